"""Qwen3-Next and Qwen3.5: three layers of Gated DeltaNet for each layer of gated attention, with an MLP or a mixture of
experts in each layer; norms that store their gain less one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models import gated_delta
from evojax_merge.models.architecture import LAYERS, RECURRENCE, Architecture, LayerType, Leaf, SharedWeights
from evojax_merge.models.config import NO_WINDOW, LlamaLikeConfig
from evojax_merge.models.config_keys import KERNEL, SIZE, SWITCH, TEXTS, Expected, mapping, or_null
from evojax_merge.models.families import llama_like, mixture
from evojax_merge.models.families.llama_like import BIASES, PARTIAL_ROPE, PARTIAL_ROTARY, read_types
from evojax_merge.models.families.mixture import ALL_SPARSE
from evojax_merge.models.families.qwen_vl import SECTION, SECTIONS, in_turns, read_mrope
from evojax_merge.models.layers import (
    Attend,
    CosSin,
    KeyValue,
    Weights,
    apply_rope,
    dense,
    dense_heads,
    dense_whole,
    rms_norm_float32,
)
from evojax_merge.models.recurrence import Recur

FULL = "full_attention"
MROPE_SECTIONS = (11, 11, 10)


# ---------------------------------------------------------------------------------------------------------------
# Tensors

NORMS = (
    llama_like.norm_leaf("attention_norm", "input_layernorm"),
    llama_like.norm_leaf("mlp_norm", "post_attention_layernorm"),
)
# The queries' projection has the gates of attention's outputs as well, head by head.
ATTENTION = tuple(
    replace(leaf, stack=FULL, shape=("gated_queries", "hidden") if leaf.name == "q" else leaf.shape)
    for leaf in llama_like.PROJECTIONS
    if leaf.component == "attention"
)
MLP = tuple(leaf for leaf in llama_like.PROJECTIONS if leaf.component == "mlp")
FILTERS = llama_like.FILTERS | {"attention": "_attn."}


def dimensions(common_dimensions: Callable[[Any], dict[str, int]], config: LlamaLikeConfig) -> dict[str, int]:
    common = common_dimensions(config)
    shape = {} if config.recurrent is None else gated_delta.dimensions(config.recurrent)
    return common | shape | {"gated_queries": 2 * common["queries"]}


# ---------------------------------------------------------------------------------------------------------------
# The forward pass

Mlp = Callable[[Any, Weights, jax.Array], jax.Array]


def norm(config: LlamaLikeConfig, weights: Weights, name: str, x: jax.Array) -> jax.Array:
    return rms_norm_float32(x, weights[name], config.norm_eps, offset=1.0)


def attention_block(
    mlp: Mlp, config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    with jax.named_scope("attention"):
        normed = norm(config, weights, "attention_norm", x)
        query, gate = jnp.split(dense_heads(normed, weights, "q", 2 * config.head_dim), 2, axis=-1)
        key, value = (dense_heads(normed, weights, name, config.head_dim) for name in ("k", "v"))
        query, key = norm(config, weights, "q_norm", query), norm(config, weights, "k_norm", key)
        cos, sin = (table.astype(x.dtype) for table in rope)
        out, kept = attend(apply_rope(query, cos, sin), apply_rope(key, cos, sin), value)
        x = x + dense(out * jax.nn.sigmoid(gate.reshape(out.shape)), weights, "o")
    return x + mlp(config, weights, norm(config, weights, "mlp_norm", x)), kept


def linear_block(
    mlp: Mlp, project: Callable[..., Any], config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin,
    recur: Recur,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """project: (config, weights, normed hidden states) -> the arrays qkv, z, b, a of `gated_delta.mix`."""
    with jax.named_scope("attention"):
        projected = project(config, weights, norm(config, weights, "attention_norm", x))
        mixed, kept = gated_delta.mix(config, weights, config.norm_eps, recur, *projected)
        x = x + mixed
    return x + mlp(config, weights, norm(config, weights, "mlp_norm", x)), kept


def final_norm(config: LlamaLikeConfig, source: SharedWeights, x: jax.Array) -> jax.Array:
    return rms_norm_float32(x, source.leaf("final_norm"), config.norm_eps, offset=1.0)


def four_projections(config: LlamaLikeConfig, weights: Weights, x: jax.Array) -> tuple[jax.Array, ...]:
    qkv, z, b, a = (dense_whole(x, weights, name) for name in ("in_qkv", "in_z", "in_b", "in_a"))
    return qkv, z, b, a


def two_projections(config: LlamaLikeConfig, weights: Weights, x: jax.Array) -> tuple[jax.Array, ...]:
    """Qwen3-Next's projections have the rows of each head of keys together."""
    shape = config.recurrent
    assert shape is not None
    values = shape.repeats * shape.value
    packed = dense_whole(x, weights, "in_qkvz").reshape(*x.shape[:2], shape.groups, -1)
    query, key, value, z = jnp.split(packed, [shape.key, 2 * shape.key, 2 * shape.key + values], axis=-1)
    b, a = jnp.split(dense_whole(x, weights, "in_ba").reshape(*x.shape[:2], shape.groups, -1), 2, axis=-1)
    query, key, value, z, b, a = (array.reshape(*x.shape[:2], -1) for array in (query, key, value, z, b, a))
    return jnp.concatenate([query, key, value], axis=-1), z, b, a


# ---------------------------------------------------------------------------------------------------------------
# config.json

KEYS: dict[str, Expected] = {
    "attention_bias": SWITCH,
    "full_attention_interval": SIZE,
    "layer_types": or_null(TEXTS),
    "linear_conv_kernel_dim": KERNEL,
    "linear_key_head_dim": SIZE,
    "linear_num_key_heads": SIZE,
    "linear_num_value_heads": SIZE,
    "linear_value_head_dim": SIZE,
    "partial_rotary_factor": PARTIAL_ROTARY,
    "rope_parameters": PARTIAL_ROPE,
    "rope_scaling": PARTIAL_ROPE,
}
MROPE = or_null(mapping({**PARTIAL_ROPE.keys, SECTION: SECTIONS, "mrope_interleaved": or_null(SWITCH)}))


def read(
    read_common: Callable[..., LlamaLikeConfig], sections: tuple[int, ...], hf: Mapping[str, Any]
) -> LlamaLikeConfig:
    """The config for the values `hf` of the keys of config.json. read_common: reads those of a Llama or a mixture;
    sections: M-RoPE's by default; empty: the model has plain RoPE."""
    types = read_types(hf, (FULL, gated_delta.STACK))
    shape = gated_delta.delta_shape(
        hf["linear_num_key_heads"], hf["linear_num_value_heads"], hf["linear_key_head_dim"],
        hf["linear_value_head_dim"], hf["linear_conv_kernel_dim"],
    )  # fmt: skip
    read_layers = partial(
        read_common, layer_types=types, recurrent=shape if gated_delta.STACK in types else None,
        windows=(NO_WINDOW,) * len(types),
    )  # fmt: skip
    # A mixture's class has no width of plain MLPs.
    return read_mrope(read_layers, in_turns, sections, {"intermediate_size": hf.get("moe_intermediate_size"), **hf})


def delta(
    model_type: str, config_class: str, mlp: Mlp, mlp_leaves: tuple[Leaf, ...], project: Callable[..., Any],
    projections: dict[str, tuple[str, str]], keys: dict[str, Expected], read: Any, **fields: Any,
) -> Architecture:  # fmt: skip
    """An architecture with this module's layers. mlp, mlp_leaves: the layer's second half; project, projections: the
    inputs of Gated DeltaNet (see `linear_block` and `gated_delta.leaves`); keys, read, fields: see `llama_like`."""
    attention = partial(attention_block, mlp)
    return llama_like.llama_like(
        model_type, config_class, KEYS | keys, read,
        leaves=(*NORMS, *ATTENTION, *gated_delta.leaves(projections), *mlp_leaves, *llama_like.SHARED),
        block=attention, final_norm=final_norm,
        layer_types={
            FULL: LayerType(attention, (LAYERS, FULL)),
            gated_delta.STACK: LayerType(
                partial(linear_block, mlp, project), (LAYERS, gated_delta.STACK), RECURRENCE
            ),
        },
        aside=("mtp.",), **{"filters": FILTERS, "dimensions": partial(dimensions, llama_like.dimensions), **fields},
    )  # fmt: skip


FOUR = {
    "in_qkv": ("in_proj_qkv", "channels"), "in_z": ("in_proj_z", "values"), "in_b": ("in_proj_b", "value_heads"),
    "in_a": ("in_proj_a", "value_heads"),
}  # fmt: skip
ROPED = {"rope_parameters": MROPE, "rope_scaling": MROPE}
EXPERTS: dict[str, Expected] = {
    "moe_intermediate_size": SIZE, "num_experts": SIZE, "num_experts_per_tok": SIZE,
    "shared_expert_intermediate_size": SIZE,
}  # fmt: skip
MIXTURE_BIASES = BIASES | {"shared_mlp": "shared_expert_intermediate_size"}
MIXTURE_FILTERS = mixture.QWEN_FILTERS | {name: text for name, text in FILTERS.items() if name != "mlp"}

EXPERT_LEAVES = (
    *mixture.expert_leaves("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"), *mixture.SHARED_EXPERT,
)  # fmt: skip
MIXTURE: dict[str, Any] = {
    "filters": MIXTURE_FILTERS, "packed": mixture.PACKED, "dimensions": partial(dimensions, mixture.dimensions),
    "no_adapter": "PEFT cannot tell its shared expert from its experts",
}  # fmt: skip

QWEN3_5_TEXT = delta(
    "qwen3_5_text", "Qwen3_5TextConfig", llama_like.gated_mlp, MLP, four_projections, FOUR, ROPED,
    partial(read, partial(llama_like.read_config, "qwen3_5_text", keys=BIASES, qk_norm=True), MROPE_SECTIONS),
)  # fmt: skip
QWEN3_5_MOE_TEXT = delta(
    "qwen3_5_moe_text", "Qwen3_5MoeTextConfig", mixture.mixture, EXPERT_LEAVES, four_projections,
    FOUR, ROPED | EXPERTS,
    partial(
        read,
        partial(
            mixture.read_mixture, "qwen3_5_moe_text", keys=MIXTURE_BIASES, qk_norm=True, weights_sum_to_one=True
        ),
        MROPE_SECTIONS,
    ),
    unread="intermediate_size", **MIXTURE,
)  # fmt: skip
QWEN3_NEXT = delta(
    "qwen3_next", "Qwen3NextConfig", mixture.mixture, EXPERT_LEAVES, two_projections,
    {"in_qkvz": ("in_proj_qkvz", "channels_values"), "in_ba": ("in_proj_ba", "twice_value_heads")},
    EXPERTS | ALL_SPARSE | {"norm_topk_prob": SWITCH},
    partial(
        read,
        partial(
            mixture.read_mixture, "qwen3_next", qk_norm=True,
            keys=MIXTURE_BIASES | {"weights_sum_to_one": "norm_topk_prob"},
        ),
        (),
    ),
    **MIXTURE,
)  # fmt: skip
