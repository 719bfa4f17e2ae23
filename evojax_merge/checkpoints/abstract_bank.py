"""The shapes of a bank, by headers alone: what a search is planned with before any weight is read, or downloaded."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from merge_kernels import draw_uniform, tabulate

from evojax_merge.checkpoints.bank import _components, common_dtype
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.models.architecture import depths, leaves_of
from evojax_merge.models.bank import Bank, MergeSpec
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
    numbers = spec.prepared_arrays(count)
    weights: dict[str, Any] = {stack: {} for stack in layers}
    keep_keys: dict[str, Any] = {stack: {} for stack in layers}
    tables: dict[str, Any] = {stack: {} for stack in layers}
    shared: tuple[dict[str, Any], ...] = ({}, {}, {})
    for leaf in leaves_of(config):
        name, shape = leaf.tensors(layers)[0], sources.shape(0, leaf.tensors(layers)[0])
        lead = () if leaf.stack is None else (layers[leaf.stack],)
        parts = shared if leaf.stack is None else tuple(kind[leaf.stack] for kind in (weights, keep_keys, tables))
        parts[0][leaf.name] = place((*lead, count, *shape), common_dtype(sources, name), leaf.sharded_axis)
        if numbers:
            parts[1][leaf.name] = place((*lead, numbers, *shape), np.uint16, leaf.sharded_axis)
        measured = _statistics(spec, count, shape)
        if measured:
            parts[2][leaf.name] = {
                statistic: place((*lead, *own.shape), own.dtype, None) for statistic, own in measured.items()
            }
    return Bank(weights, shared[0], keep_keys, shared[1], tables, shared[2], _components(config))


def abstract_stored(
    sources: Sources, config: DecoderConfig, compute_dtype: str, place: Place = anywhere
) -> StackedWeights:
    """What `load_stored` would make of the first source, as abstract arrays."""
    layers = depths(config)
    stacks: dict[str, Any] = {stack: {} for stack in layers}
    shared: dict[str, Any] = {}
    for leaf in leaves_of(config):
        name = leaf.tensors(layers)[0]
        shape, dtype = sources.shape(0, name), sources.entry(0, name).dtype
        if leaf.stack is None:
            shared[leaf.name] = place(shape, dtype, leaf.sharded_axis)
        else:
            stacks[leaf.stack][leaf.name] = place((layers[leaf.stack], *shape), dtype, leaf.sharded_axis)
    return StackedWeights(stacks, shared, compute_dtype)


def _statistics(spec: MergeSpec, count: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """The shapes of what a method measures of tensors of a shape: found by measuring small ones, of as many axes."""
    small = _AXES[: len(shape)]
    has_base = int(spec.options.has_base)

    def uniform_noise(k: int) -> np.ndarray:
        return draw_uniform(spec.seed, bytes([k]), small)

    # Task vectors that are not zero, nor alike.
    sources = list(np.random.default_rng(0).normal(size=(count, *small)).astype(np.float32))
    prepared = tabulate(spec.method, spec.options, sources, spec.prepared_for(count - has_base), uniform_noise)
    real: dict[int, int] = dict(zip(small, shape, strict=True))
    return {
        name: anywhere(tuple(real.get(length, length) for length in map(int, values.shape)), values.dtype)
        for name, values in prepared.statistics.items()
    }
