"""The decoder: one forward pass for training, scoring and generation. May import JAX and models.config.

`forward` scans over layers and takes each layer's weights from a *layer source* (models.sources): a stored
model, or a merge that is computed while the scan runs. It never asks where weights come from.

Arrays: tokens `[B, T]`, hidden states `[B, T, hidden]`, keys `[L, G, B, head_dim, S]` and values `[L, G, B, S,
head_dim]` of G key-value heads: what one head reads lies together, in the order in which its products read it. Weights
keep Hugging Face's orientation `[out, in]`. What stands in a batch's columns, and what sees what, is told by `Columns`:
rows may be padded at the left (for generation, every prompt ends in the last column) or at the right, may hold branches
that share a beginning, and may all follow one *prefix* that was computed before.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from evojax_merge.models.config import DecoderConfig, rope_frequencies

Weights = dict[str, jax.Array]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}

# Rows of the output head that are in memory at once while scoring.
HEAD_TILE = 8192
# With fewer rows than this a product keeps the weights at its left (see `product`).
FEW_ROWS = 128
# Queries that look at the same columns together, at least, and the most groups of them.
QUERY_BLOCK, MAX_QUERY_BLOCKS = 64, 4


class HeadSource(Protocol):
    """Where the output head comes from: `head(slices)` is what `head_slices` picks. `ahead`: whether slices, of the
    head and of layers, are to lie in memory before anything is computed from them."""

    @property
    def ahead(self) -> bool: ...
    def head_slices(self, start: jax.Array | int, rows: int) -> Any: ...
    def head(self, slices: Any) -> jax.Array: ...


class LayerSource(HeadSource, Protocol):
    """Where weights come from. `layers` has leading axis L on every leaf and is what the scan runs over."""

    @property
    def layers(self) -> Any: ...
    def layer(self, slice_: Any) -> Weights: ...
    def embed(self, tokens: jax.Array) -> jax.Array: ...
    def final_norm(self) -> jax.Array: ...


class StoredSource(HeadSource, Protocol):
    """A model that exists, layer by layer."""

    def each_layer(self) -> Sequence[Weights]: ...
    def embed(self, tokens: jax.Array) -> jax.Array: ...
    def final_norm(self) -> jax.Array: ...


@struct.dataclass
class Cache:
    """Keys `[L, G, B, head_dim, S]` and values `[L, G, B, S, head_dim]` of the columns that were seen."""

    keys: jax.Array
    values: jax.Array

    @property
    def width(self) -> int:
        """How many columns there is room for."""
        return self.values.shape[-2]


@struct.dataclass
class Columns:
    """positions: int32[B, T], of each token in its text; branches: int32[B, T], 0 for what all branches of a row see,
    their number for what they alone see, negative for padding."""

    positions: jax.Array
    branches: jax.Array


def columns_of(width: int, first: jax.Array, length: jax.Array) -> Columns:
    """Plain rows: one text each, in the columns from `first: int32[B]` on, `length: int32[B]` of them."""
    offsets = jnp.arange(width)[None, :] - first[:, None]
    return Columns(jnp.maximum(offsets, 0), jnp.where((offsets >= 0) & (offsets < length[:, None]), 0, -1))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weight * (wide * scale).astype(x.dtype)


def product(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """`x @ W.T` with `W: [out, in]`: `[..., out]` in `dtype`, by default the operands'."""
    if x.size // x.shape[-1] >= FEW_ROWS:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)
    # A few rows against large weights: a CPU's product is up to a quarter faster as W @ x.T.
    return upright_product(x, weight, dtype).T.reshape(*x.shape[:-1], -1)


def upright_product(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """`W @ x.T` with `W: [out, in]`: `[out, rows]`, with x.T laid out anew. The barriers keep the compiler from turning
    it round."""
    columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    return jax.lax.optimization_barrier(jnp.einsum("oi,ib->ob", weight, columns, preferred_element_type=dtype))


def linear(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """`x @ W.T (+ b)` with `W: [out, in]`."""
    y = product(x, weights[name])
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of `x: [B, T, heads, head_dim]`, halves paired as Hugging Face pairs them."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotary_table(config: DecoderConfig, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin `[B, T, head_dim/2]` at `positions: [B, T]` of sequences of `lengths: [B]`."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config, lengths)[:, None, :]
    factor = config.rope.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


@struct.dataclass
class Seen:
    """What a query may look at: key `[G, B, d, S]` and value `[G, B, S, d]`, without B where all rows share it, and
    which columns of it each query sees, `visible: bool[B, T, S]`."""

    key: jax.Array
    value: jax.Array
    visible: jax.Array


def attend(query: jax.Array, parts: Sequence[Seen]) -> jax.Array:
    """Grouped-query attention `[B, T, H * d]` of queries `[B, T, H, d]` over all columns of all parts."""
    batch, steps, heads, dim = query.shape
    groups = parts[0].key.shape[0]
    # Heads of a group first, as keys and values have them.
    query = query.reshape(batch, steps, groups, heads // groups, dim).transpose(2, 0, 3, 1, 4)
    scores = []
    for part in parts:
        raw = _by_group(query, part.key, "nd,ds->ns").astype(jnp.float32) * dim**-0.5
        # Finite, so that a padding row in which nothing is visible stays finite as well.
        scores.append(jnp.where(part.visible[None, :, None], raw, jnp.finfo(jnp.float32).min))
    shares = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(parts[0].value.dtype)
    mixed, begin = [], 0
    for part in parts:
        end = begin + part.value.shape[-2]
        mixed.append(_by_group(shares[..., begin:end], part.value, "ns,sd->nd"))
        begin = end
    return sum(mixed[1:], mixed[0]).transpose(1, 3, 0, 2, 4).reshape(batch, steps, heads * dim)


def _by_group(left: jax.Array, right: jax.Array, product: str) -> jax.Array:
    """Products `[G, B, R, T, …]` of left `[G, B, R, T, …]` with right `[G, B, …]`, or `[G, …]` for all rows."""
    groups, batch, repeats, steps, inner = left.shape
    left_axes, right_axes, out_axes = product.replace("->", ",").split(",")
    lead, rows = ("gb", (batch, repeats * steps)) if right.ndim == 4 else ("g", (batch * repeats * steps,))
    flat = left.reshape(groups, *rows, inner)
    out = jnp.einsum(f"{lead}{left_axes},{lead}{right_axes}->{lead}{out_axes}", flat, right)
    return out.reshape(groups, batch, repeats, steps, -1)


def attend_backwards(query: jax.Array, own: Seen, before: Sequence[Seen]) -> jax.Array:
    """`attend` of whole rows to themselves and to what stands before them. No column sees one behind it, so that blocks
    of queries need only look at the columns up to their own."""
    steps = query.shape[1]
    blocks = max(1, min(MAX_QUERY_BLOCKS, steps // QUERY_BLOCK))
    edges = [steps * i // blocks for i in range(blocks + 1)]

    def block(begin: int, end: int) -> jax.Array:
        seen = Seen(own.key[..., :end], own.value[:, :, :end], own.visible[:, begin:end, :end])
        earlier = [Seen(part.key, part.value, part.visible[:, begin:end]) for part in before]
        return attend(query[:, begin:end], [*earlier, seen])

    return jnp.concatenate([block(begin, end) for begin, end in pairwise(edges)], axis=1)


def project_qkv(
    config: DecoderConfig, weights: Weights, x: jax.Array, rotary: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries `[B, T, H, d]`, rotated keys `[G, B, d, T]`, and values `[G, B, T, d]`."""
    with jax.named_scope("qkv"):
        query, key, value = (
            linear(x, weights, name).reshape(*x.shape[:2], -1, config.head_dim) for name in ("q", "k", "v")
        )
        if config.qk_norm:
            query = rms_norm(query, weights["q_norm"], config.norm_eps)
            key = rms_norm(key, weights["k_norm"], config.norm_eps)
        cos, sin = (table.astype(x.dtype) for table in rotary)
        return rotate(query, cos, sin), rotate(key, cos, sin).transpose(2, 0, 3, 1), value.transpose(2, 0, 1, 3)


def gated_mlp(config: DecoderConfig, weights: Weights, x: jax.Array) -> jax.Array:
    with jax.named_scope("mlp"):
        gate = ACTIVATIONS[config.activation](linear(x, weights, "gate"))
        return linear(gate * linear(x, weights, "up"), weights, "down")


def visible(window: jax.Array, queries: Columns, keys: Columns) -> jax.Array:
    """bool[B, T, S]: what comes before, inside the window, in what is shared or in the same branch."""
    back = queries.positions[:, :, None] - keys.positions[:, None, :]
    branch = keys.branches[:, None, :]
    return (back >= 0) & (back < window) & ((branch == 0) | ((branch > 0) & (branch == queries.branches[:, :, None])))


def prefix_columns(length: int) -> Columns:
    """The columns of a prefix: one row, the same for the whole batch."""
    return Columns(jnp.arange(length)[None], jnp.zeros((1, length), jnp.int32))


def run_layer(
    config: DecoderConfig,
    weights: Weights,
    x: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    window: jax.Array,
    columns: Columns,
    prefix: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer on whole rows: the hidden states `[B, T, hidden]` after it, and its keys and values. `prefix`: the
    layer's keys `[G, d, S]` and values `[G, S, d]` of what stands before every row."""
    with jax.named_scope("attention"):
        normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
        query, key, value = project_qkv(config, weights, normed, rotary)
        before = []
        if prefix is not None:
            before = [Seen(*prefix, visible(window, columns, prefix_columns(prefix[1].shape[1])))]
        mixed = attend_backwards(query, Seen(key, value, visible(window, columns, columns)), before)
        x = x + linear(mixed, weights, "o")
    return x + gated_mlp(config, weights, rms_norm(x, weights["mlp_norm"], config.norm_eps)), (key, value)


def rotary_of(config: DecoderConfig, columns: Columns) -> tuple[jax.Array, jax.Array]:
    """The rotary table of a batch's columns."""
    lengths = jnp.max(jnp.where(columns.branches >= 0, columns.positions, 0), axis=1) + 1
    return rotary_table(config, columns.positions, lengths)


def scan_ahead(step: Callable[..., Any], x: Any, at: Callable[[Any], Any], rest: Any) -> tuple[Any, Any]:
    """Scan `step(x, slices, rest) -> (x, out)` over slices `at(0)`, `at(1)`, … and the rest (leading axis on every
    leaf), the next slices carried along. A CPU's compiler would else fuse the choice of a slice into what is computed
    from it, look its number up for every entry, and use no vector instructions. Costs the memory of one step's slices,
    and is not for gradients."""
    count = len(jax.tree.leaves(rest)[0])

    def body(carry: tuple[Any, Any], xs: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        (x, slices), (following, rest) = carry, xs
        x, out = step(x, slices, rest)
        return (x, at(following)), out

    (x, _), out = jax.lax.scan(body, (x, at(0)), (jnp.minimum(jnp.arange(count) + 1, count - 1), rest))
    return x, out


def forward(
    config: DecoderConfig,
    source: LayerSource,
    tokens: jax.Array,
    columns: Columns,
    *,
    prefix: Cache | None = None,
    keep_cache: bool = False,
) -> tuple[jax.Array, Cache | None]:
    """Final hidden states `[B, T, hidden]` (after the last norm), and the cache where it is wanted.

    tokens: int32[B, T], in columns of which `columns` tells the positions; `prefix`: the cache of one row (B = 1) that
    stands before every row of the batch.
    """
    rotary = rotary_of(config, columns)

    def layer(x: jax.Array, slice_: Any, rest: tuple[jax.Array, Cache | None]) -> tuple[jax.Array, Any]:
        window, before = rest
        shared = None if before is None else (before.keys[:, 0], before.values[:, 0])
        x, kept = run_layer(config, source.layer(slice_), x, rotary, window, columns, shared)
        return x, kept if keep_cache else None

    def at(index: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), source.layers)

    x, rest = source.embed(tokens), (jnp.asarray(config.windows, jnp.int32), prefix)
    if source.ahead:
        x, kept = scan_ahead(layer, x, at, rest)
    else:
        x, kept = jax.lax.scan(lambda x, xs: layer(x, *xs), x, (source.layers, rest))
    x = rms_norm(x, source.final_norm(), config.norm_eps)
    return x, Cache(*kept) if keep_cache else None


def step(
    config: DecoderConfig,
    source: StoredSource,
    cache: Sequence[Cache],
    column: jax.Array,
    tokens: jax.Array,
    first: jax.Array,
    prefix: Cache | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """A few tokens further: tokens `int32[B, W]` stand in the columns from `column` on (a scalar, the same for the
    whole batch, or `int32[B]`) of rows that begin at `first: int32[B]`, behind the prefix where there is one. cache:
    each layer's, without the axis L.

    Returns the final hidden states `[B, W, hidden]` and the cache with these columns written. What stood in or behind
    them is not seen.
    """
    before = 0 if prefix is None else prefix.width
    (rows, count), width = tokens.shape, cache[0].width
    positions = before + jnp.broadcast_to(column, rows)[:, None] + jnp.arange(count) - first[:, None]
    here = Columns(positions, jnp.zeros_like(positions))
    # Each as the last token of its text, as if it came alone.
    alone = rotary_of(config, Columns(positions.reshape(-1, 1), jnp.zeros((rows * count, 1), jnp.int32)))
    rotary = (alone[0].reshape(rows, count, -1), alone[1].reshape(rows, count, -1))
    behind = columns_of(width, first, width - first)
    there = Columns(before + behind.positions, behind.branches)
    x, written = source.embed(tokens), []
    # Not a scan: to pick a layer of a stack, be it weights or cache, a CPU copies it, which takes as long as to use it.
    for index, (weights, kept) in enumerate(zip(source.each_layer(), cache, strict=True)):
        window = jnp.int32(config.windows[index])
        normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
        query, key, value = project_qkv(config, weights, normed, rotary)
        kept = Cache(write_columns(kept.keys, key, column, 3), write_columns(kept.values, value, column, 2))
        parts = [Seen(kept.keys, kept.values, visible(window, here, there))]
        if prefix is not None:
            seen = visible(window, here, prefix_columns(before))
            parts.insert(0, Seen(prefix.keys[index, :, 0], prefix.values[index, :, 0], seen))
        x = x + linear(attend(query, parts), weights, "o")
        x = x + gated_mlp(config, weights, rms_norm(x, weights["mlp_norm"], config.norm_eps))
        written.append(kept)
    return rms_norm(x, source.final_norm(), config.norm_eps), tuple(written)


def write_columns(kept: jax.Array, fresh: jax.Array, column: jax.Array, axis: int) -> jax.Array:
    """`kept: [G, B, …]` with fresh entries `[G, B, …]` from `column` on along `axis`: a scalar, or `int32[B]`, a column
    for each row."""
    fresh = fresh.astype(kept.dtype)
    if column.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(kept, fresh, column, axis)
    places = jnp.stack([jnp.arange(kept.shape[1]), column], axis=-1)
    window = jax.lax.ScatterDimensionNumbers((1, 2, 3), (1,), (1, axis))
    return jax.lax.scatter(
        kept, places, fresh.swapaxes(0, 1), window, indices_are_sorted=True, unique_indices=True,
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )  # fmt: skip


def logits(config: DecoderConfig, source: HeadSource, hidden: jax.Array) -> jax.Array:
    """float32 logits `[..., vocab]` of final hidden states `[..., hidden]`."""
    return product(hidden, source.head(source.head_slices(0, config.vocab)), jnp.float32)


def likeliest(config: DecoderConfig, source: HeadSource, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens `int32[…]` after final hidden states `[…, hidden]`, of equals the first, and their float32
    logits, NaN where any token's is."""
    # Upright, a CPU compares the logits of many rows at a time.
    scores = upright_product(hidden, source.head(source.head_slices(0, config.vocab)), jnp.float32)
    # Of a column, NaN counts as the largest; a maximum need not keep it.
    best = jnp.argmax(scores, axis=0).astype(jnp.int32)
    most = jnp.take_along_axis(scores, best[None], axis=0)[0]
    return best.reshape(hidden.shape[:-1]), most.reshape(hidden.shape[:-1])


def score_targets(
    config: DecoderConfig, source: HeadSource, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log p(target) `float32[N]`, and whether the target is the likeliest token, `bool[N]`, for hidden states
    `[N, hidden]` and targets `int32[N]`.

    Walks over the vocabulary in tiles of `HEAD_TILE` rows and keeps a running log-sum-exp and maximum, so that
    neither the whole head of a merged candidate nor the full logits ever exist.
    """
    rows = min(HEAD_TILE, config.vocab)
    tiles = -(-config.vocab // rows)
    State = tuple[jax.Array, jax.Array, jax.Array]

    # The last tile is moved back inside the vocabulary; the rows it repeats are masked.
    starts = jnp.minimum(jnp.arange(tiles) * rows, config.vocab - rows)
    # To the compiler, where tiles begin depends on the layers' result: none is fetched while they need the memory.
    starts = jnp.minimum(starts, config.vocab + (hidden[0, 0] > 0))

    def tile(carry: State, slices: Any, at: tuple[jax.Array, jax.Array]) -> tuple[State, None]:
        total, picked, most = carry
        index, start = at
        scores = product(hidden, source.head(slices), jnp.float32)
        ids = start + jnp.arange(rows)
        fresh = jnp.where(ids >= index * rows, scores, -jnp.inf)
        peak = fresh.max(axis=-1)
        total = jnp.logaddexp(total, peak + jnp.log(jnp.exp(fresh - peak[:, None]).sum(axis=-1)))
        hit = jnp.take_along_axis(scores, jnp.clip(targets - start, 0, rows - 1)[:, None], axis=1)[:, 0]
        inside = (targets >= index * rows) & (targets < start + rows)
        return (total, jnp.where(inside, hit, picked), jnp.maximum(most, peak)), None

    def slices(index: Any) -> Any:
        return source.head_slices(starts[index], rows)

    nothing, places = jnp.full(targets.shape, -jnp.inf), (jnp.arange(tiles), starts)
    before = (nothing, jnp.zeros(targets.shape, jnp.float32), nothing)
    with jax.named_scope("head"):
        if source.ahead:
            (total, picked, most), _ = scan_ahead(tile, before, slices, places)
        else:
            (total, picked, most), _ = jax.lax.scan(lambda carry, at: tile(carry, slices(at[0]), at), before, places)
    return picked - total, picked >= most
