"""Banks whose layers stay on the host, or in the models' own files, until they are needed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evojax_merge.checkpoints.abstract_bank import abstract_bank
from evojax_merge.checkpoints.bank import (
    LeafReader,
    Progress,
    Put,
    enter_mask_keys,
    load_bank,
    load_leaf,
    put,
    put_leaf,
    stacked_statistics,
)
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.errors import Failed
from evojax_merge.models.architecture import LAYERS, shared_leaves, stack_leaves
from evojax_merge.models.bank import LeafBank, MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.streamed_bank import Leaves, StreamedBank


def _on_host(array: np.ndarray, sharded_axis: int | None = None) -> Any:
    return array


def bank_on_host(
    sources: Sources, config: DecoderConfig, spec: MergeSpec, progress: Progress = lambda done: None, put: Put = put
) -> StreamedBank:
    """Load all sources into the host's memory (see `load_bank`); `put` brings a layer's arrays to the devices."""
    bank = load_bank(sources, config, spec, progress, _on_host)
    layouts = {leaf.name: LeafReader(leaf, config, sources, spec).layout for leaf in stack_leaves(config, LAYERS)}
    shared = {leaf.name: LeafReader(leaf, config, sources, spec).layout for leaf in shared_leaves(config)}

    def on_devices(layout: LeafBank, leaf: Any) -> LeafBank:
        return put_leaf(layout, replace(leaf, statistics={}), leaf.statistics, put)

    def load(number: int) -> Leaves:
        part = slice(number, number + 1)
        return {
            name: on_devices(layouts[name], jax.tree.map(lambda array: array[part], leaf))
            for name, leaf in bank.stacks[LAYERS].items()
        }

    ends = {name: on_devices(layout, bank.shared[name]) for name, layout in shared.items()}
    return StreamedBank(ends, config.layers, load, abstract_bank(sources, config, spec))


def bank_in_files(
    sources: Sources, config: DecoderConfig, spec: MergeSpec, progress: Progress = lambda done: None, put: Put = put
) -> StreamedBank:
    """A bank whose layers are read from the models' files whenever they are needed. All tensors are read once here, for
    what the method measures; that, two numbers per row of random methods, and the leaves outside of the layers are
    kept. `progress` receives the bytes of each finished tensor."""
    readers = [LeafReader(leaf, config, sources, spec) for leaf in stack_leaves(config, LAYERS)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        ends = {
            leaf.name: load_leaf(LeafReader(leaf, config, sources, spec), pool, progress, put)
            for leaf in shared_leaves(config)
        }
        _release(sources, [leaf.tensor for leaf in shared_leaves(config)])
        layers = {reader.leaf.name: LayerFiles(reader, put) for reader in readers}
        for leaf in layers.values():
            leaf.measure(progress)
    files = FileStates.of(sources)

    def load(number: int) -> Leaves:
        return {name: leaf.load(number) for name, leaf in layers.items()}

    return StreamedBank(ends, config.layers, load, abstract_bank(sources, config, spec), files.check)


@dataclass
class LayerFiles:
    """One leaf of the layers, in files. mask_keys, statistics: of all layers, where they are kept."""

    reader: LeafReader
    put: Put
    mask_keys: np.ndarray | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def _is_prepared_anew(self) -> bool:
        """Return whether mask keys are as large as the weights: a layer's are made again whenever it is read."""
        layout = self.reader.layout
        return layout.mask_keys is not None and not self.reader.spec.method.has_row_keys

    def _places(self, number: int) -> Iterator[tuple[tuple[int, ...], str]]:
        """The places of a layer's tensors among those of one layer, and their names."""
        for place, name in self.reader.tensors.items():
            if place[0] == number:
                yield (0, *place[1:]), name

    def measure(self, progress: Progress) -> None:
        """Read all layers once, and keep what the method measures."""
        method, measured, keys = self.reader.spec.method, [], []
        for number in range(self.reader.config.layers):
            arrays: Any = self.reader.empty(1)
            for place, name in self._places(number):
                if method.measures or method.random:
                    self.reader.read(name, place, arrays)
                    prepared = self.reader.prepare(name, place, arrays)
                    enter_mask_keys(arrays, place, prepared)
                    measured.append(prepared.statistics)
                    _release(self.reader.sources, [name])
                progress(self.reader.tensor_bytes)
            keys.append(arrays.mask_keys)
        if measured:
            self.statistics = stacked_statistics(self.reader, measured)
        if keys[0] is not None and not self._is_prepared_anew:
            self.mask_keys = np.concatenate(keys)

    def load(self, number: int) -> LeafBank:
        """Read a layer, and bring it to the devices."""
        arrays: Any = self.reader.empty(1)
        for place, name in self._places(number):
            self.reader.read(name, place, arrays)
            if self._is_prepared_anew:
                enter_mask_keys(arrays, place, self.reader.prepare(name, place, arrays))
            _release(self.reader.sources, [name])
        part = slice(number, number + 1)
        if self.mask_keys is not None:
            arrays = replace(arrays, mask_keys=self.mask_keys[part])
        statistics = {name: values[part] for name, values in self.statistics.items()}
        return put_leaf(self.reader.layout, arrays, statistics, self.put)


def _release(sources: Sources, names: list[str]) -> None:
    """Release the memory that reading tensors of these names has mapped."""
    for source in range(len(sources.folders)):
        for name in names:
            sources.release(source, name)


@dataclass(frozen=True)
class FileStates:
    """The sizes and times of files when a search began to stream them."""

    states: dict[Path, tuple[int, int]]

    @classmethod
    def of(cls, sources: Sources) -> "FileStates":
        """The states of the files that hold the tensors of these sources."""
        entries = (entry for folder in sources.folders for entry in folder.entries.values())
        paths = {mapped.path for entry in entries for mapped in entry.mapped_files}
        return cls({path: _state(path) for path in sorted(paths)})

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
