"""StableLM (arXiv 2402.17834): LayerNorm; a part of each head is rotated; in some models attention and MLP run side by
side, and queries and keys are normalised, with a gain for each head that is a tensor of its own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evojax_merge.models.architecture import LAYERS, Leaf
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import EPSILON, SWITCH
from evojax_merge.models.families import llama_like


def _head_norm(name: str, module: str, heads: str) -> Leaf:
    return Leaf(
        name, f"model.layers.{{layer}}.self_attn.{module}.norms.{{expert}}.weight", "attention", (heads, "head_dim"),
        LAYERS, present_if=lambda c: c.qk_norm,
    )  # fmt: skip


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    return llama_like.read_config(
        "stablelm", {**hf, "rms_norm_eps": hf["layer_norm_eps"]},
        keys={"qkv_bias": "use_qkv_bias", "qk_norm": "qk_layernorm", "side_by_side": "use_parallel_residual"},
        norm="layer",
    )  # fmt: skip


STABLELM = llama_like.llama_like(
    "stablelm",
    "StableLmConfig",
    llama_like.PARTIAL_KEYS
    | {"layer_norm_eps": EPSILON, "qk_layernorm": SWITCH, "use_parallel_residual": SWITCH, "use_qkv_bias": SWITCH},
    read,
    unread="rms_norm_eps",
    leaves=(
        *(
            # Side by side, attention and MLP share a norm.
            replace(leaf, present_if=lambda c: not c.side_by_side) if leaf.name.startswith("mlp_norm") else leaf
            for leaf in llama_like.LAYER_NORMS
        ),
        *(leaf for leaf in llama_like.PROJECTIONS if leaf.name not in ("q_norm", "k_norm")),
        _head_norm("q_norm", "q_layernorm", "heads"),
        _head_norm("k_norm", "k_layernorm", "kv_heads"),
        *llama_like.SHARED,
        llama_like.FINAL_NORM_BIAS,
    ),
    dimensions=lambda config: llama_like.dimensions(config) | {"heads": config.heads, "kv_heads": config.kv_heads},
    # The names of some norms in attention contain `layernorm`, too.
    filters=llama_like.LAYER_NORM_FILTERS,
)
