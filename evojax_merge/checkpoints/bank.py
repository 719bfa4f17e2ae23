"""Hugging Face folders -> bank, stored model -> Hugging Face tensors.

Loading goes tensor by tensor out of memory-mapped files into arrays that were allocated once, so that it never
needs more than the bank and one tensor. What a method has to measure is measured on the way.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from evojax_merge.models.bank import Bank, Factors, MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.layers import layer_kinds
from evojax_merge.models.paths import PathBank, PathSpec
from evojax_merge.models.sources import StackedWeights

# JAX takes a NumPy array on the CPU as it is, without a copy, where it is aligned to this many bytes.
ALIGNMENT = 64
Progress = Callable[[int], None]
# Leaves, factors, mask keys and tables by the leaf's name.
_Parts = tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]


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
    """Onto the device, whole. Waits, so that the host's copy can be forgotten before the next leaf is read."""
    return jax.block_until_ready(jax.device_put(array, may_alias=True))


def load_bank(
    sources: Sources,
    config: DecoderConfig,
    spec: MergeSpec,
    progress: Progress = lambda done: None,
    put: Callable[..., jax.Array] = put,
) -> Bank:
    """Load all sources and measure what `spec.method` needs. `progress` is told the bytes of each finished tensor;
    `put` brings an array to where it belongs, and is told the axis that is cut where devices share a model.

    `sources` must hold the base first where deltas are taken from one. Where all of them are adapters of one base, or
    that base, the bank has each weight of the base once, and the adapters' factors.
    """
    layers = depths(config)
    shared: _Parts = ({}, {}, {}, {})
    stacks: dict[str, _Parts] = {stack: ({}, {}, {}, {}) for stack in layers}
    with ThreadPoolExecutor(max_workers=4) as pool:
        for leaf in leaves_of(config):
            loaded = _load_leaf(leaf, config, sources, spec, pool, progress)
            parts, axis = shared if leaf.stack is None else stacks[leaf.stack], leaf.sharded_axis
            # What was measured of a leaf has no axes of its own.
            for i, cut in ((0, axis), (2, mask_key_axis(spec, sources, config, leaf)), (3, None)):
                if loaded[i] is not None:
                    parts[i][leaf.name] = jax.tree.map(partial(put, sharded_axis=cut), loaded[i])
            factors = loaded[1]
            if factors is not None:
                # `a` has the weight's inputs, `b` its outputs.
                cuts = (axis if axis == end else None for end in (-1, -2))
                a, b = (put(one, sharded_axis=cut) for one, cut in zip(factors, cuts, strict=True))
                parts[1][leaf.name] = Factors(a, b)
    weights, all_factors, mask_keys, tables = ({stack: parts[i] for stack, parts in stacks.items()} for i in range(4))
    experts = frozenset(leaf.name for leaf in leaves_of(config) if leaf.has_experts)
    return Bank(
        weights, shared[0], mask_keys, shared[2], tables, shared[3], component_rows(config), all_factors, shared[1],
        experts, cut_axes(config),
    )  # fmt: skip


def mask_key_axis(spec: MergeSpec, sources: Sources, config: DecoderConfig, leaf: Leaf) -> int | None:
    """The axis, counted from the end, at which a leaf's mask keys are cut where devices share a model. Row keys are cut
    with their rows; where columns are cut each device has those of all rows."""
    if not spec.method.has_row_keys:
        return leaf.sharded_axis
    rows = -len(sources.shape(0, leaf_tensors(config, leaf)[0]))
    return -2 if leaf.sharded_axis == rows else None


def component_rows(config: DecoderConfig) -> tuple[tuple[str, int], ...]:
    """The row of the component axis of each leaf of a stack."""
    row = architecture_of(config).components.index
    return tuple((leaf.name, row(leaf.component)) for leaf in leaves_of(config) if leaf.stack is not None)


def cut_axes(config: DecoderConfig) -> tuple[tuple[str, int], ...]:
    """The axis at which each leaf that devices share is cut, where they can."""
    return tuple((leaf.name, leaf.sharded_axis) for leaf in leaves_of(config) if leaf.sharded_axis is not None)


def _load_leaf(
    leaf: Leaf, config: DecoderConfig, sources: Sources, spec: MergeSpec, pool: ThreadPoolExecutor, progress: Progress
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None, np.ndarray | None, dict[str, np.ndarray] | None]:
    """One leaf: weights `[S, …]`, `[L, S, …]` or `[L, S, E, …]`, mask keys alike, and tables `[…]`, `[L, …]` or
    `[L, E, …]`. Of low-rank sources the weights are the base's, 1 in the place of S, and there are factors (see
    `Factors`)."""
    grid, names = tensor_grid(config, leaf), leaf_tensors(config, leaf)
    rank = common_rank(sources, names)
    count, shape = len(sources.folders), sources.shape(0, names[0])
    stored = count if rank is None else 1
    stack = aligned_empty((*grid[:1], stored, *grid[1:], *shape), common_dtype(sources, names[0]))
    first_parent = int(spec.options.has_base)
    factors = None
    if rank is not None:
        each, (outputs, inputs) = (*grid[:1], count - first_parent, *grid[1:]), shape
        factors = np.zeros((*each, rank, inputs), np.float32), np.zeros((*each, outputs, rank), np.float32)
    constants = spec.prepared_for(count - first_parent)
    numbers = spec.method.mask_keys(count - first_parent)
    of_one, dtype = spec.method.mask_key_array(shape)
    mask_keys = aligned_empty((*grid[:1], numbers, *grid[1:], *of_one), dtype) if numbers else None

    def one(place: tuple[int, ...], name: str) -> dict[str, np.ndarray]:
        layer, expert = place[:1], place[1:]
        own = [stack[(*layer, s, *expert)] for s in range(stored)]
        if factors is None:
            for s, tensor in enumerate(own):
                sources.read_into(s, name, tensor)
        else:
            sources.read_core_into(name, own[0])
            for k in range(count - first_parent):
                a, b = sources.finite_factors(first_parent + k, name)
                of_parent = (*layer, k, *expert)
                factors[0][of_parent][: len(a)], factors[1][of_parent][:, : len(a)] = a, b
            # Only to be measured are they all there, one tensor at a time.
            own = [sources.read(s, name) for s in range(count)] if spec.method.measures else []

        def row_keys(k: int) -> np.ndarray:
            return draw_row_keys(spec.seed, sources.digest(first_parent + k, name), shape)

        prepared = tabulate(spec.method, spec.options, own, constants, row_keys)
        for number, values in enumerate(prepared.mask_keys):
            mask_keys[(*layer, number, *expert)] = values  # type: ignore[index]
        progress(stack.nbytes // len(names) * count // stored)
        return prepared.statistics

    rows = list(pool.map(one, np.ndindex(grid), names))
    tables = {key: np.stack([row[key] for row in rows]).reshape((*grid, *rows[0][key].shape)) for key in rows[0]}
    return stack, factors, mask_keys, tables or None


def common_rank(sources: Sources, names: Sequence[str]) -> int | None:
    """The highest rank of the factors of a leaf, of which the bank then has the base once; None where its sources have
    no base in common."""
    if any(sources.common_core(name) is None for name in names):
        return None
    return max(sources.entry(s, name).rank for name in names for s in range(len(sources.folders)))


def load_path_bank(
    sources: Sources, spec: PathSpec, compute_dtype: str, progress: Progress = lambda done: None
) -> PathBank:
    """Load all layers of all sources in one series, in their own dtypes. `progress` is told the bytes."""
    origins, layers, config = spec.origins, {}, spec.configs[0]
    for leaf in stack_leaves(config, LAYERS):
        first, grid = leaf.tensor_of(), tensor_grid(config, leaf)[1:]
        stack = aligned_empty((len(origins), *grid, *sources.shape(0, first)), common_dtype(sources, first))
        for row, (source, i) in zip(stack, origins, strict=True):
            for place in np.ndindex(grid):
                sources.read_into(source, leaf.tensor_of(i, *place), row[place])
            progress(row.nbytes)
        layers[leaf.name] = put(stack)
    shared = {}
    for leaf in shared_leaves(config):
        shared[leaf.name] = tuple(jax.device_put(sources.read_finite(s, leaf.tensor)) for s in range(len(spec.configs)))
        progress(sum(values.nbytes for values in shared[leaf.name]))
    kinds = jax.tree.map(lambda *each: jnp.concatenate(each), *map(layer_kinds, spec.configs))
    outputs = tuple((leaf.name, leaf.gain_offset) for leaf in stack_leaves(config, LAYERS) if leaf.writes_residual)
    return PathBank(layers, shared, kinds, origins, outputs, spec.export_dtype, compute_dtype)


def _entries(sources: Sources, leaf: Leaf, config: DecoderConfig) -> int:
    """How many numbers of a leaf a source has."""
    return int(np.prod((*tensor_grid(config, leaf), *sources.shape(0, leaf.tensor_of())), dtype=np.int64))


def bank_bytes(sources: Sources, config: DecoderConfig) -> int:
    """Bytes that `load_bank` will report as progress: of all sources, whether or not the bank has them as a whole."""
    return len(sources.folders) * sum(
        _entries(sources, leaf, config) * common_dtype(sources, leaf.tensor_of()).itemsize for leaf in leaves_of(config)
    )


def held_bytes(sources: Sources, config: DecoderConfig, spec: MergeSpec | PathSpec) -> int:
    """Bytes that a loaded bank takes: all sources, and the mask keys that a method prepares."""
    count = len(sources.folders)
    mask_keys = (
        len(names) * spec.mask_key_bytes(count, sources.shape(0, names[0]))
        for names in (leaf_tensors(config, leaf) for leaf in leaves_of(config))
    )
    return bank_bytes(sources, config) + sum(mask_keys)


def bytes_saved(sources: Sources, config: DecoderConfig, has_base: bool) -> int:
    """Bytes by which a bank of low-rank sources is smaller than one of all their weights."""
    count, saved = len(sources.folders), 0
    for leaf in leaves_of(config):
        names = leaf_tensors(config, leaf)
        rank = common_rank(sources, names)
        if rank is not None:
            weights = _entries(sources, leaf, config) * common_dtype(sources, names[0]).itemsize
            factors = (count - int(has_base)) * len(names) * rank * sum(sources.shape(0, names[0]))
            saved += (count - 1) * weights - factors * np.dtype(np.float32).itemsize
    return saved


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
