"""Warnings about the scores of a population: problems of a task."""

from collections.abc import Sequence

import numpy as np

from evojax_merge.errors import shown
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.tasks.task import Task


def warnings(tasks: Sequence[Task], scores: TaskScores) -> list[str]:
    """One line for each task that finds no answer in any output, or on which all candidates score the same."""
    lines = []
    for task in tasks:
        outputs = scores.outputs.get(task.name, [])
        texts = [text for row in outputs for text in row]
        if texts and (wanted := task.extraction_failure(texts)) is not None:
            lines.append(f"warning: task {task.name}: 0 of {len(texts)} outputs matched {wanted}")
        means = scores.matrices[task.name][task.metric].mean(axis=1)
        means = means[np.isfinite(means)]
        if len(means) > 1 and np.ptp(means) == 0:
            line = f"warning: task {task.name}: all {len(means)} candidates score {means[0]:.4g}; it gives no signal"
            lines.append(line + _first_answer(task, outputs))
    return lines


def _first_answer(task: Task, outputs: Sequence[Sequence[str]]) -> str:
    """The first example's target beside the first candidate's answer, in words; empty for a task without either."""
    texts = outputs[0][: len(outputs[0]) // task.size] if outputs else []
    target = task.target(0) if texts else None
    if target is None:
        return ""
    answer = task.extracted(0, texts)
    given = f"output {shown(texts[0])}" if answer is None else f"answer {shown(answer)}"
    return f" (the first target is {shown(target)}, the first candidate's {given})"
