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
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from evojax_merge.models.architecture import (
    ATTENTION,
    LayerType,
    SharedWeights,
    architecture_of,
    layer_types,
    rows_of_layers,
    types_of_layers,
)
from evojax_merge.models.attention import (
    KVSegment,
    attend_by_head,
    attention_mask,
    by_head,
    gqa_attention,
    prefill_attention,
)
from evojax_merge.models.bank import take_candidate
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.images import ImageInputs
from evojax_merge.models.layers import (
    Attend,
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
from evojax_merge.models.recurrence import Histories, RowRecurrence, StepRecurrence, empty_state, histories
from evojax_merge.models.sharding import replicate, shards_of
from evojax_merge.models.sources import StackedWeights, UnstackedWeights

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


@struct.dataclass
class KVCache:
    """Keys `[L, G, B, head_dim, S]` and values `[L, G, B, S, head_dim]` of the columns that were computed."""

    keys: jax.Array
    values: jax.Array

    @property
    def width(self) -> int:
        """S, the number of columns that the cache has room for."""
        return self.values.shape[-2]


@struct.dataclass
class LayerStates:
    """The memory that the layers keep of a batch's tokens. by_type: type of layer -> a `KVCache`, a `RecurrentState`,
    or a tuple of these (see `LayerType.memory`), with the axis of its layers in front. width: the number of columns."""

    by_type: dict[str, Any]
    width: int = struct.field(pytree_node=False)


def map_memory(function: Callable[..., Any], memory: str | tuple[str, ...], *values: Any) -> Any:
    """`function(name, *values)` for the name of a layer's memory; for a tuple of names the tuple of the results, from
    the items of each value (None stands for Nones)."""
    if isinstance(memory, str):
        return function(memory, *values)
    items = [value if value is not None else (None,) * len(memory) for value in values]
    return tuple(function(name, *each) for name, *each in zip(memory, *items, strict=True))


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


@struct.dataclass
class LayerInputs:
    """The inputs of a prefill that all layers share. layout: of the tokens; tables: the architecture's position tables
    for it; added: see `deepstack_rows`; past: for recurrent layers, else None."""

    layout: SequenceLayout
    tables: Any
    added: jax.Array | None
    past: Histories | None

    @classmethod
    def of(
        cls, config: DecoderConfig, tokens: jax.Array, layout: SequenceLayout, images: ImageInputs | None, dtype: Any
    ) -> "LayerInputs":
        """The inputs for tokens `int32[B, T]` whose hidden states have a dtype."""
        layout = image_layout(config, tokens, layout, images)
        return cls.of_layout(config, layout, deepstack_rows(tokens, images, dtype))

    @classmethod
    def of_layout(cls, config: DecoderConfig, layout: SequenceLayout, added: jax.Array | None) -> "LayerInputs":
        """The inputs for tokens with a layout, in which images have their places."""
        past = None if config.recurrent is None else histories(layout, config.recurrent.kernel)
        return cls(layout, architecture_of(config).position_tables(config, layout), added, past)


def run_layer(
    config: DecoderConfig, type_: LayerType, weights: Weights, x: jax.Array, number: jax.Array | None, kind: LayerKind,
    inputs: LayerInputs, prefix: Any,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Layer `number` of a prefill: the hidden states `[B, T, hidden]` behind it, and its memory of the tokens. number:
    None where no rows are added behind layers; prefix: the layer's memory of the tokens before (see `first_row`)."""

    def access(name: str, before: Any) -> Any:
        if name == ATTENTION:
            return prefill_attention(kind.window, inputs.layout, before)
        assert config.recurrent is not None and inputs.past is not None
        return RowRecurrence(inputs.layout, inputs.past, before or empty_state(config.recurrent, 1, x.dtype))

    memory = map_memory(access, type_.memory, prefix)
    behind, kept = type_.block(config, weights, x, tables_of(kind, inputs.tables), memory)
    if inputs.added is not None and number is not None:
        added, last = inputs.added, len(inputs.added) - 1
        behind = jax.lax.cond(number <= last, lambda x: x + added[jnp.minimum(number, last)], lambda x: x, behind)
    return replicate(behind), as_states(type_.memory, kept)


def first_row(memory: str | tuple[str, ...], states: Any) -> Any:
    """A layer's memory of a prefix, from that of the prefix's one row (see `as_states`): keys `[G, d, S]` and values
    `[G, S, d]` of attention, the state `[1, …]` of a recurrence."""

    def row(name: str, state: Any) -> Any:
        return (state.keys[:, 0], state.values[:, 0]) if name == ATTENTION else state

    return map_memory(row, memory, states)


def as_states(memory: str | tuple[str, ...], kept: Any) -> Any:
    """The memory that a layer keeps, with keys and values as a `KVCache`."""
    return map_memory(lambda name, kept: KVCache(*kept) if name == ATTENTION else kept, memory, kept)


def pick(tree: Any, row: Any) -> Any:
    """Row `row: int32[]` of every array."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(*without_upcast(leaf, row), keepdims=False), tree)


def layer_weights(config: DecoderConfig, source: Any, stacks: Sequence[str], slices: Any) -> Weights:
    """A layer's weights of all its stacks."""
    return {name: leaf for stack in stacks for name, leaf in source.layer(slices[stack]).items()}


def forward(
    config: DecoderConfig,
    source: LayerSource,
    tokens: jax.Array,
    layout: SequenceLayout,
    *,
    prefix: LayerStates | None = None,
    return_states: bool = False,
    images: ImageInputs | None = None,
) -> tuple[jax.Array, LayerStates | None]:
    """Run a prefill and return the final hidden states `[B, T, hidden]` (after the last norm), and with `return_states`
    what the layers keep of the tokens.

    tokens: int32[B, T], laid out as `layout` says; `prefix`: the states of one row (B = 1) that every row of the batch
    follows; images: those of the tokens (see `embed`).
    """
    x = replicate(embed(config, source, tokens, image_layout(config, tokens, layout, images), images))
    inputs = LayerInputs.of(config, tokens, layout, images, x.dtype)
    numbers = None if inputs.added is None else jnp.arange(config.layers)
    run_all = _alike if len(set(types_of_layers(config))) == 1 else _alternating
    x, by_type = run_all(config, source, x, numbers, inputs, prefix, return_states)
    x = architecture_of(config).final_norm(config, source, x)
    return x, LayerStates(by_type, tokens.shape[1]) if return_states else None


def _alike(
    config: DecoderConfig, source: LayerSource, x: jax.Array, numbers: jax.Array | None, inputs: LayerInputs,
    prefix: LayerStates | None, return_states: bool,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """The hidden states behind all layers of one type, and what the layers keep: a scan over their stacks."""
    ((name, type_),) = [(name, layer_types(config)[name]) for name in {*types_of_layers(config)}]
    slices = {stack: source.stacks[stack] for stack in type_.stacks}

    def layer(x: jax.Array, slice_: Any, each: Any) -> tuple[jax.Array, Any]:
        number, kind, before = each
        before = None if before is None else first_row(type_.memory, before)
        weights = layer_weights(config, source, type_.stacks, slice_)
        x, kept = run_layer(config, type_, weights, x, number, kind, inputs, before)
        return x, kept if return_states else None

    each_layer = (numbers, layer_kinds(config), None if prefix is None else prefix.by_type[name])
    if source.prefetch:
        x, kept = scan_with_prefetch(layer, x, partial(pick, slices), each_layer)
    else:
        # For gradients, a layer is computed again from the state before it, the only value that is kept.
        x, kept = jax.lax.scan(jax.checkpoint(lambda x, xs: layer(x, *xs), prevent_cse=False), x, (slices, each_layer))
    return x, {name: kept}


def _zeros(depth: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros((depth, *leaf.shape), leaf.dtype)


def _alternating(
    config: DecoderConfig, source: LayerSource, x: jax.Array, numbers: jax.Array | None, inputs: LayerInputs,
    prefix: LayerStates | None, return_states: bool,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Like `_alike`, for layers of several types: a scan over their numbers, with a branch for each type."""
    names = types_of_layers(config)
    types = {name: layer_types(config)[name] for name in dict.fromkeys(names)}
    rows = rows_of_layers(config)
    stacks = sorted({stack for each in rows for stack in each})
    row_in_stack = {stack: jnp.asarray([each.get(stack, 0) for each in rows], jnp.int32) for stack in stacks}
    row_in_type = jnp.asarray([names[:number].count(name) for number, name in enumerate(names)], jnp.int32)
    branch = jnp.asarray([list(types).index(name) for name in names], jnp.int32)

    def run(name: str, x: jax.Array, each: Any) -> tuple[jax.Array, Any]:
        type_, (_, row, in_stack, number, kind) = types[name], each
        slices = {stack: pick(source.stacks[stack], in_stack[stack]) for stack in type_.stacks}
        before = None if prefix is None else pick(prefix.by_type[name], row)
        before = None if before is None else first_row(type_.memory, before)
        weights = layer_weights(config, source, type_.stacks, slices)
        return run_layer(config, type_, weights, x, number, kind, inputs, before)

    def step(carry: tuple[jax.Array, Any], each: Any) -> tuple[tuple[jax.Array, Any], None]:
        def of_type(name: str) -> Callable[..., Any]:
            def run_and_keep(x: jax.Array, states: Any, each: Any) -> tuple[jax.Array, Any]:
                x, kept = run(name, x, each)
                if states is not None:
                    put = jax.tree.map(
                        lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one.astype(all_.dtype), each[1], 0),
                        states[name], kept,
                    )  # fmt: skip
                    states = states | {name: put}
                return x, states

            return run_and_keep

        return jax.lax.switch(each[0], [of_type(name) for name in types], *carry, each), None

    xs = (branch, row_in_type, row_in_stack, numbers, layer_kinds(config))
    states = None
    if return_states:
        kept = {name: jax.eval_shape(lambda x, name=name: run(name, x, take_candidate(xs, 0))[1], x) for name in types}
        states = {name: jax.tree.map(partial(_zeros, names.count(name)), shapes) for name, shapes in kept.items()}
    (x, states), _ = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), (x, states), xs)
    return x, states


def decode_step(
    config: DecoderConfig,
    source: StackedWeights | UnstackedWeights,
    states: Sequence[Any],
    column: jax.Array,
    tokens: jax.Array,
    left_pad: jax.Array,
    update: CacheUpdate,
    prefix: LayerStates | None = None,
    shift: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Feed tokens `int32[B, W]` that go into the columns from `column` on (a scalar for the whole batch, or
    `int32[B]`), in rows that begin at `left_pad: int32[B]`, after the prefix where there is one. states: what each
    layer keeps, without the axis of layers, in caches of `width` columns; update: writes columns into a cache; shift:
    int32[B], the number by which images in earlier columns let positions be less than they count (see models.images),
    or None.

    Returns the final hidden states `[B, W, hidden]`, and the states: caches with these columns written, of recurrences
    a `DraftState`. Earlier contents of these and later columns are not attended to.
    """
    architecture, before = architecture_of(config), 0 if prefix is None else prefix.width
    (rows, count), names = tokens.shape, types_of_layers(config)
    positions = before + jnp.broadcast_to(column, rows)[:, None] + jnp.arange(count) - left_pad[:, None]
    query_layout = SequenceLayout(positions, jnp.zeros_like(positions))
    # Each token counts as the last of its sequence, as in a step of one token: dynamic RoPE depends on the length.
    rotated = positions if shift is None else positions - shift[:, None]
    single = SequenceLayout(rotated.reshape(-1, 1), jnp.zeros((rows * count, 1), jnp.int32))
    tables = jax.tree.map(
        lambda table: table.reshape(rows, count, *table.shape[2:]), architecture.position_tables(config, single)
    )
    x = replicate(architecture.embed(config, source, tokens, query_layout))

    def attention(cache: KVCache, kind: LayerKind, prefix: KVCache | None) -> Attend:
        cached = padded_layout(cache.width, left_pad, cache.width - left_pad)
        cached = SequenceLayout(before + cached.positions, cached.segment_ids)
        mask = attention_mask(kind.window, query_layout, cached)
        behind = []
        if prefix is not None:
            prefix_mask = attention_mask(kind.window, query_layout, prefix_layout(before))
            behind = [KVSegment(prefix.keys[:, 0], prefix.values[:, 0], prefix_mask)]

        def attend(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> tuple[jax.Array, KeyValue]:
            key, value = by_head(key, value)
            keys = update(cache.keys, key, column, 3)
            values = update(cache.values, value, column, 2)
            segments = [*behind, KVSegment(keys, values, mask)]
            return attend_by_head(gqa_attention, query, keys.shape[0], segments, **options), (keys, values)

        return attend

    # No scan: picking a layer of a stack, weights or cache, copies it on a CPU, which takes as long as using it.
    rows_of = rows_of_layers(config)
    each_stack = {stack: source.each_layer(stack) for stack in {stack: None for each in rows_of for stack in each}}
    kept_states = []
    for number, (name, state) in enumerate(zip(names, states, strict=True)):
        type_, kind = layer_types(config)[name], layer_kinds(config, number)
        earlier = None if prefix is None else take_candidate(prefix.by_type[name], names[:number].count(name))

        def access(memory: str, state: Any, earlier: Any, kind: LayerKind = kind) -> Any:
            return attention(state, kind, earlier) if memory == ATTENTION else StepRecurrence(state)

        weights = {
            leaf: array for stack, at in rows_of[number].items() for leaf, array in each_stack[stack][at].items()
        }
        memory = map_memory(access, type_.memory, state, earlier)
        x, kept = type_.block(config, weights, x, tables_of(kind, tables), memory)
        x = replicate(x)
        kept_states.append(as_states(type_.memory, kept))
    return architecture.final_norm(config, source, x), tuple(kept_states)


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
