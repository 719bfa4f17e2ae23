"""Merges of pytrees: all sources leaf by leaf, their bank, and the merge of a genome."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import CombineInputs, combine_differentiable, draw_row_keys, look_up_differentiable, tabulate

from evojax_merge.errors import InputError, shown
from evojax_merge.models.bank import LeafBank, MergeSpec
from evojax_merge.schema.arguments import check_call
from evojax_merge.spaces.parameter import GroupSpace
from evojax_merge.system.blas import one_blas_thread
from evojax_merge.tasks.arrays import is_real
from evojax_merge.tasks.python_trees import Path, flatten, is_key, shown_path

# Leaves that are merged, in the kernels' form, and leaves that no merge changes.
TreeBank = list[LeafBank | Any]


# JAX prints the callables that it compiles: a merge, without its arrays.
@dataclass(frozen=True)
class Leaf:
    """One leaf of all sources. merged: whether it is merged; otherwise the merge has the first source's leaf."""

    sources: tuple[Any, ...] = field(repr=False)
    merged: bool


@dataclass(frozen=True)
class Tree:
    """All sources, leaf by leaf. paths: each leaf's keys; columns: each source's leaves, unchanged."""

    paths: tuple[Path, ...]
    leaves: tuple[Leaf, ...]
    structure: Any
    columns: tuple[Sequence[Any], ...] = field(repr=False)

    def source(self, number: int) -> Any:
        """One source as it was given."""
        return self.structure.unflatten(self.columns[number])


def open_trees(where: str, names: Sequence[str], sources: Sequence[Any]) -> Tree:
    """Flatten the sources, and check that their structures agree. Raises InputError, which names the first leaf that
    differs, and for two leaves of one name."""
    flat = [flatten(f"{where}: {name}", source) for name, source in zip(names, sources, strict=True)]
    paths: tuple[Path, ...] = tuple(path for path, _ in flat[0][0])
    structure: Any = flat[0][1]
    first_paths = {shown_path(path): None for path in paths}
    if len(first_paths) < len(paths):
        twice, _ = Counter(map(shown_path, paths)).most_common(1)[0]
        raise InputError(f"{where}: {names[0]}", f"has two leaves of the name {twice!r}; expected keys without '/'")
    in_one_order = True
    for name, (leaves, _) in zip(names[1:], flat[1:], strict=True):
        other_paths = {shown_path(path): None for path, _ in leaves}
        in_one_order = in_one_order and list(other_paths) == list(first_paths)
        for paths_of_holder, paths_of_other, holder, lacks in (
            (first_paths, other_paths, names[0], name),
            (other_paths, first_paths, name, names[0]),
        ):
            missing = next((path for path in paths_of_holder if path not in paths_of_other), None)
            if missing is not None:
                raise InputError(f"{where}: {lacks}", f"has no leaf {missing!r}, which {holder} has")
    columns = [[leaf for _, leaf in leaves] for leaves, _ in flat]
    # Modules hold the shapes of their leaves in their structure; a leaf says more.
    rows = () if not in_one_order else tuple(
        _leaf(where, names, shown_path(p), values) for p, *values in zip(paths, *columns, strict=True)
    )  # fmt: skip
    for name, (_, containers) in zip(names[1:], flat[1:], strict=True):
        if containers != structure:
            raise InputError(f"{where}: {name}", f"has other containers than {names[0]}: {containers} and {structure}")
    return Tree(paths, rows, structure, tuple(columns))


def _leaf(where: str, names: Sequence[str], path: str, values: Sequence[Any]) -> Leaf:
    if is_key(values[0]):
        return Leaf(tuple(values), merged=False)
    arrays = [np.asarray(value) for value in values]
    for name, array in zip(names, arrays, strict=True):
        if not is_real(array.dtype):
            raise InputError(f"{where}: {name}", f"leaf {path!r} is of {array.dtype}; expected real numbers")
        if array.shape != arrays[0].shape:
            raise InputError(
                f"{where}: {name}", f"leaf {path!r} has shape {array.shape}, but {arrays[0].shape} in {names[0]}"
            )
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
            raise InputError(f"{where}: {name}", f"leaf {path!r} holds NaN or Inf")
    dtype = jnp.result_type(*arrays)
    if not jnp.issubdtype(dtype, jnp.floating) or arrays[0].size == 0:
        return Leaf((arrays[0],), merged=False)
    return Leaf(tuple(array.astype(dtype) for array in arrays), merged=True)


def group_labels(where: str, paths: Sequence[Path], groups: Callable[[str], str] | None) -> list[str]:
    """The group of each leaf: the result of `groups`, or the first key at which the paths differ."""
    if groups is not None:
        check_call(f"{where}: groups", groups, ["path"])
        labels = [groups(shown_path(path)) for path in paths]
        for label, path in zip(labels, paths, strict=True):
            if not isinstance(label, str):
                raise InputError(
                    f"{where}: groups", f"returned {shown(label)} for {shown_path(path)!r}; expected a text"
                )
        return labels
    depth = 0
    while len({path[depth : depth + 1] for path in paths}) == 1 and all(len(path) > depth + 1 for path in paths):
        depth += 1
    return [shown_path(path[: depth + 1][depth:]) or "all" for path in paths]


@dataclass(frozen=True, eq=False)
class TreeMerge:
    """Merges of one tree's sources. labels: the group of each leaf."""

    tree: Tree
    labels: tuple[str, ...]
    space: GroupSpace
    spec: MergeSpec

    @property
    def merged_groups(self) -> list[tuple[str, int]]:
        """The name of each merged leaf, and its group's number."""
        leaves = zip(self.tree.paths, self.tree.leaves, self.labels, strict=True)
        return [(shown_path(path), self.space.groups.index(label)) for path, leaf, label in leaves if leaf.merged]

    @cached_property
    def bank(self) -> TreeBank:
        """The measured leaves, on the host."""
        number = self.space.groups.index
        return [
            self._measured(leaf, path, number(label)) if leaf.merged else leaf.sources[0]
            for leaf, path, label in zip(self.tree.leaves, self.tree.paths, self.labels, strict=True)
        ]

    def _measured(self, leaf: Leaf, path: Path, group: int) -> LeafBank:
        """Measure a leaf. Random numbers are fixed by the seed, a parent's content and the leaf's path."""
        # The kernels take a single number as a vector of length 1.
        sources = [np.ascontiguousarray(np.atleast_1d(source)) for source in leaf.sources]
        spec, has_base = self.spec, int(self.spec.options.has_base)

        def row_keys(k: int) -> np.ndarray:
            content = hashlib.sha256(sources[has_base + k].view(np.uint8).data)
            content.update(b"\0" + shown_path(path).encode())
            return draw_row_keys(spec.seed, content.digest(), sources[0].shape)

        numbers = spec.prepared_for(len(sources) - has_base)
        with one_blas_thread(spec.method.stores_vectors):
            prepared: Any = tabulate(spec.method, spec.options, sources, numbers, row_keys)
        stacked: Any = np.stack(sources)
        masks: Any = np.stack(prepared.mask_keys) if prepared.mask_keys else None
        return LeafBank(
            stacked,
            mask_keys=masks,
            statistics=dict(prepared.statistics),
            group=group,
        )

    def __call__(self, bank: TreeBank, genome: jax.Array) -> Any:
        """The merge of a genome, float32[D], as a pytree like its sources. Traceable."""
        parameters = self.space.parameters(genome)
        return self.tree.structure.unflatten(
            self._merged(leaf, parameters, source.sources[0].shape) if source.merged else leaf
            for leaf, source in zip(bank, self.tree.leaves, strict=True)
        )

    def _merged(self, leaf: LeafBank, parameters: Mapping[str, jax.Array], shape: tuple[int, ...]) -> Any:
        """The merged leaf `[…]` in its own dtype. parameters: name -> float32[groups, K] or [groups]."""
        of_group = {name: block[leaf.group] for name, block in parameters.items()}
        method, options = self.spec.method, self.spec.options
        statistics = look_up_differentiable(method, leaf.statistics, of_group)
        keys = () if leaf.mask_keys is None else leaf.mask_keys
        merged = combine_differentiable(method, options, CombineInputs(leaf.sources, keys, statistics, of_group))
        return merged.astype(leaf.sources.dtype).reshape(shape)


def put_bank(bank: TreeBank, put: Callable[[Any], Any]) -> TreeBank:
    """The bank with its merged leaves' arrays on the devices; other leaves stay as they are."""
    return [jax.tree.map(put, leaf) if isinstance(leaf, LeafBank) else leaf for leaf in bank]
