"""The schema of a run's files: what a search writes fits, earlier versions' files fit, and nothing else does."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.files import write_json, write_yaml

from evojax_merge.errors import InputError
from evojax_merge.search import run_schema
from evojax_merge.search.run_schema import (
    AnswerLine,
    Environment,
    HistoryLine,
    Stored,
    StoredControl,
    StoredResult,
    TimingLine,
    parse,
    read_lines,
    read_result,
    read_run_config,
    whole_lines,
)

LINE = {
    "generation": 1, "best": 0.5, "mean": 0.25, "worst": 0.0, "best_so_far": 0.5, "sigma": 0.2, "evaluations": 2,
    "failed": 0, "scores_of_best": {"a/x": 0.5}, "fitness": [0.5, None], "examples": [4, 4],
    "task_scores": {"a": [0.5, None]}, "genomes": [[0.1, 0.2], [0.3, 0.4]],
}  # fmt: skip
BRED = {"name": "b", "method": "slerp", "parents": ["one", "two"], "parameters": {"t": 0.5}, "split": 1}
MEMBER = {
    "member": 1, "fitness": 0.5, "scores": {"a": 0.1}, "heldout_fitness": 0.5, "heldout_scores": {"a": 0.1},
    "genome": [1],
}  # fmt: skip
RESULT = {
    "generations": 3, "table": [{"role": "winner", "name": "w", "heldout_fitness": float("nan")}],
    "lineage": [BRED, BRED | {"name": "c", "parents": ["b", "one"]}], "members": [MEMBER], "genome": [1, 0.5],
    "path": {"layers": [0, 1], "scales": [1.0, 0.5]}, "groups": ["g"], "parameters": {"weight": [[1.0, 2.0]]},
    "verdicts": ["It is better."], "better_than": {"base": {"name": "b", "interval": [0.0, 1.0]}},
}  # fmt: skip
TIMING = {"generation": 1, "seconds": 0.5}
SESSION = {"command": "search", "seconds": None, "versions": {"jax": "1", "evosax": None}, "cores": 2}
ANSWER = {"model": "m", "task": "t", "example": 3, "score": 0.5, "outputs": ["x"], "target": None}
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "document"),
    [
        (HistoryLine, LINE), (HistoryLine, {"generation": 1, "fitness": [1], "genomes": [[1]]}),
        (HistoryLine, LINE | {"validation": {"best_so_far": 0.5, "standard_error": None, "finalists": [None, 1.0]}}),
        (StoredResult, RESULT), (StoredResult, {}), (StoredResult, {"parameters": {"g": {"weight": [1.0]}}}),
        (TimingLine, TIMING | {"validation_seconds": 1}), (Environment, {"sessions": [SESSION]}), (Environment, {}),
        (AnswerLine, ANSWER), (AnswerLine, {"model": "m", "task": "t", "prompt": "x" * 2**19}),
        (Environment, {"sessions": [SESSION | {"command": "x" * 2**19}]}), (StoredControl, {"settings": {"seed": 1}}),
    ],
)  # fmt: skip
def test_what_a_search_writes_fits(kind: type[Stored], document: dict[str, Any]) -> None:
    assert json.dumps(parse(kind, json.dumps(document).encode())[1]) == json.dumps(document)


@pytest.mark.parametrize(
    ("kind", "document", "changes", "message"),
    [
        (HistoryLine, LINE, {"generation": True}, "generation: "),
        (HistoryLine, LINE, {"generation": -1}, "generation: "),
        (HistoryLine, LINE, {"fitness": [NAN, 1.0]}, "fitness.0: "),
        (HistoryLine, LINE, {"fitness": ["0.5", 1.0]}, "fitness.0: "),
        (HistoryLine, LINE, {"fitness": [0.5]}, "document: lists of 1 candidates and of 2"),
        (HistoryLine, LINE, {"examples": [4]}, "document: lists of 2 candidates and of 1"),
        (HistoryLine, LINE, {"task_scores": {"a": []}}, "document: lists of 2 candidates and of 0"),
        (HistoryLine, LINE, {"genomes": [[1.0], [1.0, 2.0]]}, "document: genomes of several lengths"),
        (HistoryLine, LINE, {"genomes": [[1e39, 0], [0, 0]]}, "genomes.0.0: "),
        (HistoryLine, LINE, {"best": 10**400}, "best: "),
        (HistoryLine, LINE, {"validation": [1]}, "validation: "),
        (HistoryLine, LINE, {"sigma": [[[1]]]}, "sigma."),
        (StoredResult, RESULT, {"generations": 1e3}, "generations: "),
        (StoredResult, RESULT, {"lineage": [BRED | {"parents": ["b", "one"]}]}, "document: lineage: b is bred"),
        (StoredResult, RESULT, {"lineage": [BRED | {"parents": ["c", "one"]}, BRED | {"name": "c"}]},
         "document: lineage: b is bred of a later member"),
        (StoredResult, RESULT, {"lineage": [BRED, BRED]}, "document: lineage: "),
        (StoredResult, RESULT, {"lineage": [BRED | {"split": 10**9}]}, "lineage.0.split: "),
        (StoredResult, RESULT, {"path": {"layers": [0], "scales": [0.0]}}, "path: scales: "),
        (StoredResult, RESULT, {"path": {"layers": [0], "scales": [1e-200, 1e-200]}}, "path: scales: "),
        (StoredResult, RESULT, {"path": {"layers": [0], "scales": [INFINITY]}}, "path.scales.0: "),
        (StoredResult, RESULT, {"parameters": {"weight": [[1.0], [1.0]]}}, "document: parameters.weight: "),
        (StoredResult, RESULT, {"members": [MEMBER, MEMBER | {"scores": {}}]}, "document: members: "),
        (StoredResult, RESULT, {"table": [{"role": "winner", "name": "w", "heldout_fitness": 1e301}]}, "table.0."),
        (StoredResult, RESULT, {"chosen_on": "train"}, "chosen_on: "),
        (TimingLine, TIMING, {"seconds": -1.0}, "seconds: "), (TimingLine, TIMING, {"seconds": NAN}, "seconds: "),
        (Environment, {}, {"sessions": {}}, "sessions: "), (Environment, {}, {"a": {"b": {"c": 1}}}, "a."),
        (Environment, {}, {"sessions": [SESSION | {"seconds": INFINITY}]}, "sessions.0.seconds"),
        (Environment, {}, {"sessions": [SESSION | {"cores": 10**400}]}, "sessions.0.cores"),
        (HistoryLine, LINE, {"sigma": -(10**400)}, "sigma."), (HistoryLine, LINE, {"sigma": NAN}, "sigma."),
        (AnswerLine, ANSWER, {"outputs": "x"}, "outputs: "), (AnswerLine, ANSWER, {"score": "x"}, "score: "),
        (AnswerLine, ANSWER, {"score": 1e308}, "score: "), (AnswerLine, ANSWER, {"score": INFINITY}, "score: "),
        (StoredControl, {"settings": {}}, {"step": "2"}, "step: "),
        (StoredControl, {"settings": {}}, {"rate": NAN}, "rate: "),
    ],
)  # fmt: skip
def test_what_no_search_writes_is_named(
    kind: type[Stored], document: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse(kind, json.dumps(document | changes).encode())


@pytest.mark.parametrize("text", [b"", b"[", b"\xff", b"[" * 100_000, b'{"generation": ' + b"1" * 5000 + b"}"])
def test_what_is_no_json_is_said_so(text: bytes) -> None:
    with pytest.raises(ValueError, match="is not JSON"):
        parse(HistoryLine, text)


def test_lines_end_before_the_first_that_cannot_be_read(tmp_path: Path) -> None:
    old = {"generation": 1, "fitness": [1.0], "genomes": [[1.0, 2.0]]}
    after = {"other dimensions": {"genomes": [[1.0]]}, "a text": {"best": "x"}}
    for name, changes in after.items():
        lines = [json.dumps(old), json.dumps(old | {"generation": 2}), json.dumps(old | changes), json.dumps(old)]
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        rows = read_lines(tmp_path / name, HistoryLine)
        assert [row["generation"] for row in rows] == [1, 2]
        # A line of an earlier version is completed, behind what it has.
        assert list(rows[0])[:3] == list(old) and rows[0]["examples"] == [0] and rows[0]["best_so_far"] is None
    assert read_lines(tmp_path / "missing", HistoryLine) == []


def test_files_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "history.jsonl"
    file.write_bytes(b"1\n22\n333\nhalf")
    assert list(whole_lines(file)) == [b"1", b"22", b"333"]
    for name, limit, message in (("MAX_FILE", 5, "13 bytes"), ("MAX_GENERATIONS", 2, "more than 2 lines")):
        with monkeypatch.context() as changed:
            changed.setattr(run_schema, name, limit)
            with pytest.raises(InputError, match=message):
                list(whole_lines(file))
    write_json(tmp_path / "result.json", RESULT)
    assert read_result(tmp_path / "result.json") is not None
    monkeypatch.setattr(run_schema, "MAX_DOCUMENT", 9)
    with pytest.raises(InputError, match="expected a file of a run of at most 9"):
        read_result(tmp_path / "result.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", [1]), ("search", []), ("search", {"generations": "x"}), ("stages", []), ("stages", [{}]),
        ("parents", 3), ("plugins", "x"), ("backend", 1), ("tasks", {"a": 1}), ("inputs", {"a": 1}), ("pool", []),
    ],
)  # fmt: skip
def test_a_config_of_another_form_names_the_key(tmp_path: Path, key: str, value: Any) -> None:
    file, notes = tmp_path / "config.yaml", []
    write_yaml(file, {"inputs": {}, "note": 1} | {key: value})
    with pytest.raises(InputError, match=rf"config.yaml: {key}"):
        read_run_config(file)
    document = read_run_config(file, notes)
    assert key not in document and document["note"] == 1 and notes[0].startswith(f"config.yaml cannot be read: {key}")
