"""Causal attention of long rows by the libraries of accelerators: cuDNN on NVIDIA's GPUs, splash attention on TPUs.

Both take one sequence in a row. Queries `[B, S, H, d]`, keys `[G, B, d, S]`, values `[G, B, S, d]` and `is_token:
bool[B, S]`, False for padding, on either side or in between; the result is `[B, S, H, d]`, anything for padding.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

# Queries and columns that splash attention has in a core's memory at a time.
SPLASH_BLOCK = 512
# The least compute capability for which cuDNN has fused attention, and the largest head for all GPUs from there on.
CUDNN_CAPABILITY, CUDNN_HEAD = 8.0, 128
# The packages of jax[cuda12] and jax[cuda13] that know cuDNN.
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def fused_kernels(dtype: Any, head_dim: int, scale: float | None, softcap: float | None) -> dict[str, Kernel]:
    """By the platform's name for `jax.lax.platform_dependent`: the kernels that take operands of this dtype and head
    size. scale, softcap: as in `Attend`."""
    scale = head_dim**-0.5 if scale is None else scale
    kernels: dict[str, Kernel] = {"tpu": partial(splash_attention, scale=scale, softcap=softcap)}
    halves = dtype in (jnp.bfloat16, jnp.float16)
    if halves and softcap is None and head_dim % 8 == 0 and head_dim <= CUDNN_HEAD and _has_cudnn():
        kernels["cuda"] = partial(cudnn_attention, scale=scale)
    return kernels


def _has_cudnn() -> bool:
    """Whether cuDNN is installed, and this machine has no GPU that is too old for it."""
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    capable = all(float(getattr(device, "compute_capability", 0)) >= CUDNN_CAPABILITY for device in gpus)
    return capable and any(map(find_spec, _CUDA_PLUGINS))


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    is_token: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention (a form of arXiv 2205.14135 that skips masked blocks), with a backward pass of its own.
    interpret: run it on a CPU, operation by operation."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (_, steps, heads, _), block = query.shape, SPLASH_BLOCK
    width = -(-steps // block) * block

    def padded(array: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(array, [(0, width - steps if i == axis else 0) for i in range(array.ndim)])

    mask = splash.MultiHeadMask([splash.CausalMask((width, width))] * heads)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    kernel = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap, interpret=interpret
    )
    # Tokens attend to tokens, and padding to padding.
    segments = padded(is_token.astype(jnp.int32), 1)
    rows = jax.vmap(kernel, in_axes=(0, 1, 1, 0))
    scaled = padded((query * scale).astype(query.dtype), 1).swapaxes(1, 2)
    out = rows(scaled, padded(key, 3).swapaxes(2, 3), padded(value, 2), splash.SegmentIds(segments, segments))
    return out.swapaxes(1, 2)[:, :steps]


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    is_token: jax.Array,
    *,
    scale: float,
    implementation: Any = "cudnn",
) -> jax.Array:
    """`jax.nn.dot_product_attention`, with the tokens of a row moved to its beginning: behind them padding needs no
    mask. implementation: as there."""
    order = jnp.argsort(~is_token, axis=1, stable=True)
    places = jnp.argsort(order, axis=1)

    def moved(array: jax.Array, order: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array, order[:, :, None, None], axis=1)

    operands = (moved(array, order) for array in (query, key.transpose(1, 3, 0, 2), value.transpose(1, 2, 0, 3)))
    out = jax.nn.dot_product_attention(*operands, scale=scale, is_causal=True, implementation=implementation)
    return moved(out, places)
