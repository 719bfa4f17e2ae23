"""OLMoE (arXiv 2409.02060): a mixture of experts in each layer; queries and keys are normalised as a whole, and, like
values, clipped in some models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models.config_keys import SIZE, SWITCH, above, or_null
from evojax_merge.models.families import llama_like, mixture
from evojax_merge.models.families.llama_like import BIASES
from evojax_merge.models.families.mixture import MixtureConfig, check_experts
from evojax_merge.models.families.olmo2 import WHOLE_NORMS
from evojax_merge.models.layers import Attend, CosSin, KeyValue, Weights, apply_rope, dense, rms_norm


@dataclass(frozen=True, kw_only=True)
class OlmoeConfig(MixtureConfig):
    """clip: the bound of the entries of queries, keys and values; None: they have none."""

    clip: float | None


LEAVES = tuple(replace(leaf, shape=WHOLE_NORMS.get(leaf.name, leaf.shape)) for leaf in llama_like.LEAVES)


def attention(
    config: OlmoeConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    with jax.named_scope("attention"):
        normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
        query, key, value = (dense(normed, weights, name) for name in ("q", "k", "v"))
        query, key = (
            rms_norm(part, weights[name], config.norm_eps) for part, name in ((query, "q_norm"), (key, "k_norm"))
        )
        if config.clip is not None:
            query, key, value = (jnp.clip(part, -config.clip, config.clip) for part in (query, key, value))
        query, key, value = (part.reshape(*x.shape[:2], -1, config.head_dim) for part in (query, key, value))
        cos, sin = (table.astype(x.dtype) for table in rope)
        out, kept = attend(apply_rope(query, cos, sin), apply_rope(key, cos, sin), value)
        return x + dense(out, weights, "o"), kept


def read(hf: Mapping[str, Any]) -> OlmoeConfig:
    fields = BIASES | {
        "mlp": "intermediate_size", "experts": "num_experts", "experts_per_token": "num_experts_per_tok",
        "weights_sum_to_one": "norm_topk_prob", "clip": "clip_qkv",
    }  # fmt: skip
    return check_experts(llama_like.read_config("olmoe", hf, OlmoeConfig, fields, qk_norm=True))


OLMOE = mixture.mixture_of_experts(
    "olmoe",
    "OlmoeConfig",
    mixture.expert_leaves("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    {
        "attention_bias": SWITCH, "clip_qkv": or_null(above(0)), "norm_topk_prob": SWITCH, "num_experts": SIZE,
        "num_experts_per_tok": SIZE,
    },
    read,
    attention_leaves=LEAVES,
    block=partial(mixture.sparse_block, attention),
)  # fmt: skip
