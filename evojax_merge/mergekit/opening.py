"""The models of a recipe, opened and checked against each other by their headers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from evojax_merge.checkpoints.config_file import check_unquantised, check_values, comparable, is_larger_model
from evojax_merge.checkpoints.config_shapes import check_against_config, depth_error
from evojax_merge.checkpoints.decoder_folder import DecoderFolder, decoder_of, decoder_with_projector, named_alike
from evojax_merge.checkpoints.derived import open_model
from evojax_merge.checkpoints.folder import is_float
from evojax_merge.checkpoints.generator_keys import scheme_of
from evojax_merge.checkpoints.network_checks import check_labels
from evojax_merge.checkpoints.parents import (
    Sources,
    check_layers_alike,
    common_kind,
    decoder_configs,
    is_merged_as,
    position_notes,
    shapes_differ,
)
from evojax_merge.checkpoints.tokens import TokenizerChoice, align
from evojax_merge.errors import InputError, shown
from evojax_merge.mergekit.plan import Layout, TensorPlan, evaluate_setting, layout
from evojax_merge.mergekit.schema import RecipeFile
from evojax_merge.models.architecture import BUFFERS, LAYERS, Architecture, known_architecture

# Tensors that no forward pass reads, in an architecture whose tensors are not listed: value heads of reinforcement
# learning and heads of classifiers, by the beginnings of their names, and tables that a model computes anew, by the
# ends.
VALUE_HEADS, CLASSIFIER_HEADS = ("v_head.", "value_head."), ("score.",)
TABLES = (*BUFFERS, ".attn.masked_bias", ".attention.masked_bias", "embeddings.position_ids")
# A causal mask, which older files hold as a matrix where newer classes have none.
CAUSAL_MASKS = (".attn.bias", ".attention.bias")


@dataclass(frozen=True)
class OpenedModels:
    """The models of a recipe. layouts: the names of each model's tensors that are merged; tied: whether the merged head
    is the embedding, None where the model is no known decoder with a head; kept: tensors that not all models have and
    that are written as one of them has them, with the number of that model."""

    sources: Sources
    layouts: list[Layout]
    tied: bool | None
    kept: Mapping[str, int]


def open_models(
    recipe: RecipeFile, paths: list[Path], choice: TokenizerChoice | None, allow_crimes: bool
) -> OpenedModels:
    """Open models of one architecture, known or not, or of any architectures with `allow_crimes`.

    A merge does not run the model, so that a config need not be one that this program can run. Raises InputError.
    """
    whole = recipe.other_modules is None
    if recipe.components and whole:
        raise InputError(recipe.where, "components: without other_modules whole models are merged; name that model too")
    open_decoder = decoder_with_projector if recipe.components else partial(decoder_of, with_aside=whole)
    opened = [open_model(path) for path in paths]
    folders = tuple(
        # A larger model as a whole has its tensors' names in the files.
        DecoderFolder(model.path, model.entries, model)
        if whole and is_larger_model(model.config)
        else open_decoder(model)
        for model in opened
    )
    first = folders[0]
    for folder in folders[1:]:
        kind, expected = (model.config.get("model_type") for model in (folder, first))
        if not is_merged_as(folder, common_kind(folders)) and not allow_crimes:
            _check_has_config(folder, first)
            _check_has_config(first, folder)
            raise InputError(
                folder.where,
                f"model_type is {shown(kind)}, but {first.path} is {shown(expected)}; expected one architecture "
                "(merge --allow-crimes merges them if their tensors agree)",
            )
    folders = (first, *(named_alike(model, first) if model.config else model for model in folders[1:]))
    decoder, sources = first.architecture, Sources(folders)
    for folder in folders:
        check_unquantised(folder.path / "config.json", folder.whole.config)
        if folder.architecture is not None:
            check_values(folder.where, folder.config)
    tied: bool | None = None
    names = [list(folder.entries) for folder in folders]
    if decoder is not None:
        head = sources.token_tensors.head
        if head is not None:
            # An untied head anywhere makes the merge untied; a model that was saved without its head has no such
            # tensor.
            tied = all(folder.config.get("tie_word_embeddings", False) for folder in folders)
            heads = [head] if not tied and any(head in tensor_names for tensor_names in names) else []
            names = [[name for name in tensor_names if name != head] + heads for tensor_names in names]
    kept = _kept_from_one(recipe, _decoder_of(first).architecture, names)
    names = [[name for name in tensor_names if name not in kept] for tensor_names in names]
    names, strays = _without_strays(recipe, decoder, folders, names)
    sources = replace(sources, warnings=strays)
    layouts = [layout(tensor_names) for tensor_names in names]
    if decoder is not None:
        stack = next(leaf.tensor.partition("{layer}")[0] for leaf in decoder.leaves if leaf.stack == LAYERS)
        for folder, model_layout in zip(folders, layouts, strict=True):
            depth = len(model_layout.stacks.get(stack, {}))
            configured = folder.config.get("num_hidden_layers", depth)
            if configured != depth:
                raise depth_error(folder, configured, depth)
    # Where architectures are mixed, the others' configs do not describe the merged tensors.
    check_against_config(_decoder_of(first))
    for folder in () if allow_crimes else folders[1:]:
        if recipe.on_mismatch == "refuse":
            labels, expected = (one.config.get("id2label") for one in (folder, first))
            check_labels(f"{folder.path / 'config.json'}: id2label", labels, first.path, expected)
        check_against_config(_decoder_of(folder), lambda name: _mismatch(recipe, name) == "refuse")
    if choice is not None:
        embedding = sources.token_tensors.embedding
        for folder in folders:
            entry = folder.entries.get(embedding)
            if entry is None or not entry.shape:
                raise InputError(
                    folder.path,
                    f"has no tensor {embedding}; tokenizer: aligns the rows of an embedding, which was not found here "
                    "(by its name, or by config.json's vocab_size)",
                )
        vocabulary = align(paths, [folder.entries[embedding].shape[0] for folder in folders], choice)
        sources = Sources(folders, vocabulary, (*strays, *vocabulary.warnings))
    _check_one_scheme(sources)
    _check_same_tensors(recipe, sources, layouts)
    return OpenedModels(sources, layouts, tied, kept)


def _decoder_of(folder: DecoderFolder) -> DecoderFolder:
    """The decoder of a larger model that is merged as a whole; the folder itself where its decoder cannot be told
    apart."""
    try:
        return decoder_of(folder.whole) if is_larger_model(folder.whole.config) else folder
    except InputError:
        return folder


def _kept_from_one(recipe: RecipeFile, decoder: Architecture | None, names: list[list[str]]) -> dict[str, int]:
    """The tensors that the forward pass does not run and that some models lack, each with the number of the first model
    that has it. Tensors whose treatment the recipe sets are not among them."""
    aside = () if decoder is None else decoder.aside
    common = set.intersection(*map(set, names))
    return {
        name: number
        for number, tensor_names in reversed(list(enumerate(names))) for name in tensor_names
        if name.startswith(aside) and name not in common and _mismatch(recipe, name) == "refuse"
    }  # fmt: skip


def _without_strays(
    recipe: RecipeFile, decoder: Architecture | None, folders: Sequence[DecoderFolder], names: list[list[str]]
) -> tuple[list[list[str]], tuple[str, ...]]:
    """The models' tensors, without those that no forward pass reads and that some models lack, such as a value head
    that training has left; and a warning for each model that has some. Tensors whose treatment the recipe sets stay."""
    common = set.intersection(*map(set, names))
    classes = folders[0].config.get("architectures")
    classifies = isinstance(classes, list) and any("Classification" in str(class_name) for class_name in classes)
    heads = VALUE_HEADS if classifies else VALUE_HEADS + CLASSIFIER_HEADS

    masks = {
        name for folder in folders for name, entry in folder.entries.items()
        if name.endswith(CAUSAL_MASKS) and len(entry.shape) == 4
    }  # fmt: skip

    def is_stray(name: str) -> bool:
        if name in common or _mismatch(recipe, name) != "refuse":
            return False
        if decoder is not None:
            return decoder.leaf_of(name) is None
        return name.startswith(heads) or name.endswith(TABLES) or name in masks

    warnings = []
    for folder, tensor_names in zip(folders, names, strict=True):
        strays = sorted(filter(is_stray, tensor_names))
        if strays:
            some = f"{', '.join(strays[:3])}{' …' if len(strays) > 3 else ''}"
            warnings.append(f"{folder.path}: {some}: not all models have this, and none reads it; left out")
    return [[name for name in tensor_names if not is_stray(name)] for tensor_names in names], tuple(warnings)


def _check_has_config(folder: DecoderFolder, other: DecoderFolder) -> None:
    """Raises InputError where a model has weights alone, and the other model has a config."""
    if not folder.whole.config and other.whole.config:
        raise InputError(
            folder.path, f"is of weights alone, and {other.path} is a model with a config.json; expected the folder of "
            "that model (merge --allow-crimes merges them if their tensors agree)",
        )  # fmt: skip


def check_configs(sources: Sources) -> tuple[str, ...]:
    """Lines on text models that get other positions in the larger model that they merge into. Raises InputError where
    configs of one known architecture mean different layers."""
    folders, kind = sources.folders, common_kind(sources.folders)
    if known_architecture(kind) is None:
        return ()
    if all(is_merged_as(folder, kind) for folder in folders):
        first, *others = [comparable(folder.config) for folder in folders]
        # Unequal values may mean the same layers: only reading both configs tells.
        if any(other != first for other in others):
            check_layers_alike(folders, decoder_configs(folders))
    return position_notes(folders) if len({folder.is_part for folder in folders}) == 2 else ()


def _mismatch(recipe: RecipeFile, tensor: str) -> str:
    """The treatment of a tensor that not all models have alike: one of `ON_MISMATCH`."""
    return str(evaluate_setting(recipe.where, tensor, recipe.on_mismatch, 0.0) or "refuse")


def fitting_inputs(
    recipe: RecipeFile, sources: Sources, name: str, inputs: Sequence[tuple[int, str]]
) -> Sequence[tuple[int, str]]:
    """The inputs of a tensor that are merged: all, unless an input is missing or has another shape than the first, and
    the recipe allows for that."""

    def shape(source: int, tensor: str) -> tuple[int, ...] | None:
        exists = sources.name_in(source, tensor) in sources.folders[source].entries
        return sources.shape(source, tensor) if exists else None

    expected = shape(*inputs[0])
    alike = [pair for pair in inputs if shape(*pair) == expected]
    if len(alike) == len(inputs):
        return inputs
    return {"refuse": inputs, "first": inputs[:1], "skip": alike}[_mismatch(recipe, name)]


def _check_one_scheme(sources: Sources) -> None:
    """Raises InputError for image generators whose tensors have the names of different tools."""
    first, *others = sources.folders
    expected = scheme_of(first.entries)
    for folder in others:
        actual = scheme_of(folder.entries)
        if actual != expected and actual and expected:
            raise InputError(
                folder.path, f"its tensors have the names of {actual.name}, but those of {first.path} the names of "
                f"{expected.name}; expected models of one kind in one form (diffusers converts between forms)",
            )  # fmt: skip


def _check_same_tensors(recipe: RecipeFile, sources: Sources, layouts: list[Layout]) -> None:
    """Raises InputError unless all models have the same tensors, except for the number of layers and the tensors that
    the recipe lets differ."""
    first = sources.folders[0].path

    def kinds(model_layout: Layout) -> dict[tuple[str, ...], str]:
        """A tensor's name without its layer's number -> the full name in the first layer that has it."""
        full_names: dict[tuple[str, ...], str] = {(name,): name for name in model_layout.outside}
        for head, layers in model_layout.stacks.items():
            for i, tails in sorted(layers.items(), reverse=True):
                full_names |= {(head, tail): f"{head}{i}{tail}" for tail in tails}
        return full_names

    expected = kinds(layouts[0])
    for folder, other in zip(sources.folders[1:], layouts[1:], strict=True):
        actual = kinds(other)
        differing = sorted((expected | actual)[kind] for kind in set(actual) ^ set(expected))
        differing = [name for name in differing if _mismatch(recipe, name) == "refuse"]
        if differing:
            listed = ", ".join(differing[:10])
            more = f" and {len(differing) - 10} more" if len(differing) > 10 else ""
            raise InputError(
                folder.path, f"does not hold the same tensors as {first}: {listed}{more}; expected the same, or "
                "on_mismatch: first (or skip) in the recipe, which takes those of the first model",
            )  # fmt: skip


def check_inputs(recipe: RecipeFile, sources: Sources, tensor_plan: TensorPlan) -> None:
    """Raises InputError unless all sources of a tensor have one shape and one kind of numbers, floats or not."""
    for s, key in tensor_plan.inputs:
        if sources.name_in(s, key) not in sources.folders[s].entries:
            raise InputError(sources.folders[s].path, f"has no tensor {key}")
        if sources.vocabulary is not None and sources.has_rows(key):
            embedding = sources.token_tensors.embedding
            rows, tokens = sources.entry(s, key).shape[0], sources.entry(s, embedding).shape[0]
            if rows < tokens:
                what = f"{key} has {rows:,} rows, but {embedding} {tokens:,}; expected as many, one for each token"
                raise InputError(sources.folders[s].path, what)
    (first, name), *others = tensor_plan.inputs
    for s, key in others:
        if sources.shape(s, key) != sources.shape(first, name):
            raise shapes_differ(sources, (s, key), (first, name), extracts=recipe.where == "extract-lora")
        dtype, expected = sources.entry(s, key).dtype, sources.entry(first, name).dtype
        if is_float(dtype) != is_float(expected):
            where, other = sources.folders[s].path, sources.folders[first].path
            raise InputError(where, f"{key} is {dtype}, but {expected} in {other}")
