"""Diffusers pipelines as a backend: merges of their components, scored by the pictures that they draw."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.backends.backend import Prepared
from evojax_merge.backends.function.backend import FunctionBackend
from evojax_merge.backends.torch.generator import Generator
from evojax_merge.backends.torch.network import stored_groups
from evojax_merge.checkpoints.pipelines import MERGE, SHEET, Components
from evojax_merge.errors import InputError, library_errors
from evojax_merge.mergekit.write import group_filters
from evojax_merge.system.console import say
from evojax_merge.tasks.arrays import ArrayTask
from evojax_merge.tasks.function import checked, guard_user_function
from evojax_merge.tasks.generated_images import DrawingTask, HumanImageTask, ImageTask, picture_of
from evojax_merge.tasks.splits import Splits

# The pictures of a model in a row of the contact sheet, and in pixels a picture's place there and the gap around it.
COLUMNS, CELL, GAP = 12, 96, 4


@dataclass(frozen=True, eq=False)
class PictureScorer:
    """A task's function (weights, rows) -> float[N]: draws the pictures of the rows' numbers, and has the user's
    function score them."""

    generator: Generator
    task: ImageTask

    def __call__(self, weights: Mapping[str, Any], rows: Mapping[str, Any]) -> np.ndarray:
        numbers = [int(number) for number in rows["number"]]
        drawn, function = self.generator.draw(weights, self.task, numbers), self.task.function
        if not np.isfinite(drawn).all():
            return np.full(len(numbers), np.nan, np.float32)
        records = [dict(self.task.records[i]) for i in numbers]
        with guard_user_function(function.reference):
            return checked(function, function.call(records, drawn), len(numbers))


@dataclass(frozen=True, eq=False)
class PictureWriter:
    """A compared task's function (weights, rows) -> names: draws the pictures of the rows' numbers, and keeps them."""

    generator: Generator
    task: HumanImageTask

    def __call__(self, weights: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
        numbers = [int(number) for number in rows["number"]]
        return [self.task.pictures.add(pixels) for pixels in self.generator.draw(weights, self.task, numbers)]


@dataclass(frozen=True, kw_only=True)
class PipelineBackend(FunctionBackend):
    """Merges of pipelines; see `Backend`. generator: takes the merged tensors, by their names; components: which are
    merged."""

    generator: Generator
    components: Components
    # The held-out tasks of pictures, once they are prepared.
    _heldout: list[DrawingTask] = field(default_factory=list, repr=False)
    _checked: set[str] = field(default_factory=set, repr=False)

    def check(self, where: str, task: Any) -> None:
        if not isinstance(task, DrawingTask):
            raise InputError(
                where, f"{task.name}: a {type(task).__name__} asks no image generator; expected kind: "
                "image_generation or human_images",
            )  # fmt: skip
        self.generator.check(task)

    def prepare(self, splits: Splits[list[Any]]) -> Prepared:
        self._heldout[:] = [task for task in splits.heldout if task.size]
        return super().prepare(splits.map(lambda tasks: [self._array_task(task) for task in tasks]))

    def _array_task(self, task: Any) -> ArrayTask:
        if task.name not in self._checked:
            self._check_repeatable(task)
            self._checked.add(task.name)
        compared = replace(task, indices=tuple(range(len(task.records)))) if isinstance(task, HumanImageTask) else None
        function = PictureScorer(self.generator, task) if compared is None else PictureWriter(self.generator, compared)
        array_task = ArrayTask(
            task.name, {"number": np.arange(len(task.records))}, function, metric=task.metric, weight=task.weight,
            traced=False, where=task.section, files=task.files, compared=compared,
        )  # fmt: skip
        return array_task.subset(task.indices)

    def _check_repeatable(self, task: DrawingTask) -> None:
        """Raises InputError for a pipeline that fails, or draws other pictures from the same noise."""
        weights, name = self.merge.tree.source(0), self.generator.name
        with library_errors(task.section, f"{task.name}: {name} of {self.models[0]} fails on the first example"):
            once, again = (self.generator.draw(weights, task, [task.indices[0]]) for _ in range(2))
        if not np.allclose(once, again, atol=1e-4, equal_nan=True):
            raise InputError(
                task.section, f"{task.name}: {name} draws another picture from the same noise when it is asked twice; "
                "a search compares candidates, so pictures may not be random",
            )  # fmt: skip
        say(f"{name}: draws pictures of one candidate at a time, from the same noise for each ({task.name})")

    def filters(self) -> Sequence[tuple[str, int]]:
        """Filters of tensors by the component and the name in it."""
        named: dict[str, list[tuple[str, int]]] = {}
        for name, group in self.merge.merged_groups:
            component, _, tensor = name.partition(".")
            named.setdefault(component, []).append((tensor, group))
        return [
            (f"{component}.{text}", group)
            for component, of_module in named.items()
            for tensors in [stored_groups(self.generator.modules[component], of_module)]
            for text, group in group_filters([name for name, _ in tensors], [group for _, group in tensors])
        ]

    def recipe(self, genome: np.ndarray) -> dict[str, Any]:
        kept = {
            name: self.facts.references[pipeline.path] for name, pipeline in self.components.kept.items()
            if pipeline is not self.components.first
        }  # fmt: skip
        return super().recipe(genome) | {"components": dict.fromkeys(self.components.merged, MERGE) | kept}

    def pictures(self, winner: Any, folder: Path) -> str:
        drawable = next((task for task in self._heldout if task.inputs == "images"), None)
        if drawable is None:
            return ""
        (folder / SHEET).write_bytes(self.contact_sheet(drawable, winner))
        return f"\n## Pictures\n\n{self._caption(drawable)}\n\n![contact sheet]({SHEET})\n"

    def _caption(self, task: DrawingTask) -> str:
        facts = self.facts
        rows = [*(f"{role} {facts.references[model]}" for role, model in facts.compared), "uniform", "winner"]
        shown = min(COLUMNS, task.size)
        return (
            f"The first {shown} held-out examples of `{task.name}`, a row each: "
            + ", ".join(f"`{Path(row).name if '/' in row else row}`" for row in rows)
            + "."
        )

    def contact_sheet(self, task: DrawingTask, winner: Mapping[str, Any]) -> bytes:
        """The first held-out pictures as a PNG: a row each for the base and the parents, the uniform merge and the
        winner, as in the held-out table."""
        from PIL import Image

        numbers = task.indices[:COLUMNS]
        _, baselines = self.merge.space.baselines()
        models = [*(self.merge.tree.source(k) for k in range(len(self.models))), self.merged(baselines[0]), winner]
        sheet, side = Image.new("RGB", (CELL * len(numbers), CELL * len(models)), "white"), CELL - 2 * GAP
        for row, weights in enumerate(models):
            for column, pixels in enumerate(self.generator.draw(weights, task, numbers)):
                nearest = Image.Resampling.NEAREST if pixels.shape[0] < CELL else None
                picture = picture_of(pixels).resize((side, side), nearest)
                sheet.paste(picture.convert("RGB"), (CELL * column + GAP, CELL * row + GAP))
        content = io.BytesIO()
        sheet.save(content, "PNG")
        return content.getvalue()
