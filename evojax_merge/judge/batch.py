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
from evojax_merge.tasks.voting import Choice

# The files of the page beside its pairs.
PARTS = ("judge.html", "judge.css", "answers.js", "pairs.js")
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:\">\n"
)


class VotesAwaited(Exception):
    """The search has written pairs and cannot go on without votes on them."""

    def __init__(self, count: int, path: Path) -> None:
        super().__init__(f"{count} pairs wait for votes in {path}, and on the page {page_of(path)}")


@dataclass(frozen=True)
class Pair:
    """A pair of a file. name: what its vote refers to it by; pictures: the answers are pictures, as data URIs."""

    name: str
    question: str
    prompt: str
    left: str
    right: str
    pictures: bool = False


@dataclass
class Batch:
    """pairs: the file to write pairs to; votes: by a pair's name, the choices that were read, each with its judge."""

    pairs: Path
    votes: Mapping[str, list[tuple[Choice, str]]] = field(default_factory=dict)

    def write(self, pairs: Sequence[Pair]) -> None:
        """Write the pairs and their page. Raises VotesAwaited, always."""
        rows = [vars(pair) for pair in pairs]
        atomic_write(self.pairs, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        atomic_write(page_of(self.pairs), _page(rows))
        raise VotesAwaited(len(pairs), self.pairs)


def _page(rows: Sequence[dict[str, Any]]) -> str:
    """The judges' page with everything inside, for a browser that reaches no server."""
    room = files(__package__)
    text = {name: room.joinpath(name).read_text("utf-8") for name in PARTS}
    # Inside of a script element only "<" could end it.
    data = json.dumps(rows).replace("<", "\\u003c")
    scripts = [
        f'<script type="application/json" id="pairs">{data}</script>',
        *(f"<script>{text[name]}</script>" for name in ("answers.js", "pairs.js")),
    ]
    head, _, body = text["judge.html"].partition('<link rel="stylesheet" href="judge.css">')
    body, _, end = body.partition('<script src="answers.js"></script>\n<script src="judge.js"></script>')
    head = head.replace("evojax-merge: judge", "evojax-merge: pairs")
    return "".join([head, POLICY, f"<style>{text['judge.css']}</style>", body, *scripts, end])


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
