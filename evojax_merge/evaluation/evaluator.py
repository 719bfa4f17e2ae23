"""The evaluator: every candidate of a population on every example of the tasks, in compiled batched passes.

The result for a task is a score matrix `float32[P, N]`; fitness is a reduction of it. Scoring streams: a candidate's
layers are merged inside the forward pass and never exist together, unless several passes would do the merge again and
there is room to keep it. Generation materialises a chunk of candidates first, and drafts tokens from the outputs of
earlier candidates. The number of candidates that share a pass (the *chunk*), and of rows, is chosen from the memory
that the compiler reports; a pass that runs out of memory is retried with less.
"""

import math
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import NamedSharding

from evojax_merge.errors import Failed, shown
from evojax_merge.evaluation import passes
from evojax_merge.evaluation.batched_tasks import BatchedTask, halve_batches
from evojax_merge.evaluation.devices import (
    ONE_DEVICE,
    AnyMesh,
    Devices,
    free_memory,
    on_host,
    pad_chunk,
    placed,
    size_of,
    tree_nbytes,
)
from evojax_merge.evaluation.memory import is_out_of_memory
from evojax_merge.evaluation.passes import (
    DecodeSpec,
    DifferentiableFactory,
    LazyMergeFactory,
    PerCandidateModel,
    SharedModel,
    TracedPass,
    WeightsFactory,
    abstract_results,
    trace,
)
from evojax_merge.evaluation.planned_passes import JaxprReader, abstract_result, merge_bytes
from evojax_merge.evaluation.programs import (
    CAST,
    DECODE,
    GRADIENT,
    MATERIALISE,
    PREFILL,
    PREFIX,
    PREFIX_GRADIENT,
    RECIPE_GRADIENT,
    SCORE,
    START,
    SUM,
    UNSTACK,
    Each,
    Evaluation,
    Job,
    Program,
    execute,
)
from evojax_merge.evaluation.scores import PLAIN, Goal, TaskScores, task_weights
from evojax_merge.evaluation.targets import Target, live_target
from evojax_merge.models.bank import Bank, MergeSpec, Recipe
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import CacheUpdate, KVCache, scatter_columns, select_columns
from evojax_merge.models.generate import NONFINITE_ID, PAD_ID, DecodeState
from evojax_merge.models.images import ImageInputs, ImageTable
from evojax_merge.models.sources import StackedWeights
from evojax_merge.tasks.batches import PromptBatch, ScoringBatch
from evojax_merge.tasks.task import Responses, Task, TaskRequests, cut_at_stop

Progress = Callable[[int], None]

# Decode steps between two checks for stop texts.
STOP_CHECK_INTERVAL = 32
# The most tokens of a sequence in one decode step, draft tokens included; and the tokens of all sequences for which a
# step does not take much longer than for one, where the target's peak and bandwidth do not give that number.
MAX_STEP_TOKENS = 8
CPU_STEP_TOKENS, ACCELERATOR_STEP_TOKENS = 8, 256
# The number of candidates whose outputs are kept as the lookup corpus for the next ones' draft tokens.
LOOKUP_CANDIDATES = 2
# Fraction of the free memory that materialised or unstacked candidates may take.
MATERIALISE_FRACTION = 1 / 8
# Bytes of the materialised candidates that decode together on a CPU: its cache may hold them.
CPU_CACHE_BYTES = 32 * 2**20


def compiled_temporary_bytes(traced: TracedPass) -> int | None:
    """Bytes beyond its arguments and results that a pass needs on a device, as the compiler reports; None where it
    reports nothing."""
    memory = traced.lower().compile().memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def score_task(task: Task, answers: Responses, nonfinite: np.ndarray) -> dict[str, np.ndarray]:
    """Metric -> float32[P, N]; NaN for candidates whose answers are not finite. nonfinite: bool[P], the candidates
    whose generation had logits that are not finite. Raises Failed where the task's scores are of another form."""
    failed = nonfinite | ~np.isfinite(answers.totals).all(axis=1)
    scores: Any = task.score(answers)
    if not isinstance(scores, Mapping) or task.metric not in scores:
        raise Failed(f"task {task.name}: score returned {shown(scores)}; expected arrays by metric, {task.metric} too")
    for metric, matrix in scores.items():
        shape = (len(failed), task.size)
        if np.shape(matrix) != shape or np.asarray(matrix).dtype.kind not in "fiub":
            what = f"an array of shape {list(np.shape(matrix))}" if isinstance(matrix, np.ndarray) else shown(matrix)
            raise Failed(f"task {task.name}: score returned {what} as {metric}; expected numbers {list(shape)}")
    return {metric: np.where(failed[:, None], np.nan, matrix).astype(np.float32) for metric, matrix in scores.items()}


def arrays_of(batch: ScoringBatch) -> dict[str, np.ndarray]:
    """The batch's arrays, by name, as arguments of a compiled pass."""
    return vars(batch) | {"rows": batch.rows.astype(np.int32)}


def enter_rows(matrix: np.ndarray, rows: np.ndarray, batch: ScoringBatch, values: Any) -> None:
    """Enter the values of a pass for the candidates `rows` and a batch, [>= len(rows), R], in `matrix: [P, S]`."""
    real = batch.rows >= 0
    matrix[np.ix_(rows, batch.rows[real])] = on_host(values)[: len(rows), real]


def _beside(values: np.ndarray, array: jax.Array) -> jax.Array:
    """Values in the place of an array on its devices."""
    sharding = array.sharding
    return placed(values, sharding) if isinstance(sharding, NamedSharding) else jax.device_put(values, sharding)


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
class Source:
    """A chunk of candidates as arguments of a program: the factory of their models, their shared arrays, and the arrays
    of each. holds: the weights that were materialised for it; merge_bytes: see `Program`, of one that it is scored
    by."""

    factory: Any
    replicated: Any
    candidates: Any
    holds: Any = ()
    merge_bytes: Callable[[Any], int] = lambda results: 0

    @property
    def arguments(self) -> tuple[Any, Any]:
        return self.replicated, self.candidates

    @property
    def size(self) -> int:
        return size_of(self.candidates)


# A generator that yields the programs that make a chunk's source, and returns it.
Sourcing = Generator[Program, Any, Source]


@dataclass(frozen=True)
class Population:
    """P candidates: their shared arrays, the arrays of each (leading axis P, on the host), and the factory that makes a
    model of these."""

    factory: WeightsFactory
    replicated: Any
    candidates: Any

    @property
    def size(self) -> int:
        return size_of(self.candidates)

    def chunks(self, size: int) -> Iterator[tuple[np.ndarray, Any]]:
        """Runs of `size` candidates: their numbers, and their arrays, filled up to one shape."""
        if size == self.size:
            yield np.arange(size), self.candidates
            return
        for begin in range(0, self.size, size):
            rows = np.arange(begin, min(begin + size, self.size))
            yield rows, pad_chunk(self.candidates, rows, size)

    def first(self, size: int) -> Self:
        """The first chunk of `size` candidates as a population."""
        _, candidates = next(Population.chunks(self, size))
        return replace(self, candidates=candidates)

    def source(self, candidates: Any, compute_dtype: str) -> Source:
        """A chunk that is scored without being materialised."""
        return Source(self.factory, self.replicated, candidates)

    def model_shape(self) -> Any:
        """One candidate's shapes where it has to be materialised first; None where it is in memory."""
        return None

    def abstract(self, devices: Devices) -> "Population":
        """The same candidates without arrays that come to the devices part by part: a plan loads nothing."""
        return self

    def materialise(self, mesh: AnyMesh, candidates: Any) -> Sourcing:
        """A chunk that exists as a whole."""
        return Source(self.factory, self.replicated, candidates)
        yield  # A generator without a program.

    def differentiable(self) -> Any:
        """The same candidates, to be differentiated with respect to the arrays of each; None where these are not
        differentiable."""
        return None

    def planned_scoring(self, evaluator: "DecoderEvaluator", batched_task: BatchedTask) -> Evaluation:
        """Score a task's rows for one chunk of candidates, without entering the results anywhere."""
        chunk, nothing = evaluator.scoring_chunk(self, batched_task), np.zeros(0)
        first = self.first(chunk * evaluator.devices.population)
        return evaluator.scoring(first, batched_task, chunk, nothing, nothing, lambda done: None)


@dataclass(frozen=True)
class MergePopulation(Population):
    """P merges of one bank, each described by its recipe."""

    factory: LazyMergeFactory

    def source(self, candidates: Any, compute_dtype: str) -> Source:
        merged = partial(_merge_bytes, self.replicated, compute_dtype, 1)
        return Source(self.factory, self.replicated, candidates, merge_bytes=merged)

    def model_shape(self) -> Any:
        _, candidate = next(Population.chunks(self, 1))
        spec = passes.MaterialiseSpec(self.factory, None)
        return jax.eval_shape(partial(passes.materialise, spec), self.replicated, candidate)

    def materialise(self, mesh: AnyMesh, candidates: Any) -> Sourcing:
        size = size_of(candidates)

        def moved(models: Any) -> int:
            return tree_nbytes(self.replicated) + tree_nbytes(models) // size

        arguments = (passes.MaterialiseSpec(self.factory, mesh), self.replicated, candidates)
        models = yield Program(MATERIALISE, passes.materialise, arguments, size, merge_bytes=moved)
        return Source(PerCandidateModel(), None, models, models)

    def differentiable(self) -> "DifferentiableMerges":
        """The same merges, to be differentiated with respect to their recipes."""
        lazy_factory = self.factory
        factory = DifferentiableFactory(lazy_factory.spec, lazy_factory.compute_dtype, lazy_factory.prefetch_layers)
        return DifferentiableMerges(factory, self.replicated, self.candidates)


def _merge_bytes(bank: Bank, compute_dtype: str, times: int, results: Any) -> int:
    return times * merge_bytes(bank, compute_dtype)


@dataclass(frozen=True)
class DifferentiablePopulation(Population):
    """P candidates, to be differentiated with respect to the arrays of each."""

    def to_score(self) -> Population:
        """The same candidates, not to be differentiated."""
        return self

    def planned_gradient(self, evaluator: "DecoderEvaluator", batched_task: BatchedTask) -> Evaluation:
        """Differentiate a task's rows for one chunk of candidates, without entering the results anywhere."""
        size, nothing = evaluator.gradient_chunk(self, batched_task) * evaluator.devices.population, np.zeros(0)
        weights, first = np.zeros((size, len(batched_task.requests.scored)), np.float32), self.first(size)
        return evaluator.differentiating(
            self, batched_task, np.arange(size), first.candidates, weights, nothing, nothing, lambda done: None
        )

    def pull_back(self, mesh: AnyMesh, candidates: Any, cotangents: Any, holds: Any) -> Job:
        """The derivative with respect to candidates, float32, of a function whose derivatives with respect to their
        materialised weights are `cotangents`. holds: what is in memory meanwhile."""
        return cotangents
        yield  # A generator without a program.


@dataclass(frozen=True)
class DifferentiableMerges(DifferentiablePopulation):
    """P merges of one bank, to be differentiated with respect to their recipes."""

    factory: DifferentiableFactory

    def to_score(self) -> MergePopulation:
        factory = LazyMergeFactory(self.factory.spec, self.factory.compute_dtype, self.factory.prefetch_layers)
        return MergePopulation(factory, self.replicated, self.candidates)

    def source(self, candidates: Any, compute_dtype: str) -> Source:
        # Merged, and merged again by the derivative, which then reads the sources once more.
        merged = partial(_merge_bytes, self.replicated, compute_dtype, 3)
        return Source(self.factory, self.replicated, candidates, merge_bytes=merged)

    def model_shape(self) -> Any:
        """One candidate's shapes, in the dtype of its computation, which is that of its gradient."""
        dtype = self.factory.compute_dtype
        return jax.eval_shape(lambda model: passes.to_dtype(model, dtype), self.to_score().model_shape())

    def materialise(self, mesh: AnyMesh, candidates: Any) -> Sourcing:
        source = yield from self.to_score().materialise(mesh, candidates)
        if self.factory.spec.export_dtype == self.factory.compute_dtype:
            return source
        # Cast once, not in every pass; and derivatives are not rounded to the export dtype in each of them.
        arguments = (source.candidates, self.factory.compute_dtype)
        models = yield Program(CAST, passes.to_dtype, arguments, source.size, holds=source.holds)
        return Source(source.factory, None, models, models)

    def pull_back(self, mesh: AnyMesh, candidates: Any, cotangents: Any, holds: Any) -> Job:
        size = size_of(candidates)

        def moved(gradient: Any) -> int:
            # Each layer is merged again, and its derivative reads its sources and the merge's cotangents.
            return 2 * (tree_nbytes(self.replicated) + tree_nbytes(cotangents) // size)

        spec = passes.MaterialiseSpec(self.factory, mesh)
        arguments = (spec, self.replicated, (candidates, cotangents))
        return (yield Program(RECIPE_GRADIENT, passes.recipe_gradient, arguments, size, holds=holds, merge_bytes=moved))


@dataclass(frozen=True)
class ModelPopulation(Population):
    """P models that are in memory, on the host."""

    factory: PerCandidateModel

    def chunks(self, size: int) -> Iterator[tuple[np.ndarray, Any]]:
        """A chunk goes to the device once, not with every batch."""
        for rows, models in super().chunks(size):
            yield rows, jax.device_put(models)


class _TooLarge(Exception):
    """The compiler says that not even one candidate's pass fits."""


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, _TooLarge) or is_out_of_memory(error)


@dataclass
class DecoderEvaluator:
    """Scores populations of merges of one bank, and stored models, on one set of requests.

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

    @property
    def _prefetch_layers(self) -> bool:
        return not self.target.is_accelerator

    def passes(self, population: int) -> int:
        """The steps of progress that an evaluation reports."""
        return sum(batched_task.batches for batched_task in self.batched_tasks) * population

    def _images_of(self, batched_task: BatchedTask) -> ImageTable | None:
        """The images that a task's passes take; None for a task of texts."""
        return self.images if batched_task.has_images else None

    def batch_images(self, batched_task: BatchedTask, batch: ScoringBatch) -> ImageInputs | None:
        """The images of a batch of a task's scored rows."""
        table, scoring = self._images_of(batched_task), batched_task.scoring
        if table is None or scoring is None:
            return None
        return table.inputs(batch.tokens, batch.positions, batch.segment_ids, scoring.shared_prefix)

    def prefix_images(self, batched_task: BatchedTask, shared_prefix: np.ndarray) -> ImageInputs | None:
        """The images of the prefix that a task's rows share."""
        table, positions = self._images_of(batched_task), np.arange(len(shared_prefix), dtype=np.int32)[None]
        if table is None:
            return None
        return table.inputs(shared_prefix[None], positions, np.zeros_like(positions), shared_prefix[:0])

    def _prompt_images(
        self, batched_task: BatchedTask, before: np.ndarray, tokens: np.ndarray, left_pad: np.ndarray
    ) -> ImageInputs | None:
        """The images of a group of a task's prompts, which follow the tokens `before`."""
        table, offsets = self._images_of(batched_task), np.arange(tokens.shape[1]) - left_pad[:, None]
        if table is None:
            return None
        return table.inputs(tokens, len(before) + np.maximum(offsets, 0), np.minimum(offsets, 0), before)

    def _shift(self, batched_task: BatchedTask, before: np.ndarray, batch: PromptBatch) -> np.ndarray | None:
        """The shift of the positions behind a batch of prompts, which follow the tokens `before` (see
        `decoder.decode_step`)."""
        table = self._images_of(batched_task)
        if table is None or table.positions is None:
            return None
        return table.positions.shift(batch.tokens) + table.positions.shift(before)

    def batch_arrays(self, batched_task: BatchedTask, batch: ScoringBatch) -> dict[str, Any]:
        """The arrays of a batch of a task's scored rows, its `images` among them where it has any."""
        images = self.batch_images(batched_task, batch)
        return arrays_of(batch) | ({} if images is None else {"images": images})

    def subset(self, examples: Sequence[np.ndarray]) -> "DecoderEvaluator":
        """The same on some of the examples: for each of the tasks int[M], ascending. The batches keep their shapes, so
        that nothing is compiled for them."""
        chosen = [
            batched_task.subset(indices) for batched_task, indices in zip(self.batched_tasks, examples, strict=True)
        ]
        return replace(self, batched_tasks=chosen, lookup_corpus={})

    def population(
        self, bank: Bank, spec: MergeSpec, recipes: Recipe, progress: Progress = lambda done: None
    ) -> TaskScores:
        """Score P recipes (leading axis P on every leaf)."""
        # Recipes on the host are cut into chunks without compiling anything.
        recipes = jax.tree.map(np.asarray, recipes)
        return self._evaluate(self.merges(bank, spec, recipes), progress)

    def merges(self, bank: Bank, spec: MergeSpec, recipes: Recipe) -> MergePopulation:
        """P merges in the form that this evaluator scores: recipes on the host, leading axis P on every leaf."""
        return MergePopulation(LazyMergeFactory(spec, self.compute_dtype, self._prefetch_layers), bank, recipes)

    def population_gradient(
        self, bank: Bank, spec: MergeSpec, recipes: Recipe, progress: Progress = lambda done: None, goal: Goal = PLAIN
    ) -> tuple[TaskScores, Recipe]:
        """Score P recipes (leading axis P on every leaf), and differentiate the fitness of each with respect to its
        numbers: a recipe of derivatives, float32 (see `differentiated`)."""
        population = self.merges(bank, spec, jax.tree.map(np.asarray, recipes)).differentiable()
        return self.differentiated(population, progress, goal)

    def differentiated(
        self, population: DifferentiablePopulation, progress: Progress = lambda done: None, goal: Goal = PLAIN
    ) -> tuple[TaskScores, Any]:
        """Score P candidates, and differentiate the fitness of each with respect to its arrays, float32. The scores
        are only those of the tasks' fitness. NaN where a candidate failed. Every task that counts must have a
        derivative."""
        scores, gradient = TaskScores({}), jax.tree.map(np.zeros_like, population.candidates)
        for task, weight in task_weights(self.tasks, goal):
            i = self.tasks.index(task)
            matrices, part = self.retry_on_oom(i, partial(self._gradient, population, weight), progress)
            scores.matrices[task.name] = matrices
            gradient = jax.tree.map(np.add, gradient, part)
        return scores, gradient

    def stored(self, model: StackedWeights, progress: Progress = lambda done: None) -> TaskScores:
        """Score one stored model: a population of one."""
        # Every group of devices would compute the same.
        alone = replace(self, chunk=1, devices=ONE_DEVICE, chunk_sizes={})
        return alone._evaluate(Population(SharedModel(), model, np.zeros(1)), progress)

    def models(self, models: StackedWeights, progress: Progress = lambda done: None) -> TaskScores:
        """Score P models that are in memory, on the host (leading axis P on every leaf)."""
        return self._evaluate(ModelPopulation(PerCandidateModel(), None, models), progress)

    def generate_stacked(
        self, model: StackedWeights, batched_task: BatchedTask, progress: Progress
    ) -> tuple[list[str], bool]:
        """One stored model's continuations of a task's prompts, and whether its logits were not finite."""
        texts, nonfinite = self._generate(Population(SharedModel(), model, np.zeros(1)), batched_task, progress)
        return texts[0], bool(nonfinite[0])

    def _evaluate(self, population: Population, progress: Progress) -> TaskScores:
        scored = (
            self.retry_on_oom(i, partial(self._score, population), progress) for i in range(len(self.batched_tasks))
        )
        return self.with_texts(population, scored, progress)

    def with_texts(
        self, population: Population, scored: Iterable[tuple[np.ndarray, np.ndarray]], progress: Progress
    ) -> TaskScores:
        """The tasks' scores from the answers to their scored rows (for each task, float32[P, S] and bool[P, S]), and
        from the continuations of their prompts, which are generated here."""
        scores = TaskScores({})
        written: dict[Hashable, tuple[list[list[str]], np.ndarray]] = {}
        for i, (totals, greedy) in enumerate(scored):
            task, requests = self.batched_tasks[i].task, self.batched_tasks[i].requests
            # Requests that several tasks share, such as the accuracy and the brevity of one answer, are generated once.
            asked = (requests.prompts, requests.max_new_tokens, requests.stop)
            prompts = self.batched_tasks[i].prompts
            if asked not in written:
                written[asked] = self.retry_on_oom(i, partial(self._generate, population), progress)
            elif prompts is not None:
                progress(len(prompts.batches) * population.size)
            texts, nonfinite = written[asked]
            counts = np.array([len(row.tokens) - row.start for row in requests.scored])
            scores.matrices[task.name] = score_task(task, Responses(totals, counts, greedy, texts), nonfinite)
            if requests.prompts:
                scores.outputs[task.name] = texts
            if requests.scored:
                scores.log_probabilities[task.name] = totals
        return scores

    def retry_on_oom(self, i: int, run: Callable[[BatchedTask, Progress], Any], progress: Progress) -> Any:
        """Run request i; where that is out of memory, with half the candidates or rows in a pass, until it fits. Raises
        Failed where one candidate and one row do not fit."""
        return self._retry([i], lambda count: run(self.batched_tasks[i], count), progress)

    def retry_together(self, run: Callable[[Progress], Any], progress: Progress) -> Any:
        """Like `retry_on_oom`, for all requests in one evaluation."""
        return self._retry(range(len(self.batched_tasks)), run, progress)

    def _retry(self, numbers: Sequence[int], run: Callable[[Progress], Any], progress: Progress) -> Any:
        while True:
            done = 0

            def count(passes: int) -> None:
                nonlocal done
                done += passes
                progress(passes)

            try:
                return run(count)
            except (jax.errors.JaxRuntimeError, MemoryError, _TooLarge) as error:
                if not _out_of_memory(error):
                    raise
                halved = [self._halve(i) for i in numbers]
                if not any(halved):
                    names = ", ".join(self.batched_tasks[i].task.name for i in numbers)
                    raise Failed(
                        f"{names}: out of memory with one candidate and one row a pass "
                        f"({self.free_memory() / 1e6:,.0f} MB are free); take shorter examples or smaller models"
                    ) from error
                # Passes that run again are not counted twice.
                progress(-done)

    def _halve(self, i: int) -> bool:
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

    # -----------------------------------------------------------------------------------------------------------
    # Scored rows

    def _score(
        self, population: Population, batched_task: BatchedTask, progress: Progress
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows' total log-probabilities float32[P, S], and whether they are greedy, bool[P, S]."""
        shape = (population.size, len(batched_task.requests.scored))
        totals, greedy = np.zeros(shape, np.float32), np.zeros(shape, bool)
        if batched_task.scoring is not None:
            chunk = self.scoring_chunk(population, batched_task)
            scoring = self.scoring(population, batched_task, chunk, totals, greedy, progress)
            execute(scoring, self.runs_two_jobs(0))
        return totals, greedy

    def scoring(
        self, population: Population, batched_task: BatchedTask, chunk: int, totals: np.ndarray, greedy: np.ndarray,
        progress: Progress,
    ) -> Evaluation:  # fmt: skip
        """Score a task's rows, `chunk` candidates on each device together; enters the results in `totals` and
        `greedy`, [P, S]."""
        assert batched_task.scoring is not None
        scoring, mesh = batched_task.scoring, self.devices.mesh
        materialised = self.fits_materialised(population, batched_task, chunk)
        for rows, candidates in population.chunks(chunk * self.devices.population):
            source = population.source(candidates, self.compute_dtype)
            if materialised:
                source = yield from population.materialise(mesh, candidates)
            prefix = yield from self._prefix(source, scoring.shared_prefix, batched_task)

            def job(batch: ScoringBatch, source: Source = source, prefix: KVCache | None = prefix) -> Job:
                spec = passes.ScoreSpec(self.config, source.factory, mesh, batched_task.requests.logits_fn)
                arrays = self.batch_arrays(batched_task, batch)
                arguments = (spec, (source.replicated, arrays), (source.candidates, prefix))
                answers = yield Program(
                    SCORE, passes.score, arguments, source.size, holds=(source.holds, prefix),
                    merge_bytes=source.merge_bytes,
                )  # fmt: skip
                return batch, answers

            def read(result: Any, rows: np.ndarray = rows) -> None:
                batch, (part, is_greedy) = result
                enter_rows(totals, rows, batch, part)
                enter_rows(greedy, rows, batch, is_greedy)
                progress(len(rows))

            yield Each(map(job, scoring.batches), read)

    def _prefix(
        self, source: Source, shared_prefix: np.ndarray, batched_task: BatchedTask
    ) -> Generator[Program, Any, KVCache | None]:
        """The KV cache of the prefix that a task's rows share, if there is one."""
        if not shared_prefix.size:
            return None
        spec = passes.PassSpec(self.config, source.factory, self.devices.mesh)
        images = self.prefix_images(batched_task, shared_prefix)
        arguments = (spec, (source.replicated, shared_prefix, images), source.candidates)
        return (
            yield Program(
                PREFIX, passes.prefill_prefix, arguments, source.size, holds=source.holds,
                merge_bytes=source.merge_bytes,
            )
        )  # fmt: skip

    def _gradient(
        self, population: DifferentiablePopulation, weight: float, batched_task: BatchedTask, progress: Progress
    ) -> tuple[dict[str, np.ndarray], Any]:
        """A task's scores of the metric that counts, float32[P, N], and the derivative of `weight` times their mean
        with respect to the candidates' arrays."""
        task, requests = batched_task.task, batched_task.requests
        counts = np.array([len(row.tokens) - row.start for row in requests.scored])
        shape = (population.size, len(counts))
        totals, greedy = np.zeros(shape, np.float32), np.zeros(shape, bool)
        if task.derivative == "nonlinear":
            # The weight of a total depends on the others, which may be in other batches.
            totals, greedy = self._score(population.to_score(), batched_task, lambda done: None)
        slopes = task.score_gradient(Responses(totals, counts, greedy, [])) * (weight / task.size)
        gradient = jax.tree.map(np.zeros_like, population.candidates)
        model = self.devices.candidate_bytes(population.model_shape())
        size = self.gradient_chunk(population, batched_task) * self.devices.population
        for rows, candidates in population.chunks(size):
            weights = pad_chunk(slopes, rows, size)
            differentiating = self.differentiating(
                population, batched_task, rows, candidates, weights, totals, greedy, progress
            )
            part = execute(differentiating, self.runs_two_jobs(model))
            for leaf, leaf_part in zip(jax.tree.leaves(gradient), jax.tree.leaves(part), strict=True):
                leaf[rows] = on_host(leaf_part)[: len(rows)]
        responses = Responses(totals, counts, greedy, [[]] * population.size)
        nobody = np.zeros(population.size, bool)
        return {task.metric: score_task(task, responses, nobody)[task.metric]}, gradient

    def differentiating(
        self, population: DifferentiablePopulation, batched_task: BatchedTask, rows: np.ndarray, candidates: Any,
        weights: np.ndarray, totals: np.ndarray, greedy: np.ndarray, progress: Progress,
    ) -> Evaluation:  # fmt: skip
        """The derivative of a chunk of candidates, float32, of the sum of its totals times `weights: float32[P, S]`;
        enters the results of the candidates `rows` in `totals` and `greedy`."""
        assert batched_task.scoring is not None
        mesh, scoring = self.devices.mesh, batched_task.scoring
        materialised = self.materialises_gradient(population, batched_task, size_of(candidates))
        source = population.source(candidates, self.compute_dtype)
        if materialised:
            source = yield from population.materialise(mesh, candidates)
        prefix = yield from self._prefix(source, scoring.shared_prefix, batched_task)

        def job(batch: ScoringBatch) -> Job:
            real = np.where(batch.rows >= 0, weights[:, batch.rows], 0).astype(np.float32)
            spec = passes.ScoreSpec(self.config, source.factory, mesh, batched_task.requests.logits_fn)
            arrays = self.batch_arrays(batched_task, batch)
            arguments = (spec, (source.replicated, arrays), (source.candidates, prefix, real))
            answers = yield Program(
                GRADIENT, passes.score_gradient, arguments, source.size, holds=(source.holds, prefix),
                merge_bytes=source.merge_bytes,
            )  # fmt: skip
            return batch, answers

        def read(result: Any) -> None:
            batch, ((answers, is_greedy), _) = result
            enter_rows(totals, rows, batch, answers)
            enter_rows(greedy, rows, batch, is_greedy)
            progress(len(rows))

        gradient, cotangents = yield Each(map(job, scoring.batches), read, lambda result: result[1][1])
        holds = (source.holds, prefix, gradient, cotangents)
        if prefix is not None:
            spec = passes.PassSpec(self.config, source.factory, mesh)
            images = self.prefix_images(batched_task, scoring.shared_prefix)
            shared = (source.replicated, scoring.shared_prefix, images)
            arguments = (spec, shared, (source.candidates, cotangents))
            through = yield Program(
                PREFIX_GRADIENT, passes.prefix_gradient, arguments, source.size, holds=holds,
                merge_bytes=source.merge_bytes,
            )  # fmt: skip
            gradient = yield Program(SUM, passes.add, (gradient, through), source.size, is_priced=False)
        if materialised:
            gradient = yield from population.pull_back(mesh, candidates, gradient, holds)
        return gradient

    def gradient_chunk(self, population: DifferentiablePopulation, batched_task: BatchedTask) -> int:
        """The number of candidates that share a pass that is differentiated (see `scoring_chunk`)."""
        key = (batched_task.task.name, "gradients", self._share(population))
        if key not in self.chunk_sizes:
            temporaries = partial(self._gradient_temporaries, population, batched_task)
            self.chunk_sizes[key] = self._fitting_chunk(temporaries, population, batched_task)
        return self.chunk_sizes[key]

    def materialises_gradient(
        self, population: DifferentiablePopulation, batched_task: BatchedTask, candidates: int
    ) -> bool:
        """Return whether so many candidates are materialised before they are differentiated: a layer that is merged
        inside the pass is merged twice, and on a CPU slowly."""
        assert batched_task.scoring is not None
        shape = population.model_shape()
        wanted = shape is not None and (len(batched_task.scoring.batches) > 1 or not self.target.is_accelerator)
        nbytes = candidates // self.devices.population * self.devices.candidate_bytes(shape)
        return wanted and nbytes <= MATERIALISE_FRACTION * self.free_memory()

    def runs_two_jobs(self, model: int) -> bool:
        """Return whether two jobs, for candidates that take `model` bytes each, run in threads of their own: on a CPU,
        where there is room for both. Processes that share their devices' passes must ask for them in the same order."""
        alone = self.devices.mesh is None and not self.target.is_accelerator
        return alone and 2 * model <= MATERIALISE_FRACTION * self.free_memory()

    def _decode_weights(self, source: Source) -> Sourcing:
        """Materialised candidates laid out for decoding: a CPU copies each layer that it picks from a stack, every
        time, so the layers are unstacked once, where there is room."""
        if not self.unstacks_layers(source.arguments):
            return source
        arguments = (self.devices.mesh, *source.arguments)
        unstacked = yield Program(
            UNSTACK, source.factory.unstack, arguments, source.size, holds=source.holds, is_priced=False
        )
        replicated, candidates = unstacked
        return Source(source.factory, replicated, candidates, (source.holds, unstacked))

    def unstacks_layers(self, models: Any) -> bool:
        """Return whether materialised models (arrays or their shapes) are unstacked to decode."""
        return not self.target.is_accelerator and tree_nbytes(models) <= MATERIALISE_FRACTION * self.free_memory()

    def fits_materialised(self, population: Population, batched_task: BatchedTask, chunk: int) -> bool:
        """Return whether a chunk is materialised before it is scored: each pass would redo its merge, so where there
        are several, and room for the chunk, it is done once."""
        if batched_task.scoring is None or len(batched_task.scoring.batches) < 2:
            return False
        model = population.model_shape()
        nbytes = chunk * self.devices.candidate_bytes(model)
        return model is not None and nbytes <= MATERIALISE_FRACTION * self.free_memory()

    def scoring_chunk(self, population: Population, batched_task: BatchedTask) -> int:
        """The largest power of two of candidates whose temporaries, as the compiler reports them, fit a device; 1 on a
        CPU, where sharing a pass is slower than one candidate after the other."""
        key = (batched_task.task.name, "scores", self._share(population))
        if key not in self.chunk_sizes:
            temporaries = partial(self._temporaries, population, batched_task)
            self.chunk_sizes[key] = self._fitting_chunk(temporaries, population, batched_task)
            if self.chunk_sizes[key] > 1:
                self.log(
                    f"{batched_task.task.name}: {self.chunk_sizes[key]} of {population.size} candidates a pass and "
                    f"device, in batches of {batched_task.tokens_per_batch} tokens"
                )
        return self.chunk_sizes[key]

    def _share(self, population: Population) -> int:
        """The most candidates that a device has."""
        return max(1, -(-population.size // self.devices.population))

    def _fitting_chunk(
        self, temporaries: Callable[[int], int | None], population: Population, batched_task: BatchedTask
    ) -> int:
        """The config's chunk, else the largest part of a device's candidates that fits; `temporaries`: see
        `_largest_chunk`."""
        if self.chunk is not None:
            return min(self.chunk, self._share(population))
        if not self.target.is_accelerator:
            return 1
        return self._largest_chunk(temporaries, batched_task, self._share(population))

    def _largest_chunk(self, temporaries: Callable[[int], int | None], batched_task: BatchedTask, most: int) -> int:
        """The largest chunk that fits: passes with one and with two candidates show how much each takes (`temporaries`:
        bytes for a chunk, as the compiler reports); the largest chunk that should fit is then compiled to see whether
        it does. Raises _TooLarge where one candidate does not fit and a batch has more than a row."""
        budget = self.free_memory()
        single = temporaries(1)
        if single is not None and single > budget and halve_batches(batched_task) is not None:
            raise _TooLarge
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

    def _gradient_temporaries(
        self, population: DifferentiablePopulation, batched_task: BatchedTask, chunk: int
    ) -> int | None:
        """Bytes beyond its arguments that the largest pass over a chunk that is differentiated needs on a device (see
        `_temporaries`)."""
        spec, (replicated, batch), (candidates, prefix) = self._largest_pass(population, batched_task, chunk)
        weights = np.zeros((size_of(candidates), len(batch["rows"])), np.float32)
        traced = trace(passes.score_gradient, spec, (replicated, batch), (candidates, prefix, weights))
        return self._pass_bytes(traced, prefix)

    def _temporaries(self, population: Population, batched_task: BatchedTask, chunk: int) -> int | None:
        """Bytes beyond its arguments that the largest pass over a chunk needs on a device; None where the compiler
        reports nothing."""
        spec, shared, each = self._largest_pass(population, batched_task, chunk)
        return self._pass_bytes(trace(passes.score, spec, shared, each), each[1])

    def _largest_pass(self, population: Population, batched_task: BatchedTask, chunk: int) -> tuple[Any, Any, Any]:
        """The arguments of `passes.score` for the largest batch and a chunk."""
        assert batched_task.scoring is not None
        _, candidates = next(population.chunks(chunk * self.devices.population))
        batch = max(batched_task.scoring.batches, key=lambda batch: batch.tokens.size)
        factory, mesh, shared_prefix = population.factory, self.devices.mesh, batched_task.scoring.shared_prefix
        prefix = None
        if shared_prefix.size:
            read = partial(passes.prefill_prefix, passes.PassSpec(self.config, factory, mesh))
            shared = (population.replicated, shared_prefix, self.prefix_images(batched_task, shared_prefix))
            prefix = jax.eval_shape(read, shared, candidates)
        spec = passes.ScoreSpec(self.config, factory, mesh, batched_task.requests.logits_fn)
        return spec, (population.replicated, self.batch_arrays(batched_task, batch)), (candidates, prefix)

    def _pass_bytes(self, traced: TracedPass, prefix: Any) -> int | None:
        temporaries = self.temporary_bytes(traced)
        prefix_bytes = 0 if prefix is None else self.devices.candidate_bytes(prefix) // self.devices.population
        return None if temporaries is None else temporaries + prefix_bytes

    # -----------------------------------------------------------------------------------------------------------
    # Prompts

    def _generate(
        self, population: Population, batched_task: BatchedTask, progress: Progress
    ) -> tuple[list[list[str]], np.ndarray]:
        """P lists of continuations, and bool[P], true for candidates whose logits were not finite."""
        texts = [[""] * len(batched_task.requests.prompts) for _ in range(population.size)]
        nonfinite = np.zeros(population.size, bool)
        if batched_task.prompts is None:
            return texts, nonfinite
        model = self.devices.candidate_bytes(population.model_shape())
        chunk = self.generation_chunk(population, batched_task)
        generating = self.generating(population, batched_task, chunk, texts, nonfinite, progress)
        execute(generating, self.runs_two_jobs(model))
        return texts, nonfinite

    def lookup_corpus_of(self, batched_task: BatchedTask) -> np.ndarray:
        """int32[N, M]: the last candidates' outputs after each prompt, the latest last."""
        nothing = np.full(
            (len(batched_task.requests.prompts), LOOKUP_CANDIDATES * batched_task.requests.max_new_tokens),
            PAD_ID,
            np.int32,
        )
        return self.lookup_corpus.get(batched_task.task.name, nothing)

    def generating(
        self, population: Population, batched_task: BatchedTask, chunk: int, texts: list[list[str]],
        nonfinite: np.ndarray, progress: Progress,
    ) -> Evaluation:  # fmt: skip
        """Continue a task's prompts, `chunk` candidates on each device together; enters the results in `texts` and
        `nonfinite: bool[P]`."""
        task, requests = batched_task.task, batched_task.requests

        def read(result: tuple[np.ndarray, np.ndarray]) -> None:
            rows, tokens = result
            corpus = [self.lookup_corpus_of(batched_task)[:, tokens.shape[2] :], tokens[-1]]
            self.lookup_corpus[task.name] = np.concatenate(corpus, 1)
            nonfinite[rows] = (tokens == NONFINITE_ID).any(axis=(1, 2))
            for row, outputs in zip(rows, self._decoded(tokens), strict=True):
                texts[row] = [cut_at_stop(text, requests.stop) for text in outputs]

        # The corpus of a chunk is made when its job begins.
        jobs = (
            self._generation_job(population, batched_task, rows, candidates, progress)
            for rows, candidates in population.chunks(chunk * self.devices.population)
        )
        yield Each(jobs, read)

    def _generation_job(
        self, population: Population, batched_task: BatchedTask, rows: np.ndarray, candidates: Any, progress: Progress
    ) -> Job:
        """A job that returns its candidates `rows` and their outputs after every prompt, int32[P, N, new]."""
        assert batched_task.prompts is not None
        prompts, requests, lookup_corpus = (
            batched_task.prompts,
            batched_task.requests,
            self.lookup_corpus_of(batched_task),
        )
        outputs = np.full((len(rows), len(requests.prompts), requests.max_new_tokens), PAD_ID, np.int32)

        def job() -> Job:
            source = yield from population.materialise(self.devices.mesh, candidates)
            prefix = yield from self._prefix(source, prompts.shared_prefix, batched_task)
            decoding = yield from self._decode_weights(source)
            for batch in prompts.batches:
                state = yield from self._prefill_batch(source, decoding, prefix, batch, batched_task)

                def read(state: DecodeState, batch: PromptBatch = batch) -> None:
                    real = batch.rows >= 0
                    outputs[:, batch.rows[real]] = on_host(state.tokens)[: len(rows), real]
                    progress(len(rows))

                yield self._decode(decoding, prefix, batch, batched_task, state, lookup_corpus[batch.rows], read)
            return rows, outputs

        return job()

    def _decode_spec(self, factory: Any, batch: PromptBatch, batched_task: BatchedTask) -> DecodeSpec:
        """The static half of the passes that continue a batch of prompts."""
        requests, (rows, width) = batched_task.requests, batch.tokens.shape
        steps = STOP_CHECK_INTERVAL if requests.stop else requests.max_new_tokens
        return DecodeSpec(
            self.config, factory, self.devices.mesh, self.compute_dtype, rows, width, requests.max_new_tokens,
            step_tokens(self.target, batch), steps, row_update(self.target), batched_task.stop,
        )  # fmt: skip

    def _prefill_batch(
        self, source: Source, decoding: Source, prefix: KVCache | None, batch: PromptBatch, batched_task: BatchedTask
    ) -> Generator[Program, Any, DecodeState]:
        """Prefill a batch of prompts, group by group."""
        assert batched_task.prompts is not None
        spec = self._decode_spec(source.factory, batch, batched_task)
        arguments = (spec, None, np.zeros(source.size))
        state = yield Program(START, passes.init_decode, arguments, source.size, is_priced=False)
        before = batched_task.prompts.shared_prefix
        for group in batch.prefill_groups:
            tokens, left_pad = batch.prefill_group(group)
            images = self._prompt_images(batched_task, before, tokens, left_pad)
            shared = (source.replicated, np.int32(group.begin), tokens, left_pad, images)
            holds = (decoding.holds, prefix, state)
            state = yield Program(
                PREFILL, passes.prefill, (spec, shared, (source.candidates, prefix), state), source.size, holds=holds
            )
        return state

    def _decode(
        self, decoding: Source, prefix: KVCache | None, batch: PromptBatch, batched_task: BatchedTask,
        start: DecodeState, lookup_corpus: np.ndarray, read: Callable[[DecodeState], None],
    ) -> Program:  # fmt: skip
        """The program that continues a batch of prompts greedily, up to a stop token or stop text. lookup_corpus:
        int32[B, M], see models.generate."""
        requests, spec = batched_task.requests, self._decode_spec(decoding.factory, batch, batched_task)
        assert batched_task.prompts is not None
        shift = self._shift(batched_task, batched_task.prompts.shared_prefix, batch)
        shared, each = (decoding.replicated, batch.tokens, lookup_corpus, shift), (decoding.candidates, prefix)

        def again(state: DecodeState) -> tuple[Any, ...] | None:
            # Rows that fill up a batch do not matter.
            done = on_host(state.done) | (batch.rows < 0)
            if requests.stop and state is not start and not done.all():
                done = done | self._stopped(on_host(state.tokens), requests)
            if done.all():
                return None
            return spec, shared, each, replace(state, done=_beside(done, state.done))

        # The prefill gives the first token; each further one takes a step, unless draft tokens are accepted.
        return Program(
            DECODE, passes.decode, (spec, shared, each, start), decoding.size, holds=(decoding.holds, prefix, start),
            loop=again, first=start, steps=max(1, requests.max_new_tokens - 1),
            expected_steps=requests.expected_tokens, read=read,
        )  # fmt: skip

    def _stopped(self, tokens: np.ndarray, requests: TaskRequests) -> np.ndarray:
        """bool[P, B]: true where a text holds a stop text."""
        return np.array(
            [[any(word in text for word in requests.stop) for text in row] for row in self._decoded(tokens)]
        )

    def _decoded(self, tokens: np.ndarray) -> list[list[str]]:
        """tokens: int32[P, B, new]. Candidates often agree: each distinct output is decoded once."""
        texts: dict[bytes, str] = {}

        def text(ids: np.ndarray) -> str:
            key = ids.tobytes()
            if key not in texts:
                texts[key] = self.tokenizer.decode(ids[ids >= 0], skip_special_tokens=True)
            return texts[key]

        return [[text(ids) for ids in row] for row in tokens]

    def generation_chunk(self, population: Population, batched_task: BatchedTask) -> int:
        """The number of materialised candidates that fit a device, with their caches; on a CPU the number whose weights
        its cache may hold, on a TPU one."""
        most = max(1, -(-population.size // self.devices.population))
        key = (batched_task.task.name, "texts", most)
        if key not in self.chunk_sizes:
            room = self.chunk or (most if self.target.decodes_together else 1)
            if self.chunk is None and room > 1:
                model, state = self._generation_bytes(population, batched_task)
                room = self.free_memory() // (model + state) if self.target.is_accelerator else CPU_CACHE_BYTES // model
            self.chunk_sizes[key] = int(max(1, min(most, room)))
        return self.chunk_sizes[key]

    def _generation_bytes(self, population: Population, batched_task: BatchedTask) -> tuple[int, int]:
        """Bytes on a device of one materialised candidate, and of the memory that it needs to decode the largest batch
        of prompts."""
        assert batched_task.prompts is not None
        mesh, groups = self.devices.mesh, self.devices.population

        def candidate_bytes(tree: Any) -> int:
            return self.devices.candidate_bytes(tree) // groups

        # One candidate for each group of devices.
        _, candidates = next(population.chunks(groups))
        reader = JaxprReader(self.target, self.devices)
        materialising = population.abstract(self.devices).materialise(mesh, candidates)
        models = abstract_result(materialising, reader).candidates
        if not self.target.is_accelerator:
            return candidate_bytes(models), 0
        batch, shared_prefix = (
            max(batched_task.prompts.batches, key=lambda batch: batch.tokens.size),
            batched_task.prompts.shared_prefix,
        )
        spec, prefix = self._decode_spec(PerCandidateModel(), batch, batched_task), None
        if shared_prefix.size:
            prefix_spec = passes.PassSpec(self.config, spec.factory, mesh)
            images = self.prefix_images(batched_task, shared_prefix)
            read = trace(passes.prefill_prefix, prefix_spec, (None, shared_prefix, images), models)
            prefix = abstract_results(read, self.devices)
        group = max(batch.prefill_groups, key=lambda group: (group.end - group.begin) * group.width)
        state = abstract_results(trace(passes.init_decode, spec, None, np.zeros(groups)), self.devices)
        tokens, left_pad = batch.prefill_group(group)
        images = self._prompt_images(batched_task, shared_prefix, tokens, left_pad)
        shared = (None, np.int32(0), tokens, left_pad, images)
        traced = trace(passes.prefill, spec, shared, (models, prefix), state)
        return candidate_bytes(models), 2 * candidate_bytes(state) + (self.temporary_bytes(traced) or 0)


@dataclass(frozen=True)
class MergeEvaluator:
    """Scores populations of merges of one bank, on the requests of an evaluator."""

    evaluator: DecoderEvaluator
    bank: Any
    spec: MergeSpec

    @property
    def tasks(self) -> list[Task]:
        return self.evaluator.tasks

    def passes(self, population: int) -> int:
        return self.evaluator.passes(population)

    def subset(self, examples: Sequence[np.ndarray]) -> Self:
        """The same on some of the examples: for each of the tasks int[M], ascending."""
        return replace(self, evaluator=self.evaluator.subset(examples))

    def evaluate(self, recipes: Recipe, progress: Progress = lambda done: None) -> TaskScores:
        return self.evaluator.population(self.bank, self.spec, recipes, progress)

    def value_and_gradient(
        self, recipes: Recipe, progress: Progress = lambda done: None, goal: Goal = PLAIN
    ) -> tuple[TaskScores, Recipe]:
        """Scores, and the derivative of each candidate's fitness with respect to its recipe."""
        return self.evaluator.population_gradient(self.bank, self.spec, recipes, progress, goal)
