"""Scoring layer paths: shared beginnings of candidates are computed once.

A population of paths is a trie: candidates that begin with the same (layer, fold) steps share those nodes. A batch of
tokens walks the trie depth first, one compiled call per run of steps between branches, and goes through the LM head
once per distinct path. Scores of a path are kept for the whole run, so that a path that comes again costs nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.devices import ONE_DEVICE
from evojax_merge.evaluation.evaluator import Evaluator, Progress
from evojax_merge.evaluation.generation import generate
from evojax_merge.evaluation.passes import logprobs_from_hidden
from evojax_merge.evaluation.populations import DifferentiablePopulation, stored
from evojax_merge.evaluation.programs import HEAD, LAYER, Evaluation, Program
from evojax_merge.evaluation.responses import arrays_of, enter, score_task
from evojax_merge.evaluation.scores import PLAIN, Goal, TaskScores, task_weights
from evojax_merge.models.architecture import architecture_of
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.layers import SequenceLayout
from evojax_merge.models.paths import (
    Activations,
    LayerPath,
    PathBank,
    PathWeights,
    Step,
    StreamedPathBank,
    embed_batch,
    path_config,
    run_layers,
)
from evojax_merge.models.sources import StackedWeights
from evojax_merge.tasks.batches import ScoringBatch
from evojax_merge.tasks.task import LogitsFn, Responses, Task

# Generation materialises a path; its depth is rounded up to a multiple of this, so that few shapes are compiled.
DEPTH_BUCKET = 4

Key = tuple[tuple[Step, ...], int]


def key_of(path: LayerPath) -> Key:
    """The steps and the embedding of a path: two paths with the same key are the same model."""
    return tuple(zip(path.layers, (float(f) for f in path.residual_scales()), strict=True)), path.embedding_parent


@dataclass
class Trie:
    """Distinct step sequences, branching where they part. `terminal`: the sequence that stops at this node."""

    children: dict[Step, "Trie"] = field(default_factory=dict)
    terminal: int | None = None


def build_trie(sequences: Sequence[tuple[Step, ...]]) -> Trie:
    root = Trie()
    for number, steps in enumerate(sequences):
        node = root
        for step in steps:
            node = node.children.setdefault(step, Trie())
        node.terminal = number
    return root


def segments(root: Trie) -> Iterator[tuple[int, list[Step], int | None]]:
    """The trie depth first, as runs of steps without a branch: (the number of states kept before, the steps, the path
    that ends after them). Each run starts from the state with that number; its own state is kept after it."""
    stack: list[tuple[int, Trie, list[Step]]] = [(0, child, [step]) for step, child in reversed(root.children.items())]
    while stack:
        depth, node, steps = stack.pop()
        while len(node.children) == 1 and node.terminal is None:
            ((step, node),) = node.children.items()
            steps.append(step)
        yield depth, steps, node.terminal
        stack += [(depth + 1, child, [step]) for step, child in reversed(node.children.items())]


@partial(jax.jit, static_argnums=(0, 1))
def _score(
    config: DecoderConfig, logits_fn: LogitsFn | None, source: StackedWeights, rows: jax.Array, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """The results of `passes.logprobs_from_hidden` on the states after the last layer."""
    hidden = architecture_of(config).final_norm(config, source, rows)
    return logprobs_from_hidden(config, source, hidden, batch, logits_fn)


@dataclass(frozen=True)
class PathFactory:
    """Candidates are residual scales, float32[T], of paths through the same layers of a shared bank."""

    def __call__(self, replicated: tuple[PathBank, StackedWeights, Any], candidate: jax.Array) -> PathWeights:
        return PathWeights(*replicated, candidate)


@dataclass
class PathWork:
    """The work of an evaluator of paths, and of those on some of its examples, since the start. steps_run: layer steps;
    steps_requested: the steps that would have been run one candidate after the other; paths: the distinct ones."""

    steps_run: int = 0
    steps_requested: int = 0
    paths: set[Key] = field(default_factory=set)


@dataclass
class PathEvaluator:
    """Scores populations of paths over one bank, on the requests of an evaluator. `max_length`: the most steps that a
    path has; `by_config`: the evaluators that differentiate models, by their config."""

    evaluator: Evaluator
    bank: PathBank | StreamedPathBank
    max_length: int
    score_cache: dict[Key, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)
    outputs: dict[Key, dict[str, list[str]]] = field(default_factory=dict)
    work: PathWork = field(default_factory=PathWork)
    by_config: dict[DecoderConfig, Evaluator] = field(default_factory=dict)

    @property
    def tasks(self) -> list[Task]:
        return self.evaluator.tasks

    def passes(self, population: int) -> int:
        return self.evaluator.passes(population)

    def subset(self, examples: Sequence[np.ndarray]) -> "PathEvaluator":
        """The same on some of the examples: for each of the tasks int[M], ascending. Its cache of scores is empty."""
        return replace(self, evaluator=self.evaluator.subset(examples), score_cache={}, outputs={}, by_config={})

    def evaluate(self, paths: Sequence[LayerPath | None], progress: Progress = lambda done: None) -> TaskScores:
        """Score P paths; None, a candidate without a path, scores NaN."""
        self.bank.check()
        batched_tasks = self.evaluator.batched_tasks
        passes = sum(batched_task.batches for batched_task in batched_tasks)
        keys = [None if path is None else key_of(path) for path in paths]
        fresh: dict[Key, LayerPath] = {}
        for key, path in zip(keys, paths, strict=True):
            if key is not None and path is not None and key not in self.score_cache:
                fresh.setdefault(key, path)
        progress((len(paths) - len(fresh)) * passes)
        self.work.paths.update(fresh)
        for key in fresh:
            self.score_cache[key], self.outputs[key] = {}, {}
        for i in range(len(batched_tasks)) if fresh else ():
            task = batched_tasks[i].task
            answers, nonfinite = self.evaluator.run([i], partial(self._answers, fresh), progress)
            computed = score_task(task, answers, nonfinite)
            for k, key in enumerate(fresh):
                self.score_cache[key][task.name] = {metric: scores[k] for metric, scores in computed.items()}
                self.outputs[key][task.name] = answers.texts[k]
        matrices: dict[str, dict[str, np.ndarray]] = {}
        outputs: dict[str, list[list[str]]] = {}
        for batched_task in batched_tasks:
            name, count = batched_task.task.name, batched_task.task.size
            rows = [None if key is None else self.score_cache[key][name] for key in keys]
            metrics = next((list(row) for row in rows if row is not None), [batched_task.task.metric])
            nothing = np.full(count, np.nan, np.float32)
            matrices[name] = {
                metric: np.stack([nothing if row is None else row[metric] for row in rows]) for metric in metrics
            }
            if batched_task.requests.prompts:
                outputs[name] = [
                    [""] * len(batched_task.requests.prompts) if key is None else self.outputs[key][name]
                    for key in keys
                ]
        self.work.steps_requested += passes * sum(len(path.layers) for path in paths if path is not None)
        return TaskScores(matrices, outputs)

    def value_and_gradient(
        self, paths: Sequence[LayerPath | None], progress: Progress = lambda done: None, goal: Goal = PLAIN
    ) -> tuple[TaskScores, list[np.ndarray | None]]:
        """Score P paths on the metrics that the fitness is made of, and differentiate the fitness of each with respect
        to its scales: float64[T], NaN where a candidate failed. None, a candidate without a path, scores NaN and has no
        gradient.

        The layers of a path are discrete, so there is no derivative with respect to them. Paths through the same layers
        go through a pass together, a layer at a time, each computed again from the state before it.
        """
        tasks = [task for task, _ in task_weights(self.tasks)]
        matrices = {task.name: {task.metric: np.full((len(paths), task.size), np.nan, np.float32)} for task in tasks}
        gradients: list[np.ndarray | None] = [None] * len(paths)
        progress(sum(path is None for path in paths) * self.passes(1))
        through: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for p, path in enumerate(paths):
            if path is not None:
                through.setdefault((path.layers, path.embedding_parent), []).append(p)
        for (layers, parent), members in through.items():
            same_layers = [path for p in members if (path := paths[p]) is not None]
            scales = np.stack([path.residual_scales() for path in same_layers])
            replicated = (self.bank, self.bank.ends(parent), self.bank.layout.steps_by_stack(layers))
            config = path_config(self.bank.layout, layers, self.evaluator.config)
            if config not in self.by_config:
                # The number of candidates and rows that fit into a pass depends on the depth of the path.
                self.by_config[config] = replace(self.evaluator, config=config, devices=ONE_DEVICE, chunk_sizes={})
            population = DifferentiablePopulation(PathFactory(), replicated, scales)
            scores, scale_gradients = self.by_config[config].differentiate(population, progress, goal)
            for task in tasks:
                matrices[task.name][task.metric][members] = scores.matrices[task.name][task.metric]
            for p, path, gradient in zip(members, same_layers, scale_gradients, strict=True):
                gradients[p] = path.scale_gradient(gradient)
            steps = len(layers) * self.passes(len(members))
            self.work.steps_run += steps
            self.work.steps_requested += steps
        return TaskScores(matrices), gradients

    def _answers(self, fresh: dict[Key, LayerPath], batched_task: BatchedTask, progress: Progress) -> Evaluation:
        """The responses of P distinct paths to a task's requests, and bool[P], true for paths whose logits were not
        finite."""
        keys = list(fresh)
        answers = batched_task.requests.unanswered(len(keys))
        batches = batched_task.scoring.batches if batched_task.scoring is not None else []
        # The states of all batches wait between two layers, or those of one alone.
        for together in [batches] if self.bank.by_layer and batches else [[batch] for batch in batches]:
            yield from self._walk(keys, together, batched_task, answers, progress)
        texts, nonfinite = [[""] * len(batched_task.requests.prompts) for _ in keys], np.zeros(len(keys), bool)
        lengths: list[list[int]] = [[] for _ in keys]
        if batched_task.prompts is not None:
            for k, key in enumerate(keys):
                written = yield from self._generate(fresh[key], batched_task, progress)
                (texts[k],), (lengths[k],), (nonfinite[k],) = written.texts, written.lengths, written.nonfinite
        return replace(answers, texts=texts, lengths=lengths), nonfinite

    def _walk(
        self, keys: Sequence[Key], batches: Sequence[ScoringBatch], batched_task: BatchedTask, answers: Responses,
        progress: Progress,
    ) -> Evaluation:  # fmt: skip
        """Score every distinct path on some batches; enters the results in `answers`."""
        config = self.evaluator.config
        for parent in sorted({embedding_parent for _, embedding_parent in keys}):
            source = self.bank.ends(parent)
            members = [i for i, (_, embedding_parent) in enumerate(keys) if embedding_parent == parent]
            states = [[self._embed(source, batch, batched_task) for batch in batches]]
            for depth, steps, ended in segments(build_trie([keys[i][0] for i in members])):
                del states[depth + 1 :]
                states.append((yield from self._through(steps, states[depth])))
                if ended is None:
                    continue
                for batch, state in zip(batches, states[-1], strict=True):
                    logits_fn, arrays = batched_task.requests.logits_fn, arrays_of(batch)
                    arguments = (config, logits_fn, source, state.rows.hidden, arrays)
                    results = yield Program(HEAD, _score, arguments, candidates=1)
                    enter(answers, np.array([members[ended]]), batch, [np.asarray(part)[None] for part in results])
                    progress(1)

    def _through(self, steps: Sequence[Step], states: Sequence[Activations]) -> Evaluation:
        """Take the states of some batches through some steps."""
        for bank, *arrays in self.bank.parts(steps, self.max_length):
            before, states = states, []
            for state in before:
                arguments = (self.evaluator.config, bank, state, *arrays)
                states.append((yield Program(LAYER, run_layers, arguments, candidates=1)))
            if self.bank.by_layer:
                # The layer before is free when the one after this is on its way.
                jax.block_until_ready(states)
        self.work.steps_run += len(steps) * len(states)
        return states

    def _embed(self, source: StackedWeights, batch: ScoringBatch, batched_task: BatchedTask) -> Activations:
        assert batched_task.scoring is not None
        before = batched_task.scoring.shared_prefix
        images = self.evaluator.images_of(batched_task)
        layout = SequenceLayout(jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids))
        shared_prefix = before[None] if before.size else None
        return embed_batch(
            self.evaluator.config, source, batch.tokens, layout, shared_prefix, images.of_rows(before, batch),
            images.of_prefix(before),
        )  # fmt: skip

    def _generate(self, path: LayerPath, batched_task: BatchedTask, progress: Progress) -> Evaluation:
        """The `Continuations` of a task's prompts by one path."""
        rounded = -(-len(path.layers) // DEPTH_BUCKET) * DEPTH_BUCKET
        model, config = self.bank.materialise(path, self.evaluator.config, rounded)
        assert batched_task.prompts is not None
        self.work.steps_run += len(path.layers) * len(batched_task.prompts.batches)
        images = self.evaluator.images
        # Images add nothing behind the layers that only fill up the depth.
        images = None if images is None else images.within(len(path.layers))
        runner = replace(self.evaluator, config=config, batched_tasks=[batched_task], images=images)
        return (yield from generate(runner, stored(model, config), batched_task, progress))
