"""Methods of their own kind: SCE, NearSwap, Arcee Fusion, Reinforced Agent Merging, passthrough."""

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
# Arcee Fusion: what every probability is raised by, and how many interquartile ranges lie between median and threshold.
FUSION_MIN_PROBABILITY = 1e-8
FUSION_RANGES = 1.5
# Entries whose probabilities are held in float64 at a time.
FUSION_BLOCK = 2**20


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


def _row_divergence(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The Kullback-Leibler divergence of each row's softmax from the base's: float32[R] of two `[R, C]`, by float64."""
    rows, width = base.shape
    divergence = np.empty(rows, np.float32)
    step = max(1, FUSION_BLOCK // width)

    def probabilities(x: np.ndarray) -> np.ndarray:
        wide = x.astype(np.float64)
        powers = np.exp(wide - wide.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True) + FUSION_MIN_PROBABILITY

    for start in range(0, rows, step):
        part = slice(start, start + step)
        own, first = probabilities(other[part]), probabilities(base[part])
        divergence[part] = (own * np.log(own / first)).sum(axis=1)
    return divergence


def fusion_select(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Arcee Fusion's selection, once per tensor: `uint16[...]`, 1 where the other model's entry is taken, else 0.

    An entry's importance is `|x - b| KL(softmax(x) || softmax(b))`, the softmax over the last axis (a vector is one
    row, a single number a row of its own). Taken is what is at least `median + 1.5 (q3 - q1)`; a quantile q is the
    entry of ascending rank `int(q (n - 1))`, of all n entries, however many. base, other: float32 of one shape.
    """
    if not base.size:
        return np.zeros(base.shape, np.uint16)
    width = base.shape[-1] if base.ndim else 1
    first, second = base.reshape(-1, width), other.reshape(-1, width)
    importance = np.abs(second - first) * _row_divergence(first, second)[:, None]
    ranks = [int(share * (importance.size - 1)) for share in (0.25, 0.5, 0.75)]
    low, median, high = np.partition(importance, ranks, axis=None)[ranks]
    threshold = median + np.float32(FUSION_RANGES) * (high - low)
    return (importance >= threshold).astype(np.uint16).reshape(base.shape)


def fusion(base: jax.Array, other: jax.Array, kept: jax.Array) -> jax.Array:
    """The base, with the other model's entries where `kept: uint16[...]` is not 0. float32."""
    first = base.astype(jnp.float32)
    return first + jnp.where(kept > 0, other.astype(jnp.float32) - first, 0.0)


def ram_overlap(deltas: Sequence[np.ndarray], epsilon: float) -> Statistics:
    """How far each task vector overlaps with the others (RAM+, arXiv 2601.13572): `overlap`, float32[K].

    Of the entries that parent k changes by more than epsilon: how many another parent changes too, divided by how many
    it alone changes (by epsilon where there are none). deltas: K of float32[...], a tensor of its own each.
    """
    limit = np.float32(epsilon)
    count = np.zeros(deltas[0].shape, np.int32)
    for delta in deltas:
        count += np.abs(delta) > limit
    overlap = np.zeros(len(deltas), np.float32)
    for k, delta in enumerate(deltas):
        own = count[np.abs(delta) > limit]
        alone = int(np.count_nonzero(own == 1))
        if alone < own.size:
            overlap[k] = (own.size - alone) / max(alone, epsilon) if max(alone, epsilon) > 0 else np.inf
    return {"overlap": overlap}


def ram_sum(sources: Arrays, epsilon: jax.Array, factors: Arrays) -> jax.Array:
    """Reinforced Agent Merging's delta (RAM, arXiv 2601.13572): of the parents that change an entry by more than
    epsilon the mean change, or where it is one alone its change times its factor. float32.

    sources: the base first; epsilon: float32 `[]`; factors: float32[K].
    """
    base = sources[0].astype(jnp.float32)

    def changes(k: Any) -> tuple[jax.Array, ...]:
        """Parent k's change, the same times its factor, and 1 where there is one."""
        delta = sources[k + 1].astype(jnp.float32) - base
        changed = jnp.abs(delta) > epsilon
        kept = jnp.where(changed, delta, 0.0)
        return kept, factors[k] * kept, changed.astype(jnp.float32)

    total, alone, count = sum_over(changes, len(sources) - 1)
    return jnp.where(count > 1, total / jnp.maximum(count, 1.0), alone)
