"""The host memory that a process may still take, and the errors that show that it has run out. Imports errors alone.

A process in a container is killed at the limit of its control group, whatever the machine has free.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from evojax_merge.errors import InputError

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Per version of control groups: the files with a limit, the file with the usage, and the line of memory.stat with the
# pages of files in it, which the kernel gives back before it kills.
CGROUP_FILES = {
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}
# Messages of XLA's CPU backend, its libraries and the C++ runtime where memory has run out; an address space that is
# limited (ulimit -v) shows in the last three.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "bad_alloc", "YNNPACK operation failed",
                 "Cannot allocate memory", "failed to allocate")  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory has run out."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes that this process can still take: the memory that the machine has free or can free, within the limits of
    the control groups that the process is in and of its address space (`ulimit -v`)."""
    return max(0, min(_machine(proc), _address_space(proc), *_groups(proc, cgroups)))


def require_memory(where: object, what: str, nbytes: int, available: int) -> None:
    """Raises InputError where `what` takes more memory than there is, with both figures."""
    if nbytes > available:
        raise InputError(
            where, f"{what} takes {format_bytes(nbytes)} of memory, but {format_bytes(available)} are available"
        )


def format_bytes(nbytes: int) -> str:
    """A number of bytes in a message."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def _machine(proc: Path) -> int:
    try:
        fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text(encoding="ascii").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _address_space(proc: Path) -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return 2**62
    try:
        pages = int((proc / "self" / "statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return limit
    return limit - pages * os.sysconf("SC_PAGE_SIZE")


def _groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """The bytes that each control group with a limit leaves, from the process's own up to the root; in a container the
    files of its own group lie at the root."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        number, _, fields = line.partition(":")
        controllers, _, path = fields.partition(":")
        if number == "0" and not controllers:
            version, root = 2, cgroups
        elif "memory" in controllers.split(","):
            version, root = 1, cgroups / "memory"
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            yield from _left(folder, version)
            if folder == root:
                break


def _left(folder: Path, version: int) -> Iterator[int]:
    limits, usage, freeable = CGROUP_FILES[version]
    used = _integer(folder / usage)
    if used is None:
        return
    try:
        rows = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        used -= next((int(row[1]) for row in rows if row[0] == freeable), 0)
    except (OSError, ValueError, IndexError):
        pass
    for name in limits:
        limit = _integer(folder / name)
        if limit is not None:
            yield limit - used


def _integer(path: Path) -> int | None:
    """The number in a file; None where there is none, or `max`."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
