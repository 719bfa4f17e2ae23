"""Batching: rows of tokens -> arrays of a handful of shapes.

Shared parts of rows are computed once. The *shared prefix* is the beginning that all rows of a task have in common
(few-shot examples, say): it is prefilled once per candidate, and the batches hold the tokens behind it. Scored rows of
one example (the choices of a question), and those that begin with the same image, are packed into one row: their common
prefix, and behind it each one's own tokens as a segment that attends to the prefix and to itself (tree attention).
Packed rows are bucketed by length so that padding is least; inside a bucket all batches have one shape. The same
batches serve every candidate of a run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from evojax_merge.tasks.task import Row

# Buckets: the least number, between these two, that brings the padding below this share of the computed positions.
PADDING = 0.15
BUCKETS = (4, 8)
# The share of padding for prompts: a further bucket compiles their prefill once more, but not the decoding.
PROMPT_PADDING = 0.1
# Widths are multiples of this step, or of 1 where rows are so short that the step alone would be too much padding.
LENGTH_STEP = 8
# A shorter shared prefix stays in the rows: prefilling it alone costs more.
MIN_SHARED_PREFIX = 32
# The most tokens of rows behind an image that they share, or as many as the image has where these are more: each pays
# for its distance to all others of a packed row.
MAX_BEHIND_IMAGE = 256
# Padding in segment_ids, and in a batch's row numbers.
PAD = -1
# The numbers of the rows that are packed together.
Pack = tuple[int, ...]


@dataclass(frozen=True)
class ScoredSpan:
    """A row inside a packed row: its number, its targets, and the column at which each target is predicted."""

    row: int
    columns: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class PackedRow:
    """Rows that are computed together. positions: each token's position in its row, the shared prefix counted;
    segment_ids: 0 for tokens that all rows share, else the number of the token's row, from 1."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    segment_ids: tuple[int, ...]
    spans: tuple[ScoredSpan, ...]

    @property
    def scored(self) -> int:
        return sum(len(span.columns) for span in self.spans)


@dataclass(frozen=True)
class ScoringBatch:
    """B packed rows with R = B x C scored spans. tokens, positions, segment_ids: int32[B, T].

    Scored are `targets: int32[Q]`, predicted at `predict_at: int32[Q]`, columns of the flattened batch, where `mask:
    bool[Q]`; `target_index: int32[R, S]`: the indices in Q of a span's targets, Q where there is none. rows: int[R],
    the number of each span's row.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    predict_at: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    target_index: np.ndarray
    rows: np.ndarray

    @property
    def computed(self) -> int:
        """Token positions that a model computes, padding included."""
        return self.tokens.size

    @property
    def padding(self) -> int:
        """The number of computed positions that are padding."""
        return int((self.segment_ids == PAD).sum())

    @property
    def compiled_shapes(self) -> list[Any]:
        """The shapes of the program that is compiled for the batch."""
        return [tuple(array.shape for array in vars(self).values())]


@dataclass(frozen=True)
class PrefillGroup:
    """Rows `begin` to `end` of a batch of prompts; none of them is longer than `width`."""

    begin: int
    end: int
    width: int


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are prefilled in groups of their own widths and decoded together. tokens: int32[B, T], padded on the
    left; left_pad: int32[B], the first real column; rows: int[B], each prompt's number."""

    tokens: np.ndarray
    left_pad: np.ndarray
    rows: np.ndarray
    prefill_groups: tuple[PrefillGroup, ...]

    def prefill_group(self, part: PrefillGroup) -> tuple[np.ndarray, np.ndarray]:
        """A group's tokens `int32[b, width]`, and their first real columns `int32[b]`."""
        left = self.tokens.shape[1] - part.width
        return self.tokens[part.begin : part.end, left:], self.left_pad[part.begin : part.end] - left

    @property
    def computed(self) -> int:
        """Token positions that the batch's prefill computes, padding included."""
        return sum((part.end - part.begin) * part.width for part in self.prefill_groups)

    @property
    def padding(self) -> int:
        """The number of computed positions that are padding."""
        return self.computed - int((self.tokens.shape[1] - self.left_pad[self.rows != PAD]).sum())

    @property
    def compiled_shapes(self) -> list[Any]:
        """The shapes of the batch's programs: groups are prefilled one by one, and all decoded together."""
        return [self.tokens.shape, *((part.end - part.begin, part.width, "read") for part in self.prefill_groups)]


Batch = TypeVar("Batch", ScoringBatch, PromptBatch)


@dataclass(frozen=True)
class Batches(Generic[Batch]):
    """Batches of a task's rows. shared_prefix: int32[H], the beginning of every row; tokens: the number of tokens that
    a model would compute for the rows one by one."""

    shared_prefix: np.ndarray
    batches: tuple[Batch, ...]
    tokens: int

    @property
    def computed(self) -> int:
        """Token positions that a candidate computes, padding included."""
        return len(self.shared_prefix) + sum(batch.computed for batch in self.batches)

    @property
    def padding(self) -> int:
        """The number of computed positions that are padding."""
        return sum(batch.padding for batch in self.batches)


# ---------------------------------------------------------------------------------------------------------------
# Shared parts of rows


def common_prefix_length(rows: Sequence[tuple[int, ...]]) -> int:
    """The number of tokens that all rows begin with."""
    # All others lie between the least and the greatest in order.
    low, high = min(rows), max(rows)
    same = (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return next(same, min(len(low), len(high)))


def shared_prefix_length(rows: Sequence[Row]) -> int:
    """The length of the beginning that all rows share; 0 where sharing it would not pay. At least one token is left
    before the first target, so that every target is predicted at a column of its own row."""
    if len(rows) < 2:
        return 0
    length = min(common_prefix_length([row.tokens for row in rows]), min(row.start for row in rows) - 1)
    return length if length >= MIN_SHARED_PREFIX else 0


def packs_of(rows: Sequence[Row], shared_prefix: int, pack: bool = True) -> list[Pack]:
    """The rows that are packed together, by their numbers: those of one example, and those that begin with the same
    image behind the shared prefix; `pack` False: each row alone."""
    if not pack:
        return [(number,) for number in range(len(rows))]
    groups: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(_beginning(row, shared_prefix) or row.example, []).append(number)
    return [part for group in groups.values() for part in _of_a_size(rows, group, shared_prefix)]


def _beginning(row: Row, shared_prefix: int) -> tuple[int, ...]:
    """The tokens of a row behind the shared prefix, up to its last image; none where no image is there."""
    tokens = row.tokens[shared_prefix:]
    return tokens[: max((place + 1 for place, token in enumerate(tokens) if token < 0), default=0)]


def _of_a_size(rows: Sequence[Row], group: Sequence[int], shared_prefix: int) -> Iterator[Pack]:
    """The packs of a group of rows: each alone where they share nothing, and behind an image as many as may be."""
    begin = _common_length([rows[number] for number in group], shared_prefix)
    if not begin:
        yield from ((number,) for number in group)
        return
    if not _beginning(rows[group[0]], shared_prefix):
        yield tuple(group)
        return
    pack, size = list[int](), 0
    for number in group:
        behind = len(rows[number].tokens) - shared_prefix - begin
        if pack and size + behind > max(begin, MAX_BEHIND_IMAGE):
            yield tuple(pack)
            pack, size = [], 0
        pack.append(number)
        size += behind
    yield tuple(pack)


def _common_length(rows: Sequence[Row], shared_prefix: int) -> int:
    """The number of tokens behind the shared prefix that rows have in common, no target among them."""
    if len(rows) == 1:
        return rows[0].start - shared_prefix
    return min(common_prefix_length([row.tokens for row in rows]), min(row.start for row in rows)) - shared_prefix


def pack_rows(rows: Sequence[Row], shared_prefix: int, packs: Sequence[Pack]) -> list[PackedRow]:
    """Rows without their shared prefix, packed together."""
    packed = []
    for pack in packs:
        common = _common_length([rows[number] for number in pack], shared_prefix)
        tokens = list(rows[pack[0]].tokens[shared_prefix : shared_prefix + common])
        positions, segment_ids, spans = list(range(shared_prefix, shared_prefix + common)), [0] * common, []
        for segment, number in enumerate(pack, start=1):
            row = rows[number]
            # The last token is only predicted.
            suffix = row.tokens[shared_prefix + common : -1]
            # Token i of the row stands in this column.
            columns = [*range(common), *range(len(tokens), len(tokens) + len(suffix))]
            predicted_at = tuple(columns[i - shared_prefix - 1] for i in range(row.start, len(row.tokens)))
            spans.append(ScoredSpan(number, predicted_at, row.tokens[row.start :]))
            tokens += suffix
            positions += range(shared_prefix + common, len(row.tokens) - 1)
            segment_ids += [segment] * len(suffix)
        packed.append(PackedRow(tuple(tokens), tuple(positions), tuple(segment_ids), tuple(spans)))
    return packed


# ---------------------------------------------------------------------------------------------------------------
# Shapes


def bucket_widths(lengths: np.ndarray, buckets: int, step: int) -> list[int]:
    """At most `buckets` widths, multiples of `step`, that pad these lengths the least, by dynamic programming."""
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
    splits: Sequence[np.ndarray], tokens_per_batch: int, padding: float, most_rows: int | None = None,
    merge_tokens: int = 0,
) -> list[Shape]:  # fmt: skip
    """Shapes for rows of the lengths of several splits, which then share compiled programs: batches of about
    `tokens_per_batch` tokens and at most `most_rows` rows, of sizes that fill the batches of the first split best. The
    fewest widths that keep its padding below this share, or those that come nearest to it; where every batch costs as
    much as `merge_tokens` tokens besides, those that cost least."""
    everything, lengths = np.concatenate(splits), splits[0]
    numbers = range(1 if merge_tokens else BUCKETS[0], BUCKETS[1] + 1)
    options = []
    for buckets, step in [(numbers[0], LENGTH_STEP), *((buckets, 1) for buckets in numbers)]:
        shapes, cells, above = [], 0, 0
        for width in bucket_widths(everything, buckets, step):
            count = int(((lengths > above) & (lengths <= width)).sum())
            most = min(max(1, tokens_per_batch // width), most_rows or max(1, count), max(1, count))
            # Of the sizes from half of the largest on, the one with the fewest rows in all, unused room included.
            more = merge_tokens / width
            size = min(range(most, most // 2, -1), key=lambda size: -(-max(1, count) // size) * (size + more))
            shapes.append(Shape(above, width, size))
            cells += -(-count // size) * (size * width + merge_tokens)
            above = width
        options.append((cells, shapes))
        if not merge_tokens and cells * (1 - padding) <= lengths.sum():
            break
    return min(options, key=lambda option: option[0])[1]


def _grouped(lengths: np.ndarray, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, np.ndarray]]:
    """Each batch's shape and the numbers of its rows."""
    for shape in shapes:
        members = np.flatnonzero((lengths > shape.above) & (lengths <= shape.width))
        for start in range(0, len(members), shape.size):
            yield shape, members[start : start + shape.size]


# ---------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class ScoringShapes:
    """The shapes of the batches of a task's scored rows. shared_prefix: the number of tokens that all rows begin with;
    pack: whether rows are packed together; limits: for each shape the most spans of a packed row, the
    most targets of a batch, and the most targets of a span."""

    shared_prefix: int
    pack: bool
    limits: Mapping[Shape, tuple[int, int, int]]

    def for_any(self, rows: Sequence[Row]) -> "ScoringShapes":
        """The same shapes with room for any of the rows in a batch."""
        packed_rows = pack_rows(rows, self.shared_prefix, packs_of(rows, self.shared_prefix, self.pack))
        limits = {}
        for shape, before in self.limits.items():
            # Some of a pack's examples are shorter than all of them.
            fitting = [
                packed
                for packed in packed_rows
                if len(packed.tokens) > shape.above
                and (len(packed.tokens) <= shape.width or len({rows[span.row].example for span in packed.spans}) > 1)
            ]
            most = sum(sorted((packed.scored for packed in fitting), reverse=True)[: shape.size])
            spans, scored, longest = map(max, before, _limits(fitting, most))
            limits[shape] = spans, scored, longest
        return replace(self, limits=limits)


def scoring_batches(
    splits: Sequence[Sequence[Row]], tokens_per_batch: int, pack: bool = True, merge_tokens: int = 0
) -> list[Batches[ScoringBatch]]:
    """Scored rows of several splits of a task, in batches of the same shapes. `pack` False: no row shares a packed row.
    merge_tokens: the cost of each batch besides, in tokens."""
    shapes = scoring_shapes(splits, tokens_per_batch, pack, merge_tokens=merge_tokens)
    return [fill_scoring_batches(rows, shapes) for rows in splits]


def scoring_shapes(
    splits: Sequence[Sequence[Row]], tokens_per_batch: int, pack: bool = True, share: bool = True,
    merge_tokens: int = 0,
) -> ScoringShapes:  # fmt: skip
    """The shapes of the batches that `scoring_batches` makes. `share` False: no row shares a prefix."""
    shared_prefix = shared_prefix_length([row for rows in splits for row in rows]) if share else 0
    packed_rows = [pack_rows(rows, shared_prefix, packs_of(rows, shared_prefix, pack)) for rows in splits]
    lengths = [np.array([len(packed.tokens) for packed in split]) for split in packed_rows]
    shapes = batch_shapes(lengths, tokens_per_batch, PADDING, merge_tokens=merge_tokens)
    together = [
        (shape, [split[i] for i in members])
        for split, count in zip(packed_rows, lengths, strict=True)
        for shape, members in _grouped(count, shapes)
    ]
    limits = {}
    for shape in shapes:
        groups = [group for each, group in together if each == shape]
        most = max((sum(packed.scored for packed in group) for group in groups), default=1)
        limits[shape] = _limits([packed for group in groups for packed in group], most)
    return ScoringShapes(shared_prefix, pack, limits)


def fill_scoring_batches(
    rows: Sequence[Row], shapes: ScoringShapes, packs: Sequence[Pack] | None = None
) -> Batches[ScoringBatch]:
    """Scored rows in batches of these shapes. packs: the rows that are packed together; None: as in `packs_of`."""
    if packs is None:
        packs = packs_of(rows, shapes.shared_prefix, shapes.pack)
    packed_rows = pack_rows(rows, shapes.shared_prefix, packs)
    lengths = np.array([len(packed.tokens) for packed in packed_rows])
    return Batches(
        np.array(rows[0].tokens[: shapes.shared_prefix], np.int32),
        tuple(
            _scoring_batch([packed_rows[i] for i in members], shape, *shapes.limits[shape])
            for shape, members in _grouped(lengths, list(shapes.limits))
        ),
        sum(len(row.tokens) - 1 for row in rows),
    )


def packs_in(batches: Batches[ScoringBatch]) -> Iterator[Pack]:
    """The rows that are packed together in batches."""
    for batch in batches.batches:
        for numbers in batch.rows.reshape(len(batch.tokens), -1):
            pack = tuple(numbers[numbers != PAD].tolist())
            if pack:
                yield pack


def _limits(packed_rows: Sequence[PackedRow], scored: int) -> tuple[int, int, int]:
    """The limits of batches of these rows, of which none has more than `scored` targets (see `ScoringShapes`)."""
    longest = max((len(span.columns) for packed in packed_rows for span in packed.spans), default=1)
    return max((len(packed.spans) for packed in packed_rows), default=1), _step_up(scored), longest


def _step_up(number: int) -> int:
    return -(-number // LENGTH_STEP) * LENGTH_STEP


def _scoring_batch(group: Sequence[PackedRow], shape: Shape, spans: int, scored: int, longest: int) -> ScoringBatch:
    batch = ScoringBatch(
        tokens=np.zeros((shape.size, shape.width), np.int32),
        positions=np.zeros((shape.size, shape.width), np.int32),
        segment_ids=np.full((shape.size, shape.width), PAD, np.int32),
        predict_at=np.zeros(scored, np.int32),
        targets=np.zeros(scored, np.int32),
        mask=np.zeros(scored, bool),
        target_index=np.full((shape.size * spans, longest), scored, np.int32),
        rows=np.full(shape.size * spans, PAD, np.int64),
    )
    filled = 0
    for b, packed in enumerate(group):
        count = len(packed.tokens)
        batch.tokens[b, :count], batch.positions[b, :count] = packed.tokens, packed.positions
        batch.segment_ids[b, :count] = packed.segment_ids
        for c, span in enumerate(packed.spans):
            span_slice = slice(filled, filled + len(span.columns))
            filled = span_slice.stop
            batch.predict_at[span_slice] = b * shape.width + np.array(span.columns)
            batch.targets[span_slice], batch.mask[span_slice] = span.targets, True
            batch.target_index[b * spans + c, : len(span.columns)] = range(span_slice.start, span_slice.stop)
            batch.rows[b * spans + c] = span.row
    return batch


@dataclass(frozen=True)
class PromptShapes:
    """The shapes of the batches of a task's prompts. shared_prefix: the number of tokens that all prompts begin with;
    groups: the shapes of the groups that are prefilled together; size: the number of rows of a batch."""

    shared_prefix: int
    groups: tuple[Shape, ...]
    size: int


def prompt_shapes(
    splits: Sequence[Sequence[Row]], tokens_per_part: int, tokens_per_batch: int, new: int, share: bool = True
) -> PromptShapes:
    """The shapes of batches of the prompts of several splits of a task, which are continued by `new` tokens: prefilled
    in groups of about `tokens_per_part` tokens, decoded in batches of about `tokens_per_batch`, the new ones counted.
    `share` False: no row shares a prefix."""
    shared_prefix = shared_prefix_length([row for rows in splits for row in rows]) if share else 0
    lengths = [np.array([len(row.tokens) - shared_prefix for row in rows]) for rows in splits]
    most = max(1, tokens_per_batch // (_step_up(max(int(count.max()) for count in lengths)) + new))
    shapes = batch_shapes(lengths, tokens_per_part, PROMPT_PADDING, most)
    first = list(_grouped(lengths[0], shapes))
    # The number of rows that fills the first split's batches best.
    size = max(shape.size for shape in shapes)
    while size < most and len(_packed(first, size)) > len(_packed(first, most)):
        size += 1
    return PromptShapes(shared_prefix, tuple(shapes), size)


def fill_prompt_batches(rows: Sequence[Row], shapes: PromptShapes) -> Batches[PromptBatch]:
    """Prompts in batches of these shapes."""
    lengths = np.array([len(row.tokens) - shapes.shared_prefix for row in rows])
    width = shapes.groups[-1].width
    return Batches(
        np.array(rows[0].tokens[: shapes.shared_prefix], np.int32),
        tuple(
            _prompt_batch(rows, group, shapes.size, width, shapes.shared_prefix)
            for group in _packed(list(_grouped(lengths, shapes.groups)), shapes.size)
        ),
        sum(len(row.tokens) for row in rows),
    )


PromptGroup = tuple[Shape, np.ndarray]


def _packed(prefill_groups: Sequence[PromptGroup], size: int) -> list[list[PromptGroup]]:
    """Groups of rows in batches of at most `size` rows, in their order."""
    groups: list[list[PromptGroup]] = []
    room = 0
    for shape, members in prefill_groups:
        if shape.size > room:
            groups.append([])
            room = size
        groups[-1].append((shape, members))
        room -= shape.size
    return groups


def _prompt_batch(
    rows: Sequence[Row], group: Sequence[PromptGroup], size: int, width: int, shared_prefix: int
) -> PromptBatch:
    batch = PromptBatch(
        tokens=np.zeros((size, width), np.int32),
        left_pad=np.full(size, width - 1, np.int32),
        rows=np.full(size, PAD, np.int64),
        prefill_groups=tuple(
            PrefillGroup(end - shape.size, end, shape.width)
            for (shape, _), end in zip(group, np.cumsum([shape.size for shape, _ in group]).tolist(), strict=True)
        ),
    )
    for part, (_, members) in zip(batch.prefill_groups, group, strict=True):
        for b, r in enumerate(members, start=part.begin):
            tokens = rows[r].tokens[shared_prefix:]
            batch.tokens[b, width - len(tokens) :] = tokens
            batch.left_pad[b], batch.rows[b] = width - len(tokens), r
    return batch
