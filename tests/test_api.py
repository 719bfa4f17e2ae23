"""`import evojax_merge as em`, as in a notebook: results as plain data, errors as exceptions, nothing printed."""

import json
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import run_here
from helpers.families import Family
from helpers.files import read_json, write_lines, write_yaml
from helpers.models import state
from helpers.sampling import thorough
from helpers.searches import search_config

import evojax_merge as em

ROOT = Path(__file__).resolve().parent.parent
# Stands for an environment in which PyTorch is not installed.
WITHOUT_TORCH = """
import importlib.util, sys
usual = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else usual(name, package)
sys.modules["torch"] = None
"""


@pytest.fixture
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing is printed in the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    assert capfd.readouterr() == ("", "")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def recipe(family: Family) -> dict[str, object]:
    """As a notebook has it: paths, NumPy's numbers, tuples."""
    models = [{"model": parent, "parameters": {"weight": np.float32(0.5)}} for parent in family.parents]
    return {
        "merge_method": "task_arithmetic", "base_model": family.base, "models": tuple(models), "dtype": "float32",
    }  # fmt: skip


def tasks(family: Family) -> list[dict[str, object]]:
    return [
        {"name": "text", "kind": "likelihood", "file": family.tasks},
        {"name": "choice", "kind": "multiple_choice", "file": family.tasks, "weight": 0.5},
    ]


@pytest.fixture(scope="module")
def run(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("search")
    document = search_config(family, space={"method": "task_arithmetic", "layers_per_group": "all"})
    run_here("search", write_yaml(root / "config.yaml", document), "--out", root / "mine")
    return root / "mine"


def test_importing_it_is_cheap_and_its_names_are_there() -> None:
    done = python(
        "import sys, evojax_merge as em\n"
        "print(*(name for name in ('jax', 'transformers', 'numpy', 'pydantic') if name in sys.modules))\n"
        "assert set(em.__all__) <= set(dir(em))\n"
        "for name in em.__all__: getattr(em, name)\n"
        "from evojax_merge import *\n"
        "try: em.serch\n"
        "except AttributeError as error: print(error)\n"
    )
    assert done.stdout == "\nmodule 'evojax_merge' has no attribute 'serch'\n" and not done.stderr


def test_merge_writes_what_the_command_writes(family: Family, tmp_path: Path, silent: None) -> None:
    out = em.merge(recipe(family), tmp_path / "one")
    assert out == tmp_path / "one"
    write_yaml(
        tmp_path / "recipe.yaml",
        json.loads(json.dumps(recipe(family), default=lambda x: str(x) if isinstance(x, Path) else float(x))),
    )
    other = em.merge(str(tmp_path / "recipe.yaml"), str(tmp_path / "two"), dtype="bfloat16")
    for name, values in state(out).items():
        np.testing.assert_allclose(state(other)[name], values, rtol=1e-2)
    with pytest.raises(em.InputError, match="exists already"):
        em.merge(recipe(family), out)
    assert em.merge(recipe(family), out, overwrite=True, seed=3) == out


def test_a_tilde_is_the_home_folder(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a path is written: shells leave it as it is in quotes, in YAML, and in `--json=~/file`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert em.merge(recipe(family), "~/merged") == tmp_path / "home/merged"
    space = {"method": "task_arithmetic", "layers_per_group": "all"}
    write_yaml(tmp_path / "config.yaml", search_config(family, space=space, out="~/run"))
    run_here("search", "config.yaml", "--heartbeat=~/beat")
    assert (tmp_path / "home/beat").exists() and em.open_run("~/run").finished
    em.open_run("~/run").best.export("~/best")
    models = em.load_models(family.base, family.parents)
    study = em.Study(models, em.MergeSpace(models, "task_arithmetic"), tasks(family), out="~/study")
    assert study.out == tmp_path / "home/study" and not Path("~").exists()


def test_a_recipe_as_a_mapping_starts_in_the_working_directory(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: None
) -> None:
    monkeypatch.chdir(tmp_path)
    models = [{"model": f"models/{parent.name}"} for parent in family.parents]
    (tmp_path / "models").symlink_to(family.root)
    # No file of this name is read.
    out = em.merge({"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}, "recipe")
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({"merge_method": "task_arithmetics"}, {}, "recipe: merge_method: unknown method .* 'task_arithmetic'"),
        ({"dtype": object()}, {}, "recipe: dtype: holds <object object"),
        (
            {"models": [{"model": "zoo:base", "parameters": {"weight": np.nan}}]},
            {},
            "weight: nan; expected a finite number",
        ),
        ({}, {"dtype": "bfloat"}, r"dtype: unknown dtype 'bfloat' \(did you mean 'bfloat16'"),
        ({}, {"seed": -1}, "seed: -1; expected a whole number from 0"),
        ({}, {"seed": True}, "seed: True"),
    ],
)
def test_wrong_merges_raise(
    changes: dict, options: dict, named: str, family: Family, tmp_path: Path, silent: None
) -> None:
    with pytest.raises(em.InputError, match=named):
        em.merge(recipe(family) | changes, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_evaluate_gives_what_the_command_writes(family: Family, run: Path, tmp_path: Path, silent: None) -> None:
    models = [str(family.base), str(run)]
    rows = em.evaluate([family.base, em.open_run(run)], tasks(family))
    assert [row["model"] for row in rows] == models
    write_yaml(tmp_path / "tasks.yaml", {"tasks": [task | {"file": str(task["file"])} for task in tasks(family)]})
    assert em.evaluate(models, tmp_path / "tasks.yaml") == rows
    assert em.evaluate(models[0], {"tasks": tasks(family)}) == rows[:1]
    # One task need not stand in a list.
    [row] = em.evaluate(models[0], tasks(family)[0])
    assert row["scores"] == {"text/log_probability": rows[0]["scores"]["text/log_probability"]}
    # A run stands for its winner.
    assert em.evaluate(run / "best" / "model", tasks(family))[0] == rows[1] | {"model": str(run / "best" / "model")}


def test_revisions_of_folders_are_told(family: Family) -> None:
    base, parents = f"{family.base}@v2", [str(parent) for parent in family.parents]
    config = {"base": base, "parents": parents, "space": {"method": "ties"}, "tasks": tasks(family)[:1]}
    uses = (
        lambda: em.evaluate(base, tasks(family)),
        lambda: em.load_bank([base, family.parents[0]], method="linear"),
        lambda: em.Evaluator(config),
    )
    for use in uses:
        with pytest.warns(UserWarning, match=r"@v2: .*base is a folder here, which has no revisions; v2 is ignored"):
            use()


def test_the_command_evaluates_runs(family: Family, run: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text(f"tasks: [{{name: text, kind: likelihood, file: {family.tasks}}}]")
    arguments = ["evaluate", str(run), "--tasks", str(tmp_path / "tasks.yaml"), "--json", str(tmp_path / "table.json")]
    assert "mine" in run_here(*arguments).stdout
    [row] = read_json(tmp_path / "table.json")
    assert row["model"] == str(run)
    # Of one that has not finished there is no winner.
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    [line] = run_here("evaluate", unfinished, *arguments[2:], status=2).stderr.splitlines()
    assert str(unfinished) in line and "--resume" in line and "--best-so-far" in line


def test_what_the_command_warns_of_is_a_warning(family: Family, tmp_path: Path) -> None:
    record = {"prompt": "w4", "target": "w5"}
    file = write_lines(tmp_path / "twice.jsonl", [record, record])
    with pytest.warns(UserWarning, match="1 of 2 examples repeat others") as caught:
        em.evaluate(family.base, [{"name": "text", "kind": "likelihood", "file": file}])
    assert [Path(one.filename) for one in caught] == [Path(__file__)]
    file = write_lines(tmp_path / "several.jsonl", [{"prompt": f"w{i}", "target": f"{i} 2"} for i in range(4, 6)])
    with pytest.warns(UserWarning, match=r"^evaluate: tasks\[0\].pattern: missing; 2 of 2 targets hold more than one"):
        em.evaluate(family.base, {"name": "numbers", "kind": "exact_match", "file": file, "max_new_tokens": 2})


@pytest.mark.parametrize(
    ("models", "asked", "named"),
    [
        ([], [{}], "models: is empty"),
        ("nowhere", None, "MODELS: nowhere: no such folder"),
        (".", [], "^evaluate: tasks: expected a list of 1"),
        (".", [{"kind": "text"}], r"^evaluate: tasks\[0\].kind: there is no kind"),
        (".", {"kind": "likelihood"}, r"^evaluate: tasks\[0\].name: missing"),
        (".", {"task": []}, "^evaluate: task: unknown key .did you mean 'tasks'"),
        (".", "nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_wrong_evaluations_raise(models: object, asked: object, named: str, family: Family, silent: None) -> None:
    with pytest.raises(em.InputError, match=named):
        em.evaluate(models, tasks(family) if asked is None else asked)


def test_a_run_is_read_back(run: Path, family: Family) -> None:
    found = em.open_run(str(run))
    assert isinstance(found, em.Run) and found == em.Run(run) and found.finished
    assert found.config["space"]["method"] == "task_arithmetic" and found.config["parents"] == [
        *map(str, family.parents)
    ]
    assert [row["generation"] for row in found.history] == [row["generation"] for row in found.timing] == [1, 2]
    assert found.recipe["base_model"] == str(family.base)
    assert [row["role"] for row in found.table] == ["base", "parent", "parent", "uniform", "winner"]
    assert found.result["genome"] and found.model == run / "best" / "model" and found.page == run / "report.html"


def test_a_run_that_has_just_begun(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    found = em.open_run(tmp_path)
    assert (found.history, found.table, found.page, found.finished) == ([], [], None, False)
    assert found.recipe is found.model is found.result is None
    first, second = (run / "history.jsonl").read_text().split("\n")[:2]
    (tmp_path / "history.jsonl").write_text(f"{first}\n{second[:7]}")
    assert found.history == [json.loads(first)]
    (tmp_path / "history.jsonl").unlink()
    for value in (lambda: found.best, found.plot):
        with pytest.raises(em.InputError, match=r"there is no generation yet; Study\.run, .* make them"):
            value()


def test_what_is_no_run(tmp_path: Path) -> None:
    for folder, named in ((tmp_path, "is not a run folder"), (tmp_path / "none", "no such folder")):
        with pytest.raises(em.InputError, match=named):
            em.open_run(folder)


def test_the_bank_is_that_of_a_search(family: Family, silent: None) -> None:
    loaded = em.load_bank(family.parents, family.base, method="dare_ties", rescale="density", seed=3)
    assert loaded.models == (family.base, *family.parents)
    assert loaded.spec.options.rescale == "density" and loaded.spec.seed == 3 and loaded.spec.options.has_base
    norm = np.asarray(loaded.bank.shared["final_norm"].sources)
    for row, folder in zip(norm, loaded.models, strict=True):
        np.testing.assert_array_equal(row, state(folder)["model.norm.weight"])
    constants = em.load_bank(family.parents, family.base, method="della", fixed={"epsilon": 0.1}).spec.constants
    assert constants == (("epsilon", (0.1,)),)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "ties", "base": None}, "base: missing; ties takes task vectors"),
        ({"method": "slerp"}, "base: slerp takes no base"),
        (
            {"method": "della", "fixed": {"epsilom": 0.1}},
            r"fixed.epsilom: della has no such constant \(did you mean 'eps",
        ),
        ({"method": "ties", "fixed": {"density": 0.1}}, "fixed.density: ties has no such constant"),
        ({"method": "ties", "parents": []}, "ties takes at least 1 models besides the base, found 0"),
        ({"method": "ties", "parents": ["nowhere"]}, r"load_bank: parents\[0\]: nowhere: no such folder"),
        ({"method": "ties", "export_dtype": "int8"}, "dtype: unknown dtype 'int8'"),
    ],
)
def test_wrong_banks_raise(options: dict, named: str, family: Family, silent: None) -> None:
    with pytest.raises(em.InputError, match=named):
        em.load_bank(**({"parents": family.parents, "base": family.base} | options))


@thorough
def test_nothing_is_said_of_torch_where_it_is_absent(family: Family) -> None:
    """And it is said to who imports transformers for something else."""
    ours = (
        "from pathlib import Path\n"
        "from evojax_merge.checkpoints.tokens import load_tokenizer\n"
        f"load_tokenizer(Path({str(family.base)!r}))\n"
    )
    for code, said in ((ours, False), ("import evojax_merge, transformers", True)):
        done = python(f"import os; os.environ['TRANSFORMERS_VERBOSITY'] = 'warning'\n{WITHOUT_TORCH}{code}")
        assert done.returncode == 0 and ("PyTorch" in done.stderr) == said


def test_types_are_shipped() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    assert all((ROOT / package / "py.typed").is_file() for package in packages)
