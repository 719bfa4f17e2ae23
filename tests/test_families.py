"""Every native family, checked alike: against transformers, packed, as a layer path, merged in a search, on a mesh.

A family is a row of `FAMILIES`. A sample of two runs. EVOJAX_TEST_ALL runs all of them, and also the families that
the rest of the suite searches, walks and generates with."""

import json
import math
import re
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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from evojax_merge.checkpoints.bank import load_path_bank, stored_tensors
from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.parents import open_decoders, tensor_shapes
from evojax_merge.errors import InputError
from evojax_merge.evaluation.batched_tasks import batch_tasks
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.evaluation.paths import PathEvaluator
from evojax_merge.mergekit.execute import merge_to, prepare
from evojax_merge.mergekit.plan import BEFORE_LAYERS
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
    takes_words: whether transformers takes a tokenizer of words for it, and not any as byte-level BPE; body: how names
    begin in transformers' memory, and in files."""

    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    covered_elsewhere: bool = False
    head: str = "lm_head.weight"
    older: dict[str, Any] = field(default_factory=dict)
    takes_words: bool = True
    body: tuple[str, str] = ("", "")


# Sizes are all different, so that no two axes can be mistaken.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDING = {
    "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "head_dim": 16,
}  # fmt: skip
DELTA = {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 6, "linear_value_head_dim": 10, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip
DELTA_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 20,
}  # fmt: skip
# Two of three groups of two experts.
ROUTER = {
    "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 28, "n_group": 3,
    "topk_group": 2,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_d_conv": 4}
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
    "olmo3": Row(
        "Olmo3Config",
        {
            **{key: value for key, value in SLIDING.items() if key != "head_dim"},
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 1e4,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 11008, "max_position_embeddings": 65536, "model_type": "olmo3",
            "num_attention_heads": 32, "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                "original_max_position_embeddings": 8192, "rope_type": "yarn",
            },
            "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.57.1", "use_cache": False, "vocab_size": 100278,
        },
        older={"layer_types": None},
    ),
    "smollm3": Row(
        "SmolLM3Config",
        {
            "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 5, "attention_bias": True,
            "tie_word_embeddings": False,
        },
        {
            "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 11008, "layer_types": ["full_attention"] * 7, "max_position_embeddings": 65536,
            "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0, 1, 1, 1], "num_attention_heads": 16, "num_key_value_heads": 4,
            "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
            "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False,
            "vocab_size": 128256,
        },
        older={"layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 2},
    ),
    "ernie4_5": Row(
        "Ernie4_5Config",
        {"head_dim": 16, "use_bias": True, "tie_word_embeddings": False},
        {
            "architectures": ["Ernie4_5ForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 131072,
            "model_type": "ernie4_5", "num_attention_heads": 16, "num_key_value_heads": 2, "pad_token_id": 0,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "use_bias": False, "use_cache": False, "vocab_size": 103424,
        },
    ),
    "ministral": Row(
        "MinistralConfig",
        SLIDING,
        {
            "architectures": ["MinistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 12288,
            "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention", *["sliding_attention"] * 2],
            "max_position_embeddings": 32768, "model_type": "ministral", "num_attention_heads": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 100000000.0, "sliding_window": 32768,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 131072,
        },
    ),
    "ministral3": Row(
        "Ministral3Config",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 12.0, "original_max_position_embeddings": 8,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.7,
            },
        },
        {
            "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072,
            "initializer_range": 0.02, "intermediate_size": 9216, "max_position_embeddings": 262144,
            "model_type": "ministral3", "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0,
                "rope_type": "yarn", "type": "yarn",
            },
            "sliding_window": None, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 131072,
        },
    ),
    "seed_oss": Row(
        "SeedOssConfig",
        {"head_dim": 16, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
        {
            "architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.1,
            "attention_out_bias": False, "bos_token_id": 0, "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 27648,
            "max_position_embeddings": 524288, "mlp_bias": False, "model_type": "seed_oss", "num_attention_heads": 80,
            "num_key_value_heads": 8, "pad_token_id": 1, "residual_dropout": 0.1, "rms_norm_eps": 1e-06,
            "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.55.0", "use_cache": True, "vocab_size": 155136,
        },
    ),
    "gemma": Row(
        "GemmaConfig",
        {"head_dim": 16},
        {
            "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
            "num_attention_heads": 8, "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
            "transformers_version": "4.38.0.dev0", "use_cache": True, "vocab_size": 256000,
        },
    ),
    "cohere": Row(
        "CohereConfig",
        {"logit_scale": 0.6, "use_qk_norm": True},
        {
            "architectures": ["CohereForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 5, "eos_token_id": 255001, "hidden_act": "silu", "hidden_size": 8192,
            "initializer_range": 0.02, "intermediate_size": 22528, "layer_norm_eps": 1e-05, "logit_scale": 0.0625,
            "max_position_embeddings": 8192, "model_max_length": 131072, "model_type": "cohere",
            "num_attention_heads": 64, "num_key_value_heads": 64, "pad_token_id": 0, "pretraining_tp": 1,
            "rope_theta": 8000000.0, "torch_dtype": "float16", "transformers_version": "4.38.2", "use_cache": True,
            "use_qk_norm": False, "vocab_size": 256000,
        },
    ),
    "exaone4": Row(
        "Exaone4Config",
        SLIDING,
        {
            "architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
            "eos_token_id": 361, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
            "initializer_range": 0.02, "intermediate_size": 27392,
            "layer_types": [*["sliding_attention"] * 3, "full_attention", *["sliding_attention"] * 3],
            "max_position_embeddings": 131072, "model_type": "exaone4", "num_attention_heads": 40,
            "num_key_value_heads": 8, "pad_token_id": 0, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 1000000, "sliding_window": 4096, "sliding_window_pattern": "LLLG",
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0",
            "use_cache": True, "vocab_size": 102400,
        },
    ),
    "hunyuan_v1_dense": Row(
        "HunYuanDenseV1Config",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e3, "factor": 1.0, "alpha": 50.0},
        },
        {
            "architectures": ["HunYuanDenseV1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
            "bos_token_id": 1, "eod_token_id": 127967, "eos_token_id": 127960, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 262144, "model_type": "hunyuan_v1_dense", "num_attention_heads": 32,
            "num_key_value_heads": 8, "pad_token_id": 127961, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                "type": "dynamic",
            },
            "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.52.0.dev0", "use_cache": True, "use_qk_norm": True, "vocab_size": 128167,
        },
    ),
    "arcee": Row(
        "ArceeConfig",
        {"mlp_bias": True},
        {
            "architectures": ["ArceeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 128, "hidden_act": "relu2",
            "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 18432,
            "max_position_embeddings": 65536, "mlp_bias": False, "model_type": "arcee", "num_attention_heads": 20,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0,
                "original_max_position_embeddings": 3276, "rope_type": "yarn",
            },
            "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.53.0", "use_cache": True,
            "vocab_size": 128004,
        },
    ),
    "apertus": Row(
        "ApertusConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {
            "architectures": ["ApertusForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 1, "eos_token_id": 68, "hidden_act": "xielu", "hidden_dropout": 0.0, "hidden_size": 4096,
            "initializer_range": 0.02, "intermediate_size": 21504, "max_position_embeddings": 65536,
            "mlp_bias": False, "model_type": "apertus", "num_attention_heads": 32, "num_key_value_heads": 8,
            "pad_token_id": 3, "post_norm": False, "qk_norm": True, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 12000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.56.0.dev0", "use_cache": True, "vocab_size": 131072,
        },
    ),
    "helium": Row(
        "HeliumConfig",
        {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
        {
            "architectures": ["HeliumForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560,
            "initializer_range": 0.02, "intermediate_size": 7040, "max_position_embeddings": 4096, "mlp_bias": False,
            "model_type": "helium", "num_attention_heads": 20, "num_key_value_heads": 20, "pad_token_id": 3,
            "rms_norm_eps": 1e-08, "rope_theta": 100000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.48.0.dev0", "use_cache": True, "vocab_size": 48000,
        },
    ),
    "nemotron": Row(
        "NemotronConfig",
        {"head_dim": 16, "partial_rotary_factor": 0.5, "mlp_bias": True},
        {
            "architectures": ["NemotronForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 2, "eos_token_id": 3, "head_dim": 128, "hidden_act": "relu2", "hidden_size": 3072,
            "initializer_range": 0.0134, "intermediate_size": 9216, "max_position_embeddings": 4096,
            "mlp_bias": False, "model_type": "nemotron", "norm_eps": 1e-05, "num_attention_heads": 24,
            "num_key_value_heads": 8, "partial_rotary_factor": 0.5, "rope_theta": 10000,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.32.0.dev0",
            "use_cache": True, "vocab_size": 256000,
        },
    ),
    "starcoder2": Row(
        "Starcoder2Config",
        {"sliding_window": 5},
        {
            "activation_function": "gelu", "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1,
            "attention_softmax_in_fp32": True, "bos_token_id": 0, "embedding_dropout": 0.1, "eos_token_id": 0,
            "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "initializer_range": 0.018042,
            "intermediate_size": 12288, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 16384,
            "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05, "norm_type": "layer_norm",
            "num_attention_heads": 24, "num_key_value_heads": 2, "residual_dropout": 0.1,
            "rope_theta": 999999.4420358813, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True,
            "sliding_window": 4096, "torch_dtype": "bfloat16", "transformers_version": "4.37.0.dev0",
            "use_bias": True, "use_cache": True, "vocab_size": 49152,
        },
    ),
    "stablelm": Row(
        "StableLmConfig",
        {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
        {
            "architectures": ["StableLmForCausalLM"], "bos_token_id": 100257, "eos_token_id": 100257,
            "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
            "layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "model_type": "stablelm",
            "num_attention_heads": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "rope_theta": 10000,
            "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.38.0",
            "use_cache": True, "use_qkv_bias": True, "vocab_size": 100352,
        },
    ),
    "opt": Row(
        "OPTConfig",
        {"ffn_dim": 40},
        {
            "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
            "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
            "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768,
            "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
            "num_attention_heads": 12, "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16",
            "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272,
            "word_embed_proj_dim": 768,
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
    "glm": Row(
        "GlmConfig",
        {"head_dim": 16, "attention_bias": True},
        {
            "architectures": ["GlmForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
            "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
            "initializer_range": 0.02, "intermediate_size": 13696, "max_position_embeddings": 131072,
            "model_type": "glm", "num_attention_heads": 32, "num_key_value_heads": 2, "pad_token_id": 151329,
            "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.46.0.dev0",
            "use_cache": True, "vocab_size": 151552,
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
    "gpt_oss": Row(
        "GptOssConfig",
        {
            "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 5, "swiglu_limit": 0.8,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 24,
            },
        },
        {
            "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
            "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
            "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"],
            "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
            "num_experts_per_tok": 4, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
            "pad_token_id": 199999, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                "rope_type": "yarn", "truncate": False,
            },
            "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
            "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True,
            "vocab_size": 201088,
        },
    ),
    "glm4_moe": Row(
        "Glm4MoeConfig",
        {
            **ROUTER, "head_dim": 16, "attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 1.7,
            "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
        },
        {
            "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
            "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 1, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 10944,
            "max_position_embeddings": 131072, "model_type": "glm4_moe", "moe_intermediate_size": 1408, "n_group": 1,
            "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96,
            "num_experts_per_tok": 8, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "pad_token_id": 151329,
            "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
            "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1, "torch_dtype": "bfloat16",
            "transformers_version": "4.54.0", "use_cache": True, "use_qk_norm": False, "vocab_size": 151552,
        },
    ),
    "olmoe": Row(
        "OlmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.9},
        {
            "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "clip_qkv": None, "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096,
            "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
            "num_experts_per_tok": 8, "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0",
            "use_cache": True, "vocab_size": 50304,
        },
    ),
    "ernie4_5_moe": Row(
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 28, "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
        },
        {
            "architectures": ["Ernie4_5_MoeForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 2560, "intermediate_size": 12288, "max_position_embeddings": 131072,
            "model_type": "ernie4_5_moe", "moe_capacity": [64, 64, 64], "moe_gate": "topk",
            "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_end_index": 27, "moe_layer_interval": 1,
            "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_use_aux_free": True,
            "num_attention_heads": 20, "num_key_value_heads": 4, "num_nextn_predict_layers": 1, "pad_token_id": 0,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True, "vocab_size": 103424,
        },
    ),
    "lfm2_moe": Row(
        "Lfm2MoeConfig",
        {
            "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True, "num_dense_layers": 1,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "routed_scaling_factor": 1.4,
        },
        {
            "architectures": ["Lfm2MoeForCausalLM"], "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": False,
            "dtype": "bfloat16", "eos_token_id": 7, "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 7168,
            "layer_types": ["conv", "conv", "full_attention", "conv", "conv", "conv", "full_attention"],
            "max_position_embeddings": 128000, "model_type": "lfm2_moe", "moe_intermediate_size": 1792,
            "norm_eps": 1e-05, "norm_topk_prob": True, "num_attention_heads": 32, "num_dense_layers": 2,
            "num_experts": 32, "num_experts_per_tok": 4, "num_key_value_heads": 8, "pad_token_id": 0,
            "rope_theta": 1000000.0, "routed_scaling_factor": 1.0, "tie_embedding": True,
            "transformers_version": "4.57.0.dev0", "use_cache": True, "use_expert_bias": True, "vocab_size": 65536,
        },
    ),
    "deepseek_v3": Row(
        "DeepseekV3Config",
        {
            **ROUTER, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 1.2,
                "original_max_position_embeddings": 24,
            },
        },
        {
            "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
            "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
            "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
            "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
            "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
            "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096, "type": "yarn",
            },
            "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
            "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
            "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
        },
    ),
    "deepseek_v2": Row(
        "DeepseekV2Config",
        {
            **ROUTER, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 12, "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 6, "v_head_dim": 14, "first_k_dense_replace": 1, "attention_bias": True,
            "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5,
        },
        {
            "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
            "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
            "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
            "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
            "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
            "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096, "type": "yarn",
            },
            "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
            "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
            "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
        },
    ),
    "falcon_h1": Row(
        "FalconH1Config",
        {
            **MAMBA, "mamba_d_ssm": 64, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "key_multiplier": 0.4,
            "attention_in_multiplier": 1.2, "attention_out_multiplier": 0.7, "embedding_multiplier": 3.0,
            "lm_head_multiplier": 0.5, "ssm_in_multiplier": 0.8, "ssm_out_multiplier": 0.6,
            "mlp_multipliers": [0.7, 1.3], "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        },
        {
            "architectures": ["FalconH1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375, "attn_layer_indices": None,
            "bos_token_id": 1, "embedding_multiplier": 5.656854249492381, "eos_token_id": 11, "head_dim": 64,
            "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 2048,
            "key_multiplier": 0.390625, "lm_head_multiplier": 0.0390625, "mamba_chunk_size": 128,
            "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_ssm": 1536, "mamba_d_state": 128,
            "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 24, "mamba_norm_before_gate": False,
            "mamba_proj_bias": False, "mamba_rms_norm": False, "mamba_use_mlp": True, "max_position_embeddings": 16384,
            "mlp_bias": False, "mlp_expansion_factor": 8, "mlp_multipliers": [0.8838834764831844, 0.5859375],
            "model_type": "falcon_h1", "num_attention_heads": 8, "num_key_value_heads": 2, "num_logits_to_keep": 1,
            "pad_token_id": 0, "projectors_bias": False, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "rope_theta": 100000000000.0, "ssm_in_multiplier": 1.25,
            "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
            "ssm_out_multiplier": 0.23570226039551587, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.52.0", "use_cache": True, "vocab_size": 32784,
        },
    ),
    "granitemoehybrid": Row(
        "GraniteMoeHybridConfig",
        {
            **MAMBA, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "shared_intermediate_size": 36, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 28,
            "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
            "residual_multiplier": 0.6, "tie_word_embeddings": True,
        },
        {
            "architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attention_multiplier": 0.015625, "bos_token_id": 100257, "embedding_multiplier": 12,
            "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 2048, "init_method": "mup",
            "initializer_range": 0.1, "intermediate_size": 8192,
            "layer_types": ["mamba", "mamba", "mamba", "mamba", "mamba", "attention", "mamba"], "logits_scaling": 8,
            "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64,
            "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 64, "mamba_proj_bias": False,
            "max_position_embeddings": 131072, "model_type": "granitemoehybrid", "normalization_function": "rmsnorm",
            "num_attention_heads": 32, "num_experts_per_tok": 0, "num_key_value_heads": 8, "num_local_experts": 0,
            "output_router_logits": False, "pad_token_id": 100256, "position_embedding_type": "nope",
            "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000,
            "router_aux_loss_coef": 0.01, "shared_intermediate_size": 8192, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.56.0", "use_cache": True, "vocab_size": 100352,
        },
    ),
    "lfm2": Row(
        "Lfm2Config",
        {
            "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True, "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.3,
        },
        {
            "architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": True, "block_dim": 2048,
            "block_ff_dim": 12288, "block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0,
            "block_multiple_of": 256, "block_norm_eps": 1e-05, "block_out_init_scale": 1.0, "block_use_swiglu": True,
            "block_use_xavier_init": True, "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": False, "conv_dim": 2048,
            "conv_dim_out": 2048, "conv_use_xavier_init": True, "eos_token_id": 7, "full_attn_idxs": [2, 5],
            "hidden_size": 2048, "initializer_range": 0.02, "max_position_embeddings": 128000, "model_type": "lfm2",
            "norm_eps": 1e-05, "num_attention_heads": 32, "num_heads": 32, "num_key_value_heads": 8, "pad_token_id": 0,
            "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0",
            "use_cache": True, "use_pos_enc": True, "vocab_size": 65536,
        },
    ),
    "nemotron_h": Row(
        "NemotronHConfig",
        {
            "layers_block_type": ["linear_attention", "moe", "mlp", "full_attention", "linear_attention"],
            "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 6,
            "num_hidden_layers": None, **ROUTER, "moe_shared_expert_intermediate_size": 44, "moe_latent_size": 24,
            "routed_scaling_factor": 1.3,
        },
        # Nemotron 3 Nano.
        {
            "architectures": ["NemotronHForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 1, "chunk_size": 128, "conv_kernel": 4, "eos_token_id": 2, "expand": 2, "head_dim": 128,
            "hidden_dropout": 0.0, "hidden_size": 2688, "hybrid_override_pattern": "MEMEM*E",
            "initializer_range": 0.02, "intermediate_size": 1856, "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64,
            "mamba_hidden_act": "silu", "mamba_num_heads": 64, "mamba_proj_bias": False,
            "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144, "mlp_bias": False,
            "mlp_hidden_act": "relu2", "model_type": "nemotron_h", "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712, "n_group": 1, "n_groups": 8, "n_routed_experts": 128,
            "n_shared_experts": 1, "norm_eps": 1e-05, "norm_topk_prob": True, "num_attention_heads": 32,
            "num_experts_per_tok": 6, "num_key_value_heads": 2, "num_logits_to_keep": 1, "pad_token_id": 0,
            "partial_rotary_factor": 1.0, "rescale_prenorm_residual": True, "residual_in_fp32": False,
            "rope_theta": 10000, "routed_scaling_factor": 2.5, "sliding_window": None, "ssm_state_size": 128,
            "tie_word_embeddings": False, "time_step_floor": 0.0001,
            "time_step_limit": [0.0, math.inf], "time_step_max": 0.1, "time_step_min": 0.001,
            "topk_group": 1, "torch_dtype": "bfloat16", "transformers_version": "4.55.4", "use_bias": False,
            "use_cache": True, "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 131072,
        },
        body=("model.", "backbone."),
    ),
    "qwen3_5_text": Row(
        "Qwen3_5TextConfig",
        {**DELTA, "intermediate_size": 40},
        {
            "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16",
            "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
            "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
            "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
            "mlp_only_layers": [], "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False, "num_attention_heads": 8, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 248320,
            "rope_parameters": {
                "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
                "rope_theta": 10000000, "rope_type": "default",
            },
        },
    ),
    "qwen3_5_moe_text": Row("Qwen3_5MoeTextConfig", {**DELTA, **DELTA_EXPERTS}, takes_words=False),
    "qwen3_next": Row(
        "Qwen3NextConfig",
        {**DELTA, **DELTA_EXPERTS},
        {
            "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4,
            "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
            "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
            "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next",
            "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512,
            "num_experts_per_tok": 10, "num_key_value_heads": 2, "output_router_logits": False,
            "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000,
            "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0", "use_cache": True,
            "use_sliding_window": False, "vocab_size": 151936,
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
    # Of totals of 5 to 20 each.
    np.testing.assert_allclose(scores.matrices["choice"]["margin"][0], expected, atol=5e-4)


# ---------------------------------------------------------------------------------------------------------------


def test_every_family_is_in_the_table() -> None:
    assert {*FAMILIES, *PARTS} == set(model_types())


def test_a_recipe_puts_each_tensor_outside_of_the_layers_at_its_own_end() -> None:
    for kind in FAMILIES:
        for leaf in find_architecture(kind).shared:
            assert (BEFORE_LAYERS.search(leaf.tensor) is not None) == (leaf.component == "embedding"), leaf.tensor


def test_the_documentation_lists_transformers_decoders_as_the_registry_has_them() -> None:
    text = (Path(__file__).parents[1] / "docs/reference/architectures.md").read_text()
    section = text.partition("## The decoders that people download most")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| (yes|no) \| ([^|]*)\|$", section, re.MULTILINE)
    listed = [name for name, _, _ in rows]
    assert len(listed) == len(set(listed)) == 30
    assert set(listed) <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert {name for name, native, _ in rows if native == "yes"} == set(listed) & set(model_types())
    assert all(reason.strip() for _, native, reason in rows if native == "no")


def test_logits_and_generation_are_those_of_transformers(models: Models) -> None:
    config, model = load_decoder(models.base)
    theirs, tokens = load_torch(models.base), random_tokens(0, 2, 21)
    expected_logits = torch_logits(theirs, tokens)
    # A recurrence's rounding grows with the numbers in its state: so does torch's.
    scale = 1.0 if config.recurrent is None else np.abs(expected_logits).max()
    np.testing.assert_allclose(logits(config, model, tokens), expected_logits, atol=1e-4 * scale)
    # Prompts of two lengths, padded at the left; torch continues each of them alone.
    prompts, new = [random_tokens(1, 9), random_tokens(2, 6)], 10
    padded = np.stack([np.concatenate([np.full(9 - len(prompt), 5), prompt]) for prompt in prompts])
    expected = [torch_tokens(theirs, prompt, new) for prompt in prompts]
    # Drafts, right ones and wrong ones, change nothing.
    seen = np.concatenate([random_tokens(3, 2, 3), np.array(expected)[:, :5], random_tokens(4, 2, 1)], axis=1)
    assert greedy_tokens(config, model, padded, [0, 3], new, (), window=3, seen=seen).tolist() == expected


# Settings of families besides those of their rows.
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere without norms of heads": ("cohere", {"use_qk_norm": False, "tie_word_embeddings": False}),
    "ernie4_5 without biases": ("ernie4_5", {"use_bias": False, "tie_word_embeddings": True}),
    "exaone4 without windows": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "gemma with biases": ("gemma", {"attention_bias": True, "tie_word_embeddings": False}),
    "hunyuan with plain RoPE": ("hunyuan_v1_dense", {"rope_parameters": PLAIN_ROPE, "tie_word_embeddings": True}),
    "ministral3 with a window": ("ministral3", {"sliding_window": 5}),
    "nemotron with biases": ("nemotron", {"attention_bias": True, "tie_word_embeddings": True}),
    "opt without biases": ("opt", {"enable_bias": False, "tie_word_embeddings": False}),
    "smollm3 with a tied head": ("smollm3", {"mlp_bias": True, "tie_word_embeddings": True}),
    "stablelm one after the other": ("stablelm", {"use_parallel_residual": False, "qk_layernorm": False}),
    "starcoder2 without biases": ("starcoder2", {"use_bias": False, "sliding_window": None}),
}


@pytest.mark.parametrize("case", sample(VARIANTS, 2))
def test_other_settings_of_a_family_give_transformers_logits(case: str, tmp_path: Path) -> None:
    kind, changes = VARIANTS[case]
    config = getattr(transformers, FAMILIES[kind].config)(**(SIZES | FAMILIES[kind].changes | changes))
    config._attn_implementation = "eager"
    folder = save(random_model(config, std=0.22), tmp_path / "model")
    ours, theirs = load_decoder(folder), load_torch(folder)
    for length in (1, 63, 64, 65):
        tokens = random_tokens(length, 2, length)
        expected = torch_logits(theirs, tokens)
        np.testing.assert_allclose(logits(*ours, tokens), expected, atol=1e-4 * np.abs(expected).max())


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
    # A merge, not one of the parents; buffers, which training leaves alone, are the same in all.
    merged, base, parent = (state(folder) for folder in (out / "best/model", models.base, models.parents[0]))
    trained = [name for name in base if not np.array_equal(base[name], parent[name])]
    assert len(trained) > 0.8 * len(base)
    assert all(not np.array_equal(merged[name], base[name]) for name in trained)


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
    in_memory, in_files = FAMILIES[kind].body
    expected = {
        name.replace(in_memory, in_files, 1): tuple(values.shape) for name, values in model.state_dict().items()
    }
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
    "RoPE in fewer layers than there are": ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers: 3 of them"),
    "windows that are switched off": (
        "smollm3", {"layer_types": ["sliding_attention"] * 7, "sliding_window": 8}, "use_sliding_window is false",
    ),
    "queries that grow by nothing": (
        "ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "llama_4_scaling_beta",
    ),
    "norms behind attention": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: False; expected true"),
    "a projected embedding": ("opt", {"word_embed_proj_dim": 512}, "word_embed_proj_dim: 512; expected hidden_size"),
    "another activation": ("apertus", {"hidden_act": "silu"}, "hidden_act: 'silu'; expected one of xielu"),
    "groups that divide no experts": ("glm4_moe", {"n_group": 5}, "n_group: 5, topk_group: 1; expected a divisor"),
    "experts beyond the groups": ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 40}, "num_experts_per_tok"),
    "keys that heads share": ("deepseek_v3", {"num_key_value_heads": 16}, "num_key_value_heads: 16; expected"),
    "another choice of experts": ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
    "experts with biases": ("ernie4_5_moe", {"use_bias": True}, "use_bias"),
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
