"""GLM-4 (arXiv 2406.12793): only a part of each head is rotated, with neighbours paired; the MLP's gate and its input
are one projection. GLM-4-0414 has RMSNorm behind attention and MLP, too."""

from functools import partial
from typing import Any

from evojax_merge.models.architecture import LAYERS, Architecture, Leaf
from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families import llama_like

GATE_UP = Leaf(
    "gate_up", "model.layers.{layer}.mlp.gate_up_proj.weight", "mlp", ("gate_up", "hidden"), LAYERS, sharded_axis=-2
)
_SEPARATE = ("gate", "gate_bias", "up", "up_bias")


def _glm(model_type: str, config_class: str, leaves: tuple[Leaf, ...], **fields: Any) -> Architecture:
    return llama_like.llama_like(
        model_type, config_class, llama_like.PARTIAL_KEYS | {"attention_bias": SWITCH},
        partial(llama_like.read_config, model_type, keys={"qkv_bias": "attention_bias"}, interleaved=True),
        leaves=(*(leaf for leaf in leaves if leaf.name not in _SEPARATE), GATE_UP, *llama_like.SHARED),
        dimensions=lambda config: llama_like.dimensions(config) | {"gate_up": 2 * config.mlp},
        **fields,
    )  # fmt: skip


GLM = _glm(
    "glm",
    "GlmConfig",
    (
        llama_like.norm_leaf("attention_norm", "input_layernorm"),
        llama_like.norm_leaf("mlp_norm", "post_attention_layernorm"),
        *llama_like.PROJECTIONS,
    ),
)
GLM4 = _glm(
    "glm4",
    "Glm4Config",
    (
        llama_like.norm_leaf("attention_norm", "input_layernorm"),
        llama_like.norm_leaf("post_attention_norm", "post_self_attn_layernorm", writes_residual=True),
        llama_like.norm_leaf("mlp_norm", "post_attention_layernorm"),
        llama_like.norm_leaf("post_mlp_norm", "post_mlp_layernorm", writes_residual=True),
        *llama_like.INNER_PROJECTIONS,
    ),
    # The name of a norm contains `self_attn`, too.
    filters=llama_like.FILTERS | {"attention": "self_attn."},
)
