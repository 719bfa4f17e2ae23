"""The account of a merge's tensors: each stored tensor of each model stands in it, once, with what became of it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from helpers.commands import assert_refused, output_of, run_here
from helpers.families import build_family
from helpers.files import read_json, read_recipe, write_yaml
from helpers.models import random_model, save, tiny_config
from safetensors.numpy import load_file, save_file
from test_families import FAMILIES, SIZES
from test_streaming import TEXT, write_config

from evojax_merge.mergekit.account import TensorFate, account_of
from evojax_merge.mergekit.execute import prepare


def write_recipe(folder: Path, *models: Path, **keys: Any) -> Path:
    entries = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    return write_yaml(folder / "recipe.yaml", {"merge_method": "linear", "models": entries, "dtype": "float32"} | keys)


def account(recipe: Path) -> list[TensorFate]:
    plan = prepare(read_recipe(recipe))
    fates = account_of(plan.recipe.models, plan.sources, plan.rows, plan.copied)
    for model in plan.recipe.models:
        stored = sorted(name for file in Path(model).glob("*.safetensors") for name in load_file(file))
        assert sorted(fate.tensor for fate in fates if fate.model == model and fate.fate != "made") == stored
    return fates


def add_tensors(model: Path, tensors: dict[str, np.ndarray]) -> None:
    file = model / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    first, second = (save(random_model(tiny_config(tie_word_embeddings=True), i), tmp_path / f"m{i}") for i in (0, 1))
    return first, second


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_stored_tensor_of_each_family_is_merged(kind: str, tmp_path: Path) -> None:
    row = FAMILIES[kind]
    config = getattr(transformers, row.config)(**(SIZES | row.changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    first, second = (tmp_path / "first", tmp_path / "second")
    model.save_pretrained(first)
    model.save_pretrained(second)
    assert {fate.fate for fate in account(write_recipe(tmp_path, first, second))} == {"merged"}


def test_a_tensor_that_is_not_merged_has_its_reason(models: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = models
    head, table, value_head = "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.weight"
    embedding = load_file(second / "model.safetensors")["model.embed_tokens.weight"]
    add_tensors(second, {head: embedding, table: np.ones(4, np.float32), value_head: np.ones((1, 4), np.float32)})
    fates = {fate.tensor: fate.fate for fate in account(write_recipe(tmp_path, first, second)) if fate.fate != "merged"}
    assert fates == {head: "tied", table: "computed", value_head: "left out"}


def test_a_head_that_is_untied_is_made_of_the_embedding(models: tuple[Path, Path], tmp_path: Path) -> None:
    untied = save(random_model(tiny_config(tie_word_embeddings=False), 2), tmp_path / "untied")
    fates = [fate for fate in account(write_recipe(tmp_path, models[0], untied)) if fate.fate != "merged"]
    assert fates == [TensorFate(str(models[0]), "lm_head.weight", "made", "a head of the embedding")]


def test_layers_that_no_slice_takes_are_unused(models: tuple[Path, Path], tmp_path: Path) -> None:
    layers = tiny_config().num_hidden_layers
    ranges = [[0, layers - 1], [layers - 1, layers]]
    slices = [
        {"sources": [{"model": str(model), "layer_range": part}]} for model, part in zip(models, ranges, strict=True)
    ]
    recipe = write_yaml(tmp_path / "path.yaml", {"merge_method": "passthrough", "slices": slices, "dtype": "float32"})
    fates = Counter((fate.model, fate.fate, fate.reason) for fate in account(recipe))
    each = len([name for name in load_file(models[0] / "model.safetensors") if ".layers.0." in name])
    assert fates[str(models[0]), "unused", "no slice takes its layer"] == each
    assert fates[str(models[1]), "unused", "no slice takes its layer"] == (layers - 1) * each
    assert fates[str(models[1]), "unused", "the recipe takes other models'"] == 1


def test_heads_for_several_tokens_of_one_model_are_kept(tmp_path: Path) -> None:
    row = FAMILIES["qwen3_5_text"]
    family = build_family(tmp_path, transformers.Qwen3_5TextConfig(**(SIZES | row.changes)), 2)
    name, values = "mtp.fc.weight", np.arange(6, dtype=np.float32).reshape(2, 3)
    add_tensors(family.parents[1], {name: values})
    recipe = write_recipe(tmp_path, *family.parents)
    assert [(fate.fate, fate.tensor) for fate in account(recipe) if fate.fate != "merged"] == [("kept", name)]
    run_here("merge", recipe, tmp_path / "out", "--strict")
    np.testing.assert_array_equal(load_file(tmp_path / "out/model.safetensors")[name], values)


def test_merge_tells_what_becomes_of_tensors_and_refuses_losses(models: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, stored = write_recipe(tmp_path, *models), len(load_file(models[0] / "model.safetensors"))
    printed = output_of("merge", recipe, tmp_path / "out", "--strict")
    assert f"tensors of 2 models: all {2 * stored} merged" in printed
    assert f"| m0 | merged | {stored} |" in (tmp_path / "out/README.md").read_text()
    add_tensors(models[1], {"v_head.weight": np.ones((1, 4), np.float32)})
    printed = output_of("merge", recipe, tmp_path / "out", "--overwrite", "--verbose")
    assert "left out (v_head.weight: not all models have it)" in printed.replace("\n", " ")
    assert printed.count("model.layers.0.mlp.up_proj.weight") == 2
    assert_refused(["v_head.weight", "left out", "on_mismatch"], "merge", recipe, tmp_path / "strict", "--strict")
    assert not (tmp_path / "strict").exists()


def test_a_search_keeps_the_account_in_its_result_and_card(tmp_path: Path) -> None:
    row = FAMILIES["qwen3_5_text"]
    family = build_family(tmp_path, transformers.Qwen3_5TextConfig(**(SIZES | row.changes)), 2)
    add_tensors(family.base, {"mtp.fc.weight": np.ones((2, 3), np.float32)})
    value_head = {"v_head.summary.weight": np.ones((1, 4), np.float32), "v_head.summary.bias": np.ones(1, np.float32)}
    add_tensors(family.parents[1], value_head)
    path = write_config(family.root, tasks=[TEXT | {"weight": 1}], search={"generations": 1, "population": 2})
    run_here("search", path, "--out", tmp_path / "run")
    fates = read_json(tmp_path / "run/result.json")["tensors"]
    counts = {(fate["model"], fate["fate"]): fate["count"] for fate in fates}
    stored = {folder: len(load_file(folder / "model.safetensors")) for folder in (family.base, *family.parents)}
    stored[family.parents[1]] -= len(value_head)
    others = {(family.base.name, "merged"): stored[family.base] - 1, (family.base.name, "kept"): 1}
    others[family.parents[1].name, "left out"] = len(value_head)
    assert counts == others | {(parent.name, "merged"): stored[parent] for parent in family.parents}
    assert f"{family.parents[1].name}: its value head (v_head) is left out" in (tmp_path / "run/run.log").read_text()
    assert [fate["tensors"] for fate in fates if fate["fate"] == "kept"] == [["mtp.fc.weight"]]
    assert "## Tensors" in (tmp_path / "run/best/model/README.md").read_text()
    assert "1 of base kept" in output_of("plan", path).replace("\n", " ")
