"""Checkpoints of a run: the state of a search after its generations, and the history that goes with it."""

import errno
import hashlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.config.search_config import KeepConfig
from evojax_merge.errors import Failed, InputError, PeerLostError, cannot_write
from evojax_merge.evaluation.devices import collective, concerns_lost_peer
from evojax_merge.evaluation.peers import MEETING, exchange
from evojax_merge.search.loop import INIT_KEY, generation_key
from evojax_merge.search.protocols import Space, State, Strategy
from evojax_merge.search.recording import Storage
from evojax_merge.search.run_folder import OTHER_VERSION
from evojax_merge.search.run_parts import CHECKPOINT_MARK, RunFolder, check_removable_step, prune
from evojax_merge.search.run_schema import A_FILE, MAX_FILE, HistoryLine, read_lines
from evojax_merge.system.file_system import atomic_write, remove_folder
from evojax_merge.system.interrupts import defer_signals
from evojax_merge.system.regular_file import check_unpacked, read_regular

# The share of a search's time that may go into checkpoints.
SAVING_SHARE = 0.1


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


@dataclass(frozen=True)
class Saved:
    """A checkpoint: its generations, the state's arrays by path, and the bytes and SHA-256 of the history so far."""

    generations: int
    arrays: dict[str, np.ndarray]
    history_length: int
    history_digest: bytes

    def part(self, like: dict[str, Any]) -> dict[str, Any]:
        """The state's entries of the names that `like` has, in its structure (see `state`)."""
        arrays = {path: array for path, array in self.arrays.items() if path.partition(".")[0] in like}
        entries: dict[str, Any] = replace(self, arrays=arrays).state(like)
        return entries

    def strategy_state(self, seed: int, strategy: Strategy, space: Space) -> State:
        """The strategy's state. Raises InputError where another strategy saved the checkpoint."""
        return self.part({"strategy": strategy.init(generation_key(seed, INIT_KEY), space.start[None])})["strategy"]

    def best(self, dims: int) -> tuple[np.ndarray, float]:
        """The best candidate so far: its genome float32[dims] and its fitness, -inf where none is known. Raises
        InputError where the saved genomes are of another length."""
        state = self.part({"genomes": np.zeros((0, dims), np.float32), "fitness": np.zeros(0)})
        if not len(state["genomes"]) == len(state["fitness"]) > 0 or not np.isfinite(state["genomes"][0]).all():
            raise InputError("checkpoints", OTHER_VERSION)
        return state["genomes"][0], float(state["fitness"][0])

    def state(self, like: Any) -> Any:
        """The state, in the structure of `like`, in which an axis of length 0 stands for one that grows. Raises
        InputError where the saved structure is another."""
        paths, structure = jax.tree_util.tree_flatten_with_path(like)
        leaves = []
        for path, leaf in paths:
            array, shape = self.arrays.get(_name(path)), np.shape(leaf)
            if (
                array is None or array.dtype != np.asarray(leaf).dtype or array.ndim != len(shape)
                or any(length not in (0, size) for length, size in zip(shape, array.shape, strict=True))
            ):  # fmt: skip
                raise InputError("checkpoints", OTHER_VERSION)
            leaves.append(jnp.asarray(array) if isinstance(leaf, jax.Array) else array)
        if len(leaves) != len(self.arrays):
            raise InputError("checkpoints", OTHER_VERSION)
        return jax.tree.unflatten(structure, leaves)


# Orbax's saves of several threads get into each other's folders.
_SAVING = threading.Lock()


def _without_closed_loops(unraisable: Any) -> None:
    """Print an exception that nobody could catch, but those of tensorstore's threads: each write that fails beside the
    one that orbax raises finds orbax's event loop closed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class Checkpoints:
    """The state after generations. A process killed in the middle of a save leaves the last one intact.

    The length and the digest of the history lie beside the state: a damaged history.jsonl is noticed, and a resumed one
    never differs. A digest over all arrays shows that a checkpoint is damaged. `keep`: the checkpoints that stay once
    another is saved.
    """

    def __init__(self, folder: RunFolder, keep: KeepConfig = KeepConfig()) -> None:  # noqa: B008
        with defer_signals():
            from orbax.checkpoint import v1 as ocp

        # Orbax logs at length about files that it cannot read; whatever matters is raised as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._folder, self._keep, self._orbax = folder, keep, ocp

    def save(self, generations: int, state: Any, history_length: int, history_digest: bytes) -> None:
        """Save a checkpoint. Every process has the same state and calls this, with `defer_signals`; one writes."""
        arrays = {f"state.{_name(path)}": np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        arrays["history.length"] = np.asarray(history_length, np.int64)
        arrays["history.digest"] = np.frombuffer(history_digest, np.uint8)
        try:
            with _SAVING, collective():
                usual, sys.unraisablehook = sys.unraisablehook, _without_closed_loops
                # Orbax would also delete: entries of the folder that look unfinished or old to it, whoever made them.
                self._orbax.save(
                    self._folder.step(generations).resolve(),
                    arrays | {"digest": digest_of(arrays)},
                    custom_metadata=CHECKPOINT_MARK,
                )
                # After a failure the rest of the writes end later.
                sys.unraisablehook = usual
            if jax.process_index() == 0:
                prune(self._folder, self._keep)
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
            exchange({}, "the reading of checkpoints", MEETING)
            if jax.process_index() == 0:
                for step in damaged:
                    remove_folder(self._folder.step(step))
            exchange({}, "the removal of damaged checkpoints", MEETING)
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
            if "digest" in loaded and not np.array_equal(loaded["digest"], digest_of(arrays)):
                return None
        except InputError:
            raise
        except Exception as error:
            if concerns_lost_peer(error):
                raise PeerLostError from error
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


class FolderStorage(Storage):
    """Keeps a search's generations in a run folder, for one process or several. A generation's line stands in the
    history before its checkpoint is saved, so that the checkpoint can hold the history's digest.

    The first and the last generation have a checkpoint, and of the others as many as can be saved in a tenth of the
    time: where a generation takes milliseconds, a killed run makes some again. Several processes save each, since
    their clocks differ."""

    def __init__(self, folder: RunFolder, checkpoints: Checkpoints, *, is_main_process: bool = True) -> None:
        self._folder, self._checkpoints, self._is_main_process = folder, checkpoints, is_main_process
        self._length, self._digest = 0, hashlib.sha256()
        self._unsaved: tuple[int, Any, int, bytes] | None = None
        self._due = 0.0

    def restore(self, like: Any, log: Callable[[str], None]) -> tuple[Any, int]:
        saved = self._checkpoints.restore(log)
        state, generations = (like, 0) if saved is None else (saved.state(like), saved.generations)
        if self._is_main_process:
            empty = 0, hashlib.sha256().digest()
            history = empty if saved is None else (saved.history_length, saved.history_digest)
            restore_history(self._folder, *history, log)
            if self._folder.timing.exists():
                # Nothing depends on these lines but when `search.stop.seconds` are over.
                rows = [row for row in self._folder.read_timing() if row["generation"] <= generations]
                atomic_write(self._folder.timing, "".join(map(to_line, rows)))
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
                append_line(self._folder.timing, to_line(timing))
            self._unsaved = generation, state, self._length, self._digest.digest()
            if jax.process_count() > 1 or time.monotonic() >= self._due:
                self.close()

    def close(self) -> None:
        """Save the checkpoint of the latest generation where it has none yet."""
        if self._unsaved is None:
            return
        started, unsaved, self._unsaved = time.monotonic(), self._unsaved, None
        with defer_signals():
            self._checkpoints.save(*unsaved)
        ended = time.monotonic()
        self._due = ended + (1 / SAVING_SHARE - 1) * (ended - started)

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


def digest_of(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """SHA-256 of arrays with their names, uint8[32]."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
