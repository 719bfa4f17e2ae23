"""Gradient ascent on the fitness, by any optimiser of optax, from several starts side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.config.search_config import GradientConfig
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.protocols import Capabilities
from evojax_merge.search.strategies.registry import StrategySettings, begin_with

# The optimisers of optax that need a learning rate alone, and whose state is arrays of numbers.
OPTIMIZERS = (
    "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad", "fromage",
    "lamb", "lars", "lion", "novograd", "radam", "rmsprop", "sgd", "sign_sgd", "signum", "yogi",
)  # fmt: skip


@struct.dataclass
class GradientState:
    """genomes: float32[P, D], the starts' current points; optimizer: optax's state, with a leading axis P; norms:
    float32[P], the norms of the last gradients; steps: int32[], the number of steps."""

    genomes: jax.Array
    optimizer: Any
    norms: jax.Array
    steps: jax.Array


@dataclass(frozen=True)
class GradientStrategy:
    """Each of P starts follows its own gradient. `schedule`: the step's number -> the learning rate; `sigma`: the
    standard deviation with which the other starts are drawn around the first.

    Genes may leave the bounds: the decoder mirrors them there, and a step that overshoots comes back. Clipped genes
    would stay at a bound until the optimiser's momentum turns.
    """

    name: str
    population: int
    optimizer: Any
    schedule: Callable[[Any], Any]
    sigma: float

    capabilities = Capabilities(differentiates="fitness")

    def wants_gradients(self, state: GradientState) -> bool:
        return True

    def gradient_generations(self, generations: int) -> tuple[int, int]:
        return generations, self.population

    def init(self, key: jax.Array, genomes: np.ndarray) -> GradientState:
        start, noise = jnp.asarray(genomes[0]), jax.random.normal(key, (self.population, genomes.shape[1]))
        drawn = (start + self.sigma * noise).at[0].set(start)
        return GradientState(
            drawn, jax.vmap(self.optimizer.init)(drawn), jnp.zeros(self.population, jnp.float32), jnp.int32(0)
        )

    def ask(self, key: jax.Array, state: GradientState) -> tuple[jax.Array, GradientState]:
        return state.genomes, state

    def tell(self, key: jax.Array, state: GradientState, genomes: jax.Array, scores: Scores) -> GradientState:
        assert scores.gradients is not None
        gradients = jnp.asarray(scores.gradients)
        return _step(self.optimizer, self.sigma, key, state, genomes, scores.fitness, gradients)

    def finalists(self, state: GradientState) -> np.ndarray:
        """The points after the last step, which no generation has evaluated."""
        return np.asarray(state.genomes, np.float32)

    def metrics(self, state: GradientState) -> dict[str, float]:
        """gradient_norm: the mean over the starts; learning_rate: the learning rate of the last step."""
        return {
            "gradient_norm": float(jnp.mean(state.norms)),
            "learning_rate": float(self.schedule(jnp.maximum(state.steps - 1, 0))),
        }


@partial(jax.jit, static_argnums=0)
def _step(
    optimizer: Any, sigma: float, key: jax.Array, state: GradientState, genomes: jax.Array,
    fitness: Any, gradients: jax.Array,
) -> GradientState:  # fmt: skip
    """One ascent of every start. One whose fitness or gradient is not finite continues near the best start."""
    fine = jnp.isfinite(gradients).all(axis=1) & jnp.isfinite(fitness)
    ascent = jnp.where(fine[:, None], gradients, 0.0)
    # optax minimises.
    updates, moved = jax.vmap(optimizer.update)(-ascent, state.optimizer, genomes)
    best = genomes[jnp.argmax(jnp.where(fine, fitness, -jnp.inf))]
    beside = best + sigma * jax.random.normal(key, genomes.shape)
    return GradientState(
        genomes=jnp.where(fine[:, None], genomes + updates, beside),
        optimizer=moved,
        norms=jnp.linalg.norm(ascent, axis=1),
        steps=state.steps + 1,
    )


# Each seed would be one more start to follow.
@begin_with()
def gradient(settings: StrategySettings) -> GradientStrategy:
    """Gradient ascent through the merge (Adam, or any optimiser of optax), each candidate a start of its own."""
    optimizer, schedule = make_optimizer(settings.where, settings.gradient, settings.generations)
    # Seeds are starts.
    starts = settings.population or max(1, settings.seeds)
    return GradientStrategy("gradient", starts, optimizer, schedule, settings.sigma)


def make_optimizer(where: str, config: GradientConfig, steps: int) -> tuple[Any, Callable[[Any], Any]]:
    """optax's optimiser of a config, and its learning rates. Raises InputError for one that is not in OPTIMIZERS."""
    import optax

    schedule = (
        optax.cosine_decay_schedule(config.learning_rate, steps)
        if config.schedule == "cosine"
        else optax.constant_schedule(config.learning_rate)
    )
    if config.optimizer not in OPTIMIZERS:
        raise InputError(
            f"{where}.gradient.optimizer",
            f"no optimizer {config.optimizer!r}{did_you_mean(config.optimizer, OPTIMIZERS)}; expected one of "
            f"{', '.join(OPTIMIZERS)}",
        )
    return getattr(optax, config.optimizer)(schedule), schedule
