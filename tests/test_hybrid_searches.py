"""Searches of models whose layers are of several types, or unusual, wherever the models and whatever a candidate is."""

from pathlib import Path

import numpy as np
import pytest
import transformers
from helpers.commands import refusal, run_here
from helpers.families import Family, build_family
from helpers.files import read_json, write_yaml
from helpers.models import random_model, save, state
from helpers.sampling import sample, thorough
from hostile import run_command
from safetensors.numpy import load_file, save_file
from test_families import FAMILIES, SIZES, load_reported
from test_streaming import (
    CHOICE,
    PLACES,
    TEXT,
    WORDS,
    bred,
    equal_scores,
    kill_at_random,
    run_files,
    scorer,
    some_genomes,
    write_config,
    write_paths,
    write_pool,
)

from evojax_merge.mergekit.plan import LAYER_NAME
from evojax_merge.models.architecture import find_architecture

HYBRIDS = sorted(name for name, row in FAMILIES.items() if find_architecture(name).layer_types and row.takes_words)
# Decoders with tensors of one number, a tensor for each head, tables by kind of layer, or learned positions.
UNUSUAL = ["apertus", "cohere", "exaone4", "ministral3", "olmo3", "opt", "smollm3", "stablelm"]


@pytest.fixture(scope="module", params=sample([*HYBRIDS, *UNUSUAL], 1))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    row = FAMILIES[request.param]
    config = getattr(transformers, row.config)(**(SIZES | row.changes))
    config._attn_implementation = "eager"
    return build_family(tmp_path_factory.mktemp(request.param), config, 3)


def test_merges_score_the_same_wherever_the_models_are(family: Family) -> None:
    assert np.ptp(equal_scores(write_config(family.root), 1e-4)["choice/margin"], axis=0).min() > 1e-4


@thorough
def test_layer_paths_score_the_same_wherever_the_models_are(family: Family) -> None:
    margins = equal_scores(write_paths(family.root), 1e-4)["choice/margin"]
    # No config says the order of the layers of some paths.
    paths = margins[np.isfinite(margins).all(axis=1)]
    assert len(paths) and (len(paths) == 1 or np.ptp(paths, axis=0).max() > 1e-4)


def test_children_of_a_pool_score_the_same_wherever_their_parents_are(family: Family) -> None:
    path, answers = write_pool(family.root, tasks=[CHOICE, WORDS]), []
    for place in PLACES:
        evaluator = scorer(path, place)
        genomes, context = bred(evaluator.space)
        scores = evaluator.within(context).score(genomes)
        answers.append((scores.matrices["choice"]["margin"], scores.outputs["words"]))
    for margins, texts in answers[1:]:
        np.testing.assert_allclose(margins, answers[0][0], atol=1e-4)
        assert texts == answers[0][1]


@thorough
def test_gradients_are_slopes_and_come_back_layer_by_layer(family: Family) -> None:
    path = write_config(family.root, space={"method": "linear"}, base=None, tasks=[TEXT | {"weight": 1}])
    gradients = []
    for place in PLACES[:2]:
        evaluator = scorer(path, place)
        genomes = some_genomes(evaluator)
        gradients.append(evaluator.value_and_gradient(genomes)[1])
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    step = np.zeros_like(genomes)
    step[:, 0] = 2e-4
    below, at, above = (
        evaluator.score(moved).matrices["text"]["log_probability"].mean(axis=1)
        for moved in (genomes - step, genomes, genomes + step)
    )
    slope, both_sides = gradients[0][:, 0], np.stack([at - below, above - at]) / 2e-4
    # On one side a router may choose other experts, or a bfloat16 number round otherwise.
    nearer = np.take_along_axis(both_sides, np.abs(both_sides - slope).argmin(axis=0)[None], axis=0)[0]
    np.testing.assert_allclose(slope, nearer, rtol=0.1, atol=1e-2)


@pytest.mark.parametrize(("kind", "begin"), sample([("qwen3_5_text", "mtp."), ("glm4_moe", "model.layers.3.")], 1))
def test_heads_for_several_tokens_are_kept_or_merged(kind: str, begin: str, tmp_path: Path) -> None:
    """A search keeps those of the base; a recipe merges them where all models have them, and copies them where one has
    them alone."""
    row = FAMILIES[kind]
    family = build_family(tmp_path, getattr(transformers, row.config)(**(SIZES | row.changes)), 2)
    heads = {}
    for number, folder in enumerate((family.base, *family.parents)):
        file = folder / "model.safetensors"
        heads[folder] = {f"{begin}{name}.weight": np.full((3, 5), number + 1.0, np.float32) for name in ("fc", "norm")}
        save_file(load_file(file) | heads[folder], file, {"format": "pt"})
    path = write_config(family.root, tasks=[TEXT | {"weight": 1}], search={"generations": 1, "population": 2})
    run_here("search", path, "--out", tmp_path / "run")
    winner = load_file(tmp_path / "run/best/model/model.safetensors")
    for name, values in heads[family.base].items():
        np.testing.assert_array_equal(winner[name], values)
    assert winner.keys() == load_file(family.base / "model.safetensors").keys()
    document = {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 0.5}}
                for folder in family.parents], "dtype": "float32"}  # fmt: skip
    run_here("merge", write_yaml(tmp_path / "recipe.yaml", document), tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    np.testing.assert_array_equal(merged[f"{begin}fc.weight"], np.full((3, 5), 2.5, np.float32))
    file = family.parents[0] / "model.safetensors"
    save_file({name: array for name, array in load_file(file).items() if name not in heads[family.parents[0]]}, file)
    run_here("merge", tmp_path / "recipe.yaml", tmp_path / "kept")
    kept = load_file(tmp_path / "kept/model.safetensors")
    np.testing.assert_array_equal(kept[f"{begin}fc.weight"], np.full((3, 5), 3.0, np.float32))
    path = write_paths(family.root, tasks=[TEXT | {"weight": 1}], other_modules="parent1")
    run_here("search", path, "--out", tmp_path / "paths", "--set", "search={generations: 4, population: 6}")
    winner = load_file(tmp_path / "paths/best/model/model.safetensors")
    config = read_json(tmp_path / "paths/best/model/config.json")
    for name, values in heads[family.parents[1]].items():
        behind = name.replace("layers.3", f"layers.{config['num_hidden_layers']}")
        np.testing.assert_array_equal(winner[behind], values)


def test_a_recipe_brings_no_layer_where_its_config_cannot(tmp_path: Path) -> None:
    """GLM's config says how many layers have an MLP before those with experts."""
    row = FAMILIES["glm4_moe"]
    family = build_family(tmp_path, transformers.Glm4MoeConfig(**(SIZES | row.changes)), 1)
    head = {"model.layers.3.fc.weight": np.ones((3, 5), np.float32)}
    save_file(load_file(family.base / "model.safetensors") | head, family.base / "model.safetensors", {"format": "pt"})

    def recipe(*layers: tuple[int, int]) -> Path:
        slices = [{"sources": [{"model": str(family.base), "layer_range": list(pair)}]} for pair in layers]
        return write_yaml(tmp_path / "recipe.yaml", {"merge_method": "passthrough", "slices": slices})

    run_here("merge", recipe((0, 1), (0, 3), (1, 3)), tmp_path / "deeper")
    config, written = read_json(tmp_path / "deeper/config.json"), load_file(tmp_path / "deeper/model.safetensors")
    assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (6, 2)
    assert written["model.layers.6.fc.weight"].shape == (3, 5) and "model.layers.3.fc.weight" not in written
    line = refusal("merge", recipe((0, 3), (0, 3)), tmp_path / "out")
    assert "first_k_dense_replace: layer 3 has an MLP" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [name for name in HYBRIDS if find_architecture(name).type_keys is None])
def test_slices_move_layers_with_their_types(kind: str, tmp_path: Path) -> None:
    """mergekit's slices, with values by filter and by layer: the tensors by hand, and a model for transformers."""
    row = FAMILIES[kind]
    config = getattr(transformers, row.config)(**(SIZES | row.changes))
    models = [save(random_model(config, seed), tmp_path / f"m{seed}") for seed in (0, 1)]
    last = config.num_hidden_layers - 1
    by_filter = {"filter": "norm", "value": 0.5}
    weights = [by_filter, {"value": [0.2, 0.6]}], [by_filter, {"value": [0.8, 0.4]}]
    parts = [
        {"sources": [{"model": str(model), "layer_range": part, "parameters": {"weight": list(values)}}
                     for model, values in zip(models, weights, strict=True)]}
        for part in ([last, last + 1], [0, 2])
    ]  # fmt: skip
    recipe = write_yaml(tmp_path / "recipe.yaml", {"merge_method": "linear", "slices": parts, "dtype": "float32"})
    run_here("merge", recipe, tmp_path / "out", "--strict")
    load_reported(tmp_path / "out")
    first, second, merged = (state(folder) for folder in (*models, tmp_path / "out"))
    # The numbers of an output's layers -> those of its sources, and the first model's weight there.
    places = {0: (last, 0.6), 1: (0, 0.2), 2: (1, 0.6)}
    moved = set()
    for name, values in merged.items():
        match = LAYER_NAME.match(name)
        if match is not None:
            source, weight = places[int(match["index"])]
            source_name = f"{match['head']}{source}{match['tail']}"
            weight = 0.5 if "norm" in source_name else weight
            expected = weight * first[source_name].astype(np.float64) + (1 - weight) * second[source_name]
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6, err_msg=name)
            moved.add(int(match["index"]))
    assert moved == places.keys()


@thorough
def test_a_killed_search_goes_on_to_the_byte(family: Family, tmp_path: Path) -> None:
    path = write_config(family.root, tasks=[TEXT], search={"population": 4, "generations": 12})
    run_command("search", path, "--out", tmp_path / "whole")
    kill_at_random(path, tmp_path / "killed")
    run_command("search", path, "--out", tmp_path / "killed", "--resume")
    assert run_files(tmp_path / "killed") == run_files(tmp_path / "whole")
