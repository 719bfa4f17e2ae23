"""Mamba-2 (arXiv 2405.21060): a recurrent layer whose state forgets by a gate and adds each token's input.

Letters as in `models.recurrence`; H = G R heads of v entries, a state of k entries for each, I = H v.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.models.architecture import Leaf, leaves_in
from evojax_merge.models.config import RecurrentShape
from evojax_merge.models.layers import Weights, dense, dense_whole, rms_norm_float32
from evojax_merge.models.recurrence import Recur


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """A layer's settings. shape: of its state; step_limits: of the steps dt; gated_norm: whether the output has a norm
    over each group, behind its gate or, with norm_before_gate, before it; eps: of that norm; conv_bias, in_bias,
    out_bias: whether the convolution and the projections have biases; multipliers: of the parts z, x, B, C and dt of
    the inputs' projection."""

    shape: RecurrentShape
    step_limits: tuple[float, float] = (0.0, float("inf"))
    gated_norm: bool = True
    norm_before_gate: bool = False
    eps: float = 1e-5
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    multipliers: tuple[float, ...] = (1.0,) * 5

    @property
    def inner(self) -> int:
        """I."""
        return self.shape.groups * self.shape.repeats * self.shape.value


def leaves(module: str, stack: str) -> tuple[Leaf, ...]:
    """The leaves of a layer. module: the name of its module, which ends with a dot; its config has `mamba: Mamba`."""
    leaf = leaves_in(module, "attention", stack)
    return (
        leaf("in", "in_proj.weight", "mamba_in", "hidden", sharded_axis=-2),
        leaf("in_bias", "in_proj.bias", "mamba_in", present_if=lambda c: c.mamba.in_bias),
        leaf("convolution", "conv1d.weight", "channels", "one", "kernel"),
        leaf("convolution_bias", "conv1d.bias", "channels", present_if=lambda c: c.mamba.conv_bias),
        leaf("log_rate", "A_log", "mamba_heads"),
        leaf("skip", "D", "mamba_heads"),
        leaf("step_bias", "dt_bias", "mamba_heads"),
        leaf("gated_norm", "norm.weight", "mamba_inner", present_if=lambda c: c.mamba.gated_norm),
        leaf("out", "out_proj.weight", "hidden", "mamba_inner", sharded_axis=-1, writes_residual=True),
        leaf("out_bias", "out_proj.bias", "hidden", writes_residual=True, present_if=lambda c: c.mamba.out_bias),
    )


def dimensions(mamba: Mamba) -> dict[str, int]:
    shape, inner = mamba.shape, mamba.inner
    heads = shape.groups * shape.repeats
    return {
        "channels": shape.channels, "kernel": shape.kernel, "one": 1, "mamba_heads": heads, "mamba_inner": inner,
        "mamba_in": inner + shape.channels + heads,
    }  # fmt: skip


def mamba_shape(heads: int, head: int, groups: int, state: int, kernel: int) -> RecurrentShape:
    """The state of `heads` heads of `head` entries, in groups, with a state of `state` entries for each. Raises
    ValueError where the groups do not divide the heads."""
    if heads % groups:
        raise ValueError(f"{heads} heads of Mamba in {groups} groups; expected groups of equally many")
    return RecurrentShape(heads * head + 2 * groups * state, kernel, groups, heads // groups, state, head)


def mix(mamba: Mamba, weights: Weights, x: jax.Array, recur: Recur) -> tuple[jax.Array, Any]:
    """The layer's output `[B, T, hidden]` for the hidden states behind its norm, and the state to keep."""
    shape, inner, (rows, tokens) = mamba.shape, mamba.inner, x.shape[:2]
    state = shape.groups * shape.key
    projected = dense_whole(x, weights, "in")
    gate, mixed, step = jnp.split(projected, [inner, inner + shape.channels], axis=-1)
    z, of_x, of_b, of_c, of_step = mamba.multipliers
    if mamba.multipliers != (1.0,) * 5:
        channels = np.repeat([of_x, of_b, of_c], [inner, state, state])
        gate, mixed, step = gate * z, mixed * channels.astype(x.dtype), step * of_step
    mixed, columns = recur.convolve(mixed, weights["convolution"][:, 0], weights.get("convolution_bias"))
    mixed = jax.nn.silu(mixed).astype(jnp.float32)
    value, key, query = jnp.split(mixed, [inner, inner + state], axis=-1)
    heads = (rows, tokens, shape.groups, shape.repeats)
    step = jax.nn.softplus(step.astype(jnp.float32) + weights["step_bias"].astype(jnp.float32))
    step = jnp.clip(step, *mamba.step_limits).reshape(heads)
    rate = jnp.exp(weights["log_rate"].astype(jnp.float32)).reshape(heads[2:])
    value, key, query = value.reshape(*heads, -1), key.reshape(*heads[:3], -1), query.reshape(*heads[:3], -1)
    out, kept = recur.scan(query, key, step[..., None] * value, -rate * step)
    out = out + weights["skip"].astype(jnp.float32).reshape(*heads[2:], 1) * value
    out, opened = out.reshape(rows, tokens, inner), jax.nn.silu(gate.astype(jnp.float32))
    if not mamba.gated_norm:
        out = out * opened
    elif mamba.norm_before_gate:
        out = _group_norm(mamba, weights, out) * opened
    else:
        out = _group_norm(mamba, weights, out * opened)
    return dense(out.astype(x.dtype), weights, "out"), recur.keep(columns, kept)


def _group_norm(mamba: Mamba, weights: Weights, x: jax.Array) -> jax.Array:
    """RMSNorm of `float32[B, T, I]` over the entries of each group."""
    groups = mamba.shape.groups
    grouped = x.reshape(*x.shape[:2], groups, -1)
    return rms_norm_float32(grouped, weights["gated_norm"].reshape(groups, -1), mamba.eps).reshape(x.shape)
