"""Evaluators whose scores on tasks that people judge are the judges' votes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import eq
from typing import Any, cast

import numpy as np

from evojax_merge.evaluation.scores import ScoredModel, TaskScores
from evojax_merge.judge.activity import Activity
from evojax_merge.judge.ballot import INCUMBENTS, Ballot
from evojax_merge.report.meetings import Meetings
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import Archive
from evojax_merge.search.protocols import ContextSpace, Progress
from evojax_merge.tasks.arrays import ArrayTask
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.voting import METRIC, JudgedTask


@dataclass(frozen=True)
class AskingEvaluator(SpaceEvaluator[Any]):
    """Scores generations: judges vote on the answers. describe: (context, genome) -> what its candidate is made of;
    activity: what the page says in the meantime."""

    ballots: Mapping[str, Ballot] = field(default_factory=dict)
    describe: Callable[[Any, np.ndarray], str | None] = lambda context, genome: None
    context: Any = None
    activity: Activity = field(default_factory=Activity)

    def within(self, context: Any) -> "AskingEvaluator":
        return replace(cast(AskingEvaluator, super().within(context)), context=context)

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        genomes, count = np.asarray(genomes), len(genomes)
        # A genome that refers to the strategy's state may mean nothing in the next generation.
        most = 0 if isinstance(self.space, ContextSpace) else INCUMBENTS
        incumbents = {name: one.incumbents(genomes, most).astype(genomes.dtype) for name, one in self.ballots.items()}
        # A search that goes on knows none of the answers before.
        forgotten = {
            one.tobytes(): one for name, ballot in self.ballots.items() for one in incumbents[name]
            if one.tobytes() not in ballot.answers
        }  # fmt: skip
        progress = self.activity.writing(self.passes(count + len(forgotten)), progress)
        scores = super().score(np.stack([*genomes, *forgotten.values()]), progress)
        self.activity.asking()
        strengths = {}
        for name, ballot in self.ballots.items():
            again = dict(zip(forgotten, scores.outputs[name][count:], strict=True))
            earlier = [again.get(one.tobytes()) or ballot.answers[one.tobytes()] for one in incumbents[name]]
            met = np.concatenate([genomes, incumbents[name]])
            task, describe = judged_task(self, name), partial(self.describe, self.context)
            strengths[name] = ballot.strengths(task, met, [*scores.outputs[name][:count], *earlier], describe)[:count]
        self.activity.counting()
        return _with_strengths(self, scores.candidates(range(count)), strengths)


@dataclass(frozen=True)
class RememberingEvaluator(SpaceEvaluator[Any]):
    """Scores candidates by the votes so far; asks for none."""

    ballots: Mapping[str, Ballot] = field(default_factory=dict)

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        strengths = {name: ballot.posterior(np.asarray(genomes)) for name, ballot in self.ballots.items()}
        return _with_strengths(self, super().score(genomes, progress), strengths)


@dataclass(frozen=True)
class MeetingEvaluator(SpaceEvaluator[Any]):
    """Scores the held-out table: judges compare the winner's answers with those of every other model."""

    ballots: Mapping[str, Ballot] = field(default_factory=dict)

    def compared(self, scored: Sequence[ScoredModel]) -> tuple[list[ScoredModel], list[dict[str, Meetings]]]:
        """The models with their scores on tasks that people judge, the winner last: 1 for a prompt on which the judges
        prefer the model to the winner, -1 where they prefer the winner, else 0; the winner has 0 on all of them. And
        for each model `task/metric` -> the winner's meetings with it."""
        shown = [scores.candidates([p]) for _, _, p, scores in scored]
        meetings = [dict[str, Meetings]() for _ in scored]
        for name, ballot in self.ballots.items():
            task = judged_task(self, name)
            texts = [scores.outputs[name][p] for _, _, p, scores in scored]
            met = ballot.meetings(task, texts[-1], texts[:-1])
            for k, row in enumerate((*met, np.zeros(task.size))):
                shown[k].matrices[name] = {METRIC: row[None].astype(np.float32)}
                won, lost, same = (row < 0).sum(), (row > 0).sum(), sum(map(eq, texts[k], texts[-1]))
                meetings[k][f"{name}/{METRIC}"] = Meetings(won, lost, task.size - won - lost - same, same)
        return [(role, name, 0, shown[k]) for k, (role, name, _, _) in enumerate(scored)], meetings


def with_best(archive: Archive, ballots: Mapping[str, Ballot], count: int) -> Archive:
    """The archive with the best candidates by all votes as finalists: later votes say something about earlier ones."""
    best = [ballot.best(count).astype(archive.proposed.dtype) for ballot in ballots.values()]
    return replace(archive, proposed=np.concatenate([archive.proposed, *(each for each in best if len(each))]))


def judged(
    on: Splits[SpaceEvaluator[Any]], ballots: Mapping[str, Ballot],
    describe: Callable[[Any, np.ndarray], str | None] = lambda context, genome: None,
    activity: Activity | None = None,
) -> Splits[SpaceEvaluator[Any]]:  # fmt: skip
    """The evaluators of each split, where `ballots` hold the tasks that people judge, by name. describe, activity: as
    `AskingEvaluator` has them."""
    if not ballots:
        return on

    def extended(kind: Callable[..., Any], one: SpaceEvaluator[Any]) -> Any:
        # A task of weight 0 is in the held-out split alone.
        names = {task.name for task in one.tasks}
        asked = {name: ballot for name, ballot in ballots.items() if name in names}
        return kind(one.space, one.evaluator, one.devices, one.goal, neighbours=one.neighbours, ballots=asked)

    asking = partial(AskingEvaluator, describe=describe, activity=activity or Activity())
    most = {name: ballot.task.voting.config.heldout_votes for name, ballot in ballots.items()}
    chosen = [np.arange(min(most.get(task.name, task.size), task.size)) for task in on.heldout.tasks]
    return Splits(
        shards=[extended(asking, shard) for shard in on.shards],
        search=extended(RememberingEvaluator, on.search),
        validation=None if on.validation is None else extended(RememberingEvaluator, on.validation),
        heldout=extended(MeetingEvaluator, on.heldout.subset(chosen)),
    )


def judged_task(evaluator: SpaceEvaluator[Any], name: str) -> JudgedTask:
    """The task of a name whose answers judges compare."""
    task: Any = next(task for task in evaluator.tasks if task.name == name)
    judged: JudgedTask = task.compared if isinstance(task, ArrayTask) else task
    return judged


def _with_strengths(
    evaluator: SpaceEvaluator[Any], scores: TaskScores, strengths: Mapping[str, np.ndarray]
) -> TaskScores:
    """The scores where every example of a judged task has the candidate's strength."""
    matrices = {
        name: {METRIC: np.repeat(values[:, None], judged_task(evaluator, name).size, 1).astype(np.float32)}
        for name, values in strengths.items()
    }
    return replace(scores, matrices=scores.matrices | matrices)
