"""Files that the program keeps for itself in the user's cache folder: the first line is the SHA-256 of what follows it,
so that one that is damaged is as good as missing."""

from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from evojax_merge.errors import Failed, InputError
from evojax_merge.system.file_system import atomic_write_bytes, make_folder, remove_link
from evojax_merge.system.regular_file import read_regular

# The bytes of the first line.
HEAD = 65


def read_kept(file: Path, max_bytes: int) -> bytes | None:
    """The content of a kept file; None where it is missing, damaged, something else, or has more than `max_bytes`."""
    try:
        content = read_regular(file, "a kept file", HEAD + max_bytes)
    except (OSError, InputError):
        return None
    head, rest = content[:HEAD], content[HEAD:]
    return rest if head == _head(rest) else None


def keep(file: Path, content: bytes) -> None:
    """Keep a file, if its folder can be written."""
    write_plain(file, _head(content) + content)


def write_plain(file: Path, content: bytes) -> None:
    """Keep a file without the first line, for those that people read as well. A link makes way for it."""
    with suppress(OSError, Failed, InputError):
        make_folder(file.parent)
        remove_link(file)
        atomic_write_bytes(file, content)


def _head(content: bytes) -> bytes:
    return sha256(content).hexdigest().encode() + b"\n"
