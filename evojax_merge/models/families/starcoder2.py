"""Starcoder 2 (arXiv 2402.19173): LayerNorm, biases, an MLP without gate; sliding windows."""

from collections.abc import Mapping
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import EPSILON, SWITCH
from evojax_merge.models.families import llama_like

NAMES = {"up_proj": "c_fc", "down_proj": "c_proj"}


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), "use_bias")
    return llama_like.read_config(
        "starcoder2", {**hf, "rms_norm_eps": hf["norm_epsilon"]}, LlamaLikeConfig, biases, norm="layer"
    )


STARCODER2 = llama_like.llama_like(
    "starcoder2",
    "Starcoder2Config",
    {"norm_epsilon": EPSILON, "sliding_window": llama_like.WINDOW, "use_bias": SWITCH},
    read,
    unread="rms_norm_eps",
    leaves=(
        *llama_like.LAYER_NORMS,
        *(llama_like.renamed(leaf, NAMES) for leaf in llama_like.PROJECTIONS if leaf.name not in ("gate", "gate_bias")),
        *llama_like.SHARED,
        llama_like.FINAL_NORM_BIAS,
    ),
    defaults={"tie_word_embeddings": True},
    filters=llama_like.LAYER_NORM_FILTERS,
)
