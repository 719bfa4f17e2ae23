"""Gated DeltaNet (arXiv 2412.06464): a recurrent layer whose state forgets by a gate and learns by the delta rule.

Letters as in `models.recurrence`; H = G R heads of values.
"""

from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import Leaf, leaves_in
from evojax_merge.models.config import DecoderConfig, RecurrentShape
from evojax_merge.models.layers import Weights, dense, rms_norm
from evojax_merge.models.recurrence import Recur

STACK = "linear_attention"
# Keeps the norm of a query or a key from being zero.
_EPSILON = 1e-6


def leaves(projections: dict[str, tuple[str, str]]) -> tuple[Leaf, ...]:
    """The leaves of a layer. projections: leaf -> the module's name and the name of the axis of its outputs."""
    leaf = leaves_in("model.layers.{layer}.linear_attn.", "attention", STACK)
    return (
        *(leaf(name, f"{part}.weight", out, "hidden", sharded_axis=-2) for name, (part, out) in projections.items()),
        leaf("convolution", "conv1d.weight", "channels", "one", "kernel"),
        leaf("log_rate", "A_log", "value_heads"),
        leaf("step_bias", "dt_bias", "value_heads"),
        leaf("gated_norm", "norm.weight", "value_dim"),
        leaf("mixed", "out_proj.weight", "hidden", "values", sharded_axis=-1, writes_residual=True),
    )


def dimensions(shape: RecurrentShape) -> dict[str, int]:
    heads = shape.groups * shape.repeats
    values = heads * shape.value
    return {
        "channels": shape.channels, "kernel": shape.kernel, "one": 1, "value_heads": heads, "value_dim": shape.value,
        "values": values, "channels_values": shape.channels + values, "twice_value_heads": 2 * heads,
    }  # fmt: skip


def delta_shape(key_heads: int, value_heads: int, key: int, value: int, kernel: int) -> RecurrentShape:
    """The state of a layer with so many heads of these sizes. Raises ValueError where the heads of keys do not divide
    those of values."""
    if value_heads % key_heads:
        raise ValueError(
            f"linear_num_value_heads: {value_heads} is not a multiple of linear_num_key_heads: {key_heads}"
        )
    channels = 2 * key_heads * key + value_heads * value
    return RecurrentShape(channels, kernel, key_heads, value_heads // key_heads, key, value)


def mix(
    config: DecoderConfig, weights: Weights, eps: float, recur: Recur, qkv: jax.Array, z: jax.Array, b: jax.Array,
    a: jax.Array,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """The layer's output `[B, T, hidden]`, and the state to keep. eps: of the norm; qkv: `[B, T, D]`, inputs of the
    convolution; z: `[B, T, H v]`, gates of the output; b, a: `[B, T, H]`, from which the delta rule's rate and the
    decay are computed."""
    shape = config.recurrent
    assert shape is not None
    rows, heads = z.shape[:2], (shape.groups, shape.repeats)
    mixed, columns = recur.convolve(qkv, weights["convolution"][:, 0])
    keys = shape.groups * shape.key
    query, key, value = jnp.split(jax.nn.silu(mixed).astype(jnp.float32), [keys, 2 * keys], axis=-1)
    query, key = (_unit(array.reshape(*rows, shape.groups, shape.key)) for array in (query, key))
    value = value.reshape(*rows, *heads, shape.value)
    rate = jnp.exp(weights["log_rate"].astype(jnp.float32))
    decay = -rate * jax.nn.softplus(a.astype(jnp.float32) + weights["step_bias"].astype(jnp.float32))
    beta = jax.nn.sigmoid(b).astype(jnp.float32)
    out, state = recur.scan(
        query * shape.key**-0.5, key, value, decay.reshape(*rows, *heads), beta.reshape(*rows, *heads)
    )
    normed = rms_norm(out.astype(z.dtype), weights["gated_norm"], eps).astype(jnp.float32)
    gated = normed.reshape(z.shape) * jax.nn.silu(z.astype(jnp.float32))
    return dense(gated.astype(z.dtype), weights, "mixed"), recur.keep(columns, state)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPSILON)
