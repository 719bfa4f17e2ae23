"""Votes by file, where no browser reaches the machine of the search.

The search writes the pairs that it wants votes on, as JSON lines and as a page that works from a file, and ends. A
later one reads the votes and goes on, until the next generation needs some.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from evojax_merge.errors import InputError, Paused, shown
from evojax_merge.judge.votes import Round, Vote, VoteFile
from evojax_merge.system.file_system import OutputFile, holds_json
from evojax_merge.system.regular_file import lines_of
from evojax_merge.tasks.voting import Choice

# Each judge's choices, with the judge's name, by the name of the pair; and the largest file of them.
Choices = Mapping[str, Sequence[tuple[Choice, str]]]
MAX_BYTES = 64 << 20
# The files of the page beside its pairs.
PARTS = ("judge.html", "judge.css", "answers.js", "pairs.js")
TITLE = "<title>evojax-merge: pairs</title>"
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:\">\n"
)


class VotesAwaited(Paused):
    """The search has written pairs and cannot go on without votes on them."""

    def __init__(self, count: int, path: Path) -> None:
        super().__init__(f"{count} pairs wait for votes in {path}, and on the page {page_of(path)}")


def pair_files(path: Path) -> tuple[OutputFile, OutputFile]:
    """The file of pairs and the page on which people vote on them. `path`: that of --export."""

    def holds_pairs(content: bytes) -> bool:
        return holds_json(content.partition(b"\n")[0], ("pair", "question", "prompt", "left", "right"))

    pairs = OutputFile(path, "--export", "holds no pairs", holds_pairs)
    page = OutputFile(page_of(path), "the page of --export", "is no page of pairs", lambda text: TITLE.encode() in text)
    return pairs, page


def write_pairs(path: Path, pairs: Sequence[Mapping[str, Any]]) -> None:
    """Write the files of pairs (see `pair_files`). A pair has the name by which votes refer to it, `pair`, `question`,
    `prompt`, `left`, `right`, and `pictures`, whether the answers are pictures, as data URIs. The page holds
    everything, for a browser that reaches no server."""
    file, page = pair_files(path)
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs))
    room = files(__package__)
    text = {name: room.joinpath(name).read_text("utf-8") for name in PARTS}
    # Inside of a script element only "<" could end it.
    data = json.dumps(pairs).replace("<", "\\u003c")
    scripts = [
        f'<script type="application/json" id="pairs">{data}</script>',
        *(f"<script>{text[name]}</script>" for name in ("answers.js", "pairs.js")),
    ]
    head, _, body = text["judge.html"].partition('<link rel="stylesheet" href="judge.css">')
    body, _, end = body.partition('<script src="answers.js"></script>\n<script src="judge.js"></script>')
    head = head.replace("<title>evojax-merge: judge</title>", TITLE)
    page.write("".join([head, POLICY, f"<style>{text['judge.css']}</style>", body, *scripts, end]))


def page_of(pairs: Path) -> Path:
    """The page beside a file of pairs."""
    return pairs.with_suffix(".html")


def votes_of(
    path: Path, choices: Choices, file: VoteFile, weights: Mapping[str, Mapping[str, float]]
) -> tuple[list[tuple[Round, Vote]], str]:
    """The votes to write down of choices on pairs that a search has written, each with its round; and how many they
    are, in words. path: the choices' file; weights: of judges, by task. Raises InputError for a pair that the search
    has not written."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    added: list[tuple[Round, Vote]] = []
    counted = late = 0
    for name, given in choices.items():
        if name not in file.pairs:
            what = f"has a vote on pair {name!r}, which this search has not written"
            raise InputError(path, f"{what}; expected votes on the pairs of --export")
        one, pair = file.pairs[name]
        for choice, judge in given:
            if any((vote.pair, vote.judge) == (name, judge) for vote in one.votes):
                counted += 1
            elif one.closed:
                late += 1
            else:
                weight = weights[one.task].get(judge, 1.0)
                added.append((
                    one, Vote(pair.example, pair.left, pair.right, choice, pair.answers, judge, weight, now, pair=name)
                ))  # fmt: skip
    rest = [f"; {counted} had been taken before"] if counted else []
    rest += [f"; {late} came after their generation had ended, and do not count"] if late else []
    return added, f"took {len(added)} votes{''.join(rest)}"


def read_choices(path: Path) -> Choices:
    """The choices of a file, which may be a pipe: JSON lines with `pair`, `choice` and perhaps `judge`. Raises
    InputError for other lines, and for a judge who votes twice on one pair."""
    votes: dict[str, list[tuple[Choice, str]]] = {}
    try:
        lines, rest = lines_of(path, "a file of votes", MAX_BYTES, or_pipe=True)
    except OSError as error:
        raise InputError("--import", f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate([*lines, rest], start=1):
        if line.strip():
            name, choice, judge = _row(f"{path}:{number}", line)
            if any(judge == other for _, other in votes.setdefault(name, [])):
                raise InputError(f"{path}:{number}", f"is a second vote of judge {judge!r} on one pair; remove one")
            votes[name].append((choice, judge))
    return votes


def _row(where: str, line: bytes) -> tuple[str, Choice, str]:
    """The pair, the choice and the judge of a line."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(where, f"is no JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("pair"), str):
        what = f"its keys are {', '.join(row) or 'none'}" if isinstance(row, dict) else f"is {shown(row)}"
        raise InputError(where, f'{what}; expected {{"pair": NAME, "choice": …}}, with the name that the pair has')
    choice: Any = row.get("choice")
    judge = row.get("judge", "")
    if choice not in get_args(Choice):
        raise InputError(where, f"choice: {shown(choice)}; expected one of {', '.join(get_args(Choice))}")
    if not isinstance(judge, str):
        raise InputError(where, f"judge: {shown(judge)}; expected a text")
    return row["pair"], choice, judge
