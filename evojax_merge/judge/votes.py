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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import numpy as np

from evojax_merge.errors import Failed, InputError, print_warning
from evojax_merge.tasks.voting import Choice

CHOICES = get_args(Choice)
DIGEST = 16


def digest(*texts: str) -> str:
    """The digest of texts that names answers and rounds."""
    return sha256(json.dumps(texts).encode()).hexdigest()[:DIGEST]


@dataclass(frozen=True)
class Vote:
    """A choice. example: the prompt's number in the task's split; left, right: numbers of candidates in their round;
    answers: the digests of the two answers; judge, weight: who chose, and how much that counts; time: UTC, ISO 8601,
    which nothing depends on; number: the vote's in its round, from 0; None: the file was written without numbers; pair:
    the name of the `FilePair` that it is on, "" for none."""

    example: int
    left: int
    right: int
    choice: Choice
    answers: tuple[str, str]
    judge: str = ""
    weight: float = 1.0
    time: str = ""
    number: int | None = None
    pair: str = ""


@dataclass(frozen=True)
class FilePair:
    """A question in a file for votes, of the candidates left and right. name: what votes refer to it by; the others as
    in `Vote`."""

    name: str
    example: int
    left: int
    right: int
    answers: tuple[str, str]


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
    """The rounds of a file, which grows as votes are added. Raises InputError for lines that no search wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rounds: list[Round] = []
        # By their names, with their rounds.
        self.pairs: dict[str, tuple[Round, FilePair]] = {}
        text = path.read_bytes() if path.exists() else b""
        # A process that was killed while it wrote leaves a line without its end: that vote was never confirmed.
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            print_warning(f"{path}: its last line was cut off, and is removed; a vote in it is asked for again")
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), start=1):
            self._read(f"{path}:{number}", line)

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
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Failed(f"{self.path}: cannot be written ({error.strerror}); the votes before are kept") from None

    def _read(self, where: str, line: str) -> None:
        try:
            row = json.loads(line)
            if "vote" in row:
                self._add_read(where, row)
            elif "pair" in row:
                one, fields = self._named(where, row["round"]), row["pair"]
                self.pairs[fields["name"]] = one, FilePair(**(fields | {"answers": tuple(fields["answers"])}))
            elif "closed" in row:
                self._named(where, row["closed"]).closed = True
            else:
                self.rounds.append(_round_of(where, row, self.rounds))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            what = f"is no line of a votes file ({type(error).__name__}: {error})"
            raise InputError(where, f"{what}; expected the file as the search wrote it, or a copy of that") from None

    def _add_read(self, where: str, row: dict[str, Any]) -> None:
        one, fields = self._named(where, row["round"]), dict(row["vote"])
        vote = Vote(**(fields | {"answers": tuple(fields["answers"])}))
        if vote.choice not in CHOICES:
            raise InputError(where, f"choice: {vote.choice!r}; expected one of {', '.join(CHOICES)}")
        if not (0 <= vote.left < len(one.genomes) and 0 <= vote.right < len(one.genomes)):
            raise InputError(where, f"is a vote on candidates {vote.left} and {vote.right} of {len(one.genomes)}")
        if vote in one.votes:
            raise InputError(where, "is the same vote once more; remove the line")
        if vote.number not in (None, len(one.votes)):
            what = f"is vote {vote.number} of its round after {len(one.votes)} others; lines are missing or doubled"
            raise InputError(where, f"{what}; expected the file as the search wrote it")
        one.votes.append(vote)

    def _named(self, where: str, digest: str) -> Round:
        one = self.find(digest)
        if one is None:
            raise InputError(where, f"belongs to round {digest!r}, which no earlier line begins")
        return one


def _round_of(where: str, row: dict[str, Any], earlier: Sequence[Round]) -> Round:
    genomes = np.array(row["genomes"], float)
    if genomes.ndim != 2 or not len(genomes) or not np.isfinite(genomes).all():
        raise InputError(where, "genomes: expected rows of finite numbers, all of one length")
    if any(each.digest == row["round"] for each in earlier):
        raise InputError(where, f"begins round {row['round']!r} once more; remove the line")
    answers = tuple(map(str, row.get("answers", [])))
    if answers and len(answers) != len(genomes):
        raise InputError(where, f"answers: expected one digest for each of the {len(genomes)} genomes")
    return Round(str(row["round"]), str(row["task"]), genomes, answers=answers)
