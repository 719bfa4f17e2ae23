"""The lock of a run folder, in which one process works at a time: an operating system's lock on the file `lock`, which
is released however the process ends."""

import fcntl
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

from evojax_merge.errors import InputError, print_warning
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.system.file_system import remove_file

LONGEST = 1000
LOCK = re.compile(rb"(\d+) on (\S+)\n")


def check_not_in_use(path: Path) -> None:
    """Raises InputError where another process works in a run folder; `locked` keeps one out that starts afterwards."""
    folder = RunFolder(path)
    try:
        handle = os.open(folder.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        # No process works in the folder, or `locked` reports its fault.
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder) from None
    except OSError:
        return
    finally:
        os.close(handle)


def acquire(folder: RunFolder) -> int:
    """The open lock file. Raises InputError where another process has the lock, or another kind of file its name."""
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
        # The process that held the lock may have removed the file since it was opened.
        if folder.lock.exists() and os.path.samestat(os.fstat(handle), folder.lock.stat()):
            break
        os.close(handle)
    if holder(folder.lock) is None:
        os.close(handle)
        raise InputError(folder.lock, "is no lock of this program, which needs a file of this name; move it")
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        # Other hosts read it while the file is open.
        os.fsync(handle)
    except OSError:
        os.close(handle)
        raise
    _held.add(handle)
    return handle


def release(folder: RunFolder, handle: int) -> None:
    """Release the lock, where this process still has it."""
    if handle in _held:
        # The file is removed before the lock is released: no other process can have taken the lock.
        # On a disk that has become read-only it stays, and locks nobody out.
        with suppress(OSError):
            remove_file(folder.lock)
        _held.remove(handle)
        os.close(handle)


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


# A forked child, which may outlive this process, would hold the lock as well.
_held: set[int] = set()
os.register_at_fork(after_in_child=_let_go)


def _in_use(folder: RunFolder) -> InputError:
    for _ in range(50):
        name = holder(folder.lock) or b""
        if name:
            break
        # The other process has the lock, and is about to write its id into the file.
        time.sleep(0.01)
    who = f"process {name.decode(errors='replace')}" if name else "another process"
    return InputError(folder.path, f"is in use by {who}; wait until that has ended, or stop it")


def holder(lock: Path) -> bytes | None:
    """`process id on host` from a lock file, empty where it is not written yet; None: the file holds something else."""
    if lock.exists() and not lock.is_file():
        return None
    try:
        with lock.open("rb") as handle:
            content = handle.read(LONGEST)
    except OSError:
        return b""
    return content.strip() if not content or LOCK.fullmatch(content) else None
