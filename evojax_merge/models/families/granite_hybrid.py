"""Granite 4: layers of Mamba-2, and some of attention, most without positions; an MLP in each layer, with a mixture of
experts beside it in some models; Granite's four multipliers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models import mamba2
from evojax_merge.models.architecture import LAYERS, RECURRENCE, ROUTER, LayerType, Leaf
from evojax_merge.models.config_keys import (
    FINITE,
    INFINITY,
    KERNEL,
    SIZE,
    SWITCH,
    TEXTS,
    Expected,
    above,
    one_of,
    or_null,
    whole,
)
from evojax_merge.models.families import granite, llama_like, mixture
from evojax_merge.models.families.llama_like import BIASES, read_types
from evojax_merge.models.families.mixture import MixtureConfig
from evojax_merge.models.layers import ACTIVATIONS, Attend, CosSin, KeyValue, Weights, dense, dense_parts, rms_norm
from evojax_merge.models.mamba2 import Mamba
from evojax_merge.models.recurrence import Recur

FULL, MAMBA = "full_attention", "linear_attention"


@dataclass(frozen=True, kw_only=True)
class GraniteHybridConfig(MixtureConfig):
    """mamba: the settings of Mamba layers; shared_width: of the MLP that every layer has; rotates: whether attention
    rotates queries and keys by their positions; the others: see `granite.GraniteConfig`. `experts` is 0 for a model
    without mixtures."""

    mamba: Mamba
    shared_width: int
    rotates: bool
    attention_multiplier: float
    embedding_multiplier: float
    logits_scaling: float
    residual_multiplier: float


# ---------------------------------------------------------------------------------------------------------------
# Tensors

_LAYER = "model.layers.{layer}."
_SPARSE = f"{_LAYER}block_sparse_moe."


def _is_mixture(config: GraniteHybridConfig) -> bool:
    return config.experts > 0


ATTENTION = tuple(replace(leaf, stack=FULL) for leaf in llama_like.PROJECTIONS if leaf.component == "attention")
LEAVES = (
    llama_like.norm_leaf("attention_norm", "input_layernorm"),
    llama_like.norm_leaf("mlp_norm", "post_attention_layernorm"),
    *ATTENTION,
    *mamba2.leaves(f"{_LAYER}mamba.", MAMBA),
    Leaf("shared_in", f"{_LAYER}shared_mlp.input_linear.weight", "mlp", ("twice_shared", "hidden"), LAYERS, -2),
    Leaf(
        "shared_out", f"{_LAYER}shared_mlp.output_linear.weight", "mlp", ("hidden", "shared_width"), LAYERS, -1,
        writes_residual=True,
    ),
    Leaf(
        "router", f"{_SPARSE}router.layer.weight", ROUTER, ("experts", "hidden"), LAYERS, present_if=_is_mixture,
    ),
    Leaf(
        "gate_up", f"{_SPARSE}input_linear.weight", "mlp", ("experts", "gate_up", "hidden"), LAYERS,
        present_if=_is_mixture,
    ),
    Leaf(
        "down", f"{_SPARSE}output_linear.weight", "mlp", ("experts", "hidden", "mlp"), LAYERS, writes_residual=True,
        present_if=_is_mixture,
    ),
    *llama_like.SHARED,
)  # fmt: skip


def dimensions(config: GraniteHybridConfig) -> dict[str, int]:
    return {
        **mixture.dimensions(config), **mamba2.dimensions(config.mamba), "shared_width": config.shared_width,
        "twice_shared": 2 * config.shared_width, "gate_up": 2 * config.mlp,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The forward pass


def _second_half(config: GraniteHybridConfig, weights: Weights, x: jax.Array) -> jax.Array:
    """The hidden states behind the MLP and the mixture."""
    normed = rms_norm(x, weights["mlp_norm"], config.norm_eps)
    with jax.named_scope("mlp"):
        gate, up = dense_parts(normed, weights, "shared_in", 2)
        added = dense(ACTIVATIONS[config.activation](gate) * up, weights, "shared_out")
    if config.experts:
        gate, up = jnp.split(weights["gate_up"], 2, axis=-2)
        added = added + mixture.mixture(config, weights | {"gate": gate, "up": up}, normed)
    return x + config.residual_multiplier * added


def attention_block(
    config: GraniteHybridConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    x, kept = granite.attention(config, weights, x, rope if config.rotates else (), attend)
    return _second_half(config, weights, x), kept


def mamba_block(
    config: GraniteHybridConfig, weights: Weights, x: jax.Array, rope: CosSin, recur: Recur
) -> tuple[jax.Array, Any]:
    with jax.named_scope("attention"):
        normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
        mixed, kept = mamba2.mix(config.mamba, weights, normed, recur)
        x = x + config.residual_multiplier * mixed
    return _second_half(config, weights, x), kept


# ---------------------------------------------------------------------------------------------------------------
# config.json

LIMITS = or_null(
    Expected(
        lambda value: (
            isinstance(value, list)
            and len(value) == 2
            and FINITE.accepts(value[0])
            and (FINITE.accepts(value[1]) or value[1] in (math.inf, INFINITY))
        ),
        "two numbers: the least and the largest step",
    )
)
MAMBA_KEYS: dict[str, Expected] = {
    # The length of the chunks that its kernels compute at once, which changes no value.
    "mamba_chunk_size": SIZE,
    "mamba_conv_bias": SWITCH,
    "mamba_d_conv": KERNEL,
    "mamba_d_head": Expected(lambda value: value == "auto" or SIZE.accepts(value), f"auto or {SIZE.words}"),
    "mamba_d_state": SIZE,
    "mamba_expand": SIZE,
    "mamba_n_groups": SIZE,
    "mamba_n_heads": SIZE,
    "mamba_proj_bias": SWITCH,
    "time_step_limit": LIMITS,
}
KEYS: dict[str, Expected] = MAMBA_KEYS | {
    "attention_bias": SWITCH,
    "layer_types": or_null(TEXTS),
    "num_experts_per_tok": replace(SIZE, read_if=lambda config: config.get("num_local_experts") != 0),
    "num_local_experts": whole(0, 2**31 - 1),
    "position_embedding_type": or_null(one_of("rope", "nope")),
    "shared_intermediate_size": SIZE,
    **dict.fromkeys(granite.MULTIPLIERS, above(0)),
}


def read_mamba(hf: Mapping[str, Any], **settings: Any) -> Mamba:
    """The Mamba layers of a config with `MAMBA_KEYS`; settings: further fields."""
    shape = mamba2.mamba_shape(
        hf["mamba_n_heads"], hf["mamba_d_head"], hf["mamba_n_groups"], hf["mamba_d_state"], hf["mamba_d_conv"]
    )
    low, high = hf["time_step_limit"] or (0.0, math.inf)
    return Mamba(
        shape=shape, step_limits=(float(low), float(high)), eps=hf["rms_norm_eps"], conv_bias=hf["mamba_conv_bias"],
        in_bias=hf["mamba_proj_bias"], **settings,
    )  # fmt: skip


def read(hf: Mapping[str, Any]) -> GraniteHybridConfig:
    types, experts = read_types(hf, (FULL, MAMBA)), hf["num_local_experts"]
    mamba = read_mamba(hf, out_bias=hf["mamba_proj_bias"])
    return mixture.read_mixture(
        "granitemoehybrid", hf, GraniteHybridConfig,
        experts="num_local_experts", mlp="intermediate_size",
        keys=BIASES | {"shared_width": "shared_intermediate_size"}, layer_types=types, mamba=mamba,
        recurrent=mamba.shape if MAMBA in types else None, rotates=hf["position_embedding_type"] == "rope",
        experts_per_token=hf["num_experts_per_tok"] if experts else 0, weights_sum_to_one=True,
        **{name: float(hf[name]) for name in granite.MULTIPLIERS},
    )  # fmt: skip


GRANITE_HYBRID = llama_like.llama_like(
    "granitemoehybrid", "GraniteMoeHybridConfig", KEYS, read, leaves=LEAVES, dimensions=dimensions,
    embed=granite.embed, block=attention_block, map_logits=granite.GRANITE.map_logits, always_maps_logits=True,
    layer_types={
        FULL: LayerType(attention_block, (LAYERS, FULL)), MAMBA: LayerType(mamba_block, (LAYERS, MAMBA), RECURRENCE),
    },
    filters={}, no_adapter="PEFT has no adapters for its convolutions",
)  # fmt: skip
