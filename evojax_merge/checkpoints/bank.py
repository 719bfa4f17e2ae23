"""Hugging Face folders -> bank, stored model -> Hugging Face tensors.

Loading copies tensor by tensor from memory-mapped files into arrays that were allocated once, so that it never needs
more memory than the bank and one tensor. A method's statistics are measured on the way.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import Prepared, tabulate, widest

from evojax_merge.checkpoints.folder import Part
from evojax_merge.checkpoints.kept_vectors import prepare_or_read
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.checkpoints.writer import TensorSpec
from evojax_merge.models.architecture import (
    Leaf,
    architecture_of,
    first_tensor,
    leaf_tensors,
    leaves_of,
    rows_of_layers,
    shared_leaves,
    stack_leaves,
    stack_numbers,
    tensor_grid,
    tensors_of,
    types_of_layers,
)
from evojax_merge.models.bank import Bank, Factors, LeafBank, MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.layers import layer_kinds
from evojax_merge.models.paths import PathBank, PathSpec
from evojax_merge.models.sources import StackedWeights

# JAX takes a NumPy array on the CPU as it is, without a copy, where it is aligned to this many bytes.
ALIGNMENT = 64
Progress = Callable[[int], None]
T = TypeVar("T")
# Threads that read and measure tensors. More than the cores hinder each other; one alone would wait for the disk.
LOADERS = min(4, max(2, os.cpu_count() or 1))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def common_dtype(sources: Sources, tensor: str) -> np.dtype:
    """The narrowest dtype that holds every source's values."""
    return widest(sources.entry(s, tensor).dtype for s in range(len(sources.folders)))


def put(array: np.ndarray) -> jax.Array:
    """Put a whole array onto the device. Waits, so that the host's copy can be freed before the next leaf is read."""
    return jax.block_until_ready(jax.device_put(array, may_alias=True))


class Placement(Protocol):
    """The places of a bank's arrays where several devices, of several processes perhaps, share a model: by default
    whole arrays on one device. sharded_axis: the axis, counted from the end, that is sharded then; None: each device
    has the whole array."""

    def part(self, shape: tuple[int, ...], sharded_axis: int | None) -> Part:
        """The part of an array of this shape that this process's devices hold; empty: all of it."""
        return ()

    def put(self, array: np.ndarray, sharded_axis: int | None, whole: tuple[int, ...]) -> jax.Array:
        """Bring this process's part of an array of the shape `whole` to its devices."""
        return put(array)

    def measures(self, number: int) -> bool:
        """Return whether this process measures tensor `number` of those that several processes measure together."""
        return True

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """The content of each process. All of them do this together."""
        return [content]


class OneDevice(Placement):
    """Whole arrays on one device."""


ONE_DEVICE: Placement = OneDevice()


@dataclass(frozen=True)
class ArraySpec(TensorSpec):
    """The shape and dtype of a bank's array, before the array exists. shard_axis: the axis, counted from the end, that
    is sharded where devices share a model; None: each device has the whole array."""

    shard_axis: int | None = None


def leaf_trees(config: DecoderConfig, make: Callable[[Leaf], T]) -> tuple[dict[str, dict[str, T]], dict[str, T]]:
    """The leaves of a model, each made by `make`: those of layers by stack and name, and the others by name."""
    stacks: dict[str, dict[str, T]] = {stack: {} for stack in stack_numbers(config)}
    shared: dict[str, T] = {}
    for leaf in leaves_of(config):
        (shared if leaf.stack is None else stacks[leaf.stack])[leaf.name] = make(leaf)
    return stacks, shared


def leaf_layout(sources: Sources, config: DecoderConfig, spec: MergeSpec, leaf: Leaf) -> LeafBank:
    """The arrays of a leaf's bank, an `ArraySpec` each, without its statistics, which have to be measured."""
    grid, names, axis = tensor_grid(config, leaf), leaf_tensors(config, leaf), leaf.sharded_axis
    shape, has_row_keys, count = sources.shape(0, names[0]), spec.method.has_row_keys, len(sources.folders)
    parents, rank = count - int(spec.options.has_base), None
    if all(sources.common_core(name) is not None for name in names):
        # All sources have one base: the bank has its leaf once, and factors of the highest rank.
        rank = max(sources.entry(s, name).rank for name in names for s in range(count))

    def array(number: int, each: tuple[int, ...], dtype: Any, axis: int | None) -> Any:
        """The spec of `number` arrays, with their axis after the layers' and before the experts'."""
        return ArraySpec((*grid[:1], number, *grid[1:], *each), np.dtype(dtype), axis)

    # Row keys are sharded with their rows; where columns are sharded, each device has the keys of all rows.
    keys_axis = axis if not has_row_keys else -2 if axis == -len(shape) else None
    dtype = common_dtype(sources, names[0])
    keys, (keys_shape, keys_dtype) = spec.method.mask_keys(parents), spec.method.mask_key_array(shape, dtype)
    return LeafBank(
        sources=array(count if rank is None else 1, shape, dtype, axis),
        # `a` has the weight's inputs, `b` its outputs.
        factors=None
        if rank is None
        else Factors(
            array(parents, (rank, shape[1]), np.float32, axis if axis == -1 else None),
            array(parents, (shape[0], rank), np.float32, axis if axis == -2 else None),
        ),
        mask_keys=array(keys, keys_shape, keys_dtype, keys_axis) if keys else None,
        group=0 if leaf.stack is None else architecture_of(config).components.index(leaf.component),
        shard_axis=axis,
        has_experts=leaf.has_experts,
    )


@dataclass(frozen=True)
class LeafReader:
    """Reads the tensors of a leaf from all sources, and measures them for the method of a merge. A process whose
    devices hold a part of the leaf reads that part; processes that share a model divide the tensors that have to be
    read whole to be measured."""

    leaf: Leaf
    config: DecoderConfig
    sources: Sources
    spec: MergeSpec
    placement: Placement = ONE_DEVICE

    @cached_property
    def layout(self) -> LeafBank:
        return leaf_layout(self.sources, self.config, self.spec, self.leaf)

    @cached_property
    def tensors(self) -> dict[tuple[int, ...], str]:
        """The names of the leaf's tensors by their places in its grid."""
        grid = tensor_grid(self.config, self.leaf)
        return dict(zip(np.ndindex(grid), leaf_tensors(self.config, self.leaf), strict=True))

    @property
    def _parents(self) -> range:
        """The numbers of the parents among the sources."""
        return range(int(self.spec.options.has_base), len(self.sources.folders))

    @property
    def _part(self) -> Part:
        """The part of each tensor that this process's devices hold."""
        return self._part_of(self.layout.sources, len(self.sources.shape(0, first_tensor(self.config, self.leaf))))

    def _part_of(self, spec: Any, axes: int) -> Part:
        """This process's part of the last axes of a layout's array."""
        return self.placement.part(spec.shape, spec.shard_axis)[-axes:] if axes else ()

    @property
    def is_measured(self) -> bool:
        """Return whether tensors have to be read whole to be measured, or to draw their random numbers."""
        return self.spec.method.measures or self.spec.method.random

    @property
    def is_prepared_anew(self) -> bool:
        """Return whether mask keys are as large as the weights: those of a part are made again when it is read."""
        return self.layout.mask_keys is not None and not self.spec.method.has_row_keys

    def measures(self, number: int) -> bool:
        """Return whether this process measures tensor `number` of the leaf's: each one where it holds them whole, or
        where mask keys are made again."""
        return self.is_measured and (not self._part or self.is_prepared_anew or self.placement.measures(number))

    def empty(self, layers: int | None = None) -> LeafBank:
        """Arrays for this process's part of the whole leaf, or of so many of its layers."""

        def array(spec: ArraySpec) -> np.ndarray:
            part = self.placement.part(spec.shape, spec.shard_axis)
            bounds = [axis.indices(size) for axis, size in zip(part, spec.shape, strict=False)]
            shape = (*(end - begin for begin, end, _ in bounds), *spec.shape[len(part) :])
            return aligned_empty(shape if layers is None else (layers, *shape[1:]), spec.dtype)

        arrays = jax.tree.map(array, self.layout)
        if arrays.factors is not None:
            # A parent of lower rank leaves the remaining numbers of its factors zero.
            arrays.factors.a[:], arrays.factors.b[:] = 0, 0
        empty: LeafBank = arrays
        return empty

    def read(self, name: str, place: tuple[int, ...], arrays: LeafBank) -> None:
        """Read this process's part of a tensor of all sources into its place in `arrays`. Raises InputError where one
        holds NaN or infinity, which would spoil every score."""
        for s, tensor in enumerate(self._views(place, arrays)):
            self.sources.read_into(None if arrays.factors is not None else s, name, tensor, self._part)
        self._read_factors(name, place, arrays)

    def _read_factors(self, name: str, place: tuple[int, ...], arrays: LeafBank) -> None:
        factors, layout = arrays.factors, self.layout.factors
        if factors is None or layout is None:
            return
        parts = [self._part_of(spec, 2) for spec in (layout.a, layout.b)]
        for k, source in enumerate(self._parents):
            a, b = self.sources.finite_factors(source, name)
            of_parent = (*place[:1], k, *place[1:])
            into_a, into_b = np.asarray(factors.a)[of_parent], np.asarray(factors.b)[of_parent]
            into_a[: len(a)], into_b[:, : len(b.T)] = a[parts[0]], b[parts[1]]

    def read_measured(self, number: int, name: str, place: tuple[int, ...], arrays: LeafBank) -> Prepared | None:
        """Read a tensor as `read` does, and measure it; None where another process does that. The result is without the
        mask keys that were entered in `arrays`. number: of the tensor among the leaf's."""
        if not self._part:
            self.read(name, place, arrays)
            prepared = self.prepare(name, place, arrays)
        elif self.measures(number):
            reader, first = replace(self, placement=ONE_DEVICE), (0, *place[1:]) if place else ()
            whole = reader.empty(None if self.leaf.stack is None else 1)
            reader.read(name, first, whole)
            prepared = reader.prepare(name, first, whole)
            for tensor, values in zip(self._views(place, arrays), reader._views(first, whole), strict=True):
                tensor[...] = values[self._part]
            self._read_factors(name, place, arrays)
        else:
            self.read(name, place, arrays)
            return None
        if self._part and not self.is_prepared_anew:
            return prepared
        self.enter_mask_keys(arrays.mask_keys, place, prepared)
        return replace(prepared, mask_keys=())

    def enter_mask_keys(self, mask_keys: Any, place: tuple[int, ...], prepared: Prepared) -> None:
        """Enter this process's part of a tensor's mask keys in their place in the leaf's."""
        for number, values in enumerate(prepared.mask_keys):
            part = self._part_of(self.layout.mask_keys, values.ndim)
            mask_keys[(*place[:1], number, *place[1:])] = values[part]

    def gathered(self, measured: Sequence[Prepared | None]) -> list[Prepared]:
        """The results of measuring all tensors of the leaf, from those that each process has measured (None: another
        process did). Processes that share the leaf do this together."""
        if not self._part or self.is_prepared_anew or not self.is_measured:
            return [prepared or Prepared((), {}) for prepared in measured]
        content = io.BytesIO()
        arrays: dict[str, Any] = {
            f"{number}/{kind}/{key}": values
            for number, prepared in enumerate(measured)
            if prepared is not None
            for kind, each in (("key", dict(enumerate(prepared.mask_keys))), ("statistic", prepared.statistics))
            for key, values in each.items()
        }
        np.savez(content, **arrays)
        results: list[tuple[dict[int, np.ndarray], dict[str, np.ndarray]]] = [({}, {}) for _ in measured]
        for each in self.placement.gather_bytes(content.getvalue()):
            with np.load(io.BytesIO(each), allow_pickle=False) as archive:
                for name, values in archive.items():
                    number, kind, key = name.split("/", 2)
                    if kind == "key":
                        results[int(number)][0][int(key)] = values
                    else:
                        results[int(number)][1][key] = values
        return [Prepared(tuple(keys[i] for i in range(len(keys))), statistics) for keys, statistics in results]

    def prepare(self, name: str, place: tuple[int, ...], arrays: LeafBank) -> Prepared:
        """The mask keys and statistics of a tensor that was read into `arrays`."""
        sources, spec = self.sources, self.spec
        tensors: list[np.ndarray] = self._views(place, arrays)
        if arrays.factors is not None:
            # All sources' tensors are read only to be measured, one name at a time.
            tensors = [sources.load(s, name) for s in range(len(sources.folders))] if spec.method.measures else []
        inputs = [(s, name) for s in range(len(sources.folders))]
        numbers = spec.prepared_for(len(self._parents))
        return prepare_or_read(tabulate, spec.method, spec.options, sources, inputs, tensors, numbers, spec.seed)

    def _views(self, place: tuple[int, ...], arrays: Any) -> list[np.ndarray]:
        """The parts of `arrays.sources` that a tensor of each source is read into."""
        stored = arrays.sources.shape[self._source_axis]
        # The ellipsis makes a view of a single number, too.
        return [arrays.sources[(*place[:1], s, *place[1:], ...)] for s in range(stored)]

    @property
    def _source_axis(self) -> int:
        return 0 if self.leaf.stack is None else 1

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one tensor of all sources, as `bank_bytes` counts them."""
        sources = self.layout.sources
        return sources.nbytes // len(self.tensors) * len(self.sources.folders) // sources.shape[self._source_axis]


def load_bank(
    sources: Sources,
    config: DecoderConfig,
    spec: MergeSpec,
    progress: Progress = lambda done: None,
    placement: Placement = ONE_DEVICE,
    on_host: bool = False,
) -> Bank:
    """Load all sources and measure the statistics that `spec.method` needs; of each leaf this process's part.
    `progress` receives the bytes of each finished tensor; on_host: the arrays stay NumPy's.

    The first of the `sources` must be the base where the method takes deltas from one. Where all sources are adapters
    of one base, or that base, the bank has each weight of the base once, and the adapters' factors.
    """

    def load_leaf(leaf: Leaf) -> LeafBank:
        reader = LeafReader(leaf, config, sources, spec, placement)
        arrays: Any = reader.empty()
        tensors = list(reader.tensors.items())

        def load_tensor(number: int) -> Prepared | None:
            place, name = tensors[number]
            prepared = reader.read_measured(number, name, place, arrays)
            progress(reader.tensor_bytes)
            return prepared

        measured = reader.gathered(list(pool.map(load_tensor, range(len(tensors)))))
        for (place, _), prepared in zip(tensors, measured, strict=True):
            reader.enter_mask_keys(arrays.mask_keys, place, prepared)
        statistics = stacked_statistics(reader, [prepared.statistics for prepared in measured])
        loaded: LeafBank = replace(arrays, statistics=statistics)
        return loaded if on_host else put_leaf(reader.layout, arrays, statistics, placement)

    with ThreadPoolExecutor(max_workers=LOADERS) as pool:
        return Bank(*leaf_trees(config, load_leaf))


def stacked_statistics(reader: LeafReader, measured: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The statistics of a leaf from those of each of its tensors."""
    grid = tensor_grid(reader.config, reader.leaf)
    return {
        key: np.stack([statistics[key] for statistics in measured]).reshape((*grid, *values.shape))
        for key, values in measured[0].items()
    }


def put_leaf(layout: LeafBank, arrays: LeafBank, statistics: dict[str, np.ndarray], placement: Placement) -> LeafBank:
    """Bring this process's part of a leaf's arrays, or of one layer of them, to the devices, cut as the leaf's layout
    says; the statistics whole."""
    loaded: LeafBank = jax.tree.map(
        lambda spec, array: placement.put(array, spec.shard_axis, (array.shape[0], *spec.shape[1:])), layout, arrays
    )
    whole = {name: placement.put(values, None, values.shape) for name, values in statistics.items()}
    return replace(loaded, statistics=whole)


def read_layers(
    sources: Sources,
    config: DecoderConfig,
    leaf: Leaf,
    origins: Sequence[tuple[int, int]],
    dtype: np.dtype,
    progress: Progress = lambda done: None,
) -> np.ndarray:
    """A leaf of the layers that are (source, layer) of `origins`, `[M, …]`. `progress` receives the bytes of each
    finished layer."""
    grid = tensor_grid(config, leaf)[1:]
    stack = aligned_empty((len(origins), *grid, *sources.shape(origins[0][0], first_tensor(config, leaf))), dtype)
    for row, (source, i) in enumerate(origins):
        for place in np.ndindex(grid):
            sources.read_into(source, leaf.tensor_of(i, *place), stack[row, *place, ...])
        progress(stack[row].nbytes)
    return stack


def load_path_bank(sources: Sources, spec: PathSpec, progress: Progress = lambda done: None) -> PathBank:
    """Load all layers of all sources into one stack, in their own dtypes. `progress` receives the bytes."""
    layers: dict[str, dict[str, jax.Array]] = {}
    shared, config, layout = {}, spec.configs[0], path_layout(spec)
    for stack, (_, places) in layout.steps_by_stack(range(len(spec.origins))).items():
        origins = [spec.origins[place] for place in places]
        layers[stack] = {
            leaf.name: put(read_layers(sources, config, leaf, origins, path_dtype(sources, spec, leaf), progress))
            for leaf in stack_leaves(config, stack)
        }
    for leaf in shared_leaves(config):
        shared[leaf.name] = tuple(jax.device_put(sources.load_finite(s, leaf.tensor)) for s in range(len(spec.configs)))
        progress(sum(values.nbytes for values in shared[leaf.name]))
    return replace(layout, layers=layers, shared=shared)


def path_dtype(sources: Sources, spec: PathSpec, leaf: Leaf) -> np.dtype:
    """The dtype that holds a leaf's layers of all sources exactly."""
    having = [(s, config) for s, config in enumerate(spec.configs) if leaf.stack in stack_numbers(config)]
    return widest([sources.entry(s, first_tensor(config, leaf)).dtype for s, config in having])


def path_layout(spec: PathSpec) -> PathBank:
    """A bank of paths without arrays of weights."""
    kinds = jax.tree.map(lambda *each: jnp.concatenate(each), *map(layer_kinds, spec.configs))
    leaves = [leaf for leaf in leaves_of(spec.configs[0]) if leaf.stack is not None and leaf.writes_residual]
    outputs = tuple((leaf.name, leaf.gain_offset) for leaf in leaves)
    types, rows, used = list[str](), list[tuple[tuple[str, int], ...]](), Counter[str]()
    for config in spec.configs:
        types += types_of_layers(config)
        for each in rows_of_layers(config):
            rows.append(tuple((stack, used[stack] + row) for stack, row in each.items()))
        used.update(stack for each in rows_of_layers(config) for stack in each)
    return PathBank({}, {}, kinds, spec.origins, tuple(types), tuple(rows), outputs, spec.export_dtype)


def bank_bytes(sources: Sources, config: DecoderConfig) -> int:
    """The bytes that `load_bank` will report as progress: those of all sources, whether or not the bank holds them
    whole."""

    def leaf_bytes(leaf: Leaf) -> int:
        name = first_tensor(config, leaf)
        return prod((*tensor_grid(config, leaf), *sources.shape(0, name))) * common_dtype(sources, name).itemsize

    return len(sources.folders) * sum(map(leaf_bytes, leaves_of(config)))


def held_bytes(sources: Sources, config: DecoderConfig, spec: MergeSpec) -> int:
    """The bytes of a loaded bank: all sources or their factors, and mask keys. Statistics are small in comparison."""
    arrays = jax.tree.leaves(leaf_trees(config, lambda leaf: leaf_layout(sources, config, spec, leaf)))
    return sum(array.nbytes for array in arrays)


def load_stored(
    sources: Sources, config: DecoderConfig, source: int = 0, compute_dtype: str = "float32"
) -> StackedWeights:
    """One source alone, as a stored model in its own dtype."""

    def load(leaf: Leaf) -> jax.Array:
        if leaf.stack is None:
            return jax.device_put(sources.load_finite(source, leaf.tensor))
        origins = [(source, i) for i in stack_numbers(config)[leaf.stack]]
        dtype = sources.entry(source, first_tensor(config, leaf)).dtype
        return put(read_layers(sources, config, leaf, origins, dtype))

    return StackedWeights(*leaf_trees(config, load), compute_dtype)


def stored_tensors(model: StackedWeights, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a stored model under the names that they have in a file."""
    for name, leaf, place in tensors_of(config):
        values = model.shared[leaf.name] if leaf.stack is None else model.stacks[leaf.stack][leaf.name][place]
        yield name, np.asarray(values)
