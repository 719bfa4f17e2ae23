"""Any algorithm of evosax as a strategy.

Here, and only here, fitness changes its sign: evosax minimises.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.evaluation.scores import Scores


@dataclass(frozen=True)
class EvosaxStrategy:
    """A distribution-based algorithm of evosax (one whose state has a mean) with its parameters."""

    name: str
    algorithm: Any
    params: Any

    @property
    def population(self) -> int:
        return int(self.algorithm.population_size)

    def init(self, key: jax.Array, genomes: np.ndarray) -> Any:
        return self.algorithm.init(key, jnp.asarray(genomes[0]), self.params)

    def ask(self, key: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        genomes, state = self.algorithm.ask(key, state, self.params)
        return genomes, state

    def tell(self, key: jax.Array, state: Any, genomes: jax.Array, scores: Scores) -> Any:
        fitness = jnp.asarray(scores.fitness)
        loss = jnp.where(jnp.isfinite(fitness), -jnp.asarray(fitness, jnp.float32), jnp.nan)
        state, _ = self.algorithm.tell(key, genomes, loss, state, self.params)
        return state

    def finalists(self, state: Any) -> np.ndarray:
        """The mean of the distribution."""
        return np.asarray(state.mean, np.float32)[None]

    def metrics(self, state: Any) -> dict[str, float]:
        """sigma: the standard deviation of a step in units of the bounds' range, where the algorithm has one."""
        return {"sigma": float(np.mean(state.std))} if hasattr(state, "std") else {}
