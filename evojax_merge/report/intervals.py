"""The uncertainty of a difference on the held-out examples: a paired bootstrap interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, CONFIDENCE = 10_000, 0.95
# The stream of a seed's random numbers that examples are drawn with here.
BOOTSTRAP_STREAM = 2
# Entries of a block of drawn examples: its differences stay in a core's cache.
BLOCK = 2**16


@dataclass(frozen=True)
class Lead:
    """The lead of one model over another in fitness, and its 95% interval, as far as the choice of the examples
    goes."""

    difference: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Return whether other examples of the same kind may well have shown the opposite."""
        return self.low <= 0 <= self.high


def leads_over(
    ours: Sequence[np.ndarray], others: Sequence[Sequence[np.ndarray]], weights: Sequence[float], seed: int
) -> list[Lead | None]:
    """The lead of a model over each of the others. ours: for each task its scores float32[N]; others: for each model
    the same; weights: the weight of each task in the fitness. Deterministic for a seed.

    None where a score is not finite, or where a task has only one example, which says nothing of others.
    """
    differences = [[a.astype(np.float64) - b for a, b in zip(ours, scores, strict=True)] for scores in others]
    finite = [
        k for k, by_task in enumerate(differences) if all(task.size > 1 and np.isfinite(task).all() for task in by_task)
    ]
    leads: list[Lead | None] = [None] * len(others)
    if finite:
        stacked = [np.stack([differences[k][t] for k in finite]) for t in range(len(ours))]
        means = sum(weight * task.mean(axis=1) for weight, task in zip(weights, stacked, strict=True))
        rng = np.random.default_rng([seed, BOOTSTRAP_STREAM])
        lows, highs = bootstrap(stacked, weights, rng)
        for k, mean, low, high in zip(finite, np.asarray(means), lows, highs, strict=True):
            leads[k] = Lead(float(mean), float(low), float(high))
    return leads


def bootstrap(
    differences: Sequence[np.ndarray],
    weights: Sequence[float],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> tuple[np.ndarray, np.ndarray]:
    """The percentile interval of a weighted mean over tasks of the mean over examples: its lower and upper ends,
    float64[K] each. differences: for each task float64[K, N], of K pairs of models on the same N examples.

    Each resample draws as many examples of each task as it has, with replacement and the same for all pairs; so the
    interval is that of a paired comparison, stratified by task.
    """
    drawn = np.zeros((len(differences[0]), resamples))
    for weight, task in zip(weights, differences, strict=True):
        pairs, examples = task.shape
        rows = max(1, BLOCK // examples)
        taken = np.empty((rows, examples))
        for begin in range(0, resamples, rows):
            size = min(rows, resamples - begin)
            # The drawn numbers do not depend on the size of a block.
            chosen = rng.integers(examples, size=(size, examples))
            for k in range(pairs):
                # No index is out of range; only this mode writes to `out` without a copy.
                np.take(task[k], chosen, out=taken[:size], mode="clip")
                drawn[k, begin : begin + size] += weight * taken[:size].mean(axis=1)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=1)
    return low, high
