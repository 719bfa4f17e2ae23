"""When a search ends before its last generation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evojax_merge.config.search_config import SearchConfig, StopConfig
from evojax_merge.evaluation.devices import decided_by_main
from evojax_merge.search.validation import Check, Trend


@dataclass(frozen=True)
class Course:
    """The figures of the generations so far on which a search's end and its warnings depend. evaluations: the number of
    evaluated candidates; best: the best fitness on all search examples; stale: the number of generations since that
    could have bettered it; seconds: the duration of all evaluations."""

    evaluations: int = 0
    best: float = -math.inf
    stale: int = 0
    seconds: float = 0.0
    trend: Trend = field(default_factory=Trend)

    def after(self, row: dict[str, Any], seconds: float) -> "Course":
        """The course after another generation: its row of the history, and its seconds."""
        best, look = row["best_so_far"], row.get("validation")
        course = replace(self, evaluations=row["evaluations"], seconds=self.seconds + seconds)
        if best is not None and best > self.best:
            course = replace(course, best=best, stale=0)
        elif row["best"] is not None:
            # In the other generations no candidate was evaluated on all examples.
            course = replace(course, stale=self.stale + 1)
        if best is None or look is None or look.get("best_so_far") is None:
            return course
        check = Check(row["generation"], best, look["best_so_far"], look.get("standard_error"))
        return replace(course, trend=self.trend.after(check))


def course_of(rows: Sequence[dict[str, Any]], timing: Sequence[dict[str, Any]]) -> Course:
    """The course of a search from its history and the lines of the clock."""
    course = Course(seconds=sum(map(seconds_of, timing)))
    for row in rows:
        course = course.after(row, 0.0)
    return course


def seconds_of(timing: dict[str, Any]) -> float:
    """The duration of a generation's evaluations in seconds, from its line of the clock."""
    return float(timing["seconds"]) + float(timing.get("validation_seconds", 0.0))


# The criterion that is no key of `search.stop`, but one of `search` itself.
BUDGET = "budget"


@dataclass(frozen=True)
class Stopped:
    """The criterion, by its config key, that ended a search early, and how it was met."""

    criterion: str
    reason: str

    def describe(self) -> str:
        section = "search" if self.criterion == BUDGET else "search.stop"
        return f"{section}.{self.criterion}: {self.reason}"


def stopped(search: SearchConfig, course: Course, population: int) -> Stopped | None:
    """The criterion that ends a search before a generation of `population` candidates; None: the search goes on. All
    processes of a run call this together."""
    if search.stop == StopConfig() and search.parsed_budget.seconds is None:
        return None
    # The criteria that depend on the clock come last.
    stop, budget, met = search.stop, search.parsed_budget.seconds, dict[str, str]()
    if stop.target is not None and course.best >= stop.target:
        met["target"] = f"the best fitness, {course.best:.6g}, has reached {stop.target:g}"
    if stop.evaluations is not None and course.evaluations + population > stop.evaluations:
        met["evaluations"] = (
            f"{course.evaluations:,} candidates were evaluated, and {population:,} more would be over "
            f"{stop.evaluations:,}"
        )
    if stop.stagnation is not None and course.stale >= stop.stagnation:
        met["stagnation"] = (
            f"the best fitness has not risen for {course.stale:,} generations, of {stop.stagnation:,} at most"
        )
    if stop.seconds is not None and course.seconds >= stop.seconds:
        met["seconds"] = f"evaluations have taken {course.seconds:.1f} s, of {stop.seconds:g} s"
    if budget is not None and course.seconds >= budget:
        met[BUDGET] = f"evaluations have taken {course.seconds:.1f} s, of {search.budget}"
    names = (*StopConfig.model_fields, BUDGET)
    number = decided_by_main(names.index(next(iter(met))) if met else -1)
    return None if number < 0 else Stopped(names[number], met.get(names[number], "as the main process has it"))
