"""Votes by file, where no browser reaches the machine of the search.

The search writes the pairs that it wants votes on, as JSON lines and as a page that works from a file, and ends. A
later one reads the votes and goes on, until the next generation needs some.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from evojax_merge.errors import InputError
from evojax_merge.file_system import atomic_write
from evojax_merge.tasks.votes import Choice


class VotesAwaited(Exception):
    """The search has written pairs and cannot go on without votes on them."""

    def __init__(self, count: int, path: Path) -> None:
        super().__init__(f"{count} pairs wait for votes in {path}, and on the page {page_of(path)}")


@dataclass(frozen=True)
class Pair:
    """A pair of a file. name: what its vote refers to it by."""

    name: str
    question: str
    prompt: str
    left: str
    right: str


@dataclass
class Batch:
    """pairs: the file to write pairs to; votes: by a pair's name, the choices that were read, each with its judge."""

    pairs: Path
    votes: Mapping[str, list[tuple[Choice, str]]] = field(default_factory=dict)

    def write(self, pairs: Sequence[Pair]) -> None:
        """Write the pairs and their page. Raises VotesAwaited, always."""
        rows = [vars(pair) for pair in pairs]
        atomic_write(self.pairs, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        room = files(__package__)
        # Inside of a script element only "<" could end it.
        content = {
            "JUDGE_CSS": room.joinpath("judge.css").read_text("utf-8"),
            "PAIRS_JS": room.joinpath("pairs.js").read_text("utf-8"),
            "PAIRS": json.dumps(rows).replace("<", "\\u003c"),
        }
        page = room.joinpath("pairs.html").read_text("utf-8")
        for name, text in content.items():
            page = page.replace(f"{{{{{name}}}}}", text)
        atomic_write(page_of(self.pairs), page)
        raise VotesAwaited(len(pairs), self.pairs)


def page_of(pairs: Path) -> Path:
    """The page beside a file of pairs."""
    return pairs.with_suffix(".html")


def read_choices(path: Path) -> dict[str, list[tuple[Choice, str]]]:
    """The votes of a file: JSON lines with `pair`, `choice` and perhaps `judge`. Raises InputError for other lines, and
    for a judge who votes twice on one pair."""
    votes: dict[str, list[tuple[Choice, str]]] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("--import", f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        row = _row(where, line)
        choice: Any = row.get("choice")
        judge = str(row.get("judge", ""))
        if choice not in get_args(Choice):
            raise InputError(where, f"choice: {choice!r}; expected one of {', '.join(get_args(Choice))}")
        given = votes.setdefault(str(row.get("pair")), [])
        if any(judge == other for _, other in given):
            raise InputError(where, f"is a second vote of judge {judge!r} on one pair; remove one")
        given.append((choice, judge))
    return votes


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(where, f"is no JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("pair"), str):
        raise InputError(where, "expected pair and choice")
    return row
