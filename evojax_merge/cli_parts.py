"""The parts that the commands of the command line share: options, imports, exit statuses, and how arguments are
read."""

import os
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from evojax_merge.errors import LONGEST_LINE, Failed, InputError, printable
from evojax_merge.mergekit.flags import ShardSize
from evojax_merge.system import interrupts
from evojax_merge.system.imports import importing
from evojax_merge.system.interrupts import INTERRUPTED
from evojax_merge.system.jax_environment import check_environment, no_devices
from evojax_merge.system.users_traceback import hide_inner_frames

# The bound is config.MAX_SEED, repeated here: the imports of config are too heavy for --help.
SEED = click.IntRange(min=0, max=2**63 - 1)
DTYPE = click.Choice(["float32", "float16", "bfloat16"])
# FP8 as compressed-tensors keeps it, with scales.
OUTPUT_DTYPE = click.Choice([*DTYPE.choices, "float8_e4m3"])

# Exit statuses.
DONE, FAILED, WRONG_INPUT = 0, 1, 2
# Commands that print lists.
LISTS = frozenset({"methods", "strategies", "architectures", "keys", "runs", "show", "compare"})


class FloatRange(click.FloatRange):
    """A range in which NaN is not: it passes every comparison of click's."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return number if number == number else self.fail(f"{value} is no number.", param, ctx)


class FilePath(click.Path):
    """A path in which `~` is the home folder: shells leave it as it is in quotes, and in `--out=~/run`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


FILE = FilePath(path_type=Path)
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


with_gguf_type = click.option(
    "--type", metavar="TYPE", help="Of a GGUF file: f32, f16, bf16, q8_0, q4_0, … Default: that of the dtype."
)
with_shard_size = click.option(
    "--shard-size",
    "--out-shard-size",
    "max_shard_bytes",
    type=ShardSize(),
    help="Split the weights into files of this size. Default: 5B.",
)


def _start_jax() -> None:
    """Import JAX, which keeps compiled programs from now on."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # What transformers logs as an error it raises as well.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    check_environment()
    from evojax_merge.evaluation.compilations import keep_compiled_programs

    keep_compiled_programs()


def import_command(name: str, plugin_names: tuple[str, ...] = (), distributed: bool = False) -> Any:
    """Import JAX, which keeps compiled programs from now on, and the module of a command; then load the plugins. An
    interruption of a search during the imports prints the command that continues it or begins it again, as later
    interruptions do. distributed: this is one of several processes."""
    arguments = sys.argv[1:]
    again = printable(shlex.join(["evojax-merge", *arguments]), LONGEST_LINE)
    next_step = "Continue" if "--resume" in arguments else "Start again"
    resume_hint = f"stopped before it began. {next_step} with: {again}\n" if arguments[:1] == ["search"] else ""
    with importing(), interrupts.nothing_begun(f"{resume_hint}interrupted\n"):
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
    except PermissionError as error:
        # A user's own function has its traceback.
        if error.filename is None or hide_inner_frames(error):
            raise
        what = f"{os.fsdecode(error.filename)}: may not be read, or written, by you ({error.strerror})"
        print(f"error: {printable(what)}", file=sys.stderr)
        return WRONG_INPUT
    except MemoryError as error:
        what = "this process may take no more memory" + (f" ({error})" if str(error) else "")
        print(f"error: {what}; what was saved is whole, and a search goes on with --resume", file=sys.stderr)
        return FAILED
    return DONE
