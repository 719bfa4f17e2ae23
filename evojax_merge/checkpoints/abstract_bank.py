"""The shapes of a bank, by headers alone: what a search is planned with before any weight is read, or downloaded."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from merge_kernels import draw_row_keys, tabulate

from evojax_merge.checkpoints.bank import common_dtype, common_rank, component_rows, cut_axes, mask_key_axis
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.models.architecture import depths, leaf_tensors, leaves_of, tensor_grid
from evojax_merge.models.bank import Bank, Factors, MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.sources import StackedWeights

# (shape, dtype, the axis that is cut where devices share a model, counted from the end) -> an abstract array.
Place = Callable[[tuple[int, ...], Any, int | None], jax.ShapeDtypeStruct]
# Axes of the small tensors that stand for a leaf's while it is found what is measured of one: no two have one length,
# nor has anything that is measured a length of its own among them.
_AXES = (37, 41, 43, 47)


def anywhere(shape: tuple[int, ...], dtype: Any, sharded_axis: int | None = None) -> jax.ShapeDtypeStruct:
    """An abstract array on no device in particular."""
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))


def abstract_bank(sources: Sources, config: DecoderConfig, spec: MergeSpec, place: Place = anywhere) -> Bank:
    """What `load_bank` would make of the sources, as abstract arrays."""
    layers, count = depths(config), len(sources.folders)
    parents = count - int(spec.options.has_base)
    numbers = spec.method.mask_keys(parents)
    # Weights, factors, mask keys and tables by the leaf's name.
    shared: tuple[dict[str, Any], ...] = ({}, {}, {}, {})
    stacks: dict[str, tuple[dict[str, Any], ...]] = {stack: ({}, {}, {}, {}) for stack in layers}
    for leaf in leaves_of(config):
        grid, names, axis = tensor_grid(config, leaf), leaf_tensors(config, leaf), leaf.sharded_axis
        shape, rank = sources.shape(0, names[0]), common_rank(sources, names)
        parts = shared if leaf.stack is None else stacks[leaf.stack]

        def several(
            number: int, own: tuple[int, ...], dtype: Any, cut: int | None, grid: tuple[int, ...] = grid
        ) -> jax.ShapeDtypeStruct:
            return place((*grid[:1], number, *grid[1:], *own), dtype, cut)

        parts[0][leaf.name] = several(count if rank is None else 1, shape, common_dtype(sources, names[0]), axis)
        if rank is not None:
            a = several(parents, (rank, shape[1]), np.float32, axis if axis == -1 else None)
            b = several(parents, (shape[0], rank), np.float32, axis if axis == -2 else None)
            parts[1][leaf.name] = Factors(a, b)  # type: ignore[arg-type]
        if numbers:
            of_one, dtype = spec.method.mask_key_array(shape)
            parts[2][leaf.name] = several(numbers, of_one, dtype, mask_key_axis(spec, sources, config, leaf))
        measured = _statistics(spec, count, shape)
        if measured:
            parts[3][leaf.name] = {name: place((*grid, *own.shape), own.dtype, None) for name, own in measured.items()}
    weights, factors, mask_keys, tables = ({stack: parts[i] for stack, parts in stacks.items()} for i in range(4))
    experts = frozenset(leaf.name for leaf in leaves_of(config) if leaf.has_experts)
    return Bank(
        weights, shared[0], mask_keys, shared[2], tables, shared[3], component_rows(config), factors, shared[1],
        experts, cut_axes(config),
    )  # fmt: skip


def abstract_stored(
    sources: Sources, config: DecoderConfig, compute_dtype: str, place: Place = anywhere
) -> StackedWeights:
    """What `load_stored` would make of the first source, as abstract arrays."""
    stacks: dict[str, Any] = {stack: {} for stack in depths(config)}
    shared: dict[str, Any] = {}
    for leaf in leaves_of(config):
        name = leaf_tensors(config, leaf)[0]
        shape = *tensor_grid(config, leaf), *sources.shape(0, name)
        into = shared if leaf.stack is None else stacks[leaf.stack]
        into[leaf.name] = place(shape, sources.entry(0, name).dtype, leaf.sharded_axis)
    return StackedWeights(stacks, shared, compute_dtype)


def _statistics(spec: MergeSpec, count: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """The shapes of what a method measures of tensors of a shape: found by measuring small ones, of as many axes."""
    small = _AXES[: len(shape)]
    has_base = int(spec.options.has_base)

    def row_keys(k: int) -> np.ndarray:
        return draw_row_keys(spec.seed, bytes([k]), small)

    # Task vectors that are not zero, nor alike.
    sources = list(np.random.default_rng(0).normal(size=(count, *small)).astype(np.float32))
    prepared = tabulate(spec.method, spec.options, sources, spec.prepared_for(count - has_base), row_keys)
    real: dict[int, int] = dict(zip(small, shape, strict=True))
    return {
        name: anywhere(tuple(real.get(length, length) for length in map(int, values.shape)), values.dtype)
        for name, values in prepared.statistics.items()
    }
