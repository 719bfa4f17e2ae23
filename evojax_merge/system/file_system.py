"""Files and folders that appear complete or not at all, and all that this program deletes, renames or replaces.

No other module deletes, renames or replaces files. No function of this module follows a link in order to delete: a
caller that may delete in the folder that a link leads to resolves the link first, and names the program's own files in
that folder.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from evojax_merge.errors import InputError, cannot_write

# Marks in hidden names beside a file or folder: of the content that will take its name, of the content that had the
# name and may get it back, and of a folder that is being deleted.
NEW, OLD, GONE = ".evojax-merge-new.", ".evojax-merge-old.", ".evojax-merge-gone."
_RANDOM = "[0-9a-z_]{8}"
# The beginning of a file by which this program recognises what it wrote.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
MOST_READ = 2**26


def resolved(path: Path) -> Path:
    """The path without links, and with a name in place of `.` or the like."""
    return Path(os.path.realpath(path))


def is_real_folder(path: Path) -> bool:
    """Return whether a path is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


@cache
def code_digest(package: Path) -> str:
    """sha256, hexadecimal, of the Python files in a package's folder."""
    digest = sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _hidden_name(path: Path, mark: str) -> Path:
    return path.with_name(f".{path.name}{mark}{secrets.token_hex(4)}")


# ---------------------------------------------------------------------------------------------------------------
# Files


def regular_file(path: Path) -> Path:
    """The place where a file is, or will be, once links are followed. Raises InputError where it cannot be replaced by
    another file: a folder, pipe, socket or device, an open file of a process (/dev/stdout), a link that leads
    nowhere."""
    place = path
    for _ in range(40):
        above = resolved(place.parent)
        # A link below /proc leads to a file that a process has open.
        if Path("/proc") in (above, *above.parents):
            raise InputError(path, "is no regular file; expected the name of a file")
        if not place.is_symlink():
            break
        place = place.parent / os.readlink(place)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(path, "is a link that leads nowhere; remove it or choose another name") from None
    except OSError as error:
        raise cannot_write(path, error) from None
    else:
        if stat.S_ISDIR(mode):
            raise InputError(path, "is a folder; expected the name of a file")
        if not stat.S_ISREG(mode):
            raise InputError(path, "is no regular file; expected the name of a file")
    return resolved(path)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the name of a new file, which takes the place of `path` when the block ends without an error, and vanishes
    otherwise. A link stays, and leads to the new file."""
    place = regular_file(path)
    work = _hidden_name(place, NEW)
    try:
        yield work
        os.replace(work, place)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        # Its disk may have become read-only.
        with suppress(OSError):
            work.unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Write a text file that is either the old one or the complete new one."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either the old one or the complete new one."""
    with atomic_file(path) as work:
        work.write_bytes(content)


def may_replace(path: Path, is_own: Callable[[bytes], object]) -> bool:
    """Return whether there is no file of a name, or one that is empty or that this program wrote, as `is_own` tells
    from its first MOST_READ bytes. Raises InputError where the file cannot be replaced by another file."""
    place = regular_file(path)
    try:
        with place.open("rb") as handle:
            content = handle.read(MOST_READ)
        return not content or bool(is_own(content))
    except FileNotFoundError:
        return True
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        # It is not in the format of the file that would take its place.
        return False


def holds_json(content: bytes, keys: Collection[str], *, in_list: bool = False) -> bool:
    """Return whether a file's content is a JSON object with these keys, or, `in_list`, a list of such objects."""
    document = json.loads(content)
    rows = document if in_list else [document]
    is_filled = isinstance(rows, list) and len(rows) > 0
    return is_filled and all(isinstance(row, dict) and row.keys() >= set(keys) for row in rows)


@dataclass(frozen=True)
class OutputFile:
    """A file that a command writes under a name of the user's. `option`: the name's option, in messages; `is_not`: what
    any other file is not, in messages; `is_own`: recognises what this program wrote (see `may_replace`)."""

    path: Path
    option: str
    is_not: str
    is_own: Callable[[bytes], object]

    def check(self) -> None:
        """Raises InputError where the file cannot be written, or would replace one that this program did not write."""
        check_local(self.path)
        try:
            work = _hidden_name(regular_file(self.path), NEW)
            work.touch()
            work.unlink()
            self._check_own()
        except (InputError, OSError) as error:
            what = error.what if isinstance(error, InputError) else f"cannot be written ({error.strerror})"
            raise InputError(self.path, f"{self.option}: {what}" if self.option else what) from None

    def write(self, content: str | bytes) -> None:
        """Write the file. Raises InputError where another one has got its name since the check."""
        self._check_own()
        atomic_write_bytes(self.path, content.encode("utf-8") if isinstance(content, str) else content)

    def _check_own(self) -> None:
        if not may_replace(self.path, self.is_own):
            raise InputError(self.path, f"exists, and {self.is_not} of evojax-merge; move it or choose another name")


def check_outputs(outputs: Sequence[OutputFile | None], others: Mapping[str, Path], made: Path | None = None) -> None:
    """Raises InputError, before any work, where a file must not be written (see `OutputFile.check`), is that of another
    output, or is one of `others`, files that the command reads or writes itself, by their names in messages. A None
    was not asked for. `made`: a folder that the command makes where it is missing."""
    names = {resolved(path): name for name, path in others.items()}
    for output in filter(None, outputs):
        place = resolved(output.path)
        if place in names:
            what = f"is the file of {names[place]} as well; choose another name"
            raise InputError(output.path, f"{output.option}: {what}")
        names[place] = output.option
        if made is None or place.parent != resolved(made) or made.exists():
            output.check()


def remove_file(file: Path) -> None:
    """Remove a regular file, if it is there. A link, folder, pipe, socket or device stays."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISREG(os.lstat(file).st_mode):
            os.unlink(file)


def remove_link(link: Path) -> None:
    """Remove a link, if there is one; what it leads to stays."""
    if link.is_symlink():
        link.unlink()


# ---------------------------------------------------------------------------------------------------------------
# Folders


def make_folder(folder: Path) -> None:
    """Make a folder where there is none, and those above it. Raises as `atomic_file` does where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None


def remove_folder(folder: Path) -> None:
    """Remove a folder with its content; the caller has made the folder or has checked that it is the program's own.
    Under its name the folder is whole or gone. Raises OSError for a link; links inside are removed, and their targets
    stay."""
    if folder.is_symlink():
        raise NotADirectoryError(None, "is a link", str(folder))
    work = _hidden_name(folder, GONE)
    os.rename(folder, work)
    shutil.rmtree(work)


def remove_empty_folder(folder: Path) -> None:
    """Remove a folder that holds nothing; any other, and a link, stays."""
    with suppress(OSError):
        folder.rmdir()


def is_unfinished(path: Path, file: Path) -> bool:
    """Return whether `path` is the name under which a killed process was writing `file`."""
    return re.fullmatch(rf"\.{re.escape(file.name)}{re.escape(NEW)}{_RANDOM}", path.name) is not None


def remove_leftovers(folder: Path, files: Sequence[Path] = ()) -> None:
    """Remove what killed processes left in a folder: folders that they were deleting, and unfinished versions of these
    files."""
    for path in [*folder.iterdir()] if folder.is_dir() else ():
        if re.fullmatch(rf"\..+{re.escape(GONE)}{_RANDOM}", path.name) and is_real_folder(path):
            shutil.rmtree(path)
        elif any(is_unfinished(path, file) for file in files):
            remove_file(path)


def link_or_copy(source: str, target: str) -> None:
    """Give a file a second name; where its disk cannot, copy it."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a new folder beside `target` that takes its name when the block ends without an error, and vanishes
    otherwise.

    Raises InputError for an existing `target`; with `overwrite`, moves it aside once the new folder is complete and
    removes it once the new folder has its name. A link stays, and its target is replaced. `check` is called before the
    block and before anything is moved, and raises an exception to forbid it. Folders that a killed process left of a
    former call are put back or removed.
    """
    place = resolved(target)
    recover(target)
    check_free(target, overwrite)
    check()
    with hidden_folder(target) as work:
        yield work
        # A library makes files for their owner alone; links of other files keep their mode.
        for file in work.rglob("*"):
            status = file.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and stat.S_IMODE(status.st_mode) == 0o600:
                file.chmod(0o644)
        if place.exists():
            # Else a power failure could take both.
            flush(work)
        with _locked(place.parent):
            check_free(target, overwrite)
            check()
            _swap(work, place)
    recover(target)


@contextmanager
def hidden_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, under a hidden name, which vanishes when the block ends unless it was
    renamed. `recover` removes a folder that a killed process leaves."""
    place = resolved(target)
    missing = [path for path in (place.parent, *place.parent.parents) if not os.path.exists(path)]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place.parent):
            work = Path(tempfile.mkdtemp(prefix=f".{place.name}{NEW}", dir=place.parent))
            owner = _lock(work)
        work.chmod(0o755)
    except OSError as error:
        for folder in missing:
            remove_empty_folder(folder)
        raise InputError(target, f"cannot be written ({error.strerror})") from None
    try:
        yield work
    except OSError as error:
        raise cannot_write(target, error, "; nothing was left behind") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for folder in missing:
            remove_empty_folder(folder)
        if owner is not None:
            os.close(owner)


def check_local(path: Path) -> None:
    """Raises InputError for the address of an object store: a folder of that name would be made on this machine."""
    if _ADDRESS.match(str(path)):
        raise InputError(path, "is an address; expected a path on this machine, from which the result can be copied")


def check_free(target: Path, overwrite: bool) -> None:
    """Raises InputError where `target` exists, unless it is a folder and `overwrite` is set, and where it cannot be
    made."""
    check_local(target)
    if os.path.exists(target):
        if not os.path.isdir(target):
            raise InputError(target, "is a file; expected a folder name")
        if not overwrite:
            raise InputError(target, "exists already; choose another folder or pass --overwrite")
    elif os.path.islink(target):
        raise InputError(target, "is a link that leads nowhere; remove it or choose another folder")
    else:
        above = next(path for path in resolved(target).parents if os.path.exists(path))
        if not os.path.isdir(above):
            raise InputError(target, f"cannot be written ({above} is a file)")
        if not os.access(above, os.W_OK | os.X_OK):
            raise InputError(target, f"cannot be written ({above} is not writable for you)")


def _swap(work: Path, place: Path) -> None:
    """Give `work` the name `place`. A former folder of that name is moved aside, and moved back where this fails."""
    if not place.exists():
        os.rename(work, place)
        return
    old = _hidden_name(place, OLD)
    os.rename(place, old)
    try:
        os.rename(work, place)
    except BaseException:
        os.rename(old, place)
        raise


def recover(target: Path) -> None:
    """Put back, or remove, the folders that a process left beside `target` when it was killed while writing.

    A folder that a running process is writing is locked, and stays.
    """
    place = resolved(target)
    half = re.compile(rf"\.{re.escape(place.name)}({re.escape(OLD)}|{re.escape(NEW)}){_RANDOM}")
    try:
        with _locked(place.parent):
            for left in sorted(place.parent.iterdir()):
                match = half.fullmatch(left.name)
                if match is None or not is_real_folder(left):
                    continue
                if match[1] == OLD and not os.path.lexists(place):
                    # Killed between the two steps of a swap.
                    os.rename(left, place)
                    continue
                lock = _lock(left)
                if lock is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(lock)
    except OSError:
        # A folder that is missing, or that this process may not change: the code that writes into it raises the error.
        return


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make other processes that create, swap or clean up in this folder wait; does nothing where the folder cannot be
    locked."""
    with ExitStack() as stack:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def is_writable(folder: Path) -> bool:
    """Return whether a small file can be written into a folder: its disk is neither full nor read-only."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=NEW) as file:
            file.write(bytes(2**14))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return False
    return True


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block; the others wait. folder: made where it is missing, and left."""
    make_folder(folder)
    with _locked(folder):
        yield


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds the folder's lock, which ends with the process; None where another has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def flush(folder: Path) -> None:
    """Wait until the content of a folder's files is on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
