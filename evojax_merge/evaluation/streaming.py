"""Evaluation with a bank that is not on the devices: its layers come one after the other, each once for everybody.

A generation is scored layer by layer. A layer's sources are brought to the devices while the layer before computes, all
candidates are merged there and all batches go through, and their hidden states wait for the next layer. So the bank
moves once per generation, whatever the population. A candidate that generates is materialised layer by layer; the
devices then hold it, its caches and one layer of sources.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from evojax_merge.evaluation import layer_passes, passes
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.devices import AnyMesh, Devices, on_host, pad_chunk, size_of, tree_nbytes
from evojax_merge.evaluation.evaluator import (
    DecoderEvaluator,
    MergeEvaluator,
    Progress,
    enter,
    score_metric,
    slopes_of,
)
from evojax_merge.evaluation.passes import DifferentiableFactory, LazyMergeFactory, PerCandidateModel
from evojax_merge.evaluation.populations import Population, Source, Sourcing
from evojax_merge.evaluation.programs import (
    EMBED,
    EMBED_GRADIENT,
    HEAD,
    HEAD_GRADIENT,
    LAYER,
    LAYER_GRADIENT,
    MATERIALISE,
    MERGE,
    PREFIX,
    PREFIX_GRADIENT,
    RECIPE_GRADIENT,
    SUM,
    Each,
    Evaluation,
    Job,
    Program,
    execute,
)
from evojax_merge.evaluation.scores import PLAIN, Goal, TaskScores, task_weights
from evojax_merge.models.architecture import LAYERS
from evojax_merge.models.bank import LeafBank, Recipe
from evojax_merge.models.layers import KeyValue
from evojax_merge.models.sources import StackedWeights
from evojax_merge.models.streamed_bank import StreamedBank, abstract_streamed
from evojax_merge.tasks.batches import ScoringBatch
from evojax_merge.tasks.task import Responses

Leaves = dict[str, LeafBank]
# The share of the free memory that waiting hidden states may take on a device; beyond it they wait on the host.
WAITING_FRACTION = 1 / 4


def _end_part(ends: Leaves, recipes: Recipe) -> "Part":
    return ends, recipes.shared


def _layer_part(number: int, leaves: Leaves, recipes: Recipe) -> "Part":
    """A layer's leaves, and the recipes' parameters for it, `[P, 1, …]` of `[P, L, …]`."""
    return leaves, jax.tree.map(lambda values: values[:, number : number + 1], recipes.stacks[LAYERS])


# A part of the model, brought to the devices for a chunk of candidates: what all of them share, and what each has. A
# pass merges the candidates' weights of the two.
Part = tuple[Leaves, Any]
# (a chunk of candidates, by its arrays) -> its part. Chunks come one after the other, in their order.
Bring = Callable[[Any], Part]


@dataclass(frozen=True)
class StreamedPopulation(Population, ABC):
    """P candidates whose parts come to the devices one after the other."""

    factory: Any

    @property
    @abstractmethod
    def depth(self) -> int:
        """L."""
        ...

    @property
    @abstractmethod
    def layer_bytes(self) -> int:
        """Bytes of what comes to the devices for a layer."""
        ...

    @abstractmethod
    def parts(self, chunks: Sequence[Any]) -> Iterator[Bring]:
        """The leaves that embed tokens, each of the layers, and the leaves behind them, for all chunks of candidates;
        the next part is loaded meanwhile."""
        ...

    @abstractmethod
    def ends(self, candidates: Any) -> Iterator[Part]:
        """The leaves outside of the layers for one chunk, one by one."""
        ...

    @abstractmethod
    def layers(self, candidates: Any) -> Iterator[Part]:
        """The layers for one chunk."""
        ...

    def planned_scoring(self, evaluator: DecoderEvaluator, batched_task: BatchedTask) -> Evaluation:
        chunk = scoring_chunk(evaluator, self)
        answers = [batched_task.requests.unanswered(chunk)]
        return scoring(evaluator, self.first(chunk), [batched_task], chunk, answers, lambda done: None, self.size)

    def materialise(self, mesh: AnyMesh, candidates: Any) -> Sourcing:
        size = size_of(candidates)
        spec = layer_passes.StackSpec(self.factory, mesh, self.depth)
        shared: dict[str, Any] = {}
        for part in self.ends(candidates):
            shared |= yield Program(MATERIALISE, layer_passes.materialise_ends, (spec, *part), size)
            del part
        stacks: Any = None
        for number, (leaves, each) in enumerate(self.layers(candidates)):
            moved = partial(_written_bytes, (leaves, each), self.depth * size)
            arguments: tuple[Any, ...] = (spec, (leaves, np.int32(number)), each, stacks)
            stacks = yield Program(
                MATERIALISE, layer_passes.materialise_layer, arguments, size, holds=shared, merge_bytes=moved
            )
            jax.block_until_ready(stacks)
            del leaves, each, arguments, moved
        models = StackedWeights({LAYERS: stacks}, shared, self.factory.compute_dtype)
        return Source(PerCandidateModel(), None, models, models)


@dataclass(frozen=True)
class StreamedMergePopulation(StreamedPopulation):
    """P merges of a streamed bank, each described by its recipe."""

    factory: LazyMergeFactory
    replicated: StreamedBank

    @property
    def depth(self) -> int:
        return self.replicated.depth

    @property
    def layer_bytes(self) -> int:
        return self.replicated.layer_bytes

    def parts(self, chunks: Sequence[Recipe]) -> Iterator[Bring]:
        bank = self.replicated
        ends = bank.before_layers()
        yield partial(_end_part, ends)
        ends = bank.meanwhile(ends)
        for number, leaves in bank.layers(range(bank.depth)):
            yield partial(_layer_part, number, leaves)
            del leaves
        yield partial(_end_part, bank.behind_layers(ends))

    def ends(self, candidates: Recipe) -> Iterator[Part]:
        for name in self.replicated.shapes.shared:
            yield self.replicated.load_ends([name]), {name: candidates.shared[name]}

    def layers(self, candidates: Recipe) -> Iterator[Part]:
        for number, leaves in self.replicated.layers(range(self.depth)):
            yield _layer_part(number, leaves, candidates)
            del leaves

    def abstract(self, devices: Devices) -> "StreamedMergePopulation":
        return replace(self, replicated=abstract_streamed(self.replicated.shapes))

    def differentiable(self) -> "StreamedMergePopulation":
        spec, dtype = self.factory.spec, self.factory.compute_dtype
        return replace(self, factory=DifferentiableFactory(spec, dtype))

    def planned_gradient(self, evaluator: DecoderEvaluator, batched_task: BatchedTask) -> Evaluation:
        """Differentiate a task's rows for one chunk of candidates, without entering the results anywhere."""
        chunk = scoring_chunk(evaluator, self)
        first, answers = self.first(chunk), batched_task.requests.unanswered(chunk)
        gradient = jax.tree.map(np.zeros_like, first.candidates)
        return differentiating(
            evaluator, first, [batched_task], chunk, [answers.totals], [answers], gradient, lambda done: None, self.size
        )

    def model_shape(self) -> Any:
        _, candidate = next(self.chunks(1))
        spec = passes.MaterialiseSpec(self.factory, None)
        return jax.eval_shape(partial(passes.materialise, spec), self.replicated.shapes, candidate)


def _written_bytes(part: Part, parts: int, stacks: Any) -> int:
    return tree_nbytes(part) + tree_nbytes(stacks) // parts


@dataclass
class Waiting:
    """A chunk of candidates between two layers. rows: their numbers; candidates: their arrays; prefixes: by task the
    hidden states of the prefix, None without one; batches: by task those of each batch."""

    rows: np.ndarray
    candidates: Any
    prefixes: list[Any] = field(default_factory=list)
    batches: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Room:
    """The place where hidden states wait: on the devices, or on the host. held: all that waits on a device, as an
    abstract array."""

    on_host: bool
    held: jax.ShapeDtypeStruct | None

    def keep(self, states: Any) -> Any:
        # Abstract arrays of a plan are nowhere.
        return on_host(states) if self.on_host and isinstance(states, jax.Array) else states


@dataclass(frozen=True)
class Inputs:
    """The arrays of a task's prefix (None: there is none) and of each of its batches, as arguments of passes."""

    prefix: dict[str, Any] | None
    batches: list[dict[str, Any]]


def inputs_of(evaluator: DecoderEvaluator, batched_task: BatchedTask) -> Inputs:
    if batched_task.scoring is None:
        return Inputs(None, [])
    scoring, prefix = batched_task.scoring, None
    tokens = scoring.shared_prefix[None]
    if tokens.size:
        prefix = dict[str, Any](tokens=tokens, positions=np.arange(tokens.size, dtype=np.int32)[None])
        prefix["segment_ids"] = np.zeros_like(prefix["positions"])
        images = evaluator.images_of(batched_task).of_prefix(scoring.shared_prefix)
        prefix |= {} if images is None else {"images": images}
    return Inputs(prefix, [evaluator.batch_arrays(batched_task, batch) for batch in scoring.batches])


def _waiting(evaluator: DecoderEvaluator, inputs: Sequence[Inputs], size: int) -> Room:
    """The place of the hidden states of `size` candidates between two layers."""
    tokens = sum(arrays["tokens"].size for task in inputs for arrays in task.batches)
    width = evaluator.config.hidden * np.dtype(evaluator.compute_dtype).itemsize
    nbytes = tokens * width * -(-size // evaluator.devices.population)
    if nbytes > WAITING_FRACTION * evaluator.free_memory():
        return Room(True, None)
    return Room(False, jax.ShapeDtypeStruct((nbytes,), np.uint8))


_LAYOUT = ("tokens", "positions", "segment_ids", "images")


def _layout(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays that layers need: those of the targets are the head's alone."""
    return {name: arrays[name] for name in _LAYOUT if name in arrays}


def scoring_chunk(evaluator: DecoderEvaluator, population: Population) -> int:
    """The number of candidates that share a pass: one for each group of devices, for a batch keeps these busy, unless
    the config says otherwise."""
    return min(evaluator.chunk or 1, population.size) * evaluator.devices.population


def scoring(
    evaluator: DecoderEvaluator, population: StreamedPopulation, batched_tasks: Sequence[BatchedTask], chunk: int,
    answers: Sequence[Responses], progress: Progress, size: int,
) -> Evaluation:  # fmt: skip
    """Score the rows of all tasks, `chunk` candidates together, in one run through the bank; enters the results in
    `answers`. size: the number of candidates whose hidden states wait meanwhile."""
    mesh, config = evaluator.devices.mesh, evaluator.config
    spec = passes.PassSpec(config, population.factory, mesh)
    inputs = [inputs_of(evaluator, batched_task) for batched_task in batched_tasks]
    waiting = [Waiting(rows, candidates) for rows, candidates in population.chunks(chunk)]
    waits = _waiting(evaluator, inputs, size)
    parts = population.parts([one.candidates for one in waiting])

    def each(job: Callable[[Part, Waiting], Job]) -> Each:
        """A job for each chunk and its part of the next of `parts`, which is gone when the jobs are."""
        bring = next(parts)
        return Each((job(bring(one.candidates), one) for one in waiting), _block, _no_part)

    yield each(partial(_embedding, spec, inputs, waits))
    counted = _LayerProgress(progress, population.depth, sum(len(t.batches) for t in inputs) * population.size)
    for number in range(population.depth):
        yield each(partial(_through_layer, spec, number, inputs, waits))
        counted.layer_done()

    def answering(part: Part, one: Waiting) -> Job:
        ends, candidates = part
        for i, (task, batched_task) in enumerate(zip(inputs, batched_tasks, strict=True)):
            head = passes.ScoreSpec(config, population.factory, mesh, batched_task.requests.logits_fn)
            batches = () if batched_task.scoring is None else batched_task.scoring.batches
            for batch, arrays, states in zip(batches, task.batches, one.batches[i], strict=True):
                read = partial(_enter, answers[i], one.rows, batch)
                yield Program(HEAD, layer_passes.answer, (head, (ends, arrays), (candidates, states)), chunk, read=read)

    yield each(answering)


def _block(result: Any) -> None:
    """Wait for a job: no more than two of them have arrays of their own, and the next layer is on its way meanwhile."""
    jax.block_until_ready(result)


def _no_part(result: Any) -> None:
    """Keep nothing of a job, as `Each.keep`: all jobs end before others begin, which find their results in place."""


def _enter(answers: Responses, rows: np.ndarray, batch: ScoringBatch, results: Any) -> None:
    """Enter the answers of a batch, the first two of a program's results."""
    enter(answers, rows, batch, *results[:2])


def _embedding(spec: passes.PassSpec, inputs: Sequence[Inputs], waits: Room, part: Part, one: Waiting) -> Job:
    """Embed the tokens of a chunk's prefixes and batches."""
    ends, candidates = part

    def embed(arrays: dict[str, Any]) -> Program:
        arguments = (spec, (ends, _layout(arrays)), candidates)
        return Program(EMBED, layer_passes.embed, arguments, size_of(one.candidates))

    for task in inputs:
        one.prefixes.append(None if task.prefix is None else (yield embed(task.prefix)))
        one.batches.append([])
        for arrays in task.batches:
            one.batches[-1].append(waits.keep((yield embed(arrays))))
    return one.batches


def _through_layer(
    spec: passes.PassSpec, number: int, inputs: Sequence[Inputs], waits: Room, part: Part, one: Waiting
) -> Job:
    """Merge a layer for a chunk of candidates, and take their prefixes and batches through it."""
    size, index = size_of(one.candidates), np.int32(number)
    weights = yield _merge(spec, part, size)
    del part
    for i, task in enumerate(inputs):
        kv: KeyValue | None = None
        if task.prefix is not None:
            shared = (index, _layout(task.prefix))
            arguments: tuple[Any, ...] = (spec, shared, (weights, None), one.prefixes[i])
            one.prefixes[i], kv = yield Program(PREFIX, layer_passes.run_keeping, arguments, size, holds=weights)
        for b, arrays in enumerate(task.batches):
            arguments = (spec, (index, _layout(arrays)), (weights, kv), one.batches[i][b])
            one.batches[i][b] = waits.keep(
                (yield Program(LAYER, layer_passes.run, arguments, size, holds=(weights, waits.held)))
            )
    return one.batches


def _merge(spec: passes.PassSpec, part: Part, size: int) -> Program:
    """The program that merges a layer for a chunk of candidates."""
    merging = passes.MaterialiseSpec(spec.factory, spec.mesh)
    moved = partial(_merged_bytes, tree_nbytes(part[0]), size)
    return Program(MERGE, layer_passes.merge_layer, (merging, *part), size, merge_bytes=moved)


def _merged_bytes(sources: int, size: int, weights: Any) -> int:
    return sources + tree_nbytes(weights) // size


@dataclass
class Trail:
    """A chunk of candidates on the way through the layers and back. rows, parameters: as of `Waiting`; before: the
    states that wait before each layer, the last behind all; behind: while layers come back, the derivatives with
    respect to the states behind the one that comes, by task those of the prefix and of each batch; ends: the derivative
    with respect to the recipes of the leaves outside of the layers."""

    rows: np.ndarray
    parameters: Recipe
    before: list[Waiting] = field(default_factory=list)
    behind: list[tuple[Any, list[Any]]] = field(default_factory=list)
    ends: Any = None


def differentiating(
    evaluator: DecoderEvaluator, population: StreamedMergePopulation, batched_tasks: Sequence[BatchedTask], chunk: int,
    weights: Sequence[np.ndarray], answers: Sequence[Responses], gradient: Recipe, progress: Progress, size: int,
) -> Evaluation:  # fmt: skip
    """Differentiate the sum of each task's totals times its `weights: float32[P, S]` with respect to the recipes, in
    two runs through the bank: the states before each layer are kept, and the layers come back in reverse. Enters the
    results in `gradient`, float32, and the answers in `answers`."""
    bank, mesh, config = population.replicated, evaluator.devices.mesh, evaluator.config
    spec = passes.PassSpec(config, population.factory, mesh)
    inputs = [inputs_of(evaluator, batched_task) for batched_task in batched_tasks]
    trails = [Trail(rows, recipes, [Waiting(rows, recipes)]) for rows, recipes in population.chunks(chunk)]
    waits = _waiting(evaluator, inputs, size * (bank.depth + 1))

    ends = bank.before_layers()
    yield Each(
        (_embedding(spec, inputs, waits, (ends, trail.parameters.shared), trail.before[0]) for trail in trails), _block,
        _no_part,
    )  # fmt: skip
    ends = bank.meanwhile(ends)
    counted = _LayerProgress(progress, 2 * bank.depth, sum(len(task.batches) for task in inputs) * population.size)
    for number, leaves in bank.layers(range(bank.depth)):
        layer = partial(_onwards, spec, number, leaves, inputs, waits)
        yield Each(map(layer, trails), _block, _no_part)
        counted.layer_done()
        del leaves, layer

    ends = bank.behind_layers(ends)

    def answering(trail: Trail) -> Job:
        last = trail.before.pop()
        for i, (task, batched_task) in enumerate(zip(inputs, batched_tasks, strict=True)):
            head = passes.ScoreSpec(config, population.factory, mesh, batched_task.requests.logits_fn)
            batches = () if batched_task.scoring is None else batched_task.scoring.batches
            cotangents = []
            for batch, arrays, states in zip(batches, task.batches, last.batches[i], strict=True):
                padded = pad_chunk(weights[i], trail.rows, chunk)
                real = np.where(batch.rows >= 0, padded[:, batch.rows], 0).astype(np.float32)
                arguments = (head, (ends, arrays), (trail.parameters.shared, states, real))
                read = partial(_enter, answers[i], trail.rows, batch)
                _, _, slope, cotangent = yield Program(
                    HEAD_GRADIENT, layer_passes.answer_gradient, arguments, chunk, read=read
                )
                trail.ends = yield from _sum(trail.ends, slope, chunk)
                cotangents.append(waits.keep(cotangent))
            # Nothing depends on the prefix's states behind the last layer.
            trail.behind.append((jax.tree.map(_zeros, last.prefixes[i]), cotangents))

    yield Each(map(answering, trails), _block, _no_part)
    ends = {}
    for number, leaves in bank.layers(range(bank.depth)[::-1]):
        layer = partial(_back, spec, number, leaves, inputs, waits, gradient)
        yield Each(map(layer, trails), _block, _no_part)
        counted.layer_done()
        del leaves, layer

    ends = bank.before_layers()

    def finishing(trail: Trail) -> Job:
        for task, (prefix, cotangents) in zip(inputs, trail.behind, strict=True):
            pairs = [
                *zip(task.batches, cotangents, strict=True),
                *([] if task.prefix is None else [(task.prefix, prefix)]),
            ]
            for arrays, cotangent in pairs:
                arguments = (spec, (ends, _layout(arrays)), (trail.parameters.shared, cotangent))
                slope = yield Program(EMBED_GRADIENT, layer_passes.embed_gradient, arguments, chunk)
                trail.ends = yield from _sum(trail.ends, slope, chunk)
        _add_rows(gradient.shared, trail.rows, trail.ends)

    yield Each(map(finishing, trails), _block, _no_part)


def _onwards(
    spec: passes.PassSpec, number: int, leaves: Leaves, inputs: Sequence[Inputs], waits: Room, trail: Trail
) -> Job:
    """Take a chunk through a layer, and leave the states before it as they are."""
    size = size_of(trail.parameters)
    weights = yield _merge(spec, _layer_part(number, leaves, trail.parameters), size)
    before, index, states = trail.before[-1], np.int32(number), Waiting(trail.rows, trail.parameters)
    for i, task in enumerate(inputs):
        kv: KeyValue | None = None
        prefix = None
        if task.prefix is not None:
            arguments: tuple[Any, ...] = (spec, (index, _layout(task.prefix)), (weights, None), before.prefixes[i])
            prefix, kv = yield Program(PREFIX, layer_passes.run_keeping, arguments, size, holds=weights)
        states.prefixes.append(prefix)
        states.batches.append([])
        for arrays, x in zip(task.batches, before.batches[i], strict=True):
            arguments = (spec, (index, _layout(arrays)), (weights, kv), x)
            x, _ = yield Program(LAYER, layer_passes.run_keeping, arguments, size, holds=(weights, waits.held))
            states.batches[-1].append(waits.keep(x))
    trail.before.append(states)
    return states.batches


def _back(
    spec: passes.PassSpec, number: int, leaves: Leaves, inputs: Sequence[Inputs], waits: Room, gradient: Recipe,
    trail: Trail,
) -> Job:  # fmt: skip
    """Take a chunk's derivatives back through a layer, and enter that with respect to its parameters."""
    size = size_of(trail.parameters)
    weights = yield _merge(spec, _layer_part(number, leaves, trail.parameters), size)
    before, index, slope = trail.before.pop(), np.int32(number), None
    for i, task in enumerate(inputs):
        kv: KeyValue | None = None
        kept: KeyValue | None = None
        if task.prefix is not None:
            arguments: tuple[Any, ...] = (spec, (index, _layout(task.prefix)), (weights, None), before.prefixes[i])
            _, kv = yield Program(PREFIX, layer_passes.run_keeping, arguments, size, holds=weights)
        through, cotangents = trail.behind[i]
        for b, arrays in enumerate(task.batches):
            each = ((weights, kv), before.batches[i][b], (cotangents[b], None))
            arguments = (spec, (index, _layout(arrays)), each)
            part, x, of_prefix = yield Program(
                LAYER_GRADIENT, layer_passes.run_gradient, arguments, size, holds=(weights, slope, waits.held)
            )
            cotangents[b] = waits.keep(x)
            slope = yield from _sum(slope, part, size)
            kept = yield from _sum(kept, of_prefix, size)
        if task.prefix is not None:
            arguments = (spec, (index, _layout(task.prefix)), ((weights, None), before.prefixes[i], (through, kept)))
            part, through, _ = yield Program(PREFIX_GRADIENT, layer_passes.run_gradient, arguments, size, holds=weights)
            slope = yield from _sum(slope, part, size)
            trail.behind[i] = (through, cotangents)
    merging = passes.MaterialiseSpec(spec.factory, spec.mesh)
    arguments = (merging, leaves, (_layer_part(number, leaves, trail.parameters)[1], slope))
    moved = partial(_merged_bytes, tree_nbytes(leaves), size)
    part = yield Program(RECIPE_GRADIENT, layer_passes.merge_gradient, arguments, size, merge_bytes=moved)
    places = {name: values[:, number : number + 1] for name, values in gradient.stacks[LAYERS].items()}
    _add_rows(places, trail.rows, part)


def _sum(total: Any, part: Any, size: int) -> Job:
    """The sum of two pytrees; None is nothing."""
    if total is None:
        return part
    return (yield Program(SUM, passes.add, (total, part), size, is_priced=False))


def _zeros(array: Any) -> Any:
    """Zeros like an array; abstract ones in a plan."""
    is_planned = isinstance(array, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(array.shape, array.dtype) if is_planned else np.zeros(array.shape, array.dtype)


def _add_rows(into: Any, rows: np.ndarray, parts: Any) -> None:
    """Add the results of the candidates `rows`, [>= len(rows), …], to arrays of all candidates."""
    for leaf, part in zip(jax.tree.leaves(into), jax.tree.leaves(parts), strict=True):
        if not isinstance(part, jax.ShapeDtypeStruct):
            leaf[rows] += on_host(part)[: len(rows)]


@dataclass
class _LayerProgress:
    """Reports the steps of an evaluation as its layers are done."""

    progress: Progress
    depth: int
    steps: int
    layers: int = 0

    def layer_done(self) -> None:
        before = self.steps * self.layers // self.depth
        self.layers += 1
        self.progress(self.steps * self.layers // self.depth - before)


@dataclass(frozen=True)
class StreamedEvaluator(MergeEvaluator):
    """Scores populations of merges of a streamed bank, on the requests of an evaluator."""

    bank: StreamedBank

    def evaluate(self, recipes: Recipe, progress: Progress = lambda done: None) -> TaskScores:
        return evaluate(self.evaluator, self.population(recipes), progress)

    def population(self, recipes: Recipe) -> StreamedMergePopulation:
        factory = LazyMergeFactory(self.spec, self.evaluator.compute_dtype)
        return StreamedMergePopulation(factory, self.bank, jax.tree.map(np.asarray, recipes))

    def value_and_gradient(
        self, recipes: Recipe, progress: Progress = lambda done: None, goal: Goal = PLAIN
    ) -> tuple[TaskScores, Recipe]:
        """Scores of the metrics that count, and the derivative of each candidate's fitness with respect to its
        recipe, float32."""
        population = self.population(recipes)
        counted = task_weights(self.tasks, goal)
        numbers = [self.tasks.index(task) for task, _ in counted]
        alone = replace(self, evaluator=replace(
            self.evaluator, batched_tasks=[self.evaluator.batched_tasks[i] for i in numbers]
        ))  # fmt: skip
        run = partial(alone._differentiate, population, [weight for _, weight in counted])
        return alone.evaluator.retry_together(run, progress)

    def _differentiate(
        self, population: StreamedMergePopulation, weights: Sequence[float], progress: Progress
    ) -> tuple[TaskScores, Recipe]:
        evaluator, tasks = self.evaluator, self.evaluator.batched_tasks
        answers = [batched_task.requests.unanswered(population.size) for batched_task in tasks]
        if any(task.derivative == "nonlinear" for task in evaluator.tasks):
            # The weight of a total depends on the others, which may be in other batches.
            answers = score_rows(evaluator, population, lambda done: None)
        slopes = list(map(slopes_of, evaluator.tasks, answers, weights))
        gradient: Recipe = jax.tree.map(np.zeros_like, population.candidates)
        chunk = scoring_chunk(evaluator, population)
        factory = DifferentiableFactory(self.spec, evaluator.compute_dtype)
        work = differentiating(
            evaluator, replace(population, factory=factory), tasks, chunk, slopes, answers, gradient, progress,
            population.size,
        )  # fmt: skip
        execute(work, evaluator.runs_two_jobs(2 * self.bank.layer_bytes))
        matrices = map(score_metric, evaluator.tasks, answers)
        return TaskScores(dict(zip((task.name for task in evaluator.tasks), matrices, strict=True))), gradient


def evaluate(evaluator: DecoderEvaluator, population: StreamedPopulation, progress: Progress) -> TaskScores:
    """Score a streamed population on all tasks."""
    scored = evaluator.retry_together(partial(score_rows, evaluator, population), progress)
    return evaluator.with_texts(population, scored, progress)


def score_rows(evaluator: DecoderEvaluator, population: StreamedPopulation, progress: Progress) -> list[Responses]:
    """The responses to the rows of all tasks, without texts."""
    answers = [batched_task.requests.unanswered(population.size) for batched_task in evaluator.batched_tasks]
    if any(batched_task.scoring is not None for batched_task in evaluator.batched_tasks):
        chunk = scoring_chunk(evaluator, population)
        work = scoring(evaluator, population, evaluator.batched_tasks, chunk, answers, progress, population.size)
        execute(work, evaluator.runs_two_jobs(population.layer_bytes))
    return answers
