"""What a search asks of a space and its evaluator: scores for genomes. May import every room but report and cli."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.checkpoints.bank import load_bank, load_path_bank
from evojax_merge.evaluation.evaluator import Evaluator, Progress, Scores
from evojax_merge.evaluation.paths import PathEvaluator
from evojax_merge.evaluation.requests import Requests
from evojax_merge.models.bank import Bank, MergeSpec, Recipe
from evojax_merge.models.paths import PathSpec
from evojax_merge.search.setup import Problem
from evojax_merge.spaces.data_flow import PathSpace
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

    @cached_property
    def _to_recipes(self) -> jax.stages.Wrapped:
        return jax.jit(jax.vmap(self.space.recipe))

    def recipes(self, genomes: np.ndarray) -> Recipe:
        return self._to_recipes(jnp.asarray(genomes))

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> Scores:
        return self.evaluator.population(self.bank, self.spec, self.recipes(genomes), progress)

    def describe_work(self) -> str:
        """One line on how the candidates were scored."""
        chunks = sorted(set(self.evaluator.chosen.values()))
        return f"candidates per pass: {', '.join(map(str, chunks)) or 'as asked'}"


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
        return self.evaluator.population(self.space.paths(np.asarray(genomes)), progress)

    def describe_work(self) -> str:
        """One line on how the candidates were scored."""
        done, asked = self.evaluator.computed, self.evaluator.asked
        saved = 0.0 if not asked else 1 - done / asked
        return (
            f"layer steps: {done:,} computed of {asked:,} asked for ({saved:.0%} were shared); "
            f"{len(self.evaluator.known):,} distinct paths"
        )


def open_scorers(
    problem: Problem, requests: list[list[Requests]], progress: Progress = lambda done: None
) -> list[MergeScorer] | list[PathScorer]:
    """Load the bank, and score on each list of requests. `progress` is told the bytes that were loaded."""
    settings = problem.config.evaluation
    evaluators = [
        Evaluator(problem.decoder, problem.tokenizer, rows, settings.compute_dtype, settings.chunk) for rows in requests
    ]
    if isinstance(problem.spec, PathSpec):
        assert not isinstance(problem.space, ParameterSpace)
        paths = load_path_bank(problem.sources, problem.spec, settings.compute_dtype, progress)
        space = problem.space
        return [PathScorer(PathEvaluator(evaluator, paths, space.longest), space) for evaluator in evaluators]
    assert isinstance(problem.space, ParameterSpace)
    bank = load_bank(problem.sources, problem.decoder, problem.spec, progress)
    return [MergeScorer(evaluator, bank, problem.spec, problem.space) for evaluator in evaluators]
