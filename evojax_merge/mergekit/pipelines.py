"""Merges of diffusers folders: a recipe's merge for each component that is merged, and copies of the others."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.decoder_folder import PROJECTOR
from evojax_merge.checkpoints.derived import Find
from evojax_merge.checkpoints.pipelines import MERGE, Components, Pipeline, choose_components, is_pipeline
from evojax_merge.errors import InputError
from evojax_merge.mergekit.account import TensorFate, account_of
from evojax_merge.mergekit.execute import MergePlan, MergeSettings, Progress, prepare, write_weights
from evojax_merge.mergekit.schema import RecipeFile, Setting, Settings
from evojax_merge.mergekit.streams import RecipeStream, stage_of

# The keys of a recipe that are about a language model's tokens, layers or other modules.
FOREIGN = ("tokenizer", "chat_template", "ends", "other_modules", "calibration")


@dataclass(frozen=True)
class PipelinePlan:
    """The merges of all merged components, checked and planned. models: the folder of each model, by its reference."""

    recipe: RecipeFile
    models: dict[str, Path]
    components: Components
    merges: dict[str, MergePlan]

    @property
    def nbytes(self) -> int:
        """The bytes of what is written."""
        kept = [file for name, one in self.components.kept.items() for file in one.files(name)]
        return sum(plan.nbytes for plan in self.merges.values()) + sum(file.stat().st_size for file in kept)

    @property
    def warnings(self) -> list[str]:
        lines = [line for plan in self.merges.values() for line in plan.sources.warnings]
        return [*self.components.notes, *dict.fromkeys(lines)]

    @property
    def unmatched(self) -> list[tuple[str, str]]:
        """The name of the recipe and a sentence for each of its filters that means no tensor of any component."""
        first, *others = [plan.unmatched for plan in self.merges.values()]
        return [
            (self.recipe.where, sentence)
            for wanted, sentence in first.items()
            if all(wanted in unmatched for unmatched in others)
        ]

    @cached_property
    def account(self) -> list[TensorFate]:
        """The fate of each tensor of the merged components, whose name stands before that of the tensor."""
        return [
            replace(fate, tensor=f"{component}/{fate.tensor}")
            for component, plan in self.merges.items()
            for fate in account_of(list(self.models), plan.sources, plan.rows, plan.copied)
        ]

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        return [*self.models.values(), self.recipe.path]

    def write(self, folder: Path, progress: Progress, max_shard_bytes: int) -> None:
        """Merge into an empty folder."""
        self.components.write_others(folder)
        for name, plan in self.merges.items():
            write_weights(plan, folder / name, progress, max_shard_bytes)


def prepare_pipelines(stream: RecipeStream, settings: MergeSettings, find: Find) -> PipelinePlan | None:
    """Plan the merge of a recipe whose models are diffusers folders; None where they are none. Raises InputError where
    some are, and for what such a recipe cannot say."""
    recipe = stream.result
    # A stage's result is no folder yet, and no pipeline.
    stages = {stage.name for stage in stream.stages}
    existing = [name for name in recipe.models if stage_of(name, stages) is None]
    models = {name: find(recipe.where, name, recipe.path.parent) for name in existing}
    others = [name for name, path in models.items() if not is_pipeline(path)]
    if len(others) == len(models):
        if recipe.components and recipe.components != {PROJECTOR: MERGE}:
            raise InputError(
                recipe.where, f"components: is for diffusers folders, and {recipe.models[0]} is none; expected "
                f"{PROJECTOR}: {MERGE} for LLaVAs, or no such key",
            )  # fmt: skip
        return None
    if others:
        raise InputError(recipe.where, f"{others[0]} is no diffusers folder, as the others are; expected one kind")
    if stages:
        raise InputError(recipe.where, "several documents: diffusers folders are merged by one")
    foreign = [key for key in FOREIGN if getattr(recipe, key) is not None]
    if foreign or len(recipe.modules) > 1 or any(part.count is not None for part in recipe.modules[0].slices):
        what = foreign[0] if foreign else "slices and modules"
        raise InputError(recipe.where, f"{what}: is for language models; a diffusers folder has components:")
    pipelines = [Pipeline(path) for path in models.values()]
    components = choose_components(f"{recipe.where}: components", pipelines, list(models), recipe.components)
    settings = replace(settings, copy_tokenizer=False, allow_crimes=False)
    merges = {
        name: prepare(
            _of_component(recipe, models, name, components.merged),
            settings,
            lambda where, reference, relative_to, **more: Path(reference),
        )
        for name in components.merged
    }
    return PipelinePlan(recipe, models, components, merges)


def _settings_of(settings: Settings, name: str, merged: Collection[str]) -> Settings:
    """Settings in which a filter `component.text` means tensors of that component, one of those merged."""

    def of_component(setting: Setting) -> Setting:
        if not isinstance(setting, list):
            return setting
        entries: list[Any] = []
        for entry in setting:
            component, dot, text = str(entry.get("filter") if isinstance(entry, dict) else "").partition(".")
            if not dot or component not in merged:
                entries.append(entry)
            elif component == name:
                entries.append(entry | {"filter": text})
        return entries

    return {key: of_component(setting) for key, setting in settings.items()}


def _of_component(recipe: RecipeFile, models: dict[str, Path], name: str, merged: Collection[str]) -> RecipeFile:
    """The recipe of one component, of those merged."""

    def settings_of(settings: Settings) -> Settings:
        return _settings_of(settings, name, merged)

    folders = {reference: str(path / name) for reference, path in models.items()}
    (module,) = recipe.modules
    slices = tuple(
        replace(
            part,
            sources=tuple(
                replace(source, model=folders[source.model], settings=settings_of(source.settings))
                for source in part.sources
            ),
            settings=settings_of(part.settings), base=None if part.base is None else folders[part.base],
        )
        for part in module.slices
    )  # fmt: skip
    base = None if recipe.base is None else folders[recipe.base]
    # The keys of `components` are of the folder, whose component is a model by itself.
    module = replace(module, slices=slices, settings=settings_of(module.settings))
    return replace(recipe, base=base, modules=(module,), settings=settings_of(recipe.settings), components={})
