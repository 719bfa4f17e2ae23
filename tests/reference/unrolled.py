"""Merges of few parents in float32 JAX, a term for each parent: equal to the bit where sums run in this order."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from merge_kernels import Options

from reference.merging import ELECTED, SPARSE


def unrolled_merge(
    name: str,
    options: Options,
    sources: Sequence[jax.Array],
    keep: Callable[[int, jax.Array], jax.Array],
    parameters: Mapping[str, Any],
) -> jax.Array:
    """Merge one tensor by "linear" or by a method of task vectors, float32[...], without rescaling.

    `sources` begin with the base where the method takes one; `keep(k, delta)` is the mask of parent k's delta. The sums
    of positive and of negative deltas elect the sign; the weights that count are then divided out.
    """
    wide = [x.astype(jnp.float32) for x in sources]
    weight = parameters["weight"]
    if name == "linear":
        shares = list(weight / jnp.sum(weight) if options.normalize else weight)
        total = shares[0] * wide[0]
        for share, x in zip(shares[1:], wide[1:], strict=True):
            total = total + share * x
        return total
    base, *parents = wide
    deltas = [weight[k] * (x - base) for k, x in enumerate(parents)]
    if name in SPARSE:
        deltas = [jnp.where(keep(k, parents[k] - base), delta, 0.0) for k, delta in enumerate(deltas)]
    if name not in ELECTED:
        total = deltas[0]
        for delta in deltas[1:]:
            total = total + delta
        return base + parameters["lambda"] * total
    up = down = up_weight = down_weight = jnp.zeros_like(base)
    for k, delta in enumerate(deltas):
        up, down = up + jnp.maximum(delta, 0.0), down + jnp.minimum(delta, 0.0)
        up_weight = up_weight + jnp.where(delta > 0, weight[k], 0.0)
        down_weight = down_weight + jnp.where(delta < 0, weight[k], 0.0)
    positive = up >= -down
    divisor = jnp.where(positive, up_weight, down_weight)
    total = jnp.where(positive, up, down) / jnp.where(divisor == 0, 1.0, divisor)
    return base + parameters["lambda"] * total
