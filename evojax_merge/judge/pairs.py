"""The pair of candidates on which a judge votes next; `python -m bench judge` compares the rule with others."""

from collections.abc import Callable

import numpy as np

from evojax_merge.judge.posterior import Posterior, winning

# Chooses by the candidates' posterior, the pairs that may be asked, bool[P, P], symmetric, and random numbers.
Rule = Callable[[Posterior, np.ndarray, np.random.Generator], tuple[int, int]]
# Points and weights of Gauss and Hermite, for expectations under a normal distribution.
POINTS, WEIGHTS = np.polynomial.hermite_e.hermegauss(41)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def challenged(posterior: Posterior, allowed: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """A candidate that may be the best, by one draw from the posterior, and the rival about whom a vote says most."""
    first = int(np.where(allowed.any(1), posterior.sample(1, generator)[0], -np.inf).argmax())
    return first, int(np.where(allowed[first], information(posterior)[first], -np.inf).argmax())


def information(posterior: Posterior) -> np.ndarray:
    """float64[P, P]: nats of information that a vote between two candidates has about the difference of their
    strengths: the mutual information of the two (Bayesian active learning by disagreement, Houlsby et al., 2011)."""
    mean, variances = posterior.mean, np.diag(posterior.covariance)
    deviation = np.sqrt(np.maximum(variances[:, None] + variances[None] - 2 * posterior.covariance, 0.0))
    drawn = (mean[:, None] - mean[None])[..., None] + deviation[..., None] * POINTS
    probability = winning(drawn)
    return _entropy(probability @ WEIGHTS) - _entropy(probability) @ WEIGHTS


def _entropy(probability: np.ndarray) -> np.ndarray:
    kept = np.clip(probability, 1e-12, 1 - 1e-12)
    return -(kept * np.log(kept) + (1 - kept) * np.log1p(-kept))
