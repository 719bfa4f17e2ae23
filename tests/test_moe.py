"""Mixtures of experts out of dense models, against mergekit-moe and transformers."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.commands import assert_refused, run_here
from helpers.decoders import stored_logits
from helpers.files import edit_json, write_yaml
from helpers.mergekit import assert_same_tensors
from helpers.models import CONFIGS, finetune, load_torch, random_model, save, state, tiny_config, word_tokenizer, words

CONFIGS |= {
    "phi3": transformers.Phi3Config, "gemma": transformers.GemmaConfig, "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig, "phi": transformers.PhiConfig,
}  # fmt: skip
PROMPTS = (["w4 w5 w6", "w7 w8"], ["w20 w21 w22 w23", "w24"], ["w40", "w41 w42 w43 w44 w45"])
TOKENS = np.random.default_rng(0).integers(4, 64, (2, 40))


def dense_models(folder: Path, kind: str, count: int = 4, **changes: Any) -> list[Path]:
    base = random_model(tiny_config(kind, **changes))
    models = [base, *(finetune(base, seed, 0.2) for seed in range(1, count))]
    return [save(model, folder / f"{kind}-{i}") for i, model in enumerate(models)]


def recipe_of(models: list[Path], **changes: Any) -> dict[str, Any]:
    """A recipe of the first model as base, with the next three as experts."""
    experts = [{"source_model": str(model), "positive_prompts": PROMPTS[i]} for i, model in enumerate(models[1:4])]
    return {"base_model": str(models[0]), "experts": experts, "dtype": "float32"} | changes


def by_mergekit(document: dict[str, Any], out: Path, wide: bool = True) -> dict[str, np.ndarray]:
    """The tensors of mergekit-moe's mixture by their names in per-expert files. wide: it computes hidden states in
    float32, not in bfloat16."""
    from mergekit.moe import router
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    class Wide:
        @staticmethod
        def from_pretrained(*arguments: Any, **options: Any) -> Any:
            return transformers.AutoModelForCausalLM.from_pretrained(
                *arguments, **options | {"torch_dtype": torch.float32}
            )

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        if wide:
            patch.setattr(router, "AutoModelForCausalLM", Wide)
        config = MoEMergeConfig.model_validate(document)
        build(config, str(out), MergeOptions(quiet=True, clone_tensors=True), device="cpu")
    return unpacked(state(out))


def unpacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Packed experts as one tensor for each, under Qwen's names."""
    parts: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(values):
                for part, rows in zip(("gate_proj", "up_proj"), np.split(both, 2), strict=True):
                    parts[f"{name.removesuffix('gate_up_proj')}{e}.{part}.weight"] = rows
        elif name.endswith("experts.down_proj"):
            parts |= {f"{name.removesuffix('down_proj')}{e}.down_proj.weight": each for e, each in enumerate(values)}
        else:
            parts[name] = values
    return parts


def as_qwens(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of Mixtral's files under Qwen's names."""
    names = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
    for old, new in names.items():
        tensors = {name.replace(old, new): values for name, values in tensors.items()}
    return tensors


def ours(document: dict[str, Any], folder: Path, *options: str) -> tuple[Path, str]:
    done = run_here("moe", write_yaml(folder / "moe.yaml", document), folder / "out", *options)
    return folder / "out", done.stderr


def assert_transformers_agrees(folder: Path) -> None:
    with torch.no_grad():
        expected = load_torch(folder)(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(stored_logits(folder, TOKENS), expected, rtol=2e-3, atol=2e-3)


SHARED = {"positive_prompts": ["w50 w51"]}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden": ("llama", {}),
    "hidden of a Mistral": ("mistral", {"gate_mode": "hidden", "experts_per_token": 1}),
    "cheap_embed": ("mistral", {"gate_mode": "cheap_embed"}),
    "Qwen2 with a shared expert": ("qwen2", {"shared": SHARED}),
    "Qwen2's class for Llamas": ("llama", {"shared": SHARED, "architecture": "qwen"}),
    "Qwen3": ("qwen3", {}),
    "Qwen3, cheap_embed": ("qwen3", {"gate_mode": "cheap_embed", "architecture": "qwen3"}),
    "DeepSeek": ("llama", {"architecture": "deepseek"}),
    "DeepSeek with a shared expert": ("mistral", {"architecture": "deepseek", "shared": {}, "experts_per_token": 1}),
    "scaled experts": ("llama", {"residual_scale": 0.5}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_mixtures_are_mergekits_to_the_tensor(name: str, tmp_path: Path) -> None:
    """Negative prompts, of one expert and of as many tokens each, are in every recipe. transformers opens what it has a
    class for, and its logits are ours."""
    kind, changes = PUBLISHED[name]
    changes = dict(changes)
    models = dense_models(tmp_path, kind)
    document = recipe_of(models)
    document["experts"][0]["negative_prompts"] = ["w60 w61", "w62 w63"]
    for expert in document["experts"]:
        expert |= {key: changes[key] for key in ("residual_scale",) if key in changes}
    if "shared" in changes:
        document["shared_experts"] = [{"source_model": str(models[0]), **changes.pop("shared")}]
    document |= {key: value for key, value in changes.items() if key != "residual_scale"}
    out, _ = ours(document, tmp_path)
    assert_same_tensors(as_qwens(state(out)), by_mergekit(document, tmp_path / "theirs"), rtol=1e-5, atol=2e-5)
    if document.get("architecture") != "deepseek":
        assert_transformers_agrees(out)


# ---------------------------------------------------------------------------------------------------------------
# Where it differs on purpose


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "head size": ("llama", {"head_dim": 20}),
    "rope": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                       "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "window": ("mistral", {"sliding_window": 8}),
    "phi3": ("phi3", {}),
    "gemma": ("gemma", {"head_dim": 20}),
    "qwen3": ("qwen3", {"head_dim": 12}),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_mixture_of_one_model_is_that_model(name: str, tmp_path: Path) -> None:
    """The weights of a token's experts add up to 1. A Mistral keeps its window (mergekit removes it, and texts beyond
    it get answers that no parent gives), a Phi-3's packed projections are taken apart, and a Gemma's gains and
    embeddings are written as a Mixtral's (mergekit refuses both)."""
    kind, changes = VARIANTS[name]
    (model,) = dense_models(tmp_path, kind, 1, **changes)
    document = recipe_of([model] * 3, gate_mode="random")
    out, _ = ours(document, tmp_path, "--i-understand-this-is-not-useful-without-training")
    with torch.no_grad():
        expected = load_torch(model)(torch.tensor(TOKENS)).logits.numpy()
        np.testing.assert_allclose(load_torch(out)(torch.tensor(TOKENS)).logits.numpy(), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(stored_logits(out, TOKENS), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shared", [False, True])
def test_gemmas_make_mixtures_with_gates_of_their_own_states(shared: bool, tmp_path: Path) -> None:
    models = dense_models(tmp_path, "gemma")
    more = {"shared_experts": [{"source_model": str(models[0]), **SHARED}]} if shared else {}
    out, _ = ours(recipe_of(models, **more), tmp_path)
    assert_transformers_agrees(out)
    expected = np.stack(
        [rows_of([hidden_states(models[0], text, torch.float32)[:, -1] for text in texts]) for texts in PROMPTS], axis=1
    )
    gates = {name: values for name, values in as_qwens(state(out)).items() if name.endswith("mlp.gate.weight")}
    np.testing.assert_allclose(gates_of(gates), expected, atol=1e-4)
    experts = [value for name, value in sorted(as_qwens(state(out)).items()) if ".0.mlp.experts." in name]
    assert len(experts) == 9
    for value, model, part in zip(experts, np.repeat(models[1:4], 3), ["down", "gate", "up"] * 3, strict=True):
        np.testing.assert_array_equal(value, state(model)[f"model.layers.0.mlp.{part}_proj.weight"])


def test_a_gemmas_embedding_is_scaled_by_its_dtypes_factor(tmp_path: Path) -> None:
    """transformers rounds the factor to the dtype of the weights, bfloat16, and so are logits of both in it."""
    (model,) = dense_models(tmp_path, "gemma", 1, head_dim=20)
    network = load_torch(model).to(torch.bfloat16)
    network.save_pretrained(model)
    document = recipe_of([model] * 3, gate_mode="random", dtype=None)
    out, _ = ours(document, tmp_path, "--i-understand-this-is-not-useful-without-training")
    (table,) = (value for name, value in state(out).items() if "embed_tokens" in name)
    factor = torch.tensor(48**0.5, dtype=torch.bfloat16)
    expected = (network.model.embed_tokens.weight.data * factor).float().numpy()
    np.testing.assert_array_equal(np.asarray(table, np.float32), expected)


def test_models_that_no_mixture_holds_are_refused_with_the_reason(tmp_path: Path) -> None:
    reasons = {"gemma2": "norms behind attention and MLP, and its logits a soft cap", "gemma3_text": "norms behind",
               "phi": "side by side, and the MLP has no gate"}  # fmt: skip
    for kind, reason in reasons.items():
        (model,) = dense_models(tmp_path, kind, 1)
        recipe = write_yaml(tmp_path / "moe.yaml", recipe_of([model] * 4, gate_mode="random"))
        assert_refused((f"model_type is '{kind}', of which no mixture", reason, "expected one of llama"), "moe", recipe,
                       tmp_path / "out", "--i-understand-this-is-not-useful-without-training")  # fmt: skip
    long = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}  # fmt: skip
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    for kind, changes, reason in (
        ("gemma", {"attention_bias": True}, "qkv_bias is True, which a Mixtral cannot have"),
        ("phi3", {"rope_parameters": long}, "rope_type: 'longrope' is not supported"),
        ("phi3", {"rope_parameters": partial}, "partial_rotary_factor: 0.5; expected null or 1"),
    ):
        (model,) = dense_models(tmp_path / str(len(reason)), kind, 1, **changes)
        recipe = write_yaml(tmp_path / "moe.yaml", recipe_of([model] * 4, gate_mode="random"))
        assert_refused((reason,), "moe", recipe, tmp_path / "out", "--i-understand-this-is-not-useful-without-training")


def test_every_expert_has_tensors_of_its_own(tmp_path: Path) -> None:
    """Under the names of the files that Mixtral's makers published; transformers 4 reads no others."""
    out, _ = ours(recipe_of(dense_models(tmp_path, "llama", num_hidden_layers=1)), tmp_path)
    layer = "model.layers.0."
    expected = {f"{layer}block_sparse_moe.experts.{e}.w{i}.weight" for e in range(3) for i in (1, 2, 3)}
    expected |= {f"{layer}self_attn.{part}_proj.weight" for part in "qkvo"}
    expected |= {f"{layer}{part}.weight" for part in ("input_layernorm", "post_attention_layernorm")}
    expected |= {f"{layer}block_sparse_moe.gate.weight", "model.embed_tokens.weight", "model.norm.weight"}
    assert set(state(out)) == expected | {"lm_head.weight"}
    config = transformers.AutoConfig.from_pretrained(out)
    assert (config.model_type, config.num_local_experts, config.num_experts_per_tok) == ("mixtral", 3, 2)
    assert (out / "mergekit_moe_config.yml").exists() and (out / "tokenizer.json").exists()


def hidden_states(folder: Path, text: str, dtype: torch.dtype) -> np.ndarray:
    """float64[L, T, H]: the states that enter the layers, as torch computes them in a dtype."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("<s>" + text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        states = load_torch(folder).to(dtype)(ids, output_hidden_states=True).hidden_states[:-1]
    return np.stack([each[0].double().numpy() for each in states])


def rows_of(states: list[np.ndarray]) -> np.ndarray:
    mean = np.mean(states, axis=0)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def gates_of(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """[L, E, H]"""
    return np.stack([values for name, values in sorted(tensors.items()) if name.endswith("gate.weight")])


def test_gates_are_of_states_in_float32(tmp_path: Path) -> None:
    """mergekit computes the base in bfloat16: its gates are a hundred times as far from those in float64."""
    models = dense_models(tmp_path, "llama")
    out, _ = ours(recipe_of(models), tmp_path)
    exact = np.stack(
        [rows_of([hidden_states(models[0], text, torch.float64)[:, -1] for text in texts]) for texts in PROMPTS], axis=1
    )
    errors = [
        np.abs(gates_of(as_qwens(tensors)) - exact).max()
        for tensors in (state(out), by_mergekit(recipe_of(models), tmp_path / "theirs", wide=False))
    ]
    assert errors[0] < 1e-5 and errors[0] * 100 < errors[1]


def test_a_mean_over_tokens_leaves_out_the_padding(tmp_path: Path) -> None:
    """mergekit divides by the length of the longest prompt, and adds up what padding gives."""
    models = dense_models(tmp_path, "llama")
    document = recipe_of(models, gate_mode="hidden_avg")
    out, _ = ours(document, tmp_path)
    expected = np.stack(
        [rows_of([hidden_states(models[0], text, torch.float64).mean(axis=1) for text in texts]) for texts in PROMPTS],
        axis=1,
    )
    np.testing.assert_allclose(gates_of(state(out)), expected, atol=1e-5)
    theirs = gates_of(by_mergekit(document, tmp_path / "theirs"))
    assert np.abs(theirs[:, 0] - expected[:, 0]).max() > 0.01
    # With prompts of one length the two agree.
    document["experts"] = [expert | {"positive_prompts": expert["positive_prompts"][:1]} for expert in
                           document["experts"]]  # fmt: skip
    (tmp_path / "even").mkdir()
    even, _ = ours(document, tmp_path / "even")
    np.testing.assert_allclose(
        gates_of(state(even)), gates_of(by_mergekit(document, tmp_path / "even" / "theirs")), atol=1e-5
    )


def test_normed_gates_are_of_what_the_router_receives(tmp_path: Path) -> None:
    """A mixture whose experts are all the base, so that its layers compute what the base's do."""
    (model,) = dense_models(tmp_path, "llama", 1)
    document = recipe_of([model] * 4, gate_input="normed")
    out, _ = ours(document, tmp_path, "--i-understand-this-is-not-useful-without-training")
    network, tokenizer = load_torch(out), transformers.AutoTokenizer.from_pretrained(out)
    received: list[np.ndarray] = []
    for layer in network.model.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: received.append(inputs[0][0, -1].numpy()))
    for expert, texts in enumerate(PROMPTS):
        states = []
        for text in texts:
            received.clear()
            with torch.no_grad():
                network(torch.tensor([tokenizer("<s>" + text, add_special_tokens=False)["input_ids"]]))
            states.append(np.stack(received))
        np.testing.assert_allclose(gates_of(state(out))[:, expert], rows_of(states), atol=2e-4)


def test_gates_that_cannot_tell_experts_apart_are_named_with_their_angle(tmp_path: Path) -> None:
    models = dense_models(tmp_path, "llama")
    document = recipe_of(models)
    # The state at a prompt's end depends mostly on its last word.
    document["experts"][1]["positive_prompts"] = ["w4 w5 w6", "w7 w8", "w5 w7 w8"]
    _, warnings = ours(document, tmp_path)
    assert f"the router hardly tells expert 0 ({models[1]}) from expert 1 ({models[2]}) in " in warnings
    assert "° to " in warnings and "gate_input: normed" in warnings
    assert "from expert 2" not in warnings


def test_random_gates_need_no_prompts_and_come_of_the_seed(tmp_path: Path) -> None:
    """mergekit refuses uniform_random without prompts, and its numbers are new ones each time."""
    models = dense_models(tmp_path, "llama")
    folders = {}
    for mode in ("random", "uniform_random"):
        document = recipe_of(models, gate_mode=mode)
        document["experts"] = [{"source_model": expert["source_model"]} for expert in document["experts"]]
        for name, options in ((f"{mode}-0", ()), (f"{mode}-again", ()), (f"{mode}-1", ("--seed", "1"))):
            (tmp_path / name).mkdir()
            folders[name] = gates_of(state(ours(document, tmp_path / name, *options)[0]))
        np.testing.assert_array_equal(folders[f"{mode}-0"], folders[f"{mode}-again"])
        assert not np.allclose(folders[f"{mode}-0"], folders[f"{mode}-1"])
    assert abs(folders["random-0"].std() - 1) < 0.1
    uniform = folders["uniform_random-0"]
    assert np.abs(uniform).max() <= 48**-0.5 and abs(uniform.std() - (3 * 48) ** -0.5) < 0.01


def test_noise_is_that_of_the_seed_and_of_every_mlp(tmp_path: Path) -> None:
    models = dense_models(tmp_path, "llama")
    plain, _ = ours(recipe_of(models), tmp_path)
    (tmp_path / "noisy").mkdir()
    document = recipe_of(models)
    document["experts"][1]["noise_scale"] = 0.5
    noisy, _ = ours(document, tmp_path / "noisy")
    for name, values in state(noisy).items():
        noise = values - state(plain)[name]
        assert abs(noise.std() - (0.5 if ".experts.1." in name else 0)) < 0.02, name


# ---------------------------------------------------------------------------------------------------------------
# Bad input


def test_bad_recipes_are_refused_in_a_line(tmp_path: Path) -> None:
    models = dense_models(tmp_path, "llama", num_hidden_layers=1)
    (wider,) = dense_models(tmp_path / "wide", "llama", 1, num_hidden_layers=1, intermediate_size=96)
    (deeper,) = dense_models(tmp_path / "deep", "llama", 1, num_hidden_layers=2)
    (other,) = dense_models(tmp_path, "qwen2", 1, num_hidden_layers=1)
    (biased,) = dense_models(tmp_path / "biased", "llama", 1, num_hidden_layers=1, attention_bias=True)

    def refused(says: tuple[str, ...], **changes: Any) -> None:
        document = recipe_of(models) | changes
        assert_refused(says, "moe", write_yaml(tmp_path / "bad.yaml", document), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    experts = recipe_of(models)["experts"]

    def changed(**keys: Any) -> list[dict[str, Any]]:
        return [experts[0], experts[1] | keys]

    bare = {"source_model": str(models[1])}
    refused(("experts.1.positive_prompts: missing", "gate_mode hidden"), experts=[experts[0], bare])
    refused(("all have the same prompts",), experts=changed(positive_prompts=PROMPTS[0]))
    refused(("all are one model", "--i-understand"), experts=changed(source_model=experts[0]["source_model"]))
    refused(("mlp is 96, but 80",), experts=changed(source_model=str(wider)))
    refused(("layers is 2, but 1",), experts=changed(source_model=str(deeper)))
    refused(("model_type is 'qwen2'", "expected one architecture"), experts=changed(source_model=str(other)))
    refused(("experts: 49", "hidden state has 48"), experts=experts[:1] * 48 + experts[1:2], gate_mode="random")
    refused(("experts_per_token: 4, of 3 experts",), experts_per_token=4)
    refused(("gate_mode: expected hidden, hidden_avg", "found 'hiden'"), gate_mode="hiden")
    refused(("experts.1.postive_prompts", "did you mean 'positive_prompts'"), experts=changed(postive_prompts=["w4"]))
    refused(("architecture: 'olmoe'", "mixtral, deepseek, qwen2_moe, qwen3_moe"), architecture="olmoe")
    refused(("Mixtral: has no shared experts",), architecture="mixtral", shared_experts=[bare])
    refused(("Qwen MoE: needs shared_experts", "Qwen3 MoE: its models are qwen3, not llama"), architecture="qwen")
    (narrow,) = dense_models(tmp_path / "narrow", "llama", 1, num_hidden_layers=1, head_dim=6)
    of_narrow = {"base_model": str(narrow), "architecture": "deepseek"}
    refused(("DeepSeek MoE: its code takes heads of ", "and head_dim is 6"), **of_narrow)
    refused(("gate_input: normed", "cheap_embed"), gate_mode="cheap_embed", gate_input="normed")
    refused(("has token 63", "60 rows"), base_model=str(_with_fewer_rows(tmp_path)), experts=changed(
        positive_prompts=["w63"]))  # fmt: skip
    biased_recipe = recipe_of([biased, *models[1:]])
    refused(("qkv_bias is True, which a Mixtral cannot have",), **biased_recipe)
    refused(("holds no model.safetensors",), **recipe_of([tmp_path / "wide", *models[1:]]))
    for document, says in (
        ({"merge_method": "linear", "models": []}, ("is a mergekit recipe", "evojax-merge merge")),
        ({"parents": [], "tasks": []}, ("is the config of a search", "evojax-merge search")),
    ):
        assert_refused(says, "moe", write_yaml(tmp_path / "bad.yaml", document), tmp_path / "out")
    recipe = write_yaml(tmp_path / "moe.yaml", recipe_of(models))
    assert_refused((f"lies inside of {models[1]}",), "moe", recipe, models[1] / "out")


def _with_fewer_rows(folder: Path) -> Path:
    model = random_model(tiny_config("llama", num_hidden_layers=1, vocab_size=60))
    saved = save(model, folder / "fewer")
    word_tokenizer(words(64)).save_pretrained(saved)
    return saved


def test_a_damaged_expert_is_named(tmp_path: Path) -> None:
    models = dense_models(tmp_path, "llama", num_hidden_layers=1)
    network = load_torch(models[2])
    network.model.layers[0].mlp.up_proj.weight.data[0, 0] = np.nan
    save(network, models[2])
    recipe = write_yaml(tmp_path / "moe.yaml", recipe_of(models))
    assert_refused((str(models[2]), "experts.1.w3.weight would hold NaN", "--allow-nonfinite"), "moe", recipe,
                   tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert run_here("moe", recipe, tmp_path / "out", "--allow-nonfinite").returncode == 0
    # A second time only with --overwrite, and never over what another program wrote.
    assert_refused(("out",), "moe", recipe, tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", lambda config: config.update(vocab_size=1))
    assert_refused(("was changed after evojax-merge wrote it",), "moe", recipe, tmp_path / "out", "--overwrite")


def test_keys_that_mergekit_ignores_are_named(tmp_path: Path) -> None:
    document = recipe_of(dense_models(tmp_path, "llama", num_hidden_layers=1), merge_method="moe")
    assert "merge_method: not a key of mergekit-moe; ignored" in ours(document, tmp_path)[1]
