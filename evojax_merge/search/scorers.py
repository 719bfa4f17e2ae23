"""What a search asks of a space and its evaluator: scores for genomes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.checkpoints.bank import load_bank, load_path_bank
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.devices import ONE_DEVICE, Devices
from evojax_merge.evaluation.evaluator import Evaluator, Progress, Scores
from evojax_merge.evaluation.paths import PathEvaluator
from evojax_merge.models.bank import Bank, MergeSpec, Recipe
from evojax_merge.models.paths import PathSpec
from evojax_merge.search.setup import SearchProblem
from evojax_merge.spaces.layer_path import PathSpace
from evojax_merge.spaces.parameter import ParameterSpace
from evojax_merge.tasks.task import Task


class Space(Protocol):
    """A genome has `dims` numbers; `start` is the one that the search is centred on first."""

    @property
    def dims(self) -> int: ...
    @property
    def start(self) -> np.ndarray: ...


class Scorer(Protocol):
    """Scores genomes `float32[P, D]` on a set of tasks."""

    @property
    def tasks(self) -> list[Task]: ...
    def passes(self, population: int) -> int: ...
    def score(self, genomes: np.ndarray, progress: Progress = ...) -> Scores: ...


def score_shared(devices: Devices, genomes: np.ndarray, score: Callable[[np.ndarray], Scores]) -> Scores:
    """Score this process's share of the genomes, and gather everyone's scores. Outputs stay where they were written: a
    candidate of another process has none."""
    if devices.processes == 1:
        return score(genomes)
    size, share = len(genomes), devices.local_indices(len(genomes))
    own = score(genomes[share])
    matrices = {
        task: {metric: devices.gather(matrix, size) for metric, matrix in metrics.items()}
        for task, metrics in own.matrices.items()
    }
    outputs: dict[str, list[list[str]]] = {}
    for task, texts in own.outputs.items():
        outputs[task] = [[] for _ in range(size)]
        for row, written in zip(share, texts, strict=True):
            outputs[task][row] = written
    return Scores(matrices, outputs)


@dataclass
class MergeScorer:
    """Genomes are merges."""

    evaluator: Evaluator
    bank: Bank
    spec: MergeSpec
    space: ParameterSpace

    @property
    def tasks(self) -> list[Task]:
        return self.evaluator.tasks

    def passes(self, population: int) -> int:
        return self.evaluator.passes(population)

    def recipes(self, genomes: np.ndarray) -> Recipe:
        return _recipes(self.space, jnp.asarray(genomes))

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> Scores:
        def mine(genomes: np.ndarray) -> Scores:
            return self.evaluator.population(self.bank, self.spec, self.recipes(genomes), progress)

        return score_shared(self.evaluator.devices, genomes, mine)


@partial(jax.jit, static_argnums=0)
def _recipes(space: ParameterSpace, genomes: jax.Array) -> Recipe:
    return jax.vmap(space.recipe)(genomes)


@dataclass
class PathScorer:
    """Genomes are layer paths."""

    evaluator: PathEvaluator
    space: PathSpace

    @property
    def tasks(self) -> list[Task]:
        return self.evaluator.evaluator.tasks

    def passes(self, population: int) -> int:
        return self.evaluator.evaluator.passes(population)

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> Scores:
        def mine(genomes: np.ndarray) -> Scores:
            return self.evaluator.population(self.space.paths(genomes), progress)

        return score_shared(self.evaluator.evaluator.devices, np.asarray(genomes), mine)


def describe_work(scorers: Sequence[MergeScorer | PathScorer]) -> str:
    """One line on how the candidates of a search were scored."""
    paths = [scorer.evaluator for scorer in scorers if isinstance(scorer, PathScorer)]
    if paths:
        done, asked = sum(path.steps_run for path in paths), sum(path.steps_requested for path in paths)
        saved = 0.0 if not asked else 1 - done / asked
        distinct = {known for path in paths for known in path.score_cache}
        return (
            f"layer steps: {done:,} computed of {asked:,} asked for ({saved:.0%} were shared); "
            f"{len(distinct):,} distinct paths"
        )
    merges = [scorer.evaluator for scorer in scorers if isinstance(scorer, MergeScorer)]
    most = max((chunk for evaluator in merges for chunk in evaluator.chunk_sizes.values()), default=0)
    few = {0: "no candidate", 1: "one candidate at a time"}.get(most, f"up to {most:,} candidates at a time")
    return f"each device scored {few}"


def open_scorers(
    problem: SearchProblem,
    batched_tasks: list[list[BatchedTask]],
    devices: Devices = ONE_DEVICE,
    progress: Progress = lambda done: None,
    log: Callable[[str], None] = lambda text: None,
) -> list[MergeScorer] | list[PathScorer]:
    """Load the bank, and score on each list of requests. `progress` is told the bytes that were loaded, `log` what went
    otherwise than planned."""
    settings = problem.config.evaluation
    # Their batches have the same shapes, and so what fits one fits all.
    chunk_sizes: dict[Any, int] = {}
    evaluators = [
        Evaluator(
            problem.decoder, problem.tokenizer, rows, settings.compute_dtype, settings.chunk, devices, log, chunk_sizes
        )
        for rows in batched_tasks
    ]
    if isinstance(problem.spec, PathSpec):
        assert not isinstance(problem.space, ParameterSpace)
        paths = load_path_bank(problem.sources, problem.spec, settings.compute_dtype, progress)
        space = problem.space
        return [PathScorer(PathEvaluator(evaluator, paths, space.max_length), space) for evaluator in evaluators]
    assert isinstance(problem.space, ParameterSpace)
    bank = load_bank(problem.sources, problem.decoder, problem.spec, progress, devices.put)
    return [MergeScorer(evaluator, bank, problem.spec, problem.space) for evaluator in evaluators]
