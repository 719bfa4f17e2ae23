"""The terminal: one line for each text, and none silent for long.

Whatever works for a while is named every few seconds where the output is no terminal (`Heartbeat`).
"""

import io
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import click
from rich.console import Console

from evojax_merge.errors import LOG, LONGEST_LINE, printable

# The lines that were to be printed once, outside of a command.
_PRINTED: set[str] = set()
# After so many seconds without a line the work under way is named.
SILENCE_SECONDS = 8.0


class Terminal(Console):
    """The console, which prints each text as one line, escaped, and logs all that it prints, also where it is quiet."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # The imports before this one, which take processor time, were silent, too.
        self.printed_at = time.monotonic() - min(time.process_time(), SILENCE_SECONDS)

    def print(self, *objects: Any, **options: Any) -> None:
        self.printed_at = time.monotonic()
        lines = [printable(text, LONGEST_LINE) if isinstance(text, str) else text for text in objects]
        for line in lines:
            for part in [line] if isinstance(line, str) else drawn(line).splitlines():
                LOG.info("%s", part.rstrip())
        super().print(*lines, **options)


def drawn(renderable: Any) -> str:
    """A table or the like as a file shows it."""
    file = io.StringIO()
    Console(file=file, width=140, force_jupyter=False).print(renderable)
    return file.getvalue().rstrip()


# A notebook is no terminal, although its kernel has the variables of one: there Rich's bars need widgets, and print
# every line twice without.
IN_NOTEBOOK = Console().is_jupyter
# Lines in a file are as long as a table needs. Nothing is markup: `[/INST]` is a name.
console = Terminal(
    width=None if sys.stdout.isatty() else 140, markup=False, emoji=False, highlight=False,
    force_jupyter=False, force_terminal=False if IN_NOTEBOOK else None,
)  # fmt: skip


def format_seconds(seconds: float) -> str:
    """A duration as `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def seconds_left(done: float, total: float, at: float, now: float) -> float:
    """The seconds that are left of work at the rate so far. at, now: seconds from its begin, when `done` of `total` was
    reached and now."""
    return max(0.0, at * (total / done - 1) - (now - at))


class Heartbeat:
    """Names the work under way on the console, which is no terminal, after every SILENCE_SECONDS without a line.

    Parts of the work may have parts: the innermost is named.
    """

    def __init__(self) -> None:
        self._work: list[Callable[[], str]] = []
        self._thread: threading.Thread | None = None

    @contextmanager
    def during(self, describe: Callable[[], str]) -> Iterator[None]:
        """Name the work of the block by what `describe` returns when it is called, from another thread."""
        # A command has been silent since it began to import this module; a Python program may do other things.
        if not self._work and time.monotonic() - console.printed_at > 2 * SILENCE_SECONDS:
            console.printed_at = time.monotonic()
        self._work.append(describe)
        # A process that was forked has no thread of its parent's.
        is_watching = self._thread is not None and self._thread.is_alive()
        if not is_watching and not console.is_terminal and not IN_NOTEBOOK:
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
        try:
            yield
        finally:
            self._work.remove(describe)

    def _watch(self) -> None:
        while True:
            time.sleep(SILENCE_SECONDS / 16)
            work = self._work[-1:]
            if work and time.monotonic() - console.printed_at >= SILENCE_SECONDS:
                console.printed_at = time.monotonic()
                # The log of a run is of what happened.
                super(Terminal, console).print(printable(work[0](), LONGEST_LINE), soft_wrap=True)


HEARTBEAT = Heartbeat()


def working(what: str) -> AbstractContextManager[None]:
    """Name the block's work, which has no bar, wherever it takes long."""
    started = time.monotonic()
    return HEARTBEAT.during(lambda: f"{what}: {format_seconds(time.monotonic() - started)} so far")


def say(text: str) -> None:
    """Print one line on the terminal, unchanged."""
    console.print(text)


def say_once(text: str) -> None:
    """Print one line, unless the command, or outside of one the process, has printed it before."""
    context = click.get_current_context(silent=True)
    printed = _PRINTED if context is None else context.meta.setdefault(__name__, set())
    if text not in printed:
        printed.add(text)
        say(text)
