"""The programs that merge and score pytrees, and the evaluator that runs them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.backends.function.trees import TreeBank, TreeMerge, put_bank
from evojax_merge.errors import InputError, first_line
from evojax_merge.evaluation.costs import convolution_share, cost_of
from evojax_merge.evaluation.devices import AnyMesh, shard_population
from evojax_merge.evaluation.scores import PLAIN, Goal, TaskScores, task_weights
from evojax_merge.search.protocols import Progress
from evojax_merge.search.successive_halving import rung_size
from evojax_merge.tasks.arrays import ArrayTask, row_of
from evojax_merge.tasks.python_trees import flatten, shown_path

# The share of a program's arithmetic that convolutions are, above which its candidates run apart.
MOSTLY = 0.5


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
    """The compiled programs of a search. merge: (bank, genome) -> a candidate, as `TreeMerge` is; chunk: the number of
    candidates that are computed together; population: the most that are scored at a time; is_on_cpu: whether they run
    on a CPU; finish: makes a candidate of a merge, on the host; workers: how many calls run side by side; together:
    (function, calls) -> the function's results, by as many workers. Tasks on other examples of one file share their
    programs."""

    merge: Any
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
        expected = f"one for each example, here {task.size}" if task.is_divisible else f"{task.size}, as before"
        raise InputError(task.where, f"returned {rows.shape[1]} numbers for a candidate; expected {expected}")
    return rows


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
