"""Niches: quality-diversity over the tasks that count, each in turn the quality, after CycleQD (Kuroki et al., arXiv
2410.14735).

Each task has an archive: a grid over the means on the other tasks, whose cells hold the candidate that is best in the
task itself. MAP-Elites with two behaviours is thus the archive of one of three tasks.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.fronts import check_objectives, front_metrics, front_of, objectives_of, worst_of
from evojax_merge.search.protocols import Capabilities
from evojax_merge.search.strategies.cma_es import default_population
from evojax_merge.search.strategies.pareto import MAX_POPULATION, draw_around
from evojax_merge.search.strategies.registry import DrawingStrategy, StrategySettings, generator

# The most cells along one task's mean, and the most cells of a whole archive.
MAX_BINS, MAX_CELLS = 15, 256
# The most numbers in all archives together: 256 MB, saved with every generation.
MAX_ROOM = 2**26
# The weights of the worst and the best in a task when parents are drawn, a factor for each task (CycleQD's).
WORST_COUNTS, BEST_COUNTS = 0.5, 0.8
# The standard deviation of the factor with which the parents' difference is added to the first parent; and the standard
# deviation of the noise on each gene, in units of the search's first step.
LINE, NOISE = 0.5, 0.1


@struct.dataclass
class NichesState:
    """start: float32[D]; genomes: float32[T, C, D], the archive of each task by cell; objectives: float64[T, C, T], the
    genomes' means on the tasks, NaN where a cell is empty; reference: float64[T], the worst means of the first
    generation, above which the hypervolume is measured; told: int32[], the number of generations."""

    start: np.ndarray
    genomes: np.ndarray
    objectives: np.ndarray
    reference: np.ndarray
    told: np.int32


@dataclass(frozen=True)
class Niches(DrawingStrategy):
    """A generation's parents are drawn from the archive of the task whose turn it is; its children enter the archives
    of all tasks. Cells divide the range of the front's means; candidates below the range share the lowest cells. bins:
    the number of cells along each task's mean."""

    bins: int

    name = "niches"
    capabilities = Capabilities(keeps_front=True)

    def init(self, key: jax.Array, genomes: np.ndarray) -> NichesState:
        tasks, dims = self.settings.objectives, self.settings.dims
        cells = self.bins ** (tasks - 1)
        return NichesState(
            start=np.asarray(genomes[0], np.float32),
            genomes=np.zeros((tasks, cells, dims), np.float32),
            objectives=np.full((tasks, cells, tasks), np.nan),
            reference=np.zeros(tasks),
            told=np.int32(0),
        )

    def ask(self, key: jax.Array, state: NichesState) -> tuple[jax.Array, NichesState]:
        rng, turn = generator(key), int(state.told) % self.settings.objectives
        filled = np.isfinite(state.objectives[turn]).all(axis=1)
        if not filled.any():
            return jnp.asarray(draw_around(rng, state.start, self.population, self.settings)), state
        members, objectives = state.genomes[turn][filled].astype(np.float64), state.objectives[turn][filled]
        # CycleQD's elite sampling (equation 4): members that are better in every task are drawn more often.
        span = np.ptp(objectives, axis=0)
        share = np.divide(objectives - objectives.min(axis=0), span, out=np.ones_like(objectives), where=span > 0)
        weights = np.prod(WORST_COUNTS + (BEST_COUNTS - WORST_COUNTS) * share, axis=1)
        first, second = members[rng.choice(len(members), size=(2, self.population), p=weights / weights.sum())]
        # The directional variation of Vassiliades and Mouret (arXiv 1804.03906).
        along = LINE * rng.standard_normal((self.population, 1)) * (second - first)
        noise = NOISE * self.settings.sigma * rng.standard_normal(first.shape)
        return jnp.asarray(np.clip(first + along + noise, *self.settings.range), jnp.float32), state

    def tell(self, key: jax.Array, state: NichesState, genomes: jax.Array, scores: Scores) -> NichesState:
        new_objectives, (tasks, _, dims) = objectives_of(scores), state.genomes.shape
        every = np.concatenate([state.genomes.reshape(-1, dims), np.asarray(genomes, np.float32)])
        objectives = np.concatenate([state.objectives.reshape(-1, tasks), new_objectives])
        # Earlier members come first: among equals they stay.
        finite = np.flatnonzero(np.isfinite(objectives).all(axis=1))
        archives, means = np.zeros_like(state.genomes), np.full_like(state.objectives, np.nan)
        if len(finite):
            places = self._places(objectives[finite])
            for task in range(tasks):
                # The best candidate of each cell in the task, the first among equals.
                order = np.argsort(-objectives[finite, task], kind="stable")
                cell, first = np.unique(places[task][order], return_index=True)
                best = finite[order[first]]
                archives[task, cell], means[task, cell] = every[best], objectives[best]
        reference = worst_of(new_objectives) if int(state.told) == 0 else state.reference
        return NichesState(state.start, archives, means, reference, np.int32(state.told + 1))

    def _places(self, objectives: np.ndarray) -> np.ndarray:
        """int[T, M]: in each task's archive, the cell of each candidate float64[M, T]."""
        front = objectives[front_of(objectives)]
        low, span = front.min(axis=0), np.ptp(front, axis=0)
        share = np.divide(objectives - low, span, out=np.zeros_like(objectives), where=span > 0)
        bins = np.clip((share * self.bins).astype(int), 0, self.bins - 1)
        tasks = objectives.shape[1]
        shape = (self.bins,) * (tasks - 1)
        return np.stack([np.ravel_multi_index(np.delete(bins, task, axis=1).T, shape) for task in range(tasks)])

    def members(self, state: NichesState) -> tuple[np.ndarray, np.ndarray]:
        """The genomes in the archives, float32[M, D], and their means on the tasks, float64[M, T]."""
        objectives = state.objectives.reshape(-1, self.settings.objectives)
        filled = np.isfinite(objectives).all(axis=1)
        return state.genomes.reshape(-1, self.settings.dims)[filled], objectives[filled]

    def finalists(self, state: NichesState) -> np.ndarray:
        """The front of all archives, at most as large as a population; it contains the best in each task."""
        genomes, objectives = self.members(state)
        return np.asarray(genomes[front_of(objectives, self.population)])

    def metrics(self, state: NichesState) -> dict[str, float]:
        """The front's figures, and `filled`: the share of the cells that hold a candidate."""
        filled = float(np.isfinite(state.objectives).all(axis=2).mean())
        return {"filled": filled, **front_metrics(self.members(state)[1], state.reference)}


def niches(settings: StrategySettings) -> Niches:
    """Quality-diversity as in CycleQD (arXiv 2410.14735): for each task that counts the best candidates on a grid over
    the means on the others, tasks taking turns at giving the parents."""
    where, dims, tasks = settings.where, settings.dims, settings.objectives
    check_objectives(where, "niches", tasks)
    bins = max(bins for bins in range(1, MAX_BINS + 1) if bins ** (tasks - 1) <= MAX_CELLS)
    if bins < 2:
        raise InputError(
            f"{where}.strategy", f"niches: has {tasks} objectives here, and a grid of them over {MAX_CELLS} cells; "
            "expected 9 tasks at most whose weight is above 0, or pareto",
        )  # fmt: skip
    room = tasks * bins ** (tasks - 1) * dims
    if room > MAX_ROOM:
        raise InputError(
            f"{where}.strategy", f"niches: its archives would hold {room:,} numbers in {dims:,} dimensions; expected "
            f"{MAX_ROOM:,} at most: let tensors share their parameters, or take pareto",
        )  # fmt: skip
    population = settings.population or 2 * default_population(dims)
    if population > MAX_POPULATION:
        raise InputError(where, f"population: {population:,}; niches takes {MAX_POPULATION:,} at most")
    return Niches(settings, population, bins)
