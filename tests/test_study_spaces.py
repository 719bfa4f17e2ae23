"""Studies of pytrees, of models of other backends, of layer paths and of pools; runs that are read back."""

import copy
import re
import traceback
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import toy_backend
import yaml
from helpers.families import Family
from helpers.files import write_yaml
from helpers.trees import search_trees
from hostile import run_command
from safetensors.numpy import load_file
from test_backend_seam import TOY_KIND, network, register_toy

import evojax_merge as em
from evojax_merge import plugins

WANTED = {"encoder": np.array([1.0, 2.0, 3.0], np.float32), "head": np.array([4.0], np.float32)}
BASE = {name: 0 * values for name, values in WANTED.items()}
ONE = {"encoder": WANTED["encoder"] + 1, "head": BASE["head"]}
TWO = {"encoder": BASE["encoder"], "head": 2 * WANTED["head"]}
ROWS = {"x": np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)}
MODULE = torch.nn.Linear(2, 2)
SEARCH: dict[str, Any] = {"strategy": {"strategy": "cma_es", "population": 4}, "seed": 3, "finalists": 1}


def closeness(model: Any) -> Any:
    return -sum(((model[name] - WANTED[name]) ** 2).sum() for name in WANTED)


def errors(model: Any, rows: Any) -> Any:
    return -jnp.abs(rows["x"] @ (model["encoder"] - WANTED["encoder"])) - jnp.abs(model["head"] - WANTED["head"])


def make(tasks: Any = None, parents: Any = None, **changes: Any) -> em.Study:
    models = em.load_models(BASE, parents or [ONE, TWO])
    # The same as 1.5.
    space = em.MergeSpace(models, "task_arithmetic", parameters={"weight": {"high": jnp.float32(1.5)}})
    return em.Study(models, space, tasks or [closeness], **SEARCH | changes)


def uneven(model: Any, rows: Any) -> Any:
    return np.zeros(max(2, len(rows["x"])))


def deleted() -> Any:
    leaf = jnp.array(ONE["head"])
    leaf.delete()
    return leaf


def with_rows(**keys: Any) -> dict[str, Any]:
    return em.tasks.Arrays(errors, name="errors", examples=ROWS, **keys)


# ---------------------------------------------------------------------------------------------------------------
# Pytrees


def test_a_study_of_pytrees_is_their_search() -> None:
    study = make()
    for _ in range(2):
        genomes = study.ask()
        study.tell(genomes, study.evaluate(genomes))
    short = search_trees(
        [ONE, TWO], closeness, base=BASE, method="task_arithmetic", parameters={"weight": {"high": 1.5}}, population=4,
        generations=2, seed=3,
    )  # fmt: skip
    assert [row["fitness"] for row in study.history] == [row["fitness"] for row in short.history]
    assert study.best.fitness == short.history[-1]["best_so_far"]
    names = ["weight[encoder][parents[0]]", "weight[encoder][parents[1]]", "weight[head][parents[0]]"]
    assert list(study.best.parameters)[:3] == names and set(study.space.groups) == {"encoder", "head"}


TASKS: list[tuple[Any, Any]] = [
    (closeness, [closeness]),
    (em.host_callback(closeness), [em.host_callback(closeness)]),
    (with_rows(traced=False), em.tasks.Arrays(em.host_callback(errors), name="errors", examples=ROWS)),
]


@pytest.mark.parametrize(("task", "same"), TASKS)
def test_a_task_has_several_forms(task: Any, same: Any) -> None:
    one, listed = make(task), make(same)
    assert one.config == listed.config
    genomes = one.ask()
    assert np.array_equal(one.evaluate(genomes).fitness, listed.evaluate(genomes).fitness)


def test_a_study_of_pytrees_runs_resumes_and_exports(tmp_path: Path) -> None:
    tasks = [with_rows(heldout=0.25), em.tasks.Arrays(closeness, name="closeness", weight=0.5)]
    study = make(tasks, out=tmp_path / "run", log=["csv"])
    whole = make(tasks, out=tmp_path / "whole").run(2)
    study.run(1)
    run = make(tasks, out=tmp_path / "run", resume=True, log=["csv"]).run(1)
    assert run.history == whole.history and run.finished
    logged = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert logged[0].startswith("generation,fitness/best_so_far") and [row[:2] for row in logged[1:]] == ["1,", "2,"]
    assert [row["role"] for row in run.table] == ["base", "parent", "parent", "uniform", "winner"]
    assert [row["name"] for row in run.table[:3]] == ["base", "parents[0]", "parents[1]"]

    resumed = make(tasks, out=tmp_path / "run", resume=True)
    best = resumed.best
    exported = load_file(best.export(tmp_path / "best") / "params.safetensors")
    merged, winner = best.merged(), load_file(run.model / "params.safetensors")
    for name in WANTED:
        assert np.array_equal(exported[name], winner[name]) and np.array_equal(exported[name], merged[name])
    frame = resumed.to_frame()
    assert len(frame) == len(resumed.trials) == 8 and "weight[head][parents[1]]" in frame.columns
    assert resumed.plot().to_dict()["datasets"]
    assert best.recipe["merge_method"] == "task_arithmetic"
    with pytest.raises(em.InputError, match="exists already; choose another folder or pass overwrite=True"):
        best.export(tmp_path / "best")
    best.export(tmp_path / "best", overwrite=True)


def test_a_study_gives_a_warning_once_and_names_the_programs_line(tmp_path: Path) -> None:
    def flat(model: Any) -> Any:
        return 0.0 * closeness(model)

    study = make([flat], strategy={"strategy": "gradient", "population": 1}, out=tmp_path / "run")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        study.run(1)
        study.run(1)
    ours = [warning for warning in caught if warning.category is UserWarning]
    assert [str(warning.message).partition(":")[0] for warning in ours] == ["the gradient is 0 everywhere"]
    assert ours[0].filename == __file__


def test_a_study_logs_into_its_run_folder_alone(tmp_path: Path) -> None:
    with pytest.raises(em.InputError, match="Study: log: there is no run folder to log in; give `out`"):
        make(log=["csv"])
    with pytest.raises(em.InputError, match="Study: log"):
        make(out=tmp_path / "run", log=["table"])


def test_parents_have_names() -> None:
    study = make(parents={"one": ONE, "two": TWO})
    assert "parents=['one', 'two']" in repr(study) and "weight[encoder][two]" in study.space.parameters(study.ask()[0])
    assert np.array_equal(study.ask(), make().ask())


def test_examples_are_divided_among_splits(tmp_path: Path) -> None:
    held = {"x": ROWS["x"] + 1}
    study = make([with_rows(heldout=held)], validation=0.25)
    genomes = study.ask()
    sizes = [study.evaluate(genomes, split=split).values.shape[1] for split in ("search", "validation", "heldout")]
    assert sizes == [15, 5, 20]


def test_functions_that_jax_cannot_trace(tmp_path: Path) -> None:
    def counted(model: Any) -> float:
        return float(model["head"][0] > 1)

    study = make([em.host_callback(counted)])
    assert set(study.evaluate(study.ask()).fitness) <= {0.0, 1.0}
    with pytest.raises(em.InputError, match="JAX cannot trace it"):
        make([counted])


def test_held_out_examples_that_are_not_finite_are_told() -> None:
    held = {"x": np.concatenate([ROWS["x"] + 1, np.full((1, 3), np.nan, np.float32)])}
    with pytest.warns(UserWarning, match=r"^On the held-out examples of errors \(score\) 5 of 5 models have no finite"):
        run = make([with_rows(heldout=held)]).run(1)
    assert len(run.result["verdicts"]) == 1


def test_a_fitness_can_be_debugged_without_compiling() -> None:
    with jax.disable_jit():
        [row] = make().run(np.int64(1)).history
    np.testing.assert_allclose(row["fitness"], make().run(1).history[0]["fitness"], rtol=1e-5)


def test_gradients_are_followed(tmp_path: Path) -> None:
    run = make(strategy=em.strategies.gradient(population=1), out=tmp_path / "run").run(2)
    assert run.history[1]["fitness"][0] > run.history[0]["fitness"][0]


def test_a_prompt_has_the_fitness_of_a_winner_of_minibatches(tmp_path: Path) -> None:
    study = make(
        with_rows(), strategy=em.strategies.gradient(population=1, gradient={"minibatches": 4}), out=tmp_path / "run"
    )
    run = study.run(2)
    assert study.history[-1]["best_so_far"] is None and study.best.fitness is not None
    for value in (study, run):
        assert f"best_fitness={study.best.fitness:.6g}, best_fitness_on='{study.best.split}'" in repr(value)
        assert f"origin={study.best.origin!r}" in repr(value.best)


def test_other_pytrees_do_not_resume_a_run(tmp_path: Path) -> None:
    make(out=tmp_path / "run").run(1)
    other = copy.deepcopy(TWO)
    other["head"] += 1
    with pytest.raises(em.InputError, match=r"belongs to another config: parents\.1 differs .* with `out`"):
        make(parents=[ONE, other], out=tmp_path / "run", resume=True)
    with pytest.raises(em.InputError, match="pass resume=True to continue it or overwrite=True to start again"):
        make(out=tmp_path / "run")


def test_a_run_has_the_candidates_of_its_study(tmp_path: Path) -> None:
    study = make(out=tmp_path / "run")
    run = study.run(1)
    assert run.trials == study.trials and run.best == study.best
    again = run.best.export(tmp_path / "again")
    assert (again / "params.safetensors").read_bytes() == (run.model / "params.safetensors").read_bytes()
    assert run.to_frame().equals(study.to_frame()) and run.plot().to_dict()["datasets"]
    assert ">weight parents[1]</th>" in run._repr_html_() and "final scores" in run._repr_html_()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: em.load_models(None, [ONE, "zoo:maths"]), "load_models: parents[0]: {"),
        (lambda: em.load_models(BASE, {"a b": ONE}), "load_models: parents: 'a b'; expected names of letters"),
        (lambda: em.load_models(BASE, ONE), "parents: has the keys of the base; a mapping gives parents names"),
        (lambda: em.load_models(None, {"maths": "zoo:maths"}), "parents: name 'zoo:maths'; expected a list"),
        (lambda: em.load_models(None, [MODULE, MODULE]), "parents[0]: is a Linear, a module of torch; expected"),
        (lambda: make(parents=[ONE | {"head": deleted()}, TWO]), "parents[0]: leaf 'head' was deleted, or donated"),
        (lambda: em.LayerPathSpace(em.load_models(None, [ONE, TWO])), "LayerPathSpace: data_flow: is for language"),
        (lambda: em.PoolSpace(em.load_models(None, [ONE, TWO])), "PoolSpace: pool: is for language models"),
        (lambda: em.MixtureSpace(em.load_models(None, [ONE, TWO])), "MixtureSpace: mixture: is for language models"),
        (lambda: make([with_rows(heldout=1.5)]), "heldout: expected a share"),
        (lambda: make([{"kind": "arrays", "name": "a", "function": errors}]), "inputs: model calls it with (model)"),
        (lambda: make([closeness, closeness]), "tasks: names must differ; 'closeness' stands more than once"),
        (lambda: make([em.tasks.Arrays(errors, name="a", examples={"x": 1.0})]), "leading axes of [0]"),
        (lambda: make(rungs=2), "search.rungs"),
        (lambda: make(stop={"target": MODULE}), "Study: search.stop.target: holds Linear("),
        (lambda: make([em.tasks.Arrays(uneven, name="a", examples=ROWS, traced=False)]).run(1),
         "tasks[0]: returned 2 numbers for a candidate; expected one for each example, here 1"),
    ],
)  # fmt: skip
def test_wrong_calls(call: Any, named: str) -> None:
    with pytest.raises(em.InputError) as caught:
        call()
    assert named in str(caught.value)


def test_pytrees_that_are_gone_are_named() -> None:
    config = make().config
    with pytest.raises(em.InputError, match=r"parents\[0\]: python:parents\[0\]@\w+ is a pytree of a Python program"):
        em.Evaluator({**config, "base": None, "parents": ["python:parents[0]@0123"], "space": {"method": "linear"}})


# ---------------------------------------------------------------------------------------------------------------
# A user's function that raises


def inner(model: Any) -> Any:
    raise ValueError("not today")


def raises(model: Any) -> Any:
    return inner(model)


def test_the_traceback_of_a_users_function_has_the_users_frames(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not today") as caught:
        make([raises])
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert [frame.name for frame in frames][-2:] == ["raises", "inner"]
    assert {frame.filename for frame in frames} == {__file__}


def test_a_command_shows_the_users_frames_as_well(tmp_path: Path) -> None:
    source = "def inner(model):\n    return model['w'] @ [1.0] * 9\n\ndef raises(model):\n    return inner(model)\n"
    (tmp_path / "own.py").write_text(source)
    np.savez(tmp_path / "one.npz", w=np.ones(3, np.float32))
    config = {
        "backend": "function", "parents": ["one.npz"], "space": {"method": "linear"},
        "tasks": [{"name": "own", "kind": "arrays", "function": "own.py:raises"}], "search": {"population": 2},
    }  # fmt: skip
    done = run_command("search", write_yaml(tmp_path / "config.yaml", config), folder=tmp_path, status=1)
    files = re.findall(r'File "(.*)", line', done.stderr)
    assert files == [str(tmp_path / "own.py")] * 2, done.stderr


# ---------------------------------------------------------------------------------------------------------------
# Other backends, layer paths, pools


def test_models_of_another_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_toy(monkeypatch)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    base = network(rng)
    for name, arrays in {"base": base, "one": network(rng, base, 0.5), "two": network(rng, base, 0.5)}.items():
        (tmp_path / name).mkdir()
        toy_backend.save(arrays, tmp_path / name)
    models = em.load_models("base", ["one", "two"], backend="network")
    space = em.MergeSpace(models, "ties", parameters={"weight": {"low": 0.0, "high": 1.5}})
    study = em.Study(models, space, [{"name": "right", "kind": "blobs", "angle": 0.3}], **SEARCH, out="run")
    run = study.run(1)
    assert "backend='network'" in repr(models) and run.finished
    assert set(toy_backend.load(study.best.export("best"))) == {"first", "second"}
    # A command has the paths from any folder, and hears of what the program alone has registered.
    assert yaml.safe_load(study.to_yaml())["parents"] == [str(tmp_path / "one"), str(tmp_path / "two")]
    monkeypatch.setattr(plugins, "_of_the_program", ["network", TOY_KIND])
    lines = [line for line in study.to_yaml().splitlines() if line.startswith("# Missing")]
    assert len(lines) == 2 and lines[0].startswith("# Missing: network: registered by the Python program")
    assert list(study.to_frame().columns[-2:]) == ["weight[second][one]", "weight[second][two]"]


@pytest.mark.parametrize("kind", ["path", "pool", "mixture"])
def test_layer_paths_pools_and_mixtures(kind: str, family: Family, tmp_path: Path) -> None:
    models = em.load_models(None, family.parents)
    space = {
        "path": lambda: em.LayerPathSpace(models, moves=2),
        "pool": lambda: em.PoolSpace(models, methods=["linear"], size=3),
        "mixture": lambda: em.MixtureSpace(models, gate_mode="random"),
    }[kind]()  # fmt: skip
    tasks = [em.tasks.Likelihood(name="text", file=family.tasks)]
    strategy = {"strategy": "path_ga", "population": 3} if kind == "path" else {"population": 3}
    study = em.Study(models, space, tasks, strategy=strategy, out=tmp_path / "run", seed=1)
    run = study.run(1)
    by_hand = em.Study(models, space, tasks, strategy=strategy, seed=1)
    genomes = by_hand.ask()
    by_hand.tell(genomes, by_hand.evaluate(genomes))
    assert by_hand.history == run.history == study.history
    assert f"method='{'data_flow' if kind == 'path' else kind}'" in repr(study)
    for best, name in ((study.best, "by-study"), (run.best, "by-run")):
        exported = best.export(tmp_path / name)
        assert (exported / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()
    last = "dense[layer 2]" if kind == "mixture" else f"gene[{space.dims - 1}]"
    assert list(study.to_frame().columns[-1:]) == [last]
