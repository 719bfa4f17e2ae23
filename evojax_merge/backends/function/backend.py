"""Any pytrees as a backend: merges of them, scored by JAX functions (or functions that JAX cannot trace)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.backends.backend import Adaptable
from evojax_merge.backends.function.adapted import adaptable_tree
from evojax_merge.backends.function.planner import FunctionPlanner
from evojax_merge.backends.function.programs import (
    Programs,
    TreeEvaluator,
    add_answers,
    checked,
    host_scores,
    score_count,
)
from evojax_merge.backends.function.trees import TreeBank, TreeMerge, put_bank
from evojax_merge.checkpoints.abstract_bank import anywhere
from evojax_merge.checkpoints.writer import write_marker
from evojax_merge.config.search_config import EvaluationConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.devices import ONE_DEVICE, Devices, tree_nbytes
from evojax_merge.evaluation.planned_passes import (
    DeviceSizes,
)
from evojax_merge.evaluation.samples import score_rows
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.write import dump_documents
from evojax_merge.report.front_matter import changed_front_matter
from evojax_merge.report.winner import MergeReport
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.run_schema import GROUPS
from evojax_merge.spaces.parameter import GroupSpace
from evojax_merge.system.file_system import atomic_folder, atomic_write
from evojax_merge.tasks.arrays import ArrayTask, row_of
from evojax_merge.tasks.splits import Splits

Write = Callable[[Any, Path], None]
# Low-rank changes that an accelerator computes together.
TOGETHER = 8


@dataclass(frozen=True)
class FunctionBackend:
    """Merges of pytrees; see `Backend`. names: of the models in recipes and tables, the base first where there is one;
    models: their files; save: writes a pytree into a folder; `chunk`: the number of candidates that are computed
    together (None: one on a CPU, where computing several together is slower, else all)."""

    merge: TreeMerge
    names: tuple[str, ...]
    models: tuple[Path, ...]
    save: Write
    settings: EvaluationConfig
    target: Target
    document: Mapping[str, Any] = field(default_factory=dict)
    kind: Any = None

    compute_dtype = final_compute_dtype = "float32"
    export_dtype = None
    baseline_role = "uniform"

    @property
    def name(self) -> str:
        return self.merge.spec.method_name

    @property
    def space(self) -> GroupSpace:
        return self.merge.space

    @property
    def _has_base(self) -> bool:
        return self.merge.spec.options.has_base

    @property
    def compared(self) -> list[tuple[str, Path]]:
        roles = ["base"] * self._has_base + ["parent"] * (len(self.models) - self._has_base)
        return list(zip(roles, self.models, strict=True))

    @property
    def references(self) -> Mapping[Path, str]:
        return dict(zip(self.models, self.names, strict=True))

    @property
    def hub_library(self) -> str:
        """The library that opens an exported folder, by its name on the hub."""
        return "jax"

    @property
    def loaded(self) -> int:
        return len(self.models)

    @property
    def is_random(self) -> bool:
        return self.merge.spec.method.random

    @property
    def has_derivatives(self) -> bool:
        return True

    not_adaptable, not_polishable = "", "an adapter is written for language models"

    # -----------------------------------------------------------------------------------------------------------
    # Before the search

    def check_task(self, where: str, task: Any) -> None:
        """Raises InputError for a task of another kind of model, for a function that JAX cannot trace, and for one that
        returns another number of scores than the task has examples."""
        if not isinstance(task, ArrayTask):
            raise InputError(
                where, f"{task.name}: a {type(task).__name__} asks a language model; expected a task on arrays, such "
                "as kind: arrays",
            )  # fmt: skip
        count = score_count(self.merge, task)
        if count != task.size:
            raise InputError(task.where, f"returned {count} numbers for {task.size} examples; expected one for each")

    def example_lengths(self, task: ArrayTask) -> np.ndarray:
        return np.ones(task.size)

    def prepare(self, splits: Splits[list[ArrayTask]]) -> Splits[list[ArrayTask]]:
        return replace(splits.map(_weighted), heldout=splits.heldout)

    def describe(self) -> str:
        space = self.merge.space
        names = ", ".join(parameter.name for parameter in space.search_parameters)
        return f"{space.dims} parameters ({names}; {len(space.groups)} groups)"

    def describe_inputs(self, prepared: Splits[list[ArrayTask]]) -> list[str]:
        examples = sum(task.size for task in prepared.search)
        lines = [f"{role}: {self.references[model]}" for role, model in self.compared]
        return [*lines, f"per candidate: {examples:,} examples of {', '.join(task.name for task in prepared.search)}"]

    def warnings(self, prepared: Splits[list[ArrayTask]]) -> list[str]:
        return []

    def resolved(self) -> dict[str, Any]:
        return {**self.document, GROUPS: list(self.merge.space.groups)}

    def files(self) -> set[Path]:
        return {file for model in self.models for file in ([model] if model.is_file() else model.rglob("*"))
                if file.is_file()}  # fmt: skip

    def extensions(self) -> list[object]:
        return [self.merge.spec.method, self.kind]

    # -----------------------------------------------------------------------------------------------------------
    # The cost

    def stored_bytes(self) -> int:
        return sum(getattr(leaf, "nbytes", 0) for column in self.merge.tree.columns for leaf in column)

    def held_bytes(self) -> int:
        return tree_nbytes(self.abstract_bank(anywhere))

    def abstract_bank(self, place: Callable[..., Any]) -> TreeBank:
        """The bank as abstract arrays that `place` makes."""
        return put_bank(self.merge.bank, lambda array: place(array.shape, array.dtype, None))

    def device_sizes(self, shards: int) -> DeviceSizes:
        sizes = DeviceSizes(shards)
        self.abstract_bank(sizes.place)
        return sizes

    def streamed(self) -> None:
        """None: trees are on the devices."""

    def planner(self, bank_bytes: int) -> "FunctionPlanner":
        return FunctionPlanner(self, bank_bytes)

    def smaller_passes(self) -> list[dict[str, Any]]:
        return [] if self.settings.chunk == 1 else [{"chunk": 1}]

    # -----------------------------------------------------------------------------------------------------------
    # The search

    def chunk(self, population: int) -> int:
        """The number of candidates that are computed together."""
        if self.settings.chunk is None:
            return population if self.target.is_accelerator else 1
        return min(self.settings.chunk, population)

    def programs(self, population: int, devices: Devices) -> Programs:
        is_on_cpu = not self.target.is_accelerator
        return Programs(self.merge, self.chunk(population), population, devices.mesh, is_on_cpu)

    def load(self, devices: Devices, progress: Callable[[int], None], folder: Path | None) -> TreeBank:
        bank = put_bank(self.merge.bank, devices.put)
        progress(self.stored_bytes())
        return bank

    def evaluators(
        self, bank: TreeBank, prepared: Splits[list[ArrayTask]], population: int, devices: Devices = ONE_DEVICE,
        log: Callable[[str], None] = lambda text: None,
    ) -> Splits[SpaceEvaluator[Any]]:  # fmt: skip
        programs = self.programs(population, devices)
        return prepared.map(lambda tasks: SpaceEvaluator(self.space, TreeEvaluator(tasks, bank, programs), devices))

    def evaluator(
        self, bank: TreeBank, tasks: list[ArrayTask], population: int, devices: Devices = ONE_DEVICE
    ) -> SpaceEvaluator[Any]:
        programs = self.programs(population, devices)
        return SpaceEvaluator(self.space, TreeEvaluator(tasks, bank, programs), devices)

    def describe_work(self, evaluators: Sequence[SpaceEvaluator[Any]]) -> str:
        chunk = max((evaluator.evaluator.programs.chunk for evaluator in evaluators), default=1)
        few = "one candidate at a time" if chunk == 1 else f"up to {chunk:,} candidates at a time"
        return f"each device scored {few}"

    def within(self, context: Any) -> "FunctionBackend":
        return self

    # -----------------------------------------------------------------------------------------------------------
    # The winner

    def score_stored(self, model: Path, heldout: SpaceEvaluator[Any], progress: Callable[[int], None]) -> TaskScores:
        stored, scores = self.merge.tree.source(self.models.index(model)), TaskScores({})
        for task in heldout.tasks:
            if task.compared is not None:
                add_answers(task, scores, stored)
                progress(1)
                continue
            if task.traced:
                answer = jax.jit(task.function)(stored, *task.rows)
                row = row_of(task.where, np.asarray(answer), np.asarray).astype(np.float32)
            else:
                row = host_scores(task, stored)
            scores.matrices[task.name] = {task.metric: checked(task, row[None])}
            progress(1)
        return scores

    def export_change(self, model: Path, layout: Any, vector: np.ndarray, out: Path, check: Callable[[], None]) -> None:
        raise InputError(model, f"cannot be polished: {self.not_polishable}")

    def adaptable(
        self, candidate: Path | np.ndarray, like: Sequence[SpaceEvaluator[Any]], rank: int, scale: float
    ) -> Adaptable:
        programs = self.programs(TOGETHER, ONE_DEVICE)
        assert isinstance(candidate, Path), self.not_polishable
        splits = [evaluator.evaluator.tasks for evaluator in like]
        return adaptable_tree(
            self.merge.tree, self.models.index(candidate), splits, programs, rank, scale, self.matrix_shape
        )

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a leaf as matrices `(…, out, in)`."""
        return shape

    def answers(
        self, model: str, candidate: Path | np.ndarray, heldout: SpaceEvaluator[Any], scores: TaskScores, number: int
    ) -> list[dict[str, Any]]:
        rows, weights = [], None
        for task in heldout.tasks:
            answers: Sequence[str] = ()
            if task.answer is not None:
                weights = self._weights(candidate) if weights is None else weights
                answers = task.answer(weights, *task.rows)
            for n, row in enumerate(score_rows(model, task, task.indices, scores, number)):
                words = {"prompt": task.prompt(n), "target": task.target(n)}
                words |= {"image": task.pictures[row["example"]]} if task.pictures else {}
                words |= {"outputs": [answers[n]]} if answers else {}
                rows.append(row | words)
        return rows

    def _weights(self, candidate: Path | np.ndarray) -> Any:
        """One of the compared models, or the candidate of a genome, as a pytree."""
        if isinstance(candidate, Path):
            return self.merge.tree.source(self.models.index(candidate))
        return self.merged(candidate)

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> MergeReport:
        values = {name: np.asarray(block) for name, block in self.merge.space.values(jnp.asarray(genome)).items()}
        return MergeReport(self.merge.space.groups, values, tuple(parents))

    def merged_from(self, genome: np.ndarray) -> list[Path]:
        return list(self.models)

    def recipe(self, genome: np.ndarray) -> str:
        """The recipe in mergekit's format: each group's parameters behind a filter with its name."""
        space, first = self.merge.space, int(self._has_base)
        parameters = {name: np.asarray(block) for name, block in space.parameters(jnp.asarray(genome)).items()}

        def written(block: np.ndarray) -> Any:
            values = [float(value) for value in block]
            if len(set(values)) == 1:
                return values[0]
            return [{"filter": group, "value": value} for group, value in zip(space.groups, values, strict=True)]

        of_parents = {name for name in parameters if space.method.parameter(name).per_parent}
        document: dict[str, Any] = {"merge_method": self.name}
        if first:
            document["base_model"] = self.names[0]
        document["models"] = [
            {"model": name, "parameters": {key: written(parameters[key][:, k]) for key in sorted(of_parents)}}
            for k, name in enumerate(self.names[first:])
        ]
        shared = {key: written(block) for key, block in parameters.items() if key not in of_parents}
        options = self.merge.spec.options
        return dump_documents([document | {"parameters": {"normalize": options.normalize} | shared}])

    def merged(self, genome: np.ndarray) -> Any:
        """The merge of a genome, float32[D], as a pytree."""
        return jax.jit(self.merge)(put_bank(self.merge.bank, jnp.asarray), jnp.asarray(genome))

    def export(
        self, recipe: str, genome: np.ndarray, out: Path, card: str, check: Callable[[], None]
    ) -> list[dict[str, Any]]:
        with atomic_folder(out, overwrite=True, check=check) as folder:
            self.save(self.merged(genome), folder)
            atomic_write(folder / "README.md", changed_front_matter(card, {"library_name": self.hub_library}))
            write_marker(folder)
        return []


def _weighted(tasks: list[ArrayTask]) -> list[ArrayTask]:
    """The tasks that are part of the fitness: a task of weight 0 is only shown in the held-out table."""
    return [task for task in tasks if task.weight > 0]
