"""Loggers: the figures of each generation, for TensorBoard, Weights & Biases, or a table.

They are written on this machine; Weights & Biases uploads them where `WANDB_MODE` says so. A logger that fails is a
warning, and never ends the search.
"""

import csv
import hashlib
import importlib.util
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from evojax_merge.errors import InputError, first_line, print_warning, shown
from evojax_merge.report.progress import OnGeneration
from evojax_merge.search.environment import read_sessions
from evojax_merge.search.recording import Generation
from evojax_merge.search.run_parts import TABLE_MARK, RunFolder
from evojax_merge.system.file_system import atomic_write, may_replace

# The package of each logger that needs one; the extra has the logger's name.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
PROJECT = "evojax-merge"


class Logger(Protocol):
    def log(self, generation: int, figures: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class LoggedSearch:
    """A search whose figures are logged. folder: its run folder; run: the whole run's, another one for an early stage
    of a chain; config: the resolved config."""

    run: RunFolder
    folder: RunFolder
    config: Mapping[str, Any]

    @property
    def stage(self) -> str:
        """The name of an early stage's folder; empty for the run itself."""
        return "" if self.folder == self.run else self.folder.path.name


def check_loggers(where: str, names: Sequence[str]) -> None:
    """Raises InputError for a logger that does not exist, and for one whose package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise InputError(where, f"{shown(name)}; expected any of {', '.join(LOGGERS)}")
        package = PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise InputError(where, f"{name} needs the package {package}; pip install 'evojax-merge[{name}]'")


@contextmanager
def logged(names: Sequence[str], search: LoggedSearch, on_generation: OnGeneration) -> Iterator[OnGeneration]:
    """Log the generations of the block. Yields the function to call after each generation, which calls `on_generation`
    as well."""
    loggers: dict[str, Logger] = {}
    waiting = [] if jax.process_index() > 0 else list(dict.fromkeys(names))

    def guard(name: str, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            loggers.pop(name, None)
            print_warning(f"log: {name} failed ({first_line(error)}), and gets nothing more of this search")

    def after(generation: Generation) -> None:
        # Nothing is opened before there is something to log: a search that is refused leaves nothing behind.
        while waiting:
            name = waiting.pop()
            guard(name, lambda name: loggers.update({name: LOGGERS[name](search)}), name)
        for name, logger in list(loggers.items()):
            guard(name, logger.log, generation.number, figures(generation))
        on_generation(generation)

    try:
        yield after
    finally:
        for name, logger in list(loggers.items()):
            guard(name, logger.close)


def figures(generation: Generation) -> dict[str, float]:
    """The figures of a generation by their names; those that it does not have are left out."""
    g = generation
    named = {
        "fitness/best_so_far": g.best_so_far, "fitness/best": g.best, "fitness/mean": g.mean,
        "fitness/best_parent": g.best_parent, "fitness/validation": g.validation, "candidates/failed": g.failed,
        "seconds": g.seconds,
    }  # fmt: skip
    named |= {f"strategy/{name}": value for name, value in g.metrics.items()}
    named |= {f"tasks/{name}": value for name, value in g.scores_of_best.items()}
    return {name: float(value) for name, value in named.items() if value is not None}


class TensorBoard:
    """Event files in the run folder's `tensorboard/`. Events of generations that are searched again are purged."""

    def __init__(self, search: LoggedSearch) -> None:
        self._folder = search.run.path / "tensorboard" / search.stage
        self._writer: Any = None

    def log(self, generation: int, figures: Mapping[str, float]) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=generation)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, generation)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, offline unless `WANDB_MODE` is set; its files lie in the run folder's `wandb/`."""

    def __init__(self, search: LoggedSearch) -> None:
        # The terminal is this program's.
        for variable, value in (("WANDB_CONSOLE", "off"), ("WANDB_SILENT", "true")):
            os.environ.setdefault(variable, value)
        import wandb

        place = search.folder.path.resolve()
        began = next((str(session.get("started")) for session in read_sessions(search.folder)), "")
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=f"{search.run.path.name} {search.stage}".rstrip(),
            # The same for all processes that work on a run, so that a search that goes on is one run.
            id=hashlib.sha256(f"{place} {began}".encode()).hexdigest()[:12],
            resume=None if mode == "offline" else "allow", dir=str(search.run.path), config=dict(search.config),
            mode=mode,
        )  # fmt: skip

    def log(self, generation: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=generation)

    def close(self) -> None:
        self._run.finish()


class Table:
    """The figures as `history.csv`, a row for each generation."""

    def __init__(self, search: LoggedSearch) -> None:
        self._file = search.folder.table
        if not may_replace(self._file, TABLE_MARK.match):
            raise InputError(self._file, "is no table of evojax-merge; move it")
        self._rows: list[dict[str, str]] | None = None

    def log(self, generation: int, figures: Mapping[str, float]) -> None:
        rows = self._rows or []
        if self._rows is None and self._file.exists():
            # The rows of the generations before, from an earlier process's table.
            with self._file.open(encoding="utf-8", newline="") as handle:
                whole = [row for row in csv.DictReader(handle) if None not in row and None not in row.values()]
            rows = [row for row in whole if row["generation"].isdecimal() and int(row["generation"]) < generation]
        row = {"generation": str(generation)} | {name: repr(value) for name, value in figures.items()}
        columns = _columns(rows)
        if self._rows is not None and columns == _columns([*rows, row]):
            with self._file.open("a", encoding="utf-8", newline="") as handle:
                csv.DictWriter(handle, columns, lineterminator="\n").writerow(row)
        else:
            # The strategy may have other metrics from now on.
            text = io.StringIO()
            writer = csv.DictWriter(text, _columns([*rows, row]), lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, row])
            atomic_write(self._file, text.getvalue())
        self._rows = [*rows, row]

    def close(self) -> None: ...


def _columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


LOGGERS: dict[str, Callable[[LoggedSearch], Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "csv": Table}
