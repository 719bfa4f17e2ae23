"""Attention of whole rows, and of queries to a cache.

Queries are `[B, T, H, d]`; keys `[G, B, d, S]` and values `[G, B, S, d]` of G key-value heads lie as in a KV cache, or
are `[G, d, S]` and `[G, S, d]` where all rows share them.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from evojax_merge.models.fused_attention import Kernel, fused_kernels
from evojax_merge.models.layers import Attend, KeyValue, SequenceLayout, prefix_layout
from evojax_merge.models.sharding import MODEL_AXIS, cut_at, map_shards, model_shards, shard

# The least number of queries in a block of causal attention, and the most blocks.
QUERY_BLOCK, MAX_QUERY_BLOCKS = 64, 4
# Pairs of a row's queries and columns beyond which no array holds an entry for each pair: rows of more than 1,024
# tokens. They are taken in blocks of so many queries, and so many columns: a block's products stay in a CPU's cache.
MAX_PAIRS = 1024**2
LONG_QUERIES, LONG_COLUMNS = 256, 512


@struct.dataclass
class KVSegment:
    """Keys `[G, B, d, S]` and values `[G, B, S, d]` to attend to (without B where all rows share them), and
    `mask: bool[B, T, S]`, the columns that each query attends to."""

    key: jax.Array
    value: jax.Array
    mask: jax.Array


def attention_mask(window: jax.Array, queries: SequenceLayout, keys: SequenceLayout) -> jax.Array:
    """The mask bool[B, T, S]: True for keys that are not later, or of the query's own image (see `SequenceLayout`),
    inside the sliding window, and in the shared segment or the query's own."""
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    segment = keys.segment_ids[:, None, :]
    allowed = (segment == 0) | ((segment > 0) & (segment == queries.segment_ids[:, :, None]))
    seen = distance >= 0
    if queries.image_ids is not None and keys.image_ids is not None:
        same = queries.image_ids[:, :, None] == keys.image_ids[:, None, :]
        seen |= same & (queries.image_ids >= 0)[:, :, None]
    return seen & (distance < window) & allowed


def gqa_attention(
    query: jax.Array,
    segments: Sequence[KVSegment],
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention `[B, T, H * d]` of queries `[B, T, H, d]` over all columns of all segments; scale,
    softcap and sinks as in `Attend`."""
    batch, steps, heads, dim = query.shape
    groups, scale = segments[0].key.shape[0], dim**-0.5 if scale is None else scale
    # Key-value heads first, like keys and values.
    query = query.reshape(batch, steps, groups, heads // groups, dim).transpose(2, 0, 3, 1, 4)
    logits = [_masked_logits(query, segment, scale, softcap) for segment in segments]
    if sinks is not None:
        # Behind the last segment, so that no value is multiplied with their shares.
        logits.append(_sink_logits(sinks, (*query.shape[:-1], 1)))
    probs = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(segments[0].value.dtype)
    attn_out, begin = [], 0
    for segment in segments:
        end = begin + segment.value.shape[-2]
        attn_out.append(_grouped_matmul(probs[..., begin:end], segment.value, "ns,sd->nd"))
        begin = end
    return sum(attn_out[1:], attn_out[0]).transpose(1, 3, 0, 2, 4).reshape(batch, steps, heads * dim)


def _masked_logits(query: jax.Array, segment: KVSegment, scale: float, softcap: float | None) -> jax.Array:
    """The scaled products of queries `[G, B, R, T, d]` and a segment's keys, `float32[G, B, R, T, S]`; where the mask
    is False the least finite number, so that a padding row in which everything is masked stays finite as well."""
    raw = _grouped_matmul(query, segment.key, "nd,ds->ns", jnp.float32) * scale
    if softcap is not None:
        raw = softcap * jnp.tanh(raw / softcap)
    return jnp.where(segment.mask[None, :, None], raw, jnp.finfo(jnp.float32).min)


def _sink_logits(sinks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The logits `[H]` of sinks, for each query: `float32[G, B, R, T, 1]`, which is `shape`."""
    by_head = sinks.astype(jnp.float32).reshape(shape[0], 1, shape[2], 1, 1)
    return jnp.broadcast_to(by_head, shape)


def _grouped_matmul(left: jax.Array, right: jax.Array, subscripts: str, dtype: Any = None) -> jax.Array:
    """Matmuls `[G, B, R, T, …]` of left `[G, B, R, T, …]` with right `[G, B, …]`, or `[G, …]` for all rows; in `dtype`,
    by default the operands'."""
    groups, batch, repeats, steps, inner = left.shape
    left_axes, right_axes, out_axes = subscripts.replace("->", ",").split(",")
    lead, rows = ("gb", (batch, repeats * steps)) if right.ndim == 4 else ("g", (batch * repeats * steps,))
    flat = left.reshape(groups, *rows, inner)
    out = jnp.einsum(
        f"{lead}{left_axes},{lead}{right_axes}->{lead}{out_axes}", flat, right, preferred_element_type=dtype
    )
    return out.reshape(groups, batch, repeats, steps, -1)


def causal_attention(query: jax.Array, rows: KVSegment, prefix: Sequence[KVSegment], **options: Any) -> jax.Array:
    """`gqa_attention` of whole rows to themselves and to a prefix. No query attends to a later column, so that a block
    of queries is only multiplied with the columns up to its own."""
    steps = query.shape[1]
    blocks = max(1, min(MAX_QUERY_BLOCKS, steps // QUERY_BLOCK))
    edges = [steps * i // blocks for i in range(blocks + 1)]

    def block(begin: int, end: int) -> jax.Array:
        upto = KVSegment(rows.key[..., :end], rows.value[:, :, :end], rows.mask[:, begin:end, :end])
        earlier = [KVSegment(segment.key, segment.value, segment.mask[:, begin:end]) for segment in prefix]
        return gqa_attention(query[:, begin:end], [*earlier, upto], **options)

    return jnp.concatenate([block(begin, end) for begin, end in pairwise(edges)], axis=1)


@struct.dataclass
class LongSegment:
    """Keys `[G, B, d, S]` and values `[G, B, S, d]` to attend to (without B where all rows share them), with the layout
    of their columns in place of a mask."""

    key: jax.Array
    value: jax.Array
    layout: SequenceLayout


def blockwise_attention(
    query: jax.Array,
    layout: SequenceLayout,
    segments: Sequence[LongSegment],
    window: jax.Array,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`gqa_attention` in blocks of queries and columns, with a running softmax (arXiv 2205.14135): its memory grows
    with a row's length, and not with the length's square. Blocks in which no query attends to any column are skipped:
    later ones, those behind a window, and those of other sequences. layout: the queries'. A gradient computes the
    blocks again."""
    batch, steps, heads, dim = query.shape
    groups, scale = segments[0].key.shape[0], dim**-0.5 if scale is None else scale
    # Key-value heads first, like keys and values; blocks before all.
    query = query.reshape(batch, steps, groups, heads // groups, dim).transpose(2, 0, 3, 1, 4)
    columns = [
        (
            _blocks(segment.key, -1, LONG_COLUMNS),
            _blocks(segment.value, -2, LONG_COLUMNS),
            _layout_blocks(segment.layout, LONG_COLUMNS),
        )
        for segment in segments
    ]

    def attend(block: tuple[jax.Array, SequenceLayout]) -> jax.Array:
        query, layout = block

        def add(carry: Any, column_block: Any) -> tuple[Any, None]:
            key, value, key_layout = column_block
            mask = attention_mask(window, layout, key_layout)

            def attended(carry: Any) -> Any:
                peak, total, summed = carry
                raw = _masked_logits(query, KVSegment(key, value, mask), scale, softcap)
                # The result does not depend on it.
                higher = jax.lax.stop_gradient(jnp.maximum(peak, raw.max(axis=-1, keepdims=True)))
                weights, shrunk = jnp.exp(raw - higher), jnp.exp(peak - higher)
                products = _grouped_matmul(weights.astype(value.dtype), value, "ns,sd->nd", jnp.float32)
                return higher, total * shrunk + weights.sum(axis=-1, keepdims=True), summed * shrunk + products

            return jax.lax.cond(mask.any(), attended, lambda carry: carry, carry), None

        rows = (*query.shape[:-1], 1)
        if sinks is None:
            peak, total = jnp.full(rows, jnp.finfo(jnp.float32).min, jnp.float32), jnp.zeros(rows, jnp.float32)
        else:
            peak, total = _sink_logits(sinks, rows), jnp.ones(rows, jnp.float32)
        carry = peak, total, jnp.zeros(query.shape, jnp.float32)
        for column_blocks in columns:
            carry, _ = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), carry, column_blocks)
        _, total, summed = carry
        # A block of padding attends to nothing, and stays finite.
        return (summed / jnp.where(total > 0, total, 1)).astype(segments[0].value.dtype)

    blocks = _blocks(query, 3, LONG_QUERIES), _layout_blocks(layout, LONG_QUERIES)
    out = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), blocks)
    # [blocks, G, B, R, queries, d] -> [B, blocks, queries, G, R, d]
    return out.transpose(2, 0, 4, 1, 3, 5).reshape(batch, -1, heads * dim)[:, :steps]


def long_attention(
    query: jax.Array,
    rows: LongSegment,
    prefix: Sequence[LongSegment],
    window: jax.Array,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`gqa_attention` of whole rows to themselves and to a prefix, with no array of all pairs. Rows of one sequence
    each take the fused kernel of the platform that the program is compiled for; all others, or where it has none,
    blocks."""
    segments = (*prefix, rows)
    columns = sum(segment.key.shape[-1] for segment in segments)
    # A kernel takes prefix and row as one sequence, and computes the prefix's attention for nothing; it has no sinks.
    is_plain, has_shards = sinks is None and rows.layout.image_ids is None, rows.key.shape[0] % model_shards() == 0
    fits = is_plain and has_shards and columns <= 2 * query.shape[1]

    def in_blocks(query: jax.Array, segments: Sequence[LongSegment], window: jax.Array) -> jax.Array:
        return blockwise_attention(query, segments[-1].layout, segments, window, scale, softcap, sinks)

    def fused(kernel: Kernel) -> Callable[..., jax.Array]:
        def attend(query: jax.Array, segments: Sequence[LongSegment], window: jax.Array) -> jax.Array:
            out = _by_heads(kernel, *_one_sequence(query, segments))
            return out[:, -query.shape[1] :].reshape(*query.shape[:2], -1)

        def choose(query: jax.Array, segments: Sequence[LongSegment], window: jax.Array) -> jax.Array:
            # A prompt and a single answer behind it are segments 0 and 1.
            is_single = (segments[-1].layout.segment_ids <= 1).all() & (window >= columns)
            return jax.lax.cond(is_single, attend, in_blocks, query, segments, window)

        return choose

    kernels = fused_kernels(query.dtype, query.shape[-1], scale, softcap) if fits else {}
    by_platform = {platform: fused(kernel) for platform, kernel in kernels.items()}
    if not by_platform:
        return in_blocks(query, segments, window)
    return jax.lax.platform_dependent(query, segments, window, default=in_blocks, **by_platform)


def _one_sequence(query: jax.Array, segments: Sequence[LongSegment]) -> tuple[jax.Array, ...]:
    """Queries `[B, S, H, d]`, keys `[G, B, d, S]`, values `[G, B, S, d]` and `is_token: bool[B, S]` of all segments as
    of one row; the queries of earlier segments are zeros."""
    batch, steps = query.shape[:2]
    keys, values = (
        [x if x.ndim == 4 else jnp.broadcast_to(x[:, None], (len(x), batch, *x.shape[1:])) for x in each]
        for each in ([segment.key for segment in segments], [segment.value for segment in segments])
    )
    key, value = jnp.concatenate(keys, axis=-1), jnp.concatenate(values, axis=-2)
    tokens = [jnp.broadcast_to(segment.layout.segment_ids >= 0, (batch, segment.key.shape[-1])) for segment in segments]
    padded = jnp.pad(query, ((0, 0), (key.shape[-1] - steps, 0), (0, 0), (0, 0)))
    return padded, key, value, jnp.concatenate(tokens, axis=1)


def _by_heads(kernel: Kernel, *operands: jax.Array) -> jax.Array:
    """A kernel of `_one_sequence`'s operands. A compiler divides no kernel of a library between devices; those that
    share a model run it on their own heads."""
    if MODEL_AXIS not in jax.sharding.get_abstract_mesh().shape:
        return kernel(*operands)
    cuts = (cut_at(4, 2), cut_at(4, 0), cut_at(4, 0), cut_at(2, None))
    return map_shards(lambda _, *operands: kernel(*operands), cuts, cut_at(4, 2), *operands)


def _blocks(array: jax.Array, axis: int, size: int, fill: int = 0) -> jax.Array:
    """An axis in blocks of a size, or of its length, which lead: `[blocks, …, size, …]`. The last one is filled up."""
    axis %= array.ndim
    size = min(size, array.shape[axis])
    count = -(-array.shape[axis] // size)
    padding = [(0, count * size - length if i == axis else 0) for i, length in enumerate(array.shape)]
    padded = jnp.pad(array, padding, constant_values=fill) if padding[axis][1] else array
    return jnp.moveaxis(padded.reshape(*array.shape[:axis], count, size, *array.shape[axis + 1 :]), axis, 0)


def _layout_blocks(layout: SequenceLayout, size: int) -> SequenceLayout:
    """The columns of a layout in blocks, without their places; columns that fill up the last one are padding."""
    images = None if layout.image_ids is None else _blocks(layout.image_ids, 1, size, -1)
    return SequenceLayout(_blocks(layout.positions, 1, size), _blocks(layout.segment_ids, 1, size, -1), images)


def by_head(key: jax.Array, value: jax.Array) -> KeyValue:
    """Keys and values `[B, T, G, d]` in the layout of a cache: `[G, B, d, T]` and `[G, B, T, d]`, sharded by heads."""
    return shard(key.transpose(2, 0, 3, 1), 0), shard(value.transpose(2, 0, 1, 3), 0)


def attend_by_head(
    attention: Callable[..., jax.Array], query: jax.Array, kv_heads: int, *arguments: Any, **options: Any
) -> jax.Array:
    """The attention of queries `[B, T, H, d]`. Devices that share a model compute some of the heads each, where that
    divides no group of heads that share keys and values; else all heads."""
    cut = kv_heads % model_shards() == 0
    return shard(attention(shard(query, 2, cut), *arguments, **options), -1, cut)


def prefill_attention(window: jax.Array, layout: SequenceLayout, prefix: KeyValue | None = None) -> Attend:
    """The attention of whole rows to themselves and to a prefix, given as one layer's keys `[G, d, S]` and values
    `[G, S, d]`."""
    steps = layout.positions.shape[1]
    is_long = steps * (steps + (0 if prefix is None else prefix[1].shape[1])) > MAX_PAIRS
    before = [] if prefix is None else [(*prefix, prefix_layout(prefix[1].shape[1]))]

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> tuple[jax.Array, KeyValue]:
        key, value = by_head(key, value)
        attention: Callable[..., jax.Array]
        if is_long:
            attention, rows = long_attention, LongSegment(key, value, layout)
            arguments: tuple[Any, ...] = rows, [LongSegment(*earlier) for earlier in before], window
        else:
            masked = [KVSegment(k, v, attention_mask(window, layout, columns)) for k, v, columns in before]
            whole = KVSegment(key, value, attention_mask(window, layout, layout))
            is_causal = layout.image_ids is None
            attention = causal_attention if is_causal else gqa_attention
            arguments = (whole, masked) if is_causal else ([*masked, whole],)
        return attend_by_head(attention, query, key.shape[0], *arguments, **options), (key, value)

    return attend
