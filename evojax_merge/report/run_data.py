"""A run folder as its page reads it: no more than the page shows, however long the run was.

Only the files of the folder are read, and a run may be writing them at the same time: a last line that is cut short
does not count, and every file but config.yaml may be missing.
"""

import math
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evojax_merge.errors import InputError, escaped
from evojax_merge.report.comparison import Row, verdict
from evojax_merge.report.intervals import Lead
from evojax_merge.report.stored_run import method_in
from evojax_merge.search.run_folder import run_at
from evojax_merge.search.run_lock import check_not_in_use
from evojax_merge.search.run_parts import LOG_MARK
from evojax_merge.search.run_schema import (
    A_FILE,
    MAX_DOCUMENT,
    Environment,
    HistoryLine,
    Kind,
    Scored,
    StoredResult,
    TimingLine,
    parse,
    read_run_config,
    whole_lines,
)
from evojax_merge.system.file_system import may_replace
from evojax_merge.system.regular_file import open_regular, read_regular
from evojax_merge.tasks.voting import METRIC

# The generations that are read, evenly spaced over the run, and beside them those that looked at the validation split.
MOST_GENERATIONS, MOST_LOOKS = 400, 200
# The most that a page shows: characters of a file, and a log's last lines, warnings, and characters of a line.
MOST_TEXT, MOST_LINES, MOST_WARNINGS, LONGEST = 60_000, 200, 50, 1_000

SEARCH_SPLIT = "on the search split"
State = Literal["finished", "running", "stopped"]


class HistoryRow(HistoryLine):
    """A line of history.jsonl."""

    @property
    def best_of_part(self) -> float | None:
        """The best fitness where all candidates met the same part of the examples, a minibatch; None where some met all
        of them."""
        finite = [value for value in self.fitness if value is not None]
        is_part = self.best is None and len(set(self.examples)) == 1
        return max(finite, default=None) if is_part else None

    @property
    def validation_fitness(self) -> float | None:
        """The validation fitness of the best so far or, where no candidate has met all examples yet, the best of the
        strategy's proposals; None in a generation that did not look at it."""
        if self.best_so_far is not None:
            return self.validation.best_so_far
        return max((x for x in self.validation.finalists if x is not None), default=None)


class Result(StoredResult):
    """result.json."""

    @cached_property
    def is_judged(self) -> bool:
        """Whether the scores of a task are judges' votes."""
        return any(name.endswith(f"/{METRIC}") for row in self.table for name in row.heldout_scores)

    @property
    def rivals(self) -> list[Scored]:
        """The base, the best parent and the uniform merge."""
        names = {role: rival.name for role, rival in self.better_than.items()}
        return [] if self.winner is None else [row for row in self.table if names.get(row.role) == row.name]

    @property
    def verdicts(self) -> list[str]:
        if self.sentences or self.winner is None:
            return self.sentences
        ours = Row("winner", self.winner.name, self.winner.heldout_fitness, {}, units=self.units)
        rows = [Row(row.role, row.name, row.heldout_fitness, {}, lead_over(self, row)) for row in self.rivals]
        return [sentence for row in rows if (sentence := verdict(ours, row)) is not None]


def lead_over(result: StoredResult, scored: Scored) -> Lead | None:
    """The winner's lead over a model of the table; None where none is known."""
    interval = result.interval_over(scored)
    if result.winner is None or (interval is None and "interval" not in scored.model_fields_set):
        return None
    # None: too few examples to say.
    return Lead(result.winner.heldout_fitness - scored.heldout_fitness, *(interval or (-math.inf, math.inf)))


@dataclass(frozen=True)
class Generation:
    """A generation that was read. median, low, high: of the candidates' fitness, and its 10th and 90th percentile;
    genome, genome_fitness: the best of the candidates that were evaluated on the most examples."""

    row: HistoryRow
    median: float | None
    low: float | None
    high: float | None
    genome: list[float]
    genome_fitness: float | None

    @property
    def number(self) -> int:
        return self.row.generation

    @property
    def metrics(self) -> dict[str, float]:
        extra = self.row.model_extra or {}
        return {name: value for name, value in extra.items() if isinstance(value, int | float)}


@dataclass(frozen=True)
class BestFitness:
    """The fitness that a run is listed with, in words: `fitness of the winner` and `on the search split`."""

    name: str
    value: float
    where: str

    def describe(self) -> str:
        return f"{self.name} {self.value:.4f}, {self.where}"


@dataclass(frozen=True)
class RunData:
    """A run. count: its whole number of generations; generations: those that were read, see MOST_GENERATIONS; every
    one of them where there are no more. log: its last lines, and warnings: those of all its lines; notes: sentences
    about parts that cannot be read."""

    path: Path
    state: State
    config: dict[str, Any]
    config_text: str
    count: int
    generations: list[Generation]
    timing: list[TimingLine]
    result: Result | None
    recipe: str | None
    environment: dict[str, Any]
    log: list[str]
    warnings: list[str]
    notes: list[str]

    @property
    def name(self) -> str:
        return escaped(self.path.name or str(self.path))

    @property
    def method(self) -> str:
        return str(method_in(self.config))

    @property
    def search(self) -> dict[str, Any]:
        """The section `search` of the config; for a search in stages, the last stage's."""
        last = (self.config.get("stages") or [self.config])[-1]
        section: dict[str, Any] = last.get("search") or {}
        return section

    @property
    def outcome(self) -> Result:
        """The result; before there is one, an empty one."""
        return self.result or Result()

    @property
    def last(self) -> HistoryRow | None:
        return self.generations[-1].row if self.generations else None

    @property
    def best(self) -> BestFitness | None:
        """The winner's fitness on the whole search split; before there is a winner, the best fitness of a candidate on
        all examples of its generation; where no generation measured one, the last generation's best on its minibatch or
        by the companion."""
        if self.last is None:
            return None
        # The best so far may have met a part of the split (`limit`), and validation may choose another winner.
        if "winner" in self.outcome.search_fitness:
            return BestFitness("fitness of the winner", self.outcome.search_fitness["winner"], SEARCH_SPLIT)
        if self.last.best_so_far is not None:
            return BestFitness("best fitness so far", self.last.best_so_far, SEARCH_SPLIT)
        if self.last.best_of_part is None:
            return None
        where = "by the companion" if self.last.companion else "on its minibatch"
        return BestFitness("best fitness of the last generation", self.last.best_of_part, where)

    @property
    def seconds(self) -> float:
        """The seconds of all generations."""
        return sum(line.seconds + line.validation_seconds for line in self.timing)

    @property
    def whole_seconds(self) -> float | None:
        """The seconds of all processes that worked on the run, one after another, with all that comes before and after
        the generations; None where one has not ended or was killed."""
        seconds = [session.get("seconds") for session in self.environment.get("sessions", ())]
        whole = [value for value in seconds if isinstance(value, int | float)]
        return sum(whole) if whole and len(whole) == len(seconds) else None

    @property
    def fitness_rows(self) -> list[Generation]:
        """The generations whose figures are the fitness, not a companion with another scale."""
        return [generation for generation in self.generations if not generation.row.companion]


def read_run(path: Path, *, working: bool | None = None) -> RunData:
    """Read a run folder. working: whether a process works in it; None looks at its lock. Raises InputError where it is
    no run folder."""
    folder = run_at(path)
    notes: list[str] = []
    config = read_run_config(folder.config, notes)
    count, validated = 0, []
    for count, line in enumerate(whole_lines(folder.history), start=1):
        if b'"validation": {' in line:
            validated.append(count - 1)
    numbers = {*spread(count, MOST_GENERATIONS), *(validated[k] for k in spread(len(validated), MOST_LOOKS))}
    # A running search may have added lines since.
    every_line = zip(range(count), whole_lines(folder.history), strict=False)
    lines = [line for number, line in every_line if number in numbers]
    rows = [row[0] for line in lines if (row := _parsed(HistoryRow, folder.history, notes, line))]
    clock = [at[0] for line in whole_lines(folder.timing) if (at := _parsed(TimingLine, folder.timing, notes, line))]
    result = _parsed(Result, folder.result, notes)
    state: State = "finished"
    if result is None or result[0].generations < count:
        if working is None:
            try:
                check_not_in_use(path)
                working = False
            except InputError:
                working = True
        state = "running" if working else "stopped"
        if result is not None:
            notes.append(f"The winner of {result[0].generations} generations is not shown: the run has gone on since.")
        result = None
    environment = _parsed(Environment, folder.environment, notes)
    log, warnings = _log(folder.log)
    dims = next((row.dims for row in rows), None)
    if any(row.dims not in (None, dims) for row in rows):
        notes.append(f"{folder.history.name} cannot be read: genomes of several lengths")
        rows = [row for row in rows if row.dims in (None, dims)]
    return RunData(
        path=path.absolute(),
        state=state,
        config=config,
        config_text=_text(folder.config) or "",
        count=count,
        generations=[_summary(row) for row in rows],
        timing=clock,
        result=None if result is None else result[0],
        recipe=_text(folder.recipe),
        environment={} if environment is None else environment[1],
        log=log,
        warnings=warnings,
        notes=list(dict.fromkeys(notes)),
    )


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly spaced, the first and the last among them."""
    return sorted({int(number) for number in np.linspace(0, count - 1, min(count, most))})


def _parsed(kind: type[Kind], file: Path, notes: list[str], line: bytes | None = None) -> tuple[Kind, Any] | None:
    """The document of a file, or one of its lines, and its plain data; None where there is no file, and a note where it
    has another form."""
    if line is None and not file.is_file():
        return None
    try:
        return parse(kind, read_regular(file, A_FILE, MAX_DOCUMENT) if line is None else line)
    except ValueError as error:
        notes.append(f"{file.name} cannot be read: {error}")
        return None


def _summary(row: HistoryRow) -> Generation:
    fitness = np.array([np.nan if value is None else value for value in row.fitness], float)
    finite = fitness[np.isfinite(fitness)]
    if not finite.size:
        return Generation(row, None, None, None, [], None)
    median, low, high = map(float, np.quantile(finite, [0.5, 0.1, 0.9]))
    met = np.where(np.isfinite(fitness), row.examples or 0, -1)
    place = int(np.argmax(np.where(met == met.max(), fitness, -np.inf)))
    return Generation(row, median, low, high, row.genomes[place], float(fitness[place]))


def _text(path: Path) -> str | None:
    """The text of a file, its end cut off where it is long; None where there is no such file."""
    if not path.is_file():
        return None
    text = read_regular(path, A_FILE, MAX_DOCUMENT).decode(errors="replace")
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}\n… ({len(text) - MOST_TEXT} more characters)"


def _log(path: Path) -> tuple[list[str], list[str]]:
    """The last lines of a log, and its first warnings."""
    last: deque[str] = deque(maxlen=MOST_LINES)
    warnings: list[str] = []
    # A file of another kind, or one that a link leads to, is not the run's to show.
    if path.is_file() and not path.is_symlink() and may_replace(path, LOG_MARK.match):
        with open_regular(path, A_FILE) as handle:
            handle.seek(max(0, path.stat().st_size - MAX_DOCUMENT))
            for raw in handle:
                line = raw.decode(errors="replace").rstrip("\n")[:LONGEST]
                last.append(escaped(line))
                if "warning" in line.lower() and len(warnings) < MOST_WARNINGS:
                    warnings.append(last[-1])
    return list(last), warnings
