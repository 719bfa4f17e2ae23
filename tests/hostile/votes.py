"""Votes files and files of choices that no search and no page wrote, or that were damaged: refused with file and line,
before models are loaded."""

import json
import os
import threading
from collections.abc import Callable
from typing import Any

from hostile import Case, World, changing, config

Change = Callable[[World], Any]
JUDGING = ("judge", "config.yaml", "--out", "run")
REPLAY = (*JUDGING, "--replay", "votes.jsonl")
IMPORT = (*JUDGING, "--import", "choices.jsonl")
NAME = "0123456789abcdef"
ROUND = {"round": NAME, "task": "taste", "genomes": [[0.5], [0.25], [1.0]], "answers": ["a", "b", "c"]}
HELDOUT = {"round": "fedcba9876543210", "task": "taste", "genomes": [[], [], []], "answers": []}
VOTE = {"example": 0, "left": 0, "right": 1, "choice": "left", "answers": ["x", "y"], "judge": "ann", "weight": 1.0,
        "time": "2026-01-01T00:00:00+00:00", "number": 0, "pair": ""}  # fmt: skip
PAIR = {"name": "p0", "example": 0, "left": 0, "right": 1, "answers": ["x", "y"]}
CHOICE = {"pair": "p0", "choice": "left", "judge": "ann"}


def judged(world: World, **changes: Any) -> None:
    task = {"name": "taste", "kind": "human", "file": "tasks.jsonl", "max_new_tokens": 2, "heldout_votes": 2} | changes
    world.write("config.yaml", config(tasks=[task]))


def line(document: Any) -> bytes:
    return (document if isinstance(document, bytes) else json.dumps(document).encode()) + b"\n"


@changing
def votes(world: World, /, *documents: Any, **changes: Any) -> None:
    """A votes file of a round, with these lines behind it."""
    judged(world, **changes)
    world.write("votes.jsonl", b"".join(map(line, (ROUND, HELDOUT, *documents))))


def vote(**changes: Any) -> dict[str, Any]:
    return {"vote": VOTE | changes, "round": NAME}


def pair(**changes: Any) -> dict[str, Any]:
    return {"pair": PAIR | changes, "round": NAME}


def heldout(**changes: Any) -> dict[str, Any]:
    return {"vote": VOTE | changes, "round": HELDOUT["round"]}


def other_round(**changes: Any) -> dict[str, Any]:
    return ROUND | {"round": "ffff"} | changes


def replaying(name: str, document: Any, *says: str, more: tuple[Any, ...] = ()) -> Case:
    return Case(f"replay: {name}", votes(document, *more), ("votes.jsonl:3: ", *says), REPLAY)


@changing
def content(world: World, text: bytes) -> None:
    judged(world)
    world.write("votes.jsonl", text)


@changing
def choices(world: World, *documents: Any) -> None:
    judged(world)
    world.write("choices.jsonl", b"".join(map(line, documents)))


def importing(name: str, document: Any, *says: str) -> Case:
    return Case(f"import: {name}", choices(document), ("choices.jsonl:1: ", *says), IMPORT)


@changing
def piped(world: World, text: bytes) -> None:
    """A pipe in the place of a file of choices."""
    judged(world)
    os.mkfifo(world / "choices.jsonl")
    threading.Thread(target=(world / "choices.jsonl").write_bytes, args=(text,), daemon=True).start()


@changing
def as_link(world: World, target: str, name: str) -> None:
    judged(world)
    (world / name).symlink_to(target)


@changing
def as_folder(world: World, name: str) -> None:
    judged(world)
    (world / name).mkdir()


def kept_votes(world: World) -> None:
    """A folder with votes, and no run."""
    judged(world)
    world.write("run/votes.jsonl", line(ROUND))


CASES = [
    replaying("an example of a fraction", vote(example=0.5), "example: 0.5"),
    replaying("an example of 1.0", vote(example=1.0), "example: 1.0"),
    replaying("an example that is true", vote(example=True), "example: True"),
    replaying("an example that is a text", vote(example="0"), "example: '0'"),
    replaying("an example below 0", vote(example=-1), "example: -1"),
    replaying("an example of a milliard", vote(example=1_000_000_000), "example: 1000000000; the task has"),
    replaying("an example of a hundred digits", vote(example=10**100), "example: ", "the task has"),
    replaying("no example", {"vote": {k: v for k, v in VOTE.items() if k != "example"}, "round": NAME}, "example: "),
    replaying("left: a fraction", vote(left=0.5), "left: 0.5"),
    replaying("left: null", vote(left=None), "left: None"),
    replaying("left: a list", vote(left=[0]), "left: [0]"),
    replaying("right: false", vote(right=False), "right: False"),
    replaying("right: -1", vote(right=-1), "right: -1"),
    replaying("right: 3 of 3", vote(right=3), "is a vote on candidates 0 and 3 of 3"),
    replaying("a candidate against itself", vote(right=0), "is a vote on candidate 0 and itself"),
    replaying("a weight of NaN", vote(weight=float("nan")), "weight: nan"),
    replaying("a weight of Infinity", vote(weight=float("inf")), "weight: inf"),
    replaying("a weight of 1e999", json.dumps(vote()).replace("1.0", "1e999").encode(), "weight: inf"),
    replaying("a weight below 0", vote(weight=-0.5), "weight: -0.5"),
    replaying("a weight of a million", vote(weight=1e6), "weight: 1000000.0"),
    replaying("a weight that is true", vote(weight=True), "weight: True"),
    replaying("a weight that is a text", vote(weight="1"), "weight: '1'"),
    replaying("a choice of a number", vote(choice=1), "choice: 1; expected one of left, right, tie, both_bad"),
    replaying("a choice in capitals", vote(choice="LEFT"), "choice: 'LEFT'; expected one of"),
    replaying("a choice that is null", vote(choice=None), "choice: None; expected one of"),
    replaying("a judge that is a list", vote(judge=["ann"]), "judge: ['ann']"),
    replaying("a time that is a number", vote(time=1767225600), "time: 1767225600"),
    replaying("a number that is a fraction", vote(number=0.5), "number: 0.5"),
    replaying("a number that is true", vote(number=False), "number: False"),
    replaying("a number after a gap", vote(number=5), "is vote 5 of its round after 0 others"),
    replaying("answers of one", vote(answers=["x"]), "answers.1"),
    replaying("answers of three", vote(answers=["x", "y", "z"]), "answers"),
    replaying("answers that are null", vote(answers=None), "answers: None"),
    replaying("a key that votes have not", vote(votes=100), "votes: 100"),
    replaying("a vote that is a list", {"vote": [0, 1], "round": NAME}, "is no line of a votes file"),
    replaying("a vote of an unknown round", {"vote": VOTE, "round": "zz"}, "belongs to round 'zz'"),
    replaying("a vote of a round in a list", {"vote": VOTE, "round": [NAME]}, "belongs to round"),
    replaying("a held-out vote beyond its prompts", heldout(example=2), "example: 2; the task has 2"),
    replaying("a held-out vote without the winner", heldout(left=1, right=2), "candidates 1 and 2 of 3"),
    replaying("a pair of a fraction", pair(example=0.5), "example: 0.5"),
    replaying("a pair against itself", pair(left=1), "is a vote on candidate 1 and itself"),
    replaying("a pair of a milliard", pair(example=1_000_000_000), "example: 1000000000; the task has"),
    replaying("a pair without a name", {"pair": {}, "round": NAME}, "name: "),
    replaying("a pair that is null", {"pair": None, "round": NAME}, "is no line of a votes file"),
    replaying("the end of an unknown round", {"closed": "zz"}, "belongs to round 'zz'"),
    replaying("the end of a number", {"closed": 1.5}, "belongs to round 1.5"),
    replaying("genomes with NaN", other_round(genomes=[[float("nan")]]), "expected rows of finite numbers"),
    replaying("genomes with -Infinity", other_round(genomes=[[-float("inf")]]), "expected rows of finite numbers"),
    replaying("genomes with null", other_round(genomes=[[None]]), "expected rows of finite numbers"),
    replaying("genomes of true", other_round(genomes=[[True]]), "expected rows of finite numbers"),
    replaying("genomes of two lengths", other_round(genomes=[[1.0], [1.0, 2.0]]), "all of one length"),
    replaying("genomes that are deep", other_round(genomes=[[[1.0]]]), "expected rows of finite numbers"),
    replaying("genomes of nothing", other_round(genomes=[]), "expected rows of finite numbers"),
    replaying("fewer answers than genomes", other_round(answers=["a"]), "expected one digest for each of the 3"),
    replaying("a round once more", ROUND, f"begins round '{NAME}' once more"),
    replaying("a round of another task", other_round(task="smell"), "has votes on task 'smell', which the search"),
    replaying("a round without genomes", {"round": "ffff", "task": "taste"}, "is no line of a votes file"),
    replaying("a line that is a number", 7, "is no line of a votes file"),
    replaying("a line that is null", b"null", "is no line of a votes file"),
    replaying("a line that is no JSON", b"vote", "is no line of a votes file", more=(vote(),)),
    replaying("a line that is cut", b'{"vote": {"exam', "is no line of a votes file", more=(vote(),)),
    replaying("a line that is no UTF-8", b'{"vote": "\xff"}', "is no line of a votes file", more=(vote(),)),
    replaying("a line that is deep", b"[" * 100_000, "is no line of a votes file", more=(vote(),)),
    replaying("a line of zeros", b"\0" * 100, "is no line of a votes file", more=(vote(),)),
    Case("replay: the same vote twice", votes(vote(), vote()), ("votes.jsonl:4: is the same vote once more",), REPLAY),
    Case("replay: an empty file", content(b""), ("--replay: votes.jsonl: holds no votes",), REPLAY),
    Case("replay: a text", content(b"Dear judges,\n"), ("--replay: votes.jsonl: holds no votes",), REPLAY),
    Case("replay: a line that was cut, alone", content(line(ROUND)[:20]), ("votes.jsonl: holds no votes",), REPLAY),
    Case("replay: a folder", as_folder("votes.jsonl"), ("--replay: votes.jsonl: no such file",), REPLAY),
    Case("replay: a device", as_link("/dev/zero", "votes.jsonl"), ("--replay: votes.jsonl: no such file",), REPLAY),
    Case("votes where no run is", kept_votes, ("run: is not empty and not a run folder",), JUDGING),
    importing("a text", b"left", "is no JSON"),
    importing("deep JSON", b"[" * 100_000, "is no JSON"),
    importing("no UTF-8", b'{"pair": "\xff"}', "is no JSON"),
    importing("a number", 7, "is 7; expected"),
    importing("a vote of a votes file", vote(), "its keys are vote, round; expected"),
    importing("a pair that is a number", CHOICE | {"pair": 1}, "its keys are pair, choice, judge; expected"),
    importing("a choice that is true", CHOICE | {"choice": True}, "choice: True; expected one of"),
    importing("a choice that is a fraction", CHOICE | {"choice": 0.5}, "choice: 0.5; expected one of"),
    importing("a judge that is null", CHOICE | {"judge": None}, "judge: None; expected a text"),
    importing("a judge that is true", CHOICE | {"judge": True}, "judge: True; expected a text"),
    Case("import: a judge who votes twice", choices(CHOICE, CHOICE), ("choices.jsonl:2: is a second vote",), IMPORT),
    Case("import: a pair of another run", choices(CHOICE), ("choices.jsonl: has a vote on pair 'p0'",), IMPORT),
    Case("import: no such file", lambda world: judged(world), ("--import: choices.jsonl: cannot be read",), IMPORT),
    Case("import: a folder", as_folder("choices.jsonl"), ("--import: choices.jsonl: cannot be read (Is a",), IMPORT),
    Case("import: an endless device", as_link("/dev/zero", "choices.jsonl"), ("of at most 67,108,864",), IMPORT),
    Case("import: a pipe of no JSON", piped(b"x\n"), ("choices.jsonl:1: is no JSON",), IMPORT),
    Case("import: a pipe of another run", piped(line(CHOICE)), ("choices.jsonl: has a vote on pair 'p0'",), IMPORT),
]  # fmt: skip
