"""The terminal: the console, and progress bars in bytes, in candidate passes and in generations."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from evojax_merge.errors import LONGEST_LINE, escaped_lines, printable
from evojax_merge.search.loop import Generation, Reporter


class Terminal(Console):
    """The console, which prints each text as one line, escaped."""

    def print(self, *objects: Any, **options: Any) -> None:
        lines = (printable(text, LONGEST_LINE) if isinstance(text, str) else text for text in objects)
        super().print(*lines, **options)


class PlainColumn(TextColumn):
    """A column of a progress bar whose text is no markup, and is escaped."""

    def render(self, task: Task) -> Text:
        return Text(printable(self.text_format.format(task=task)))


def cell(text: str, style: str = "") -> Text:
    """The text of a table's cell, which may have several lines: no markup, and escaped."""
    return Text(escaped_lines(text), style)


# Lines in a file are as long as a table needs. Nothing is markup: `[/INST]` is a name.
console = Terminal(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False, highlight=False)

OnGeneration = Callable[[Generation], None]


@contextmanager
def bytes_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes."""
    columns = (
        PlainColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task, done)


def merge_bar(label: str, which: str, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
    """The progress bar of one of several merges; `which` is empty where there is one."""
    return bytes_bar(f"{label} {which}".rstrip(), nbytes)


@contextmanager
def passes_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in candidate passes."""
    columns = (
        PlainColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task, done)


class GenerationsColumn(ProgressColumn):
    """Completed generations of the requested ones, `5/50`; within a generation with its fraction, `5.3/50`; without
    their number where the clock ends the search."""

    def render(self, task: Task) -> Text:
        of = "" if task.total is None else f"/{task.total:.0f}"
        return Text(f"{task.completed:.1f}".removesuffix(".0") + of)


class SearchBar(Reporter):
    """The search's progress bar: generations in full, passes of the running one as its fraction. `on_generation`
    receives each generation as well."""

    def __init__(self, progress: Progress, generations: int | None, on_generation: OnGeneration) -> None:
        self._progress, self._on_generation = progress, on_generation
        self._bar = progress.add_task("search", total=generations, info="compiling …")
        self._share = 0.0

    def evaluating(self, generation: int, passes: int) -> None:
        self._share = 1.0 / max(passes, 1)
        self._progress.update(self._bar, completed=generation)

    def advanced(self, passes: int) -> None:
        self._progress.advance(self._bar, passes * self._share)

    def finished(self, generation: Generation) -> None:
        g = generation

        def shown(value: float | None) -> str:
            return "none" if value is None else f"{value:.4f}"

        failed = f"  failed {g.failed}" if g.failed else ""
        info = (
            f"best so far {shown(g.best_so_far)}  mean {shown(g.mean)}  "
            + ("" if g.validation is None else f"validation {shown(g.validation)}  ")
            + "".join(f"{name} {value:.3f}  " for name, value in g.metrics.items())
            + f"{g.seconds / g.population:.3g} s/candidate{failed}"
        )
        self._progress.update(self._bar, completed=g.number, info=info)
        if not console.is_terminal:
            console.print(f"generation {g.number}: {info}", highlight=False)
        self._on_generation(g)

    def log(self, text: str) -> None:
        say(text)

    def warn(self, text: str) -> None:
        console.print(f"warning: {text}", highlight=False, soft_wrap=True)


@contextmanager
def search_bar(generations: int | None, on_generation: OnGeneration) -> Iterator[SearchBar]:
    """A progress bar over the generations of a search; None: the clock ends it."""
    columns = (
        PlainColumn("{task.description}"), BarColumn(), GenerationsColumn(),
        PlainColumn("{task.fields[info]}"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield SearchBar(progress, generations, on_generation)


def say(text: str) -> None:
    """Print one line on the terminal, unchanged."""
    console.print(text, highlight=False)
