"""The shapes of a bank, from file headers alone: a search is planned with them before any weight is read or
downloaded."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from merge_kernels import draw_row_keys, tabulate

from evojax_merge.checkpoints.bank import leaf_layout, leaf_trees
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.models.architecture import Leaf, leaf_tensors, tensor_grid
from evojax_merge.models.bank import Bank, LeafBank, MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.sources import StackedWeights

# (shape, dtype, the axis, counted from the end, that is sharded where devices share a model) -> an abstract array.
Place = Callable[[tuple[int, ...], Any, int | None], jax.ShapeDtypeStruct]
# Axis lengths of small stand-ins for a leaf's tensors, on which the shapes of its statistics are measured. No two are
# equal, and no statistic has an axis of its own of one of these lengths.
_AXES = (37, 41, 43, 47)


def anywhere(shape: tuple[int, ...], dtype: Any, sharded_axis: int | None = None) -> jax.ShapeDtypeStruct:
    """An abstract array on no device in particular."""
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))


def abstract_bank(sources: Sources, config: DecoderConfig, spec: MergeSpec, place: Place = anywhere) -> Bank:
    """The bank that `load_bank` would make of the sources, as abstract arrays."""

    def abstract_leaf(leaf: Leaf) -> LeafBank:
        layout = leaf_layout(sources, config, spec, leaf)
        arrays = jax.tree.map(lambda array: place(array.shape, array.dtype, array.shard_axis), layout)
        grid, shape = tensor_grid(config, leaf), sources.shape(0, leaf_tensors(config, leaf)[0])
        measured = _statistics(spec, len(sources.folders), shape)
        statistics = {
            name: place((*grid, *statistic.shape), statistic.dtype, None) for name, statistic in measured.items()
        }
        return replace(arrays, statistics=statistics)

    return Bank(*leaf_trees(config, abstract_leaf))


def abstract_stored(
    sources: Sources, config: DecoderConfig, compute_dtype: str, place: Place = anywhere
) -> StackedWeights:
    """The stored model that `load_stored` would make of the first source, as abstract arrays."""

    def abstract_leaf(leaf: Leaf) -> Any:
        name = leaf_tensors(config, leaf)[0]
        shape = *tensor_grid(config, leaf), *sources.shape(0, name)
        return place(shape, sources.entry(0, name).dtype, leaf.sharded_axis)

    return StackedWeights(*leaf_trees(config, abstract_leaf), compute_dtype)


def _statistics(spec: MergeSpec, count: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """The shapes of a method's statistics for tensors of a shape, from measuring small tensors of as many axes."""
    small = _AXES[: len(shape)]
    has_base = int(spec.options.has_base)

    def row_keys(k: int) -> np.ndarray:
        return draw_row_keys(spec.seed, bytes([k]), small)

    # Task vectors that are neither zero nor equal.
    sources = list(np.random.default_rng(0).normal(size=(count, *small)).astype(np.float32))
    prepared = tabulate(spec.method, spec.options, sources, spec.prepared_for(count - has_base), row_keys)
    real: dict[int, int] = dict(zip(small, shape, strict=True))
    return {
        name: anywhere(tuple(real.get(length, length) for length in map(int, values.shape)), values.dtype)
        for name, values in prepared.statistics.items()
    }
