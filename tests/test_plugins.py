"""Entry points of other packages: what they add is there in every command, and a broken one is named in a line."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from helpers.commands import command, run_here
from helpers.families import Family
from helpers.files import write_yaml
from merge_kernels import METHODS
from test_planning import document

import evojax_merge as em
from evojax_merge import plugins

MODULE = """
from merge_kernels import Method, Parameter, register

def combine(options, inputs):
    return sum(weight * source for weight, source in zip(inputs.parameters["weight"], inputs.sources))

SUM = Method("sum_up", (Parameter("weight", True, 1.0, low=0.0, high=2.0),), base="parent", combine=combine)

def both():
    register(SUM)
    register(Method("sum_down", SUM.parameters, base="parent", combine=SUM.combine))

def fails():
    raise RuntimeError("no luck\\ntoday")
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package `others` 1.2 with the given entry points: group -> name -> value."""
    before = dict(METHODS)
    monkeypatch.setattr(plugins, "_loaded", set())

    def install(**groups: dict[str, str]) -> None:
        info = tmp_path / "others-1.2.dist-info"
        info.mkdir()
        (tmp_path / "others.py").write_text(MODULE)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.2\n")
        rows = [
            f"[evojax_merge.{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in groups.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(rows))
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("others", None)
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize(
    ("value", "added"),
    [("others:SUM", {"sum_up"}), ("others:both", {"sum_up", "sum_down"})],
    ids=["object", "function"],
)
def test_methods_are_registered_once(value: str, added: set[str], install: Install) -> None:
    before = set(METHODS)
    install(methods={"mine": value})
    for _ in range(2):
        shown = run_here("methods").stdout
        assert all(name in shown for name in list(added)[:1])
    assert set(METHODS) - before == added


@pytest.mark.parametrize(
    ("group", "value", "named"),
    [
        ("methods", "others:absent", "AttributeError: module 'others' has no attribute 'absent'"),
        ("methods", "nowhere:SUM", "ModuleNotFoundError: No module named 'nowhere'"),
        ("methods", "others:fails", r"RuntimeError: no luck\ntoday"),
        ("methods", "others:MODULE", "AttributeError"),
        ("methods", "others:register", "expected a merge_kernels.Method"),
        ("tasks", "nowhere:TASK", "ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_broken_plugin_is_named_in_a_line(
    group: str, value: str, named: str, install: Install, tmp_path: Path
) -> None:
    install(**{group: {"mine": value}})
    for arguments in (
        ["methods"], ["merge", "recipe.yaml", str(tmp_path / "out")], ["evaluate", "model", "--tasks", "tasks.yaml"],
        ["search", "config.yaml", "--out", str(tmp_path / "run")], ["export", str(tmp_path / "run"), "out"],
    ):  # fmt: skip
        [line] = run_here(*arguments, status=2).stderr.splitlines()
        assert line.startswith(
            f"error: plugin 'mine' of others 1.2: evojax_merge.{group} = {value} could not be loaded"
        )
        assert named in line
    with pytest.raises(em.InputError, match=r"plugin 'mine' of others 1\.2"):
        em.load_models(None, [{}])
    assert command("--help") == 0


def test_a_taken_name_is_an_error_of_the_plugin(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(methods={"first": "others:SUM", "second": "others:both"})
    assert command("methods") == 2
    assert "plugin 'second' of others 1.2" in (line := capsys.readouterr().err) and "registered already" in line


def test_a_run_is_not_continued_by_another_version_of_a_plugin(
    install: Install, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(methods={"mine": "others:SUM"}, tasks={})
    config, out = tmp_path / "config.yaml", tmp_path / "run"
    write_yaml(config, document(family, space={"method": "sum_up"}, search={"generations": 1}))
    assert command("search", str(config), "--out", str(out)) == 0
    plugin = tmp_path / "others.py"
    assert yaml.safe_load((out / "config.yaml").read_text())["inputs"].keys() >= {str(plugin)}
    plugin.write_text(MODULE.replace("weight * source", "-weight * source"))
    capsys.readouterr()
    again = ["search", str(config), "--out", str(out), "--resume", "--set", "search.generations=2"]
    assert f"{plugin} has changed since the run was begun" in run_here(*again, status=2).stderr


def test_nothing_is_loaded_for_help(install: Install, tmp_path: Path) -> None:
    install(methods={"mine": "others:fails"})
    done = subprocess.run(
        [sys.executable, "-m", "evojax_merge", "--help"], capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr
