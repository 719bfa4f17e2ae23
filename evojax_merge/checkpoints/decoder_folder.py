"""The decoder of a model folder: its tensors by the names that its architecture has for them, and its settings.

Files name a decoder's tensors in several ways. transformers puts a prefix before those of a model with a head, which
files of the model without one lack (GPT-2's `transformer.wte.weight`, `wte.weight`); and in a larger model, such as one
that reads images, the text decoder has a prefix of its own (`language_model.model.layers.0…`,
`model.language_model.layers.0…`). What reads a `DecoderFolder` knows the architecture's names alone.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.checkpoints.config_file import (
    DECODER_PREFIX,
    DECODER_PREFIXES,
    NO_CONFIG,
    check_unquantised,
    decoder_settings,
    is_larger_model,
    read_decoder_config,
    with_decoder_settings,
)
from evojax_merge.checkpoints.folder import Folder, MappedFile, Tensor, Whole
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.errors import InputError, shown
from evojax_merge.models.architecture import EMBEDDING, FINAL_NORM, HEAD, Architecture, known_architecture
from evojax_merge.models.config import DecoderConfig

# What transformers calls the head of every model.
LM_HEAD = "lm_head.weight"
# How older files of larger models begin the names of tensors, and how transformers does in memory: one after the other.
IN_MEMORY = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^model\.(?=(embed_tokens|layers|norm)\.)"), "model.language_model."),
    (re.compile(r"^(?!model\.|lm_head\.)"), "model."),
    (re.compile(r"^model\.vision_tower\.vision_model\."), "model.vision_tower."),
)


@dataclass(frozen=True)
class Part(Whole):
    """A part of another tensor: `of.read()[place]`."""

    of: Tensor
    place: tuple[int | slice, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        # Of a view that takes no memory.
        return np.broadcast_to(np.int8(0), self.of.shape)[self.place].shape

    @property
    def file(self) -> Path:
        return self.of.file

    @property
    def mapped_files(self) -> tuple[MappedFile, ...]:
        return self.of.mapped_files

    def read(self) -> np.ndarray:
        return self.of.read()[self.place]

    def content(self) -> Iterator[np.ndarray]:
        yield np.ascontiguousarray(self.read()).reshape(-1).view(np.uint8)

    def release(self) -> None:
        self.of.release()


@dataclass(frozen=True)
class TensorNames:
    """How a file names a decoder's tensors: with `body` in the place of the architecture's own prefix, and its head
    `head`."""

    own_body: str = ""
    body: str = ""
    own_head: str | None = None
    head: str | None = None

    def in_file(self, tensor: str) -> str:
        """The name in the file of a tensor that the architecture calls so, whether or not it is there."""
        if self.head is not None and tensor == self.own_head:
            return self.head
        return self.body + tensor.removeprefix(self.own_body) if tensor.startswith(self.own_body) else tensor

    def of_architecture(self, name: str) -> str:
        """What the architecture calls a tensor of the file."""
        if self.own_head is not None and name == self.head:
            return self.own_head
        return self.own_body + name.removeprefix(self.body) if name.startswith(self.body) else name


@dataclass(frozen=True)
class DecoderFolder(Folder):
    """A model folder as its decoder: `entries` are the decoder's tensors, by the names of its architecture, and
    `config` its settings, which say whether its head is its embedding. whole: all of the folder; names: what its files
    call the tensors; is_part: whether it is the text decoder of a larger model; other_modules: that model's other
    tensors, by their names in the file."""

    whole: Folder
    names: TensorNames = TensorNames()
    is_part: bool = False
    other_modules: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def config(self) -> dict[str, Any]:
        settings = decoder_settings(self.whole.config) if self.is_part else self.whole.config
        architecture = known_architecture(settings.get("model_type"))
        if architecture is None:
            return settings
        if self.is_part:
            # Classes of larger models have defaults of their own; where both tensors are there and differ, transformers
            # goes by the tensors.
            return settings | {"tie_word_embeddings": self.names.own_head not in self.entries}
        defaults = architecture.defaults
        return {key: defaults[key] for key in ("tie_word_embeddings",) if key in defaults} | settings

    @property
    def where(self) -> object:
        """What messages call the place of its settings."""
        file = self.path / "config.json"
        return f"{file}: text_config" if self.is_part and "text_config" in self.whole.config else file

    @property
    def files(self) -> list[Path]:
        return self.whole.files

    def close(self) -> None:
        super().close()
        self.whole.close()

    def decoder_config(self) -> DecoderConfig:
        """What its settings mean. Raises InputError as `read_decoder_config` does, and where there are none."""
        if not self.whole.config:
            read_json_object(self.path / "config.json", missing=NO_CONFIG)
        check_unquantised(self.path / "config.json", self.whole.config)
        kind = self.config.get("model_type")
        architecture = known_architecture(kind)
        if self.is_part and architecture is not None and architecture.always_maps_logits:
            raise InputError(
                self.where,
                f"model_type is {shown(kind)}, whose logits transformers leaves unscaled in a larger model; expected "
                "another text decoder",
            )
        return read_decoder_config(self.where, self.config)

    def in_memory(self, tensor: str) -> str:
        """What transformers calls a tensor of the decoder, by the architecture's name of it."""
        if not self.is_part:
            return tensor
        if tensor == self.names.own_head:
            return LM_HEAD
        prefix = DECODER_PREFIXES.get(self.whole.config["model_type"], DECODER_PREFIX)
        return prefix + tensor.removeprefix(self.names.own_body)

    def whole_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json with other settings of the decoder."""
        return with_decoder_settings(self.whole.config, settings) if self.is_part else dict(settings)


def decoder_of(folder: Folder) -> DecoderFolder:
    """A folder as its decoder; of an architecture that is not known, as it is. Buffers that earlier files hold are left
    out. Raises InputError where tensors could be those of several decoders."""
    is_part = is_larger_model(folder.config)
    architecture = known_architecture(decoder_settings(folder.config).get("model_type"))
    if architecture is None:
        return DecoderFolder(folder.path, folder.entries, folder, is_part=is_part)
    body, head = _body(architecture), architecture.leaf(HEAD)
    own_head = None if head is None else head.tensor
    found = _find_body(folder, architecture, body, anywhere=is_part)
    names = TensorNames(body, found, own_head, None if own_head is None else _find_head(folder, body, found, own_head))
    roots = {leaf.tensor.removeprefix(body).split(".")[0] for leaf in architecture.leaves if leaf.name != HEAD}

    def is_own(name: str) -> bool:
        """Whether a tensor of the file is of the decoder, be it one that the architecture has or not."""
        if not is_part or name == names.head:
            return True
        return name.startswith(found) and name.removeprefix(found).split(".")[0] in roots

    own = {names.of_architecture(name): entry for name, entry in folder.entries.items() if is_own(name)}
    own = _unpacked(folder, architecture, own)
    own = {name: entry for name, entry in own.items() if not name.endswith(architecture.buffers)}
    others = {name: entry for name, entry in folder.entries.items() if not is_own(name)}
    return DecoderFolder(folder.path, own, folder, names, is_part, others)


def _unpacked(folder: Folder, architecture: Architecture, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names, the parts of packed ones in their place. Raises InputError where one is there twice."""
    found: dict[str, Tensor] = {}
    for name, entry in entries.items():
        for part, tensor in _parts(architecture, name, entry).items():
            if part in found or (part != name and part in entries):
                raise InputError(folder.path, f"holds {part}, and {name}, which it is a part of; expected one of them")
            found[part] = tensor
    return found


def _parts(architecture: Architecture, name: str, entry: Tensor) -> dict[str, Tensor]:
    """What a tensor is, or holds."""
    for pattern, held in architecture.packed.items():
        match = re.fullmatch(re.escape(pattern).replace(re.escape("{layer}"), r"(\d+)"), name)
        leaves = [leaf for leaf in architecture.leaves if leaf.name in held]
        if match is None or any(len(entry.shape) != len(leaf.shape) for leaf in leaves):
            continue
        layer, rows = int(match[1]), entry.shape[-2] // len(leaves)
        places = [(expert,) for expert in range(entry.shape[0])] if leaves[0].has_experts else [()]
        return {
            leaf.tensor_of(layer, *place): Part(entry, (*place, slice(i * rows, (i + 1) * rows)))
            for place in places
            for i, leaf in enumerate(leaves)
        }
    return {name: entry}


def as_it_is(folder: Folder) -> DecoderFolder:
    """All tensors of a folder, with the names that they have."""
    return DecoderFolder(folder.path, folder.entries, folder)


def named_alike(folder: DecoderFolder, expected: DecoderFolder) -> DecoderFolder:
    """A model with the names that another one of its kind has in its files, which may be older or newer; as it is where
    it has those already, or where two of its tensors would have one name."""
    theirs = {_name_in_memory(name): name for name in expected.entries}
    renamed = {
        name if name in expected.entries else theirs.get(_name_in_memory(name), name): entry
        for name, entry in folder.entries.items()
    }
    return replace(folder, entries=renamed) if len(renamed) == len(folder.entries) else folder


def _name_in_memory(name: str) -> str:
    for pattern, begin in IN_MEMORY:
        name = pattern.sub(begin, name)
    return name


def _body(architecture: Architecture) -> str:
    """What all tensors but the head have before their names, such as `model.`."""
    tensors = [leaf.tensor for leaf in architecture.leaves if leaf.name != HEAD]
    body = f"{tensors[0].partition('.')[0]}."
    return body if all(tensor.startswith(body) for tensor in tensors) else ""


def _find_body(folder: Folder, architecture: Architecture, body: str, *, anywhere: bool) -> str:
    """What the decoder's tensors have before their names in a folder's files: its own prefix or none, or, `anywhere`,
    whatever there is."""
    embedding, norm = (architecture.leaf(name) for name in (EMBEDDING, FINAL_NORM))
    assert embedding is not None and norm is not None
    tail, norm_tail = embedding.tensor.removeprefix(body), norm.tensor.removeprefix(body)
    ends = [name.removesuffix(tail) for name in folder.entries if name.endswith(tail)] if anywhere else [body, ""]
    found = [
        one for one in ends
        if (not one or one.endswith(".")) and f"{one}{tail}" in folder.entries and f"{one}{norm_tail}" in folder.entries
    ]  # fmt: skip
    if body in found or not found:
        return body
    if len(found) > 1:
        raise InputError(folder.path, f"holds several decoders ({', '.join(sorted(found))}); expected one text decoder")
    return found[0]


def _find_head(folder: Folder, own_body: str, body: str, own_head: str) -> str:
    """The name of the head in a folder's files: beside the body, or beside what the body lies in; where there is none,
    what it would have to be."""
    parts = body.split(".")[:-1]
    above = ["".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts), -1, -1)]
    names = [f"{one}{head}" for one in above for head in (own_head, LM_HEAD)]
    beside = body.removesuffix(own_body) if body.endswith(own_body) else ""
    return next((name for name in names if name in folder.entries), f"{beside}{own_head}")
