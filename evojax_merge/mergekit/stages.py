"""Merges of several stages: all are planned before the first is done, and only the last one's model stays.

The results of the stages lie in a hidden folder beside the output. Planning fills the folder with models without
weights, from which a later merge is planned: their config, their tokenizer and the shapes and dtypes of their tensors;
merging writes the weights, and removes a model after the last merge that needs it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from evojax_merge.checkpoints.derived import FindModel, parts_of, resolve_model
from evojax_merge.checkpoints.folder import Folder
from evojax_merge.checkpoints.writer import ShardWriter
from evojax_merge.errors import InputError, printable
from evojax_merge.mergekit.account import FATES, TensorFate, account_of
from evojax_merge.mergekit.execute import (
    DEFAULTS,
    MergePlan,
    MergeSettings,
    Progress,
    prepare,
    write_small_files,
    write_weights,
)
from evojax_merge.mergekit.streams import RecipeStream, stage_of
from evojax_merge.system.file_system import hidden_folder, recover, remove_folder

T = TypeVar("T")
# Opens a progress bar of a label and a number of bytes.
Bar = Callable[[str, int], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class StagePlan:
    """A stage that is planned, and the folder of its result."""

    merge_plan: MergePlan
    folder: Path

    @property
    def name(self) -> str:
        return self.merge_plan.recipe.name


@dataclass(frozen=True)
class StreamPlan:
    """The merges of a recipe, checked and planned: `stages` in the order in which they are done, and `result`."""

    stages: tuple[StagePlan, ...]
    result: MergePlan

    @property
    def merges(self) -> list[MergePlan]:
        """All merges in their order, the result's last."""
        return [*(stage.merge_plan for stage in self.stages), self.result]

    @property
    def models(self) -> dict[str, Folder]:
        """The models that exist before any merge, by the recipe's names of them; each merge's base comes first."""
        made = {stage.folder for stage in self.stages}
        named = [pair for merge in self.merges for pair in zip(merge.recipe.models, merge.sources.folders, strict=True)]
        return {model: folder for model, folder in named if made.isdisjoint(parts_of(folder.path))}

    @property
    def paths(self) -> dict[str, Path]:
        """The folders of `models`."""
        return {model: folder.path for model, folder in self.models.items()}

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        return list(dict.fromkeys(path for merge in self.merges for path in merge.inputs))

    @property
    def warnings(self) -> list[str]:
        """Warnings about the models' tokens, a line each; a stage has its name, not its hidden folder."""
        lines = dict.fromkeys(line for merge in self.merges for line in merge.sources.warnings)
        for stage in self.stages:
            lines = {line.replace(str(stage.folder), stage.name): None for line in lines}
        return list(lines)

    @property
    def unmatched(self) -> list[tuple[str, str]]:
        """The name of a recipe and a sentence for each of its filters that means no tensor."""
        return [(merge.recipe.where, sentence) for merge in self.merges for sentence in merge.unmatched.values()]

    @cached_property
    def account(self) -> list[TensorFate]:
        """The fate of each tensor of the models that exist before any merge: that of the merge that makes most of it,
        the first in `FATES`."""
        names = {stage.name for stage in self.stages}
        fates: dict[tuple[str, str, bool], TensorFate] = {}
        for merge in self.merges:
            for fate in account_of(merge.recipe.models, merge.sources, merge.rows, merge.copied):
                key = fate.model, fate.tensor, fate.fate == "made"
                if stage_of(fate.model, names) is None:
                    fates[key] = min(fates.get(key, fate), fate, key=lambda fate: FATES.index(fate.fate))
        return list(fates.values())

    @property
    def last_uses(self) -> list[int]:
        """For each stage, the number of the last merge that needs its result; the stage's own number, where only
        planning needs the result, for its tokenizer."""
        read = [set(merge.inputs) for merge in self.merges]
        return [
            max((i for i, paths in enumerate(read) if stage.folder in paths), default=number)
            for number, stage in enumerate(self.stages)
        ]

    @property
    def peak_bytes(self) -> int:
        """The most that the weights on the disk take together: those being written, and those that are still needed."""
        sizes, last_uses = [merge.nbytes for merge in self.merges], self.last_uses
        return max(
            size + sum(sizes[k] for k, last in enumerate(last_uses[:i]) if last >= i) for i, size in enumerate(sizes)
        )


@contextmanager
def prepare_stream(
    stream: RecipeStream, target: Path, settings: MergeSettings = DEFAULTS, find: FindModel = resolve_model
) -> Iterator[StreamPlan]:
    """Plan all merges of a recipe, whose result will be written to `target`; the plan holds inside of the block.

    The dtype and the tokenizer of the settings are the result's, all others those of all merges. `find` returns a
    model's folder; its argument `made` has the results of stages. Raises InputError for errors that the headers show,
    and leaves nothing on the disk then.
    """
    with ExitStack() as stack:
        folders: dict[str, Path] = {}
        stack.enter_context(_stages_named(folders))
        if stream.stages:
            recover(target)
            work = stack.enter_context(hidden_folder(target))

        def find_model(where: object, reference: str, relative_to: Path, *, weights: bool = True) -> Path:
            model_folder = find(where, reference, relative_to, made=folders, weights=weights)
            if stage_of(reference, folders) not in (None, reference):
                # The folder stands for a stage with an adapter, and is useless without the stage.
                stack.callback(remove_folder, model_folder)
                folders[reference] = model_folder
            return model_folder

        stages = []
        for number, stage in enumerate(stream.stages, start=1):
            merge_plan = prepare(stage, replace(settings, dtype=None, copy_tokenizer=True), find_model)
            folder = work / f"{number}-{re.sub(r'[^A-Za-z0-9_.-]', '-', stage.name)[:60]}"
            folder.mkdir()
            # Headers alone suffice to plan a later merge.
            ShardWriter(folder, merge_plan.specs).reserve()
            write_small_files(merge_plan, folder)
            folders[stage.name] = folder
            stages.append(StagePlan(merge_plan, folder))
        yield StreamPlan(tuple(stages), prepare(stream.result, settings, find_model))


@contextmanager
def _stages_named(folders: Mapping[str, Path]) -> Iterator[None]:
    """Replace hidden folders by the names of their stages in an InputError of the block."""
    try:
        yield
    except InputError as error:
        where, what = error.where, error.what
        for name, folder in folders.items():
            where, what = where.replace(str(folder), name), what.replace(str(folder), name)
        raise InputError(where, what) from None


def merge_stream(
    stream_plan: StreamPlan,
    target: Path,
    write: Callable[..., T],
    *,
    card: str | None,
    overwrite: bool = False,
    check: Callable[[], None] = lambda: None,
    bar: Bar = lambda label, nbytes: nullcontext(lambda done: None),
) -> T:
    """Do all merges and return the value of `write`, which writes the result and takes the arguments of `merge_to`.
    `bar` shows the progress of each merge, with its number and name where there are several."""
    last_uses, count = stream_plan.last_uses, len(stream_plan.stages) + 1
    for i, stage in enumerate(stream_plan.stages):
        label = f"{i + 1} of {count} ({printable(stage.name, 40)})"
        with bar(label, stage.merge_plan.nbytes) as progress:
            write_weights(stage.merge_plan, stage.folder, progress)
        for folder in stage.merge_plan.sources.folders:
            # A file that is mapped keeps its place on the disk.
            folder.close()
        for other, last in zip(stream_plan.stages, last_uses, strict=True):
            if last == i:
                remove_folder(other.folder)
    with bar(f"{count} of {count}" if count > 1 else "", stream_plan.result.nbytes) as progress:
        return write(stream_plan.result, target, card=card, overwrite=overwrite, check=check, progress=progress)
