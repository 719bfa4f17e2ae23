"""`votes.jsonl`: every round of candidates that judges compared, and every vote, in the order in which they came.

A line is one of

    {"round": DIGEST, "task": …, "genomes": [[…], …], "answers": [DIGEST, …]}
                                                         candidates whose answers are compared from now on
    {"pair": {…}, "round": DIGEST}                       two of them that stand in a file for votes (see `FilePair`)
    {"vote": {…}, "round": DIGEST}                       a choice between two of them on one prompt (see `Vote`)
    {"closed": DIGEST}                                   the round's strengths went to the search

A line is on the disk before anything depends on it, so that a search that is killed loses no vote, and a search that
meets a round of the file again takes its votes from there.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from pydantic import ConfigDict, Field, InstanceOf, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from evojax_merge.errors import InputError, print_warning, shown
from evojax_merge.search.checkpoints import append_line
from evojax_merge.system.file_system import atomic_write_bytes, regular_file
from evojax_merge.system.regular_file import lines_of
from evojax_merge.tasks.voting import Choice, Weight

CHOICES = get_args(Choice)
DIGEST = 16
# The largest votes file.
MAX_BYTES = 1 << 30
Natural = Annotated[int, Strict(), Field(ge=0)]
# A name may hold half of a surrogate pair, which pydantic does not take for text.
AnyText = InstanceOf[str]
_GENOMES = TypeAdapter(list[list[Annotated[float, Strict(), Field(allow_inf_nan=False)]]])


def digest(*texts: str) -> str:
    """The digest of texts that names answers and rounds."""
    return sha256(json.dumps(texts).encode()).hexdigest()[:DIGEST]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Vote:
    """A choice. example: the prompt's number in the task's split; left, right: numbers of candidates in their round;
    answers: the digests of the two answers; judge, weight: who chose, and how much that counts; time: UTC, ISO 8601,
    which nothing depends on; number: the vote's in its round, from 0; None: the file was written without numbers; pair:
    the name of the `FilePair` that it is on, "" for none."""

    example: Natural
    left: Natural
    right: Natural
    choice: Choice
    answers: tuple[AnyText, AnyText]
    judge: AnyText = ""
    weight: Annotated[Weight, Strict()] = 1.0
    time: AnyText = ""
    number: Natural | None = None
    pair: AnyText = ""


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FilePair:
    """A question in a file for votes, on the candidates left and right. name: votes refer to it; others: see `Vote`."""

    name: AnyText
    example: Natural
    left: Natural
    right: Natural
    answers: tuple[AnyText, AnyText]


@dataclass
class Round:
    """P candidates of one generation, or of the held-out comparison. genomes: float64[P, D], without columns where the
    candidates have none; answers: the digest of each candidate's answers to all prompts."""

    digest: str
    task: str
    genomes: np.ndarray
    votes: list[Vote] = field(default_factory=list)
    closed: bool = False
    answers: tuple[str, ...] = ()


class VoteFile:
    """The rounds of a file, which grows as votes are added. sizes: by the names of the search's tasks, the numbers of
    examples that a generation, and the held-out comparison, may ask about. Raises InputError for lines that no search
    wrote, and for votes on other tasks and examples."""

    def __init__(self, path: Path, sizes: Mapping[str, tuple[int, int]] | None = None) -> None:
        self.path, self._sizes = path, sizes
        self.rounds: list[Round] = []
        # By their names, with their rounds.
        self.pairs: dict[str, tuple[Round, FilePair]] = {}
        lines, rest = lines_of(path, "a votes file", MAX_BYTES) if path.exists() else ([], b"")
        self._lacks_end, lines = bool(rest), [*lines, *([rest] if rest else [])]
        # A process that was killed while it wrote leaves a part of a line: that vote was never confirmed.
        self._broken = b""
        try:
            json.loads(lines[-1] if lines and lines[-1].strip() else "0")
        except (ValueError, RecursionError):
            self._broken = lines.pop()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self._read(f"{path}:{number}", line)

    def mend(self) -> None:
        """Make lines appendable: end the last line, and move one that cannot be read to `votes.jsonl.broken`."""
        if self._broken:
            aside = self.path.with_name("votes.jsonl.broken")
            what = f"its last line cannot be read, and stands in {aside.name} now; a vote in it is asked for again"
            print_warning(f"{self.path}: {what}")
            earlier = regular_file(aside).read_bytes() if aside.exists() else b""
            atomic_write_bytes(aside, earlier + self._broken + b"\n")
            with self.path.open("r+b") as file:
                file.truncate(file.seek(0, os.SEEK_END) - len(self._broken) - (not self._lacks_end))
        elif self._lacks_end:
            append_line(self.path, "\n")
        self._broken, self._lacks_end = b"", False

    def find(self, digest: str) -> Round | None:
        return next((each for each in self.rounds if each.digest == digest), None)

    def of_task(self, task: str) -> Iterator[Round]:
        return (each for each in self.rounds if each.task == task)

    def open(self, digest: str, task: str, genomes: np.ndarray, answers: Sequence[str] = ()) -> Round:
        """Begin a round."""
        rows = [[float(gene) for gene in row] for row in genomes]
        self._append({"round": digest, "task": task, "genomes": rows, "answers": list(answers)})
        self.rounds.append(Round(digest, task, np.asarray(genomes, float), answers=tuple(answers)))
        return self.rounds[-1]

    def ask(self, one: Round, pair: FilePair) -> None:
        """Remember a pair that is written to a file."""
        if pair.name not in self.pairs:
            self._append({"pair": asdict(pair), "round": one.digest})
            self.pairs[pair.name] = one, pair

    def add(self, to: Round, vote: Vote) -> None:
        vote = replace(vote, number=len(to.votes))
        self._append({"vote": asdict(vote), "round": to.digest})
        to.votes.append(vote)

    def close(self, one: Round) -> None:
        self._append({"closed": one.digest})
        one.closed = True

    def _append(self, line: dict[str, Any]) -> None:
        self.mend()
        append_line(self.path, json.dumps(line) + "\n")

    def _read(self, where: str, line: bytes) -> None:
        try:
            row = json.loads(line)
            if "vote" in row:
                one, fields = self._named(where, row["round"]), row["vote"]
                if fields["choice"] not in CHOICES:
                    raise InputError(where, f"choice: {shown(fields['choice'])}; expected one of {', '.join(CHOICES)}")
                vote, count = Vote(**fields), len(one.votes)
                self._check(where, one, vote)
                # Only votes of files without numbers can be anywhere.
                if vote in (one.votes if vote.number is None else one.votes[vote.number :][:1]):
                    raise InputError(where, "is the same vote once more; remove the line")
                if vote.number not in (None, count):
                    what = f"is vote {vote.number} of its round after {count} others; lines are missing or doubled"
                    raise InputError(where, f"{what}; expected the file as the search wrote it")
                one.votes.append(vote)
            elif "pair" in row:
                one, pair = self._named(where, row["round"]), FilePair(**row["pair"])
                self._check(where, one, pair)
                self.pairs[pair.name] = one, pair
            elif "closed" in row:
                self._named(where, row["closed"]).closed = True
            else:
                self.rounds.append(self._round_of(where, row))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            what = f"is no line of a votes file ({type(error).__name__}: {error})"
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                what = f"{'.'.join(map(str, first['loc']))}: {shown(first['input'])} ({first['msg']})"
            raise InputError(where, f"{what}; expected the file as the search wrote it, or a copy of that") from None

    def _check(self, where: str, one: Round, asked: Vote | FilePair) -> None:
        """Raises InputError for a question that the round does not have."""
        left, right, (count, dims) = asked.left, asked.right, one.genomes.shape
        # In the held-out comparison the winner, the first, meets the others.
        if max(left, right) >= count or (not dims and min(left, right) > 0):
            raise InputError(where, f"is a vote on candidates {left} and {right} of {count}")
        if left == right:
            raise InputError(where, f"is a vote on candidate {left} and itself")
        most = asked.example + 1 if self._sizes is None else self._sizes[one.task][0 if dims else 1]
        if asked.example >= most:
            raise InputError(where, f"example: {asked.example}; the task has {most} to vote on, from 0 on")

    def _named(self, where: str, digest: str) -> Round:
        one = self.find(digest)
        if one is None:
            raise InputError(where, f"belongs to round {shown(digest)}, which no earlier line begins")
        return one

    def _round_of(self, where: str, row: dict[str, Any]) -> Round:
        name, task, answers = row["round"], row["task"], row.get("answers", [])
        if not all(isinstance(text, str) for text in (name, task, *answers)):
            raise InputError(where, "round, task, answers: expected texts")
        try:
            genomes = np.array(_GENOMES.validate_python(row["genomes"]), float)
        except ValueError:
            genomes = np.zeros(0)
        if genomes.ndim != 2 or not len(genomes):
            raise InputError(where, "genomes: expected rows of finite numbers, all of one length")
        if self.find(name) is not None:
            raise InputError(where, f"begins round {name!r} once more; remove the line")
        if answers and len(answers) != len(genomes):
            raise InputError(where, f"answers: expected one digest for each of the {len(genomes)} genomes")
        if self._sizes is not None and task not in self._sizes:
            raise InputError(where, f"has votes on task {shown(task)}, which the search does not have")
        return Round(name, task, genomes, answers=tuple(answers))
