"""A genetic algorithm, on evosax's."""

from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import optax

from evojax_merge.search.strategies.cma_es import default_population
from evojax_merge.search.strategies.evosax import PopulationStrategy
from evojax_merge.search.strategies.registry import StrategySettings


@lru_cache(maxsize=8)
def _algorithm(dims: int, population: int, sigma: float) -> Any:
    from evosax.algorithms import SimpleGA

    class ElitistGA(SimpleGA):
        """Keeps the best of parents and children, and adapts the mutations' sigma by the rule of one success in five. A
        candidate that scores the median is neither a success nor a failure, so that ties leave sigma as it is."""

        def _tell(self, key: Any, population: Any, fitness: Any, state: Any, params: Any) -> Any:
            loss = jnp.where(jnp.isnan(fitness), jnp.inf, fitness)
            median = jnp.median(state.fitness)
            change = 0.8 * jnp.mean(loss < median) - 0.2 * jnp.mean(loss > median)
            all_genomes = jnp.concatenate([population, state.population])
            all_losses = jnp.concatenate([loss, state.fitness])
            best = jnp.argsort(all_losses, stable=True)[: self.population_size]
            return state.replace(
                population=all_genomes[best],
                fitness=all_losses[best],
                std=jnp.where(jnp.isfinite(median), state.std * jnp.exp(0.5 * change), state.std),
            )

    return ElitistGA(population, jnp.zeros(dims), std_schedule=optax.constant_schedule(jnp.float32(sigma)))


def ga(settings: StrategySettings) -> PopulationStrategy:
    """A genetic algorithm: uniform crossover of the better half, Gaussian mutations of adapted size, and the best of
    parents and children survive."""
    population = settings.population or 2 * default_population(settings.dims)
    algorithm = _algorithm(settings.dims, population, settings.sigma)
    params = algorithm.default_params.replace(crossover_rate=0.5)
    return PopulationStrategy("ga", algorithm, params, settings.sigma)
