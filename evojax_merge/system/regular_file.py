"""Checks of files of strangers: what they name lies inside of their folder, and they are regular files, since reading a
pipe would wait, and reading a device would never end."""

import io
import os
import re
import shutil
import stat
from pathlib import Path, PurePosixPath

from evojax_merge.errors import InputError, escaped, shown

# The beginning of a pointer of Git LFS.
LFS_MARK = b"version https://git-lfs.github.com/spec/v1"

# What compressed arrays may take in memory: this, or so many times the bytes of their files where that is more. Arrays
# of zeros compress a thousandfold, and random numbers not at all.
MAX_UNPACKED, MAX_RATIO = 4 * 2**30, 20

# The bytes of a tokenizer's file, or of settings, that are copied: the largest have some 40 MB.
MAX_COPIED = 2**30
# The maximum of a file name's bytes in file systems.
MAX_NAME_BYTES = 255

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def file_inside(where: object, folder: Path, name: object, *, plain: bool = False, advice: str = "") -> Path:
    """The path of what a file calls `name`, in `folder`. where: the place of the name in messages; plain: whether it
    has no folder before it; advice: the end of the message. Links are followed: the hub's cache is made of them.

    Raises InputError unless the name is a relative path that stays inside of the folder on every system.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if (
        not isinstance(name, str) or not parts or (plain and name != parts[0]) or "\\" in name or escaped(name) != name
        or name.startswith(("/", "~")) or re.match("[A-Za-z]:", name)
        or any(part == ".." or len(part.encode()) > MAX_NAME_BYTES for part in parts) or len(name) > 4 * MAX_NAME_BYTES
    ):  # fmt: skip
        what = "a plain name" if plain else "a plain path"
        raise InputError(where, f"{shown(name)} lies outside of its folder; expected {what} inside of {folder}{advice}")
    return folder / name


def check_regular(path: Path, expected: str) -> int:
    """The size of a regular file, or of a link's target. `expected`: the name of such a file in messages ("a JSON
    file"). Raises InputError where anything else is in its place, and the error of `Path.stat` where nothing is."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "something else")
        raise InputError(path, f"is no regular file but {kind}; expected {expected}")
    return status.st_size


def open_regular(path: Path, expected: str) -> io.BufferedReader:
    """Open a regular file for reading. Raises as `check_regular` does."""
    check_regular(path, expected)
    return path.open("rb")


def check_no_pointer(file: Path) -> None:
    """Raises InputError for a pointer of Git LFS, which stands for a file that was not fetched."""
    with open_regular(file, "a data file") as handle:
        if handle.read(len(LFS_MARK)) == LFS_MARK:
            raise InputError(file, "is a pointer of Git LFS and not the file itself; run `git lfs pull`")


def read_regular(path: Path, expected: str, max_bytes: int | None = None, *, or_pipe: bool = False) -> bytes:
    """The content of a regular file, or, with `or_pipe`, of whatever is in its place. Raises InputError where it has
    more than `max_bytes`, and as `check_regular` does."""
    with path.open("rb") if or_pipe else open_regular(path, expected) as handle:
        # Python reserves as many bytes as are asked for. Files of the kernel report a size of 0, and may have no end.
        size = os.fstat(handle.fileno()).st_size
        content = handle.read(-1 if max_bytes is None else min(size, max_bytes) + 1)
        if max_bytes is not None and len(content) > size:
            content += handle.read(max_bytes + 1 - len(content))
    if max_bytes is not None and len(content) > max_bytes:
        size = max(path.stat().st_size, len(content))
        raise InputError(path, f"has {size:,} bytes; expected {expected} of at most {max_bytes:,}")
    return content


def check_unpacked(path: Path, unpacked: int, packed: int) -> None:
    """Raises InputError where arrays of a file or folder would take far more memory than it has bytes. unpacked: their
    bytes in memory; packed: the bytes on the disk."""
    if unpacked > max(MAX_UNPACKED, MAX_RATIO * packed):
        raise InputError(
            path, f"has {packed:,} bytes that unpack to {unpacked:,}; expected at most {MAX_UNPACKED:,}, or "
            f"{MAX_RATIO} times its own bytes"
        )  # fmt: skip


def lines_of(path: Path, expected: str, max_bytes: int, *, or_pipe: bool = False) -> tuple[list[bytes], bytes]:
    """The lines of a file, without their ends, and what follows the last end. A line feed alone ends a line: texts in
    JSON may hold the other line ends of Unicode. Raises as `read_regular` does."""
    *lines, rest = read_regular(path, expected, max_bytes, or_pipe=or_pipe).split(b"\n")
    return lines, rest


def copy_regular(source: Path, target: Path, expected: str) -> None:
    """Copy a regular file. Raises InputError for one of more than `MAX_COPIED` bytes, and as `check_regular` does."""
    size = check_regular(source, expected)
    if size > MAX_COPIED:
        raise InputError(source, f"has {size:,} bytes; expected {expected} of at most {MAX_COPIED:,}")
    shutil.copyfile(source, target)


def check_model_folder(folder: Path) -> None:
    """Raises InputError where a model's folder holds a pipe, a socket or a device: the libraries that read a folder
    open anything with the name of a file that they look for."""
    for place in (folder, folder / "chat_templates"):
        for entry in sorted(place.iterdir()) if place.is_dir() else ():
            if entry.exists() and not entry.is_dir():
                check_regular(entry, "a file of a model")
