"""Methods of their own kind: SCE, NearSwap, passthrough."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels.sums import Arrays, is_looped, sum_over

Statistics = dict[str, np.ndarray]

# A number per entry that no density reaches.
NEVER_KEPT = 2**16 - 1
# SCE: below this sum of mean squares all parents count alike; the smallest sum of kept weights.
SCE_MIN_SQUARES = 1e-6
SCE_MIN_WEIGHT = 1e-6
# NearSwap: smaller differences count as this.
NEARSWAP_MIN_DIFFERENCE = 1e-6


def _spread(stack: np.ndarray) -> np.ndarray:
    """The sum of squared differences of all pairs of rows, which is `K^2` times their variance: float64[n] of
    float32[K, n]. It vanishes exactly where all rows are equal."""
    count, size = stack.shape
    spread = np.zeros(size)
    if is_looped(count):
        # As many passes as rows, not as pairs of them. The mean of equal float32 numbers is exact in float64.
        mean = stack.mean(axis=0, dtype=np.float64)
        for row in stack:
            spread += np.square(row - mean)
        return count * spread
    for i in range(count):
        for j in range(i + 1, count):
            spread += np.square(stack[i].astype(np.float64) - stack[j])
    return spread


def sce_select(deltas: Sequence[np.ndarray], densities: np.ndarray) -> tuple[np.ndarray, Statistics]:
    """SCE's selection (arXiv 2408.07990), once per tensor: which entries are kept at which density, and the weights.

    Kept are the `int(density nonzero)` entries whose variance over the deltas is largest (`nonzero`: how many
    variances are not 0), and everything at density 1. Returns, per entry, the number of the first of the ascending
    `densities: float64[G]` at which it is kept (`uint16`, NEVER where none is), and per density

    - `threshold`: int32[G]; an entry is kept where its number is below it;
    - `share`: float32[K, G], parent k's share of the mean squares of the deltas that are kept.

    Entries that tie are kept in the order of the tensor, so that the count is exact.
    """
    stack = np.stack([delta.reshape(-1) for delta in deltas])
    count, size = stack.shape
    variance = _spread(stack)
    nonzero = int(np.count_nonzero(variance))
    # In float32, as mergekit counts here (and nowhere else): a gradient's 0.44999999999999996 is its 0.45.
    counts = (np.float32(nonzero) * densities.astype(np.float32)).astype(np.int64)
    kept = np.where(densities >= 1, size, np.where(densities > 0, counts, 0))
    order = np.argsort(-variance, kind="stable")
    number = np.empty(size, np.uint16)
    # kept never falls: the first density whose count exceeds an entry's place keeps it.
    number[order] = np.minimum(np.searchsorted(kept, np.arange(size), side="right"), NEVER_KEPT)
    if len(densities) > 1:
        # Past the last density there is nothing; the grid ends at 1, which keeps all.
        number = np.where(number >= len(densities), NEVER_KEPT, number).astype(np.uint16)
    else:
        number[number > 0] = NEVER_KEPT
    levels = np.minimum(number, len(densities)).astype(np.int64)
    squares = np.stack(
        [
            np.cumsum(np.bincount(levels, np.square(row, dtype=np.float64), len(densities) + 1))[: len(densities)]
            for row in stack
        ]
    ) / max(size, 1)
    total = squares.sum(axis=0)
    alike = total < SCE_MIN_SQUARES
    share = np.where(alike, 1.0 / count, squares / np.where(alike, 1.0, total))
    threshold = np.arange(1, len(densities) + 1, dtype=np.int32)
    return number.reshape(deltas[0].shape), {"threshold": threshold, "share": share.astype(np.float32)}


def sce_sum(sources: Arrays, number: jax.Array, threshold: jax.Array, share: jax.Array) -> jax.Array:
    """SCE's merged delta: what is kept and agrees with the majority's sign, averaged by `share`. float32.

    sources: the base first; number: uint16 `[...]`; threshold: int32 `[]`; share: float32[K].

    The sign is elected by the unweighted deltas, + on a tie, as in `task_vectors.elected_sum`.
    """
    wide = sources[0].astype(jnp.float32)
    kept = number.astype(jnp.int32) < threshold

    def masses(k: Any) -> tuple[jax.Array, ...]:
        """Parent k's delta, delta times share, and share, each where the delta is above 0 and where it is below."""
        delta = jnp.where(kept, sources[k + 1].astype(jnp.float32) - wide, 0.0)
        above, below = jnp.maximum(delta, 0.0), jnp.minimum(delta, 0.0)
        shares = jnp.where(delta > 0, share[k], 0.0), jnp.where(delta < 0, share[k], 0.0)
        return above, below, share[k] * above, share[k] * below, *shares

    up, down, up_sum, down_sum, up_share, down_share = sum_over(masses, len(sources) - 1)
    positive = up >= -down
    divisor = jnp.maximum(jnp.where(positive, up_share, down_share), SCE_MIN_WEIGHT)
    return jnp.where(positive, up_sum, down_sum) / divisor


def nearswap(base: jax.Array, other: jax.Array, t: jax.Array) -> jax.Array:
    """`a + w (b - a)` with `w = clamp(t / max(|a - b|, 1e-6), 0, 1)`: far entries move by `t`. float32."""
    first, second = base.astype(jnp.float32), other.astype(jnp.float32)
    distance = jnp.maximum(jnp.abs(first - second), NEARSWAP_MIN_DIFFERENCE)
    weight = jnp.clip(t / distance, 0.0, 1.0)
    return weight * second + (1 - weight) * first
