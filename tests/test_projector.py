"""Projectors that are merged with the decoders behind them: scores, exports, gradients, plans, and what is refused."""

from pathlib import Path
from typing import Any

import jax
import pytest
import torch
import yaml
from helpers.commands import command, run_here
from helpers.files import read_json, write_yaml
from helpers.mergekit import assert_same_tensors
from helpers.models import save
from helpers.sampling import sample
from helpers.searches import open_problem, seeing_search
from reference.vision_models import save_seeing, seeing_model
from safetensors.numpy import load_file
from test_vision import _own_cache, heldout_score, write_tasks
from transformers import AutoModelForCausalLM

__all__ = ["_own_cache"]
PROJECTOR = "multi_modal_projector."
STRATEGIES: dict[str, dict[str, Any]] = {
    "cma_es": {"space": {"method": "dare_ties"}},
    "gradient": {"space": {"method": "task_arithmetic"}, "search": {"strategy": "gradient", "generations": 1}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two parents with projectors of their own, of which the second has a tower of its own."""
    folder = tmp_path_factory.mktemp("projectors")
    for seed, (name, noise) in enumerate((("base", 0.0), ("one", 0.0), ("two", 0.05))):
        model = seeing_model("llava")
        for values in model.model.multi_modal_projector.parameters():
            values.data += 0.1 * seed
        save_seeing(model, folder / name, seed, noise)
    write_tasks(folder, "<image>")
    return folder


def search_config(root: Path, folder: Path, **more: Any) -> Path:
    document = seeing_search(root, "paths", {"space": {"method": "task_arithmetic"}})
    parents = [str(root / "one"), str(root / "two")]
    return write_yaml(
        folder / "search.yaml", document | {"parents": parents, "components": {"projector": "merge"}} | more
    )


def test_a_plan_names_the_cost(root: Path, tmp_path: Path) -> None:
    config = search_config(root, tmp_path)
    problem = open_problem(config)
    backend = problem.backend
    _, line = backend.planner().notes
    work, layers = 2 * (16 * 32 + 32 * 32), 2 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 40)
    assert line.startswith("projector: merged, and computed by every candidate: 3.07 kFLOP for each position")
    assert f"{work / layers:.2%} of what the layers take" in line
    # The features are the tower's.
    problem.prepare()
    place = backend.abstract_images("float32", jax.ShapeDtypeStruct)
    assert place.features.shape == (backend.models.vision.tokenizer.rows, 16)


@pytest.mark.parametrize("strategy", sample(STRATEGIES, 1))
def test_a_search_over_projectors_exports_what_it_scored(
    strategy: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = search_config(root, tmp_path, **STRATEGIES[strategy])
    assert command("search", config, "--out", tmp_path / "run") == 0
    # Base and first parent have one tower, whatever their projectors.
    assert "8 encoded by the vision tower, 0 read" in " ".join(capsys.readouterr().out.split())
    written = load_file(tmp_path / "run/best/model/model.safetensors")
    base = load_file(root / "base/model.safetensors")
    merged = [name for name in base if PROJECTOR in name and (written[name] != base[name]).any()]
    assert len(merged) == 4
    tower = [name for name in base if "vision_tower." in name]
    assert tower and all((written[name] == base[name]).all() for name in tower)
    table = read_json(tmp_path / "run/result.json")["table"]
    folders = {"winner": tmp_path / "run/best/model", "base": root / "base"}
    for row in table:
        if row["role"] in ("winner", "base", "parent"):
            folder = folders.get(row["role"], root / row["name"].split("/")[-1])
            (scored,) = row["heldout_scores"].values()
            assert scored == pytest.approx(heldout_score(folder, root), abs=1e-4), row
    # The recipe says all that was merged.
    assert command("merge", tmp_path / "run/best/recipe.yaml", tmp_path / "again") == 0
    again = load_file(tmp_path / "again/model.safetensors")
    assert_same_tensors(written, again)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another component": ({"components": {"tower": "merge"}}, "components: tower: merge; expected projector: merge"),
    "a component of a model": ({"components": {"projector": "one"}}, "components: projector: one; expected projector"),
    "layer paths": ({"space": None, "data_flow": {"moves": 2}}, "projector is merged by a space alone"),
    "an image generator's backend": ({"backend": "function"}, "backend: function opens neither"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, root: Path, tmp_path: Path) -> None:
    changes, expected = REFUSED[case]
    config = search_config(root, tmp_path, **changes)
    if changes.get("space", 0) is None:
        document = yaml.safe_load(config.read_text())
        write_yaml(config, {key: value for key, value in document.items() if value is not None})
    assert expected in " ".join(run_here("search", config, "--out", tmp_path / "run", status=2).stderr.split())


def test_models_without_such_a_projector(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_seeing(seeing_model("idefics3"), tmp_path / "other", 0)
    torch.manual_seed(0)
    save(AutoModelForCausalLM.from_config(seeing_model("llava").config.text_config).float(), tmp_path / "text")
    for name, kind in (("other", "idefics3"), ("text", "llama")):
        config = search_config(root, tmp_path, parents=[str(tmp_path / name), str(root / "one")])
        error = " ".join(run_here("search", config, "--out", tmp_path / "run", status=2).stderr.split())
        assert f"{tmp_path / name}: its projector cannot be merged: model_type is '{kind}'" in error
    recipe = {
        "models": [{"model": str(root / "one")}, {"model": str(root / "two")}], "merge_method": "linear",
        "parameters": {"weight": 0.5}, "components": {"projector": "merge"},
    }  # fmt: skip
    assert command("merge", write_yaml(tmp_path / "recipe.yaml", recipe), tmp_path / "out") == 2
    assert "without other_modules whole models are merged" in " ".join(capsys.readouterr().err.split())
