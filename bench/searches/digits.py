"""Does a merge of pytrees read all digits? Two experts of an image classifier, merged by a `Study`.

python -m bench digits 3             # the family of seed 3; by default that of seed 0

A small convolutional network (Flax) sees scikit-learn's handwritten digits for a moment: the base. One copy is then
fine-tuned on the digits 0 to 4, another on 5 to 9, and each forgets the other digits. The evolved merge reads all ten.
Half a minute on two cores.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import evojax_merge as em
from evojax_merge.zoo.digit_images import HIGH, LOW, load_digit_images

BATCH = 64


class Reader(nnx.Module):
    """Images float32[N, 8, 8, 1] -> logits float32[N, 10]."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.second(nnx.relu(self.first(images))))
        return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1))))


@dataclass(frozen=True)
class Digits:
    """Images float32[N, 8, 8, 1] and their digits int32[N]."""

    images: jax.Array
    labels: jax.Array

    def __getitem__(self, rows: np.ndarray | slice) -> "Digits":
        return Digits(self.images[rows], self.labels[rows])

    def only(self, labels: range) -> "Digits":
        return self[np.isin(self.labels, labels)]


@dataclass(frozen=True)
class Plan:
    """The training steps of the base and of each expert, and the length of the search."""

    base_steps: int = 20
    expert_steps: int = 300
    generations: int = 40
    population: int = 16


@dataclass(frozen=True)
class Family:
    """The base, its two experts, and the digits that the search scores on and those that nothing has seen."""

    base: Reader
    experts: tuple[Reader, Reader]
    search: Digits
    heldout: Digits


def load_digits(seed: int) -> tuple[Digits, Digits, Digits]:
    """(for training, for the search, held out): 800, 500 and 497 images."""
    training, search, heldout = (
        Digits(jnp.asarray(part.images[..., None] / 16.0), jnp.asarray(part.labels))
        for part in load_digit_images("bench digits", seed)
    )
    return training, search, heldout


def log_probabilities(model: Reader, digits: Digits) -> jax.Array:
    """The log-probabilities float32[N] of the right digits."""
    return -optax.softmax_cross_entropy_with_integer_labels(model(digits.images), digits.labels)


def accuracy(model: Reader, digits: Digits) -> float:
    return float(jnp.mean(model(digits.images).argmax(axis=1) == digits.labels))


@partial(jax.jit, static_argnums=3)
def _train(model: Reader, images: jax.Array, labels: jax.Array, rate: float) -> Reader:
    """Adam, one step per batch: images [steps, BATCH, …]."""
    optimizer = optax.adam(rate)

    def step(carry: tuple, batch: tuple) -> tuple[tuple, None]:
        model, state = carry
        gradient = jax.grad(lambda m: -log_probabilities(m, Digits(*batch)).mean())(model)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(model, updates), state), None

    (model, _), _ = jax.lax.scan(step, (model, optimizer.init(model)), (images, labels))
    return model


def train(model: Reader, digits: Digits, steps: int, rate: float, seed: int) -> Reader:
    rows = np.random.default_rng([seed, 1]).integers(0, len(digits.labels), (steps, BATCH))
    return _train(model, digits.images[rows], digits.labels[rows], rate)


def make_family(seed: int = 0, plan: Plan = Plan()) -> Family:
    training, search, heldout = load_digits(seed)
    base = train(Reader(nnx.Rngs(seed)), training, plan.base_steps, 1e-3, seed)
    low, high = (train(base, training.only(part), plan.expert_steps, 1e-3, seed) for part in (LOW, HIGH))
    return Family(base, (low, high), search, heldout)


def uniform(family: Family) -> Reader:
    """The mean of the experts, which is also half of each one's task vector."""
    return jax.tree.map(lambda a, b: (a + b) / 2, *family.experts)


def evolve(family: Family, seed: int, plan: Plan, on_generation: Callable[[em.Generation], None]) -> em.Run:
    """Search a weight for each layer of each expert, scored by the log-probabilities of the right digits."""
    models = em.load_models(family.base, family.experts)
    space = em.MergeSpace(models, "task_arithmetic", parameters={"weight": {"low": -0.5, "high": 2.0}})

    def fitness(model: Reader) -> jax.Array:
        return log_probabilities(model, family.search).mean()

    return em.Study(models, space, fitness, population=plan.population, seed=seed).run(plan.generations, on_generation)


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    seed, plan = parser.parse_args().seed, Plan()
    family = make_family(seed, plan)
    print(f"trained the family in {time.perf_counter() - started:.0f} s")

    def tell(generation: em.Generation) -> None:
        if (generation.number + 1) % 10 == 0:
            print(f"generation {generation.number + 1}: log-probability {generation.best_so_far:.3f}")

    run = evolve(family, seed, plan, tell)
    models = {
        "base": family.base, "expert for 0 to 4": family.experts[0], "expert for 5 to 9": family.experts[1],
        "uniform merge": uniform(family), "evolved merge": run.best.merged(),
    }  # fmt: skip
    print(f"\n{'held-out accuracy':20}    all    0-4    5-9")
    for name, model in models.items():
        shares = [accuracy(model, part) for part in (family.heldout, *map(family.heldout.only, (LOW, HIGH)))]
        print(f"{name:20}{''.join(f'{share:7.1%}' for share in shares)}")
    print("\nweights of the experts by layer:")
    for name, weight in run.best.parameters.items():
        print(f"  {name:28} {weight:5.2f}")
    print(f"{len(family.heldout.labels)} held-out images; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
