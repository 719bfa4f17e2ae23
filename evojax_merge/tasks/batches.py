"""Rows of tokens -> a handful of array shapes. Imports NumPy alone.

Rows are sorted by length and cut into at most `MAX_BUCKETS` lengths so that padding is least; inside a bucket all
batches have one shape. The same batches serve every candidate of a run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MAX_BUCKETS = 4
# Widths are multiples of this.
LENGTH_STEP = 8


@dataclass(frozen=True)
class Row:
    """Tokens, of which those from `start` on are scored (or, for a prompt, generated); `where` names the example."""

    tokens: tuple[int, ...]
    start: int
    where: str


@dataclass(frozen=True)
class ScoringBatch:
    """tokens: int32[B, T], padded at the right; length: int32[B]. Scored are `targets: int32[B, Q]`, predicted at
    columns `at: int32[B, Q]` where `mask: bool[B, Q]`. rows: int[B], which row each is, -1 for padding."""

    tokens: np.ndarray
    length: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class PromptBatch:
    """tokens: int32[B, T], padded at the left; first: int32[B], the first real column; rows: int[B], -1: padding."""

    tokens: np.ndarray
    first: np.ndarray
    rows: np.ndarray


def bucket_widths(lengths: np.ndarray) -> list[int]:
    """At most `MAX_BUCKETS` widths into which rows of these lengths go with the least padding (exact, by dynamic
    programming over the distinct widths)."""
    widths, counts = np.unique(-(-np.asarray(lengths) // LENGTH_STEP) * LENGTH_STEP, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    # best[i]: the least cells for the first i widths with the buckets so far, and where the last bucket began.
    best = [0.0] + [np.inf] * len(widths)
    choices: list[list[int]] = []
    for _ in range(min(MAX_BUCKETS, len(widths))):
        fresh, began = [0.0], [0]
        for end in range(1, len(widths) + 1):
            costs = [best[begin] + (total[end] - total[begin]) * widths[end - 1] for begin in range(end)]
            began.append(int(np.argmin(costs)))
            fresh.append(float(min(costs)))
        best, choices = fresh, [*choices, began]
    edges, end = [], len(widths)
    for began in reversed(choices):
        if end == 0:
            break
        edges.append(int(widths[end - 1]))
        end = began[end]
    return edges[::-1]


@dataclass(frozen=True)
class Shape:
    """One array shape: rows of up to `width` tokens, of which at most `scored` are scored, `size` to a batch."""

    width: int
    scored: int
    size: int


def batch_shapes(rows: Sequence[Row], tokens_per_batch: int, others: Sequence[Row] = ()) -> list[Shape]:
    """The shapes for `rows`, wide enough for `others` as well (another split's), which then compile nothing new.

    Batches have about `tokens_per_batch` tokens, and sizes that fill the last batch of `rows` best.
    """
    together = [*rows, *others]
    lengths = np.array([len(row.tokens) for row in rows])
    all_lengths = np.array([len(row.tokens) for row in together])
    shapes, below = [], 0
    for width in bucket_widths(all_lengths):
        inside = np.flatnonzero((all_lengths > below) & (all_lengths <= width))
        count = max(1, int(((lengths > below) & (lengths <= width)).sum()))
        below = width
        batches = -(-count * width // tokens_per_batch)
        scored = max(len(together[r].tokens) - together[r].start for r in inside)
        shapes.append(Shape(width, scored, -(-count // batches)))
    return shapes


def _grouped(rows: Sequence[Row], shapes: Sequence[Shape]) -> Iterator[tuple[Shape, np.ndarray]]:
    """Each batch's shape and the numbers of its rows, padded with -1."""
    lengths, below = np.array([len(row.tokens) for row in rows]), 0
    for shape in shapes:
        members = np.flatnonzero((lengths > below) & (lengths <= shape.width))
        below = shape.width
        for start in range(0, len(members), shape.size):
            group = members[start : start + shape.size]
            yield shape, np.concatenate([group, np.full(shape.size - len(group), -1, np.int64)])


def scoring_batches(rows: Sequence[Row], shapes: Sequence[Shape]) -> list[ScoringBatch]:
    """Batches of rows whose targets are scored."""
    batches = []
    for shape, group in _grouped(rows, shapes):
        batch = ScoringBatch(
            tokens=np.zeros((shape.size, shape.width), np.int32),
            length=np.ones(shape.size, np.int32),
            at=np.zeros((shape.size, shape.scored), np.int32),
            targets=np.zeros((shape.size, shape.scored), np.int32),
            mask=np.zeros((shape.size, shape.scored), bool),
            rows=group,
        )
        for b, r in enumerate(group[group >= 0]):
            tokens, start = rows[r].tokens, rows[r].start
            scored = len(tokens) - start
            batch.tokens[b, : len(tokens)] = tokens
            batch.length[b] = len(tokens)
            batch.at[b, :scored] = np.arange(start - 1, len(tokens) - 1)
            batch.targets[b, :scored] = tokens[start:]
            batch.mask[b, :scored] = True
        batches.append(batch)
    return batches


def prompt_batches(rows: Sequence[Row], shapes: Sequence[Shape]) -> list[PromptBatch]:
    """Batches of rows that are continued."""
    batches = []
    for shape, group in _grouped(rows, shapes):
        batch = PromptBatch(
            np.zeros((shape.size, shape.width), np.int32), np.full(shape.size, shape.width - 1, np.int32), group
        )
        for b, r in enumerate(group[group >= 0]):
            tokens = rows[r].tokens
            batch.tokens[b, shape.width - len(tokens) :] = tokens
            batch.first[b] = shape.width - len(tokens)
        batches.append(batch)
    return batches


def padding_share(batches: Sequence[ScoringBatch | PromptBatch], rows: Sequence[Row]) -> float:
    """The share of computed token positions that are padding."""
    cells = sum(batch.tokens.size for batch in batches)
    return 1.0 - sum(len(row.tokens) for row in rows) / cells if cells else 0.0
