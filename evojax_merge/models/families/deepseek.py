"""DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437): multi-head latent attention, an MLP in the first layers, and in
the others a mixture of experts with one for every token.

Latent attention projects the hidden states to a narrow vector, from which each head's keys and values are expanded; a
part of the keys, which RoPE rotates, is the same for all heads. A KV cache holds the expanded keys and values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import LAYERS, NEXT_LAYERS, leaves_in
from evojax_merge.models.config_keys import OFF, SIZE, SWITCH, Expected, one_of, or_null
from evojax_merge.models.families import llama_like, mixture
from evojax_merge.models.families.glm4_moe import ROUTER_KEYS, SPARSE_LEAVES, dense_first, read_gate, read_layers
from evojax_merge.models.families.llama_like import BIASES
from evojax_merge.models.families.mixture import Gate, MixtureConfig
from evojax_merge.models.layers import (
    Attend,
    CosSin,
    KeyValue,
    Weights,
    apply_rope,
    apply_rope_interleaved,
    dense,
    dense_heads,
    rms_norm,
)

# Of the norms of latent vectors, whatever a config says of the others.
LATENT_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class LatentConfig(MixtureConfig):
    """query_rank, kv_rank: the widths of the latent vectors of queries (0: there is none) and of keys and values;
    plain_dim: the entries of a query and a key that RoPE does not rotate; value_dim: those of a value;
    interleaved: whether RoPE pairs neighbours; scale: the factor of the products of queries and keys. `head_dim` is the
    larger of a key's and a value's entries, to which both are filled up with zeros."""

    query_rank: int
    kv_rank: int
    plain_dim: int
    value_dim: int
    interleaved: bool
    scale: float


# ---------------------------------------------------------------------------------------------------------------
# Tensors


def _has_rank(config: LatentConfig) -> bool:
    return config.query_rank > 0


_leaf = leaves_in("model.layers.{layer}.self_attn.", "attention", LAYERS)
ATTENTION = (
    _leaf("q", "q_proj.weight", "queries", "hidden", sharded_axis=-2, present_if=lambda c: not _has_rank(c)),
    _leaf("q_a", "q_a_proj.weight", "query_rank", "hidden", present_if=_has_rank),
    _leaf("q_a_bias", "q_a_proj.bias", "query_rank", present_if=lambda c: _has_rank(c) and c.qkv_bias),
    _leaf("q_a_norm", "q_a_layernorm.weight", "query_rank", present_if=_has_rank),
    _leaf("q_b", "q_b_proj.weight", "queries", "query_rank", sharded_axis=-2, present_if=_has_rank),
    _leaf("kv_a", "kv_a_proj_with_mqa.weight", "kv_latent", "hidden"),
    _leaf("kv_a_bias", "kv_a_proj_with_mqa.bias", "kv_latent", present_if=lambda c: c.qkv_bias),
    _leaf("kv_a_norm", "kv_a_layernorm.weight", "kv_rank"),
    _leaf("kv_b", "kv_b_proj.weight", "keys_values", "kv_rank", sharded_axis=-2),
    _leaf("o", "o_proj.weight", "hidden", "values", sharded_axis=-1, writes_residual=True),
    _leaf("o_bias", "o_proj.bias", "hidden", writes_residual=True, present_if=lambda c: c.o_bias),
)
LEAVES = (*(leaf for leaf in llama_like.LEAVES if leaf.component != "attention"), *ATTENTION)


def dimensions(config: LatentConfig) -> dict[str, int]:
    return mixture.dimensions(config) | {
        "queries": config.heads * (config.plain_dim + config.rotary_dim), "query_rank": config.query_rank,
        "kv_latent": config.kv_rank + config.rotary_dim, "kv_rank": config.kv_rank,
        "keys_values": config.heads * (config.plain_dim + config.value_dim), "values": config.heads * config.value_dim,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The forward pass


def attention(
    config: LatentConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    """The hidden states plus attention's output, and the expanded keys and values to keep."""
    cos, sin = (table.astype(x.dtype) for table in rope)
    rotate = apply_rope_interleaved if config.interleaved else apply_rope
    width = config.plain_dim + config.rotary_dim

    def filled(heads: jax.Array) -> jax.Array:
        return jnp.pad(heads, [(0, 0)] * 3 + [(0, config.head_dim - heads.shape[-1])])

    with jax.named_scope("attention"):
        normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
        with jax.named_scope("qkv"):
            if config.query_rank:
                latent = rms_norm(dense(normed, weights, "q_a"), weights["q_a_norm"], LATENT_EPS)
                query = dense_heads(latent, weights, "q_b", width)
            else:
                query = dense_heads(normed, weights, "q", width)
            latent, shared_key = jnp.split(dense(normed, weights, "kv_a"), [config.kv_rank], axis=-1)
            latent = rms_norm(latent, weights["kv_a_norm"], LATENT_EPS)
            expanded = dense_heads(latent, weights, "kv_b", config.plain_dim + config.value_dim)
            key, value = jnp.split(expanded, [config.plain_dim], axis=-1)
            shared_key = jnp.broadcast_to(rotate(shared_key[:, :, None], cos, sin), (*key.shape[:3], config.rotary_dim))
            plain, rotated = jnp.split(query, [config.plain_dim], axis=-1)
            query = jnp.concatenate([plain, rotate(rotated, cos, sin)], axis=-1)
            key = jnp.concatenate([key, shared_key], axis=-1)
        out, kept = attend(filled(query), filled(key), filled(value), scale=config.scale)
        out = out.reshape(*x.shape[:2], config.heads, config.head_dim)[..., : config.value_dim]
        return x + dense(out.reshape(*x.shape[:2], -1), weights, "o"), kept


# ---------------------------------------------------------------------------------------------------------------
# config.json

KEYS: dict[str, Expected] = ROUTER_KEYS | {
    "attention_bias": SWITCH,
    "kv_lora_rank": SIZE,
    "n_group": or_null(SIZE),
    "q_lora_rank": or_null(SIZE),
    "qk_nope_head_dim": SIZE,
    "qk_rope_head_dim": SIZE,
    "topk_group": or_null(SIZE),
    "v_head_dim": SIZE,
}


def read(model_type: str, hf: Mapping[str, Any], gate: Gate, **values: Any) -> LatentConfig:
    heads, rotary_dim, settings = hf["num_attention_heads"], hf["qk_rope_head_dim"], hf["rope_parameters"]
    if hf["num_key_value_heads"] != heads:
        raise ValueError(f"num_key_value_heads: {hf['num_key_value_heads']}; expected num_attention_heads, {heads}")
    if rotary_dim % 2:
        raise ValueError(f"qk_rope_head_dim: {rotary_dim}; expected an even number, to rotate positions in pairs")
    width = hf["qk_nope_head_dim"] + rotary_dim
    # YaRN's temperature of attention, which other families apply to cosines and sines.
    all_dim, factor = settings.get("mscale_all_dim") or 0, settings.get("factor") or 1
    temperature = 0.1 * all_dim * math.log(factor) + 1 if all_dim and factor > 1 else 1.0
    head_dim = max(width, hf["v_head_dim"]) + max(width, hf["v_head_dim"]) % 2
    return mixture.read_mixture(
        model_type, {**hf, "head_dim": head_dim}, LatentConfig,
        keys=BIASES | {"kv_rank": "kv_lora_rank", "plain_dim": "qk_nope_head_dim", "rotary_dim": "qk_rope_head_dim",
                       "value_dim": "v_head_dim"},
        **{**read_layers(hf), **values}, query_rank=hf["q_lora_rank"] or 0, gate=gate,
        scale=width**-0.5 * temperature**2,
    )  # fmt: skip


def read_v3(hf: Mapping[str, Any]) -> LatentConfig:
    gate = read_gate(hf, scores="sigmoid", added=1e-20)
    return read("deepseek_v3", hf, gate, interleaved=hf["rope_interleave"])


def read_v2(hf: Mapping[str, Any]) -> LatentConfig:
    plain = hf["topk_method"] == "greedy"
    gate = read_gate({**hf, "n_group": 1, "topk_group": 1} if plain else hf, group_top=1)
    return read("deepseek_v2", hf, gate, interleaved=True, weights_sum_to_one=False)


FIELDS: dict[str, Any] = {
    "attention_leaves": LEAVES, "layer_types": mixture.dense_and_sparse(attention), "type_keys": dense_first,
    "dimensions": dimensions,
    "no_adapter": "PEFT cannot tell its shared experts from its experts",
}  # fmt: skip
DEEPSEEK_V3 = mixture.mixture_of_experts(
    "deepseek_v3", "DeepseekV3Config", SPARSE_LEAVES, KEYS | {"rope_interleave": SWITCH}, read_v3,
    aside=(NEXT_LAYERS,), **FIELDS,
)  # fmt: skip
DEEPSEEK_V2 = mixture.mixture_of_experts(
    "deepseek_v2", "DeepseekV2Config", tuple(leaf for leaf in SPARSE_LEAVES if leaf.name != "router_correction"),
    {key: KEYS[key] for key in KEYS if key not in ("num_mtp_layers", "num_nextn_predict_layers")}
    # Its class declares norm_topk_prob and does not read it.
    | {"mlp_bias": OFF, "topk_method": one_of("greedy", "group_limited_greedy")},
    read_v2, **FIELDS,
)  # fmt: skip
