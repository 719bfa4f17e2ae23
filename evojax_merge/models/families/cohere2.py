"""Command R7B and Command A: attention and MLP run side by side behind one LayerNorm without bias; layers with a
sliding window have RoPE, with neighbours paired; layers with full attention have no positions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import SharedWeights
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import EPSILON, OFF, SIZE, SWITCH, TEXTS, Expected, above, or_null
from evojax_merge.models.families.llama_like import (
    BIASES,
    PROJECTIONS,
    SHARED,
    WINDOW,
    gated_mlp,
    llama_like,
    norm_leaf,
    read_config,
    sliding_layers,
)
from evojax_merge.models.layers import (
    Attend,
    CosSin,
    KeyValue,
    SequenceLayout,
    Weights,
    apply_rope_interleaved,
    dense,
    dense_heads,
    layer_norm,
    rope_tables,
)


@dataclass(frozen=True, kw_only=True)
class Cohere2Config(LlamaLikeConfig):
    """logit_scale: the factor of the logits."""

    logit_scale: float


LEAVES = (norm_leaf("norm", "input_layernorm"), *PROJECTIONS, *SHARED)
COHERE_KEYS: dict[str, Expected] = {
    "attention_bias": SWITCH,
    "layer_norm_eps": EPSILON,
    "layer_types": or_null(TEXTS),
    "logit_scale": above(0),
    "sliding_window": WINDOW,
    "sliding_window_pattern": or_null(SIZE),
    "use_qk_norm": OFF,
}


def position_tables(config: Cohere2Config, layout: SequenceLayout) -> tuple[CosSin, CosSin]:
    """The tables of layers with full attention, which rotate by nothing, and of layers with a sliding window."""
    cos, sin = rope_tables(config.rope, config.head_dim, layout)
    return (jnp.ones_like(cos), jnp.zeros_like(sin)), (cos, sin)


def block(
    config: Cohere2Config, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    normed = layer_norm(x, weights["norm"], None, config.norm_eps)
    with jax.named_scope("attention"):
        query, key, value = (dense_heads(normed, weights, name, config.head_dim) for name in ("q", "k", "v"))
        cos, sin = (table.astype(x.dtype) for table in rope)
        attn_out, kept = attend(apply_rope_interleaved(query, cos, sin), apply_rope_interleaved(key, cos, sin), value)
        attention = dense(attn_out, weights, "o")
    return x + attention + gated_mlp(config, weights, normed), kept


def final_norm(config: Cohere2Config, source: SharedWeights, x: jax.Array) -> jax.Array:
    return layer_norm(x, source.leaf("final_norm"), None, config.norm_eps)


def read(hf: Mapping[str, Any]) -> Cohere2Config:
    common = {**hf, "rms_norm_eps": hf["layer_norm_eps"]}
    config = read_config("cohere2", common, Cohere2Config, BIASES | {"logit_scale": "logit_scale"})
    return replace(config, position_kinds=sliding_layers(hf))


COHERE2 = llama_like(
    "cohere2",
    "Cohere2Config",
    COHERE_KEYS,
    read,
    unread="rms_norm_eps",
    leaves=LEAVES,
    position_tables=position_tables,
    block=block,
    final_norm=final_norm,
    map_logits=lambda config, products: products * config.logit_scale,
    always_maps_logits=True,
)
