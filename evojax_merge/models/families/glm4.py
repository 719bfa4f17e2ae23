"""GLM-4-0414 (arXiv 2406.12793): RMSNorm before and behind attention and MLP; only a part of each head is rotated, with
neighbours paired; the MLP's gate and its input are one projection."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import LAYERS, Leaf
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import (
    FILTERS,
    INNER_PROJECTIONS,
    PARTIAL_ROPE,
    PARTIAL_ROTARY,
    SHARED,
    dimensions,
    llama_like,
    norm_leaf,
    partial_position_tables,
    read_config,
    rope_config,
    rotary_dimension,
)
from evojax_merge.models.layers import (
    ACTIVATIONS,
    Attend,
    CosSin,
    KeyValue,
    Weights,
    apply_rope_interleaved,
    dense,
    dense_heads,
    rms_norm,
)
from evojax_merge.models.sharding import replicate


@dataclass(frozen=True, kw_only=True)
class Glm4Config(LlamaLikeConfig):
    """rotary_dim: the number of entries of a head that are rotated."""

    rotary_dim: int


LEAVES = (
    norm_leaf("attention_norm", "input_layernorm"),
    norm_leaf("post_attention_norm", "post_self_attn_layernorm", writes_residual=True),
    norm_leaf("mlp_norm", "post_attention_layernorm"),
    norm_leaf("post_mlp_norm", "post_mlp_layernorm", writes_residual=True),
    *(leaf for leaf in INNER_PROJECTIONS if leaf.name not in ("gate", "gate_bias", "up", "up_bias")),
    Leaf(
        "gate_up", "model.layers.{layer}.mlp.gate_up_proj.weight", "mlp", ("gate_up", "hidden"), LAYERS,
        sharded_axis=-2,
    ),
    *SHARED,
)  # fmt: skip


def block(
    config: Glm4Config, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    with jax.named_scope("attention"):
        normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
        query, key, value = (dense_heads(normed, weights, name, config.head_dim) for name in ("q", "k", "v"))
        cos, sin = (table.astype(x.dtype) for table in rope)
        attn_out, kept = attend(apply_rope_interleaved(query, cos, sin), apply_rope_interleaved(key, cos, sin), value)
        x = x + rms_norm(dense(attn_out, weights, "o"), weights["post_attention_norm"], config.norm_eps)
    with jax.named_scope("mlp"):
        normed = rms_norm(x, weights["mlp_norm"], config.norm_eps)
        # One half of the devices has the gate's entries, the other half the entries that the gate multiplies.
        gate, up = jnp.split(replicate(dense(normed, weights, "gate_up")), 2, axis=-1)
        down = dense(ACTIVATIONS[config.activation](gate) * up, weights, "down")
    return x + rms_norm(down, weights["post_mlp_norm"], config.norm_eps), kept


def read(hf: Mapping[str, Any]) -> Glm4Config:
    settings = hf["rope_parameters"]
    common: LlamaLikeConfig = read_config("glm4", hf, keys={"qkv_bias": "attention_bias"})
    rotary_dim = rotary_dimension(common.head_dim, settings)
    rope = rope_config(settings, hf["max_position_embeddings"], rotary_dim)
    return Glm4Config(**vars(common) | {"rope": rope}, rotary_dim=rotary_dim)


GLM4 = llama_like(
    "glm4",
    "Glm4Config",
    {
        "attention_bias": SWITCH,
        "partial_rotary_factor": PARTIAL_ROTARY,
        "rope_parameters": PARTIAL_ROPE,
        "rope_scaling": PARTIAL_ROPE,
    },
    read,
    leaves=LEAVES,
    dimensions=lambda config: dimensions(config) | {"gate_up": 2 * config.mlp},
    position_tables=partial_position_tables,
    block=block,
    # The name of a norm contains `self_attn`, too.
    filters=FILTERS | {"attention": "self_attn."},
)
