"""`evojax-merge reproduce`: a finished run is searched again, and compared with the first one to the bit."""

import os
from pathlib import Path

from evojax_merge import plugins
from evojax_merge.commands.search import run_search
from evojax_merge.errors import Failed, InputError
from evojax_merge.problem import read_config
from evojax_merge.schema.yaml_reader import load_documents
from evojax_merge.search.environment import differences, environment, read_sessions
from evojax_merge.search.reproduction import parting
from evojax_merge.search.run_folder import run_at
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import read_result
from evojax_merge.system.console import console


def reproduce(run: Path, out: Path | None) -> None:
    """Search again from a run's config, into a new folder. Raises InputError where the run is not finished, or an input
    has changed, and Failed where the two runs differ."""
    folder = run_at(Path(os.path.abspath(run)))
    if not (folder.is_finished() and folder.recipe.is_file() and folder.model.is_dir()):
        raise InputError(run, "has no winner to compare with; finish it with search … --resume")
    # A damaged recipe shows before the long work.
    load_documents(folder.recipe)
    out = out or folder.path.with_name(f"{folder.path.name}-reproduced")
    if os.path.lexists(out):
        raise InputError(out, "exists already; choose a new folder with --out")
    sessions, current = read_sessions(folder), environment()
    changes = list(dict.fromkeys(line for session in sessions for line in differences(session, current)))
    if not sessions:
        changes = [f"{folder.environment.name}: missing or damaged, so the environments cannot be compared"]
    for line in changes or ["the environment is the one that the run recorded"]:
        console.print(line, soft_wrap=True)
    plugins.load()
    overrides = _without_clock(folder)
    for number, end in enumerate(_ends(folder)):
        config = read_config(folder.config, [*overrides, *end], None)
        run_search(folder.config, config, out, resume=number > 0, overwrite=False)
    difference = parting(folder, RunFolder(out))
    if difference is not None:
        cause = "; ".join(changes) or (
            "nothing that was recorded: a fitness that depends on more than the inputs, or a pass that ran out of "
            "memory and was halved"
        )
        raise Failed(f"{out}: is not the same as {run}: {difference}; likely cause: {cause}")
    console.print(f"bit-identical: {out}", soft_wrap=True)


def _ends(folder: RunFolder) -> list[list[str]]:
    """The overrides of each end of a run that its winner depends on: of the one that it is kept from, and the last."""
    result = read_result(folder.result)
    if result is None or result.kept_from is None:
        return [[]]
    earlier = {"budget": "null", "generations": result.kept_from, "controls": "[]", "then": "null"}
    return [[f"search.{key}={value}" for key, value in earlier.items()], []]


def _without_clock(folder: RunFolder) -> list[str]:
    """The overrides of a run's config with which each search ends after the same generation, however long it takes: one
    that `search.stop.seconds` ended has its number of evaluations, which no schedule depends on, and one whose budget
    is a time its number of generations."""
    config = read_config(folder.config, [], None)
    searches = [config.search] if config.stages is None else [stage.search for stage in config.stages]
    count = len(searches)
    runs = [*(RunFolder(folder.stages / f"stage-{number}") for number in range(1, count)), folder]
    overrides = []
    for number, run in enumerate(runs):
        section = f"stages.{number}.search" if count > 1 else "search"
        overrides.append(f"{section}.stop.seconds=null")
        history = run.read_history()
        if searches[number].parsed_budget.seconds is not None:
            overrides += [f"{section}.budget=null", f"{section}.generations={len(history)}"]
        elif history and (result := read_result(run.result)) is not None and result.stopped_by == "seconds":
            overrides.append(f"{section}.stop.evaluations={history[-1]['evaluations']}")
    return overrides
