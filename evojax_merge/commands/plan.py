"""`evojax-merge plan`: the cost of a search, from headers alone."""

import json
import tempfile
from functools import partial
from pathlib import Path

from evojax_merge import plugins
from evojax_merge.checkpoints.headers import HeaderFolders
from evojax_merge.config.documents import attribute_errors_to_overrides
from evojax_merge.errors import InputError
from evojax_merge.evaluation.compilers import CompilerMissing, target_compiler
from evojax_merge.evaluation.targets import find_target, live_target
from evojax_merge.evaluation.timings import read_timings
from evojax_merge.problem import (
    build_problem,
    read_config,
    revision_warnings,
    stage_configs,
)
from evojax_merge.report.notices import print_warnings
from evojax_merge.report.plan import KEYS
from evojax_merge.steps.planning import make_plan
from evojax_merge.system.console import console, say, working
from evojax_merge.system.file_system import OutputFile, check_outputs, holds_json
from evojax_merge.tasks.opening import data_warnings
from evojax_merge.zoo.references import resolve_headers


def plan(path: Path, target_name: str | None, json_file: Path | None, overrides: list[str]) -> None:
    """Print the cost of a config file's search on a target; None: on this machine's devices. json_file: receives a list
    of plans, one for each stage. Raises InputError, at the end, where one does not fit."""
    is_own = partial(holds_json, keys=KEYS, in_list=True)
    output = None if json_file is None else OutputFile(json_file, "--json", "holds no plan", is_own)
    check_outputs([output], {"CONFIG": path})
    with attribute_errors_to_overrides(path, overrides):
        plugins.load()
        config = read_config(path, overrides, None)
        target = live_target() if target_name is None else find_target("--target", target_name)
        with tempfile.TemporaryDirectory() as root, working("planning"):
            folders, plans = HeaderFolders(Path(root)), []

            def resolve(where: object, reference: str, relative_to: Path) -> Path:
                return folders.shaped(resolve_headers(folders, where, reference, relative_to))

            for stage, config_of_stage in enumerate(stage_configs(config)):
                problem = build_problem(path, config_of_stage, chained=stage > 0, target=target, resolve=resolve)
                try:
                    compiler = target_compiler(target, config.evaluation.model)
                except CompilerMissing as error:
                    compiler = None
                    say(str(error))
                prepared = problem.prepare()
                plans.append(make_plan(problem, prepared, folders.download_bytes, compiler, read_timings()))
                if not stage:
                    data = data_warnings(str(path), config_of_stage.tasks, problem.splits)
                    warnings = (*problem.facts.warnings, *prepared.warnings, *data)
    print_warnings((*revision_warnings(path, config), *warnings))
    for number, stage_plan in enumerate(plans, start=1):
        if len(plans) > 1:
            console.print(f"stage {number} of {len(plans)}")
        for line in stage_plan.lines():
            console.print(line, soft_wrap=True)
        console.print(stage_plan.table())
        if stage_plan.fits:
            console.print(stage_plan.times())
        for line in stage_plan.conclusion():
            console.print(line, soft_wrap=True)
    if output is not None:
        output.write(json.dumps([stage_plan.as_json() for stage_plan in plans], indent=1) + "\n")
    for stage_plan in plans:
        if not stage_plan.fits:
            raise InputError(path, stage_plan.what_would_fit())
