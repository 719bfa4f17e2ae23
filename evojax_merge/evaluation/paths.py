"""Scoring layer paths: what candidates share is computed once. May import evaluation, models and tasks.

A population of paths is a trie: candidates that begin with the same (layer, fold) steps share those nodes. A batch of
tokens walks the trie depth first, one compiled call per run of steps between branches, and meets the head once per
distinct path. Scores of a path are kept for the whole run, so that a path that comes again costs nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.evaluation.evaluator import Evaluator, Progress, Scores, arrays_of, score_task
from evojax_merge.evaluation.passes import score_states
from evojax_merge.evaluation.requests import Requests
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import Columns, rms_norm
from evojax_merge.models.paths import Path, PathBank, State, advance, begin, ends_of, fold
from evojax_merge.models.sources import Stored
from evojax_merge.tasks.batches import ScoringBatch
from evojax_merge.tasks.task import Answers, Reduce

# Generation runs a stored model: lengths are rounded up to this many layers, so that few shapes are compiled.
LENGTH_STEP = 4

Step = tuple[int, float]
Key = tuple[tuple[Step, ...], int]


def key_of(path: Path) -> Key:
    """What a path computes: two with the same key are the same model."""
    return tuple(zip(path.layers, (float(f) for f in path.folds()), strict=True)), path.ends


@dataclass
class Trie:
    """Distinct step sequences, branching where they part. `ends_here`: which of them stops at this node."""

    children: dict[Step, "Trie"] = field(default_factory=dict)
    ends_here: int | None = None


def build_trie(sequences: Sequence[tuple[Step, ...]]) -> Trie:
    root = Trie()
    for number, steps in enumerate(sequences):
        node = root
        for step in steps:
            node = node.children.setdefault(step, Trie())
        node.ends_here = number
    return root


def segments(root: Trie) -> Iterator[tuple[int, list[Step], int | None]]:
    """The trie depth first, as runs of steps without a branch: (how many states were kept before, steps, which path
    ends after them). Each run starts from the state with that number; its own state is kept after it."""
    stack: list[tuple[int, Trie, list[Step]]] = [(0, child, [step]) for step, child in reversed(root.children.items())]
    while stack:
        depth, node, steps = stack.pop()
        while len(node.children) == 1 and node.ends_here is None:
            ((step, node),) = node.children.items()
            steps.append(step)
        yield depth, steps, node.ends_here
        stack += [(depth + 1, child, [step]) for step, child in reversed(node.children.items())]


@partial(jax.jit, static_argnums=(0, 1))
def _score(
    config: DecoderConfig, reduce: Reduce | None, source: Stored, rows: jax.Array, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """What passes.score_states makes of the states after the last layer."""
    return score_states(config, source, rms_norm(rows, source.final_norm(), config.norm_eps), batch, reduce)


@dataclass
class PathEvaluator:
    """Scores populations of paths over one bank, on the requests of an evaluator.

    `longest`: how many steps a path has at most. `computed` and `asked`: layer steps that were run, and that would
    have been run one candidate after the other, since the start.
    """

    evaluator: Evaluator
    bank: PathBank
    longest: int
    known: dict[Key, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)
    outputs: dict[Key, dict[str, list[str]]] = field(default_factory=dict)
    computed: int = 0
    asked: int = 0

    def population(self, paths: Sequence[Path | None], progress: Progress = lambda done: None) -> Scores:
        """Score P paths; None, a candidate without a path, scores NaN."""
        requests = self.evaluator.requests
        passes = sum(request.batches for request in requests)
        keys = [None if path is None else key_of(path) for path in paths]
        fresh: dict[Key, Path] = {}
        for key, path in zip(keys, paths, strict=True):
            if key is not None and path is not None and key not in self.known:
                fresh.setdefault(key, path)
        progress((len(paths) - len(fresh)) * passes)
        if fresh:
            self._score_fresh(fresh, progress)
        matrices: dict[str, dict[str, np.ndarray]] = {}
        outputs: dict[str, list[list[str]]] = {}
        for request in requests:
            name, count = request.task.name, request.task.size
            rows = [None if key is None else self.known[key][name] for key in keys]
            metrics = next((list(row) for row in rows if row is not None), [request.task.metric])
            nothing = np.full(count, np.nan, np.float32)
            matrices[name] = {
                metric: np.stack([nothing if row is None else row[metric] for row in rows]) for metric in metrics
            }
            if request.asked.prompts:
                outputs[name] = [
                    [""] * len(request.asked.prompts) if key is None else self.outputs[key][name] for key in keys
                ]
        self.asked += passes * sum(len(path.layers) for path in paths if path is not None)
        return Scores(matrices, outputs)

    def _score_fresh(self, fresh: dict[Key, Path], progress: Progress) -> None:
        keys = list(fresh)
        for key in keys:
            self.known[key], self.outputs[key] = {}, {}
        for i, request in enumerate(self.evaluator.requests):
            task, run = request.task, partial(self._answers, fresh)
            totals, greedy, texts, broken = self.evaluator.with_less(i, run, progress)
            counts = np.array([len(row.tokens) - row.start for row in request.asked.scored])
            matrices = score_task(task, Answers(totals, counts, greedy, texts), broken)
            for k, key in enumerate(keys):
                self.known[key][task.name] = {metric: scores[k] for metric, scores in matrices.items()}
                self.outputs[key][task.name] = texts[k]

    def _answers(
        self, fresh: dict[Key, Path], request: Requests, progress: Progress
    ) -> tuple[np.ndarray, np.ndarray, list[list[str]], np.ndarray]:
        """What P distinct paths make of a request: float32[P, S] and bool[P, S] of its scored rows, P lists of outputs,
        and bool[P], whose logits were not finite."""
        keys = list(fresh)
        totals = np.zeros((len(keys), len(request.asked.scored)), np.float32)
        greedy = np.zeros(totals.shape, bool)
        for batch in request.scoring.batches if request.scoring is not None else ():
            real = batch.rows >= 0
            found, likeliest = self._walk(keys, batch, request, progress)
            totals[:, batch.rows[real]], greedy[:, batch.rows[real]] = found[:, real], likeliest[:, real]
        texts, broken = [[""] * len(request.asked.prompts) for _ in keys], np.zeros(len(keys), bool)
        if request.prompts is not None:
            for k, key in enumerate(keys):
                texts[k], broken[k] = self._continue(fresh[key], request, progress)
        return totals, greedy, texts, broken

    def _walk(
        self, keys: Sequence[Key], batch: ScoringBatch, request: Requests, progress: Progress
    ) -> tuple[np.ndarray, np.ndarray]:
        """float32[P, R] and bool[P, R]: every distinct path on one batch."""
        config, arrays = self.evaluator.config, arrays_of(batch)
        assert request.scoring is not None
        header = request.scoring.header[None] if request.scoring.header.size else None
        columns = Columns(jnp.asarray(batch.positions), jnp.asarray(batch.branches))
        totals = np.zeros((len(keys), len(batch.rows)), np.float32)
        greedy = np.zeros(totals.shape, bool)
        for parent in sorted({ends for _, ends in keys}):
            source = ends_of(self.bank, parent)
            members = [i for i, (_, ends) in enumerate(keys) if ends == parent]
            states = [begin(source, batch.tokens, header)]
            for depth, steps, ended in segments(build_trie([keys[i][0] for i in members])):
                del states[depth + 1 :]
                states.append(self._advance(config, states[depth], columns, steps))
                self.computed += len(steps)
                if ended is not None:
                    found = _score(config, request.asked.reduce, source, states[-1].rows, arrays)
                    totals[members[ended]], greedy[members[ended]] = (np.asarray(part) for part in found)
                    progress(1)
        return totals, greedy

    def _advance(self, config: DecoderConfig, state: State, columns: Columns, steps: Sequence[Step]) -> State:
        layers, folds = np.zeros(self.longest, np.int32), np.zeros(self.longest, np.float32)
        layers[: len(steps)] = [layer for layer, _ in steps]
        folds[: len(steps)] = [value for _, value in steps]
        return advance(config, self.bank, state, columns, layers, folds, np.int32(len(steps)))

    def _continue(self, path: Path, request: Requests, progress: Progress) -> tuple[list[str], bool]:
        """The outputs of one path for a task's prompts, and whether its logits were not finite."""
        rounded = -(-len(path.layers) // LENGTH_STEP) * LENGTH_STEP
        model, config = fold(self.bank, path, self.evaluator.config, rounded)
        assert request.prompts is not None
        self.computed += len(path.layers) * len(request.prompts.batches)
        runner = replace(self.evaluator, config=config, requests=[request])
        texts, broken = runner.write_stored(model, request, progress)
        return texts, broken
