"""Any algorithm of evosax as a strategy.

Fitness changes its sign in this module alone: evosax minimises.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.errors import InputError, shown
from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.protocols import Capabilities

# The least standard deviation of a step, in units of the bounds' range. Genomes of float32 differ by more; without it a
# search that has converged ends in steps of 0 / 0.
LEAST_STD = 1e-12


def losses(scores: Scores) -> np.ndarray:
    """float32[P]: minus the fitness, NaN for candidates that failed."""
    with np.errstate(over="ignore"):
        fitness = np.asarray(scores.fitness, np.float32)
    return np.where(np.isfinite(fitness), -fitness, np.float32(np.nan))


def strongly_typed(state: Any) -> Any:
    """The first state with the types of all later states. A Python number in evosax's initial state is weakly typed, so
    that JAX would compile ask and tell a second time in the second generation."""

    def strong(leaf: Any) -> Any:
        return jax.device_put(np.asarray(leaf)) if getattr(leaf, "weak_type", False) else leaf

    return jax.tree.map(strong, state)


@dataclass(frozen=True)
class _Algorithm:
    """An algorithm of evosax with its parameters."""

    name: str
    algorithm: Any
    params: Any

    @property
    def population(self) -> int:
        return int(self.algorithm.population_size)

    def tell(self, key: jax.Array, state: Any, genomes: jax.Array, scores: Scores) -> Any:
        state, _ = self.algorithm.tell(key, genomes, losses(scores), state, self.params)
        return state


def inject_steps(state: Any, genomes: jax.Array, count: int) -> tuple[jax.Array, Any]:
    """The genomes and the state to `tell` where the first `count` genomes of the first generation were not drawn.

    genomes: float32[P, D]. Their steps from the mean, in units of sigma (the first distribution is isotropic), are
    shortened to a length that a drawn step hardly exceeds: sqrt(D) + 2 D / (D + 2) (Hansen, Injecting external
    solutions into CMA-ES, arXiv 1110.4181). The path and covariance would take a far genome for a large step that
    selection preferred. Where the state holds the normal numbers of the genomes (`z`), the injected genomes' numbers
    replace the drawn ones.
    """
    if not hasattr(state, "std"):
        return genomes, state
    dims = genomes.shape[1]
    steps = (genomes[:count] - state.mean) / state.std
    length = jnp.linalg.norm(steps, axis=1, keepdims=True)
    steps = steps * jnp.minimum(1.0, (dims**0.5 + 2 * dims / (dims + 2)) / jnp.maximum(length, 1e-12))
    genomes = jnp.asarray(genomes).at[:count].set(state.mean + state.std * steps)
    if hasattr(state, "z"):
        state = state.replace(z=state.z.at[:count].set(steps))
    return genomes, state


@dataclass(frozen=True)
class EvosaxStrategy(_Algorithm):
    """A distribution-based algorithm of evosax (one whose state has a mean) with its parameters. Raises InputError for
    an algorithm that is population-based."""

    capabilities = Capabilities(takes_injected=True)
    inject = staticmethod(inject_steps)

    def __post_init__(self) -> None:
        from evosax.algorithms.base import EvolutionaryAlgorithm
        from evosax.algorithms.population_based.base import PopulationBasedAlgorithm

        if not isinstance(self.algorithm, EvolutionaryAlgorithm):
            raise InputError(
                f"strategy {shown(self.name)}", f"algorithm: {shown(self.algorithm)}; expected an algorithm of evosax"
            )
        if isinstance(self.algorithm, PopulationBasedAlgorithm):
            kind = type(self.algorithm).__name__
            raise InputError(
                f"strategy {self.name}", f"evosax's {kind} keeps a population; wrap it in PopulationStrategy"
            )

    def init(self, key: jax.Array, genomes: np.ndarray) -> Any:
        return strongly_typed(self.algorithm.init(key, jnp.asarray(genomes[0]), self.params))

    def ask(self, key: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        genomes, state = self.algorithm.ask(key, state, self.params)
        return genomes, state

    def tell(self, key: jax.Array, state: Any, genomes: jax.Array, scores: Scores) -> Any:
        state = super().tell(key, state, genomes, scores)
        return state.replace(std=jnp.maximum(state.std, LEAST_STD)) if hasattr(state, "std") else state

    def finalists(self, state: Any) -> np.ndarray:
        """The mean of the distribution."""
        return np.asarray(state.mean, np.float32)[None]

    def metrics(self, state: Any) -> dict[str, float]:
        """sigma: the standard deviation of a step in units of the bounds' range, where the algorithm has one."""
        return {"sigma": float(np.mean(np.asarray(state.std)))} if hasattr(state, "std") else {}


@dataclass(frozen=True)
class PopulationStrategy(_Algorithm):
    """A population-based algorithm of evosax with its parameters. The first generation is the initial population: the
    start, and genomes drawn around it with standard deviation `sigma`."""

    sigma: float

    def init(self, key: jax.Array, genomes: np.ndarray) -> Any:
        start, noise = jnp.asarray(genomes[0]), jax.random.normal(key, (self.population, genomes.shape[1]))
        drawn = (start + self.sigma * noise).at[0].set(start)
        fitness = jnp.full(self.population, jnp.inf)
        return strongly_typed(self.algorithm.init(key, drawn, fitness, self.params))

    def ask(self, key: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        return _ask(self.algorithm, key, state, self.params)

    def finalists(self, state: Any) -> np.ndarray:
        """The mean of the population."""
        return np.asarray(state.population, np.float32).mean(axis=0)[None]

    def metrics(self, state: Any) -> dict[str, float]:
        """spread: the standard deviation of the population's genes; sigma: that of a mutation, if it has one."""
        spread = {"spread": float(np.std(state.population, axis=0).mean())}
        return spread | ({"sigma": float(np.mean(state.std))} if hasattr(state, "std") else {})


@partial(jax.jit, static_argnums=0)
def _ask(algorithm: Any, key: jax.Array, state: Any, params: Any) -> tuple[jax.Array, Any]:
    return jax.lax.cond(
        state.generation_counter == 0,
        lambda state: (state.population, state),
        lambda state: algorithm.ask(key, state, params),
        state,
    )
