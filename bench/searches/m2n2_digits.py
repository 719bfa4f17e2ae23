"""M2N2's published experiment on scikit-learn's digits: two experts, and networks from scratch (15 minutes).

    python -m bench m2n2-digits
    python -m bench m2n2-digits --seeds 1 --evaluations 2000 --from experts

The network has 64 inputs, 256 hidden units and 10 outputs: 19,210 weights. The first 80% of the 1,797 images are
searched on, the others held out; pixels go from 0 to 16. Experts have 10 steps of Adam on the digits 0 to 4, and on 5
to 9, from different random weights. From experts every method may evaluate 10,000 networks, from scratch 50,000.

- `pool`: this program's strategy: complementary pairs, competition for images, ten children of a generation;
- `M2N2`, `GA`, `MAP-Elites`: written from the paper (arXiv 2508.16204), one child at a time. M2N2 keeps 20 networks;
  GA is M2N2 without competition and attraction; MAP-Elites has a cell for each tenth of the accuracies on odd and on
  even digits;
- `brute force`: SLERP of the experts at as many places;
- `cma_es`: this program's search of a weight for each expert and array, by a `Study`;
- `sep_cma_es`: this program's strategy over all 19,210 weights, from scratch.

From scratch a child's weights are mutated by noise of 0.01. All children are SLERPs with a split point anywhere among
the weights. Printed are held-out accuracies of the network that is best on the images searched, medians (and quartiles)
over seeds; a seed changes the search alone.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from merge_kernels import METHODS, merge_tensor

import evojax_merge as em
from bench.searches.m2n2 import ARCHIVE, Correct, shown
from bench.searches.strategy_functions import scores_of
from bench.shared.machine import describe
from bench.shared.plain_search import PlainSearch, one_split
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.schema.genealogy import Member, founding_genealogy
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import INIT_KEY, evolve, generation_key
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.search.strategies.registry import PoolSettings, StrategySettings, make_strategy
from evojax_merge.spaces.breeding import BreedingSpace, genome_genes

PIXELS, HIDDEN, DIGITS = 64, 256, 10
# The arrays of a network in the order in which they stand in its vector of weights.
SHAPES = {"w1": (PIXELS, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, DIGITS), "b2": (DIGITS,)}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
SPREAD = 0.01  # of random weights, and of mutations
CHILDREN = 10
CELLS = 11  # of MAP-Elites, for each of two accuracies in tenths


class Images(NamedTuple):
    """float32[N, PIXELS] and the digits int32[N]."""

    pixels: jax.Array
    labels: jax.Array


@cache
def load_images() -> tuple[Images, Images]:
    """The images to search on, and those that are held out."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    count = int(0.8 * len(labels))
    everything = Images(jnp.asarray(pixels, jnp.float32), jnp.asarray(labels, jnp.int32))
    return Images(*(part[:count] for part in everything)), Images(*(part[count:] for part in everything))


def arrays_of(weights: Any) -> dict[str, Any]:
    """A network's arrays by their names, from its weights float32[SIZE]."""
    arrays, start = {}, 0
    for name, shape in SHAPES.items():
        arrays[name] = weights[start : start + int(np.prod(shape))].reshape(shape)
        start += int(np.prod(shape))
    return arrays


def logits(network: dict[str, Any], pixels: jax.Array) -> jax.Array:
    """float32[N, DIGITS]."""
    return jax.nn.relu(pixels @ network["w1"] + network["b1"]) @ network["w2"] + network["b2"]


def right(weights: jax.Array, images: Images) -> jax.Array:
    """bool[N]: which digits a network float32[SIZE] reads right."""
    return logits(arrays_of(weights), images.pixels).argmax(axis=1) == images.labels


rights = jax.jit(lambda networks, images: jax.lax.map(lambda weights: right(weights, images), networks))


def random_network(key: jax.Array) -> jax.Array:
    return SPREAD * jax.random.normal(key, (SIZE,))


@jax.jit
def train(weights: jax.Array, images: Images) -> jax.Array:
    """Ten steps of Adam on all images at once."""
    optimizer = optax.adam(3e-3)

    def loss(weights: jax.Array) -> jax.Array:
        answers = logits(arrays_of(weights), images.pixels)
        return optax.softmax_cross_entropy_with_integer_labels(answers, images.labels).mean()

    state = optimizer.init(weights)
    for _ in range(10):
        updates, state = optimizer.update(jax.grad(loss)(weights), state)
        weights = optax.apply_updates(weights, updates)
    return weights


@cache
def make_experts() -> jax.Array:
    """float32[2, SIZE]: networks that have seen the digits 0 to 4, and 5 to 9. Their seed is the published one."""
    images, _ = load_images()
    experts = []
    for key, is_low in zip(jax.random.split(jax.random.PRNGKey(42)), (True, False), strict=True):
        rows = np.flatnonzero((np.asarray(images.labels) < DIGITS // 2) == is_low)
        experts.append(train(random_network(key), Images(images.pixels[rows], images.labels[rows])))
    return jnp.stack(experts)


def best_of(networks: jax.Array) -> float:
    """The held-out accuracy of the network, of float32[P, SIZE], that reads most of the images searched right."""
    images, heldout = load_images()
    best = int(np.asarray(rights(networks, images)).mean(axis=1).argmax())
    return float(right(networks[best], heldout).mean())


# ---------------------------------------------------------------------------------------------------------------
# One child at a time, from the paper


def slerp_with_split(first: jax.Array, second: jax.Array, share: jax.Array, place: jax.Array | int) -> jax.Array:
    """SLERP between whole networks, by `share` before the place and by 1 - `share` behind."""
    t = jnp.where(jnp.arange(SIZE) < place, share, 1 - share)
    cosine = first @ second / (jnp.linalg.norm(first) * jnp.linalg.norm(second))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    sine = jnp.sin(angle)
    merged = (jnp.sin((1 - t) * angle) * first + jnp.sin(t * angle) * second) / sine
    return jnp.where(sine > 1e-6, merged, (1 - t) * first + t * second)


@dataclass(frozen=True)
class Breeding:
    """Children of two networks of an archive, one at a time. niches: whether networks share what they read right, and
    the second parent is drawn by what it adds to the first (M2N2; else GA); mutates: whether noise is added."""

    niches: bool
    mutates: bool

    def start(self, networks: jax.Array) -> Any:
        """The archive: networks float32[ARCHIVE, SIZE] and which images each reads right, none for a free place."""
        images, _ = load_images()
        free = ARCHIVE - len(networks)
        return (
            jnp.concatenate([networks, jnp.zeros((free, SIZE))]),
            jnp.concatenate([rights(networks, images), jnp.zeros((free, len(images.labels)), bool)]),
        )

    def worth(self, correct: jax.Array) -> jax.Array:
        """float32[A, N]: each network's share of each image."""
        readers = correct.sum(axis=0) if self.niches else jnp.ones(correct.shape[1])
        return correct / jnp.where(readers > 0, readers, 1)

    def parents(self, key: jax.Array, archive: Any) -> tuple[jax.Array, jax.Array]:
        networks, correct = archive
        keys, shares = jax.random.split(key), self.worth(correct)
        fitness = shares.sum(axis=1)
        first = jax.random.choice(keys[0], ARCHIVE, p=fitness / fitness.sum())
        if self.niches:
            gains = jnp.maximum(shares - shares[first], 0).sum(axis=1)
            fitness = jnp.where(gains.sum() > 0, gains, fitness)
        second = jax.random.choice(keys[1], ARCHIVE, p=fitness / fitness.sum())
        return networks[first], networks[second]

    def with_child(self, archive: Any, child: jax.Array, correct: jax.Array) -> Any:
        """The archive without whoever is worth least."""
        everyone = jnp.concatenate([archive[1], correct[None]])
        worst = self.worth(everyone).sum(axis=1).argmin()
        # A child that is worth least takes no place.
        places = jnp.arange(ARCHIVE)[:, None] == worst
        return jnp.where(places, child, archive[0]), jnp.where(places, correct, archive[1])

    def members(self, archive: Any) -> jax.Array:
        return archive[0]


@dataclass(frozen=True)
class MapElites:
    """The best network for each cell of accuracies on odd and on even digits, in tenths."""

    mutates: bool
    niches = False

    def start(self, networks: jax.Array) -> Any:
        images, _ = load_images()
        archive = jnp.zeros((CELLS * CELLS, SIZE)), jnp.zeros(CELLS * CELLS)
        for network, correct in zip(networks, rights(networks, images), strict=True):
            archive = self.with_child(archive, network, correct)
        return archive

    def parents(self, key: jax.Array, archive: Any) -> tuple[jax.Array, jax.Array]:
        networks, fitness = archive
        first, second = jax.random.choice(key, CELLS * CELLS, (2,), p=fitness / fitness.sum())
        return networks[first], networks[second]

    def with_child(self, archive: Any, child: jax.Array, correct: jax.Array) -> Any:
        odd = load_images()[0].labels % 2 == 1
        tenths = [(10 * (correct * part).sum() / part.sum()).astype(int) for part in (odd, ~odd)]
        cell, fitness = CELLS * tenths[0] + tenths[1], correct.mean()
        place = (jnp.arange(CELLS * CELLS) == cell) & (fitness > archive[1][cell])
        return jnp.where(place[:, None], child, archive[0]), jnp.where(place, fitness, archive[1])

    def members(self, archive: Any) -> jax.Array:
        return archive[0]


@partial(jax.jit, static_argnums=(0, 3))
def breed(method: Breeding | MapElites, archive: Any, key: jax.Array, children: int) -> Any:
    """The archive after so many children."""
    images, _ = load_images()

    def step(archive: Any, key: jax.Array) -> tuple[Any, None]:
        keys = jax.random.split(key, 4)
        first, second = method.parents(keys[0], archive)
        place = jax.random.randint(keys[1], (), 0, SIZE)
        child = slerp_with_split(first, second, jax.random.uniform(keys[2]), place)
        if method.mutates:
            child = child + random_network(keys[3])
        return method.with_child(archive, child, right(child, images)), None

    return jax.lax.scan(step, archive, jax.random.split(key, children))[0]


def bred(method: Breeding | MapElites, networks: jax.Array, evaluations: int, seed: int) -> float:
    archive = breed(method, method.start(networks), jax.random.key(seed), evaluations - len(networks))
    return best_of(method.members(archive))


# ---------------------------------------------------------------------------------------------------------------
# By this program


@dataclass(frozen=True, eq=False)
class NetworkEvaluator:
    """Scores members of a pool of networks."""

    founders: np.ndarray
    images: Images

    @property
    def tasks(self) -> list[Correct]:
        return [Correct(len(self.images.labels))]

    def passes(self, population: int) -> int:
        return population

    def evaluate(self, members: Sequence[Member], progress: Any = None) -> TaskScores:
        networks = np.stack([self.network(member) for member in members])
        return TaskScores({"digits": {"accuracy": np.asarray(rights(networks, self.images), np.float32)}})

    @lru_cache(maxsize=256)  # noqa: B019
    def network(self, member: Member) -> np.ndarray:
        """A member's weights, float32[SIZE]; its parents change places at its split."""
        if member.is_founder:
            return self.founders[member.number]
        first, second = (self.network(parent) for parent in member.parents)
        method = METHODS[member.method]

        def merged(*sources: np.ndarray) -> np.ndarray:
            return merge_tensor(method, method.options, sources, member.parameters, _no_noise, np.dtype(np.float32))

        return np.concatenate([merged(first, second)[: member.split], merged(second, first)[member.split :]])


def _no_noise(k: int) -> np.ndarray:
    raise AssertionError("SLERP draws nothing")


def run_pool(networks: jax.Array, evaluations: int, seed: int) -> float:
    methods = (METHODS["slerp"],)
    space = BreedingSpace(methods, SIZE, True, founding_genealogy(len(networks), genome_genes(methods, split=True)))
    pool = PoolSettings(len(networks), len(methods), ARCHIVE, "complementary", "competition")
    config = SearchConfig(strategy="pool", population=CHILDREN, generations=evaluations // CHILDREN)
    settings = StrategySettings(space.dims, config.population, config.sigma, config.generations, pool=pool)
    evaluator = NetworkEvaluator(np.asarray(networks), load_images()[0])
    strategy = make_strategy("m2n2_digits", "pool", settings)
    on = one_split(SpaceEvaluator(space, evaluator))
    archive = evolve(PlainSearch(config, seed, strategy, space), on, Storage(), Reporter())
    context = archive.context
    best = (space if context is None else space.within(context)).member(np.asarray(archive.genomes[0]))
    return best_of(jnp.asarray(evaluator.network(best))[None])


def run_cma_es(networks: jax.Array, evaluations: int, seed: int) -> float:
    images, heldout = load_images()
    # By the keys of the arrays: each has weights of its own.
    models = em.load_models(None, [arrays_of(np.asarray(network)) for network in networks])
    space = em.MergeSpace(models, "linear", normalize=False, parameters={"weight": {"low": 0.0, "high": 1.5}})

    def fitness(arrays: Any) -> jax.Array:
        return (logits(arrays, images.pixels).argmax(axis=1) == images.labels).mean()

    study = em.Study(models, space, fitness, population=ARCHIVE, seed=seed)
    merged = study.run(evaluations // ARCHIVE).best.merged()
    return float((logits(merged, heldout.pixels).argmax(axis=1) == heldout.labels).mean())


def run_sep_cma_es(networks: jax.Array, evaluations: int, seed: int) -> float:
    """From the first network; no matter how many there are."""
    images, _ = load_images()
    generations = evaluations // ARCHIVE
    settings = StrategySettings(SIZE, ARCHIVE, SPREAD, generations, lambda unit: np.asarray(unit) - 0.5)
    strategy = make_strategy("m2n2_digits", "sep_cma_es", settings)
    state = strategy.init(generation_key(seed, INIT_KEY), np.asarray(networks[:1]))
    best, best_fitness = networks[0], -1.0
    for generation in range(generations):
        key = generation_key(seed, generation)
        genomes, state = strategy.ask(key, state)
        fitness = np.asarray(rights(jnp.asarray(genomes), images)).mean(axis=1)
        if fitness.max() > best_fitness:
            best, best_fitness = jnp.asarray(genomes[int(fitness.argmax())]), float(fitness.max())
        state = strategy.tell(key, state, genomes, scores_of(fitness))
    return best_of(best[None])


def brute_force(networks: jax.Array, evaluations: int, seed: int) -> float:
    first, second = networks
    shares = jnp.linspace(0, 1, evaluations)
    accuracies = jax.lax.map(
        lambda share: right(slerp_with_split(first, second, share, SIZE), load_images()[0]).mean(), shares
    )
    return best_of(slerp_with_split(first, second, shares[accuracies.argmax()], SIZE)[None])


Run = Callable[[jax.Array, int, int], float]


def bred_by(method: Breeding | MapElites) -> Run:
    return lambda networks, evaluations, seed: bred(method, networks, evaluations, seed)


FROM_EXPERTS: dict[str, Run] = {
    "pool": run_pool,
    "M2N2": bred_by(Breeding(niches=True, mutates=False)),
    "MAP-Elites": bred_by(MapElites(mutates=False)),
    "brute force": brute_force,
    "GA": bred_by(Breeding(niches=False, mutates=False)),
    "cma_es": run_cma_es,
}
FROM_SCRATCH: dict[str, Run] = {
    "M2N2": bred_by(Breeding(niches=True, mutates=True)),
    "GA": bred_by(Breeding(niches=False, mutates=True)),
    "sep_cma_es": run_sep_cma_es,
}


def starts(begin: str, seed: int) -> jax.Array:
    """float32[2, SIZE]: the two networks that a search begins with."""
    if begin == "experts":
        return make_experts()
    return jnp.stack([random_network(key) for key in jax.random.split(jax.random.key(seed))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, help="default: 10,000 from experts, 50,000 from scratch")
    parser.add_argument("--from", dest="begin", choices=["experts", "scratch"], help="default: one after the other")
    parser.add_argument("--methods", nargs="+", help="the names of some of the methods")
    arguments = parser.parse_args()
    print(describe())
    accuracies = [f"{float(right(expert, load_images()[1]).mean()):.1%}" for expert in make_experts()]
    print(f"{SIZE:,} weights; held-out accuracy of the experts: {', '.join(accuracies)}", flush=True)
    for begin, methods, published in (("experts", FROM_EXPERTS, 10_000), ("scratch", FROM_SCRATCH, 50_000)):
        if arguments.begin not in (None, begin):
            continue
        evaluations = arguments.evaluations or published
        print(f"\n| from {begin}, {evaluations:,} evaluations | held out | a seed |\n| --- | ---: | ---: |")
        for name, run in methods.items():
            if arguments.methods is not None and name not in arguments.methods:
                continue
            started = time.perf_counter()
            values = [run(starts(begin, seed), evaluations, seed) for seed in range(arguments.seeds)]
            seconds = (time.perf_counter() - started) / arguments.seeds
            print(f"| {name} | {shown(values)} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
