"""LFM2: gated short convolutions, and some layers of attention whose queries and keys are normalised by head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from evojax_merge.models.architecture import LAYERS, RECURRENCE, LayerType, Leaf, leaves_in
from evojax_merge.models.config import LlamaLikeConfig, RecurrentShape
from evojax_merge.models.config_keys import EPSILON, KERNEL, SIZE, SWITCH, TEXTS, Expected, above, or_null
from evojax_merge.models.families import llama_like
from evojax_merge.models.families.llama_like import read_types
from evojax_merge.models.layers import CosSin, Weights, dense, dense_parts, rms_norm
from evojax_merge.models.recurrence import Recur

FULL, CONVOLUTION = "full_attention", "conv"

# ---------------------------------------------------------------------------------------------------------------
# Tensors

_LAYER = "model.layers.{layer}."
# Llama's names of modules, and LFM2's.
NAMES = {
    "o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm", "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip


def renamed(leaf: Leaf) -> Leaf:
    """A leaf of a Llama by LFM2's name of its tensor, those of attention in a stack of their own."""
    return replace(llama_like.renamed(leaf, NAMES), stack=FULL if leaf.component == "attention" else leaf.stack)


def _has_bias(config: LlamaLikeConfig) -> bool:
    return config.o_bias


_leaf = leaves_in(f"{_LAYER}conv.", "attention", CONVOLUTION)
LEAVES = (
    llama_like.norm_leaf("attention_norm", "operator_norm"),
    llama_like.norm_leaf("mlp_norm", "ffn_norm"),
    *(renamed(leaf) for leaf in llama_like.PROJECTIONS if not leaf.name.endswith("_bias")),
    _leaf("in", "in_proj.weight", "thrice_hidden", "hidden", sharded_axis=-2),
    _leaf("in_bias", "in_proj.bias", "thrice_hidden", present_if=_has_bias),
    _leaf("convolution", "conv.weight", "hidden", "one", "kernel"),
    _leaf("convolution_bias", "conv.bias", "hidden", present_if=_has_bias),
    _leaf("mixed", "out_proj.weight", "hidden", "hidden", sharded_axis=-1, writes_residual=True),
    _leaf("mixed_bias", "out_proj.bias", "hidden", writes_residual=True, present_if=_has_bias),
    *(
        replace(leaf, tensor="model.embedding_norm.weight") if leaf.name == "final_norm" else leaf
        for leaf in llama_like.SHARED
    ),
)


def dimensions(config: LlamaLikeConfig) -> dict[str, int]:
    kernel = 1 if config.recurrent is None else config.recurrent.kernel
    return llama_like.dimensions(config) | {"thrice_hidden": 3 * config.hidden, "one": 1, "kernel": kernel}


# ---------------------------------------------------------------------------------------------------------------
# The forward pass


def convolution(
    config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin, recur: Recur
) -> tuple[jax.Array, Any]:
    """The hidden states plus the convolution's output, and the columns to keep."""
    with jax.named_scope("convolution"):
        normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
        before, behind, inputs = dense_parts(normed, weights, "in", 3)
        mixed, columns = recur.convolve(before * inputs, weights["convolution"][:, 0], weights.get("convolution_bias"))
        return x + dense(behind * mixed, weights, "mixed"), recur.keep(columns)


def convolution_block(
    config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin, recur: Recur
) -> tuple[jax.Array, Any]:
    x, kept = convolution(config, weights, x, rope, recur)
    return x + llama_like.gated_mlp(config, weights, rms_norm(x, weights["mlp_norm"], config.norm_eps)), kept


# ---------------------------------------------------------------------------------------------------------------
# config.json

KEYS: dict[str, Expected] = {
    "block_auto_adjust_ff_dim": SWITCH,
    "block_ff_dim": SIZE,
    "block_ffn_dim_multiplier": or_null(above(0)),
    "block_multiple_of": SIZE,
    "conv_L_cache": KERNEL,
    "conv_bias": SWITCH,
    "full_attn_idxs": Expected(lambda value: value is None or isinstance(value, list), "null or a list of layers"),
    "layer_types": or_null(TEXTS),
    "norm_eps": EPSILON,
    "tie_embedding": SWITCH,
}


def recurrent_shape(hf: Mapping[str, Any], types: tuple[str, ...]) -> RecurrentShape | None:
    """The state of a model's convolutions; None where it has none."""
    return RecurrentShape(hf["hidden_size"], hf["conv_L_cache"]) if CONVOLUTION in types else None


def _mlp_width(hf: Mapping[str, Any]) -> int:
    """The width of the MLP, by the rule of the config's class."""
    width: int = hf["intermediate_size"]
    if not hf["block_auto_adjust_ff_dim"]:
        return width
    width = 2 * width // 3
    if hf["block_ffn_dim_multiplier"] is None:
        return width
    multiple: int = hf["block_multiple_of"]
    return multiple * -(-int(hf["block_ffn_dim_multiplier"] * width) // multiple)


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    types = read_types(hf, (FULL, CONVOLUTION))
    settings = {"hidden_act": "silu", "rms_norm_eps": hf["norm_eps"], "intermediate_size": _mlp_width(hf)}
    return llama_like.read_config(
        "lfm2", {**hf, **settings}, keys={"o_bias": "conv_bias"}, qk_norm=True, layer_types=types,
        recurrent=recurrent_shape(hf, types),
    )  # fmt: skip


LFM2 = llama_like.llama_like(
    "lfm2", "Lfm2Config", KEYS, read, leaves=LEAVES, dimensions=dimensions,
    layer_types={
        FULL: LayerType(llama_like.block, (LAYERS, FULL)),
        CONVOLUTION: LayerType(convolution_block, (LAYERS, CONVOLUTION), RECURRENCE),
    },
    filters={}, no_adapter="PEFT has no adapters for its convolutions",
)  # fmt: skip
