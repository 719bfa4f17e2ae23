"""Responses of a population to a task's rows: entered as passes end, reduced to scores and their derivatives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evojax_merge.errors import Failed, shown
from evojax_merge.evaluation.devices import on_host
from evojax_merge.tasks.batches import ScoringBatch
from evojax_merge.tasks.task import Responses, Task


def arrays_of(batch: ScoringBatch) -> dict[str, np.ndarray]:
    """The batch's arrays, by name, as arguments of a compiled pass."""
    return vars(batch) | {"rows": batch.rows.astype(np.int32)}


def enter(responses: Responses, rows: np.ndarray, batch: ScoringBatch, results: Sequence[Any]) -> None:
    """Enter the first two results of a pass for the candidates `rows` and a batch: totals, and whether they are greedy,
    each [>= len(rows), R]."""
    real = batch.rows >= 0
    for matrix, values in ((responses.totals, results[0]), (responses.greedy, results[1])):
        matrix[np.ix_(rows, batch.rows[real])] = on_host(values)[: len(rows), real]


def score_task(task: Task, responses: Responses, nonfinite: np.ndarray) -> dict[str, np.ndarray]:
    """Metric -> float32[P, N]; NaN for candidates whose responses are not finite. nonfinite: bool[P], the candidates
    whose generation had logits that are not finite. Raises Failed where the task's scores are of another form."""
    failed = nonfinite | ~np.isfinite(responses.totals).all(axis=1)
    scores: Any = task.score(responses)
    if not isinstance(scores, Mapping) or task.metric not in scores:
        raise Failed(f"task {task.name}: score returned {shown(scores)}; expected arrays by metric, {task.metric} too")
    for metric, matrix in scores.items():
        shape = (len(failed), task.size)
        if np.shape(matrix) != shape or np.asarray(matrix).dtype.kind not in "fiub":
            what = f"an array of shape {list(np.shape(matrix))}" if isinstance(matrix, np.ndarray) else shown(matrix)
            raise Failed(f"task {task.name}: score returned {what} as {metric}; expected numbers {list(shape)}")
    return {metric: np.where(failed[:, None], np.nan, matrix).astype(np.float32) for metric, matrix in scores.items()}


def score_gradients(task: Task, responses: Responses, weight: float) -> np.ndarray:
    """float32[P, S]: the derivative of `weight` times the mean of a task's scores with respect to its rows' totals."""
    return task.score_gradient(responses) * (weight / task.size)
