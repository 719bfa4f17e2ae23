"""Scores: the results of tasks on a population's answers, and the matrix that a search works with.

Letters: P candidates, N examples, T tasks. Higher is better, everywhere. A candidate whose scores are not finite has
failed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from evojax_merge.tasks.task import ScoredTask

T = TypeVar("T", bound=ScoredTask)


@dataclass(frozen=True)
class TaskScores:
    """Per task: metric -> float32[P, N]; for tasks that generate the P lists of outputs; for tasks that score rows
    these rows' total log-probabilities float32[P, S]."""

    matrices: dict[str, dict[str, np.ndarray]]
    outputs: dict[str, list[list[str]]] = field(default_factory=dict)
    log_probabilities: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """A population's score matrix, which a strategy receives.

    values: float32[P, N], each candidate's score on each example, NaN where it was not evaluated; evaluated: bool[P,
    N]; task_of: int[N], the task of each example; tasks: the T tasks' names; weights: float64[T], the share of each in
    the fitness, together 1; predicted: float64[P], the fitness on all examples where some were left out, NaN for a
    candidate that failed; None: fitness is the mean over the evaluated examples. gradients: float32[P, D], the
    derivatives of the candidates' fitness with respect to their genomes, where the strategy wants them.
    """

    values: np.ndarray
    evaluated: np.ndarray
    task_of: np.ndarray
    tasks: tuple[str, ...]
    weights: np.ndarray
    predicted: np.ndarray | None = None
    gradients: np.ndarray | None = None

    @property
    def task_means(self) -> np.ndarray:
        """float64[P, T]: each candidate's mean on the examples of each task that it was evaluated on."""
        means = np.full((len(self.values), len(self.tasks)), np.nan)
        for t in range(len(self.tasks)):
            columns = np.flatnonzero(self.task_of == t)
            # A product with the mask would be NaN for examples that were not evaluated.
            counted = np.take(self.evaluated, columns, axis=1)
            values = np.where(counted, np.take(self.values, columns, axis=1), 0)
            counts = counted.sum(axis=1)
            summed = values.sum(axis=1, dtype=np.float64)
            means[:, t] = np.divide(summed, counts, out=means[:, t], where=counts > 0)
        return means

    @property
    def fitness(self) -> np.ndarray:
        """float64[P]: the predicted fitness, else the weighted mean over tasks of the mean over examples; NaN for a
        candidate that failed."""
        if self.predicted is not None:
            return self.predicted
        summed = self.task_means @ self.weights
        return np.where(np.isfinite(summed), summed, np.nan)


def task_weights(tasks: Sequence[T]) -> list[tuple[T, float]]:
    """The tasks that the fitness is made of, and the share of each; together 1. Tasks of weight 0 take no part, unless
    there are no others: then all have the same share."""
    weights = [task.weight for task in tasks] if any(task.weight for task in tasks) else [1.0] * len(tasks)
    return [(task, weight / sum(weights)) for task, weight in zip(tasks, weights, strict=True) if weight > 0]


def fitness(tasks: Sequence[ScoredTask], scores: TaskScores) -> np.ndarray:
    """float64[P]: the weighted mean over tasks of the mean over examples of each task's metric; NaN where a
    score is not finite."""
    rows = [
        share * scores.matrices[task.name][task.metric].mean(axis=1, dtype=np.float64)
        for task, share in task_weights(tasks)
    ]
    summed = np.sum(rows, axis=0)
    return np.where(np.isfinite(summed), summed, np.nan)


def means(tasks: Sequence[ScoredTask], scores: TaskScores) -> list[dict[str, float]]:
    """Per candidate: `task/metric` -> mean over examples."""
    first = scores.matrices[tasks[0].name][tasks[0].metric]
    return [
        {
            f"{task.name}/{metric}": float(matrix[p].mean(dtype=np.float64))
            for task in tasks
            for metric, matrix in scores.matrices[task.name].items()
        }
        for p in range(first.shape[0])
    ]


def score_matrix(tasks: Sequence[ScoredTask], scores: TaskScores) -> Scores:
    """The score matrix of candidates that were evaluated on every example."""
    weighted = task_weights(tasks)
    values = [scores.matrices[task.name][task.metric] for task, _ in weighted]
    matrix = np.concatenate(values, axis=1)
    return Scores(
        values=matrix,
        evaluated=np.ones(matrix.shape, bool),
        task_of=np.repeat(np.arange(len(values)), [value.shape[1] for value in values]),
        tasks=tuple(task.name for task, _ in weighted),
        weights=np.array([share for _, share in weighted]),
    )
