"""What is printed is escaped where it leaves the program: lines, tables, progress bars, warnings and cards."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.families import Family
from rich.progress import Progress

import evojax_merge as em
from evojax_merge.cli_parts import run
from evojax_merge.errors import escaped_lines, nearest, print_warning, printable
from evojax_merge.report.comparison import Row
from evojax_merge.report.front_matter import changed_front_matter
from evojax_merge.report.intervals import Lead
from evojax_merge.report.progress import PlainColumn
from evojax_merge.report.tables import Table, markdown_table, scores_table
from evojax_merge.system.console import Terminal

UNSAFE = "a\u202eb\u200bc\x1b[31md\u2028e\x9bf\ud800g"
SHOWN = "a\\u202eb\\u200bc\\x1b[31md\\u2028e\\x9bf\\ud800g"


@pytest.fixture
def terminal() -> Terminal:
    return Terminal(file=io.StringIO(), width=200, markup=False, emoji=False, highlight=False)


def text_of(terminal: Terminal) -> str:
    assert isinstance(terminal.file, io.StringIO)
    return terminal.file.getvalue()


def test_a_line_is_one_line(terminal: Terminal) -> None:
    terminal.print(f"wrote {UNSAFE}\nerror: none", soft_wrap=True)
    assert text_of(terminal) == f"wrote {SHOWN}\\nerror: none\n"


def test_names_of_any_script_are_printed_as_they_are() -> None:
    for name in ("Modèle 混合 модель", "שלום", "مرحبا", "a b", "é"):
        assert printable(name) == name


def test_tables_show_escaped_names(terminal: Terminal) -> None:
    rows = [Row("model", UNSAFE, 1.0, {f"{UNSAFE}/accuracy": 1.0})]
    terminal.print(scores_table(rows).terminal(f"Scores on {UNSAFE}"))
    lines = text_of(terminal).splitlines()
    assert SHOWN in lines[0] and sum(SHOWN in line for line in lines) == 3
    # Borders meet: the widths are those of what is shown.
    assert len({len(line.rstrip()) for line in lines[1:]}) == 1
    markdown = markdown_table(rows)
    assert markdown.isascii() and markdown.count(SHOWN.replace("|", "\\|")) == 2 and len(markdown.splitlines()) == 3


def test_cells_keep_their_lines(terminal: Terminal) -> None:
    terminal.print(Table(["name"], [[f"one\n{UNSAFE}"]]).terminal())
    assert [line.strip("│ ") for line in text_of(terminal).splitlines()[3:5]] == ["one", SHOWN]


def test_a_narrow_terminal_leaves_the_fitness_of_one_task_out() -> None:
    rows = [Row(role, "maths", -4.5, {"sums/log_probability": -4.5, "b/a": 1.0}) for role in ("parent", "winner")]
    for width, count in ((40, 0), (140, 1)):
        terminal = Terminal(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)
        terminal.print(scores_table(rows).terminal())
        assert text_of(terminal).count("fitness") == count and text_of(terminal).count("-4.5000") == 2 * (count + 1)
    several = [Row(role, "maths", -2.0, {"sums/log_probability": -4.5, "b/a": 0.5}) for role in ("parent", "winner")]
    terminal = Terminal(file=io.StringIO(), width=40, markup=False, emoji=False, highlight=False)
    terminal.print(scores_table(several).terminal())
    assert "fitness" in text_of(terminal)


@pytest.mark.parametrize("width", [80, 140])
def test_a_narrow_terminal_breaks_no_word(width: int) -> None:
    """Headings and cells go on behind spaces, / and _; a table of too many columns has them as rows."""
    unit = "log-probability per token"
    scores = {"japanese_sums/log_probability": -12.0898, "whole_answers/accuracy": 0.8633}
    units = {"fitness": unit, "japanese_sums/log_probability": unit, "whole_answers/accuracy": "share right"}
    lead = Lead(12.004, 11.8611, 12.1469)
    leads = {"parent": lead, "winner": None}
    rows = [Row(role, "japanese", -4.5705, scores, leads[role], units=units) for role in leads]
    columns = ["run", "method", "state", "generations", "best fitness", "winner, held out", "best parent, held out"]
    columns += ["time"]
    runs = [[f"run-{k}", "task_arithmetic", "finished", "100/100", -0.0695, -0.0859, -4.5705, "2:07"] for k in range(3)]
    for table in (scores_table(rows), Table(columns, runs, frozenset({3, 4, 5, 6, 7}))):
        terminal = Terminal(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)
        terminal.print(table.terminal())
        text = text_of(terminal)
        assert "…" not in text and max(map(len, text.splitlines())) <= width
        words = set(re.split(r"[\s┃│]+", text))
        table = table if table.repeated is None or table.natural_width <= width else table.without(table.repeated)
        texts = [value for row in (table.columns, *table.rows) for value in row if isinstance(value, str)]
        for part in re.findall(r"[^\s/_]+", " ".join(texts)):
            assert any(part in word for word in words), part


def test_bars_show_escaped_labels(terminal: Terminal) -> None:
    with Progress(PlainColumn("{task.description}"), console=terminal) as progress:
        progress.add_task(f"merging {UNSAFE} [bold]")
    assert f"merging {SHOWN} [bold]" in text_of(terminal)


def test_a_warning_is_one_line_of_bounded_length(capsys: pytest.CaptureFixture[str]) -> None:
    print_warning(f"{UNSAFE}\n{'x' * 1_000_000}")
    line = capsys.readouterr().err
    assert line.startswith(f"warning: {SHOWN}\\nxxx") and line.count("\n") == 1 and len(line) < 2000


def test_front_matter_keeps_its_meaning() -> None:
    name = f"owner/{UNSAFE[:-2]}"
    card = changed_front_matter("---\nlicense: mit\n---\n# Title\n", {"base_model": [name]})
    assert escaped_lines(card) == card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == [name]


@pytest.mark.parametrize(
    ("word", "names", "expected"),
    [
        ("foo", ("pool", "search"), None),
        ("bar", ("base", "parents"), None),
        ("hello", ("della", "ties"), None),
        ("adam", ("random", "de"), None),
        ("wieght", ("weight", "density"), "weight"),
        ("lin", ("linear", "slerp"), "linear"),
        ("tys", ("dare_ties", "slerp", "ties"), "ties"),
        ("model", ("model_stock", "della"), "model_stock"),
        ("self_attn.q_porj", ("model.layers.0.self_attn.q_proj.weight",), "model.layers.0.self_attn.q_proj.weight"),
        ("x" * 1_000_000, ("weight",), None),
    ],
)
def test_only_near_names_are_suggested(word: str, names: tuple[str, ...], expected: str | None) -> None:
    assert nearest(word, names) == expected


def test_a_card_is_escaped_where_it_is_written(tmp_path: Path, family: Family) -> None:
    models = [{"model": str(family.base), "parameters": {"weight": 1.0}}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# a\u202eb\u200bc\n" + yaml.safe_dump({"merge_method": "linear", "models": models}))
    out = em.merge(recipe, tmp_path / "a\u202eb")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "\u202e" not in card and "a\\u202eb" in card


def test_a_file_that_the_user_may_not_read_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A user's own function, unlike this program's, has its traceback."""
    code, namespace = "def denied():\n    os.unlink('/proc/version')\n", dict[str, Any]()
    exec(compile(f"import os\n{code}", str(Path(em.__file__).with_name("module.py")), "exec"), namespace)
    assert run(namespace["denied"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: /proc/version: may not be read, or written, by you (") and line.count("\n") == 1
    exec(f"import os\n{code}", namespace)
    with pytest.raises(PermissionError):
        run(namespace["denied"])
