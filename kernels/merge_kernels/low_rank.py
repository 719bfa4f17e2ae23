"""Weights that are a base plus a product of two small matrices, like LoRA's (Hu et al. 2022, arXiv:2106.09685)."""

import jax
import jax.numpy as jnp


def add_low_rank(base: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`base + b a`, computed in float32 and rounded to the dtype of `base` once.

    base: `[…, in]`, float; a: float32 `[r, in]`; b: float32 `[…, r]`, of the same rows as base. A rank of 0 adds
    nothing.
    """
    delta = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    return (base.astype(jnp.float32) + delta).astype(base.dtype)
