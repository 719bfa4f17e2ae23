"""Functions that a Python program gives to a search in place of `path/to/file.py:name`.

A config is text, so a function stands in it as `python:QUALNAME@DIGEST`. The digest depends on the function's code: a
function that has changed has another reference, and a run is not resumed with it.
"""

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from inspect import getattr_static
from typing import Any

import numpy as np

from evojax_merge.errors import InputError

PREFIX = "python:"
# Characters of a qualified name and of a digest in a reference.
MAX_NAME, DIGEST = 100, 16
_functions: dict[str, Callable[..., Any]] = {}
# References by the `id` of the function. `_referenced` keeps these functions alive, so that no other function gets
# their `id`.
_references: dict[int, str] = {}
_referenced: list[Callable[..., Any]] = []


def reference_to(function: Callable[..., Any]) -> str:
    """The text that stands for a function in a config, `python:QUALNAME@DIGEST`. It stays the same for one function
    object, even if the variables that the function uses change."""
    if id(function) not in _references:
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        _references[id(function)] = f"{PREFIX}{name[:MAX_NAME]}@{digest(function)}"
        _referenced.append(function)
    reference = _references[id(function)]
    _functions[reference] = function
    return reference


def is_reference(text: str) -> bool:
    return text.startswith(PREFIX) and "@" in text


def find_function(where: str, reference: str) -> Callable[..., Any]:
    """The function of a reference. Raises InputError where this process has not defined it."""
    if reference not in _functions:
        raise InputError(
            where,
            f"{reference} is a function of a Python program, and this process has not defined it as it was; run the "
            "search in that program, or put the function into a file and name it as path/to/file.py:name",
        )
    return _functions[reference]


def digest(function: Callable[..., Any]) -> str:
    """A digest of a function's code, of the defaults and the variables around it, and of the functions of its module
    that it calls. Comments, the file's name and the place in the file make no difference."""
    parts = repr(list(_content(function, set())))
    return sha256(parts.encode("utf-8", "backslashreplace")).hexdigest()[:DIGEST]


def _content(value: Any, seen: set[int]) -> Iterator[object]:
    """A value as plain texts and numbers, the same in every process; other objects are their type alone."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield repr(value)
        return
    if id(value) in seen:
        yield "again"
        return
    seen.add(id(value))
    yield type(value).__qualname__
    if isinstance(value, types.CodeType):
        yield from (value.co_code.hex(), value.co_names, value.co_argcount, value.co_kwonlyargcount, value.co_flags)
        for constant in value.co_consts:
            yield from _content(constant, seen)
    elif isinstance(value, types.FunctionType):
        yield from _content(value.__code__, seen)
        for part in (value.__defaults__, value.__kwdefaults__, *map(_cell, value.__closure__ or ())):
            yield from _content(part, seen)
        for name in sorted(_names(value.__code__)):
            used = value.__globals__.get(name)
            is_helper = isinstance(used, types.FunctionType) and used.__module__ == value.__module__
            if is_helper or isinstance(used, bool | int | float | str | bytes):
                yield name
                yield from _content(used, seen)
    elif isinstance(value, types.MethodType):
        yield from _content(value.__func__, seen)
        yield from _content(vars(value.__self__) if hasattr(value.__self__, "__dict__") else None, seen)
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            yield from _content(part, seen)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _content(key, seen)
            yield from _content(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _content(item, seen)
    elif isinstance(value, set | frozenset):
        yield sorted(repr(list(_content(item, set()))) for item in value)
    elif isinstance(value, np.ndarray):
        yield from (value.dtype.str, value.shape, sha256(np.ascontiguousarray(value).tobytes()).hexdigest())
    elif hasattr(value, "__wrapped__"):  # jax.jit and other wrappers
        yield from _content(value.__wrapped__, seen)
    elif callable(value) and isinstance(call := getattr_static(type(value), "__call__", None), types.FunctionType):
        yield from _content(call, seen)
        yield from _content(getattr(value, "__dict__", None), seen)
    else:
        yield getattr(value, "__qualname__", "")


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that is defined further down
        return None


def _names(code: types.CodeType) -> set[str]:
    """The global names that a function's code uses, the functions inside of it included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return {*code.co_names, *(name for one in inner for name in _names(one))}
