"""What a search does while it asks judges nothing, and at its end its result: the words of their page."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.filesize import decimal

from evojax_merge.report.comparison import Result
from evojax_merge.report.progress import format_seconds

COLUMNS = ("model", "winner preferred", "model preferred", "neither", "same answer", "winner's share of the decided")


@dataclass
class Step:
    """A piece of work. total, done: its units, 0 where they are unknown; seconds: those that the last one of its kind
    took; None: none was measured; started: on the monotonic clock."""

    what: str
    total: int
    seconds: float | None
    started: float
    done: int = 0

    def describe(self) -> str:
        passed = time.monotonic() - self.started
        done = f", {self.done / self.total:.0%} done" if self.total else ""
        left = ""
        if self.seconds is not None:
            last = format_seconds(self.seconds)
            left = f", about {format_seconds(self.seconds - passed)} left" if passed < self.seconds else ""
            left += f" (the last generation's took {last})"
        elif 0 < self.done < self.total:
            rest = passed * (self.total - self.done) / self.done
            left = f", about {format_seconds(rest)} left at the rate so far"
        return f"{self.what}{done}; {format_seconds(passed)} so far{left}."


class Activity:
    """The search writes it, and the page reads it from another thread. generations: that the search will hold; None:
    the clock ends it; done: those that it has behind it."""

    def __init__(self, generations: int | None = None, done: int = 0) -> None:
        self._of, self._number = "" if generations is None else f" of {generations}", done
        self._has_asked = self.has_ended = False
        self._writing: float | None = None
        self._step = Step("Before the first pair: the search begins", 0, None, time.monotonic())
        self._result: dict[str, Any] | None = None

    def loading(self, nbytes: int, progress: Callable[[int], None]) -> Callable[[int], None]:
        """The models are loaded from here on. Return `progress` for the page as well, as the others do."""
        what = f"Before the first pair, step 1 of 2: {decimal(nbytes)} of models are being loaded"
        return self._begin(what, nbytes, progress)

    def writing(self, passes: int, progress: Callable[[int], None]) -> Callable[[int], None]:
        """The next generation's candidates write their answers from here on."""
        self._number += 1
        what = f"the candidates of generation {self._number}{self._of} are writing their answers"
        # The first ones wait for programs that are compiled, which says nothing of later ones.
        what = f"Next, {what}" if self._has_asked else f"Before the first pair, step 2 of 2: {what}"
        return self._begin(what, passes, progress, self._writing)

    def asking(self) -> None:
        """The answers are written, and judges vote on them."""
        self._has_asked, self._writing = True, time.monotonic() - self._step.started

    def counting(self) -> None:
        """The generation has its votes."""
        self._begin(f"Generation {self._number}{self._of} has its votes, and the search works with them", 0)

    def choosing(self, passes: int, progress: Callable[[int], None]) -> Callable[[int], None]:
        """The generations are over."""
        what = (
            "The last generation has its votes: the winner is being chosen, and it and the other models write answers"
        )
        return self._begin(f"{what} to held-out prompts", passes, progress)

    def conclude(self, result: Result) -> None:
        """The winner is chosen, and has met the other models."""
        met = [(row, meetings) for row in result.rows for meetings in row.meetings.values()]
        table = [
            [row.label(), *map(str, (one.won, one.lost, one.neither, one.same)), one.share()]
            for row, one in met
        ]  # fmt: skip
        unproven = ["No prompt was held out: no vote says whether the winner is better than the other models."]
        sentences = result.verdicts() if result.rows else unproven
        self._result = {"sentences": sentences, "columns": COLUMNS, "table": table}
        self._begin("The winner is chosen, and is being written to best/model in the run's folder", 0)

    def state(self) -> dict[str, Any]:
        step = self._step
        text = step.describe()
        if self.has_ended:
            text = "The search has ended, and all votes are kept. Thank you."
            text += " The winner is best/model in the run's folder." if self._result else ""
        share = 1.0 if self.has_ended else step.done / step.total if step.total else 0.0
        return {"ended": self.has_ended, "activity": text, "share": share, "result": self._result}

    def _begin(
        self, what: str, total: int, progress: Callable[[int], None] = lambda done: None, seconds: float | None = None
    ) -> Callable[[int], None]:
        step = self._step = Step(what, total, seconds, time.monotonic())

        def advance(done: int) -> None:
            step.done = min(step.total, step.done + done)
            progress(done)

        return advance
