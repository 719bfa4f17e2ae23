"""The account of a merge's tensors: what became of each that its models store, and which ones were made.

A tensor that a file holds in parts (numbers of a few bits beside their scales, a matrix beside its adapter) counts
once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from merge_kernels import Options

from evojax_merge.checkpoints.decoder_folder import TensorView
from evojax_merge.checkpoints.folder import Tensor
from evojax_merge.checkpoints.parents import Sources, is_value_head
from evojax_merge.mergekit.opening import CAUSAL_MASKS, TABLES
from evojax_merge.mergekit.plan import LAYER_NAME, TensorPlan

# merged: an input of the method; kept: written as a model has it; made: written, and stored by no model as it is
# written; tied: the head is the embedding; computed: a table that the model computes anew; unused: the recipe takes
# something else in its place; left out: the recipe does not ask for that.
Fate = Literal["merged", "kept", "made", "tied", "computed", "unused", "left out"]
FATES: tuple[Fate, ...] = get_args(Fate)
COPIED = "as it is stored"


@dataclass(frozen=True)
class TensorFate:
    """The fate of a tensor. model: the recipe's name of the model that stores it, or that it is made of; tensor: its
    name in the model's files, or, where it is made, in the merge's; reason: a phrase, empty where the fate says
    all."""

    model: str
    tensor: str
    fate: Fate
    reason: str = ""


def account_of(
    models: Sequence[str], sources: Sources, rows: Sequence[TensorPlan], copied: Mapping[str, Tensor]
) -> list[TensorFate]:
    """The fates of all tensors of the sources, which the recipe calls `models`, and of those that are made. rows: the
    tensors that the recipe plans; copied: those that are written as one model has them."""
    names, written = {row.name for row in rows}, {id(tensor) for tensor in copied.values()}
    fates = [made for row in rows if (made := _made(models, sources, row)) is not None]
    for number, (model, folder) in enumerate(zip(models, sources.folders, strict=True)):
        read = _read(sources, number, rows)
        read |= {name: ("kept", COPIED) for name, tensor in folder.whole.entries.items() if id(tensor) in written}
        layers = {match["index"] for name in read if (match := LAYER_NAME.match(name)) is not None}
        for name in folder.whole.entries:
            match = LAYER_NAME.match(name)
            fate: tuple[Fate, str] = "left out", "not all models have it"
            if name in read:
                fate = read[name]
            elif not read:
                fate = "unused", "nothing of this model is merged"
            elif folder.names.of_architecture(name) == sources.token_tensors.head:
                is_tied = folder.config.get("tie_word_embeddings", False)
                fate = ("tied", "the head is the embedding") if is_tied else ("unused", "another model's is kept")
            elif name in folder.other_modules:
                fate = "unused", "another model's is kept"
            elif name.endswith((*TABLES, *CAUSAL_MASKS)):
                fate = "computed", "by the model itself"
            elif match is not None and match["index"] not in layers:
                fate = "unused", "no slice takes its layer"
            elif name in names:
                fate = "unused", "the recipe takes other models'"
            fates.append(TensorFate(model, name, *fate))
    return fates


def account_of_search(sources: Sources, other_modules: Path | None) -> list[TensorFate]:
    """The fates of the tensors of a search's models, which are named by their paths: all of the decoders' take part,
    and the other modules stay those of one model."""
    rows = [
        TensorPlan(folder.names.in_file(name), ((number, name),), Options(), {})
        for number, folder in enumerate(sources.folders) for name in folder.entries
        if name != sources.token_tensors.head or sources.name_in(number, name) == name
    ]  # fmt: skip
    copied = {name: tensor for folder in sources.folders if folder.path == other_modules
              for name, tensor in folder.other_modules.items()}  # fmt: skip
    fates = account_of([str(folder.path) for folder in sources.folders], sources, rows, copied)
    return [replace(fate, reason="a value head") if is_value_head(fate.tensor) else fate for fate in fates]


def _read(sources: Sources, number: int, rows: Sequence[TensorPlan]) -> dict[str, tuple[Fate, str]]:
    """The tensors of a source, by their names in the file, that the planned tensors are made of."""
    stored = {id(tensor): name for name, tensor in sources.folders[number].whole.entries.items()}
    fates: dict[str, tuple[Fate, str]] = {}
    for row in rows:
        for tensor in (tensor for source, tensor in row.inputs if source == number):
            entry = sources.entry(number, tensor)
            while isinstance(entry, TensorView) and id(entry) not in stored:
                entry = entry.of
            fates[stored[id(entry)]] = ("kept", "not all models have it alike") if row.copied else ("merged", "")
    return fates


def _made(models: Sequence[str], sources: Sources, row: TensorPlan) -> TensorFate | None:
    """The fate of a tensor that is made, of the first model that does not store it as it is written; None where all
    do."""
    for source, tensor in row.inputs:
        if sources.name_in(source, tensor) != tensor:
            return TensorFate(models[source], row.name, "made", "a head of the embedding")
        if sources.vocabulary is not None and sources.has_rows(tensor):
            rows = sources.entry(source, tensor).shape[0]
            if sources.vocabulary.padding or not np.array_equal(sources.vocabulary.rows[source], np.arange(rows)):
                return TensorFate(models[source], row.name, "made", "rows in the merged tokenizer's order")
    return None
