"""A run folder as its page reads it: no more than the page shows, however long the run was.

Only the files of the folder are read, and a run may be writing them at the same time: a last line that is cut short
does not count, and every file but config.yaml may be missing.
"""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evojax_merge.errors import InputError, escaped
from evojax_merge.file_system import may_replace
from evojax_merge.regular_file import lines_of
from evojax_merge.report.comparison import Row, verdict
from evojax_merge.report.intervals import Lead
from evojax_merge.run import StoredRun, method_in
from evojax_merge.search.run_folder import is_run
from evojax_merge.search.run_lock import check_not_in_use
from evojax_merge.search.run_parts import LOG_MARK, RunFolder
from evojax_merge.tasks.voting import METRIC

# The generations that are read, evenly spaced over the run, and beside them those that looked at the validation split.
MOST_GENERATIONS, MOST_LOOKS = 400, 200
# The most that a page shows: characters of a file, and a log's last lines, warnings, and characters of a line.
MOST_TEXT, MOST_LINES, MOST_WARNINGS, LONGEST = 60_000, 200, 50, 1_000

SEARCH_SPLIT = "on the search split"
State = Literal["finished", "running", "stopped"]
Parsed = TypeVar("Parsed", bound=BaseModel)
Scores = dict[str, float | None]


class _Row(BaseModel):
    """A line of history.jsonl. Further numbers in it are the strategy's metrics."""

    model_config = ConfigDict(extra="allow")

    generation: int
    best: float | None = None
    mean: float | None = None
    worst: float | None = None
    best_so_far: float | None = None
    evaluations: int = 0
    failed: int = 0
    scores_of_best: Scores = {}
    fitness: list[float | None]
    examples: list[int] = []
    task_scores: dict[str, list[float | None]] = {}
    genomes: list[list[float]]
    companion: bool = False
    validation: dict[str, Any] = {}

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
            return self.validation.get("best_so_far")
        return max((x for x in self.validation.get("finalists", ()) if x is not None), default=None)


class _Timing(BaseModel):
    generation: int
    seconds: float
    validation_seconds: float = 0.0


class _Scored(BaseModel):
    """A model in the table of result.json. Python's JSON holds NaN and Infinity. interval: of the winner's lead over
    it; a run of an earlier version has those of the rivals alone, in `better_than`."""

    role: str
    name: str
    heldout_fitness: float
    heldout_scores: dict[str, float] = {}
    interval: tuple[float, float] | None = None

    @property
    def label(self) -> str:
        """The name, with the role before it where the name does not say it."""
        return self.name if self.role in ("winner", "uniform", self.name) else f"{self.role} {self.name}"


class _Rival(BaseModel):
    name: str
    interval: tuple[float, float] | None = None


class _Member(BaseModel):
    """A member of a front."""

    member: int
    fitness: float
    scores: dict[str, float]
    heldout_fitness: float
    heldout_scores: dict[str, float]
    genome: list[float]


class Bred(BaseModel):
    """A member of a pool that the winner descends from, or the winner. parameters: one value for each parent, or one;
    for layers from `split` on, the second parent comes before the first."""

    name: str
    method: str
    parents: list[str]
    parameters: dict[str, float | list[float]]
    split: int


class _Path(BaseModel):
    layers: list[int]
    scales: list[float]


class Result(BaseModel):
    """result.json."""

    generations: int = 0
    table: list[_Scored] = []
    better_than: dict[str, _Rival] = {}
    chosen_on: Literal["search", "validation"] = "search"
    search_fitness: dict[str, float] = {}
    validation_fitness: dict[str, float] = {}
    compute_dtype: str = ""
    stopped_by: str | None = None
    members: list[_Member] = []
    lineage: list[Bred] = []
    # Of a pool's models; 0 in a run of an earlier version.
    layers: int = 0
    path: _Path | None = None
    groups: list[str] = []
    # Parameter -> [groups][columns]; from search_pytrees group -> parameter -> [columns].
    parameters: dict[str, Any] = {}
    genome: list[float] = []
    # The sentences of the terminal; a run of an earlier version has none.
    sentences: list[str] = Field([], alias="verdicts")

    @property
    def is_judged(self) -> bool:
        """Whether the scores of a task are judges' votes."""
        return any(name.endswith(f"/{METRIC}") for row in self.table for name in row.heldout_scores)

    @property
    def winner(self) -> _Scored | None:
        return next((scored for scored in self.table if scored.role == "winner"), None)

    @property
    def rivals(self) -> list[Row]:
        """The base, the best parent and the uniform merge, with the winner's lead over each."""
        rows = []
        for scored in self.table:
            rival = self.better_than.get(scored.role)
            if rival is None or rival.name != scored.name or self.winner is None:
                continue
            lead = self.lead_over(scored)
            rows.append(Row(scored.role, scored.name, scored.heldout_fitness, scored.heldout_scores, lead))
        return rows

    def lead_over(self, scored: _Scored) -> Lead | None:
        """The winner's lead over a model of the table; None where there is no interval."""
        rival = self.better_than.get(scored.role)
        of_rival = rival.interval if rival is not None and rival.name == scored.name else None
        interval = scored.interval or of_rival
        if self.winner is None or interval is None:
            return None
        return Lead(self.winner.heldout_fitness - scored.heldout_fitness, *interval)

    @property
    def verdicts(self) -> list[str]:
        if self.sentences:
            return self.sentences
        ours = None if self.winner is None else self.winner.heldout_fitness
        sentences = [] if ours is None else [verdict(ours, row) for row in self.rivals]
        return [sentence for sentence in sentences if sentence is not None]


@dataclass(frozen=True)
class Generation:
    """A generation that was read. median, low, high: of the candidates' fitness, and its 10th and 90th percentile;
    genome, genome_fitness: the best of the candidates that were evaluated on the most examples."""

    row: _Row
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

    @property
    def is_comparable(self) -> bool:
        """Whether the fitness is one on the search split, as other runs have it."""
        return self.where == SEARCH_SPLIT

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
    timing: list[_Timing]
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
        stages = self.config.get("stages")
        last = stages[-1] if isinstance(stages, list) and stages else self.config
        section = last.get("search") if isinstance(last, dict) else None
        return section if isinstance(section, dict) else {}

    @property
    def last(self) -> _Row | None:
        return self.generations[-1].row if self.generations else None

    @property
    def best(self) -> BestFitness | None:
        """The winner's fitness on the whole search split; before there is a winner, the best fitness of a candidate on
        all examples of its generation; where no generation measured one, the last generation's best on its minibatch or
        by the companion."""
        if self.last is None:
            return None
        # The best so far may have met a part of the split (`limit`), and validation may choose another winner.
        if self.result is not None and "winner" in self.result.search_fitness:
            return BestFitness("fitness of the winner", self.result.search_fitness["winner"], SEARCH_SPLIT)
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
    def fitness_rows(self) -> list[Generation]:
        """The generations whose figures are the fitness, not a companion with another scale."""
        return [generation for generation in self.generations if not generation.row.companion]


def read_run(path: Path, *, working: bool | None = None) -> RunData:
    """Read a run folder. working: whether a process works in it; None looks at its lock. Raises InputError where it is
    no run folder."""
    folder = RunFolder(path)
    if not path.is_dir():
        raise InputError(path, "no such folder; expected the run folder of a search")
    if not is_run(folder):
        raise InputError(path, "is not a run folder of a search")
    notes: list[str] = []
    count, lines = _lines(folder.history)
    rows = [_parsed(_Row, line, folder.history, notes) for line in lines]
    clock = [_parsed(_Timing, line, folder.timing, notes) for line in _whole_lines(folder.timing)]
    result = _parsed(Result, folder.result.read_bytes(), folder.result, notes) if folder.result.is_file() else None
    state: State = "finished"
    if result is None or result.generations < count:
        state = "running" if (_in_use(path) if working is None else working) else "stopped"
        if result is not None:
            notes.append(f"The winner of {result.generations} generations is not shown: the run has gone on since.")
        result = None
    environment = _text(path / "environment.json", whole=True)
    log, warnings = _log(path / "run.log")
    config_text = _text(folder.config) or ""
    return RunData(
        path=path.absolute(),
        state=state,
        config=StoredRun(path).config,
        config_text=config_text,
        count=count,
        generations=[_summary(row) for row in rows if row],
        timing=[line for line in clock if line],
        result=result,
        recipe=_text(folder.recipe),
        environment=_mapping(environment, path / "environment.json", notes),
        log=log,
        warnings=warnings,
        notes=list(dict.fromkeys(notes)),
    )


def _lines(path: Path) -> tuple[int, list[bytes]]:
    """The number of a file's whole lines, and some of the lines: evenly spaced from the first to the last, and those
    that hold a look at the validation split."""
    if not path.is_file():
        return 0, []
    starts, validated = [0], []
    with path.open("rb") as handle:
        for number, line in enumerate(handle):
            if line.endswith(b"\n"):
                starts.append(starts[-1] + len(line))
                if b'"validation": {' in line:
                    validated.append(number)
        count = len(starts) - 1
        numbers = {*spread(count, MOST_GENERATIONS), *(validated[k] for k in spread(len(validated), MOST_LOOKS))}
        lines = []
        for number in sorted(numbers):
            handle.seek(starts[number])
            lines.append(handle.read(starts[number + 1] - starts[number]))
    return count, lines


def _whole_lines(path: Path) -> list[bytes]:
    return lines_of(path, "a file of a run")[0] if path.is_file() else []


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly spaced, the first and the last among them."""
    return sorted({int(number) for number in np.linspace(0, count - 1, min(count, most))})


def _parsed(kind: type[Parsed], text: bytes, file: Path, notes: list[str]) -> Parsed | None:
    """The document of a file or of a line of it; where it has another form, None and a note."""
    try:
        # Python's parser, since result.json may hold NaN.
        return kind.model_validate(json.loads(text))
    except (ValueError, RecursionError) as error:
        what = "is not JSON"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc'])) or 'document'}: {first['msg']}"
        notes.append(f"{file.name} cannot be read: {what}")
        return None


def _summary(row: _Row) -> Generation:
    fitness = np.array([np.nan if value is None else value for value in row.fitness], float)
    finite = fitness[np.isfinite(fitness)]
    median, low, high = map(float, np.quantile(finite, [0.5, 0.1, 0.9])) if finite.size else (None, None, None)
    genome: list[float] = []
    best: float | None = None
    if finite.size and len(row.genomes) == len(fitness):
        met = np.array(row.examples if len(row.examples) == len(fitness) else [0] * len(fitness))
        met = np.where(np.isfinite(fitness), met, -1)
        place = int(np.argmax(np.where(met == met.max(), fitness, -np.inf)))
        genome, best = row.genomes[place], float(fitness[place])
    return Generation(row, median, low, high, genome, best)


def _in_use(path: Path) -> bool:
    try:
        check_not_in_use(path)
    except InputError:
        return True
    return False


def _text(path: Path, whole: bool = False) -> str | None:
    """The text of a file, its end cut off where it is long; None where there is no such file."""
    if not path.is_file():
        return None
    text = path.read_bytes().decode(errors="replace")
    if whole or len(text) <= MOST_TEXT:
        return text
    return f"{text[:MOST_TEXT]}\n… ({len(text) - MOST_TEXT} more characters)"


def _log(path: Path) -> tuple[list[str], list[str]]:
    """The last lines of a log, and its first warnings."""
    last: deque[str] = deque(maxlen=MOST_LINES)
    warnings: list[str] = []
    # A file of another kind, or one that a link leads to, is not the run's to show.
    if path.is_file() and not path.is_symlink() and may_replace(path, LOG_MARK.match):
        with path.open("rb") as lines:
            for line in (part.decode(errors="replace") for part in lines):
                last.append(escaped(line.rstrip("\n")[:LONGEST]))
                if "warning" in line[:LONGEST].lower() and len(warnings) < MOST_WARNINGS:
                    warnings.append(last[-1])
    return list(last), warnings


def _mapping(text: str | None, file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        document = json.loads(text or "{}")
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        notes.append(f"{file.name} cannot be read: it is no JSON object")
        return {}
    return document
