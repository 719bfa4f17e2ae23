"""The whole grid of one or two parameters."""

from dataclasses import dataclass
from math import isqrt

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.strategies.registry import DrawingStrategy, StrategySettings, begin_with

# The default number of values of a parameter: 0, 0.1, ... 1 of its range.
VALUES = 11
# The least distance of neighbouring values, in units of the range.
MIN_STEP = 1e-4


@struct.dataclass
class GridState:
    """The grid of the next generation, in units of the range: low and high, float32[D] each; best, float32[D], the
    best point so far, and its fitness."""

    low: jax.Array
    high: jax.Array
    best: jax.Array
    fitness: jax.Array


@dataclass(frozen=True)
class Grid(DrawingStrategy):
    """values: the number of values of each parameter."""

    values: int

    name = "grid"

    def init(self, key: jax.Array, genomes: np.ndarray) -> GridState:
        dims = self.settings.dims
        return GridState(jnp.zeros(dims), jnp.ones(dims), jnp.full(dims, 0.5, jnp.float32), jnp.float32(-jnp.inf))

    def points(self, state: GridState) -> np.ndarray:
        """float64[P, D]: the grid's points, the last parameter's values fastest."""
        columns = np.linspace(np.asarray(state.low, np.float64), np.asarray(state.high, np.float64), self.values).T
        return np.stack(np.meshgrid(*columns, indexing="ij"), axis=-1).reshape(-1, self.settings.dims)

    def ask(self, key: jax.Array, state: GridState) -> tuple[jax.Array, GridState]:
        return jnp.asarray(self.settings.from_unit(self.points(state)), jnp.float32), state

    def tell(self, key: jax.Array, state: GridState, genomes: jax.Array, scores: Scores) -> GridState:
        """End a generation. The next grid lies between the best point's neighbours, unless all scores are equal."""
        finite = scores.fitness[np.isfinite(scores.fitness)]
        if not finite.size or finite.min() == finite.max():
            return state
        fitness = np.where(np.isfinite(scores.fitness), scores.fitness, -np.inf)
        first = int(np.argmax(fitness))
        better = fitness[first] > float(state.fitness)
        best = self.points(state)[first] if better else np.asarray(state.best, np.float64)
        step = (np.asarray(state.high, np.float64) - np.asarray(state.low)) / (self.values - 1)
        step = np.maximum(step, MIN_STEP * (self.values - 1) / 2)
        return GridState(
            jnp.asarray(np.maximum(best - step, 0.0), jnp.float32),
            jnp.asarray(np.minimum(best + step, 1.0), jnp.float32),
            jnp.asarray(best, jnp.float32),
            jnp.float32(fitness[first]) if better else state.fitness,
        )

    def metrics(self, state: GridState) -> dict[str, float]:
        """step: the distance of neighbouring values in the next grid, in units of the range."""
        return {"step": float(np.max(state.high - state.low)) / (self.values - 1)}


@begin_with()
def grid(settings: StrategySettings) -> Grid:
    """The whole grid of one or two parameters in each generation: first from bound to bound, then between the
    neighbours of the best point."""
    where, dims, population = settings.where, settings.dims, settings.population
    if dims > 2:
        raise InputError(
            where, f"strategy: grid takes one or two dimensions, and the search has {dims:,}; let tensors share their "
            "parameters, or choose cma_es",
        )  # fmt: skip
    if settings.seeds:
        raise InputError(where, "seeds: grid takes none, it covers the bounds; leave them out, or choose cma_es")
    if population is None:
        return Grid(settings, VALUES**dims, VALUES)
    values = population if dims == 1 else isqrt(population)
    if values**dims != population or values < 3:
        raise InputError(
            where, f"population: {population}; a grid of two dimensions takes a square number from 9 on, such as "
            f"{max(values, 3) ** 2}" if dims == 2 else f"population: {population}; a grid takes 3 or more",
        )  # fmt: skip
    return Grid(settings, population, values)
