"""Pytrees that a Python program gives to a search in place of files: models, and arrays of examples.

A config is text, so a pytree stands in it as `python:NAME@DIGEST`. The digest is of its containers and all arrays: a
pytree that has changed has another reference, and a run is not resumed with it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any
from weakref import WeakValueDictionary

import jax
import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.tasks.python_functions import DIGEST, PREFIX

Path = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class PythonTree:
    """A pytree with the reference that stands for it in a config, as long as this object lives."""

    reference: str
    tree: Any = field(repr=False)


_trees: WeakValueDictionary[str, PythonTree] = WeakValueDictionary()


def hold_tree(where: str, name: str, tree: Any) -> PythonTree:
    """A pytree for a config. name: in its reference. Raises InputError for an object that is no pytree."""
    leaves, structure = flatten(where, tree)
    # A module and its state have the same paths and arrays.
    texts = [*(shown_path(path) for path, _ in leaves), *_containers(structure)]
    digest = hashlib.sha256("\n".join(texts).encode())
    digest.update(digest_of([leaf for _, leaf in leaves]).encode())
    reference = f"{PREFIX}{name}@{digest.hexdigest()[:DIGEST]}"
    return _trees.setdefault(reference, PythonTree(reference, tree))


def _containers(structure: Any) -> list[str]:
    """The names of the types of a pytree's nodes, from the top."""
    node = structure.node_data()
    inner = [name for child in structure.children() for name in _containers(child)]
    return inner if node is None else [node[0].__qualname__, *inner]


def find_tree(where: str, reference: str) -> Any:
    """The pytree of a reference. Raises InputError where this process does not hold it."""
    held = _trees.get(reference)
    if held is None:
        raise InputError(
            where,
            f"{reference} is a pytree of a Python program, which this process does not have; go on in that program, or "
            "put the arrays into a file and name it",
        )
    return held.tree


def shown_path(path: Path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(where: str, tree: Any) -> tuple[list[tuple[Path, Any]], Any]:
    """The leaves of a pytree, with their paths, and its structure. Raises InputError for a leaf that JAX does not take,
    such as a tensor of torch, for one that is deleted, and for an object that is no pytree."""
    try:
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    # These are raised for keys that cannot be sorted, and for a tree that contains itself, by the depth of JAX's calls.
    except (TypeError, ValueError, RecursionError, SystemError) as error:
        raise InputError(where, f"is no pytree ({error})") from None
    for path, leaf in leaves:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            name = type(leaf).__name__
            how = f"jax.tree_util.register_dataclass({name}) makes a dataclass a pytree" if is_dataclass(leaf) else (
                "jax.tree.map(np.asarray, …) makes arrays of tensors on the CPU"
            )  # fmt: skip
            raise InputError(where, f"leaf {shown_path(path)!r} is a {name}; expected an array of NumPy or JAX: {how}")
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
            raise InputError(
                where, f"leaf {shown_path(path)!r} was deleted, or donated to a compiled function; expected arrays "
                "that live as long as the search: jax.tree.map(np.array, …) copies them",
            )  # fmt: skip
    return leaves, structure


def is_key(leaf: Any) -> bool:
    """Return whether a leaf is an array of random keys, which are no numbers."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)


def digest_of(leaves: Sequence[Any]) -> str:
    """SHA-256 of arrays in their order; arrays of objects, which no search takes, count by their shapes."""
    digest = hashlib.sha256()
    for leaf in leaves:
        array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(
            np.ascontiguousarray(array).view(np.uint8).data if array.size and not array.dtype.hasobject else b""
        )
    return digest.hexdigest()
