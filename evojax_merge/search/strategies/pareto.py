"""NSGA-II: a search for the Pareto front of all tasks that count, in place of one weighted fitness."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.fronts import check_objectives, crowded_order, front_metrics, front_of, objectives_of, worst_of
from evojax_merge.search.protocols import Capabilities
from evojax_merge.search.strategies.cma_es import default_population
from evojax_merge.search.strategies.registry import DrawingStrategy, StrategySettings, generator

# Candidates are compared in pairs: P x P numbers.
MAX_POPULATION = 4096
# The indices of the distributions of crossover and mutation: larger values keep children nearer to their parents (the
# paper's are 20, for ten times as many evaluations as merges usually have). The probabilities of crossing over a pair,
# and each gene.
CROSSOVER_INDEX, MUTATION_INDEX = 5.0, 20.0
PAIR_CROSSED, GENE_CROSSED = 0.9, 0.5


@struct.dataclass
class ParetoState:
    """genomes: float32[P, D], the population, before the first generation its candidates; objectives: float64[P, T],
    the genomes' means on the tasks, NaN where a candidate failed or was not evaluated yet; reference: float64[T], the
    worst means of the first generation, above which the hypervolume is measured; told: int32[], the number of
    generations."""

    genomes: np.ndarray
    objectives: np.ndarray
    reference: np.ndarray
    told: np.int32


@dataclass(frozen=True)
class NSGA2(DrawingStrategy):
    """The best of parents and children survive: by front, and within a front by crowding distance. Each parent is the
    better of two by the same order. Crossover and mutation act on the genes, between the bounds: the map from genes to
    parameters is curved near the bounds alone."""

    name = "pareto"
    capabilities = Capabilities(keeps_front=True)

    def init(self, key: jax.Array, genomes: np.ndarray) -> ParetoState:
        objectives = np.full((self.population, self.settings.objectives), np.nan)
        drawn = draw_around(generator(key), genomes[0], self.population, self.settings)
        return ParetoState(drawn, objectives, np.zeros(self.settings.objectives), np.int32(0))

    def ask(self, key: jax.Array, state: ParetoState) -> tuple[jax.Array, ParetoState]:
        if int(state.told) == 0:
            return jnp.asarray(state.genomes), state
        rng, (low, high) = generator(key), self.settings.range
        order, pairs = crowded_order(state.objectives), -(-self.population // 2)
        # Places in the order: each parent of each pair is the better of two contenders.
        parents = order[rng.integers(self.population, size=(2, 2, pairs)).min(axis=0)]
        first, second = np.clip((state.genomes[parents].astype(np.float64) - low) / (high - low), 0, 1)
        children = np.concatenate(simulated_binary_crossover(rng, first, second))[: self.population]
        children = low + (high - low) * polynomial_mutation(rng, children)
        return jnp.asarray(children, jnp.float32), state

    def tell(self, key: jax.Array, state: ParetoState, genomes: jax.Array, scores: Scores) -> ParetoState:
        is_first, new_objectives = int(state.told) == 0, objectives_of(scores)
        before = 0 if is_first else self.population
        every = np.concatenate([state.genomes[:before], np.asarray(genomes, np.float32)])
        objectives = np.concatenate([state.objectives[:before], new_objectives])
        # A copy of an earlier candidate adds nothing, and ranks last, like a candidate that failed.
        _, distinct = np.unique(every, axis=0, return_index=True)
        compared = np.full_like(objectives, np.nan)
        compared[distinct] = objectives[distinct]
        best = crowded_order(compared)[: self.population]
        reference = worst_of(new_objectives) if is_first else state.reference
        return ParetoState(every[best], objectives[best], reference, np.int32(state.told + 1))

    def finalists(self, state: ParetoState) -> np.ndarray:
        """The front of the population."""
        return np.asarray(state.genomes[front_of(state.objectives)])

    def metrics(self, state: ParetoState) -> dict[str, float]:
        return front_metrics(state.objectives, state.reference)


def draw_around(rng: np.random.Generator, start: np.ndarray, count: int, settings: StrategySettings) -> np.ndarray:
    """float32[count, D]: the start, and normal steps of `sigma` from it, which end at the bounds."""
    steps = settings.sigma * rng.standard_normal((count, settings.dims))
    steps[0] = 0
    return np.clip(start + steps, *settings.range).astype(np.float32)


def simulated_binary_crossover(
    rng: np.random.Generator, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Two children of each pair of parents, float64[pairs, D] in the unit cube: around each parent's gene, as far as
    the parents are apart (Deb and Agrawal, 1995), within the bounds (Deb et al., 2002)."""
    low, high = np.minimum(first, second), np.maximum(first, second)
    apart, drawn = np.maximum(high - low, 1e-12), rng.random(first.shape)

    def spread(room: np.ndarray) -> np.ndarray:
        """The distance of the children, in units of the parents', where `room` is left up to the bound."""
        alpha = 2 - (1 + 2 * room / apart) ** -(CROSSOVER_INDEX + 1)
        inner = np.minimum(drawn * alpha, 1)
        outer = 1 / (2 - np.maximum(drawn * alpha, 1))
        return np.where(drawn * alpha <= 1, inner, outer) ** (1 / (CROSSOVER_INDEX + 1))

    below = (low + high - spread(low) * apart) / 2
    above = (low + high + spread(1 - high) * apart) / 2
    crossed = (rng.random((len(first), 1)) < PAIR_CROSSED) & (rng.random(first.shape) < GENE_CROSSED)
    swapped = rng.random(first.shape) < 0.5
    return (
        np.where(crossed, np.where(swapped, above, below), first).clip(0, 1),
        np.where(crossed, np.where(swapped, below, above), second).clip(0, 1),
    )


def polynomial_mutation(rng: np.random.Generator, genes: np.ndarray) -> np.ndarray:
    """One gene in D of float64[P, D], on average, moved within the unit cube (Deb and Goyal, 1996)."""
    power, drawn = MUTATION_INDEX + 1, rng.random(genes.shape)
    down = (2 * drawn + (1 - 2 * drawn) * (1 - genes) ** power).clip(0) ** (1 / power) - 1
    up = 1 - (2 * (1 - drawn) + (2 * drawn - 1) * genes**power).clip(0) ** (1 / power)
    mutated = rng.random(genes.shape) < 1 / genes.shape[1]
    return np.where(mutated, genes + np.where(drawn < 0.5, down, up), genes).clip(0, 1)


def pareto(settings: StrategySettings) -> NSGA2:
    """NSGA-II (Deb et al., 2002): the Pareto front of all tasks that count, by non-dominated sorting, simulated binary
    crossover and polynomial mutation."""
    check_objectives(settings.where, "pareto", settings.objectives)
    population = settings.population or 2 * default_population(settings.dims)
    if population > MAX_POPULATION:
        raise InputError(settings.where, f"population: {population:,}; pareto takes {MAX_POPULATION:,} at most")
    return NSGA2(settings, population)
