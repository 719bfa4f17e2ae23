"""Regular expressions that strangers wrote, with the meaning that `re` gives them, but with limits: on the size of an
expression, and on the time of a match, which backtracking alone does not limit."""

import functools
import re
import warnings
from typing import Literal

import regex

from evojax_merge.errors import InputError, shown

LONGEST = 10_000
# The maximum of parts that counted repetitions are written out to when a pattern is compiled: `((a{99}){99}){99}` has a
# million.
LARGEST = 100_000
# The maximum of processor time for matching an expression with the name of a module.
SECONDS_A_NAME = 0.2

TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d+(?:,\d*)?\}|\{,\d+\}|.", re.DOTALL)


@functools.cache
def expression(pattern: str) -> regex.Pattern[str]:
    """The compiled pattern, whose methods take a `timeout` in seconds. Raises ValueError for a pattern that is no
    expression of `re`, or too large; the error's text is the end of a sentence about the pattern."""
    if len(pattern) > LONGEST:
        raise ValueError(f"has {len(pattern):,} characters; expected at most {LONGEST:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            small = _size(pattern) <= LARGEST
            compiled = regex.compile(_as_re(pattern), regex.V0) if small else None
    except RecursionError:
        raise ValueError("is not a regular expression (it is nested too deep)") from None
    except (re.error, regex.error, OverflowError, ValueError) as error:
        raise ValueError(f"is not a regular expression ({error})") from None
    if compiled is None:
        raise ValueError(f"repeats more than {LARGEST:,} parts")
    return compiled


def pattern_matches(where: object, pattern: str, name: str, how: Literal["match", "fullmatch", "search"]) -> bool:
    """Return whether `re.match`, `re.fullmatch` or `re.search` finds the pattern in a name. Raises InputError, with
    `where` in front, for a pattern that `expression` refuses, and for a match that takes too long."""
    try:
        return getattr(expression(pattern), how)(name, timeout=SECONDS_A_NAME) is not None
    except ValueError as error:
        raise InputError(where, f"the pattern {shown(pattern)} {error}") from None
    except (TimeoutError, MemoryError):
        raise InputError(
            where, f"the pattern {shown(pattern)} tries too many ways to match a name; expected a regular expression "
            "without repetitions inside repetitions"
        ) from None  # fmt: skip


def _as_re(pattern: str) -> str:
    """The pattern with the syntax escaped that has a meaning in the package regex alone: `{e}` for errors,
    `[[:alpha:]]` for a class."""
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
    """The approximate number of a pattern's parts when its counted repetitions are written out."""
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
