"""The greedy soup (Wortsman et al., Model soups, arXiv 2203.05482): a uniform average of some of the parents.

Parents are added one at a time, the best first; one that makes the average worse is left out. A generation scores three
parents, or decides on two: the first added, the second added without the first, and both added.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import Scores, score_matrix
from evojax_merge.search.protocols import Capabilities, GenomeEvaluator, HasAverages, Progress, Space, goal_of
from evojax_merge.search.strategies.registry import StrategySettings, begin_with


@struct.dataclass
class GreedyState:
    """fitness: float64[K], the parents', -inf for one that failed or was not scored yet; members: bool[K], the parents
    in the soup; best: float64[], the soup's fitness; generation: int32[], the number of generations."""

    fitness: np.ndarray
    members: np.ndarray
    best: np.ndarray
    generation: np.ndarray


@dataclass(frozen=True)
class Greedy:
    """space: contains the averages of its K parents."""

    space: HasAverages

    name, population = "greedy", 3

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(generations=self._scoring + self.space.parents // 2)

    @property
    def _scoring(self) -> int:
        """The number of generations that score the parents themselves."""
        return -(-self.space.parents // self.population)

    def _undecided(self, state: GreedyState) -> np.ndarray:
        """int[≤ 2]: the parents that the next generation decides on, the better one first."""
        decided = 1 + 2 * (int(state.generation) - self._scoring)
        order = np.argsort(-np.asarray(state.fitness), kind="stable")
        return order[decided : decided + 2] if decided > 0 else order[:0]

    def init(self, key: jax.Array, genomes: np.ndarray) -> GreedyState:
        nobody = np.zeros(self.space.parents, bool)
        return GreedyState(np.full(len(nobody), -np.inf), nobody, np.array(-np.inf), np.zeros((), np.int32))

    def ask(self, key: jax.Array, state: GreedyState) -> tuple[jax.Array, GreedyState]:
        each = np.eye(self.space.parents, dtype=bool)
        soups = each[int(state.generation) * self.population :][: self.population]
        if int(state.generation) >= self._scoring:
            added = each[self._undecided(state)]
            soups = np.asarray(state.members) | np.stack([*added, added.any(axis=0)])
        soups = soups[np.minimum(np.arange(self.population), len(soups) - 1)]
        return jnp.asarray(self.space.averages(self.name, soups)), state

    def tell(self, key: jax.Array, state: GreedyState, genomes: jax.Array, scores: Scores) -> GreedyState:
        values = np.where(np.isfinite(scores.fitness), scores.fitness, -np.inf)
        fitness, members, best = np.array(state.fitness), np.array(state.members), np.array(state.best)
        scored = fitness[int(state.generation) * self.population :][: self.population]
        scored[:] = values[: len(scored)]
        if int(state.generation) == self._scoring - 1:
            members[np.argmax(fitness)], best = True, fitness.max()
        candidate = 0
        for parent in self._undecided(state):
            accepted = np.isfinite(values[candidate]) and values[candidate] >= best
            if accepted:
                members[parent], best = True, values[candidate]
            # The second parent was scored with the first and without.
            candidate = 2 if accepted else 1
        return GreedyState(fitness, members, np.array(best), np.array(int(state.generation) + 1, np.int32))

    def finalists(self, state: GreedyState) -> np.ndarray:
        """The soup, once there is one."""
        members = np.asarray(state.members)[None]
        return self.space.averages(self.name, members[members.any(axis=1)])

    def metrics(self, state: GreedyState) -> dict[str, float]:
        """soup: the number of parents in the soup."""
        return {"soup": int(np.asarray(state.members).sum())}


def averages_of(where: str, space: Space | None) -> HasAverages:
    """The space, if it contains the averages of its parents. Raises InputError otherwise, and for a single parent."""
    if not isinstance(space, HasAverages) or space.parents < 2:
        raise InputError(where, "greedy averages the weights of parents; expected the merge of 2 parents or more")
    space.averages(where, np.eye(space.parents, dtype=bool))
    return space


def greedy_soup(space: HasAverages, evaluator: GenomeEvaluator, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """The greedy soup by an evaluator's scores: the parents in it, bool[K], and its genome, float32[D]."""
    strategy, key = Greedy(space), jax.random.key(0)
    state: Any = strategy.init(key, np.zeros(0))
    for _ in range(strategy.capabilities.generations or 0):
        genomes, state = strategy.ask(key, state)
        scores = evaluator.score(np.asarray(genomes), progress)
        state = strategy.tell(key, state, genomes, score_matrix(evaluator.tasks, scores, goal_of(evaluator)))
    return state.members, strategy.finalists(state)[0]


@begin_with()
def greedy(settings: StrategySettings) -> Greedy:
    """The greedy soup: parents are added to a uniform average, the best first, unless they make it worse."""
    if settings.seeds or settings.rungs > 1:
        key, why = (
            ("rungs", "averages are compared on all examples") if settings.rungs > 1 else ("seeds", "it has its own")
        )
        raise InputError(settings.where, f"{key}: the strategy greedy takes none, {why}; leave the key out")
    return Greedy(averages_of(f"{settings.where}.strategy", settings.space))
