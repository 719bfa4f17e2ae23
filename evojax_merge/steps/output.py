"""The output of a search: the lines about its setup and its work, and its winner's files."""

import hashlib
from functools import partial
from typing import Any

from evojax_merge.backends.backend import Backend, Prepared
from evojax_merge.errors import print_warning
from evojax_merge.evaluation.devices import Devices
from evojax_merge.problem import SearchProblem
from evojax_merge.report.card import search_card
from evojax_merge.report.comparison import Result, scores_title, write_result
from evojax_merge.report.plan import DAY, ENDING, Plan, shown_seconds
from evojax_merge.report.tables import scores_table
from evojax_merge.search.checkpoints import Checkpoints, to_line
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.run_folder import keep_winner, write_front
from evojax_merge.search.run_parts import RunFolder, check_replaceable
from evojax_merge.search.run_schema import read_result
from evojax_merge.search.stopping import course_of, stopped
from evojax_merge.steps.controls import control_roles
from evojax_merge.system import interrupts
from evojax_merge.system.console import console, say
from evojax_merge.system.file_system import atomic_write, remove_folder
from evojax_merge.tasks.splits import Splits


def print_setup(
    problem: SearchProblem[Backend], prepared: Prepared, devices: Devices, planned: Plan, saved: int
) -> None:
    """Print the search's devices, models, batches, strategy and plan. saved: the number of generations that are done,
    which a plan does not price."""
    console.print(devices.describe())
    for line in (*problem.facts.notes, *prepared.notes, *problem.notes, *planned.summary(saved)):
        console.print(line, soft_wrap=True)
    stop, parts = problem.search.stop.seconds, planned.part_seconds()
    after = sum(parts.get(name, 0.0) for name in ENDING)
    if planned.fits and stop is not None and after > stop:
        say(f"search.stop.seconds: {stop:g} s of generations; what follows them takes about {shown_seconds(after)}")
    seconds = planned.seconds_left(saved) + planned.around_seconds
    if planned.fits and seconds > 3 * DAY:
        print_warning(
            f"the search takes about {shown_seconds(seconds)}; fewer generations, candidates or "
            "examples take less, and search.budget ends it in time"
        )


def print_work(folder: RunFolder, problem: SearchProblem[Backend], evaluators: Splits[SpaceEvaluator[Any]]) -> None:
    """Print how candidates were scored, and how much successive halving saved."""
    used = [evaluator for evaluator in (evaluators.choice, *evaluators.minibatches, *evaluators.shards) if evaluator]
    console.print(problem.backend.describe_work(used))
    if len(evaluators.shards) > 1:
        examples = sum(task.size for shard in problem.splits.shards for task in shard if task.weight > 0)
        counts = [count for row in folder.read_history() for count in row["examples"]]
        done, total = sum(counts), len(counts) * examples
        share = f"{1 - done / total:.0%} saved"
        console.print(f"successive halving: {done:,} of {total:,} passes of a candidate over an example ({share})")


def print_complete(folder: RunFolder, why: str) -> None:
    """Say that a run is complete, and leave it as it is."""
    say(why)
    console.print(f"the run is complete; its winner: {folder.model}", soft_wrap=True)


def why_complete(folder: RunFolder, problem: SearchProblem[Backend]) -> str | None:
    """One line, if a run folder holds all the results of a search of its saved generations, and no more are wanted;
    else None. All processes of a run call this together."""
    result, rows, wanted = read_result(folder.result), folder.read_history(), problem.search.generations
    if result is None or result.generations != len(rows):
        return None
    written = [folder.recipe, folder.model, *([folder.front] if result.members else [])]
    if not all(path.exists() for path in written):
        return None
    if result.table and not control_roles(problem) <= {row.role for row in result.table}:
        return None
    course = course_of(rows, folder.read_timing())
    ended = stopped(problem.search, course, problem.strategy.population) if result.stopped_by is not None else None
    if ended is None and wanted > len(rows):
        return None
    saved = Checkpoints(folder).restore(say)
    if saved is None or saved.generations != len(rows):
        return None
    content = folder.history.read_bytes()
    if (len(content), hashlib.sha256(content).digest()) != (saved.history_length, saved.history_digest):
        return None
    if ended is None:
        return f"{len(rows)} generations are saved, and {wanted} wanted: nothing to search"
    return f"{len(rows)} generations are saved: nothing to search ({ended.describe()})"


def write_winner(folder: RunFolder, problem: SearchProblem[Backend], result: Result) -> None:
    """Export the winner, and report."""
    interrupts.check()
    check_replaceable(folder.model)
    recipe, history = problem.backend.describe(result.genome).recipe, folder.read_history()
    keep_winner(folder, recipe)
    atomic_write(folder.recipe, recipe)
    if result.members:
        write_front(folder, [problem.backend.describe(member.genome).recipe for member in result.members])
    card = search_card(folder.path.name, problem, result, recipe, len(history))
    check = partial(check_replaceable, folder.model)
    tensors = problem.backend.export(recipe, result.genome, folder.model, card, check)
    check_replaceable(folder.adapter)
    if result.change is not None:
        change, check = result.change, partial(check_replaceable, folder.adapter)
        change.model.export(folder.model, change.vector, folder.adapter, check)
    elif folder.adapter.exists():
        remove_folder(folder.adapter)
    if result.answers:
        atomic_write(folder.heldout_answers, "".join(map(to_line, result.answers)))
    write_result(result, len(history), folder.result, tensors)
    shown = result.report.terminal()
    if shown is not None:
        for line in shown.split("\n"):
            console.print(line, soft_wrap=True)
    console.print(scores_table(result.rows).terminal(scores_title(result.held_out)))
    if result.members:
        console.print(scores_table(result.front()).terminal("The front: no candidate is better in every task"))
        console.print(f"members: {folder.front} (export --member NUMBER)", soft_wrap=True)
    console.print(f"winner: {folder.model}", soft_wrap=True)
    if result.change is not None:
        console.print(f"polished: {folder.adapter}, an adapter of it (export --as polished)", soft_wrap=True)
    measured = result.measured()
    for sentence in (result.chosen_on(), *([] if measured is None else [measured]), *result.verdicts()):
        console.print(sentence, style="bold", soft_wrap=True)
    # Earlier winners are compared with this one on the examples that no search has seen.
    for place in folder.kept_winners():
        earlier = read_result(place / folder.result.name)
        if earlier is None or earlier.winner is None:
            continue
        fitness, before = result.winner.fitness, earlier.winner.heldout_fitness
        is_equal = f"{fitness:.4f}" == f"{before:.4f}"
        verdict = "equal to" if is_equal else "better than" if fitness > before else "WORSE than"
        console.print(
            f"held out, the winner of {len(history)} generations ({fitness:.4f}) is {verdict} that of "
            f"{earlier.generations} ({before:.4f}), which is kept: {place / folder.model.name} is a model folder like "
            f"{folder.model}", soft_wrap=True,
        )  # fmt: skip
