"""The main path: search, merge, evaluate and export, from parsed arguments to printed tables."""

import json
import math
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.table import Table

from evojax_merge import interrupts, plugins
from evojax_merge.checkpoints.bank import bank_bytes
from evojax_merge.checkpoints.derived import ignored_revisions, parts_of, reference_to
from evojax_merge.checkpoints.headers import HeaderFolders
from evojax_merge.checkpoints.writer import (
    MAX_SHARD_BYTES,
    check_output,
    check_outside,
    require_space,
)
from evojax_merge.config import Config, StageConfig, blamed_on_overrides
from evojax_merge.continuation import Continuation
from evojax_merge.errors import Failed, InputError, print_warning
from evojax_merge.evaluation.batched_tasks import BatchedTask, describe_batches, token_warnings
from evojax_merge.evaluation.compilers import CompilerMissing, TargetCompiler, target_compiler
from evojax_merge.evaluation.devices import barrier, local_devices, unused_memory
from evojax_merge.evaluation.diagnostics import warnings
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.evaluation.memory import require_memory
from evojax_merge.evaluation.samples import sample_rows
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.targets import Target, find_target, live_target
from evojax_merge.file_system import atomic_write, check_free, recover
from evojax_merge.interrupts import defer_signals
from evojax_merge.mergekit.as_adapter import RankError, prepare_adapter, write_as_adapter
from evojax_merge.mergekit.execute import Progress, merge_to
from evojax_merge.mergekit.stages import StreamPlan, merge_stream, prepare_stream
from evojax_merge.mergekit.streams import RecipeStream, parse_stream, read_stream, stream_warnings
from evojax_merge.mergekit.unused_keys import blaming_slips, few_lines, without_unused_keys
from evojax_merge.mergekit.write import dump_documents, in_dtype
from evojax_merge.planning import advice, disk_bytes, make_plan
from evojax_merge.problem import (
    SearchProblem,
    build_problem,
    config_from,
    failure_hint,
    read_config,
    resolved_document,
    resolved_space,
    stage_config,
)
from evojax_merge.references import resolve_headers, resolve_reference
from evojax_merge.regular_file import read_regular
from evojax_merge.report.card import adapter_card, card_in_dtype, merge_card, search_card
from evojax_merge.report.comparison import Result, write_result
from evojax_merge.report.listings import architectures_table, keys_table, methods_table, strategies_table
from evojax_merge.report.notices import Log, say_unread
from evojax_merge.report.picture import draw
from evojax_merge.report.plan import Plan, holds_plans, shown_advice
from evojax_merge.report.progress import OnGeneration, bytes_bar, console, passes_bar, say, search_bar
from evojax_merge.report.tables import terminal_table
from evojax_merge.schema import MAX_NAME_BYTES
from evojax_merge.search.loop import evolve, saved_strategy_state
from evojax_merge.search.protocols import context_of
from evojax_merge.search.run_folder import (
    Checkpoints,
    EarlierWinner,
    FolderStorage,
    check_inputs,
    check_masks,
    check_place,
    earlier_winners,
    find_member,
    is_run,
    keep_winner,
    locked,
    open_run,
    random_numbers,
    read_result,
    removed_if_refused,
    to_line,
    write_front,
)
from evojax_merge.search.run_lock import check_not_in_use
from evojax_merge.search.run_parts import RunFolder, check_replaceable_model, check_room, read_lines
from evojax_merge.search.stopping import course_of, stopped
from evojax_merge.search.successive_halving import describe_halving
from evojax_merge.selection import open_evaluators, passes_to_select, recipe_text, select_best
from evojax_merge.stored_models import (
    Split,
    check_own_file,
    holds_samples,
    holds_table,
    read_tasks,
    score_models,
    score_table,
)
from evojax_merge.tasks.opening import overlaps
from evojax_merge.tasks.splits import Splits
from evojax_merge.yaml_reader import load_documents, load_yaml, parse_documents, refuse_repeated

T = TypeVar("T")


def search(
    path: Path, out: Path | None, resume: bool, overwrite: bool, seed: int | None, overrides: list[str],
    force: bool = False, plugin_names: Sequence[str] = (),
) -> None:  # fmt: skip
    """The search of a config file, told with the command that continues it wherever it is broken off. `plugin_names`:
    of plugins that are loaded and that the config need not name."""
    options = [part for override in overrides for part in ("--set", override)]
    options += [] if seed is None else ["--seed", str(seed)]
    options += [part for name in plugin_names for part in ("--plugin", name)]
    options += ["--distributed"] if jax.process_count() > 1 else []
    options += ["--force"] if force else []
    asked = ["--out", str(out)] if out else []
    asked += ["--resume"] if resume else ["--overwrite"] if overwrite else []
    continuation = Continuation(_command(path, *asked, *options))
    with continuation.told(), blamed_on_overrides(path, overrides):
        plugins.load()
        config = read_config(path, overrides, seed)
        out = out or default_out(path, config)
        begun = partial(continuation.begun, _command(path, "--out", str(out), *options, "--resume"))
        run_search(path, config, out, resume=resume, overwrite=overwrite, begun=begun, force=force)


def default_out(path: Path, config: Config) -> Path:
    """The run folder of a config that is given none."""
    return Path(config.out) if config.out else Path("runs") / path.stem


def run_search(
    path: Path,
    config: Config,
    out: Path,
    *,
    resume: bool,
    overwrite: bool,
    begun: Callable[[RunFolder], None] = lambda folder: None,
    on_generation: OnGeneration = lambda generation: None,
    force: bool = False,
) -> None:
    """Search from a config to a model in the run folder `out`. `path` names the config in messages, and relative paths
    start in its folder; `begun` is called as soon as there is something to resume. Raises InputError where it cannot
    fit into memory, unless `force`."""
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in out.parts):
        raise InputError(out, f"a name in it has over {MAX_NAME_BYTES} bytes; choose another run folder with --out")
    if jax.process_index() == 0:
        # Before the models and examples are opened, which can take minutes.
        check_not_in_use(out)
        check_place(out, resume=resume, overwrite=overwrite)
    if config.stages is not None:
        _run_chain(path, config, config.stages, out, resume, overwrite, begun, on_generation, force)
        return
    problem = build_problem(path, config)
    _check_outside(out, [problem])
    batched_tasks = problem.batched_tasks()
    require_space(out, disk_bytes(problem))
    _require_bank(path, problem, force)
    with _opened(out, resolved_document(problem), begun, resume=resume, overwrite=overwrite) as folder:
        _say_first(path, problem, batched_tasks)
        _search_into(folder, problem, batched_tasks, on_generation, force)


def _command(path: Path, *options: str) -> str:
    return shlex.join(["evojax-merge", "search", str(path), *options])


@contextmanager
def _opened(
    path: Path, document: dict[str, Any], begun: Callable[[RunFolder], None], *, resume: bool, overwrite: bool
) -> Iterator[RunFolder]:
    """The run folder, locked and opened by the one process that writes; the others wait, and say nothing. `begun` is
    called as soon as there is something to resume."""
    console.quiet = console.quiet or jax.process_index() > 0
    folder = RunFolder(path)
    with ExitStack() as stack:
        with defer_signals():
            if jax.process_index() == 0:
                stack.enter_context(locked(path, resume=resume))
                open_run(path, document, resume=resume, overwrite=overwrite, say=lambda line: _warn([line]))
                if not resume:
                    stack.enter_context(removed_if_refused(folder))
            begun(folder)
        _check_checkpoints(folder)
        yield folder


def _check_checkpoints(folder: RunFolder) -> None:
    """What cannot be continued is found before the models are loaded. All processes do this together."""
    barrier("opened")
    Checkpoints(folder).restore(say)


_FORCE = "--force goes on all the same"


def _require_bank(path: Path, problem: SearchProblem, force: bool) -> None:
    """Raises InputError, unless `force`, where the models cannot be in memory together. A device holds its share of
    them; on a CPU all devices hold theirs in the memory of the host."""
    devices = 1 if problem.target.is_accelerator else problem.target.devices_per_host
    nbytes = problem.candidates.held_bytes() * devices // problem.config.evaluation.model
    what = f"holding {len(problem.merged_from)} models" + ("" if devices == 1 else f" for {devices} devices")
    try:
        require_memory(f"{path}: parents", what, nbytes, unused_memory())
    except InputError as error:
        if not force:
            found = shown_advice(advice(problem, 0))
            raise InputError(error.where, f"{error.what}; {found} ({_FORCE})") from None


def _require_passes(folder: RunFolder, planned: Plan) -> None:
    """Raises InputError where an accelerator cannot hold the models and what the smallest passes need."""
    if planned.target.is_accelerator and not planned.fits:
        raise InputError(folder.path, f"{planned.what_would_fit()} ({_FORCE})")


def _run_chain(
    path: Path, config: Config, stages: list[StageConfig], out: Path, resume: bool, overwrite: bool,
    begun: Callable[[RunFolder], None], on_generation: OnGeneration, force: bool,
) -> None:  # fmt: skip
    """Stages one after the other: the winner of one is the first parent of the next. The last is the run itself, those
    before have run folders of their own below `stages/`."""
    # Every stage is checked before the first one runs.
    problems = [build_problem(path, one, chained=i > 0) for i, one in enumerate(_stage_configs(config))]
    _check_outside(out, problems)
    batched_tasks = [problem.batched_tasks() for problem in problems]
    require_space(out, sum(map(disk_bytes, problems)))
    for problem in problems:
        _require_bank(path, problem, force)
    document = resolved_document(problems[0])
    for key in ("space", "data_flow", "search"):
        document.pop(key)
    document |= random_numbers(any(problem.candidates.is_random for problem in problems))
    document["stages"] = [
        stage.model_dump(mode="json") | {"space": resolved_space(problem)}
        for stage, problem in zip(stages, problems, strict=True)
    ]
    with _opened(out, document, begun, resume=resume, overwrite=overwrite) as run:
        # All stages ask the same.
        _say_first(path, problems[0], batched_tasks[0])
        winner: str | None = None
        for number, stage in enumerate(stages, start=1):
            console.print(f"stage {number} of {len(stages)}")
            problem = problems[0]
            if winner is not None:
                problem = build_problem(path, stage_config(config, stage, winner), chained=True)
            if number == len(stages):
                _search_into(run, problem, batched_tasks[-1], on_generation, force)
                return
            folder = RunFolder((run.stages / f"stage-{number}").resolve())
            if not (resume and folder.result.exists() and folder.model.exists()):
                begun(folder)
                if jax.process_index() == 0:
                    again = resume and is_run(folder)
                    open_run(folder.path, resolved_document(problem), resume=again, overwrite=not again)
                _check_checkpoints(folder)
                _search_into(folder, problem, batched_tasks[number - 1], on_generation, force)
            winner = str(folder.model)
            begun(run)


def _say_first(path: Path, problem: SearchProblem, batched_tasks: Splits[list[BatchedTask]]) -> None:
    """What a user should know of the models and the examples before a search."""
    say_unread(problem.sources.folders)
    _warn(_of_revisions(path, problem.config))
    _warn(problem.sources.warnings)
    examples = [*batched_tasks.search, *(batched_tasks.validation or []), *batched_tasks.heldout]
    _warn(token_warnings(examples, problem.tokenizer, problem.decoder.vocab))
    _warn(overlaps(str(path), problem.config.tasks, problem.splits))


def _of_revisions(path: Path, config: Config) -> list[str]:
    """What to tell of revisions that a config names and that there are not."""
    told = ignored_revisions((config.base, *config.parents, config.other_modules), path.parent)
    return [f"{path}: {line}" for line in told]


def _search_into(
    folder: RunFolder,
    problem: SearchProblem,
    batched_tasks: Splits[list[BatchedTask]],
    on_generation: OnGeneration,
    force: bool,
) -> None:
    """Search, choose, export and report; of a run that has done all this nothing is done again."""
    why_complete = _why_complete(folder, problem)
    if why_complete is not None:
        say(why_complete)
        console.print(f"the run is complete; its winner: {folder.model}", highlight=False, soft_wrap=True)
        return
    check_room(folder, problem.search.generations)
    devices = local_devices(problem.config.evaluation.model)
    console.print(devices.describe(), highlight=False)
    for role, model in problem.models:
        console.print(f"{role}: {reference_to(model)}", highlight=False, soft_wrap=True)
    if problem.other_modules is not None:
        where = reference_to(problem.other_modules)
        console.print(f"other modules: those of {where}", highlight=False, soft_wrap=True)
    console.print(describe_batches([one for shard in batched_tasks.shards for one in shard]), highlight=False)
    planned = make_plan(problem, batched_tasks)
    if not force:
        _require_passes(folder, planned)
    for line in planned.summary():
        console.print(line, highlight=False, soft_wrap=True)
    with bytes_bar("loading", bank_bytes(problem.sources, problem.decoder)) as progress:
        on = open_evaluators(problem, batched_tasks, devices, progress, say)
    with search_bar(problem.search.generations, on_generation) as reporter:
        storage = FolderStorage(folder, Checkpoints(folder), is_main_process=devices.is_main_process)
        archive = evolve(
            problem.search, problem.config.seed, problem.strategy, problem.space, on.shards, storage, reporter,
            warnings, failure_hint, on.minibatches, on.validation, problem.example_choice(on),
        )  # fmt: skip
    searched = [one.evaluator for one in (on.choice, *on.minibatches, *on.shards) if one is not None]
    console.print(problem.candidates.describe_work(searched), highlight=False)
    if len(on.shards) > 1:
        examples = sum(task.size for shard in problem.splits.shards for task in shard if task.weight > 0)
        console.print(describe_halving(folder.read_history(), examples), highlight=False)
    with passes_bar("scoring", passes_to_select(problem, on)) as advance:
        result = select_best(problem, on, archive, advance)
    if devices.is_main_process:
        _write_winner(folder, problem.within(archive.context), result)
    barrier("written")


def _why_complete(folder: RunFolder, problem: SearchProblem) -> str | None:
    """One line, if a run folder holds all that a search of its saved generations ends with, and no more are wanted;
    else None. All processes of a run ask this together."""
    result, rows, wanted = read_result(folder.result), folder.read_history(), problem.search.generations
    if result is None or result.get("generations") != len(rows):
        return None
    written = [folder.recipe, folder.model, folder.picture, *([folder.front] if "members" in result else [])]
    if not all(path.exists() for path in written):
        return None
    course = course_of(rows, read_lines(folder.timing))
    ended = stopped(problem.search.stop, course, problem.strategy.population) if "stopped_by" in result else None
    if ended is None and wanted > len(rows):
        return None
    saved = Checkpoints(folder).restore(say)
    if saved is None or not saved.describes(len(rows), folder.history):
        return None
    if ended is None:
        return f"{len(rows)} generations are saved, and {wanted} wanted: nothing to search"
    return f"{len(rows)} generations are saved: nothing to search ({ended.describe()})"


def _warn(lines: Sequence[str]) -> None:
    for line in lines if jax.process_index() == 0 else ():
        print_warning(line)


def _write_winner(folder: RunFolder, problem: SearchProblem, result: Result) -> None:
    """Export the winner, and report."""
    interrupts.check()
    check_replaceable_model(folder.model)
    recipe, history = recipe_text(problem, result.genome), folder.read_history()
    keep_winner(folder, recipe)
    atomic_write(folder.recipe, recipe)
    if result.members:
        write_front(folder, [recipe_text(problem, member.genome) for member in result.members])
    card = search_card(folder.path.name, problem, result, recipe, len(history))
    with prepare_stream(read_stream(folder.recipe), folder.model, find=resolve_reference) as stream_plan:
        bar = partial(_merge_bar, "exporting")
        write = partial(merge_to, recipe=recipe)
        check = partial(check_replaceable_model, folder.model)
        merge_stream(stream_plan, folder.model, write, card=card, overwrite=True, check=check, bar=bar)
    draw(result, history, folder.picture)
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
    """One line on what going on has brought, on the examples that no search has seen."""
    now, before = f"{fitness:.4f}", f"{earlier.heldout_fitness:.4f}"
    verdict = "equal to" if now == before else "better than" if fitness > earlier.heldout_fitness else "WORSE than"
    return (
        f"held out, the winner of {generations} generations ({now}) is {verdict} that of {earlier.generations} "
        f"({before}), which is kept in {earlier.path}"
    )


def plan(path: Path, target_name: str | None, json_file: Path | None, overrides: list[str]) -> None:
    """Say what the search of a config file would take on a target; None: on the devices that are here. json_file: a
    list of plans, one for each stage. Raises InputError, at the end, where one does not fit."""
    if json_file is not None:
        check_own_file(json_file, "--json", "plan", holds_plans)
    with blamed_on_overrides(path, overrides):
        plugins.load()
        config = read_config(path, overrides, None)
        target = live_target() if target_name is None else find_target("--target", target_name)
        with tempfile.TemporaryDirectory() as root:
            folders, plans = HeaderFolders(Path(root)), []
            resolve = partial(resolve_headers, folders)
            for stage, config_of_stage in enumerate(_stage_configs(config)):
                problem = build_problem(path, config_of_stage, chained=stage > 0, target=target, resolve=resolve)
                compiler = _compiler(target, config.evaluation.model)
                plans.append(make_plan(problem, problem.batched_tasks(), folders.download_bytes, compiler))
    _warn(_of_revisions(path, config))
    for number, one in enumerate(plans, start=1):
        if len(plans) > 1:
            console.print(f"stage {number} of {len(plans)}")
        for line in one.lines():
            console.print(line, highlight=False, soft_wrap=True)
        console.print(one.table())
    if json_file is not None:
        atomic_write(json_file, json.dumps([one.as_json() for one in plans], indent=1) + "\n")
    for one in plans:
        if not one.fits:
            raise InputError(path, one.what_would_fit())


def _compiler(target: Target, model: int) -> TargetCompiler | None:
    """The target's compiler; where it is not installed a line says so."""
    try:
        return target_compiler(target, model)
    except CompilerMissing as error:
        say(str(error))
        return None


def _stage_configs(config: Config) -> list[Config]:
    """The configs of a search's stages; until there is a winner, the first parent stands for it."""
    if config.stages is None:
        return [config]
    return [stage_config(config, stage, config.parents[0] if i else None) for i, stage in enumerate(config.stages)]


@dataclass(frozen=True)
class MergeOptions:
    """How a recipe is merged, and what of the model is written.

    `dtype`, `seed`: in place of the recipe's. `overwrite`: replace a model that evojax-merge wrote. `allow_nonfinite`,
    `allow_crimes`: see `prepare_stream`. `strict`: what mergekit passes over in a recipe, or reads as something else,
    is refused, not told. `copy_tokenizer`: the first model's is written as well. `card`: so are a card and the recipe.
    `max_shard_bytes`: the most in a file of weights."""

    dtype: str | None = None
    seed: int | None = None
    overwrite: bool = False
    allow_nonfinite: bool = False
    allow_crimes: bool = False
    strict: bool = False
    copy_tokenizer: bool = True
    card: bool = True
    max_shard_bytes: int = MAX_SHARD_BYTES


def merge(
    recipe: Path, out: Path, options: MergeOptions, quiet: bool = False, without_meaning: Sequence[str] = ()
) -> None:
    """`without_meaning`: options that the command line has and that change nothing."""
    usual, console.quiet = console.quiet, console.quiet or quiet
    try:
        if without_meaning:
            _warn([f"{', '.join(without_meaning)}: mergekit's, without a meaning here; ignored"])
        write_merge(recipe, out, options, say, lambda line: _warn([line]))
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    finally:
        console.quiet = usual


def write_merge(recipe: Path | list[Any], out: Path, options: MergeOptions, log: Log, warn: Log) -> None:
    """Do the merge of a recipe (a file, or the documents that its YAML says) and write the model."""
    plugins.load()
    recover(out)
    check_free(out, options.overwrite)
    strict = options.strict
    twice: list[str] = []
    repeated = refuse_repeated if strict else lambda place, said: twice.append(f"{place}: {said}; the last counts")
    if isinstance(recipe, Path):
        path, given, text = recipe, load_documents(recipe, repeated), recipe.read_text(encoding="utf-8")
        no_file: Path | None = None
    else:
        path, given, text = Path("recipe"), recipe, dump_documents(recipe)
        no_file = path
    documents, ignored = (given, []) if strict else without_unused_keys(path, given)
    with ExitStack() as stack:
        with blaming_slips([] if strict else given):
            stream = parse_stream(path, documents)
            planned = prepare_stream(
                stream, out, options.dtype, options.seed, options.allow_nonfinite, resolve_reference,
                options.copy_tokenizer, options.allow_crimes, strict,
            )  # fmt: skip
            stream_plan = stack.enter_context(planned)
        said_twice = few_lines(path, twice, "more keys stand twice")
        for line in (*said_twice, *ignored, *stream_warnings(stream), *stream_plan.warnings):
            warn(line)
        say_unread(list(stream_plan.models.values()), log)
        inputs = [path for path in stream_plan.inputs if path != no_file]
        card = _card_of_merge(out, stream_plan, text) if options.card else None
        write = partial(merge_to, recipe=text if options.card else None, max_shard_bytes=options.max_shard_bytes)
        _write_model(stream_plan, out, card, "merging", options.overwrite, inputs, write)


def _write_model(
    stream_plan: StreamPlan, out: Path, card: str | None, label: str, overwrite: bool, keep: Sequence[Path],
    write: Callable[..., T],
) -> T:  # fmt: skip
    """Do planned merges and write the result, unless `out` may not be written to (see `check_output`) or the disk is
    too full. `write`: see `merge_stream`."""
    check = partial(check_output, out, [*keep, *_parts_of_runs(out)])
    check()
    require_space(out, stream_plan.peak_bytes)
    bar = partial(_merge_bar, label)
    return merge_stream(stream_plan, out, write, card=card, overwrite=overwrite, check=check, bar=bar)


def _merge_bar(what: str, which: str, nbytes: int) -> AbstractContextManager[Progress]:
    """The progress bar of a merge; `which`: of several, which one it is."""
    return bytes_bar(f"{what} {which}".rstrip(), nbytes)


def _card_of_merge(out: Path, stream_plan: StreamPlan, text: str) -> str:
    methods = list(dict.fromkeys(one.recipe.method.name for one in stream_plan.merges))
    models = {model: folder.path for model, folder in stream_plan.models.items()}
    return merge_card(out.name, methods, models, text)


def _check_outside(out: Path, problems: Sequence[SearchProblem]) -> None:
    """Raises InputError where a run folder, or a part of it that is a link, lies in a model of the search."""
    models = [part for problem in problems for model in problem.references for part in parts_of(model)]
    for place in (out, *RunFolder(out).parts):
        check_outside(place, models)


def _parts_of_runs(out: Path) -> list[Path]:
    """What belongs to the runs in whose folders `out` would lie."""
    # Parts of a run may be links.
    above = {*Path(os.path.realpath(out)).parents, *Path(os.path.abspath(out)).parents}
    runs = [RunFolder(folder) for folder in sorted(above)]
    return [part for run in runs if run.config.exists() and run.history.exists() for part in run.parts]


def evaluate(
    models: list[str],
    tasks_path: Path,
    json_file: Path | None,
    samples_file: Path | None = None,
    split: Split = "all",
) -> None:
    tasks = read_tasks(tasks_path, split)
    if json_file is not None:
        check_own_file(json_file, "--json", "scores", holds_table)
    if samples_file is not None:
        if json_file is not None and os.path.realpath(samples_file) == os.path.realpath(json_file):
            raise InputError(samples_file, "--samples: is the file of --json as well; choose another name")
        check_own_file(samples_file, "--samples", "samples", holds_samples)
    samples: list[dict[str, Any]] = []

    def keep(model: str, evaluator: Evaluator, scores: TaskScores) -> None:
        if samples_file is not None:
            samples.extend(sample_rows(model, evaluator.batched_tasks, scores))

    rows = score_models(models, tasks, say, lambda line: _warn([line]), keep)
    console.print(terminal_table(rows, f"Scores on {'; '.join(tasks.sizes)}"))
    if json_file is not None:
        atomic_write(json_file, json.dumps(score_table(models, rows), indent=1, ensure_ascii=False) + "\n")
    if samples_file is not None:
        atomic_write(samples_file, "".join(map(to_line, samples)))


def list_known(what: str, section: str | None = None) -> None:
    """Print what the program knows: methods, strategies, architectures, or the keys of a config, all or a section's."""
    plugins.load()
    tables: dict[str, Callable[[], Table]] = {
        "methods": methods_table,
        "strategies": strategies_table,
        "architectures": architectures_table,
        "keys": partial(keys_table, section),
    }
    console.print(tables[what]())


def export(
    run: Path, out: Path, dtype: str | None, overwrite: bool, best_so_far: bool, member: int | None = None,
    rank: int | None = None,
) -> None:  # fmt: skip
    """Write a run's winner, its best candidate so far, or a member of its front: as a model, or, where a rank is given,
    as an adapter of its base of that rank."""
    plugins.load()
    folder = RunFolder(run)
    if not is_run(folder):
        raise InputError(run, "is not a run folder of a search" if run.exists() else "no such folder")
    plugins.load_named(f"{folder.config}: plugins", load_yaml(folder.config).get("plugins", []), folder.path)
    recover(out)
    check_free(out, overwrite)
    if member is not None:
        file = find_member(folder, member)
        _export(folder, read_stream(file), file.read_text(encoding="utf-8"), None, out, dtype, overwrite, rank)
        return
    finished = (read_result(folder.result) or {}).get("generations", -1) >= len(folder.read_history())
    if best_so_far and not (finished and folder.recipe.exists()):
        _export_best_so_far(folder, out, dtype, overwrite, rank)
        return
    if not folder.recipe.exists():
        if folder.params.exists():
            raise InputError(run, f"is a run of search_pytrees, whose winner is a pytree: best/{folder.params.name}")
        more = "finish it with search … --resume, or pass --best-so-far"
        raise InputError(run, f"has no winner yet (no best/recipe.yaml); {more}")
    stream, card_file = read_stream(folder.recipe), folder.model / "README.md"
    card = read_regular(card_file, "a model card").decode(errors="replace") if card_file.exists() else None
    _export(folder, stream, folder.recipe.read_text(encoding="utf-8"), card, out, dtype, overwrite, rank)


def _export(
    folder: RunFolder, stream: RecipeStream, text: str, card: str | None, out: Path, dtype: str | None, overwrite: bool,
    rank: int | None,
) -> None:  # fmt: skip
    """Write the model of a run's recipe, or its adapter of a rank. `text`: the recipe as YAML; `card` None: one that
    shows just that."""
    if any(recipe.method.random for recipe in (*(stage.recipe for stage in stream.stages), stream.result)):
        check_masks(folder)
    with prepare_stream(stream, out, dtype, find=resolve_reference) as stream_plan:
        searched = stream_plan.result.recipe.out_dtype
        card = card_in_dtype(card or _card_of_merge(out, stream_plan, text), searched, dtype)
        write: Callable[..., RankError | None] = partial(merge_to, recipe=in_dtype(text, dtype))
        if rank is not None:
            base = prepare_adapter(stream_plan, rank)
            write = partial(write_as_adapter, rank=rank, describe=partial(adapter_card, base=base, rank=rank))
        keep = [*stream_plan.inputs, *folder.parts]
        error = _write_model(stream_plan, out, card, "exporting", overwrite, keep, write)
    if error is not None:
        console.print(str(error), highlight=False, soft_wrap=True)
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)


def _export_best_so_far(folder: RunFolder, out: Path, dtype: str | None, overwrite: bool, rank: int | None) -> None:
    """Write the best candidate that an unfinished run has saved, as every generation scored it."""
    # Nobody else may go on with the run meanwhile.
    with locked(folder.path, resume=True):
        running, config = _stage_begun_last(folder)
        check_inputs(running)
        problem = build_problem(running.config, config, chained=True)
        saved = Checkpoints(running).restore(say)
        if saved is None:
            raise InputError(folder.path, "has saved no generation yet; continue it with search … --resume")
        fitness = float(saved.arrays["fitness"][0])
        if not math.isfinite(fitness):
            raise Failed(
                f"{folder.path}: of no candidate of {saved.generations} generations the fitness on all examples is "
                "known (gradients on minibatches, or of a companion, do not tell it); continue the search with --resume"
            )
        state = saved_strategy_state(saved, problem.config.seed, problem.strategy, problem.space)
        problem = problem.within(context_of(problem.strategy, state))
        text = recipe_text(problem, saved.arrays["genomes"][0])
        stream = parse_stream(running.recipe, parse_documents(running.recipe, text))
        _export(folder, stream, text, None, out, dtype, overwrite, rank)
    chosen_on = "whole search split" if problem.splits.validation is None else "validation split"
    console.print(
        f"the best candidate of {saved.generations} generations, fitness {fitness:.4f} on the examples that every "
        f"generation is scored on (a finished run chooses its winner on the {chosen_on})",
        soft_wrap=True,
    )


def _stage_begun_last(folder: RunFolder) -> tuple[RunFolder, Config]:
    """The run folder of a search that was broken off, and its config; of a chain, those of the stage that was
    running."""
    config = config_from(folder.config, load_yaml(folder.config), [], None)
    if config.stages is None:
        return folder, config
    before = [RunFolder(folder.stages / f"stage-{number}") for number in range(1, len(config.stages))]
    if folder.history.exists() or not before:
        winner = str(before[-1].model) if before else None
        return folder, stage_config(config, config.stages[-1], winner)
    begun = [stage for stage in before if is_run(stage)]
    if not begun:
        raise InputError(folder.path, "has saved no generation yet; continue it with search … --resume")
    return _stage_begun_last(begun[-1])
