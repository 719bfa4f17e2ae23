"""The main path: from a checked search to a winner in its run folder."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from evojax_merge import interrupts
from evojax_merge.errors import InputError
from evojax_merge.evaluation.devices import Devices, barrier, local_devices
from evojax_merge.evaluation.diagnostics import warnings
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.file_system import atomic_write
from evojax_merge.planning import make_plan
from evojax_merge.problem import (
    SearchProblem,
    failure_hint,
)
from evojax_merge.report.card import search_card
from evojax_merge.report.comparison import Result, write_result
from evojax_merge.report.plan import Plan
from evojax_merge.report.progress import OnGeneration, bytes_bar, console, passes_bar, say, search_bar
from evojax_merge.report.tables import terminal_table
from evojax_merge.search.environment import recorded_session
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import Archive, Reporter, Storage, evolve
from evojax_merge.search.run_folder import (
    Checkpoints,
    EarlierWinner,
    FolderStorage,
    earlier_winners,
    keep_winner,
    read_result,
    write_front,
)
from evojax_merge.search.run_parts import RunFolder, check_replaceable_model, check_room, read_lines
from evojax_merge.search.stopping import course_of, stopped
from evojax_merge.search.successive_halving import describe_halving
from evojax_merge.selection import open_evaluators, passes_to_select, select_best
from evojax_merge.tasks.splits import Splits

FORCE = "--force goes on all the same"


def search(
    folder: RunFolder,
    problem: SearchProblem,
    prepared: Splits[list[Any]],
    on_generation: OnGeneration,
    force: bool,
) -> None:
    """Search, choose the winner, export it and report. A run that has done all this is left unchanged."""
    why_complete = _why_complete(folder, problem)
    if why_complete is not None:
        say(why_complete)
        console.print(f"the run is complete; its winner: {folder.model}", highlight=False, soft_wrap=True)
        return
    check_room(folder, problem.search.generations)
    devices = local_devices(problem.backend.settings.model)
    planned = make_plan(problem, prepared)
    _print_setup(problem, prepared, devices, planned)
    if planned.target.is_accelerator and not planned.fits and not force:
        raise InputError(folder.path, f"{planned.what_would_fit()} ({FORCE})")

    with recorded_session(folder) if devices.is_main_process else nullcontext():
        with bytes_bar("loading", problem.backend.stored_bytes()) as progress:
            evaluators = open_evaluators(problem, prepared, devices, progress, say)
        generations = None if problem.search.parsed_budget.seconds else problem.search.generations
        with search_bar(generations, on_generation) as reporter:
            storage = FolderStorage(folder, Checkpoints(folder), is_main_process=devices.is_main_process)
            archive = evolve_on(problem, evaluators, storage, reporter, warnings, failure_hint)
        _print_work(folder, problem, evaluators)
        with passes_bar("scoring", passes_to_select(problem, evaluators)) as progress:
            result = select_best(problem, evaluators, archive, progress)
        if devices.is_main_process:
            _write_winner(folder, problem.within(archive.context), result)
    barrier("written")


def evolve_on(
    problem: SearchProblem, evaluators: Splits[SpaceEvaluator[Any]], storage: Storage, reporter: Reporter,
    diagnose: Callable[[Sequence[Any], TaskScores], Sequence[str]] = lambda tasks, scores: (),
    hint: Callable[[Any], str] = failure_hint,
) -> Archive:  # fmt: skip
    """Evolve a problem's candidates (see `search.loop.evolve`)."""
    return evolve(
        problem.search, problem.seed, problem.strategy, problem.space, evaluators.shards, storage, reporter, diagnose,
        hint, evaluators.minibatches, evaluators.validation, problem.example_choice(evaluators),
    )  # fmt: skip


def _print_setup(problem: SearchProblem, prepared: Splits[list[Any]], devices: Devices, planned: Plan) -> None:
    """Print the search's devices, models, batches, strategy and plan."""
    console.print(devices.describe(), highlight=False)
    for line in (*problem.backend.describe_inputs(prepared), *problem.notes):
        console.print(line, highlight=False, soft_wrap=True)
    for line in planned.summary():
        console.print(line, highlight=False, soft_wrap=True)


def _print_work(folder: RunFolder, problem: SearchProblem, evaluators: Splits[SpaceEvaluator[Any]]) -> None:
    """Print how candidates were scored, and how much successive halving saved."""
    used = [evaluator for evaluator in (evaluators.choice, *evaluators.minibatches, *evaluators.shards) if evaluator]
    console.print(problem.backend.describe_work(used), highlight=False)
    if len(evaluators.shards) > 1:
        examples = sum(task.size for shard in problem.splits.shards for task in shard if task.weight > 0)
        console.print(describe_halving(folder.read_history(), examples), highlight=False)


def _why_complete(folder: RunFolder, problem: SearchProblem) -> str | None:
    """One line, if a run folder holds all the results of a search of its saved generations, and no more are wanted;
    else None. All processes of a run call this together."""
    result, rows, wanted = read_result(folder.result), folder.read_history(), problem.search.generations
    if result is None or result.get("generations") != len(rows):
        return None
    written = [folder.recipe, folder.model, *([folder.front] if "members" in result else [])]
    if not all(path.exists() for path in written):
        return None
    course = course_of(rows, read_lines(folder.timing))
    ended = stopped(problem.search, course, problem.strategy.population) if "stopped_by" in result else None
    if ended is None and wanted > len(rows):
        return None
    saved = Checkpoints(folder).restore(say)
    if saved is None or not saved.describes(len(rows), folder.history):
        return None
    if ended is None:
        return f"{len(rows)} generations are saved, and {wanted} wanted: nothing to search"
    return f"{len(rows)} generations are saved: nothing to search ({ended.describe()})"


def _write_winner(folder: RunFolder, problem: SearchProblem, result: Result) -> None:
    """Export the winner, and report."""
    interrupts.check()
    check_replaceable_model(folder.model)
    recipe, history = problem.backend.recipe(result.genome), folder.read_history()
    keep_winner(folder, recipe)
    atomic_write(folder.recipe, recipe)
    if result.members:
        write_front(folder, [problem.backend.recipe(member.genome) for member in result.members])
    card = search_card(folder.path.name, problem, result, recipe, len(history))
    check = partial(check_replaceable_model, folder.model)
    problem.backend.export(recipe, result.genome, folder.model, card, check)
    write_result(result, len(history), folder.result)
    shown = result.report.terminal()
    if shown is not None:
        for line in shown.split("\n"):
            console.print(line, highlight=False, soft_wrap=True)
    console.print(terminal_table(result.rows, "Held-out scores"))
    if result.members:
        console.print(terminal_table(result.front(), "The front: no candidate is better in every task"))
        console.print(f"members: {folder.front} (export --member NUMBER)", highlight=False, soft_wrap=True)
    console.print(f"winner: {folder.model}", highlight=False, soft_wrap=True)
    for sentence in (result.chosen_on(), *result.verdicts()):
        console.print(sentence, style="bold", markup=False, highlight=False, soft_wrap=True)
    for earlier in earlier_winners(folder):
        line = _compared(earlier, len(history), result.winner.fitness)
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _compared(earlier: EarlierWinner, generations: int, fitness: float) -> str:
    """One line that compares the winner with an earlier one, on the examples that no search has seen."""
    now, before = f"{fitness:.4f}", f"{earlier.heldout_fitness:.4f}"
    verdict = "equal to" if now == before else "better than" if fitness > earlier.heldout_fitness else "WORSE than"
    return (
        f"held out, the winner of {generations} generations ({now}) is {verdict} that of {earlier.generations} "
        f"({before}), which is kept in {earlier.path}"
    )
