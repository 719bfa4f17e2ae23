"""LM-MA-ES, evosax's, for genomes of thousands of dimensions."""

from functools import lru_cache
from typing import Any

import jax.numpy as jnp

from evojax_merge.search.strategies.cma_es import default_population, ordinal_weights
from evojax_merge.search.strategies.evosax import EvosaxStrategy
from evojax_merge.search.strategies.registry import StrategySettings


@lru_cache(maxsize=8)
def _algorithm(dims: int, population: int) -> Any:
    from evosax.algorithms import LM_MA_ES

    class RankedLMMAES(LM_MA_ES):
        """Updates the direction vectors by rank: evosax's algorithm weighs candidates in the order in which they were
        drawn."""

        def _tell(self, key: Any, population: Any, fitness: Any, state: Any, params: Any) -> Any:
            return super()._tell(key, population, fitness, state, params.replace(weights=fitness))

    return RankedLMMAES(population, jnp.zeros(dims), fitness_shaping_fn=ordinal_weights)


def lm_ma_es(settings: StrategySettings) -> EvosaxStrategy:
    """Limited-memory matrix adaptation (Loshchilov et al., arXiv 1705.06693): 4 + 3 ln D direction vectors in place of
    a covariance, for thousands of dimensions."""
    algorithm = _algorithm(settings.dims, settings.population or default_population(settings.dims))
    params = algorithm.default_params
    # The learning rates P / (4^i D) assume that D exceeds P.
    params = params.replace(std_init=jnp.float32(settings.sigma), c_c=jnp.minimum(params.c_c, 1.0))
    return EvosaxStrategy("lm_ma_es", algorithm, params)
