"""Qwen3-MoE: a Qwen3 with a mixture of experts in every layer, and one window for all layers where it has one."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import QWEN_WINDOWS, read_config
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf, mixture_settings
from evojax_merge.models.families.mixture import (
    QWEN_EXPERTS,
    MixtureConfig,
    expert_leaves,
    mixture_config,
    mixture_of_experts,
)


def read(hf: Mapping[str, Any]) -> MixtureConfig:
    bias = hf["attention_bias"]
    return mixture_config(
        read_config("qwen3_moe", hf, qkv_bias=bias, o_bias=bias, qk_norm=True),
        mlp=hf["moe_intermediate_size"],
        experts=hf["num_experts"],
        per_token=hf["num_experts_per_tok"],
        weights_sum_to_one=hf["norm_topk_prob"],
    )


QWEN3_MOE = replace(
    mixture_of_experts(
        "qwen3_moe",
        "Qwen3MoeConfig",
        expert_leaves("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
        {"router": "mlp.gate.", "mlp": ".mlp."},
        {},
        QWEN_EXPERTS | {name: QWEN_WINDOWS[name] for name in ("sliding_window", "use_sliding_window")}
        | {"attention_bias": SWITCH},
        read,
    ),
    gguf=llama_like_gguf(
        "qwen3moe",
        partial(mixture_settings, experts_key="num_experts", weights_sum_to_one=True),
        has_experts=True,
    ),
)  # fmt: skip
