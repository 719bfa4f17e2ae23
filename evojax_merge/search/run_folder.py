"""The run folder: what a search leaves behind and continues from. May import errors, config, checkpoints'
writer and evaluation.devices.

config.yaml      the resolved config, with the hash of every input file
history.jsonl    one line a generation; nothing in it depends on the clock
timing.jsonl     seconds a generation
checkpoints/     the state after each generation (orbax), the last two kept
best/            recipe.yaml and model/
winners/         what best/ was when the run had finished with fewer generations, with its result.json and report.png
stages/          run folders of the stages before the last, in a chain
result.json      held-out scores of the winner, the parents and the uniform merge
report.png       fitness over generations, and the winner's parameters
"""

import itertools
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.checkpoints.recipe_writer import dump_yaml
from evojax_merge.checkpoints.writer import atomic_write
from evojax_merge.errors import InputError, LostProcess
from evojax_merge.evaluation.devices import in_step
from evojax_merge.yaml_reader import load_yaml

# May differ between a run and its continuation.
EXTENDABLE = ("generations",)


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def timing(self) -> Path:
        return self.path / "timing.jsonl"

    @property
    def recipe(self) -> Path:
        return self.path / "best" / "recipe.yaml"

    @property
    def model(self) -> Path:
        return self.path / "best" / "model"

    @property
    def winners(self) -> Path:
        return self.path / "winners"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def picture(self) -> Path:
        return self.path / "report.png"

    @property
    def parts(self) -> list[Path]:
        """The folders that belong to the run; what else lies beside them is its user's."""
        return [self.path / "best", self.path / "checkpoints", self.path / "stages", self.winners]

    def read_history(self) -> list[dict[str, Any]]:
        return read_lines(self.history)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one line, on the disk when this returns."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(row, ensure_ascii=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def truncate_lines(path: Path, generations: int) -> None:
    """Keep the lines of generations below `generations`: those of a generation that was not saved are made again."""
    rows = [row for row in read_lines(path) if row["generation"] < generations]
    if path.exists():
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def open_run(path: Path, document: dict[str, Any], *, resume: bool, overwrite: bool) -> RunFolder:
    """Create a run folder, or open one that was begun with the same config.

    Raises InputError where it cannot be written, holds another run, or is not a run folder at all.
    """
    folder = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise InputError(path, "is a file; expected a run folder")
    occupied = path.exists() and any(path.iterdir())
    if occupied and not is_run(folder):
        raise InputError(path, "is not empty and not a run folder; choose another with --out")
    if occupied and resume:
        _check_same_config(folder, document)
    elif occupied and not overwrite:
        raise InputError(path, "holds a run already; pass --resume to continue it or --overwrite to start again")
    elif not occupied and resume:
        raise InputError(path, "holds no run to resume")
    try:
        if occupied and not resume:
            _clear(folder)
        (path / "best").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror})") from None
    atomic_write(folder.config, dump_yaml(document))
    return folder


@contextmanager
def removed_if_refused(folder: RunFolder) -> Iterator[None]:
    """Where the input turns out to be wrong (InputError) before anything of the search was saved, the folder goes
    again: it holds its config alone, and the next attempt may have another."""
    try:
        yield
    except InputError:
        files = [path for path in folder.path.rglob("*") if path.is_symlink() or not path.is_dir()]
        if jax.process_index() == 0 and {path.name for path in files} <= {folder.config.name}:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def is_run(folder: RunFolder) -> bool:
    """Whether a search made this folder: its config.yaml lists the hashes of its inputs."""
    if not folder.config.exists():
        return False
    document = load_yaml(folder.config)
    return isinstance(document, dict) and "inputs" in document


def _clear(folder: RunFolder) -> None:
    """Delete what a search wrote, and nothing that a user put beside it."""
    for part in folder.parts:
        shutil.rmtree(part, ignore_errors=True)
    for file in (folder.history, folder.timing, folder.result, folder.picture):
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class EarlierWinner:
    """The winner of a run that had finished before it went on: where it is kept, and what `result.json` said of it."""

    path: Path
    generations: int
    heldout_fitness: float


def read_result(file: Path) -> dict[str, Any] | None:
    """The document of a `result.json`, or None where there is none that can be read."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def keep_winner(folder: RunFolder, recipe: str) -> None:
    """Move a finished run's winner to `winners/GENERATIONS`, unless `recipe`, the new winner's, is the same.

    One rename moves recipe, model, result and picture together: a kill leaves all of them in one place or the other.
    """
    result, best = read_result(folder.result), folder.recipe.parent
    if result is None or not folder.model.exists() or not folder.recipe.exists():
        return
    if folder.recipe.read_text(encoding="utf-8") == recipe:
        return
    for file in (folder.result, folder.picture):
        if file.exists():
            shutil.copyfile(file, best / file.name)
    name = f"{result.get('generations', 0):03d}"
    others = (folder.winners / f"{name}-{number}" for number in itertools.count(2))
    folder.winners.mkdir(exist_ok=True)
    os.rename(best, next(path for path in itertools.chain([folder.winners / name], others) if not path.exists()))
    best.mkdir()


def earlier_winners(folder: RunFolder) -> list[EarlierWinner]:
    """The winners that were kept, in the order of their generations."""
    found = []
    for path in sorted(folder.winners.glob("*/")):
        result = read_result(path / "result.json") or {"table": []}
        fitness = [row["heldout_fitness"] for row in result["table"] if row["role"] == "winner"]
        found += [EarlierWinner(path, result["generations"], value) for value in fitness]
    return found


def _check_same_config(folder: RunFolder, document: dict[str, Any]) -> None:
    old = load_yaml(folder.config)
    differing = [key for key in _differences(old, document) if key.split(".")[-1] not in EXTENDABLE]
    if differing:
        raise InputError(
            folder.config,
            f"belongs to another config: {differing[0]} differs; choose another folder with --out",
        )


def _differences(one: Any, other: Any, key: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            difference
            for name in sorted(set(one) | set(other), key=str)
            for difference in _differences(one.get(name), other.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if one == other else [key]


@contextmanager
def interrupts_held() -> Iterator[None]:
    """SIGINT and SIGTERM that arrive in this block act at its end; a second one acts at once. Orbax waits in an event
    loop that an interruption leaves half closed, with what it was saving. Signals reach the main thread alone; in
    another this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def release() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def hold(number: int, frame: Any) -> None:
        held.append(number)
        if len(held) > 1:
            release()
            signal.raise_signal(number)

    for number in usual:
        signal.signal(number, hold)
    try:
        yield
    finally:
        release()
    if held:
        signal.raise_signal(held[0])


class Checkpoints:
    """The state after each generation. A process killed in the middle of a save leaves the last one intact."""

    def __init__(self, folder: RunFolder) -> None:
        import logging

        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)
        policy = ocp.training.preservation_policies.LatestN(2)
        self._checkpointer = ocp.training.Checkpointer(
            (folder.path / "checkpoints").resolve(), preservation_policy=policy, cleanup_tmp_directories=True
        )

    def latest(self) -> int | None:
        """How many generations the newest checkpoint has behind it, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, generations: int, state: Any) -> None:
        """Every process has the same state, and all of them call this, with `interrupts_held`; one writes."""
        with in_step():
            self._checkpointer.save_pytree(generations, jax.tree.map(np.asarray, state))

    def load(self, generations: int, like: Any) -> Any:
        """Restore into the structure of `like`."""
        with interrupts_held():
            loaded = self._checkpointer.load_pytree(generations, jax.tree.map(np.asarray, like))
        return jax.tree.map(lambda new, old: jnp.asarray(new) if isinstance(old, jax.Array) else new, loaded, like)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        # Closing is done together; it would wait for a process that has gone.
        if kind is not LostProcess:
            self._checkpointer.close()
