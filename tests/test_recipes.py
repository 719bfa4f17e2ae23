"""Recipes: mergekit's YAML means here what it means there, and what a search found is written so that both read it."""

import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers.families import Family, build_family
from helpers.files import read_json, read_recipe, write_json
from helpers.mergekit import assert_same_weights, merge_by_mergekit
from helpers.models import OF_MERGEKIT, finetune, load_torch, random_model, save, state, tiny_config, words
from helpers.sampling import sample
from merge_kernels import METHODS, Options

from evojax_merge.checkpoints.bank import load_bank, stored_tensors
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.commands import merge as merge_command
from evojax_merge.errors import InputError
from evojax_merge.mergekit.execute import merge_to, prepare
from evojax_merge.mergekit.plan import evaluate_setting, layout, options_from, plan
from evojax_merge.mergekit.write import dump_yaml, recipe_document
from evojax_merge.models.architecture import COMPONENTS, LAYERS, shared_leaves, tensors_of
from evojax_merge.models.bank import MergeSpec, Recipe, take_candidate
from evojax_merge.models.sources import LazyMerge
from evojax_merge.schema.yaml_reader import parse_yaml
from evojax_merge.spaces.parameter import ParameterSpace, SearchParameter

RANDOM = ("dare_linear", "dare_ties")
# Bounds inside which every parameter has a meaning, whatever the others are.
WIDE = {
    "weight": (0.05, 1.0), "density": (0.2, 0.8), "lambda": (0.1, 1.0), "t": (0.1, 1.0), "epsilon": (0.01, 0.15),
    "gamma": (0.0, 0.2), "select_topk": (0.0, 1.0), "scale": (0.5, 1.5), "eps": (1e-9, 1e-8), "tol": (1e-6, 1e-5),
    "r": (0.0, 1.0), "alpha": (0.0, 2.0),
}  # fmt: skip


# A recipe of the others names prompts.
WITHOUT_PROMPTS = [name for name, method in METHODS.items() if not method.looks_at]


def has_base(name: str) -> bool:
    """Whether the tests give the method a base that deltas are taken from."""
    return METHODS[name].base != "parent"


def write(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def merge(folder: Path, document: dict[str, Any], **options: Any) -> Path:
    """`evojax-merge merge` of a document, to a new folder."""
    out = folder / f"merged{len(list(folder.glob('merged*')))}"
    merge_command.merge(write(folder, document), out, merge_command.MergeOptions(**options))
    return out


def mergekit_merge(folder: Path, document: dict[str, Any]) -> Path:
    return merge_by_mergekit(document, folder / f"theirs{len(list(folder.glob('theirs*')))}", random_seed=0)


def inputs(family: Family, **parameters: list[Any]) -> list[dict[str, Any]]:
    """The `models` of a document: parent k with the k-th value of each parameter."""
    return [
        {"model": str(parent), "parameters": {name: values[k] for name, values in parameters.items()}}
        for k, parent in enumerate(family.parents)
    ]


# ---------------------------------------------------------------------------------------------------------------
# Settings: the same numbers for every tensor as mergekit resolves

TENSORS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.2.input_layernorm.weight",
    "model.norm.weight",
)
SETTINGS: tuple[Any, ...] = (
    0.25, 3, [0.0, 1.0], [0.0, 1.0, 0.25, 0.5], [0.7], [],
    {"value": 0.5}, {"filter": "mlp", "value": 0.5},
    [{"filter": "self_attn", "value": [0.0, 0.5, 1.0]}, {"filter": "mlp", "value": 0.3}, {"value": 0.9}],
    [{"filter": "*", "value": 0.1}, {"filter": "mlp", "value": 0.3}],
    [{"filter": "layers.1.", "value": [0.2, 0.4]}, {"filter": "norm", "value": 1}],
)  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_settings_evaluate_as_in_mergekit(setting: Any) -> None:
    from mergekit.config import ConditionalParameter
    from mergekit.config import evaluate_setting as theirs

    def typed(setting: Any) -> Any:
        if isinstance(setting, dict):
            return ConditionalParameter(**setting)
        return [typed(row) for row in setting] if isinstance(setting, list) else setting

    for tensor in TENSORS:
        for t in (0.0, 0.1, 1 / 3, 0.5, 0.75, 1.0):
            expected = theirs(tensor, typed(setting), t, validate=float)
            found = evaluate_setting("file", tensor, setting, t)
            assert (found is None) == (expected is None)
            if expected is not None:
                assert found == pytest.approx(expected, abs=1e-12)


def their_plan(document: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, dict[str, float]]]]:
    """Tensor -> (shared parameters, parent -> parameters), as mergekit plans the merge."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import SaveTensor
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    config, options = MergeConfiguration.model_validate(document), MergeOptions(quiet=True)
    architecture = get_architecture_info(config, options)
    planner = MergePlanner(config, architecture, options, _model_out_config(config, architecture))
    rows = {}
    for save_task in planner.plan_to_disk("nowhere"):
        if not isinstance(save_task, SaveTensor):
            continue
        task = save_task.tensor_task
        of_parents = {model.model.path: dict(values.items()) for model, values in task.input_parameters.items()}
        rows[save_task.tensor_name] = (dict(task.parameters.items()), of_parents)
    return rows


def random_setting(rng: np.random.Generator, bounds: tuple[float, float]) -> Any:
    """A scalar, a gradient, or filters over either, some of which match nothing."""

    def plain() -> Any:
        draws = [round(float(x), 10) for x in rng.uniform(*bounds, rng.integers(2, 5))]
        return draws if rng.random() < 0.4 else draws[0]

    if rng.random() < 0.5:
        return plain()
    filters = rng.choice(["self_attn", "mlp", "norm", "layers.1.", "embed", "q_proj", "nothing"], 2, replace=False)
    rows = [{"filter": str(name), "value": plain()} for name in filters]
    return [*rows, {"value": plain()}] if rng.random() < 0.5 else rows


def random_document(family: Family, name: str, rng: np.random.Generator) -> dict[str, Any]:
    """A document with settings at every level; the last one always gives a value, so that none is missing."""
    method = METHODS[name]
    per_parent = [p.name for p in method.parameters if p.per_parent]
    # A whole number cannot be a gradient.
    common = [p.name for p in method.parameters if not p.per_parent and p.name != "max_iter"]

    def some(names: list[str], chance: float) -> dict[str, Any]:
        return {name: random_setting(rng, WIDE[name]) for name in names if rng.random() < chance}

    parents = [str(parent) for parent in family.parents][: method.max_parents]
    models = [str(family.base), parents[0]] if name == "slerp" else parents
    document: dict[str, Any] = {"merge_method": name}
    if has_base(name) or name == "slerp":
        document["base_model"] = str(family.base)
    if rng.random() < 0.5:
        document["models"] = [{"model": model, "parameters": some(per_parent, 0.6)} for model in models]
    else:
        listed = [str(family.base), *models] if has_base(name) else models
        document["slices"] = [
            {
                "sources": [
                    {"model": model, "layer_range": list(layers), "parameters": some(per_parent, 0.6)}
                    for model in listed
                ],
                "parameters": some(per_parent + common, 0.5),
            }
            for layers in ((0, 2), (1, 3), (2, 3))
        ]
    final = {p: round(float(rng.uniform(*WIDE[p])), 3) for p in per_parent}
    needed = {p.name: [0.3, 0.7, 0.6] for p in method.parameters if p.name == "t"}
    document["parameters"] = final | some(common, 0.7) | needed
    if "normalize" in method.yaml_options:
        document["parameters"]["normalize"] = bool(rng.random() < 0.5)
    return document


@pytest.mark.parametrize("name", sample(OF_MERGEKIT, 4))
def test_documents_resolve_as_in_mergekit(name: str, family: Family, tmp_path: Path) -> None:
    """Random documents, both forms, settings at every level: the same tensors and the same parameters."""
    layouts = [layout(list(state(family.base)))] * 3
    rng = np.random.default_rng(sorted(METHODS).index(name))
    for _ in range(12):
        document = random_document(family, name, rng)
        recipe = read_recipe(write(tmp_path, document))
        expected = their_plan(document)
        rows = {row.name: row for row in plan(recipe, layouts)}
        assert set(rows) == set(expected)
        for tensor, row in rows.items():
            shared, of_parents = expected[tensor]
            parents = [recipe.models[model] for model, _ in row.inputs]
            assert row.options.has_base == has_base(name)
            if has_base(name):
                assert parents.pop(0) == document["base_model"]
            for parameter in METHODS[name].parameters:
                found = row.parameters[parameter.name]
                wanted = (
                    [of_parents[parent][parameter.name] for parent in parents]
                    if parameter.per_parent
                    else shared[parameter.name]
                )
                np.testing.assert_allclose(found, wanted, rtol=1e-12, err_msg=f"{tensor} {parameter.name} {document}")
            if "normalize" in METHODS[name].yaml_options:
                assert row.options.normalize == shared["normalize"]


def test_switches_have_the_methods_defaults() -> None:
    from mergekit.merge_methods import registry

    for name in OF_MERGEKIT:
        method = METHODS[name]
        theirs = {p.name: p.default for p in registry.get(name).spec.parameters}
        options = options_from("file", method, {}, has_base(name))
        assert options == replace(method.options, has_base=has_base(name))
        for switch in ("normalize", "normalize_weights"):
            if switch in theirs:
                assert options.normalize == theirs[switch]
        if "rescale" in theirs and name != "task_arithmetic":
            assert options.rescale == {True: "l1", False: "none"}[theirs["rescale"]]
        assert set(method.yaml_options) | set(method.ignored_settings) <= set(theirs)
        for parameter in method.parameters:
            # Where neither has one, it has to be given.
            if parameter.default is not None and parameter.name != "scale":
                assert parameter.default == theirs[parameter.name]
    requests = {"normalize": False, "rescale": "density"}
    assert options_from("file", METHODS["ties"], requests, True) == Options(False, "density", has_base=True)


# ---------------------------------------------------------------------------------------------------------------
# Weights: the merge that is written is mergekit's

MERGES: dict[str, Callable[[Family], dict[str, Any]]] = {
    "linear": lambda f: {
        "merge_method": "linear",
        "models": inputs(f, weight=[[0.2, 0.9], [{"filter": "mlp", "value": 0.3}, {"value": 0.6}]]),
    },
    "linear, not normalized": lambda f: {
        "merge_method": "linear", "models": inputs(f, weight=[0.8, -0.3]), "parameters": {"normalize": False},
    },
    "linear, the base weighed like the others": lambda f: {
        "merge_method": "linear", "base_model": str(f.base), "models": inputs(f, weight=[0.8, 0.5]),
        "parameters": {"weight": 0.3},
    },
    "slerp": lambda f: {
        "merge_method": "slerp", "base_model": str(f.base),
        "models": [{"model": str(f.base)}, {"model": str(f.parents[0])}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0.0, 0.5, 1.0]}, {"value": 0.4}]},
    },
    "task_arithmetic": lambda f: {
        "merge_method": "task_arithmetic", "base_model": str(f.base), "models": inputs(f, weight=[0.7, [0.1, 0.9]]),
        "parameters": {"lambda": 0.8},
    },
    "ties": lambda f: {
        "merge_method": "ties", "base_model": str(f.base),
        "models": inputs(f, weight=[0.7, [0.1, 0.9]], density=[[0.2, 0.9], 0.333]), "parameters": {"lambda": 1.2},
    },
    "ties, slices": lambda f: {
        "merge_method": "ties", "base_model": str(f.base),
        "slices": [
            {
                "sources": [
                    {"model": str(f.base), "layer_range": [0, 2]},
                    *({**row, "layer_range": [1, 3]} for row in inputs(f, weight=[0.6, 0.5], density=[0.5, 0.7])),
                ],
            },
            {
                "sources": [
                    {"model": str(f.base), "layer_range": [1, 3]},
                    *({**row, "layer_range": [1, 3]} for row in inputs(f, weight=[0.1, [0.3, 0.9]])),
                ],
                "parameters": {"normalize": False},
            },
        ],
        "parameters": {"density": 0.8},
    },
    "dare_linear": lambda f: {
        "merge_method": "dare_linear", "base_model": str(f.base), "models": inputs(f, weight=[0.6, 0.5]),
        "parameters": {"density": 1.0},
    },
    "dare_ties": lambda f: {
        "merge_method": "dare_ties", "base_model": str(f.base), "models": inputs(f, weight=[0.6, 0.5]),
        "parameters": {"normalize": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", sample(MERGES, 8))
def test_merges_equal_mergekit(case: str, family: Family, tmp_path: Path) -> None:
    document = MERGES[case](family) | {"dtype": "float32"}
    found, expected = merge(tmp_path, document), mergekit_merge(tmp_path, document)
    assert_same_weights(found, expected)
    config = read_json(found / "config.json")
    assert config["num_hidden_layers"] == (4 if "slices" in case else 3)
    assert config["dtype"] == "float32"
    # What was written runs in transformers, with no tensor missing or left over.
    assert load_torch(found).config.num_hidden_layers == config["num_hidden_layers"]


def test_bfloat16_merge_rounds_once_at_the_end(tmp_path: Path) -> None:
    """Qwen2 with biases, bfloat16 parents: float32 arithmetic, then one rounding."""
    family = build_family(tmp_path / "models", tiny_config("qwen2"), dtype=torch.bfloat16)
    document = MERGES["task_arithmetic"](family)
    found = merge(tmp_path, document)
    expected = mergekit_merge(tmp_path, document | {"dtype": "float32", "out_dtype": "bfloat16"})
    assert_same_weights(found, expected, 2**-7)
    one, other = state(found), state(expected)
    # A different order of the same float32 sums may fall on the other side of a rounding boundary, rarely.
    differing = sum((one[name] != other[name]).sum() for name in other)
    assert differing < 1e-3 * sum(values.size for values in other.values())
    assert read_json(found / "config.json")["dtype"] == "bfloat16"
    wide = merge(tmp_path, document, dtype="float32")
    assert_same_weights(wide, mergekit_merge(tmp_path, document | {"dtype": "float32"}))


def test_out_dtype_is_what_is_written(family: Family, tmp_path: Path) -> None:
    found = merge(tmp_path, MERGES["linear"](family) | {"dtype": "float32", "out_dtype": "float16"})
    assert load_torch(found).config.dtype == torch.float32
    assert read_json(found / "config.json")["dtype"] == "float16"
    expected = merge(tmp_path, MERGES["linear"](family))
    for name, values in state(expected).items():
        np.testing.assert_array_equal(state(found)[name], values.astype(np.float16))


def test_float64_is_written_without_a_word_of_jax(family: Family, tmp_path: Path) -> None:
    models = [{"model": str(parent), "parameters": {"weight": 0.5}} for parent in family.parents]
    document = {"merge_method": "linear", "models": models}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = state(merge(tmp_path, document | {"dtype": "float64"}))
    for name, values in state(merge(tmp_path, document | {"dtype": "float32"})).items():
        assert wide[name].dtype == np.float64
        np.testing.assert_array_equal(wide[name], values)


@pytest.mark.parametrize("name", RANDOM)
def test_dare_follows_its_seed_and_density(name: str, family: Family, tmp_path: Path) -> None:
    document = {
        "merge_method": name, "base_model": str(family.base), "models": inputs(family, weight=[0.5, 0.5]),
        "parameters": {"density": 0.3, "rescale": False}, "random_seed": 4,
    }  # fmt: skip
    one, again = state(merge(tmp_path, document)), state(merge(tmp_path, document))
    other = state(merge(tmp_path, document, seed=5))
    base, parents = state(family.base), [state(parent) for parent in family.parents]
    moved = total = 0
    for tensor, values in one.items():
        np.testing.assert_array_equal(values, again[tensor])
        moved += (values != base[tensor]).sum()
        total += values.size
        if name == "dare_linear":
            # Each entry is the base plus half of some of the deltas.
            halves = [0.5 * (parent[tensor] - base[tensor]) for parent in parents]
            options = np.stack([0 * halves[0], halves[0], halves[1], halves[0] + halves[1]]) + base[tensor]
            assert np.abs(options - values).min(axis=0).max() < 1e-6
    assert any((values != other[tensor]).any() for tensor, values in one.items())
    # An entry moves unless both parents drop it.
    expected = 1 - 0.7**2
    assert abs(moved / total - expected) < 5 * np.sqrt(expected * (1 - expected) / total)


def test_dare_does_not_depend_on_the_order_of_parents(family: Family, tmp_path: Path) -> None:
    document = {
        "merge_method": "dare_ties", "base_model": str(family.base),
        "models": inputs(family, weight=[0.7, 0.4], density=[0.3, 0.6]),
    }  # fmt: skip
    turned = document | {"models": document["models"][::-1]}  # type: ignore[index]
    assert_same_weights(merge(tmp_path, document), merge(tmp_path, turned), 1e-6)


# ---------------------------------------------------------------------------------------------------------------
# What a search found


def space_for(name: str, decoder: Any, parents: int) -> ParameterSpace:
    method = METHODS[name]
    wide = WIDE | {"weight": (-0.5, 1.5), "lambda": (0.5, 1.5)}
    search_parameters = tuple(
        SearchParameter(p.name, *wide.get(p.name, (p.low, p.high)), (0.5,)) for p in method.parameters if p.searched
    )
    fixed = tuple((p.name, (float(p.default or 0),)) for p in method.parameters if not p.searched)
    components = (("attention",), ("mlp", "norm"))
    shared = tuple(leaf.name for leaf in shared_leaves(decoder))
    return ParameterSpace(
        method=method, parents=parents, layers=decoder.layers, layers_per_group=2, names=COMPONENTS,
        components=components, shared=shared, search_parameters=search_parameters, constants=fixed,
    )  # fmt: skip


@pytest.fixture(scope="module", params=sample([True, False], 1), ids=sample(["tied", "untied"], 1))
def found_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    config = tiny_config(tie_word_embeddings=request.param, num_hidden_layers=4)
    return build_family(tmp_path_factory.mktemp("found"), config)


def found_recipe(family: Family, name: str, seed: int = 0) -> tuple[Recipe, MergeSpec, Any, Any, dict[str, Any]]:
    """A random genome's recipe, what it was found with, and the document that is written for it."""
    method = METHODS[name]
    parents = family.parents[: method.max_parents]
    sources, decoder = open_sources([*([family.base] if has_base(name) else []), *parents])
    space = space_for(name, decoder, len(parents))
    spec = MergeSpec(name, replace(method.options, has_base=has_base(name)), 9, "float32", space.constants)
    genome = np.random.default_rng(seed).uniform(-0.1, 1.1, space.dims).astype(np.float32)
    recipe = jax.tree.map(np.asarray, take_candidate(jax.vmap(space.recipe)(jnp.asarray(genome)[None]), 0))
    base = str(family.base) if has_base(name) else None
    document = recipe_document(recipe, spec, decoder, base, [str(parent) for parent in parents])
    return recipe, spec, sources, decoder, document


@pytest.mark.parametrize("name", sample(WITHOUT_PROMPTS, 4))
def test_found_recipes_read_back_as_they_were(name: str, found_family: Family, tmp_path: Path) -> None:
    """YAML and back: every tensor's parameters are the same float32 numbers, the switches and the seed too."""
    recipe, spec, sources, decoder, document = found_recipe(found_family, name)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(document))
    assert yaml.safe_load(path.read_text()) == document
    read = read_recipe(path)
    assert read.method.name == name
    if METHODS[name].random:
        assert read.seed == spec.seed
    tensors = list(sources.folders[0].entries)
    rows = {row.name: row for row in plan(read, [layout(tensors)] * len(read.models))}
    assert set(rows) == set(tensors)
    wanted = {}
    for tensor, leaf, place in tensors_of(decoder):
        if leaf.stack is None:
            wanted[tensor] = recipe.shared[leaf.name]
        else:
            c = COMPONENTS.index(leaf.component)
            wanted[tensor] = {key: values[(*place, c)] for key, values in recipe.stacks[LAYERS].items()}
    for tensor, row in rows.items():
        for parameter, values in wanted[tensor].items():
            if METHODS[name].parameter(parameter).quantised:
                values = np.round(values.astype(np.float64), 3).astype(np.float32)
            np.testing.assert_array_equal(row.parameters[parameter].astype(np.float32), values, err_msg=tensor)
        assert row.options == spec.options
    densities = [row.parameters["density"] for row in rows.values() if "density" in row.parameters]
    # As a decimal fraction, whose float64 counts the entries that the search's table counted.
    assert all((np.round(values, 3) == values).all() for values in densities)


@pytest.mark.parametrize("name", sample(OF_MERGEKIT, 4))
def test_found_recipes_mean_the_same_to_mergekit(name: str, found_family: Family, tmp_path: Path) -> None:
    *_, document = found_recipe(found_family, name)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(document))
    expected = their_plan(yaml.safe_load(path.read_text()))
    recipe = read_recipe(path)
    rows = {row.name: row for row in plan(recipe, [layout(list(expected))] * len(recipe.models))}
    assert set(rows) == set(expected)
    for tensor, row in rows.items():
        shared, of_parents = expected[tensor]
        parents = [recipe.models[model] for model, _ in row.inputs][has_base(name) :]
        for parameter in METHODS[name].parameters:
            wanted = (
                [of_parents[parent][parameter.name] for parent in parents]
                if parameter.per_parent
                else shared[parameter.name]
            )
            np.testing.assert_allclose(row.parameters[parameter.name], wanted, rtol=1e-12)


@pytest.mark.parametrize("name", ["ties", "slerp", "task_arithmetic"])
def test_found_recipes_merge_the_same_in_mergekit(name: str, found_family: Family, tmp_path: Path) -> None:
    # A genome whose thresholds meet no two equal magnitudes: there both programs keep what they like.
    *_, document = found_recipe(found_family, name, seed=3)
    document = yaml.safe_load(dump_yaml(document))
    assert_same_weights(merge(tmp_path, document), mergekit_merge(tmp_path, document))


@pytest.mark.parametrize("name", sample(WITHOUT_PROMPTS, 4))
def test_what_was_evaluated_is_what_is_written(name: str, found_family: Family, tmp_path: Path) -> None:
    """The candidate out of the bank and its tables, and the streamed merge of its recipe."""
    recipe, spec, sources, decoder, document = found_recipe(found_family, name, seed=1)
    bank = load_bank(sources, decoder, spec)
    model = jax.jit(lambda recipe: LazyMerge.of(bank, recipe, spec).materialise())(recipe)
    evaluated = dict(stored_tensors(model, decoder))
    written = state(merge(tmp_path, document))
    assert not prepare(read_recipe(tmp_path / "recipe.yaml")).unmatched
    assert set(evaluated) == set(written)
    for tensor, values in written.items():
        np.testing.assert_allclose(evaluated[tensor], values, rtol=2e-6, atol=1e-6, err_msg=tensor)


# ---------------------------------------------------------------------------------------------------------------
# Filters without a tensor


def linear_document(family: Family, weight: Any = 0.5, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": inputs(family, weight=[weight, 0.5])} | more


def filtered(wanted: str) -> list[dict[str, Any]]:
    return [{"filter": wanted, "value": 0.25}, {"value": 0.5}]


def sliced(family: Family, wanted: str) -> dict[str, Any]:
    sources = [{"model": str(parent), "layer_range": [0, 2]} for parent in family.parents]
    last = {"model": str(family.parents[0]), "layer_range": [1, 2], "parameters": {"weight": filtered(wanted)}}
    return {
        "merge_method": "linear",
        "parameters": {"weight": 0.5},
        "slices": [{"sources": sources}, {"sources": [last]}],
    }


MISMATCH = [{"filter": "lm_hed", "value": "first"}, {"value": "refuse"}]
# A document with a filter that means no tensor, its key, and a part of the hint.
UNMATCHED: dict[str, tuple[Callable[[Family], dict[str, Any]], str, str]] = {
    "a model's": (lambda f: linear_document(f, filtered("self_attnn")), "weight", "'self_attn'"),
    "for all": (
        lambda f: linear_document(f, parameters={"normalize": {"filter": "mpl", "value": True}}), "normalize", "'mlp'"
    ),
    "of a gradient": (
        lambda f: linear_document(f, [{"filter": "mlpp", "value": [0.1, 0.4]}, {"value": 1}]), "weight", "'mlp'"
    ),
    "in another case": (lambda f: linear_document(f, filtered("EMBED_TOKENS")), "weight", "'embed_tokens'"),
    "of a slice's source": (lambda f: sliced(f, "q_prj"), "weight", "'q_proj'"),
    "a layer that there is not": (lambda f: linear_document(f, filtered("layers.17.")), "weight", "'layers'"),
    "of a mismatch": (lambda f: linear_document(f, on_mismatch=MISMATCH), "on_mismatch", "known: "),
    "of a module": (
        lambda f: {
            "merge_method": "linear",
            "modules": {"text_decoder": {"models": inputs(f, weight=[filtered("normm"), 1])}},
        },
        "weight", "'norm'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNMATCHED)
def test_a_filter_that_means_no_tensor_is_named(
    case: str, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, key, meant = UNMATCHED[case]
    document = make(family)
    merge(tmp_path, document)
    lines = [line for line in capsys.readouterr().err.splitlines() if "means no tensor" in line]
    assert len(lines) == 1 and f"{key}: the filter '" in lines[0] and meant in lines[0], lines
    with pytest.raises(InputError, match="means no tensor"):
        merge(tmp_path, document, strict=True)
    assert not list(tmp_path.glob("merged1*"))


def test_filters_that_mean_a_tensor_are_not_named(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts of names, the layers of a taller result, a star, and a filter that an earlier one always comes before."""
    rows = [{"filter": text, "value": 0.5} for text in ("q_proj", "layers.2.", "self_attn.q", "*", "mlp")]
    merge(tmp_path, linear_document(family, rows), strict=True)
    merge(tmp_path, sliced(family, "layers.2."), strict=True)
    assert "means no tensor" not in capsys.readouterr().err


def test_many_filters_without_a_tensor_are_counted(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(tmp_path, linear_document(family, [{"filter": f"none{i}", "value": 0} for i in range(50)] + [{"value": 1}]))
    lines = capsys.readouterr().err.splitlines()
    assert sum("means no tensor" in line for line in lines) == 20
    assert any("30 more filters mean no tensor" in line for line in lines)


# ---------------------------------------------------------------------------------------------------------------
# Folders


def test_everything_but_the_weights_is_copied(family: Family, tmp_path: Path) -> None:
    extended = tmp_path / "base"
    shutil.copytree(family.base, extended)
    (extended / "chat_template.jinja").write_text("{{ messages }}")
    document = {
        "merge_method": "task_arithmetic", "base_model": "base", "models": inputs(family, weight=[0.5, 0.5]),
    }  # fmt: skip
    found = merge(tmp_path, document)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (found / name).read_bytes() == (extended / name).read_bytes()
    assert load_tokenizer(found).get_vocab() == load_tokenizer(family.base).get_vocab()
    card = (found / "README.md").read_text()
    assert "task_arithmetic" in card
    # The recipe is in it, and no place of this machine.
    assert f"- model: {family.parents[0].name}" in card and str(family.root) not in card
    config, original = (read_json(path / "config.json") for path in (found, extended))
    assert {key for key in config if config[key] != original.get(key)} <= {"dtype", "torch_dtype"}


def test_tied_merge_stays_tied_and_mixed_becomes_untied(tmp_path: Path) -> None:
    model = random_model(tiny_config(tie_word_embeddings=True))
    tied = [save(finetune(model, k), tmp_path / f"tied{k}") for k in range(2)]
    untied = save(random_model(tiny_config(), seed=3), tmp_path / "untied")

    def document(*models: Path) -> dict[str, Any]:
        rows = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
        return {"merge_method": "linear", "models": rows}

    both = merge(tmp_path, document(*tied))
    assert "lm_head.weight" not in state(both)
    assert load_torch(both).config.tie_word_embeddings
    for models in ([tied[0], untied], [untied, tied[0]]):
        mixed = merge(tmp_path, document(*models))
        tensors = state(mixed)
        head = (state(tied[0])["model.embed_tokens.weight"] + state(untied)["lm_head.weight"]) / 2
        np.testing.assert_allclose(tensors["lm_head.weight"], head, rtol=1e-6, atol=1e-6)
        loaded = load_torch(mixed)
        assert not loaded.config.tie_word_embeddings
        np.testing.assert_array_equal(loaded.lm_head.weight.detach().numpy(), tensors["lm_head.weight"])


def test_layers_keep_their_kind_where_they_are_moved(tmp_path: Path) -> None:
    """Windows are a layer's own: a repeated or left-out layer takes its type along into the config."""
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    original = save(random_model(config), tmp_path / "model")
    kinds = read_json(original / "config.json")["layer_types"]
    assert kinds == ["full_attention", "full_attention", "sliding_attention"]
    slices = [
        {"sources": [{"model": str(original), "layer_range": list(layers), "parameters": {"weight": 1}}]}
        for layers in ((0, 1), (2, 3), (2, 3), (1, 2))
    ]
    found = merge(tmp_path, {"merge_method": "linear", "slices": slices})
    written = read_json(found / "config.json")
    assert written["num_hidden_layers"] == 4
    assert written["layer_types"] == [kinds[i] for i in (0, 2, 2, 1)]
    windows = open_sources([found])[1].windows
    assert [window == 4 for window in windows] == [False, True, True, False]
    # The same model, put together in torch.
    expected = load_torch(original)
    expected.model.layers = torch.nn.ModuleList(expected.model.layers[i] for i in (0, 2, 2, 1))
    expected.config.layer_types, expected.config.num_hidden_layers = written["layer_types"], 4
    tokens = torch.arange(4, 16)[None]
    with torch.no_grad():
        expected_logits = expected(tokens, use_cache=False).logits
        torch.testing.assert_close(load_torch(found)(tokens, use_cache=False).logits, expected_logits)


@pytest.mark.parametrize("source", ["base", "parent"])
def test_vocabularies_are_aligned_as_in_mergekit(source: str, tmp_path: Path) -> None:
    """Two parents whose tokenizers number the same tokens differently."""
    model = random_model(tiny_config(tie_word_embeddings=True))
    order = np.random.default_rng(0).permutation(64)
    base = save(model, tmp_path / "base")
    parents = []
    for k in (1, 2):
        tuned = finetune(model, k)
        rows = order if k == 2 else np.arange(64)
        with torch.no_grad():
            embedding = tuned.get_input_embeddings().weight
            embedding.copy_(embedding[rows].clone())
        parents.append(save(tuned, tmp_path / f"parent{k}", [words()[i] for i in rows]))
    family = Family(tmp_path, base, tuple(parents), tmp_path)
    document = {
        "merge_method": "task_arithmetic", "base_model": str(base), "models": inputs(family, weight=[0.4, 0.7]),
        "dtype": "float32", "tokenizer_source": "base" if source == "base" else str(parents[1]),
    }  # fmt: skip
    found, expected = merge(tmp_path, document), mergekit_merge(tmp_path, document)
    assert load_tokenizer(found).get_vocab() == load_tokenizer(expected).get_vocab()
    assert_same_weights(found, expected)


def test_other_architectures_merge_tensor_by_tensor(tmp_path: Path) -> None:
    """A one-off merge needs no decoder; tensors of integers are copied, and older files may name norms' otherwise."""
    from safetensors.torch import save_file

    rng = np.random.default_rng(0)
    folders, contents = [], []
    for k in range(2):
        folder = tmp_path / f"model{k}"
        folder.mkdir()
        tensors = {
            "h.0.weight": torch.tensor(rng.normal(size=(6, 4)), dtype=torch.float32),
            "h.0.positions": torch.arange(5),
            "wte.weight": torch.tensor(rng.normal(size=(9, 4)), dtype=torch.float32),
        }
        norm = "LayerNorm.weight" if k else "LayerNorm.gamma"
        tensors[norm] = torch.tensor(rng.normal(size=4), dtype=torch.float32)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        write_json(folder / "config.json", {"model_type": "something", "n_layer": 1})
        folders.append(folder)
        contents.append(tensors)
    rows = [{"model": str(path), "parameters": {"weight": w}} for path, w in zip(folders, (0.25, 0.75), strict=True)]
    found = merge(tmp_path, {"merge_method": "linear", "models": rows})
    from safetensors.torch import load_file

    tensors = load_file(found / "model.safetensors")
    assert torch.equal(tensors["h.0.positions"], torch.arange(5))
    for name in ("h.0.weight", "wte.weight"):
        torch.testing.assert_close(tensors[name], 0.25 * contents[0][name] + 0.75 * contents[1][name])
    expected = 0.25 * contents[0]["LayerNorm.gamma"] + 0.75 * contents[1]["LayerNorm.weight"]
    torch.testing.assert_close(tensors["LayerNorm.gamma"], expected)
    assert read_json(found / "config.json")["model_type"] == "something"


# ---------------------------------------------------------------------------------------------------------------
# Architectures: the folder loads as its sources do

TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = TINY | {"num_key_value_heads": 2}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 16, "max_target_positions": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "decoder_start_token_id": 1, "begin_suppress_tokens": None,
}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": 64}


def architectures() -> dict[str, Callable[[], Any]]:
    """A small torch model of each, by name."""

    def causal(config: Any) -> Callable[[], Any]:
        return lambda: transformers.AutoModelForCausalLM.from_config(config)

    tf = transformers
    vision, text = tf.CLIPVisionConfig(**VISION), tf.LlamaConfig(**GROUPED, tie_word_embeddings=False)
    llava = {"vision_config": vision, "text_config": text, "image_token_index": 63, "vision_feature_layer": -1}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return {
        **{f"{kind}{' tied' * tied}": causal(tiny_config(kind, tie_word_embeddings=tied))
           for kind in ("llama", "qwen3") for tied in (False, True)},
        "gpt2": causal(tf.GPT2Config(**GPT)),
        "gpt2 untied": causal(tf.GPT2Config(**GPT, tie_word_embeddings=False)),
        "gpt_neox": causal(tf.GPTNeoXConfig(**TINY, tie_word_embeddings=False)),
        "gptj": causal(tf.GPTJConfig(**GPT, rotary_dim=4)),
        "opt": causal(tf.OPTConfig(**{**TINY, "ffn_dim": 48}, word_embed_proj_dim=32)),
        "bloom": causal(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4)),
        "falcon": causal(tf.FalconConfig(**TINY)),
        "phi": causal(tf.PhiConfig(**GROUPED)),
        "phi3": causal(tf.Phi3Config(**GROUPED)),
        "gemma": causal(tf.GemmaConfig(**GROUPED, head_dim=8)),
        "gemma2": causal(tf.Gemma2Config(**GROUPED, head_dim=8)),
        "mixtral": causal(tf.MixtralConfig(**GROUPED, **experts)),
        "mamba": causal(tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=4)),
        "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, num_layers=6, num_decoder_layers=2)),
        "t5 gated, untied": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(**T5, num_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        "t5 encoder": lambda: tf.T5EncoderModel(tf.T5Config(**T5, num_layers=6)),
        "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**{
            key: value for key, value in WHISPER.items() if key not in ("num_mel_bins", "max_source_positions")
        })),
        "whisper": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)),
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**TINY)),
        "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)),
        "clip": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=TINY, vision_config=VISION, projection_dim=16)),
        "llava": lambda: tf.LlavaForConditionalGeneration(tf.LlavaConfig(**llava)),
        "llava untied": lambda: tf.LlavaForConditionalGeneration(tf.LlavaConfig(**llava, tie_word_embeddings=False)),
    }  # fmt: skip


def loading(model_class: Any, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """A model's tensors as transformers loads it, and what it says of weights that do not fit."""
    model, found = model_class.from_pretrained(folder, output_loading_info=True)
    told = {key: sorted(map(str, names)) for key, names in found.items() if isinstance(names, (list, set, tuple))}
    return dict(model.state_dict()), told


@pytest.mark.parametrize("kind", sample(architectures(), 5))
def test_a_merge_loads_as_its_sources_do(kind: str, tmp_path: Path) -> None:
    """No weight is missing, left over or made up, and the config means what the sources' means."""
    torch.manual_seed(0)
    models = []
    for k in range(2):
        model = architectures()[kind]()
        with torch.no_grad():
            for values in model.parameters():
                values += 0.1 * torch.randn_like(values)
        model.save_pretrained(tmp_path / f"model{k}")
        models.append(str(tmp_path / f"model{k}"))
    rows = [{"model": path, "parameters": {"weight": w}} for path, w in zip(models, (0.25, 0.75), strict=True)]
    found = merge(tmp_path, {"merge_method": "linear", "models": rows, "dtype": "float32"})
    (one, told), (other, _) = (loading(type(model), Path(path)) for path in models)
    tensors, said = loading(type(model), found)
    assert said == told
    assert not any(told.values())
    for name, values in tensors.items():
        expected = 0.25 * one[name] + 0.75 * other[name] if values.is_floating_point() else one[name]
        torch.testing.assert_close(values, expected, msg=name)
    config, source = (read_json(folder / "config.json") for folder in (found, Path(models[0])))
    assert config == {**source, "dtype": "float32"}


@pytest.mark.parametrize("kind", sample(["gpt2", "gpt_neox", "bloom", "phi", "mixtral", "bert"], 3))
def test_slices_write_the_depth_that_they_make(kind: str, tmp_path: Path) -> None:
    """Also of architectures that no decoder here knows."""
    torch.manual_seed(0)
    model = architectures()[kind]()
    model.save_pretrained(tmp_path / "model")
    order = (0, 2, 2, 1, 0)
    slices = [{"sources": [{"model": str(tmp_path / "model"), "layer_range": [i, i + 1]}]} for i in order]
    found = merge(tmp_path, {"merge_method": "passthrough", "slices": slices})
    (tensors, said), source = loading(type(model), found), model.state_dict()
    assert not any(said.values())
    layers = {
        tuple(match.groups()) for name in tensors if (match := re.match(r"(.*(?:h|layers?|block)\.)(\d+)\.", name))
    }
    assert sorted(int(number) for _, number in layers) == list(range(len(order)))
    for name, values in tensors.items():
        head, number, tail = re.fullmatch(r"(.*?(?:h|layers?|block)\.)(\d+)(\..*)|.*", name).groups()
        torch.testing.assert_close(values, source[name if number is None else f"{head}{order[int(number)]}{tail}"])


def test_slices_of_a_model_that_does_not_say_its_depth_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "model").mkdir()
    save_file({f"h.{i}.weight": torch.zeros(2) for i in range(3)}, tmp_path / "model" / "model.safetensors")
    slices = [{"sources": [{"model": str(tmp_path / "model"), "layer_range": [0, 2]}]}]
    for config in ({"model_type": "something"}, {"model_type": "something", "n_layer": 5}):
        write_json(tmp_path / "model" / "config.json", config)
        with pytest.raises(InputError, match="does not say that there are 3 layers"):
            merge(tmp_path, {"merge_method": "passthrough", "slices": slices})
    # All of them, in their order, are no change.
    slices[0]["sources"][0]["layer_range"] = [0, 3]
    written = merge(tmp_path, {"merge_method": "passthrough", "slices": slices}) / "config.json"
    assert read_json(written)["n_layer"] == 5


def test_anchors_and_merge_keys_are_read_and_kept_apart_from_keys_that_stand_twice() -> None:
    text = """
    usual: &usual {weight: 0.5, density: 0.1}
    more: &more {epsilon: 0.2}
    one: {<<: *usual, weight: 0.7}
    two: {<<: [*usual, *more]}
    three: {<<: *usual, <<: *more}
    numbers: {1: a, "1": b}
    """
    assert parse_yaml("file", text) == yaml.safe_load(text)
    assert parse_yaml("file", text)["one"] == {"weight": 0.7, "density": 0.1}
    for twice in ("{a: 1, a: 1}", "{a: 1, 'a': 2}", "{a: 1, !!str a: 2}", "[{b: {c: 1, d: 2, c: 3}}]", "{1: a, 1: b}"):
        with pytest.raises(InputError, match=r"^file:1: .*is on line 1 already"):
            parse_yaml("file", twice)


def test_recipes_of_many_parents_and_layers_are_read(tmp_path: Path) -> None:
    """As a search writes them."""
    filters = [{"filter": f"layers.{i}.{part}", "value": 0.123456} for i in range(80) for part in ("self_attn", "mlp")]
    models = [{"model": f"m{k}", "parameters": {"weight": filters}} for k in range(100)]
    path = write(tmp_path, {"merge_method": "linear", "models": models})
    assert len(read_recipe(path).models) == 100


def test_relative_models_are_found_beside_the_recipe(family: Family, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for path in (family.base, *family.parents):
        (tmp_path / "models" / path.name).symlink_to(path)
    document = {
        "merge_method": "linear",
        "models": [{"model": f"models/{p.name}", "parameters": {"weight": 1}} for p in family.parents],
    }
    job = prepare(read_recipe(write(tmp_path, document)))
    merge_to(job, tmp_path / "out", card="card")
    assert_same_weights(tmp_path / "out", merge(tmp_path, {**document, "models": inputs(family, weight=[1, 1])}), 0)


def test_a_base_of_a_linear_merge_needs_a_weight_as_in_mergekit(family: Family, tmp_path: Path) -> None:
    document = {
        "merge_method": "linear", "base_model": str(family.base), "models": inputs(family, weight=[0.8, 0.5]),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="Missing required parameter weight"):
        their_plan(document)
    with pytest.raises(InputError, match=f"weight: missing for {family.base}"):
        merge(tmp_path, document)


@pytest.mark.parametrize("weights", [[0.5, -0.5], [0, 0]])
def test_linear_weights_that_sum_to_zero_are_refused(weights: list[float], family: Family, tmp_path: Path) -> None:
    """mergekit would write infinities."""
    with pytest.raises(InputError, match="sum to zero"):
        merge(tmp_path, {"merge_method": "linear", "models": inputs(family, weight=weights)})
