"""What packages of others add: merge methods, search strategies, architectures and kinds of task, by entry points.

A package's pyproject.toml names an object to register, or a function without arguments that registers:

    [project.entry-points."evojax_merge.methods"]
    softmax = "my_package.merging:SOFTMAX"

`load` is called where a command begins, and by the functions of the public API.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from evojax_merge.errors import InputError, shown


@dataclass(frozen=True)
class Registry:
    """Where the objects of an entry point's group go: a function of a module, which is imported when it is needed.
    `named`: it takes the name first, which the object does not know."""

    module: str
    function: str
    named: bool = False

    @property
    def register(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(import_module(self.module), self.function)
        return found


REGISTRIES = {
    "method": Registry("merge_kernels", "register"),
    "strategy": Registry("evojax_merge.search.strategies.registry", "register_strategy", named=True),
    "architecture": Registry("evojax_merge.models.architecture", "register_architecture"),
    "task": Registry("evojax_merge.tasks.kinds", "register_task"),
}
GROUPS = {
    "evojax_merge.methods": "method",
    "evojax_merge.strategies": "strategy",
    "evojax_merge.architectures": "architecture",
    "evojax_merge.tasks": "task",
}
_loaded: set[EntryPoint] = set()


def register(kind: str, *arguments: Any) -> Any:
    """Register an object of a kind (see `REGISTRIES`). Raises InputError where it cannot be used or its name is
    taken."""
    try:
        with _checking_methods():
            return REGISTRIES[kind].register(*arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"register_{kind}", str(error)) from None


@contextmanager
def _checking_methods() -> Iterator[None]:
    """Check the merge methods that the block registers. Raises ValueError, and none of them stays registered, where the
    functions of one return something else than tensors."""
    from merge_kernels import METHODS

    before = set(METHODS)
    yield
    added = [METHODS[name] for name in METHODS if name not in before]
    problems = [problem for problem in map(_wrong_result, added) if problem is not None]
    if problems:
        for method in added:
            del METHODS[method.name]
        raise ValueError(problems[0])


def _wrong_result(method: Any) -> str | None:
    """Call a method's functions on small tensors, without computing anything on a device. Returns the first result that
    is of a wrong type or shape. What the functions raise is theirs, and shows where a merge calls them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from merge_kernels import CombineInputs, Prepared, draw_row_keys, prepare

    count = max(method.min_parents, min(2, method.max_parents or 2))
    options = replace(method.options, has_base=method.uses_base(True))
    rng, shape = np.random.default_rng(0), (4, 3)
    sources = tuple(rng.uniform(0.1, 1.0, shape).astype(np.float32) for _ in range(count + options.has_base))
    numbers = {
        one.name: np.full(count if one.per_parent else (), 1 / count if one.default is None else one.default)
        for one in method.parameters
    }
    results: list[Any] = []

    def combine(inputs: CombineInputs) -> float:
        results.append(method.combine(options, inputs))
        return 0.0

    try:
        prepared = prepare(method, options, sources, numbers, lambda k: draw_row_keys(0, bytes([k]) * 32, shape))
        if not isinstance(prepared, Prepared):
            return f"merge method {method.name!r}: prepare returned {shown(prepared)}; expected a Prepared"
        floats = {name: values.astype(np.float32) for name, values in numbers.items()}
        arrays: tuple[Any, ...] = (sources, prepared.mask_keys, prepared.statistics, floats)
        jax.eval_shape(combine, CombineInputs(*arrays))
    except Exception:
        return None
    (merged,) = results
    is_array = isinstance(merged, jax.Array | np.ndarray)
    if is_array and merged.shape == shape and jnp.issubdtype(merged.dtype, jnp.floating):
        return None
    kind = f"{merged.dtype}{list(merged.shape)}" if is_array else shown(merged)
    return f"merge method {method.name!r}: combine returned {kind}; expected float32{list(shape)}, as its sources"


def load() -> None:
    """Register what installed packages add, once in a process. Raises InputError for what cannot be imported or
    registered, with the plugin's name, its package and its own error."""
    installed = entry_points()
    for group, kind in GROUPS.items():
        for plugin in installed.select(group=group):
            if plugin not in _loaded:
                _load(plugin, kind)
                _loaded.add(plugin)


def _load(plugin: EntryPoint, kind: str) -> None:
    try:
        found = plugin.load()
        registry = REGISTRIES[kind]
        with _checking_methods():
            if inspect.isfunction(found) and not inspect.signature(found).parameters:
                found()
            elif registry.named:
                registry.register(plugin.name, found)
            else:
                registry.register(found)
    # A package that leaves by itself is as broken as one that raises.
    except (Exception, SystemExit) as error:
        package = "an unknown package" if plugin.dist is None else f"{plugin.dist.name} {plugin.dist.version}"
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise InputError(
            f"plugin {plugin.name!r} of {package}",
            f"{plugin.group} = {plugin.value} could not be loaded ({what}); repair or uninstall the package",
        ) from error


def source_files(objects: Iterable[object]) -> set[Path]:
    """The Python files behind these objects, as far as they come from plugins: all of their packages, of which one file
    may use another."""
    packages = {plugin.module.partition(".")[0] for plugin in _loaded}
    named = {module.partition(".")[0] for one in objects for module in _modules(one)}
    return {file for package in packages & named for file in _files(package)}


def _modules(value: object) -> Iterator[str]:
    """The modules that an object and what it is made of are defined in."""
    for part in (value, *getattr(value, "__dict__", {}).values()):
        for owner in (part, type(part)):
            module = getattr(owner, "__module__", None)
            if isinstance(module, str):
                yield module


def _files(package: str) -> Iterator[Path]:
    module = sys.modules[package]
    folders = getattr(module, "__path__", None)
    if folders is not None:
        yield from (file for folder in folders for file in Path(folder).rglob("*.py"))
    elif module.__file__ is not None:
        yield Path(module.__file__)
