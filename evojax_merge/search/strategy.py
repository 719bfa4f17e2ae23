"""The strategy: ask for a population of genomes, tell it their fitness.

Here, and only here, fitness changes its sign: evosax minimises.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A full covariance costs an eigendecomposition of D x D each generation; beyond this it would be what one waits for.
MAX_FULL_DIMS = 512


def default_population(dims: int) -> int:
    """CMA-ES' default: 4 + floor(3 ln D)."""
    return 4 + int(3 * np.log(max(dims, 1)))


def ordinal_weights(population: jax.Array, fitness: jax.Array, state: Any, params: Any) -> jax.Array:
    """Recombination weights by ordinal rank; candidates that are not finite come last.

    Averaged ranks of ties would make the weights sum to less than 1 and let sigma collapse where many candidates
    score the same, as they do on accuracy.
    """
    order = jnp.argsort(jnp.where(jnp.isfinite(fitness), fitness, jnp.inf), stable=True)
    return params.weights[jnp.argsort(order)]


@dataclass(frozen=True)
class Strategy:
    """An evosax strategy with its parameters, and the seed that all its randomness comes from."""

    name: str
    algorithm: Any
    params: Any
    seed: int

    def init(self, start: np.ndarray) -> Any:
        """The state before the first generation, centred on the genome `start`."""
        return self.algorithm.init(self._key(2**31 - 1), jnp.asarray(start), self.params)

    def ask(self, state: Any, generation: int) -> tuple[jax.Array, Any]:
        """genomes float32[P, D]; the same for the same state and generation."""
        return self.algorithm.ask(self._key(generation), state, self.params)

    def tell(self, state: Any, generation: int, genomes: jax.Array, fitness: np.ndarray) -> Any:
        """fitness: float[P], higher is better, NaN where a candidate failed."""
        loss = jnp.where(jnp.isfinite(jnp.asarray(fitness)), -jnp.asarray(fitness, jnp.float32), jnp.nan)
        state, _ = self.algorithm.tell(self._key(generation), genomes, loss, state, self.params)
        return state

    def _key(self, generation: int) -> jax.Array:
        # Of a seed JAX takes the lower 32 bits alone.
        key, high = jax.random.key(self.seed % 2**32), self.seed // 2**32
        return jax.random.fold_in(jax.random.fold_in(key, high) if high else key, generation)


@lru_cache(maxsize=8)
def _algorithm(dims: int, population: int) -> tuple[str, Any]:
    """Kept, because every new instance is compiled anew."""
    from evosax.algorithms import CMA_ES, Sep_CMA_ES

    name, kind = ("CMA_ES", CMA_ES) if dims <= MAX_FULL_DIMS else ("Sep_CMA_ES", Sep_CMA_ES)
    return name, kind(population, jnp.zeros(dims), fitness_shaping_fn=ordinal_weights)


def make_strategy(dims: int, population: int, sigma: float, seed: int) -> Strategy:
    """CMA-ES, or its separable form where D is beyond `MAX_FULL_DIMS`."""
    name, algorithm = _algorithm(dims, population)
    return Strategy(name, algorithm, algorithm.default_params.replace(std_init=jnp.float32(sigma)), seed)
