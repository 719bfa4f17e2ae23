"""Checks of the arguments of public functions and of the signatures of users' functions."""

import inspect
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from evojax_merge.errors import InputError, shown
from evojax_merge.schema.section import Form
from evojax_merge.system.regular_file import MAX_NAME_BYTES

# Characters of a path, on Linux.
MAX_PATH = 4096
STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)

_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    type(None): "None",
    os.PathLike: "a path",
    Sequence: "a list or a tuple",
    Mapping: "a mapping with texts as keys",
    Callable: "a function",
}


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], where: str = "") -> None:
    """Raise InputError, which names the argument, for a value that is not of the argument's annotated type: True is no
    number, and a text no list. arguments: the function's arguments by name; further names are ignored. where: the
    function in messages, by default its own name."""
    where = where or function.__qualname__.removesuffix(".__init__")
    for name, hint in _hints(function).items():
        _check(f"{where}: {name}", hint, arguments[name])


def _check(where: str, hint: Any, value: Any) -> None:
    if hint is Any:
        return
    try:
        _adapter(hint).validate_python(_plain(value))
    except ValidationError:
        # The message about an item is more specific than the message about its list.
        for origin, items in ((get_origin(member), get_args(member)) for member in _members(hint)):
            if origin is Mapping and isinstance(value, Mapping):
                for key, item in value.items():
                    _check(f"{where}.{key}", items[-1], item)
            elif origin is Sequence and isinstance(value, list | tuple):
                for number, item in enumerate(value):
                    _check(f"{where}[{number}]", items[0], item)
        raise InputError(where, f"{shown(value)}; expected {_words(hint)}") from None
    if isinstance(value, str | os.PathLike) and any(get_origin(member) is os.PathLike for member in _members(hint)):
        path = os.fspath(value)
        parts = path.split("/")
        if "\0" in path or len(path) > MAX_PATH or any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in parts):
            raise InputError(
                where, f"{shown(path)}; expected a path, without NUL, no part over {MAX_NAME_BYTES} bytes"
            )  # fmt: skip


def check_call(
    where: str, function: Callable[..., Any], names: Sequence[str], named: str = "", caller: str = "it is called"
) -> None:
    """Raise InputError where a function cannot be called with as many positional arguments as `names`, which are their
    names. named, caller: the function, and who calls it, in the message."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # Functions that are not written in Python may have no signature.
    try:
        signature.bind(*names)
    except TypeError:
        raise InputError(where, f"{named} takes {signature}; {caller} with ({', '.join(names)})".lstrip()) from None


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(function, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return"}


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    # Beside the config of a section TypeAdapter takes no other.
    is_section = isinstance(hint, type) and (issubclass(hint, BaseModel) or is_dataclass(hint))
    return TypeAdapter(hint, config=None if is_section else STRICT)


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union; else the type alone."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _plain(value: Any) -> Any:
    """A value with NumPy's numbers, also those in a mapping, as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _words(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        forms = [form.words for form in annotation.__metadata__ if isinstance(form, Form)]
        return forms[0] if forms else _words(get_args(annotation)[0])
    if len(_members(annotation)) > 1:
        return " or ".join(dict.fromkeys(map(_words, _members(annotation))))
    if origin is Literal:
        return ", ".join(map(repr, get_args(annotation)))
    if origin is Sequence:
        (items,) = get_args(annotation)
        return _WORDS[Sequence] if items is Any else f"a list of {_plural(items)}"
    kind = origin or annotation
    return _WORDS.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def _plural(annotation: Any) -> str:
    """Several values of a type, in words."""
    if get_origin(annotation) is not Annotated and len(_members(annotation)) > 1:
        return " or ".join(dict.fromkeys(map(_plural, _members(annotation))))
    if (get_origin(annotation) or annotation) is Mapping:
        return "mappings with texts as keys"
    return f"{_words(annotation).removeprefix('a ')}s"
