"""Granite: a Llama with four multipliers: of embeddings, attention, the layers' contributions, and logits (maximal
update parametrisation, arXiv 2203.03466)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from evojax_merge.models.architecture import SharedWeights
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SWITCH, above
from evojax_merge.models.families.llama_like import BIASES, gated_mlp, llama_like, project_qkv, read_config
from evojax_merge.models.layers import Attend, CosSin, KeyValue, SequenceLayout, Weights, dense, rms_norm

MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier")


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(LlamaLikeConfig):
    """attention_multiplier: the factor of the products of queries and keys; logits_scaling: the divisor of the
    logits."""

    attention_multiplier: float
    embedding_multiplier: float
    logits_scaling: float
    residual_multiplier: float


def embed(config: GraniteConfig, source: SharedWeights, tokens: jax.Array, layout: SequenceLayout) -> jax.Array:
    return source.rows("embed", tokens) * config.embedding_multiplier


def attention(
    config: Any, weights: Weights, x: jax.Array, rope: CosSin | tuple[()], attend: Attend
) -> tuple[jax.Array, KeyValue]:
    """The hidden states plus attention's output, and the keys and values to keep."""
    with jax.named_scope("attention"):
        normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
        attn_out, kept = attend(*project_qkv(config, weights, normed, rope), scale=config.attention_multiplier)
        return x + config.residual_multiplier * dense(attn_out, weights, "o"), kept


def block(
    config: GraniteConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    x, kept = attention(config, weights, x, rope, attend)
    normed = rms_norm(x, weights["mlp_norm"], config.norm_eps)
    return x + config.residual_multiplier * gated_mlp(config, weights, normed), kept


def read(hf: Mapping[str, Any]) -> GraniteConfig:
    multipliers = {name: float(hf[name]) for name in MULTIPLIERS}
    return read_config("granite", hf, GraniteConfig, BIASES | {"mlp_bias": "mlp_bias"}, **multipliers)


GRANITE = llama_like(
    "granite",
    "GraniteConfig",
    {"attention_bias": SWITCH, "mlp_bias": SWITCH, **dict.fromkeys(MULTIPLIERS, above(0))},
    read,
    embed=embed,
    block=block,
    map_logits=lambda config, products: products / config.logits_scaling,
    always_maps_logits=True,
)
