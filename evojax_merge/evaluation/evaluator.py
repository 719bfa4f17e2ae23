"""The evaluator: every candidate of a population on every example of the tasks, in compiled batched passes.

May import models and tasks. The result for a task is a score matrix `float32[P, N]`; fitness is a reduction of it.
Scoring streams: a candidate's layers are merged inside the forward pass and never exist together. Generation
materialises a chunk of candidates first. Which candidates go through a pass together (the *chunk*) is chosen from
the memory that the compiler reports.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.models.bank import Bank, MergeSpec, Recipe, candidate
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import LayerSource, forward, target_log_probabilities
from evojax_merge.models.generate import BROKEN, generate
from evojax_merge.models.sources import Merged, Stored
from evojax_merge.tasks.batches import (
    PromptBatch,
    Row,
    ScoringBatch,
    Shape,
    batch_shapes,
    padding_share,
    prompt_batches,
    scoring_batches,
)
from evojax_merge.tasks.tasks import Task, likelihood_rows, prompt_rows, score_likelihood, score_outputs

Progress = Callable[[int], None]

# Share of an accelerator's free memory that a pass may take beyond the bank.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Scores:
    """Per task: metric -> float32[P, N], and for tasks that generate the P lists of N outputs."""

    matrices: dict[str, dict[str, np.ndarray]]
    outputs: dict[str, list[list[str]]] = field(default_factory=dict)


def fitness(tasks: Sequence[Task], scores: Scores) -> np.ndarray:
    """float64[P]: the weighted mean over tasks of the mean over examples of each task's metric; NaN where a
    score is not finite. Tasks of weight 0 take no part, unless there are no others: then all count alike."""
    weights = [task.weight for task in tasks] if any(task.weight for task in tasks) else [1.0] * len(tasks)
    rows = [
        weight / sum(weights) * scores.matrices[task.name][task.metric].mean(axis=1, dtype=np.float64)
        for task, weight in zip(tasks, weights, strict=True)
        if weight > 0
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


@dataclass(frozen=True)
class Requests:
    """A task's examples, tokenised once for the whole run, as batches."""

    task: Task
    rows: list[Row]
    scoring: list[ScoringBatch]
    prompts: list[PromptBatch]
    stop: tuple[int, ...]


def build_requests(
    splits: Sequence[Sequence[Task]], tokenizer: Any, tokens_per_batch: int, context: int, stop: tuple[int, ...]
) -> list[list[Requests]]:
    """Tokenise and batch several splits of the same tasks, in batches of the same shapes, made for the first split.

    Raises InputError for an example that is longer than `context`, the model's.
    """
    rows = [[_task_rows(task, tokenizer, context) for task in split] for split in splits]
    shapes = [
        batch_shapes(rows[0][i], tokens_per_batch, [row for other in rows[1:] for row in other[i]])
        for i in range(len(splits[0]))
    ]
    return [
        [_requests(task, rows[s][i], shapes[i], stop) for i, task in enumerate(split)] for s, split in enumerate(splits)
    ]


def describe_requests(requests: Sequence[Requests]) -> str:
    """One line: what each candidate is asked."""
    rows = [row for request in requests for row in request.rows]
    batches: list[ScoringBatch | PromptBatch] = []
    for request in requests:
        batches += [*request.scoring, *request.prompts]
    return (
        f"each candidate: {sum(len(row.tokens) for row in rows):,} tokens of {len(rows):,} rows in {len(batches)} "
        f"batches, {padding_share(batches, rows):.0%} padding"
    )


def _requests(task: Task, rows: list[Row], shapes: list[Shape], stop: tuple[int, ...]) -> Requests:
    if task.kind == "exact_match":
        return Requests(task, rows, [], prompt_batches(rows, shapes), stop)
    return Requests(task, rows, scoring_batches(rows, shapes), [], stop)


def _task_rows(task: Task, tokenizer: Any, context: int) -> list[Row]:
    generates = task.kind == "exact_match"
    new = task.max_new_tokens if generates else 0
    rows = prompt_rows(task, tokenizer) if generates else likelihood_rows(task, tokenizer)
    for row in rows:
        if len(row.tokens) + new > context:
            asked = f"{len(row.tokens)} tokens" + (f" and {new} new ones" if new else "")
            raise InputError(row.where, f"{asked} do not fit the models' context of {context}")
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Compiled passes


def score_batch(config: DecoderConfig, source: LayerSource, batch: Any) -> jax.Array:
    """The targets' total log-probability for each row, float32[B]. batch: a ScoringBatch's arrays, as a dict."""
    tokens, first = batch["tokens"], jnp.zeros_like(batch["length"])
    hidden, _ = forward(config, source, tokens, first, batch["length"])
    # Only positions that predict a target meet the head.
    picked = jnp.take_along_axis(hidden, batch["at"][..., None], axis=1)
    flat = target_log_probabilities(config, source, picked.reshape(-1, picked.shape[-1]), batch["targets"].reshape(-1))
    return jnp.where(batch["mask"], flat.reshape(batch["mask"].shape), 0.0).sum(axis=1)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _score_chunk(
    config: DecoderConfig, spec: MergeSpec, compute_dtype: str, bank: Bank, recipes: Recipe, batch: Any
) -> jax.Array:
    """float32[chunk, B]: a chunk of candidates in one pass."""

    def one(recipe: Recipe) -> jax.Array:
        return score_batch(config, Merged(bank, recipe, spec, compute_dtype), batch)

    # A population axis of one would only cost.
    return one(candidate(recipes, 0))[None] if _size(recipes) == 1 else jax.vmap(one)(recipes)


@partial(jax.jit, static_argnums=0)
def _score_stored(config: DecoderConfig, model: Stored, batch: Any) -> jax.Array:
    return score_batch(config, model, batch)


@partial(jax.jit, static_argnums=(0, 1))
def _materialise(spec: MergeSpec, compute_dtype: str, bank: Bank, recipes: Recipe) -> Stored:
    def one(recipe: Recipe) -> Stored:
        # Else the compiler takes the shared leaves' deltas, which no candidate changes, out of the loop and keeps them.
        own, recipe = jax.lax.optimization_barrier((bank, recipe))
        return Merged(own, recipe, spec, compute_dtype).materialise()

    return jax.lax.map(one, recipes)


_generate = jax.jit(generate, static_argnums=(0, 4, 5))


def _arrays(batch: ScoringBatch) -> dict[str, np.ndarray]:
    return {name: getattr(batch, name) for name in ("tokens", "length", "at", "targets", "mask")}


def _size(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _chunks(recipes: Recipe, chunk: int) -> Iterator[Recipe]:
    """Runs of `chunk` candidates; the last is filled up with its last candidate, so that all have one shape."""
    last = _size(recipes) - 1
    for start in range(0, last + 1, chunk):
        rows = np.minimum(np.arange(start, start + chunk), last)
        yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], recipes)


@dataclass
class Evaluator:
    """Scores populations of merges of one bank, and stored models, on one set of requests.

    `chunk`: how many candidates share a pass; None chooses.
    """

    config: DecoderConfig
    tokenizer: Any
    requests: list[Requests]
    compute_dtype: str = "float32"
    chunk: int | None = None
    chosen: dict[Any, int] = field(default_factory=dict)

    @property
    def tasks(self) -> list[Task]:
        return [request.task for request in self.requests]

    def passes(self, population: int) -> int:
        """How many steps of progress an evaluation reports."""
        return sum(len(request.scoring) + len(request.prompts) for request in self.requests) * population

    def population(
        self, bank: Bank, spec: MergeSpec, recipes: Recipe, progress: Progress = lambda done: None
    ) -> Scores:
        """Score P recipes (leading axis P on every leaf)."""
        # On the host they are cut into chunks without compiling anything.
        recipes = jax.tree.map(np.asarray, recipes)
        size = _size(recipes)

        def score(batch: ScoringBatch) -> np.ndarray:
            arrays = _arrays(batch)
            chunk = self._chunk_for(spec, bank, recipes, arrays)
            rows: list[Any] = []
            for i, part in enumerate(_chunks(recipes, chunk)):
                rows.append(_score_chunk(self.config, spec, self.compute_dtype, bank, part, arrays))
                # One pass is always queued, so that the device does not wait for the host; no more than one, so
                # that an interruption does not wait for the device.
                if i > 0:
                    rows[i - 1] = np.asarray(rows[i - 1])
                    progress(chunk)
            progress(chunk)
            return np.concatenate([np.asarray(row) for row in rows])[:size]

        def continue_(batch: PromptBatch, request: Requests) -> np.ndarray:
            rows = []
            for part in _chunks(recipes, self._generation_chunk(bank, size)):
                models = _materialise(spec, self.compute_dtype, bank, part)
                rows.append(self._continue(models, batch, request))
                progress(len(rows[-1]))
            return np.concatenate(rows)[:size]

        return self._evaluate(size, score, continue_)

    def stored(self, model: Stored, progress: Progress = lambda done: None) -> Scores:
        """Score one stored model: a population of one."""

        def score(batch: ScoringBatch) -> np.ndarray:
            row = np.asarray(_score_stored(self.config, model, _arrays(batch)))
            progress(1)
            return row[None]

        def continue_(batch: PromptBatch, request: Requests) -> np.ndarray:
            row = self._continue(jax.tree.map(lambda leaf: leaf[None], model), batch, request)
            progress(1)
            return row

        return self._evaluate(1, score, continue_)

    def _continue(self, models: Stored, batch: PromptBatch, request: Requests) -> np.ndarray:
        new = request.task.max_new_tokens
        return np.asarray(_generate(self.config, models, batch.tokens, batch.first, new, request.stop))

    def _evaluate(
        self,
        size: int,
        score: Callable[[ScoringBatch], np.ndarray],
        continue_: Callable[[PromptBatch, Requests], np.ndarray],
    ) -> Scores:
        matrices, outputs = {}, {}
        for request in self.requests:
            task, count = request.task, len(request.rows)
            if task.kind == "exact_match":
                texts = [[""] * count for _ in range(size)]
                broken = np.zeros(size, bool)
                for prompts in request.prompts:
                    tokens = continue_(prompts, request)
                    broken |= (tokens == BROKEN).any(axis=(1, 2))
                    self._decode_into(texts, tokens, prompts.rows)
                outputs[task.name] = texts
                scores = score_outputs(task, texts)
                matrices[task.name] = {name: np.where(broken[:, None], np.nan, rows) for name, rows in scores.items()}
                continue
            sums = np.zeros((size, count), np.float32)
            for batch in request.scoring:
                real = batch.rows >= 0
                sums[:, batch.rows[real]] = score(batch)[:, real]
            counts = np.array([len(row.tokens) - row.start for row in request.rows])
            matrices[task.name] = score_likelihood(task, sums, counts)
        return Scores(matrices, outputs)

    def _decode_into(self, texts: list[list[str]], tokens: np.ndarray, rows: np.ndarray) -> None:
        """tokens: int32[P, B, new]. Candidates often agree: each distinct output is decoded once."""
        for b, row in enumerate(rows):
            if row < 0:
                continue
            known: dict[bytes, str] = {}
            for p in range(tokens.shape[0]):
                ids = tokens[p, b]
                key = ids.tobytes()
                if key not in known:
                    known[key] = self.tokenizer.decode(ids[ids >= 0], skip_special_tokens=True)
                texts[p][row] = known[key]

    def _chunk_for(self, spec: MergeSpec, bank: Bank, recipes: Recipe, batch: dict[str, np.ndarray]) -> int:
        """The largest power of two whose temporaries, as the compiler reports them, fit the device; 1 on a CPU,
        where sharing a pass is slower than one candidate after the other."""
        size = _size(recipes)
        if self.chunk is not None:
            return min(self.chunk, size)
        key = (size, *(array.shape for array in batch.values()))
        if key not in self.chosen:
            self.chosen[key] = self._largest_chunk(spec, bank, recipes, batch, size)
        return self.chosen[key]

    def _largest_chunk(self, spec: MergeSpec, bank: Bank, recipes: Recipe, batch: Any, size: int) -> int:
        budget = free_memory()
        if budget is None:
            return 1
        chunk = 1
        while chunk * 2 <= size:
            part = next(_chunks(recipes, chunk * 2))
            lowered = _score_chunk.lower(self.config, spec, self.compute_dtype, bank, part, batch)
            memory = lowered.compile().memory_analysis()
            if memory is None or memory.temp_size_in_bytes > budget:
                break
            chunk *= 2
        return chunk

    def _generation_chunk(self, bank: Bank, size: int) -> int:
        """As many materialised candidates as fit; one at a time on a CPU unless they are small."""
        if self.chunk is not None:
            return min(self.chunk, size)
        one = sum(leaf.nbytes // leaf.shape[1] for leaf in bank.layers.values())
        one += sum(leaf.nbytes // leaf.shape[0] for leaf in bank.shared.values())
        budget = free_memory()
        # A quarter for the weights: the rest is for caches and activations. Small models fit a CPU's cache.
        room = 32 * 2**20 if budget is None else budget // 4
        return int(max(1, min(size, room // max(one, 1))))


def free_memory() -> int | None:
    """Bytes that a pass may use on the first device beyond what is loaded; None on a CPU."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return None
    return int(MEMORY_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))
