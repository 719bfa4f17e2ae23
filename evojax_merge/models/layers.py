"""What blocks are made of: norms, matmuls, rotary positions, and the layout of a batch.

Shapes: tokens `[B, T]`, hidden states `[B, T, hidden]`. Weights keep Hugging Face's orientation `[out, in]`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from evojax_merge.models.config import LlamaLikeConfig, rope_frequencies

Weights = dict[str, jax.Array]
# Keys `[G, B, d, T]` and values `[G, B, T, d]` of one layer, as a KV cache keeps them.
KeyValue = tuple[jax.Array, jax.Array]
CosSin = tuple[jax.Array, jax.Array]
# (queries `[B, T, H, d]`, keys `[B, T, G, d]`, values `[B, T, G, d]`) -> attention output `[B, T, H * d]`, and the
# layer's keys and values to keep. A block is given one: that of prefill, or that of decoding with a cache.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, KeyValue]]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
# With fewer rows than this a matmul keeps the weights on its left (see `matmul`).
GEMV_MAX_ROWS = 128


@struct.dataclass
class SequenceLayout:
    """positions: int32[B, T], each token's position in its sequence; segment_ids: int32[B, T], 0 for tokens that all
    segments of a row attend to, a segment's number for tokens that it alone attends to, negative for padding."""

    positions: jax.Array
    segment_ids: jax.Array


def padded_layout(width: int, left_pad: jax.Array, length: jax.Array) -> SequenceLayout:
    """One sequence a row, in the columns from `left_pad: int32[B]` on, `length: int32[B]` of them."""
    offsets = jnp.arange(width)[None, :] - left_pad[:, None]
    return SequenceLayout(jnp.maximum(offsets, 0), jnp.where((offsets >= 0) & (offsets < length[:, None]), 0, -1))


def prefix_layout(length: int) -> SequenceLayout:
    """A prefix: one row, the same for the whole batch."""
    return SequenceLayout(jnp.arange(length)[None], jnp.zeros((1, length), jnp.int32))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weight * (wide * scale).astype(x.dtype)


def matmul(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """`x @ W.T` with `W: [out, in]`: `[..., out]` in `dtype`, by default the operands'."""
    if x.size // x.shape[-1] >= GEMV_MAX_ROWS:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)
    # Few rows against large weights: a CPU computes W @ x.T up to a quarter faster.
    return matmul_transposed(x, weight, dtype).T.reshape(*x.shape[:-1], -1)


def matmul_transposed(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """`W @ x.T` with `W: [out, in]`: `[out, rows]`. The barriers keep the compiler from transposing it back."""
    columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    return jax.lax.optimization_barrier(jnp.einsum("oi,ib->ob", weight, columns, preferred_element_type=dtype))


def dense(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """`x @ W.T (+ b)` with `W: [out, in]`."""
    y = matmul(x, weights[name])
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def dense_heads(x: jax.Array, weights: Weights, name: str, head_dim: int) -> jax.Array:
    """`dense`, its outputs by head: `[B, T, heads, head_dim]`."""
    return dense(x, weights, name).reshape(*x.shape[:2], -1, head_dim)


def rope_cos_sin(config: LlamaLikeConfig, positions: jax.Array, lengths: jax.Array) -> CosSin:
    """cos and sin `[B, T, head_dim/2]` at `positions: [B, T]` of sequences of `lengths: [B]`."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config, lengths)[:, None, :]
    factor = config.rope.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rope_tables(config: LlamaLikeConfig, layout: SequenceLayout) -> CosSin:
    """cos and sin `[B, T, head_dim/2]` for a batch's layout."""
    lengths = jnp.max(jnp.where(layout.segment_ids >= 0, layout.positions, 0), axis=1) + 1
    return rope_cos_sin(config, layout.positions, lengths)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding of `x: [B, T, heads, head_dim]`, halves paired as Hugging Face pairs them."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
