"""Plugins: merge methods, search strategies, architectures, kinds of task and backends that users and packages add.

A package adds them by entry points. Its pyproject.toml names an object to register, or a function without arguments
that registers:

    [project.entry-points."evojax_merge.methods"]
    softmax = "my_package.merging:SOFTMAX"

A config's `plugins`, the option `--plugin` and the environment variable EVOJAX_MERGE_PLUGINS name Python files and
packages that register when they are imported.

`load` is called where a command begins, and by the functions of the public API.
"""

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from evojax_merge.errors import InputError, shown
from evojax_merge.system.user_modules import importing_from, lacks_module, load_file


@dataclass(frozen=True)
class Registry:
    """The destination of an entry point group's objects: a function of a module, imported when needed. `named`: whether
    the function takes the plugin's name first, for objects without a name."""

    group: str
    module: str
    function: str
    named: bool = False

    @property
    def register(self) -> Callable[..., Any]:
        register: Callable[..., Any] = getattr(import_module(self.module), self.function)
        return register


REGISTRIES = {
    "method": Registry("evojax_merge.methods", "merge_kernels", "register"),
    "strategy": Registry(
        "evojax_merge.strategies", "evojax_merge.search.strategies.registry", "register_strategy", named=True
    ),
    "architecture": Registry("evojax_merge.architectures", "evojax_merge.models.architecture", "register_architecture"),
    "task": Registry("evojax_merge.tasks", "evojax_merge.tasks.kinds", "register_task"),
    "backend": Registry("evojax_merge.backends", "evojax_merge.backends.registry", "register_backend", named=True),
}
# Python files and packages to load, separated as the folders of a search path.
ENVIRONMENT = "EVOJAX_MERGE_PLUGINS"
# The end of messages about an unknown name.
HINT = f"; a plugin can add it (plugins: in a config, --plugin FILE, {ENVIRONMENT})"
RECIPE_HINT = f"; a plugin can add it (--plugin FILE, {ENVIRONMENT})"
_loaded: set[EntryPoint] = set()
# The plugins that were named, by their names from any folder.
_named: dict[str, ModuleType] = {}
# The plugins that are being loaded, and the objects and names that were registered while there was none.
_loading: list[str] = []
_of_the_program: list[Any] = []


def register(kind: str, *arguments: Any) -> Any:
    """Register an object of a kind (see `REGISTRIES`). Raises InputError where it cannot be used or its name is
    taken."""
    try:
        with _checking_methods():
            registered = REGISTRIES[kind].register(*arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"register_{kind}", str(error)) from None
    if not _loading:
        _of_the_program.extend(arguments)
    return registered


def registered_by_program(value: object) -> bool:
    """Return whether the running program has registered an object, or a name, itself: no plugin did, which another
    process would load as well."""
    return any(value is other or (isinstance(value, str) and value == other) for other in _of_the_program)


@contextmanager
def _checking_methods(plugin: str | None = None) -> Iterator[None]:
    """Check the merge methods that the block registers, which loads a `plugin`, if it has one. Raises ValueError, and
    unregisters all of them, where a method's functions return a wrong type or shape."""
    from merge_kernels import METHODS

    before, loading = set(METHODS), [plugin] if plugin is not None else []
    _loading.extend(loading)
    try:
        yield
    finally:
        del _loading[len(_loading) - len(loading) :]
    added = [METHODS[name] for name in METHODS if name not in before]
    problems = [problem for problem in map(_wrong_result, added) if problem is not None]
    if problems:
        for method in added:
            del METHODS[method.name]
        raise ValueError(problems[0])


def _wrong_result(method: Any) -> str | None:
    """Call a method's functions on small tensors, without computing anything on a device. Returns the first result that
    is of a wrong type or shape. An exception of the functions is ignored here: it appears where a merge calls them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from merge_kernels import CombineInputs, Prepared, draw_row_keys, prepare

    count = max(method.min_parents, min(2, method.max_parents or 2))
    options = replace(method.options, has_base=method.uses_base(True))
    rng, shape = np.random.default_rng(0), (4, 3)
    sources = tuple(rng.uniform(0.1, 1.0, shape).astype(np.float32) for _ in range(count + options.has_base))
    numbers = {
        parameter.name: np.full(
            count if parameter.per_parent else (), 1 / count if parameter.default is None else parameter.default
        )
        for parameter in method.parameters
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
    """Register what installed packages and the environment variable's plugins add, once in a process. Raises InputError
    for a package's entry point that cannot be imported or registered, with the plugin's name, its package and its
    error; for the environment variable's plugins see `load_named`."""
    installed = entry_points()
    for registry in REGISTRIES.values():
        for plugin in installed.select(group=registry.group):
            if plugin in _loaded:
                continue
            try:
                with _checking_methods(plugin.name):
                    target = plugin.load()
                    if inspect.isfunction(target) and not inspect.signature(target).parameters:
                        target()
                    elif registry.named:
                        registry.register(plugin.name, target)
                    else:
                        registry.register(target)
            # A package that exits is as broken as one that raises.
            except (Exception, SystemExit) as error:
                package = "an unknown package" if plugin.dist is None else f"{plugin.dist.name} {plugin.dist.version}"
                what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                raise InputError(
                    f"plugin {plugin.name!r} of {package}",
                    f"{plugin.group} = {plugin.value} could not be loaded ({what}); repair or uninstall the package",
                ) from error
            _loaded.add(plugin)
    load_named(ENVIRONMENT, [name for name in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if name], Path.cwd())


def load_named(where: str, names: Sequence[str], folder: Path) -> list[str]:
    """Import Python files, by paths that start in `folder`, and packages. Returns their names from any folder.

    Raises InputError, with `where`, for a file or package that does not exist, and for a plugin that registers a name
    that is taken or an object that cannot be used. All other exceptions of a plugin pass through.
    """
    return [_load_named(f"{where}: {name}", name, folder) for name in names]


def _load_named(where: str, name: str, folder: Path) -> str:
    is_file = name.endswith(".py")
    if not is_file and not all(part.isidentifier() for part in name.split(".")):
        raise InputError(where, "expected a Python file (NAME.py) or the name of a package")
    path = folder / os.path.expanduser(name)
    if is_file and not os.path.isfile(path):
        raise InputError(where, "no such file")
    known_as = str(path.resolve()) if is_file else name
    try:
        place = path.resolve().parent if is_file else folder
        with importing_from(place), _checking_methods(name):
            # The script that the interpreter runs has registered its objects already.
            main = sys.modules.get("__main__")
            script = getattr(main, "__file__", None)
            if not is_file:
                _named[known_as] = import_module(name)
            elif main is not None and script is not None and Path(script).resolve() == path.resolve():
                _named[known_as] = main
            else:
                _named[known_as] = load_file(path.resolve())
    except InputError as error:
        raise InputError(where, str(error)) from None
    except ModuleNotFoundError as error:
        if is_file or not lacks_module(error, name):
            raise
        raise InputError(where, f"there is no module {error.name!r} in {folder.resolve()} or on sys.path") from None
    except ValueError as error:
        # Any ValueError that no registry raised is the plugin's own.
        refusing = {registry.register.__code__ for registry in REGISTRIES.values()}
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_code not in refusing | {inspect.unwrap(_checking_methods).__code__}:
            raise
        raise InputError(where, str(error)) from None
    except SystemExit as error:
        raise RuntimeError(f"the plugin {name} ended the program (SystemExit: {error})") from error
    return known_as


def source_files(objects: Iterable[object]) -> set[Path]:
    """The Python files of the installed plugins that define these objects: all files of their packages, since one file
    may use another."""
    packages = {plugin.module.partition(".")[0] for plugin in _loaded}
    used = packages & {module.partition(".")[0] for value in objects for module in _modules(value)}
    return {file for package in used for file in _files(sys.modules[package])}


def named_plugins(objects: Iterable[object]) -> list[str]:
    """The named plugins that define these objects."""
    defining = {module for value in objects for module in _modules(value)}
    return [
        name
        for name, plugin in _named.items()
        if any(module == plugin.__name__ or module.startswith(f"{plugin.__name__}.") for module in defining)
    ]


def files_of(names: Iterable[str]) -> set[Path]:
    """The Python files of named plugins; for a package, all of its files."""
    return {file for name in names for file in _files(_named[name])}


def named_files() -> set[Path]:
    """The files of all named plugins that were loaded."""
    return files_of(_named)


def _modules(value: object) -> Iterator[str]:
    """The modules that define an object and its attributes."""
    for part in (value, *getattr(value, "__dict__", {}).values()):
        for owner in (part, type(part)):
            module = getattr(owner, "__module__", None)
            if isinstance(module, str):
                yield module


def _files(module: ModuleType) -> Iterator[Path]:
    folders = getattr(module, "__path__", None)
    if folders is not None:
        yield from (file for folder in folders for file in Path(folder).rglob("*.py"))
    elif module.__file__ is not None:
        yield Path(module.__file__)
