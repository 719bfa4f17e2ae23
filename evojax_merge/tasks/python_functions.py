"""Functions that a Python program gives to a search in place of `path/to/file.py:name`.

A config is text, so a function stands in it as `python:QUALNAME@DIGEST`. The digest depends on the function's code: a
function that has changed has another reference, and a run is not resumed with it.
"""

import dis
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from hashlib import sha256
from inspect import getattr_static
from typing import Any

import numpy as np

from evojax_merge.errors import InputError

PREFIX = "python:"
# Characters of a qualified name and of a digest in a reference.
MAX_NAME, DIGEST = 100, 16
# By reference: the functions that Python programs gave last.
_functions: dict[str, Callable[..., Any]] = {}


def reference_to(function: Callable[..., Any]) -> str:
    """The text that stands for a function in a config, `python:QUALNAME@DIGEST`, by what it is made of now."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    reference = f"{PREFIX}{name[:MAX_NAME]}@{digest(function)}"
    _functions[reference] = function
    return reference


def referenced_functions(document: Any) -> dict[str, Callable[..., Any]]:
    """The functions whose references stand in a config's document, by reference. They are remembered again by
    `remember_functions`, where another function of the same digest may have been given since."""
    if isinstance(document, Mapping | list | tuple):
        parts = document.values() if isinstance(document, Mapping) else document
        return {key: function for part in parts for key, function in referenced_functions(part).items()}
    return {document: _functions[document]} if isinstance(document, str) and document in _functions else {}


def remember_functions(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Have these references stand for these functions."""
    _functions.update(functions)


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
    """A digest of a function's code, of the defaults and the variables around it, of the functions of its module that
    it calls, and of the numbers, texts and arrays of its module that it uses. Variables that it sets itself count as
    its state, and make no difference; nor do comments, the file's name and the place in the file."""
    parts = repr(list(_content(function, set(), getattr(function, "__module__", None))))
    return sha256(parts.encode("utf-8", "backslashreplace")).hexdigest()[:DIGEST]


def _content(value: Any, seen: set[int], module: str | None) -> Iterator[object]:
    """A value as plain texts and numbers, the same in every process; objects of other modules than the function's are
    their type alone."""
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
            yield from _content(constant, seen, module)
    elif isinstance(value, types.FunctionType):
        code, state = value.__code__, _names_set(value.__code__)
        yield from _content(code, seen, module)
        around = dict(zip(code.co_freevars, map(_cell, value.__closure__ or ()), strict=True))
        variables = [around[name] for name in code.co_freevars if name not in state]
        for part in (value.__defaults__, value.__kwdefaults__, *variables):
            yield from _content(part, seen, module)
        for name in sorted(_names(code) - state):
            used = value.__globals__.get(name)
            is_helper = isinstance(used, types.FunctionType) and used.__module__ == value.__module__
            if is_helper or isinstance(used, bool | int | float | str | bytes | tuple) or _is_array(used):
                yield name
                yield from _content(used, seen, module)
    elif isinstance(value, types.MethodType):
        yield from _content(value.__func__, seen, module)
        yield from _attributes(value.__self__, seen, module)
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            yield from _content(part, seen, module)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _content(key, seen, module)
            yield from _content(item, seen, module)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _content(item, seen, module)
    elif isinstance(value, set | frozenset):
        yield sorted(repr(list(_content(item, set(), module))) for item in value)
    elif _is_array(value):
        array = _on_host(value)
        yield from (str(value.dtype), *value.shape)
        if array is not None and array.dtype == object:
            for item in array.flat:
                yield from _content(item, seen, module)
        elif array is not None:
            yield sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    elif hasattr(value, "__wrapped__"):  # jax.jit and other wrappers
        yield from _content(value.__wrapped__, seen, module)
    elif callable(value) and isinstance(call := getattr_static(type(value), "__call__", None), types.FunctionType):
        yield from _content(call, seen, module)
        yield from _attributes(value, seen, module)
    elif type(value).__module__ in (module, "types", "argparse") or is_dataclass(value):
        yield from _attributes(value, seen, module)
    else:
        yield getattr(value, "__qualname__", "")


def _is_array(value: Any) -> bool:
    """Return whether a value is an array, a scalar of NumPy, or a tensor."""
    return hasattr(value, "__array__") and hasattr(value, "dtype") and hasattr(value, "shape")


def _on_host(array: Any) -> np.ndarray | None:
    """The array in the host's memory; None where it cannot be had, as where it was deleted."""
    import jax

    # Tensors may have a gradient, or lie on another device; JAX's random keys are no numbers.
    readers: tuple[Callable[[], Any], ...] = (
        lambda: array, lambda: array.detach().cpu(), lambda: jax.random.key_data(array)
    )  # fmt: skip
    for read in readers:
        with suppress(AttributeError, TypeError, ValueError, RuntimeError):
            return np.asarray(read())
    return None


def _attributes(value: Any, seen: set[int], module: str | None) -> Iterator[object]:
    """The content of an object's attributes but for those that its methods set: its state, such as a counter."""
    methods = [(name, part) for kind in type(value).__mro__ for name, part in vars(kind).items()]
    state = {
        attribute
        for name, part in methods if isinstance(part, types.FunctionType) and name not in ("__init__", "__post_init__")
        for attribute in _names_set(part.__code__, "STORE_ATTR")
    }  # fmt: skip
    for name, part in getattr(value, "__dict__", {}).items():
        if name not in state:
            yield name
            yield from _content(part, seen, module)


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that is defined further down
        return None


def _names(code: types.CodeType) -> set[str]:
    """The global names that a function's code uses, the functions inside of it included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return {*code.co_names, *(name for one in inner for name in _names(one))}


def _names_set(code: types.CodeType, *operations: str) -> set[str]:
    """The variables outside of a function, or with STORE_ATTR the attributes, that its code sets, the functions inside
    of it included."""
    wanted = operations or ("STORE_GLOBAL", "STORE_DEREF")
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    names = {step.argval for step in dis.get_instructions(code) if step.opname in wanted}
    return names.union(*(_names_set(one, *operations) for one in inner))
