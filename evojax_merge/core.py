"""The main path: from a checked search to a winner in its run folder."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from evojax_merge.backends.backend import Backend, Prepared
from evojax_merge.errors import InputError
from evojax_merge.evaluation.compilations import compilations
from evojax_merge.evaluation.devices import barrier, local_devices
from evojax_merge.evaluation.diagnostics import warnings
from evojax_merge.evaluation.timings import read_timings
from evojax_merge.judge.evaluation import judged, with_best
from evojax_merge.judge.opening import JudgeOptions, judging
from evojax_merge.judge.proposals import proposing
from evojax_merge.problem import SearchProblem
from evojax_merge.report.progress import OnGeneration, bytes_bar, passes_bar, search_bar
from evojax_merge.search.checkpoints import Checkpoints, FolderStorage
from evojax_merge.search.environment import recorded_session
from evojax_merge.search.kept_scores import kept_scores
from evojax_merge.search.loop import evolve
from evojax_merge.search.run_parts import RunFolder, check_room, remove_members
from evojax_merge.search.run_schema import read_run_config
from evojax_merge.steps.controls import why_no_gradient
from evojax_merge.steps.loading import loading_beside
from evojax_merge.steps.output import print_complete, print_setup, print_work, why_complete, write_winner
from evojax_merge.steps.planning import compiling_beside, ending_estimate, make_plan, record_timing
from evojax_merge.steps.selection import open_evaluators, select_best
from evojax_merge.system.console import say

FORCE = "--force goes on all the same"


def search(
    folder: RunFolder,
    problem: SearchProblem[Backend],
    prepared: Prepared,
    on_generation: OnGeneration,
    force: bool,
    judges: JudgeOptions | None,
    on_searched: Callable[[], None] = lambda: None,
) -> None:
    """Search, choose the winner, export it and report. A run that has done all this is left unchanged. on_searched: is
    called once all generations are saved."""
    complete = why_complete(folder, problem)
    if complete is not None:
        print_complete(folder, complete)
        return
    check_room(folder, problem.search.generations)
    problem = replace(problem, kept=kept_scores(read_run_config(folder.config), jax.process_count()))
    devices, compiled_before = local_devices(problem.facts.settings.model), compilations()
    reading = list[float]()
    with loading_beside(problem.backend, devices, folder.members, reading) as load:
        planned = make_plan(problem, prepared, timings=read_timings())
        print_setup(problem, prepared, devices, planned, len(folder.read_history()))
        if planned.target.is_accelerator and not planned.fits and not force:
            raise InputError(folder.path, f"{planned.what_would_fit()} ({FORCE})")

        with recorded_session(folder) if devices.is_main_process else nullcontext():
            generations = None if problem.search.parsed_budget.seconds else problem.search.generations
            with judging(folder, problem, say, judges or JudgeOptions()) as (ballots, activity):
                loading, measuring = activity.shown(bytes_bar), activity.shown(passes_bar)
                with compiling_beside(problem, prepared):
                    evaluators = open_evaluators(problem, prepared, devices, loading, say, measuring, load)
                without = why_no_gradient(problem, evaluators)
                if without and problem.splits.tuning:
                    say(f"adapters: trained by rank-1 evolution strategies, without gradients, for {without}")
                evaluators = judged(evaluators, ballots, partial(family_tree, problem), activity)
                problem = proposing(problem, ballots)
                # The export reads the models again, and writes one.
                ending = ending_estimate(problem, planned, compiled_before, sum(reading))
                with search_bar(generations, on_generation, ending) as reporter:
                    storage = FolderStorage(
                        folder, Checkpoints(folder, problem.keep), is_main_process=devices.is_main_process
                    )
                    archive = evolve(problem, evaluators, storage, reporter, warnings)
                archive = with_best(archive, ballots, problem.search.finalists)
                print_work(folder, problem, evaluators)
                on_searched()
                result = select_best(problem, evaluators, archive, activity.shown(passes_bar), folder)
                activity.conclude(result)
                say((compilations() - compiled_before).describe())
                if devices.is_main_process:
                    write_winner(folder, problem.within(archive.context), result)
                    remove_members(folder)
                    if not ballots:
                        record_timing(planned, folder, compilations() - compiled_before)
    barrier("written")


def family_tree(problem: SearchProblem[Backend], context: Any, genome: np.ndarray) -> str | None:
    """The family tree of a pool's candidate, in lines; None for a candidate without parents that the search has bred.
    context: what the strategy lends the space."""
    if context is None:
        return None
    return problem.backend.within(context).describe(genome).report.terminal()
