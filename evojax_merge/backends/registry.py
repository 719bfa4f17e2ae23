"""Backends by their names in a config."""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from evojax_merge.backends.backend import BackendFactory
from evojax_merge.errors import InputError, did_you_mean, shown
from evojax_merge.plugins import HINT
from evojax_merge.tasks.function import users_module
from evojax_merge.tasks.rubric import Margins, provide_judges
from evojax_merge.zoo.references import resolve_reference

# The built-in factories as module:object: a search imports only its own.
_BUILT_IN = {
    "decoder": "evojax_merge.backends.decoder.opening:FACTORY",
    "function": "evojax_merge.backends.function.opening:FACTORY",
    "torch": "evojax_merge.backends.torch.opening:FACTORY",
}
_registered: dict[str, BackendFactory] = {}


def _open_judge(where: str, reference: str, folder: Path) -> tuple[Path, Margins]:
    from evojax_merge.backends.decoder.judge_model import open_judge_model

    path = resolve_reference(where, reference, folder)
    return path, open_judge_model(path).margins


provide_judges(_open_judge)


def register_backend(name: str, factory: BackendFactory) -> None:
    """Make `backend: NAME` mean the models that `factory` opens; a later factory of the same name
    replaces an earlier one. Raises ValueError for the name of a backend that comes with the program, and for a value
    that is no name or no factory."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,100}", name):
        raise ValueError(f"name: {shown(name)}; expected a word of letters, digits, _ and -")
    if name in _BUILT_IN:
        raise ValueError(f"there is a backend {name!r} already; choose another name")
    lacking = _lacking(factory)
    if lacking:
        raise ValueError(
            f"factory: {shown(factory)} lacks {lacking}; expected a BackendFactory, such as a FunctionFactory"
        )
    _registered[name] = factory


def _lacking(factory: Any) -> str:
    return ", ".join(member for member in ("check", "open") if not callable(getattr(factory, member, None)))


def find_backend(where: str, name: str, folder: Path) -> BackendFactory:
    """The factory of a name, or the object that `FILE.py:NAME` or `PACKAGE:NAME` names; a file's path starts
    in `folder`. A function there makes a module of torch. Raises InputError where there is none."""
    if name in _registered:
        return _registered[name]
    if ":" in name:
        return _imported(where, name, folder)
    if name not in _BUILT_IN:
        raise InputError(where, f"unknown backend {name!r}{did_you_mean(name, [*_BUILT_IN, *_registered])}{HINT}")
    module, attribute = _BUILT_IN[name].split(":")
    factory: BackendFactory = getattr(import_module(module), attribute)
    return factory


def _imported(where: str, name: str, folder: Path) -> BackendFactory:
    module_name, _, attribute = name.rpartition(":")
    module = users_module(where, module_name, folder)
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if not name.startswith("_") and (
            getattr(value, "__module__", None) == module.__name__ or not _lacking(value))]  # fmt: skip
        raise InputError(where, f"{module_name} has no {attribute!r}{did_you_mean(attribute, names)}")
    factory = getattr(module, attribute)
    lacking = _lacking(factory)
    if lacking and callable(factory):
        from evojax_merge.backends.torch.opening import TorchFactory

        try:
            inspect.signature(factory).bind()
        except ValueError:
            pass  # Functions that are not written in Python may have no signature.
        except TypeError as error:
            raise InputError(where, f"{name} is called without arguments ({error})") from None
        return TorchFactory(factory)
    if lacking:
        raise InputError(where, f"{name} is {shown(factory)}, which lacks {lacking}; expected a BackendFactory")
    result: BackendFactory = factory
    return result
