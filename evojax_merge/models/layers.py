"""The parts of blocks: norms, matmuls, rotary positions, and the layout of a batch.

Shapes: tokens `[B, T]`, hidden states `[B, T, hidden]`. Weights keep Hugging Face's orientation `[out, in]`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.models.config import DecoderConfig, RopeConfig, rope_frequencies
from evojax_merge.models.sharding import model_shards, replicate, shard, shards_of

Weights = dict[str, jax.Array]


class RecordedWeights(Weights):
    """A layer's weights that keep the inputs of `dense`. inputs: `[B, T, in]`, by the weight's name, while a program is
    traced."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.inputs: dict[str, jax.Array] = {}


# Keys `[G, B, d, T]` and values `[G, B, T, d]` of one layer, in the layout of a KV cache.
KeyValue = tuple[jax.Array, jax.Array]
CosSin = tuple[jax.Array, jax.Array]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
# With fewer rows than this a matmul keeps the weights on its left (see `matmul`).
GEMV_MAX_ROWS = 128


class Attend(Protocol):
    """The attention that a block receives: that of prefill, or that of decoding with a cache."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """(queries `[B, T, H, d]`, keys `[B, T, G, d]`, values `[B, T, G, d]`) -> attention output `[B, T, H * d]`, and
        the layer's keys and values to keep. scale: the factor of the products of queries and keys, by default `d^-1/2`;
        softcap: bounds the scaled products to `softcap * tanh(x / softcap)`; sinks: `[H]`, for each head the logit of a
        column without a value, which takes a share of the softmax."""


@struct.dataclass
class SequenceLayout:
    """positions: int32[B, T], each token's position in its sequence; segment_ids: int32[B, T], 0 for tokens that all
    segments of a row attend to, a segment's number for tokens that it alone attends to, negative for padding.
    image_ids: int32[B, T], where the positions of an image attend to each other in both directions, the number of the
    image in its row, negative elsewhere; None: no position attends to a later one. places: int32[B, T, 3], each token's
    position in time, height and width for M-RoPE; None: `positions` is all three."""

    positions: jax.Array
    segment_ids: jax.Array
    image_ids: jax.Array | None = None
    places: jax.Array | None = None


@struct.dataclass
class LayerKind:
    """The differences of a stack's layers beside their weights. window: int32[], the number of positions that the layer
    attends to, its own included; positions: int32[], the index of its position tables, or None where there is only one
    set. For several layers both have a leading axis."""

    window: jax.Array
    positions: jax.Array | None


def layer_kinds(config: DecoderConfig, layers: int | slice = slice(None)) -> LayerKind:
    """The kind of one layer, or of several layers."""
    positions = jnp.asarray(config.position_kinds[layers], jnp.int32) if config.position_kinds else None
    return LayerKind(jnp.asarray(config.windows[layers], jnp.int32), positions)


def tables_of(kind: LayerKind, tables: Any) -> Any:
    """The position tables of a layer, picked from the tuple of all tables, or the only tables."""
    number = kind.positions
    return tables if number is None else jax.tree.map(lambda *each: jax.lax.select_n(number, *each), *tables)


def padded_layout(width: int, left_pad: jax.Array, length: jax.Array) -> SequenceLayout:
    """The layout of one sequence a row, in `length: int32[B]` columns from `left_pad: int32[B]` on."""
    offsets = jnp.arange(width)[None, :] - left_pad[:, None]
    return SequenceLayout(jnp.maximum(offsets, 0), jnp.where((offsets >= 0) & (offsets < length[:, None]), 0, -1))


def left_padded(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, SequenceLayout]:
    """Rows of tokens that end in the last of `width` columns: int32[B, width], and their layout."""
    tokens = np.array([[0] * (width - len(row)) + list(row) for row in rows], np.int32)
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    return tokens, padded_layout(width, width - lengths, lengths)


def prefix_layout(length: int) -> SequenceLayout:
    """The layout of a prefix: one row, the same for the whole batch."""
    return SequenceLayout(jnp.arange(length)[None], jnp.zeros((1, length), jnp.int32))


def _normalised(x: jax.Array, eps: float) -> jax.Array:
    """`x` divided by its root mean square over the last axis: float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide * scale


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis (arXiv 1910.07467), in float32 except for the gain."""
    return weight * _normalised(x, eps).astype(x.dtype)


def rms_norm_float32(x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """RMSNorm over the last axis, entirely in float32, with the gain `offset + weight`."""
    gain = weight.astype(jnp.float32)
    return (_normalised(x, eps) * (gain + offset if offset else gain)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """LayerNorm over the last axis (arXiv 1607.06450), in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    scaled = normed * weight.astype(jnp.float32)
    return (scaled if bias is None else scaled + bias.astype(jnp.float32)).astype(x.dtype)


def without_upcast(leaf: jax.Array, start: Any) -> tuple[jax.Array, Any]:
    """A leaf and the start of a slice of it, behind a barrier for bfloat16. A CPU's compiler takes slices of bfloat16
    by way of float32, and would make a float32 copy of the whole leaf before a loop that takes slices."""
    return jax.lax.optimization_barrier((leaf, start)) if leaf.dtype == jnp.bfloat16 else (leaf, start)


def matmul(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """`x @ W.T` with `W: [out, in]`: `[..., out]` in `dtype`, by default the operands'."""
    if x.size // x.shape[-1] >= GEMV_MAX_ROWS:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)
    # Few rows against large weights: a CPU computes W @ x.T up to a quarter faster.
    return matmul_transposed(x, weight, dtype).T.reshape(*x.shape[:-1], -1)


def matmul_transposed(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """`W @ x.T` with `W: [out, in]`: `[out, rows]`. The barriers keep the compiler from transposing the product
    back."""
    columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    return jax.lax.optimization_barrier(jnp.einsum("oi,ib->ob", weight, columns, preferred_element_type=dtype))


def dense(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """`x @ W.T (+ b)` with `W: [out, in]`."""
    if isinstance(weights, RecordedWeights):
        weights.inputs[name] = x
    y = matmul(x, weights[name])
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def dense_whole(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """`dense` with all outputs on each device that shares a model: outputs of several kinds, whose borders are not
    those of the devices' shards."""
    return replicate(dense(x, weights, name))


def dense_parts(x: jax.Array, weights: Weights, name: str, parts: int) -> list[jax.Array]:
    """`dense_whole` in equal parts of its outputs."""
    if model_shards() > 1:
        return jnp.split(dense_whole(x, weights, name), parts, axis=-1)
    # A CPU's compiler computes a norm of x within a product that alone uses it, which takes it half as long again for
    # thousands of rows.
    if isinstance(weights, RecordedWeights):
        weights.inputs[name] = x
    products = [matmul(x, part) for part in jnp.split(weights[name], parts, axis=-2)]
    bias = weights.get(f"{name}_bias")
    return products if bias is None else [y + b for y, b in zip(products, jnp.split(bias, parts, axis=-1), strict=True)]


def dense_heads(x: jax.Array, weights: Weights, name: str, head_dim: int) -> jax.Array:
    """`dense` with its outputs by head: `[B, T, heads, head_dim]`."""
    y = dense(x, weights, name)
    # No head is divided between devices.
    return shard(y, -1, shards_of(y.shape[-1] // head_dim) > 1).reshape(*x.shape[:2], -1, head_dim)


def rope_tables(rope: RopeConfig, dim: int, layout: SequenceLayout, axes: Sequence[int] = ()) -> CosSin:
    """cos and sin `[B, T, dim/2]` for a batch's layout; `dim` entries of a head are rotated. axes: for each of the
    frequencies, whether M-RoPE rotates by a token's place in time (0), height (1) or width (2)."""
    positions = layout.positions[..., None]
    if axes and layout.places is not None:
        positions = layout.places[..., jnp.asarray(axes)]
    lengths = jnp.max(jnp.where(layout.segment_ids >= 0, positions.max(axis=-1), 0), axis=1) + 1
    angles = positions.astype(jnp.float32) * rope_frequencies(rope, dim, lengths)[:, None, :]
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864) of `x: [B, T, heads, head_dim]`, with halves paired as in Hugging
    Face. cos, sin: `[B, T, dim/2]`; entries of a head beyond `dim` stay as they are."""
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        return jnp.concatenate([apply_rope(x[..., :rotated], cos, sin), x[..., rotated:]], axis=-1)
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def apply_rope_interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Like `apply_rope`, with neighbours paired: entries 0 and 1, 2 and 3, …"""
    rotated = 2 * cos.shape[-1]
    first, second = x[..., 0:rotated:2], x[..., 1:rotated:2]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([pairs.reshape(*x.shape[:-1], rotated), x[..., rotated:]], axis=-1)
