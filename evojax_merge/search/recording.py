"""Records of a search: each generation's line of the history and of the clock, what is saved, and what is reported."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from evojax_merge.config.search_config import SearchConfig
from evojax_merge.evaluation.compilations import compilations
from evojax_merge.evaluation.scores import ScoredTask, number_or_none, without_broken
from evojax_merge.mergekit.write import shortest_decimal
from evojax_merge.search.protocols import HasParents, Space, State
from evojax_merge.search.stopping import Course, course_of, seconds_of
from evojax_merge.search.successive_halving import HalvingResult

# A generation's fitness is measured on all examples, on a minibatch, or by a smooth companion.
ScoredOn = Literal["all examples", "minibatch", "companion"]


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a generation. tasks: those that all of its candidates were scored on first; scored_on: the
    meaning of `halved.fitness`; passes: its work, 1 is a candidate on all examples, without a gradient; seconds: its
    duration; figures: further ones for the history, by name."""

    tasks: Sequence[ScoredTask]
    halved: HalvingResult
    scored_on: ScoredOn
    passes: float
    seconds: float
    figures: Mapping[str, float]


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
        return list(self._rows)

    def read_timing(self) -> list[dict[str, Any]]:
        return list(self._timing)

    def describe(self, generations: int) -> str:
        """Say which of the first `generations` are kept, and where."""
        return "nothing is saved"


class Clock:
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


class Recorder:
    """Keeps a search's generations. course: what the search's end and its warnings depend on."""

    def __init__(self, config: SearchConfig, space: Space, storage: Storage, reporter: Reporter) -> None:
        self._config, self._space, self._storage, self._reporter = config, space, storage, reporter
        rows = storage.read_history()
        self.course = course_of(rows, storage.read_timing())
        self._best_parent = _best_parent(space, rows[0]) if rows else None
        self._clock = Clock()

    def record(
        self, number: int, genomes: np.ndarray, evaluated: Evaluated, state: dict[str, Any], metrics: dict[str, float],
        look: tuple[dict[str, Any], float] | None,
    ) -> None:  # fmt: skip
        """Save generation `number` and the state after it, and report it. metrics: the strategy's; look: the fitness on
        the validation split, and the seconds that it took; None: there was no look."""
        config, halved, population, seconds = self._config, evaluated.halved, len(genomes), evaluated.seconds
        row = history_row(number, self.course.evaluations + population, genomes, halved, state, metrics)
        if evaluated.scored_on == "companion":
            row["companion"] = True
        timing = {
            "generation": number, "passes": evaluated.passes, "seconds": seconds,
            "seconds_per_candidate": seconds / population,
        }  # fmt: skip
        if look is not None:
            row["validation"], timing["validation_seconds"] = look
        parted, self.course = self.course.trend.overfitting_since, self.course.after(row, seconds_of(timing))
        if self.course.trend.overfitting_since != parted:
            # Warn before saving: a warning about a saved generation was already given.
            self._reporter.warn(self.course.trend.describe())
        self._storage.save(number, state, row, timing)
        if number == 1:
            self._best_parent = _best_parent(self._space, row)
        shown: Mapping[str, Any] = row.get("validation", {})
        self._reporter.finished(
            Generation(
                number=number,
                fitness=without_broken(halved.fitness),
                metrics=metrics,
                validation=shown.get("best_so_far"),
                proposed_validation=max((x for x in shown.get("finalists", ()) if x is not None), default=None),
                **{name: row[name] for name in ("best", "mean", "best_so_far", "failed", "scores_of_best")},
                seconds=seconds,
                best_parent=self._best_parent,
                scored_on=evaluated.scored_on,
                generations=None if config.parsed_budget.seconds else config.generations,
                seconds_left=self._clock.seconds_left(config, number, self.course, population, seconds_of(timing)),
            )
        )


def _best_parent(space: Space, row: Mapping[str, Any]) -> float | None:
    """The best fitness of a parent, on all examples, in a generation's row of the history; None: it has no parent."""
    if row["best"] is None or not isinstance(space, HasParents):
        return None
    parents = space.parents_among(np.array(row["genomes"], np.float32))
    met_all = np.array(row["examples"]) == max(row["examples"])
    values = np.array(row["fitness"], float)[parents & met_all]
    return number_or_none(np.max(values, initial=-np.inf, where=np.isfinite(values)))


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
        "best": number_or_none(complete.max()) if complete.size else None,
        "mean": number_or_none(finite.mean()) if finite.size else None,
        "worst": number_or_none(finite.min()) if finite.size else None,
        "best_so_far": number_or_none(without_broken(state["fitness"][:1])[0]),
        **{name: number_or_none(value) for name, value in metrics.items()},
        "evaluations": evaluations,
        "failed": int((~np.isfinite(halved.fitness)).sum()),
        "scores_of_best": {name: number_or_none(value) for name, value in halved.scores_of_best.items()},
        "fitness": [number_or_none(value) for value in values],
        "examples": halved.examples.tolist(),
        "task_scores": {
            name: [number_or_none(value) for value in column]
            for name, column in zip(halved.scores.tasks, halved.scores.task_means.T, strict=True)
        },
        "genomes": [[shortest_decimal(gene) for gene in genome] for genome in genomes],
    }
