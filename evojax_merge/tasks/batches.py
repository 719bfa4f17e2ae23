"""Rows of tokens -> a handful of array shapes. Imports NumPy alone.

Rows are sorted by length and cut into at most `MAX_BUCKETS` lengths so that padding is least; inside a bucket all
batches have one shape. The same batches serve every candidate of a run.
"""

from collections.abc import Sequence
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


def _groups(rows: Sequence[Row], tokens_per_batch: int) -> list[tuple[int, list[np.ndarray], int]]:
    """(width, batches of row numbers, rows per batch) for every bucket."""
    lengths = np.array([len(row.tokens) for row in rows])
    groups, below = [], 0
    for width in bucket_widths(lengths):
        members = np.flatnonzero((lengths > below) & (lengths <= width))
        below = width
        if not len(members):
            continue
        count = max(1, -(-len(members) * width // tokens_per_batch))
        size = -(-len(members) // count)
        groups.append((width, [members[i : i + size] for i in range(0, len(members), size)], size))
    return groups


def _pad(numbers: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([numbers, np.full(size - len(numbers), -1, np.int64)])


def scoring_batches(rows: Sequence[Row], tokens_per_batch: int) -> list[ScoringBatch]:
    """Batches of about `tokens_per_batch` tokens for rows whose targets are scored."""
    batches = []
    for width, groups, size in _groups(rows, tokens_per_batch):
        most = max(len(rows[r].tokens) - rows[r].start for group in groups for r in group)
        for group in groups:
            batch = ScoringBatch(
                tokens=np.zeros((size, width), np.int32),
                length=np.ones(size, np.int32),
                at=np.zeros((size, most), np.int32),
                targets=np.zeros((size, most), np.int32),
                mask=np.zeros((size, most), bool),
                rows=_pad(group, size),
            )
            for b, r in enumerate(group):
                tokens, start = rows[r].tokens, rows[r].start
                scored = len(tokens) - start
                batch.tokens[b, : len(tokens)] = tokens
                batch.length[b] = len(tokens)
                batch.at[b, :scored] = np.arange(start - 1, len(tokens) - 1)
                batch.targets[b, :scored] = tokens[start:]
                batch.mask[b, :scored] = True
            batches.append(batch)
    return batches


def prompt_batches(rows: Sequence[Row], tokens_per_batch: int) -> list[PromptBatch]:
    """Batches of about `tokens_per_batch` tokens for rows that are continued."""
    batches = []
    for width, groups, size in _groups(rows, tokens_per_batch):
        for group in groups:
            batch = PromptBatch(
                np.zeros((size, width), np.int32), np.full(size, width - 1, np.int32), _pad(group, size)
            )
            for b, r in enumerate(group):
                tokens = rows[r].tokens
                batch.tokens[b, width - len(tokens) :] = tokens
                batch.first[b] = width - len(tokens)
            batches.append(batch)
    return batches


def padding_share(batches: Sequence[ScoringBatch | PromptBatch], rows: Sequence[Row]) -> float:
    """The share of computed token positions that are padding."""
    cells = sum(batch.tokens.size for batch in batches)
    return 1.0 - sum(len(row.tokens) for row in rows) / cells if cells else 0.0
