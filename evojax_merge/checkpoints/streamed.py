"""Banks of merges and of layer paths whose layers stay on the host, or in the models' files, until they are needed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from merge_kernels import Prepared

from evojax_merge.checkpoints.abstract_bank import abstract_bank
from evojax_merge.checkpoints.bank import (
    ONE_DEVICE,
    LeafReader,
    Placement,
    Progress,
    load_bank,
    path_dtype,
    path_layout,
    put,
    put_leaf,
    read_layers,
    stacked_statistics,
)
from evojax_merge.checkpoints.folder import Folder, files_of
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.errors import Failed
from evojax_merge.models.architecture import leaves_of, rows_of_layers, shared_leaves, stack_leaves, tensor_grid
from evojax_merge.models.bank import LeafBank, MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.paths import PathSpec, StreamedPathBank
from evojax_merge.models.streamed_bank import StreamedBank

Arrays = dict[str, np.ndarray]


def bank_on_host(
    sources: Sources, config: DecoderConfig, spec: MergeSpec, progress: Progress = lambda done: None,
    placement: Placement = ONE_DEVICE,
) -> StreamedBank:  # fmt: skip
    """Load all sources into the host's memory (see `load_bank`)."""
    bank = load_bank(sources, config, spec, progress, placement, on_host=True)
    stacked = {name: leaf for leaves in bank.stacks.values() for name, leaf in leaves.items()}
    layouts = {leaf.name: LeafReader(leaf, config, sources, spec).layout for leaf in leaves_of(config)}

    def load(name: str, number: int | None) -> LeafBank:
        leaf: Any = bank.shared[name] if number is None else _layer_of(stacked[name], number)
        return put_leaf(layouts[name], replace(leaf, statistics={}), leaf.statistics, placement)

    return _streamed(sources, config, spec, load)


def bank_in_files(
    sources: Sources, config: DecoderConfig, spec: MergeSpec, progress: Progress = lambda done: None,
    placement: Placement = ONE_DEVICE,
) -> StreamedBank:  # fmt: skip
    """A bank whose parts are read from the models' files whenever they are needed. All tensors are read once here where
    the method measures them; that, and two numbers per row of random methods, are kept. `progress` receives the bytes
    of each finished tensor."""
    leaves = {leaf.name: LeafFiles(LeafReader(leaf, config, sources, spec, placement)) for leaf in leaves_of(config)}
    for leaf in leaves.values():
        leaf.measure(progress)
    check = FileStates.of(sources.folders).check
    return _streamed(sources, config, spec, lambda name, number: leaves[name].load(number), check)


def _streamed(
    sources: Sources, config: DecoderConfig, spec: MergeSpec, load: Callable[[str, int | None], LeafBank],
    check: Callable[[], None] = lambda: None,
) -> StreamedBank:  # fmt: skip
    """A bank whose leaves are brought by `load`: (name, row in the stack; None: outside of the layers)."""
    rows = rows_of_layers(config)
    return StreamedBank(
        rows,
        lambda number: {
            leaf.name: load(leaf.name, row)
            for stack, row in rows[number].items()
            for leaf in stack_leaves(config, stack)
        },
        lambda names: {name: load(name, None) for name in names},
        abstract_bank(sources, config, spec),
        check,
    )


def _layer_of(tree: Any, number: int) -> Any:
    """One layer of a tree of arrays; the axis of the layers stays, with one entry."""
    return jax.tree.map(lambda array: array[number : number + 1], tree)


@dataclass
class LeafFiles:
    """One leaf, in files. mask_keys, statistics: of this process's part of the leaf, where they are kept."""

    reader: LeafReader
    mask_keys: np.ndarray | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)

    def _empty(self, number: int | None) -> Any:
        return self.reader.empty(None if number is None else 1)

    def _places(self, number: int | None) -> Iterator[tuple[tuple[int, ...], str]]:
        """The places of a part's tensors in the part, and their names."""
        for place, name in self.reader.tensors.items():
            if number is None:
                yield place, name
            elif place[0] == number:
                yield (0, *place[1:]), name

    def measure(self, progress: Progress) -> None:
        """Read all parts once where the method measures them, and keep its results. Processes that share the model
        divide the tensors."""
        reader = self.reader
        results: list[Prepared | None] = []
        keys: list[Any] = []
        # The layers, or the whole leaf, are read by themselves.
        rows = tensor_grid(reader.config, reader.leaf)[:1]
        parts: Sequence[int | None] = range(rows[0]) if rows else [None]
        for number in parts:
            arrays = self._empty(number)
            for place, name in self._places(number):
                prepared = None
                if reader.measures(len(results)):
                    prepared = reader.read_measured(len(results), name, place, arrays)
                results.append(prepared)
                progress(reader.tensor_bytes)
            keys.append(None if reader.is_prepared_anew else arrays.mask_keys)
        if not reader.is_measured:
            return
        measured = reader.gathered(results)
        self.statistics = stacked_statistics(reader, [prepared.statistics for prepared in measured])
        if keys[0] is not None:
            numbered = iter(measured)
            for number, part in zip(parts, keys, strict=True):
                for place, _ in self._places(number):
                    reader.enter_mask_keys(part, place, next(numbered))
            self.mask_keys = keys[0] if len(keys) == 1 else np.concatenate(keys)

    def load(self, number: int | None) -> LeafBank:
        """Read a part, and bring it to the devices."""
        arrays = self._empty(number)
        for place, name in self._places(number):
            if self.reader.is_prepared_anew:
                self.reader.read_measured(0, name, place, arrays)
            else:
                self.reader.read(name, place, arrays)
        keys, statistics = self.mask_keys, self.statistics
        if number is not None:
            keys, statistics = _layer_of((keys, statistics), number)
        if keys is not None:
            arrays = replace(arrays, mask_keys=keys)
        return put_leaf(self.reader.layout, arrays, statistics, self.reader.placement)


@dataclass(frozen=True)
class FileStates:
    """The sizes and times of files when a search began to stream them."""

    states: dict[Path, tuple[int, int]]

    @classmethod
    def of(cls, folders: Iterable[Folder]) -> "FileStates":
        """The states of the files that hold the tensors of these folders."""
        files = {file for folder in folders for file in files_of(folder.entries.values())}
        return cls({path: _state(path) for path in sorted(files)})

    def check(self) -> None:
        """Raises Failed where a file is no longer the one that the search began with."""
        for path, state in self.states.items():
            if _state(path) != state:
                raise Failed(
                    f"{path}: the file has changed while the search streams it (by its size or time); put back the "
                    "file that the run began with, and go on with --resume"
                )


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise Failed(f"{path}: cannot be read any more ({error.strerror}); the search streams it") from None
    return status.st_size, status.st_mtime_ns


# ---------------------------------------------------------------------------------------------------------------
# Layer paths


def path_bank_on_host(sources: Sources, spec: PathSpec, progress: Progress = lambda done: None) -> StreamedPathBank:
    """Load all layers of all sources into the host's memory. `progress` receives the bytes of each part."""

    def loaded(read: Callable[[Sources, PathSpec, int], Any], count: int) -> list[Any]:
        parts = []
        for number in range(count):
            parts.append(read(sources, spec, number))
            progress(sum(array.nbytes for array in jax.tree.leaves(parts[-1])))
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


def _put(arrays: Any) -> Any:
    return jax.tree.map(put, arrays)


def _read_layer(sources: Sources, spec: PathSpec, number: int) -> dict[str, Arrays]:
    """One of the M layers: stack -> leaf -> `[1, …]`."""
    (origin,) = origins = spec.origins[number : number + 1]
    config = spec.configs[origin[0]]
    return {
        stack: {
            leaf.name: read_layers(sources, config, leaf, origins, path_dtype(sources, spec, leaf))
            for leaf in stack_leaves(config, stack)
        }
        for stack in rows_of_layers(config)[origin[1]]
    }


def _read_ends(sources: Sources, spec: PathSpec, parent: int) -> Arrays:
    """A parent's leaves outside of the layers."""
    return {leaf.name: sources.load_finite(parent, leaf.tensor) for leaf in shared_leaves(spec.configs[0])}
