"""Rows that the benchmarks have the evaluator score, and what scoring them takes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evojax_merge.checkpoints.parents import tensor_shapes
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.models.config import DecoderConfig
from evojax_merge.tasks.batches import scoring_batches
from evojax_merge.tasks.task import Row, TaskRequests
from evojax_merge.tasks.text import Example, TextTask


def work(config: DecoderConfig, rows: Sequence[Row]) -> tuple[float, float]:
    """FLOP of the layers, and of the head, for these rows, each computed whole."""
    shapes = tensor_shapes(config)
    layers = sum(int(np.prod(shape)) for name, shape in shapes.items() if "layers." in name and len(shape) == 2)
    tokens, scored = sum(len(row.tokens) for row in rows), sum(len(row.tokens) - row.start for row in rows)
    return 2.0 * layers * tokens, 2.0 * config.hidden * config.vocab * scored


def of_rows(batched_task: BatchedTask, rows: Sequence[Row], tokens_per_batch: int) -> BatchedTask:
    """A task that asks for these rows in place of its own, in batches of so many tokens."""
    assert isinstance(batched_task.task, TextTask)
    task = replace(batched_task.task, examples=(Example("", ("",), "", 0),) * len(rows))
    (batches,) = scoring_batches([rows], tokens_per_batch, pack=False)
    return replace(batched_task, task=task, requests=TaskRequests(tuple(rows)), scoring=batches)
