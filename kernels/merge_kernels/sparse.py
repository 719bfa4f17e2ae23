"""The family of sparsified task vectors: a score and a threshold per entry, then a sum or a sign consensus.

With deltas `d_k = x_k - b` an entry of parent k is kept where its score passes parent k's threshold:

- magnitude (TIES, arXiv 2306.01708): score `|d|`, kept where `|d| >= threshold`;
- random (DARE, arXiv 2311.03099): score a fixed uniform 16-bit number, kept where `score < threshold`.

Thresholds and the scale that restores the L1 norm are measured once per tensor, for one density or for a grid.
With thresholds all entries that tie at the threshold are kept: where bfloat16 checkpoints tie massively, more
than `int(density * n)` entries survive, and which ones does not depend on the order of anything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Statistics = dict[str, np.ndarray]

SCORE_LEVELS = 2**16
# Norms below this are not rescaled.
MIN_NORM = 1e-7


@dataclass(frozen=True)
class Sparsifier:
    """`measure(|d|: float32[n], score: uint16[n] | None, densities: float64[G])` gives
    `threshold[G]` and `l1_scale: float32[G]`; `keep(d, score, threshold)` is the mask."""

    measure: Callable[[np.ndarray, np.ndarray | None, np.ndarray], Statistics]
    keep: Callable[[jax.Array, jax.Array | None, jax.Array], jax.Array]
    random: bool


def kept_count(density: float, size: int) -> int:
    """How many entries magnitude trimming keeps: `max(1, int(density n))` inside (0, 1), as mergekit counts.

    In Python's float64: float32 arithmetic gives other counts.
    """
    if density <= 0 or size == 0:
        return 0
    return size if density >= 1 else max(1, int(density * size))


def _l1_scale(total: float, kept: np.ndarray) -> np.ndarray:
    restored = np.full(kept.shape, total) / np.where(kept < MIN_NORM, 1.0, kept)
    return np.where((kept < MIN_NORM) | (total < MIN_NORM), 1.0, restored).astype(np.float32)


def measure_magnitude(magnitudes: np.ndarray, score: np.ndarray | None, densities: np.ndarray) -> Statistics:
    """Thresholds are order statistics of `|d|`: `inf` keeps nothing, 0 keeps all."""
    size = magnitudes.size
    counts = np.array([kept_count(density, size) for density in densities], np.int64)
    inside = (counts > 0) & (counts < size)
    threshold = np.where(counts == 0, np.inf, 0.0).astype(np.float32)
    if len(densities) == 1:
        if inside[0]:
            position = size - counts[0]
            threshold[0] = np.partition(magnitudes, position)[position]
        kept = np.array([magnitudes[magnitudes >= threshold[0]].sum(dtype=np.float64)])
        total = float(magnitudes.sum(dtype=np.float64))
    else:
        ascending = np.sort(magnitudes)
        threshold[inside] = ascending[size - counts[inside]]
        below = np.concatenate([[0.0], np.cumsum(ascending, dtype=np.float64)])
        kept = below[-1] - below[np.searchsorted(ascending, threshold, side="left")]
        total = float(below[-1])
    return {"threshold": threshold, "l1_scale": _l1_scale(total, kept)}


def measure_random(magnitudes: np.ndarray, score: np.ndarray | None, densities: np.ndarray) -> Statistics:
    """Thresholds are `round(density 2^16)`: each entry is kept with that probability, to 16 bits."""
    assert score is not None
    threshold = np.rint(np.clip(densities, 0.0, 1.0) * SCORE_LEVELS).astype(np.int32)
    mass = np.bincount(score, weights=magnitudes, minlength=SCORE_LEVELS)
    below = np.concatenate([[0.0], np.cumsum(mass)])
    return {"threshold": threshold, "l1_scale": _l1_scale(float(below[-1]), below[threshold])}


MAGNITUDE = Sparsifier(
    measure=measure_magnitude,
    keep=lambda delta, score, threshold: jnp.abs(delta) >= threshold,
    random=False,
)
RANDOM = Sparsifier(
    measure=measure_random,
    keep=lambda delta, score, threshold: score.astype(jnp.int32) < threshold,  # type: ignore[union-attr]
    random=True,
)


def kept_deltas(
    sparsifier: Sparsifier | None,
    base: jax.Array,
    parents: Sequence[jax.Array],
    scores: Sequence[jax.Array] | None,
    statistics: dict[str, jax.Array],
    factors: jax.Array,
) -> list[jax.Array]:
    """`factor_k * (x_k - b)` where kept, else 0: K float32 arrays. factors: float32[K]."""
    wide = base.astype(jnp.float32)
    weighted = []
    for k, parent in enumerate(parents):
        delta = parent.astype(jnp.float32) - wide
        scaled = factors[k] * delta
        if sparsifier is not None:
            score = None if scores is None else scores[k]
            scaled = jnp.where(sparsifier.keep(delta, score, statistics["threshold"][k]), scaled, 0.0)
        weighted.append(scaled)
    return weighted


def plain_sum(weighted: Sequence[jax.Array], weight: jax.Array, normalize: bool) -> jax.Array:
    """Task arithmetic (arXiv 2212.04089): `sum_k D_k`, divided by `sum w` (1 where it vanishes)."""
    total = weighted[0]
    for addend in weighted[1:]:
        total = total + addend
    if not normalize:
        return total
    divisor = jnp.sum(weight)
    return total / jnp.where(jnp.abs(divisor) < 1e-8, 1.0, divisor)


def elected_sum(weighted: Sequence[jax.Array], weight: jax.Array, normalize: bool) -> jax.Array:
    """TIES' sign election: the sum of the entries whose sign is the majority's by mass (+ on a tie).

    The positive and the negative mass are summed apart and compared, so that entries which cancel exactly
    (they do in bfloat16 fine-tunes) cannot be decided by how a compiler fuses multiplications and additions.
    With `normalize` the result is divided by the weights of the entries that were kept (1 where there are none).
    """
    up = down = jnp.zeros_like(weighted[0])
    up_weight = down_weight = jnp.zeros_like(weighted[0])
    for k, entry in enumerate(weighted):
        up = up + jnp.maximum(entry, 0.0)
        down = down + jnp.minimum(entry, 0.0)
        if normalize:
            up_weight = up_weight + jnp.where(entry > 0, weight[k], 0.0)
            down_weight = down_weight + jnp.where(entry < 0, weight[k], 0.0)
    positive = up >= -down
    total = jnp.where(positive, up, down)
    if not normalize:
        return total
    divisor = jnp.where(positive, up_weight, down_weight)
    return total / jnp.where(divisor == 0, 1.0, divisor)
