"""Wrong input: exit status 2, one line on stderr that names the file, the key and what was expected, nothing written.

Most cases call the command line in this process; a few run it as a user does.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.commands import command, refusal
from helpers.families import Family, build_family
from helpers.files import edit_json, write_lines
from helpers.models import finetune, load_torch, random_model, save, state, tiny_config, words
from helpers.sampling import sample, thorough
from hostile import changing, recipe, run_command, run_python
from hostile import config as search_config
from safetensors.torch import load_file, save_file

from evojax_merge.errors import InputError

Change = Callable[[Path], Any]


@pytest.fixture
def models(family: Family, tmp_path: Path) -> Path:
    """A folder of one's own with `base`, `one`, `two`, `tasks.jsonl`, a recipe and a config that are right."""
    root = tmp_path / "models"
    for name, path in zip(("base", "one", "two"), (family.base, *family.parents), strict=True):
        shutil.copytree(path, root / name)
    shutil.copyfile(family.tasks, root / "tasks.jsonl")
    write(root / "recipe.yaml", recipe())
    write(root / "config.yaml", search_config())
    return root


def write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False))
    return path


def one_model(**parameters: Any) -> dict[str, Any]:
    return recipe(models=[{"model": "one", "parameters": parameters}])


def contents(folder: Path) -> set[str]:
    """Every file and folder below, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


Refusal = Callable[..., str]


def one_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    assert stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("error: ")
    return stderr.removeprefix("error: ").strip()


@pytest.fixture
def refused(tmp_path: Path) -> Refusal:
    """Runs a command that has to be refused, and gives the one line that it says, which contains all texts."""

    def call(*arguments: object, says: Iterable[object] = ()) -> str:
        before, line = contents(tmp_path), refusal(*arguments)
        # Neither an output nor a temporary file is left.
        assert contents(tmp_path) == before
        assert all(str(text) in line for text in says), line
        return line

    return call


# ---------------------------------------------------------------------------------------------------------------
# Recipes. The change, and what the line has to say.

RECIPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "an unknown method": (recipe(merge_method="dare_tie"), ("merge_method", "dare_tie", "'dare_ties'")),
    "a method far from any": (recipe(merge_method="xyz"), ("xyz", "linear", "slerp", "task_arithmetic")),
    "no method": ({"base_model": "base", "models": recipe()["models"]}, ("merge_method",)),
    "a density of DARE below 0": (
        one_model(weight=1, density=-0.1) | {"merge_method": "dare_ties"}, ("density", "-0.1", "[0, 1]"),
    ),
    "a weight that is no number": (one_model(weight="much"), ("weight", "much", "number")),
    "a weight that is not finite": (one_model(weight=float("nan")), ("weight", "nan")),
    "no weight": (recipe(models=[{"model": "one"}, {"model": "two"}]), ("weight", "missing", "one")),
    "no base": ({"merge_method": "ties", "models": recipe()["models"]}, ("ties", "base_model")),
    "a slip for a parameter that is needed": (
        one_model(wieght=1), ("weight: missing for", "(models[0].parameters.wieght: did you mean 'weight'?)"),
    ),
    "a parameter outside of parameters": (
        recipe(models=[{"model": "one", "weight": 1}, {"model": "two"}]),
        ("weight: missing for", "(models[0].weight: did you mean 'parameters.weight'?)"),
    ),
    "a slip for the base": (
        {"merge_method": "ties", "base_modle": "base", "models": recipe()["models"]},
        ("ties", "(base_modle: did you mean 'base_model'?)"),
    ),
    "a slip for the models": (
        {"merge_method": "linear", "modells": recipe()["models"]}, ("models", "(modells: did you mean 'models'?)"),
    ),
    "three models of slerp": (
        recipe(merge_method="slerp", models=[{"model": m} for m in ("one", "two")], parameters={"t": 0.5}),
        ("slerp", "2", "3"),
    ),
    "models and slices": (recipe(slices=[{}]), ("models", "slices")),
    "no models": (recipe(models=[]), ("models", "empty")),
    "a model without a name": (recipe(models=[{"parameters": {"weight": 1}}]), ("models[0]", "model", "missing")),
    "a model that is not there": (recipe(base_model="./three"), ("./three", "no such folder")),
    "an unknown dtype": (recipe(dtype="float8"), ("dtype", "float8", "bfloat16")),
    "a switch that is none": (recipe(parameters={"normalize": "maybe"}), ("normalize", "maybe", "true or false")),
    "a mismatch that is none": (recipe(on_mismatch="drop"), ("on_mismatch", "'drop'", "refuse, first, skip")),
    "a config of mergekit-moe": (
        {"base_model": "base", "gate_mode": "hidden", "experts": []}, ("mergekit-moe", "evojax-merge moe"),
    ),
    "a recipe of mergekit-moe": (
        {"merge_method": "moe", "base_model": "base", "gate_mode": "hidden", "experts": []},
        ("mergekit-moe", "evojax-merge moe"),
    ),
    "a moe recipe without experts": (recipe(merge_method="moe"), ("mergekit-moe", "evojax-merge moe")),
    "an unknown method of experts": (recipe(merge_method="clown", experts=[]), ("mergekit-moe", "evojax-merge moe")),
    "a config of bakllama": ({"layer_slices": [{"model": "one", "start": 0, "end": 1}]}, ("bakllama", "passthrough")),
    "a config of mergekit-evolve": ({"genome": {}, "tasks": []}, ("mergekit-evolve", "evojax-merge search")),
    "an adapter that is not there": (recipe(base_model="base+adapter"), ("base+adapter", "adapter: no such folder")),
    "two tokenizers": (recipe(tokenizer_source="union", tokenizer={}), ("tokenizer_source", "tokenizer")),
    "a tokenizer that is not there": (recipe(tokenizer_source="./words"), ("recipe.yaml: tokenizer_source: ./words",)),
    "a tokenizer that is not there, in a section": (
        recipe(tokenizer={"source": "./words"}), ("recipe.yaml: tokenizer.source: ./words",),
    ),
    "a t of a model": (
        {"merge_method": "slerp", "base_model": "one", "models": [
            {"model": "one"}, {"model": "two", "parameters": {"t": 0.5}},
        ]},
        ("t: missing for the merge", "parameters of the recipe or of a slice (models[1].parameters.t: ignored, all "
         "models share one t)"),
    ),
    "a token of nowhere": (
        recipe(tokenizer={"tokens": {"w9": {"source": "three"}}}), ("tokenizer.tokens.w9", "three"),
    ),
    "tokenizer of another model": (recipe(tokenizer_source="three"), ("tokenizer_source", "three")),
    "layers that the model does not have": (
        {
            "merge_method": "linear",
            "slices": [{"sources": [{"model": "one", "layer_range": [1, 5], "parameters": {"weight": 1}}]}],
        },
        ("slices[0].sources[0]: layer_range [1, 5] goes to layer 4, but one has no layer 3: it has layers 0 to 2",),
    ),
    "layers in the wrong order": (
        {"merge_method": "linear", "slices": [{"sources": [{"model": "one", "layer_range": [2, 1]}]}]},
        ("layer_range", "[2, 1]"),
    ),
    "slices of unlike length": (
        {
            "merge_method": "linear",
            "slices": [{"sources": [{"model": m, "layer_range": [0, n]} for m, n in (("one", 2), ("two", 3))]}],
        },
        ("slices[0]", "layer_range", "length"),
    ),
    "text that is not YAML": ("merge_method: ties\nmodels: [one\nbase_model: base\n", (":3", "YAML")),
    "an empty file": ("", ("mapping",)),
    "a list": ("- ties\n", ("mapping", "list")),
}  # fmt: skip


# What mergekit passes over or reads as something else, and is refused with --strict.
UNUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "an unknown key": (recipe(merge_metod="ties"), ("merge_metod", "'merge_method'")),
    "an unknown parameter": (recipe(parameters={"densitty": 0.5}), ("parameters", "densitty", "'density'")),
    "an unknown parameter of a model": (
        one_model(weight=1, weigth=1), ("models[0].parameters", "weigth", "'weight'"),
    ),
    "a density above 1": (one_model(weight=1, density=1.5), ("density", "1.5", "[0, 1]")),
    "a density below 0": (one_model(weight=1, density=-0.1), ("density", "-0.1", "[0, 1]")),
    "a chat template that is not one": (recipe(chat_template="vicuna"), ("chat_template", "vicuna", "chatml")),
}  # fmt: skip


@pytest.mark.parametrize("case", sample([*RECIPES, *UNUSED], 15))
def test_wrong_recipes(case: str, models: Path, refused: Refusal) -> None:
    document, named = (RECIPES | UNUSED)[case]
    path = write(models / "recipe.yaml", document)
    refused("merge", path, models / "out", *(["--strict"] if case in UNUSED else []), says=(path, *named))


def test_recipe_that_is_not_there(models: Path, refused: Refusal) -> None:
    refused("merge", models / "nothing.yaml", models / "out", says=("nothing.yaml", "no such file"))


# ---------------------------------------------------------------------------------------------------------------
# Model folders


Tensors = dict[str, Any]
UP, QUERIES, DOWN = (f"model.layers.{name}" for name in ("1.mlp.up_proj", "0.self_attn.q_proj", "2.mlp.down_proj"))


def sharded(folder: Path, change: Callable[[Path], object]) -> None:
    model = load_torch(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    change(folder)


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def cut(file: Path, end: int) -> None:
    file.write_bytes(file.read_bytes()[:end])


def wrong_index(folder: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        files = sorted(set(content["weight_map"].values()))
        at = files.index(content["weight_map"]["model.norm.weight"])
        content["weight_map"]["model.norm.weight"] = files[at - 1]

    edit_json(folder / INDEX, swap)


@changing
def with_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | change(tensors), folder / "model.safetensors", {"format": "pt"})


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{UP}.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def not_a_number(tensors: Tensors) -> Tensors:
    tensors[f"{DOWN}.weight"][3, 4] = float("nan")
    return {}


INDEX = "model.safetensors.index.json"
# What makes another folder of parent `one`; what it was is gone.
DAMAGES: dict[str, Change] = {
    "a missing shard": lambda folder: sharded(folder, lambda own: second_shard(own).unlink()),
    "a truncated shard": lambda folder: sharded(folder, lambda own: cut(second_shard(own), -10)),
    "an index that points outside": lambda folder: sharded(folder, lambda own: edit_json(own / INDEX, lambda content:
        content["weight_map"].update({"model.norm.weight": "../two/model.safetensors"}))),
    "an index that is wrong": lambda folder: sharded(folder, wrong_index),
    "an index that is none": lambda folder: sharded(folder, lambda own: (own / INDEX).write_text("{}")),
    "pickles only": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "a header cut short": lambda folder: cut(folder / "model.safetensors", 2000),
    "data cut short": lambda folder: cut(folder / "model.safetensors", -1),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "something else": lambda folder: (folder / "model.safetensors").write_bytes(
        (8).to_bytes(8, "little") + b"nonsense" * 9
    ),
    "a tensor too few": without_a_tensor,
    "a tensor too many": with_tensors(lambda tensors: {f"{QUERIES}.bias": tensors["model.norm.weight"].clone()}),
    "a tensor of another shape": with_tensors(lambda tensors: {f"{UP}.weight": tensors[f"{UP}.weight"][:-3].clone()}),
    "NaN": with_tensors(not_a_number),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "a config that is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "an attribute that is not handled": lambda folder: edit_json(
        folder / "config.json", lambda config: config.update(logit_scale=2.0)
    ),
    "a tokenizer that is not JSON": lambda folder: (folder / "tokenizer.json").write_text("{"),
}  # fmt: skip
FOLDERS: dict[str, tuple[str, ...]] = {
    "a missing shard": ("model.safetensors.index.json", "model-00002", "missing"),
    "a truncated shard": ("model-00002", "truncated", "expected"),
    "an index that points outside": ("model.safetensors.index.json", "../two/model.safetensors", "outside"),
    "an index that is wrong": ("model.safetensors.index.json", "model.norm.weight"),
    "an index that is none": ("model.safetensors.index.json", "weight_map"),
    "pickles only": ("pickle", "save_pretrained"),
    "a header cut short": ("model.safetensors", "truncated"),
    "data cut short": ("model.safetensors", "truncated", "expected"),
    "no weights": ("holds no model.safetensors",),
    "something else": ("model.safetensors", "not a safetensors file"),
    "a tensor too few": ("model.layers.1.mlp.up_proj.weight",),
    "a tensor too many": ("model.layers.0.self_attn.q_proj.bias",),
    "a tensor of another shape": ("model.layers.1.mlp.up_proj.weight", "[77, 48]", "[80, 48]"),
    "NaN": ("model.layers.2.mlp.down_proj.weight", "NaN", "--allow-nonfinite"),
    "no config": ("config.json",),
    "a config that is not JSON": ("config.json", "JSON"),
    "an attribute that is not handled": ("config.json", "logit_scale"),
    "a tokenizer that is not JSON": ("tokenizer",),
}


@pytest.mark.parametrize("case", sample(FOLDERS, 8))
def test_wrong_model_folders(case: str, models: Path, refused: Refusal) -> None:
    DAMAGES[case](models / "one")
    refused("merge", models / "recipe.yaml", models / "out", "--strict", says=(models / "one", *FOLDERS[case]))


@pytest.mark.parametrize(
    "case", sample(["a missing shard", "pickles only", "a tensor of another shape", "no config"], 2)
)
def test_wrong_model_folders_in_a_search(case: str, models: Path, refused: Refusal) -> None:
    DAMAGES[case](models / "one")
    refused("search", models / "config.yaml", "--out", models / "run", says=(models / "one", *FOLDERS[case]))


def test_parents_of_different_sizes_name_the_first_tensor_and_both_shapes(models: Path, refused: Refusal) -> None:
    shutil.rmtree(models / "two")
    config = tiny_config(intermediate_size=96, tie_word_embeddings=True)
    save(random_model(config), models / "two")
    for arguments in (
        ["merge", models / "recipe.yaml", models / "out"],
        ["search", models / "config.yaml", "--out", models / "run"],
    ):
        line = refused(*arguments)
        assert str(models / "two") in line
        assert str(models / "base") in line
        assert "model.layers.0.mlp." in line
        assert "[96, 48]" in line or "[48, 96]" in line
        assert "[80, 48]" in line or "[48, 80]" in line
        assert "models of different widths cannot be merged" in line and "evojax-merge inspect" in line


def test_parents_of_different_vocabularies_or_depths(models: Path, refused: Refusal) -> None:
    for changes, expected in (
        ({"vocab_size": 70}, ("model.embed_tokens.weight", "[70, 48]", "[64, 48]")),
        ({"num_hidden_layers": 2}, ("2 layers",)),
        ({"num_hidden_layers": 4}, ("4 layers",)),
    ):
        shutil.rmtree(models / "two")
        save(random_model(tiny_config(tie_word_embeddings=True, **changes)), models / "two")
        refused("merge", models / "recipe.yaml", models / "out", says=("two", *expected))


def test_parents_of_different_architectures(models: Path, refused: Refusal) -> None:
    shutil.rmtree(models / "two")
    save(random_model(tiny_config("qwen2", tie_word_embeddings=True)), models / "two")
    for arguments in (
        ["merge", models / "recipe.yaml", models / "out"],
        ["search", models / "config.yaml", "--out", models / "run"],
    ):
        refused(*arguments, says=(models / "two" / "config.json", "'qwen2'", "'llama'"))


def test_many_tokens_that_a_parent_lacks(models: Path, refused: Refusal) -> None:
    """A single merge fills them in, as mergekit does; a search takes few rows of one model for those of another."""
    other = [*words()[:-8], *(f"only-here-{i}" for i in range(8))]
    shutil.rmtree(models / "two")
    save(finetune(load_torch(models / "base"), 2), models / "two", other)
    write(models / "config.yaml", search_config(tokenizer_source="two"))
    says = ("lacks 8 of the 64 tokens", "only-here-0", "approximate: omp")
    refused("search", models / "config.yaml", "--out", models / "run", says=says)


def test_nan_is_merged_when_it_is_allowed(models: Path) -> None:
    DAMAGES["NaN"](models / "one")
    rows = [{"model": name, "parameters": {"weight": 0.5}} for name in ("one", "two")]
    write(models / "recipe.yaml", {"merge_method": "linear", "models": rows})
    assert command("merge", models / "recipe.yaml", models / "out", "--allow-nonfinite") == 0
    merged = state(models / "out")["model.layers.2.mlp.down_proj.weight"]
    assert np.isnan(merged[3, 4])
    assert np.isfinite(np.delete(merged.ravel(), 3 * merged.shape[1] + 4)).all()


# ---------------------------------------------------------------------------------------------------------------
# Configs of a search


def space(**changes: Any) -> dict[str, Any]:
    return search_config(space=search_config()["space"] | changes)


def task(**changes: Any) -> dict[str, Any]:
    return search_config(tasks=[search_config()["tasks"][0] | changes])


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in search_config().items() if name != key}


CONFIGS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "an unknown key": (search_config(parent=["one"]), ("parent:", "'parents'")),
    "an unknown key of a section": (search_config(search={"generation": 3}), ("search.generation", "'generations'")),
    "an unknown key of a task": (task(promt="{prompt}"), ("tasks[0].promt", "'prompt'")),
    "an unknown method": (space(method="tiess"), ("space.method", "tiess", "'ties'")),
    "an unknown kind of task": (task(kind="likelyhood"), ("tasks[0].kind", "likelyhood", "likelihood")),
    "no parents": (without("parents"), ("parents", "missing")),
    "a slip for a key that is needed": (without("parents") | {"parent": ["one"]}, ("parent: unknown key", "'parents'")),
    "a slip for a key that a section needs": (
        search_config(space={"mehtod": "ties"}), ("space.mehtod: unknown key", "'method'"),
    ),
    "a slip for the kind of a task": (
        search_config(tasks=[{"name": "a", "file": "a.jsonl", "knid": "likelihood"}]),
        ("tasks[0].knid: unknown key", "'kind'"),
    ),
    "a slip for a task of lm-eval": (
        search_config(tasks=[{"lm_evla": "arc_easy"}]), ("tasks[0].lm_evla: unknown key", "'lm_eval'"),
    ),
    "an empty list of parents": (search_config(parents=[]), ("parents",)),
    "no tasks": (without("tasks"), ("tasks", "missing")),
    "text for a number": (search_config(search={"generations": "many"}), ("generations", "whole number", "many")),
    "no generation": (search_config(search={"generations": 0}), ("search.generations", "1", "0")),
    "a negative seed": (search_config(seed=-1), ("seed", "-1")),
    "no base for task vectors": (without("base"), ("base", "ties")),
    "an unknown parameter": (space(parameters={"weights": {}}), ("space", "parameters.weights", "'weight'")),
    "a parameter of another method": (space(parameters={"t": {}}), ("parameters.t", "ties")),
    "a density above 1": (space(parameters={"density": {"high": 1.2}}), ("parameters.density", "1.2", "[0, 1]")),
    "a fixed density above 1": (
        space(parameters={"weight": {}}, fixed={"density": 1.2}), ("fixed", "density", "1.2", "[0, 1]"),
    ),
    "bounds in the wrong order": (
        space(parameters={"weight": {"low": 1, "high": 0}}), ("parameters.weight", "low", "high"),
    ),
    "a start outside the bounds": (
        space(parameters={"weight": {"start": 3}}), ("parameters.weight", "start", "[0, 1]"),
    ),
    "too many starts": (space(parameters={"weight": {"start": [0.1, 0.2, 0.3]}}), ("weight", "3 numbers", "1 or 2")),
    "nothing left to search": (space(method="linear", parameters={}, fixed={"weight": 1}), ("fixed", "weight")),
    "searched and fixed": (space(fixed={"weight": 0.5}), ("weight", "searched and fixed")),
    "components that are none": (space(components=["attention", "mlp"]), ("components", "norm")),
    "a metric of another kind": (task(metric="accuracy"), ("tasks[0]", "metric", "accuracy", "log_probability")),
    "a pattern that is none": (
        task(kind="exact_match", pattern="("), ("tasks[0]", "pattern", "'('", "regular expression"),
    ),
    "a temperature below 0": (task(kind="exact_match", temperature=-0.5), ("tasks[0].temperature", "0.001", "-0.5")),
    "no token to draw from": (
        task(kind="exact_match", temperature=1, top_p=0), ("tasks[0].top_p", "above 0", "found 0"),
    ),
    "more samples than sensible": (
        task(kind="exact_match", temperature=1, samples=100_000), ("tasks[0].samples", "1,024", "100000"),
    ),
    "greedy samples": (task(kind="exact_match", samples=4), ("tasks[0]", "samples", "temperature, above 0")),
    "a length of nothing": (task(metric="length"), ("tasks[0]", "length", "likelihood", "generates nothing")),
    "two tasks of one name": (search_config(tasks=search_config()["tasks"] * 2), ("tasks", "names")),
    "no weight anywhere": (task(weight=0), ("tasks", "weight")),
    "a task file that is not there": (task(file="nothing.jsonl"), ("tasks[0].file", "nothing.jsonl", "no such file")),
    "a held-out file that is not there": (task(heldout="nothing.jsonl"), ("tasks[0].heldout", "nothing.jsonl")),
    "a parent that is not there": (
        search_config(parents=["one", "./three"]), ("parents[1]", "./three", "no such folder"),
    ),
    "another tokenizer_source": (
        search_config(tokenizer_source="three/four/five"), ("tokenizer_source", "three/four/five"),
    ),
    "a model that the zoo has not": (search_config(base="zoo:basis"), ("base", "zoo:basis", "'zoo:base'")),
    "a kind of task that is none": (task(kind="exactmatch"), ("tasks[0].kind", "'exactmatch'", "'exact_match'")),
    "a start without a meaning": (
        space(parameters={"density": {"start": 3}}), ("parameters.density: start [3.0]", "[0, 1]"),
    ),
    "text that is not YAML": ("base: base\nparents: [one\nspace: {}\n", (":3", "YAML")),
    "an empty file": ("", ("mapping",)),
}  # fmt: skip


@pytest.mark.parametrize("case", sample(CONFIGS, 15))
def test_wrong_configs(case: str, models: Path, refused: Refusal) -> None:
    document, named = CONFIGS[case]
    path = write(models / "config.yaml", document)
    refused("search", path, "--out", models / "run", says=(path, *named))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("search.sigma", ("--set", "key.path=value")),
        ("search.sigma=wide", ("--set search.sigma=wide: expected a number", "found 'wide'")),
        ("search.sgima=0.2", ("--set search.sgima=0.2: unknown key", "'sigma'")),
        ("serch.sigma=0.2", ("--set serch.sigma=0.2: serch: unknown key", "'search'")),
        ("search={sigma: wide}", ("--set search={sigma: wide}: sigma: expected a number",)),
        ("parents.0=tow", ("--set parents.0=tow: tow: no such folder",)),
        ("tasks.0.file=tasks.json", ("--set tasks.0.file=tasks.json: tasks.json: no such file",)),
        ("data_flow.scales=matrix", ("--set data_flow.scales=matrix: the form moves has block, none",)),
        ("space.method=tiez", ("--set space.method=tiez: unknown method 'tiez'", "'ties'")),
        ("space.parameters.weight.low=9", ("--set space.parameters.weight.low=9: ", "low 9 is not below")),
        ("parents.7=one", ("--set", "parents.7")),
        ("tasks.0.weight.more=1", ("--set", "tasks.0.weight.more")),
        ("seed=[1", ("--set", "seed", "YAML")),
    ],
)
def test_wrong_overrides(override: str, named: tuple[str, ...], models: Path, refused: Refusal) -> None:
    # A key that may not be set is one that stands in the file.
    write(models / "config.yaml", task(weight=1.0))
    refused("search", models / "config.yaml", "--out", models / "run", "--set", override, says=named)


TASK_FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "an empty file": ("", ("holds no example",)),
    "blank lines only": ("\n  \n", ("holds no example",)),
    "a line that is not JSON": ('{"prompt": "w4", "target": "w5"}\n{"prompt": "w4"\n', (":2", "JSON")),
    "a line that is no object": ('{"prompt": "w4", "target": "w5"}\n\n[1, 2]\n', (":3", "object", "list")),
    "a field that is not there": ('{"prompt": "w4", "goal": "w5"}\n', (":1", "target", "goal")),
    "an empty target": ('{"prompt": "w4", "target": ""}\n', (":1", "target", "empty")),
    "one example alone": ('{"prompt": "w4", "target": "w5"}\n', ("held-out",)),
    "an example beyond the context": (
        '{"prompt": "w4", "target": "w5"}\n' * 2 + json.dumps({"prompt": "w4 " * 300, "target": "w5"}) + "\n",
        (":3", "301", "256"),
    ),
}


@pytest.mark.parametrize("case", sample(TASK_FILES, 8))
def test_wrong_task_files(case: str, models: Path, refused: Refusal) -> None:
    text, named = TASK_FILES[case]
    (models / "tasks.jsonl").write_text(text)
    refused("search", models / "config.yaml", "--out", models / "run", says=(models / "tasks.jsonl", *named))


def test_task_file_that_is_not_text(models: Path, refused: Refusal) -> None:
    (models / "tasks.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n')
    refused("search", models / "config.yaml", "--out", models / "run", says=(models / "tasks.jsonl", "UTF-8"))


def test_parents_without_a_tokenizer(models: Path, refused: Refusal) -> None:
    for name in ("base", "one", "two"):
        for file in (models / name).glob("tokenizer*"):
            file.unlink()
    refused("search", models / "config.yaml", "--out", models / "run", says=("tokenizer", models / "base"))


# ---------------------------------------------------------------------------------------------------------------
# Places to write to


def test_existing_folder_is_not_overwritten_unasked(models: Path, refused: Refusal) -> None:
    out = models / "out"
    out.mkdir()
    (out / "file").write_text("mine")
    line = refused("merge", models / "recipe.yaml", out, says=(out,))
    # It would not replace a file that the program did not write.
    assert "which evojax-merge did not write" in line and "--overwrite" not in line
    assert (out / "file").read_text() == "mine"
    # A merge that fails with --overwrite keeps what was there.
    DAMAGES["NaN"](models / "one")
    refused("merge", models / "recipe.yaml", out, "--overwrite")
    assert (out / "file").read_text() == "mine"


def test_places_below_or_at_a_file(models: Path, refused: Refusal) -> None:
    file = models / "tasks.jsonl"
    for arguments in (
        ["merge", models / "recipe.yaml", file / "out"],
        ["merge", models / "recipe.yaml", file, "--overwrite"],
        ["search", models / "config.yaml", "--out", file],
        ["search", models / "config.yaml", "--out", file / "run"],
        ["export", file, models / "out"],
        ["export", models / "base", models / "out"],
    ):
        line = refused(*arguments)
        assert str(file) in line or arguments[0] == "export"


def test_run_folder_of_another_config(models: Path, refused: Refusal) -> None:
    from evojax_merge.problem import build_problem, read_config, resolved_document
    from evojax_merge.search.run_folder import open_run

    path, out = models / "config.yaml", models / "run"
    config = read_config(path, [], None)
    document = resolved_document(config, build_problem(path, config))
    open_run(out, document, resume=False, overwrite=False)
    for override, differing in (
        ("seed=4", "seed"),
        ("search.sigma=0.3", "search.sigma"),
        ("parents=[two, one]", "parents"),
    ):
        refused("search", path, "--out", out, "--resume", "--set", override, says=(out / "config.yaml", differing))
    # A run without a generation gives way to the next one.
    (out / "history.jsonl").write_text('{"generation": 1}\n')
    refused("search", path, "--out", out, says=(out, "--resume"))
    # An input that changed under its name is another config too.
    write_lines(models / "tasks.jsonl", [{"prompt": "w4", "target": f"w{i}"} for i in range(5, 10)])
    assert "tasks.jsonl" in refused("search", path, "--out", out, "--resume")


def test_resume_and_overwrite_together(models: Path, refused: Refusal) -> None:
    both = ("--resume", "--overwrite")
    refused("search", models / "config.yaml", "--out", models / "run", *both, says=both)


@pytest.mark.parametrize(
    "arguments",
    [
        ["serach"], ["merge"], ["merge", "recipe.yaml", "out", "--dtypo", "float32"],
        ["merge", "recipe.yaml", "out", "--dtype", "float8"], ["merge", "recipe.yaml", "out", "--seed", "-1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_arguments(arguments: list[str], refused: Refusal) -> None:
    refused(*arguments)


# ---------------------------------------------------------------------------------------------------------------
# The evaluate command


def test_wrong_evaluations(models: Path, refused: Refusal) -> None:
    tasks = write(models / "tasks.yaml", {"tasks": search_config()["tasks"]})
    assert "./three" in refused("evaluate", "./three", "--tasks", tasks)
    assert "nothing.yaml" in refused("evaluate", models / "one", "--tasks", models / "nothing.yaml")
    write(tasks, {"tasks": [], "space": None} | {"tasks": search_config()["tasks"], "metric": "accuracy"})
    assert str(tasks) in refused("evaluate", models / "one", "--tasks", tasks)
    write(tasks, {"tassk": []})
    refused("evaluate", models / "one", "--tasks", tasks, says=(tasks,))


def test_files_take_the_place_of_their_like_alone(tmp_path: Path) -> None:
    from evojax_merge.steps.stored_models import is_samples_file, is_score_table
    from evojax_merge.system.file_system import OutputFile, check_outputs

    file = tmp_path / "scores.json"
    row = {"model": "one", "fitness": None, "scores": {"text/accuracy": 0.5}}
    sample = {"model": "one", "task": "text", "example": "text.jsonl:1", "outputs": [], "score": 1.0, "scores": {}}
    others = ("{}", "[]", "mine", "[1]", json.dumps([row, row | {"note": 1}]), "[" * 9999, '{"prompt": "text"}\n')
    for option, is_own, like in (
        ("--json", is_score_table, json.dumps([row])),
        ("--samples", is_samples_file, 2 * (json.dumps(sample) + "\n")),
    ):
        output = OutputFile(file, option, "holds no scores", is_own)
        for text in ("", like):
            file.write_text(text)
            check_outputs([output, None], {})
        for text in others:
            file.write_text(text)
            with pytest.raises(InputError, match=rf"scores\.json: {option}: exists"):
                check_outputs([output], {})
        # Somebody else may write the file while the command works.
        file.write_text("mine")
        with pytest.raises(InputError, match=r"scores\.json: exists"):
            output.write(like)
        assert file.read_text() == "mine"
    assert contents(tmp_path) == {"scores.json"}


# ---------------------------------------------------------------------------------------------------------------
# As a user runs it


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@thorough
def test_processes_say_one_line_and_exit_with_2(models: Path, tmp_path: Path) -> None:
    DAMAGES["NaN"](models / "two")
    before = contents(tmp_path)
    fresh, forked = functools.partial(process, "-m", "evojax_merge.cli"), functools.partial(run_command, status=None)
    slip = ["search", models / "config.yaml", "--set", "space.method=tise", "--out", models / "run"]
    for run, arguments, named in (
        (fresh, ["merge", models / "recipe.yaml", models / "out"], "--allow-nonfinite"),
        (forked, slip, "'ties'"),
        (forked, ["evaluate", models / "nothing", "--tasks", models / "config.yaml"], "no such folder"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert named in one_line(done.stderr)
        assert contents(tmp_path) == before


def test_a_file_that_cannot_be_written_to_its_end_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that fills up on the way."""
    root = tmp_path / "models"
    build_family(root)
    models = [{"model": f"parent{k}", "parameters": {"weight": 0.5}} for k in range(2)]
    path = write(root / "recipe.yaml", {"merge_method": "linear", "models": models})
    before = contents(tmp_path)
    size = (root / "base" / "model.safetensors").stat().st_size
    limited = (
        f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))\n"
        "import jax\njax.config.update('jax_enable_compilation_cache', False)\n"
        "from evojax_merge.cli import main\nmain()"
    )
    done = run_python(limited, "merge", path, root / "out", status=1)
    assert str(root / "out") in one_line(done.stderr)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"], ["merge", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom evojax_merge.cli import main\nsys.argv[1:] = " + repr(arguments) + "\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'jax', 'transformers', 'torch', 'flax', 'evosax', 'altair', 'vl_convert'} & set(sys.modules)\n"
        "    print('imported', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported []"
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) > 1


def test_a_merge_imports_no_torch(tmp_path: Path) -> None:
    """Its import takes longer than a small merge, and transformers' classes of configs bring it along."""
    build_family(tmp_path)
    for file in tmp_path.glob("*/tokenizer*"):
        file.unlink()
    models = [{"model": f"parent{k}", "parameters": {"weight": 0.5}} for k in range(2)]
    recipe = write(tmp_path / "recipe.yaml", {"merge_method": "linear", "models": models})
    program = (
        "import sys\nfrom evojax_merge.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)\n"
    )
    arguments = ["merge", str(recipe), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert (tmp_path / "out" / "model.safetensors").exists()
