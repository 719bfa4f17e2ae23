"""Hugging Face folders -> bank, stored model -> Hugging Face tensors.

Loading goes tensor by tensor out of memory-mapped files into arrays that were allocated once, so that it never
needs more than the bank and one tensor. What a method has to measure is measured on the way.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from merge_kernels import draw_uniform, tabulate

from evojax_merge.checkpoints.architectures import COMPONENTS, layer_leaves, shared_leaves
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.models.bank import Bank, MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.paths import PathBank, PathSpec
from evojax_merge.models.sources import StackedWeights

# JAX takes a NumPy array on the CPU as it is, without a copy, where it is aligned to this many bytes.
ALIGNMENT = 64
Progress = Callable[[int], None]
# Leaves, scores and tables by the leaf's name.
_Parts = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def common_dtype(sources: Sources, tensor: str) -> np.dtype:
    """The narrowest dtype that holds every source's values."""
    import jax.numpy as jnp

    dtypes = [sources.entry(s, tensor).dtype for s in range(len(sources.folders))]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = np.dtype(jnp.promote_types(widest, dtype))
    return widest


def put(name: str, array: np.ndarray) -> jax.Array:
    """Onto the device. Waits, so that the host's copy can be forgotten before the next leaf is read."""
    return jax.block_until_ready(jax.device_put(array, may_alias=True))


def load_bank(
    sources: Sources,
    config: DecoderConfig,
    spec: MergeSpec,
    progress: Progress = lambda done: None,
    put: Callable[[str, np.ndarray], jax.Array] = put,
) -> Bank:
    """Load all sources and measure what `spec.method` needs. `progress` is told the bytes of each finished tensor;
    `put` brings a leaf, of which it is told the name, to where it belongs.

    `sources` must hold the base first where deltas are taken from one.
    """
    layer: _Parts = ({}, {}, {})
    shared: _Parts = ({}, {}, {})
    with ThreadPoolExecutor(max_workers=4) as pool:
        for leaf in layer_leaves(config) + shared_leaves(config):
            in_layers = "{i}" in leaf.tensor
            tensors = [leaf.tensor.format(i=i) for i in range(config.layers)] if in_layers else [leaf.tensor]
            loaded = _load_leaf(tensors, sources, spec, pool, progress)
            # What was measured of a leaf has no axes of its own.
            names = (leaf.name, leaf.name, "")
            for part, value, name in zip(layer if in_layers else shared, loaded, names, strict=True):
                if value is not None:
                    # A shared leaf was loaded as a stack of one.
                    part[leaf.name] = jax.tree.map(
                        lambda x, name=name, all_=in_layers: put(name, x if all_ else x[0]), value
                    )
    components = tuple((leaf.name, COMPONENTS.index(leaf.component)) for leaf in layer_leaves(config))
    return Bank(layer[0], shared[0], layer[1], shared[1], layer[2], shared[2], components)


def _load_leaf(
    names: list[str], sources: Sources, spec: MergeSpec, pool: ThreadPoolExecutor, progress: Progress
) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray] | None]:
    """One leaf of the tensors `names` (one per layer): weights `[len(names), S, …]`, scores, tables."""
    count, shape = len(sources.folders), sources.shape(0, names[0])
    stack = aligned_empty((len(names), count, *shape), common_dtype(sources, names[0]))
    first_parent = int(spec.options.has_base)
    constants = spec.prepared_for(count - first_parent)
    numbers = spec.method.keep_keys(count - first_parent)
    keep_keys = aligned_empty((len(names), numbers, *shape), np.dtype(np.uint16)) if numbers else None

    def one(i: int) -> dict[str, np.ndarray]:
        for s in range(count):
            sources.read_into(s, names[i], stack[i, s])

        def uniform_noise(k: int) -> np.ndarray:
            return draw_uniform(spec.seed, sources.digest(first_parent + k, names[i]), shape)

        prepared = tabulate(spec.method, spec.options, list(stack[i]), constants, uniform_noise)
        for number, values in enumerate(prepared.keep_keys):
            keep_keys[i, number] = values  # type: ignore[index]
        progress(stack[i].nbytes)
        return prepared.statistics

    rows = list(pool.map(one, range(len(names))))
    tables = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return stack, keep_keys, tables or None


def load_path_bank(
    sources: Sources, spec: PathSpec, compute_dtype: str, progress: Progress = lambda done: None
) -> PathBank:
    """Load all layers of all sources in one series, in their own dtypes. `progress` is told the bytes."""
    origins, layers = spec.origins, {}
    for leaf in layer_leaves(spec.configs[0]):
        first = leaf.tensor.format(i=0)
        stack = aligned_empty((len(origins), *sources.shape(0, first)), common_dtype(sources, first))
        for row, (source, i) in zip(stack, origins, strict=True):
            sources.read_into(source, leaf.tensor.format(i=i), row)
            progress(row.nbytes)
        layers[leaf.name] = put(leaf.name, stack)
    shared = {}
    for leaf in shared_leaves(spec.configs[0]):
        shared[leaf.name] = tuple(jax.device_put(sources.read_finite(s, leaf.tensor)) for s in range(len(spec.configs)))
        progress(sum(values.nbytes for values in shared[leaf.name]))
    windows = np.array([window for config in spec.configs for window in config.windows], np.int32)
    return PathBank(layers, shared, jax.device_put(windows), origins, spec.export_dtype, compute_dtype)


def bank_bytes(sources: Sources, config: DecoderConfig) -> int:
    """Bytes that `load_bank` will report as progress."""
    total = 0
    for leaf in layer_leaves(config) + shared_leaves(config):
        repeats = config.layers if "{i}" in leaf.tensor else 1
        name = leaf.tensor.format(i=0)
        size = int(np.prod(sources.shape(0, name), dtype=np.int64)) * common_dtype(sources, name).itemsize
        total += repeats * size * len(sources.folders)
    return total


def held_bytes(sources: Sources, config: DecoderConfig, spec: MergeSpec | PathSpec) -> int:
    """Bytes that a loaded bank takes: all sources, and the 16-bit numbers of each entry that a method prepares."""
    total = bank_bytes(sources, config)
    if isinstance(spec, PathSpec):
        return total
    count = len(sources.folders)
    numbers = spec.method.keep_keys(count - int(spec.options.has_base))
    entries = sum(
        (config.layers if "{i}" in leaf.tensor else 1)
        * int(np.prod(sources.shape(0, leaf.tensor.format(i=0)), dtype=np.int64))
        for leaf in layer_leaves(config) + shared_leaves(config)
    )
    return total + numbers * entries * np.dtype(np.uint16).itemsize


def load_stored(
    sources: Sources, config: DecoderConfig, source: int = 0, compute_dtype: str = "float32"
) -> StackedWeights:
    """One source alone, as a stored model in its own dtype."""
    layers = {}
    for leaf in layer_leaves(config):
        names = [leaf.tensor.format(i=i) for i in range(config.layers)]
        stack = aligned_empty((config.layers, *sources.shape(source, names[0])), sources.entry(source, names[0]).dtype)
        for i, name in enumerate(names):
            sources.read_into(source, name, stack[i])
        layers[leaf.name] = put(leaf.name, stack)
    shared = {leaf.name: jax.device_put(sources.read_finite(source, leaf.tensor)) for leaf in shared_leaves(config)}
    return StackedWeights(layers, shared, compute_dtype)


def stored_tensors(model: StackedWeights, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a stored model under their Hugging Face names."""
    for leaf in shared_leaves(config):
        yield leaf.tensor, np.asarray(model.shared[leaf.name])
    for i in range(config.layers):
        for leaf in layer_leaves(config):
            yield leaf.tensor.format(i=i), np.asarray(model.layers[leaf.name][i])
