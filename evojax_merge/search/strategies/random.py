"""Random search: the baseline of every other strategy."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.strategies.cma_es import default_population
from evojax_merge.search.strategies.registry import DrawingStrategy, StrategySettings


@struct.dataclass
class RandomState:
    """start: float32[D], the first candidate; generation: int32[], the number of generations."""

    start: jax.Array
    generation: jax.Array


@dataclass(frozen=True)
class RandomSearch(DrawingStrategy):
    """Draws candidates without learning from scores."""

    name = "random"

    def init(self, key: jax.Array, genomes: np.ndarray) -> RandomState:
        return RandomState(jnp.asarray(genomes[0]), jnp.int32(0))

    def ask(self, key: jax.Array, state: RandomState) -> tuple[jax.Array, RandomState]:
        unit = jax.random.uniform(key, (self.population, self.settings.dims))
        genomes = jnp.asarray(self.settings.from_unit(np.asarray(unit)), jnp.float32)
        return genomes.at[0].set(jnp.where(state.generation == 0, state.start, genomes[0])), state

    def tell(self, key: jax.Array, state: RandomState, genomes: jax.Array, scores: Scores) -> RandomState:
        return RandomState(state.start, state.generation + 1)


def random(settings: StrategySettings) -> RandomSearch:
    """Random search: the start, then values drawn uniformly between the bounds."""
    return RandomSearch(settings, settings.population or default_population(settings.dims))
