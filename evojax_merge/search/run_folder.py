"""The run folder: the files that a search leaves behind and continues from.

config.yaml      the resolved config, with the hash of every input file
history.jsonl    one line a generation; nothing in it depends on the clock
history.backup.jsonl  the same, from which a damaged history is restored
timing.jsonl     seconds a generation
run.log          all that the command prints, with the time of each line; appended to when the run goes on
history.csv      the figures of the history as a table, where the config's log names csv
environment.json  versions, devices, machine, command and duration of each process that worked on the run
checkpoints/     the state after each generation (orbax), the last three kept
best/            recipe.yaml and model/; for a strategy that keeps a front, front/ with the recipe of each member
members/         of a pool whose members are kept in files, while it is searched: the weights of parents
winners/         best/ as it was when the run had finished with fewer generations, with its result.json
stages/          run folders of the stages before the last, in a chain
result.json      held-out scores of the winner, the parents and the uniform merge
heldout_answers.jsonl  the winner's and each task's best parent's answers to each held-out example
report.html      the run as a page: figures, tables, the config
lock             while a process works here: its id and host

The process may be killed at any instant. It leaves a folder that holds nothing but a lock, or one that can be
continued; the next process that opens the folder removes whatever was half-written.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import merge_kernels
import numpy as np

from evojax_merge.checkpoints.folder import file_hash
from evojax_merge.config.search_config import GradientConfig
from evojax_merge.errors import Failed, InputError, PeerLostError, cannot_write
from evojax_merge.evaluation.devices import barrier, collective
from evojax_merge.mergekit.write import dump_yaml
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.search.run_lock import acquire, holder, release
from evojax_merge.search.run_log import run_log
from evojax_merge.search.run_parts import (
    CHECKPOINT_MARK,
    RunFolder,
    check_parts,
    check_removable_step,
    check_replaceable_front,
    check_room,
    clear,
    entries,
    prune,
    remove_log,
    sweep,
)
from evojax_merge.search.run_schema import (
    A_FILE,
    MAX_FILE,
    HistoryLine,
    StoredResult,
    read_lines,
    read_result,
    read_run_config,
)
from evojax_merge.system.file_system import (
    atomic_folder,
    atomic_write,
    is_unfinished,
    link_or_copy,
    remove_empty_folder,
    remove_file,
    remove_folder,
)
from evojax_merge.system.interrupts import defer_signals
from evojax_merge.system.regular_file import check_unpacked, read_regular

# Keys that may differ between a run and its continuation.
EXTENDABLE = (("search", "generations"), ("search", "budget"), ("search", "stop"), ("log",))
POPULATION, GRADIENT = ("search", "population"), ("search", "gradient")
_START_AGAIN = "cannot be continued by this one; pass --overwrite to start again, or choose another folder with --out"
OTHER_VERSION = f"was begun by another version of this program, and {_START_AGAIN}"
OTHER_MASKS = f"was begun by a version of this program that drew other random masks, and {_START_AGAIN}"
# In config.yaml, beside the config: the hashes of input files, and how random masks are drawn where they are.
INPUTS, RANDOM_NUMBERS = "inputs", "random_numbers"


def to_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def append_line(path: Path, line: str) -> None:
    """Append one line, on the disk when this returns."""
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise cannot_write(path, error, "; all that was saved is whole, and --resume goes on from it") from None


def restore_history(folder: RunFolder, length: int, digest: bytes, say: Callable[[str], None]) -> None:
    """Restore history.jsonl and its backup to their content when a checkpoint was saved: `length` bytes with this
    SHA-256.

    A line that was being written and those of a generation that was not saved go without a message; `say` reports any
    other difference. Where both files are damaged, only the lines before the damage are left."""
    files = (folder.history, folder.history_backup)
    contents = [read_regular(path, A_FILE, MAX_FILE) if path.is_file() else b"" for path in files]
    whole = next((text[:length] for text in contents if hashlib.sha256(text[:length]).digest() == digest), None)
    if whole is None:
        lines = [read_lines(path, HistoryLine) for path in files]
        longest = max(lines, key=len)
        whole = "".join(map(to_line, longest)).encode()
        say(
            f"{folder.history.name} is damaged, and so is its backup: the lines of generations after {len(longest)} "
            "are lost; the search itself goes on as it would have"
        )
    elif contents[0][:length] != whole:
        say(f"{folder.history.name} was not as it had been written; it is restored from its backup")
    for path, before in zip(files, contents, strict=True):
        if before != whole:
            atomic_write(path, whole.decode())


def restore_timing(folder: RunFolder, generations: int) -> None:
    """Keep the lines of the first `generations`; where one is damaged, those before it. They depend on the
    clock, and nothing depends on them but when `search.stop.seconds` are over."""
    if folder.timing.exists():
        rows = [row for row in folder.read_timing() if row["generation"] <= generations]
        atomic_write(folder.timing, "".join(map(to_line, rows)))


# ---------------------------------------------------------------------------------------------------------------
# Opening


def open_run(
    path: Path,
    document: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    say: Callable[[str], None] = lambda line: None,
) -> RunFolder:
    """Create a run folder, or open one that was begun with the same config, and remove what a killed process left.
    `say` receives a line for each part of a run that is started again in which a user's files stay.

    Raises InputError where the folder cannot be written, holds another run, or is no run folder at all.
    """
    folder = RunFolder(path)
    occupied = check_place(path, resume=resume, overwrite=overwrite)
    last_stage = (document.get("stages") or [document])[-1]
    generations = last_stage.get("search", {}).get("generations", 0)
    if occupied and resume:
        check_same_config(folder, document)
        result = read_result(folder.result) or StoredResult()
        if result.generations < generations and result.stopped_by is None:
            # Before long work.
            check_room(folder, generations)
    if resume and "generations" in document.get("search", {}):
        # Fewer generations than are saved already cannot be asked for.
        wanted = max(document["search"]["generations"], len(folder.read_history()))
        document = document | {"search": document["search"] | {"generations": wanted}}
    try:
        path.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        if occupied and not resume:
            for line in clear(folder, generations):
                say(line)
        atomic_write(folder.config, dump_yaml(document))
        folder.best.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror})") from None
    return folder


@contextmanager
def opened(path: Path, document: dict[str, Any], *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """A run folder, locked for this process and opened by `open_run`. The folder is removed again where it is refused
    before the search has saved anything."""
    folder = RunFolder(path)
    with ExitStack() as stack:
        with defer_signals():
            stack.enter_context(locked(path, resume=resume))
            open_run(path, document, resume=resume, overwrite=overwrite)
            if not resume:
                stack.enter_context(removed_if_refused(folder))
        stack.enter_context(run_log(folder))
        yield folder


@contextmanager
def locked(path: Path, *, resume: bool) -> Iterator[None]:
    """Lock the run folder for this process, create it where there is none, and remove it again where it stays empty.

    Raises InputError where another process has it, where the folder is none of a run, or holds none to `resume`.
    """
    folder, is_new = RunFolder(path), not path.exists()
    _check_place(folder, resume)
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = acquire(folder)
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        release(folder, handle)
        if is_new:
            remove_empty_folder(path)


@contextmanager
def removed_if_refused(folder: RunFolder) -> Iterator[None]:
    """Remove what was written to a run folder where the input turns out to be wrong (InputError) before the search has
    saved anything: the next attempt may have another config. The folder itself goes with its lock."""
    try:
        yield
    except InputError:
        others = {*entries(folder.path)} - {folder.config, folder.environment, folder.log, folder.lock}
        if all(path in folder.parts and not entries(path) for path in others):
            for path in others:
                remove_empty_folder(path)
            remove_log(folder)
            remove_file(folder.environment)
            remove_file(folder.config)
        raise


def check_place(path: Path, *, resume: bool, overwrite: bool) -> bool:
    """Return whether a run lies at a path. Raises InputError where a run with progress is neither to be resumed nor to
    be overwritten, where something else lies there, or where there is nothing to resume. A run without progress gives
    way to any other."""
    occupied = _check_place(RunFolder(path), resume)
    if occupied and not resume and not overwrite and RunFolder(path).has_progress():
        raise InputError(path, "holds a run already; pass --resume to continue it or --overwrite to start again")
    return occupied


def _check_place(folder: RunFolder, resume: bool) -> bool:
    """Return whether a run lies in a folder. Raises InputError where something else does, or where there is nothing to
    resume."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise InputError(path, "is a file; expected a run folder")
    try:
        empty = not path.exists() or not any(path.iterdir())
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None
    if empty and resume:
        raise InputError(path, "holds no run to resume")
    if empty or _is_just_begun(folder):
        return False
    if not is_run(folder):
        raise InputError(path, "is not empty and not a run folder; choose another with --out")
    check_parts(folder)
    return True


def is_run(folder: RunFolder) -> bool:
    """Return whether a search made this folder: its config.yaml lists the hashes of its inputs."""
    if not folder.config.exists():
        return False
    document = load_yaml(folder.config)
    return isinstance(document, dict) and INPUTS in document


def random_numbers(is_random: bool) -> dict[str, str]:
    """The entry of a run's config.yaml on random masks, where the run draws any."""
    return {RANDOM_NUMBERS: merge_kernels.SCHEME} if is_random else {}


def check_masks(folder: RunFolder) -> None:
    """Raises InputError where this program would draw other random masks than a run was scored with."""
    if read_run_config(folder.config).get(RANDOM_NUMBERS) != merge_kernels.SCHEME:
        raise InputError(
            folder.path,
            "was searched by a version of this program that drew other random masks; what it has exported itself (in "
            "best/model, once it is finished) is what was scored, and cannot be made again by this one",
        )


def _is_just_begun(folder: RunFolder) -> bool:
    """Return whether a process was killed in a folder before it had written config.yaml."""

    def of_a_start(path: Path) -> bool:
        if path == folder.lock:
            return path.is_file() and holder(path) is not None
        return is_unfinished(path, folder.config) or (path in folder.parts and path.is_dir() and not entries(path))

    return all(of_a_start(path) for path in folder.path.iterdir())


@dataclass(frozen=True)
class EarlierWinner:
    """The winner of a run that had finished before it went on: its folder, and its generations and held-out fitness
    from `result.json`."""

    path: Path
    generations: int
    heldout_fitness: float


def keep_winner(folder: RunFolder, recipe: str) -> None:
    """Keep a finished run's winner in `winners/GENERATIONS`, unless `recipe`, the new winner's, is the same: recipe,
    model, front and result, all of them or none. Weights are hard links where their disk allows it."""
    result = read_result(folder.result)
    if result is None or not folder.model.exists() or not folder.recipe.exists():
        return
    if folder.recipe.read_text(encoding="utf-8") == recipe:
        return
    if any(read_result(winner / folder.result.name) == result for winner in folder.kept_winners()):
        # A process was killed after it had kept this winner.
        return
    name = f"{result.generations:03d}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    place = next(folder.winners / name for name in names if not os.path.lexists(folder.winners / name))
    with atomic_folder(place) as work:
        for path in (folder.recipe, folder.result):
            if path.exists():
                shutil.copyfile(path, work / path.name)
        for path in (folder.model, folder.front):
            if path.exists():
                shutil.copytree(path, work / path.name, symlinks=True, copy_function=link_or_copy)


def write_front(folder: RunFolder, recipes: Sequence[str]) -> None:
    """Write the recipe of each member of a front, in place of the recipes in its folder, all at once."""
    check = partial(check_replaceable_front, folder.front)
    with atomic_folder(folder.front, overwrite=True, check=check) as work:
        for number, recipe in enumerate(recipes, start=1):
            (work / f"member-{number}.yaml").write_text(recipe, encoding="utf-8")


def find_member(folder: RunFolder, number: int) -> Path:
    """The recipe of a member of the front. Raises InputError where there is no such member."""
    file, count = folder.front / f"member-{number}.yaml", len(entries(folder.front))
    if not count:
        raise InputError(
            folder.path,
            "has no front to take a member from; expected a finished search with strategy pareto or niches",
        )
    if not file.is_file():
        raise InputError("--member", f"{number}; expected a member of {folder.path}, whose front has 1 to {count}")
    return file


def earlier_winners(folder: RunFolder) -> list[EarlierWinner]:
    """The winners that were kept, in the order of their generations."""
    winners = []
    for path in folder.kept_winners():
        result = read_result(path / folder.result.name)
        if result is not None and result.winner is not None:
            winners.append(EarlierWinner(path, result.generations, result.winner.heldout_fitness))
    return winners


def check_same_config(folder: RunFolder, document: dict[str, Any]) -> None:
    """Raises InputError where a run folder holds the run of another config, or of other input files. document: as
    `config.yaml` would have it."""
    differences = _differences(read_run_config(folder.config), document)
    # Another method is another config, whatever it draws.
    for key, old, new in sorted(differences, key=lambda difference: difference[0] == (RANDOM_NUMBERS,)):
        if any(key[: len(extendable)] == extendable for extendable in EXTENDABLE):
            continue
        if key[-2:] == POPULATION and old is None:
            # Earlier versions wrote a population only where the config had one.
            continue
        if key[-2:] == GRADIENT and old is None and new == GradientConfig().model_dump(mode="json"):
            # Earlier versions wrote defaults only for strategies that came with the program.
            continue
        if key == (RANDOM_NUMBERS,):
            raise InputError(folder.path, OTHER_MASKS)
        if key[0] == INPUTS and len(key) == 2:
            raise _other_input(folder, key[1], old, new)
        raise InputError(
            folder.config,
            f"belongs to another config: {'.'.join(map(str, key))} differs (it was {_short(old)}, now {_short(new)}); "
            "give the options of its first search again, or choose another folder with --out",
        )


def check_inputs(folder: RunFolder) -> None:
    """Raises InputError where a file that a run's scores depend on has changed or is gone."""
    for file, digest in read_run_config(folder.config)[INPUTS].items():
        current = file_hash(Path(file)) if Path(file).is_file() else None
        if current != digest:
            raise _other_input(folder, file, digest, current)


def check_recorded_inputs(where: object, recorded: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Raises InputError where a file is missing or has another hash than a run recorded. current: the hashes of the
    files that are read now, by their paths."""
    for file, digest in recorded.items():
        if file in current and current[file] != digest:
            what = f"has changed since the run (sha256 {_short(digest)}, now {_short(current[file])})"
        elif file not in current and not os.path.lexists(file):
            what = f"is missing; the run read it (sha256 {_short(digest)})"
        else:
            continue
        raise InputError(
            f"{where}: {INPUTS}",
            f"{file} {what}; restore it, or go on all the same without the key {INPUTS} (search: --set {INPUTS}=null)",
        )


def _other_input(folder: RunFolder, file: str, old: str | None, new: str | None) -> InputError:
    what = "was removed" if new is None else "is new" if old is None else "has changed"
    return InputError(
        folder.config,
        f"belongs to other inputs: {file} {what} since the run was begun (sha256 {_short(old)}, now {_short(new)}); "
        "restore it, or choose another folder with --out",
    )


def _differences(one: Any, other: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """The differences of two documents: each key that differs, and its values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(set(one) | set(other), key=str):
            yield from _differences(one.get(name), other.get(name), (*key, name))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(*pair, (*key, number))
    elif one != other:
        yield key, one, other


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else f"{text[:40]} … {text[-10:]}"


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass(frozen=True)
class Saved:
    """A checkpoint: the number of generations behind it, the state's arrays by path, and the length in bytes and the
    SHA-256 of the history so far."""

    generations: int
    arrays: dict[str, np.ndarray]
    history_length: int
    history_digest: bytes

    def describes(self, generations: int, history: Path) -> bool:
        """Return whether the checkpoint is of this number of generations, and a history is, to the byte, the one that
        the checkpoint was saved with."""
        content = history.read_bytes()
        same = len(content) == self.history_length and hashlib.sha256(content).digest() == self.history_digest
        return same and self.generations == generations

    def part(self, name: str) -> "Saved":
        """The saved arrays of one part of the state, a mapping."""
        return replace(self, arrays={path: array for path, array in self.arrays.items() if path.startswith(f"{name}.")})

    def best(self, dims: int) -> tuple[np.ndarray, float]:
        """The best candidate so far: its genome float32[dims] and its fitness, -inf where none is known. Raises
        InputError where the saved genomes are of another length."""
        like = {"genomes": np.zeros((0, dims), np.float32), "fitness": np.zeros(0)}
        state = replace(self, arrays={name: self.arrays[name] for name in like}).state(like)
        if not len(state["genomes"]) == len(state["fitness"]) > 0 or not np.isfinite(state["genomes"][0]).all():
            raise InputError("checkpoints", OTHER_VERSION)
        return state["genomes"][0], float(state["fitness"][0])

    def state(self, like: Any) -> Any:
        """The state, in the structure of `like`, in which an axis of length 0 stands for one that grows. Raises
        InputError where the saved structure is another."""
        paths, structure = jax.tree_util.tree_flatten_with_path(like)
        expected = {_name(path): leaf for path, leaf in paths}
        if self.arrays.keys() != expected.keys() or not all(
            _fits(self.arrays[name], expected[name]) for name in expected
        ):
            raise InputError("checkpoints", OTHER_VERSION)
        pairs = [(self.arrays[name], leaf) for name, leaf in expected.items()]
        return jax.tree.unflatten(
            structure, [jnp.asarray(new) if isinstance(leaf, jax.Array) else new for new, leaf in pairs]
        )


class Checkpoints:
    """The state after each generation. A process killed in the middle of a save leaves the last one intact.

    The length and the digest of the history lie beside the state: a damaged history.jsonl is noticed, and a resumed one
    never differs. A digest over all arrays shows that a checkpoint is damaged.
    """

    def __init__(self, folder: RunFolder) -> None:
        import logging

        with defer_signals():
            from orbax.checkpoint import v1 as ocp

        # Orbax logs at length about files that it cannot read; whatever matters is raised as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._folder, self._orbax = folder, ocp

    def latest(self) -> int | None:
        """The number of generations behind the newest checkpoint, or None."""
        return max(self._folder.steps(), default=None)

    def save(self, generations: int, state: Any, history_length: int, history_digest: bytes) -> None:
        """Save a checkpoint. Every process has the same state, and all of them call this, with `defer_signals`; one
        writes."""
        arrays = {f"state.{_name(path)}": np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        arrays["history.length"] = np.asarray(history_length, np.int64)
        arrays["history.digest"] = np.frombuffer(history_digest, np.uint8)
        try:
            with collective():
                # Orbax would also delete: entries of the folder that look unfinished or old to it, whoever made them.
                self._orbax.save(
                    self._folder.step(generations).resolve(),
                    arrays | {"digest": _digest(arrays)},
                    custom_metadata=CHECKPOINT_MARK,
                )
            if jax.process_index() == 0:
                prune(self._folder)
        except PeerLostError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            full = os.strerror(errno.ENOSPC)
            raise Failed(
                f"{self._folder.checkpoints}: generation {generations} could not be saved "
                f"({full if full in text else text[:200]}); all that was saved before is whole, and --resume goes on "
                "from it"
            ) from None

    def restore(self, say: Callable[[str], None]) -> Saved | None:
        """The newest checkpoint that can be read; damaged ones are removed, which `say` reports. None: nothing was
        saved yet. Every process of a run calls this.

        Raises InputError where there are checkpoints but none can be read, or where an older version wrote them.
        """
        saved, damaged = None, []
        for step in reversed(self._folder.steps()):
            saved = self._load(step)
            if saved is not None:
                break
            damaged.append(step)
        again = "pass --overwrite to start again, or choose another folder with --out"
        if saved is None and damaged:
            shown = "it is damaged" if len(damaged) == 1 else f"all {len(damaged)} are damaged"
            raise InputError(self._folder.checkpoints, f"no checkpoint can be read ({shown}); {again}")
        # The line of a generation stands in the history before its checkpoint is saved.
        if saved is None and len(self._folder.read_history()) > 1:
            raise InputError(self._folder.path, f"has a history but no checkpoint to continue from; {again}")
        if damaged:
            for step in damaged:
                check_removable_step(self._folder, step)
            barrier("read")
            if jax.process_index() == 0:
                for step in damaged:
                    remove_folder(self._folder.step(step))
            barrier("removed")
            assert saved is not None
            say(
                f"the checkpoint of generation {damaged[0]} is damaged; "
                f"going on from the one of generation {saved.generations}"
            )
        return saved

    def _load(self, generations: int) -> Saved | None:
        """A checkpoint, or None where it is damaged. Raises InputError where an older version wrote it, and where it
        unpacks to far more than its own bytes."""
        path = self._folder.step(generations).resolve()
        try:
            with defer_signals():
                described = jax.tree.leaves(self._orbax.metadata(path).metadata)
                # A chunk is unpacked whole, whatever part of it the array has.
                unpacked = sum(
                    each.dtype.itemsize * max(map(math.prod, (each.shape, each.storage_metadata.chunk_shape)))
                    for each in described
                )
                check_unpacked(path, unpacked, sum(file.stat().st_size for file in path.rglob("*")))
                loaded = self._orbax.load(path)
            arrays = {name: np.asarray(leaf) for name, leaf in loaded.items() if name != "digest"}
            if "digest" in loaded and not np.array_equal(loaded["digest"], _digest(arrays)):
                return None
        except InputError:
            raise
        except Exception:
            # Orbax raises anything for bytes that it did not write.
            return None
        state = {name.removeprefix("state."): leaf for name, leaf in arrays.items() if name.startswith("state.")}
        length, digest = arrays.get("history.length"), arrays.get("history.digest")
        if (
            "digest" not in loaded or length is None or digest is None or (length.shape, length.dtype) != ((), np.int64)
            or (digest.shape, digest.dtype) != ((32,), np.uint8) or not {"genomes", "fitness"} <= state.keys()
        ):  # fmt: skip
            raise InputError(self._folder.path, OTHER_VERSION)
        return Saved(generations, state, int(length), digest.tobytes())


class FolderStorage:
    """Keeps a search's generations in a run folder, for one process or several. A generation's line stands in the
    history before its checkpoint is saved, so that the checkpoint can hold the history's digest."""

    def __init__(self, folder: RunFolder, checkpoints: Checkpoints, *, is_main_process: bool = True) -> None:
        self._folder, self._checkpoints, self._is_main_process = folder, checkpoints, is_main_process
        self._length, self._digest = 0, hashlib.sha256()

    def restore(self, like: Any, log: Callable[[str], None]) -> tuple[Any, int]:
        saved = self._checkpoints.restore(log)
        state, generations = (like, 0) if saved is None else (saved.state(like), saved.generations)
        if self._is_main_process:
            length, digest = (
                (0, hashlib.sha256().digest()) if saved is None else (saved.history_length, saved.history_digest)
            )
            restore_history(self._folder, length, digest, log)
            restore_timing(self._folder, generations)
            written = self._folder.history.read_bytes() if self._folder.history.is_file() else b""
            self._length, self._digest = len(written), hashlib.sha256(written)
        return state, generations

    def save(self, generation: int, state: Any, row: dict[str, Any], timing: dict[str, Any]) -> None:
        line = to_line(row)
        self._length += len(line.encode())
        self._digest.update(line.encode())
        with defer_signals():
            if self._is_main_process:
                append_line(self._folder.history, line)
                append_line(self._folder.history_backup, line)
            self._checkpoints.save(generation, state, self._length, self._digest.digest())
            if self._is_main_process:
                append_line(self._folder.timing, to_line(timing))

    def read_history(self) -> list[dict[str, Any]]:
        return self._folder.read_history()

    def read_timing(self) -> list[dict[str, Any]]:
        return self._folder.read_timing()

    def describe(self, generations: int) -> str:
        if not generations:
            return "it is the first, and nothing is saved"
        return f"the {generations} before it are saved in {self._folder.path}"


def _name(path: tuple[Any, ...]) -> str:
    """The place of a leaf in a pytree of dicts, dataclasses and sequences."""
    return ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)


def _fits(array: np.ndarray, like: Any) -> bool:
    """Return whether a saved array has the dtype and shape of `like`, whose axes of length 0 stand for any length."""
    expected = np.shape(like)
    same = len(expected) == array.ndim and all(n in (0, size) for n, size in zip(expected, array.shape, strict=True))
    return same and array.dtype == np.asarray(like).dtype


def _digest(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """SHA-256 of arrays with their names, uint8[32]."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
