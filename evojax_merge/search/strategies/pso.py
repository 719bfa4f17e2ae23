"""Particle swarm optimisation, evosax's."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.search.strategies.cma_es import default_population
from evojax_merge.search.strategies.evosax import PopulationStrategy
from evojax_merge.search.strategies.registry import StrategySettings


@lru_cache(maxsize=8)
def _algorithm(dims: int, population: int) -> Any:
    from evosax.algorithms import PSO

    class StandardPSO(PSO):
        """Draws random numbers for each gene (with evosax's single number a swarm stays in the plane that its first
        places and velocities span), and changes a particle's best only where it became better (if ties counted, all
        particles would be drawn to the first one where everything scores the same)."""

        def _ask(self, key: Any, state: Any, params: Any) -> Any:
            cognitive, social = jax.random.uniform(key, (2, *state.population.shape))
            best = state.population_best[jnp.argmin(state.fitness_best)]
            velocity = (
                params.inertia_coeff * state.velocity
                + params.cognitive_coeff * cognitive * (state.population_best - state.population)
                + params.social_coeff * social * (best - state.population)
            )
            return state.population + velocity, state.replace(velocity=velocity)

        def _tell(self, key: Any, population: Any, fitness: Any, state: Any, params: Any) -> Any:
            better = fitness < state.fitness_best
            # The first generation sets the places, also of particles that failed.
            taken = better | (state.generation_counter == 0)
            return state.replace(
                population=population,
                fitness=fitness,
                population_best=jnp.where(taken[:, None], population, state.population_best),
                fitness_best=jnp.where(better, fitness, state.fitness_best),
            )

    return StandardPSO(population, jnp.zeros(dims))


def pso(settings: StrategySettings) -> PopulationStrategy:
    """Particle swarm optimisation (Kennedy and Eberhart, 1995), with Clerc and Kennedy's constriction (2002)."""
    algorithm = _algorithm(settings.dims, settings.population or 2 * default_population(settings.dims))
    # With evosax's coefficients, 0.75, 1.5 and 2, the variance of a particle's place grows without bound.
    params = algorithm.default_params.replace(inertia_coeff=0.7298, cognitive_coeff=1.49618, social_coeff=1.49618)
    return PopulationStrategy("pso", algorithm, params, settings.sigma)
