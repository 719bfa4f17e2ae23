"""Every native family, checked alike: against transformers, packed, as a layer path, merged in a search, on a mesh.

A family is a row of `FAMILIES`. A sample of two runs. EVOJAX_TEST_ALL runs all of them, and also the families that
the rest of the suite searches, walks and generates with."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.commands import run_here
from helpers.decoders import greedy_tokens, load_decoder, logits
from helpers.files import (
    edit_json,
    examples_in,
    read_json,
    read_lines,
    read_recipe,
    write_json,
    write_lines,
    write_yaml,
)
from helpers.models import finetune, load_torch, random_model, save, state, word_tokenizer, words
from helpers.sampling import ALL, sample
from helpers.searches import search_config, task_section
from reference.torch_models import text_logprobs, torch_logits, torch_tokens

from evojax_merge.checkpoints.bank import load_path_bank, stored_tensors
from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.parents import open_decoders, tensor_shapes
from evojax_merge.errors import InputError
from evojax_merge.evaluation.batched_tasks import batch_tasks
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.evaluation.paths import PathEvaluator
from evojax_merge.mergekit.execute import merge_to, prepare
from evojax_merge.mergekit.schema import parse_recipe
from evojax_merge.mergekit.write import dump_yaml, path_document
from evojax_merge.models.architecture import find_architecture, model_types
from evojax_merge.models.config import NO_WINDOW
from evojax_merge.models.paths import LayerPath, PathSpec
from evojax_merge.tasks.text import TextTask

VOCAB = 64


@dataclass(frozen=True)
class Row:
    """config: the class in transformers; changes: what differs from `SIZES`, so that every feature bites; hub: a
    config.json as repositories have it, but for the number of layers; covered_elsewhere: whether other tests do what
    these do; head: what its files call the head; older: what config.json says in older words (None: not at all);
    takes_words: whether transformers takes a tokenizer of words for it, and not any as byte-level BPE."""

    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    covered_elsewhere: bool = False
    head: str = "lm_head.weight"
    older: dict[str, Any] = field(default_factory=dict)
    takes_words: bool = True


# Sizes are all different, so that no two axes can be mistaken.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDING = {
    "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "head_dim": 16,
}  # fmt: skip
FAMILIES = {
    "llama": Row("LlamaConfig", covered_elsewhere=True),
    "mistral": Row("MistralConfig", {"sliding_window": 5}, covered_elsewhere=True),
    "qwen2": Row("Qwen2Config", covered_elsewhere=True, takes_words=False),
    "qwen3": Row("Qwen3Config", {"head_dim": 16}, covered_elsewhere=True),
    "gemma2": Row(
        "Gemma2Config",
        {**SLIDING, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0},
        {
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
            "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
            "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
            "num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
            "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
        },
        older={"layer_types": None},
    ),
    "gemma3_text": Row(
        "Gemma3TextConfig",
        {
            **SLIDING, "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
        {
            "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
            "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
            "num_attention_heads": 4, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
            "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
        },
        older={
            "layer_types": None, "rope_local_base_freq": 50.0, "rope_parameters": None,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 1e5, "sliding_window_pattern": 2,
        },
    ),
    "olmo2": Row(
        "Olmo2Config",
        {},
        {
            "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "olmo2",
            "num_attention_heads": 32, "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32",
            "transformers_version": "4.47.0", "use_cache": False, "vocab_size": 100352,
        },
    ),
    "granite": Row(
        "GraniteConfig",
        {
            "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
            "residual_multiplier": 0.6, "tie_word_embeddings": True,
        },
        {
            "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
            "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
            "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
            "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite",
            "num_attention_heads": 32, "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5000000.0, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.47.0.dev0", "use_cache": True, "vocab_size": 49155,
        },
    ),
    "cohere2": Row(
        "Cohere2Config",
        {
            "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "logit_scale": 0.6,
        },
        {
            "architectures": ["Cohere2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 5, "cache_implementation": "hybrid", "eos_token_id": 255001, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "layer_norm_eps": 1e-05, "layer_switch": 4, "logit_scale": 0.25, "max_position_embeddings": 8192,
            "model_type": "cohere2", "num_attention_heads": 32, "num_key_value_heads": 8,
            "order_of_interleaved_layers": "local_attn_first", "pad_token_id": 0,
            "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0,
            "sliding_window": 4096, "sliding_window_pattern": 4, "torch_dtype": "bfloat16",
            "transformers_version": "4.48.0.dev0", "use_cache": True, "use_embedding_sharing": True,
            "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": True,
            "use_qk_norm": False, "vocab_size": 256000,
        },
        older={"layer_types": None, "sliding_window_pattern": 2},
    ),
    "glm4": Row(
        "Glm4Config",
        {"head_dim": 16, "attention_bias": True},
        {
            "architectures": ["Glm4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "eos_token_id": [151329, 151336, 151338, 151348], "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 13696,
            "max_position_embeddings": 32768, "model_type": "glm4", "num_attention_heads": 32,
            "num_key_value_heads": 2, "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.52.0.dev0", "use_cache": True, "vocab_size": 151552,
        },
    ),
    "gpt2": Row(
        "GPT2Config",
        {"n_inner": 40},
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
            "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
            "n_layer": 7, "n_positions": 1024, "resid_pdrop": 0.0, "summary_activation": None,
            "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
            "summary_use_proj": True, "vocab_size": 50257,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
    ),
    "gpt_neox": Row(
        "GPTNeoXConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {
            "architectures": ["GPTNeoXForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
            "bos_token_id": 0, "classifier_dropout": 0.1, "eos_token_id": 0, "hidden_act": "gelu",
            "hidden_dropout": 0.0, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
            "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
            "num_attention_heads": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
            "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True,
            "use_parallel_residual": True, "vocab_size": 50304,
        },
        head="embed_out.weight",
    ),
    "phi3": Row(
        "Phi3Config",
        {
            "sliding_window": 5, "partial_rotary_factor": 0.75, "max_position_embeddings": 192,
            "original_max_position_embeddings": 96,
            "rope_scaling": {
                "type": "longrope", "short_factor": [1.0, 1.5, 2.5], "long_factor": [2.0, 3.0, 5.0],
            },
        },
        {
            "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 199999, "embd_pdrop": 0.0,
            "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072,
            "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
            "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3", "num_attention_heads": 24,
            "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "pad_token_id": 199999,
            "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "long_factor": [1.0 + 0.7 * i for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope",
            },
            "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 200064,
        },
    ),
    "mixtral": Row(
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
        {
            "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
            "num_experts_per_tok": 2, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
            "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
            "use_cache": True, "vocab_size": 32000,
        },
    ),
    "qwen2_moe": Row(
        "Qwen2MoeConfig",
        {
            "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28,
            "shared_expert_intermediate_size": 44,
        },
        {
            "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192,
            "max_window_layers": 21, "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False,
            "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_key_value_heads": 16,
            "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0",
            "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
        },
    ),
    "qwen3_moe": Row(
        "Qwen3MoeConfig",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "norm_topk_prob": True,
            "head_dim": 16, "use_sliding_window": True, "sliding_window": 5,
        },
        {
            "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
            "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
            "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
            "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4, "output_router_logits": False,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
            "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
        },
    ),
}  # fmt: skip
# The text decoders of larger models, which are no models by themselves: tests/test_text_decoders.py.
PARTS = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"}
RUN = sample([name for name, row in FAMILIES.items() if ALL or not row.covered_elsewhere], 2)


class Models:
    """Two models of a family that were made from one base, all in one folder, with a file of examples."""

    def __init__(self, kind: str, root: Path) -> None:
        row = FAMILIES[kind]
        config = getattr(transformers, row.config)(**(SIZES | row.changes))
        config._attn_implementation = "eager"
        # Weights this large make attention attend to few places, so that positions matter.
        base = random_model(config, std=0.22)
        self.row, self.root, self.base = row, root, save(base, root / "base")
        self.parents = [save(finetune(base, k + 1), root / f"parent{k}") for k in range(2)]
        for folder in (self.base, *self.parents):
            edit_json(folder / "config.json", lambda config: say_in_older_words(config, row.older))
        # All of one length: each length is a program to compile.
        for seed, name in enumerate(("search", "heldout")):
            write_lines(root / f"{name}.jsonl", [record(seed, i) for i in range(3)])
        self.file = write_lines(root / "choices.jsonl", [record(2, i, "w5 w6 w7 w8 " * 8) for i in range(2)])

    def task(self) -> TextTask:
        """Choices behind one question, all of them behind one header."""
        examples = examples_in(self.file, "multiple_choice")
        return TextTask("choice", "multiple_choice", "margin", 1.0, str(self.file), tuple(examples))

    def evaluator(self, config: Any) -> Evaluator:
        tokenizer = word_tokenizer(words(VOCAB))
        return Evaluator(config, tokenizer, batch_tasks([[self.task()]], tokenizer, 256, 256, (2,))[0])


def say_in_older_words(config: dict[str, Any], older: dict[str, Any]) -> None:
    for key, value in older.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value


def record(seed: int, number: int, header: str = "") -> dict[str, Any]:
    """An example of random words: 6 in its prompt, 2 in its target and in each choice."""
    rng = np.random.default_rng([seed, number])

    def text(size: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(4, VOCAB, size))

    return {"prompt": header + text(6), "target": text(2), "choices": [text(2) for _ in range(3)], "answer": 1}


@pytest.fixture(scope="module", params=RUN)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(request.param, tmp_path_factory.mktemp(request.param))


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, VOCAB, shape).astype(np.int32)


def load_reported(folder: Path) -> Any:
    """The folder as transformers reads it, with all of its tensors, and all that the model has."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def assert_margins(scores: Any, model: Any, models: Models) -> None:
    """Scores behind a shared header, of packed choices, are those of whole texts, one by one."""
    expected = []
    for example in models.task().examples:
        totals = [text_logprobs(model, example.prompt, target).sum() for target in example.targets]
        expected.append(totals[example.answer] - np.delete(totals, example.answer).max())
    np.testing.assert_allclose(scores.matrices["choice"]["margin"][0], expected, atol=2e-4)


# ---------------------------------------------------------------------------------------------------------------


def test_every_family_is_in_the_table() -> None:
    assert {*FAMILIES, *PARTS} == set(model_types())


def test_logits_and_generation_are_those_of_transformers(models: Models) -> None:
    config, model = load_decoder(models.base)
    theirs, tokens = load_torch(models.base), random_tokens(0, 2, 21)
    np.testing.assert_allclose(logits(config, model, tokens), torch_logits(theirs, tokens), atol=1e-4)
    # Prompts of two lengths, padded at the left; torch continues each of them alone.
    prompts, new = [random_tokens(1, 9), random_tokens(2, 6)], 10
    padded = np.stack([np.concatenate([np.full(9 - len(prompt), 5), prompt]) for prompt in prompts])
    expected = [torch_tokens(theirs, prompt, new) for prompt in prompts]
    # Drafts, right ones and wrong ones, change nothing.
    seen = np.concatenate([random_tokens(3, 2, 3), np.array(expected)[:, :5], random_tokens(4, 2, 1)], axis=1)
    assert greedy_tokens(config, model, padded, [0, 3], new, (), window=3, seen=seen).tolist() == expected


def test_what_is_shared_is_computed_as_if_it_were_not(models: Models) -> None:
    config, model = load_decoder(models.base)
    evaluator = models.evaluator(config)
    (batched_task,) = evaluator.batched_tasks
    assert batched_task.scoring is not None and len(batched_task.scoring.shared_prefix) >= 32
    assert batched_task.scoring.computed < 0.4 * batched_task.scoring.tokens
    assert_margins(evaluator.score_stored(model), load_torch(models.base), models)


def test_a_layer_path_is_exported_as_it_was_scored(models: Models, tmp_path: Path) -> None:
    sources, configs = open_decoders(models.parents)
    spec = PathSpec(tuple(configs), "float32")
    bank = load_path_bank(sources, spec)
    # Out of order and repeated, with scales: layers of all kinds at any place.
    path = LayerPath((3, 1, 2, 1, 5), (1.0, 1.25, 0.8, 1.3, 0.7), 1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(path_document(path, spec, [str(folder) for folder in models.parents])))
    merge_to(prepare(read_recipe(recipe)), tmp_path / "out", card="")
    theirs = load_reported(tmp_path / "out")
    assert_margins(PathEvaluator(models.evaluator(configs[0]), bank, 5).evaluate([path]), theirs, models)
    # To the bit what is evaluated, whatever it is that the scales are folded into.
    model, config = bank.materialise(path, configs[0])
    assert load_decoder(tmp_path / "out")[0] == replace(config, head_is_embedding=configs[0].head_is_embedding)
    written = state(tmp_path / "out")
    for name, values in stored_tensors(model, config):
        np.testing.assert_array_equal(written[name], values)


def write_search(models: Models) -> Path:
    if not models.row.takes_words:
        pytest.skip("no tokenizer of words")
    space = {
        "method": "ties", "layers_per_group": 2, "components": ["attention", "mlp", "norm"],
        "parameters": {"weight": {"high": 1.5}, "density": {"low": 0.2}},
    }  # fmt: skip
    tasks = [task_section("search.jsonl", heldout="heldout.jsonl")]
    return write_yaml(models.root / "search.yaml", search_config(space=space, tasks=tasks))


def test_a_search_exports_what_it_scored(models: Models) -> None:
    out = models.root / "run"
    run_here("search", write_search(models), "--out", out)
    theirs = load_reported(out / "best/model")
    result = read_json(out / "result.json")
    (winner,) = (row for row in result["table"] if row["role"] == "winner")
    records = read_lines(models.root / "heldout.jsonl")
    means = [text_logprobs(theirs, one["prompt"], one["target"]).mean() for one in records]
    assert winner["heldout_scores"] == {"text/log_probability": pytest.approx(np.mean(means), abs=1e-4)}
    # A merge, not one of the parents.
    merged = state(out / "best/model")
    assert all(not np.array_equal(merged[name], values) for name, values in state(models.base).items())


@pytest.mark.skipif(not ALL, reason="EVOJAX_TEST_ALL")
def test_a_model_that_two_devices_share_scores_the_same(models: Models, tmp_path: Path) -> None:
    program = tmp_path / "mesh.py"
    program.write_text(MESH_PROGRAM)
    done = subprocess.run([sys.executable, program, write_search(models)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(one, two, atol=1e-5)


# Scores of two candidates on one device, and on two that share a model.
MESH_PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from jax.sharding import AxisType, Mesh
from pathlib import Path
from evojax_merge.evaluation.devices import Devices
from evojax_merge.problem import build_problem, read_config
from evojax_merge.steps.selection import open_evaluator

path = Path(sys.argv[1])
problem = build_problem(path, read_config(path, [], None))
genomes = np.random.default_rng(0).random((2, problem.space.dims)).astype(np.float32)
shared = Mesh(np.array(jax.devices()).reshape(1, 2), ("population", "model"), axis_types=(AxisType.Auto,) * 2)
found = []
for mesh in (None, shared):
    scorer = open_evaluator(problem, problem.prepare().shards[0], Devices(mesh))
    (metrics,) = scorer.score(genomes).matrices.values()
    found.append([matrix.tolist() for matrix in metrics.values()])
print(json.dumps(found))
"""

# ---------------------------------------------------------------------------------------------------------------
# config.json

HUB = [name for name, row in FAMILIES.items() if row.hub]


@pytest.mark.parametrize("kind", HUB)
def test_the_hubs_configs_are_read_as_transformers_reads_them(kind: str, tmp_path: Path) -> None:
    document = FAMILIES[kind].hub | {"num_hidden_layers": 7}
    config = decoder_config(write_json(tmp_path / "config.json", document))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    expected = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    head = expected.pop("lm_head.weight")
    if not theirs.tie_word_embeddings:
        expected[FAMILIES[kind].head] = head
    assert config.head_is_embedding == theirs.tie_word_embeddings
    found = tensor_shapes(config)
    if any("experts" in name for name in found):
        # In memory it has a layer's experts in one tensor.
        assert sum(map(math.prod, found.values())) == sum(map(math.prod, expected.values()))
    else:
        assert found == expected
    windowed = getattr(theirs, "sliding_window", None) and getattr(theirs, "use_sliding_window", True)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"] * 7
    assert config.windows == tuple(
        theirs.sliding_window if kind == "sliding_attention" else NO_WINDOW for kind in kinds
    )


def test_a_filter_that_takes_anothers_tensors_is_refused() -> None:
    glm4 = find_architecture("glm4")
    with pytest.raises(ValueError, match=r"that of attention takes .*post_self_attn_layernorm.*, which is of norm"):
        replace(glm4, filters=glm4.filters | {"attention": "self_attn"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gain_offsets": {"norm": float("nan")}}, "gain_offsets: 'norm': nan; expected a filter and a finite number"),
        ({"gain_offsets": ["norm"]}, "gain_offsets: .*; expected a mapping of filters and numbers"),
        ({"gain_offsets": {"norm": 1}, "merge_method": "linear"}, "gain_offsets: only a passthrough merge of slices"),
    ],
)
def test_recipes_with_wrong_gain_offsets_are_refused(changes: dict[str, Any], said: str) -> None:
    part = {"sources": [{"model": "one", "layer_range": [0, 1]}]}
    document = {"merge_method": "passthrough", "slices": [part], "dtype": "float32"} | changes
    with pytest.raises(InputError, match=said):
        parse_recipe(Path("recipe.yaml"), document)


REFUSED = {
    "attention to later tokens": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "a cap of nothing": ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
    "RoPE of a kind of layer": (
        "gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": "much"}}},
        "rope_parameters.full_attention.rope_theta",
    ),
    "no window": ("cohere2", {"sliding_window": None}, "sliding_window"),
    "normalised queries": ("cohere2", {"use_qk_norm": True}, "use_qk_norm"),
    "another family's multiplier": ("olmo2", {"residual_multiplier": 0.5}, "residual_multiplier"),
    "attention scaled by the layer": (
        "gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx",
    ),
    "attention in another order": ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
    "a hidden size that does not fit": ("gpt2", {"n_head": 7}, "n_embd: 768 is not a multiple of n_head: 7"),
    "no entry is rotated": ("gpt_neox", {"rotary_pct": 0.01}, "rotary_pct"),
    "factors of another head": (
        "phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 48}},
        "short_factor",
    ),
    "factors that are no numbers": (
        "phi3", {"rope_scaling": {"type": "longrope", "short_factor": ["1"] * 48, "long_factor": [1.0] * 48}},
        "rope_scaling.short_factor",
    ),
    "half a pair": ("glm4", {"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_handled_is_refused_by_name(case: str, tmp_path: Path) -> None:
    kind, changes, named = REFUSED[case]
    document = FAMILIES[kind].hub | {"num_hidden_layers": 7} | changes
    write_json(tmp_path / "config.json", document)
    with pytest.raises(InputError, match=named) as raised:
        decoder_config(tmp_path / "config.json")
    assert "\n" not in str(raised.value)
