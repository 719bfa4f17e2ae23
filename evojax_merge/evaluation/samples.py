"""A model's answers, example by example: plain rows for a file of JSON lines."""

from collections.abc import Sequence
from typing import Any

from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.scores import ScoredTask, TaskScores, number_or_none

# The keys of a row, whatever the task is.
KEYS = ("model", "task", "example", "score", "scores")


def sample_rows(
    model: str, batched_tasks: Sequence[BatchedTask], scores: TaskScores, p: int = 0
) -> list[dict[str, Any]]:
    """The answers of candidate `p` of the scored ones: a row for each task and example, in their order.

    `example` is the example's place in the data, `scores` its score by each metric, and `score` that by the metric of
    the task's fitness. `outputs` are the texts that were generated for it; `log_probabilities` the totals of its
    targets (or choices), in their order. `prompt` is the question and `target` the right answer in the data, and
    `extracted` the answer that was found in the outputs; None where there is none. A number that is not finite is None.
    """
    rows = []
    for batched_task in batched_tasks:
        task, requests = batched_task.task, batched_task.requests
        lines = score_rows(model, task, [None] * task.size, scores, p)
        answers: list[tuple[str, Sequence[Any], Sequence[Any]]] = []
        if task.name in scores.outputs:
            answers.append(("outputs", requests.prompts, scores.outputs[task.name][p]))
        # The values that a user's function of the logits returns are no log-probabilities.
        if task.name in scores.log_probabilities and requests.logits_fn is None:
            totals = [number_or_none(total) for total in scores.log_probabilities[task.name][p]]
            answers.append(("log_probabilities", requests.scored, totals))
        for row in (*requests.prompts, *requests.scored):
            lines[row.example]["example"] = row.where
        for key, asked, given in answers:
            for row, answer in zip(asked, given, strict=True):
                lines[row.example].setdefault(key, []).append(answer)
        for n, line in enumerate(lines):
            line["prompt"], line["target"] = task.prompt(n), task.target(n)
            line["extracted"] = task.extracted(n, line.get("outputs", []))
        rows += lines
    return rows


def score_rows(
    model: str, task: ScoredTask, examples: Sequence[Any], scores: TaskScores, p: int = 0
) -> list[dict[str, Any]]:
    """The scores of candidate `p` on a task, a row for each example. examples: each one's place in the data, or its
    number there."""
    matrices = scores.matrices[task.name]
    return [
        {
            "model": model,
            "task": task.name,
            "example": example,
            "score": number_or_none(matrices[task.metric][p, n]),
            "scores": {metric: number_or_none(matrix[p, n]) for metric, matrix in matrices.items()},
        }
        for n, example in enumerate(examples)
    ]
