"""Rows of tokens -> a handful of array shapes. May import tasks.task.

What rows share is laid out once. The *header* is the beginning that all rows of a task have in common (the few-shot
examples, say): it is computed once per candidate, and the batches hold what follows it. Scored rows of one example (the
choices of a question) become one *sheet*: their common beginning, and behind it each row's own tokens as a branch that
sees the beginning and itself. Sheets are sorted by length and cut into few widths so that padding is least; inside a
width all batches have one shape. The same batches serve every candidate of a run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

import numpy as np

from evojax_merge.tasks.task import Row

# Widths: as few as bring the padding below this share of the computed positions, between so few and so many.
PADDING = 0.15
BUCKETS = (4, 8)
# Of prompts: a width more compiles what reads them again, not what writes on.
PROMPT_PADDING = 0.1
# Widths are multiples of this; where rows are so short that it alone would be too much padding, of 1.
LENGTH_STEP = 8
# A shorter header is left in the rows: a pass of its own costs more.
MIN_HEADER = 32
# Marks columns that hold no token, and rows of a batch that hold no row.
NOTHING = -1


@dataclass(frozen=True)
class Slot:
    """One row of a sheet: its number, and its targets, each predicted at a column."""

    row: int
    columns: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Sheet:
    """Rows that are computed together. positions: of each token in its row, the header's tokens counted; branches: 0
    for what all rows share, else whose it is."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[int, ...]
    slots: tuple[Slot, ...]

    @property
    def scored(self) -> int:
        return sum(len(slot.columns) for slot in self.slots)


@dataclass(frozen=True)
class ScoringBatch:
    """B sheets with R = B x C slots. tokens, positions, branches: int32[B, T], branch `NOTHING` for padding.

    Scored are `targets: int32[Q]`, predicted at `at: int32[Q]`, a column of the flattened batch, where `mask: bool[Q]`;
    `spread: int32[R, S]`: which of the Q are a slot's, Q where there is none. rows: int[R], which row a slot is.
    """

    tokens: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    spread: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Part:
    """Rows `begin` to `end` of a batch of prompts; none of them is longer than `width`."""

    begin: int
    end: int
    width: int


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are read in parts of their own widths, and written on together. tokens: int32[B, T], padded at the
    left; first: int32[B], the first real column; rows: int[B]."""

    tokens: np.ndarray
    first: np.ndarray
    rows: np.ndarray
    parts: tuple[Part, ...]

    def part(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """A part's tokens `int32[b, width]`, and their first real columns `int32[b]`."""
        left = self.tokens.shape[1] - part.width
        return self.tokens[part.begin : part.end, left:], self.first[part.begin : part.end] - left

    @property
    def read(self) -> int:
        """Token positions that are computed to read it."""
        return sum((part.end - part.begin) * part.width for part in self.parts)


Batch = TypeVar("Batch", ScoringBatch, PromptBatch)


@dataclass(frozen=True)
class Batches(Generic[Batch]):
    """header: int32[H], what stands before every row; tokens: how many a model would read for them one row after the
    other."""

    header: np.ndarray
    batches: tuple[Batch, ...]
    tokens: int

    @property
    def computed(self) -> int:
        """Token positions that a candidate computes, padding included."""
        return len(self.header) + sum(
            batch.tokens.size if isinstance(batch, ScoringBatch) else batch.read for batch in self.batches
        )

    @property
    def padding(self) -> int:
        """How many of them are padding."""
        return sum(
            int((batch.branches == NOTHING).sum()) if isinstance(batch, ScoringBatch) else _left_padding(batch)
            for batch in self.batches
        )


def _left_padding(batch: PromptBatch) -> int:
    return batch.read - int((batch.tokens.shape[1] - batch.first[batch.rows != NOTHING]).sum())


# ---------------------------------------------------------------------------------------------------------------
# What rows share


def common_beginning(rows: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all of them begin with."""
    # Between the least and the greatest in order lie all others.
    low, high = min(rows), max(rows)
    same = (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return next(same, min(len(low), len(high)))


def header_length(rows: Sequence[Row]) -> int:
    """How much of their beginning all rows share; 0 where it would not pay. At least one token is left before the
    first target, so that whatever is predicted is predicted at a column of the row itself."""
    if len(rows) < 2:
        return 0
    length = min(common_beginning([row.tokens for row in rows]), min(row.start for row in rows) - 1)
    return length if length >= MIN_HEADER else 0


def sheets_of(rows: Sequence[Row], header: int, pack: bool = True) -> list[Sheet]:
    """Rows without their header, those of one example together; `pack` False: each alone."""
    numbered = list(enumerate(rows))
    if not pack:
        return [_sheet([one], header) for one in numbered]
    groups = [list(group) for _, group in groupby(numbered, key=lambda one: one[1].example)]
    sheets = []
    for group in groups:
        shared = _trunk(group, header)
        sheets += [_sheet(group, header)] if shared else [_sheet([one], header) for one in group]
    return sheets


def _trunk(group: Sequence[tuple[int, Row]], header: int) -> int:
    """How many tokens behind the header a group of rows shares, no target among them."""
    rows = [row for _, row in group]
    if len(rows) == 1:
        return rows[0].start - header
    return min(common_beginning([row.tokens for row in rows]), min(row.start for row in rows)) - header


def _sheet(group: Sequence[tuple[int, Row]], header: int) -> Sheet:
    trunk = _trunk(group, header)
    tokens = list(group[0][1].tokens[header : header + trunk])
    positions, branches, slots = list(range(header, header + trunk)), [0] * trunk, []
    for branch, (number, row) in enumerate(group, start=1):
        # The last token is only predicted.
        own = row.tokens[header + trunk : -1]
        # Token i of the row stands in this column.
        columns = [*range(trunk), *range(len(tokens), len(tokens) + len(own))]
        predicted_at = tuple(columns[i - header - 1] for i in range(row.start, len(row.tokens)))
        slots.append(Slot(number, predicted_at, row.tokens[row.start :]))
        tokens += own
        positions += range(header + trunk, len(row.tokens) - 1)
        branches += [branch] * len(own)
    return Sheet(tuple(tokens), tuple(positions), tuple(branches), tuple(slots))


# ---------------------------------------------------------------------------------------------------------------
# Shapes


def bucket_widths(lengths: np.ndarray, buckets: int, step: int) -> list[int]:
    """At most `buckets` widths, multiples of `step`, into which rows of these lengths go with the least padding (exact,
    by dynamic programming over the distinct widths)."""
    widths, counts = np.unique(-(-np.asarray(lengths) // step) * step, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    # best[i]: the least cells for the first i widths with the buckets so far, and where the last bucket began.
    best = [0.0] + [np.inf] * len(widths)
    choices: list[list[int]] = []
    for _ in range(min(buckets, len(widths))):
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
    """Rows longer than `above` and no longer than `width`, `size` to a batch."""

    above: int
    width: int
    size: int


def batch_shapes(
    splits: Sequence[np.ndarray], tokens_per_batch: int, padding: float, most_rows: int | None = None
) -> list[Shape]:
    """Shapes for rows of the lengths of several splits, which then share what is compiled: batches of about
    `tokens_per_batch` tokens and at most so many rows, of sizes that fill the batches of the first split best. As few
    widths as keep its padding below this share, or those that come nearest to it."""
    everything, first = np.concatenate(splits), splits[0]
    tries = [(BUCKETS[0], LENGTH_STEP), *((buckets, 1) for buckets in range(BUCKETS[0], BUCKETS[1] + 1))]
    found = []
    for buckets, step in tries:
        shapes, cells, above = [], 0, 0
        for width in bucket_widths(everything, buckets, step):
            count = int(((first > above) & (first <= width)).sum())
            most = min(max(1, tokens_per_batch // width), most_rows or max(1, count))
            shapes.append(Shape(above, width, _full_size(max(1, count), most)))
            cells += -(-count // shapes[-1].size) * shapes[-1].size * width
            above = width
        found.append((cells, shapes))
        if cells * (1 - padding) <= first.sum():
            break
    return min(found, key=lambda one: one[0])[1]


def _full_size(count: int, most: int) -> int:
    """The batch size, between half of `most` and `most`, that leaves the least room in the last of `count` rows."""
    most = min(count, most)
    return min(range(most, most // 2, -1), key=lambda size: -count % size)


def _grouped(lengths: np.ndarray, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, np.ndarray]]:
    """Each batch's shape and the numbers of its rows."""
    for shape in shapes:
        members = np.flatnonzero((lengths > shape.above) & (lengths <= shape.width))
        for start in range(0, len(members), shape.size):
            yield shape, members[start : start + shape.size]


# ---------------------------------------------------------------------------------------------------------------
# Batches


def scoring_batches(
    splits: Sequence[Sequence[Row]], tokens_per_batch: int, pack: bool = True
) -> list[Batches[ScoringBatch]]:
    """Scored rows of several splits of a task, in batches of the same shapes. `pack` False: no two rows in a sheet."""
    header = header_length([row for rows in splits for row in rows])
    sheets = [sheets_of(rows, header, pack) for rows in splits]
    lengths = [np.array([len(sheet.tokens) for sheet in split]) for split in sheets]
    shapes = batch_shapes(lengths, tokens_per_batch, PADDING)
    groups = [
        [(shape, [split[i] for i in members]) for shape, members in _grouped(count, shapes)]
        for split, count in zip(sheets, lengths, strict=True)
    ]
    together = [one for split in groups for one in split]
    limits = {
        shape: (
            max(len(sheet.slots) for s, group in together if s == shape for sheet in group),
            _step_up(max(sum(sheet.scored for sheet in group) for s, group in together if s == shape)),
            max(len(slot.columns) for s, group in together if s == shape for sheet in group for slot in sheet.slots),
        )
        for shape in {shape for shape, _ in together}
    }
    return [
        Batches(
            np.array(rows[0].tokens[:header], np.int32),
            tuple(_scoring_batch(group, shape, *limits[shape]) for shape, group in split),
            sum(len(row.tokens) - 1 for row in rows),
        )
        for rows, split in zip(splits, groups, strict=True)
    ]


def _step_up(number: int) -> int:
    return -(-number // LENGTH_STEP) * LENGTH_STEP


def _scoring_batch(group: Sequence[Sheet], shape: Shape, slots: int, scored: int, longest: int) -> ScoringBatch:
    batch = ScoringBatch(
        tokens=np.zeros((shape.size, shape.width), np.int32),
        positions=np.zeros((shape.size, shape.width), np.int32),
        branches=np.full((shape.size, shape.width), NOTHING, np.int32),
        at=np.zeros(scored, np.int32),
        targets=np.zeros(scored, np.int32),
        mask=np.zeros(scored, bool),
        spread=np.full((shape.size * slots, longest), scored, np.int32),
        rows=np.full(shape.size * slots, NOTHING, np.int64),
    )
    filled = 0
    for b, sheet in enumerate(group):
        count = len(sheet.tokens)
        batch.tokens[b, :count], batch.positions[b, :count] = sheet.tokens, sheet.positions
        batch.branches[b, :count] = sheet.branches
        for c, slot in enumerate(sheet.slots):
            own = slice(filled, filled + len(slot.columns))
            filled = own.stop
            batch.at[own] = b * shape.width + np.array(slot.columns)
            batch.targets[own], batch.mask[own] = slot.targets, True
            batch.spread[b * slots + c, : len(slot.columns)] = range(own.start, own.stop)
            batch.rows[b * slots + c] = slot.row
    return batch


def prompt_batches(
    splits: Sequence[Sequence[Row]], tokens_per_part: int, tokens_per_batch: int, new: int
) -> list[Batches[PromptBatch]]:
    """Rows of several splits of a task that are continued by `new` tokens, in batches of one shape: read in parts of
    about `tokens_per_part` tokens, written in batches of about `tokens_per_batch`, the new ones counted."""
    header = header_length([row for rows in splits for row in rows])
    lengths = [np.array([len(row.tokens) - header for row in rows]) for rows in splits]
    most = max(1, tokens_per_batch // (_step_up(max(int(count.max()) for count in lengths)) + new))
    shapes = batch_shapes(lengths, tokens_per_part, PROMPT_PADDING, most)
    parts = [list(_grouped(count, shapes)) for count in lengths]
    # As many rows as fill the first split's batches best.
    size = max(shape.size for shape in shapes)
    while size < most and len(_packed(parts[0], size)) > len(_packed(parts[0], most)):
        size += 1
    return [
        Batches(
            np.array(rows[0].tokens[:header], np.int32),
            tuple(_prompt_batch(rows, group, size, shapes[-1].width, header) for group in _packed(split, size)),
            sum(len(row.tokens) for row in rows),
        )
        for rows, split in zip(splits, parts, strict=True)
    ]


Read = tuple[Shape, np.ndarray]


def _packed(parts: Sequence[Read], size: int) -> list[list[Read]]:
    """Parts in groups of at most `size` rows, in their order."""
    groups: list[list[Read]] = []
    room = 0
    for shape, members in parts:
        if shape.size > room:
            groups.append([])
            room = size
        groups[-1].append((shape, members))
        room -= shape.size
    return groups


def _prompt_batch(rows: Sequence[Row], group: Sequence[Read], size: int, width: int, header: int) -> PromptBatch:
    batch = PromptBatch(
        tokens=np.zeros((size, width), np.int32),
        first=np.full(size, width - 1, np.int32),
        rows=np.full(size, NOTHING, np.int64),
        parts=tuple(
            Part(end - shape.size, end, shape.width)
            for (shape, _), end in zip(group, np.cumsum([shape.size for shape, _ in group]).tolist(), strict=True)
        ),
    )
    for part, (_, members) in zip(batch.parts, group, strict=True):
        for b, r in enumerate(members, start=part.begin):
            own = rows[r].tokens[header:]
            batch.tokens[b, width - len(own) :] = own
            batch.first[b], batch.rows[b] = width - len(own), r
    return batch
