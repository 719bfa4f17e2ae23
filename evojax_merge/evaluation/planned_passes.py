"""The compiled passes that an evaluation would run, traced with abstract arrays: their arithmetic, traffic and memory.

The evaluator itself decides how many candidates share a pass and whether they are materialised first; this module
follows its decisions through a chunk of candidates. Nothing is run, and only headers need be there.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.checkpoints.abstract_bank import anywhere
from evojax_merge.evaluation import passes
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.costs import Cost, cost_of, scan_length, temporary_bytes
from evojax_merge.evaluation.devices import Devices, is_sharded, size_of, tree_nbytes
from evojax_merge.evaluation.evaluator import (
    STOP_CHECK_INTERVAL,
    Evaluator,
    MergePopulation,
    Population,
    arrays_of,
    row_update,
    step_tokens,
)
from evojax_merge.evaluation.passes import PerCandidateModel, TracedPass, abstract_results, trace
from evojax_merge.evaluation.targets import Target
from evojax_merge.models.architecture import EMBEDDING, HEAD
from evojax_merge.models.bank import Bank
from evojax_merge.models.decoder import KVCache

# The use of planned passes: the generations' scores, their gradients, or what chooses the winner.
PlanUse = Literal["scores", "gradient", "final"]
MATERIALISE, PREFIX, SCORE, PREFILL, DECODE = "materialise", "prefix", "score", "prefill", "decode"
CAST, GRADIENT, PREFIX_GRADIENT, RECIPE_GRADIENT = "cast", "gradient", "prefix gradient", "recipe gradient"


class PassReader(Protocol):
    """Reads the memory and the results of a traced pass: from its jaxpr, or from the compiler of its target."""

    def temporary_bytes(self, traced: TracedPass) -> int:
        """Bytes that the pass needs on a device beside its arguments, its results included."""
        ...

    def outputs(self, traced: TracedPass) -> Any:
        """The pass's results, as abstract arrays with their shardings."""
        ...

    def place(self, candidates: Any) -> Any:
        """The arrays that each candidate has (leading axis P), with the shardings that a pass takes."""
        ...


@dataclass(frozen=True)
class JaxprReader:
    """An estimate for a target, read off the jaxpr. devices: one group of them, which share a candidate."""

    target: Target
    devices: Devices

    def temporary_bytes(self, traced: TracedPass) -> int:
        donated = [argument for argument in jax.tree.leaves(traced.args_info) if argument.donated]
        return temporary_bytes(traced.jaxpr, donated, self.target.platform, traced.cut, self.devices.model)

    def outputs(self, traced: TracedPass) -> Any:
        return abstract_results(traced, self.devices)

    def place(self, candidates: Any) -> Any:
        return candidates


@dataclass(frozen=True)
class PlannedPass:
    """A pass over a chunk of candidates.

    task: the task's name; candidates: the size of the chunk; runs: how often the pass runs for such a chunk; steps: how
    often the body of its `while` loop runs, at most; merge_bytes: the traffic of merging for a candidate in a run, the
    sources' and the merge's bytes; held_bytes: the memory that it needs beside the bank and its temporaries, for all
    its candidates.
    """

    task: str
    name: str
    traced: TracedPass
    candidates: int
    runs: int = 1
    steps: int = 1
    merge_bytes: int = 0
    held_bytes: int = 0

    def cost(self, target: Target) -> Cost:
        """The cost of all its runs, for one candidate."""
        # On a CPU the program finds how many blocks of a mixture's tokens it computes: each token counts once.
        platform = None if target.platform == "cpu" else target.platform

        def trips(eqn: Any) -> int:
            return self.steps if eqn.primitive.name == "while" else scan_length(eqn)

        computed = cost_of(self.traced.jaxpr, trips, platform) * (self.runs / self.candidates)
        return computed + Cost(merge_bytes=float(self.merge_bytes * self.runs))


def planned_passes(
    evaluator: Evaluator, population: Population, batched_task: BatchedTask, reader: PassReader
) -> list[PlannedPass]:
    """The passes that evaluate one chunk of a population on a task's batches, on one group of devices."""
    return [
        *_scoring(evaluator, population, batched_task, reader),
        *_generating(evaluator, population, batched_task, reader),
    ]


def planned_gradient_passes(
    evaluator: Evaluator, population: MergePopulation, batched_task: BatchedTask, reader: PassReader
) -> list[PlannedPass]:
    """The passes that differentiate one chunk of a population on a task's batches, on one group of devices."""
    return list(_differentiating(evaluator, population, batched_task, reader))


def merge_bytes(bank: Bank, dtype: str) -> int:
    """Bytes that merging all layers and the head into `dtype` moves for a candidate: sources and their prepared arrays
    are read, the merge is written. (Products that read it again count that themselves.)"""
    leaves = [leaf for stack in bank.stacks.values() for leaf in stack.values()]
    head = replace(bank.shared[HEAD if HEAD in bank.shared else EMBEDDING], factors=None)
    # A leaf of a stack has the sources behind its layers.
    entries = sum(leaf.sources.size // leaf.sources.shape[1] for leaf in leaves)
    entries += head.sources.size // head.sources.shape[0]
    read = [replace(leaf, statistics={}) for leaf in (*leaves, head)]
    return tree_nbytes(read) + entries * jnp.dtype(dtype).itemsize


@dataclass(frozen=True)
class _Source:
    """A chunk of candidates as arguments of a pass: the factory of models, the shared arrays, and the arrays of each;
    the traffic of merging for each of them in every pass; and the bytes of their materialised weights."""

    factory: Any
    replicated: Any
    candidates: Any
    merge_bytes: int = 0
    held_bytes: int = 0

    @property
    def arguments(self) -> tuple[Any, Any]:
        return self.replicated, self.candidates


def _materialised(
    evaluator: Evaluator, population: Population, candidates: Any, task: str, reader: PassReader
) -> tuple[list[PlannedPass], _Source]:
    """The pass that materialises a chunk, if there has to be one, and the chunk after that pass."""
    traced = population.traced_materialise(evaluator.devices.mesh, candidates)
    if traced is None:
        return [], _Source(*population.materialise(evaluator.devices.mesh, candidates))
    models, size = reader.outputs(traced), size_of(candidates)
    moved = tree_nbytes(population.replicated) + tree_nbytes(models) // size
    once = PlannedPass(task, MATERIALISE, traced, size, merge_bytes=moved)
    return [once], _Source(PerCandidateModel(), None, models, held_bytes=tree_nbytes(models))


def _prefix(
    evaluator: Evaluator, source: _Source, shared_prefix: np.ndarray, task: str, reader: PassReader
) -> tuple[list[PlannedPass], KVCache | None]:
    if not shared_prefix.size:
        return [], None
    traced = trace(
        passes.prefill_prefix,
        evaluator.config,
        source.factory,
        evaluator.devices.mesh,
        *source.arguments,
        shared_prefix,
    )
    size = size_of(source.candidates)
    read = PlannedPass(task, PREFIX, traced, size, 1, 1, source.merge_bytes, source.held_bytes)
    return [read], reader.outputs(traced)


def _scoring(
    evaluator: Evaluator, population: Population, batched_task: BatchedTask, reader: PassReader
) -> Iterator[PlannedPass]:
    scoring, task = batched_task.scoring, batched_task.task.name
    if scoring is None:
        return
    mesh, chunk = evaluator.devices.mesh, evaluator.scoring_chunk(population, batched_task)
    _, chunk_candidates = next(population.chunks(chunk * evaluator.devices.population))
    candidates = reader.place(chunk_candidates)
    if evaluator.fits_materialised(population, batched_task, chunk):
        once, source = _materialised(evaluator, population, candidates, task, reader)
        yield from once
    else:
        # Candidates that are not in memory as a whole are merged inside the pass.
        merged = population.model_shape() is not None
        moved = merge_bytes(population.replicated, evaluator.compute_dtype) if merged else 0
        source = _Source(*population.source, candidates, moved)
    read, prefix = _prefix(evaluator, source, scoring.shared_prefix, task, reader)
    yield from read
    held = source.held_bytes + tree_nbytes(prefix)
    for batch, runs in _distinct(scoring.batches, lambda batch: str(batch.compiled_shapes)):
        traced = trace(
            passes.score,
            evaluator.config, source.factory, mesh, batched_task.requests.logits_fn, *source.arguments, prefix,
            arrays_of(batch),
        )  # fmt: skip
        yield PlannedPass(task, SCORE, traced, size_of(candidates), runs, 1, source.merge_bytes, held)


def _differentiating(
    evaluator: Evaluator, population: MergePopulation, batched_task: BatchedTask, reader: PassReader
) -> Iterator[PlannedPass]:
    scoring, task, mesh = batched_task.scoring, batched_task.task.name, evaluator.devices.mesh
    assert scoring is not None
    if batched_task.task.derivative == "nonlinear":
        # The weight of each total depends on all of them.
        yield from _scoring(evaluator, population, batched_task, reader)
    differentiable = population.differentiable()
    chunk = evaluator.gradient_chunk(differentiable, batched_task) * evaluator.devices.population
    _, chunk_recipes = next(population.chunks(chunk))
    recipes, size = reader.place(chunk_recipes), size_of(chunk_recipes)
    materialised = evaluator.materialises_gradient(differentiable, batched_task, size)
    if materialised:
        once, source = _materialised(evaluator, population, recipes, task, reader)
        yield from once
        if population.factory.spec.export_dtype != evaluator.compute_dtype:
            traced = trace(passes.to_dtype, source.candidates, evaluator.compute_dtype)
            yield PlannedPass(task, CAST, traced, size, held_bytes=source.held_bytes)
            models = reader.outputs(traced)
            source = _Source(PerCandidateModel(), None, models, held_bytes=tree_nbytes(models))
    else:
        # Merged, and merged again by the derivative, which then reads the sources once more.
        moved = 3 * merge_bytes(population.replicated, evaluator.compute_dtype)
        source = _Source(differentiable.factory, population.replicated, recipes, moved)
    read, prefix = _prefix(evaluator, source, scoring.shared_prefix, task, reader)
    yield from read
    held, gradient = source.held_bytes + tree_nbytes(prefix), None
    for batch, runs in _distinct(scoring.batches, lambda batch: str(batch.compiled_shapes)):
        weights = reader.place(np.zeros((size, len(batch.rows)), np.float32))
        traced = trace(
            passes.score_gradient,
            evaluator.config, source.factory, mesh, batched_task.requests.logits_fn, *source.arguments, prefix,
            arrays_of(batch), weights,
        )  # fmt: skip
        _, gradient = reader.outputs(traced)
        # The sum of the earlier batches' gradients is held beside this one.
        total = tree_nbytes(gradient) if len(scoring.batches) > 1 else 0
        yield PlannedPass(task, GRADIENT, traced, size, runs, 1, source.merge_bytes, held + total)
    assert gradient is not None
    with_gradient = held + tree_nbytes(gradient)
    of_candidates, cotangents = gradient
    if prefix is not None:
        traced = trace(
            passes.prefix_gradient,
            evaluator.config,
            source.factory,
            mesh,
            *source.arguments,
            scoring.shared_prefix,
            cotangents,
        )
        yield PlannedPass(task, PREFIX_GRADIENT, traced, size, 1, 1, source.merge_bytes, with_gradient)
    if materialised:
        traced = trace(
            passes.recipe_gradient, differentiable.factory, mesh, population.replicated, recipes, of_candidates
        )
        # Each layer is merged again, and its derivative reads its sources and the merge's cotangents.
        moved = 2 * (tree_nbytes(population.replicated) + tree_nbytes(of_candidates) // size)
        yield PlannedPass(task, RECIPE_GRADIENT, traced, size, 1, 1, moved, with_gradient)


def _generating(
    evaluator: Evaluator, population: Population, batched_task: BatchedTask, reader: PassReader
) -> Iterator[PlannedPass]:
    prompts, requests, task = batched_task.prompts, batched_task.requests, batched_task.task.name
    if prompts is None:
        return
    config, mesh, stop, new = evaluator.config, evaluator.devices.mesh, batched_task.stop, requests.max_new_tokens
    chunk = evaluator.generation_chunk(population, batched_task) * evaluator.devices.population
    _, chunk_candidates = next(population.chunks(chunk))
    candidates = reader.place(chunk_candidates)
    once, source = _materialised(evaluator, population, candidates, task, reader)
    yield from once
    read, prefix = _prefix(evaluator, source, prompts.shared_prefix, task, reader)
    yield from read
    decoding, held, size = source, source.held_bytes + tree_nbytes(prefix), size_of(candidates)
    if evaluator.unstacks_layers(source.arguments):
        unstacked = jax.eval_shape(partial(source.factory.unstack, mesh), *source.arguments)
        decoding, held = _Source(source.factory, *unstacked), held + tree_nbytes(unstacked)
    check = STOP_CHECK_INTERVAL if requests.stop else new
    for batch, runs in _distinct(prompts.batches, lambda batch: str(batch.compiled_shapes)):
        (rows, width), tokens = batch.tokens.shape, step_tokens(evaluator.target, batch)
        traced = trace(
            passes.init_decode,
            config,
            evaluator.compute_dtype,
            mesh,
            reader.place(np.zeros(size)),
            rows,
            width,
            new,
            tokens,
        )
        state = reader.outputs(traced)
        with_state = held + tree_nbytes(state)
        for group, times in _distinct(batch.prefill_groups, lambda group: str((group.end - group.begin, group.width))):
            traced = trace(
                passes.prefill,
                config, source.factory, mesh, width, stop, *source.arguments, prefix, state, np.int32(group.begin),
                *batch.prefill_group(group),
            )  # fmt: skip
            yield PlannedPass(task, PREFILL, traced, size, runs * times, held_bytes=with_state)
        lookup_corpus = evaluator.lookup_corpus_of(batched_task)[batch.rows]
        traced = trace(
            passes.decode,
            config, decoding.factory, mesh, check, tokens, row_update(evaluator.target), stop, *decoding.arguments,
            state, prefix, batch.tokens, lookup_corpus,
        )  # fmt: skip
        # The prefill gives the first token; each further one takes a step, unless draft tokens are accepted.
        yield PlannedPass(task, DECODE, traced, size, runs, max(1, new - 1), held_bytes=with_state)


def _distinct(items: Any, shape: Callable[[Any], str]) -> list[tuple[Any, int]]:
    """The first item of each shape, and the number of items with that shape."""
    counts = Counter(map(shape, items))
    first: dict[str, Any] = {}
    for item in items:
        first.setdefault(shape(item), item)
    return [(first[key], count) for key, count in counts.items()]


@dataclass(frozen=True)
class Report:
    """A target compiler's report on a pass. temporary_bytes: on a device, beside its arguments, its results included;
    collectives: by kind their number, and the bytes of their results together."""

    temporary_bytes: int
    collectives: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class SizedPass:
    """A planned pass, and the bytes that it needs on a device: held for it, as the device's share of its group's;
    beside its arguments, its results included, as estimated; and its compiler's report (None: it was not asked, or
    refuses the pass however small it is)."""

    planned: PlannedPass
    held_bytes: int
    temporary_bytes: int
    report: Report | None

    @property
    def needed_bytes(self) -> int:
        """Bytes on a device, beside the bank."""
        return self.held_bytes + (self.temporary_bytes if self.report is None else self.report.temporary_bytes)


@dataclass
class DeviceSizes:
    """Bytes of the loaded models on a device, and of the largest leaf, which is on the host as a whole while it is
    loaded. Its `place` makes abstract arrays, and counts every leaf."""

    model: int
    bank: int = 0
    largest_leaf: int = 0
    by_dtype: Counter[str] = field(default_factory=Counter)

    def place(self, shape: tuple[int, ...], dtype: Any, sharded_axis: int | None = None) -> jax.ShapeDtypeStruct:
        leaf = anywhere(shape, dtype)
        nbytes = leaf.size * leaf.dtype.itemsize
        device_bytes = nbytes // self.model if is_sharded(shape, sharded_axis, self.model) else nbytes
        self.bank, self.largest_leaf = self.bank + device_bytes, max(self.largest_leaf, nbytes)
        self.by_dtype[str(leaf.dtype)] += device_bytes
        return leaf
