"""The decoder of a model folder: its tensors by the names that its architecture has for them, and its settings.

Files name a decoder's tensors in several ways. transformers puts a prefix before those of a model with a head, which
files of the model without one lack (GPT-2's `transformer.wte.weight`, `wte.weight`); and in a larger model, such as one
that reads images, the text decoder has a prefix of its own (`language_model.model.layers.0…`,
`model.language_model.layers.0…`). Code that reads a `DecoderFolder` needs the architecture's names alone.
"""

import re
from collections.abc import Collection, Iterator, Mapping
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
)
from evojax_merge.checkpoints.folder import ChangedTensor, Folder, Tensor
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.errors import InputError, shown
from evojax_merge.models.architecture import EMBEDDING, FINAL_NORM, HEAD, NEXT_LAYERS, Architecture, known_architecture
from evojax_merge.models.config import DecoderConfig, ProjectorConfig
from evojax_merge.models.config_keys import one_of
from evojax_merge.models.layers import ACTIVATIONS
from evojax_merge.models.projector import FIRST, PREFIX

# The part of a larger model that is merged with its text decoder where a config or a recipe says so.
PROJECTOR = "projector"
# transformers' name of every model's head.
LM_HEAD = "lm_head.weight"
# A tensor without a byte may say that it holds any number of experts, of which each gets a name.
MOST_PACKED = 100_000
# Parts of tensors' names in older files of larger models and of encoders, and in transformers' memory; applied one
# after the other.
IN_MEMORY = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^model\.(?=(embed_tokens|layers|norm)\.)"), "model.language_model."),
    (re.compile(r"^(?!model\.|lm_head\.)"), "model."),
    (re.compile(r"^model\.vision_tower\.vision_model\."), "model.vision_tower."),
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)


@dataclass(frozen=True)
class TensorView(ChangedTensor):
    """A rearrangement of another tensor, which is identified by its own values."""

    of: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.of,)

    def content(self) -> Iterator[np.ndarray]:
        yield self.load().reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class TensorSlice(TensorView):
    """A part of another tensor: `of.read()[place]`."""

    place: tuple[int | slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        # A broadcast view has the shape and takes no memory.
        return np.broadcast_to(np.int8(0), self.of.shape)[self.place].shape

    def read(self) -> np.ndarray:
        return self.of.read()[self.place]

    def load(self) -> np.ndarray:
        values = np.empty(self.shape, self.dtype)
        self.of.copy_into(tuple(slice(i, i + 1) if isinstance(i, int) else i for i in self.place), values)
        return values


@dataclass(frozen=True)
class TransposedTensor(TensorView):
    """Another tensor with its last two axes exchanged."""

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        *others, rows, columns = self.of.shape
        return (*others, columns, rows)

    def read(self) -> np.ndarray:
        return np.ascontiguousarray(self.of.read().swapaxes(-2, -1))

    def load(self) -> np.ndarray:
        return np.ascontiguousarray(self.of.load().swapaxes(-2, -1))


@dataclass(frozen=True)
class TensorNames:
    """A decoder's tensor names in a file: `body` replaces the architecture's prefix `own_body`, `head` its name of the
    head, `own_head`; `projector` stands before the names of a projector's tensors. layers: the beginning of the
    architecture's names of layers, where those from number `depth` on are no layers of the decoder (`NEXT_LAYERS`);
    empty: all are."""

    own_body: str = ""
    body: str = ""
    own_head: str | None = None
    head: str | None = None
    projector: str = ""
    layers: str = ""
    depth: int = 0

    def in_file(self, tensor: str) -> str:
        """The name in the file of the architecture's tensor of this name, whether or not the file holds it."""
        if self.head is not None and tensor == self.own_head:
            return self.head
        if tensor.startswith(PREFIX):
            return self.projector + tensor
        if self.layers and tensor.startswith(NEXT_LAYERS):
            number, _, tail = tensor.removeprefix(NEXT_LAYERS).partition(".")
            tensor = f"{self.layers}{self.depth + int(number)}.{tail}"
        return self.body + tensor.removeprefix(self.own_body) if tensor.startswith(self.own_body) else tensor

    def of_architecture(self, name: str) -> str:
        """The architecture's name of a tensor of the file."""
        if self.own_head is not None and name == self.head:
            return self.own_head
        if name.startswith(self.projector + PREFIX):
            return name.removeprefix(self.projector)
        tensor = self.own_body + name.removeprefix(self.body) if name.startswith(self.body) else name
        number, _, tail = tensor.removeprefix(self.layers).partition(".")
        is_next = self.layers and tensor.startswith(self.layers) and re.fullmatch("0|[1-9][0-9]{0,8}", number)
        return f"{NEXT_LAYERS}{int(number) - self.depth}.{tail}" if is_next and int(number) >= self.depth else tensor


@dataclass(frozen=True)
class DecoderFolder(Folder):
    """The decoder of a model folder: `entries` are the decoder's tensors, by the architecture's names, and `config` its
    settings, which say whether its head is its embedding. whole: the whole folder; names: the tensors' names in the
    files; is_part: True for the text decoder of a larger model; other_modules: the larger model's other tensors, by
    their names in the file; projector: the larger model's projector, where its tensors are among the decoder's."""

    whole: Folder
    names: TensorNames = TensorNames()
    is_part: bool = False
    other_modules: Mapping[str, Tensor] = field(default_factory=dict)
    projector: ProjectorConfig | None = None

    @property
    def vision_tensors(self) -> dict[str, Tensor]:
        """The tensors outside of the text decoder, by their names in the file."""
        merged = {self.names.in_file(name): entry for name, entry in self.entries.items() if name.startswith(PREFIX)}
        return {**self.other_modules, **merged}

    def at_depth(self, depth: int) -> "DecoderFolder":
        """The folder with its names of layers behind the last, for a decoder of another depth."""
        names = replace(self.names, depth=depth)
        tensors = {name: self.names.of_architecture(name) for name in self.other_modules}
        others = {
            names.in_file(tensors[name]) if tensors[name].startswith(NEXT_LAYERS) else name: entry
            for name, entry in self.other_modules.items()
        }
        return replace(self, names=names, other_modules=others)

    @cached_property
    def config(self) -> dict[str, Any]:
        settings = decoder_settings(self.whole.config) if self.is_part else self.whole.config
        architecture = known_architecture(settings.get("model_type"))
        if architecture is None:
            return settings
        if self.is_part:
            # Classes of larger models have defaults of their own; where both tensors exist and differ, transformers
            # goes by the tensors.
            return settings | {"tie_word_embeddings": self.names.own_head not in self.entries}
        defaults = architecture.defaults
        settings = {key: defaults[key] for key in ("tie_word_embeddings",) if key in defaults} | settings
        embedding, head = architecture.leaf(EMBEDDING), self.entries.get(self.names.own_head or "")
        if head is None or embedding is None or not settings.get("tie_word_embeddings"):
            return settings
        # transformers takes a stored head that differs for the head, whatever the config says.
        return settings | {"tie_word_embeddings": _are_equal(head, self.entries.get(embedding.tensor, head))}

    @property
    def architecture(self) -> Architecture | None:
        """The decoder's architecture; None where it is unknown."""
        return known_architecture(self.config.get("model_type"))

    @property
    def where(self) -> object:
        """The place of the decoder's settings, for messages."""
        file = self.path / "config.json"
        return f"{file}: text_config" if self.is_part and "text_config" in self.whole.config else file

    @property
    def files(self) -> list[Path]:
        return self.whole.files

    def close(self) -> None:
        super().close()
        self.whole.close()

    def decoder_config(self) -> DecoderConfig:
        """The config that the settings mean. Raises InputError as `read_decoder_config` does, and where there are no
        settings."""
        if not self.whole.config:
            read_json_object(self.path / "config.json", missing=NO_CONFIG)
        check_unquantised(self.path / "config.json", self.whole.config)
        if self.is_part and self.architecture is not None and self.architecture.always_maps_logits:
            kind = shown(self.config["model_type"])
            raise InputError(
                self.where,
                f"model_type is {kind}, whose logits transformers leaves unscaled in a larger model; expected another "
                "text decoder",
            )
        return replace(read_decoder_config(self.where, self.config), projector=self.projector)

    def in_memory(self, tensor: str) -> str:
        """transformers' name of a decoder's tensor in memory, from the architecture's name."""
        if not self.is_part:
            body, other = self.names.own_body, None if self.architecture is None else self.architecture.body_in_memory
            return tensor if other is None or not tensor.startswith(body) else other + tensor.removeprefix(body)
        if tensor == self.names.own_head:
            return LM_HEAD
        if tensor.startswith(PREFIX):
            return f"model.{tensor}"
        prefix = DECODER_PREFIXES.get(self.whole.config["model_type"], DECODER_PREFIX)
        return prefix + tensor.removeprefix(self.names.own_body)

    def whole_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json with other settings of the decoder."""
        whole = self.whole.config
        if not self.is_part:
            return dict(settings)
        if not isinstance(whole.get("text_config"), dict):
            return {**settings, "model_type": whole["model_type"]}
        # Some files, such as LLaVA 1.6's, repeat the rows for tokens beside the decoder's settings.
        repeated = ("tie_word_embeddings", *(key for key in ("vocab_size",) if key in whole))
        return {**whole, "text_config": dict(settings), **{key: settings[key] for key in repeated if key in settings}}


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (np.ascontiguousarray(each.read()).view(np.uint8) for each in (one, other))
    return np.array_equal(first, second)


def with_embedding(folder: Folder) -> Folder:
    """The folder with the head of a tied model for its embedding, where its files store the head alone: safetensors'
    save_model keeps one name of the two."""
    architecture = known_architecture(folder.config.get("model_type"))
    head = folder.entries.get(LM_HEAD)
    if (
        architecture is None
        or head is None
        or not {**architecture.defaults, **folder.config}.get("tie_word_embeddings")
    ):
        return folder
    embedding = architecture.leaf(EMBEDDING)
    if embedding is None or embedding.tensor in folder.entries:
        return folder
    others = {name: entry for name, entry in folder.entries.items() if name != LM_HEAD}
    return replace(folder, entries={embedding.tensor: head, **others})


def decoder_of(folder: Folder, *, with_aside: bool = False) -> DecoderFolder:
    """The decoder of a folder; the whole folder where its architecture is unknown. Leaves out the buffers that earlier
    files hold. with_aside: tensors that the forward pass does not run (`Architecture.aside`) are among the decoder's,
    else among those of other modules. Raises InputError where the tensors could belong to several decoders."""
    is_part = is_larger_model(folder.config)
    architecture = known_architecture(decoder_settings(folder.config).get("model_type"))
    if architecture is None:
        return DecoderFolder(folder.path, folder.entries, folder, is_part=is_part)
    tensors, head = [leaf.tensor for leaf in architecture.leaves if leaf.name != HEAD], architecture.leaf(HEAD)
    # The prefix of all tensors' names but the head's, such as `model.`; empty where they share none.
    body = f"{tensors[0].partition('.')[0]}."
    body = body if all(tensor.startswith(body) for tensor in tensors) else ""
    file_body = _find_body(folder, architecture, body, anywhere=is_part)
    names = TensorNames(body, file_body)
    if head is not None:
        # The head is beside the body, or beside a module that holds the body.
        modules = file_body.split(".")[:-1]
        above = ["".join(f"{part}." for part in modules[:depth]) for depth in range(len(modules), -1, -1)]
        head_names = [f"{prefix}{name}" for prefix in above for name in (head.tensor, LM_HEAD)]
        beside = file_body.removesuffix(body) if file_body.endswith(body) else ""
        head_in_file = next((name for name in head_names if name in folder.entries), f"{beside}{head.tensor}")
        names = TensorNames(body, file_body, head.tensor, head_in_file)
    depth = decoder_settings(folder.config).get("num_hidden_layers")
    if NEXT_LAYERS in architecture.aside and isinstance(depth, int):
        stack = next(leaf.tensor for leaf in architecture.leaves if leaf.stack is not None)
        names = replace(names, layers=stack.partition("{layer}")[0], depth=depth)
    aside, roots = architecture.aside, {tensor.removeprefix(body).split(".")[0] for tensor in tensors}

    def is_own(name: str) -> bool:
        """Return whether a tensor of the file belongs to the decoder, also one that the architecture does not have."""
        if not is_part or name == names.head:
            return with_aside or not (name.startswith(aside) or names.of_architecture(name).startswith(aside))
        return name.startswith(file_body) and name.removeprefix(file_body).split(".")[0] in roots

    packed = {names.of_architecture(name): entry for name, entry in folder.entries.items() if is_own(name)}
    entries: dict[str, Tensor] = {}
    for name, entry in packed.items():
        for part, tensor in _parts(architecture, name, entry).items():
            if part in entries or (part != name and part in packed):
                raise InputError(folder.path, f"holds {part}, and {name}, which it is a part of; expected one of them")
            entries[part] = tensor
    hidden = decoder_settings(folder.config).get("hidden_size")
    for name, entry in entries.items():
        leaf = architecture.leaf_of(name) if architecture.transposable else None
        if leaf is not None and leaf.name in architecture.transposable and len(entry.shape) == len(leaf.shape):
            transposed, axis = TransposedTensor(entry), leaf.shape.index("hidden")
            if entry.shape[axis] != hidden and transposed.shape[axis] == hidden:
                entries[name] = transposed
    entries = {name: entry for name, entry in entries.items() if not name.endswith(architecture.buffers)}
    others = {name: entry for name, entry in folder.entries.items() if not is_own(name)}
    return DecoderFolder(folder.path, entries, folder, names, is_part, others)


def decoder_with_projector(whole: Folder) -> DecoderFolder:
    """The decoder of a LLaVA's folder, with the projector's tensors among its own. Raises InputError for another
    model, and as `decoder_of` does."""
    folder = decoder_of(whole)
    config, marker = folder.whole.config, f"{PREFIX}{FIRST}.weight"
    stored = next((name for name in folder.other_modules if name.endswith(marker)), None)
    if stored is None or config.get("model_type") != "llava":
        kind = shown(config.get("model_type"))
        raise InputError(
            folder.path, f"its projector cannot be merged: model_type is {kind}; components: projector is for llava "
            "models, which all of the models then are",
        )  # fmt: skip
    key, place = "projector_hidden_act", folder.path / "config.json"
    activation = one_of(*ACTIVATIONS).check(place, key, config.get(key, "gelu"))
    names = replace(folder.names, projector=stored.removesuffix(marker))
    prefix = names.projector + PREFIX
    merged = {names.of_architecture(name): entry for name, entry in folder.other_modules.items()
              if name.startswith(prefix)}  # fmt: skip
    return replace(
        folder, entries={**folder.entries, **merged}, names=names,
        other_modules={name: entry for name, entry in folder.other_modules.items() if not name.startswith(prefix)},
        projector=ProjectorConfig(
            folder.other_modules[stored].shape[-1], activation, bool(config.get("multimodal_projector_bias", True))
        ),
    )  # fmt: skip


def _parts(architecture: Architecture, name: str, entry: Tensor) -> dict[str, Tensor]:
    """The architecture's tensors that a tensor is, or packs, by name."""
    for pattern, held in architecture.packed.items():
        match = re.fullmatch(re.escape(pattern).replace(re.escape("{layer}"), "([0-9]{1,9})"), name)
        leaves = [leaf for leaf in architecture.leaves if leaf.name in held]
        if match is None or any(len(entry.shape) != len(leaf.shape) for leaf in leaves):
            continue
        if entry.shape[0] > MOST_PACKED:
            raise InputError(entry.file, f"{name} has {entry.shape[0]:,} experts; expected at most {MOST_PACKED:,}")
        layer, rows = int(match[1]), entry.shape[-2] // len(leaves)
        places = [(expert,) for expert in range(entry.shape[0])] if leaves[0].has_experts else [()]
        return {
            leaf.tensor_of(layer, *place): TensorSlice(entry, (*place, slice(i * rows, (i + 1) * rows)))
            for place in places
            for i, leaf in enumerate(leaves)
        }
    return {name: entry}


def in_memory(name: str) -> str:
    """transformers' name in memory of a tensor of a larger model, by its name in a file of any age."""
    for pattern, begin in IN_MEMORY:
        name = pattern.sub(begin, name)
    return name


def named_alike(folder: DecoderFolder, expected: DecoderFolder) -> DecoderFolder:
    """A model with its tensors renamed as in another model of its kind, whose files may be older or newer; unchanged
    where two of its tensors would get one name."""
    renamed = _renamed(folder.entries, expected.entries)
    return replace(folder, entries=renamed) if len(renamed) == len(folder.entries) else folder


def with_others_named_alike(folder: DecoderFolder, expected: DecoderFolder) -> DecoderFolder:
    """A larger model with the tensors outside of its decoder renamed (see `named_alike`)."""
    return replace(folder, other_modules=_renamed(folder.other_modules, expected.other_modules))


def _renamed(tensors: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    theirs = {in_memory(name): name for name in expected}
    return {name if name in expected else theirs.get(in_memory(name), name): tensor for name, tensor in tensors.items()}


def _find_body(folder: Folder, architecture: Architecture, body: str, *, anywhere: bool) -> str:
    """The prefix of the decoder's tensors in a folder's files: the architecture's or none, or, with `anywhere`, any.
    Raises InputError where several prefixes fit."""
    embedding, norm = (architecture.leaf(name) for name in (EMBEDDING, FINAL_NORM))
    assert embedding is not None and norm is not None
    tail, norm_tail = embedding.tensor.removeprefix(body), norm.tensor.removeprefix(body)
    ends = [name.removesuffix(tail) for name in folder.entries if name.endswith(tail)] if anywhere else [body, ""]
    prefixes = [
        prefix for prefix in ends
        if (not prefix or prefix.endswith("."))
        and f"{prefix}{tail}" in folder.entries and f"{prefix}{norm_tail}" in folder.entries
    ]  # fmt: skip
    if body in prefixes or not prefixes:
        return body
    if len(prefixes) > 1:
        raise InputError(
            folder.path, f"holds several decoders ({', '.join(sorted(prefixes))}); expected one text decoder"
        )
    return prefixes[0]
