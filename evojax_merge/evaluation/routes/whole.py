"""The route of models that run in one program, which scans all layers; a task at a time.

A candidate's layers are merged inside the forward pass and never exist together, unless several passes would do the
merge again and there is room to keep it. The number of candidates that share a pass (the *chunk*) is chosen from the
memory that the compiler reports.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from evojax_merge.evaluation import passes, programs
from evojax_merge.evaluation.batched_tasks import BatchedTask, halve_batches
from evojax_merge.evaluation.devices import on_host, pad_chunk, size_of
from evojax_merge.evaluation.passes import trace
from evojax_merge.evaluation.programs import ALL_READ, Each, Evaluation, Job, Program
from evojax_merge.evaluation.responses import enter, score_gradients
from evojax_merge.models.decoder import LayerStates
from evojax_merge.tasks.batches import ScoringBatch
from evojax_merge.tasks.task import Responses

if TYPE_CHECKING:
    from evojax_merge.evaluation.evaluator import Evaluator, Progress
    from evojax_merge.evaluation.populations import DifferentiablePopulation, Population, Source

# Fraction of the free memory that materialised or unstacked candidates may take.
MATERIALISE_FRACTION = 1 / 8
# (the size of a chunk) -> the bytes beyond its arguments that a pass over it needs on a device.
Temporaries = Callable[[int], int | None]


def groups(tasks: Sequence[Any]) -> list[list[Any]]:
    """The tasks that run together: each by itself."""
    return [[task] for task in tasks]


def score(
    evaluator: "Evaluator", population: "Population", batched_task: BatchedTask, progress: "Progress"
) -> Evaluation:
    """The responses to the rows of a task, without texts."""
    responses = batched_task.requests.unanswered(population.size)
    if batched_task.scoring is not None:
        chunk = scoring_chunk(evaluator, population, batched_task)
        yield from _scoring(evaluator, population, batched_task, chunk, responses, progress)
        yield ALL_READ
    return [responses]


def differentiate(
    evaluator: "Evaluator", scored: "Population", weights: Sequence[float], batched_task: BatchedTask,
    progress: "Progress",
) -> Evaluation:  # fmt: skip
    """A task's responses, and the derivative of its weight times the mean of its scores."""
    population = scored.differentiable()
    responses = batched_task.requests.unanswered(population.size)
    if batched_task.task.derivative == "nonlinear":
        # The weight of a total depends on the others, which may be in other batches.
        (responses,) = yield from score(evaluator, scored, batched_task, lambda done: None)
    row_weights = score_gradients(batched_task.task, responses, *weights)
    gradient = jax.tree.map(np.zeros_like, population.candidates)
    threads = evaluator.runs_two_jobs(evaluator.devices.candidate_bytes(population.model_shape()))
    size = scoring_chunk(evaluator, population, batched_task, is_gradient=True) * evaluator.devices.population
    for rows, candidates in population.chunks(size):
        padded = pad_chunk(row_weights, rows, size)
        part = yield from _differentiating(
            evaluator, population, batched_task, rows, candidates, padded, responses, progress, threads
        )
        for leaf, leaf_part in zip(jax.tree.leaves(gradient), jax.tree.leaves(part), strict=True):
            leaf[rows] = on_host(leaf_part)[: len(rows)]
    return [responses], gradient


def planned_scoring(evaluator: "Evaluator", population: "Population", batched_task: BatchedTask) -> Evaluation:
    """Score a task's rows for one chunk of candidates, without entering the results anywhere."""
    chunk = scoring_chunk(evaluator, population, batched_task)
    first, nobody = population.first(chunk * evaluator.devices.population), batched_task.requests.unanswered(0)
    return _scoring(evaluator, first, batched_task, chunk, nobody, lambda done: None)


def planned_gradient(evaluator: "Evaluator", scored: "Population", batched_task: BatchedTask) -> Evaluation:
    """Differentiate a task's rows for one chunk of candidates, without entering the results anywhere."""
    population = scored.differentiable()
    size = scoring_chunk(evaluator, population, batched_task, is_gradient=True) * evaluator.devices.population
    first, nobody = population.first(size), batched_task.requests.unanswered(size)
    return _differentiating(
        evaluator, population, batched_task, np.arange(size), first.candidates, nobody.totals, nobody,
        lambda done: None, threads=False,
    )  # fmt: skip


def _scoring(
    evaluator: "Evaluator", population: "Population", batched_task: BatchedTask, chunk: int, responses: Responses,
    progress: "Progress",
) -> Evaluation:  # fmt: skip
    """Score a task's rows, `chunk` candidates on each device together; enters the results in `responses`."""
    assert batched_task.scoring is not None
    scoring, threads = batched_task.scoring, evaluator.runs_two_jobs(0)
    # Each pass would redo the merge, so where there are several, and room for the chunk, it is done once.
    materialised = len(scoring.batches) > 1 and _fits_materialised(evaluator, population, chunk)
    for rows, candidates in population.chunks(chunk * evaluator.devices.population):
        source, prefix = yield from _source_and_prefix(evaluator, population, batched_task, candidates, materialised)
        job = partial(_batch_job, evaluator, batched_task, source, prefix)

        def read(result: Any, rows: np.ndarray = rows) -> None:
            batch, answers = result
            enter(responses, rows, batch, answers)
            progress(len(rows))

        yield Each(map(job, scoring.batches), read, threads=threads)


def _source_and_prefix(
    evaluator: "Evaluator", population: "Population", batched_task: BatchedTask, candidates: Any, materialised: bool
) -> Generator[Program, Any, tuple["Source", LayerStates | None]]:
    """A chunk of candidates as arguments of the passes over a task's rows, and the cache of the rows' prefix."""
    assert batched_task.scoring is not None
    source = population.source(candidates, evaluator.compute_dtype)
    if materialised:
        source = yield from population.materialise(evaluator.devices.mesh, candidates)
    return source, (yield from read_prefix(evaluator, source, batched_task.scoring.shared_prefix, batched_task))


def _batch_job(
    evaluator: "Evaluator", batched_task: BatchedTask, source: "Source", prefix: LayerStates | None,
    batch: ScoringBatch, weights: np.ndarray | None = None,
) -> Job:  # fmt: skip
    """Score a batch of a task's rows for a chunk of candidates, and differentiate the sum of the totals times their
    `weights: float32[P, S]` where there are such. Returns the batch and the results."""
    spec = passes.ScoreSpec(evaluator.config, source.factory, evaluator.devices.mesh, batched_task.requests.logits_fn)
    shared = (source.replicated, evaluator.batch_arrays(batched_task, batch))
    name, function, each = programs.SCORE, passes.score, [source.candidates, prefix]
    if weights is not None:
        name, function = programs.GRADIENT, passes.score_gradient
        each.append(np.where(batch.rows >= 0, weights[:, batch.rows], 0).astype(np.float32))
    results = yield Program(
        name, function, (spec, shared, tuple(each)), source.size, holds=(source.holds, prefix),
        merge_bytes=source.merge_bytes,
    )  # fmt: skip
    return batch, results


def read_prefix(
    evaluator: "Evaluator", source: "Source", shared_prefix: np.ndarray, batched_task: BatchedTask
) -> Generator[Program, Any, LayerStates | None]:
    """The KV cache of the prefix that a task's rows share, if there is one."""
    if not shared_prefix.size:
        return None
    spec = passes.PassSpec(evaluator.config, source.factory, evaluator.devices.mesh)
    images = evaluator.images_of(batched_task).of_prefix(shared_prefix)
    arguments = (spec, (source.replicated, shared_prefix, images), source.candidates)
    program = Program(
        programs.PREFIX, passes.prefill_prefix, arguments, source.size, holds=source.holds,
        merge_bytes=source.merge_bytes,
    )  # fmt: skip
    return (yield program)


def _differentiating(
    evaluator: "Evaluator", population: "DifferentiablePopulation", batched_task: BatchedTask, rows: np.ndarray,
    candidates: Any, weights: np.ndarray, responses: Responses, progress: "Progress", threads: bool,
) -> Evaluation:  # fmt: skip
    """The derivative of a chunk of candidates, float32, of the sum of its totals times `weights: float32[P, S]`; enters
    the results of the candidates `rows` in `responses`."""
    assert batched_task.scoring is not None
    mesh, scoring = evaluator.devices.mesh, batched_task.scoring
    # A layer that is merged inside the pass is merged twice, and on a CPU slowly.
    redone = len(scoring.batches) > 1 or not evaluator.target.is_accelerator
    chunk = size_of(candidates) // evaluator.devices.population
    materialised = redone and _fits_materialised(evaluator, population, chunk)
    source, prefix = yield from _source_and_prefix(evaluator, population, batched_task, candidates, materialised)
    job = partial(_batch_job, evaluator, batched_task, source, prefix, weights=weights)

    def read(result: Any) -> None:
        batch, (answers, _) = result
        enter(responses, rows, batch, answers)
        progress(len(rows))

    gradient, cotangents = yield Each(map(job, scoring.batches), read, lambda result: result[1][1], threads)
    holds = (source.holds, prefix, gradient, cotangents)
    if prefix is not None:
        spec = passes.PassSpec(evaluator.config, source.factory, mesh)
        images = evaluator.images_of(batched_task).of_prefix(scoring.shared_prefix)
        arguments = (spec, (source.replicated, scoring.shared_prefix, images), (source.candidates, cotangents))
        through = yield Program(
            programs.PREFIX_GRADIENT, passes.prefix_gradient, arguments, source.size, holds=holds,
            merge_bytes=source.merge_bytes,
        )  # fmt: skip
        gradient = yield Program(programs.SUM, passes.add, (gradient, through), source.size, is_priced=False)
    if materialised:
        gradient = yield from population.pull_back(mesh, candidates, gradient, holds)
    return gradient


def _fits_materialised(evaluator: "Evaluator", population: "Population", chunk: int) -> bool:
    """Return whether there is room for a chunk of materialised candidates on each device, where they are not in memory
    anyway."""
    model = population.model_shape()
    nbytes = chunk * evaluator.devices.candidate_bytes(model)
    return model is not None and nbytes <= MATERIALISE_FRACTION * evaluator.free_memory()


def scoring_chunk(
    evaluator: "Evaluator", population: "Population", batched_task: BatchedTask, *, is_gradient: bool = False
) -> int:
    """The number of candidates that share a pass on a device, chosen once: the config's chunk, else the largest power
    of two of candidates whose temporaries, as the compiler reports them, fit a device; 1 on a CPU, where sharing a pass
    is slower than one candidate after the other. is_gradient: the pass is differentiated."""
    most = max(1, -(-population.size // evaluator.devices.population))
    key = (batched_task.task.name, "gradients" if is_gradient else "scores", most)
    if key not in evaluator.chunk_sizes:
        if evaluator.chunk is not None:
            chunk = min(evaluator.chunk, most)
        elif not evaluator.target.is_accelerator:
            chunk = 1
        else:
            temporaries = partial(pass_temporaries, evaluator, population, batched_task, is_gradient=is_gradient)
            chunk = _largest_chunk(evaluator.free_memory(), temporaries, batched_task, most)
        evaluator.chunk_sizes[key] = chunk
        if chunk > 1 and not is_gradient:
            evaluator.log(
                f"{batched_task.task.name}: {chunk} of {population.size} candidates a pass and "
                f"device, in batches of {batched_task.tokens_per_batch} tokens"
            )
    return evaluator.chunk_sizes[key]


def _largest_chunk(budget: int, temporaries: Temporaries, batched_task: BatchedTask, most: int) -> int:
    """The largest chunk that fits: passes with one and with two candidates show how much each takes; the largest chunk
    that should fit is then compiled to see whether it does. Raises MemoryError where one candidate does not fit and a
    batch has more than a row."""
    single = temporaries(1)
    if single is not None and single > budget and halve_batches(batched_task) is not None:
        raise MemoryError
    if single is None or most < 2:
        return 1
    double = temporaries(2) or 2 * single
    each = max(double - single, 1)
    chunk = 1
    while chunk * 2 <= most and single + (2 * chunk - 1) * each <= budget:
        chunk *= 2
    while chunk > 2 and (temporaries(chunk) or 0) > budget:
        chunk //= 2
    return chunk if chunk > 1 and double <= budget else 1


def pass_temporaries(
    evaluator: "Evaluator", population: "Population", batched_task: BatchedTask, chunk: int, *, is_gradient: bool
) -> int | None:
    """Bytes beyond its arguments that the pass over the largest batch and a chunk needs on a device; None where the
    compiler reports nothing. is_gradient: the pass is differentiated."""
    assert batched_task.scoring is not None
    devices = evaluator.devices
    _, candidates = next(population.chunks(chunk * devices.population))
    batch = max(batched_task.scoring.batches, key=lambda batch: batch.tokens.size)
    factory, shared_prefix = population.factory, batched_task.scoring.shared_prefix
    prefix, prefix_bytes = None, 0
    if shared_prefix.size:
        read = partial(passes.prefill_prefix, passes.PassSpec(evaluator.config, factory, devices.mesh))
        images = evaluator.images_of(batched_task).of_prefix(shared_prefix)
        prefix = jax.eval_shape(read, (population.replicated, shared_prefix, images), candidates)
        prefix_bytes = devices.candidate_bytes(prefix) // devices.population
    spec = passes.ScoreSpec(evaluator.config, factory, devices.mesh, batched_task.requests.logits_fn)
    shared = (population.replicated, evaluator.batch_arrays(batched_task, batch))
    if is_gradient:
        weights = np.zeros((size_of(candidates), len(batch.rows)), np.float32)
        traced = trace(passes.score_gradient, spec, shared, (candidates, prefix, weights))
    else:
        traced = trace(passes.score, spec, shared, (candidates, prefix))
    temporaries = evaluator.temporary_bytes(traced)
    return None if temporaries is None else temporaries + prefix_bytes
