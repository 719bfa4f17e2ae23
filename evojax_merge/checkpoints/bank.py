"""Hugging Face folders -> bank, stored model -> Hugging Face tensors.

Loading copies tensor by tensor from memory-mapped files into arrays that were allocated once, so that it never needs
more memory than the bank and one tensor. A method's statistics are measured on the way.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import draw_row_keys, tabulate

from evojax_merge.checkpoints.parents import Sources
from evojax_merge.models.architecture import (
    LAYERS,
    Leaf,
    architecture_of,
    depths,
    leaf_tensors,
    leaves_of,
    shared_leaves,
    stack_leaves,
    tensor_grid,
    tensors_of,
)
from evojax_merge.models.bank import Bank, Factors, LeafBank, MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.layers import layer_kinds
from evojax_merge.models.paths import PathBank, PathSpec
from evojax_merge.models.sources import StackedWeights

# JAX takes a NumPy array on the CPU as it is, without a copy, where it is aligned to this many bytes.
ALIGNMENT = 64
Progress = Callable[[int], None]
# (array, the axis, counted from the end, that is sharded where devices share a model) -> the array on its devices.
Put = Callable[[np.ndarray, int | None], jax.Array]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def common_dtype(sources: Sources, tensor: str) -> np.dtype:
    """The narrowest dtype that holds every source's values."""
    dtypes = [sources.entry(s, tensor).dtype for s in range(len(sources.folders))]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = np.dtype(jnp.promote_types(widest, dtype))
    return widest


def put(array: np.ndarray, sharded_axis: int | None = None) -> jax.Array:
    """Put a whole array onto the device. Waits, so that the host's copy can be freed before the next leaf is read."""
    return jax.block_until_ready(jax.device_put(array, may_alias=True))


@dataclass(frozen=True)
class ArraySpec:
    """The shape and dtype of a bank's array, before the array exists. shard_axis: the axis, counted from the end, that
    is sharded where devices share a model; None: each device has the whole array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    shard_axis: int | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def bank_of(config: DecoderConfig, make: Callable[[Leaf], LeafBank]) -> Bank:
    """A bank of the leaves of a model, each made by `make`."""
    bank = Bank({stack: {} for stack in depths(config)}, {})
    for leaf in leaves_of(config):
        leaves = bank.shared if leaf.stack is None else bank.stacks[leaf.stack]
        leaves[leaf.name] = make(leaf)
    return bank


def leaf_layout(sources: Sources, config: DecoderConfig, spec: MergeSpec, leaf: Leaf) -> LeafBank:
    """The arrays of a leaf's bank, an `ArraySpec` each, without its statistics, which have to be measured."""
    grid, names, axis = tensor_grid(config, leaf), leaf_tensors(config, leaf), leaf.sharded_axis
    shape, rank, has_row_keys = sources.shape(0, names[0]), common_rank(sources, names), spec.method.has_row_keys
    parents = len(sources.folders) - int(spec.options.has_base)

    def array(number: int, each: tuple[int, ...], dtype: Any, axis: int | None) -> Any:
        """The spec of `number` arrays, with their axis after the layers' and before the experts'."""
        return ArraySpec((*grid[:1], number, *grid[1:], *each), np.dtype(dtype), axis)

    # Row keys are sharded with their rows; where columns are sharded, each device has the keys of all rows.
    keys_axis = axis if not has_row_keys else -2 if axis == -len(shape) else None
    keys, (keys_shape, keys_dtype) = spec.method.mask_keys(parents), spec.method.mask_key_array(shape)
    return LeafBank(
        sources=array(len(sources.folders) if rank is None else 1, shape, common_dtype(sources, names[0]), axis),
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


def load_bank(
    sources: Sources,
    config: DecoderConfig,
    spec: MergeSpec,
    progress: Progress = lambda done: None,
    put: Put = put,
) -> Bank:
    """Load all sources and measure the statistics that `spec.method` needs. `progress` receives the bytes of each
    finished tensor; `put` brings an array to its devices.

    The first of the `sources` must be the base where the method takes deltas from one. Where all sources are adapters
    of one base, or that base, the bank has each weight of the base once, and the adapters' factors.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        return bank_of(config, lambda leaf: _load_leaf(leaf, config, sources, spec, pool, progress, put))


def _load_leaf(
    leaf: Leaf, config: DecoderConfig, sources: Sources, spec: MergeSpec, pool: ThreadPoolExecutor, progress: Progress,
    put: Put,
) -> LeafBank:  # fmt: skip
    layout, grid, names = (
        leaf_layout(sources, config, spec, leaf),
        tensor_grid(config, leaf),
        leaf_tensors(config, leaf),
    )
    arrays = jax.tree.map(lambda array: aligned_empty(array.shape, array.dtype), layout)
    weights, factors, mask_keys = arrays.sources, arrays.factors, arrays.mask_keys
    if factors is not None:
        # A parent of lower rank leaves the remaining numbers of its factors zero.
        factors.a[:], factors.b[:] = 0, 0
    count, stored = len(sources.folders), weights.shape[len(grid[:1])]
    shape, first_parent = sources.shape(0, names[0]), int(spec.options.has_base)
    constants = spec.prepared_for(count - first_parent)

    def load_tensor(place: tuple[int, ...], name: str) -> dict[str, np.ndarray]:
        layer, expert = place[:1], place[1:]
        tensors = [weights[(*layer, s, *expert)] for s in range(stored)]
        if factors is None:
            for s, tensor in enumerate(tensors):
                sources.read_into(s, name, tensor)
        else:
            sources.read_core_into(name, tensors[0])
            for k in range(count - first_parent):
                a, b = sources.finite_factors(first_parent + k, name)
                of_parent = (*layer, k, *expert)
                factors.a[of_parent][: len(a)], factors.b[of_parent][:, : len(a)] = a, b
            # All sources' tensors are read only to be measured, one name at a time.
            tensors = [sources.read(s, name) for s in range(count)] if spec.method.measures else []

        def row_keys(k: int) -> np.ndarray:
            return draw_row_keys(spec.seed, sources.digest(first_parent + k, name), shape)

        prepared = tabulate(spec.method, spec.options, tensors, constants, row_keys)
        for number, values in enumerate(prepared.mask_keys):
            mask_keys[(*layer, number, *expert)] = values
        progress(weights.nbytes // len(names) * count // stored)
        return prepared.statistics

    measured = list(pool.map(load_tensor, np.ndindex(grid), names))
    statistics = {
        key: np.stack([statistics_of_tensor[key] for statistics_of_tensor in measured]).reshape(
            (*grid, *measured[0][key].shape)
        )
        for key in measured[0]
    }
    loaded: LeafBank = jax.tree.map(lambda spec, array: put(array, spec.shard_axis), layout, arrays)
    return replace(loaded, statistics={name: put(values, None) for name, values in statistics.items()})


def common_rank(sources: Sources, names: Sequence[str]) -> int | None:
    """The highest rank of a leaf's factors; None where its sources have no base in common. With a rank, the bank has
    the base's leaf once."""
    if any(sources.common_core(name) is None for name in names):
        return None
    return max(sources.entry(s, name).rank for name in names for s in range(len(sources.folders)))


def load_path_bank(sources: Sources, spec: PathSpec, progress: Progress = lambda done: None) -> PathBank:
    """Load all layers of all sources into one stack, in their own dtypes. `progress` receives the bytes."""
    origins, layers, config = spec.origins, {}, spec.configs[0]
    for leaf in stack_leaves(config, LAYERS):
        first, grid = leaf.tensor_of(), tensor_grid(config, leaf)[1:]
        stack = aligned_empty((len(origins), *grid, *sources.shape(0, first)), common_dtype(sources, first))
        for layer, (source, i) in zip(stack, origins, strict=True):
            for place in np.ndindex(grid):
                sources.read_into(source, leaf.tensor_of(i, *place), layer[place])
            progress(layer.nbytes)
        layers[leaf.name] = put(stack)
    shared = {}
    for leaf in shared_leaves(config):
        shared[leaf.name] = tuple(jax.device_put(sources.read_finite(s, leaf.tensor)) for s in range(len(spec.configs)))
        progress(sum(values.nbytes for values in shared[leaf.name]))
    kinds = jax.tree.map(lambda *each: jnp.concatenate(each), *map(layer_kinds, spec.configs))
    outputs = tuple((leaf.name, leaf.gain_offset) for leaf in stack_leaves(config, LAYERS) if leaf.writes_residual)
    return PathBank(layers, shared, kinds, origins, outputs, spec.export_dtype)


def _entries(sources: Sources, leaf: Leaf, config: DecoderConfig) -> int:
    """The number of a leaf's elements in one source."""
    return int(np.prod((*tensor_grid(config, leaf), *sources.shape(0, leaf.tensor_of())), dtype=np.int64))


def bank_bytes(sources: Sources, config: DecoderConfig) -> int:
    """The bytes that `load_bank` will report as progress: those of all sources, whether or not the bank holds them
    whole."""
    return len(sources.folders) * sum(
        _entries(sources, leaf, config) * common_dtype(sources, leaf.tensor_of()).itemsize for leaf in leaves_of(config)
    )


def held_bytes(sources: Sources, config: DecoderConfig, spec: MergeSpec) -> int:
    """The bytes of a loaded bank: all sources or their factors, and mask keys. Statistics are small in comparison."""
    arrays = jax.tree.leaves(bank_of(config, lambda leaf: leaf_layout(sources, config, spec, leaf)))
    return sum(array.nbytes for array in arrays)


def load_stored(
    sources: Sources, config: DecoderConfig, source: int = 0, compute_dtype: str = "float32"
) -> StackedWeights:
    """One source alone, as a stored model in its own dtype."""
    stacks: dict[str, dict[str, jax.Array]] = {stack: {} for stack in depths(config)}
    shared = {}
    for leaf in leaves_of(config):
        if leaf.stack is None:
            shared[leaf.name] = jax.device_put(sources.read_finite(source, leaf.tensor))
            continue
        grid, first = tensor_grid(config, leaf), leaf.tensor_of()
        stack = aligned_empty((*grid, *sources.shape(source, first)), sources.entry(source, first).dtype)
        for place in np.ndindex(grid):
            sources.read_into(source, leaf.tensor_of(*place), stack[place])
        stacks[leaf.stack][leaf.name] = put(stack)
    return StackedWeights(stacks, shared, compute_dtype)


def stored_tensors(model: StackedWeights, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a stored model under the names that they have in a file."""
    for name, leaf, place in tensors_of(config):
        values = model.shared[leaf.name] if leaf.stack is None else model.stacks[leaf.stack][leaf.name][place]
        yield name, np.asarray(values)
