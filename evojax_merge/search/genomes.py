"""Scores for genomes: a space and an evaluator together, over all processes of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import numpy as np

from evojax_merge.evaluation.devices import ONE_DEVICE, Devices, check_genomes
from evojax_merge.evaluation.scores import PLAIN, Goal, TaskScores
from evojax_merge.search.protocols import ContextSpace, Progress, ScoresCandidates, Space

E = TypeVar("E", bound=ScoresCandidates)


@dataclass(frozen=True)
class SpaceEvaluator(Generic[E]):
    """Scores genomes of a space. Each process decodes and evaluates its share. goal: what fitness is made of scores."""

    space: Space
    evaluator: E
    devices: Devices = ONE_DEVICE
    goal: Goal = PLAIN

    @property
    def tasks(self) -> Any:
        return self.evaluator.tasks

    def passes(self, population: int) -> int:
        return self.evaluator.passes(population)

    def within(self, context: Any) -> "SpaceEvaluator[E]":
        """Scores genomes that refer to members that the strategy lends (see `context_of`); None: they refer to none."""
        return self if context is None else replace(self, space=cast(ContextSpace, self.space).within(context))

    def subset(self, examples: Sequence[np.ndarray]) -> "SpaceEvaluator[E]":
        """Scores genomes on some of the examples: for each task int[M], ascending. The evaluator must be divisible."""
        return replace(self, evaluator=cast(Any, self.evaluator).subset(examples))

    def value_and_gradient(
        self, genomes: np.ndarray, progress: Progress = lambda done: None
    ) -> tuple[TaskScores, np.ndarray]:
        """genomes: float32[P, D]. Return the scores, and the derivatives of the fitness, float32[P, D]. The evaluator
        must have derivatives with respect to candidates (`value_and_gradient`), and the space those of candidates with
        respect to genomes (`pull_back`)."""
        genomes = np.asarray(genomes)
        check_genomes(genomes)
        space, evaluator, devices = cast(Any, self.space), cast(Any, self.evaluator), self.devices
        size, share = len(genomes), devices.local_indices(len(genomes))
        local_genomes = genomes if devices.processes == 1 else genomes[share]
        scores, cotangents = evaluator.value_and_gradient(space.decode(local_genomes), progress, self.goal)
        gradients = devices.gather(space.pull_back(local_genomes, cotangents), size)
        return scores if devices.processes == 1 else self._gathered(scores, size), gradients

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        """genomes: float32[P, D]. Outputs stay where they were written: a candidate of another process has none."""
        genomes = np.asarray(genomes)
        check_genomes(genomes)
        if self.devices.processes == 1:
            # Processes that share each candidate all score every one.
            return self.evaluator.evaluate(self.space.decode(genomes), progress)
        size, share = len(genomes), self.devices.local_indices(len(genomes))
        local_scores = self.evaluator.evaluate(self.space.decode(genomes[share]), progress)
        matrices = self._gathered(local_scores, size).matrices
        outputs: dict[str, list[list[str]]] = {}
        for task, texts in local_scores.outputs.items():
            outputs[task] = [[] for _ in range(size)]
            for index, written in zip(share, texts, strict=True):
                outputs[task][index] = written
        return TaskScores(matrices, outputs)

    def _gathered(self, local_scores: TaskScores, size: int) -> TaskScores:
        """The score matrices of all processes' candidates."""
        return TaskScores({
            task: {metric: self.devices.gather(matrix, size) for metric, matrix in metrics.items()}
            for task, metrics in local_scores.matrices.items()
        })  # fmt: skip
