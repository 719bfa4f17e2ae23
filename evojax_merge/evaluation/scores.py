"""Scores: the results of tasks on a population's answers, and the matrix that a search works with.

Letters: P candidates, N examples, T tasks. Higher is better, everywhere. A candidate whose scores are not finite has
failed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from evojax_merge.tasks.task import ScoredTask

T = TypeVar("T", bound=ScoredTask)

# The fitness of a candidate that breaks a guard by hardly anything. Every broken one lies between this and its double,
# below all that keep their guards, and as far apart in float32 as other fitness is.
BROKEN = -1e30
# The part of a score by which it may differ where it is computed in other pieces.
ROUNDING = 1e-5


@dataclass(frozen=True)
class TaskScores:
    """Per task: metric -> float32[P, N]; for tasks that generate the P lists of outputs; for tasks that score rows
    these rows' total log-probabilities float32[P, S]."""

    matrices: dict[str, dict[str, np.ndarray]]
    outputs: dict[str, list[list[str]]] = field(default_factory=dict)
    log_probabilities: dict[str, np.ndarray] = field(default_factory=dict)

    def candidates(self, numbers: Sequence[int]) -> "TaskScores":
        """The scores of some of the candidates."""
        rows = list(numbers)
        return TaskScores(
            {task: {metric: values[rows] for metric, values in metrics.items()}
             for task, metrics in self.matrices.items()},
            {task: [texts[p] for p in rows] for task, texts in self.outputs.items()},
            {task: totals[rows] for task, totals in self.log_probabilities.items()},
        )  # fmt: skip


# A model of the held-out table: its role, its name, its row in the scores of some models, and these scores.
ScoredModel = tuple[str, str, int, TaskScores]


def joined(parts: Sequence[TaskScores]) -> TaskScores:
    """The scores of consecutive populations as those of one."""
    first = parts[0]
    return TaskScores(
        {
            task: {metric: np.concatenate([part.matrices[task][metric] for part in parts]) for metric in metrics}
            for task, metrics in first.matrices.items()
        },
        {task: [texts for part in parts for texts in part.outputs[task]] for task in first.outputs},
        {task: np.concatenate([part.log_probabilities[task] for part in parts]) for task in first.log_probabilities},
    )


@dataclass(frozen=True, repr=False)
class Scores:
    """A population's score matrix, which a strategy receives.

    values: float32[P, N], each candidate's score on each example, NaN where it was not evaluated; evaluated: bool[P,
    N]; task_of: int[N], the task of each example; tasks: the T tasks' names; weights: float64[T], the share of each in
    the fitness, together 1, over the unit in which it is measured (see `Goal`); predicted: float64[P], the fitness that
    candidates are compared by, on all examples where some were left out, NaN for a candidate that failed; None: fitness
    is the weighted mean over the evaluated examples. gradients: float32[P, D], the derivatives of the candidates'
    fitness with respect to their genomes, where the strategy wants them.
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

    def __repr__(self) -> str:
        (candidates, examples), values = self.values.shape, self.fitness
        best = int(np.nanargmax(values)) if np.isfinite(values).any() else None
        shown = np.array2string(values, precision=4, separator=", ", threshold=16, max_line_width=1000)
        return (
            f"Scores(candidates={candidates}, examples={examples}, tasks={list(self.tasks)}, fitness={shown}, "
            f"best_candidate={best})"
        )


@dataclass(frozen=True)
class Scale:
    """The measure of a task: a mean counts as its distance from `zero`, in units of `unit`, which is above 0."""

    zero: float
    unit: float


@dataclass(frozen=True)
class Guard:
    """The constraint on a task: a candidate's mean is not below the base's by more than `tolerance`."""

    base: float
    tolerance: float

    @property
    def least(self) -> float:
        """The least mean that keeps the guard; the base itself keeps it, in whatever pieces it is computed."""
        return self.base - self.tolerance - ROUNDING * max(1.0, abs(self.base))


@dataclass(frozen=True)
class Goal:
    """The fitness beyond the tasks' weights. scales: by `task/metric`, a score without one counts as it is; guards: by
    the task's name."""

    scales: Mapping[str, Scale] = field(default_factory=dict)
    guards: Mapping[str, Guard] = field(default_factory=dict)

    def scale(self, task: ScoredTask) -> Scale:
        return self.scales.get(f"{task.name}/{task.metric}", UNSCALED)

    def offset(self, tasks: Sequence[ScoredTask]) -> float:
        """The part of the fitness that no candidate changes: the weighted sum of means less this is the fitness."""
        return sum(weight * self.scale(task).zero for task, weight in task_weights(tasks, self))


UNSCALED = Scale(0.0, 1.0)
PLAIN = Goal()


def task_weights(tasks: Sequence[T], goal: Goal = PLAIN) -> list[tuple[T, float]]:
    """The tasks that the fitness is made of, and the share of each over its unit; shares are together 1. Tasks of
    weight 0 take no part, unless there are no others: then all have the same share."""
    weights = [task.weight for task in tasks] if any(task.weight for task in tasks) else [1.0] * len(tasks)
    return [
        (task, weight / sum(weights) / goal.scale(task).unit)
        for task, weight in zip(tasks, weights, strict=True)
        if weight > 0
    ]


def fitness(tasks: Sequence[ScoredTask], scores: TaskScores, goal: Goal = PLAIN) -> np.ndarray:
    """float64[P]: the weighted mean over tasks of the mean over examples of each task's metric, as the goal's scales
    measure it; NaN where a score is not finite."""
    rows = [weight * _mean(task, scores) for task, weight in task_weights(tasks, goal)]
    summed = np.sum(rows, axis=0) - goal.offset(tasks)
    return np.where(np.isfinite(summed), summed, np.nan)


def ranked_fitness(tasks: Sequence[ScoredTask], scores: TaskScores, goal: Goal = PLAIN) -> np.ndarray:
    """float64[P]: the fitness that candidates are compared by. One that keeps the guards is better than one that breaks
    any; of two that do, the one that breaks them less (Deb, An efficient constraint handling method for genetic
    algorithms, 2000)."""
    values = fitness(tasks, scores, goal)
    if not goal.guards:
        return values
    # By how much each candidate breaks the guards, in the units of the scales.
    broken = np.zeros(len(values))
    for task in tasks:
        if task.name in goal.guards:
            broken += np.maximum(0.0, goal.guards[task.name].least - _mean(task, scores)) / goal.scale(task).unit
    return np.where(np.isfinite(values) & (broken > 0), BROKEN * (1 + broken / (1 + broken)), values)


def number_or_none(value: Any) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


def without_broken(values: np.ndarray) -> np.ndarray:
    """Fitness that candidates are compared by, NaN where a guard is broken."""
    return np.where(values <= BROKEN, np.nan, values)


def _mean(task: ScoredTask, scores: TaskScores) -> np.ndarray:
    mean: np.ndarray = scores.matrices[task.name][task.metric].mean(axis=1, dtype=np.float64)
    return mean


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


def units_of(tasks: Sequence[ScoredTask], scores: TaskScores, goal: Goal = PLAIN) -> dict[str, str]:
    """The unit of each score `task/metric` that has one, and of `fitness`: that of the only task that counts, or how it
    is made of several."""
    units = {f"{task.name}/{metric}": _unit(task, metric) for task in tasks for metric in scores.matrices[task.name]}
    (first, _), *others = task_weights(tasks, goal)
    mean = "weighted mean of scaled tasks" if goal.scales else "weighted mean of the tasks" if others else None
    units["fitness"] = mean or units.get(f"{first.name}/{first.metric}")
    return {score: unit for score, unit in units.items() if unit}


def have_one_unit(tasks: Sequence[ScoredTask]) -> bool:
    """Return whether no two tasks that the fitness is made of have scores in different units. A metric without a unit
    differs from none."""
    return len({_unit(task, task.metric) for task, _ in task_weights(tasks)} - {None}) < 2


def _unit(task: ScoredTask, metric: str) -> str | None:
    unit: str | None = getattr(task, "units", {}).get(metric.partition(",")[0])
    return unit


def score_matrix(tasks: Sequence[ScoredTask], scores: TaskScores, goal: Goal = PLAIN) -> Scores:
    """The score matrix of candidates that were evaluated on every example."""
    weighted = task_weights(tasks, goal)
    values = [scores.matrices[task.name][task.metric] for task, _ in weighted]
    matrix = np.concatenate(values, axis=1)
    return Scores(
        values=matrix,
        evaluated=np.ones(matrix.shape, bool),
        task_of=np.repeat(np.arange(len(values)), [value.shape[1] for value in values]),
        tasks=tuple(task.name for task, _ in weighted),
        weights=np.array([weight for _, weight in weighted]),
        predicted=ranked_fitness(tasks, scores, goal),
    )
