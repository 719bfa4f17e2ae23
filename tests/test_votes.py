"""Votes files and files of choices: which lines are votes, and that no search loses one."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import run_here
from helpers.families import Family
from helpers.files import write_yaml
from helpers.sampling import sample
from helpers.searches import search_config
from hostile import run_python

from evojax_merge.errors import InputError
from evojax_merge.judge.batch import read_choices
from evojax_merge.judge.votes import Vote, VoteFile

VOTE = {"example": 0, "left": 0, "right": 1, "choice": "left", "answers": ["x", "y"], "judge": "bob", "number": 1}
PAIR = {"name": "p", "example": 0, "left": 0, "right": 1, "answers": ["x", "y"]}
ROUND = {"round": "cd", "task": "taste", "genomes": [[0.5, 1.0], [0.25, 0.0]], "answers": ["x", "y"]}
SIZES = {"taste": (5, 2)}


def written(path: Path) -> VoteFile:
    """A file of a round with one vote."""
    file = VoteFile(path)
    one = file.open("ab", "taste", np.array([[0.5, 1.0], [0.25, 0.0]]))
    file.add(one, Vote(0, 0, 1, "left", ("x", "y"), "ann"))
    return file


def vote(**changes: Any) -> dict[str, Any]:
    return {"vote": VOTE | changes, "round": "ab"}


def pair(**changes: Any) -> dict[str, Any]:
    return {"pair": PAIR | changes, "round": "ab"}


LINES: dict[str, tuple[Any, str]] = {
    "a fraction of an example": (vote(example=0.5), "example: 0.5"),
    "a whole fraction": (vote(example=1.0), "example: 1.0"),
    "a truth value as example": (vote(example=True), "example: True"),
    "a text as example": (vote(example="1"), "example: '1'"),
    "an example below 0": (vote(example=-1), "example: -1"),
    "an example beyond the split": (vote(example=5), "example: 5; the task has 5"),
    "an example far beyond the split": (vote(example=1_000_000_000), "example: 1000000000; the task has 5"),
    "a fraction of a candidate": (vote(left=0.5), "left: 0.5"),
    "a truth value as candidate": (vote(right=True), "right: True"),
    "null as candidate": (vote(left=None), "left: None"),
    "a candidate against itself": (vote(left=1), "is a vote on candidate 1 and itself"),
    "a candidate that is not there": (vote(right=2), "is a vote on candidates 0 and 2 of 2"),
    "a weight of NaN": (vote(weight=float("nan")), "weight: nan"),
    "an endless weight": (vote(weight=float("inf")), "weight: inf"),
    "a weight below 0": (vote(weight=-1.0), "weight: -1.0"),
    "a weight beyond the config's": (vote(weight=1001.0), "weight: 1001.0"),
    "a truth value as weight": (vote(weight=True), "weight: True"),
    "a text as weight": (vote(weight="2"), "weight: '2'"),
    "an unknown choice": (vote(choice="neither"), "choice: 'neither'; expected one of left, right, tie, both_bad"),
    "a list of choices": (vote(choice=["left"]), "choice: ['left']"),
    "a number as judge": (vote(judge=3), "judge: 3"),
    "a number as time": (vote(time=1.5), "time: 1.5"),
    "a number as pair": (vote(pair=1), "pair: 1"),
    "a fraction as number": (vote(number=1.0), "number: 1.0"),
    "a truth value as number": (vote(number=True), "number: True"),
    "a number of later": (vote(number=7), "is vote 7 of its round after 1 others"),
    "an unknown key": (vote(score=1), "score: 1 (Unexpected"),
    "one answer": (vote(answers=["x"]), "answers.1"),
    "answers that are numbers": (vote(answers=[1, 2]), "answers.0: 1"),
    "no choice": ({"vote": {"example": 0}, "round": "ab"}, "is no line of a votes file"),
    "a list as vote": ({"vote": [1], "round": "ab"}, "is no line of a votes file"),
    "a vote of no round": ({"vote": VOTE}, "is no line of a votes file"),
    "a number as round": ({"vote": VOTE, "round": 1}, "belongs to round 1, which no earlier line begins"),
    "a pair against itself": (pair(left=1), "is a vote on candidate 1 and itself"),
    "a pair beyond the split": (pair(example=1_000_000_000), "example: 1000000000"),
    "a pair of a truth value": (pair(right=True), "right: True"),
    "a pair of an unknown candidate": (pair(right=9), "is a vote on candidates 0 and 9 of 2"),
    "a pair without a name": ({"pair": {"example": 0}, "round": "ab"}, "name: "),
    "a number as a pair's name": (pair(name=1), "name: 1"),
    "genomes with NaN": (ROUND | {"genomes": [[float("nan")], [1.0]]}, "expected rows of finite numbers"),
    "genomes with truth values": (ROUND | {"genomes": [[True], [1.0]]}, "expected rows of finite numbers"),
    "genomes of texts": (ROUND | {"genomes": [["1"], ["2"]]}, "expected rows of finite numbers"),
    "genomes of two lengths": (ROUND | {"genomes": [[1.0], [1.0, 2.0]]}, "all of one length"),
    "genomes without a row": (ROUND | {"genomes": []}, "expected rows of finite numbers"),
    "a number as genomes": (ROUND | {"genomes": 1}, "expected rows of finite numbers"),
    "an unknown task": (ROUND | {"task": "smell"}, "has votes on task 'smell', which the search does not have"),
    "a number as task": (ROUND | {"task": 1}, "round, task, answers: expected texts"),
    "a list as round": (ROUND | {"round": []}, "round, task, answers: expected texts"),
    "answers of numbers": (ROUND | {"answers": [1, 2]}, "round, task, answers: expected texts"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_no_search_wrote_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "votes.jsonl"
    written(path)
    line, message = LINES[name]
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        VoteFile(path, SIZES)
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value), caught.value
    assert path.read_bytes() == before


def test_the_heldout_comparison_has_examples_of_its_own_and_a_winner(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    for right, example, message in ((2, 0, None), (2, 2, "the task has 2"), (1, 0, "candidates 2 and 1 of 3")):
        file = VoteFile(path)
        one = file.open("ab", "taste", np.zeros((3, 0)))
        file.add(one, Vote(example, 0 if right == 2 else 2, right, "tie", ("x", "y"), weight=0.0))
        if message is None:
            VoteFile(path, SIZES)
        else:
            with pytest.raises(InputError, match=message):
                VoteFile(path, SIZES)
        path.unlink()


SECOND = json.dumps(vote()).encode()


@pytest.mark.parametrize(
    ("end", "judges", "broken"),
    [
        (SECOND, ["ann", "bob"], None),
        (SECOND + b"\r\n", ["ann", "bob"], None),
        (SECOND + b"\n\n", ["ann", "bob"], None),
        (b"\n \n" + SECOND, ["ann", "bob"], None),
        (SECOND[:-9], ["ann"], SECOND[:-9]),
        (SECOND[:-9] + b"\n", ["ann"], SECOND[:-9]),
        (b"\0" * 20, ["ann"], b"\0" * 20),
        (b"\xff\xfe{}\n", ["ann"], b"\xff\xfe{}"),
        (b"[" * 100_000, ["ann"], b"[" * 100_000),
        (SECOND.replace(b"bob", "b\u2028o\x85b".encode()), ["ann", "b\u2028o\x85b"], None),
    ],
    ids=["no end", "CRLF", "a blank end", "blank lines", "cut", "cut, ended", "zeros", "no UTF-8", "deep", "U+2028"],
)
def test_a_last_line_is_a_vote_or_stands_beside(
    tmp_path: Path, end: bytes, judges: list[str], broken: bytes | None, capsys: Any
) -> None:
    path, aside = tmp_path / "votes.jsonl", tmp_path / "votes.jsonl.broken"
    written(path)
    path.write_bytes(path.read_bytes() + end)
    before = path.read_bytes()
    aside.write_bytes(b"older\n")
    file = VoteFile(path)
    # Reading changes nothing.
    assert path.read_bytes() == before and not capsys.readouterr().err
    assert [vote.judge for vote in file.rounds[0].votes] == judges
    file.add(file.rounds[0], Vote(1, 1, 0, "tie", ("x", "y"), "cid"))
    assert [vote.judge for vote in VoteFile(path).rounds[0].votes] == [*judges, "cid"]
    assert path.read_bytes().endswith(b"\n")
    assert aside.read_bytes() == (b"older\n" if broken is None else b"older\n" + broken + b"\n")
    said = capsys.readouterr().err
    assert ("votes.jsonl.broken" in said) == (broken is not None) and said.count("\n") == (broken is not None)


FULL = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from evojax_merge.errors import Failed
from evojax_merge.judge.votes import Vote, VoteFile

path = Path(sys.argv[1])
file = VoteFile(path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20,) * 2)
try:
    file.add(file.rounds[0], Vote(1, 1, 0, "tie", ("x", "y"), "bob"))
except Failed as error:
    print(error)
"""


def test_a_vote_that_the_disk_has_no_room_for_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    written(path)
    before = path.read_bytes()
    done = run_python(FULL, path)
    assert done.stdout.startswith(f"{path}: could not be written (File too large)"), done
    assert path.read_bytes() == before + json.dumps({"vote": {"example": 1, "left": 1}}).encode()[:20]
    file = VoteFile(path)
    file.add(file.rounds[0], Vote(1, 1, 0, "tie", ("x", "y"), "bob"))
    assert [vote.judge for vote in VoteFile(path).rounds[0].votes] == ["ann", "bob"]
    assert path.read_bytes().startswith(before)


def test_a_line_in_the_middle_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    written(path)
    path.write_bytes(path.read_bytes() + SECOND[:-9] + b"\n" + SECOND + b"\n")
    with pytest.raises(InputError, match=r"votes\.jsonl:3: is no line of a votes file"):
        VoteFile(path)


CHOICES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"x", "is no JSON"),
    "deep JSON": (b"[" * 100_000, "is no JSON"),
    "no UTF-8": (b'{"pair": "\xff"}', "is no JSON"),
    "a list": (b"[1]", "is [1]; expected"),
    "no pair": (b'{"choice": "left"}', "its keys are choice; expected"),
    "a number as pair": (b'{"pair": 1, "choice": "left"}', "its keys are pair, choice; expected"),
    "no choice": (b'{"pair": "a"}', "choice: None; expected one of"),
    "a truth value as choice": (b'{"pair": "a", "choice": true}', "choice: True; expected one of"),
    "a list of choices": (b'{"pair": "a", "choice": ["left"]}', "choice: ['left']; expected one of"),
    "null as judge": (b'{"pair": "a", "choice": "tie", "judge": null}', "judge: None; expected a text"),
    "a number as judge": (b'{"pair": "a", "choice": "tie", "judge": 1}', "judge: 1; expected a text"),
    "a second vote": (b'{"pair": "b", "choice": "tie", "judge": "a\xe2\x80\xa8b"}', "is a second vote of judge"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_a_line_that_is_no_choice_is_named(tmp_path: Path, name: str) -> None:
    line, message = CHOICES[name]
    path = tmp_path / "votes.jsonl"
    first = '\ufeff{"pair": "b", "choice": "left", "judge": "a\u2028b"}\r\n\n'.encode()
    path.write_bytes(first + line)
    with pytest.raises(InputError) as caught:
        read_choices(path)
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)
    path.write_bytes(first)
    assert read_choices(path) == {"b": [("left", "a\u2028b")]}


def test_a_file_of_choices_has_a_size() -> None:
    with pytest.raises(InputError, match=r"/dev/zero: has 67,108,865 bytes; expected a file of votes of at most"):
        read_choices(Path("/dev/zero"))


# ---------------------------------------------------------------------------------------------------------------
# Searches

JUDGE = 'def shorter(record, left, right):\n    return "left" if len(left) < len(right) else "right"\n'


def config(folder: Path, family: Family, **changes: Any) -> Path:
    (folder / "judge.py").write_text(JUDGE)
    task = {"name": "taste", "kind": "human", "file": str(family.tasks), "max_new_tokens": 2, "votes": 8,
            "heldout_votes": 2} | changes  # fmt: skip
    space = {"method": "task_arithmetic", "parameters": {"weight": {"low": -2.0, "high": 3.0}}}
    return write_yaml(folder / "config.yaml", search_config(family, 1, 3, space=space, tasks=[task]))


def votes_in(path: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, path.read_bytes().split(b"\n")[:-1])
    return [{key: value for key, value in row["vote"].items() if key != "time"} for row in rows if "vote" in row]


def test_a_search_goes_on_behind_a_last_line_without_an_end_and_a_broken_one(tmp_path: Path, family: Family) -> None:
    path, run = config(tmp_path, family, judge="judge.py:shorter"), tmp_path / "run"
    run_here("search", path, "--out", run)
    lines = (run / "votes.jsonl").read_bytes().split(b"\n")[:-1]
    last = max(number for number, line in enumerate(lines) if b'"vote"' in line)
    # The lines above are such files as well.
    for name, end in sample([("whole", b""), ("broken", b"\n" + lines[last][:-5])], 1):
        kept = lines[: last + 1] if name == "whole" else lines[:last]
        (tmp_path / "votes.jsonl").write_bytes(b"\n".join(kept) + end)
        done = run_here("judge", path, "--out", tmp_path / name, "--replay", tmp_path / "votes.jsonl")
        votes = tmp_path / name / "votes.jsonl"
        assert votes_in(votes) == votes_in(run / "votes.jsonl")
        assert votes.with_name("votes.jsonl.broken").exists() == (name == "broken") == ("broken now" in done.stderr)
    # A file of other votes, or of none, is no replay.
    for content, message in (("a text\n", "holds no votes"), (lines[0][:9].decode(), "holds no votes")):
        (tmp_path / "other.jsonl").write_text(content)
        done = run_here("judge", path, "--out", tmp_path / "other", "--replay", tmp_path / "other.jsonl", status=2)
        assert message in done.stderr and not (tmp_path / "other").exists()
    document = json.loads(lines[0])
    document["genomes"] = [[*row, 0.5] for row in document["genomes"]]
    (tmp_path / "other.jsonl").write_text(json.dumps(document) + "\n")
    done = run_here("judge", path, "--out", tmp_path / "other", "--replay", tmp_path / "other.jsonl", status=2)
    assert "are on candidates of another space" in done.stderr, done.stderr


def test_a_pipe_of_choices_is_read_once(tmp_path: Path, family: Family) -> None:
    path, run, pairs = config(tmp_path, family), tmp_path / "run", tmp_path / "pairs.jsonl"
    run_here("judge", path, "--out", run, "--export", pairs)
    rows = [json.loads(line) for line in pairs.read_bytes().split(b"\n")[:-1]]
    text = "".join(json.dumps({"pair": row["pair"], "choice": "left"}) + "\n" for row in rows)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(text,), daemon=True)
    writer.start()
    pairs.unlink()
    done = run_here("judge", path, "--out", run, "--resume", "--import", pipe, "--export", pairs)
    assert f"{pipe}: took {len(rows)} votes\n" in done.stdout
    assert len(votes_in(run / "votes.jsonl")) == len(rows) > 0
