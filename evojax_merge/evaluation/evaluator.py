"""The evaluator: every candidate of a population on every example of the tasks, in compiled batched passes.

The result for a task is a score matrix `float32[P, N]`; fitness is a reduction of it. How candidates run is their
population's route. Generation materialises a chunk of candidates first, and drafts tokens from the outputs of earlier
candidates. A pass that runs out of memory is retried with fewer candidates or rows.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Event
from typing import Any, Self

import jax
import numpy as np

from evojax_merge.errors import Failed
from evojax_merge.evaluation import passes
from evojax_merge.evaluation.batched_tasks import BatchedTask, halve_batches
from evojax_merge.evaluation.devices import ONE_DEVICE, Devices, free_memory
from evojax_merge.evaluation.generation import Continuations, generate
from evojax_merge.evaluation.memory import is_out_of_memory
from evojax_merge.evaluation.passes import LazyMergeFactory, TracedPass
from evojax_merge.evaluation.populations import MergeParts, MergePopulation, Population, StreamedPopulation, stored
from evojax_merge.evaluation.programs import Each, Evaluation, Job, Program
from evojax_merge.evaluation.responses import arrays_of, score_task
from evojax_merge.evaluation.routes.whole import MATERIALISE_FRACTION
from evojax_merge.evaluation.scores import PLAIN, Goal, TaskScores, joined, task_weights
from evojax_merge.evaluation.targets import Target, live_target
from evojax_merge.models.bank import Bank, MergeSpec, Recipe
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.images import ImageInputs, ImageTable
from evojax_merge.models.sources import DifferentiableMerge, StackedWeights
from evojax_merge.models.streamed_bank import StreamedBank
from evojax_merge.tasks.batches import PromptBatch, ScoringBatch
from evojax_merge.tasks.task import Task

Progress = Callable[[int], None]


def compiled_temporary_bytes(traced: TracedPass) -> int | None:
    """Bytes beyond its arguments and results that a pass needs on a device, as the compiler reports; None where it
    reports nothing."""
    memory = traced.lower().compile().memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def no_progress(done: int) -> None:
    """Drop the progress of an evaluation."""


@dataclass(frozen=True)
class TaskImages:
    """The images that a task's passes take: None, each, for a task of texts. before: int32[H], the tokens of the prefix
    that all rows share."""

    table: ImageTable | None

    def of_prefix(self, before: np.ndarray) -> ImageInputs | None:
        positions = np.arange(len(before), dtype=np.int32)[None]
        return self._inputs(before[None], positions, np.zeros_like(positions), before[:0])

    def of_rows(self, before: np.ndarray, batch: ScoringBatch) -> ImageInputs | None:
        return self._inputs(batch.tokens, batch.positions, batch.segment_ids, before)

    def of_prompts(self, before: np.ndarray, tokens: np.ndarray, left_pad: np.ndarray) -> ImageInputs | None:
        """tokens: int32[B, T], of a group of prompts; left_pad: int32[B]."""
        offsets = np.arange(tokens.shape[1]) - left_pad[:, None]
        return self._inputs(tokens, len(before) + np.maximum(offsets, 0), np.minimum(offsets, 0), before)

    def shift(self, before: np.ndarray, batch: PromptBatch) -> np.ndarray | None:
        """The shift of the positions behind a batch of prompts (see `decoder.decode_step`)."""
        if self.table is None or self.table.positions is None:
            return None
        return self.table.positions.shift(batch.tokens) + self.table.positions.shift(before)

    def _inputs(
        self, tokens: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray, before: np.ndarray
    ) -> ImageInputs | None:
        return None if self.table is None else self.table.inputs(tokens, positions, segment_ids, before)


@dataclass
class Evaluator:
    """Scores populations, and stored models, on one set of requests.

    `chunk`: the number of candidates that share a pass on a device; None chooses it. `log` receives each choice.
    Choices that depend on the kind of device are made for `target`; `free_memory`: bytes that a pass may use on a
    device beyond what is loaded; `temporary_bytes`: the bytes that a traced pass needs beyond its arguments;
    `images`: those of the tasks, None where there are none.
    """

    config: DecoderConfig
    tokenizer: Any
    batched_tasks: list[BatchedTask]
    compute_dtype: str = "float32"
    chunk: int | None = None
    devices: Devices = ONE_DEVICE
    log: Callable[[str], None] = lambda text: None
    # By task and kind of pass: the chunk that was chosen.
    chunk_sizes: dict[Any, int] = field(default_factory=dict)
    # By task: int32[N, …], the last candidates' outputs after each prompt.
    lookup_corpus: dict[str, np.ndarray] = field(default_factory=dict)
    target: Target = field(default_factory=live_target)
    free_memory: Callable[[], int] = free_memory
    temporary_bytes: Callable[[TracedPass], int | None] = compiled_temporary_bytes
    images: ImageTable | None = None

    @property
    def tasks(self) -> list[Task]:
        return [batched_task.task for batched_task in self.batched_tasks]

    def passes(self, population: int) -> int:
        """The steps of progress that an evaluation reports."""
        return sum(batched_task.batches for batched_task in self.batched_tasks) * population

    def images_of(self, batched_task: BatchedTask) -> TaskImages:
        return TaskImages(self.images if batched_task.has_images else None)

    def batch_arrays(self, batched_task: BatchedTask, batch: ScoringBatch) -> dict[str, Any]:
        """The arrays of a batch of a task's scored rows, its `images` among them where it has any."""
        assert batched_task.scoring is not None
        images = self.images_of(batched_task).of_rows(batched_task.scoring.shared_prefix, batch)
        return arrays_of(batch) | ({} if images is None else {"images": images})

    def subset(self, examples: Sequence[np.ndarray]) -> "Evaluator":
        """The same on some of the examples: for each of the tasks int[M], ascending. The batches keep their shapes, so
        that nothing is compiled for them."""
        chosen = [
            batched_task.subset(indices) for batched_task, indices in zip(self.batched_tasks, examples, strict=True)
        ]
        return replace(self, batched_tasks=chosen, lookup_corpus={})

    def score(self, population: Population, progress: Progress = no_progress) -> TaskScores:
        """Score a population: the tasks' scores from the responses to their rows, and from the continuations of their
        prompts, which are generated here."""
        scores = TaskScores({})
        written: dict[Hashable, Continuations] = {}
        score = partial(population.route.score, self, population)
        for numbers in population.route.groups(range(len(self.batched_tasks))):
            for i, responses in zip(numbers, self.run(numbers, score, progress), strict=True):
                task, requests = self.batched_tasks[i].task, self.batched_tasks[i].requests
                asked, prompts = requests.generated, self.batched_tasks[i].prompts
                if asked not in written:
                    written[asked] = self.run([i], partial(generate, self, population), progress)
                elif prompts is not None:
                    progress(len(prompts.batches) * population.size)
                texts, lengths, nonfinite = written[asked].texts, written[asked].lengths, written[asked].nonfinite
                if population.finite is not None:
                    nonfinite = nonfinite | ~population.finite
                answers = replace(responses, texts=texts, lengths=lengths)
                scores.matrices[task.name] = score_task(task, answers, nonfinite)
                if requests.prompts:
                    scores.outputs[task.name] = texts
                if requests.scored:
                    scores.log_probabilities[task.name] = responses.totals
        return scores

    def differentiate(
        self, population: Population, progress: Progress = no_progress, goal: Goal = PLAIN
    ) -> tuple[TaskScores, Any]:
        """Score P candidates, and differentiate the fitness of each with respect to its arrays, float32. The scores
        are only those of the tasks' fitness. NaN where a candidate failed. Every task that counts must have a
        derivative."""
        matrices, gradient = {}, jax.tree.map(np.zeros_like, population.candidates)
        for group in population.route.groups(task_weights(self.tasks, goal)):
            numbers = [self.tasks.index(task) for task, _ in group]
            weights = [weight for _, weight in group]
            differentiate = partial(population.route.differentiate, self, population, weights)
            responses, part = self.run(numbers, differentiate, progress)
            for (task, _), answered in zip(group, responses, strict=True):
                scored = score_task(task, answered, np.zeros(len(answered.totals), bool))
                matrices[task.name] = {task.metric: scored[task.metric]}
            gradient = jax.tree.map(np.add, gradient, part)
        return TaskScores(matrices), gradient

    def merges(self, bank: Bank | StreamedBank, spec: MergeSpec, recipes: Recipe) -> Population:
        """P merges of a bank (recipes with a leading axis P on every leaf), by the route that the bank's place asks
        for."""
        # Recipes on the host are cut into chunks without compiling anything.
        recipes = jax.tree.map(np.asarray, recipes)
        if isinstance(bank, StreamedBank):
            lazy, parts = LazyMergeFactory(spec, self.compute_dtype), MergeParts(bank)
            return StreamedPopulation(lazy, parts, recipes, gradient=replace(lazy, kind=DifferentiableMerge))
        prefetch_layers = not self.target.is_accelerator
        return MergePopulation(LazyMergeFactory(spec, self.compute_dtype, prefetch_layers), bank, recipes)

    def score_stored(self, model: StackedWeights, progress: Progress = no_progress) -> TaskScores:
        """Score one stored model: a population of one."""
        # Every group of devices would compute the same.
        alone = replace(self, chunk=1, devices=ONE_DEVICE, chunk_sizes={})
        return alone.score(stored(model, self.config), progress)

    def run(self, numbers: Sequence[int], evaluation: Callable[..., Evaluation], progress: Progress) -> Any:
        """The result of an evaluation of the tasks `numbers`; where it is out of memory, it runs again with half the
        candidates or rows in a pass, until it fits. evaluation: takes the batched tasks, and `progress`. Raises Failed
        where one candidate and one row do not fit."""
        while True:
            done = 0

            def count(passes: int) -> None:
                nonlocal done
                done += passes
                progress(passes)

            try:
                return execute(evaluation(*(self.batched_tasks[i] for i in numbers), progress=count))
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                halved = [self.halve(i) for i in numbers]
                if not any(halved):
                    names = ", ".join(self.batched_tasks[i].task.name for i in numbers)
                    raise Failed(
                        f"{names}: out of memory with one candidate and one row a pass "
                        f"({self.free_memory() / 1e6:,.0f} MB are free); take shorter examples or smaller models"
                    ) from error
                # Passes that run again are not counted twice.
                progress(-done)

    def halve(self, i: int) -> bool:
        """Take half the candidates of a task, or half its rows, in a pass from now on. Return False where it is one of
        each."""
        batched_task, halved = self.batched_tasks[i], False
        for key, chunk in self.chunk_sizes.items():
            if key[0] == batched_task.task.name and chunk > 1:
                self.chunk_sizes[key], halved = chunk // 2, True
                self.log(
                    f"{batched_task.task.name}: out of memory with {chunk} candidates a pass; "
                    f"going on with {chunk // 2}"
                )
        less = None if halved else halve_batches(batched_task)
        if less is not None:
            self.log(
                f"{batched_task.task.name}: out of memory; going on with batches of {less.tokens_per_batch} tokens"
            )
            self.batched_tasks = [*self.batched_tasks[:i], less, *self.batched_tasks[i + 1 :]]
        return halved or less is not None

    def runs_two_jobs(self, model: int) -> bool:
        """Return whether two jobs, for candidates that take `model` bytes each, run in threads of their own: on a CPU,
        where there is room for both. Processes that share their devices' passes must ask for them in the same order."""
        alone = self.devices.mesh is None and not self.target.is_accelerator
        return alone and 2 * model <= MATERIALISE_FRACTION * self.free_memory()


def execute(evaluation: Evaluation) -> Any:
    """Run an evaluation, and return its result. Each job is started before the one before it is waited for, and no
    more, so that an interruption does not wait long.

    An accelerator queues its work, and only has to be kept busy. A CPU runs the work of one thread one after the other,
    and leaves cores idle wherever there is little to do: there jobs may have threads of their own.
    """
    cancelled = Event()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2))
        stack.callback(cancelled.set)
        running: deque[tuple[Each, Any]] = deque()
        sent: Any = None
        try:
            while True:
                item = evaluation.send(sent)
                sent = None
                if isinstance(item, Program):
                    sent = run_program(item, cancelled)
                else:
                    for job in item.jobs:
                        outcome = pool.submit(_finish, job, cancelled) if item.threads else _run(job, cancelled)
                        running.append((item, outcome))
                        while len(running) > 1:
                            sent = _take(running, sent)
                    while item.keep is not None and running:
                        sent = _take(running, sent)
                # Its arrays may be freed while the next program is made.
                del item
        except StopIteration as end:
            while running:
                _take(running, None)
            return end.value


def run_program(program: Program, cancelled: Event) -> Any:
    """The results of a program on its arguments. `cancelled` ends a loop before it is done."""
    if program.loop is None:
        results = program.function(*program.arguments)
    else:
        results = program.first
        while not cancelled.is_set() and (arguments := program.loop(results)) is not None:
            results = program.function(*arguments)
    if program.read is not None:
        program.read(results)
    return results


def _run(job: Job, cancelled: Event) -> Any:
    """Run a job's programs. Nobody waits for its result once `cancelled` is set."""
    results = None
    try:
        while not cancelled.is_set():
            results = run_program(job.send(results), cancelled)
    except StopIteration as end:
        return end.value
    job.close()
    return None


def _finish(job: Job, cancelled: Event) -> Any:
    return jax.block_until_ready(_run(job, cancelled))


def _take(running: deque[tuple[Each, Any]], total: Any) -> Any:
    """Wait for the first of the running jobs, and read it. Return the sum that is kept with it."""
    each, outcome = running.popleft()
    result = outcome.result() if isinstance(outcome, Future) else outcome
    each.read(result)
    if each.keep is None:
        return total
    part = each.keep(result)
    return part if total is None else passes.add(total, part)


# (the evaluator, what candidates are made of, candidates) -> their populations: more than one where memory has no room
# for all.
Populations = Callable[[Evaluator, Any, Any], Iterable[Population]]


@dataclass(frozen=True)
class PopulationEvaluator:
    """Scores candidates of one kind, which `populations` makes of a bank, on the requests of an evaluator."""

    evaluator: Evaluator
    bank: Any
    populations: Populations

    @property
    def tasks(self) -> list[Task]:
        return self.evaluator.tasks

    def passes(self, population: int) -> int:
        return self.evaluator.passes(population)

    def subset(self, examples: Sequence[np.ndarray]) -> Self:
        """The same on some of the examples: for each of the tasks int[M], ascending."""
        return replace(self, evaluator=self.evaluator.subset(examples))

    def evaluate(self, candidates: Any, progress: Progress = no_progress) -> TaskScores:
        parts = []
        for population in self.populations(self.evaluator, self.bank, candidates):
            parts.append(self.evaluator.score(population, progress))
        return joined(parts)

    def value_and_gradient(
        self, candidates: Any, progress: Progress = no_progress, goal: Goal = PLAIN
    ) -> tuple[TaskScores, Any]:
        """Scores, and the derivative of each candidate's fitness with respect to its arrays, float32."""
        (population,) = self.populations(self.evaluator, self.bank, candidates)
        return self.evaluator.differentiate(population, progress, goal)
