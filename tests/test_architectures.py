"""The decoder against transformers and torch: every architecture, every feature that a config can switch on."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.decoders import greedy_tokens, hidden_states
from helpers.families import Family
from helpers.files import edit_json, read_json, write_json
from helpers.models import finetune, load_torch, random_model, save, tiny_config
from helpers.sampling import sample
from helpers.searches import search_config
from reference.torch_models import torch_logits
from transformers import AutoConfig, AutoModelForCausalLM

from evojax_merge.checkpoints.bank import load_bank, load_stored
from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.parents import open_sources, tensor_shapes
from evojax_merge.commands import merge as merge_command
from evojax_merge.commands import search as search_command
from evojax_merge.errors import InputError
from evojax_merge.models import decoder
from evojax_merge.models.bank import MergeSpec
from evojax_merge.models.config import NO_WINDOW, DecoderConfig, rope_frequencies
from evojax_merge.models.generate import PAD_ID
from evojax_merge.models.sources import StackedWeights

THETA = {"rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA}
# Long enough for both ends of the ramp to lie between the rotary dimensions, so that rounding them matters.
LONG_YARN = YARN | {"original_max_position_embeddings": 4096}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama grouped queries, all biases, tied": (
        "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama one head for all keys, no group": ("llama", {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"}),
    "llama explicit head_dim, llama3 rope": (
        "llama",
        {
            "head_dim": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-3,
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32, **THETA,
            },
        },
    ),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, **THETA}}),
    "llama dynamic rope beyond its context": (
        "llama",
        {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, **THETA}},
    ),
    "llama yarn rope": ("llama", {"rope_parameters": YARN}),
    "llama yarn, a ramp inside": ("llama", {"head_dim": 32, "rope_parameters": LONG_YARN}),
    "llama yarn, attention_factor and betas": (
        "llama", {"rope_parameters": {**YARN, "attention_factor": 1.37, "beta_fast": 16.0, "beta_slow": 2.0}},
    ),
    "llama yarn, mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5}}),
    "llama yarn, not truncated": (
        "llama", {"head_dim": 32, "rope_parameters": {**LONG_YARN, "truncate": False}},
    ),
    "mistral sliding window, head_dim": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "mistral no window, tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 windows in upper layers": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3 head_dim, windows, bias, tied": (
        "qwen3",
        {
            "head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2,
            "attention_bias": True, "tie_word_embeddings": True,
        },
    ),
    "qwen3 untied": ("qwen3", {"head_dim": 8}),
}  # fmt: skip


def load(folder: Path) -> tuple[DecoderConfig, StackedWeights]:
    sources, config = open_sources([folder])
    return config, load_stored(sources, config)


def ours(config: DecoderConfig, model: StackedWeights, tokens: np.ndarray) -> np.ndarray:
    """Logits of a batch without padding."""

    def run(model: StackedWeights, tokens: jax.Array) -> jax.Array:
        return decoder.logits(config, model, hidden_states(config, model, tokens))

    return np.asarray(jax.jit(run)(model, jnp.asarray(tokens, jnp.int32)))


def random_tokens(seed: int, *shape: int, vocab: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, shape)


@pytest.mark.parametrize("case", sample(CASES, 5))
def test_logits_and_greedy_generation_equal_torch(case: str, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    # Weights this large make attention attend to few places, so that positions matter.
    save(random_model(tiny_config(kind, **changes), std=0.22), tmp_path)
    config, model = load(tmp_path)
    tokens = random_tokens(0, 2, 29)
    expected = torch_logits(load_torch(tmp_path), tokens)
    found = ours(config, model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)

    # Prompts of different lengths in one batch, padded at the left with a token that is not special to the decoder;
    # torch continues each of them alone.
    prompts = [random_tokens(1 + i, size) for i, size in enumerate((11, 4, 7))]
    width, new = 12, 14
    padded = np.full((3, width), 5, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    first = np.array([width - len(prompt) for prompt in prompts], np.int32)
    continued = greedy_tokens(config, model, padded, first, new, ())
    for row, prompt in zip(continued, prompts, strict=True):
        # A fresh one each time: transformers' dynamic rope remembers the longest text so far.
        with torch.no_grad():
            whole = load_torch(tmp_path).generate(
                torch.tensor(prompt)[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert row.tolist() == whole[0, len(prompt) :].tolist()

    # Guesses, right ones and wrong ones, change nothing.
    seen = np.concatenate([random_tokens(9, 3, 5), continued[:, :7], random_tokens(8, 3, 1), continued[:, 7:]], axis=1)
    assert greedy_tokens(config, model, padded, first, new, (), window=4, seen=seen).tolist() == continued.tolist()


def test_generation_ends_at_a_stop_token(tmp_path: Path) -> None:
    """What precedes the stop token is as without it; the stop token itself and what follows are not there."""
    save(random_model(tiny_config()), tmp_path)
    config, model = load(tmp_path)
    tokens, first = random_tokens(0, 2, 6).astype(np.int32), np.zeros(2, np.int32)
    endless = greedy_tokens(config, model, tokens, first, 12, ())
    stop = int(endless[0, 5])
    stopped = greedy_tokens(config, model, tokens, first, 12, (stop, 2))
    for with_stop, without in zip(stopped, endless, strict=True):
        ends = np.flatnonzero(np.isin(without, [stop, 2]))
        end = ends[0] if len(ends) else len(without)
        assert with_stop[:end].tolist() == without[:end].tolist()
        assert (with_stop[end:] == PAD_ID).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    save(random_model(tiny_config("qwen2")).to(dtype), tmp_path)
    config, model = load(tmp_path)
    assert model.stacks["layers"]["q"].dtype == jnp.dtype(str(dtype).removeprefix("torch."))
    tokens = random_tokens(0, 2, 17)
    expected = torch_logits(load_torch(tmp_path), tokens)
    np.testing.assert_allclose(ours(config, model, tokens), expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Tied and untied heads


def test_parents_that_store_a_copy_of_the_tied_head(tmp_path: Path) -> None:
    """A tied config counts, whether or not a copy of the embedding is stored under the head's name."""
    from safetensors.torch import load_file, save_file

    model = random_model(tiny_config(tie_word_embeddings=True))
    plain, copied = save(model, tmp_path / "plain"), save(model, tmp_path / "copied")
    tensors = load_file(copied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})

    for order in ([plain, copied], [copied, plain]):
        sources, config = open_sources(order)
        assert config.head_is_embedding
        bank = load_bank(sources, config, MergeSpec("linear", _options("linear"), 0, "float32"))
        assert "head" not in bank.shared
        embedding = np.asarray(bank.shared["embed"].sources)
        np.testing.assert_array_equal(embedding[0], embedding[1])
    tokens = random_tokens(0, 1, 9)
    np.testing.assert_allclose(ours(*load(copied), tokens), torch_logits(load_torch(plain), tokens), atol=1e-4)


def test_tied_and_untied_parents_together_are_untied(tmp_path: Path) -> None:
    tied = save(random_model(tiny_config(tie_word_embeddings=True)), tmp_path / "tied")
    untied = save(random_model(tiny_config(), seed=1), tmp_path / "untied")
    sources, config = open_sources([tied, untied])
    assert not config.head_is_embedding
    bank = load_bank(sources, config, MergeSpec("linear", _options("linear"), 0, "float32"))
    heads = [np.asarray(bank.shared["head"].sources[k]) for k in range(2)]
    np.testing.assert_array_equal(heads[0], load_torch(tied).get_input_embeddings().weight.detach().numpy())
    np.testing.assert_array_equal(heads[1], load_torch(untied).get_output_embeddings().weight.detach().numpy())
    assert not np.array_equal(heads[1], np.asarray(bank.shared["embed"].sources[1]))


def _options(name: str) -> Any:
    from merge_kernels import METHODS

    return METHODS[name].options


# ---------------------------------------------------------------------------------------------------------------
# The head in tiles


@pytest.mark.parametrize("tile", sample([1, 7, 63, 64, 8192], 2))
def test_log_probabilities_do_not_depend_on_the_tile(
    tile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(random_model(tiny_config(), std=0.4), tmp_path)
    config, model = load(tmp_path)
    monkeypatch.setattr(decoder, "VOCAB_TILE", tile)
    hidden = np.random.default_rng(0).normal(size=(128, config.hidden)).astype(np.float32)
    targets = np.resize(np.arange(config.vocab), 128)
    found, likeliest = decoder.target_logprobs(config, model, jnp.asarray(hidden), jnp.asarray(targets, jnp.int32))
    scores = load_torch(tmp_path).lm_head(torch.tensor(hidden)).detach()
    expected = torch.log_softmax(scores, dim=-1).gather(1, torch.tensor(targets)[:, None])[:, 0]
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), atol=1e-4)
    assert np.asarray(likeliest).tolist() == (scores.argmax(dim=-1).numpy() == targets).tolist()


def test_padding_at_the_left_changes_nothing(tmp_path: Path) -> None:
    """Hidden states of the real columns are those of the text alone, whatever stands in the padding."""
    save(random_model(tiny_config("mistral", sliding_window=4)), tmp_path)
    config, model = load(tmp_path)
    text = random_tokens(0, 1, 10)
    alone = hidden_states(config, model, text)
    padded = np.concatenate([random_tokens(1, 1, 5), text], axis=1)
    shifted = hidden_states(config, model, padded, [5], [10])
    np.testing.assert_allclose(np.asarray(shifted)[:, 5:], np.asarray(alone), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Configs that are refused


def _set(key: str, value: Any) -> Any:
    return lambda config: config.__setitem__(key, value)


def _rope(**changes: Any) -> Any:
    return lambda config: config["rope_parameters"].update(changes)


REFUSED = {
    "another activation": ("llama", _set("hidden_act", "tanh"), "hidden_act"),
    "a Granite multiplier": ("llama", _set("residual_multiplier", 0.5), "residual_multiplier"),
    "Granite's attention scale": ("llama", _set("attention_multiplier", 0.015625), "attention_multiplier"),
    "MiniCPM's depth scale": ("llama", _set("scale_depth", 1.4), "scale_depth"),
    "MiniCPM's embedding scale": ("mistral", _set("scale_emb", 12), "scale_emb"),
    "a multiplier that is a text": ("llama", _set("logits_scaling", "8"), "logits_scaling"),
    "Gemma's cap": ("llama", _set("final_logit_softcapping", 30.0), "final_logit_softcapping"),
    "Gemma's attention scale": ("llama", _set("query_pre_attn_scalar", 256), "query_pre_attn_scalar"),
    "layers without positions": ("llama", _set("no_rope_layers", [1, 1, 0]), "no_rope_layers"),
    "positions of images": ("qwen2", _set("use_mrope", True), "use_mrope"),
    "layers of unlike shapes": ("llama", _set("per_layer_config", {"0": {"intermediate_size": 8}}), "per_layer_config"),
    "quantised": ("llama", _set("quantization_config", {"quant_method": "gptq"}), "quantization_config.*gptq"),
    "quantised, in other words": ("llama", _set("compression_config", {"x": 1}), "compression_config"),
    "longrope": ("llama", _rope(rope_type="longrope", short_factor=[1.0] * 6, long_factor=[2.0] * 6), "rope"),
    "partial rotary": ("llama", _rope(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "a rope key that is not of its kind": ("llama", _rope(beta_fast=16.0), "beta_fast"),
    "another architecture": ("llama", _set("model_type", "bloom"), "bloom"),
    "an unknown kind of layer": ("qwen2", _set("layer_types", ["full_attention", "linear_attention"] * 2), "layer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_handled_is_refused_by_name(case: str, tmp_path: Path) -> None:
    kind, change, named = REFUSED[case]
    save(random_model(tiny_config(kind)), tmp_path)
    edit_json(tmp_path / "config.json", change)
    with pytest.raises(InputError, match=named) as raised:
        open_sources([tmp_path])
    assert raised.value.where == str(tmp_path / "config.json")
    assert "\n" not in str(raised.value)


def test_attributes_at_their_default_and_of_no_consequence_are_accepted(tmp_path: Path) -> None:
    save(random_model(tiny_config()), tmp_path)
    edit_json(
        tmp_path / "config.json",
        lambda config: config.update(
            {"pretraining_tp": 1, "use_cache": False, "_name_or_path": "elsewhere", "attention_dropout": 0.1}
        ),
    )
    _, config = open_sources([tmp_path])
    assert config.layers == 3


# config.json as repositories and trainers leave them, but for the number of layers, and what all of them have.
LEFT_BY_TRANSFORMERS = {
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.0",
}  # fmt: skip
LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000,
    "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3 = LLAMA_2 | {
    "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 500000.0, "vocab_size": 128256,
    "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_31_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "rms_norm_eps": 1e-5,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
QWEN_25 = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "max_position_embeddings": 32768, "max_window_layers": 24, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
UNSLOTH = {
    "_name_or_path": "unsloth/mistral-7b-bnb-4bit", "unsloth_fixed": True, "unsloth_version": "2024.9",
    "unk_token_id": 0, "pad_token_id": 770, "dtype": "bfloat16",
}  # fmt: skip
REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": (
        "llama",
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
            "eos_token_id": 0, "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
            "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9,
            "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_interleaved": False,
            "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        },
    ),
    "Llama-2-7b": ("llama", LLAMA_2 | {"_name_or_path": "meta-llama/Llama-2-7b-hf", "pretraining_tp": 2}),
    "Llama of the first days": (
        "llama",
        {
            "architectures": ["LLaMAForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008, "pad_token_id": -1,
            "num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_sequence_length": 2048, "vocab_size": 32000,
        },
    ),
    "Llama-3-8B": ("llama", LLAMA_3),
    "Llama-3.1-8B-Instruct": (
        "llama",
        LLAMA_3 | {
            "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072, "rope_scaling": LLAMA_31_ROPE,
        },
    ),
    "Llama-3.2-1B": (
        "llama",
        LLAMA_3 | {
            "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
            "rope_scaling": LLAMA_31_ROPE | {"factor": 32.0}, "tie_word_embeddings": True,
        },
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        "llama", LLAMA_3 | {"max_position_embeddings": 131072, "rope_scaling": LLAMA_31_ROPE, "eos_token_id": 128001},
    ),
    "TinyLlama, tuned by axolotl": (
        "llama",
        LLAMA_2 | {
            "_name_or_path": "TinyLlama/TinyLlama-1.1B", "hidden_size": 2048, "intermediate_size": 5632,
            "num_key_value_heads": 4, "max_position_embeddings": 2048, "neftune_noise_alpha": 5,
            "_flash_attn_2_enabled": True, "attn_implementation": "flash_attention_2", "model_parallel": False,
        },
    ),
    "a Vicuna with stretched positions": (
        "llama", LLAMA_2 | {"rope_scaling": {"factor": 4.0, "type": "linear"}, "max_sequence_length": 16384},
    ),
    "a CodeLlama, dynamic": (
        "llama", LLAMA_2 | {"rope_scaling": {"factor": 2.0, "type": "dynamic"}, "rope_theta": 1000000},
    ),
    "Yarn-Llama": (
        "llama",
        LLAMA_2 | {
            "rope_scaling": {
                "factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True,
            },
            "max_position_embeddings": 65536,
            "auto_map": {"AutoModelForCausalLM": "modeling_llama_yarn.LlamaForCausalLM"},
        },
    ),
    "a Llama with head_dim null, and keys of other families": (
        "llama",
        LLAMA_3 | {
            "head_dim": None, "sliding_window": 4096, "use_mrope": False, "num_experts": 8, "embedding_multiplier": 1.0,
            "layer_types": ["sliding_attention", "sliding_attention"], "logit_scale": 1, "sep_token_id": 5,
            "final_logit_softcapping": None, "query_pre_attn_scalar": 128, "use_bfloat16": True, "torchscript": False,
        },
    ),
    "yarn, with the original context beside it": (
        "llama",
        LLAMA_3 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 2048},
    ),
    "Mistral-7B-v0.1": ("mistral", MISTRAL),
    "Mistral-Nemo": (
        "mistral",
        MISTRAL | {
            "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 1024000, "rope_theta": 1000000.0,
            "sliding_window": None, "vocab_size": 131072,
        },
    ),
    "Zephyr": ("mistral", MISTRAL | {"_name_or_path": "mistralai/Mistral-7B-v0.1", "pad_token_id": 2}),
    "OpenHermes": ("mistral", MISTRAL | {"eos_token_id": 32000, "vocab_size": 32002, "use_cache": False}),
    "an Unsloth fine-tune of Mistral": ("mistral", MISTRAL | UNSLOTH | {"attention_bias": True, "mlp_bias": True}),
    "Qwen2.5-0.5B": ("qwen2", QWEN_25 | {"use_mrope": False}),
    "Qwen2.5 with a window of nothing that is not used": ("qwen2", QWEN_25 | {"sliding_window": 0}),
    "Qwen2.5, yarn": (
        "qwen2",
        QWEN_25 | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        "qwen2",
        QWEN_25 | {
            "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "max_window_layers": 21,
            "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False, "use_mrope": False,
        },
    ),
    "an Unsloth fine-tune of Qwen3": (
        "qwen3",
        QWEN_25 | UNSLOTH | {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
            "intermediate_size": 3072, "max_position_embeddings": 40960, "num_attention_heads": 16,
            "num_key_value_heads": 8, "layer_types": ["full_attention", "full_attention"], "sliding_window": None,
        },
    ),
    "written by transformers 5": (
        "qwen3",
        {
            "attention_bias": False, "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 300,
            "max_position_embeddings": 40960, "num_attention_heads": 16, "num_key_value_heads": 8, "dtype": "bfloat16",
            "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sample(REAL, 8))
def test_real_configs_are_read_as_transformers_reads_them(case: str, tmp_path: Path) -> None:
    kind, own = REAL[case]
    document = LEFT_BY_TRANSFORMERS | own | {"model_type": kind, "num_hidden_layers": 2}
    config = decoder_config(write_json(tmp_path / "config.json", document))

    theirs = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs, attn_implementation="eager")
    expected = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    if config.head_is_embedding:
        expected.pop("lm_head.weight")
    assert tensor_shapes(config) == expected
    assert config.head_is_embedding == theirs.tie_word_embeddings
    layer = model.model.layers[0]
    assert (config.kv_heads, config.head_dim) == (theirs.num_key_value_heads, layer.self_attn.head_dim)
    assert config.norm_eps == layer.input_layernorm.variance_epsilon

    rotary = type(model.model.rotary_emb)(theirs)
    found = rope_frequencies(config.rope, config.head_dim, jnp.asarray([16], jnp.int32))[0]
    np.testing.assert_allclose(np.asarray(found), rotary.inv_freq.numpy(), rtol=1e-5)
    assert config.rope.attention_factor == pytest.approx(rotary.attention_scaling)

    windows = getattr(theirs, "sliding_window", None) if kind != "llama" else None
    assert set(config.windows) == {windows or NO_WINDOW}


def test_keys_that_nobody_reads_are_kept_and_named_once(family: Family, tmp_path: Path, capsys: Any) -> None:
    """In a search, which exports the winner, and in a merge; they may differ between the models."""
    models = {}
    for number, (name, path) in enumerate(zip(("base", "one", "two"), (family.base, *family.parents), strict=True)):
        models[name] = shutil.copytree(path, tmp_path / name)
        left = {"rope_interleaved": False, "unsloth_version": f"2024.{number}", "auto_map": {"AutoModel": "x.Y"}}
        edit_json(models[name] / "config.json", lambda config, left=left: config.update(left))
    recipe = {
        "merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 1}} for name in models],
    }  # fmt: skip
    write_json(tmp_path / "recipe.yaml", recipe)
    space = {"method": "linear", "parameters": {"weight": {"low": 0.0, "high": 1.0}}}
    config = search_config(family, 1, base=None, parents=["one", "two"], space=space)
    write_json(tmp_path / "config.yaml", config)
    merge_command.merge(tmp_path / "recipe.yaml", tmp_path / "merged", merge_command.MergeOptions())
    said = [capsys.readouterr().out]
    search_command.search(tmp_path / "config.yaml", tmp_path / "run", False, False, None, [])
    said.append(capsys.readouterr().out)
    for out, folder in zip(said, (tmp_path / "merged", tmp_path / "run" / "best" / "model"), strict=True):
        named = [line for line in out.splitlines() if "unsloth_version" in line]
        assert len(named) == 1 and "rope_interleaved" in named[0] and "auto_map" in named[0]
        written = read_json(folder / "config.json")
        assert written["unsloth_version"].startswith("2024.") and written["rope_interleaved"] is False


def test_configs_that_differ_in_the_forward_pass_are_refused(tmp_path: Path) -> None:
    one = save(random_model(tiny_config()), tmp_path / "one")
    for key, value in (("rms_norm_eps", 1e-2), ("hidden_act", "relu")):
        other = save(finetune(random_model(tiny_config()), 1), tmp_path / key)
        edit_json(other / "config.json", _set(key, value))
        with pytest.raises(InputError) as raised:
            open_sources([one, other])
        assert str(other / "config.json") in str(raised.value)
    other = save(finetune(random_model(tiny_config()), 1), tmp_path / "longer")
    edit_json(other / "config.json", _set("max_position_embeddings", 512))
    open_sources([one, other])


def test_old_spelling_of_rope_settings_is_read(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` beside each other, as configs had them before `rope_parameters`."""
    save(random_model(tiny_config()), tmp_path)

    def old(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}

    edit_json(tmp_path / "config.json", old)
    assert "rope_parameters" not in read_json(tmp_path / "config.json")
    config, model = load(tmp_path)
    assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("linear", 5e5, 2.0)
    tokens = random_tokens(0, 1, 20)
    np.testing.assert_allclose(ours(config, model, tokens), torch_logits(load_torch(tmp_path), tokens), atol=1e-4)
