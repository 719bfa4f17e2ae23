"""Differential evolution, evosax's."""

from functools import lru_cache
from typing import Any

import jax.numpy as jnp

from evojax_merge.errors import InputError
from evojax_merge.search.strategies.cma_es import default_population
from evojax_merge.search.strategies.evosax import PopulationStrategy
from evojax_merge.search.strategies.registry import StrategySettings

# The best member, two others, and the member that their combination may replace.
MIN_POPULATION = 4
# Each member draws the others from a list of all of them: P x P numbers.
MAX_POPULATION = 4096


@lru_cache(maxsize=8)
def _algorithm(dims: int, population: int) -> Any:
    from evosax.algorithms import DifferentialEvolution

    class StrictDE(DifferentialEvolution):
        """Replaces a member only by a better one. With evosax's `<=` the population's spread is a random walk where
        everything scores the same."""

        def _tell(self, key: Any, population: Any, fitness: Any, state: Any, params: Any) -> Any:
            # The first generation becomes the population, with the candidates that failed.
            taken = (fitness < state.fitness) | (state.generation_counter == 0)
            return state.replace(
                population=jnp.where(taken[:, None], population, state.population),
                fitness=jnp.where(taken, jnp.where(jnp.isnan(fitness), jnp.inf, fitness), state.fitness),
            )

    return StrictDE(population, jnp.zeros(dims))


def de(settings: StrategySettings) -> PopulationStrategy:
    """Differential evolution (Storn and Price, 1997): best/1/bin, differences weighed by 0.5 to 1, drawn in each
    generation."""
    population = settings.population or 2 * default_population(settings.dims)
    if not MIN_POPULATION <= population <= MAX_POPULATION:
        raise InputError(settings.where, f"population: {population:,}; de takes {MIN_POPULATION} to {MAX_POPULATION:,}")
    algorithm = _algorithm(settings.dims, population)
    params = algorithm.default_params.replace(differential_weight_min=0.5, differential_weight_max=1.0)
    return PopulationStrategy("de", algorithm, params, settings.sigma)
