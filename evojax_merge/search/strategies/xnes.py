"""Exponential natural evolution strategy. evosax's version takes the exponential of each entry, and so has no
covariances."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.protocols import Capabilities
from evojax_merge.search.strategies.cma_es import check_full_covariance, default_population
from evojax_merge.search.strategies.evosax import inject_steps, losses
from evojax_merge.search.strategies.registry import DrawingStrategy, StrategySettings


@struct.dataclass
class NaturalState:
    """The distribution: mean float32[D], std float32[], shape float32[D, D] (of determinant 1); a genome is
    mean + std * shape @ z. z: float32[P, D], the generation's normal numbers."""

    mean: jax.Array
    std: jax.Array
    shape: jax.Array
    z: jax.Array


@dataclass(frozen=True)
class XNES(DrawingStrategy):
    """xNES with its usual learning rates and utilities."""

    name = "xnes"
    capabilities = Capabilities(takes_injected=True)
    inject = staticmethod(inject_steps)

    def init(self, key: jax.Array, genomes: np.ndarray) -> NaturalState:
        return NaturalState(
            mean=jnp.asarray(genomes[0]),
            std=jnp.float32(self.settings.sigma),
            shape=jnp.eye(self.settings.dims),
            z=jnp.zeros((self.population, self.settings.dims)),
        )

    def ask(self, key: jax.Array, state: NaturalState) -> tuple[jax.Array, NaturalState]:
        return _draw(key, state)

    def tell(self, key: jax.Array, state: NaturalState, genomes: jax.Array, scores: Scores) -> NaturalState:
        return _update(state, losses(scores))

    def finalists(self, state: NaturalState) -> np.ndarray:
        """The mean of the distribution."""
        return np.asarray(state.mean, np.float32)[None]

    def metrics(self, state: NaturalState) -> dict[str, float]:
        return {"sigma": float(state.std)}


@jax.jit
def _draw(key: jax.Array, state: NaturalState) -> tuple[jax.Array, NaturalState]:
    z = jax.random.normal(key, state.z.shape)
    return state.mean + state.std * z @ state.shape.T, state.replace(z=z)  # type: ignore[attr-defined]


@jax.jit
def _update(state: NaturalState, loss: jax.Array) -> NaturalState:
    """The natural gradient's step (Glasmachers et al., GECCO 2010, algorithm 2). Ties rank as drawn, failures last."""
    population, dims = state.z.shape
    z = state.z[jnp.argsort(jnp.where(jnp.isnan(loss), jnp.inf, loss), stable=True)]
    utilities = jnp.maximum(0.0, np.log(population / 2 + 1) - jnp.log(jnp.arange(1, population + 1)))
    utilities = utilities / utilities.sum() - 1 / population
    rate = (9 + 3 * np.log(dims)) / (5 * dims * np.sqrt(dims))
    # The utilities sum to 0: no identity to subtract.
    gradient = jnp.einsum("p,pi,pj->ij", utilities, z, z)
    by_size = jnp.trace(gradient) / dims
    values, vectors = jnp.linalg.eigh(gradient - by_size * jnp.eye(dims))
    step = (vectors * jnp.exp(rate / 2 * values)) @ vectors.T
    return state.replace(  # type: ignore[attr-defined]
        mean=state.mean + state.std * state.shape @ (utilities @ z),
        std=state.std * jnp.exp(rate / 2 * by_size),
        shape=state.shape @ step,
    )


def xnes(settings: StrategySettings) -> XNES:
    """Exponential natural evolution strategy (Glasmachers et al., 2010): follows the natural gradient of the expected
    fitness, with a full covariance; up to 512 dimensions."""
    check_full_covariance("xnes", settings)
    return XNES(settings, settings.population or default_population(settings.dims))
