"""The evaluator: every candidate of a population on every example of the tasks, in compiled batched passes.

The result for a task is a score matrix `float32[P, N]`; fitness is a reduction of it. Scoring streams: a candidate's
layers are merged inside the forward pass and never exist together, unless several passes would do the merge again and
there is room to keep it. Generation materialises a chunk of candidates first, and drafts tokens from the outputs of
earlier candidates. The number of candidates that share a pass (the *chunk*), and of rows, is chosen from the memory
that the compiler reports; a pass that runs out of memory is retried with less.
"""

from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import jax
import numpy as np

from evojax_merge.errors import Failed, shown
from evojax_merge.evaluation import passes
from evojax_merge.evaluation.batched_tasks import BatchedTask, halve_batches
from evojax_merge.evaluation.devices import (
    ONE_DEVICE,
    Devices,
    free_memory,
    on_host,
    pad_chunk,
    size_of,
)
from evojax_merge.evaluation.generation import generate
from evojax_merge.evaluation.memory import is_out_of_memory
from evojax_merge.evaluation.passes import (
    LazyMergeFactory,
    PerCandidateModel,
    TracedPass,
    trace,
)
from evojax_merge.evaluation.populations import (
    MATERIALISE_FRACTION,
    DifferentiablePopulation,
    MergePopulation,
    ModelPopulation,
    Population,
    Source,
    stored,
)
from evojax_merge.evaluation.programs import (
    GRADIENT,
    PREFIX,
    PREFIX_GRADIENT,
    SCORE,
    SUM,
    Each,
    Evaluation,
    Job,
    Program,
    execute,
)
from evojax_merge.evaluation.scores import PLAIN, Goal, TaskScores, task_weights
from evojax_merge.evaluation.targets import Target, live_target
from evojax_merge.evaluation.task_images import TaskImages
from evojax_merge.models.bank import Bank, MergeSpec, Recipe
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import KVCache
from evojax_merge.models.images import ImageTable
from evojax_merge.models.sources import StackedWeights
from evojax_merge.tasks.batches import ScoringBatch
from evojax_merge.tasks.task import Responses, Task

Progress = Callable[[int], None]


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


def score_metric(task: Task, answers: Responses) -> dict[str, np.ndarray]:
    """The scores of the metric that counts, float32[P, N]."""
    return {task.metric: score_task(task, answers, np.zeros(len(answers.totals), bool))[task.metric]}


def slopes_of(task: Task, answers: Responses, weight: float) -> np.ndarray:
    """float32[P, S]: the derivative of `weight` times the mean of a task's scores with respect to its rows' totals."""
    return task.score_gradient(answers) * (weight / task.size)


def arrays_of(batch: ScoringBatch) -> dict[str, np.ndarray]:
    """The batch's arrays, by name, as arguments of a compiled pass."""
    return vars(batch) | {"rows": batch.rows.astype(np.int32)}


def enter(answers: Responses, rows: np.ndarray, batch: ScoringBatch, totals: Any, greedy: Any) -> None:
    """Enter the results of a pass for the candidates `rows` and a batch, each [>= len(rows), R]."""
    real = batch.rows >= 0
    for matrix, values in ((answers.totals, totals), (answers.greedy, greedy)):
        matrix[np.ix_(rows, batch.rows[real])] = on_host(values)[: len(rows), real]


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

    def images_of(self, batched_task: BatchedTask) -> TaskImages:
        """The images that a task's passes take."""
        return TaskImages(self.images if batched_task.has_images else None)

    def batch_arrays(self, batched_task: BatchedTask, batch: ScoringBatch) -> dict[str, Any]:
        """The arrays of a batch of a task's scored rows, its `images` among them where it has any."""
        assert batched_task.scoring is not None
        images = self.images_of(batched_task).of_rows(batched_task.scoring.shared_prefix, batch)
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
        return alone._evaluate(stored(model), progress)

    def models(self, models: StackedWeights, progress: Progress = lambda done: None) -> TaskScores:
        """Score P models that are in memory, on the host (leading axis P on every leaf)."""
        return self._evaluate(ModelPopulation(PerCandidateModel(), None, models), progress)

    def _evaluate(self, population: Population, progress: Progress) -> TaskScores:
        scored = (
            self.retry_on_oom(i, partial(self._score, population), progress) for i in range(len(self.batched_tasks))
        )
        return self.with_texts(population, scored, progress)

    def with_texts(self, population: Population, scored: Iterable[Responses], progress: Progress) -> TaskScores:
        """The tasks' scores from the responses to their rows, and from the continuations of their prompts, which are
        generated here."""
        scores = TaskScores({})
        written: dict[Hashable, tuple[list[list[str]], np.ndarray]] = {}
        for i, answers in enumerate(scored):
            task, requests = self.batched_tasks[i].task, self.batched_tasks[i].requests
            # Requests that several tasks share, such as the accuracy and the brevity of one answer, are generated once.
            asked = (requests.prompts, requests.max_new_tokens, requests.stop)
            prompts = self.batched_tasks[i].prompts
            if asked not in written:
                written[asked] = self.retry_on_oom(i, partial(generate, self, population), progress)
            elif prompts is not None:
                progress(len(prompts.batches) * population.size)
            texts, nonfinite = written[asked]
            scores.matrices[task.name] = score_task(task, replace(answers, texts=texts), nonfinite)
            if requests.prompts:
                scores.outputs[task.name] = texts
            if requests.scored:
                scores.log_probabilities[task.name] = answers.totals
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

    def _score(self, population: Population, batched_task: BatchedTask, progress: Progress) -> Responses:
        """The responses to a task's rows, without texts."""
        answers = batched_task.requests.unanswered(population.size)
        if batched_task.scoring is not None:
            chunk = self.scoring_chunk(population, batched_task)
            scoring = self.scoring(population, batched_task, chunk, answers, progress)
            execute(scoring, self.runs_two_jobs(0))
        return answers

    def scoring(
        self, population: Population, batched_task: BatchedTask, chunk: int, answers: Responses, progress: Progress
    ) -> Evaluation:
        """Score a task's rows, `chunk` candidates on each device together; enters the results in `answers`."""
        assert batched_task.scoring is not None
        scoring, mesh = batched_task.scoring, self.devices.mesh
        materialised = self.fits_materialised(population, batched_task, chunk)
        for rows, candidates in population.chunks(chunk * self.devices.population):
            source = population.source(candidates, self.compute_dtype)
            if materialised:
                source = yield from population.materialise(mesh, candidates)
            prefix = yield from self.read_prefix(source, scoring.shared_prefix, batched_task)

            def job(batch: ScoringBatch, source: Source = source, prefix: KVCache | None = prefix) -> Job:
                spec = passes.ScoreSpec(self.config, source.factory, mesh, batched_task.requests.logits_fn)
                arrays = self.batch_arrays(batched_task, batch)
                arguments = (spec, (source.replicated, arrays), (source.candidates, prefix))
                results = yield Program(
                    SCORE, passes.score, arguments, source.size, holds=(source.holds, prefix),
                    merge_bytes=source.merge_bytes,
                )  # fmt: skip
                return batch, results

            def read(result: Any, rows: np.ndarray = rows) -> None:
                batch, (totals, greedy) = result
                enter(answers, rows, batch, totals, greedy)
                progress(len(rows))

            yield Each(map(job, scoring.batches), read)

    def read_prefix(
        self, source: Source, shared_prefix: np.ndarray, batched_task: BatchedTask
    ) -> Generator[Program, Any, KVCache | None]:
        """The KV cache of the prefix that a task's rows share, if there is one."""
        if not shared_prefix.size:
            return None
        spec = passes.PassSpec(self.config, source.factory, self.devices.mesh)
        images = self.images_of(batched_task).of_prefix(shared_prefix)
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
        answers = batched_task.requests.unanswered(population.size)
        if batched_task.task.derivative == "nonlinear":
            # The weight of a total depends on the others, which may be in other batches.
            answers = self._score(population.to_score(), batched_task, lambda done: None)
        slopes = slopes_of(batched_task.task, answers, weight)
        gradient = jax.tree.map(np.zeros_like, population.candidates)
        model = self.devices.candidate_bytes(population.model_shape())
        size = self.gradient_chunk(population, batched_task) * self.devices.population
        for rows, candidates in population.chunks(size):
            weights = pad_chunk(slopes, rows, size)
            differentiating = self.differentiating(
                population, batched_task, rows, candidates, weights, answers, progress
            )
            part = execute(differentiating, self.runs_two_jobs(model))
            for leaf, leaf_part in zip(jax.tree.leaves(gradient), jax.tree.leaves(part), strict=True):
                leaf[rows] = on_host(leaf_part)[: len(rows)]
        return score_metric(batched_task.task, answers), gradient

    def differentiating(
        self, population: DifferentiablePopulation, batched_task: BatchedTask, rows: np.ndarray, candidates: Any,
        weights: np.ndarray, answers: Responses, progress: Progress,
    ) -> Evaluation:  # fmt: skip
        """The derivative of a chunk of candidates, float32, of the sum of its totals times `weights: float32[P, S]`;
        enters the results of the candidates `rows` in `answers`."""
        assert batched_task.scoring is not None
        mesh, scoring = self.devices.mesh, batched_task.scoring
        materialised = self.materialises_gradient(population, batched_task, size_of(candidates))
        source = population.source(candidates, self.compute_dtype)
        if materialised:
            source = yield from population.materialise(mesh, candidates)
        prefix = yield from self.read_prefix(source, scoring.shared_prefix, batched_task)

        def job(batch: ScoringBatch) -> Job:
            real = np.where(batch.rows >= 0, weights[:, batch.rows], 0).astype(np.float32)
            spec = passes.ScoreSpec(self.config, source.factory, mesh, batched_task.requests.logits_fn)
            arrays = self.batch_arrays(batched_task, batch)
            arguments = (spec, (source.replicated, arrays), (source.candidates, prefix, real))
            results = yield Program(
                GRADIENT, passes.score_gradient, arguments, source.size, holds=(source.holds, prefix),
                merge_bytes=source.merge_bytes,
            )  # fmt: skip
            return batch, results

        def read(result: Any) -> None:
            batch, ((totals, greedy), _) = result
            enter(answers, rows, batch, totals, greedy)
            progress(len(rows))

        gradient, cotangents = yield Each(map(job, scoring.batches), read, lambda result: result[1][1])
        holds = (source.holds, prefix, gradient, cotangents)
        if prefix is not None:
            spec = passes.PassSpec(self.config, source.factory, mesh)
            images = self.images_of(batched_task).of_prefix(scoring.shared_prefix)
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
            shared = (population.replicated, shared_prefix, self.images_of(batched_task).of_prefix(shared_prefix))
            prefix = jax.eval_shape(read, shared, candidates)
        spec = passes.ScoreSpec(self.config, factory, mesh, batched_task.requests.logits_fn)
        return spec, (population.replicated, self.batch_arrays(batched_task, batch)), (candidates, prefix)

    def _pass_bytes(self, traced: TracedPass, prefix: Any) -> int | None:
        temporaries = self.temporary_bytes(traced)
        prefix_bytes = 0 if prefix is None else self.devices.candidate_bytes(prefix) // self.devices.population
        return None if temporaries is None else temporaries + prefix_bytes


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
