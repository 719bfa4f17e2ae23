"""The sources of a merge, opened together and checked against each other.

The bank and the streamed merge both read from `Sources`, so that both see the same rows and the same names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evojax_merge.checkpoints.adapters import resized_base
from evojax_merge.checkpoints.config_file import NO_CONFIG
from evojax_merge.checkpoints.decoder_folder import DecoderFolder, decoder_of
from evojax_merge.checkpoints.derived import open_model
from evojax_merge.checkpoints.folder import (
    Folder,
    Part,
    Tensor,
    copy_finite,
    is_finite,
    is_float,
)
from evojax_merge.checkpoints.json_files import read_json_object, shown
from evojax_merge.checkpoints.tokens import (
    TokenizerChoice,
    Vocabulary,
    align,
    aligned_rows,
    chat_template,
    has_tokenizer,
    padded_rows,
    vocabulary_warnings,
)
from evojax_merge.errors import InputError
from evojax_merge.models.architecture import (
    EMBEDDING,
    HEAD,
    Architecture,
    architecture_of,
    known_architecture,
    leaves_of,
    tensor_shape,
    tensors_of,
)
from evojax_merge.models.config import DecoderConfig, RopeConfig
from evojax_merge.system.jinja_process import FOLDERS_WITH_TEMPLATE

if TYPE_CHECKING:
    from evojax_merge.checkpoints.moments import Moments

# Architectures' names for the module with a row for each token: at the input, and at the output (also for its bias).
EMBEDDINGS = (
    "embed_tokens", "wte", "word_embeddings", "word_embedding", "embed_in", "tok_embeddings", "token_embedding",
    "embeddings", "shared",
)  # fmt: skip
HEADS = (
    "lm_head", "lm_head.linear", "lm_head.decoder", "embed_out", "output", "output_layer", "proj_out",
    "vocab_projector", "predictions", "predictions.decoder", "linear", "decoder", "head", "lm_loss",
    "output_projection", "generator_lm_head", "pred_layer.proj",
)  # fmt: skip
_EMBEDDINGS, _HEADS = (tuple(f".{name}" for name in names) for names in (EMBEDDINGS, HEADS))
OpenDecoder = Callable[[Folder], DecoderFolder]
# The field of a config that the text decoders of models with M-RoPE have, and text models have empty.
AXES = "rope_axes"


@dataclass(frozen=True)
class TokenTensors:
    """The names in the file of the tensors whose rows belong to tokens; head: the same tensor as the embedding where
    the config ties them, None where no model has a head; others: a head's bias, or an encoder's embedding beside a
    decoder's."""

    embedding: str
    head: str | None
    others: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.embedding, *(() if self.head is None else (self.head,)), *self.others)


def token_tensors(architecture: Architecture) -> TokenTensors:
    """The token tensors of a known architecture."""
    embedding, head = architecture.leaf(EMBEDDING), architecture.leaf(HEAD)
    assert embedding is not None
    others = (leaf for leaf in architecture.leaves if leaf.shape[:1] == ("vocab",) and leaf not in (embedding, head))
    return TokenTensors(embedding.tensor, None if head is None else head.tensor, tuple(leaf.tensor for leaf in others))


def find_token_tensors(folder: DecoderFolder) -> TokenTensors:
    """The token tensors of a model of an unknown architecture. The embedding is the first weight with a usual name,
    else the first matrix of `vocab_size` rows. Further embeddings and heads count if they have as many rows."""
    rows = {name: entry.shape[0] for name, entry in folder.entries.items() if entry.shape}
    # With a dot before the first part of a name, which is all of some.
    modules = {name: f".{name.rpartition('.')[0]}" for name in rows}
    embeddings = [name for name in rows if name.endswith(".weight") and modules[name].endswith(_EMBEDDINGS)]
    if not embeddings:
        size = vocabulary_size(folder.config)
        matrices = (name for name in rows if len(folder.entries[name].shape) == 2)
        embeddings = [name for name in matrices if rows[name] == size]
    if not embeddings:
        return TokenTensors("model.embed_tokens.weight", "lm_head.weight")
    embedding = embeddings[0]
    heads = [name for name in rows if modules[name].endswith(_HEADS)]
    head = "lm_head.weight" if "lm_head.weight" in heads else None
    others = (name for name in (*embeddings, *heads) if name not in (embedding, head))
    return TokenTensors(embedding, head, tuple(name for name in others if rows[name] == rows[embedding]))


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """The number of token rows by a config: its own `vocab_size`, or that of its `text_config`; None without either."""
    text = config.get("text_config")
    return config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)


@dataclass(frozen=True)
class Sources:
    """Opened folders of one architecture. `vocabulary`: the alignment of their rows (None: rows stay as they are);
    `warnings`: about their tokens, for the user, a line each; `moments`: for methods that look at activations;
    `lenders`: further folders, numbered behind the others, that only give rows for the vocabulary's `fills`."""

    folders: tuple[DecoderFolder, ...]
    vocabulary: Vocabulary | None = None
    warnings: tuple[str, ...] = ()
    moments: "Moments | None" = None
    lenders: tuple[DecoderFolder, ...] = ()

    @cached_property
    def token_tensors(self) -> TokenTensors:
        first = self.folders[0]
        return find_token_tensors(first) if first.architecture is None else token_tensors(first.architecture)

    def name_in(self, source: int, tensor: str) -> str:
        """The tensor's name in that folder: a tied head is the embedding, whether or not a copy of it is stored."""
        folder = (*self.folders, *self.lenders)[source]
        tied = bool(folder.config.get("tie_word_embeddings", False))
        return self.token_tensors.embedding if tensor == self.token_tensors.head and tied else tensor

    def has_rows(self, tensor: str) -> bool:
        """Return whether the tensor's rows belong to tokens."""
        return tensor in self.token_tensors.names

    def entry(self, source: int, tensor: str) -> Tensor:
        return (*self.folders, *self.lenders)[source].entries[self.name_in(source, tensor)]

    def shape(self, source: int, tensor: str) -> tuple[int, ...]:
        shape = self.entry(source, tensor).shape
        return (self.vocabulary.size, *shape[1:]) if self.vocabulary is not None and self.has_rows(tensor) else shape

    @cached_property
    def _adapted(self) -> bool:
        return any(entry.rank for folder in self.folders for entry in folder.entries.values())

    def common_core(self, tensor: str) -> Tensor | None:
        """The matrix of which every source's tensor is a low-rank change or an equal copy; None where there is no such
        matrix, and always where no source is an adapter."""
        if not self._adapted or (self.vocabulary is not None and self.has_rows(tensor)):
            return None
        entries = [self.entry(source, tensor) for source in range(len(self.folders))]
        core = entries[0].core
        return core if len(core.shape) == 2 and all(entry.core == core for entry in entries) else None

    def read(self, source: int, tensor: str) -> np.ndarray:
        """One source's tensor, with its rows in the common order: in its own dtype, or float32 where rows are filled
        in from others."""
        return self._values(source, tensor, lambda entry: entry.read())

    def load(self, source: int, tensor: str) -> np.ndarray:
        """Like `read`, in memory of its own. Raises Failed where a file cannot be read."""
        return self._values(source, tensor, lambda entry: entry.load())

    def _values(self, source: int, tensor: str, values: Callable[[Tensor], np.ndarray]) -> np.ndarray:
        if self.vocabulary is None or not self.has_rows(tensor):
            return values(self.entry(source, tensor))
        transplant, numbers = self.vocabulary.transplant, self.vocabulary.rows[source]
        if transplant is not None and (numbers < 0).any():
            # A tied head is the embedding, and its rows are made as those are.
            is_head = tensor == self.token_tensors.head == self.name_in(source, tensor)
            names = self._donor.token_tensors
            donor = self._donor.entry(0, names.head if is_head and names.head else names.embedding)
            stored = values(self.entry(source, tensor))
            rows = transplant.rows(source, numbers, self.name_in(source, tensor), stored, donor, is_head)
            return padded_rows(self.vocabulary, rows)
        donors = {model for parts in self.vocabulary.fills.values() for model, _ in parts}
        return aligned_rows(self.vocabulary, source, {s: values(self.entry(s, tensor)) for s in donors | {source}})

    @cached_property
    def _donor(self) -> "Sources":
        """The model that gives a transplant its tokens. Raises InputError where its embedding is no matrix."""
        assert self.vocabulary is not None and self.vocabulary.transplant is not None
        donor = Sources((decoder_of(open_model(self.vocabulary.transplant.donor)),))
        tensors = filter(None, (donor.token_tensors.embedding, donor.token_tensors.head))
        for name in dict.fromkeys(donor.name_in(0, tensor) for tensor in tensors):
            entry = donor.folders[0].entries.get(name)
            shape = () if entry is None else entry.shape
            if entry is None or len(shape) != 2 or 0 in shape or not is_float(entry.dtype):
                what = "no such tensor" if entry is None else f"{entry.dtype}{list(shape)}"
                raise InputError(donor.folders[0].path, f"{name}: found {what}; expected a float matrix, a row a token")
        return donor

    def load_finite(self, source: int, tensor: str) -> np.ndarray:
        """Like `load`. Raises InputError where the tensor holds NaN or infinity, which would spoil every score."""
        values = self.load(source, tensor)
        if not is_finite(values):
            raise self._not_finite(source, tensor)
        return values

    def read_into(self, source: int | None, tensor: str, into: np.ndarray, part: Part = ()) -> None:
        """Like `load_finite`, a part of the tensor into an array of the part's shape. source: None for the matrix of
        `common_core`."""
        if source is None:
            core = self.common_core(tensor)
            assert core is not None
            if not core.copy_into(part, into):
                raise InputError(core.file, f"{tensor} holds NaN or Inf; expected finite weights")
            return
        if self.vocabulary is not None and self.has_rows(tensor):
            finite = copy_finite(self.load(source, tensor)[part], into)
        else:
            finite = self.entry(source, tensor).copy_into(part, into)
        if not finite:
            raise self._not_finite(source, tensor)

    def finite_factors(self, source: int, tensor: str) -> tuple[np.ndarray, np.ndarray]:
        """Like `Tensor.factors`. Raises InputError where a factor holds NaN or infinity."""
        a, b = self.entry(source, tensor).factors()
        if not np.isfinite(a).all() or not np.isfinite(b).all():
            raise self._not_finite(source, tensor)
        return a, b

    def _not_finite(self, source: int, tensor: str) -> InputError:
        name = self.name_in(source, tensor)
        return InputError(self.entry(source, tensor).file, f"{name} holds NaN or Inf; expected finite weights")

    def release(self, source: int, tensor: str) -> None:
        """Release the memory that reading a tensor has mapped."""
        self.entry(source, tensor).release()

    def digest(self, source: int, tensor: str) -> bytes:
        return self.folders[source].digest(self.name_in(source, tensor))

    def moments_of(self, source: int, tensor: str) -> np.ndarray | None:
        """One source's moments of a tensor; None: it has none, or none are measured."""
        return None if self.moments is None else self.moments.of(source, tensor)


def open_sources(
    paths: Sequence[Path], tokenizer: TokenizerChoice | None = None, open_decoder: OpenDecoder = decoder_of
) -> tuple[Sources, DecoderConfig]:
    """Open the folders of decoders of one depth and check that they can be merged with each other. open_decoder: takes
    the decoder out of a folder.

    Raises InputError for another architecture, tensor set, shape or config, naming the first difference.
    """
    sources, configs = open_decoders(paths, tokenizer, open_decoder)
    for folder, config in zip(sources.folders[1:], configs[1:], strict=True):
        _check_config(folder.where, config, configs[0])
    return sources, configs[0]


def open_decoders(
    paths: Sequence[Path], tokenizer: TokenizerChoice | None = None, open_decoder: OpenDecoder = decoder_of
) -> tuple[Sources, list[DecoderConfig]]:
    """Open the folders of decoders whose layers fit each other, whatever their depth; open_decoder: see `open_sources`.
    Raises InputError."""
    opened = [open_decoder(open_model(path)) for path in paths]
    folders = tuple(
        replace(folder, entries={name: entry for name, entry in folder.entries.items() if not is_value_head(name)})
        for folder in opened
    )
    for folder in folders:
        if not folder.config:
            read_json_object(folder.path / "config.json", missing=NO_CONFIG)
        if not is_merged_as(folder, common_kind(folders)):
            kind, expected = (shown(model.config.get("model_type")) for model in (folder, folders[0]))
            raise InputError(
                folder.where, f"model_type is {kind}, but {folders[0].path} is {expected}; expected one architecture"
            )
    configs = decoder_configs(folders)
    for folder, config in zip(folders, configs, strict=True):
        for name in token_tensors(architecture_of(config)).names:
            entry = folder.entries.get(name)
            if entry is not None and entry.shape[:1] != (config.vocab,):
                what = f"{name} has shape {list(entry.shape)}; its config says {config.vocab} rows"
                raise InputError(folder.path, what)
    counts = [config.vocab for config in configs]
    vocabulary = None if tokenizer is None else align(paths, counts, tokenizer)
    sources = Sources(folders, vocabulary)
    # An untied head anywhere makes the merge untied.
    tied = all(config.head_is_embedding for config in configs)
    if vocabulary is not None:
        configs = [replace(config, vocab=vocabulary.size) for config in configs]
    configs = [replace(config, head_is_embedding=tied) for config in configs]
    _check_shapes(sources, configs)
    check_layers_alike(folders, configs)
    warnings = vocabulary_warnings(paths) if vocabulary is None else vocabulary.warnings
    heads = [
        f"{folder.path}: its value head (v_head) is left out: no language model has one"
        for folder in opened if any(map(is_value_head, folder.entries))
    ]  # fmt: skip
    sources = replace(sources, warnings=(*warnings, *heads, *position_notes(folders)))
    FOLDERS_WITH_TEMPLATE[:] = [path for path in paths if has_tokenizer(path) and chat_template(path)]
    return sources, configs


def is_value_head(tensor: str) -> bool:
    """Return whether a tensor of this name is of the value head that TRL stores beside a language model."""
    return tensor.startswith("v_head.")


def common_kind(folders: Sequence[DecoderFolder]) -> object:
    """The model_type that a merge of these decoders has: that of the first, or, where the first is a text model, that
    of a larger model's decoder with the same layers."""
    kinds = [folder.config.get("model_type") for folder in folders]
    return next((kind for kind in kinds if _text_model(kind) == kinds[0]), kinds[0])


def is_merged_as(folder: DecoderFolder, kind: object) -> bool:
    """Return whether a decoder merges with those of a model_type: it has that one, or is a text model of its layers."""
    return folder.config.get("model_type") in (kind, _text_model(kind) or kind)


def _text_model(kind: object) -> str | None:
    architecture = known_architecture(kind)
    return None if architecture is None else architecture.text_model


def decoder_configs(folders: Sequence[DecoderFolder]) -> list[DecoderConfig]:
    """The decoders' configs, those of text models as of the larger model's decoder that they merge into."""
    configs = [folder.decoder_config() for folder in folders]
    larger = next((config for folder, config in zip(folders, configs, strict=True) if folder.is_part), None)
    if larger is None:
        return configs
    return [
        config if folder.is_part else as_decoder_of(config, larger)
        for folder, config in zip(folders, configs, strict=True)
    ]


def as_decoder_of(config: DecoderConfig, larger: DecoderConfig) -> DecoderConfig:
    """The config of a text model as that of a larger model's decoder, which has the positions of the larger model, and
    its other settings of images."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    # Where tokens stand and how far they see: the text model may have a longer context, say.
    names = ["architecture", *(name for name, value in values.items() if isinstance(value, RopeConfig) or name == AXES)]
    if config.layers == larger.layers:
        names += ["windows", "position_kinds"]
    return replace(larger, **values | {name: getattr(larger, name) for name in names})


def position_notes(folders: Sequence[DecoderFolder]) -> tuple[str, ...]:
    """A line on the text models whose positions are not those of the larger model that they merge into; none where all
    agree."""
    paths: dict[str, list[str]] = {}
    for folder, config in zip(folders, decoder_configs(folders), strict=True):
        # The axes of M-RoPE change no position of a text.
        differences = (each for each in _differences(folder.decoder_config(), config) if each[0] != AXES)
        name, value, used = next(differences, ("", None, None))
        if name:
            paths.setdefault(f"{name} is {shown(value)}, and {shown(used)}", []).append(str(folder.path))
    larger = next((folder.path for folder in folders if folder.is_part), None)
    return tuple(
        f"{', '.join(named)}: {what} in {larger}; merges have the latter, and all models are scored with it"
        for what, named in paths.items()
    )


def check_layers_alike(folders: Sequence[DecoderFolder], configs: Sequence[DecoderConfig]) -> None:
    """Raises InputError unless the configs of these decoders mean the same layers, whatever their number."""
    first = configs[0]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        sizes = {name: getattr(first, name) for name in ("layers", "vocab", "head_is_embedding")}
        if config.layers != first.layers:
            sizes |= {"windows": first.windows, "position_kinds": first.position_kinds}
        _check_config(folder.where, replace(config, **sizes), first)


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model of this config, by Hugging Face name."""
    shapes = {leaf.name: tensor_shape(config, leaf) for leaf in leaves_of(config)}
    return {name: shapes[leaf.name] for name, leaf, _ in tensors_of(config)}


def _check_shapes(sources: Sources, configs: Sequence[DecoderConfig]) -> None:
    first = tensor_shapes(configs[0])
    for s, (folder, config) in enumerate(zip(sources.folders, configs, strict=True)):
        shapes = tensor_shapes(config)
        missing = [name for name in shapes if sources.name_in(s, name) not in folder.entries]
        if missing:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            which = f"which {sources.folders[0].path} has" if missing[0] in first and s else "which its config asks for"
            raise InputError(folder.path, f"has no tensor {missing[0]}{more}, {which}")
        extra = sorted(set(folder.entries) - set(shapes) - {sources.token_tensors.head})
        if extra:
            what = f"holds a tensor that its architecture does not have: {folder.names.in_file(extra[0])}"
            raise InputError(folder.path, what)
        for name, expected in shapes.items():
            entry, shape = sources.entry(s, name), sources.shape(s, name)
            if not is_float(entry.dtype):
                what = f"{sources.name_in(s, name)} holds {entry.dtype}; expected float weights (a quantised model?)"
                raise InputError(entry.file, what)
            if s and name in first and shape != sources.shape(0, name):
                raise shapes_differ(sources, (s, name), (0, name))
            if shape != expected:
                raise InputError(folder.path, f"{name} has shape {list(shape)}; its config says {list(expected)}")


def shapes_differ(
    sources: Sources, tensor: tuple[int, str], other: tuple[int, str], *, extracts: bool = False
) -> InputError:
    """The error about two sources' tensors, with the shapes that their files have. extracts: the first source becomes
    an adapter of the other one, and its tokens stay."""
    shape, expected = sources.entry(*tensor).shape, sources.entry(*other).shape
    advice = "models of different widths cannot be merged; `evojax-merge inspect` compares them"
    if sources.has_rows(tensor[1]) and shape[1:] == expected[1:]:
        advice = "say tokenizer_source: base (or one of the models), so that rows are aligned by token"
        if extracts:
            advice = resized_base(shape[0])
    first, second = (sources.folders[number].path for number in (tensor[0], other[0]))
    return InputError(first, f"{tensor[1]} has shape {list(shape)}, but {list(expected)} in {second}; {advice}")


def _check_config(where: object, config: DecoderConfig, expected: DecoderConfig) -> None:
    for name, value, first in _differences(config, expected):
        raise InputError(where, f"{name} is {value}, but {first} in the first model; expected the same")


def _differences(config: DecoderConfig, expected: DecoderConfig) -> Iterator[tuple[str, Any, Any]]:
    """The settings that differ beside the architecture: name, value, and the expected one. A part, such as RoPE, gives
    its differing fields."""
    values = {
        field.name: (getattr(config, field.name), getattr(expected, field.name))
        for field in fields(config) if field.name != "architecture"
    }  # fmt: skip
    parts = {name: pair for name, pair in values.items() if all(map(is_dataclass, pair))}
    inner = {
        f"{name}.{field.name}": (getattr(value, field.name), getattr(first, field.name))
        for name, (value, first) in parts.items()
        for field in fields(value)
    }
    for name, (value, first) in (inner | values).items():
        if value != first:
            yield name, value, first
