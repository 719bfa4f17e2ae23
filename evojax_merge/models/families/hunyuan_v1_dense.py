"""Hunyuan's dense models: a Llama whose queries and keys are normalised by head, behind RoPE."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SWITCH, above, mapping, or_null
from evojax_merge.models.families.llama_like import BIASES, LEAVES, ROPE, llama_like, read_config

_NORMS = {"q_norm": "query_layernorm", "k_norm": "key_layernorm"}
_ROPE = or_null(mapping({**ROPE.keys, "alpha": or_null(above(0))}))


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    rope, head_dim = hf["rope_parameters"], hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
    if rope.get("rope_type") == "dynamic" and rope.get("alpha"):
        # Whatever the length, `alpha` stretches the base.
        theta = rope["rope_theta"] * rope["alpha"] ** (head_dim / max(head_dim - 2, 1))
        rope = {"rope_type": "default", "rope_theta": theta}
    return read_config(
        "hunyuan_v1_dense", {**hf, "rope_parameters": rope}, LlamaLikeConfig, BIASES, qk_norm=True,
        norm_behind_rope=True,
    )  # fmt: skip


HUNYUAN_V1_DENSE = llama_like(
    "hunyuan_v1_dense",
    "HunYuanDenseV1Config",
    {"attention_bias": SWITCH, "rope_parameters": _ROPE, "rope_scaling": _ROPE},
    read,
    leaves=tuple(
        replace(leaf, tensor=leaf.tensor.replace(leaf.name, _NORMS[leaf.name])) if leaf.name in _NORMS else leaf
        for leaf in LEAVES
    ),
)
