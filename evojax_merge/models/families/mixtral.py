"""Mixtral: a Mistral with a mixture of experts, whose weights add up to 1, in every layer (arXiv 2401.04088)."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from evojax_merge.models.config_keys import SIZE
from evojax_merge.models.families.llama_like import WINDOW, read_config
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf, mixture_settings
from evojax_merge.models.families.mixture import MixtureConfig, expert_leaves, mixture_config, mixture_of_experts


def read(hf: Mapping[str, Any]) -> MixtureConfig:
    return mixture_config(
        read_config("mixtral", hf, qkv_bias=False),
        mlp=hf["intermediate_size"],
        experts=hf["num_local_experts"],
        per_token=hf["num_experts_per_tok"],
        weights_sum_to_one=True,
    )


MIXTRAL = replace(
    mixture_of_experts(
        "mixtral",
        "MixtralConfig",
        expert_leaves("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
        # Both the files' and transformers' tensor names contain these; mergekit matches the names.
        {"router": "gate.weight", "mlp": "experts"},
        {"gate.weight": ("router",)},
        {"num_experts_per_tok": SIZE, "num_local_experts": SIZE, "sliding_window": WINDOW},
        read,
    ),
    gguf=llama_like_gguf(
        "llama", partial(mixture_settings, experts_key="num_local_experts"), has_experts=True, interleaved=True
    ),
)
