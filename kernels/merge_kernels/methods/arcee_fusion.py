"""Arcee Fusion: the base, with the other model's most important entries."""

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels.method import CombineInputs, Method, Options, Prepared, PrepareInputs
from merge_kernels.registry import register

# Every probability is raised by this.
MIN_PROBABILITY = 1e-8
# Interquartile ranges between the median and the threshold.
RANGES = 1.5
# Entries whose probabilities are held in float64 at a time.
BLOCK = 2**20


def _prepare(options: Options, inputs: PrepareInputs) -> Prepared:
    """Mask keys: `uint16[...]`, 1 where the other model's entry is taken, else 0.

    An entry's importance is `|x - b| KL(softmax(x) || softmax(b))`, the softmax over the last axis (a vector is one
    row, a single number a row of its own). An entry is taken where it is at least `median + 1.5 (q3 - q1)`; a quantile
    q is the entry of ascending rank `int(q (n - 1))`, of all n entries, however many.
    """
    base, other = (np.asarray(x, np.float32) for x in inputs.sources)
    if not base.size:
        return Prepared((np.zeros(base.shape, np.uint16),), {})
    width = base.shape[-1] if base.ndim else 1
    first, second = base.reshape(-1, width), other.reshape(-1, width)
    importance = np.abs(second - first) * _row_divergence(first, second)[:, None]
    ranks = [int(share * (importance.size - 1)) for share in (0.25, 0.5, 0.75)]
    low, median, high = np.partition(importance, ranks, axis=None)[ranks]
    threshold = median + np.float32(RANGES) * (high - low)
    return Prepared(((importance >= threshold).astype(np.uint16).reshape(base.shape),), {})


def _row_divergence(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The Kullback-Leibler divergence of each row's softmax from the base's: float32[R] of two `[R, C]`, by float64."""
    rows, width = base.shape
    divergence = np.empty(rows, np.float32)
    step = max(1, BLOCK // width)

    def probabilities(x: np.ndarray) -> np.ndarray:
        wide = x.astype(np.float64)
        powers = np.exp(wide - wide.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True) + MIN_PROBABILITY

    for start in range(0, rows, step):
        block = slice(start, start + step)
        p, q = probabilities(other[block]), probabilities(base[block])
        divergence[block] = (p * np.log(p / q)).sum(axis=1)
    return divergence


def _combine(options: Options, inputs: CombineInputs) -> jax.Array:
    base, other = (x.astype(jnp.float32) for x in inputs.sources)
    return base + jnp.where(inputs.mask_keys[0] > 0, other - base, 0.0)


register(
    Method(
        "arcee_fusion",
        (),
        base="required",
        combine=_combine,
        prepare=_prepare,
        options=Options(has_base=True),
        max_parents=1,
        mask_keys=lambda parents: 1,
    )
)
