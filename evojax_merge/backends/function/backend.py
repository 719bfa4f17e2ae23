"""Any pytrees as a backend: merges of them, scored by JAX functions (or functions that JAX cannot trace)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.backends.backend import Adaptable, BackendFacts, CandidateFacts, Prepared
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
from evojax_merge.evaluation.samples import score_rows
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.write import dump_documents, switch_values
from evojax_merge.report.comparison import model_name
from evojax_merge.report.front_matter import changed_front_matter
from evojax_merge.report.winner import MergeReport
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.run_schema import GROUPS
from evojax_merge.system.file_system import atomic_folder, atomic_write
from evojax_merge.tasks.arrays import ArrayTask, row_of
from evojax_merge.tasks.splits import Splits

Write = Callable[[Any, Path], None]
# Low-rank changes that an accelerator computes together.
TOGETHER = 8


@dataclass(frozen=True)
class FunctionBackend:
    """Merges of pytrees; see `Backend`. save: writes a pytree into a folder; library: opens
    such a folder, by its name on the hub. The setting `chunk` is the number of
    candidates that are computed together (None: one on a CPU, where computing several together is slower, else all)."""

    facts: BackendFacts
    merge: TreeMerge
    save: Write
    library: str = "jax"

    @property
    def models(self) -> list[Path]:
        """The models' files, in the order of the tree's sources."""
        return [model for _, model in self.facts.compared]

    # -----------------------------------------------------------------------------------------------------------
    # Before the search

    def check(self, where: str, task: Any) -> None:
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

    def prepare(self, splits: Splits[list[ArrayTask]]) -> Prepared:
        weighted = replace(splits.map(_weighted), heldout=splits.heldout)
        examples = sum(task.size for task in weighted.search)
        names = ", ".join(task.name for task in weighted.search)
        return Prepared(**vars(weighted), notes=[f"per candidate: {examples:,} examples of {names}"])

    def files(self) -> set[Path]:
        return {file for model in self.models for file in ([model] if model.is_file() else model.rglob("*"))
                if file.is_file()}  # fmt: skip

    # -----------------------------------------------------------------------------------------------------------
    # The cost

    def held_bytes(self) -> int:
        """Bytes of the loaded bank."""
        return tree_nbytes(self.abstract_bank(anywhere))

    def abstract_bank(self, place: Callable[..., Any]) -> TreeBank:
        """The bank as abstract arrays that `place` makes."""
        return put_bank(self.merge.bank, lambda array: place(array.shape, array.dtype, None))

    def planner(self) -> FunctionPlanner:
        return FunctionPlanner(self)

    # -----------------------------------------------------------------------------------------------------------
    # The search

    def chunk(self, population: int) -> int:
        """The number of candidates that are computed together."""
        if self.facts.settings.chunk is None:
            return population if self.facts.target.is_accelerator else 1
        return min(self.facts.settings.chunk, population)

    def programs(self, population: int, devices: Devices) -> Programs:
        is_on_cpu = not self.facts.target.is_accelerator
        return Programs(self.merge, self.chunk(population), population, devices.mesh, is_on_cpu)

    def load(self, devices: Devices, progress: Callable[[int], None], folder: Path | None) -> TreeBank:
        bank = put_bank(self.merge.bank, devices.put)
        progress(self.facts.stored_bytes)
        return bank

    def evaluators(
        self, bank: TreeBank, prepared: Splits[list[ArrayTask]], population: int, devices: Devices = ONE_DEVICE,
        log: Callable[[str], None] = lambda text: None,
    ) -> Splits[SpaceEvaluator[Any]]:  # fmt: skip
        programs = self.programs(population, devices)
        return prepared.map(
            lambda tasks: SpaceEvaluator(self.merge.space, TreeEvaluator(tasks, bank, programs), devices)
        )

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

    def adaptable(
        self, candidate: Path | np.ndarray, like: Sequence[SpaceEvaluator[Any]], rank: int, scale: float
    ) -> Adaptable:
        programs = self.programs(TOGETHER, ONE_DEVICE)
        assert isinstance(candidate, Path), self.facts.not_polishable
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

    def describe(self, genome: np.ndarray) -> CandidateFacts:
        space = self.merge.space
        values = {name: np.asarray(block) for name, block in space.values(jnp.asarray(genome)).items()}
        report = MergeReport(space.groups, values, tuple(map(model_name, self.facts.parents)))
        comment = "".join(f"# {line}\n" for line in wrap(self.facts.beyond_recipe, 110))
        return CandidateFacts(comment + dump_documents([self.recipe(genome)]), self.models, report)

    def recipe(self, genome: np.ndarray) -> dict[str, Any]:
        """The recipe in mergekit's format: each group's parameters behind its filters."""
        facts, space = self.facts, self.merge.space
        parameters = {name: np.asarray(block) for name, block in space.parameters(jnp.asarray(genome)).items()}
        filters = self.filters()

        def written(block: np.ndarray) -> Any:
            values = [float(value) for value in block]
            if len(set(values)) == 1:
                return values[0]
            return [{"filter": text, "value": values[group]} for text, group in filters]

        of_parents = {name for name in parameters if space.method.parameter(name).per_parent}
        document: dict[str, Any] = {"merge_method": facts.name}
        if facts.base is not None:
            document["base_model"] = facts.references[facts.base]
        document["models"] = [
            {
                "model": facts.references[parent],
                "parameters": {key: written(parameters[key][:, k]) for key in sorted(of_parents)},
            }
            for k, parent in enumerate(facts.parents)
        ]
        shared = {key: written(block) for key, block in parameters.items() if key not in of_parents}
        spec = self.merge.spec
        settings = switch_values(space.method, spec.options) | shared
        document |= {"parameters": settings} if settings else {}
        return document | ({"random_seed": spec.seed} if space.method.random else {})

    def filters(self) -> Sequence[tuple[str, int]]:
        """The filters of a recipe, of which the first that matches a tensor counts, each with its group's number."""
        return [(group, number) for number, group in enumerate(self.merge.space.groups)]

    def merged(self, genome: np.ndarray) -> Any:
        """The merge of a genome, float32[D], as a pytree."""
        return jax.jit(self.merge)(put_bank(self.merge.bank, jnp.asarray), jnp.asarray(genome))

    def export(
        self, recipe: str, genome: np.ndarray, out: Path, card: str, check: Callable[[], None]
    ) -> list[dict[str, Any]]:
        weights = self.merged(genome)
        with atomic_folder(out, overwrite=True, check=check) as folder:
            self.save(weights, folder)
            card = changed_front_matter(card, {"library_name": self.library}) + self.pictures(weights, folder)
            atomic_write(folder / "README.md", card)
            write_marker(folder)
        return []

    def pictures(self, winner: Any, folder: Path) -> str:
        """Write pictures of a winner into its folder; the section of its card about them."""
        return ""


def _weighted(tasks: list[ArrayTask]) -> list[ArrayTask]:
    """The tasks that are part of the fitness: a task of weight 0 is only shown in the held-out table."""
    return [task for task in tasks if task.weight > 0]


def tree_facts(
    merge: TreeMerge, models: Sequence[Path], names: Sequence[str], settings: EvaluationConfig, target: Target,
    factory: Any = None, **others: Any,
) -> BackendFacts:  # fmt: skip
    """The facts about merges of pytrees. models, names: the files of the tree's sources, and their names in recipes and
    tables; factory: the `BackendFactory` that opened them; others: further fields."""
    space, spec = merge.space, merge.spec
    references, has_base = dict(zip(models, names, strict=True)), int(spec.options.has_base)
    searched = ", ".join(parameter.name for parameter in space.search_parameters)
    facts = BackendFacts(
        name=spec.method_name,
        space=space,
        genome=f"{space.dims} parameters ({searched}; {len(space.groups)} groups)",
        base=models[0] if has_base else None,
        parents=tuple(models[has_base:]),
        references=references,
        loaded=len(models),
        stored_bytes=sum(getattr(leaf, "nbytes", 0) for column in merge.tree.columns for leaf in column),
        settings=settings,
        target=target,
        is_random=spec.method.random,
        baseline_role="uniform",
        not_polishable="an adapter is written for language models",
        smaller_passes=[] if settings.chunk == 1 else [{"chunk": 1}],
        extensions=[spec.method, factory],
        **others,
    )
    notes = [f"{role}: {references[model]}" for role, model in facts.compared]
    return replace(facts, resolved={**facts.resolved, GROUPS: list(space.groups)}, notes=notes)
