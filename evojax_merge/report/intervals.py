"""The uncertainty of a difference on held-out examples: a 95% interval, or that there are too few examples to say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evojax_merge.evaluation.scores import ROUNDING

CONFIDENCE = 0.95
# The examples of a task below which no outcomes of right and wrong, however one-sided, pass a sign test at 5%.
FEW = 6
SAME, TOO_FEW, NOISE = "same", "too few examples to say", "within noise"


@dataclass(frozen=True)
class Lead:
    """The lead of one model over another, and its 95% interval, as far as the choice of the examples goes: infinite
    where there are too few examples to say, [0, 0] where the scores are the same example by example, up to ROUNDING."""

    difference: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Return whether other examples of the same kind may well have shown the opposite."""
        return self.low <= 0 <= self.high

    @property
    def remark(self) -> str:
        """SAME, TOO_FEW or NOISE; empty where the interval does not hold 0."""
        if self.low == self.high == 0:
            return SAME
        return TOO_FEW if math.isinf(self.low) else NOISE if self.within_noise else ""

    @property
    def interval(self) -> list[float] | None:
        """The interval for JSON; None: too few examples to say."""
        return None if math.isinf(self.low) else [self.low, self.high]


def paired_lead(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], weights: Sequence[float]) -> Lead | None:
    """The lead of a model over another on the same examples; None where a score is not finite. ours, theirs: for each
    task the scores float[N]; weights: the weight of each task in the fitness."""
    differences = [a.astype(np.float64) - b for a, b in zip(ours, theirs, strict=True)]
    pairs = zip(ours, differences, strict=True)
    differences = [np.where(np.abs(task) <= ROUNDING * np.abs(a), 0.0, task) for a, task in pairs]
    if not any(task.any() for task in differences):
        return Lead(0.0, 0.0, 0.0)
    binary = list(map(_is_binary, ours, theirs))
    most = sum(weights) if all(binary) else math.inf
    return _interval(weights, differences, [(1.0, -1.0) if task else () for task in binary], most)


def exact_lead(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], weights: Sequence[float]) -> Lead | None:
    """The lead of `paired_lead`, of scores that no choice of examples bears on: its interval is the difference."""
    lead = paired_lead(ours, theirs, weights)
    return None if lead is None else Lead(lead.difference, lead.difference, lead.difference)


def unpaired_lead(ours: np.ndarray, theirs: np.ndarray) -> Lead | None:
    """The lead of a model over another that was scored on other examples, float[N] and float[M]; None where a score is
    not finite."""
    added, most = ((0.0, 1.0), 1.0) if _is_binary(ours, theirs) else ((), math.inf)
    return _interval([1.0, -1.0], [ours, theirs], [added, added], most)


def _is_binary(*scores: np.ndarray) -> bool:
    """Return whether every example is right (1) or wrong (0)."""
    return all(bool(np.isin(values, (0, 1)).all()) for values in scores)


def _interval(
    weights: Sequence[float], samples: Sequence[np.ndarray], added: Sequence[Sequence[float]], most: float
) -> Lead | None:
    """A weighted sum of the means of samples, which is `most` at most, with Welch's interval; None where a value is not
    finite. added: to each sample of outcomes of right and wrong, one more success and one more failure, without which
    the interval collapses where all outcomes agree (Bonett & Price 2012 for pairs, Agresti & Caffo 2000 else)."""
    if not all(np.isfinite(sample).all() for sample in samples):
        return None
    difference = float(sum(weight * sample.mean() for weight, sample in zip(weights, samples, strict=True)))
    padded = [np.append(sample, more) for sample, more in zip(samples, added, strict=True)]
    sizes = np.array(list(map(len, samples)))
    # Scores that are not right or wrong, and differ by the same on all examples, say nothing of their spread.
    if sizes.min() < 2 or not any(map(np.ptp, padded)):
        return Lead(difference, -math.inf, math.inf)
    squares = np.array([w * w * values.var(ddof=1) / len(values) for w, values in zip(weights, padded, strict=True)])
    freedom = squares.sum() ** 2 / np.sum(squares**2 / (sizes - 1))
    # SciPy takes long to import, and a search needs it at its end.
    from scipy.special import stdtrit

    half = stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(squares.sum())
    centre = sum(weight * values.mean() for weight, values in zip(weights, padded, strict=True))
    low, high = float(max(centre - half, -most)), float(min(centre + half, most))
    is_known = sizes.min() >= FEW or not low <= 0 <= high
    return Lead(difference, low, high) if is_known else Lead(difference, -math.inf, math.inf)
