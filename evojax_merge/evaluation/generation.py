"""Texts: materialised candidates continue prompts, and draft tokens from the outputs of earlier candidates."""

import math
from bisect import bisect_left
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from evojax_merge.evaluation import passes, programs
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.devices import on_host, placed, tree_nbytes
from evojax_merge.evaluation.passes import DecodeSpec, abstract_results, trace
from evojax_merge.evaluation.planned_passes import JaxprReader, abstract_result
from evojax_merge.evaluation.populations import Population, Source, Sourcing
from evojax_merge.evaluation.programs import ALL_READ, Each, Evaluation, Job, Program
from evojax_merge.evaluation.routes.whole import MATERIALISE_FRACTION, read_prefix
from evojax_merge.evaluation.targets import Target
from evojax_merge.models.decoder import CacheUpdate, LayerStates, scatter_columns, select_columns
from evojax_merge.models.generate import NONFINITE_ID, PAD_ID, DecodeState
from evojax_merge.models.sampling import Draws
from evojax_merge.tasks.batches import PromptBatch
from evojax_merge.tasks.task import TaskRequests

if TYPE_CHECKING:
    from evojax_merge.evaluation.evaluator import Evaluator, Progress

# Decode steps between two looks for the ends of texts.
STOP_CHECK_INTERVAL = 32
# The most tokens of a sequence in one decode step, draft tokens included; and the tokens of all sequences for which a
# step does not take much longer than for one, where the target's peak and bandwidth do not give that number.
MAX_STEP_TOKENS = 8
CPU_STEP_TOKENS, ACCELERATOR_STEP_TOKENS = 8, 256
# The number of candidates whose outputs are kept as the lookup corpus for the next ones' draft tokens.
LOOKUP_CANDIDATES = 2
# Bytes of the materialised candidates that decode together on a CPU: its cache may hold them.
CPU_CACHE_BYTES = 32 * 2**20


def step_tokens(target: Target, batch: PromptBatch) -> int:
    """The number of tokens that a pass takes of each sequence of a batch."""
    tokens: float = CPU_STEP_TOKENS
    if target.is_accelerator:
        tokens = ACCELERATOR_STEP_TOKENS if math.isnan(target.tokens_per_step) else target.tokens_per_step
    return max(1, min(MAX_STEP_TOKENS, int(tokens) // len(batch.rows)))


def row_update(target: Target) -> CacheUpdate:
    """The function that writes into caches where each row has a column of its own."""
    return select_columns if target.platform == "tpu" else scatter_columns


@dataclass(frozen=True)
class Continuations:
    """The continuations of a task's N prompts by P candidates. texts: P lists of them; lengths: P lists of the numbers
    of their tokens, empty where no task counts them; nonfinite: bool[P], true for candidates whose logits were not
    finite."""

    texts: list[list[str]]
    lengths: list[list[int]]
    nonfinite: np.ndarray


def generate(
    evaluator: "Evaluator", population: Population, batched_task: BatchedTask, progress: "Progress"
) -> Evaluation:
    """A population's `Continuations` of a task's prompts."""
    prompts, size = len(batched_task.requests.prompts), population.size
    written = Continuations([[""] * prompts for _ in range(size)], [[] for _ in range(size)], np.zeros(size, bool))
    if batched_task.prompts is None:
        return written
    chunk = generation_chunk(evaluator, population, batched_task)
    yield from generating(evaluator, population, batched_task, chunk, written, progress)
    yield ALL_READ
    return written


def _lookup_corpus(evaluator: "Evaluator", batched_task: BatchedTask) -> np.ndarray:
    """int32[N, M]: the last candidates' outputs after each prompt, the latest last."""
    requests = batched_task.requests
    nothing = np.full((len(requests.prompts), LOOKUP_CANDIDATES * requests.max_new_tokens), PAD_ID, np.int32)
    return evaluator.lookup_corpus.get(batched_task.task.name, nothing)


def generating(
    evaluator: "Evaluator", population: Population, batched_task: BatchedTask, chunk: int,
    written: Continuations, progress: "Progress",
) -> Evaluation:  # fmt: skip
    """Continue a task's prompts, `chunk` candidates on each device together; enters the results in `written`."""
    task, requests = batched_task.task, batched_task.requests
    threads = evaluator.runs_two_jobs(evaluator.devices.candidate_bytes(population.model_shape()))
    counts_tokens = any(other.requests.counts_tokens for other in evaluator.batched_tasks)

    def read(result: tuple[np.ndarray, np.ndarray]) -> None:
        rows, tokens = result
        corpus = [_lookup_corpus(evaluator, batched_task)[:, tokens.shape[2] :], tokens[-1]]
        evaluator.lookup_corpus[task.name] = np.concatenate(corpus, 1)
        written.nonfinite[rows] = (tokens == NONFINITE_ID).any(axis=(1, 2))
        for row, outputs in zip(rows, _texts(evaluator, tokens), strict=True):
            written.texts[row] = [requests.cut(text) for text in outputs]
        if counts_tokens:
            for row, outputs in zip(rows, tokens, strict=True):
                written.lengths[row] = [_length(evaluator, ids[ids >= 0], requests) for ids in outputs]

    # The corpus of a chunk is made when its job begins.
    jobs = (
        _job(evaluator, population, batched_task, rows, candidates, progress)
        for rows, candidates in population.chunks(chunk * evaluator.devices.population)
    )
    yield Each(jobs, read, threads=threads)


def _job(
    evaluator: "Evaluator",
    population: Population,
    batched_task: BatchedTask,
    rows: np.ndarray,
    candidates: Any,
    progress: "Progress",
) -> Job:
    """A job that returns its candidates `rows` and their outputs after every prompt, int32[P, N, new]."""
    assert batched_task.prompts is not None
    prompts, requests = batched_task.prompts, batched_task.requests
    lookup_corpus = _lookup_corpus(evaluator, batched_task)
    outputs = np.full((len(rows), len(requests.prompts), requests.max_new_tokens), PAD_ID, np.int32)

    def job() -> Job:
        source = yield from population.materialise(evaluator.devices.mesh, candidates)
        prefix = yield from read_prefix(evaluator, source, prompts.shared_prefix, batched_task)
        decoding = yield from _decode_weights(evaluator, source)
        for batch in prompts.batches:
            state = yield from _prefill_batch(evaluator, source, decoding, prefix, batch, batched_task)

            def read(state: DecodeState, batch: PromptBatch = batch) -> None:
                real = batch.rows >= 0
                outputs[:, batch.rows[real]] = on_host(state.tokens)[: len(rows), real]
                progress(len(rows))

            yield _decode(evaluator, decoding, prefix, batch, batched_task, state, lookup_corpus[batch.rows], read)
        return rows, outputs

    return job()


def _decode_spec(evaluator: "Evaluator", factory: Any, batch: PromptBatch, batched_task: BatchedTask) -> DecodeSpec:
    """The static half of the passes that continue a batch of prompts."""
    requests, (rows, width) = batched_task.requests, batch.tokens.shape
    steps = STOP_CHECK_INTERVAL if requests.ends_early else requests.max_new_tokens
    return DecodeSpec(
        evaluator.config, factory, evaluator.devices.mesh, evaluator.compute_dtype, rows, width,
        requests.max_new_tokens,
        step_tokens(evaluator.target, batch), steps, row_update(evaluator.target), batched_task.stop,
    )  # fmt: skip


def _prefill_batch(
    evaluator: "Evaluator",
    source: Source,
    decoding: Source,
    prefix: LayerStates | None,
    batch: PromptBatch,
    batched_task: BatchedTask,
) -> Generator[Program, Any, DecodeState]:
    """Prefill a batch of prompts, group by group."""
    assert batched_task.prompts is not None
    spec = _decode_spec(evaluator, source.factory, batch, batched_task)
    arguments = (spec, None, np.zeros(source.size))
    state = yield Program(programs.START, passes.init_decode, arguments, source.size, is_priced=False)
    before = batched_task.prompts.shared_prefix
    for group in batch.prefill_groups:
        tokens, left_pad = batch.prefill_group(group)
        images = evaluator.images_of(batched_task).of_prompts(before, tokens, left_pad)
        draws = _draws(batched_task.requests, batch.rows[group.begin : group.end])
        shared = (source.replicated, np.int32(group.begin), tokens, left_pad, images, draws)
        each, holds = (source.candidates, prefix), (decoding.holds, prefix, state)
        state = yield Program(programs.PREFILL, passes.prefill, (spec, shared, each, state), source.size, holds=holds)
    return state


def _decode(
    evaluator: "Evaluator", decoding: Source, prefix: LayerStates | None, batch: PromptBatch,
    batched_task: BatchedTask, start: DecodeState, lookup_corpus: np.ndarray, read: Callable[[DecodeState], None],
) -> Program:  # fmt: skip
    """The program that continues a batch of prompts up to a stop token or a text's end. lookup_corpus: int32[B, M], see
    models.generate."""
    requests, spec = batched_task.requests, _decode_spec(evaluator, decoding.factory, batch, batched_task)
    assert batched_task.prompts is not None
    shift = evaluator.images_of(batched_task).shift(batched_task.prompts.shared_prefix, batch)
    draws = _draws(requests, batch.rows)
    shared, each = (decoding.replicated, batch.tokens, lookup_corpus, shift, draws), (decoding.candidates, prefix)

    def again(state: DecodeState) -> tuple[Any, ...] | None:
        # Rows that fill up a batch do not matter.
        done = on_host(state.done) | (batch.rows < 0)
        if requests.ends_early and state is not start and not done.all():
            texts = _texts(evaluator, on_host(state.tokens))
            done = done | np.array([[requests.cut(text) != text for text in row] for row in texts])
        if done.all():
            return None
        sharding = state.done.sharding
        put_done = placed(done, sharding) if isinstance(sharding, NamedSharding) else jax.device_put(done, sharding)
        return spec, shared, each, replace(state, done=put_done)

    # The prefill gives the first token; each further one takes a step, unless draft tokens are accepted.
    return Program(
        programs.DECODE, passes.decode, (spec, shared, each, start), decoding.size,
        holds=(decoding.holds, prefix, start), loop=again, first=start, steps=max(1, requests.max_new_tokens - 1),
        expected_steps=requests.expected_tokens, read=read,
    )  # fmt: skip


def _draws(requests: TaskRequests, rows: np.ndarray) -> Draws | None:
    """The draws of the prompts `rows: int[B]`; a prompt that fills up a batch takes the last one's. None: tokens are
    greedy."""
    if requests.sampler is None:
        return None
    seeds = np.array([requests.prompts[row].seed for row in rows], "<u8")
    return Draws(seeds.view("<u4").reshape(-1, 2), requests.sampler)  # type: ignore[arg-type]


def _length(evaluator: "Evaluator", ids: np.ndarray, requests: TaskRequests) -> int:
    """The number of generated tokens `ids` up to the one that shows a text's end: how many follow it depends on the
    steps that the host waits for."""

    def is_cut(count: int) -> bool:
        text = evaluator.tokenizer.decode(ids[:count], skip_special_tokens=True)
        return requests.cut(text) != text

    return bisect_left(range(len(ids)), True, key=is_cut) if requests.ends_early else len(ids)


def _texts(evaluator: "Evaluator", tokens: np.ndarray) -> list[list[str]]:
    """tokens: int32[P, B, new]. Candidates often agree: each distinct output is decoded once."""
    texts: dict[bytes, str] = {}

    def text(ids: np.ndarray) -> str:
        key = ids.tobytes()
        if key not in texts:
            texts[key] = evaluator.tokenizer.decode(ids[ids >= 0], skip_special_tokens=True)
        return texts[key]

    return [[text(ids) for ids in row] for row in tokens]


def generation_chunk(evaluator: "Evaluator", population: Population, batched_task: BatchedTask) -> int:
    """The number of materialised candidates that fit a device, with their caches; on a CPU the number whose weights
    its cache may hold, on a TPU one."""
    most = max(1, -(-population.size // evaluator.devices.population))
    key = (batched_task.task.name, "texts", most)
    if key not in evaluator.chunk_sizes:
        room = evaluator.chunk or (most if evaluator.target.decodes_together else 1)
        if evaluator.chunk is None and room > 1:
            model, state = _bytes(evaluator, population, batched_task)
            on_accelerator = evaluator.target.is_accelerator
            room = evaluator.free_memory() // (model + state) if on_accelerator else CPU_CACHE_BYTES // model
        evaluator.chunk_sizes[key] = int(max(1, min(most, room)))
    return evaluator.chunk_sizes[key]


def _bytes(evaluator: "Evaluator", population: Population, batched_task: BatchedTask) -> tuple[int, int]:
    """Bytes on a device of one materialised candidate, and of the memory that it needs to decode the largest batch
    of prompts."""
    assert batched_task.prompts is not None
    mesh, groups = evaluator.devices.mesh, evaluator.devices.population

    def candidate_bytes(tree: Any) -> int:
        return evaluator.devices.candidate_bytes(tree) // groups

    # One candidate for each group of devices.
    _, candidates = next(population.chunks(groups))
    reader = JaxprReader(evaluator.target, evaluator.devices)
    materialising = population.abstract(evaluator.devices).materialise(mesh, candidates)
    source = abstract_result(materialising, reader)
    models = source.candidates
    if not evaluator.target.is_accelerator:
        return candidate_bytes(models), 0
    batch = max(batched_task.prompts.batches, key=lambda batch: batch.tokens.size)
    shared_prefix = batched_task.prompts.shared_prefix
    spec, prefix = _decode_spec(evaluator, source.factory, batch, batched_task), None
    if shared_prefix.size:
        prefix_spec = passes.PassSpec(evaluator.config, spec.factory, mesh)
        images = evaluator.images_of(batched_task).of_prefix(shared_prefix)
        read = trace(passes.prefill_prefix, prefix_spec, (source.replicated, shared_prefix, images), models)
        prefix = abstract_results(read, evaluator.devices)
    group = max(batch.prefill_groups, key=lambda group: (group.end - group.begin) * group.width)
    state = abstract_results(trace(passes.init_decode, spec, None, np.zeros(groups)), evaluator.devices)
    tokens, left_pad = batch.prefill_group(group)
    images = evaluator.images_of(batched_task).of_prompts(shared_prefix, tokens, left_pad)
    draws = _draws(batched_task.requests, batch.rows[group.begin : group.end])
    shared = (source.replicated, np.int32(0), tokens, left_pad, images, draws)
    traced = trace(passes.prefill, spec, shared, (models, prefix), state)
    return candidate_bytes(models), 2 * candidate_bytes(state) + (evaluator.temporary_bytes(traced) or 0)


def _decode_weights(evaluator: "Evaluator", source: Source) -> Sourcing:
    """Materialised candidates laid out for decoding: a CPU copies each layer that it picks from a stack, every
    time, so the layers are unstacked once, where there is room."""
    if not unstacks_layers(evaluator, source.arguments):
        return source
    arguments = (evaluator.devices.mesh, *source.arguments)
    unstacked = yield Program(
        programs.UNSTACK, source.factory.unstack, arguments, source.size, holds=source.holds, is_priced=False
    )
    replicated, candidates = unstacked
    return Source(source.factory, replicated, candidates, (source.holds, unstacked))


def unstacks_layers(evaluator: "Evaluator", models: Any) -> bool:
    """Return whether materialised models (arrays or their shapes) are unstacked to decode."""
    return not evaluator.target.is_accelerator and tree_nbytes(models) <= MATERIALISE_FRACTION * evaluator.free_memory()
