"""The words of the judges' page while the search asks nothing, and about its result."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from evojax_merge.report.comparison import Result, label_of
from evojax_merge.report.plan import CHOOSING, HELDOUT, MEASURING
from evojax_merge.steps.loading import Phase, Progress
from evojax_merge.system.console import format_seconds, seconds_left

# A phase of the search, in the words of the page.
PHASES = {
    "loading": "Before the first pair, step 1 of 2: the models are being loaded",
    MEASURING: "Before the first pair, step 1 of 2: the base is being measured on the other tasks",
    CHOOSING: "The last generation has its votes: the winner is being chosen",
    HELDOUT: "The winner is chosen: it and the other models are writing answers to held-out prompts",
}
TRAINING = "The winner is chosen: adapters are being trained, to be compared with it"
COLUMNS = ("model", "winner preferred", "model preferred", "neither", "same answer", "winner's share of the decided")


@dataclass
class Step:
    """A piece of work. total, done: its units, total 0 where they are unknown; last: the seconds that the last
    generation took for the same; started: seconds of the monotonic clock; at: those from then on until `done`."""

    what: str
    total: int = 0
    last: float | None = None
    started: float = field(default_factory=lambda: time.monotonic())
    done: int = 0
    at: float = 0.0

    def describe(self) -> str:
        passed, left, basis = time.monotonic() - self.started, 0.0, ""
        if self.last is not None:
            left, basis = self.last - passed, f" (the last generation's took {format_seconds(self.last)})"
        elif 0 < self.done < self.total:
            left = seconds_left(self.done, self.total, self.at, passed)
            basis = " at the rate so far" if left > 0 else ""
        share = f", {self.done / self.total:.0%} done" if self.total else ""
        about = f", about {format_seconds(left)} left" if left > 0 else ""
        return f"{self.what}{share}; {format_seconds(passed)} so far{about}{basis}."


class Activity:
    """The search writes it, and the page reads it from another thread. generations: that the search will hold; None:
    the clock ends it; done: those that it has behind it."""

    def __init__(self, generations: int | None = None, done: int = 0) -> None:
        self._of, self._number = "" if generations is None else f" of {generations}", done
        self._step, self.has_ended = Step("Before the first pair: the search begins"), False
        self._last: float | None = None
        self._result: dict[str, Any] | None = None

    def shown(self, phase: Phase) -> Phase:
        """The phase, on the page as well."""

        @contextmanager
        def shown(name: str, steps: int) -> Iterator[Progress]:
            with phase(name, steps) as progress:
                yield self._begin(Step(PHASES.get(name, TRAINING), steps), progress)

        return shown

    def writing(self, passes: int, progress: Progress) -> Progress:
        self._number += 1
        start = "Before the first pair, step 2 of 2:" if self._last is None else "Next,"
        what = f"{start} the candidates of generation {self._number}{self._of} are writing their answers"
        return self._begin(Step(what, passes, self._last), progress)

    def asking(self) -> None:
        self._last = time.monotonic() - self._step.started

    def counting(self) -> None:
        self._step = Step(f"Generation {self._number}{self._of} has its votes, and the search works with them")

    def conclude(self, result: Result) -> None:
        met = [(row, meetings) for row in result.rows for meetings in row.meetings.values()]
        table = [
            [label_of(row.role, row.name), *map(str, (one.won, one.lost, one.neither, one.same)), one.share()]
            for row, one in met
        ]
        unproven = ["No prompt was held out: no vote says whether the winner is better than the other models."]
        sentences = result.verdicts() if result.rows else unproven
        self._result = {"sentences": sentences, "columns": COLUMNS, "table": table}
        self._step = Step("The search is over: its winner is being written to best/model in the run's folder")

    def state(self) -> dict[str, Any]:
        step, share, text = self._step, 1.0, "The search has ended, and all votes are kept. Thank you."
        if not self.has_ended:
            share, text = step.done / step.total if step.total else 0.0, step.describe()
        elif self._result is not None:
            text += " The winner is best/model in the run's folder."
        return {"ended": self.has_ended, "activity": text, "share": share, "result": self._result}

    def _begin(self, step: Step, progress: Progress) -> Progress:
        self._step = step

        def advance(done: int) -> None:
            step.done, step.at = min(step.total, step.done + done), time.monotonic() - step.started
            progress(done)

        return advance
