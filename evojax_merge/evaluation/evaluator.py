"""The evaluator: every candidate of a population on every example of the tasks, in compiled batched passes.

May import models, tasks and evaluation's other files. The result for a task is a score matrix `float32[P, N]`; fitness
is a reduction of it. Scoring streams: a candidate's layers are merged inside the forward pass and never exist together,
unless several passes would do the merge again and there is room to keep it. Generation materialises a chunk of
candidates first, and guesses at what they write from what those before them wrote. How many candidates go through a
pass together (the *chunk*), and how many rows, is chosen from the memory that the compiler reports; where that was too
much, less is tried.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Event
from typing import Any, TypeVar

import jax
import numpy as np

from evojax_merge.errors import Failed
from evojax_merge.evaluation import passes
from evojax_merge.evaluation.devices import (
    ONE_DEVICE,
    Devices,
    float_bytes,
    free_memory,
    on_accelerator,
    repeat_last,
    size_of,
)
from evojax_merge.evaluation.memory import is_out_of_memory
from evojax_merge.evaluation.passes import Alone, Build, Each, MergeOf
from evojax_merge.evaluation.requests import Requests, smaller
from evojax_merge.models.bank import Bank, MergeSpec, Recipe
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import Cache
from evojax_merge.models.generate import BROKEN, ENDED, Writing
from evojax_merge.models.sources import Stored
from evojax_merge.tasks.batches import PromptBatch, ScoringBatch
from evojax_merge.tasks.task import Answers, Asked, Task, cut_at_stop

Progress = Callable[[int], None]
Result = TypeVar("Result")

# Passes in which candidates write between two looks at their stop texts.
GLANCE = 32
# Tokens that a sequence is given in a pass while it is written, the guessed ones counted, at most; and the tokens of
# all sequences for which a pass does not take much longer than for one.
WINDOW = 8
CPU_WINDOWS, ACCELERATOR_WINDOWS = 8, 256
# Candidates whose outputs are remembered, for guesses at the next ones'.
REMEMBERED = 2
# Share of the free memory that candidates may take that are put together, or laid apart, for several passes.
WHOLE_SHARE = 1 / 8
# Materialised candidates that decode together on a CPU: as many as its cache may hold.
CPU_MODELS = 32 * 2**20


@dataclass(frozen=True)
class Scores:
    """Per task: metric -> float32[P, N], and for tasks that generate the P lists of outputs."""

    matrices: dict[str, dict[str, np.ndarray]]
    outputs: dict[str, list[list[str]]] = field(default_factory=dict)


def shares(tasks: Sequence[Task]) -> list[tuple[Task, float]]:
    """The tasks that the fitness is made of, and how much each counts; together 1. Tasks of weight 0 take no part,
    unless there are no others: then all count alike."""
    weights = [task.weight for task in tasks] if any(task.weight for task in tasks) else [1.0] * len(tasks)
    return [(task, weight / sum(weights)) for task, weight in zip(tasks, weights, strict=True) if weight > 0]


def fitness(tasks: Sequence[Task], scores: Scores) -> np.ndarray:
    """float64[P]: the weighted mean over tasks of the mean over examples of each task's metric; NaN where a
    score is not finite."""
    rows = [
        share * scores.matrices[task.name][task.metric].mean(axis=1, dtype=np.float64) for task, share in shares(tasks)
    ]
    summed = np.sum(rows, axis=0)
    return np.where(np.isfinite(summed), summed, np.nan)


def means(tasks: Sequence[Task], scores: Scores) -> list[dict[str, float]]:
    """Per candidate: `task/metric` -> mean over examples."""
    first = scores.matrices[tasks[0].name][tasks[0].metric]
    return [
        {
            f"{task.name}/{metric}": float(matrix[p].mean(dtype=np.float64))
            for task in tasks
            for metric, matrix in scores.matrices[task.name].items()
        }
        for p in range(first.shape[0])
    ]


def score_task(task: Task, answers: Answers, broken: np.ndarray) -> dict[str, np.ndarray]:
    """Metric -> float32[P, N]; NaN for candidates whose answers are not numbers. broken: bool[P], whose outputs are
    not."""
    failed = broken | ~np.isfinite(answers.totals).all(axis=1)
    return {
        metric: np.where(failed[:, None], np.nan, matrix).astype(np.float32)
        for metric, matrix in task.score(answers).items()
    }


def arrays_of(batch: ScoringBatch) -> dict[str, np.ndarray]:
    """What a compiled pass takes of a batch."""
    return vars(batch) | {"rows": batch.rows.astype(np.int32)}


def _two_under_way(jobs: Iterable[Callable[[Event], Result]], threads: bool) -> Iterator[Result]:
    """The jobs' results, in their order; each job is started before the one before it is waited for, and no more, so
    that an interruption does not wait long.

    An accelerator queues what it is asked, and needs only never to be idle. A CPU works through what one thread asks
    one after the other, and leaves cores idle wherever there is little to do: with `threads` each job has its own. The
    event that jobs are given is set when nobody waits for them any more.
    """
    left = Event()
    if not threads:
        under_way: deque[Result] = deque()
        for job in jobs:
            under_way.append(job(left))
            if len(under_way) > 1:
                yield under_way.popleft()
        yield from under_way
        return
    with ThreadPoolExecutor(2) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(_finished, job, left))
                if len(waiting) > 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            left.set()


def _finished(job: Callable[[Event], Result], left: Event) -> Result:
    result: Result = jax.block_until_ready(job(left))
    return result


def _window(batch: PromptBatch) -> int:
    """How many tokens each sequence of a batch is given in a pass."""
    windows = ACCELERATOR_WINDOWS if on_accelerator() else CPU_WINDOWS
    return max(1, min(WINDOW, windows // len(batch.rows)))


@dataclass(frozen=True)
class Population:
    """P candidates: what they share, what each has (leading axis P, on the host), and how a model is made of it."""

    build: Build
    shared: Any
    members: Any

    @property
    def size(self) -> int:
        return size_of(self.members)

    @property
    def source(self) -> tuple[Build, Any]:
        return self.build, self.shared

    def chunks(self, size: int) -> Iterator[tuple[np.ndarray, Any]]:
        """Runs of `size` candidates: their numbers, and the members, filled up to one shape."""
        for begin in range(0, self.size, size):
            rows = np.arange(begin, min(begin + size, self.size))
            yield rows, repeat_last(self.members, rows, size)


class _TooLarge(Exception):
    """The compiler says that not even one candidate's pass fits."""


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, _TooLarge) or is_out_of_memory(error)


@dataclass
class Evaluator:
    """Scores populations of merges of one bank, and stored models, on one set of requests.

    `chunk`: how many candidates share a pass on a device; None chooses. `say` is told what was chosen.
    """

    config: DecoderConfig
    tokenizer: Any
    requests: list[Requests]
    compute_dtype: str = "float32"
    chunk: int | None = None
    devices: Devices = ONE_DEVICE
    say: Callable[[str], None] = lambda text: None
    # By task and kind of pass: the chunk that was chosen.
    chosen: dict[Any, int] = field(default_factory=dict)
    # By task: int32[N, …], what the last candidates wrote after each prompt.
    written: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def tasks(self) -> list[Task]:
        return [request.task for request in self.requests]

    def passes(self, population: int) -> int:
        """How many steps of progress an evaluation reports."""
        return sum(request.batches for request in self.requests) * population

    def population(
        self, bank: Bank, spec: MergeSpec, recipes: Recipe, progress: Progress = lambda done: None
    ) -> Scores:
        """Score P recipes (leading axis P on every leaf)."""
        # On the host they are cut into chunks without compiling anything.
        recipes = jax.tree.map(np.asarray, recipes)
        return self._evaluate(Population(MergeOf(spec, self.compute_dtype), bank, recipes), progress)

    def stored(self, model: Stored, progress: Progress = lambda done: None) -> Scores:
        """Score one stored model: a population of one."""
        # Every group of devices would compute the same.
        alone = replace(self, chunk=1, devices=ONE_DEVICE, chosen={})
        return alone._evaluate(Population(Alone(), model, np.zeros(1)), progress)

    def write_stored(self, model: Stored, request: Requests, progress: Progress) -> tuple[list[str], bool]:
        """One stored model's continuations of a task's prompts, and whether its logits were not finite."""
        texts, broken = self._write(Population(Alone(), model, np.zeros(1)), request, progress)
        return texts[0], bool(broken[0])

    def _evaluate(self, population: Population, progress: Progress) -> Scores:
        scores = Scores({})
        for i in range(len(self.requests)):
            totals, greedy = self.with_less(i, partial(self._score, population), progress)
            texts, broken = self.with_less(i, partial(self._write, population), progress)
            task, asked = self.requests[i].task, self.requests[i].asked
            counts = np.array([len(row.tokens) - row.start for row in asked.scored])
            scores.matrices[task.name] = score_task(task, Answers(totals, counts, greedy, texts), broken)
            if asked.prompts:
                scores.outputs[task.name] = texts
        return scores

    def with_less(self, i: int, run: Callable[[Requests, Progress], Any], progress: Progress) -> Any:
        """`run` request i; where that is out of memory, with half of what went through a pass, until it fits. Raises
        Failed where it does not fit however little that is."""
        while True:
            done = 0

            def count(passes: int) -> None:
                nonlocal done
                done += passes
                progress(passes)

            try:
                return run(self.requests[i], count)
            except (jax.errors.JaxRuntimeError, MemoryError, _TooLarge) as error:
                if not _out_of_memory(error):
                    raise
                if not self._halve(i):
                    raise Failed(
                        f"{self.requests[i].task.name}: out of memory with one candidate and one row a pass "
                        f"({free_memory() / 1e6:,.0f} MB are free); take shorter examples or smaller models"
                    ) from error
                # What is done again is not counted twice.
                progress(-done)

    def _halve(self, i: int) -> bool:
        request, halved = self.requests[i], False
        for key, chunk in self.chosen.items():
            if key[0] == request.task.name and chunk > 1:
                self.chosen[key], halved = chunk // 2, True
                self.say(
                    f"{request.task.name}: out of memory with {chunk} candidates a pass; going on with {chunk // 2}"
                )
        less = None if halved else smaller(request)
        if less is not None:
            self.say(f"{request.task.name}: out of memory; going on with batches of {less.tokens_per_batch} tokens")
            self.requests = [*self.requests[:i], less, *self.requests[i + 1 :]]
        return halved or less is not None

    # -----------------------------------------------------------------------------------------------------------
    # Scored rows

    def _score(self, population: Population, request: Requests, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """float32[P, S] and bool[P, S]."""
        shape = (population.size, len(request.asked.scored))
        totals, greedy = np.zeros(shape, np.float32), np.zeros(shape, bool)
        if request.scoring is None:
            return totals, greedy
        for rows, batch, (found, likeliest) in _two_under_way(self._passes(population, request), self._threads(0)):
            real = batch.rows >= 0
            place = np.ix_(rows, batch.rows[real])
            totals[place] = np.asarray(found)[: len(rows), real]
            greedy[place] = np.asarray(likeliest)[: len(rows), real]
            progress(len(rows))
        return totals, greedy

    def _passes(
        self, population: Population, request: Requests
    ) -> Iterator[Callable[[Event], tuple[np.ndarray, ScoringBatch, Any]]]:
        """For each chunk and batch a job: which candidates and rows, and what score_states finds of them."""
        assert request.scoring is not None
        mesh, reduce = self.devices.mesh, request.asked.reduce
        chunk = self._scoring_chunk(population, request)
        whole = self._fits_whole(population, request, chunk)

        def job(rows: np.ndarray, source: Any, prefix: Cache | None, batch: ScoringBatch, left: Event) -> Any:
            build, shared, members = source
            found = passes.score(self.config, build, mesh, reduce, shared, members, prefix, arrays_of(batch))
            return rows, batch, found

        for rows, members in population.chunks(chunk * self.devices.population):
            source = self._whole(population, members) if whole else (*population.source, members)
            prefix = self._read_header(*source, request.scoring.header)
            yield from (partial(job, rows, source, prefix, batch) for batch in request.scoring.batches)

    def _threads(self, model: int) -> bool:
        """Whether two jobs, for candidates that take `model` bytes each, run in threads of their own: on a CPU, where
        there is room for both. Processes that share their devices' passes must ask for them in the same order."""
        alone = self.devices.mesh is None and not on_accelerator()
        return alone and 2 * model <= WHOLE_SHARE * free_memory()

    def _whole(self, population: Population, members: Any) -> tuple[Build, Any, Any]:
        """Candidates that exist as a whole: how their models are made, what they share, and what each has."""
        if not isinstance(population.build, MergeOf):
            return *population.source, members
        return Each(), None, passes.materialise(population.build, self.devices.mesh, population.shared, members)

    def _writer(self, build: Build, shared: Any, members: Any) -> tuple[Build, Any, Any]:
        """Whole candidates as they write on fastest: a CPU copies each layer that it picks from a stack, every time, so
        that the layers are laid apart once, where there is room."""
        if on_accelerator() or float_bytes((shared, members)) > WHOLE_SHARE * free_memory():
            return build, shared, members
        if isinstance(shared, Stored):
            return build, passes.lay_apart(shared), members
        return build, shared, passes.lay_each_apart(self.devices.mesh, members)

    def _fits_whole(self, population: Population, request: Requests, chunk: int) -> bool:
        """Whether a chunk is put together before it is scored: each pass would do its merge again, so where there are
        several, and room for the chunk, it is done once."""
        if not isinstance(population.build, MergeOf) or request.scoring is None or len(request.scoring.batches) < 2:
            return False
        return chunk * float_bytes(self._model_shape(population)) <= WHOLE_SHARE * free_memory()

    def _model_shape(self, population: Population) -> Any:
        """One materialised candidate's shapes."""
        assert isinstance(population.build, MergeOf)
        _, member = next(population.chunks(1))
        return jax.eval_shape(partial(passes.materialise, population.build, None), population.shared, member)

    def _read_header(self, build: Build, shared: Any, members: Any, header: np.ndarray) -> Cache | None:
        if not header.size:
            return None
        return passes.read_header(self.config, build, self.devices.mesh, shared, members, header)

    def _scoring_chunk(self, population: Population, request: Requests) -> int:
        """The largest power of two of candidates whose temporaries, as the compiler reports them, fit a device; 1 on a
        CPU, where sharing a pass is slower than one candidate after the other."""
        most = max(1, -(-population.size // self.devices.population))
        key = (request.task.name, "scores", most)
        if key not in self.chosen:
            if self.chunk is not None:
                self.chosen[key] = min(self.chunk, most)
            else:
                self.chosen[key] = self._largest_chunk(population, request, most) if on_accelerator() else 1
            if self.chosen[key] > 1:
                self.say(
                    f"{request.task.name}: {self.chosen[key]} of {population.size} candidates a pass and device, "
                    f"in batches of {request.tokens_per_batch} tokens"
                )
        return self.chosen[key]

    def _largest_chunk(self, population: Population, request: Requests, most: int) -> int:
        """One and two candidates a pass tell what each takes; the largest chunk that should fit is then compiled to
        see whether it does. Raises _TooLarge where one does not fit and a batch has more than a row."""
        budget = free_memory()
        one = self._temporaries(population, request, 1)
        if one is not None and one > budget and smaller(request) is not None:
            raise _TooLarge
        if one is None or most < 2:
            return 1
        two = self._temporaries(population, request, 2) or 2 * one
        each = max(two - one, 1)
        chunk = 1
        while chunk * 2 <= most and one + (2 * chunk - 1) * each <= budget:
            chunk *= 2
        while chunk > 2 and (self._temporaries(population, request, chunk) or 0) > budget:
            chunk //= 2
        return chunk if chunk > 1 and two <= budget else 1

    def _temporaries(self, population: Population, request: Requests, chunk: int) -> int | None:
        """Bytes beyond its arguments that the largest pass over a chunk needs on a device, as the compiler reports;
        None where it does not."""
        assert request.scoring is not None
        _, members = next(population.chunks(chunk * self.devices.population))
        batch = max(request.scoring.batches, key=lambda batch: batch.tokens.size)
        build, shared, mesh, header = population.build, population.shared, self.devices.mesh, request.scoring.header
        read = partial(passes.read_header, self.config, build, mesh)
        prefix = jax.eval_shape(read, shared, members, header) if header.size else None
        lowered = passes.score.lower(
            self.config, build, mesh, request.asked.reduce, shared, members, prefix, arrays_of(batch)
        )
        memory = lowered.compile().memory_analysis()
        own = 0 if prefix is None else float_bytes(prefix) // self.devices.population
        return None if memory is None else memory.temp_size_in_bytes + own

    # -----------------------------------------------------------------------------------------------------------
    # Prompts

    def _write(
        self, population: Population, request: Requests, progress: Progress
    ) -> tuple[list[list[str]], np.ndarray]:
        """P lists of continuations, and bool[P], whose logits were not finite."""
        texts = [[""] * len(request.asked.prompts) for _ in range(population.size)]
        broken = np.zeros(population.size, bool)
        if request.prompts is None:
            return texts, broken
        size = float_bytes(self._model_shape(population)) if isinstance(population.build, MergeOf) else 0
        for rows, tokens in _two_under_way(self._writings(population, request, progress), self._threads(size)):
            self.written[request.task.name] = np.concatenate([self._seen(request)[:, tokens.shape[2] :], tokens[-1]], 1)
            broken[rows] = (tokens == BROKEN).any(axis=(1, 2))
            for row, written in zip(rows, self._decoded(tokens), strict=True):
                texts[row] = [cut_at_stop(text, request.asked.stop) for text in written]
        return texts, broken

    def _seen(self, request: Requests) -> np.ndarray:
        """int32[N, M]: what was written after each prompt, as far as it is remembered, the latest last."""
        nothing = np.full((len(request.asked.prompts), REMEMBERED * request.asked.max_new_tokens), ENDED, np.int32)
        return self.written.get(request.task.name, nothing)

    def _writings(
        self, population: Population, request: Requests, progress: Progress
    ) -> Iterator[Callable[[Event], tuple[np.ndarray, np.ndarray]]]:
        """For each chunk a job: which candidates, and int32[P, N, new], what they write after every prompt."""
        assert request.prompts is not None
        prompts, asked = request.prompts, request.asked

        def job(rows: np.ndarray, members: Any, seen: np.ndarray, left: Event) -> Any:
            found = np.full((len(rows), len(asked.prompts), asked.max_new_tokens), ENDED, np.int32)
            source = self._whole(population, members)
            writer = self._writer(*source)
            prefix = self._read_header(*source, prompts.header)
            for batch in prompts.batches:
                if left.is_set():
                    break
                writing = self._begin(*source, prefix, batch, request)
                tokens = self._continue(*writer, prefix, batch, request, writing, seen[batch.rows], left)
                real = batch.rows >= 0
                found[:, batch.rows[real]] = tokens[: len(rows), real]
                progress(len(rows))
            return rows, found

        chunk = self._writing_chunk(population, request) * self.devices.population
        for rows, members in population.chunks(chunk):
            yield partial(job, rows, members, self._seen(request))

    def _begin(
        self, build: Build, shared: Any, members: Any, prefix: Cache | None, batch: PromptBatch, request: Requests
    ) -> Writing:
        """A batch of prompts, read part by part."""
        mesh, (rows, width) = self.devices.mesh, batch.tokens.shape
        new, everyone = request.asked.max_new_tokens, np.zeros(size_of(members))
        writing = passes.open_writing(self.config, self.compute_dtype, mesh, everyone, rows, width, new, _window(batch))
        for part in batch.parts:
            writing = passes.begin_writing(
                self.config, build, mesh, width, request.stop, shared, members, prefix, writing, np.int32(part.begin),
                *batch.part(part),
            )  # fmt: skip
        return writing

    def _continue(
        self,
        build: Build,
        shared: Any,
        members: Any,
        prefix: Cache | None,
        batch: PromptBatch,
        request: Requests,
        writing: Writing,
        seen: np.ndarray,
        left: Event,
    ) -> np.ndarray:
        """int32[P, B, new]: greedy continuations of a batch of prompts, up to a stop token or stop text; less, once
        `left` is set. seen: int32[B, M], what was written after these prompts before."""
        asked, mesh = request.asked, self.devices.mesh
        count = GLANCE if asked.stop else asked.max_new_tokens
        tokens, done = np.asarray(writing.tokens), np.asarray(writing.done)
        # Rows that fill up a part say nothing.
        done = done | (batch.rows < 0)
        while not (done.all() or left.is_set()):
            writing = replace(writing, done=jax.device_put(done, writing.done.sharding))
            writing = passes.keep_writing(
                self.config, build, mesh, count, _window(batch), request.stop, shared, members, writing, prefix,
                batch.tokens, seen,
            )  # fmt: skip
            tokens, done = np.array(writing.tokens), np.asarray(writing.done)
            if asked.stop and not done.all():
                done = done | self._stopped(tokens, asked)
        return tokens

    def _stopped(self, tokens: np.ndarray, asked: Asked) -> np.ndarray:
        """bool[P, B]: whether a text holds a stop text."""
        return np.array([[any(word in text for word in asked.stop) for text in row] for row in self._decoded(tokens)])

    def _decoded(self, tokens: np.ndarray) -> list[list[str]]:
        """tokens: int32[P, B, new]. Candidates often agree: each distinct output is decoded once."""
        known: dict[bytes, str] = {}

        def text(ids: np.ndarray) -> str:
            key = ids.tobytes()
            if key not in known:
                known[key] = self.tokenizer.decode(ids[ids >= 0], skip_special_tokens=True)
            return known[key]

        return [[text(ids) for ids in row] for row in tokens]

    def _writing_chunk(self, population: Population, request: Requests) -> int:
        """As many materialised candidates, with their caches, as fit; on a CPU one at a time unless they are small."""
        most = max(1, -(-population.size // self.devices.population))
        key = (request.task.name, "texts", most)
        if key not in self.chosen:
            room = self.chunk or most
            if self.chunk is None and isinstance(population.build, MergeOf):
                model, state = self._written_bytes(population, request)
                room = free_memory() // (model + state) if on_accelerator() else CPU_MODELS // model
            self.chosen[key] = int(max(1, min(most, room)))
        return self.chosen[key]

    def _written_bytes(self, population: Population, request: Requests) -> tuple[int, int]:
        """Bytes of one materialised candidate, and of what it needs to write the largest batch of prompts."""
        assert request.prompts is not None
        model = self._model_shape(population)
        if not on_accelerator():
            return float_bytes(model), 0
        batch, header = max(request.prompts.batches, key=lambda batch: batch.tokens.size), request.prompts.header
        read = partial(passes.read_header, self.config, Each(), None)
        prefix = jax.eval_shape(read, None, model, header) if header.size else None
        part = max(batch.parts, key=lambda part: (part.end - part.begin) * part.width)
        (rows, width), new = batch.tokens.shape, request.asked.max_new_tokens
        opened = partial(passes.open_writing, self.config, self.compute_dtype, None)
        writing = jax.eval_shape(lambda: opened(np.zeros(1), rows, width, new, _window(batch)))
        lowered = passes.begin_writing.lower(
            self.config, Each(), None, width, request.stop, None, model, prefix, writing, np.int32(0),
            *batch.part(part),
        )  # fmt: skip
        memory = lowered.compile().memory_analysis()
        held = float_bytes(writing)
        return float_bytes(model), 2 * held + (0 if memory is None else memory.temp_size_in_bytes)
