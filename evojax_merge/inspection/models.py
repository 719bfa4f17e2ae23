"""The facts of models' headers and small files, side by side."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from evojax_merge.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_FILE, read_adapter_config
from evojax_merge.checkpoints.config_file import torch_hint
from evojax_merge.checkpoints.decoder_folder import DecoderFolder, decoder_of, named_alike, with_others_named_alike
from evojax_merge.checkpoints.derived import SAFETENSORS, open_model, sources_of
from evojax_merge.checkpoints.folder import Folder, Tensor, open_folder, read_metadata
from evojax_merge.checkpoints.generator_keys import scheme_of
from evojax_merge.checkpoints.generator_lora import LORA_FILE, factor_ranks
from evojax_merge.checkpoints.parents import vocabulary_size
from evojax_merge.checkpoints.pipelines import DENOISERS, Pipeline, is_pipeline
from evojax_merge.checkpoints.tokens import chat_template, count_differing_tokens, has_tokenizer, needs_code
from evojax_merge.errors import InputError
from evojax_merge.inspection.ways import Way, way_of
from evojax_merge.models.architecture import Architecture

# The component of tensors that belong to none.
OTHER = "other"
# The components of layers of unknown architectures, by parts of their tensors' names.
NAME_PARTS = (
    ("norm", ("norm", "ln_")),
    ("attention", ("attn", "attention")),
    ("mlp", ("mlp", "ffn", "feed_forward", "experts", "fc1", "fc2")),
)


@dataclass(frozen=True)
class Adapter:
    """The facts of an adapter's files. ranks: the different ranks of its factors, rising; trained_on: the base that
    they name; base: the model that it changes in this comparison, None for a LoRA's file by itself; is_low_rank: it is
    nothing but factors."""

    ranks: tuple[int, ...]
    trained_on: str | None
    base: Path | None
    is_low_rank: bool


@dataclass(frozen=True)
class Model:
    """The facts of a model's headers and small files.

    tensors: by name. architecture: its model_type; None without a config. dtypes: stored dtype -> numbers of that
    dtype. stored_as: how the weights are stored where they are made while they are read, such as gguf or adapter.
    vocabulary: rows of the embedding by the config. differing_tokens: the rows that have other tokens in the first
    model's tokenizer; None where the two cannot be compared. chat_template: the default template's text; None: it has
    none. unsearchable: the reason why the search over language models does not take it; None: it does. way: how a
    search takes it; None: none does. adapter: the facts of the adapter that changes it; None without one.
    """

    reference: str
    path: Path
    folder: DecoderFolder
    tensors: Mapping[str, Tensor]
    architecture: str | None
    layers: int
    parameters: int
    dtypes: Mapping[str, int]
    stored_as: str | None
    vocabulary: int | None
    tied: bool
    tokenizer: bool
    differing_tokens: int | None
    chat_template: str | None
    unsearchable: str | None
    way: Way | None
    adapter: Adapter | None


def read_models(references: Sequence[str], paths: Sequence[Path]) -> list[Model]:
    """The models of these folders, by their headers. Raises InputError for a model that cannot be opened, and for one
    that is given twice."""
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise InputError(references[number], "is given twice; expected models that differ")
    folders = [decoder_of(_open(path)) for path in paths]
    alike = named_alike if folders[0].architecture is None else with_others_named_alike
    folders[1:] = [alike(folder, folders[0]) for folder in folders[1:]]
    with_tokens = [path for path in paths if has_tokenizer(path)]
    return [
        _read_model(reference, folder, with_tokens[0] if with_tokens else None)
        for reference, folder in zip(references, folders, strict=True)
    ]


def _open(path: Path) -> Folder:
    """A model; of a folder of diffusers, the components that are merged by default."""
    if path.suffix == ".npz":
        raise InputError(
            path, "holds arrays, whose distances inspect does not measure; a search takes it as a pytree (backend: "
            "function), and begins with: evojax-merge init --parents FILE FILE --function FILE.py:NAME",
        )  # fmt: skip
    if not is_pipeline(path):
        return open_model(path)
    present = Pipeline(path).classes
    parts = {name: open_folder(path / name).entries for name in DENOISERS if name in present}
    return Folder(path, {f"{part}.{name}": entry for part, entries in parts.items() for name, entry in entries.items()})


def _read_model(reference: str, folder: DecoderFolder, first_with_tokens: Path | None) -> Model:
    path, config = folder.path, folder.config
    tied, entries = bool(config.get("tie_word_embeddings", False)), {**folder.other_modules, **folder.entries}
    # Some files of tied models hold a copy of the embedding as a head.
    tensors = {name: entry for name, entry in entries.items() if not (tied and name == folder.names.own_head)}
    sizes = Counter[str]()
    for entry in tensors.values():
        sizes[str(entry.dtype)] += prod(entry.shape)
    layers = {place[0] for name in folder.entries if (place := place_of(None, name))[0] is not None}
    has_tokens = has_tokenizer(path)
    kind = Pipeline(path).class_name if is_pipeline(path) else config.get("model_type")
    unsearchable = _why_unsearchable(folder)
    return Model(
        reference=reference,
        path=path,
        folder=folder,
        tensors=tensors,
        architecture=kind if isinstance(kind, str) else None,
        layers=len(layers),
        parameters=sizes.total(),
        dtypes=dict(sizes.most_common()),
        stored_as=sources_of(path).kind or None,
        vocabulary=size if isinstance(size := vocabulary_size(config), int) else None,
        tied=tied,
        tokenizer=has_tokens,
        differing_tokens=count_differing_tokens(first_with_tokens, path) if first_with_tokens and has_tokens else None,
        chat_template=chat_template(path),
        unsearchable=unsearchable,
        way=way_of(folder, unsearchable),
        adapter=_adapter_of(path),
    )


def _adapter_of(path: Path) -> Adapter | None:
    """The adapter of a model, or the LoRA that a file holds by itself."""
    base, adapter = sources_of(path).adapted or (None, path)
    if base is not None and (adapter / ADAPTER_CONFIG).is_file():
        config = read_adapter_config(adapter)
        ranks = tuple(factor_ranks(adapter / ADAPTER_FILE))
        return Adapter(ranks, config.base, base, not (config.is_dora or config.saved_modules))
    file = adapter / LORA_FILE if base is not None and adapter.is_dir() else adapter
    ranks = tuple(factor_ranks(file)) if file.suffix == SAFETENSORS and file.is_file() else ()
    # The key is that of kohya's trainer.
    return Adapter(ranks, read_metadata(file).get("ss_sd_model_name"), base, True) if ranks else None


def _why_unsearchable(folder: DecoderFolder) -> str | None:
    kind = folder.config.get("model_type")
    if is_pipeline(folder.path):
        return "it is an image generator"
    if folder.architecture is None:
        if kind is None:
            if scheme_of(folder.entries) is not None:
                return "it is an image generator in one file, of which a search takes the folder that diffusers writes"
            lone = f"it is a LoRA without its base: name it as BASE+{folder.path.name}"
            return "no config.json" if _adapter_of(folder.path) is None else lone
        unknown = f"the architecture {kind} is not one of those that are searched"
        return "; ".join(filter(None, (unknown, torch_hint(folder.config))))
    try:
        folder.decoder_config()
    except InputError as error:
        return error.what
    if not has_tokenizer(folder.path):
        return "no tokenizer"
    return "its tokenizer is custom code" if needs_code(folder.path) else None


def place_of(architecture: Architecture | None, name: str) -> tuple[int | None, str]:
    """The layer of a tensor, None outside of the layers, and its component; an unknown architecture's by the words in
    its name."""
    number = re.search(r"\.([0-9]{1,9})\.", f".{name}")
    leaf = None if architecture is None else architecture.leaf_of(name)
    if leaf is not None:
        return (None, leaf.name) if leaf.stack is None else (int(number[1]) if number else None, leaf.component)
    if architecture is not None or number is None:
        return None, OTHER
    component = next((component for component, parts in NAME_PARTS if any(part in name for part in parts)), OTHER)
    return int(number[1]), component
