"""Pareto fronts: the comparison of candidates in a search for several objectives at once.

Every objective is maximised. One candidate *dominates* another where it is worse in no objective and better in one; the
front consists of the candidates that no other dominates. A candidate with an objective that is NaN has failed: all
others dominate it. Letters: P candidates, T objectives.
"""

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import Scores

# The time to compute the hypervolume is exponential in the objectives.
MAX_HYPERVOLUME_OBJECTIVES = 3


def check_objectives(where: str, name: str, objectives: int) -> None:
    """Raises InputError where a search has too few objectives for the strategy `name`."""
    if objectives < 2:
        raise InputError(
            f"{where}.strategy",
            f"{name}: has one objective here; expected two tasks or more whose weight is above 0, or another strategy, "
            "such as cma_es",
        )


def objectives_of(scores: Scores) -> np.ndarray:
    """float64[P, T]: each candidate's mean on each task that counts; NaN on all tasks for a candidate that failed."""
    return np.where(np.isfinite(scores.fitness)[:, None], scores.task_means, np.nan)


def nondominated_ranks(objectives: np.ndarray) -> np.ndarray:
    """int[P]: 0 for the front of float64[P, T], 1 for the front of the others, and so forth (fast non-dominated
    sorting: Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II, 2002)."""
    failed = np.isnan(objectives).any(axis=1)
    values = np.where(failed[:, None], -np.inf, objectives)
    no_worse = np.ones((len(values), len(values)), bool)
    for column in values.T:
        no_worse &= column[:, None] >= column
    dominates = no_worse & ~no_worse.T
    dominated_by = dominates.sum(axis=0)
    ranks, left, rank = np.zeros(len(values), int), np.ones(len(values), bool), 0
    while left.any():
        front = left & (dominated_by == 0)
        ranks[front], left[front] = rank, False
        dominated_by -= dominates[front].sum(axis=0)
        rank += 1
    return ranks


def crowding_distances(objectives: np.ndarray) -> np.ndarray:
    """float64[F]: how far apart the neighbours of each point of a front float64[F, T] are: the sum over objectives of
    the distance from the next smaller to the next larger one, in units of the front's range (Deb et al., 2002);
    infinite for the ends."""
    if len(objectives) <= 2:
        return np.full(len(objectives), np.inf)
    distances = np.zeros(len(objectives))
    for values in objectives.T:
        order = np.argsort(values, kind="stable")
        steps = np.diff(values[order])
        if steps.sum() > 0:
            between = np.concatenate([[np.inf], steps[:-1] + steps[1:], [np.inf]])
            distances[order] += between / (values[order[-1]] - values[order[0]])
    return distances


def crowded_order(objectives: np.ndarray) -> np.ndarray:
    """int[P]: the order of the candidates float64[P, T] by NSGA-II's crowded comparison, best first: by rank, within a
    rank by crowding distance, and among equals the earlier first."""
    ranks, room = nondominated_ranks(objectives), np.zeros(len(objectives))
    finite = np.isfinite(objectives).all(axis=1)
    for rank in np.unique(ranks[finite]):
        front = finite & (ranks == rank)
        room[front] = crowding_distances(objectives[front])
    return np.lexsort((-room, ranks))


def front_of(objectives: np.ndarray, limit: int | None = None) -> np.ndarray:
    """int[F]: the candidates float64[P, T] on the front, ascending; only the first of candidates with the same
    objectives, and at most `limit`, those with the largest crowding distances."""
    finite = np.flatnonzero(np.isfinite(objectives).all(axis=1))
    _, first = np.unique(objectives[finite], axis=0, return_index=True)
    distinct = finite[np.sort(first)]
    front = distinct[nondominated_ranks(objectives[distinct]) == 0]
    room = crowding_distances(objectives[front])
    return front[np.sort(np.argsort(-room, kind="stable")[:limit])]


def hypervolume(objectives: np.ndarray, reference: np.ndarray) -> float:
    """The volume of what the candidates float64[P, T] dominate above the point `reference`, float64[T] (Zitzler and
    Thiele, 1998), summed up in slices along one objective after the other. Its time is exponential in T."""
    return _volume((objectives - reference)[(objectives > reference).all(axis=1)])


def _volume(points: np.ndarray) -> float:
    """The volume of the union of the boxes from 0 to each point of float64[F, T], which is above 0; T is 2 or more."""
    points = points[np.argsort(-points[:, -1], kind="stable")]
    heights = points[:, -1] - np.append(points[1:, -1], 0.0)
    if points.shape[1] == 2:
        return float(heights @ np.maximum.accumulate(points[:, 0]))
    return float(sum(height * _volume(points[: i + 1, :-1]) for i, height in enumerate(heights) if height > 0))


def front_metrics(objectives: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The figures for the history of the kept candidates float64[P, T]. front: the size of the front; hypervolume: the
    hypervolume above `reference`, with up to three objectives."""
    front = front_of(objectives)
    figures: dict[str, float] = {"front": len(front)}
    if len(reference) <= MAX_HYPERVOLUME_OBJECTIVES:
        figures["hypervolume"] = hypervolume(objectives[front], reference)
    return figures


def worst_of(objectives: np.ndarray) -> np.ndarray:
    """float64[T]: the least value of each objective of float64[P, T] among the candidates that did not fail, or 0."""
    finite = objectives[np.isfinite(objectives).all(axis=1)]
    return finite.min(axis=0) if len(finite) else np.zeros(objectives.shape[1])
