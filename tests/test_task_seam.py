"""The seam for kinds of tasks: one that others wrote is searched on and evaluated like those of the package."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from copy_task import KIND, CopyConfig, CopyTask
from helpers.families import Family
from helpers.files import read_json, read_lines, write_yaml
from helpers.searches import search_config, task_section

from evojax_merge.commands import evaluate as evaluate_command
from evojax_merge.commands import search as search_command
from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import TaskFile
from evojax_merge.errors import InputError
from evojax_merge.schema.section import Section
from evojax_merge.tasks import kinds
from evojax_merge.tasks.kinds import register_task
from evojax_merge.tasks.opening import open_task, open_whole_task
from evojax_merge.tasks.task import TaskConfig, TaskKind

COPY: dict[str, Any] = {"name": "again", "kind": "copy", "count": 10}


@pytest.fixture(autouse=True)
def copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind `copy` is known in this test alone."""
    monkeypatch.setattr(kinds, "_registered", [])
    register_task(KIND)


def parsed(task: Any) -> TaskConfig:
    config: TaskConfig = parse(Path("tasks.yaml"), {"tasks": [task]}, TaskFile).tasks[0]
    return config


@pytest.fixture
def config_file(family: Family, tmp_path: Path) -> Path:
    space = {"method": "task_arithmetic", "layers_per_group": "all", "parameters": {"weight": {}}}
    document = search_config(family, space=space, tasks=[COPY, task_section(family.tasks, limit=4)], seed=5)
    return write_yaml(tmp_path / "copy.yaml", document)


def test_a_search_on_a_kind_from_outside(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    search_command.search(config_file, run, False, False, None, [])
    assert len((run / "history.jsonl").read_text().splitlines()) == 2
    table = read_json(run / "result.json")["table"]
    assert all(0 < row["heldout_scores"]["again/copied"] < 1 for row in table)
    kept = yaml.safe_load((run / "config.yaml").read_text())["tasks"][0]
    assert kept == {"name": "again", "kind": "copy", "count": 10, "length": 3, "heldout": 0.2, "limit": None,
                    "weight": 1.0}  # fmt: skip
    # What was kept can be opened again.
    search_command.search(config_file, run, True, False, None, ["search.generations=3"])
    assert len((run / "history.jsonl").read_text().splitlines()) == 3


def test_an_evaluation_on_a_kind_from_outside(config_file: Path, family: Family, tmp_path: Path) -> None:
    scores, samples = tmp_path / "scores.json", tmp_path / "samples.jsonl"
    models = [str(family.base), str(family.parents[0])]
    evaluate_command.evaluate(models, config_file, scores, samples)
    table = read_json(scores)
    lines = read_lines(samples)
    assert [(line["model"], line["task"]) for line in lines] == [
        (model, task) for model in models for task, count in (("again", 10), ("text", 12)) for _ in range(count)
    ]
    for row in table:
        own = [line for line in lines if line["model"] == row["model"] and line["task"] == "again"]
        assert [line["example"] for line in own] == [f"copy {n}" for n in range(10)]
        assert np.mean([line["score"] for line in own]) == pytest.approx(row["scores"]["again/copied"])
        assert {line["target"] for line in own} == {None}
        for line in own:
            assert line["score"] == line["scores"]["copied"] == pytest.approx(np.exp(line["log_probabilities"][0]))
    records = read_lines(family.tasks)
    texts = [line for line in lines if line["task"] == "text"]
    assert [line["target"] for line in texts] == 2 * [record["target"] for record in records]
    assert {line["extracted"] for line in lines} == {None}
    # Samples take the place of earlier ones.
    evaluate_command.evaluate(models[:1], config_file, None, samples)
    assert len(samples.read_text().splitlines()) == 22


def test_examples_are_drawn_by_the_searchs_seed() -> None:
    config = parsed(COPY)
    whole = open_whole_task("tasks[0]", config, Path(), seed=3)
    search, heldout = open_task("tasks[0]", config, Path(), seed=3)
    assert isinstance(whole, CopyTask) and isinstance(search, CopyTask) and isinstance(heldout, CopyTask)
    assert (search.size, heldout.size) == (8, 2)
    assert sorted(search.prompts + heldout.prompts) == sorted(whole.prompts)
    assert whole != open_whole_task("tasks[0]", config, Path(), seed=4)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            COPY | {"kind": "cpoy"},
            r"tasks\[0\].kind: there is no kind of task 'cpoy' \(did you mean 'copy'\?\); a plugin can add it .*",
        ),
        (COPY | {"kind": 3}, r"tasks\[0\].kind: expected one of .*arrays, copy, found 3"),
        ({"name": "again"}, r"tasks\[0\].kind: missing"),
        ([], r"tasks\[0\]: expected a mapping .*, found an empty list"),
        (COPY | {"cuont": 3}, r"tasks\[0\].cuont: unknown key \(did you mean 'count'\?\)"),
        (COPY | {"count": "many"}, r"tasks\[0\].count: expected a whole number, found 'many'"),
        (COPY | {"name": ""}, r"tasks\[0\].name: expected a text of 1 to 200 characters, in one line, found ''"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(task: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^tasks.yaml: {message}$"):
        parsed(task)


def test_a_kind_without_a_second_source_takes_a_share(tmp_path: Path) -> None:
    config = parsed(COPY | {"heldout": "more.jsonl"})
    with pytest.raises(InputError, match=r"tasks\[0\]\.heldout: more\.jsonl; .* expected a share"):
        open_task("tasks[0]", config, tmp_path, seed=0)


class Nameless(TaskConfig):
    count: int = 3


class Taken(TaskConfig):
    kind: Literal["gsm"]


class Sourceless(TaskConfig):
    kind: Literal["drawn"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (replace(KIND, config=Nameless), "Nameless: a kind of task needs a name"),
        (replace(KIND, config=Taken), "'gsm' is a built-in kind"),
        (replace(KIND, key="lm_eval"), "'lm_eval' is a built-in kind"),
        (replace(KIND, config=Sourceless, source="file"), "Sourceless: source: the section has no key 'file'"),
    ],
)
def test_kinds_that_cannot_be_registered(kind: TaskKind, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_task(kind)
    assert [name for kind in kinds.kinds() for name in kind.names][-2:] == ["arrays", "copy"]


def test_a_kind_that_is_registered_again_takes_its_own_place() -> None:
    class Longer(CopyConfig):
        length: int = 7

    register_task(replace(KIND, config=Longer))
    assert type(parsed(COPY)) is Longer and issubclass(Longer, Section)
    assert [name for kind in kinds.kinds() for name in kind.names].count("copy") == 1
