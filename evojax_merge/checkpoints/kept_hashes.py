"""Hashes of large files, kept in the user's cache folder: models of terabytes are not read at every start.

A file is known by what its file system says of it, as git knows those of a work tree: device, inode, size, and the
times of its content and of its entry. No program sets the latter back.
"""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from evojax_merge.checkpoints.folder import file_hash
from evojax_merge.errors import InputError
from evojax_merge.system.data_packages import cache_folder
from evojax_merge.system.kept_files import write_plain
from evojax_merge.system.regular_file import read_regular

# Bytes of a file from which on its hash is kept; the most hashes, the latest ones, and the bytes of the file of them.
LEAST_BYTES, MAX_HASHES, MAX_BYTES = 2**20, 20_000, 2**22
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# Nanoseconds for which a file has to be unchanged: within a clock's tick a second change would leave no trace.
SETTLED = 2 * 10**9


def file_hashes(paths: Sequence[Path]) -> dict[str, str]:
    """sha256 of files by path, hexadecimal. A large file that has not changed since it was hashed is not read again."""
    kept, fresh = _read(), dict[str, str]()

    def hashed(path: Path) -> str:
        before = _identity(path)
        if before in kept:
            return kept[before]
        digest = file_hash(path)
        if before is not None and _identity(path) == before:
            fresh[before] = digest
        return digest

    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(map(str, paths), pool.map(hashed, paths), strict=True))
    if fresh:
        latest = list((_read() | fresh).items())[-MAX_HASHES:]
        write_plain(_file(), f"{json.dumps(dict(latest), indent=0)}\n".encode())
    return hashes


def _identity(path: Path) -> str | None:
    """The file system's account of a large file that has not changed lately; None for any other."""
    status = os.stat(path)
    if status.st_size < LEAST_BYTES or time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < SETTLED:
        return None
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _read() -> dict[str, str]:
    try:
        return TypeAdapter(dict[str, Digest]).validate_json(read_regular(_file(), "hashes of files", MAX_BYTES))
    except (OSError, ValidationError, InputError):
        return {}


def _file() -> Path:
    return cache_folder() / "hashes.json"
