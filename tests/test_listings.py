"""The tables of what the program knows, and of what it found."""

import pytest
from helpers.commands import command, run_here
from merge_kernels import METHODS
from rich.progress import Progress

from evojax_merge.config.documents import keys_of
from evojax_merge.config.search_config import Config
from evojax_merge.models.architecture import model_types
from evojax_merge.report.comparison import Row
from evojax_merge.report.progress import GenerationsColumn
from evojax_merge.report.tables import markdown_table
from evojax_merge.search.strategies.registry import strategy_names


def listed(what: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert command(*what.split()) == 0
    return capsys.readouterr().out


def test_every_method_is_listed_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    text = listed("methods", capsys)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows if row[0]] == list(METHODS)
    name = ""
    found: dict[str, str] = {}
    for row in rows:
        name = row[0] or name
        found[name] = " ".join([found.get(name, ""), *row[1:]])
    for method in METHODS.values():
        for parameter in method.parameters:
            assert f"{parameter.name} " in found[method.name]
        for option in method.yaml_options:
            assert option in found[method.name]


def test_the_strategies_that_searches_use_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = listed("strategies", capsys)
    assert {"cma_es", "sep_cma_es"} <= set(strategy_names())
    for name in strategy_names():
        assert f"│ {name} " in text


def test_every_architecture_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = listed("architectures", capsys)
    for name in model_types():
        assert f"│ {name} " in text


def test_every_key_of_a_config_is_listed_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    keys = list(keys_of(Config))
    for key in keys:
        assert key.takes and key.meaning.isprintable() and 4 < len(key.meaning) <= 100, key
    known = {key.name: key for key in keys}
    assert known["parents"].default == "required" and known["search.sigma"].default == "0.1667"
    assert known["search.strategy"].default == "cma_es" and known["search.stop"].default == ""
    assert known["search.seeds"].takes == "a list of up to 4 of uniform, parents, trimmed_parents or task_vectors"
    assert known["space.parameters.NAME.low"].takes == "a number that float32 holds"
    assert {key.of for key in keys if key.name == "tasks[].metric"} == {
        ("likelihood", "multiple_choice", "exact_match"), ("generation",), ("gsm",), ("lm_eval",), ("classification",),
        ("regression",), ("text_to_text",), ("transcription",), ("similarity",), ("retrieval",),
    }  # fmt: skip
    text = listed("keys all", capsys)
    for name in known:
        assert f"│ {name} " in text
    # Without a section, a line for each of them, and how to see more.
    *lines, how = listed("keys", capsys).splitlines()
    names = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert names == [name for name in known if "." not in name and "[" not in name]
    assert "evojax-merge keys search" in how and "evojax-merge keys all" in how


def test_the_keys_of_a_section_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = listed("keys search.stop", capsys)
    names = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert [name for name in names if name] == [
        "search.stop", *(f"search.stop.{name}" for name in ("evaluations", "seconds", "target", "stagnation")),
    ]  # fmt: skip
    assert run_here("keys", "serch", status=2).stderr == "error: keys: serch: no such key (did you mean 'search'?)\n"


def test_a_name_that_says_its_role_stands_alone() -> None:
    rows = [Row(role, name, 0.5, {"t/m": 0.5}) for role, name in (("base", "base"), ("parent", "maths"), ("base", "b"))]
    assert [line.split("|")[1].strip() for line in markdown_table(rows).splitlines()[2:]] == [
        "base", "parent `maths`", "base `b`",
    ]  # fmt: skip


def test_generations_are_counted_without_a_last_one_where_the_clock_ends_them() -> None:
    progress = Progress()
    progress.add_task("search", total=None, completed=3)
    assert GenerationsColumn().render(progress.tasks[0]).plain == "3"


@pytest.mark.parametrize(("completed", "shown"), [(0, "0/12"), (0.95, "0/12"), (5.0, "5/12"), (12, "12/12")])
def test_whole_generations_are_counted_as_such(completed: float, shown: str) -> None:
    progress = Progress()
    progress.add_task("search", total=12, completed=completed)
    assert GenerationsColumn().render(progress.tasks[0]).plain == shown
