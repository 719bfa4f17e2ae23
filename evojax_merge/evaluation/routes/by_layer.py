"""The route of models whose layers come to the devices one after the other, each once for everybody.

A generation is scored layer by layer. A layer's sources are brought to the devices while the layer before computes, all
candidates are merged there and all batches go through, and their hidden states wait for the next layer. So the bank
moves once per generation, whatever the population. A candidate that generates is materialised layer by layer; the
devices then hold it, its caches and one layer of sources.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from evojax_merge.evaluation import layer_passes, passes, programs
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.devices import on_host, pad_chunk, size_of
from evojax_merge.evaluation.programs import Each, Evaluation, Job, Program, merge_traffic
from evojax_merge.evaluation.responses import enter, score_gradients
from evojax_merge.models.architecture import LAYERS, types_of_layers
from evojax_merge.models.bank import Recipe
from evojax_merge.tasks.batches import ScoringBatch
from evojax_merge.tasks.task import Responses

if TYPE_CHECKING:
    from evojax_merge.evaluation.evaluator import Evaluator, Progress
    from evojax_merge.evaluation.populations import Part, Population, StreamedPopulation

# The share of the free memory that waiting hidden states may take on a device; beyond it they wait on the host.
WAITING_FRACTION = 1 / 4
# The arrays of a batch that layers need: those of the targets are the head's alone.
LAYOUT = ("tokens", "positions", "segment_ids", "images")


@dataclass
class States:
    """The hidden states of a chunk of candidates between two layers, or derivatives with respect to them. prefixes: by
    task those of the prefix, None without one; batches: by task those of each batch."""

    prefixes: list[Any] = field(default_factory=list)
    batches: list[list[Any]] = field(default_factory=list)


@dataclass
class Chunk:
    """A chunk of candidates on the way through the layers. rows: their numbers; candidates: their arrays; states: those
    behind the layers that it has gone through, the last ones alone unless they are kept. behind, slope: the derivatives
    while layers come back, with respect to the states behind the next one, and with respect to the candidates' arrays
    for the leaves outside of the layers."""

    rows: np.ndarray
    candidates: Any
    states: list[States] = field(default_factory=list)
    behind: States = field(default_factory=States)
    slope: Any = None


@dataclass(frozen=True)
class StatesPlacement:
    """The place where hidden states wait: on the devices, or on the host. held: all that waits on a device, as an
    abstract array; host_bytes: what waits on the host, of all groups of devices."""

    held: jax.ShapeDtypeStruct | None
    host_bytes: int = 0

    def keep(self, states: Any) -> Any:
        # Abstract arrays of a plan are nowhere.
        return on_host(states) if self.host_bytes and isinstance(states, jax.Array) else states


@dataclass(frozen=True)
class TaskInputs:
    """A task, and the arrays of its prefix (None: there is none) and of each of its batches, as arguments of passes."""

    task: BatchedTask
    prefix: dict[str, Any] | None
    batches: list[dict[str, Any]]

    @property
    def scoring_batches(self) -> Sequence[ScoringBatch]:
        return () if self.task.scoring is None else self.task.scoring.batches


def inputs_of(evaluator: "Evaluator", batched_task: BatchedTask) -> TaskInputs:
    if batched_task.scoring is None:
        return TaskInputs(batched_task, None, [])
    scoring, prefix = batched_task.scoring, None
    tokens = scoring.shared_prefix[None]
    if tokens.size:
        prefix = dict[str, Any](tokens=tokens, positions=np.arange(tokens.size, dtype=np.int32)[None])
        prefix["segment_ids"] = np.zeros_like(prefix["positions"])
        images = evaluator.images_of(batched_task).of_prefix(scoring.shared_prefix)
        prefix |= {} if images is None else {"images": images}
    batches = [evaluator.batch_arrays(batched_task, batch) for batch in scoring.batches]
    return TaskInputs(batched_task, prefix, batches)


def groups(tasks: Sequence[Any]) -> list[Sequence[Any]]:
    """The tasks that run together: all, so that the layers come once."""
    return [tasks]


def score(
    evaluator: "Evaluator", population: "StreamedPopulation", *tasks: BatchedTask, progress: "Progress"
) -> Evaluation:
    """The responses to the rows of all tasks, without texts, in one run through the layers."""
    responses = [batched_task.requests.unanswered(population.size) for batched_task in tasks]
    if any(batched_task.scoring is not None for batched_task in tasks):
        chunk = scoring_chunk(evaluator, population)
        waits = _states_placement(evaluator, tasks, population.size)
        yield from _scoring(evaluator, population, tasks, chunk, responses, progress, waits)
    return responses


def differentiate(
    evaluator: "Evaluator", population: "StreamedPopulation", weights: Sequence[float], *tasks: BatchedTask,
    progress: "Progress",
) -> Evaluation:  # fmt: skip
    """See `whole.differentiate`; all tasks in two runs through the layers."""
    responses = [batched_task.requests.unanswered(population.size) for batched_task in tasks]
    if any(batched_task.task.derivative == "nonlinear" for batched_task in tasks):
        # The weight of a total depends on the others, which may be in other batches.
        responses = yield from score(evaluator, population, *tasks, progress=lambda done: None)
    row_weights = [
        score_gradients(batched_task.task, answered, weight)
        for batched_task, answered, weight in zip(tasks, responses, weights, strict=True)
    ]
    gradient: Recipe = jax.tree.map(np.zeros_like, population.candidates)
    yield from _differentiating(
        evaluator, population.differentiable(), tasks, scoring_chunk(evaluator, population), row_weights, responses,
        gradient, progress, _kept_states(evaluator, tasks, population),
    )  # fmt: skip
    return responses, gradient


def planned_scoring(evaluator: "Evaluator", population: "StreamedPopulation", batched_task: BatchedTask) -> Evaluation:
    """Score a task's rows for one chunk of candidates, without entering the results anywhere."""
    chunk = scoring_chunk(evaluator, population)
    responses = [batched_task.requests.unanswered(chunk)]
    # A run takes all tasks through the layers together.
    waits = _states_placement(evaluator, evaluator.batched_tasks, population.size)
    return _scoring(evaluator, population.first(chunk), [batched_task], chunk, responses, lambda done: None, waits)


def planned_gradient(evaluator: "Evaluator", population: "StreamedPopulation", batched_task: BatchedTask) -> Evaluation:
    """Differentiate a task's rows for one chunk of candidates, without entering the results anywhere."""
    chunk = scoring_chunk(evaluator, population)
    first, responses = population.differentiable().first(chunk), batched_task.requests.unanswered(chunk)
    gradient = jax.tree.map(np.zeros_like, first.candidates)
    return _differentiating(
        evaluator, first, [batched_task], chunk, [responses.totals], [responses], gradient, lambda done: None,
        _kept_states(evaluator, evaluator.batched_tasks, population),
    )  # fmt: skip


def scoring_chunk(evaluator: "Evaluator", population: "Population") -> int:
    """The number of candidates that share a pass: one for each group of devices, for a batch keeps these busy, unless
    the config says otherwise."""
    return min(evaluator.chunk or 1, population.size) * evaluator.devices.population


def _states_placement(evaluator: "Evaluator", tasks: Sequence[BatchedTask], size: int) -> StatesPlacement:
    """The place of the hidden states of `size` candidates between two layers."""
    tokens = sum(batch.computed for task in tasks if task.scoring is not None for batch in task.scoring.batches)
    width, groups = evaluator.config.hidden * np.dtype(evaluator.compute_dtype).itemsize, evaluator.devices.population
    nbytes = tokens * width * -(-size // groups)
    if nbytes > WAITING_FRACTION * evaluator.free_memory():
        return StatesPlacement(None, nbytes * groups)
    return StatesPlacement(jax.ShapeDtypeStruct((nbytes,), np.uint8))


def _kept_states(
    evaluator: "Evaluator", tasks: Sequence[BatchedTask], population: "StreamedPopulation"
) -> StatesPlacement:
    """The place of the hidden states before every layer, which gradients need."""
    return _states_placement(evaluator, tasks, population.size * (population.parts.depth + 1))


def _layout(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: arrays[name] for name in LAYOUT if name in arrays}


def _side_by_side(threads: bool, jobs: Iterator[Job]) -> Each:
    """Jobs, each waited for: no more than two of them have arrays of their own, and the next layer is on its way
    meanwhile. All end before others begin, which find their results in place."""
    return Each(jobs, jax.block_until_ready, lambda result: None, threads)


def _scoring(
    evaluator: "Evaluator", population: "StreamedPopulation", tasks: Sequence[BatchedTask], chunk: int,
    responses: Sequence[Responses], progress: "Progress", waits: StatesPlacement,
    weights: Sequence[np.ndarray] | None = None,
) -> Evaluation:  # fmt: skip
    """Score the rows of all tasks, `chunk` candidates together, in one run through the bank; enters the results in
    `responses`. waits: where the hidden states of all candidates are meanwhile. weights: of the totals that
    `_differentiating` differentiates, which goes on from the states before each layer, the derivatives of the answers,
    and the returned passes' spec, tasks' inputs, chunks, makers of jobs and reports."""
    spec = passes.PassSpec(evaluator.config, population.factory, evaluator.devices.mesh)
    inputs = [inputs_of(evaluator, batched_task) for batched_task in tasks]
    chunks = [Chunk(rows, candidates) for rows, candidates in population.chunks(chunk)]
    runs, depth = 1 if weights is None else 2, population.parts.depth
    side_by_side = partial(_side_by_side, evaluator.runs_two_jobs(runs * population.parts.layer_bytes))
    parts = population.parts.bring([one.candidates for one in chunks])
    steps = sum(len(task.batches) for task in inputs) * population.size

    def each(job: Callable[["Part", Chunk], Job]) -> Each:
        """A job for each chunk and its part of the next of `parts`, which is gone when the jobs are."""
        bring = next(parts)
        return side_by_side(job(bring(one.candidates), one) for one in chunks)

    def layer_done(number: int) -> None:
        """Report the share of a layer in the steps; `number` counts those of both runs."""
        progress(steps * (number + 1) // (runs * depth) - steps * number // (runs * depth))

    yield each(partial(_embed, spec, inputs, waits))
    for number in range(depth):
        yield each(partial(_forward_layer, spec, number, inputs, waits, weights is not None))
        layer_done(number)
    yield each(partial(_answer, spec, inputs, waits, responses, weights))
    return spec, inputs, chunks, side_by_side, layer_done


def _embed(
    spec: passes.PassSpec, inputs: Sequence[TaskInputs], waits: StatesPlacement, part: "Part", chunk: Chunk
) -> Job:
    """Embed the tokens of a chunk's prefixes and batches."""
    ends, candidates = part

    def embed(arrays: dict[str, Any]) -> Program:
        arguments = (spec, (ends, _layout(arrays)), candidates)
        return Program(programs.EMBED, layer_passes.embed, arguments, size_of(chunk.candidates))

    states = States()
    for task in inputs:
        states.prefixes.append(None if task.prefix is None else (yield embed(task.prefix)))
        states.batches.append([])
        for arrays in task.batches:
            states.batches[-1].append(waits.keep((yield embed(arrays))))
    chunk.states.append(states)
    return states.batches


def _forward_layer(
    spec: passes.PassSpec, number: int, inputs: Sequence[TaskInputs], waits: StatesPlacement, keeps_states: bool,
    part: "Part", chunk: Chunk,
) -> Job:  # fmt: skip
    """Merge a layer for a chunk of candidates, and take their prefixes and batches through it. Unless it `keeps_states`
    before it, those behind it take their place."""
    size, index = size_of(chunk.candidates), np.int32(number)
    before = chunk.states[-1]
    after = before
    if keeps_states:
        after = States(list(before.prefixes), [list(states) for states in before.batches])
    weights = yield _merge(spec, part, size)
    del part
    layer = _layer_spec(spec, number)
    for i, task in enumerate(inputs):
        kv: Any = None
        if task.prefix is not None:
            after.prefixes[i], kv = yield _prefix_layer(layer, index, task.prefix, weights, before.prefixes[i], size)
        for b, arrays in enumerate(task.batches):
            arguments = (layer, (index, _layout(arrays)), (weights, kv), before.batches[i][b])
            run = layer_passes.run_keeping if keeps_states else layer_passes.run
            results = yield Program(
                programs.LAYER, run, arguments, size, holds=(weights, waits.held), host_bytes=waits.host_bytes
            )
            after.batches[i][b] = waits.keep(results[0] if keeps_states else results)
    if keeps_states:
        chunk.states.append(after)
    return after.batches


def _layer_spec(spec: passes.PassSpec, number: int) -> layer_passes.LayerSpec:
    name = types_of_layers(spec.config)[number]
    return layer_passes.LayerSpec(spec.config, spec.factory, spec.mesh, name)


def _prefix_layer(
    spec: layer_passes.LayerSpec, index: np.int32, arrays: dict[str, Any], weights: Any, x: Any, size: int
) -> Program:
    """The program that takes a prefix through a layer: its states behind it, and what the layer keeps."""
    arguments = (spec, (index, _layout(arrays)), (weights, None), x)
    return Program(programs.PREFIX, layer_passes.run_keeping, arguments, size, holds=weights)


def _merge(spec: passes.PassSpec, part: "Part", size: int) -> Program:
    """The program that merges a layer for a chunk of candidates."""
    merging = passes.MaterialiseSpec(spec.factory, spec.mesh)
    moved = merge_traffic(part[0], size)
    return Program(programs.MERGE, layer_passes.merge_layer, (merging, *part), size, merge_bytes=moved)


def _answer(
    spec: passes.PassSpec, inputs: Sequence[TaskInputs], waits: StatesPlacement, responses: Sequence[Responses],
    weights: Sequence[np.ndarray] | None, part: "Part", chunk: Chunk,
) -> Job:  # fmt: skip
    """Answer the tasks' rows from a chunk's states behind the last layer, and differentiate the answers where there are
    `weights`."""
    (ends, candidates), last, size = part, chunk.states.pop(), size_of(chunk.candidates)
    for i, task in enumerate(inputs):
        head = passes.ScoreSpec(spec.config, spec.factory, spec.mesh, task.task.requests.logits_fn)
        cotangents = []
        for batch, arrays, x in zip(task.scoring_batches, task.batches, last.batches[i], strict=True):
            read, shared = partial(enter, responses[i], chunk.rows, batch), (ends, arrays)
            if weights is None:
                yield Program(programs.HEAD, layer_passes.answer, (head, shared, (candidates, x)), size, read=read)
                continue
            padded = pad_chunk(weights[i], chunk.rows, size)
            real = np.where(batch.rows >= 0, padded[:, batch.rows], 0).astype(np.float32)
            _, _, slope, cotangent = yield Program(
                programs.HEAD_GRADIENT, layer_passes.answer_gradient, (head, shared, (candidates, x, real)), size,
                read=read,
            )  # fmt: skip
            chunk.slope = yield from _sum(chunk.slope, slope, size)
            cotangents.append(waits.keep(cotangent))
        if weights is not None:
            # Nothing depends on the prefix's states behind the last layer.
            chunk.behind.prefixes.append(jax.tree.map(_zeros, last.prefixes[i]))
            chunk.behind.batches.append(cotangents)


def _differentiating(
    evaluator: "Evaluator", population: "StreamedPopulation", tasks: Sequence[BatchedTask], chunk: int,
    weights: Sequence[np.ndarray], responses: Sequence[Responses], gradient: Recipe, progress: "Progress",
    waits: StatesPlacement,
) -> Evaluation:  # fmt: skip
    """Differentiate the sum of each task's totals times its `weights: float32[P, S]` with respect to the recipes, in
    two runs through the bank: the states before each layer are kept, and the layers come back in reverse. Enters the
    results in `gradient`, float32, and the responses in `responses`."""
    bank = population.parts.bank
    spec, inputs, chunks, side_by_side, layer_done = yield from _scoring(
        evaluator, population, tasks, chunk, responses, progress, waits, weights
    )
    for number, leaves in bank.layers(range(bank.depth)[::-1]):
        backward = partial(_backward_layer, spec, number, leaves, inputs, waits, gradient)
        yield side_by_side(map(backward, chunks))
        layer_done(2 * bank.depth - 1 - number)
        del leaves, backward
    ends = bank.embedding_leaves()

    def finishing(one: Chunk) -> Job:
        for task, prefix, cotangents in zip(inputs, one.behind.prefixes, one.behind.batches, strict=True):
            pairs = [
                *zip(task.batches, cotangents, strict=True),
                *([] if task.prefix is None else [(task.prefix, prefix)]),
            ]
            for arrays, cotangent in pairs:
                arguments = (spec, (ends, _layout(arrays)), (one.candidates.shared, cotangent))
                slope = yield Program(programs.EMBED_GRADIENT, layer_passes.embed_gradient, arguments, chunk)
                one.slope = yield from _sum(one.slope, slope, chunk)
        _add_rows(gradient.shared, one.rows, one.slope)

    yield side_by_side(map(finishing, chunks))


def layer_part(number: int, leaves: Any, recipes: Recipe) -> "Part":
    """A layer's leaves, and the recipes' parameters for it, `[P, 1, …]` of `[P, L, …]`."""
    return leaves, jax.tree.map(lambda values: values[:, number : number + 1], recipes.stacks[LAYERS])


def _backward_layer(
    spec: passes.PassSpec, number: int, leaves: Any, inputs: Sequence[TaskInputs], waits: StatesPlacement,
    gradient: Recipe, chunk: Chunk,
) -> Job:  # fmt: skip
    """Take a chunk's derivatives back through a layer, and enter that with respect to its parameters."""
    size = size_of(chunk.candidates)
    weights = yield _merge(spec, layer_part(number, leaves, chunk.candidates), size)
    before, index, slope = chunk.states.pop(), np.int32(number), None
    layer = _layer_spec(spec, number)
    for i, task in enumerate(inputs):
        kv: Any = None
        kept: Any = None
        if task.prefix is not None:
            _, kv = yield _prefix_layer(layer, index, task.prefix, weights, before.prefixes[i], size)
        cotangents = chunk.behind.batches[i]
        for b, arrays in enumerate(task.batches):
            each = ((weights, kv), before.batches[i][b], (cotangents[b], None))
            arguments: tuple[Any, ...] = (layer, (index, _layout(arrays)), each)
            part, x, of_prefix = yield Program(
                programs.LAYER_GRADIENT, layer_passes.run_gradient, arguments, size, holds=(weights, slope, waits.held),
                host_bytes=waits.host_bytes,
            )  # fmt: skip
            cotangents[b] = waits.keep(x)
            slope = yield from _sum(slope, part, size)
            kept = yield from _sum(kept, of_prefix, size)
        if task.prefix is not None:
            behind = (chunk.behind.prefixes[i], kept)
            arguments = (layer, (index, _layout(task.prefix)), ((weights, None), before.prefixes[i], behind))
            part, chunk.behind.prefixes[i], _ = yield Program(
                programs.PREFIX_GRADIENT, layer_passes.run_gradient, arguments, size, holds=weights
            )
            slope = yield from _sum(slope, part, size)
    merging = passes.MaterialiseSpec(spec.factory, spec.mesh)
    arguments = (merging, leaves, (layer_part(number, leaves, chunk.candidates)[1], slope))
    moved = merge_traffic(leaves, size)
    part = yield Program(programs.RECIPE_GRADIENT, layer_passes.merge_gradient, arguments, size, merge_bytes=moved)
    places = {name: values[:, number : number + 1] for name, values in gradient.stacks[LAYERS].items()}
    _add_rows(places, chunk.rows, part)


def _sum(total: Any, part: Any, size: int) -> Job:
    """The sum of two pytrees; None is nothing."""
    if total is None:
        return part
    return (yield Program(programs.SUM, passes.add, (total, part), size, is_priced=False))


def _zeros(array: Any) -> Any:
    """Zeros like an array; abstract ones in a plan."""
    is_planned = isinstance(array, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(array.shape, array.dtype) if is_planned else np.zeros(array.shape, array.dtype)


def _add_rows(into: Any, rows: np.ndarray, parts: Any) -> None:
    """Add the results of the candidates `rows`, [>= len(rows), …], to arrays of all candidates."""
    for leaf, part in zip(jax.tree.leaves(into), jax.tree.leaves(parts), strict=True):
        if not isinstance(part, jax.ShapeDtypeStruct):
            leaf[rows] += on_host(part)[: len(rows)]
