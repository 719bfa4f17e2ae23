"""The seam for backends: one that others wrote, and pytrees in files, are searched as language models are."""

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import toy_backend
import yaml
from helpers.commands import output_of, run_here
from helpers.files import read_json, write_yaml
from helpers.sampling import thorough
from helpers.searches import problem_of
from helpers.trees import by_group, search_trees
from safetensors.numpy import load_file, save_file

import evojax_merge as em
from evojax_merge.backends import registry
from evojax_merge.errors import InputError
from evojax_merge.tasks import kinds
from evojax_merge.tasks.task import TaskKind

TOY = Path(toy_backend.__file__)
# Other tests of this process list the program's own.
TOY_KIND, TOY_FACTORY = kinds._registered.pop(), registry._registered.pop("network")


def register_toy(monkeypatch: pytest.MonkeyPatch, *more: TaskKind) -> None:
    """Know the toy's backend and its kind of task, and `more` kinds, for the time of a test."""
    monkeypatch.setattr(kinds, "_registered", [*kinds._registered, TOY_KIND, *more])
    monkeypatch.setattr(registry, "_registered", {**registry._registered, "network": TOY_FACTORY})


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    register_toy(monkeypatch)


def network(rng: np.random.Generator, base: Any = None, size: float = 1.0) -> Any:
    shapes = {"first": {"w": (2, 5), "b": (5,)}, "second": {"w": (5, 2), "b": (2,)}}
    drawn = {layer: {name: (rng.normal(size=shape) * size).astype(np.float32) for name, shape in arrays.items()}
             for layer, arrays in shapes.items()}  # fmt: skip
    if base is None:
        return drawn
    return {layer: {name: base[layer][name] + array for name, array in arrays.items()}
            for layer, arrays in drawn.items()}  # fmt: skip


def write_networks(folder: Path) -> dict[str, Any]:
    """A base and two networks that were made from it, in a folder each; by their names."""
    rng = np.random.default_rng(0)
    base = network(rng)
    models = {"base": base, "one": network(rng, base, 0.5), "two": network(rng, base, 0.5)}
    for name, arrays in models.items():
        (folder / name).mkdir()
        toy_backend.save(arrays, folder / name)
    return models


@pytest.fixture
def networks(tmp_path: Path) -> dict[str, Any]:
    return write_networks(tmp_path)


def document(**changes: Any) -> dict[str, Any]:
    return {
        "backend": "network", "base": "base", "parents": ["one", "two"],
        "space": {"method": "ties", "parameters": {"weight": {"low": 0.0, "high": 1.5}}},
        "tasks": [{"name": "right", "kind": "blobs", "angle": 0.3, "heldout": 0.25},
                  {"name": "up", "kind": "blobs", "angle": 1.2, "heldout": 0.25, "weight": 0.5}],
        "search": {"generations": 3, "population": 6, "rungs": 2, "validation": 0.25}, "seed": 3,
    } | changes  # fmt: skip


def config_file(folder: Path, **changes: Any) -> Path:
    return write_yaml(folder / "config.yaml", document(**changes))


def test_a_toy_is_planned_searched_resumed_and_exported(networks: dict[str, Any], tmp_path: Path) -> None:
    config, run, whole = config_file(tmp_path), tmp_path / "run", tmp_path / "whole"
    plan = output_of("plan", config)
    assert "fits" in plan and "right" in plan
    run_here("search", config, "--out", whole)
    run_here("search", config, "--out", run, "--set", "search.generations=2")
    run_here("search", config, "--out", run, "--resume")
    assert (run / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    result = read_json(run / "result.json")
    assert result == read_json(whole / "result.json")
    assert [(row["role"], set(row["heldout_scores"])) for row in result["table"]] == [
        (role, {"right/score", "up/score"}) for role in ("base", "parent", "parent", "uniform", "winner")
    ]

    # The exported winner has the scores that the table says; so have the parents.
    problem = problem_of(config, document())
    winner = toy_backend.load(run / "best" / "model")
    for row, model in ((result["table"][1], networks["one"]), (result["table"][-1], winner)):
        for task in problem.splits.heldout:
            scores = np.asarray(toy_backend.margins(model, *task.rows))
            assert row["heldout_scores"][f"{task.name}/score"] == pytest.approx(scores.mean(), abs=1e-6)

    # The winner is the merge of its parameters, by the method's own formula on these arrays.
    trim = search_trees(
        [networks["one"], networks["two"]], lambda tree: jnp.float32(0), base=networks["base"], method="ties",
        generations=1, population=2, parameters={"weight": {"low": 0.0, "high": 1.5}}, seed=3,
    )  # fmt: skip
    assert set(by_group(trim)) == {"first", "second"}
    merged = problem.backend.merged(np.array(result["genome"], np.float32))
    for layer, arrays in winner.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, np.asarray(merged[layer][name]))

    exported = tmp_path / "exported"
    run_here("export", run, exported)
    assert (exported / "first.w.npy").read_bytes() == (run / "best/model/first.w.npy").read_bytes()
    (recipe,) = yaml.safe_load_all((run / "best" / "recipe.yaml").read_text())
    assert recipe["merge_method"] == "ties" and len(recipe["models"]) == 2
    assert "right" in (run / "best/model/README.md").read_text()
    assert em.open_run(run).table == result["table"]
    (run / "report.html").unlink()
    run_here("report", run)
    assert "right" in (run / "report.html").read_text(encoding="utf-8")


@thorough
def test_a_killed_search_exports_the_best_so_far(networks: dict[str, Any], tmp_path: Path) -> None:
    config, run = config_file(tmp_path), tmp_path / "run"
    run_here("search", config, "--out", run)
    (run / "result.json").unlink()
    run_here("export", run, tmp_path / "so_far", "--best-so-far")
    assert set(toy_backend.load(tmp_path / "so_far")) == {"first", "second"}


def test_gradients_and_every_strategy_seam_work_over_it(networks: dict[str, Any], tmp_path: Path) -> None:
    search = {"generations": 3, "strategy": "gradient", "population": 1, "gradient": {"minibatches": 2}}
    config = config_file(tmp_path, space={"method": "task_arithmetic"}, search=search)
    run_here("search", config, "--out", tmp_path / "run")
    history = em.open_run(tmp_path / "run").history
    assert len(history) == 3 and history[-1]["fitness"] != history[0]["fitness"]


SCORES = '''"""Scores of a linear model."""

def errors(model, rows):
    return -((rows["x"] @ model["layer"]["w"] - rows["y"]) ** 2).sum(-1)

def counted(model, rows):
    return float((model["layer"]["w"] > 0).sum()) + 0 * rows["y"][:, 0]
'''


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """A config whose models are safetensors files, and whose best merge is the mean of the parents."""
    rng = np.random.default_rng(1)
    one, two, x = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 2), (3, 2), (40, 3)))
    save_file({"layer/w": one}, tmp_path / "one.safetensors")
    np.savez(tmp_path / "two.npz", **{"layer/w": two})
    np.savez(tmp_path / "data.npz", x=x, y=x @ ((one + two) / 2))
    (tmp_path / "scores.py").write_text(SCORES)
    task = {"name": "fit", "kind": "arrays", "file": "data.npz", "function": "scores.py:errors"}
    return write_yaml(tmp_path / "linear.yaml", {
            "backend": "function", "parents": ["one.safetensors", "two.npz"], "tasks": [task],
            "space": {"method": "linear", "normalize": False, "parameters": {"weight": {"low": 0.0, "high": 1.0}}},
            "search": {"generations": 40, "population": 8}, "evaluation": {"chunk": 3},
        })  # fmt: skip


def test_files_of_arrays_are_searched(linear: Path, tmp_path: Path) -> None:
    run_here("search", linear, "--out", tmp_path / "run")
    merged = load_file(tmp_path / "run/best/model/params.safetensors")["layer/w"]
    one, two = load_file(tmp_path / "one.safetensors")["layer/w"], np.load(tmp_path / "two.npz")["layer/w"]
    np.testing.assert_allclose(merged, (one + two) / 2, atol=0.02)
    table = em.open_run(tmp_path / "run").table
    assert [row["role"] for row in table] == ["parent", "parent", "uniform", "winner"]
    assert table[-1]["heldout_fitness"] > max(row["heldout_fitness"] for row in table[:2])


def test_a_function_that_is_not_traced_is_called_with_each_model(linear: Path, tmp_path: Path) -> None:
    text = linear.read_text().replace("scores.py:errors", "scores.py:counted")
    linear.write_text(text)
    with pytest.raises(InputError, match=r"tasks\[0\]: JAX cannot trace it .*say traced: false"):
        problem_of(linear, yaml.safe_load(text))
    (task,) = yaml.safe_load(text)["tasks"]
    write_yaml(linear, yaml.safe_load(text) | {"tasks": [task | {"traced": False}]})
    run_here("search", linear, "--out", tmp_path / "run", "--set", "search.generations=2")
    scores = [value for row in em.open_run(tmp_path / "run").history for value in row["fitness"]]
    assert all(value == int(value) for value in scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "netwerk"}, r"backend: unknown backend 'netwerk' \(did you mean 'network'\?\); a plugin can"),
        ({"backend": "nowhere.py:KIND"}, r"backend: nowhere.py: no such file"),
        ({"backend": "nowhere_at_all:KIND"}, r"backend: there is no module 'nowhere_at_all'"),
        ({"backend": f"{TOY}:em"}, r"lacks check, open; expected a BackendFactory"),
        ({"backend": f"{TOY}:missing"}, r"toy_backend.py has no 'missing' \(known: .*save\)"),
        ({"export_dtype": "float32"}, r"export_dtype: is for language models"),
        ({"evaluation": {"model": 2}}, r"evaluation.model: "),
        ({"parents": ["one", "three"]}, r"parents\[1\]: three: no such file or folder"),
        ({"space": {"method": "ties", "layers_per_group": 2}}, r"space: layers_per_group: is for language models"),
        ({"tasks": [{"name": "a", "kind": "likelihood", "file": "zoo:search.jsonl"}]},
         r"tasks\[0\]: a: a TextTask asks a language model"),
    ],
)  # fmt: skip
def test_bad_input_is_named(networks: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = config_file(tmp_path)
    with pytest.raises(InputError, match=message):
        problem_of(path, document(**changes))


def test_parents_that_differ_are_named(networks: dict[str, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "two" / "first.w.npy", np.zeros((2, 4), np.float32))
    path = config_file(tmp_path)
    with pytest.raises(InputError, match=r"parents\[1\]: leaf 'first/w' has shape \(2, 4\), but \(2, 5\) in base"):
        problem_of(path, document())


def test_names_that_are_taken_and_values_that_open_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is a backend 'decoder' already"):
        em.register_backend("decoder", em.FunctionFactory())
    with pytest.raises(InputError, match=r"register_backend: factory: .* lacks check, open"):
        em.register_backend("mine", object())
    (tmp_path / "plugin.py").write_text(
        "import evojax_merge as em\nem.register_backend('function', em.FunctionFactory())\n"
    )
    config = config_file(tmp_path, plugins=["plugin.py"])
    assert "there is a backend 'function' already" in run_here("search", config, status=2).stderr


def test_language_models_refuse_tasks_on_arrays(family: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((4, 2)))
    (tmp_path / "scores.py").write_text(SCORES)
    task = {"name": "fit", "kind": "arrays", "file": "data.npz", "function": "scores.py:errors"}
    config = {"parents": list(map(str, family.parents)), "space": {"method": "linear"}, "tasks": [task]}
    path = tmp_path / "config.yaml"
    with pytest.raises(InputError, match=r"tasks\[0\]: fit: tasks of kind: arrays are for backend: function; take"):
        problem_of(path, config)
    write_yaml(path, {"tasks": [task]})
    says = "fit: tasks of kind: arrays are for backend: function; evaluate scores language models and networks"
    assert says in run_here("evaluate", family.base, "--tasks", path, status=2).stderr


def test_the_toy_is_one_short_file() -> None:
    assert len(TOY.read_text().splitlines()) <= 60
    assert "toy_backend" in sys.modules
