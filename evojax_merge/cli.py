"""The command line: parse, call, print. Every heavy import happens inside the command that needs it."""

import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from evojax_merge import __version__
from evojax_merge.system import interrupts, torch_note

if __name__ == "__main__":  # Before click: an interruption should not find the program unprepared.
    interrupts.end_at_once(interrupts.INTERRUPTED, "interrupted\n")

import click

from evojax_merge.errors import LONGEST_LINE, Failed, InputError, PeerLostError, printable, without_secrets
from evojax_merge.mergekit.flags import ShardSize, given_without_meaning, without_meaning
from evojax_merge.system.interrupts import INTERRUPTED
from evojax_merge.system.jax_environment import check_environment, no_devices
from evojax_merge.system.users_traceback import hide_inner_frames

DONE, FAILED, WRONG_INPUT = 0, 1, 2
# The bound is config.MAX_SEED, repeated here: the imports of config are too heavy for --help.
SEED = click.IntRange(min=0, max=2**63 - 1)
FILE = click.Path(path_type=Path)
DTYPE = click.Choice(["float32", "float16", "bfloat16"])

# Commands that print lists.
LISTS = frozenset({"methods", "strategies", "architectures", "keys", "runs", "show", "compare"})

with_overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Override one key of CONFIG."
)
with_plugins = click.option(
    "--plugin",
    "plugin_names",
    multiple=True,
    metavar="FILE",
    help="Load this Python file or package first: it may add methods, strategies, tasks, architectures; repeatable.",
)


def _start_jax() -> None:
    """Import JAX, which keeps compiled programs from now on."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    check_environment()
    from evojax_merge.evaluation.compilations import keep_compiled_programs

    keep_compiled_programs()


def _command(name: str, plugin_names: tuple[str, ...] = (), distributed: bool = False) -> Any:
    """Import JAX, which keeps compiled programs from now on, and the module of a command; then load the plugins. An
    interruption of a search during the imports prints the command that continues it or begins it again, as later
    interruptions do. distributed: this is one of several processes."""
    arguments = sys.argv[1:]
    again = printable(shlex.join(["evojax-merge", *arguments]), LONGEST_LINE)
    next_step = "Continue" if "--resume" in arguments else "Start again"
    resume_hint = f"stopped before it began. {next_step} with: {again}\n" if arguments[:1] == ["search"] else ""
    with interrupts.nothing_begun(f"{resume_hint}interrupted\n"):
        _start_jax()
        if distributed:
            from evojax_merge.evaluation.devices import init_distributed

            init_distributed()
        module = import_module(f"evojax_merge.commands.{name}")
    if plugin_names:
        from evojax_merge import plugins

        plugins.load_named("--plugin", plugin_names, Path.cwd())
    return module


class Command(click.Command):
    """A command, which is named from its first imports on wherever it takes long, unless other programs read it."""

    def invoke(self, context: click.Context) -> Any:
        is_read = context.info_name in LISTS or context.params.get("quiet") or context.params.get("as_json")
        if is_read:
            return super().invoke(context)
        from evojax_merge.system.console import working

        with working(str(context.info_name)):
            return super().invoke(context)


class Commands(click.Group):
    """The group of all commands."""

    command_class = Command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt as interruption:
            # Click prints an empty line at a KeyboardInterrupt, and none at its own exception.
            raise click.Abort from interruption


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Evolve merges of open-weight models, on accelerators, in JAX."""


@cli.command(short_help="Compare models before a merge: what they are, and how their weights differ.")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path())
@click.option("--base", metavar="MODEL", type=click.Path(), help="Which one is the base. Default: found by distances.")
@click.option("--json", "json_file", type=FILE, help="Write the report here as well.")
@click.option("--picture", type=FILE, help="Draw distances and task vectors (.png or .svg).")
def inspect(models: tuple[str, ...], base: str | None, json_file: Path | None, picture: Path | None) -> None:
    """Compare models before a merge: headers, tokenizers, which one is the base of the others, their task vectors,
    and what that means for the choice of a method. Reads all weights, a few tensors at a time."""
    _command("inspect").inspect(list(models), base, json_file, picture)


class InitCommand(click.Command):
    """A command whose options --parents, --prompt and --target take every argument up to the next option, or to the
    name of a config."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        repeated: list[str] = []
        option = ""
        for argument in arguments:
            is_config = argument.endswith((".yaml", ".yml")) and not os.path.isdir(argument)
            begins = argument in ("--parents", "--prompt", "--target")
            option = argument if begins else "" if argument.startswith("-") or is_config else option
            repeated += [] if begins else [option, argument] if option else [argument]
        return super().parse_args(context, repeated)


@cli.command(cls=InitCommand, short_help="Write the commented config of a first search.")
@click.argument("file", type=FILE, default=Path("search.yaml"))
@click.option("--base", metavar="MODEL", type=click.Path(), help="The model that task vectors are taken from.")
@click.option("--parents", multiple=True, metavar="MODEL...", type=click.Path(), help="The models that are merged.")
@click.option("--data", metavar="FILE", type=click.Path(), help="A data file, a folder of pictures, or an .npz.")
@click.option("--hub", metavar="OWNER/DATASET", help="Score on a data set of the hub: [/CONFIG][:SPLIT] may follow.")
@click.option("--lm-eval", metavar="TASK", help="Score on a task of lm-eval.")
@click.option("--prompt", multiple=True, metavar="FIELD...", help="The fields of an example's prompt or input.")
@click.option("--target", multiple=True, metavar="FIELD...", help="The fields of what is right about an example.")
@click.option("--method", metavar="NAME", help="One of `evojax-merge methods`. Default: what `inspect` advises.")
@click.option("--backend", metavar="FILE.py:NAME", help="Parents are state dicts: a function that makes their module.")
@click.option("--function", metavar="FILE.py:NAME", help="A function that scores networks, pictures or pytrees.")
@click.option("--out", metavar="RUN", type=click.Path(), help="The run folder of the search.")
@click.option(
    "--budget-generations", "generations", type=click.IntRange(1, 1_000_000),
    help="Generations; default: a budget of 600 passes.",
)  # fmt: skip
@click.option("--overwrite", "--force", "overwrite", is_flag=True, help="Replace FILE, if init wrote it.")
def init(
    file: Path, overwrite: bool, hub: str | None, prompt: tuple[str, ...], target: tuple[str, ...], **choices: Any
) -> None:
    """Write the commented config of a first search to FILE (search.yaml), checked like one that is searched with. Asks
    on a terminal for what is missing. The kind of task goes by the models and the data's first record, the method by
    the models' weights, and the number of parameters by that of the examples."""
    sources = {"--data": choices["data"], "--hub": hub, "--lm-eval": choices["lm_eval"]}
    given = [option for option, value in sources.items() if value is not None]
    if len(given) > 1:
        raise InputError(given[1], f"cannot go with {given[0]}; expected one source of data")
    command = _command("init")
    if hub is not None:
        choices["data"] = f"hub:{hub.removeprefix('hub:')}"
    command.init(file, command.Choices(fields=command.Fields(prompt, target), **choices), overwrite)


@cli.command(short_help="Print a script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes evojax-merge's commands, options and paths in SHELL, for its startup file:

    eval "$(evojax-merge completion bash)"
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(cli, {}, "evojax-merge", "_EVOJAX_MERGE_COMPLETE").source())


@cli.command(short_help="Search for the best merge, and export the winner.")
@click.argument("config", type=FILE)
@click.option("--out", type=FILE, help="Run folder. Default: the config's `out`, or runs/NAME.")
@click.option("--resume", is_flag=True, help="Continue a run: after an interruption, or with more generations.")
@click.option("--overwrite", is_flag=True, help="Start again in a folder that holds a run.")
@click.option("--seed", type=SEED, help="Override the config's seed.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="Override one key of CONFIG (search.generations=50, tasks.0.limit=20); repeatable.",
)
@click.option("--distributed", is_flag=True, help="This is one of several processes that share the search.")
@click.option("--force", is_flag=True, help="Go on where the models or the passes do not fit into memory.")
@click.option("--quiet", is_flag=True, help="Print nothing on stdout; the run folder's run.log has all lines.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone: a line for each generation and warning.")
@click.option("--heartbeat", type=FILE, help="Touch this file at each pass, for a program that watches.")
@click.option("--metrics", type=FILE, help="Write figures of each generation here, as Prometheus reads them.")
@with_plugins
def search(
    config: Path,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    seed: int | None,
    overrides: tuple[str, ...],
    distributed: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
    plugin_names: tuple[str, ...],
    **watching: Path | None,
) -> None:
    """Search for the best merge that CONFIG describes, and export the winner. docs/glossary.md explains the words of
    the lines that it prints."""
    if resume and overwrite:
        raise InputError("--resume", "cannot go with --overwrite")
    if quiet and as_json:
        raise InputError("--json", "cannot go with --quiet")
    if distributed:
        # JAX's text on a lost process would stand before the line that says so: this leaves it out.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "4")
    command = _command("search", plugin_names, distributed)
    output: Literal["text", "json", "none"] = "json" if as_json else "none" if quiet else "text"
    from evojax_merge.report.monitor import Monitor

    command.search(
        config,
        out,
        resume,
        overwrite,
        seed,
        list(overrides),
        force,
        plugin_names,
        output,
        watching=Monitor(watching["heartbeat"], watching["metrics"]),
    )


@cli.command(short_help="Search for the merge whose answers people prefer.")
@click.argument("config", type=FILE)
@click.option("--out", type=FILE, help="Run folder. Default: the config's `out`, or runs/NAME.")
@click.option("--resume", is_flag=True, help="Continue a run; no vote is asked for again.")
@click.option("--overwrite", is_flag=True, help="Replace a run that has no votes.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of the page. Default: any that is free.")
@click.option("--replay", type=FILE, help="Take the votes of this votes.jsonl of an equal search.")
@click.option("--export", "pairs", type=FILE, help="Write pairs (.jsonl, and a page) and stop.")
@click.option("--import", "choices", type=FILE, help="Votes on the pairs that were written.")
@with_overrides
@with_plugins
def judge(
    config: Path,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    port: int,
    replay: Path | None,
    pairs: Path | None,
    choices: Path | None,
    overrides: tuple[str, ...],
    plugin_names: tuple[str, ...],
) -> None:
    """Search like `search`, for the merge whose answers people prefer: CONFIG has a task of `kind: human`. Serves a
    page on this machine where people choose between two answers."""
    command = _command("search", plugin_names)
    from evojax_merge.judge.batch import VotesAwaited
    from evojax_merge.judge.opening import JudgeOptions

    if resume and overwrite:
        raise InputError("--resume", "cannot go with --overwrite")
    judges = JudgeOptions(port, replay, pairs, choices)
    try:
        command.search(config, out, resume, overwrite, None, list(overrides), plugin_names=plugin_names, judges=judges)
    except VotesAwaited as awaited:
        click.echo(f"{awaited}; then go on with --resume --import votes.jsonl --export {pairs}")


@cli.command(short_help="Say what a search would take: memory, work, time.")
@click.argument("config", type=FILE)
@click.option("--target", metavar="NAME", help="rtx4090, 8xh100, 2x8xh100, v5p-8, cpu, … Default: the devices here.")
@click.option("--json", "json_file", type=FILE, help="Write the plan here as well.")
@with_overrides
@with_plugins
def plan(
    config: Path,
    target: str | None,
    json_file: Path | None,
    overrides: tuple[str, ...],
    plugin_names: tuple[str, ...],
) -> None:
    """Say, from the models' headers alone, whether the search of CONFIG fits a target's memory, how much it computes
    and moves, and how long that takes at least. The last lines are the verdict and the time; docs/accelerators.md says
    what each column of the table holds."""
    _command("plan", plugin_names).plan(config, target, json_file, list(overrides))


@cli.command(short_help="Measure this device: merging, scoring, decoding, a generation of a search.")
@click.option("--shape", metavar="NAME", help="Of the models: 7B, 3B, 1B, 100M, 10M. Default: the largest that fits.")
@click.option(
    "--seconds", type=click.FloatRange(1, 86_400), default=540, show_default=True, metavar="SECONDS",
    help="What would take longer is left out.",
)  # fmt: skip
@click.option("--json", "json_file", type=FILE, help="Write figures, machine and versions here.")
@click.option("--compare", type=FILE, help="An earlier file of --json to compare with.")
def bench(shape: str | None, seconds: float, json_file: Path | None, compare: Path | None) -> None:
    """Measure the device at hand on models of random weights, which are made on it: merge kernels against the device's
    own copy, likelihood passes against its best matrix product, decoding, and a generation of a search."""
    _command("bench").bench(shape, seconds, json_file, compare)


@cli.command(short_help="Do one merge, described by a mergekit YAML.")
@click.argument("recipe", type=FILE)
@click.argument("out", type=FILE)
@click.option("--dtype", type=DTYPE, help="Override the output dtype.")
@click.option("--seed", "--random-seed", "seed", type=SEED, help="Override the seed of random methods.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, if it is a model that evojax-merge wrote.")
@click.option("--allow-nonfinite", is_flag=True, help="Merge even where a parent holds NaN or Inf.")
@click.option("--allow-crimes/--no-allow-crimes", help="Merge different architectures if their tensors agree.")
@click.option(
    "--strict", is_flag=True, help="Refuse keys, parameters, filters without a meaning, in place of a warning."
)
@click.option(
    "--out-shard-size",
    "max_shard_bytes",
    type=ShardSize(),
    help="Split the weights into files of this size. Default: 5B.",
)
@click.option(
    "--copy-tokenizer/--no-copy-tokenizer", default=True, help="Whether OUT gets the first model's tokenizer."
)
@click.option(
    "--write-model-card/--no-write-model-card", "card", default=True, help="Whether OUT gets a card and the recipe."
)
@click.option("--transformers-cache", type=FILE, help="Where models of the hub are kept.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@with_plugins
@without_meaning
@click.pass_context
def merge(
    context: click.Context,
    recipe: Path,
    out: Path,
    transformers_cache: Path | None,
    quiet: bool,
    plugin_names: tuple[str, ...],
    **options: Any,
) -> None:
    """Do the merge that RECIPE (a mergekit YAML) describes and write the model to OUT.

    RECIPE may have several documents, as mergekit-multi takes them: those with a `name` are merged first, and others
    name them as models. --dtype is for the result, --seed for all documents.

    The other options of mergekit-yaml (--cuda, --lazy-unpickle, …) are taken as well, and change nothing.
    """
    if transformers_cache is not None:
        # Before anything imports huggingface_hub.
        os.environ["HF_HUB_CACHE"] = os.path.realpath(os.path.expanduser(transformers_cache))
    command = _command("merge", plugin_names)
    given = command.MergeOptions(**{name: value for name, value in options.items() if value is not None})
    command.merge(recipe, out, given, quiet, given_without_meaning(context))


@cli.command(short_help="Score stored models on tasks.")
@click.argument("models", metavar="MODEL_OR_RUN...", nargs=-1, required=True, type=click.Path())
@click.option("--tasks", required=True, type=FILE, help="YAML with `tasks:`, as in a search.")
@click.option("--json", "json_file", type=FILE, help="Write the scores here as well.")
@click.option(
    "--samples",
    "samples_file",
    type=FILE,
    help="Write what each model answered here: JSON lines, one for each model, task and example.",
)
@click.option(
    "--split",
    type=click.Choice(["search", "validation", "heldout", "all"]),
    default="all",
    show_default=True,
    help="Only the examples that a search of TASKS, with its seed, has in this split.",
)
@with_plugins
def evaluate(
    models: tuple[str, ...],
    tasks: Path,
    json_file: Path | None,
    samples_file: Path | None,
    split: Literal["search", "validation", "heldout", "all"],
    plugin_names: tuple[str, ...],
) -> None:
    """Score stored models on the examples of the tasks (a search's config can serve as the tasks file). A run folder
    stands for its winner."""
    _command("evaluate", plugin_names).evaluate(list(models), tasks, json_file, samples_file, split)


@cli.command(short_help="Write a search's winner again, in another dtype or place.")
@click.argument("run", type=FILE)
@click.argument("out", type=FILE)
@click.option("--dtype", type=DTYPE, help="Override the output dtype.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, if it is a model that evojax-merge wrote.")
@click.option("--best-so-far", is_flag=True, help="Of a run that was broken off: the best candidate that it has saved.")
@click.option("--member", type=int, help="Of a search for a front: the member of this number, in place of the winner.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["model", "adapter"]),
    default="model",
    help="What is written: the whole model (default), or its difference to the base as a LoRA adapter.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Of an adapter: the rank that the difference is cut to.")
def export(
    run: Path,
    out: Path,
    dtype: str | None,
    overwrite: bool,
    best_so_far: bool,
    member: int | None,
    form: str,
    rank: int | None,
) -> None:
    """Write the winner of the run folder RUN, or a member of its front, to OUT, as a Hugging Face folder or as an
    adapter of its base."""
    if (form == "adapter") != (rank is not None):
        raise InputError(
            "--rank", "missing; expected the adapter's rank" if rank is None else "only --as adapter has one"
        )
    if best_so_far and member is not None:
        raise InputError("--member", "cannot go with --best-so-far")
    _command("export").export(run, out, dtype, overwrite, best_so_far, member, rank)


@cli.command(short_help="Write a run as one HTML page.")
@click.argument("run", type=FILE)
@click.option("--watch", is_flag=True, help="Write the page again whenever the run goes on, until it is finished.")
@with_plugins
def report(run: Path, watch: bool, plugin_names: tuple[str, ...]) -> None:
    """Write RUN/report.html, from the run folder alone: one file, which a browser opens without a network. A search
    writes it as well, at its end and every so often before."""
    _command("report", plugin_names).report(run, watch)


@cli.command(short_help="Compare runs: a table, and a page.")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True, type=FILE)
@click.option("--out", type=FILE, default="compare.html", show_default=True, help="The page.")
def compare(runs: tuple[Path, ...], out: Path) -> None:
    """Print a line for each RUN, and write a page of all of them."""
    if len(runs) < 2:
        raise InputError("compare", f"{runs[0]} alone; expected two runs or more (report makes the page of one)")
    _command("compare").compare(list(runs), out)


@cli.command(short_help="Show a run in the terminal.")
@click.argument("run", type=FILE)
def show(run: Path) -> None:
    """Show how far RUN is, finished or not: its best fitness, its winner, and the held-out scores."""
    _command("show").show(run)


@cli.command("runs", short_help="List the runs below a folder.")
@click.argument("folder", default="runs", type=FILE)
def list_runs(folder: Path) -> None:
    """List the runs below FOLDER (default: runs), the newest first."""
    _command("runs").runs(folder)


@cli.command(short_help="Search a finished run again, and compare the two to the bit.")
@click.argument("run", type=FILE)
@click.option("--out", type=FILE, help="The new run folder. Default: RUN-reproduced.")
@with_plugins
def reproduce(run: Path, out: Path | None, plugin_names: tuple[str, ...]) -> None:
    """Search the finished run RUN again, into a new folder, and compare history, recipe and weights. The inputs must be
    unchanged. Exit status 1 where the two runs differ, with the first generation that does."""
    _command("reproduce", plugin_names).reproduce(run, out)


@cli.command(short_help="Upload a run's winner to the hub, with what proves it.")
@click.argument("run", type=FILE)
@click.option(
    "--repo", required=True, metavar="OWNER/NAME", help="The repository of the hub; made where there is none."
)
@click.option("--push", is_flag=True, help="Upload. Without it, the files are listed and nothing leaves this machine.")
@click.option("--private", is_flag=True, help="A repository that is made is private.")
@click.option("--with-answers", is_flag=True, help="Upload prompts, answers, pictures and the log of the run as well.")
def publish(run: Path, repo: str, push: bool, private: bool, with_answers: bool) -> None:
    """List, or with --push upload, the winner of the finished run RUN with its model card, recipe, result and page. No
    file has a path of this machine: models are named by the last part of theirs."""
    _command("publish").publish(run, repo, push, private, with_answers)


@cli.command(short_help="List the merge methods, with their parameters and bounds.")
@with_plugins
def methods(plugin_names: tuple[str, ...]) -> None:
    """List the merge methods: what they take, their parameters, and the bounds that a search has by default."""
    _command("listings", plugin_names).list_known("methods")


@cli.command(short_help="List the search strategies.")
@with_plugins
def strategies(plugin_names: tuple[str, ...]) -> None:
    """List the search strategies."""
    _command("listings", plugin_names).list_known("strategies")


@cli.command(short_help="List the architectures that can be searched and merged.")
def architectures() -> None:
    """List the architectures that can be searched and merged."""
    _command("listings").list_known("architectures")


@cli.command(short_help="List the keys of a search's config, with their defaults and meanings.")
@click.argument("section", required=False)
def keys(section: str | None) -> None:
    """List the keys that a search's config may have: what each takes, its default, and what it means. SECTION: this key
    and those in it (search, space.parameters, tasks), or all; without it, the sections."""
    _command("listings").list_known("keys", section)


def run(command: Callable[[], Any]) -> int:
    """Run a command; turn its exceptions into the exit status and one line on stderr."""
    try:
        return _run(command)
    except BaseException as error:
        # Code that a signal interrupts may raise any exception: an import in C raises ImportError.
        if interrupts.received():
            interrupts.end_at_once(INTERRUPTED, "interrupted\n")
        elif not isinstance(error, (KeyboardInterrupt, click.Abort)):
            raise
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED


def _run(command: Callable[[], Any]) -> int:
    try:
        command()
        sys.stdout.flush()
    except (InputError, Failed) as error:
        if interrupts.received():
            raise
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT if isinstance(error, InputError) else FAILED
    except RuntimeError as error:
        # JAX initialises its devices at their first use.
        if not str(error).startswith("Unable to initialize backend"):
            raise
        print(f"error: {no_devices(error)}", file=sys.stderr)
        return WRONG_INPUT
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()
        else:
            more = "" if context is None else f" (see {context.command_path} --help)"
            print(f"error: {printable(error.format_message())}{more}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:
        print("error: standard output was closed", file=sys.stderr)
        return FAILED
    return DONE


def main() -> None:
    interrupts.install()
    torch_note.is_command = True
    # Warnings are for developers, who ask for them (-W, PYTHONWARNINGS); users' messages are this program's own.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # A character that the terminal's encoding lacks is escaped and must not end the program.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = run(lambda: cli.main(standalone_mode=False))
    except PeerLostError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # An ordinary exit would wait for the lost process.
        os._exit(FAILED)
    except Exception as error:
        import traceback

        hide_inner_frames(error)
        print(without_secrets("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        status = FAILED
    # The work is done: from now on a signal only ends the program sooner.
    interrupts.end_at_once(status)
    try:
        sys.stdout.flush()
    except OSError:
        # The interpreter would flush again at exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


if __name__ == "__main__":
    main()
