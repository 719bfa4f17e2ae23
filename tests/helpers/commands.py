"""`evojax-merge` in the process of a test."""

import contextlib
import io
import subprocess
from collections.abc import Iterable
from pathlib import Path

from evojax_merge.cli import cli, run
from helpers.files import write_yaml


def command(*arguments: object) -> int:
    """The exit status of `evojax-merge` with these arguments, in this process, where pytest captures its output."""
    return run(lambda: cli.main([*map(str, arguments)], standalone_mode=False))


def run_here(*arguments: object, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """`evojax-merge` with these arguments, in this process, which must end with `status` unless that is None: programs
    that it traces and compiles serve the next command as well, where a process of its own takes four times as long.
    (hostile.run_command: a real process.)"""
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        ended = command(*arguments)
    assert status in (None, ended), stdout.getvalue() + stderr.getvalue()
    return subprocess.CompletedProcess(["evojax-merge", *arguments], ended, stdout.getvalue(), stderr.getvalue())


def refusal(*arguments: object) -> str:
    """The one line on stderr of `evojax-merge` with these arguments, which must be refused."""
    line = run_here(*arguments, status=2).stderr
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


def assert_refused(says: Iterable[str], *arguments: object) -> None:
    """The one line of a command that must be refused contains all texts."""
    line = refusal(*arguments)
    assert all(text in line for text in says), line


def output_of(*arguments: object) -> str:
    """The output of `evojax-merge` with these arguments, first to stdout, then to stderr; it must succeed."""
    done = run_here(*arguments)
    return done.stdout + done.stderr


def linear_merge(folder: Path, *models: object) -> tuple[object, ...]:
    """The arguments of `evojax-merge merge` of models with weights of 1, in float32, to `out` in a folder."""
    rows = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    recipe = {"merge_method": "linear", "dtype": "float32", "models": rows}
    return "merge", write_yaml(folder / "recipe.yaml", recipe), folder / "out"
