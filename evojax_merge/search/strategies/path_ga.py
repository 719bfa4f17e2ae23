"""A genetic algorithm over lists of moves, for layer paths.

It follows genetic improvement (Le Goues et al., GenProg, 2012; Langdon and Harman, 2015): an individual is a list of
edits of one object; a mutation adds, removes or changes one edit, a crossover takes whole edits from two parents.
Strategies that move all genes of a genome at once would change every edit at each step.

Many lists of moves mean one path, so that a population would soon hold one path in many spellings, and nothing would
lead it away from there. Genomes that score the same therefore share one place among the members (clearing; Pétrowski,
1996), no genome is evaluated a second time (tabu search; Glover, 1989), and some candidates begin at the search's first
genomes again (random immigrants; Grefenstette, 1992).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.strategies.cma_es import default_population
from evojax_merge.search.strategies.registry import DrawingStrategy, StrategySettings, begin_with, generator

# The share of the candidates that are mutants of the genomes that the search began at, and not of members.
NEWCOMER_RATE = 0.25
# The share of the children that have two parents.
CROSSOVER_RATE = 0.5
# The share of the added moves that copy an existing move (gene duplication; Koza, 1995).
DUPLICATION_RATE = 0.25
# The probability that a continuous gene, when drawn or changed, gets the value that changes nothing.
NEUTRAL_RATE = 0.5
# The most times that a child is drawn again where its genome has been evaluated before.
MAX_DRAWS = 20
# The number of genomes, the latest ones, that are not evaluated again.
MAX_EVALUATED = 2**16

# The genes of a move that is on.
Move = tuple[float, ...]


@struct.dataclass
class PathGAState:
    """seeds: float32[A, D], the genomes that the search began at, the start first; members: float32[P, D], the
    population; fitness: float64[P], the members' fitness, -inf where a member has none; evaluated: uint64[M],
    fingerprints of the genomes that were evaluated, in their order, M 0 before the first generation; told: int32[], the
    number of generations."""

    seeds: np.ndarray
    members: np.ndarray
    fitness: np.ndarray
    evaluated: np.ndarray
    told: np.ndarray


@dataclass(frozen=True)
class PathGA(DrawingStrategy):
    """Truncation selection of parents and children (mu + lambda), binary tournaments for parents. Of the genomes that
    score the same, the one with the fewest moves is a member, and the others where there is room."""

    name = "path_ga"

    @cached_property
    def _values(self) -> list[np.ndarray]:
        """For each gene of a move, the genes of its V values, float32[V]; for a continuous gene, of both bounds."""
        values = []
        for count in self.settings.move_genes:
            unit = (np.arange(count) + 0.5) / count if count else np.array([0.0, 1.0])
            values.append(np.asarray(self.settings.from_unit(unit), np.float32))
        return values

    @property
    def _capacity(self) -> int:
        """The number of moves in a genome."""
        return self.settings.dims // len(self.settings.move_genes)

    def init(self, key: jax.Array, genomes: np.ndarray) -> PathGAState:
        """The first members are the start and mutants of `genomes`."""
        seeds = np.asarray(genomes, np.float32)
        start, newcomer = seeds[0], self._newcomers(generator(key), seeds)
        members = np.concatenate([start[None], self._unmet([newcomer] * (self.population - 1), {fingerprint(start)})])
        unscored = np.full(self.population, -np.inf)
        return PathGAState(seeds, members, unscored, np.zeros(0, np.uint64), np.zeros((), np.int32))

    def ask(self, key: jax.Array, state: PathGAState) -> tuple[jax.Array, PathGAState]:
        if int(state.told) == 0:
            return jnp.asarray(state.members), state
        rng, members, seeds = generator(key), np.asarray(state.members), np.asarray(state.seeds)
        start = seeds[0]
        scored = max(1, int(np.isfinite(state.fitness).sum()))

        def picked() -> list[Move]:
            return self._moves(members[rng.integers(scored, size=2).min()], start)

        def child() -> np.ndarray:
            moves, mutations = picked(), int(rng.geometric(0.5))
            if rng.random() < CROSSOVER_RATE:
                moves, mutations = self._recombined(rng, moves, picked()), mutations - 1
            for _ in range(mutations):
                moves = self._mutated(rng, moves, start)
            return self._genome(moves, start)

        met = {*state.evaluated.tolist(), *map(fingerprint, members)}
        newcomers = round(NEWCOMER_RATE * self.population)
        draws = [self._newcomers(rng, seeds)] * newcomers + [child] * (self.population - newcomers)
        return jnp.asarray(self._unmet(draws, met)), state

    def tell(self, key: jax.Array, state: PathGAState, genomes: jax.Array, scores: Scores) -> PathGAState:
        generation, start = int(state.told), np.asarray(state.seeds)[0]
        # The first generation is the population, also where seeds have replaced members.
        parents = slice(0, self.population if generation else 0)
        children = np.asarray(genomes, np.float32)
        every = np.concatenate([np.asarray(state.members)[parents], children])
        values = np.where(np.isfinite(scores.fitness), scores.fitness, -np.inf)
        fitness = np.concatenate([np.asarray(state.fitness)[parents], values])
        _, firsts = np.unique(every, axis=0, return_index=True)
        firsts = np.sort(firsts)
        lengths = np.array([len(self._moves(genome, start)) for genome in every[firsts]])
        ranked = firsts[np.lexsort((lengths, -fitness[firsts]))]
        # True where a better or shorter genome scores the same, and where a genome has no score.
        again = np.isin(np.arange(len(ranked)), np.unique(fitness[ranked], return_index=True)[1], invert=True)
        again |= ~np.isfinite(fitness[ranked])
        # With too few distinct genomes, the best are repeated.
        order = np.resize(ranked[np.argsort(again, kind="stable")], self.population)
        evaluated = np.append(state.evaluated, np.array(list(map(fingerprint, children)), np.uint64))
        return PathGAState(
            state.seeds, every[order], fitness[order], evaluated[-MAX_EVALUATED:], np.array(generation + 1, np.int32)
        )

    def metrics(self, state: PathGAState) -> dict[str, float]:
        """moves: the number of moves of the best member."""
        return {"moves": float(len(self._moves(np.asarray(state.members)[0], np.asarray(state.seeds)[0])))}

    def _moves(self, genome: np.ndarray, start: np.ndarray) -> list[Move]:
        """The moves of a genome that are on; none for the start, which means the same candidate."""
        if np.array_equal(genome, start):
            return []
        return [tuple(genes) for genes in self._rows(genome).tolist() if genes[0] > self._values[0].mean()]

    def _genome(self, moves: list[Move], start: np.ndarray) -> np.ndarray:
        """float32[D]: the genome of these moves, with all further moves off; the start where there is no move."""
        if not moves:
            return start
        rows = self._rows(start).copy()
        rows[:, 0] = self._values[0][0]
        rows[len(moves) :] = rows[0]
        rows[: len(moves)] = moves
        return rows.ravel()

    def _rows(self, genome: np.ndarray) -> np.ndarray:
        return genome.reshape(self._capacity, -1)

    def _newcomers(self, rng: np.random.Generator, seeds: np.ndarray) -> Callable[[], np.ndarray]:
        """A function that draws a mutant of one of the genomes that the search began at."""
        lists = [self._moves(genome, seeds[0]) for genome in seeds]

        def newcomer() -> np.ndarray:
            moves = lists[rng.integers(len(lists))]
            for _ in range(int(rng.geometric(0.5))):
                moves = self._mutated(rng, moves, seeds[0])
            return self._genome(moves, seeds[0])

        return newcomer

    def _unmet(self, draws: Sequence[Callable[[], np.ndarray]], met: set[int]) -> np.ndarray:
        """float32[C, D]: a genome by each of the functions; the genomes differ from each other and from those with the
        fingerprints `met`, as far as MAX_DRAWS further draws find such."""
        met, genomes = set(met), []
        for draw in draws:
            genome = draw()
            for _ in range(MAX_DRAWS):
                if fingerprint(genome) not in met:
                    break
                genome = draw()
            met.add(fingerprint(genome))
            genomes.append(genome)
        return np.stack(genomes)

    def _recombined(self, rng: np.random.Generator, first: list[Move], second: list[Move]) -> list[Move]:
        """The moves that both parents have, and each move of only one parent with probability 1/2."""
        moves = [move for move in first if move in second or rng.random() < 0.5]
        moves += [move for move in second if move not in first and rng.random() < 0.5]
        while len(moves) > self._capacity:
            del moves[rng.integers(len(moves))]
        return moves

    def _mutated(self, rng: np.random.Generator, moves: list[Move], start: np.ndarray) -> list[Move]:
        """One move added (in the place of another where there is no room), removed or changed."""
        moves = list(moves)
        kind = rng.choice(["add", "remove", "change"]) if moves else "add"
        if kind == "add":
            copied = bool(moves) and rng.random() < DUPLICATION_RATE
            added = moves[rng.integers(len(moves))] if copied else self._drawn(rng, start)
            if len(moves) == self._capacity:
                del moves[rng.integers(len(moves))]
            moves.insert(int(rng.integers(len(moves) + 1)), added)
            return moves
        chosen = int(rng.integers(len(moves)))
        moves[chosen : chosen + 1] = [] if kind == "remove" else [self._changed(rng, moves[chosen], start)]
        return moves

    def _drawn(self, rng: np.random.Generator, start: np.ndarray) -> Move:
        """A move that is on, its genes uniform."""
        genes = [float(rng.choice(values)) for values in self._values]
        genes[0] = float(self._values[0][1])
        for gene in self._continuous:
            neutral = rng.random() < NEUTRAL_RATE
            genes[gene] = float(start[gene] if neutral else np.float32(rng.uniform(*self._values[gene])))
        return tuple(genes)

    def _changed(self, rng: np.random.Generator, move: Move, start: np.ndarray) -> Move:
        """The move with another value of one gene: a neighbour of its value, or any value, with equal probability; for
        a continuous gene, a normal step, or the value that changes nothing."""
        gene, genes = int(rng.integers(1, len(move))), list(move)
        values, near = self._values[gene], rng.random() < 0.5
        if gene in self._continuous:
            stepped = np.clip(move[gene] + self.settings.sigma * rng.normal(), values[0], values[1])
            genes[gene] = float(start[gene] if rng.random() < NEUTRAL_RATE else np.float32(stepped))
        elif near:
            place = int(np.argmin(np.abs(values - move[gene]))) + int(rng.choice([-1, 1]))
            genes[gene] = float(values[np.clip(place, 0, len(values) - 1)])
        else:
            genes[gene] = float(rng.choice(values))
        return tuple(genes)

    @property
    def _continuous(self) -> list[int]:
        return [gene for gene, count in enumerate(self.settings.move_genes) if count == 0]


def fingerprint(genome: np.ndarray) -> int:
    """A number of 64 bits that is another one for another genome."""
    return int.from_bytes(hashlib.blake2b(genome.tobytes(), digest_size=8).digest(), "little")


@begin_with("parents")
def path_ga(settings: StrategySettings) -> PathGA:
    """A genetic algorithm of layer paths (data_flow, form: moves): whole moves are added, removed, changed and
    recombined, and the best of parents and children survive."""
    if not settings.move_genes:
        raise InputError(
            settings.where,
            "strategy: path_ga searches moves of a layer path, and this space has none; expected data_flow with form: "
            "moves, or another strategy, such as cma_es",
        )
    return PathGA(settings, settings.population or 2 * default_population(settings.dims))
