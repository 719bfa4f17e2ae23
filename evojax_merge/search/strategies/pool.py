"""A pool of models that breed: each generation's children are merges of two members, and take the place of others.

The loop of AutoMerge and of Sakana AI's M2N2 (arXiv 2508.16204). A member has a number and a genome
(see evojax_merge.schema.genealogy), and scores on every example. Two rules are M2N2's. *Attraction* pairs members that
are good at different examples: the second parent b of a is the one with the largest

    g(a, b) = sum_j c_j / (z_j + eps) max(f_j(b) - f_j(a), 0)

*Competition* makes members share each example's worth, so that a member which alone solves some examples stays:

    F(i) = sum_j c_j / (z_j + eps) f_j(i)

f_j(i) is the score of member i on example j, less the pool's lowest on that example (scores may be log-probabilities,
and M2N2's are at least 0); z_j the sum of these over the pool; c_j the example's weight in the fitness.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import Scores
from evojax_merge.schema.genealogy import (
    FIRST,
    GENES,
    MAX_MEMBERS,
    METHOD,
    NONE,
    NUMBER,
    SECOND,
    Genealogy,
    founder_genomes,
)
from evojax_merge.search.protocols import Capabilities
from evojax_merge.search.strategies.registry import DrawingStrategy, PoolSettings, StrategySettings, generator

POPULATION = 16
# Keeps divisions by z_j finite where all members score the same on an example.
EPS = 1e-9
# The probability that a child's parameters lie near its better parent's, where the same method bred that parent.
NEAR_PARENT = 0.5


@struct.dataclass
class PoolState:
    """offspring: float32[M, D], the genomes of all candidates so far, by number, founders included; members: int32[S],
    the numbers of the pool's members, best first, -1 for an empty place; scores: float32[S, N], the members' scores on
    every example; shares: float64[N], each example's weight in the fitness, with sum 1; generation: int32[], the number
    of generations. N and M are 0 before the first generation."""

    offspring: np.ndarray
    members: np.ndarray
    scores: np.ndarray
    shares: np.ndarray
    generation: np.int32 | np.ndarray


@dataclass(frozen=True)
class Pool(DrawingStrategy):
    """`settings.sigma` is the standard deviation of the genes around a parent's."""

    pool: PoolSettings

    name = "pool"
    capabilities = Capabilities(lends_context=True)

    def init(self, key: jax.Array, genomes: np.ndarray) -> PoolState:
        size = self.pool.size
        return PoolState(
            offspring=np.zeros((0, self.settings.dims), np.float32),
            members=np.full(size, NONE, np.int32),
            scores=np.zeros((size, 0), np.float32),
            shares=np.zeros(0),
            generation=np.int32(0),
        )

    def ask(self, key: jax.Array, state: PoolState) -> tuple[jax.Array, PoolState]:
        """The founders not scored yet, and children of the members, or of founders where fewer than two are finite."""
        rng, founders = generator(key), founder_genomes(self.pool.founders, self.settings.dims - GENES)
        genealogy, asked = Genealogy(founders, np.asarray(state.offspring)), int(state.generation) * self.population
        genomes = np.zeros((self.population, self.settings.dims), np.float32)
        unscored = founders[asked : asked + self.population]
        genomes[: len(unscored)] = unscored
        alive = np.asarray(state.members) != NONE
        members, scores = np.asarray(state.members)[alive], np.asarray(state.scores, np.float64)[alive]
        if len(members) < 2:
            members, scores = np.arange(len(founders)), np.zeros((len(founders), len(state.shares)))
        fitness = scores @ np.asarray(state.shares)
        for p in range(len(unscored), self.population):
            pair = self._pair(rng, scores, np.asarray(state.shares), fitness)
            genomes[p, NUMBER] = len(founders) + asked + p
            genomes[p, [FIRST, SECOND]] = members[pair]
            better = genealogy.genome(int(members[pair[np.argmax(fitness[pair])]]))
            genomes[p, METHOD:] = self._birth(rng, better)
        return jnp.asarray(genomes), state

    def _pair(
        self, rng: np.random.Generator, scores: np.ndarray, shares: np.ndarray, fitness: np.ndarray
    ) -> np.ndarray:
        """int[2]: the rows of two members that breed."""
        count = len(scores)
        if self.pool.selection == "random":
            better = np.argsort(-fitness, kind="stable")[: max(2, -(-count // 2))]
            return rng.choice(better, 2, replace=False)
        first = _tournament(rng, np.arange(count), fitness)
        others = np.delete(np.arange(count), first)
        if self.pool.selection == "tournament":
            return np.array([first, _tournament(rng, others, fitness)])
        gains = attraction(scores, shares, first)[others]
        # Where no member is better on any example, any other member is chosen.
        return np.array([first, others[np.argmax(gains)] if gains.any() else rng.choice(others)])

    def _birth(self, rng: np.random.Generator, better: np.ndarray) -> np.ndarray:
        """float32[1 + G]: a method's number and genes, near those of the better parent's birth or anew."""
        genes = rng.random(self.settings.dims - GENES)
        method = rng.integers(self.pool.methods)
        if better[METHOD] == method and rng.random() < NEAR_PARENT:
            # Mirrored at the bounds.
            genes = (better[GENES:] + self.settings.sigma * rng.standard_normal(len(genes))) % 2
            genes = np.minimum(genes, 2 - genes)
        return np.concatenate([[method], genes])

    def tell(self, key: jax.Array, state: PoolState, genomes: jax.Array, scores: Scores) -> PoolState:
        children, pool = np.asarray(genomes), self.pool
        shares = scores.weights[scores.task_of] / np.bincount(scores.task_of)[scores.task_of]
        alive, finite = np.asarray(state.members) != NONE, np.isfinite(scores.values).all(axis=1)
        # Older members come first: among equals they stay.
        numbers = np.concatenate([np.asarray(state.members)[alive], children[finite, NUMBER].astype(np.int32)])
        values = np.asarray(scores.values)[finite]
        if alive.any():
            values = np.concatenate([np.asarray(state.scores)[alive], values])
        survivors = keep_competing if pool.replace == "competition" else keep_best
        kept = survivors(values.astype(np.float64), shares, pool.size)
        members, rows = np.full(pool.size, NONE, np.int32), np.zeros((pool.size, values.shape[1]), np.float32)
        members[: len(kept)], rows[: len(kept)] = numbers[kept], values[kept]
        offspring = np.concatenate([np.asarray(state.offspring), children])
        return PoolState(offspring, members, rows, shares, np.int32(int(state.generation) + 1))

    def context(self, state: PoolState) -> np.ndarray:
        """float32[M, D]: the genomes of all children so far, among which the space looks up parents."""
        return np.asarray(state.offspring)

    def metrics(self, state: PoolState) -> dict[str, float]:
        """members, founders: the numbers of members and of founders among them; pool_mean: their mean fitness."""
        members = np.asarray(state.members)
        alive = members != NONE
        fitness = np.asarray(state.scores, np.float64)[alive] @ np.asarray(state.shares)
        founders = int((members[alive] < self.pool.founders).sum())
        return {
            "members": int(alive.sum()),
            "founders": founders,
            "pool_mean": float(fitness.mean()) if alive.any() else np.nan,
        }


def _tournament(rng: np.random.Generator, rows: np.ndarray, fitness: np.ndarray) -> int:
    """The better of two random rows, or the only row."""
    drawn = rng.choice(rows, min(2, len(rows)), replace=False)
    return int(drawn[np.argmax(fitness[drawn])])


def example_worth(scores: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f, float64[S, N], the scores above the lowest on each example, and c / (z + eps), float64[N]."""
    above = scores - scores.min(axis=0, initial=np.inf)
    return above, shares / (above.sum(axis=0) + EPS)


def attraction(scores: np.ndarray, shares: np.ndarray, first: int) -> np.ndarray:
    """float64[S]: each member's lead over `first` where it leads, weighted by the examples' worth, g(first, ·)."""
    above, worth = example_worth(scores, shares)
    gains: np.ndarray = np.maximum(above - above[first], 0) @ worth
    return gains


def keep_best(scores: np.ndarray, shares: np.ndarray, size: int) -> np.ndarray:
    """int[≤ size]: the rows of scores float64[S, N] with the highest fitness, best first."""
    return np.argsort(-(scores @ shares), kind="stable")[:size]


def keep_competing(scores: np.ndarray, shares: np.ndarray, size: int) -> np.ndarray:
    """int[≤ size]: the rows that are left when the row with the smallest share of the examples' worth is removed, one
    after the other; the rows with the highest fitness first."""
    left = np.arange(len(scores))
    while len(left) > size:
        above, worth = example_worth(scores[left], shares)
        gained = above @ worth
        # Among equals the youngest is removed.
        left = np.delete(left, len(left) - 1 - int(np.argmin(gained[::-1])))
    return left[np.argsort(-(scores[left] @ shares), kind="stable")]


def pool(settings: StrategySettings) -> Pool:
    """A pool of models that breed (AutoMerge; M2N2): children of two members each take the place of others. Only with
    the section pool."""
    where, breeding = settings.where, settings.pool
    if breeding is None:
        raise InputError(where, "strategy: pool breeds models, and there is no section pool; add one, or choose cma_es")
    population = settings.population or POPULATION
    members = breeding.founders + population * settings.generations
    if members > MAX_MEMBERS:
        raise InputError(
            where, f"generations: {settings.generations:,} of {population:,} children are {members:,} members; "
            f"expected {MAX_MEMBERS:,} at most",
        )  # fmt: skip
    return Pool(settings, population, breeding)
