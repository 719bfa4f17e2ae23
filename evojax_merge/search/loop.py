"""The generation loop: ask, evaluate, tell, save.

A run is a function of its config: the random key of a generation depends on the seed and the generation's number alone,
and the state is saved as it goes on, so that a run that was killed and resumed writes the same history and finds the
same winner as one that was not.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import numpy as np

from evojax_merge.config.search_config import SearchConfig
from evojax_merge.errors import Failed
from evojax_merge.evaluation.compilations import compilations
from evojax_merge.evaluation.scores import (
    BROKEN,
    ScoredTask,
    TaskScores,
    fitness,
    means,
    score_matrix,
    task_weights,
    without_broken,
)
from evojax_merge.mergekit.write import shortest_decimal
from evojax_merge.search.answers import ask, finalists, metrics, tell
from evojax_merge.search.budgets import GRADIENT_PASSES, STEPS_PER_LOOK, describe_length, looks_at_all
from evojax_merge.search.example_choice import ExampleChoice, choose_examples
from evojax_merge.search.protocols import (
    GenomeEvaluator,
    GradientEvaluator,
    HasParents,
    Space,
    State,
    Strategy,
    context_of,
    goal_of,
    plain_merges_of,
    wants_gradients,
    within,
)
from evojax_merge.search.stopping import Course, Stopped, course_of, seconds_of, stopped
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

# The number of the key that a strategy's first state is drawn from; generations have those from 0 on.
INIT_KEY = 2**31 - 1
# A generation's fitness is measured on all examples, on a minibatch, or by a smooth companion.
ScoredOn = Literal["all examples", "minibatch", "companion"]


@dataclass(frozen=True)
class Generation:
    """The results of one generation. number: from 1; fitness: float64[P], each candidate's mean over the examples that
    it was evaluated on, NaN where it failed or broke a guard; best, mean: of this generation, and best_so_far of all,
    on all examples (None: no such candidate yet); metrics: the strategy's, such as sigma; seconds: the duration of the
    evaluation; validation: the fitness of the best so far on the validation split, in generations that are validated;
    generations: how many are wanted, None where the clock ends the search; best_parent: the fitness of the best parent
    among the candidates of the first generation; seconds_left: about the time until the last generation,
    and on the terminal until the end of the search; stage: the number of a chain's stage, from 1; scores_of_best: the
    best candidate's mean by `task/metric`; scored_on: the meaning of `fitness`, on a minibatch where generations take
    turns with several; proposed_validation: the best fitness of the strategy's proposals on the validation split, in
    generations that are validated."""

    number: int
    fitness: np.ndarray
    best: float | None
    mean: float | None
    best_so_far: float | None
    failed: int
    metrics: dict[str, float]
    seconds: float
    validation: float | None = None
    generations: int | None = None
    best_parent: float | None = None
    seconds_left: float | None = None
    stage: int | None = None
    scores_of_best: Mapping[str, float | None] = field(default_factory=dict)
    scored_on: ScoredOn = "all examples"
    proposed_validation: float | None = None

    @property
    def population(self) -> int:
        return len(self.fitness)

    @property
    def best_of_part(self) -> float | None:
        """The best of `fitness` where that is of a minibatch or a companion; None for one on all examples."""
        finite = self.fitness[np.isfinite(self.fitness)]
        return float(finite.max()) if self.scored_on != "all examples" and finite.size else None


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


class Reporter:
    """Receives progress. The defaults do nothing, but for `warn`, which logs; the command line overrides them."""

    def evaluating(self, generation: int, passes: int) -> None: ...
    def advanced(self, passes: int) -> None: ...
    def finished(self, generation: Generation) -> None: ...
    def log(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        self.log(f"warning: {text}")


class Storage:
    """Keeps a search, generation by generation; this one for as long as the process lives."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._timing: list[dict[str, Any]] = []

    def restore(self, like: State, log: Callable[[str], None]) -> tuple[State, int]:
        """The last saved state, in the structure of `like`, and the number of generations behind it; else `like`, 0."""
        return like, 0

    def save(self, generation: int, state: State, row: dict[str, Any], timing: dict[str, Any]) -> None:
        """Keep a generation: the state after it, its line of the history and that of the clock."""
        self._rows.append(row)
        self._timing.append(timing)

    def close(self) -> None:
        """Bring what was kept to where it stays."""

    def read_history(self) -> list[dict[str, Any]]:
        """The rows that were saved."""
        return list(self._rows)

    def read_timing(self) -> list[dict[str, Any]]:
        """The lines of the clock that were saved."""
        return list(self._timing)

    def describe(self, generations: int) -> str:
        """Say which of the first `generations` are kept, and where."""
        return "nothing is saved"


def generation_key(seed: int, generation: int) -> jax.Array:
    """The random key of a generation, from 0 on. JAX takes 32 bits of a seed; the higher ones are folded in."""
    key, high = jax.random.key(seed % 2**32), seed // 2**32
    return jax.random.fold_in(jax.random.fold_in(key, high) if high else key, generation)


class Schedule:
    """How a search's generations are scored: by successive halving over shards of the examples, or, where the strategy
    follows gradients, on one of the minibatches, and now and then on all examples as well where `looks`.

    by_gradient: of the generation that began last, None before the first; is_fitness: whether gradients are those of
    the fitness, and not of a companion."""

    def __init__(
        self, shards: Sequence[GenomeEvaluator], minibatches: Sequence[GradientEvaluator],
        choice: ExampleChoice | None, seed: int, *, looks: bool = False,
    ) -> None:  # fmt: skip
        self.shards, self._minibatches, self._choice, self._seed = shards, minibatches, choice, seed
        self.by_gradient: bool | None = None
        self.is_fitness = bool(minibatches) and _metrics(minibatches[0]) == _metrics(shards[0])
        self._looks, self._looked = looks and self.is_fitness and len(shards) == 1, False
        self._examples = sum(task.size for shard in shards for task in shard.tasks)

    @property
    def scored_on(self) -> ScoredOn:
        """The meaning of the latest generation's fitness."""
        if not self.by_gradient or self._looked or (self.is_fitness and len(self._minibatches) == 1):
            return "all examples"
        return "minibatch" if self.is_fitness else "companion"

    def passes(self, halved: HalvingResult) -> float:
        """The work of the latest generation, whose results these are: 1 is a candidate on all examples, without a
        gradient."""
        scored = float(halved.examples.sum() / self._examples)
        if not self.by_gradient:
            return scored
        followed = GRADIENT_PASSES * len(halved.examples) / len(self._minibatches)
        return followed + scored if self._looked else followed

    def evaluate(
        self, number: int, by_gradient: bool, genomes: np.ndarray, surrogate: SurrogateData, reporter: Reporter
    ) -> tuple[Sequence[ScoredTask], HalvingResult]:
        """The results of generation `number`, and the tasks that all of its candidates were scored on first."""
        parts: Sequence[GenomeEvaluator] = self._minibatches if by_gradient else self.shards
        if self._minibatches and not self.is_fitness and by_gradient != self.by_gradient:
            shown, wanted = (
                ", ".join(f"{task} {metric}" for task, metric in _metrics(part)) for part in (parts[0], self.shards[0])
            )
            line = f"from generation {number + 1} on candidates are scored on"
            reporter.log(
                f"{line} the fitness itself: {shown}" if shown == wanted
                else f"{line} {shown}, which has a gradient, in place of {wanted}"
            )  # fmt: skip
        self.by_gradient = by_gradient
        turns = shard_order(len(parts), self._seed, number)
        if by_gradient:
            return parts[turns[0]].tasks, self._differentiate(number, turns[0], genomes, surrogate, reporter)
        order = (
            order_shards(parts, turns) if self._choice is None
            else choose_examples(self._choice, surrogate, self._seed, number)
        )  # fmt: skip
        reporter.evaluating(number, halving_passes(order, len(genomes)))
        return order.parts[0].evaluator.tasks, successive_halving(order, genomes, surrogate, reporter.advanced)

    def _differentiate(
        self, number: int, turn: int, genomes: np.ndarray, surrogate: SurrogateData, reporter: Reporter
    ) -> HalvingResult:
        """Evaluate and differentiate genomes `float32[P, D]` on minibatch `turn`. Candidates that were evaluated on the
        fitness, on the only minibatch or on all examples besides, count as complete."""
        evaluator, parts, size = self._minibatches[turn], shard_parts(self._minibatches), len(genomes)
        self._looked = self._looks and (number + 1) % STEPS_PER_LOOK == 0
        seen: GenomeEvaluator = self.shards[0] if self._looked else evaluator
        reporter.evaluating(number, evaluator.passes(size) + (seen.passes(size) if self._looked else 0))
        first, gradients = evaluator.value_and_gradient(genomes, reporter.advanced)
        predicted, matrix = fitness(evaluator.tasks, first, goal_of(evaluator)), empty_matrix(parts, size)
        parts[turn].enter(first, np.arange(size), matrix)
        scores = seen.score(genomes, reporter.advanced) if self._looked else first
        values = fitness(seen.tasks, scores, goal_of(seen))
        best = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))
        return HalvingResult(
            fitness=values,
            examples=np.full(size, sum(task.size for task in seen.tasks)),
            complete=np.isfinite(values) & self.is_fitness & (self._looked or len(parts) == 1),
            scores=replace(matrix, predicted=predicted, gradients=gradients),
            scores_of_best=means(seen.tasks, scores)[best],
            first=first,
            surrogate=surrogate,
        )


def evolve(
    config: SearchConfig,
    seed: int,
    strategy: Strategy,
    space: Space,
    shards: Sequence[GenomeEvaluator],
    storage: Storage,
    reporter: Reporter,
    diagnose: Callable[[Sequence[Any], TaskScores], Sequence[str]] = lambda tasks, scores: (),
    hint: Callable[[Any], str] = lambda task: "",
    minibatches: Sequence[GradientEvaluator] = (),
    validation: GenomeEvaluator | None = None,
    choice: ExampleChoice | None = None,
) -> Archive:
    """Search from the storage's last saved generation (or from the start) to the config's end. `shards`: one evaluator
    for each shard of the examples; with one, every candidate is evaluated on everything. `minibatches`: for a strategy
    that follows gradients, evaluators that differentiate the fitness or its companion, one for each part of the
    examples. `validation`: scores the validation split every `config.validate_every` generations. `choice`: the shards'
    examples, from which each generation's rungs choose; None: the shards take turns. `diagnose` returns notes on the
    first generation's scores, which are logged; `hint` explains why all candidates may fail on a task.

    Raises Failed in the generation in which every candidate fails, and where a strategy asks for another number of
    genomes than its population.
    """
    _introduce(config, strategy, space, shards, minibatches, reporter)
    state = init_state(config, seed, strategy, space, init_surrogate(shards, space.dims))
    if validation is not None and config.validate_every:
        state["peak"] = init_peak(validation)
    state, first = storage.restore(state, reporter.log)
    rows = storage.read_history()
    course, ended, done = course_of(rows, storage.read_timing()), None, first
    best_parent = _best_parent(space, rows[0]) if rows else None
    clock = _Clock()
    schedule = Schedule(shards, minibatches, choice, seed, looks=looks_at_all(config))
    if config.generations <= first:
        reporter.log(f"{first} generations are saved, and {config.generations} wanted: nothing to search")
    with contextlib.closing(storage):
        for number in range(first, config.generations):
            interrupts.check()
            key = generation_key(seed, number)
            genomes, state_after_ask = ask(strategy, key, state["strategy"], space.dims)
            context = context_of(strategy, state_after_ask)
            schedule.shards = [within(shard, context) for shard in schedule.shards]
            ended = stopped(config, course, len(genomes))
            if ended is not None:
                of = "" if config.parsed_budget.seconds else f" of {config.generations}"
                searched = f"stopped after generation {number}{of}"
                line = f"{number} generations are saved: nothing to search" if number == first else searched
                reporter.log(f"{line} ({ended.describe()})")
                break
            started, genes, surrogate = time.perf_counter(), np.asarray(genomes), SurrogateData(**state["known"])
            by_gradient = wants_gradients(strategy, state["strategy"])
            tasks, halved = schedule.evaluate(number, by_gradient, genes, surrogate, reporter)
            seconds = time.perf_counter() - started
            if not np.isfinite(halved.fitness).any():
                raise Failed(_all_failed(number, len(genomes), tasks, halved.first, storage, hint))
            for line in diagnose(tasks, halved.first) if number == 0 else ():
                reporter.log(line)
            state_after_tell = tell(strategy, key, state_after_ask, genomes, halved.scores)
            state = next_state(state_after_tell, genes, halved, state)
            values = metrics(strategy, state_after_tell)
            if goal_of(schedule.shards[0]).guards:
                values["guards_broken"] = int((halved.fitness <= BROKEN).sum())
            if by_gradient and number == first and not np.any(halved.scores.gradients):
                reporter.warn(
                    "the gradient is 0 everywhere: nothing that is searched changes the scores, to first order"
                )
            row = history_row(number + 1, course.evaluations + len(genomes), genes, halved, state, values)
            if by_gradient and not schedule.is_fitness:
                row["companion"] = True
            timing = {
                "generation": number + 1, "passes": schedule.passes(halved), "seconds": seconds,
                "seconds_per_candidate": seconds / len(genomes),
            }  # fmt: skip
            if validation is not None and config.validate_every and (number + 1) % config.validate_every == 0:
                started = time.perf_counter()
                best = np.asarray(state["genomes"])[:1][np.isfinite(state["fitness"][:1])]
                proposed = finalists(strategy, state_after_tell, space.dims)
                evaluator = within(validation, context_of(strategy, state_after_tell))
                row["validation"], state["peak"] = validate(evaluator, best, proposed, state["peak"])
                timing["validation_seconds"] = time.perf_counter() - started
            overfitting_since, course = course.trend.overfitting_since, course.after(row, seconds_of(timing))
            if course.trend.overfitting_since != overfitting_since:
                # Warn before saving: a warning about a saved generation was already given.
                reporter.warn(course.trend.describe())
            storage.save(number + 1, state, row, timing)
            done = number + 1
            best_parent = _best_parent(space, row) if number == 0 else best_parent
            reporter.finished(
                _generation(
                    row, halved, values, seconds=seconds, best_parent=best_parent, scored_on=schedule.scored_on,
                    generations=None if config.parsed_budget.seconds else config.generations,
                    seconds_left=clock.seconds_left(config, done, course, len(genomes), seconds_of(timing)),
                )
            )  # fmt: skip
    finite = np.isfinite(state["fitness"])
    return Archive(
        genomes=np.asarray(state["genomes"])[finite],
        fitness=np.asarray(state["fitness"])[finite],
        proposed=finalists(strategy, state["strategy"], space.dims),
        generations=done,
        stopped=ended,
        context=context_of(strategy, state["strategy"]),
    )


def _introduce(
    config: SearchConfig, strategy: Strategy, space: Space, shards: Sequence[GenomeEvaluator],
    minibatches: Sequence[GradientEvaluator], reporter: Reporter,
) -> None:  # fmt: skip
    """Log the size of a search, and how its generations are scored."""
    steps = f", each gradient step on one of its {len(minibatches)} minibatches" if len(minibatches) > 1 else ""
    reporter.log(
        f"{strategy.name}: {space.dims} dimensions, population {strategy.population}, {describe_length(config)}; "
        f"fitness on the search split{steps}"
    )
    _, missing = plain_merges_of(space)
    if missing:
        reporter.log(f"not in the space: {'; '.join(missing)}")
    if len(shards) > 1:
        sizes = np.cumsum([sum(task.size for task in shard.tasks) for shard in shards])
        ends = enumerate(rung_shards(len(shards)))
        rungs = [f"{rung_size(strategy.population, rung)} on {sizes[end - 1]}" for rung, end in ends]
        reporter.log(f"successive halving: {', '.join(rungs)} examples")


def _generation(row: Mapping[str, Any], halved: HalvingResult, metrics: dict[str, float], **figures: Any) -> Generation:
    """The results of a generation, of its row of the history and further `figures`, fields of `Generation`."""
    look: Mapping[str, Any] = row.get("validation", {})
    return Generation(
        number=row["generation"],
        fitness=without_broken(halved.fitness),
        metrics=metrics,
        validation=look.get("best_so_far"),
        proposed_validation=max((x for x in look.get("finalists", ()) if x is not None), default=None),
        **{name: row[name] for name in ("best", "mean", "best_so_far", "failed", "scores_of_best")},
        **figures,
    )


def _best_parent(space: Space, row: Mapping[str, Any]) -> float | None:
    """The best fitness of a parent, on all examples, in a generation's row of the history; None: it has no parent."""
    if row["best"] is None or not isinstance(space, HasParents):
        return None
    parents = space.parents_among(np.array(row["genomes"], np.float32))
    met_all = np.array(row["examples"]) == max(row["examples"])
    values = np.array(row["fitness"], float)[parents & met_all]
    return _number(np.max(values, initial=-np.inf, where=np.isfinite(values)))


class _Clock:
    """Estimates the time that a search takes until its last generation. The seconds of compiling do not count, and
    neither do a process's first generation and, beside evaluating, its second: the strategy is traced there, and the
    libraries that save are imported."""

    def __init__(self) -> None:
        self._each = list[float]()
        self._ended: tuple[float, float] | None = None

    def seconds_left(
        self, config: SearchConfig, done: int, course: Course, population: int, evaluating: float
    ) -> float | None:
        """Seconds until the last generation, or until a limit of `search.stop` or the budget, whichever comes first;
        None after the process's first generation. done: the number of generations so far; evaluating: the seconds of
        the latest one's evaluation."""
        now, compiling, stop = time.perf_counter(), compilations().seconds, config.stop
        before, self._ended = self._ended, (now, compiling)
        if before is None:
            return None
        each = max(0.0, now - before[0] - (compiling - before[1]))
        self._each.append(each if self._each else min(each, evaluating))
        each = statistics.median(self._each)
        remaining = config.generations - done
        if stop.evaluations is not None:
            remaining = min(remaining, (stop.evaluations - course.evaluations) // population)
        limits = [seconds for seconds in (stop.seconds, config.parsed_budget.seconds) if seconds is not None]
        left = remaining * each
        return max(0.0, min(left, *(seconds - course.seconds for seconds in limits))) if limits else left


def _metrics(evaluator: GenomeEvaluator) -> list[tuple[str, str]]:
    """The name and the metric of each task that counts."""
    return [(task.name, task.metric) for task, _ in task_weights(evaluator.tasks)]


def _all_failed(
    number: int, population: int, tasks: Sequence[ScoredTask], scores: TaskScores, storage: Storage,
    hint: Callable[[Any], str],
) -> str:  # fmt: skip
    """The message about a generation in which every candidate failed: what failed, and where to look. The generation is
    not saved, so that a continuation tries it again."""
    # The first task of the fitness on which no candidate is finite, else the one with the fewest finite candidates.
    rows = [(task, np.isfinite(scores.matrices[task.name][task.metric]).all(axis=1)) for task, _ in task_weights(tasks)]
    failed = next((task for task, finite in rows if not finite.any()), min(rows, key=lambda pair: pair[1].sum())[0])
    return (
        f"generation {number + 1}: all {population} candidates failed, their scores for task {failed.name} are not "
        f"finite; {storage.describe(number)}. {hint(failed)}"
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


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def history_row(
    number: int,
    evaluations: int,
    genomes: np.ndarray,
    halved: HalvingResult,
    state: dict[str, Any],
    metrics: dict[str, float],
) -> dict[str, Any]:
    """`fitness` is each candidate's mean over as many `examples`, None where it failed or broke a guard; `task_scores`
    its mean on those of each task; `best` and `scores_of_best` are of those that were evaluated on all of them, `mean`
    and `worst` of all candidates."""
    values = without_broken(halved.fitness)
    finite, complete = values[np.isfinite(values)], values[halved.complete & np.isfinite(values)]
    return {
        "generation": number,
        "best": _number(complete.max()) if complete.size else None,
        "mean": _number(finite.mean()) if finite.size else None,
        "worst": _number(finite.min()) if finite.size else None,
        "best_so_far": _number(without_broken(state["fitness"][:1])[0]),
        **{name: _number(value) for name, value in metrics.items()},
        "evaluations": evaluations,
        "failed": int((~np.isfinite(halved.fitness)).sum()),
        "scores_of_best": {name: _number(value) for name, value in halved.scores_of_best.items()},
        "fitness": [_number(value) for value in values],
        "examples": halved.examples.tolist(),
        "task_scores": {
            name: [_number(value) for value in column]
            for name, column in zip(halved.scores.tasks, halved.scores.task_means.T, strict=True)
        },
        "genomes": [[shortest_decimal(gene) for gene in genome] for genome in genomes],
    }


@dataclass(frozen=True)
class Finalist:
    """A candidate, float32[D], its fitness on the examples that the winner is chosen on, and there its means on the
    tasks that count, float64[T], and its scores, float32[N], task by task."""

    genome: np.ndarray
    fitness: float
    task_means: np.ndarray
    scores: np.ndarray


def rescore(space: Space, evaluator: GenomeEvaluator, archive: Archive, progress: Any) -> list[Finalist]:
    """The finalists on the examples that the winner is chosen on, the full search split or the validation split, best
    first: the best few of the search, the strategy's proposals, the start, the uniform merge and the parents, so that
    no winner is worse there than a parent that the space contains and that keeps the guards. Candidates that are not
    finite are left out."""
    evaluator = within(evaluator, archive.context)
    genomes = np.concatenate([archive.genomes, archive.proposed, space.start[None], plain_merges_of(space)[0]])
    genomes = genomes[np.isfinite(genomes).all(axis=1)]
    _, kept = np.unique(genomes, axis=0, return_index=True)
    genomes = genomes[np.sort(kept)]
    scores, goal = evaluator.score(genomes, progress), goal_of(evaluator)
    matrix = score_matrix(evaluator.tasks, scores, goal)
    values, task_means = fitness(evaluator.tasks, scores, goal), matrix.task_means
    order = np.argsort(-np.where(np.isfinite(matrix.fitness), matrix.fitness, -np.inf), kind="stable")
    return [
        Finalist(genomes[i], float(values[i]), task_means[i], matrix.values[i]) for i in order if np.isfinite(values[i])
    ]
