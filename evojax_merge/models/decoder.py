"""The decoder: one forward pass for training, scoring and generation. May import JAX and models.config.

`forward` scans over layers and takes each layer's weights from a *layer source* (models.sources): a stored
model, or a merge that is computed while the scan runs. It never asks where weights come from.

Arrays: tokens `[B, T]`, hidden states `[B, T, hidden]`, keys and values `[L, B, S, kv_heads, head_dim]`.
Weights keep Hugging Face's orientation `[out, in]`. A batch is padded at the left for generation (every
prompt ends in the last column) and at the right for scoring; `first` and `length` say which columns are real.
"""

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


class HeadSource(Protocol):
    """Where the output head comes from."""

    def head_rows(self, start: jax.Array | int, rows: int) -> jax.Array: ...


class LayerSource(HeadSource, Protocol):
    """Where weights come from. `layers` has leading axis L on every leaf and is what the scan runs over."""

    @property
    def layers(self) -> Any: ...
    def layer(self, slice_: Any) -> Weights: ...
    def embed(self, tokens: jax.Array) -> jax.Array: ...
    def final_norm(self) -> jax.Array: ...


@struct.dataclass
class Cache:
    """Keys and values `[L, B, S, kv_heads, head_dim]` of the columns that were seen."""

    keys: jax.Array
    values: jax.Array


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weight * (wide * scale).astype(x.dtype)


def linear(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """`x @ W.T (+ b)` with `W: [out, in]`."""
    y = jnp.einsum("...i,oi->...o", x, weights[name])
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


def attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """Grouped-query attention. query `[B, T, H, d]`, key and value `[B, S, G, d]`, visible `bool[B, T, S]`."""
    batch, steps, heads, dim = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, steps, groups, heads // groups, dim)
    scores = jnp.einsum("btgrd,bsgd->bgrts", query, key).astype(jnp.float32) * dim**-0.5
    # Finite, so that a padding row in which nothing is visible stays finite as well.
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    mixed = jnp.einsum("bgrts,bsgd->btgrd", jax.nn.softmax(scores, axis=-1).astype(value.dtype), value)
    return mixed.reshape(batch, steps, heads * dim)


def project_qkv(
    config: DecoderConfig, weights: Weights, x: jax.Array, rotary: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries `[B, T, H, d]` and keys, and values, `[B, T, G, d]`."""
    with jax.named_scope("qkv"):
        query, key, value = (
            linear(x, weights, name).reshape(*x.shape[:2], -1, config.head_dim) for name in ("q", "k", "v")
        )
        if config.qk_norm:
            query = rms_norm(query, weights["q_norm"], config.norm_eps)
            key = rms_norm(key, weights["k_norm"], config.norm_eps)
        cos, sin = (table.astype(x.dtype) for table in rotary)
        return rotate(query, cos, sin), rotate(key, cos, sin), value


def gated_mlp(config: DecoderConfig, weights: Weights, x: jax.Array) -> jax.Array:
    with jax.named_scope("mlp"):
        gate = ACTIVATIONS[config.activation](linear(x, weights, "gate"))
        return linear(gate * linear(x, weights, "up"), weights, "down")


def _visible(window: jax.Array, query_columns: jax.Array, key_columns: jax.Array, first: jax.Array) -> jax.Array:
    """bool[B, T, S]: causal, inside the window, not padding. Columns of one row differ by what positions do."""
    back = query_columns[:, None] - key_columns[None, :]
    inside = (back >= 0) & (back < window)
    return inside[None] & (key_columns[None, None, :] >= first[:, None, None])


def positions_of(columns: jax.Array, first: jax.Array) -> jax.Array:
    """int32[B, T]: positions of columns `int32[T]` in rows that begin at `first: int32[B]`."""
    return jnp.maximum(columns[None, :] - first[:, None], 0)


def run_layer(
    config: DecoderConfig,
    weights: Weights,
    x: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    window: jax.Array,
    columns: jax.Array,
    first: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer on whole sequences: the hidden states `[B, T, hidden]` after it, and its keys and values."""
    with jax.named_scope("attention"):
        normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
        query, key, value = project_qkv(config, weights, normed, rotary)
        mixed = attend(query, key, value, _visible(window, columns, columns, first))
        x = x + linear(mixed, weights, "o")
    return x + gated_mlp(config, weights, rms_norm(x, weights["mlp_norm"], config.norm_eps)), (key, value)


def forward(
    config: DecoderConfig,
    source: LayerSource,
    tokens: jax.Array,
    first: jax.Array,
    length: jax.Array,
    *,
    keep_cache: bool = False,
) -> tuple[jax.Array, Cache | None]:
    """Final hidden states `[B, T, hidden]` (after the last norm), and the cache where it is wanted.

    tokens: int32[B, T]; first: int32[B], the column of the first real token; length: int32[B], how many follow.
    """
    columns = jnp.arange(tokens.shape[1])
    rotary = rotary_table(config, positions_of(columns, first), length)

    def layer(x: jax.Array, xs: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
        slice_, window = xs
        x, kept = run_layer(config, source.layer(slice_), x, rotary, window, columns, first)
        return x, kept if keep_cache else None

    x = source.embed(tokens)
    x, kept = jax.lax.scan(layer, x, (source.layers, jnp.asarray(config.windows, jnp.int32)))
    x = rms_norm(x, source.final_norm(), config.norm_eps)
    return x, Cache(*kept) if keep_cache else None


def step(
    config: DecoderConfig,
    source: LayerSource,
    cache: Cache,
    column: jax.Array,
    tokens: jax.Array,
    first: jax.Array,
) -> tuple[jax.Array, Cache]:
    """One token further: tokens `int32[B]` stand in `column` (a scalar, the same for the whole batch).

    Returns the final hidden state `[B, hidden]` and the cache with this column written.
    """
    position = (column - first)[:, None]
    rotary = rotary_table(config, position, position[:, 0] + 1)
    key_columns = jnp.arange(cache.keys.shape[2])

    def layer(carry: tuple[jax.Array, Cache], xs: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, None]:
        x, cache = carry
        slice_, window, index = xs
        weights = source.layer(slice_)
        normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
        query, key, value = project_qkv(config, weights, normed, rotary)
        # Carried, not stacked by the scan: the compiler then writes this column in place.
        cache = Cache(
            *(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (index, 0, column, 0, 0))
                for old, new in ((cache.keys, key), (cache.values, value))
            )
        )
        keys, values = cache.keys[index], cache.values[index]
        mixed = attend(query, keys, values, _visible(window, column[None], key_columns, first))
        x = x + linear(mixed, weights, "o")
        x = x + gated_mlp(config, weights, rms_norm(x, weights["mlp_norm"], config.norm_eps))
        return (x, cache), None

    x = source.embed(tokens)[:, None]
    windows = jnp.asarray(config.windows, jnp.int32)
    (x, cache), _ = jax.lax.scan(layer, (x, cache), (source.layers, windows, jnp.arange(config.layers)))
    return rms_norm(x, source.final_norm(), config.norm_eps)[:, 0], cache


def logits(config: DecoderConfig, source: LayerSource, hidden: jax.Array) -> jax.Array:
    """float32 logits `[..., vocab]` of final hidden states `[..., hidden]`."""
    head = source.head_rows(0, config.vocab)
    return jnp.einsum("...i,vi->...v", hidden, head, preferred_element_type=jnp.float32)


def target_log_probabilities(
    config: DecoderConfig, source: HeadSource, hidden: jax.Array, targets: jax.Array
) -> jax.Array:
    """log p(target) `float32[N]` for hidden states `[N, hidden]` and targets `int32[N]`.

    Walks over the vocabulary in tiles of `HEAD_TILE` rows and keeps a running log-sum-exp, so that neither the
    whole head of a merged candidate nor the full logits ever exist.
    """
    rows = min(HEAD_TILE, config.vocab)
    tiles = -(-config.vocab // rows)

    def tile(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        total, picked = carry
        # The last tile is moved back inside the vocabulary; the rows it repeats are masked.
        start = jnp.minimum(index * rows, config.vocab - rows)
        head = source.head_rows(start, rows)
        scores = jnp.einsum("ni,vi->nv", hidden, head, preferred_element_type=jnp.float32)
        ids = start + jnp.arange(rows)
        fresh = jnp.where(ids >= index * rows, scores, -jnp.inf)
        total = jnp.logaddexp(total, jax.nn.logsumexp(fresh, axis=-1))
        hit = jnp.take_along_axis(scores, jnp.clip(targets - start, 0, rows - 1)[:, None], axis=1)[:, 0]
        inside = (targets >= index * rows) & (targets < start + rows)
        return (total, jnp.where(inside, hit, picked)), None

    start = (jnp.full(targets.shape, -jnp.inf), jnp.zeros(targets.shape, jnp.float32))
    with jax.named_scope("head"):
        (total, picked), _ = jax.lax.scan(tile, start, jnp.arange(tiles))
    return picked - total
