"""Any pytrees as a backend: merges of them, scored by JAX functions (or functions that JAX cannot trace)."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.backends.function.trees import TreeBank, TreeMerge, put_bank
from evojax_merge.checkpoints.abstract_bank import anywhere
from evojax_merge.checkpoints.writer import write_marker
from evojax_merge.config.search_config import EvaluationConfig
from evojax_merge.errors import InputError, first_line
from evojax_merge.evaluation.compilers import TargetCompiler, collectives
from evojax_merge.evaluation.costs import convolution_share, cost_of
from evojax_merge.evaluation.devices import ONE_DEVICE, AnyMesh, Devices, shard_population, tree_nbytes
from evojax_merge.evaluation.passes import TracedPass, trace
from evojax_merge.evaluation.planned_passes import (
    DeviceSizes,
    JaxprReader,
    PlannedPass,
    PlanUse,
    Report,
    SizedPass,
)
from evojax_merge.evaluation.programs import GRADIENT, MATERIALISE, SCORE
from evojax_merge.evaluation.samples import score_rows
from evojax_merge.evaluation.scores import PLAIN, Goal, TaskScores, task_weights
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.write import dump_documents
from evojax_merge.report.front_matter import changed_front_matter
from evojax_merge.report.plan import shown_seconds
from evojax_merge.report.winner import MergeReport
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.protocols import Progress
from evojax_merge.search.successive_halving import rung_size
from evojax_merge.spaces.parameter import GroupSpace
from evojax_merge.system.file_system import atomic_folder, atomic_write
from evojax_merge.tasks.arrays import ArrayTask, row_of
from evojax_merge.tasks.python_trees import flatten, shown_path
from evojax_merge.tasks.splits import Splits

Write = Callable[[Any, Path], None]
# The share of a program's arithmetic that convolutions are, above which its candidates run apart.
MOSTLY = 0.5
# The least duration of a measurement of a function that is not traced, unless it has all examples.
LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class TreeSpace:
    """The parameters of the groups of leaves. Genomes go to the evaluator unchanged: its program merges them."""

    group_space: GroupSpace

    @property
    def dims(self) -> int:
        return self.group_space.dims

    @property
    def start(self) -> np.ndarray:
        return self.group_space.start

    @property
    def parents(self) -> int:
        return self.group_space.parents

    @property
    def groups(self) -> Any:
        return self.group_space.groups

    @property
    def search_parameters(self) -> Any:
        return self.group_space.search_parameters

    def averages(self, where: str, members: np.ndarray) -> np.ndarray:
        return self.group_space.averages(where, members)

    def decode(self, genomes: np.ndarray) -> np.ndarray:
        return genomes

    def pull_back(self, genomes: np.ndarray, cotangents: np.ndarray) -> np.ndarray:
        return cotangents

    def seed_genomes(self, where: str, name: str) -> np.ndarray:
        return self.group_space.seed_genomes(where, name)

    def baselines(self) -> tuple[str, np.ndarray]:
        return self.group_space.baselines()

    def plain_merges(self) -> tuple[np.ndarray, tuple[str, ...]]:
        return self.group_space.plain_merges()

    def named_values(self, genomes: np.ndarray, parents: Sequence[str]) -> dict[str, np.ndarray]:
        return self.group_space.named_values(genomes, parents)

    def parents_among(self, genomes: np.ndarray) -> np.ndarray:
        return self.group_space.parents_among(genomes)


# ---------------------------------------------------------------------------------------------------------------
# Programs


def _scores(merge: TreeMerge, task: ArrayTask, bank: TreeBank, genome: jax.Array, rows: tuple[Any, ...]) -> jax.Array:
    """float32[N]: a candidate's scores."""
    return row_of(task.where, task.function(merge(bank, genome), *rows), jnp.asarray).astype(jnp.float32)


def over_candidates(function: Callable[[jax.Array], Any], genomes: jax.Array, chunk: int) -> Any:
    """The function's results for each genome, `chunk` of them at a time. A single one is in no loop: see
    `Programs.runs_apart`."""
    if len(genomes) == 1:
        return jax.tree.map(lambda leaf: leaf[None], function(genomes[0]))
    return jax.lax.map(function, genomes, batch_size=None if chunk == 1 else chunk)


def score_program(merge: TreeMerge, task: ArrayTask, chunk: int, mesh: AnyMesh = None) -> Any:
    """(bank, genomes float32[P, D], rows) -> float32[P, N], compiled: merges and scores `chunk` candidates together."""

    @jax.jit
    def program(bank: TreeBank, genomes: jax.Array, rows: tuple[Any, ...]) -> jax.Array:
        def local(shared: Any, genomes: jax.Array) -> jax.Array:
            one = partial(_scores, merge, task, shared[0])
            return over_candidates(lambda genome: one(genome, shared[1]), genomes, chunk)

        result: jax.Array = shard_population(mesh, local, (bank, rows), genomes)
        return result

    return program


def gradient_program(merge: TreeMerge, task: ArrayTask, chunk: int) -> Any:
    """(bank, genomes float32[P, D], rows) -> the scores float32[P, N] and the derivatives of their means, float32[P,
    D], compiled."""

    @jax.jit
    def program(bank: TreeBank, genomes: jax.Array, rows: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        def mean(genome: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = _scores(merge, task, bank, genome, rows)
            return scores.mean(), scores

        def score_and_gradient(genome: jax.Array) -> tuple[jax.Array, jax.Array]:
            (_, scores), gradient = jax.value_and_grad(mean, has_aux=True)(genome)
            return scores, gradient

        results: tuple[jax.Array, jax.Array] = over_candidates(score_and_gradient, genomes, min(chunk, len(genomes)))
        return results

    return program


@dataclass
class Programs:
    """The compiled programs of a search. chunk: the number of candidates that are computed together; population: the
    most that are scored at a time; is_on_cpu: whether they run on a CPU; finish: makes a candidate of a merge, on the
    host; workers: how many calls run side by side; together: (function, calls) -> the function's results, by as many
    workers. Tasks on other examples of one file share their programs."""

    merge: TreeMerge
    chunk: int
    population: int
    mesh: AnyMesh = None
    is_on_cpu: bool = False
    finish: Callable[[Any], Any] = lambda model: model
    workers: int = 1
    together: Callable[[Callable[[Any], Any], Any], list[Any]] = lambda function, calls: list(map(function, calls))
    _compiled: dict[Any, Any] = field(default_factory=dict)
    # Whether a task's candidates run apart, by its name and metric.
    _apart: dict[tuple[str, str], bool] = field(default_factory=dict)
    # The programs that were run, by what they are compiled for.
    _warm: set[Any] = field(default_factory=set)

    def of(self, make: Callable[..., Any], task: ArrayTask, *settings: Any) -> Any:
        # A task and its differentiable companion share their name.
        key = (make, task.name, task.metric, *settings)
        if key not in self._compiled:
            self._compiled[key] = make(self.merge, task, self.chunk, *settings)
        return self._compiled[key]

    @cached_property
    def whole(self) -> Any:
        """(bank, genome) -> the merged pytree, compiled."""
        return jax.jit(self.merge)

    @cached_property
    def sizes(self) -> list[int]:
        """The populations that programs are compiled for, ascending: a worker's share of those of the rungs."""
        groups = 1 if self.mesh is None else self.mesh.shape["population"]
        sizes = {rung_size(self.population, rung) for rung in range(self.population.bit_length())}
        return sorted({-(-(-(-size // groups) * groups) // self.workers) for size in sizes})

    def runs_apart(self, task: ArrayTask, program: Any, *arguments: Any) -> bool:
        """Return whether each candidate has a run of the program by itself. XLA for CPUs takes many times as long for a
        convolution in a loop, here that over candidates, as for one outside of loops; it is products of small matrices
        for which a loop is the quickest."""
        key = (task.name, task.metric)
        if key not in self._apart:
            self._apart[key] = (
                self.is_on_cpu and self.chunk == 1 and self.mesh is None
                and convolution_share(cost_of(program.trace(*arguments).jaxpr)) > MOSTLY
            )  # fmt: skip
        return self._apart[key]

    def side_by_side(self, function: Callable[[Any], Any], calls: Sequence[Any], key: Any) -> list[Any]:
        """The function's results. Calls with a new `key` follow one call by itself, so that it alone compiles."""
        if key in self._warm or len(calls) < 2:
            return self.together(function, calls)
        self._warm.add(key)
        return [function(calls[0]), *self.together(function, calls[1:])]


# ---------------------------------------------------------------------------------------------------------------
# Scoring


@dataclass(frozen=True)
class TreeEvaluator:
    """Scores genomes with the functions of some tasks."""

    tasks: list[ArrayTask]
    bank: TreeBank
    programs: Programs

    def passes(self, population: int) -> int:
        return population * len(self.tasks)

    def subset(self, examples: Sequence[np.ndarray]) -> "TreeEvaluator":
        """The evaluator of a subset of the examples: for each task int[M], ascending."""
        chosen = [task.subset(indices.tolist()) for task, indices in zip(self.tasks, examples, strict=True)]
        return replace(self, tasks=chosen)

    def evaluate(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        scores = TaskScores({})
        for task in self.tasks:
            if task.compared is not None:
                for genome in genomes:
                    add_answers(task, scores, self.programs.finish(self.programs.whole(self.bank, genome)))
                    progress(1)
                continue
            rows = (self._traced if task.traced else self._untraced)(task, genomes)
            scores.matrices[task.name] = {task.metric: checked(task, rows)}
            progress(len(genomes))
        return scores

    def _traced(self, task: ArrayTask, genomes: np.ndarray) -> np.ndarray:
        programs = self.programs
        program = programs.of(score_program, task, programs.mesh)
        # A task without examples has no rungs.
        sizes = programs.sizes[-1:] if task.examples is None else programs.sizes
        share = min(-(-len(genomes) // programs.workers), sizes[-1])
        size = next(size for size in sizes if size >= share)
        if programs.runs_apart(task, program, self.bank, np.resize(genomes, (size, genomes.shape[1])), task.rows):
            size = share = 1

        def score(part: np.ndarray) -> np.ndarray:
            # Padded to a size for which the program is compiled.
            padded = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
            return np.asarray(program(self.bank, padded, task.rows))[: len(part)]

        parts = [genomes[begin : begin + share] for begin in range(0, len(genomes), share)]
        return np.concatenate(programs.side_by_side(score, parts, (task.name, task.metric, size, task.size)))

    def _untraced(self, task: ArrayTask, genomes: np.ndarray) -> np.ndarray:
        programs = self.programs

        def score(genome: np.ndarray) -> np.ndarray:
            return host_scores(task, programs.finish(programs.whole(self.bank, genome)))

        rows = programs.together(score, genomes)
        sizes = sorted({scores.size for scores in rows})
        if len(sizes) > 1:
            raise InputError(task.where, f"returned {sizes[0]} numbers for one candidate and {sizes[1]} for another")
        return np.stack(rows)

    def value_and_gradient(
        self, genomes: np.ndarray, progress: Progress = lambda done: None, goal: Goal = PLAIN
    ) -> tuple[TaskScores, np.ndarray]:
        """The scores, and float32[P, D], the derivative of each genome's fitness with respect to it. Every task that
        counts must be traced."""
        scores, gradient = TaskScores({}), None
        for task, weight in task_weights(self.tasks, goal):
            program = self.programs.of(gradient_program, task)
            apart = self.programs.runs_apart(task, program, self.bank, genomes, task.rows)
            parts = [genomes[i : i + 1] for i in range(len(genomes))] if apart else [genomes]
            results = [program(self.bank, genomes_of_part, task.rows) for genomes_of_part in parts]
            rows, part = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
            scores.matrices[task.name] = {task.metric: checked(task, rows)}
            part = part if weight == 1 else part * np.float32(weight)
            gradient = part if gradient is None else gradient + part
            progress(len(genomes))
        assert gradient is not None
        return scores, gradient


def add_answers(task: ArrayTask, scores: TaskScores, model: Any) -> None:
    """Add a model's answers to the outputs, and zeros in place of its scores: judges compare the answers."""
    answers = scores.outputs.setdefault(task.name, [])
    answers.append(task.function(model, *task.rows))
    scores.matrices[task.name] = {task.metric: np.zeros((len(answers), task.size), np.float32)}


def host_scores(task: ArrayTask, model: Any) -> np.ndarray:
    """float32[N]: a model's scores by a function that JAX does not trace."""
    scores: np.ndarray = row_of(task.where, task.function(model, *task.rows), np.asarray).astype(np.float32)
    return scores


def checked(task: ArrayTask, rows: np.ndarray) -> np.ndarray:
    """Scores float[P, N] of a task. Raises InputError for another number of them than the task's examples."""
    if rows.shape[1] != task.size:
        raise InputError(
            task.where, f"returned {rows.shape[1]} numbers for a candidate; expected {task.size}, as before, or one "
            "for each example",
        )  # fmt: skip
    return rows


# ---------------------------------------------------------------------------------------------------------------
# The backend


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
    def space(self) -> TreeSpace:
        return TreeSpace(self.merge.space)

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
        return dict(self.document)

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

    def smaller_passes(self) -> str:
        return "evaluation.chunk: 1, or fewer examples"

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

    def answers(
        self, model: str, heldout: SpaceEvaluator[Any], scores: TaskScores, number: int
    ) -> list[dict[str, Any]]:
        rows = []
        for task in heldout.tasks:
            rows += score_rows(model, task, task.indices, scores, number)
            for row in rows[-task.size :] if task.pictures else ():
                row["image"] = task.pictures[row["example"]]
        return rows

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

    def export(self, recipe: str, genome: np.ndarray, out: Path, card: str, check: Callable[[], None]) -> None:
        with atomic_folder(out, overwrite=True, check=check) as folder:
            self.save(self.merged(genome), folder)
            atomic_write(folder / "README.md", changed_front_matter(card, {"library_name": self.hub_library}))
            write_marker(folder)


def _weighted(tasks: list[ArrayTask]) -> list[ArrayTask]:
    """The tasks that are part of the fitness: a task of weight 0 is only shown in the held-out table."""
    return [task for task in tasks if task.weight > 0]


def score_count(merge: TreeMerge, task: ArrayTask) -> int:
    """The number of scores that a task's function returns, found before anything is compiled. Raises InputError for a
    function that JAX cannot trace although it is to be traced."""
    start = merge.space.start
    if not task.traced:
        return host_scores(task, jax.jit(merge)(put_bank(merge.bank, jnp.asarray), start)).size
    for path, leaf in flatten(f"{task.where}: examples", task.examples)[0]:
        dtype = leaf.dtype if isinstance(leaf, jax.Array) else np.asarray(leaf).dtype
        if dtype.kind in "OSUMmV" and not jnp.issubdtype(dtype, jnp.floating):
            raise InputError(
                f"{task.where}: examples", f"leaf {shown_path(path)!r} is of {dtype}, which JAX has not; expected "
                f"numbers, or {task.untraced}",
            )  # fmt: skip
    try:
        shape = jax.eval_shape(partial(_scores, merge, task), merge.bank, start, task.rows)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise InputError(task.where, f"JAX cannot trace it ({first_line(error)}); {task.untraced}") from error
    return int(shape.size)


@dataclass(frozen=True)
class FunctionPlanner:
    """Plans a search over pytrees: one program for each task; see `Planner`."""

    backend: FunctionBackend
    bank_bytes: int
    # By the name and metric of a task that is not traced: numbers of examples, and the seconds of a candidate on them.
    _measured: dict[tuple[str, str], list[tuple[int, float]]] = field(default_factory=dict)

    gradient_passes = 1
    jobs = 1

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"{name}: JAX does not trace it; measured here: {shown_seconds(points[-1][1])} for a candidate on "
            f"{points[-1][0]} of the examples"
            for (name, _), points in self._measured.items()
        )

    def _called_seconds(self, task: ArrayTask) -> float:
        """The seconds that a candidate takes on a task that is not traced, from measurements on one example, and then
        on twice as many until they take a second."""
        points = self._measured.setdefault((task.name, task.metric), [])
        if not points:
            backend, count = self.backend, 1
            bank, workers = put_bank(backend.merge.bank, jnp.asarray), backend.programs(1, ONE_DEVICE).workers
            genomes = np.repeat(backend.space.start[None], workers, axis=0)
            while not points or (points[-1][0] < task.size and points[-1][1] * workers < LEAST_SECONDS):
                evaluator = backend.evaluator(bank, [task.subset(range(count))], workers)
                seconds = np.inf
                # The first call on so many examples compiles, or prepares the network for them.
                for _ in range(2):
                    started = time.perf_counter()
                    evaluator.score(genomes)
                    seconds = min(seconds, (time.perf_counter() - started) / workers)
                points.append((count, seconds))
                count = min(2 * count, task.size)
        (few, less), (many, more) = points[-2] if len(points) > 1 else (0, 0.0), points[-1]
        return more + max(0.0, more - less) / (many - few) * (task.size - many)

    def passes(
        self, tasks: Sequence[ArrayTask], candidates: int, use: PlanUse, compiler: TargetCompiler | None = None
    ) -> list[SizedPass]:
        backend, target = self.backend, self.backend.target
        chunk, reader = backend.chunk(math.ceil(candidates / target.devices)), JaxprReader(target, ONE_DEVICE)
        bank, genomes = backend.abstract_bank(anywhere), jax.ShapeDtypeStruct((chunk, backend.space.dims), jnp.float32)
        sized = []
        for task in tasks:
            traced = self._traced(task, bank, genomes, chunk, use)
            name = MATERIALISE if not task.traced else GRADIENT if use == "gradient" else SCORE
            planned = PlannedPass(
                task.name, name, traced, chunk if task.traced else 1, merge_bytes=tree_nbytes(bank),
                held_bytes=tree_nbytes([anywhere(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(task.rows)]),
                called_seconds=0.0 if task.traced else self._called_seconds(task),
            )  # fmt: skip
            report = None
            if compiler is not None:
                placed = backend.abstract_bank(compiler.place_leaf)
                compiled = self._traced(task, placed, compiler.place(genomes), chunk, use)
                report = Report(compiler.temporary_bytes(compiled), collectives(compiler.compiled(compiled)))
            sized.append(SizedPass(planned, planned.held_bytes, reader.temporary_bytes(traced), report))
        return sized

    def _traced(self, task: ArrayTask, bank: TreeBank, genomes: Any, chunk: int, use: PlanUse) -> TracedPass:
        merge = self.backend.merge
        if not task.traced:
            return trace(jax.jit(merge), bank, jax.ShapeDtypeStruct(genomes.shape[1:], genomes.dtype))
        make = gradient_program if use == "gradient" else score_program
        return trace(make(merge, task, chunk), bank, genomes, task.rows)
