"""The common parts of Gemma 2 and Gemma 3 (arXiv 2408.00118, 2503.19786): RMSNorm before and behind attention and MLP,
with gains that are stored less one; embeddings times the square root of the hidden size; an attention scale that the
config sets."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import Architecture, SharedWeights
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import OFF, SIZE, SWITCH, TEXTS, Expected, above, one_of, or_null
from evojax_merge.models.families import llama_like
from evojax_merge.models.families.llama_like_gguf import FACTOR, llama_metadata, llama_settings
from evojax_merge.models.gguf import GgufFile, Settings
from evojax_merge.models.layers import ACTIVATIONS, Attend, CosSin, KeyValue, SequenceLayout, Weights


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(LlamaLikeConfig):
    """query_scale: the factor of the products of queries and keys; attention_softcap and logit_softcap: the bound of
    these products' and of the logits' absolute values (None: no bound)."""

    query_scale: float
    attention_softcap: float | None
    logit_softcap: float | None


LEAVES = (
    llama_like.norm_leaf("attention_norm", "input_layernorm"),
    llama_like.norm_leaf("post_attention_norm", "post_attention_layernorm", writes_residual=True, gain_offset=1.0),
    llama_like.norm_leaf("mlp_norm", "pre_feedforward_layernorm"),
    llama_like.norm_leaf("post_mlp_norm", "post_feedforward_layernorm", writes_residual=True, gain_offset=1.0),
    *llama_like.INNER_PROJECTIONS,
    *llama_like.SHARED,
)
GEMMA_KEYS: dict[str, Expected] = {
    "attention_bias": SWITCH,
    "final_logit_softcapping": or_null(above(0)),
    "hidden_activation": one_of(*ACTIVATIONS),
    "layer_types": or_null(TEXTS),
    "query_pre_attn_scalar": above(0),
    "sliding_window": llama_like.WINDOW,
    "use_bidirectional_attention": OFF,
}


def gemma_like(
    model_type: str, config_class: str, keys: dict[str, Expected], read: Any, **fields: Any
) -> Architecture:  # fmt: skip
    """An architecture with this module's tensors and forward pass. keys: the keys that its class reads beside
    `GEMMA_KEYS`; read, fields: see `llama_like`."""
    return llama_like.llama_like(
        model_type, config_class, GEMMA_KEYS | keys, read, unread="hidden_act", leaves=LEAVES, embed=embed, block=block,
        map_logits=map_logits, **fields,
    )  # fmt: skip


def embed(config: GemmaConfig, source: SharedWeights, tokens: jax.Array, layout: SequenceLayout) -> jax.Array:
    rows = source.rows("embed", tokens)
    return rows * jnp.asarray(config.hidden**0.5, rows.dtype)


def block(
    config: GemmaConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    attend = partial(attend, scale=config.query_scale, softcap=config.attention_softcap)
    return llama_like.block(config, weights, x, rope, attend)


def map_logits(config: GemmaConfig, products: jax.Array) -> jax.Array:
    cap = config.logit_softcap
    return products if cap is None else cap * jnp.tanh(products / cap)


def read_gemma(
    model_type: str, hf: Mapping[str, Any], *, qk_norm: bool, attention_softcap: float | None
) -> GemmaConfig:
    """The config for the values `hf` of the keys of config.json."""
    return llama_like.read_config(
        model_type,
        {**hf, "hidden_act": hf["hidden_activation"]},
        GemmaConfig,
        llama_like.BIASES | {"logit_softcap": "final_logit_softcapping"},
        qk_norm=qk_norm,
        norm="rms_float32",
        norm_offset=1.0,
        query_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=attention_softcap,
    )


# In GGUF files: the metadata behind keys of config.json.
GGUF_KEYS = {
    "attn_logit_softcapping": (".attn_logit_softcapping", FACTOR),
    "final_logit_softcapping": (".final_logit_softcapping", FACTOR),
    "sliding_window": (".attention.sliding_window", SIZE),
}


def gguf_settings(file: GgufFile, large: int) -> dict[str, Any]:
    """The keys of config.json for a Gemma's GGUF file. Soft caps and windows that the file does not name are left to
    the defaults of the config's class. large: the number of layers of the model whose queries are scaled by the hidden
    size of each head, which no file says (llama.cpp's `f_attention_scale`)."""
    settings = llama_settings(file)
    is_large = settings["num_hidden_layers"] == large
    per_head = settings["hidden_size"] // max(settings["num_attention_heads"], 1)
    settings["query_pre_attn_scalar"] = per_head if is_large else settings["head_dim"]
    for name, (key, expected) in GGUF_KEYS.items():
        if file.key(key) in file.metadata:
            settings[name] = file.value(key, expected)
    return settings


def gguf_metadata(values: Mapping[str, Any]) -> Settings:
    """The inverse of `gguf_settings`."""
    metadata, tensors = llama_metadata(values)
    written = {key: values[name] for name, (key, _) in GGUF_KEYS.items() if values.get(name) is not None}
    return metadata | written, tensors
