"""The goal of a search: the scales and guards of its fitness, from the scores of its base and parents."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evojax_merge.backends.backend import Backend, Progress
from evojax_merge.errors import Failed
from evojax_merge.evaluation.scores import ROUNDING, Goal, Guard, Scale, TaskScores, means, task_weights
from evojax_merge.problem import SearchProblem
from evojax_merge.report.comparison import model_name
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.system.console import say
from evojax_merge.tasks.splits import Splits

StoredSplit = Literal["search", "heldout"]


def with_goals(
    problem: SearchProblem, on: Splits[SpaceEvaluator[Any]], log: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda passes: None,
) -> Splits[SpaceEvaluator[Any]]:  # fmt: skip
    """The evaluators of each split, with the goal of the search. `log` receives a line for each task's scale,
    `progress` the passes of the models that are measured."""
    scales = {} if problem.scale == "none" else measured_scales(problem, on.search, log, progress)
    if not scales and not problem.guards:
        return on

    def scaled(evaluator: SpaceEvaluator[Any]) -> SpaceEvaluator[Any]:
        return replace(evaluator, goal=Goal(scales))

    guarded = [with_goal(problem, evaluator, scales, progress) for evaluator in (*on.shards, on.search)]
    validation = None if on.validation is None else with_goal(problem, on.validation, scales, progress)
    return replace(on.map(scaled), shards=guarded[:-1], search=guarded[-1], validation=validation)


def with_goal(
    problem: SearchProblem, evaluator: SpaceEvaluator[Any], scales: Mapping[str, Scale],
    progress: Progress = lambda passes: None,
) -> SpaceEvaluator[Any]:  # fmt: skip
    """The evaluator with these scales, and guards by the base's scores on its examples. Raises Failed where one of
    these is not finite."""
    if not problem.guards:
        return replace(evaluator, goal=Goal(scales))
    assert problem.facts.base is not None, "opening the search refuses guards without a base"
    scored = means(evaluator.tasks, problem.backend.score_stored(problem.facts.base, evaluator, progress))[0]
    guards = {}
    for task, _ in task_weights(evaluator.tasks):
        if task.name in problem.guards:
            mean = scored[f"{task.name}/{task.metric}"]
            if not np.isfinite(mean):
                raise Failed(f"guard of task {task.name}: the base's score is not finite: nothing compares with it")
            guards[task.name] = Guard(mean, problem.guards[task.name])
    return replace(evaluator, goal=Goal(scales, guards))


def measured_scales(
    problem: SearchProblem, search: SpaceEvaluator[Any], log: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda passes: None,
) -> dict[str, Scale]:  # fmt: skip
    """The scale of each task that counts, by `task/metric`, from the scores of all models on the search split: from the
    base, or where there is none the worst parent, to the best parent. A task on which these two are equal has none."""
    scored = [
        (role, model, means(search.tasks, score_stored(problem, "search", search, model, progress))[0])
        for role, model in problem.facts.compared
    ]
    scales = {}
    for task, _ in task_weights(search.tasks):
        name = f"{task.name}/{task.metric}"
        finite = [(role, model, mean[name]) for role, model, mean in scored if np.isfinite(mean[name])]
        parents = sorted((mean, model) for role, model, mean in finite if role == "parent")
        base = next(((mean, model) for role, model, mean in finite if role == "base"), None)
        what = f"scale of task {task.name} ({task.metric})"
        if not parents:
            log(f"{what}: none, because no parent has a finite score")
            continue
        best, best_model = parents[-1]
        zero, zero_model = parents[0] if base is None else base
        start = f"the worst parent {model_name(zero_model)}" if base is None else "the base"
        if abs(best - zero) <= ROUNDING * max(1.0, abs(zero)):
            log(f"{what}: none, because {start} and the best parent both score {zero:.4g}")
            continue
        scales[name] = Scale(zero, abs(best - zero))
        log(f"{what}: 0 is {zero:.4g} ({start}), {'1' if best > zero else '-1'} is {best:.4g} (the best parent "
            f"{model_name(best_model)})")  # fmt: skip
    return scales


def score_stored(
    problem: SearchProblem[Backend], split: StoredSplit, evaluator: SpaceEvaluator[Any], model: Path,
    progress: Progress,
) -> TaskScores:  # fmt: skip
    """The scores of the base or of a parent on a split, as an earlier search kept them or as they are computed now."""
    sizes = {task.name: task.size for task in evaluator.tasks}
    kept = None if problem.kept is None else problem.kept.read(split, model, sizes)
    if kept is not None:
        say(f"{model_name(model)}: scored on the {split} split by an earlier search, of the same models and tasks")
        return kept
    scores = problem.backend.score_stored(model, evaluator, progress)
    if problem.kept is not None:
        problem.kept.keep(split, model, sizes, scores)
    return scores
