"""The sources of a merge, opened together and checked against each other. May import checkpoints' other files.

`Sources` is what the bank and the streamed merge both read from, so that both see the same rows and the same names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.architectures import (
    decoder_config,
    dimensions,
    layer_leaves,
    shared_leaves,
)
from evojax_merge.checkpoints.folder import EMBEDDING, HEAD, Entry, Folder, open_folder
from evojax_merge.checkpoints.tokens import check_same_vocabulary, row_maps
from evojax_merge.errors import InputError
from evojax_merge.models.config import DecoderConfig


@dataclass(frozen=True)
class Sources:
    """Opened folders of one architecture. `rows[s]` reorders source s's vocabulary rows (None: as they are)."""

    folders: tuple[Folder, ...]
    rows: tuple[np.ndarray, ...] | None = None

    def name_in(self, source: int, tensor: str) -> str:
        """The tensor's name in that folder: a tied head is the embedding, whether or not a copy of it is stored."""
        folder = self.folders[source]
        tied = bool(folder.config.get("tie_word_embeddings", False))
        return EMBEDDING if tensor == HEAD and tied else tensor

    def entry(self, source: int, tensor: str) -> Entry:
        return self.folders[source].entries[self.name_in(source, tensor)]

    def shape(self, source: int, tensor: str) -> tuple[int, ...]:
        shape, rows = self.entry(source, tensor).shape, self._rows_of(source, tensor)
        return shape if rows is None else (len(rows), *shape[1:])

    def read(self, source: int, tensor: str) -> np.ndarray:
        """One source's tensor in its own dtype, with its rows in the common order."""
        values = self.folders[source].read(self.name_in(source, tensor))
        rows = self._rows_of(source, tensor)
        return values if rows is None else values[rows]

    def digest(self, source: int, tensor: str) -> bytes:
        return self.folders[source].digest(self.name_in(source, tensor))

    def _rows_of(self, source: int, tensor: str) -> np.ndarray | None:
        return self.rows[source] if self.rows is not None and tensor in (EMBEDDING, HEAD) else None


def open_sources(paths: Sequence[Path], tokenizer_source: Path | None = None) -> tuple[Sources, DecoderConfig]:
    """Open the folders of decoders and check that they can be merged with each other.

    Raises InputError for another architecture, tensor set, shape or config, naming the first difference.
    """
    folders = tuple(open_folder(path) for path in paths)
    kinds = [folder.config.get("model_type") for folder in folders]
    for folder, kind in zip(folders, kinds, strict=True):
        if kind != kinds[0]:
            raise InputError(
                folder.path / "config.json",
                f"model_type is {kind!r}, but {folders[0].path} is {kinds[0]!r}; expected one architecture",
            )
    configs = [decoder_config(folder.path / "config.json") for folder in folders]
    maps = None if tokenizer_source is None else tuple(row_maps(paths, tokenizer_source))
    sources = Sources(folders, maps)
    # An untied head anywhere makes the merge untied.
    tied = all(config.head_is_embedding for config in configs)
    vocab = configs[0].vocab if maps is None else len(maps[0])
    config = replace(configs[0], head_is_embedding=tied, vocab=vocab)
    _check_shapes(sources, config, configs)
    for folder, other in zip(folders[1:], configs[1:], strict=True):
        _check_config(folder.path / "config.json", replace(other, head_is_embedding=tied, vocab=vocab), config)
    if maps is None:
        check_same_vocabulary(paths)
    return sources, config


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of this config, by its Hugging Face name."""
    sizes = dimensions(config)
    shapes = {leaf.tensor: tuple(sizes[d] for d in leaf.shape) for leaf in shared_leaves(config)}
    for i in range(config.layers):
        for leaf in layer_leaves(config):
            shapes[leaf.tensor.format(i=i)] = tuple(sizes[d] for d in leaf.shape)
    return shapes


def _check_shapes(sources: Sources, config: DecoderConfig, configs: Sequence[DecoderConfig]) -> None:
    reference = sources.folders[0].path
    shapes = tensor_shapes(config)
    for s, folder in enumerate(sources.folders):
        missing = [name for name in shapes if sources.name_in(s, name) not in folder.entries]
        if missing:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise InputError(folder.path, f"has no tensor {missing[0]}{more}, which {reference} has")
        extra = sorted(set(folder.entries) - set(shapes) - {HEAD})
        extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
        if extra:
            raise InputError(folder.path, f"holds a tensor that its architecture does not have: {extra[0]}")
        for name, expected in shapes.items():
            found = sources.shape(s, name)
            if found == expected:
                continue
            if s == 0:
                raise InputError(folder.path, f"{name} has shape {list(found)}; its config says {list(expected)}")
            raise InputError(
                folder.path,
                f"{name} has shape {list(found)}, but {list(sources.shape(0, name))} in {reference}",
            )


def _check_config(file: Path, found: DecoderConfig, expected: DecoderConfig) -> None:
    for field in fields(DecoderConfig):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if one != other:
            raise InputError(file, f"{field.name} is {one}, but {other} in the first model; expected the same")
