"""A ridge surrogate: the predicted fitness on all examples of a candidate that was evaluated on some of them.

The candidates of a search are close relatives: a candidate's score on an example is mostly determined by its scores on
others, and by where its genome lies between those that were evaluated on everything. So the unknown part of the fitness
is regressed on the known scores and on the genome, over the latest candidates that were evaluated on all examples. (In
the terms of Monte Carlo: known scores are control variates for the unknown mean.) The ridge is chosen by leave-one-out
cross-validation; where no regression predicts better than the mean does, the mean is taken, and candidates rank by
their means on the examples that they were evaluated on.
"""

from dataclasses import dataclass

import numpy as np

# The number of candidates that the data holds. Older candidates say little of the region that the search is in.
HISTORY = 64
# Ridges that are tried, as shares of the features' mean variance.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class SurrogateData:
    """The latest candidates that were evaluated on all examples, the newest last; rows of NaN until there are as many.

    genomes: float32[R, D]; contributions: float32[R, N], the contribution of each example to the fitness, which is the
    sum of a candidate's row."""

    genomes: np.ndarray
    contributions: np.ndarray


def empty_surrogate(rows: int, dims: int, examples: int) -> SurrogateData:
    return SurrogateData(np.full((rows, dims), np.nan, np.float32), np.full((rows, examples), np.nan, np.float32))


def append_candidates(data: SurrogateData, genomes: np.ndarray, contributions: np.ndarray) -> SurrogateData:
    """The data with float32[P, D] genomes and float32[P, N] contributions appended, as many of the oldest dropped."""
    return SurrogateData(*(
        np.concatenate([old, new]).astype(np.float32)[len(new) :]
        for old, new in ((data.genomes, genomes), (data.contributions, contributions))
    ))  # fmt: skip


def predict_fitness(
    data: SurrogateData, genomes: np.ndarray, contributions: np.ndarray, evaluated: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """The predicted fitness on all examples of candidates that were evaluated on some, float64[P].

    genomes: float32[P, D]; evaluated: int[M], the numbers of those examples; contributions: float32[P, M], what they
    added to the fitness; counts: float[M], for how many examples of its task each of them stands. Without data the
    prediction is the mean on the evaluated examples. Candidates that were evaluated on different examples can be
    compared as soon as the data holds one candidate."""
    estimates = (contributions * counts).sum(axis=1, dtype=np.float64)
    rows = np.isfinite(data.contributions).all(axis=1)
    if not rows.any():
        return estimates
    before = data.contributions[rows]
    gap = before.sum(axis=1, dtype=np.float64) - (before[:, evaluated] * counts).sum(axis=1, dtype=np.float64)
    # Genes count for as much as scores do, whatever their units.
    places = data.genomes[rows]
    spread, space = (float(part.var(axis=0, dtype=np.float64).sum()) for part in (before[:, evaluated], places))
    scale = np.sqrt(spread / space) if space > 0 else 0.0
    features, queries = np.hstack([before[:, evaluated], scale * places]), np.hstack([contributions, scale * genomes])
    return estimates + regress(features, gap, queries)


def regress(features: np.ndarray, targets: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Ridge regression with an intercept that is not shrunk; the ridge, or no slope at all, is chosen by leave-one-out
    cross-validation. features: float[R, F]; targets: float[R]; queries: float[P, F]. Returns float64[P]."""
    center, mean, count = features.mean(axis=0, dtype=np.float64), targets.mean(), len(targets)
    centred, residuals = features - center, targets - mean
    values, vectors = np.linalg.eigh(centred @ centred.T)
    variance = values.sum() / count
    flat = np.full(len(queries), mean)
    if count < 3 or not variance > 0:
        return flat
    along, least, chosen = vectors.T @ residuals, np.mean((residuals * count / (count - 1)) ** 2), None
    for ridge in RIDGES:
        shrunk = values / (values + ridge * variance)
        # The residual of a fit without an example is that of the fit with it over one minus its own leverage.
        leverage = (vectors**2) @ shrunk + 1 / count
        left_out = np.mean(((residuals - vectors @ (shrunk * along)) / np.maximum(1 - leverage, 1e-9)) ** 2)
        if left_out < least:
            least, chosen = left_out, ridge
    if chosen is None:
        return flat
    weights = centred.T @ (vectors @ (along / (values + chosen * variance)))
    return mean + (queries - center) @ weights
