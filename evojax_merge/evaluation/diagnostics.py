"""Warnings about the scores of a population: problems of a task."""

from collections.abc import Sequence

import numpy as np

from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.tasks.task import Task


def warnings(tasks: Sequence[Task], scores: TaskScores) -> list[str]:
    """One line for each task that finds no answer in any output, or on which all candidates score the same."""
    lines = []
    for task in tasks:
        texts = [text for row in scores.outputs.get(task.name, []) for text in row]
        if texts and (wanted := task.extraction_failure(texts)) is not None:
            lines.append(f"warning: task {task.name}: 0 of {len(texts)} outputs matched {wanted}")
        means = scores.matrices[task.name][task.metric].mean(axis=1)
        means = means[np.isfinite(means)]
        if len(means) > 1 and np.ptp(means) == 0:
            lines.append(
                f"warning: task {task.name}: all {len(means)} candidates score {means[0]:.4g}; it gives no signal"
            )
    return lines
