"""A merged model as a GGUF file, tensor by tensor."""

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evojax_merge.checkpoints.config_file import read_decoder_config
from evojax_merge.checkpoints.derived import parts_of
from evojax_merge.checkpoints.gguf_file import SUFFIX, import_gguf, read_gguf
from evojax_merge.checkpoints.gguf_tokens import tokenizer_metadata
from evojax_merge.checkpoints.gguf_writer import (
    OWN_TYPE,
    GgufOutput,
    carried_metadata,
    check_type,
    is_our_gguf,
    plan_outputs,
    settings_metadata,
    write_gguf,
)
from evojax_merge.checkpoints.writer import check_outside
from evojax_merge.errors import InputError
from evojax_merge.mergekit.execute import MergePlan, Progress, merged_tensors, write_small_files
from evojax_merge.system.file_system import OutputFile, atomic_file, hidden_folder, remove_leftovers
from evojax_merge.version import __version__

# The type of a file whose type nobody chose, by the dtype of the merge.
TYPES = {"float32": "f32", "float64": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class GgufPlan:
    """A planned GGUF file. warnings: a line about each thing that it does not hold as the model does."""

    metadata: dict[str, Any]
    outputs: tuple[GgufOutput, ...]
    warnings: tuple[str, ...]


def is_gguf_name(target: Path) -> bool:
    return target.suffix.lower() == SUFFIX


def check_new_gguf(target: Path, overwrite: bool, keep: Sequence[Path]) -> None:
    """Raises InputError where a GGUF file must not be written to `target`, or must not replace what is there. keep:
    files and folders that are read."""
    check_outside(target, keep)
    OutputFile(target, "", "is no GGUF file", is_our_gguf).check()
    if target.exists() and not overwrite:
        raise InputError(target, "exists already; choose another name or pass --overwrite")


def plan_gguf(merge_plan: MergePlan, target: Path, type_name: str | None) -> GgufPlan:
    """Plan the GGUF file of a merge. type_name: None: the type of the merge's dtype. Raises InputError for a model that
    GGUF files cannot express, and for an unknown type."""
    leader, recipe = merge_plan.leader, merge_plan.recipe
    if not merge_plan.config:
        raise InputError(leader.path, "has no config.json; a GGUF file is made of language models: choose a folder")
    if type_name is None:
        largest = max(merge_plan.rows, key=lambda row: merge_plan.specs[row.name].nbytes)
        type_name = TYPES[str(merge_plan.specs[largest.name].dtype)]
    kind = check_type(type_name)
    config = read_decoder_config(leader.where, merge_plan.config)
    outputs, notes = plan_outputs(leader.where, config, kind)
    metadata, tensors, warnings = settings_metadata(leader.where, merge_plan.config, config, outputs)
    named = {leader.names.in_file(part) for output in outputs for part in output.parts}
    extra = sorted(merge_plan.specs.keys() - named - merge_plan.copied.keys())
    missing = sorted(named - merge_plan.specs.keys())
    if extra or missing:
        what = f"has no tensor {missing[0]}" if missing else f"holds {extra[0]}, for which GGUF files have no name"
        raise InputError(leader.path, f"{what}; expected a whole {config.architecture}")
    if merge_plan.copied:
        notes.append(
            f"{len(merge_plan.copied)} tensors of other modules ({min(merge_plan.copied)}, …) are not in the "
            "file, which is the text decoder's: llama.cpp reads them from a file of their own "
            "(convert_hf_to_gguf.py --mmproj)"
        )
    carried: dict[str, Any] = {}
    for part in parts_of(leader.path):
        if part.suffix == SUFFIX:
            vocabulary, is_leaders = merge_plan.sources.vocabulary, merge_plan.tokenizer == leader.path
            same_tokens = is_leaders and (vocabulary is None or vocabulary.copied == leader.path)
            carried = carried_metadata(read_gguf(part).metadata, same_tokens and merge_plan.chat_template is None)
    if merge_plan.tokenizer is not None and "tokenizer.ggml.tokens" not in carried:
        with hidden_folder(target) as folder:
            write_small_files(merge_plan, folder)
            try:
                carried |= tokenizer_metadata(folder, config.vocab)
            except InputError as error:
                advice = f"{without_tokens(recipe.path, target, type_name)} writes the file without tokens"
                # The hidden folder holds the tokenizer of this model, or one that was made of it and others.
                raise InputError(merge_plan.tokenizer, f"{error.what}: {advice}") from None
    types, type_key = import_gguf(target).LlamaFileType, "ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"
    general = {
        "general.architecture": next(iter(metadata)).partition(".")[0], "general.type": "model",
        "general.name": _model_name(target.stem, carried.get("tokenizer.ggml.tokens", ())),
        "general.quantized_by": f"evojax-merge {__version__}",
        "general.description": f"a merge by {recipe.method.name}, made with evojax-merge; see evojax_merge.card",
        "general.quantization_version": 2,
        **dict.fromkeys(("general.file_type", OWN_TYPE), int(types[type_key])),
    }  # fmt: skip
    return GgufPlan(carried | general | metadata, (*outputs, *tensors), (*notes, *warnings))


def write_as_gguf(
    merge_plan: MergePlan,
    target: Path,
    *,
    plan: GgufPlan,
    card: str | None,
    recipe: str | None = None,
    overwrite: bool = False,
    check: Callable[[], None] = lambda: None,
    progress: Progress = lambda done: None,
) -> None:
    """Merge, and write a GGUF file that appears complete or not at all. The card and the recipe are among its
    metadata."""
    del overwrite  # `check` refuses a file that must stay.
    texts = {"evojax_merge.card": card, "evojax_merge.recipe": recipe}
    metadata = plan.metadata | _links(card) | {key: text for key, text in texts.items() if text}
    leader = merge_plan.leader
    names = [leader.names.in_file(part) for output in plan.outputs for part in output.parts]
    progress(merge_plan.nbytes - sum(merge_plan.specs[name].nbytes for name in names))

    def values() -> Any:
        for name, merged in zip(names, merged_tensors(merge_plan, names), strict=True):
            yield merged
            progress(merge_plan.specs[name].nbytes)

    remove_leftovers(target.parent, [target])
    check()
    with atomic_file(target) as file:
        write_gguf(file, metadata, plan.outputs, values())
        check()


def without_tokens(recipe: Path, target: Path, type_name: str) -> str:
    """The command that merges a recipe into a GGUF file without tokens; its option where the recipe is no file."""
    option = "--no-copy-tokenizer"
    command = ["evojax-merge", "merge", str(recipe), str(target), "--type", type_name, option]
    return shlex.join(command) if recipe.is_file() else option


def _model_name(stem: str, tokens: Collection[str]) -> str:
    """A name for the file's model. llama.cpp strips spaces behind a Phi-3's special tokens where its name says that it
    is one, and cannot load another model of such a name."""
    is_phi3 = set(tokens).issuperset(("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>"))
    says_so = any(name in stem.lower() for name in ("phi-3", "phi3"))
    return stem if is_phi3 == says_so else f"{stem} (Phi-3)" if is_phi3 else "model"


def _links(card: str | None) -> dict[str, Any]:
    """The license and the hub's models of a card, as GGUF's metadata."""
    header = yaml.safe_load((card or "").split("---\n")[1]) if (card or "").startswith("---\n") else {}
    license_name, models = header.get("license"), header.get("base_model") or []
    metadata: dict[str, Any] = {"general.license": license_name} if isinstance(license_name, str) else {}
    models = [model for model in ([models] if isinstance(models, str) else models) if isinstance(model, str)]
    metadata |= {"general.base_model.count": len(models)} if models else {}
    for i, model in enumerate(models):
        organisation, _, name = model.rpartition("/")
        metadata[f"general.base_model.{i}.name"] = name
        metadata[f"general.base_model.{i}.repo_url"] = f"https://huggingface.co/{model}"
        metadata |= {f"general.base_model.{i}.organization": organisation} if organisation else {}
    return metadata
