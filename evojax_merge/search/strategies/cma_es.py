"""CMA-ES and its relatives for more dimensions, evosax's, with recombination weights that ties do not shrink."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.search.strategies.evosax import EvosaxStrategy
from evojax_merge.search.strategies.registry import StrategySettings

# A full covariance costs an eigendecomposition of D x D each generation; beyond this size it would dominate a
# generation's time.
MAX_FULL_DIMS = 512


def default_population(dims: int) -> int:
    """CMA-ES' default: 4 + floor(3 ln D)."""
    return 4 + int(3 * np.log(max(dims, 1)))


def check_full_covariance(name: str, settings: StrategySettings) -> None:
    """Raises InputError for more dimensions than a full covariance takes."""
    if settings.dims > MAX_FULL_DIMS:
        raise InputError(
            settings.where, f"strategy: {name} takes {MAX_FULL_DIMS} dimensions at most, and the search has "
            f"{settings.dims:,}; choose sep_cma_es or lm_ma_es",
        )  # fmt: skip


def ordinal_weights(population: jax.Array, fitness: jax.Array, state: Any, params: Any) -> jax.Array:
    """Recombination weights by ordinal rank; candidates that are not finite come last.

    Averaged ranks of ties would make the weights sum to less than 1 and let sigma collapse where many candidates score
    the same, which is common for accuracy.
    """
    order = jnp.argsort(jnp.where(jnp.isfinite(fitness), fitness, jnp.inf), stable=True)
    return params.weights[jnp.argsort(order)]


@lru_cache(maxsize=16)
def cma_algorithm(kind: str, dims: int, population: int) -> Any:
    """evosax's algorithm, cached because JAX compiles every new instance anew."""
    from evosax import algorithms

    return getattr(algorithms, kind)(population, jnp.zeros(dims), fitness_shaping_fn=ordinal_weights)


@lru_cache(maxsize=16)
def cma_params(kind: str, dims: int, population: int) -> Any:
    """evosax's parameters, cached because evosax computes them in fifty small operations at each call."""
    return cma_algorithm(kind, dims, population).default_params


def _strategy(name: str, kind: str, settings: StrategySettings) -> EvosaxStrategy:
    size = settings.dims, settings.population or default_population(settings.dims)
    params = cma_params(kind, *size).replace(std_init=jnp.float32(settings.sigma))
    return EvosaxStrategy(name, cma_algorithm(kind, *size), params)


def cma_es(settings: StrategySettings) -> EvosaxStrategy:
    """CMA-ES (Hansen, arXiv 1604.00772); its separable form beyond 512 dimensions."""
    return _strategy("cma_es", "CMA_ES", settings) if settings.dims <= MAX_FULL_DIMS else sep_cma_es(settings)


def sep_cma_es(settings: StrategySettings) -> EvosaxStrategy:
    """Separable CMA-ES (Ros and Hansen, 2008): a variance for each gene, and no covariances."""
    return _strategy("sep_cma_es", "Sep_CMA_ES", settings)


@lru_cache(maxsize=8)
def _lm_algorithm(dims: int, population: int) -> Any:
    from evosax.algorithms import LM_MA_ES

    class RankedLMMAES(LM_MA_ES):
        """Updates the direction vectors by rank: evosax's algorithm weighs candidates in the order of drawing."""

        def _tell(self, key: Any, population: Any, fitness: Any, state: Any, params: Any) -> Any:
            return super()._tell(key, population, fitness, state, params.replace(weights=fitness))

    return RankedLMMAES(population, jnp.zeros(dims), fitness_shaping_fn=ordinal_weights)


def lm_ma_es(settings: StrategySettings) -> EvosaxStrategy:
    """Limited-memory matrix adaptation (Loshchilov et al., arXiv 1705.06693): 4 + 3 ln D direction vectors in place of
    a covariance, for thousands of dimensions."""
    algorithm = _lm_algorithm(settings.dims, settings.population or default_population(settings.dims))
    params = algorithm.default_params
    # The learning rates P / (4^i D) assume that D exceeds P.
    params = params.replace(std_init=jnp.float32(settings.sigma), c_c=jnp.minimum(params.c_c, 1.0))
    return EvosaxStrategy("lm_ma_es", algorithm, params)
