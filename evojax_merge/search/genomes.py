"""Scores for genomes: a space and an evaluator together, over all processes of a run."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from evojax_merge.evaluation.devices import ONE_DEVICE, Devices
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.search.protocols import Evaluator, Progress, Space

E = TypeVar("E", bound=Evaluator)


@dataclass(frozen=True)
class SpaceEvaluator(Generic[E]):
    """Scores genomes of a space. Each process decodes and evaluates its share."""

    space: Space
    evaluator: E
    devices: Devices = ONE_DEVICE

    @property
    def tasks(self) -> Any:
        return self.evaluator.tasks

    def passes(self, population: int) -> int:
        return self.evaluator.passes(population)

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        """genomes: float32[P, D]. Outputs stay where they were written: a candidate of another process has none."""
        genomes, devices = np.asarray(genomes), self.devices
        if devices.processes == 1:
            return self.evaluator.evaluate(self.space.decode(genomes), progress)
        size, share = len(genomes), devices.local_indices(len(genomes))
        own = self.evaluator.evaluate(self.space.decode(genomes[share]), progress)
        matrices = {
            task: {metric: devices.gather(matrix, size) for metric, matrix in metrics.items()}
            for task, metrics in own.matrices.items()
        }
        outputs: dict[str, list[list[str]]] = {}
        for task, texts in own.outputs.items():
            outputs[task] = [[] for _ in range(size)]
            for row, written in zip(share, texts, strict=True):
                outputs[task][row] = written
        return TaskScores(matrices, outputs)
