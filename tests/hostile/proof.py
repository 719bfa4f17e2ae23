"""The proof of a run, changed: its record of the environment, the hashes of its inputs, its history."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import Case, changing
from hostile.runs import RESUME, a_run, edit_config, inputs

AGAIN = ("search", "run/config.yaml", "--out", "again")
EVALUATE = ("evaluate", "base", "--tasks", "run/config.yaml")
REPRODUCE = ("reproduce", "run")
PUBLISH = ("publish", "run", "--repo", "me/mine")


def record(content: Any) -> Callable[[Path], Any]:
    text = content if isinstance(content, str) else json.dumps({"sessions": content})
    return lambda run: (run / "environment.json").write_text(text)


@changing
def replace_record(run: Path, make: Callable[[Path], Any]) -> None:
    (run / "environment.json").unlink()
    make(run / "environment.json")


def longer(world: Any) -> None:
    with (world / "tasks.jsonl").open("a") as data:
        data.write("\n")


def without_its_recipe(run: Path) -> None:
    (run / "best/recipe.yaml").write_bytes(bytes(range(256)))


CASES: list[Case] = [
    # The hashes of the inputs
    Case("data with another line, searched again", inputs(longer), ("tasks.jsonl has changed", "inputs=null"), AGAIN),
    Case("data with another line, scored again", inputs(longer), ("tasks.jsonl has changed", "inputs"), EVALUATE),
    Case(
        "data with another line, reproduced", inputs(longer), ("tasks.jsonl has changed", "restore it"), REPRODUCE
    ),
    Case(
        "a file of a parent that went", inputs(lambda world: (world / "one/generation_config.json").unlink()),
        ("one/generation_config.json is missing", "inputs=null"), AGAIN,
    ),
    Case(
        "inputs that are a number", edit_config(lambda config: config.update(inputs=5)),
        ("config.yaml: inputs: expected a mapping",), AGAIN,
    ),
    Case(
        "inputs whose hash is a list", edit_config(lambda config: config.update(inputs={"tasks.jsonl": [1]})),
        ("config.yaml: inputs",), AGAIN,
    ),
    Case(
        "inputs that are no files", edit_config(lambda config: config.update(inputs={"no\nfile\x1b[31m": "0"})),
        ("inputs: no\\nfile\\x1b[31m is missing",), AGAIN,
    ),
    # The record of the environment
    Case(
        "a folder in the place of the record", a_run(replace_record(Path.mkdir)), ("environment.json",),
        (*RESUME, "--set", "search.generations=4"),
    ),
    Case(
        "a pipe in the place of the record", a_run(replace_record(os.mkfifo)), ("environment.json",),
        (*RESUME, "--set", "search.generations=4"),
    ),
    Case(
        "a link in the place of the record, to start again",
        a_run(replace_record(lambda file: file.symlink_to("../tasks.jsonl"))), ("environment.json: is a link",),
        ("search", "config.yaml", "--out", "run", "--overwrite"),
    ),
    # A history that cannot be compared
    Case(
        "a history that is garbage", a_run(lambda run: (run / "history.jsonl").write_bytes(bytes(range(256)))),
        ("generation 1 of", "is the first that differs: its line is damaged", "likely cause"), REPRODUCE, status=1,
        leaves=("run-reproduced",), seconds=60,
    ),
    Case(
        "a record that would command a terminal",
        a_run(lambda run: [record([{"versions": {"jax": "\x1b[31m"}, "system": {}}])(run),
                           (run / "history.jsonl").write_text('{"genomes": 1}\n')]),
        ("versions.jax: \\x1b[31m then",), REPRODUCE, status=1, leaves=("run-reproduced",), seconds=60,
    ),
    # Runs that prove nothing
    Case("a damaged recipe, reproduced", a_run(without_its_recipe), ("best/recipe.yaml",), REPRODUCE),
    Case("a damaged recipe, published", a_run(without_its_recipe), ("best/recipe.yaml",), PUBLISH),
    Case(
        "stages that are a number", edit_config(lambda config: config.update(stages=5)), ("config.yaml", "stages"),
        REPRODUCE,
    ),
    Case(
        "a result that is garbage", a_run(lambda run: (run / "result.json").write_bytes(b"\xff\x00")),
        ("run: has no winner to compare with",), REPRODUCE,
    ),
    Case(
        "reproduced onto itself", a_run(lambda run: None), ("run: exists already",), (*REPRODUCE, "--out", "run")
    ),
    Case("no repository's name", a_run(lambda run: None), ("--repo: ../x",), ("publish", "run", "--repo", "../x")),
]  # fmt: skip
