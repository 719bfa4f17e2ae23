"""The pair of candidates on which a judge votes next.

Four rules, of which `top_two` is the program's; `python -m bench judge` compares them. Each takes the
candidates' posterior, the pairs that may be asked, bool[P, P], symmetric, and random numbers.
"""

from collections.abc import Callable

import numpy as np

from evojax_merge.judge.posterior import Posterior, winning

Rule = Callable[[Posterior, np.ndarray, np.random.Generator], tuple[int, int]]
DRAWS = 100
# Points and weights of Gauss and Hermite, for expectations under a normal distribution.
POINTS, WEIGHTS = np.polynomial.hermite_e.hermegauss(41)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def random_pair(posterior: Posterior, allowed: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """Any pair."""
    return _one_of(np.triu(allowed), generator)


def top_two(posterior: Posterior, allowed: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """Two candidates that may be the best: the best of one draw from the posterior, and the best of another draw among
    those that may be compared with it (top-two Thompson sampling, Russo, 2016)."""
    draws = posterior.sample(DRAWS, generator)
    able = allowed.any(1)
    first = int(np.where(able, draws[0], -np.inf).argmax())
    rivals = np.where(allowed[first], draws[1:], -np.inf)
    ahead = np.flatnonzero(rivals.max(1) > draws[1:, first])
    return first, int(rivals[ahead[0] if len(ahead) else 0].argmax())


def most_informative(posterior: Posterior, allowed: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """The pair whose vote says most about the strengths; among equals one by chance."""
    table = np.where(allowed, information(posterior), -np.inf)
    return _one_of(np.triu(table >= table.max() - 1e-12), generator)


def challenged(posterior: Posterior, allowed: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """A candidate that may be the best, that of one draw from the posterior, and the rival whose vote against it says
    most about their difference."""
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


def _one_of(pairs: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    rows, columns = np.nonzero(pairs)
    number = int(generator.integers(len(rows)))
    return int(rows[number]), int(columns[number])


def _entropy(probability: np.ndarray) -> np.ndarray:
    kept = np.clip(probability, 1e-12, 1 - 1e-12)
    return -(kept * np.log(kept) + (1 - kept) * np.log1p(-kept))


RULES: dict[str, Rule] = {
    "random": random_pair,
    "top_two": top_two,
    "information": most_informative,
    "challenged": challenged,
}
