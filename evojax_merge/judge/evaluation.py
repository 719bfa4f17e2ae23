"""Evaluators whose scores on `kind: human` tasks are judges' votes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.judge.ballot import Ballot
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.protocols import Progress
from evojax_merge.tasks.human import METRIC, HumanTask
from evojax_merge.tasks.splits import Splits

# A model of the held-out table: its role, its name, the scores in which it stands, and its row there.
Scored = tuple[str, str, int, TaskScores]


@dataclass(frozen=True)
class AskingEvaluator(SpaceEvaluator[Any]):
    """Scores generations: judges vote on the answers."""

    ballots: Mapping[str, Ballot] = field(default_factory=dict)

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        scores = super().score(genomes, progress)
        strengths = {
            name: ballot.strengths(_human(self, name), np.asarray(genomes), scores.outputs[name])
            for name, ballot in self.ballots.items()
        }
        return _with_strengths(self, scores, strengths)


@dataclass(frozen=True)
class RememberingEvaluator(SpaceEvaluator[Any]):
    """Scores candidates by the votes so far; asks for none."""

    ballots: Mapping[str, Ballot] = field(default_factory=dict)

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        scores = super().score(genomes, progress)
        return _with_strengths(
            self, scores, {name: ballot.posterior(np.asarray(genomes)) for name, ballot in self.ballots.items()}
        )


@dataclass(frozen=True)
class MeetingEvaluator(SpaceEvaluator[Any]):
    """Scores the held-out table: judges compare the winner's answers with those of every other model."""

    ballots: Mapping[str, Ballot] = field(default_factory=dict)

    def compared(self, scored: Sequence[Scored]) -> list[Scored]:
        """The models with their scores on tasks that people judge, the winner last: 1 for a prompt on which the judges
        prefer the model to the winner, -1 where they prefer the winner, else 0; the winner has 0 on all of them."""
        matrices: list[dict[str, dict[str, np.ndarray]]] = [
            {task: {metric: values[p : p + 1] for metric, values in metrics.items()}
             for task, metrics in scores.matrices.items()}
            for _, _, p, scores in scored
        ]  # fmt: skip
        for name, ballot in self.ballots.items():
            task = _human(self, name)
            texts = [scores.outputs[name][p] for _, _, p, scores in scored]
            met = ballot.meetings(task, texts[-1], texts[:-1])
            for k, row in enumerate((*met, np.zeros(task.size))):
                matrices[k][name] = {METRIC: row[None].astype(np.float32)}
        return [
            (role, name, 0, TaskScores(
                matrices[k], {task: [texts[p]] for task, texts in scores.outputs.items()},
                {task: totals[p : p + 1] for task, totals in scores.log_probabilities.items()},
            ))
            for k, (role, name, p, scores) in enumerate(scored)
        ]  # fmt: skip


def judged(on: Splits[SpaceEvaluator[Any]], ballots: Mapping[str, Ballot]) -> Splits[SpaceEvaluator[Any]]:
    """The evaluators of each split, where `ballots` hold the tasks that people judge, by name."""
    if not ballots:
        return on

    def extended(kind: type[Any], one: SpaceEvaluator[Any]) -> SpaceEvaluator[Any]:
        return kind(one.space, one.evaluator, one.devices, one.goal, ballots)

    counts = {name: min(ballot.task.heldout_votes, _human(on.heldout, name).size) for name, ballot in ballots.items()}
    chosen = [np.arange(counts.get(task.name, task.size)) for task in on.heldout.tasks]
    return Splits(
        shards=[extended(AskingEvaluator, shard) for shard in on.shards],
        search=extended(RememberingEvaluator, on.search),
        validation=None if on.validation is None else extended(RememberingEvaluator, on.validation),
        heldout=extended(MeetingEvaluator, on.heldout.subset(chosen)),
    )


def _human(evaluator: SpaceEvaluator[Any], name: str) -> HumanTask:
    return next(task for task in evaluator.tasks if task.name == name)


def _with_strengths(
    evaluator: SpaceEvaluator[Any], scores: TaskScores, strengths: Mapping[str, np.ndarray]
) -> TaskScores:
    """The scores where every example of a judged task has the candidate's strength."""
    matrices = {
        name: {METRIC: np.repeat(values[:, None], _human(evaluator, name).size, 1).astype(np.float32)}
        for name, values in strengths.items()
    }
    return replace(scores, matrices=scores.matrices | matrices)
