"""Regular expressions that strangers wrote, as those of `re`, but with an end: an expression is bounded in size, and
looking for it in time, which backtracking alone is not."""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import regex

from evojax_merge.errors import InputError, shown

LONGEST = 10_000
# Parts that counted repetitions are written out to when a pattern is compiled: `((a{99}){99}){99}` has a million.
LARGEST = 100_000
# Of processor time that looking for an expression in the name of a module may take.
SECONDS_A_NAME = 0.2

TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d+(?:,\d*)?\}|\{,\d+\}|.", re.DOTALL)


@functools.cache
def expression(pattern: str) -> regex.Pattern[str]:
    """The compiled pattern, whose methods take a `timeout` in seconds. Raises ValueError for a pattern that is no
    expression of `re`, or too large: what it is, as the end of a sentence about it."""
    if len(pattern) > LONGEST:
        raise ValueError(f"has {len(pattern):,} characters; expected at most {LONGEST:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            small = _size(pattern) <= LARGEST
            found = regex.compile(_as_re(pattern), regex.V0) if small else None
    except RecursionError:
        raise ValueError("is not a regular expression (it is nested too deep)") from None
    except (re.error, regex.error, OverflowError, ValueError) as error:
        raise ValueError(f"is not a regular expression ({error})") from None
    if found is None:
        raise ValueError(f"repeats more than {LARGEST:,} parts")
    return found


def begins(where: object, pattern: str, name: str) -> bool:
    """Whether a match begins where the name does, as `re.match` has it. Raises InputError, `where` in front, for a
    pattern that `expression` refuses, and for one that is not found, or missed, in no time."""
    return _matches(where, pattern, lambda found: found.match(name, timeout=SECONDS_A_NAME))


def is_all_of(where: object, pattern: str, name: str) -> bool:
    """Whether the whole name is a match, as `re.fullmatch` has it. Raises as `begins` does."""
    return _matches(where, pattern, lambda found: found.fullmatch(name, timeout=SECONDS_A_NAME))


def _matches(where: object, pattern: str, look: Callable[[regex.Pattern[str]], Any]) -> bool:
    try:
        return look(expression(pattern)) is not None
    except ValueError as error:
        raise InputError(where, f"the pattern {shown(pattern)} {error}") from None
    except (TimeoutError, MemoryError):
        raise InputError(
            where, f"the pattern {shown(pattern)} tries too many ways to match a name; expected a regular expression "
            "without repetitions inside repetitions"
        ) from None  # fmt: skip


def _as_re(pattern: str) -> str:
    """The pattern without what only the package regex gives a meaning: `{e}` for errors, `[[:alpha:]]` for a class."""
    parts = []
    for token in TOKENS.findall(pattern):
        if token == "{":
            token = r"\{"
        elif token.startswith("[") and len(token) > 1:
            inner = re.sub(r"(\\.)|\[", lambda part: part[1] or r"\[", token[1:], flags=re.DOTALL)
            token = f"[{inner}"
        parts.append(token)
    return "".join(parts)


def _size(pattern: str) -> int:
    """About how many parts a pattern has when its counted repetitions are written out."""
    groups, last = [0], 0
    for token in TOKENS.findall(pattern):
        if token == "(":
            groups.append(0)
            last = 0
        elif token == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif token.startswith("{") and len(token) > 1:
            groups[-1] += last * (max(int(number) for number in re.findall(r"\d+", token)) - 1)
        else:
            last = 1
            groups[-1] += 1
    return sum(groups)
