"""SCE (arXiv 2408.07990): select the entries in which parents differ most, calculate weights, elect signs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels.method import CombineInputs, Method, Options, Parameter, Prepared, PrepareInputs
from merge_kernels.registry import register
from merge_kernels.sums import is_looped, sum_over

# A number per entry that no density reaches.
NEVER_KEPT = 2**16 - 1
# Below this sum of mean squares all parents count alike.
MIN_SQUARES = 1e-6
# The smallest sum of kept weights.
MIN_WEIGHT = 1e-6


def _prepare(options: Options, inputs: PrepareInputs) -> Prepared:
    """Select the entries that are kept at each density, and calculate the parents' weights.

    Kept are the `int(density nonzero)` entries whose variance over the deltas is largest (`nonzero`: the number of
    variances that are not 0), and everything at density 1. Mask keys: per entry, the number of the first of the
    ascending densities, float64[G], at which it is kept (`uint16`, NEVER_KEPT where none is). Statistics, per density:

    - `threshold`: int32[G]; an entry is kept where its number is below it;
    - `share`: float32[K, G], parent k's share of the mean squares of the deltas that are kept.

    Entries that tie are kept in the order of the tensor, so that the count is exact.
    """
    base, densities = np.asarray(inputs.sources[0], np.float32), inputs.densities[0]
    deltas = [np.asarray(x, np.float32) - base for x in inputs.sources[1:]]
    stack = np.stack([delta.reshape(-1) for delta in deltas])
    count, size = stack.shape
    variance = _spread(stack)
    nonzero = int(np.count_nonzero(variance))
    # In float32, as mergekit counts here (and nowhere else): a gradient's 0.44999999999999996 is its 0.45.
    counts = (np.float32(nonzero) * densities.astype(np.float32)).astype(np.int64)
    kept = np.where(densities >= 1, size, np.where(densities > 0, counts, 0))
    number = _largest(variance, int(kept[0])) if len(densities) == 1 else _first_kept(variance, kept)
    levels = np.minimum(number, len(densities)).astype(np.int64)
    squares = np.stack(
        [
            np.cumsum(np.bincount(levels, np.square(row, dtype=np.float64), len(densities) + 1))[: len(densities)]
            for row in stack
        ]
    ) / max(size, 1)
    total = squares.sum(axis=0)
    alike = total < MIN_SQUARES
    share = np.where(alike, 1.0 / count, squares / np.where(alike, 1.0, total))
    threshold = np.arange(1, len(densities) + 1, dtype=np.int32)
    return Prepared((number.reshape(base.shape),), {"threshold": threshold, "share": share.astype(np.float32)})


def _largest(variance: np.ndarray, count: int) -> np.ndarray:
    """The numbers of entries, `uint16[n]`, where one density keeps `count` of them: in linear time."""
    number, size = np.full(len(variance), NEVER_KEPT, np.uint16), len(variance)
    if 0 < count < size:
        least = np.partition(variance, size - count)[size - count]
        number[variance > least] = 0
        number[np.flatnonzero(variance == least)[: count - np.count_nonzero(number == 0)]] = 0
    elif count:
        number[:] = 0
    return number


def _first_kept(variance: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The numbers of entries, `uint16[n]`, where the ascending densities keep `kept` of them, int[G]."""
    number = np.empty(len(variance), np.uint16)
    # kept never falls: the first density whose count exceeds an entry's place keeps it.
    order = np.argsort(-variance, kind="stable")
    number[order] = np.minimum(np.searchsorted(kept, np.arange(len(order)), side="right"), NEVER_KEPT)
    # Past the last density there is nothing; the grid ends at 1, which keeps all.
    return np.where(number >= len(kept), NEVER_KEPT, number).astype(np.uint16)


def _spread(stack: np.ndarray) -> np.ndarray:
    """The sum of squared differences of all pairs of rows, which is `K^2` times their variance: float64[n] of
    float32[K, n]. It vanishes exactly where all rows are equal."""
    count, size = stack.shape
    spread = np.zeros(size)
    if is_looped(count):
        # One pass per row, not one per pair of rows. The mean of equal float32 numbers is exact in float64.
        mean = stack.mean(axis=0, dtype=np.float64)
        for row in stack:
            spread += np.square(row - mean)
        return count * spread
    for i in range(count):
        for j in range(i + 1, count):
            spread += np.square(stack[i].astype(np.float64) - stack[j])
    return spread


def _combine(options: Options, inputs: CombineInputs) -> jax.Array:
    """The base plus the deltas that are kept and agree with the majority's sign, averaged by `share`.

    The sign is elected by the unweighted deltas, + on a tie, as in `task_vectors.elected_sum`.
    """
    sources, share = inputs.sources, inputs.statistics["share"]
    base = sources[0].astype(jnp.float32)
    kept = inputs.mask_keys[0].astype(jnp.int32) < inputs.statistics["threshold"]

    def masses(k: Any) -> tuple[jax.Array, ...]:
        """Parent k's delta, delta times share, and share, each where the delta is above 0 and where it is below."""
        delta = jnp.where(kept, sources[k + 1].astype(jnp.float32) - base, 0.0)
        above, below = jnp.maximum(delta, 0.0), jnp.minimum(delta, 0.0)
        shares = jnp.where(delta > 0, share[k], 0.0), jnp.where(delta < 0, share[k], 0.0)
        return above, below, share[k] * above, share[k] * below, *shares

    up, down, up_sum, down_sum, up_share, down_share = sum_over(masses, len(sources) - 1)
    positive = up >= -down
    divisor = jnp.maximum(jnp.where(positive, up_share, down_share), MIN_WEIGHT)
    return base + jnp.where(positive, up_sum, down_sum) / divisor


register(
    Method(
        "sce",
        (
            Parameter(
                "select_topk",
                per_parent=False,
                default=1.0,
                low=0.0,
                high=1.0,
                valid_min=0.0,
                valid_max=1.0,
                quantised=True,
            ),
        ),
        base="required",
        combine=_combine,
        prepare=_prepare,
        options=Options(has_base=True),
        mask_keys=lambda parents: 1,
        ignored_settings=("int8_mask",),
    )
)
