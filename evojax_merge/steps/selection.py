"""From a search's archive to the winner: re-scoring, and the comparison on held-out examples."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from evojax_merge.backends.backend import Backend
from evojax_merge.errors import Failed, InputError
from evojax_merge.evaluation.devices import ONE_DEVICE, Devices
from evojax_merge.evaluation.scores import ScoredModel, fitness, means, score_matrix, task_weights, units_of
from evojax_merge.problem import SearchProblem
from evojax_merge.report.answers import MOST_EXAMPLES, largest_differences
from evojax_merge.report.comparison import FrontMember, GuardResult, Result, Row, model_name, model_names
from evojax_merge.report.intervals import exact_lead, paired_lead
from evojax_merge.report.meetings import Meetings
from evojax_merge.report.plan import CHOOSING, HELDOUT, MEASURING
from evojax_merge.search.fronts import front_of
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import Archive, failure_hint
from evojax_merge.search.protocols import (
    GenomeEvaluator,
    Space,
    capabilities_of,
    goal_of,
    gradient_generations,
    plain_merges_of,
    within,
)
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import StoredResult, read_result
from evojax_merge.search.strategies.greedy import Greedy
from evojax_merge.steps.controls import Control, examples_of, make_controls, polish
from evojax_merge.steps.goals import StoredSplit, score_stored, with_goals
from evojax_merge.steps.loading import Load, Phase, Progress, loading_beside, silent_phase
from evojax_merge.tasks.images import thumbnail
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.task import GUARD_WEIGHT, Task


@runtime_checkable
class ComparesAnswers(Protocol):
    """An evaluator that scores the models of the held-out table by comparing their answers."""

    def compared(self, scored: Sequence[ScoredModel]) -> tuple[list[ScoredModel], Sequence[Mapping[str, Meetings]]]:
        """The same models, the winner last: role, name, and the scores in which the model stands, with its row; and for
        each `task/metric` -> the winner's meetings with it."""


def open_evaluators(
    problem: SearchProblem[Backend],
    prepared: Splits[list[Any]],
    devices: Devices = ONE_DEVICE,
    loading: Phase = silent_phase,
    log: Callable[[str], None] = lambda text: None,
    measuring: Phase = silent_phase,
    load: Load | None = None,
) -> Splits[SpaceEvaluator[Any]]:
    """Open evaluators of genomes on each of the splits, with the goal of the search, for which the base and the parents
    are scored. The steps of `loading` are bytes, those of `measuring` passes; `log` receives the evaluators' notes;
    load: of the bank, begun already (see `loading_beside`); None: it is loaded now."""
    backend, population = problem.backend, problem.strategy.population
    with nullcontext(load) if load else loading_beside(backend, devices, None, []) as load_bank:
        bank = load_bank(loading)
    on = with_neighbours(problem, backend.evaluators(bank, prepared, population, devices, log))
    counts = models_to_measure(problem)
    if not counts.search:
        return with_goals(problem, on, log)
    validation = 0 if on.validation is None else on.validation.passes(counts.validation)
    with measuring(MEASURING, on.search.passes(counts.search) + validation) as progress:
        return with_goals(problem, on, log, progress)


def open_evaluator(
    problem: SearchProblem[Backend], tasks: list[Any], devices: Devices = ONE_DEVICE, bank: Any = None
) -> SpaceEvaluator[Any]:
    """Score genomes on the prepared tasks of one split as generations are scored. bank: None: it is loaded."""
    backend = problem.backend
    bank = backend.load(devices, lambda done: None, None) if bank is None else bank
    one = Splits([tasks], [], None, [])
    on = backend.evaluators(bank, one, problem.strategy.population, devices, lambda text: None)
    return with_neighbours(problem, on).shards[0]


def with_neighbours(problem: SearchProblem[Backend], on: Splits[SpaceEvaluator[Any]]) -> Splits[SpaceEvaluator[Any]]:
    """The evaluators, which score the neighbours that their tasks ask for as well."""
    return on.map(lambda evaluator: replace(evaluator, neighbours=problem.neighbours(evaluator.tasks)))


@dataclass(frozen=True)
class Finalist:
    """A candidate, float32[D], its fitness on the examples that the winner is chosen on, and there its means on the
    tasks that count, float64[T], and its scores, float32[N], task by task."""

    genome: np.ndarray
    fitness: float
    task_means: np.ndarray
    scores: np.ndarray


def finalist_genomes(space: Space, archive: Archive) -> np.ndarray:
    """The finite genomes of the finalists, float32[F, D], each once (see `rescore`)."""
    genomes = np.concatenate([archive.genomes, archive.proposed, space.start[None], plain_merges_of(space)[0]])
    genomes = genomes[np.isfinite(genomes).all(axis=1)]
    _, kept = np.unique(genomes, axis=0, return_index=True)
    return genomes[np.sort(kept)]


def with_earlier_winner(archive: Archive, space: Space, folder: RunFolder | None) -> tuple[Archive, int | None]:
    """The archive with the winner of the run's earlier end as a finalist, and the generations of that end; None where
    the archive has this winner already, or there is none. A context decodes the genomes of its own generation alone."""
    earlier = (read_result(folder.result) if folder is not None else None) or StoredResult()
    genome = np.array(earlier.genome, np.float32)
    if archive.context is not None or len(genome) != space.dims:
        return archive, None
    if (finalist_genomes(space, archive) == genome).all(axis=1).any():
        return archive, None
    proposed = np.concatenate([archive.proposed, genome[None]])
    return replace(archive, proposed=proposed), earlier.kept_from or earlier.generations


def rescore(space: Space, evaluator: GenomeEvaluator, archive: Archive, progress: Any) -> list[Finalist]:
    """The finalists on the examples that the winner is chosen on, the full search split or the validation split, best
    first: the best few of the search, the strategy's proposals, the start, the uniform merge and the parents, so that
    no winner is worse there than a parent that the space contains and that keeps the guards. Candidates that are not
    finite are left out."""
    evaluator, genomes = within(evaluator, archive.context), finalist_genomes(space, archive)
    scores, goal = evaluator.score(genomes, progress), goal_of(evaluator)
    matrix = score_matrix(evaluator.tasks, scores, goal)
    values, task_means = fitness(evaluator.tasks, scores, goal), matrix.task_means
    order = np.argsort(-np.where(np.isfinite(matrix.fitness), matrix.fitness, -np.inf), kind="stable")
    return [
        Finalist(genomes[i], float(values[i]), task_means[i], matrix.values[i]) for i in order if np.isfinite(values[i])
    ]


def select_best(
    problem: SearchProblem[Backend],
    on: Splits[SpaceEvaluator[Any]],
    archive: Archive,
    phase: Phase = silent_phase,
    folder: RunFolder | None = None,
) -> Result:
    """Choose the winner among the finalists, on the validation split where there is one, else on the whole search
    split; then score the winner and the models that it is compared with on the held-out split. folder: keeps what is
    made for controls. Raises Failed where no finalist has finite scores."""
    problem, on = problem.within(archive.context), on.map(lambda evaluator: evaluator.within(archive.context))
    backend, heldout, counts = problem.backend, on.heldout, candidates_to_select(problem)
    on_validation = 0 if on.validation is None else on.validation.passes(counts.validation)
    with phase(CHOOSING, on.search.passes(counts.search) + on_validation) as progress:
        scored_again = replace(archive, genomes=archive.genomes[: _scored_again(problem)])
        scored_again, earlier = with_earlier_winner(scored_again, problem.space, folder)
        finalists = rescore(problem.space, on.deciding, scored_again, progress)
        if not finalists:
            raise Failed(_no_winner(problem, archive))
        best, (label, baselines) = finalists[0], problem.space.baselines()

        def fitness_on(evaluator: SpaceEvaluator[Any], genomes: np.ndarray) -> np.ndarray:
            return fitness(evaluator.tasks, evaluator.score(genomes, progress), evaluator.goal)

        fitness_of = {finalist.genome.tobytes(): finalist.fitness for finalist in finalists}
        missing = [genome for genome in baselines if genome.tobytes() not in fitness_of]
        if missing:
            missed = fitness_on(on.deciding, np.stack(missing))
            fitness_of |= {genome.tobytes(): float(value) for genome, value in zip(missing, missed, strict=True)}
        values = np.array([fitness_of[genome.tobytes()] for genome in baselines])
        number = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))
        plain, value = baselines[number], float(values[number])
        searched, plain_searched, validated = best.fitness, value, None
        if on.validation is not None:
            validated = (best.fitness, value)
            searched, plain_searched = (
                float(fitness_on(on.search, genome[None])[0]) for genome in (best.genome, plain)
            )
    controls, change = make_controls(problem, on, archive, phase, folder), None
    if problem.search.then == "polish":
        polished, change = polish(problem, on, archive, best.genome, phase, folder)
        controls.append(polished)
    with phase(HELDOUT, heldout.passes(counts.heldout)) as progress:
        table, answers = (
            _table(problem, heldout, best.genome, plain, controls, progress) if problem.splits.heldout else ([], ())
        )
        front = _front(heldout, finalists, progress) if capabilities_of(problem.strategy).keeps_front else ()
    # A task that is only shown, or only guarded, has no share of the fitness.
    shares = {task.name: share for task, share in task_weights(heldout.tasks) if task.weight > GUARD_WEIGHT}
    return Result(
        genome=best.genome,
        search_fitness=searched,
        baseline=(label, plain_searched),
        scores=best.scores,
        baseline_name=model_name(problem.parents[number]) if backend.facts.baseline_role is None else "",
        rows=table,
        report=backend.describe(best.genome).report,
        validation=validated,
        stopped_by=None if archive.stopped is None else archive.stopped.criterion,
        members=front,
        compute_dtype=backend.facts.final_compute_dtype,
        search_compute_dtype=backend.facts.compute_dtype,
        shares={f"{task.name}/{task.metric}": shares.get(task.name, 0.0) for task in heldout.tasks if table},
        scales=on.search.goal.scales,
        guards=_guards(on.deciding, best, table),
        answers=answers,
        parent=origin_of(backend, best.genome) if _is_parent(backend.facts.space, best.genome) else "",
        controls=tuple(control.note for control in controls if control.note),
        change=change if change is not None and change.facts["step"] else None,
        examples=examples_of(problem),
        fitted={control.role: control.search for control in controls if control.search is not None},
        held_out=is_held_out(heldout),
        kept_from=earlier if earlier and np.array_equal(best.genome, scored_again.proposed[-1]) else None,
    )


def is_held_out(heldout: SpaceEvaluator[Any]) -> bool:
    """Return whether the tasks that count keep examples from the search; a function of a model alone has none."""
    return any(task.is_divisible for task, weight in task_weights(heldout.tasks, heldout.goal) if weight)


def origin_of(backend: Backend, genome: np.ndarray) -> str:
    """The plain merge or the parent that a winner is, in words, or that the strategy proposed it (see
    `rescore`)."""
    space, parents = backend.facts.space, model_names(backend.facts.parents)
    merges, (label, baselines) = plain_merges_of(space)[0], space.baselines()
    named = [(f"the {label}", baselines[0])] if len(baselines) == 1 else []
    if len(merges) == 1 + len(parents):
        named += zip(["the uniform merge", *(f"the parent {name}" for name in parents)], merges, strict=True)
    named.append(("the start", space.start))
    equal = (name for name, merge in named if np.array_equal(merge, genome))
    return next(equal, "a parent" if _is_parent(space, genome) else "the strategy's proposal")


def _is_parent(space: Any, genome: np.ndarray) -> bool:
    return hasattr(space, "parents_among") and bool(space.parents_among(genome[None])[0])


def _guards(deciding: SpaceEvaluator[Any], best: Finalist, table: Sequence[Row]) -> tuple[GuardResult, ...]:
    """The winner beside the base on each guarded task."""
    goal, heldout = deciding.goal, {row.role: row.scores for row in table if row.role in ("base", "winner")}
    results = []
    for (task, _), mean in zip(task_weights(deciding.tasks), best.task_means, strict=True):
        if task.name in goal.guards:
            guard, score = goal.guards[task.name], f"{task.name}/{task.metric}"
            shown = (heldout["winner"][score], heldout["base"][score]) if heldout else None
            results.append(
                GuardResult(score, guard.tolerance, float(mean), guard.base, bool(mean >= guard.least), shown)
            )
    return tuple(results)


def _front(heldout: SpaceEvaluator[Any], finalists: Sequence[Finalist], progress: Progress) -> tuple[FrontMember, ...]:
    """The finalists that are the front on the examples that the winner is chosen on, from the best in the first task
    on; scored on the held-out split."""
    objectives = np.stack([finalist.task_means for finalist in finalists])
    front = front_of(objectives)
    chosen = [finalists[i] for i in front[np.argsort(-objectives[front, 0], kind="stable")]]
    names = [f"{task.name}/{task.metric}" for task, _ in task_weights(heldout.tasks)]
    scores = heldout.score(np.stack([finalist.genome for finalist in chosen]), progress)
    values = fitness(heldout.tasks, scores, heldout.goal)
    rows = zip(chosen, values, means(heldout.tasks, scores), strict=True)
    return tuple(
        FrontMember(
            number, finalist.fitness, dict(zip(names, map(float, finalist.task_means), strict=True)),
            float(heldout_fitness), {name: table[name] for name in names}, finalist.genome,
        )
        for number, (finalist, heldout_fitness, table) in enumerate(rows, start=1)
    )  # fmt: skip


def _table(
    problem: SearchProblem[Backend],
    heldout: SpaceEvaluator[Any],
    winner: np.ndarray,
    plain: np.ndarray,
    controls: Sequence[Control],
    progress: Progress,
) -> tuple[list[Row], Sequence[dict[str, Any]]]:
    """The rows of the held-out table: the stored models, the baseline where it is none of them, the controls and the
    winner; and the answers of the winner and of each task's best parent. winner, plain: the genomes of the winner and
    of the baseline."""
    backend = problem.backend
    scored: list[ScoredModel] = [
        (role, model_name(path), 0, score_stored(problem, "heldout", heldout, path, progress))
        for role, path in backend.facts.compared
    ]
    drawn = {control: control.genome for control in controls if control.genome is not None}
    finals = heldout.score(np.stack([winner, plain, *drawn.values()]), progress)
    if backend.facts.baseline_role is not None:
        role = backend.facts.baseline_role
        scored.append((role, f"{role} {backend.facts.name}", 1, finals))
    scored += [(control.role, control.name, p, finals) for p, control in enumerate(drawn, start=2)]
    scored += [(control.role, control.name, 0, control.scores) for control in controls if control.scores is not None]
    scored.append(("winner", f"evolved {backend.facts.name}", 0, finals))
    met: Sequence[Mapping[str, Meetings]] = [{}] * len(scored)
    if isinstance(heldout, ComparesAnswers):
        scored, met = heldout.compared(scored)
    rows = _rows(heldout, scored, met)
    shows_answers = heldout.devices.is_main_process and is_held_out(heldout)
    return rows, _answers(backend, heldout, winner, scored, rows) if shows_answers else []


def _rows(
    heldout: SpaceEvaluator[Any], scored: Sequence[ScoredModel], met: Sequence[Mapping[str, Meetings]]
) -> list[Row]:
    """A row for each model, those before the last, the winner, with its lead over them. met: the winner's meetings with
    each, where people compared answers."""
    tasks, units = heldout.tasks, units_of(heldout.tasks, scored[-1][3], heldout.goal)
    weighted = task_weights(tasks, heldout.goal)
    weights, lead_of = [weight for _, weight in weighted], paired_lead if is_held_out(heldout) else exact_lead

    def examples(model: ScoredModel, task: Task) -> np.ndarray:
        of_all: np.ndarray = model[3].matrices[task.name][task.metric]
        return of_all[model[2]]

    *others, winner = scored
    ours, rows = [examples(winner, task) for task, _ in weighted], []
    for role, name, p, scores in scored:
        value = float(fitness(tasks, scores, heldout.goal)[p])
        rows.append(Row(role, name, value, means(tasks, scores)[p], units=units))
    for k, (model, meetings) in enumerate(zip(others, met, strict=False)):
        too_few = {score for score, each in meetings.items() if each.too_few}
        lead = None if too_few else lead_of(ours, [examples(model, task) for task, _ in weighted], weights)
        by_task = {}
        for task in tasks if model[0] in ("base", "parent") else ():
            of_task = lead_of([examples(winner, task)], [examples(model, task)], [1.0])
            if of_task is not None and (score := f"{task.name}/{task.metric}") not in too_few:
                by_task[score] = of_task
        rows[k] = replace(rows[k], lead=lead, task_leads=by_task, meetings=meetings)
    return rows


def _answers(
    backend: Backend,
    heldout: SpaceEvaluator[Any],
    winner: np.ndarray,
    scored: Sequence[ScoredModel],
    rows: Sequence[Row],
) -> list[dict[str, Any]]:
    """The answers of the winner, and to each task those of the parent that is best in it: one that is best in another
    task would hide where the winner lost."""
    parents, last, best = [k for k, row in enumerate(rows) if row.role == "parent"], len(rows) - 1, {}
    if not parents:
        return []
    for task in heldout.tasks:
        values = [rows[k].scores[f"{task.name}/{task.metric}"] for k in parents]
        best[task.name] = parents[int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))]
    answers: list[dict[str, Any]] = []
    for k in (last, *sorted(set(best.values()))):
        candidate = winner if k == last else backend.facts.compared[k][1]
        answered = backend.answers(rows[k].name, candidate, heldout, scored[k][3], scored[k][2])
        answers += [row for row in answered if k == last or best[row["task"]] == k]
    _add_thumbnails(heldout.tasks, answers)
    return answers


def _add_thumbnails(tasks: Sequence[Task], answers: Sequence[dict[str, Any]]) -> None:
    """Give the winner's answers that a page of the run may show their examples' images, small. answers: the winner's,
    and then of each task those of another model."""
    for task in tasks:
        rows = [row for row in answers if row["task"] == task.name]
        scores, count = [row["score"] for row in rows], len(rows) // 2
        for k in largest_differences(scores[:count], scores[count:])[:MOST_EXAMPLES]:
            # A file that is gone by now has been scored all the same.
            with suppress(InputError):
                image = task.image(k)
                if image is not None:
                    rows[k]["thumbnail"] = thumbnail(image)


def _no_winner(problem: SearchProblem[Backend], archive: Archive) -> str:
    """The message about a search without a winner: every generation had a candidate with finite scores, but none of the
    finalists has on the examples that the winner is chosen on."""
    metrics = ", ".join(f"{task.name} ({task.metric})" for task in problem.splits.search)
    split = "whole search split" if problem.splits.validation is None else "validation split"
    return (
        f"no winner: after {archive.generations} generations of {problem.strategy.population} candidates, none of the "
        f"{problem.search.finalists} best, what the strategy proposed, the start and the parents has finite scores on "
        f"the {split} of {metrics}. {failure_hint(problem.splits.search[0])}"
    )


@dataclass(frozen=True)
class SelectionCounts:
    """The most models that are scored on each split, beside the candidates of the generations."""

    search: int
    validation: int
    heldout: int


def _scored_again(problem: SearchProblem[Backend]) -> int:
    """The number of a search's best candidates that are scored again. One, where the generations were scored on the
    examples that the winner is chosen on, in the same dtype: their fitness has ranked the others behind it."""
    splits, facts = problem.splits, problem.facts
    sizes = [
        sum(task.size for tasks in part for task, _ in task_weights(tasks))
        for part in (splits.shards, [splits.search])
    ]  # fmt: skip
    ranked = splits.validation is None and sizes[0] == sizes[1] and facts.compute_dtype == facts.final_compute_dtype
    return 1 if ranked and not capabilities_of(problem.strategy).keeps_front else problem.search.finalists


def candidates_to_select(problem: SearchProblem[Backend]) -> SelectionCounts:
    """The most models that `select_best` scores on each split."""
    plain, _ = plain_merges_of(problem.space)
    front = problem.strategy.population + len(plain) if capabilities_of(problem.strategy).keeps_front else 0
    _, proposed = gradient_generations(problem.strategy, problem.search.generations)
    # Besides the finalists and the strategy's proposals: the start, the uniform merge and the parents.
    others = np.unique(np.concatenate([problem.space.start[None], plain, problem.space.baselines()[1]]), axis=0)
    candidates = _scored_again(problem) + max(1, proposed) + len(others) + front
    heldout = not_kept(problem, "heldout", problem.splits.heldout) + 2 + front + len(problem.search.controls)
    if "greedy" in problem.search.controls:
        soup = Greedy(problem.space)
        candidates += soup.population * (soup.capabilities.generations or 0)
    if problem.splits.validation is None:
        return SelectionCounts(candidates, 0, heldout)
    return SelectionCounts(2, candidates, heldout)


def not_kept(problem: SearchProblem, split: StoredSplit, tasks: Sequence[Task]) -> int:
    """The number of models of the search, base and parents, whose scores on a split no earlier search kept."""
    models = [model for _, model in problem.facts.compared]
    if problem.kept is None:
        return len(models)
    sizes = {task.name: task.size for task in tasks}
    return sum(problem.kept.read(split, model, sizes) is None for model in models)


def models_to_measure(problem: SearchProblem) -> SelectionCounts:
    """The models that are scored on each split before the first generation, for scales and guards (`with_goals`); those
    on the examples of the generations count as on the search split."""
    scaled = not_kept(problem, "search", problem.splits.search) if problem.scale == "parents" else 0
    guarded = 1 if problem.guards else 0
    return SelectionCounts(scaled + 2 * guarded, guarded if problem.splits.validation is not None else 0, 0)
