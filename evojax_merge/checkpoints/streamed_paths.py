"""Banks of layer paths whose layers stay on the host, or in the models' files, until a path comes to them."""

from collections.abc import Callable

import jax
import numpy as np

from evojax_merge.checkpoints.bank import Progress, common_dtype, path_layout, put, read_layers
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.checkpoints.streamed import FileStates
from evojax_merge.models.architecture import LAYERS, shared_leaves, stack_leaves
from evojax_merge.models.paths import PathSpec, StreamedPathBank

Arrays = dict[str, np.ndarray]


def path_bank_on_host(sources: Sources, spec: PathSpec, progress: Progress = lambda done: None) -> StreamedPathBank:
    """Load all layers of all sources into the host's memory. `progress` receives the bytes of each part."""

    def loaded(read: Callable[[Sources, PathSpec, int], Arrays], count: int) -> list[Arrays]:
        parts = []
        for number in range(count):
            parts.append(read(sources, spec, number))
            progress(sum(array.nbytes for array in parts[-1].values()))
        return parts

    layers, ends = loaded(_read_layer, len(spec.origins)), loaded(_read_ends, len(spec.configs))
    return StreamedPathBank(
        path_layout(spec), lambda number: _put(layers[number]), lambda parent: _put(ends[parent]), lambda: None
    )


def path_bank_in_files(sources: Sources, spec: PathSpec, progress: Progress = lambda done: None) -> StreamedPathBank:
    """A bank whose layers are read from the models' files whenever a path comes to them."""
    return StreamedPathBank(
        path_layout(spec), lambda number: _put(_read_layer(sources, spec, number)),
        lambda parent: _put(_read_ends(sources, spec, parent)), FileStates.of(sources.folders).check,
    )  # fmt: skip


def _put(arrays: Arrays) -> dict[str, jax.Array]:
    return {name: put(array) for name, array in arrays.items()}


def _read_layer(sources: Sources, spec: PathSpec, number: int) -> Arrays:
    """One of the M layers: leaf -> `[1, …]`."""
    config, origins = spec.configs[0], spec.origins[number : number + 1]
    return {
        leaf.name: read_layers(sources, config, leaf, origins, common_dtype(sources, leaf.tensor_of()))
        for leaf in stack_leaves(config, LAYERS)
    }


def _read_ends(sources: Sources, spec: PathSpec, parent: int) -> Arrays:
    """A parent's leaves outside of the layers."""
    return {leaf.name: sources.load_finite(parent, leaf.tensor) for leaf in shared_leaves(spec.configs[0])}
