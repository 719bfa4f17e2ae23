"""Scores for genomes: a space and an evaluator together, over all processes of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar, cast, runtime_checkable

import numpy as np

from evojax_merge.evaluation.devices import ONE_DEVICE, Devices, check_genomes
from evojax_merge.evaluation.scores import PLAIN, Goal, TaskScores
from evojax_merge.search.protocols import ContextSpace, Progress, ScoresCandidates, Space

E = TypeVar("E", bound=ScoresCandidates)


@runtime_checkable
class ComparesNeighbours(Protocol):
    """A task whose score, its `metric`, is the share of a candidate's neighbours that give the same answer."""

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def neighbours(self) -> int:
        """The number of neighbours, even."""

    @property
    def step(self) -> float:
        """The distance of each gene of a neighbour from the candidate's; 1: the range of a gene."""

    def answers(self, outputs: Sequence[Sequence[str]], totals: np.ndarray) -> np.ndarray:
        """float32[P, N]: numbers that are equal for equal answers. outputs: P lists; totals: see `TaskScores`."""


@dataclass(frozen=True)
class Neighbours:
    """The genomes that are scored beside each genome of a population. offsets: float32[K, D], by the names of the tasks
    that ask for them."""

    offsets: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(map(len, self.offsets.values()))

    def beside(self, genomes: np.ndarray) -> np.ndarray:
        """float32[(1 + K) P, D]: the genomes, float32[P, D], then the neighbours of all of them at the first offset, at
        the second …"""
        offsets = [np.zeros((1, genomes.shape[1]), np.float32), *self.offsets.values()]
        return np.concatenate([genomes + offset for offset in np.concatenate(offsets)]).astype(genomes.dtype)

    def with_answers(self, tasks: Sequence[Any], scores: TaskScores) -> TaskScores:
        """The scores with the numbers of the answers in the place of agreement."""
        answers = {
            task.name: {task.metric: task.answers(scores.outputs.get(task.name, ()),
                                                  scores.log_probabilities.get(task.name, np.zeros(0)))}
            for task in tasks if task.name in self.offsets
        }  # fmt: skip
        return replace(scores, matrices=scores.matrices | answers)

    def agreement(self, scores: TaskScores, count: int) -> TaskScores:
        """The scores of the first `count` candidates, from those with answers of all that stand beside them."""
        first, matrices, begin = scores.candidates(range(count)), {}, 1
        for name, offsets in self.offsets.items():
            ((metric, answers),) = scores.matrices[name].items()
            by_offset = answers.reshape(-1, count, answers.shape[1])
            same = by_offset[begin : begin + len(offsets)] == by_offset[0]
            matrices[name], begin = {metric: same.mean(axis=0, dtype=np.float32)}, begin + len(offsets)
        return replace(first, matrices=first.matrices | matrices)


NO_NEIGHBOURS = Neighbours()


def neighbours_of(tasks: Sequence[Any], dims: int, seed: int) -> Neighbours:
    """The neighbours that the tasks of a search compare: pairs on both sides of a genome, at the task's step. The genes
    of the first pair move together; those of the others in directions that the seed draws, the same for all
    genomes."""
    offsets = {}
    for task in tasks:
        if isinstance(task, ComparesNeighbours):
            signs = np.random.default_rng(seed).choice([-1.0, 1.0], (task.neighbours // 2, dims))
            signs[0] = 1.0
            offsets[task.name] = (task.step * np.concatenate([signs, -signs])).astype(np.float32)
    return Neighbours(offsets)


@dataclass(frozen=True)
class SpaceEvaluator(Generic[E]):
    """Scores genomes of a space. Each process decodes and evaluates its share. goal: what fitness is made of scores;
    neighbours: what is scored beside each genome."""

    space: Space
    evaluator: E
    devices: Devices = ONE_DEVICE
    goal: Goal = PLAIN
    neighbours: Neighbours = field(default=NO_NEIGHBOURS, kw_only=True)

    @property
    def tasks(self) -> Any:
        return self.evaluator.tasks

    def passes(self, population: int) -> int:
        return self.evaluator.passes(population * (1 + self.neighbours.count))

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
        asked = self.neighbours.beside(genomes) if self.neighbours.count else genomes
        size, is_alone = len(asked), self.devices.processes == 1
        share = range(size) if is_alone else self.devices.local_indices(size)
        # Processes that share each candidate all score every one.
        local_genomes = asked if is_alone else asked[share]
        scores = self.evaluator.evaluate(self.space.decode(local_genomes), progress)
        scores = self.neighbours.with_answers(self.tasks, scores)
        if not is_alone:
            outputs: dict[str, list[list[str]]] = {}
            for task, texts in scores.outputs.items():
                outputs[task] = [[] for _ in range(size)]
                for index, written in zip(share, texts, strict=True):
                    outputs[task][index] = written
            scores = replace(self._gathered(scores, size), outputs=outputs)
        return self.neighbours.agreement(scores, len(genomes)) if self.neighbours.count else scores

    def _gathered(self, local_scores: TaskScores, size: int) -> TaskScores:
        """The score matrices of all processes' candidates."""
        return TaskScores({
            task: {metric: self.devices.gather(matrix, size) for metric, matrix in metrics.items()}
            for task, metrics in local_scores.matrices.items()
        })  # fmt: skip
