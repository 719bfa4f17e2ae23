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

from evojax_merge.evaluation import passes
from evojax_merge.evaluation.batched_tasks import BatchedTask, halve_batches
from evojax_merge.evaluation.devices import on_host, pad_chunk, size_of
from evojax_merge.evaluation.passes import TracedPass, trace
from evojax_merge.evaluation.programs import (
    ALL_READ,
    GRADIENT,
    PREFIX,
    PREFIX_GRADIENT,
    SCORE,
    SUM,
    Each,
    Evaluation,
    Job,
    Program,
)
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
    size = gradient_chunk(evaluator, population, batched_task) * evaluator.devices.population
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
    size = gradient_chunk(evaluator, population, batched_task) * evaluator.devices.population
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
    scoring, mesh, threads = batched_task.scoring, evaluator.devices.mesh, evaluator.runs_two_jobs(0)
    # Each pass would redo the merge, so where there are several, and room for the chunk, it is done once.
    materialised = len(scoring.batches) > 1 and _fits_materialised(evaluator, population, chunk)
    for rows, candidates in population.chunks(chunk * evaluator.devices.population):
        source = population.source(candidates, evaluator.compute_dtype)
        if materialised:
            source = yield from population.materialise(mesh, candidates)
        prefix = yield from read_prefix(evaluator, source, scoring.shared_prefix, batched_task)

        def job(batch: ScoringBatch, source: "Source" = source, prefix: LayerStates | None = prefix) -> Job:
            spec = passes.ScoreSpec(evaluator.config, source.factory, mesh, batched_task.requests.logits_fn)
            arrays = evaluator.batch_arrays(batched_task, batch)
            arguments = (spec, (source.replicated, arrays), (source.candidates, prefix))
            results = yield Program(
                SCORE, passes.score, arguments, source.size, holds=(source.holds, prefix),
                merge_bytes=source.merge_bytes,
            )  # fmt: skip
            return batch, results

        def read(result: Any, rows: np.ndarray = rows) -> None:
            batch, answers = result
            enter(responses, rows, batch, answers)
            progress(len(rows))

        yield Each(map(job, scoring.batches), read, threads=threads)


def read_prefix(
    evaluator: "Evaluator", source: "Source", shared_prefix: np.ndarray, batched_task: BatchedTask
) -> Generator[Program, Any, LayerStates | None]:
    """The KV cache of the prefix that a task's rows share, if there is one."""
    if not shared_prefix.size:
        return None
    spec = passes.PassSpec(evaluator.config, source.factory, evaluator.devices.mesh)
    images = evaluator.images_of(batched_task).of_prefix(shared_prefix)
    arguments = (spec, (source.replicated, shared_prefix, images), source.candidates)
    return (
        yield Program(
            PREFIX, passes.prefill_prefix, arguments, source.size, holds=source.holds, merge_bytes=source.merge_bytes
        )
    )


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
    source = population.source(candidates, evaluator.compute_dtype)
    if materialised:
        source = yield from population.materialise(mesh, candidates)
    prefix = yield from read_prefix(evaluator, source, scoring.shared_prefix, batched_task)

    def job(batch: ScoringBatch) -> Job:
        real = np.where(batch.rows >= 0, weights[:, batch.rows], 0).astype(np.float32)
        spec = passes.ScoreSpec(evaluator.config, source.factory, mesh, batched_task.requests.logits_fn)
        arrays = evaluator.batch_arrays(batched_task, batch)
        arguments = (spec, (source.replicated, arrays), (source.candidates, prefix, real))
        results = yield Program(
            GRADIENT, passes.score_gradient, arguments, source.size, holds=(source.holds, prefix),
            merge_bytes=source.merge_bytes,
        )  # fmt: skip
        return batch, results

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
            PREFIX_GRADIENT, passes.prefix_gradient, arguments, source.size, holds=holds,
            merge_bytes=source.merge_bytes,
        )  # fmt: skip
        gradient = yield Program(SUM, passes.add, (gradient, through), source.size, is_priced=False)
    if materialised:
        gradient = yield from population.pull_back(mesh, candidates, gradient, holds)
    return gradient


def _fits_materialised(evaluator: "Evaluator", population: "Population", chunk: int) -> bool:
    """Return whether there is room for a chunk of materialised candidates on each device, where they are not in memory
    anyway."""
    model = population.model_shape()
    nbytes = chunk * evaluator.devices.candidate_bytes(model)
    return model is not None and nbytes <= MATERIALISE_FRACTION * evaluator.free_memory()


def scoring_chunk(evaluator: "Evaluator", population: "Population", batched_task: BatchedTask) -> int:
    """The largest power of two of candidates whose temporaries, as the compiler reports them, fit a device; 1 on a CPU,
    where sharing a pass is slower than one candidate after the other."""
    key = (batched_task.task.name, "scores", _share(evaluator, population))
    temporaries = partial(_scoring_temporaries, evaluator, population, batched_task)
    is_new = key not in evaluator.chunk_sizes
    chunk = _fitting_chunk(evaluator, key, temporaries, batched_task)
    if is_new and chunk > 1:
        evaluator.log(
            f"{batched_task.task.name}: {chunk} of {population.size} candidates a pass and "
            f"device, in batches of {batched_task.tokens_per_batch} tokens"
        )
    return chunk


def gradient_chunk(evaluator: "Evaluator", population: "DifferentiablePopulation", batched_task: BatchedTask) -> int:
    """The number of candidates that share a pass that is differentiated (see `scoring_chunk`)."""
    key = (batched_task.task.name, "gradients", _share(evaluator, population))
    temporaries = partial(gradient_temporaries, evaluator, population, batched_task)
    return _fitting_chunk(evaluator, key, temporaries, batched_task)


def _scoring_temporaries(
    evaluator: "Evaluator", population: "Population", batched_task: BatchedTask, chunk: int
) -> int | None:
    """Bytes beyond its arguments that the largest pass over a chunk needs on a device; None where the compiler reports
    nothing."""
    spec, shared, each = _largest_pass(evaluator, population, batched_task, chunk)
    return _pass_bytes(evaluator, trace(passes.score, spec, shared, each), each[1])


def gradient_temporaries(
    evaluator: "Evaluator", population: "DifferentiablePopulation", batched_task: BatchedTask, chunk: int
) -> int | None:
    """Bytes beyond its arguments that the largest pass over a chunk that is differentiated needs on a device."""
    spec, (replicated, batch), (candidates, prefix) = _largest_pass(evaluator, population, batched_task, chunk)
    weights = np.zeros((size_of(candidates), len(batch["rows"])), np.float32)
    traced = trace(passes.score_gradient, spec, (replicated, batch), (candidates, prefix, weights))
    return _pass_bytes(evaluator, traced, prefix)


def _share(evaluator: "Evaluator", population: "Population") -> int:
    """The most candidates that a device has."""
    return max(1, -(-population.size // evaluator.devices.population))


def _fitting_chunk(
    evaluator: "Evaluator", key: tuple[str, str, int], temporaries: Temporaries, batched_task: BatchedTask
) -> int:
    """The config's chunk, else the largest part of a device's candidates that fits, chosen once for a `key`: the
    task's name, the kind of pass, and the most candidates of a device."""
    if key not in evaluator.chunk_sizes:
        most = key[2]
        if evaluator.chunk is not None:
            chunk = min(evaluator.chunk, most)
        elif not evaluator.target.is_accelerator:
            chunk = 1
        else:
            chunk = _largest_chunk(evaluator.free_memory(), temporaries, batched_task, most)
        evaluator.chunk_sizes[key] = chunk
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


def _largest_pass(
    evaluator: "Evaluator", population: "Population", batched_task: BatchedTask, chunk: int
) -> tuple[Any, Any, Any]:
    """The arguments of `passes.score` for the largest batch and a chunk."""
    assert batched_task.scoring is not None
    _, candidates = next(population.chunks(chunk * evaluator.devices.population))
    batch = max(batched_task.scoring.batches, key=lambda batch: batch.tokens.size)
    factory, mesh, shared_prefix = population.factory, evaluator.devices.mesh, batched_task.scoring.shared_prefix
    prefix = None
    if shared_prefix.size:
        read = partial(passes.prefill_prefix, passes.PassSpec(evaluator.config, factory, mesh))
        images = evaluator.images_of(batched_task).of_prefix(shared_prefix)
        prefix = jax.eval_shape(read, (population.replicated, shared_prefix, images), candidates)
    spec = passes.ScoreSpec(evaluator.config, factory, mesh, batched_task.requests.logits_fn)
    return spec, (population.replicated, evaluator.batch_arrays(batched_task, batch)), (candidates, prefix)


def _pass_bytes(evaluator: "Evaluator", traced: TracedPass, prefix: Any) -> int | None:
    temporaries, devices = evaluator.temporary_bytes(traced), evaluator.devices
    prefix_bytes = 0 if prefix is None else devices.candidate_bytes(prefix) // devices.population
    return None if temporaries is None else temporaries + prefix_bytes
