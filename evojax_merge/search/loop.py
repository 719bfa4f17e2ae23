"""The generation loop: ask, evaluate, tell, record.

A run is a function of its config: the random key of a generation depends on the seed and the generation's number alone,
and the state is saved as it goes on, so that a run that was killed and resumed writes the same history and finds the
same winner as one that was not.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import numpy as np

from evojax_merge.config.search_config import SearchConfig
from evojax_merge.errors import Failed
from evojax_merge.evaluation.scores import BROKEN, TaskScores, fitness, means, task_weights
from evojax_merge.search.answers import ask, finalists, metrics, tell
from evojax_merge.search.budgets import GRADIENT_PASSES, STEPS_PER_LOOK, describe_length, looks_at_all
from evojax_merge.search.example_choice import ExampleChoice, choose_examples
from evojax_merge.search.protocols import (
    GenomeEvaluator,
    Space,
    State,
    Strategy,
    context_of,
    goal_of,
    plain_merges_of,
    wants_gradients,
    within,
)
from evojax_merge.search.recording import Evaluated, Recorder, Reporter, ScoredOn, Storage
from evojax_merge.search.stopping import Stopped, stopped
from evojax_merge.search.successive_halving import (
    HalvingResult,
    empty_matrix,
    halving_passes,
    init_surrogate,
    order_shards,
    rung_shards,
    rung_size,
    shard_order,
    shard_parts,
    successive_halving,
)
from evojax_merge.search.surrogate import SurrogateData
from evojax_merge.search.validation import init_peak, validate
from evojax_merge.system import interrupts
from evojax_merge.tasks.splits import Splits

# The number of the key that a strategy's first state is drawn from; generations have those from 0 on.
INIT_KEY = 2**31 - 1


class Searchable(Protocol):
    """The parts of a problem that a search is made of."""

    @property
    def search(self) -> SearchConfig: ...
    @property
    def seed(self) -> int: ...
    @property
    def strategy(self) -> Strategy: ...
    @property
    def space(self) -> Space: ...
    @property
    def strata(self) -> Sequence[Sequence[np.ndarray]]:
        """Where rungs choose their examples: those of each task in strata that every rung has its share of, int[n]."""


@dataclass(frozen=True)
class Archive:
    """The result of a search: its best genomes, best first, float32[A, D], their fitness float64[A], and further
    genomes that the strategy proposes, float32[F, D]. generations: how many were searched; stopped: the criterion that
    ended the search before its last generation; context: what the strategy's last state lends to the space."""

    genomes: np.ndarray
    fitness: np.ndarray
    proposed: np.ndarray
    generations: int
    stopped: Stopped | None = None
    context: Any = None


def generation_key(seed: int, generation: int) -> jax.Array:
    """The random key of a generation, from 0 on. JAX takes 32 bits of a seed; the higher ones are folded in."""
    key, high = jax.random.key(seed % 2**32), seed // 2**32
    return jax.random.fold_in(jax.random.fold_in(key, high) if high else key, generation)


class Schedule:
    """How a search's generations are scored: by successive halving over shards of the examples, or, where the strategy
    follows gradients, on one of the minibatches, and now and then, where the search may end by the best of all
    examples, on these as well."""

    def __init__(self, problem: Searchable, on: Splits[Any]) -> None:
        self._problem, self._shards, self._minibatches = problem, on.shards, on.minibatches
        self._choice = None if on.choice is None else ExampleChoice(on.choice, problem.strata, len(on.shards))
        # Whether gradients are those of the fitness, and not of a companion.
        self._is_fitness = bool(on.minibatches) and _metrics(on.minibatches[0]) == _metrics(on.shards[0])
        self._looks = looks_at_all(problem.search) and self._is_fitness and len(on.shards) == 1
        self._examples = sum(task.size for shard in on.shards for task in shard.tasks)
        self._by_gradient: bool | None = None

    def evaluate(
        self, number: int, genomes: np.ndarray, state: dict[str, Any], context: Any, reporter: Reporter
    ) -> Evaluated:
        """Evaluate the generation after `number` others. state: the search's before it; context: what the strategy
        lends the space."""
        surrogate = SurrogateData(**state["known"])
        by_gradient = wants_gradients(self._problem.strategy, state["strategy"])
        if self._minibatches and not self._is_fitness and by_gradient != self._by_gradient:
            reporter.log(self._announcement(number, by_gradient))
        self._by_gradient = by_gradient
        turns = shard_order(len(self._minibatches if by_gradient else self._shards), self._problem.seed, number)
        if by_gradient:
            return self._differentiate(number, turns[0], genomes, surrogate, reporter)
        started = time.perf_counter()
        shards = [within(shard, context) for shard in self._shards]
        order = (
            order_shards(shards, turns) if self._choice is None
            else choose_examples(self._choice, surrogate, self._problem.seed, number)
        )  # fmt: skip
        reporter.evaluating(number, halving_passes(order, len(genomes)))
        halving, scores = successive_halving(order, genomes, surrogate), None
        try:
            while True:
                evaluator, asked = halving.send(scores)
                scores = evaluator.score(asked, reporter.advanced)
        except StopIteration as end:
            halved: HalvingResult = end.value
        broken = {"guards_broken": int((halved.fitness <= BROKEN).sum())} if goal_of(shards[0]).guards else {}
        return Evaluated(
            order.parts[0].evaluator.tasks, halved, "all examples", float(halved.examples.sum() / self._examples),
            time.perf_counter() - started, broken,
        )  # fmt: skip

    def _differentiate(
        self, number: int, turn: int, genomes: np.ndarray, surrogate: SurrogateData, reporter: Reporter
    ) -> Evaluated:
        """Evaluate and differentiate genomes `float32[P, D]` on minibatch `turn`. Candidates that were evaluated on the
        fitness, on the only minibatch or on all examples besides, count as complete."""
        started, evaluator = time.perf_counter(), self._minibatches[turn]
        parts, size = shard_parts(self._minibatches), len(genomes)
        looked = self._looks and (number + 1) % STEPS_PER_LOOK == 0
        seen: GenomeEvaluator = self._shards[0] if looked else evaluator
        reporter.evaluating(number, evaluator.passes(size) + (seen.passes(size) if looked else 0))
        first, gradients = evaluator.value_and_gradient(genomes, reporter.advanced)
        predicted, matrix = fitness(evaluator.tasks, first, goal_of(evaluator)), empty_matrix(parts, size)
        parts[turn].enter(first, np.arange(size), matrix)
        scores = seen.score(genomes, reporter.advanced) if looked else first
        values = fitness(seen.tasks, scores, goal_of(seen))
        best = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))
        sees_all = looked or len(parts) == 1
        halved = HalvingResult(
            fitness=values,
            examples=np.full(size, sum(task.size for task in seen.tasks)),
            complete=np.isfinite(values) & self._is_fitness & sees_all,
            scores=replace(matrix, predicted=predicted, gradients=gradients),
            scores_of_best=means(seen.tasks, scores)[best],
            first=first,
            surrogate=surrogate,
        )
        passes = GRADIENT_PASSES * size / len(parts)
        if looked:
            passes += float(halved.examples.sum() / self._examples)
        scored_on: ScoredOn = "companion" if not self._is_fitness else "all examples" if sees_all else "minibatch"
        return Evaluated(evaluator.tasks, halved, scored_on, passes, time.perf_counter() - started, {})

    def _announcement(self, number: int, by_gradient: bool) -> str:
        """The line about what the generations from `number` + 1 on are scored on."""
        part = self._minibatches[0] if by_gradient else self._shards[0]
        shown, wanted = (
            ", ".join(f"{task} {metric}" for task, metric in _metrics(one)) for one in (part, self._shards[0])
        )
        line = f"from generation {number + 1} on candidates are scored on"
        if shown == wanted:
            return f"{line} the fitness itself: {shown}"
        return f"{line} {shown}, which has a gradient, in place of {wanted}"


def evolve(
    problem: Searchable,
    on: Splits[Any],
    storage: Storage,
    reporter: Reporter,
    diagnose: Callable[[Sequence[Any], TaskScores], Sequence[str]] = lambda tasks, scores: (),
) -> Archive:
    """Search from the storage's last saved generation (or from the start) to the end.

    on: evaluators of genomes: one for each shard of the examples; for a strategy that follows gradients, one for each
    minibatch, which differentiates the fitness or its companion; and one for the validation split, which is looked at
    every `search.validate_every` generations. diagnose: (tasks, everyone's scores) -> notes on the first generation.

    Raises Failed in the generation in which every candidate fails, and where a strategy asks for another number of
    genomes than its population.
    """
    config, strategy, space = problem.search, problem.strategy, problem.space
    _introduce(problem, on, reporter)
    state = init_state(config, problem.seed, strategy, space, init_surrogate(on.shards, space.dims))
    if on.validation is not None and config.validate_every:
        state["peak"] = init_peak(on.validation)
    state, first = storage.restore(state, reporter.log)
    schedule, recorder = Schedule(problem, on), Recorder(config, space, storage, reporter)
    number, ended = first, None
    if config.generations <= first:
        reporter.log(f"{first} generations are saved, and {config.generations} wanted: nothing to search")
    with contextlib.closing(storage):
        while number < config.generations:
            interrupts.check()
            key = generation_key(problem.seed, number)
            genomes, asked = ask(strategy, key, state["strategy"], space.dims)
            ended = stopped(config, recorder.course, len(genomes))
            if ended is not None:
                reporter.log(_why_stopped(config, ended, number, first))
                break
            genes = np.asarray(genomes)
            evaluated = schedule.evaluate(number, genes, state, context_of(strategy, asked), reporter)
            _check(evaluated, number, storage)
            for line in diagnose(evaluated.tasks, evaluated.halved.first) if number == 0 else ():
                reporter.log(line)
            gradients = evaluated.halved.scores.gradients
            if number == first and gradients is not None and not np.any(gradients):
                reporter.warn(
                    "the gradient is 0 everywhere: nothing that is searched changes the scores, to first order"
                )
            strategy_state = tell(strategy, key, asked, genomes, evaluated.halved.scores)
            state = next_state(strategy_state, genes, evaluated.halved, state)
            number += 1
            look, state = _look(problem, on.validation, number, state)
            figures = {**metrics(strategy, strategy_state), **evaluated.figures}
            recorder.record(number, genes, evaluated, state, figures, look)
    finite = np.isfinite(state["fitness"])
    return Archive(
        genomes=np.asarray(state["genomes"])[finite],
        fitness=np.asarray(state["fitness"])[finite],
        proposed=finalists(strategy, state["strategy"], space.dims),
        generations=number,
        stopped=ended,
        context=context_of(strategy, state["strategy"]),
    )


def _introduce(problem: Searchable, on: Splits[Any], reporter: Reporter) -> None:
    """Log the size of a search, and how its generations are scored."""
    strategy, space, minibatches, shards = problem.strategy, problem.space, len(on.minibatches), len(on.shards)
    steps = f", each gradient step on one of its {minibatches} minibatches" if minibatches > 1 else ""
    reporter.log(
        f"{strategy.name}: {space.dims} dimensions, population {strategy.population}, "
        f"{describe_length(problem.search)}; fitness on the search split{steps}"
    )
    _, missing = plain_merges_of(space)
    if missing:
        reporter.log(f"not in the space: {'; '.join(missing)}")
    if shards > 1:
        sizes = np.cumsum([sum(task.size for task in shard.tasks) for shard in on.shards])
        rungs = [
            f"{rung_size(strategy.population, rung)} on {sizes[end - 1]}"
            for rung, end in enumerate(rung_shards(shards))
        ]
        reporter.log(f"successive halving: {', '.join(rungs)} examples")


def _why_stopped(config: SearchConfig, ended: Stopped, number: int, first: int) -> str:
    """The line about a search that ended after `number` generations, of which `first` were saved before."""
    of = "" if config.parsed_budget.seconds else f" of {config.generations}"
    searched = f"stopped after generation {number}{of}"
    line = f"{number} generations are saved: nothing to search" if number == first else searched
    return f"{line} ({ended.describe()})"


def _look(
    problem: Searchable, validation: GenomeEvaluator | None, number: int, state: dict[str, Any]
) -> tuple[tuple[dict[str, Any], float] | None, dict[str, Any]]:
    """The fitness on the validation split after generation `number`, and the seconds that it took, where the search
    looks at it then; and the state after that."""
    every = problem.search.validate_every
    if validation is None or not every or number % every:
        return None, state
    started, strategy = time.perf_counter(), problem.strategy
    best = np.asarray(state["genomes"])[:1][np.isfinite(state["fitness"][:1])]
    proposed = finalists(strategy, state["strategy"], problem.space.dims)
    evaluator = within(validation, context_of(strategy, state["strategy"]))
    look, peak = validate(evaluator, best, proposed, state["peak"])
    return (look, time.perf_counter() - started), state | {"peak": peak}


def _metrics(evaluator: GenomeEvaluator) -> list[tuple[str, str]]:
    """The name and the metric of each task that counts."""
    return [(task.name, task.metric) for task, _ in task_weights(evaluator.tasks)]


def _check(evaluated: Evaluated, number: int, storage: Storage) -> None:
    """Raises Failed where every candidate of the generation after `number` others failed: says on which task, and where
    to look. The generation is not saved, so that a continuation tries it again."""
    fitness, scores = evaluated.halved.fitness, evaluated.halved.first
    if np.isfinite(fitness).any():
        return
    # The first task of the fitness on which no candidate is finite, else the one with the fewest finite candidates.
    rows = [
        (task, np.isfinite(scores.matrices[task.name][task.metric]).all(axis=1))
        for task, _ in task_weights(evaluated.tasks)
    ]
    failed = next((task for task, finite in rows if not finite.any()), min(rows, key=lambda pair: pair[1].sum())[0])
    raise Failed(
        f"generation {number + 1}: all {len(fitness)} candidates failed, their scores for task {failed.name} are not "
        f"finite; {storage.describe(number)}. {failure_hint(failed)}"
    )


def failure_hint(task: Any) -> str:
    """Advice for a task on which every candidate fails."""
    return task.failure_hint() or (
        "Merges overflow where the bounds of their parameters are wide, and paths fail that have no layer or more than "
        "max_layers: narrow the bounds, lower search.sigma, or evaluate the parents by themselves"
    )


def init_state(
    config: SearchConfig, seed: int, strategy: Strategy, space: Space, surrogate: SurrogateData
) -> dict[str, Any]:
    """A search's state before its first generation."""
    return {
        "strategy": strategy.init(generation_key(seed, INIT_KEY), space.start[None]),
        "genomes": np.zeros((config.finalists, space.dims), np.float32),
        "fitness": np.full(config.finalists, -np.inf),
        "known": vars(surrogate),
    }


def next_state(
    strategy_state: State, genomes: np.ndarray, halved: HalvingResult, state: dict[str, Any]
) -> dict[str, Any]:
    """A search's state after a generation; strategy_state: its strategy's."""
    # A mean over fewer examples says too little to stand in the archive.
    every = np.concatenate([state["fitness"], np.where(halved.complete, halved.fitness, -np.inf)])
    # A stable sort: among equals, the earliest candidate stays.
    best = np.argsort(-every, kind="stable")[: len(state["fitness"])]
    return state | {
        "strategy": strategy_state,
        "genomes": np.concatenate([state["genomes"], genomes])[best],
        "fitness": every[best],
        "known": vars(halved.surrogate),
    }
