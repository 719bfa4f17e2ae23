"""Preferences from votes: a Bradley-Terry model whose strengths have a Gaussian-process prior over genomes.

A candidate with genome x has the strength f(x). The probability that it wins a vote against x' is sigmoid(f(x) - f(x'))
(Bradley and Terry, 1952), but for lapses: in a share `LAPSE` of the votes a judge chooses the other one, however far
apart the two are. The prior is f ~ GP(0, k), with a Matérn kernel (nu = 5/2), so that votes on one generation say
something about the next, whose genomes lie near. The posterior is Laplace's approximation (Chu and Ghahramani, 2005),
with the expected curvature of the likelihood in place of its own, which lapses can make negative. The kernel's length
and variance are those of a grid that explain the votes best (by the approximated evidence). The grid has no longer and
flatter kernels: some votes are explained best by a plane with hardly a slope, whose highest point is a corner.

A vote is one or more *outcomes*, each a pair with a weight:

- left or right: the winner over the loser, weight 1;
- tie: each over the other, weight 1/2;
- both bad: a tie, and the bar of acceptable answers, whose strength is 0, over each of the two, weight 1/2.

A judge's weight multiplies those of the judge's votes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from evojax_merge.search.item_response import sigmoid
from evojax_merge.system.blas import one_blas_thread
from evojax_merge.tasks.voting import Choice

# The number of an outcome's loser or winner where it is the bar of acceptable answers.
BAR = -1
# The kernel's length in units of the median distance between genomes, and its standard deviation in logits.
LENGTHS = (0.5, 1.0)
DEVIATIONS = (2.0, 4.0)
# The standard deviation of strengths before the first vote.
FIRST_DEVIATION = 2.0
# The share of votes in which a judge errs, whatever the strengths.
LAPSE = 0.15
# What a candidate's strength has of its own, as a share of the variance: two genomes that are nearly equal may write
# different answers.
NUGGET = 0.02
STEPS = 50
TOLERANCE = 1e-6
# Several threads only slow matrices of this size down, on a busy machine a hundredfold, and sum in another order on
# each number of cores: a replay gives the same bytes with one.
one_thread = one_blas_thread()


@dataclass(frozen=True)
class Outcomes:
    """V outcomes between candidates. winners, losers: int[V], numbers of candidates, or BAR; weights: float64[V]."""

    winners: np.ndarray
    losers: np.ndarray
    weights: np.ndarray

    def design(self, size: int) -> np.ndarray:
        """float64[V, N]: 1 at the winner, -1 at the loser; the bar has no column."""
        matrix, rows = np.zeros((len(self.winners), size + 1)), np.arange(len(self.winners))
        matrix[rows, self.winners] += 1
        matrix[rows, self.losers] -= 1
        return matrix[:, :size]


def outcomes_of(votes: Sequence[tuple[int, int, Choice, float]]) -> Outcomes:
    """The outcomes of votes: left candidate, right candidate, the choice, the judge's weight."""
    rows: list[tuple[int, int, float]] = []
    for left, right, choice, weight in votes:
        if choice == "left":
            rows.append((left, right, weight))
        elif choice == "right":
            rows.append((right, left, weight))
        else:
            rows += [(left, right, weight / 2), (right, left, weight / 2)]
            if choice == "both_bad":
                rows += [(BAR, left, weight / 2), (BAR, right, weight / 2)]
    table = np.array(rows, float).reshape(-1, 3)
    return Outcomes(table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2])


@dataclass(frozen=True)
class Posterior:
    """Strengths of N candidates. mean: float64[N]; covariance: float64[N, N]; evidence: the votes' log-probability."""

    mean: np.ndarray
    covariance: np.ndarray
    evidence: float

    def part(self, rows: slice) -> "Posterior":
        """The strengths of some of the candidates."""
        return Posterior(self.mean[rows], self.covariance[rows, rows], self.evidence)

    @one_thread
    def sample(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """float64[count, N]: strengths drawn from the posterior."""
        values, vectors = np.linalg.eigh(self.covariance)
        noise = generator.standard_normal((count, len(values)))
        return self.mean + (noise * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


@dataclass(frozen=True)
class Kernel:
    """A Matérn kernel (nu = 5/2). length: in units of genomes; deviation: in logits."""

    length: float
    deviation: float

    def __call__(self, distances: np.ndarray) -> np.ndarray:
        """The covariance at distances, of any shape; at 0 with the share that each candidate has of its own."""
        scaled = np.sqrt(5.0) * distances / self.length
        smooth = (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
        return self.deviation**2 * ((1 - NUGGET) * smooth + NUGGET * (distances == 0))


def fit_kernel(genomes: np.ndarray, outcomes: Outcomes) -> Kernel:
    """The kernel, of a grid, that explains the outcomes between candidates with these genomes, float[N, D], best; one
    of the typical length before the first vote."""
    distances = distances_between(genomes)
    # The median of the distances above 0; 1 where all are 0.
    typical = float(np.median(distances[distances > 0])) if (distances > 0).any() else 1.0
    if not len(outcomes.weights):
        return Kernel(typical, FIRST_DEVIATION)
    kernels = [Kernel(scale * typical, deviation) for scale in LENGTHS for deviation in DEVIATIONS]
    return max(kernels, key=lambda kernel: fit_preferences(genomes, outcomes, kernel).evidence)


def fit_preferences(genomes: np.ndarray, outcomes: Outcomes, kernel: Kernel) -> Posterior:
    """The posterior strengths of candidates with these genomes, float[N, D]."""
    return _laplace(kernel(distances_between(genomes)), outcomes.design(len(genomes)), outcomes.weights)


@dataclass(frozen=True)
class Preferences:
    """The outcomes of votes between candidates with these genomes, float64[N, D], and the kernel that explains them."""

    genomes: np.ndarray
    outcomes: Outcomes
    kernel: Kernel

    def at(self, genomes: np.ndarray) -> Posterior:
        """The posterior strengths of candidates, voted on or not, with genomes float[P, D]."""
        size, joined = len(self.genomes), np.concatenate([self.genomes, genomes])
        return fit_preferences(joined, self.outcomes, self.kernel).part(slice(size, None))


def distances_between(genomes: np.ndarray) -> np.ndarray:
    """float64[N, N], the Euclidean distances between genomes float[N, D]."""
    genomes = np.asarray(genomes, float)
    return np.sqrt(np.maximum(((genomes[:, None] - genomes[None]) ** 2).sum(-1), 0.0))


@one_thread
def _laplace(kernel: np.ndarray, design: np.ndarray, weights: np.ndarray) -> Posterior:
    """Newton's method in the space of the votes' differences z = A f, whose prior covariance is A K A'."""
    if not len(weights):
        return Posterior(np.zeros(len(kernel)), kernel, 0.0)
    cross = kernel @ design.T
    prior = design @ cross
    # f = K A' a at the mode; a is the gradient of the log-likelihood there.
    dual = np.zeros(len(weights))
    objective = -np.inf
    for _ in range(STEPS):
        differences = prior @ dual
        slope, curvature = _derivatives(differences)
        root = np.sqrt(weights * curvature)
        solve, _ = _cholesky(np.eye(len(root)) + root[:, None] * prior * root[None])
        target = weights * (curvature * differences + slope)
        step = target - root * solve(root * (prior @ target)) - dual
        size = 1.0
        while True:
            proposed = dual + size * step
            moved = prior @ proposed
            value = float(weights @ np.log(winning(moved)) - 0.5 * proposed @ moved)
            if value >= objective or size < 1e-4:
                break
            size /= 2
        dual, change, objective = proposed, value - objective, value
        if change < TOLERANCE:
            break
    root = np.sqrt(weights * _derivatives(prior @ dual)[1])
    solve, diagonal = _cholesky(np.eye(len(root)) + root[:, None] * prior * root[None])
    scaled = root[:, None] * cross.T
    covariance = kernel - scaled.T @ solve(scaled)
    evidence = objective - float(np.log(diagonal).sum())
    return Posterior(cross @ dual, (covariance + covariance.T) / 2, evidence)


def _cholesky(matrix: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """The solver of equations in a positive matrix, and its Cholesky factor's diagonal."""
    # Searches without judges import this module, and SciPy takes long.
    from scipy.linalg import cho_factor, cho_solve

    try:
        factor = cho_factor(matrix, lower=True)
    except np.linalg.LinAlgError:
        factor = cho_factor(matrix + 1e-8 * np.eye(len(matrix)), lower=True)
    return partial(cho_solve, factor), np.diag(factor[0])


def winning(differences: np.ndarray) -> np.ndarray:
    """The probability that a judge prefers the first of two whose strengths differ by so much."""
    return LAPSE + (1 - 2 * LAPSE) * sigmoid(differences)


def _derivatives(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The slope of the logarithm of `winning`, and minus its curvature, as expected over both results of a vote."""
    strength, probability = sigmoid(differences), winning(differences)
    slope = (1 - 2 * LAPSE) * strength * (1 - strength)
    return slope / probability, slope**2 / (probability * (1 - probability))
