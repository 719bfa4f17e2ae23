"""The run folder: what a search leaves behind and continues from.

config.yaml      the resolved config, with the hash of every input file
history.jsonl    one line a generation; nothing in it depends on the clock
history.backup.jsonl  the same, from which a damaged history is restored
timing.jsonl     seconds a generation
checkpoints/     the state after each generation (orbax), the last three kept
best/            recipe.yaml and model/; of a strategy that keeps a front, front/ with the recipe of each member
winners/         what best/ was when the run had finished with fewer generations, with its result.json and report.png
stages/          run folders of the stages before the last, in a chain
result.json      held-out scores of the winner, the parents and the uniform merge
report.png       fitness over generations, and the winner's parameters
lock             while a process works here: its id and host

The process may be killed at any instant. What it leaves is a folder that holds nothing but a lock, or one that can be
continued; the next process to open it removes the rest.
"""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import merge_kernels
import numpy as np

from evojax_merge.checkpoints.folder import file_hash
from evojax_merge.checkpoints.writer import atomic_folder, atomic_write, recover
from evojax_merge.errors import Failed, InputError, PeerLostError, cannot_write, print_warning
from evojax_merge.evaluation.devices import barrier, collective
from evojax_merge.interrupts import defer_signals
from evojax_merge.mergekit.write import dump_yaml
from evojax_merge.regular_file import read_regular
from evojax_merge.yaml_reader import load_yaml

# May differ between a run and its continuation.
EXTENDABLE = (("search", "generations"), ("search", "stop"))
KEPT_CHECKPOINTS = 3
# In best/: the winner of `search_pytrees`, its leaves by their paths.
PARAMS = "params.safetensors"
# The checkpoints of a run that is started again, for the moment until they are deleted.
CLEARED = ".checkpoints.old"
_START_AGAIN = "cannot be continued by this one; pass --overwrite to start again, or choose another folder with --out"
OTHER_VERSION = f"was begun by another version of this program, and {_START_AGAIN}"
OTHER_MASKS = f"was begun by a version of this program that drew other random masks, and {_START_AGAIN}"
# In config.yaml, beside the config: the hashes of input files, and how random masks are drawn where they are.
INPUTS, RANDOM_NUMBERS = "inputs", "random_numbers"
OF_A_RUN = (INPUTS, RANDOM_NUMBERS)
LOCK = re.compile(rb"(\d+) on (\S+)\n")


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
    def history_backup(self) -> Path:
        return self.path / "history.backup.jsonl"

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
    def front(self) -> Path:
        return self.path / "best" / "front"

    @property
    def winners(self) -> Path:
        return self.path / "winners"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def stages(self) -> Path:
        return self.path / "stages"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

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
    """The lines of a JSONL file, from its start to the first that was cut short or is no JSON object with a
    generation's number."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in read_regular(path, "a file of JSON lines").split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("generation"), int):
            break
        rows.append(row)
    return rows


def to_line(row: dict[str, Any]) -> str:
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
    """Make history.jsonl and its backup what they were when a checkpoint was saved: `length` bytes with this SHA-256.

    A line that was being written and those of a generation that was not saved go without a word; where anything else is
    different, that is said. Where both are damaged, the lines before the damage are all there is."""
    found = [path.read_bytes() if path.is_file() else b"" for path in (folder.history, folder.history_backup)]
    whole = next((one[:length] for one in found if hashlib.sha256(one[:length]).digest() == digest), None)
    if whole is None:
        lines = [read_lines(path) for path in (folder.history, folder.history_backup)]
        longest = max(lines, key=len)
        whole = "".join(map(to_line, longest)).encode()
        say(
            f"{folder.history.name} is damaged, and so is its backup: the lines of generations after {len(longest)} "
            "are lost; the search itself goes on as it would have"
        )
    elif found[0][:length] != whole:
        say(f"{folder.history.name} was not as it had been written; it is restored from its backup")
    for path, before in zip((folder.history, folder.history_backup), found, strict=True):
        if before != whole:
            atomic_write(path, whole.decode())


def restore_timing(folder: RunFolder, generations: int) -> None:
    """Keep the lines of the first `generations`; where one is damaged, those before it. They depend on the
    clock, and nothing depends on them but when `search.stop.seconds` are over."""
    if folder.timing.exists():
        rows = [row for row in read_lines(folder.timing) if row["generation"] <= generations]
        atomic_write(folder.timing, "".join(map(to_line, rows)))


# ---------------------------------------------------------------------------------------------------------------
# Opening


def open_run(path: Path, document: dict[str, Any], *, resume: bool, overwrite: bool) -> RunFolder:
    """Create a run folder, or open one that was begun with the same config, and remove what a killed process left.

    Raises InputError where it cannot be written, holds another run, or is not a run folder at all.
    """
    folder = RunFolder(path)
    occupied = check_place(path, resume=resume, overwrite=overwrite)
    if occupied and resume:
        _check_same_config(folder, document)
    if resume and "generations" in document.get("search", {}):
        # Fewer generations than are saved already cannot be asked for.
        wanted = max(document["search"]["generations"], len(folder.read_history()))
        document = document | {"search": document["search"] | {"generations": wanted}}
    try:
        path.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        if occupied and not resume:
            _clear(folder)
        atomic_write(folder.config, dump_yaml(document))
        folder.recipe.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror})") from None
    return folder


@contextmanager
def opened(path: Path, document: dict[str, Any], *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """A run folder, locked for this process and opened as `open_run` does. It goes again where it is refused before
    anything of the search was saved."""
    folder = RunFolder(path)
    with ExitStack() as stack:
        with defer_signals():
            stack.enter_context(locked(path, resume=resume))
            open_run(path, document, resume=resume, overwrite=overwrite)
            if not resume:
                stack.enter_context(removed_if_refused(folder))
        yield folder


@contextmanager
def removed_if_refused(folder: RunFolder) -> Iterator[None]:
    """Where the input turns out to be wrong (InputError) before anything of the search was saved, the folder goes
    again: it holds its config alone, and the next attempt may have another."""
    try:
        yield
    except InputError:
        files = [path for path in folder.path.rglob("*") if path.is_symlink() or not path.is_dir()]
        if {path.name for path in files} <= {folder.config.name, folder.lock.name}:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def check_place(path: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether a run lies at a path. Raises InputError where it is neither to be resumed nor to be overwritten, where
    something else lies there, or nothing that could be resumed."""
    occupied = _check_place(RunFolder(path), resume)
    if occupied and not resume and not overwrite:
        raise InputError(path, "holds a run already; pass --resume to continue it or --overwrite to start again")
    return occupied


def _check_place(folder: RunFolder, resume: bool) -> bool:
    """Whether a run lies here. Raises InputError where something else does, or nothing that could be resumed."""
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
    return True


def is_run(folder: RunFolder) -> bool:
    """Whether a search made this folder: its config.yaml lists the hashes of its inputs."""
    if not folder.config.exists():
        return False
    document = load_yaml(folder.config)
    return isinstance(document, dict) and INPUTS in document


def random_numbers(is_random: bool) -> dict[str, str]:
    """What a run's config.yaml says of random masks, where there are any."""
    return {RANDOM_NUMBERS: merge_kernels.SCHEME} if is_random else {}


def check_masks(folder: RunFolder) -> None:
    """Raises InputError where this program would draw other random masks than a run was scored with."""
    if load_yaml(folder.config).get(RANDOM_NUMBERS) != merge_kernels.SCHEME:
        raise InputError(
            folder.path,
            "was searched by a version of this program that drew other random masks; what it has exported itself (in "
            "best/model, once it is finished) is what was scored, and cannot be made again by this one",
        )


def _is_just_begun(folder: RunFolder) -> bool:
    """Whether a process was killed here before it had written config.yaml."""

    def of_a_start(path: Path) -> bool:
        if path == folder.lock:
            return path.is_file() and _holder(path) is not None
        return _is_half(path, folder.config) or (path == folder.recipe.parent and path.is_dir() and not _entries(path))

    return all(of_a_start(path) for path in folder.path.iterdir())


def _is_half(path: Path, whole: Path) -> bool:
    """Whether a killed process was writing `whole` under this name; see checkpoints.writer. An editor's are others."""
    return re.fullmatch(rf"\.{re.escape(whole.name)}(\.\d+)?", path.name) is not None


def _sweep(folder: RunFolder) -> None:
    """Remove what killed processes left half-written; a model that was just being replaced gets its name back. Only
    for who holds the lock."""
    best = folder.recipe.parent
    recover(folder.model)
    recover(folder.front)
    written = (
        folder.config, folder.history, folder.history_backup, folder.timing, folder.result, folder.picture,
        folder.recipe,
    )  # fmt: skip
    for path in (*_entries(folder.path), *_entries(best)):
        if any(_is_half(path, whole) for whole in written if whole.parent == path.parent):
            _remove(path)
    # Copied to go to winners/ with the rest of best/.
    for file in (folder.result, folder.picture):
        _remove(best / file.name)
    _remove(folder.path / CLEARED)
    steps = sorted((path for path in _entries(folder.checkpoints) if _is_step(path)), key=lambda path: int(path.name))
    for path in {*_entries(folder.checkpoints)} - {*steps[-KEPT_CHECKPOINTS:]}:
        _remove(path)
    for stage in _entries(folder.stages):
        _sweep(RunFolder(stage))


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clear(folder: RunFolder) -> None:
    """Delete what a search wrote, and nothing that a user put beside it. Until the checkpoints go, all at once, the run
    could be continued, its history restored from the backup; afterwards it has not begun."""
    folders = (folder.recipe.parent, folder.winners, folder.stages)
    for path in (folder.result, folder.picture, *folders, folder.timing, folder.history):
        _remove(path)
    if folder.checkpoints.exists():
        folder.checkpoints.rename(folder.path / CLEARED)
    _remove(folder.history_backup)
    _remove(folder.path / CLEARED)


@dataclass(frozen=True)
class EarlierWinner:
    """The winner of a run that had finished before it went on: where it is kept, and what `result.json` said of it."""

    path: Path
    generations: int
    heldout_fitness: float


def read_result(file: Path) -> dict[str, Any] | None:
    """The document of a `result.json`, or None where there is none that can be read."""
    try:
        document = json.loads(read_regular(file, "a JSON file"))
    except (OSError, ValueError, RecursionError):
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


def write_front(folder: RunFolder, recipes: Sequence[str]) -> None:
    """Write the recipe of each member of a front, in place of those that are there, all at once."""
    with atomic_folder(folder.front, overwrite=True) as work:
        for number, recipe in enumerate(recipes, start=1):
            (work / f"member-{number}.yaml").write_text(recipe, encoding="utf-8")


def find_member(folder: RunFolder, number: int) -> Path:
    """The recipe of a member of the front. Raises InputError where there is no such member."""
    file, count = folder.front / f"member-{number}.yaml", len(_entries(folder.front))
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
    found = []
    for path in sorted(folder.winners.glob("*/")):
        result = read_result(path / "result.json") or {"table": []}
        fitness = [row["heldout_fitness"] for row in result["table"] if row["role"] == "winner"]
        found += [EarlierWinner(path, result["generations"], value) for value in fitness]
    return found


def _check_same_config(folder: RunFolder, document: dict[str, Any]) -> None:
    differences = _differences(load_yaml(folder.config), document)
    # Another method is another config, whatever it draws.
    for key, old, new in sorted(differences, key=lambda difference: difference[0] == (RANDOM_NUMBERS,)):
        if key[:2] in EXTENDABLE:
            continue
        if key == (RANDOM_NUMBERS,):
            raise InputError(folder.path, OTHER_MASKS)
        if key[0] == INPUTS and len(key) == 2:
            raise _other_input(folder, key[1], old, new)
        raise InputError(
            folder.config,
            f"belongs to another config: {'.'.join(map(str, key))} differs (it was {_short(old)}, now {_short(new)}); "
            "choose another folder with --out",
        )


def check_inputs(folder: RunFolder) -> None:
    """Raises InputError where a file that a run's scores depend on is no longer what it was."""
    for file, digest in load_yaml(folder.config)[INPUTS].items():
        found = file_hash(Path(file)) if Path(file).is_file() else None
        if found != digest:
            raise _other_input(folder, file, digest, found)


def _other_input(folder: RunFolder, file: str, old: str | None, new: str | None) -> InputError:
    what = "was removed" if new is None else "is new" if old is None else "has changed"
    return InputError(
        folder.config,
        f"belongs to other inputs: {file} {what} since the run was begun (sha256 {_short(old)}, now {_short(new)}); "
        "restore it, or choose another folder with --out",
    )


def _differences(one: Any, other: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Where two documents differ: key by key, and the value that each has there."""
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
# The lock


@contextmanager
def locked(path: Path, *, resume: bool) -> Iterator[None]:
    """The run folder for this process alone, made where it is not there yet. The lock is the operating system's, on the
    file `lock`, and goes with the process however it ends.

    Raises InputError where another process has it, where the folder is none of a run, or holds none to `resume`.
    """
    folder, is_new = RunFolder(path), not path.exists()
    _check_place(folder, resume)
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder)
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        if handle in _held:
            # While it is still locked: nobody else can have taken it.
            folder.lock.unlink(missing_ok=True)
            _held.remove(handle)
            os.close(handle)
            if is_new and not _entries(path):
                with suppress(OSError):
                    path.rmdir()


def check_not_in_use(path: Path) -> None:
    """Raises InputError where another process works in a run folder. One may come afterwards: `locked` keeps it out."""
    folder = RunFolder(path)
    try:
        handle = os.open(folder.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        # Nobody works here, or it is said by `locked` what is wrong with the folder.
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder) from None
    except OSError:
        return
    finally:
        os.close(handle)


def _lock(folder: RunFolder) -> int:
    """The open lock file."""
    while True:
        handle = os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise _in_use(folder) from None
        except OSError as error:
            print_warning(
                f"{folder.path}: this file system knows no locks ({error.strerror}); see to it that no other process "
                "works in this folder"
            )
        # Who held it may have removed it since it was opened.
        if folder.lock.exists() and os.path.samestat(os.fstat(handle), folder.lock.stat()):
            break
        os.close(handle)
    if _holder(folder.lock) is None:
        os.close(handle)
        raise InputError(folder.lock, "is no lock of this program, which needs a file of this name; move it")
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode())
    _held.add(handle)
    return handle


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


# A forked child, which may outlive this process, would have the lock as well.
_held: set[int] = set()
os.register_at_fork(after_in_child=_let_go)


def _in_use(folder: RunFolder) -> InputError:
    for _ in range(50):
        holder = _holder(folder.lock) or b""
        if holder:
            break
        # It has the lock, and is about to write its name into it.
        time.sleep(0.01)
    who = f"process {holder.decode(errors='replace')}" if holder else "another process"
    return InputError(folder.path, f"is in use by {who}; wait until that has ended, or stop it")


def _holder(lock: Path) -> bytes | None:
    """`process id on host` from a lock file, empty where it is not written yet; None: it is something else."""
    try:
        content = lock.read_bytes()
    except OSError:
        return b""
    return content.strip() if not content or LOCK.fullmatch(content) else None


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass(frozen=True)
class Saved:
    """A checkpoint: how many generations are behind it, the state's arrays by path, and the length in bytes and the
    SHA-256 of the history so far."""

    generations: int
    arrays: dict[str, np.ndarray]
    history_length: int
    history_digest: bytes

    def describes(self, generations: int, history: Path) -> bool:
        """Whether so many generations are behind it, and a history is, to the byte, what it was when this was saved."""
        content = history.read_bytes()
        same = len(content) == self.history_length and hashlib.sha256(content).digest() == self.history_digest
        return same and self.generations == generations

    def part(self, name: str) -> "Saved":
        """What was saved of one part of the state, a mapping."""
        return replace(self, arrays={path: own for path, own in self.arrays.items() if path.startswith(f"{name}.")})

    def state(self, like: Any) -> Any:
        """The state, in the structure of `like`, of which an axis of length 0 is one that grows. Raises InputError
        where it is another."""
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

    The length and the digest of the history lie beside the state: a damaged history.jsonl is told, and a resumed one
    never differs. A digest over all tells a damaged checkpoint.
    """

    def __init__(self, folder: RunFolder) -> None:
        import logging

        with defer_signals():
            from orbax.checkpoint import v1 as ocp

        # It reports what cannot be read at length; what matters is raised as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        policy = ocp.training.preservation_policies.LatestN(KEPT_CHECKPOINTS)
        self._folder = folder
        with defer_signals():
            self._checkpointer = ocp.training.Checkpointer(
                folder.checkpoints.resolve(), preservation_policy=policy, cleanup_tmp_directories=True
            )

    def latest(self) -> int | None:
        """How many generations the newest checkpoint has behind it, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, generations: int, state: Any, history_length: int, history_digest: bytes) -> None:
        """Every process has the same state, and all of them call this, with `defer_signals`; one writes."""
        arrays = {f"state.{_name(path)}": np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        arrays["history.length"] = np.asarray(history_length, np.int64)
        arrays["history.digest"] = np.frombuffer(history_digest, np.uint8)
        try:
            with collective():
                self._checkpointer.save_pytree(generations, arrays | {"digest": _digest(arrays)})
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
        """The newest checkpoint that can be read; those that cannot are removed, and that is said. None: there is none
        because nothing was saved yet. Every process of a run calls this.

        Raises InputError where none can be read though there was one, or where an older version wrote it.
        """
        steps = sorted((int(path.name) for path in _entries(self._folder.checkpoints) if _is_step(path)), reverse=True)
        saved, damaged = None, []
        for step in steps:
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
            barrier("read")
            if jax.process_index() == 0:
                for step in damaged:
                    _remove(self._folder.checkpoints / str(step))
            barrier("removed")
            self._checkpointer.reload()
            assert saved is not None
            say(
                f"the checkpoint of generation {damaged[0]} is damaged; "
                f"going on from the one of generation {saved.generations}"
            )
        return saved

    def _load(self, generations: int) -> Saved | None:
        """A checkpoint, or None where it is damaged. Raises InputError where an older version wrote it."""
        try:
            with defer_signals():
                loaded = self._checkpointer.load_pytree(generations)
            arrays = {name: np.asarray(leaf) for name, leaf in loaded.items() if name != "digest"}
            if "digest" in loaded and not np.array_equal(loaded["digest"], _digest(arrays)):
                return None
        except Exception:
            # Whatever its reader makes of bytes that it did not write.
            return None
        if not {"digest", "history.length", "history.digest"} <= loaded.keys():
            raise InputError(self._folder.path, OTHER_VERSION)
        length, digest = int(arrays.pop("history.length")), arrays.pop("history.digest").tobytes()
        state = {name.removeprefix("state."): array for name, array in arrays.items()}
        return Saved(generations, state, length, digest)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        # Closing is done together; it would wait for a process that has gone. It raises again what a save has raised.
        if kind is not PeerLostError:
            with nullcontext() if kind is None else suppress(Exception):
                self._checkpointer.close()


class FolderStorage:
    """A run folder as the place where a search keeps its generations, for one process or several. A generation's line
    stands in the history before its checkpoint is saved, so that the checkpoint can say what it must be."""

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
        return read_lines(self._folder.timing)

    def describe(self, generations: int) -> str:
        if not generations:
            return "it is the first, and nothing is saved"
        return f"the {generations} before it are saved in {self._folder.path}"


def _name(path: tuple[Any, ...]) -> str:
    """The place of a leaf in a pytree of dicts, dataclasses and sequences."""
    return ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)


def _fits(array: np.ndarray, like: Any) -> bool:
    """Whether a saved array is of the dtype and shape of `like`, but for axes that had no length there."""
    expected = np.shape(like)
    same = len(expected) == array.ndim and all(n in (0, own) for n, own in zip(expected, array.shape, strict=True))
    return same and array.dtype == np.asarray(like).dtype


def _digest(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """SHA-256 of arrays with their names, uint8[32]."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
