"""What a candidate that met some of the examples would score on all of them. May import numpy alone.

The candidates of a search are close relatives: what one of them scores on an example is told to a large part by what it
scores on others, and by where it stands between those that have met everything. So the part of the fitness that is
still unknown is regressed on the scores that are known and on the genome, over the latest candidates that met all
examples. (In the terms of Monte Carlo: known scores are control variates for the unknown mean.) The ridge is chosen by
leaving each of those out in turn; where no regression foretells them better than their mean does, that is taken, and
candidates rank by their means on what they met.
"""

from dataclasses import dataclass

import numpy as np

# How many candidates are remembered. Those of long ago were elsewhere: they say little of where the search is now.
WINDOW = 64
# Ridges that are tried, as shares of the features' mean variance.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Known:
    """The latest candidates that met all examples, the newest last; rows of NaN until there are as many.

    genomes: float32[R, D]; worth: float32[R, N], what each example added to the fitness, so that a row's sum is it."""

    genomes: np.ndarray
    worth: np.ndarray


def nothing_known(rows: int, dims: int, examples: int) -> Known:
    return Known(np.full((rows, dims), np.nan, np.float32), np.full((rows, examples), np.nan, np.float32))


def remember(known: Known, genomes: np.ndarray, worth: np.ndarray) -> Known:
    """With candidates `genomes: float32[P, D]`, `worth: float32[P, N]` behind the others; as many rows as before."""
    return Known(*(
        np.concatenate([old, new]).astype(np.float32)[len(new) :]
        for old, new in ((known.genomes, genomes), (known.worth, worth))
    ))  # fmt: skip


def foresee(known: Known, genomes: np.ndarray, worth: np.ndarray, met: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The fitness on all examples of candidates that met some, float64[P].

    genomes: float32[P, D]; met: int[M], the numbers of the examples that they met; worth: float32[P, M], what those
    added; counts: float[M], for how many examples of its task each of them stands. With nothing known, that is the mean
    on the examples met. Candidates that met other examples can be compared as soon as one candidate is known."""
    own = (worth * counts).sum(axis=1, dtype=np.float64)
    rows = np.isfinite(known.worth).all(axis=1)
    if not rows.any():
        return own
    before = known.worth[rows]
    gap = before.sum(axis=1, dtype=np.float64) - (before[:, met] * counts).sum(axis=1, dtype=np.float64)
    # Genes count for as much as scores do, whatever their units.
    places = known.genomes[rows]
    spread, space = (float(part.var(axis=0, dtype=np.float64).sum()) for part in (before[:, met], places))
    scale = np.sqrt(spread / space) if space > 0 else 0.0
    features, at = np.hstack([before[:, met], scale * places]), np.hstack([worth, scale * genomes])
    return own + regress(features, gap, at)


def regress(features: np.ndarray, targets: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Ridge regression with an intercept that is not shrunk, the ridge chosen by leave-one-out, no slope among the
    choices. features: float[R, F]; targets: float[R]; at: float[P, F]. Returns float64[P]."""
    center, mean, count = features.mean(axis=0, dtype=np.float64), targets.mean(), len(targets)
    centred, rest = features - center, targets - mean
    values, vectors = np.linalg.eigh(centred @ centred.T)
    variance = values.sum() / count
    flat = np.full(len(at), mean)
    if count < 3 or not variance > 0:
        return flat
    along, least, chosen = vectors.T @ rest, np.mean((rest * count / (count - 1)) ** 2), None
    for ridge in RIDGES:
        shrunk = values / (values + ridge * variance)
        # The residual of a fit without an example is that of the fit with it over one minus its own leverage.
        leverage = (vectors**2) @ shrunk + 1 / count
        left_out = np.mean(((rest - vectors @ (shrunk * along)) / np.maximum(1 - leverage, 1e-9)) ** 2)
        if left_out < least:
            least, chosen = left_out, ridge
    if chosen is None:
        return flat
    weights = centred.T @ (vectors @ (along / (values + chosen * variance)))
    return mean + (at - center) @ weights
