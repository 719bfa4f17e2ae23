"""`evojax-merge search`: a config, its checks, the run folder, one search or a chain of them."""

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import jax

from evojax_merge import core, plugins
from evojax_merge.backends.backend import Backend
from evojax_merge.checkpoints.derived import parts_of
from evojax_merge.checkpoints.folder import file_hash
from evojax_merge.checkpoints.writer import (
    check_outside,
    require_space,
)
from evojax_merge.config.documents import attribute_errors_to_overrides
from evojax_merge.config.search_config import Config, SearchConfig, StageConfig
from evojax_merge.errors import LOG, LONGEST_LINE, Failed, InputError, PeerLostError, print_warning, printable
from evojax_merge.evaluation.devices import decided_by_main, losing_peers, unused_memory
from evojax_merge.evaluation.memory import require_memory
from evojax_merge.evaluation.peers import (
    check_agreement,
    check_files,
    check_samples,
    check_shared_folder,
    telling_peers,
)
from evojax_merge.judge.opening import JudgeOptions, check_export, check_judges
from evojax_merge.problem import (
    SearchProblem,
    build_problem,
    model_samples,
    read_config,
    resolved_document,
    resolved_search,
    revision_warnings,
    stage_config,
    stage_configs,
)
from evojax_merge.report.loggers import LoggedSearch, check_loggers, logged
from evojax_merge.report.monitor import Monitor, watched_by
from evojax_merge.report.notices import print_warnings
from evojax_merge.report.page import kept_page
from evojax_merge.report.plan import format_advice
from evojax_merge.report.progress import OnGeneration, generation_record
from evojax_merge.search.checkpoints import Checkpoints
from evojax_merge.search.recording import Generation
from evojax_merge.search.run_folder import (
    INPUTS,
    check_place,
    check_recorded_inputs,
    check_same_config,
    is_run,
    locked,
    open_run,
    opened,
    random_numbers,
)
from evojax_merge.search.run_lock import check_not_in_use, holder
from evojax_merge.search.run_log import early_lines
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.steps.advice import Adviser
from evojax_merge.steps.output import print_complete, why_complete
from evojax_merge.steps.planning import disk_bytes
from evojax_merge.system import interrupts
from evojax_merge.system.console import console, say, working
from evojax_merge.system.file_system import check_outputs, is_writable
from evojax_merge.system.interrupts import defer_signals
from evojax_merge.system.regular_file import MAX_NAME_BYTES
from evojax_merge.tasks.opening import data_warnings

# The form of a search's output.
Output = Literal["text", "json", "none"]


# The seconds after which a signal ends a search in the middle of a pass.
PATIENCE = 5.0


@dataclass
class ResumeHint:
    """The command that continues a search, or begins it again where nothing is saved, printed wherever the search is
    broken off. resume: whether the search continues an earlier one; folder: the run folder, once there is one; without:
    the options that leave out the controls and the polish, while these alone are missing."""

    command: str
    resume: bool
    folder: RunFolder | None = None
    without: str = ""

    def on_started(self, command: str, folder: RunFolder) -> None:
        """Remember the command that continues the search from now on, and its run folder."""
        self.command, self.folder = command, folder

    def on_searched(self, search: SearchConfig) -> None:
        """Remember that all generations of a search are saved."""
        given = {"search.controls=[]": search.controls, "search.then=null": search.then}
        self.without = " ".join(f"--set {shlex.quote(option)}" for option, value in given.items() if value)

    def describe(self) -> str:
        """A line with the command, and one about a winner that waits for controls or a polish."""
        state = "nothing was searched yet" if self.resume else "nothing was saved"
        if self.folder is not None:
            count = len(self.folder.read_history())
            state = f"{'1 generation is' if count == 1 else f'{count} generations are'} saved"
        again = "Start again" if self.folder is None and not self.resume else "Continue"
        lines = [f"stopped; {state}. {again} with: {self.command}"]
        if self.without:
            lines.append(f"Only controls or polish are missing; to write the winner without them, add {self.without}")
        return "".join(printable(line, LONGEST_LINE) + "\n" for line in lines)

    @contextmanager
    def on_exit(self) -> Iterator[None]:
        """Print the command where a signal or the loss of another process ends the block."""
        try:
            with interrupts.ending_within(PATIENCE, self.describe):
                yield
        except BaseException as error:
            if interrupts.received() or isinstance(error, PeerLostError):
                with defer_signals():
                    # In one piece: JAX may end the process at any time, with a line of its own.
                    print(self.describe(), end="", file=sys.stderr, flush=True)
            raise


def search(
    path: Path, out: Path | None, resume: bool, overwrite: bool, seed: int | None, overrides: list[str],
    force: bool = False, plugin_names: Sequence[str] = (), output: Output = "text",
    judges: JudgeOptions | None = None, watching: Monitor = Monitor(),  # noqa: B008
) -> None:  # fmt: skip
    """Search from a config file. A search that is broken off prints the command that continues it. judges: of the
    command `judge`; watching: the files of programs that watch the search."""
    name = "search" if judges is None else "judge"

    def command(*options: str) -> str:
        return shlex.join(["evojax-merge", name, str(path), *options])

    options = [part for override in overrides for part in ("--set", override)]
    options += [] if seed is None else ["--seed", str(seed)]
    options += [part for name in plugin_names for part in ("--plugin", name)]
    options += ["--distributed"] if jax.process_count() > 1 else []
    options += ["--force"] if force else []
    options += {"text": [], "json": ["--json"], "none": ["--quiet"]}[output]
    options += [] if watching.heartbeat is None else ["--heartbeat", str(watching.heartbeat)]
    options += [] if watching.metrics is None else ["--metrics", str(watching.metrics)]
    asked = ["--out", str(out)] if out else []
    asked += ["--resume"] if resume else ["--overwrite"] if overwrite else []
    options += ["--port", str(judges.port)] if judges is not None and judges.port else []
    options += ["--export", str(judges.pairs)] if judges is not None and judges.pairs else []
    resume_hint = ResumeHint(command(*asked, *options), resume)
    with (
        resume_hint.on_exit(), telling_peers(), losing_peers(), _printing(output) as on_generation,
        attribute_errors_to_overrides(path, overrides),
    ):  # fmt: skip
        plugins.load()
        config = read_config(path, overrides, seed)
        out = out or default_out(path, config)
        if resume and not out.exists() and is_run(RunFolder(path.parent)):
            raise InputError(out, f"holds no run to resume; {path.parent} is a run: --out {path.parent} resumes it")
        check_outputs(watching.outputs(), {"CONFIG": path} | RunFolder(out).named_files)
        on_started = partial(resume_hint.on_started, command("--out", str(out), *options, "--resume"))
        with watched_by(watching):
            run_search(
                path, config, out, resume=resume, overwrite=overwrite, on_started=on_started,
                on_generation=on_generation, force=force, judges=judges, on_searched=resume_hint.on_searched,
            )  # fmt: skip


@contextmanager
def _printing(output: Output) -> Iterator[OnGeneration]:
    """Have the block print texts and bars, nothing, or the generations as JSON, for which it yields a callback, with
    warnings and the error that ends it. Other code, such as a user's function, prints on stderr then."""
    usual, lines = console.quiet, sys.stdout

    def print_generation(generation: Generation) -> None:
        if output == "json" and jax.process_index() == 0:
            print(generation_record(generation), file=lines, flush=True)

    console.quiet = usual or output != "text"
    try:
        with _json_messages(lines) if output == "json" else nullcontext():
            yield print_generation
    finally:
        console.quiet = usual


@contextmanager
def _json_messages(lines: IO[str]) -> Iterator[None]:
    """Print the block's warnings, and the error that ends it, as lines of JSON."""

    def print_line(kind: str, text: str) -> None:
        print(json.dumps({kind: printable(text)}, ensure_ascii=False), file=lines, flush=True)

    class Warnings(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print_line("warning", record.getMessage().removeprefix("warning: "))

    handler = Warnings(logging.WARNING)
    LOG.addHandler(handler)
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (InputError, Failed) as error:
        print_line("error", str(error))
        raise
    finally:
        LOG.removeHandler(handler)


def default_out(path: Path, config: Config) -> Path:
    """The run folder of a config without one."""
    return Path(os.path.expanduser(config.out)) if config.out else Path("runs") / path.stem


@early_lines()
def run_search(
    path: Path,
    config: Config,
    out: Path,
    *,
    resume: bool,
    overwrite: bool,
    on_started: Callable[[RunFolder], None] = lambda folder: None,
    on_generation: OnGeneration = lambda generation: None,
    force: bool = False,
    judges: JudgeOptions | None = None,
    on_searched: Callable[[SearchConfig], None] = lambda search: None,
) -> None:
    """Search from a config to a model in the run folder `out`. `path` names the config in messages, and relative paths
    start in its folder; `on_started` is called as soon as there is something to resume, `on_searched` once all
    generations of a search without stages are saved. In a chain of stages the winner
    of one is the first parent of the next: the last stage is the run itself, earlier ones have run folders of their own
    below `stages/`. Raises InputError where the search cannot fit into memory, unless `force`."""
    given: dict[str, bool | str] = {"--resume": resume, "--overwrite": overwrite, "--force": force}
    given |= {file.name: file_hash(file) for file in plugins.named_files()}
    check_agreement(config.model_dump(mode="json", exclude={"inputs", "out"}), given)
    run, configs, stages = RunFolder(out), stage_configs(config), config.stages
    _check_run_folder(path, config, run, resume=resume, overwrite=overwrite)
    check_export(path, out, judges or JudgeOptions())
    check_loggers(f"{path}: log", config.log)
    early = [RunFolder((run.stages / f"stage-{number}").resolve()) for number in range(1, len(configs))]
    # Every stage is checked before the first one runs.
    with working("reading the models and the tasks"):
        problems = [build_problem(path, of_stage, chained=i > 0) for i, of_stage in enumerate(configs)]
    models = [part for problem in problems for model in problem.facts.references for part in parts_of(model)]
    for place in (out, *run.parts):
        check_outside(place, models)
    if stages is not None and judges is not None and (judges.replay or judges.pairs or judges.choices):
        what = "people judge a search in stages on its page; leave --replay, --export and --import out"
        raise InputError(f"{path}: stages", what)
    for folder, problem in zip([*early, run], problems, strict=True):
        check_judges(path, folder.path, problem, judges, resume=resume)
    with working("preparing the tasks"):
        prepared = [problem.prepare() for problem in problems]
    complete = why_complete(run, problems[-1]) if resume else None
    if complete is None:
        require_space(out, sum(map(disk_bytes, problems)))
        for problem in problems:
            _require_bank(path, problem, force)
    document = _whole_document(stages, configs[0], problems)
    check_recorded_inputs(path, config.inputs or {}, document[INPUTS])
    check_files(document[INPUTS])
    # The processes that only wait print nothing.
    console.quiet = console.quiet or jax.process_index() > 0
    if complete is not None and not decided_by_main(is_writable(out)):
        # Nothing need be written.
        check_same_config(run, document)
        print_complete(run, complete)
        return
    with opened(
        out, document, resume=resume, overwrite=overwrite, say=print_warning, on_started=on_started,
        check=_check_checkpoints,
    ):  # fmt: skip
        # All stages have the same examples.
        print_warnings(revision_warnings(path, configs[0]))
        print_warnings((*problems[0].facts.warnings, *prepared[0].warnings))
        print_warnings(data_warnings(str(path), configs[0].tasks, problems[0].splits))
        winner: str | None = None
        for number, folder in enumerate([*early, run]):
            problem, of_stage, after_stage = problems[0], configs[0], on_generation
            if stages is not None:
                console.print(f"stage {number + 1} of {len(stages)}")
                after_stage = partial(_after_stage, on_generation, number + 1)
            if stages is not None and winner is not None:
                of_stage = stage_config(config, stages[number], winner)
                problem = build_problem(path, of_stage, chained=True)
            is_done = folder is not run and resume and folder.result.exists() and folder.model.exists()
            if folder is not run and not is_done:
                on_started(folder)
                if jax.process_index() == 0:
                    again = resume and is_run(folder)
                    open_run(folder.path, resolved_document(of_stage, problem), resume=again, overwrite=not again)
                _check_checkpoints(folder)
            if not is_done:
                with (
                    logged(config.log, LoggedSearch(run, folder, document), after_stage) as after_log,
                    kept_page(folder, after_log, print_warning) as after_page,
                ):
                    searched = partial(on_searched, problem.search) if stages is None else lambda: None
                    core.search(folder, problem, prepared[number], after_page, force, judges, searched)
            if folder is not run:
                winner = folder.winner
                on_started(run)


def _check_run_folder(path: Path, config: Config, run: RunFolder, *, resume: bool, overwrite: bool) -> None:
    """Raises InputError where a run cannot lie in its folder, or not all processes see the same folder and models:
    before the models and examples are opened, which can take minutes."""
    out = run.path
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in out.parts):
        raise InputError(out, f"a name in it has over {MAX_NAME_BYTES} bytes; choose another run folder with --out")
    if jax.process_index() == 0:
        check_not_in_use(out)
        check_place(out, resume=resume, overwrite=overwrite)
    if jax.process_count() > 1:
        check_samples(model_samples(path, config))
        # What process 0 cannot write is seen as it is, or refused when it is opened.
        may_lock = jax.process_index() == 0 and (not out.exists() or is_writable(out))
        with locked(out, resume=resume) if may_lock else nullcontext():
            check_shared_folder(out, lambda: holder(run.lock))


def _whole_document(
    stages: Sequence[StageConfig] | None, first: Config, problems: Sequence[SearchProblem[Backend]]
) -> dict[str, Any]:
    """The resolved document of a search, or of a chain of stages. first: the config of the first stage."""
    with working("hashing the models and the data"):
        document = resolved_document(first, problems[0])
    if stages is not None:
        for key in ("space", "data_flow", "search"):
            document.pop(key)
        document |= random_numbers(any(problem.facts.is_random for problem in problems))
        document["stages"] = [_resolved_stage(stages, number, problem) for number, problem in enumerate(problems)]
    return document


def _check_checkpoints(folder: RunFolder) -> None:
    """Find a run that cannot be continued before the models are loaded, and a folder that not all processes share. All
    do this together."""
    check_shared_folder(folder.path, lambda: holder(folder.lock))
    Checkpoints(folder).restore(say)


def _require_bank(path: Path, problem: SearchProblem[Backend], force: bool) -> None:
    """Raises InputError, unless `force`, where the models cannot be in memory together. A device holds its share of
    them; on a CPU all devices hold theirs in the memory of the host."""
    devices = 1 if problem.target.is_accelerator else problem.target.devices_per_host
    nbytes = problem.backend.planner().sizes.held * devices // problem.facts.settings.model
    what = f"holding {problem.facts.loaded} models" + ("" if devices == 1 else f" for {devices} devices")
    try:
        require_memory(f"{path}: parents", what, nbytes, unused_memory())
    except InputError as error:
        if not force:
            remedy = format_advice(Adviser(problem, problem.prepare()).advice())
            raise InputError(error.where, f"{error.what}; {remedy} ({core.FORCE})") from None


def _after_stage(on_generation: OnGeneration, stage: int, generation: Generation) -> None:
    on_generation(replace(generation, stage=stage))


def _resolved_stage(stages: Sequence[StageConfig], number: int, problem: SearchProblem[Backend]) -> dict[str, Any]:
    """A stage for the run folder's config. Its population stays null where a stage before it searches for a path: the
    default depends on the dimensions, and these on the layers of that stage's winner."""
    search = resolved_search(problem.search, problem.strategy)
    if any(before.data_flow is not None for before in stages[:number]):
        search["population"] = stages[number].search.population
    return stages[number].model_dump(mode="json") | {"space": problem.facts.resolved["space"], "search": search}
