"""Progress bars in bytes, in candidate passes and in generations; elsewhere than on a terminal lines."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import RenderableType
from rich.constrain import Constrain
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from evojax_merge.errors import LOG, print_warning, printable
from evojax_merge.evaluation.compilations import compilations, is_compiling
from evojax_merge.report.monitor import monitor
from evojax_merge.search.recording import Generation, Reporter
from evojax_merge.system.console import HEARTBEAT, IN_NOTEBOOK, console, format_seconds, say, seconds_left

# The columns of a line about a generation, at most, and those of the bar in it, at least, with the spaces around it.
COLUMNS, SHORTEST_BAR = 80, 8
# The share of the work from which on the seconds that are left are estimated.
LEAST_PERCENTAGE = 10


class PlainColumn(TextColumn):
    """A column of a progress bar whose text is no markup, and is escaped."""

    def render(self, task: Task) -> Text:
        return Text(printable(self.text_format.format(task=task)))


OnGeneration = Callable[[Generation], None]


def _advance(progress: Progress, task: TaskID, done: int) -> None:
    """Count steps, and the moment at which they were done."""
    monitor().passed()
    progress.update(task, advance=done, at=progress.tasks[0].elapsed)


@contextmanager
def _progress(*columns: ProgressColumn, done: str) -> Iterator[Progress]:
    """Bars on a terminal. Elsewhere a line at the end, `done` and the time that it took, and some meanwhile."""

    def describe() -> str:
        task = progress.tasks[0]
        step = task.fields.get("step")
        share = f" {step}," if step else f" {task.percentage:.0f}%," if task.total and task.completed else ""
        now, at, left = task.elapsed or 0.0, task.fields.get("at"), ""
        # The first steps compile, and say little about the others.
        if at is not None and task.total and task.percentage >= LEAST_PERCENTAGE:
            seconds = seconds_left(task.completed, task.total, at, now)
            left = f", about {format_seconds(seconds)} left" if seconds else ""
        return f"{task.description}:{share} {format_seconds(now)} so far{left}"

    started = time.monotonic()
    columns = (PlainColumn("{task.description}"), BarColumn(), *columns)
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    with progress, HEARTBEAT.during(describe):
        yield progress
    if not console.is_terminal:
        say(f"{done} took {format_seconds(time.monotonic() - started)}")


@contextmanager
def bytes_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes."""
    columns = DownloadColumn(binary_units=True), TimeElapsedColumn()
    with _progress(*columns, done=f"{label} {decimal(total)}") as progress:
        yield partial(_advance, progress, progress.add_task(label, total=total))


def merge_bar(label: str, which: str, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
    """The progress bar of one of several merges; `which` is empty where there is one."""
    return bytes_bar(f"{label} {which}".rstrip(), nbytes)


@contextmanager
def passes_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in candidate passes."""
    with _progress(TimeElapsedColumn(), TimeRemainingColumn(), done=label) as progress:
        yield partial(_advance, progress, progress.add_task(label, total=total))


@contextmanager
def named_bar(label: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar in steps that have names; the function is called where each begins."""
    with _progress(TimeElapsedColumn(), PlainColumn("{task.fields[step]}"), done=label) as progress:
        task = progress.add_task(label, total=total, step="")
        names = list[str]()

        def begin(name: str) -> None:
            progress.update(task, completed=len(names), step=name)
            names.append(name)

        yield begin
        progress.update(task, completed=total, step="")


class GenerationsColumn(ProgressColumn):
    """Completed generations of the requested ones, `5/50`; without their number where the clock ends the search."""

    def render(self, task: Task) -> Text:
        return Text(_counted(int(task.completed), task.total))


def _counted(number: int, of: float | None) -> str:
    return f"{number}" if of is None else f"{number}/{of:.0f}"


class SearchProgress(Progress):
    """A progress bar that fills a line of `COLUMNS`."""

    def get_renderable(self) -> RenderableType:
        return Constrain(super().get_renderable(), COLUMNS)


def generation_figures(generation: Generation, columns: int) -> str:
    """The best fitness so far, that of the best parent, the time left, failures and validation, in this order, as far
    as the columns allow. Where no candidate has met all examples yet, the first and the last are those of the
    generation: its best on its minibatch or by the companion, and that of the strategy's proposals."""
    g = generation

    def shown(value: float | None) -> str | None:
        return None if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"

    is_known = g.best_so_far is not None
    name = "best" if is_known else "companion" if g.scored_on == "companion" else "on its minibatch"
    figures = {
        name: shown(g.best_so_far if is_known else g.best_of_part),
        "best parent": shown(g.best_parent),
        "left": None if g.seconds_left is None else format_seconds(g.seconds_left),
        "failed": str(g.failed) if g.failed else None,
        "validation": shown(g.validation if is_known else g.proposed_validation),
    }
    text = ""
    for part in (f"  {name} {value}" for name, value in figures.items() if value is not None):
        text += part if len(text + part) <= columns else ""
    return text


def generation_line(generation: Generation) -> str:
    """A generation as a line of at most `COLUMNS` columns."""
    label = f"generation {_counted(generation.number, generation.generations)}"
    return label + generation_figures(generation, COLUMNS - len(label))


def generation_record(generation: Generation) -> str:
    """A generation as a line of JSON, for scripts."""
    g = generation
    record = {
        "stage": g.stage, "generation": g.number, "generations": g.generations, "best_so_far": g.best_so_far,
        "best": g.best, "mean": g.mean, "best_parent": g.best_parent, "validation": g.validation,
        "population": g.population, "failed": g.failed, "seconds": round(g.seconds, 3),
        "seconds_left": None if g.seconds_left is None else round(g.seconds_left, 1),
        "scores_of_best": dict(g.scores_of_best), "metrics": g.metrics,
    }  # fmt: skip
    return json.dumps(_finite(record), ensure_ascii=False)


def _finite(value: Any) -> Any:
    """The value with null for each number that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class SearchBar(Reporter):
    """The search's progress bar: generations in full, passes of the running one as its fraction; in a notebook, the
    latest generation's line. ending: (seconds of a generation) -> about the seconds from the last generation to the
    end of the search, which `seconds_left` counts. `on_generation` receives each generation as well."""

    def __init__(
        self, progress: Progress, generations: int | None, on_generation: OnGeneration,
        ending: Callable[[float], float],
    ) -> None:  # fmt: skip
        self._progress, self._on_generation = progress, on_generation
        # Shows a line below a notebook's cell, each in the place of the one before.
        self._show: Callable[[str], None] = lambda line: None
        if IN_NOTEBOOK:
            from IPython.display import Pretty, display

            place = display(Pretty(""), display_id=True)
            self._show = lambda line: place.update(Pretty(line))
        self._bar = progress.add_task("search", total=generations, info="compiling …")
        self._ending, self._seconds, self._compiled = ending, list[float](), compilations()
        self._passes, self._done, self._number, self._began = 1, 0, 1, time.monotonic()
        self._end: float | None = None

    def evaluating(self, generation: int, passes: int) -> None:
        self._passes, self._done, self._number, self._began = max(passes, 1), 0, generation + 1, time.monotonic()
        self._progress.update(self._bar, completed=generation)

    def advanced(self, passes: int) -> None:
        monitor().passed()
        self._done += passes
        self._progress.advance(self._bar, passes / self._passes)

    def describe(self) -> str:
        """A line about the generation under way."""
        number, now = _counted(self._number, self._progress.tasks[0].total), time.monotonic()
        state = "compiling" if is_compiling() else f"{self._done} of {self._passes} steps"
        left = "" if self._end is None else f", about {format_seconds(max(0.0, self._end - now))} left"
        return f"generation {number}: {state}, {format_seconds(now - self._began)} so far{left}"

    def finished(self, generation: Generation) -> None:
        # A process's first generation takes longer than others, beside compiling.
        compiling = compilations()
        self._seconds.append(max(0.0, generation.seconds - (compiling - self._compiled).seconds))
        self._compiled = compiling
        if generation.seconds_left is not None:
            seconds_left = generation.seconds_left + self._ending(statistics.median(self._seconds[1:]))
            generation = replace(generation, seconds_left=seconds_left)
            self._end = time.monotonic() + seconds_left
        # A bar takes what the figures leave.
        columns = COLUMNS - len(_counted(generation.number, generation.generations)) - SHORTEST_BAR
        info = generation_figures(generation, columns).strip()
        self._progress.update(self._bar, completed=generation.number, info=info)
        line = generation_line(generation)
        if console.is_terminal:
            LOG.info("%s", line)
        else:
            console.print(line, soft_wrap=True)
        self._show(line)
        monitor().finished(generation)
        self._on_generation(generation)

    def log(self, text: str) -> None:
        say(text)

    def warn(self, text: str) -> None:
        print_warning(text)


@contextmanager
def search_bar(
    generations: int | None, on_generation: OnGeneration, ending: Callable[[float], float] = lambda seconds: 0.0
) -> Iterator[SearchBar]:
    """A progress bar over the generations of a search; None: the clock ends it. ending: see `SearchBar`."""
    columns = (BarColumn(bar_width=None), GenerationsColumn(), PlainColumn("{task.fields[info]}"))
    # In a file each generation has its line.
    with SearchProgress(*columns, console=console, expand=True, disable=not console.is_terminal) as progress:
        bar = SearchBar(progress, generations, on_generation, ending)
        with HEARTBEAT.during(bar.describe):
            yield bar
