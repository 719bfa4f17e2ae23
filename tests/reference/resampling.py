"""Bootstrap intervals in plain Python loops."""

from collections.abc import Sequence

import numpy as np


def naive_bootstrap(
    differences: Sequence[np.ndarray], weights: Sequence[float], seed: int, resamples: int, confidence: float
) -> np.ndarray:
    """Return percentile intervals (Efron 1979) of the weighted mean over tasks, float64 `[pairs, 2]`.

    `differences`: one float `[pairs, examples]` per task. Draws one resample, one task and one example after the other;
    all pairs share the draws.
    """
    rng = np.random.default_rng(seed)
    drawn = [[rng.integers(task.shape[1], size=task.shape[1]) for _ in range(resamples)] for task in differences]
    ends = []
    for k in range(len(differences[0])):
        means = sorted(
            sum(
                weight * sum(task[k, i] for i in drawn[t][b]) / task.shape[1]
                for t, (weight, task) in enumerate(zip(weights, differences, strict=True))
            )
            for b in range(resamples)
        )
        for share in ((1 - confidence) / 2, (1 + confidence) / 2):
            place = share * (resamples - 1)
            below = int(place)
            above = min(below + 1, resamples - 1)
            ends.append(means[below] + (place - below) * (means[above] - means[below]))
    return np.array(ends).reshape(-1, 2)
