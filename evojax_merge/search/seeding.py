"""Seeding: a first generation that holds good merges, with any strategy (after PSO-Merging, arXiv 2508.19839)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.evaluation.scores import Scores
from evojax_merge.search import answers
from evojax_merge.search.protocols import (
    Capabilities,
    CapableStrategy,
    Space,
    State,
    Strategy,
    capabilities_of,
    context_of,
    gradient_generations,
    wants_gradients,
)


def seed_genomes(where: str, names: Sequence[str], space: Space) -> np.ndarray:
    """float32[S, D]: the genomes that `search.seeds` names, each once. Raises InputError for one the space lacks."""
    genomes = [np.zeros((0, space.dims), np.float32), *(space.seed_genomes(f"{where}: seeds", name) for name in names)]
    every = np.concatenate(genomes)
    _, kept = np.unique(every, axis=0, return_index=True)
    return every[np.sort(kept)]


def seeded(strategy: Strategy, seeds: np.ndarray) -> Strategy:
    """The strategy, with `seeds` as the first candidates of its first generation. seeds: float32[S, D], S up to P."""
    return SeededStrategy(strategy, seeds) if len(seeds) else strategy


@dataclass(frozen=True)
class SeededStrategy:
    """A strategy whose first generation is given in part: seeds replace the first genomes that the strategy draws, and
    the strategy's `tell` gets the genomes that were evaluated. An evolution strategy begins anew at a seed that is the
    best of its first generation. The state is the strategy's, and `told`, int32[]: the number of generations."""

    strategy: Strategy
    seeds: np.ndarray

    @property
    def name(self) -> str:
        return self.strategy.name

    @property
    def population(self) -> int:
        return self.strategy.population

    @property
    def capabilities(self) -> Capabilities:
        return replace(capabilities_of(self.strategy), takes_injected=False)

    def wants_gradients(self, state: Any) -> bool:
        return wants_gradients(self.strategy, state["strategy"])

    def gradient_generations(self, generations: int) -> tuple[int, int]:
        return gradient_generations(self.strategy, generations)

    def context(self, state: Any) -> Any:
        return context_of(self.strategy, state["strategy"])

    def init(self, key: jax.Array, genomes: np.ndarray) -> State:
        return {"strategy": self.strategy.init(key, np.concatenate([genomes, self.seeds])), "told": np.int32(0)}

    def ask(self, key: jax.Array, state: Any) -> tuple[jax.Array, State]:
        genomes, asked = answers.ask(self.strategy, key, state["strategy"], self.seeds.shape[1])
        if int(state["told"]) == 0:
            genomes = jnp.asarray(genomes).at[: len(self.seeds)].set(self.seeds)
        return genomes, {"strategy": asked, "told": state["told"]}

    def tell(self, key: jax.Array, state: Any, genomes: jax.Array, scores: Scores) -> State:
        inner, generation = state["strategy"], int(state["told"])
        if generation == 0 and capabilities_of(self.strategy).takes_injected:
            values = np.where(np.isfinite(scores.fitness), scores.fitness, -np.inf)
            best = int(np.argmax(values))
            if best < len(self.seeds) and np.isfinite(values[best]):
                # Genomes that were drawn around the start hold no information about the surroundings of a better seed.
                restarted = self.strategy.init(key, np.asarray(genomes)[best : best + 1])
                return {"strategy": restarted, "told": np.int32(1)}
            genomes, inner = cast(CapableStrategy, self.strategy).inject(inner, genomes, len(self.seeds))
        return {"strategy": answers.tell(self.strategy, key, inner, genomes, scores), "told": np.int32(generation + 1)}

    def finalists(self, state: Any) -> np.ndarray:
        return self.strategy.finalists(state["strategy"])

    def metrics(self, state: Any) -> dict[str, float]:
        return self.strategy.metrics(state["strategy"])
