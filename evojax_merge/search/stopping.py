"""When a search ends before its last generation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evojax_merge.config import StopConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.devices import decided_by_main
from evojax_merge.search.validation import Check, Trend


@dataclass(frozen=True)
class Course:
    """What of the generations so far a search's end and its warnings depend on. evaluations: how many candidates were
    evaluated; best: the best fitness on all search examples; stale: how many generations since could have bettered it;
    seconds: how long evaluations have taken."""

    evaluations: int = 0
    best: float = -math.inf
    stale: int = 0
    seconds: float = 0.0
    trend: Trend = field(default_factory=Trend)

    def after(self, row: dict[str, Any], seconds: float) -> "Course":
        """After another generation: its row of the history, and its seconds."""
        best, look = row["best_so_far"], row.get("validation")
        course = replace(self, evaluations=row["evaluations"], seconds=self.seconds + seconds)
        if best is not None and best > self.best:
            course = replace(course, best=best, stale=0)
        elif row["best"] is not None:
            # Of no candidate of the others is it known what it scores on all examples.
            course = replace(course, stale=self.stale + 1)
        if best is None or look is None or look["best_so_far"] is None:
            return course
        check = Check(row["generation"], best, look["best_so_far"], look["standard_error"])
        return replace(course, trend=self.trend.after(check))


def course_of(rows: Sequence[dict[str, Any]], timing: Sequence[dict[str, Any]]) -> Course:
    """The course of a search from its history and the lines of the clock."""
    course = Course(seconds=sum(map(seconds_of, timing)))
    for row in rows:
        course = course.after(row, 0.0)
    return course


def seconds_of(timing: dict[str, Any]) -> float:
    """How long the evaluations of a generation took, by its line of the clock."""
    return float(timing["seconds"]) + float(timing.get("validation_seconds", 0.0))


@dataclass(frozen=True)
class Stopped:
    """What ended a search early: the criterion, as a config calls it, and how it was met."""

    criterion: str
    reason: str

    def describe(self) -> str:
        return f"search.stop.{self.criterion}: {self.reason}"


def stopped(stop: StopConfig, course: Course, population: int) -> Stopped | None:
    """What ends a search before a generation of so many candidates; None: it goes on. All processes of a run do this
    together."""
    if stop == StopConfig():
        return None
    met = criteria_met(stop, course, population)
    names = tuple(StopConfig.model_fields)
    number = decided_by_main(names.index(next(iter(met))) if met else -1)
    return None if number < 0 else Stopped(names[number], met.get(names[number], "as the main process has it"))


def criteria_met(stop: StopConfig, course: Course, population: int) -> dict[str, str]:
    """Which criteria are met before a generation of so many candidates, and what is to be said of each. What depends on
    the clock comes last."""
    found = {}
    if stop.target is not None and course.best >= stop.target:
        found["target"] = f"the best fitness, {course.best:.6g}, has reached {stop.target:g}"
    if stop.evaluations is not None and course.evaluations + population > stop.evaluations:
        found["evaluations"] = (
            f"{course.evaluations:,} candidates were evaluated, and {population:,} more would be over "
            f"{stop.evaluations:,}"
        )
    if stop.stagnation is not None and course.stale >= stop.stagnation:
        found["stagnation"] = (
            f"the best fitness has not risen for {course.stale:,} generations, of {stop.stagnation:,} at most"
        )
    if stop.seconds is not None and course.seconds >= stop.seconds:
        found["seconds"] = f"evaluations have taken {course.seconds:.1f} s, of {stop.seconds:g} s"
    return found


def check_stop(where: str, stop: StopConfig, population: int) -> None:
    """Raises InputError where a search would end before its first generation. `where` names the search."""
    if stop.evaluations is not None and stop.evaluations < population:
        raise InputError(
            where,
            f"stop.evaluations: {stop.evaluations:,} are fewer than the {population:,} candidates of one generation; "
            f"expected {population:,} or more, or a smaller population",
        )
