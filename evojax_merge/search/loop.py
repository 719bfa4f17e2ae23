"""The generation loop: ask, evaluate, tell, save.

A run is a function of its config: the random key of a generation depends on the seed and the generation's number alone,
and the state after each generation is saved, so that a run that was killed and resumed writes the same history and
finds the same winner as one that was not.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from evojax_merge import interrupts
from evojax_merge.config import SearchConfig
from evojax_merge.errors import Failed
from evojax_merge.evaluation.devices import tree_nbytes
from evojax_merge.evaluation.diagnostics import warnings
from evojax_merge.evaluation.evaluator import Scores, fitness, task_weights
from evojax_merge.interrupts import defer_signals
from evojax_merge.search.run_folder import (
    KEPT_CHECKPOINTS,
    Checkpoints,
    RunFolder,
    append_line,
    restore_history,
    restore_timing,
    to_line,
)
from evojax_merge.search.scorers import Scorer, Space
from evojax_merge.search.strategy import Strategy, default_population, make_strategy
from evojax_merge.search.successive_halving import (
    HalvingResult,
    describe_rungs,
    halving_passes,
    init_surrogate,
    shard_order,
    successive_halving,
)
from evojax_merge.search.surrogate import HISTORY, SurrogateData
from evojax_merge.tasks.task import Task


@dataclass(frozen=True)
class Generation:
    """What one generation showed; `seconds` is how long its evaluation took."""

    number: int
    best: float | None
    mean: float | None
    sigma: float
    best_so_far: float | None
    failed: int
    seconds: float
    population: int


@dataclass(frozen=True)
class Outcome:
    """The best genomes of a search, best first: float32[A, D], and the mean of the final distribution."""

    genomes: np.ndarray
    fitness: np.ndarray
    mean: np.ndarray


class Reporter:
    """Told of progress; the command line draws it. Every method may be left as it is."""

    def evaluating(self, generation: int, passes: int) -> None: ...
    def advanced(self, passes: int) -> None: ...
    def finished(self, generation: Generation) -> None: ...
    def log(self, text: str) -> None: ...


def run_search(
    config: SearchConfig,
    seed: int,
    space: Space,
    shards: Sequence[Scorer],
    folder: RunFolder,
    reporter: Reporter,
    is_main_process: bool = True,
) -> Outcome:
    """Search from where the run folder stands (its start, or its last saved generation) to the config's end. `shards`:
    a scorer for each shard of the examples; with one, every candidate is scored on everything.
    `is_main_process`: whether this is the process that writes the run folder; all of them save checkpoints together.
    Raises Failed in the generation in which every candidate fails."""
    population = config.population or default_population(space.dims)
    strategy = make_strategy(space.dims, population, config.sigma, seed)
    reporter.log(f"{strategy.name}: {space.dims} dimensions, population {population}, {config.generations} generations")
    if len(shards) > 1:
        reporter.log(describe_rungs(shards, population))
    with Checkpoints(folder) as checkpoints:
        state = _init_state(strategy, space.start, config.finalists, init_surrogate(shards, space.dims))
        saved, first, history = checkpoints.restore(reporter.log), 0, ""
        if saved is not None:
            state, first, history = saved.state(state), saved.generations, saved.history
            if first >= config.generations:
                reporter.log(f"{first} generations are saved, and {config.generations} wanted: nothing to search")
        if is_main_process:
            restore_history(folder, history, reporter.log)
            restore_timing(folder, first)
        for number in range(first, config.generations):
            interrupts.check()
            genomes, state_after_ask = strategy.ask(state["strategy"], number)
            order = shard_order(len(shards), seed, number)
            reporter.evaluating(number, halving_passes(shards, order, population))
            started = time.perf_counter()
            halved = successive_halving(
                shards, order, np.asarray(genomes), SurrogateData(**state["known"]), reporter.advanced
            )
            seconds = time.perf_counter() - started
            if not np.isfinite(halved.fitness).any():
                raise Failed(_all_failed(number, population, shards[order[0]].tasks, halved.first, folder))
            if number == 0:
                for line in warnings(shards[order[0]].tasks, halved.first):
                    reporter.log(line)
            state = _next_state(strategy, state_after_ask, number, genomes, halved, state)
            row = _history_row(number, halved, state)
            timing = {"generation": number, "seconds": seconds, "seconds_per_candidate": seconds / population}
            line = to_line(row)
            history += line
            with defer_signals():
                checkpoints.save(number + 1, state, history)
                if is_main_process:
                    append_line(folder.history, line)
                    append_line(folder.timing, to_line(timing))
            reporter.finished(
                Generation(
                    number=number,
                    best=row["best"],
                    mean=row["mean"],
                    sigma=row["sigma"],
                    best_so_far=row["best_so_far"],
                    failed=row["failed"],
                    seconds=seconds,
                    population=population,
                )
            )
    return _outcome(state)


def _all_failed(number: int, population: int, tasks: Sequence[Task], scores: Scores, folder: RunFolder) -> str:
    """A generation of which nothing can be learned: what failed, and where to look. It is not saved, so that a
    continuation tries it again."""
    failed = first_failed(tasks, scores)
    saved = f"the {number} before it are saved in {folder.path}" if number else "it is the first, and nothing is saved"
    return (
        f"generation {number + 1}: all {population} candidates failed, their scores for task {failed.name} are not "
        f"finite; {saved}. {failure_hint(failed)}"
    )


def first_failed(tasks: Sequence[Task], scores: Scores) -> Task:
    """The first task of the fitness for which no candidate's scores are finite, else for which one's are not."""
    rows = [(task, np.isfinite(scores.matrices[task.name][task.metric]).all(axis=1)) for task, _ in task_weights(tasks)]
    return next((task for task, finite in rows if not finite.any()), min(rows, key=lambda row: row[1].sum())[0])


def failure_hint(task: Task) -> str:
    """What makes every candidate fail."""
    return task.failure_hint() or (
        "Merges overflow where the bounds of their parameters are wide, and paths fail that have no layer or more than "
        "max_layers: narrow the bounds, lower search.sigma, or evaluate the parents by themselves"
    )


def run_bytes(config: SearchConfig, space: Space, examples: int) -> int:
    """About how much a run writes beside its model, at most: checkpoints (each with the history), one of them being
    written while the others are kept, and the history."""
    population = config.population or default_population(space.dims)
    state = jax.eval_shape(make_strategy(space.dims, population, config.sigma, 0).init, space.start)
    arrays = 4 * HISTORY * (space.dims + examples) + 4 * config.finalists * space.dims + tree_nbytes(state)
    history = config.generations * (400 + 45 * population)
    return (KEPT_CHECKPOINTS + 1) * (arrays + history) + 2 * history + 2**20


def _init_state(strategy: Strategy, start: np.ndarray, archive: int, known: SurrogateData) -> dict[str, Any]:
    return {
        "strategy": strategy.init(start),
        "genomes": np.zeros((archive, start.size), np.float32),
        "fitness": np.full(archive, -np.inf),
        "known": vars(known),
    }


def _next_state(
    strategy: Strategy,
    state_after_ask: Any,
    number: int,
    genomes: jax.Array,
    halved: HalvingResult,
    state: dict[str, Any],
) -> dict[str, Any]:
    # A mean over fewer examples says too little to stand in the archive.
    every = np.concatenate([state["fitness"], np.where(halved.complete, halved.fitness, -np.inf)])
    # Stable: of equals, the one that was found first stays.
    best = np.argsort(-every, kind="stable")[: len(state["fitness"])]
    return {
        "strategy": strategy.tell(state_after_ask, number, genomes, halved.predicted),
        "genomes": np.concatenate([state["genomes"], np.asarray(genomes)])[best],
        "fitness": every[best],
        "known": vars(halved.surrogate),
    }


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def _history_row(number: int, halved: HalvingResult, state: dict[str, Any]) -> dict[str, Any]:
    """`fitness` is each candidate's mean over as many `examples`; `best` and `scores_of_best` are of those that met
    all of them, `mean` and `worst` of all."""
    values = halved.fitness
    finite, complete = values[np.isfinite(values)], values[halved.complete]
    return {
        "generation": number,
        "best": _number(complete.max()) if complete.size else None,
        "mean": _number(finite.mean()) if finite.size else None,
        "worst": _number(finite.min()) if finite.size else None,
        "best_so_far": _number(state["fitness"][0]),
        "sigma": float(state["strategy"].std),
        "evaluations": (number + 1) * len(values),
        "failed": int(len(values) - finite.size),
        "scores_of_best": {name: _number(value) for name, value in halved.scores_of_best.items()},
        "fitness": [_number(value) for value in values],
        "examples": halved.examples.tolist(),
    }


def _outcome(state: dict[str, Any]) -> Outcome:
    found = np.isfinite(state["fitness"])
    return Outcome(
        np.asarray(state["genomes"])[found], np.asarray(state["fitness"])[found],
        np.asarray(state["strategy"].mean, np.float32),
    )  # fmt: skip


@dataclass(frozen=True)
class Finalist:
    """A candidate that was re-scored on the full search split."""

    genome: np.ndarray
    fitness: float


def rescore(space: Space, scorer: Scorer, outcome: Outcome, progress: Any) -> list[Finalist]:
    """The finalists (the best few of the search, the mean of its last distribution, the start) on the full search
    split, best first. Candidates that are not finite are left out."""
    genomes = np.concatenate([outcome.genomes, outcome.mean[None], space.start[None]])
    genomes = genomes[np.isfinite(genomes).all(axis=1)]
    _, kept = np.unique(genomes, axis=0, return_index=True)
    genomes = genomes[np.sort(kept)]
    values = fitness(scorer.tasks, scorer.score(genomes, progress))
    order = np.argsort(-np.where(np.isfinite(values), values, -np.inf), kind="stable")
    return [Finalist(genomes[i], float(values[i])) for i in order if np.isfinite(values[i])]
