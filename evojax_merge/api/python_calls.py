"""Shared parts of the public functions: how they read arguments, speak to a Python program, and warn it."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from datetime import date, datetime
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.errors import InputError, in_python_words, shown
from evojax_merge.evaluation.compilations import keep_compiled_programs
from evojax_merge.system.console import console
from evojax_merge.system.jax_environment import SETTINGS
from evojax_merge.system.users_traceback import hide_inner_frames
from evojax_merge.tasks.python_functions import reference_to
from evojax_merge.tasks.python_trees import PythonTree

Location = str | PathLike[str]


class PythonCall(AbstractContextManager[None]):
    """The body of a public function. Compiled programs are kept, progress bars show on terminals alone, messages name
    arguments in place of options, warnings are Python warnings, JAX has the program's `SETTINGS`, and the traceback of
    a user's own function has the user's frames alone. given: the warnings that the program has had already, to which
    the body's are added."""

    def __init__(self, given: set[str] | None = None) -> None:
        self._given = given

    def __enter__(self) -> None:
        keep_compiled_programs()
        self._was_quiet, self._entered = console.quiet, ExitStack()
        console.quiet = console.quiet or not console.is_terminal
        self._entered.enter_context(in_python_words(self._given))
        for name, value in SETTINGS.items():
            self._entered.enter_context(getattr(jax, name)(value))

    # No generator with `contextmanager`: that one would restore the traceback.
    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._entered.__exit__(kind, error, traceback)
        console.quiet = self._was_quiet
        if error is not None:
            hide_inner_frames(error)


def as_path(location: Location) -> Path:
    """A file or folder that the program names; `~` is the home folder, as in configs."""
    return Path(os.path.expanduser(location))


def ignore(line: str) -> None:
    """Drop a line that a command prints beside its result."""


def plain_data(where: str, value: Any) -> Any:
    """A document of mappings, lists, numbers, texts and paths as the plain data that YAML would give for it. A
    reference (tasks.python_functions, tasks.python_trees) stands for a function or a pytree where a config names one.
    Raises InputError for anything else, and for a document that holds itself."""
    try:
        return _plain(where, value)
    except RecursionError:
        raise InputError(where, "is nested too deeply, or in itself; expected what YAML can say") from None


def _plain(where: str, value: Any, separator: str = ": ") -> Any:
    if isinstance(value, Mapping):
        named = {key: reference_to(v) if key == "function" and callable(v) else v for key, v in value.items()}
        return {_plain_scalar(where, key): _plain(f"{where}{separator}{key}", item, ".") for key, item in named.items()}
    if type(value) is set:
        return {_plain_scalar(where, item) for item in value}
    if isinstance(value, list | tuple):
        return [_plain(f"{where}[{number}]", item, ".") for number, item in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(where, value.tolist())
    if isinstance(value, PythonTree):
        return value.reference
    return _plain_scalar(where, str(value) if isinstance(value, PathLike) else value)


def _plain_scalar(where: str, value: Any) -> Any:
    # Subclasses of texts and numbers, such as enums, have other texts than their values.
    if value is None or type(value) in (bool, int, float, str, bytes, date, datetime):
        return value
    raise InputError(where, f"holds {shown(value)}, which no YAML can say; expected numbers, texts and lists")


def genome_array(name: str, value: Any, shape: tuple[str | int, ...]) -> np.ndarray:
    """An argument as float32 of this shape, in which a letter stands for any length. Raises InputError for any other
    argument, and for values that are not finite in float32."""
    expected = f"expected numbers of shape [{', '.join(map(str, shape))}]"
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # lists of unlike lengths
        raise InputError(name, f"{shown(value)}; {expected}") from None
    if array.dtype.kind not in "fiu" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(name, f"{shown(value)}; {expected}")
    if array.ndim != len(shape) or any(a != b for a, b in zip(array.shape, shape, strict=True) if isinstance(b, int)):
        raise InputError(name, f"shape {list(array.shape)}; {expected}")
    with np.errstate(over="ignore"):
        genes = array.astype(np.float32)
    if not np.isfinite(genes).all():
        raise InputError(name, "NaN or infinite in float32; expected finite numbers")
    return genes
