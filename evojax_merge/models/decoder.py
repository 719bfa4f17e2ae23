"""The decoder: one forward pass for training, scoring and generation.

`forward` (prefill) scans over the layers and takes each layer's weights from a *layer source* (models.sources): stored
weights, or a merge that is computed while the scan runs. `decode_step` feeds a few tokens to a model with a KV cache.
Both run the block of the config's architecture and pass it the attention function.

Shapes: tokens `[B, T]`, hidden states `[B, T, hidden]`, cached keys `[L, G, B, head_dim, S]` and values `[L, G, B, S,
head_dim]` of G key-value heads: each head's keys and values are contiguous, in the order in which its matmuls read
them. Weights keep Hugging Face's orientation `[out, in]`. A `SequenceLayout` gives every token's position and segment:
rows may be padded on the left (for generation, every prompt ends in the last column) or on the right, may hold several
segments that share a beginning, and may all follow one *prefix* that was prefilled before.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from evojax_merge.models.architecture import LAYERS, SharedWeights, architecture_of
from evojax_merge.models.attention import (
    KVSegment,
    attend_by_head,
    attention_mask,
    by_head,
    gqa_attention,
    prefill_attention,
)
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.images import ImageInputs
from evojax_merge.models.layers import (
    KeyValue,
    LayerKind,
    SequenceLayout,
    Weights,
    layer_kinds,
    matmul,
    padded_layout,
    prefix_layout,
    tables_of,
    without_upcast,
)
from evojax_merge.models.projector import project
from evojax_merge.models.sharding import replicate, shards_of

# Rows of the LM head that are in memory at once while scoring, on all devices that share the head together.
VOCAB_TILE = 8192


class HeadSource(Protocol):
    """The source of the LM head: `lm_head_rows` picks `rows` rows of each of `shards` equal shards of the vocabulary,
    from the shard's row `start` on, and `head(slices)` computes the head from them. `prefetch`: whether a scan loads
    the next slices, of the head and of layers, into its carry before anything is computed from them."""

    @property
    def prefetch(self) -> bool: ...
    def lm_head_rows(self, start: jax.Array | int, rows: int, shards: int) -> Any: ...
    def head(self, slices: Any) -> jax.Array: ...


class LayerSource(HeadSource, SharedWeights, Protocol):
    """The source of all weights. `stacks[stack]` has leading axis L on every leaf and is what a scan runs over."""

    @property
    def stacks(self) -> Any: ...
    def layer(self, slice_: Any) -> Weights: ...


class MaterialisedSource(HeadSource, SharedWeights, Protocol):
    """Weights that exist in memory, layer by layer."""

    def each_layer(self, stack: str) -> Sequence[Weights]: ...


@struct.dataclass
class KVCache:
    """Keys `[L, G, B, head_dim, S]` and values `[L, G, B, S, head_dim]` of the columns that were computed."""

    keys: jax.Array
    values: jax.Array

    @property
    def width(self) -> int:
        """S, the number of columns that the cache has room for."""
        return self.values.shape[-2]


# (cache `[G, B, …]`, fresh entries `[G, B, …]`, the column of the first entry, axis) -> the cache with the entries.
CacheUpdate = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


# ---------------------------------------------------------------------------------------------------------------
# The two ways through all layers


def scan_with_prefetch(step: Callable[..., Any], x: Any, at: Callable[[Any], Any], xs: Any) -> tuple[Any, Any]:
    """Scan `step(x, slices, xs) -> (x, out)` over slices `at(0)`, `at(1)`, … and `xs` (leading axis on every leaf),
    with the next slices prefetched into the carry. Without the prefetch a CPU's compiler fuses the choice of a slice
    into the computation from it, looks up the index for every entry, and uses no vector instructions. Costs the memory
    of one step's slices, and is not meant for gradients."""
    count = len(jax.tree.leaves(xs)[0])

    def body(carry: tuple[Any, Any], following_xs: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        (x, slices), (following, xs) = carry, following_xs
        x, out = step(x, slices, xs)
        return (x, at(following)), out

    (x, _), out = jax.lax.scan(body, (x, at(0)), (jnp.minimum(jnp.arange(count) + 1, count - 1), xs))
    return x, out


def embed(
    config: DecoderConfig, source: SharedWeights, tokens: jax.Array, layout: SequenceLayout, images: ImageInputs | None
) -> jax.Array:
    """The hidden states before the first layer. images: a negative token is the position of row `~token` of their
    features, which enters as it is, or through the projector that a config has; None: there is no negative token."""
    architecture = architecture_of(config)
    if images is None:
        return architecture.embed(config, source, tokens, layout)
    embedded = architecture.embed(config, source, jnp.maximum(tokens, 0), layout)
    rows = image_rows(images.features, tokens, embedded.dtype)
    if config.projector is not None:
        rows = project(config.projector, source, rows)
    return jnp.where((tokens < 0)[..., None], rows, embedded)


def image_rows(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """`[..., B, T, hidden]`: the rows of a table `[..., R, hidden]` in the positions of images, any row elsewhere."""
    return jnp.take(table, jnp.maximum(~tokens, 0), axis=-2).astype(dtype)


def image_layout(
    config: DecoderConfig, tokens: jax.Array, layout: SequenceLayout, images: ImageInputs | None
) -> SequenceLayout:
    """The layout of tokens with the places of their images, and the `image_ids` that the config's architecture has use
    for. An image is a run of negative tokens."""
    if images is None:
        return layout
    layout = replace(layout, places=images.positions)
    if not architecture_of(config).bidirectional_images:
        return layout
    is_image = tokens < 0
    begins = is_image & ~jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
    return replace(layout, image_ids=jnp.where(is_image, jnp.cumsum(begins, axis=1), -1))


def deepstack_rows(tokens: jax.Array, images: ImageInputs | None, dtype: Any) -> jax.Array | None:
    """`[D, B, T, hidden]`: the rows that are added behind each of the first D layers, 0 for texts; None: none are."""
    if images is None or images.deepstack is None:
        return None
    return jnp.where((tokens < 0)[..., None], image_rows(images.deepstack, tokens, dtype), 0)


def add_deepstack(x: jax.Array, added: jax.Array | None, number: jax.Array | None) -> jax.Array:
    """The hidden states behind layer `number`, with the rows of `added` (see `deepstack_rows`) for that layer."""
    if added is None or number is None:
        return x
    last = added.shape[0] - 1
    return jax.lax.cond(number <= last, lambda: x + added[jnp.minimum(number, last)], lambda: x)


def run_layer(
    config: DecoderConfig, weights: Weights, x: jax.Array, number: jax.Array | None, kind: LayerKind,
    layout: SequenceLayout, tables: Any, added: jax.Array | None, prefix: KeyValue | None,
) -> tuple[jax.Array, KeyValue]:  # fmt: skip
    """Layer `number` of a prefill: the hidden states `[B, T, hidden]` behind it, and its keys and values. tables: the
    architecture's position tables for the layout; added: see `deepstack_rows`, None where `number` is not needed;
    prefix: the layer's keys and values of the tokens before, as in `prefill_attention`."""
    attend = prefill_attention(kind.window, layout, prefix)
    x, kv = architecture_of(config).block(config, weights, x, tables_of(kind, tables), attend)
    return replicate(add_deepstack(x, added, number)), kv


def forward(
    config: DecoderConfig,
    source: LayerSource,
    tokens: jax.Array,
    layout: SequenceLayout,
    *,
    prefix: KVCache | None = None,
    return_kv: bool = False,
    images: ImageInputs | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Run a prefill and return the final hidden states `[B, T, hidden]` (after the last norm), and the KV cache with
    `return_kv`.

    tokens: int32[B, T], laid out as `layout` says; `prefix`: the cache of one row (B = 1) that every row of the batch
    follows; images: those of the tokens (see `embed`).
    """
    architecture, slices = architecture_of(config), source.stacks[LAYERS]
    layout = image_layout(config, tokens, layout, images)
    tables = architecture.position_tables(config, layout)

    def layer(x: jax.Array, slice_: Any, each: Any) -> tuple[jax.Array, Any]:
        number, kind, before = each
        shared = None if before is None else (before.keys[:, 0], before.values[:, 0])
        x, kv = run_layer(config, source.layer(slice_), x, number, kind, layout, tables, added, shared)
        return x, kv if return_kv else None

    def at(index: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(*without_upcast(leaf, index), keepdims=False), slices
        )

    x = replicate(embed(config, source, tokens, layout, images))
    added = deepstack_rows(tokens, images, x.dtype)
    numbers = None if added is None else jnp.arange(config.layers)
    each_layer = (numbers, layer_kinds(config), prefix)
    if source.prefetch:
        x, kv = scan_with_prefetch(layer, x, at, each_layer)
    else:
        # For gradients, a layer is computed again from the state before it, the only value that is kept.
        x, kv = jax.lax.scan(jax.checkpoint(lambda x, xs: layer(x, *xs), prevent_cse=False), x, (slices, each_layer))
    x = architecture.final_norm(config, source, x)
    return x, KVCache(*kv) if return_kv else None


def decode_step(
    config: DecoderConfig,
    source: MaterialisedSource,
    cache: Sequence[KVCache],
    column: jax.Array,
    tokens: jax.Array,
    left_pad: jax.Array,
    update: CacheUpdate,
    prefix: KVCache | None = None,
    shift: jax.Array | None = None,
) -> tuple[jax.Array, tuple[KVCache, ...]]:
    """Feed tokens `int32[B, W]` that go into the cache's columns from `column` on (a scalar for the whole batch, or
    `int32[B]`), in rows that begin at `left_pad: int32[B]`, after the prefix where there is one. cache: one per layer,
    without the axis L; update: writes columns into a cache; shift: int32[B], the number by which images in earlier
    columns let positions be less than they count (see models.images), or None.

    Returns the final hidden states `[B, W, hidden]`, and the cache with these columns written. Earlier contents of
    these and later columns are not attended to.
    """
    architecture, before = architecture_of(config), 0 if prefix is None else prefix.width
    (rows, count), width = tokens.shape, cache[0].width
    positions = before + jnp.broadcast_to(column, rows)[:, None] + jnp.arange(count) - left_pad[:, None]
    query_layout = SequenceLayout(positions, jnp.zeros_like(positions))
    # Each token counts as the last of its sequence, as in a step of one token: dynamic RoPE depends on the length.
    rotated = positions if shift is None else positions - shift[:, None]
    single = SequenceLayout(rotated.reshape(-1, 1), jnp.zeros((rows * count, 1), jnp.int32))
    tables = jax.tree.map(
        lambda table: table.reshape(rows, count, *table.shape[2:]), architecture.position_tables(config, single)
    )
    cached = padded_layout(width, left_pad, width - left_pad)
    cached = SequenceLayout(before + cached.positions, cached.segment_ids)
    x, caches = replicate(architecture.embed(config, source, tokens, query_layout)), []
    # No scan: picking a layer of a stack, weights or cache, copies it on a CPU, which takes as long as using it.
    for index, (weights, layer_cache) in enumerate(zip(source.each_layer(LAYERS), cache, strict=True)):
        kind = layer_kinds(config, index)
        mask = attention_mask(kind.window, query_layout, cached)
        behind = []
        if prefix is not None:
            prefix_mask = attention_mask(kind.window, query_layout, prefix_layout(before))
            behind = [KVSegment(prefix.keys[index, :, 0], prefix.values[index, :, 0], prefix_mask)]

        def attend(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            *,
            scale: float | None = None,
            softcap: float | None = None,
            old: KVCache = layer_cache,
            mask: jax.Array = mask,
            behind: Sequence[KVSegment] = tuple(behind),
        ) -> tuple[jax.Array, KeyValue]:
            key, value = by_head(key, value)
            keys = update(old.keys, key, column, 3)
            values = update(old.values, value, column, 2)
            segments = [*behind, KVSegment(keys, values, mask)]
            return attend_by_head(gqa_attention, query, keys.shape[0], segments, scale, softcap), (keys, values)

        x, kv = architecture.block(config, weights, x, tables_of(kind, tables), attend)
        x = replicate(x)
        caches.append(KVCache(*kv))
    return architecture.final_norm(config, source, x), tuple(caches)


def update_columns(cache: jax.Array, fresh: jax.Array, column: jax.Array, axis: int) -> jax.Array:
    """`cache: [G, B, …]` with fresh entries `[G, B, …]` from `column: int32[]` on along `axis`."""
    return jax.lax.dynamic_update_slice_in_dim(cache, fresh.astype(cache.dtype), column, axis)


def scatter_columns(cache: jax.Array, fresh: jax.Array, column: jax.Array, axis: int) -> jax.Array:
    """Like `update_columns`, with a column per row, `int32[B]`. Writes the fresh entries alone."""
    starts = jnp.stack([jnp.arange(cache.shape[1]), column], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers((1, 2, 3), (1,), (1, axis))
    return jax.lax.scatter(
        cache, starts, fresh.astype(cache.dtype).swapaxes(0, 1), numbers, indices_are_sorted=True, unique_indices=True,
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )  # fmt: skip


def select_columns(cache: jax.Array, fresh: jax.Array, column: jax.Array, axis: int) -> jax.Array:
    """Like `scatter_columns`, by a select over all entries. That reads and writes the whole cache in place; to scatter,
    a TPU's compiler would copy the cache into another layout."""
    shape = [1] * cache.ndim
    shape[1], shape[axis] = cache.shape[1], cache.shape[axis]
    offset = (jnp.arange(cache.shape[axis]) - column[:, None]).reshape(shape)
    for i in range(fresh.shape[axis]):
        entry = jax.lax.slice_in_dim(fresh.astype(cache.dtype), i, i + 1, axis=axis)
        cache = jnp.where(offset == i, entry, cache)
    return cache


# ---------------------------------------------------------------------------------------------------------------
# The LM head


def logits(config: DecoderConfig, source: HeadSource, hidden: jax.Array) -> jax.Array:
    """float32 logits `[..., vocab]` of final hidden states `[..., hidden]`."""
    products = matmul(hidden, source.head(source.lm_head_rows(0, config.vocab, 1)), jnp.float32)
    return architecture_of(config).map_logits(config, products)


def target_logprobs(
    config: DecoderConfig, source: HeadSource, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log p(target) `float32[N]`, and whether the target is the greedy token, `bool[N]`, for hidden states
    `[N, hidden]` and targets `int32[N]`.

    Walks over the vocabulary in tiles of `VOCAB_TILE` rows and keeps a running log-sum-exp and maximum, so that neither
    the whole head of a merged candidate nor the full logits ever exist. Where devices share the head, a tile has
    equally many rows of each device's shard.
    """
    architecture, shards = architecture_of(config), shards_of(config.vocab)
    vocab = config.vocab // shards  # of a shard
    rows = min(VOCAB_TILE // shards, vocab)
    tiles = -(-vocab // rows)
    Carry = tuple[jax.Array, jax.Array, jax.Array]

    # The last tile is moved back inside the vocabulary; the rows it repeats are masked.
    starts = jnp.minimum(jnp.arange(tiles) * rows, vocab - rows)
    # A made-up dependency of the tiles' starts on the layers' result: the compiler fetches no tile while layers need
    # the memory.
    starts = jnp.minimum(starts, vocab + (hidden[0, 0] > 0))
    # A target's row in its shard, and the beginning of its shard's rows in a tile.
    own_targets, own_rows = targets % vocab, targets // vocab * rows

    def score_tile(carry: Carry, slices: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Carry, None]:
        log_sum, picked, max_logit = carry
        index, start = at
        tile = architecture.map_logits(config, matmul(hidden, source.head(slices), jnp.float32))
        ids = start + jnp.arange(rows)
        fresh = jnp.where(jnp.tile(ids >= index * rows, shards), tile, -jnp.inf)
        peak = fresh.max(axis=-1)
        log_sum = jnp.logaddexp(log_sum, peak + jnp.log(jnp.exp(fresh - peak[:, None]).sum(axis=-1)))
        places = own_rows + jnp.clip(own_targets - start, 0, rows - 1)
        hit = jnp.take_along_axis(tile, places[:, None], axis=1)[:, 0]
        inside = (own_targets >= index * rows) & (own_targets < start + rows)
        return (log_sum, jnp.where(inside, hit, picked), jnp.maximum(max_logit, peak)), None

    def slices(index: Any) -> Any:
        return source.lm_head_rows(starts[index], rows, shards)

    nothing, places = jnp.full(targets.shape, -jnp.inf), (jnp.arange(tiles), starts)
    empty = (nothing, jnp.zeros(targets.shape, jnp.float32), nothing)
    with jax.named_scope("head"):
        if source.prefetch:
            (log_sum, picked, max_logit), _ = scan_with_prefetch(score_tile, empty, slices, places)
        else:
            (log_sum, picked, max_logit), _ = jax.lax.scan(
                jax.checkpoint(lambda carry, at: score_tile(carry, slices(at[0]), at), prevent_cse=False), empty, places
            )
    return picked - log_sum, picked >= max_logit
