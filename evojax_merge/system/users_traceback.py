"""The traceback of an exception that a user's own function raises, without the frames of this program and of JAX."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from evojax_merge.errors import Failed, InputError

# Packages whose frames say nothing to the author of a function that they call, beside this one.
_HIDDEN = ("merge_kernels", "jax", "jaxlib", "click", "contextlib", "concurrent", "threading", "pathlib", "shutil")


class WrongResultError(Failed):
    """A user's own function returned something else than its caller takes."""


def hide_inner_frames(error: BaseException) -> bool:
    """Leave only the user's frames in the traceback of an error that the user's own function raised, itself or in a
    library that it called, or that its result or an argument is, and in that of its cause. Return whether it did; the
    traceback of an error of this program stays whole, and so does every one with JAX_TRACEBACK_FILTERING=off."""
    if os.environ.get("JAX_TRACEBACK_FILTERING") == "off":
        return False
    cause_is_users = error.__cause__ is not None and hide_inner_frames(error.__cause__)
    entries = list(_entries(error.__traceback__))
    ours = f"{Path(__file__).parents[1]}{os.sep}"
    hidden = tuple(_place(name) for name in _HIDDEN if name in sys.modules)

    def file_of(entry: TracebackType) -> str:
        return entry.tb_frame.f_code.co_filename

    inner = [number for number, entry in enumerate(entries) if file_of(entry).startswith(ours)]
    users = [n for n, entry in enumerate(entries) if n not in inner and not file_of(entry).startswith(hidden)]
    raised_by_user = isinstance(error, WrongResultError | InputError) or (
        bool(inner and users) and users[-1] > inner[-1]
    )
    if not raised_by_user and not cause_is_users:
        return False
    kept: TracebackType | None = None
    for number in reversed(users):
        entry = entries[number]
        kept = TracebackType(kept, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    error.__traceback__ = kept
    return True


def _entries(entry: TracebackType | None) -> Iterator[TracebackType]:
    while entry is not None:
        yield entry
        entry = entry.tb_next


def _place(name: str) -> str:
    """The start of the paths of an imported package's files, or the file of a module."""
    file = Path(str(sys.modules[name].__file__))
    return f"{file.parent}{os.sep}" if file.stem == "__init__" else str(file)
