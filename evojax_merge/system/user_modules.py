"""Import of users' Python files and packages, by path or by name."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType


def load_file(path: Path) -> ModuleType:
    """Import a Python file once. The module's name contains a digest of the content, so that a changed file is another
    module. Exceptions of the file pass through."""
    content = path.read_bytes()
    name = f"{path.stem}_{sha256(str(path).encode() + content).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and isinstance(spec.loader, SourceFileLoader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        # The loader would take bytecode of an earlier content whose file had the same size in the same second.
        exec(spec.loader.source_to_code(content, str(path)), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def reference_from_anywhere(reference: str, folder: Path) -> str:
    """The reference `FILE.py:NAME`, or `MODULE:NAME` of a module that was imported from a file in `folder`, with the
    file's full path; any other as it is."""
    place, _, name = reference.rpartition(":")
    if place.endswith(".py"):
        return f"{(folder / os.path.expanduser(place)).resolve()}:{name}"
    file = Path(getattr(sys.modules.get(place), "__file__", None) or "")
    return f"{file.resolve()}:{name}" if file.name and file.resolve().parent == folder.resolve() else reference


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Put `folder` first on sys.path, as Python does for a script in it. Afterwards the folder stays on the path, but
    last, where it hides no library that is imported later."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
        if entry not in sys.path:
            sys.path.append(entry)


def lacks_module(error: ModuleNotFoundError, name: str) -> bool:
    """Return whether an import of `name` failed because this module, or a package that contains it, is missing.
    Otherwise a module that `name` imports is missing."""
    return error.name is not None and (name == error.name or name.startswith(f"{error.name}."))
