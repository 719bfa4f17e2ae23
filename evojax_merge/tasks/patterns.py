"""The search for users' regular expressions in the outputs of models: a match that backtracks without end is given
up."""

import contextlib
import functools
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import regex

from evojax_merge.errors import InputError, print_warning
from evojax_merge.schema.patterns import expression

# Seconds of processor time that one text may take. An ordinary pattern needs a thousandth of it for the longest output.
SECONDS = 2.0
# The number of such texts after which the pattern is refused: it would take all of the run's time.
GIVE_UP_AFTER = 3
# Examples of a task that a user's pattern is tried on before the search.
PROBED = 50


class Pattern:
    """A pattern by its text. find: the matches in a text, or TimeoutError; `slow`: the texts on which that came."""

    def __init__(self, text: str, find: Callable[[str], list[Any]]) -> None:
        self.text, self._find = text, find
        self.slow: set[str] = set()

    def find_all(self, text: str) -> list[Any] | None:
        """All matches; None where the search for them took too long."""
        if text in self.slow:
            return None
        try:
            return self._find(text)
        except TimeoutError:
            self.slow.add(text)
            return None


@functools.cache
def _compiled(pattern: str) -> Pattern:
    compiled = expression(pattern)

    def find(text: str) -> list[Any]:
        try:
            return list(compiled.finditer(text, timeout=SECONDS))
        except MemoryError:
            raise TimeoutError from None

    return Pattern(pattern, find)


@functools.cache
def _of_others(compiled: re.Pattern[str]) -> Pattern:
    """An expression that others compiled with `re`, whose matches are those of its `findall` in every detail."""

    def find(text: str) -> list[Any]:
        with time_limit(SECONDS):
            return compiled.findall(text)

    return Pattern(compiled.pattern, find)


class TooSlow(InputError):
    """A pattern that took too long on output after output."""


class LimitedRegex:
    """Stands for a compiled expression of `re` in others' code: its `findall` gives up where `find_all` does, all else
    is the expression's own. `where` names the task."""

    def __init__(self, where: str, compiled: re.Pattern[str]) -> None:
        self._where, self._compiled = where, compiled

    def findall(self, text: str) -> list[Any]:
        return _matches(self._where, _of_others(self._compiled), text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once the process has computed for so long. `re` checks for signals while it
    matches; only the main thread receives them, and in others there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        signal.signal(signal.SIGVTALRM, handler)


def check_pattern(where: str, pattern: str, longest: int, samples: Sequence[str] = ()) -> None:
    """Raises InputError for a text that is no regular expression of `re`, is too large, or takes too long on the
    `samples`, joined to one text of as many characters as `longest` tokens may have."""
    shown = _shown(pattern)
    if not pattern:
        raise InputError(
            where, "pattern: is empty, and matches nothing but empty text; leave the key out or fill it in"
        )
    try:
        compiled = _compiled(pattern)
    except ValueError as error:
        raise InputError(where, f"pattern: {shown} {error}") from None
    sample = " ".join(samples)[: 4 * longest]
    if compiled.find_all(sample) is None:
        raise InputError(where, f"pattern: {shown} {_too_slow(sample)}")


def find_all(where: str, pattern: str, text: str) -> list[regex.Match[str]]:
    """All matches in a model's output. Where the search takes too long there are none, and the user sees one warning;
    raises TooSlow if that happens again and again. `where` names the task."""
    return _matches(where, _compiled(pattern), text)


def answer_end(where: str, pattern: str, text: str) -> int | None:
    """The end of the first match in a model's output that more text follows, so that no further token changes it; None
    where there is none."""
    # The first bytes of a character are shown as this one, until the token with its others is there.
    length = len(text.rstrip("\ufffd"))
    ends = (match.end() for match in find_all(where, pattern, text) if match[0])
    return next((end for end in ends if end < length), None)


def _matches(where: str, pattern: Pattern, text: str) -> list[Any]:
    before = len(pattern.slow)
    matches = pattern.find_all(text)
    if matches is None and len(pattern.slow) > before:
        problem = f"pattern: {_shown(pattern.text)} {_too_slow(text)}"
        if len(pattern.slow) >= GIVE_UP_AFTER:
            raise TooSlow(where, f"{problem}, and did so on {len(pattern.slow)} outputs")
        if not before:
            print_warning(f"{where}: {problem}; such an output counts as one without an answer")
    return matches or []


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 200 else f"{pattern[:200]}…")


def _too_slow(text: str) -> str:
    shown = text if len(text) <= 60 else f"{text[:60]}…"
    return (
        f"takes more than {SECONDS:g} s on a text of {len(text):,} characters ({shown!r}): "
        "it tries too many ways to match; expected a pattern without repetitions inside repetitions"
    )
