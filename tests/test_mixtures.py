"""Mixtures of experts: what experts compute, merges of every expert's tensors by themselves, and what files hold."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers.commands import refusal
from helpers.decoders import hidden_states, load_decoder, score_merges
from helpers.families import Family, build_family
from helpers.files import edit_json, write_lines, write_yaml
from helpers.mergekit import assert_same_weights
from helpers.models import random_model, save, state, tiny_config
from helpers.sampling import sample
from merge_kernels import METHODS
from reference.decoder import clipped_expert_outputs, expert_outputs, squared_expert_outputs
from test_evaluator import Setting
from test_recipes import WIDE, merge, mergekit_merge

from evojax_merge.backends.decoder.kinds.merge import build_space
from evojax_merge.checkpoints.bank import load_bank, load_stored, stored_tensors
from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.config.search_config import SpaceConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.costs import cost_of
from evojax_merge.mergekit.write import dump_yaml, recipe_document
from evojax_merge.models.bank import MergeSpec, take_candidate
from evojax_merge.models.config import RecurrentShape
from evojax_merge.models.families import mixture
from evojax_merge.models.families.gpt_oss import GptOssConfig
from evojax_merge.models.families.mixture import (
    FEW_TOKENS,
    MixtureConfig,
    blocked_experts,
    every_expert,
    gathered_experts,
    gpu_experts,
    joined_ragged_experts,
)
from evojax_merge.models.families.nemotron_h import NemotronHConfig
from evojax_merge.models.mamba2 import Mamba
from evojax_merge.models.sources import ExpertsInPlace, LazyMerge

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe")
MODULES = {"mixtral": "block_sparse_moe", "qwen2_moe": "mlp", "qwen3_moe": "mlp"}


# ---------------------------------------------------------------------------------------------------------------
# What experts compute


def mixture_of(experts: int, per_token: int) -> MixtureConfig:
    sizes: dict[str, Any] = {"hidden": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "vocab": 8}
    return MixtureConfig(
        architecture="mixtral", **sizes, windows=(8,), mlp=12, norm_eps=1e-6, activation="silu", rope=None,
        rotary_dim=0, experts=experts, experts_per_token=per_token, weights_sum_to_one=True,
    )  # fmt: skip


def weights_of(config: MixtureConfig, seed: int) -> dict[str, np.ndarray]:
    rng, (e, m, h) = np.random.default_rng(seed), (config.experts, config.mlp, config.hidden)
    shapes = {"gate": (e, m, h), "up": (e, m, h), "down": (e, h, m)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


# What a CPU, a TPU, and a GPU by the number of tokens compute.
COMPUTES = [blocked_experts, joined_ragged_experts, gathered_experts, every_expert]


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(
    ("tokens", "experts", "per_token", "crowded"),
    sample([(1, 4, 2, False), (5, 4, 1, True), (70, 4, 2, False), (150, 6, 2, True), (40, 3, 3, False)], 2),
)
def test_each_token_meets_its_experts(
    compute: Any, tokens: int, experts: int, per_token: int, crowded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and for two candidates side by side. crowded: the first expert takes every token, in several blocks where
    there are many."""
    monkeypatch.setattr(mixture, "SIZES", 2)
    config, rng = mixture_of(experts, per_token), np.random.default_rng(tokens)
    chosen = np.stack([rng.permutation(experts)[:per_token] for _ in range(tokens)]).astype(np.int32)
    if crowded:
        chosen = np.stack([np.r_[0, 1 + rng.permutation(experts - 1)[: per_token - 1]] for _ in range(tokens)])
    x = rng.normal(size=(tokens, config.hidden)).astype(np.float32)
    both = [weights_of(config, seed) for seed in (0, 1)]
    expected = [expert_outputs(weights, x, chosen) for weights in both]
    run = jax.jit(lambda weights, x, chosen: compute(config, weights, x, chosen))
    np.testing.assert_allclose(run(both[0], x, chosen), expected[0], rtol=1e-4, atol=1e-4)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *both)
    found = jax.jit(jax.vmap(run))(stacked, np.stack([x, x]), np.stack([chosen, chosen]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # Candidates that share the experts, with other tokens and other choices.
    shared = jax.jit(jax.vmap(run, in_axes=(None, 0, 0)))(both[0], np.stack([x, -x]), np.stack([chosen, chosen[::-1]]))
    np.testing.assert_allclose(shared[0], expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shared[1], expert_outputs(both[0], -x, chosen[::-1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("form", ["clipped", "squared"])
def test_experts_of_other_forms_are_the_same_everywhere(
    form: str, compute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss's, whose matrices are `[in, out]` and have biases, and Nemotron's, which have no gate."""
    monkeypatch.setattr(mixture, "SIZES", 2)
    plain, rng = vars(mixture_of(4, 2)), np.random.default_rng(5)
    config: MixtureConfig
    if form == "clipped":
        config = GptOssConfig(**plain, swiglu_alpha=1.7, swiglu_limit=1.2)
        shapes: dict[str, tuple[int, ...]] = {"gate_up": (4, 8, 24), "gate_up_bias": (4, 24), "down": (4, 12, 8)}
        reference: Any = partial(clipped_expert_outputs, alpha=1.7, limit=1.2)
    else:
        config = NemotronHConfig(**plain | {"activation": "relu2"}, mamba=Mamba(shape=RecurrentShape(1, 2)))
        shapes, reference = {"up": (4, 12, 8), "down": (4, 8, 12)}, squared_expert_outputs
    two = [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(2)]
    x = rng.normal(size=(2, 70, 8)).astype(np.float32)
    chosen = np.stack([rng.permutation(4)[:2] for _ in range(70)]).astype(np.int32)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *two)
    outputs = jax.jit(jax.vmap(lambda weights, x: compute(config, weights, x, chosen)))(stacked, x)
    for candidate in range(2):
        expected = reference(two[candidate], x[candidate], chosen)
        np.testing.assert_allclose(outputs[candidate], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compute", COMPUTES)
def test_experts_are_differentiated_as_in_one_sum(compute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of two candidates at a time. The first expert takes every token, in two blocks; the last takes none."""
    monkeypatch.setattr(mixture, "SIZES", 2)
    config, rng = mixture_of(4, 2), np.random.default_rng(3)
    x = rng.normal(size=(90, config.hidden)).astype(np.float32)
    chosen = jnp.stack([np.r_[0, rng.integers(1, 3)] for _ in range(90)]).astype(jnp.int32)
    cotangent = rng.normal(size=(90, 2, config.hidden)).astype(np.float32)

    def everywhere(weights: Any, x: jax.Array) -> jax.Array:
        """Every expert of every token, of which those that it has are picked."""
        gate, up = (jnp.einsum("nh,emh->nem", x, weights[name]) for name in ("gate", "up"))
        return jnp.take_along_axis(
            jnp.einsum("nem,ehm->neh", jax.nn.silu(gate) * up, weights["down"]), chosen[:, :, None], axis=1
        )

    def slopes(compute: Any) -> Any:
        of_one = jax.grad(lambda weights, x: (compute(weights, x) * cotangent).sum(), (0, 1))
        weights = jax.tree.map(lambda *leaves: np.stack(leaves), weights_of(config, 0), weights_of(config, 1))
        return jax.jit(jax.vmap(of_one))(weights, np.stack([x, x[::-1]]))

    expected = slopes(everywhere)
    found = slopes(lambda weights, x: compute(config, weights, x, chosen))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3), found, expected)


@pytest.mark.parametrize(("experts", "per_token"), [(8, 2), (64, 8)])
def test_a_gpu_computes_little_in_vain(experts: int, per_token: int) -> None:
    """Of many tokens one and a half times what they need, also of many experts; of few nothing larger than that of all
    experts, once."""
    config = mixture_of(experts, per_token)
    weights = {name: jnp.asarray(values) for name, values in weights_of(config, 0).items()}

    def flops(tokens: int) -> float:
        jaxpr = jax.make_jaxpr(lambda *operands: gpu_experts(config, *operands))(
            weights, jnp.zeros((tokens, config.hidden)), jnp.zeros((tokens, per_token), jnp.int32)
        )
        products = cost_of(jaxpr).products
        return sum(one.flops * count for one, count in products.items()) / (6 * tokens * config.hidden * config.mlp)

    assert per_token <= flops(4096) < 1.6 * per_token
    assert flops(FEW_TOKENS) == experts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", sample(KINDS, 1))
def test_a_scan_leaves_experts_where_they_are(kind: str, dtype: str, tmp_path: Path) -> None:
    """Their products are those of a layer's slice to the bit, and no array has all experts of a layer."""
    config, model = load_decoder(save(random_model(tiny_config(kind)), tmp_path))
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, config.vocab, (2, 40)), jnp.int32)
    whole = model.in_place(tuple(config.parts))
    assert isinstance(whole, ExpertsInPlace)
    states = jax.jit(hidden_states, static_argnums=0)
    sliced, in_place = (states.lower(config, each, tokens).compile() for each in (model, whole))
    np.testing.assert_array_equal(in_place(whole, tokens), sliced(model, tokens))
    experts = sum(leaf.nbytes // len(leaf) for leaves in model.stacks.values() for name, leaf in leaves.items()
                  if name in config.parts and leaves.keys() >= set(config.parts))  # fmt: skip
    saved = [program.memory_analysis().temp_size_in_bytes for program in (sliced, in_place)]
    assert saved[0] - saved[1] >= experts // 2, (saved, experts)


# ---------------------------------------------------------------------------------------------------------------
# Merges


@pytest.fixture(scope="module", params=sample(KINDS, 1))
def mixtures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(tmp_path_factory.mktemp(request.param), tiny_config(request.param, num_hidden_layers=2))


def found_recipe(family: Family, name: str) -> tuple[Any, dict[str, Any]]:
    """A random candidate of a space with a group for each component of each layer: its tensors as they are scored, and
    the recipe that is written for it."""
    method = METHODS[name]
    base = [family.base] if method.options.has_base else []
    sources, decoder = open_sources([*base, *family.parents])
    searched = {p.name: {"low": WIDE[p.name][0], "high": WIDE[p.name][1]} for p in method.parameters if p.searched}
    document = {"method": name, "components": ["attention", "mlp", "norm"], "parameters": searched}
    parents = [str(parent) for parent in family.parents]
    space = build_space("space", SpaceConfig.model_validate(document), method, parents, decoder)
    spec = MergeSpec(name, method.options, 9, "float32", space.constants)
    genome = np.random.default_rng(2).random((1, space.dims)).astype(np.float32)
    recipe = jax.tree.map(np.asarray, take_candidate(space.decode(genome), 0))
    bank = load_bank(sources, decoder, spec)
    model = jax.jit(lambda recipe: LazyMerge.of(bank, recipe, spec).materialise())(recipe)
    written = recipe_document(recipe, spec, decoder, str(family.base) if base else None, parents)
    return dict(stored_tensors(model, decoder)), yaml.safe_load(dump_yaml(written))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """A folder's tensors under the names that our files have, however its experts are stored."""
    sources, config = open_sources([folder])
    return dict(stored_tensors(load_stored(sources, config), config))


@pytest.mark.parametrize("name", sample(["ties", "dare_linear", "slerp"], 2))
def test_each_experts_tensors_are_merged_by_themselves(name: str, mixtures: Family, tmp_path: Path) -> None:
    """The candidate out of the bank is what its recipe gives, tensor by tensor of the files."""
    evaluated, document = found_recipe(mixtures, name)
    written = state(merge(tmp_path, document))
    assert set(evaluated) == set(written)
    for tensor, values in written.items():
        np.testing.assert_allclose(evaluated[tensor], values, rtol=2e-6, atol=1e-6, err_msg=tensor)


def test_recipes_mean_the_same_to_mergekit(mixtures: Family, tmp_path: Path) -> None:
    """It merges what transformers has in memory, a layer's experts packed: the same where no tensor is measured."""
    if decoder_config(mixtures.base / "config.json").architecture == "qwen2_moe":
        pytest.skip("mergekit does not know it, and takes its head for a tensor before the layers")
    evaluated, document = found_recipe(mixtures, "task_arithmetic")
    theirs = tensors_of(mergekit_merge(tmp_path, document))
    assert set(evaluated) == set(theirs)
    for tensor, values in theirs.items():
        np.testing.assert_allclose(evaluated[tensor], values, rtol=1e-5, atol=1e-5, err_msg=tensor)


def test_a_router_has_parameters_of_its_own(mixtures: Family) -> None:
    _, document = found_recipe(mixtures, "slerp")
    kind = decoder_config(mixtures.base / "config.json").architecture
    rows = document["slices"][0]["parameters"]["t"]
    assert len({row["value"] for row in rows}) == len(rows)
    # The first filter that a name has counts.
    names = [row["filter"] for row in rows]
    layer = f"model.layers.0.{MODULES[kind]}"
    router, *experts = (
        next(i for i, wanted in enumerate(names) if wanted in tensor)
        for tensor in (
            f"{layer}.gate.weight",
            f"{layer}.experts.0.w1.weight",
            "model.layers.0.mlp.experts.gate_up_proj",
        )
    )
    assert router not in experts and len(set(experts)) == 1


@pytest.mark.parametrize(
    ("components", "groups"),
    [
        (["attention+mlp+norm"], ["attention+mlp+norm", "router"]),
        (["attention", "router+mlp+norm"], ["attention", "router+mlp+norm"]),
    ],
)
def test_a_router_may_go_with_another_component(components: list[str], groups: list[str], family: Family) -> None:
    dense = open_sources([family.base])[1]
    mixture = replace(dense, architecture="mixtral")
    config = SpaceConfig.model_validate({"method": "linear", "components": components, "layers_per_group": "all"})
    space = build_space("space", config, METHODS["linear"], ["one", "two"], mixture)
    assert list(space.groups[: len(groups)]) == [f"layers 0-{dense.layers - 1} {group}" for group in groups]
    if "router" in components[-1]:
        with pytest.raises(InputError, match=r"components: 'router'.*; expected each of attention, mlp, norm once"):
            build_space("space", config, METHODS["linear"], ["one", "two"], dense)


@pytest.mark.parametrize(("compute", "mlp"), sample(list(zip(COMPUTES, (24, 28, 20, 16), strict=True)), 2))
def test_candidates_side_by_side_score_as_they_do_alone(
    compute: Any, mlp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a CPU computes experts, and as accelerators do. mlp: a width for each, so that programs are not shared."""
    monkeypatch.setattr(mixture, "blocked_experts", lambda *operands: compute(*operands[:4]))
    config = tiny_config("mixtral", num_hidden_layers=2, intermediate_size=mlp)
    setting = Setting(build_family(tmp_path, config), "ties")
    alone, together = (
        score_merges(setting.evaluator([setting.short], chunk=chunk), setting.bank, setting.spec, setting.recipes)
        for chunk in (1, 3)
    )
    for metric, expected in alone.matrices["text"].items():
        np.testing.assert_allclose(together.matrices["text"][metric], expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kind", sample(KINDS, 1))
def test_packed_experts_are_those_of_one_file_each(kind: str, tmp_path: Path) -> None:
    """transformers has the experts of a layer packed in memory, and writes them so if it is told to."""
    model = random_model(tiny_config(kind, num_hidden_layers=2))
    plain = save(model, tmp_path / "plain")
    packed = save(model, tmp_path / "packed", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in state(packed))
    models = [tensors_of(folder) for folder in (plain, packed)]
    expected = state(plain)
    assert set(models[0]) == set(models[1]) == set(expected)
    for name, values in expected.items():
        for found in models:
            np.testing.assert_array_equal(found[name], values, err_msg=name)
    rows = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in (plain, packed)]
    assert_same_weights(merge(tmp_path, {"merge_method": "linear", "models": rows}), plain)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_mixtures_of_other_numbers_of_experts_are_no_parents_of_one_merge(kind: str, tmp_path: Path) -> None:
    """By either command, whether or not the experts are packed: a line that names a tensor, and nothing is written."""
    key = "num_local_experts" if kind == "mixtral" else "num_experts"
    models = [random_model(tiny_config(kind, num_hidden_layers=1, **{key: count})) for count in (4, 3)]
    four, three = (save(model, tmp_path / name) for model, name in zip(models, ("four", "three"), strict=True))
    packed = save(models[1], tmp_path / "packed", save_original_format=False)
    tasks = write_lines(tmp_path / "tasks.jsonl", [{"prompt": "w5", "target": "w6"}] * 4)
    for parents in ((four, three), (three, four), (four, packed)):
        rows = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in parents]
        write_yaml(tmp_path / "recipe.yaml", {"merge_method": "linear", "models": rows})
        search = {
            "parents": [str(folder) for folder in parents],
            "space": {"method": "linear"},
            "tasks": [{"name": "text", "kind": "likelihood", "file": str(tasks), "heldout": 0.5}],
        }
        write_yaml(tmp_path / "search.yaml", search)
        for arguments in (
            ["merge", tmp_path / "recipe.yaml", tmp_path / "out"],
            ["search", tmp_path / "search.yaml", "--out", tmp_path / "out"],
        ):
            line = refusal(*arguments)
            assert parents[1].name in line and re.search(r"model\.layers\.0\.\S+\.(experts\.\d|gate\.)", line), line
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step: 2; expected 1; layers without experts"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers: \[0\]; expected null or an empty list"),
        ({"num_local_experts": 2**30}, "1073741824 experts in 3 layers each; expected at most 200,000 in all"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: 9; expected at most the number of experts, 4"),
    ],
)
def test_what_a_mixture_cannot_be(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(changes))
    with pytest.raises(InputError, match=said):
        decoder_config(tmp_path / "config.json")
