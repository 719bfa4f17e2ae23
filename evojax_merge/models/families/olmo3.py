"""Olmo 3: OLMo 2's block; most layers have a sliding window, and a RoPE that is not stretched."""

from collections.abc import Mapping
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SWITCH, TEXTS, or_null
from evojax_merge.models.families import llama_like, olmo2


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    ropes, head_dim = hf["rope_parameters"], hf["hidden_size"] // hf["num_attention_heads"]
    return llama_like.read_config(
        "olmo3", {**hf, "rope_parameters": ropes["full_attention"]}, LlamaLikeConfig, llama_like.BIASES, qk_norm=True,
        norm="rms_float32", position_kinds=llama_like.sliding_layers(hf),
        local_rope=llama_like.rope_config(ropes["sliding_attention"], hf["max_position_embeddings"], head_dim),
    )  # fmt: skip


OLMO3 = llama_like.llama_like(
    "olmo3",
    "Olmo3Config",
    {
        "attention_bias": SWITCH,
        "layer_types": or_null(TEXTS),
        "rope_parameters": llama_like.LOCAL_ROPE,
        "sliding_window": llama_like.WINDOW,
    },
    read,
    leaves=olmo2.LEAVES,
    position_tables=llama_like.local_position_tables,
)
