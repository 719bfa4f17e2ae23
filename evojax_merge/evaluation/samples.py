"""A model's answers, example by example: plain rows for a file of JSON lines."""

import math
from collections.abc import Sequence
from typing import Any

from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.scores import TaskScores

# The keys of a row, whatever the task is.
KEYS = ("model", "task", "example", "score", "scores")


def sample_rows(
    model: str, batched_tasks: Sequence[BatchedTask], scores: TaskScores, p: int = 0
) -> list[dict[str, Any]]:
    """The answers of candidate `p` of the scored ones: a row for each task and example, in their order.

    `example` is the example's place in the data, `scores` its score by each metric, and `score` that by the metric of
    the task's fitness. `outputs` are the texts that were generated for it; `log_probabilities` the totals of its
    targets (or choices), in their order. `target` is the right answer in the data, and `extracted` the answer that was
    found in the outputs; None where there is none. A number that is not finite is None.
    """
    rows = []
    for batched_task in batched_tasks:
        task, requests = batched_task.task, batched_task.requests
        matrices = scores.matrices[task.name]
        lines: list[dict[str, Any]] = [{"model": model, "task": task.name, "example": None} for _ in range(task.size)]
        answers: list[tuple[str, Sequence[Any], Sequence[Any]]] = []
        if task.name in scores.outputs:
            answers.append(("outputs", requests.prompts, scores.outputs[task.name][p]))
        # The values that a user's function of the logits returns are no log-probabilities.
        if task.name in scores.log_probabilities and requests.logits_fn is None:
            totals = [_finite(total) for total in scores.log_probabilities[task.name][p]]
            answers.append(("log_probabilities", requests.scored, totals))
        for row in (*requests.prompts, *requests.scored):
            lines[row.example]["example"] = row.where
        for key, asked, given in answers:
            for row, answer in zip(asked, given, strict=True):
                lines[row.example].setdefault(key, []).append(answer)
        for n, line in enumerate(lines):
            line["target"], line["extracted"] = task.target(n), task.extracted(n, line.get("outputs", []))
            line["score"] = _finite(matrices[task.metric][p, n])
            line["scores"] = {metric: _finite(matrix[p, n]) for metric, matrix in matrices.items()}
        rows += lines
    return rows


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
