"""Plugins that a config, `--plugin` or the environment names: they serve every command, and a broken one is told."""

import os
from pathlib import Path

import pytest
import yaml
from helpers.families import Family
from helpers.files import write_yaml
from helpers.models import state
from helpers.sampling import thorough
from hostile import run_command, run_script
from test_planning import document

import evojax_merge as em

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
METHOD = """
from merge_kernels import Method, Parameter
import evojax_merge as em
from helper_of_plugin import combine

em.register_method(Method("sum_up", (Parameter("weight", True, 1.0, low=0.0, high=2.0),), base="parent",
                          combine=lambda options, inputs: combine(inputs)))
"""
HELPER = """
def combine(inputs):
    return sum(weight * source for weight, source in zip(inputs.parameters["weight"], inputs.sources))
"""
TASK = """
from typing import Literal
from evojax_merge.tasks.kinds import register_task
from evojax_merge.tasks.task import TaskKind
from evojax_merge.tasks.text import TextConfig, open_text

class MineConfig(TextConfig):
    kind: Literal["mine"]

register_task(TaskKind(MineConfig, lambda config, opening: open_text(
    TextConfig(**(config.model_dump() | {"kind": "likelihood"})), opening), source="file"))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Plugins below `plugins/`, and a working directory that is another one."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "method.py").write_text(METHOD)
    (tmp_path / "plugins" / "helper_of_plugin.py").write_text(HELPER)
    (tmp_path / "plugins" / "task.py").write_text(TASK)
    return tmp_path


def write_config(folder: Path, family: Family, **changes: object) -> Path:
    search = {"population": 4, "generations": 1}
    return write_yaml(folder / "config.yaml", document(family, space={"method": "sum_up"}, search=search) | changes)


def test_a_config_names_its_plugins(family: Family, folder: Path) -> None:
    config, run = write_config(folder, family, plugins=["plugins/method.py"]), folder / "run"
    done = run_command("search", config, "--out", run, folder=folder / "plugins")
    written = em.open_run(run).config
    plugin = str(folder / "plugins" / "method.py")
    assert written["plugins"] == [plugin] and plugin in written["inputs"]
    # The run's own files find it again: the winner is exported, the config searched with from anywhere.
    run_command("export", run, folder / "again")
    assert state(folder / "again").keys() == state(run / "best" / "model").keys()
    run_command("plan", run / "config.yaml", folder=folder)
    done = run_command("search", config, "--out", run, "--resume", "--set", "search.generations=2")
    (folder / "plugins" / "method.py").write_text(METHOD + "# changed\n")
    done = run_command("search", config, "--out", run, "--resume", "--set", "search.generations=3", status=2)
    assert f"{plugin} has changed since the run was begun" in done.stderr


@thorough
def test_the_option_and_the_environment_name_plugins(
    family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, option = write_config(folder, family), ("--plugin", "plugins/method.py")
    printed = []
    for command in (["methods"], ["plan", "config.yaml"], ["search", "config.yaml", "--out", "run"]):
        done = run_command(*command, *option, folder=folder)
        printed.append(done.stdout)
    assert "sum_up" in printed[0]
    assert em.open_run(folder / "run").config["plugins"] == [str(folder / "plugins" / "method.py")]
    models = [{"model": str(parent), "parameters": {"weight": 1.0}} for parent in family.parents]
    write_yaml(folder / "recipe.yaml", {"merge_method": "sum_up", "models": models})
    run_command("merge", "recipe.yaml", "out", *option, folder=folder)
    done = run_command("merge", "recipe.yaml", "other", folder=folder, status=2)
    assert "unknown method 'sum_up'" in done.stderr and "--plugin FILE" in done.stderr
    monkeypatch.setenv("EVOJAX_MERGE_PLUGINS", os.pathsep.join(["plugins/task.py", "plugins/method.py"]))
    run_command("merge", "recipe.yaml", "other", folder=folder)
    done = run_command("search", config, "--out", "run", "--resume", "--set", "search.generations=2", folder=folder)


def test_a_plugin_adds_a_kind_of_task(family: Family, folder: Path) -> None:
    task = {"name": "text", "kind": "mine", "file": str(family.tasks)}
    write_yaml(folder / "tasks.yaml", {"plugins": ["plugins/task.py"], "tasks": [task]})
    run_command("evaluate", family.base, "--tasks", folder / "tasks.yaml")
    write_yaml(folder / "tasks.yaml", {"tasks": [task]})
    done = run_command("evaluate", family.base, "--tasks", folder / "tasks.yaml", status=2)
    assert "there is no kind of task 'mine'" in done.stderr and "plugins:" in done.stderr
    option = ("--plugin", folder / "plugins" / "task.py")
    run_command("evaluate", family.base, "--tasks", folder / "tasks.yaml", *option)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("import evojax_merge as em\nem.register_strategy('cma_es', print)", "there is a strategy 'cma_es' already"),
        ("import merge_kernels as m\nm.register(m.METHODS['ties'])", "'ties': the name is registered already"),
        ("import merge_kernels as m\nm.register(3)", "3 is no merge method"),
        (None, "no such file"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line(source: str | None, named: str, family: Family, folder: Path) -> None:
    if source is not None:
        (folder / "broken.py").write_text(source)
    config = write_config(folder, family, plugins=["broken.py"])
    for command in (["search", config], ["strategies", "--plugin", folder / "broken.py"]):
        done = run_command(*command, folder=folder, status=2)
        [line] = done.stderr.splitlines()
        assert line.startswith("error: ") and "broken.py" in line and named in line


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("no_such_package", "there is no module 'no_such_package'"),
        ("some/folder", "expected a Python file (NAME.py) or the name of a package"),
    ],
)
def test_a_plugin_that_is_not_there_is_one_line(
    name: str, named: str, family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_command("search", write_config(folder, family, plugins=[name]), folder=folder, status=2)
    assert named in done.stderr and len(done.stderr.splitlines()) == 1
    assert f"plugins: {name}" in done.stderr
    monkeypatch.setenv("EVOJAX_MERGE_PLUGINS", name)
    done = run_command("keys", folder=folder, status=2)
    assert f"EVOJAX_MERGE_PLUGINS: {name}: " in done.stderr


@pytest.mark.parametrize("source", ["1 / 0", "int('x')", "import sys\nsys.exit()", "import no_such_module", "def"])
def test_a_plugin_that_raises_shows_where(source: str, folder: Path) -> None:
    (folder / "broken.py").write_text(source)
    done = run_command("methods", "--plugin", folder / "broken.py", status=1)
    assert "Traceback" in done.stderr and 'broken.py", line' in done.stderr


def test_the_examples_are_plugins(family: Family, tmp_path: Path) -> None:
    """And inputs of the run, also where a strategy's objects are of a library's classes."""
    method, strategy, config = CONFIGS / "own_method.py", CONFIGS / "own_strategy.py", tmp_path / "config.yaml"
    search = {"strategy": "snes", "population": 4, "generations": 1}
    write_yaml(config, document(family, space={"method": "agreement"}, search=search) | {"plugins": [str(method)]})
    run_command("search", config, "--out", "run", "--plugin", strategy, folder=tmp_path)
    written = em.open_run(tmp_path / "run").config
    assert set(written["plugins"]) == {str(method), str(strategy)} <= written["inputs"].keys()
    text = (CONFIGS / "own_strategy.yaml").read_text()
    assert yaml.safe_load(text)["plugins"] == ["own_strategy.py"]


def test_the_script_that_runs_is_a_plugin_already(family: Family, folder: Path) -> None:
    config = write_config(folder, family, plugins=["script.py"])
    combine = f"{HELPER}\n{METHOD.replace('from helper_of_plugin import combine', '')}"
    (folder / "script.py").write_text(f"{combine}\nif __name__ == '__main__': em.evolve({str(config)!r}, out='run')\n")
    run_script(folder / "script.py", folder=folder)
