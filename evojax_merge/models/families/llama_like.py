"""The common parts of Llama, Mistral and Qwen: the tensors, the forward pass, and the reading of their configs.

RMSNorm before attention and MLP, rotary grouped-query attention (with a sliding window in some layers), gated MLP. The
families' configs hold their differences: biases, norms of queries and keys, windows.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

import jax

from evojax_merge.errors import shown
from evojax_merge.models.architecture import LAYERS, Architecture, Leaf, SharedWeights
from evojax_merge.models.config import NO_WINDOW, LlamaLikeConfig, RopeConfig
from evojax_merge.models.config_keys import (
    CONTEXT,
    DEPTH,
    EPSILON,
    SIZE,
    SWITCH,
    TEXT,
    TEXTS,
    Expected,
    above,
    is_number,
    mapping,
    one_of,
    or_null,
    whole,
)
from evojax_merge.models.layers import (
    ACTIVATIONS,
    Attend,
    CosSin,
    KeyValue,
    SequenceLayout,
    Weights,
    apply_rope,
    dense,
    dense_heads,
    rms_norm,
    rope_tables,
)

Config = TypeVar("Config", bound=LlamaLikeConfig)

# ---------------------------------------------------------------------------------------------------------------
# Tensors


_LAYER = "model.layers.{layer}."


def norm_leaf(name: str, module: str, **more: Any) -> Leaf:
    """The gain of a norm of the hidden states in each layer, by its module's name."""
    return Leaf(name, f"{_LAYER}{module}.weight", "norm", ("hidden",), LAYERS, **more)


def _projections() -> tuple[Leaf, ...]:
    """The leaves of a layer except its norms of the hidden states."""
    attention, mlp, leaves = f"{_LAYER}self_attn.", f"{_LAYER}mlp.", list[Leaf]()
    for name, out in (("q", "queries"), ("k", "keys"), ("v", "keys")):
        leaves += [
            Leaf(name, f"{attention}{name}_proj.weight", "attention", (out, "hidden"), sharded_axis=-2),
            Leaf(f"{name}_bias", f"{attention}{name}_proj.bias", "attention", (out,), present_if=lambda c: c.qkv_bias),
        ]
    leaves += [
        Leaf(
            "o", f"{attention}o_proj.weight", "attention", ("hidden", "queries"), sharded_axis=-1, writes_residual=True
        ),
        Leaf(
            "o_bias", f"{attention}o_proj.bias", "attention", ("hidden",), writes_residual=True,
            present_if=lambda c: c.o_bias,
        ),
        Leaf("q_norm", f"{attention}q_norm.weight", "attention", ("head_dim",), present_if=lambda c: c.qk_norm),
        Leaf("k_norm", f"{attention}k_norm.weight", "attention", ("head_dim",), present_if=lambda c: c.qk_norm),
    ]  # fmt: skip
    for name in ("gate", "up"):
        leaves += [
            Leaf(name, f"{mlp}{name}_proj.weight", "mlp", ("mlp", "hidden"), sharded_axis=-2),
            Leaf(f"{name}_bias", f"{mlp}{name}_proj.bias", "mlp", ("mlp",), present_if=lambda c: c.mlp_bias),
        ]
    leaves += [
        Leaf("down", f"{mlp}down_proj.weight", "mlp", ("hidden", "mlp"), sharded_axis=-1, writes_residual=True),
        Leaf(
            "down_bias", f"{mlp}down_proj.bias", "mlp", ("hidden",), writes_residual=True,
            present_if=lambda c: c.mlp_bias,
        ),
    ]  # fmt: skip
    return tuple(replace(leaf, stack=LAYERS) for leaf in leaves)


PROJECTIONS = _projections()
# The leaves outside of the layers.
SHARED = (
    Leaf("embed", "model.embed_tokens.weight", "embedding", ("vocab", "hidden"), sharded_axis=-2),
    Leaf("final_norm", "model.norm.weight", "norm", ("hidden",)),
    Leaf(
        "head", "lm_head.weight", "head", ("vocab", "hidden"), sharded_axis=-2,
        present_if=lambda c: not c.head_is_embedding,
    ),
)  # fmt: skip
LEAVES = (
    norm_leaf("attention_norm", "input_layernorm"), norm_leaf("mlp_norm", "post_attention_layernorm"), *PROJECTIONS,
    *SHARED,
)  # fmt: skip
# For layers whose contributions are normalised: the norm behind a projection sets the contribution's scale.
INNER_PROJECTIONS = tuple(replace(leaf, writes_residual=False) for leaf in PROJECTIONS)
# The filters that mergekit's users write.
FILTERS = {
    "attention": "self_attn", "mlp": ".mlp.", "norm": "layernorm",
    "embed": "embed_tokens", "final_norm": "model.norm", "head": "lm_head",
}  # fmt: skip


def dimensions(config: LlamaLikeConfig) -> dict[str, int]:
    return {
        "hidden": config.hidden,
        "queries": config.heads * config.head_dim,
        "keys": config.kv_heads * config.head_dim,
        "head_dim": config.head_dim,
        "mlp": config.mlp,
        "vocab": config.vocab,
    }


# ---------------------------------------------------------------------------------------------------------------
# The forward pass


def embed(config: LlamaLikeConfig, source: SharedWeights, tokens: jax.Array, layout: SequenceLayout) -> jax.Array:
    return source.rows("embed", tokens)


def position_tables(config: LlamaLikeConfig, layout: SequenceLayout) -> CosSin:
    return rope_tables(config.rope, config.head_dim, layout)


def partial_position_tables(config: Any, layout: SequenceLayout) -> CosSin:
    """The tables where the first `config.rotary_dim` entries of a head are rotated."""
    return rope_tables(config.rope, config.rotary_dim, layout)


def project_qkv(
    config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, H, d]` and keys `[B, T, G, d]` with RoPE applied, and values `[B, T, G, d]`."""
    with jax.named_scope("qkv"):
        query, key, value = (dense_heads(x, weights, name, config.head_dim) for name in ("q", "k", "v"))
        if config.qk_norm:
            query = rms_norm(query, weights["q_norm"], config.norm_eps)
            key = rms_norm(key, weights["k_norm"], config.norm_eps)
        cos, sin = (table.astype(x.dtype) for table in rope)
        return apply_rope(query, cos, sin), apply_rope(key, cos, sin), value


def gated_mlp(config: LlamaLikeConfig, weights: Weights, x: jax.Array) -> jax.Array:
    with jax.named_scope("mlp"):
        gate = ACTIVATIONS[config.activation](dense(x, weights, "gate"))
        return dense(gate * dense(x, weights, "up"), weights, "down")


def attention(
    config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    """The hidden states plus attention's output, and the keys and values that `attend` returned."""
    with jax.named_scope("attention"):
        normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
        attn_out, kept = attend(*project_qkv(config, weights, normed, rope))
        return x + dense(attn_out, weights, "o"), kept


def block(
    config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    x, kept = attention(config, weights, x, rope, attend)
    return x + gated_mlp(config, weights, rms_norm(x, weights["mlp_norm"], config.norm_eps)), kept


def final_norm(config: LlamaLikeConfig, source: SharedWeights, x: jax.Array) -> jax.Array:
    return rms_norm(x, source.leaf("final_norm"), config.norm_eps)


# ---------------------------------------------------------------------------------------------------------------
# config.json

_ONE = Expected(lambda value: is_number(value) and value == 1, "1")
_MSCALE = Expected(lambda value: is_number(value) and 0 <= value <= 1e6, "a number from 0 to 1,000,000")
_ROPE: dict[str, Expected] = {
    "attention_factor": or_null(above(0)),
    "beta_fast": or_null(above(0)),
    "beta_slow": or_null(above(0)),
    "factor": or_null(above(0)),
    "high_freq_factor": or_null(above(0)),
    "low_freq_factor": or_null(above(0)),
    "mscale": or_null(_MSCALE),
    "mscale_all_dim": or_null(_MSCALE),
    "original_max_position_embeddings": or_null(CONTEXT),
    "partial_rotary_factor": or_null(_ONE),
    "rope_theta": above(1),
    "rope_type": TEXT,
    "truncate": SWITCH,
    "type": TEXT,
}
ROPE = or_null(mapping(_ROPE))
# For families in which only some of a head's entries are rotated.
PARTIAL_ROTARY = or_null(Expected(lambda value: is_number(value) and 0 < value <= 1, "a number above 0, up to 1"))
PARTIAL_ROPE = or_null(mapping(_ROPE | {"partial_rotary_factor": PARTIAL_ROTARY}))
# Keys that the class of every family reads. `head_dim` and RoPE's spellings count for every family, declared or not.
KEYS: dict[str, Expected] = {
    "head_dim": or_null(SIZE),
    "hidden_act": one_of(*ACTIVATIONS),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "max_position_embeddings": CONTEXT,
    "num_attention_heads": SIZE,
    "num_hidden_layers": DEPTH,
    "num_key_value_heads": or_null(SIZE),
    "original_max_position_embeddings": or_null(CONTEXT),
    "partial_rotary_factor": or_null(_ONE),
    "rms_norm_eps": EPSILON,
    "rope_parameters": ROPE,
    "rope_scaling": ROPE,
    "rope_theta": above(1),
    "tie_word_embeddings": SWITCH,
    "vocab_size": SIZE,
}
WINDOW = or_null(SIZE)
# The fields of a config that say where attention has biases, and the key that says so in most families.
BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
# Qwen's classes ignore windows that are switched off.
QWEN_WINDOWS: dict[str, Expected] = {
    "layer_types": or_null(TEXTS),
    "max_window_layers": whole(0, 2**31 - 1),
    "sliding_window": replace(WINDOW, read_if=lambda config: config.get("use_sliding_window") is True),
    "use_sliding_window": SWITCH,
}

# For each rope_type: the keys that are read, and the required keys.
ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip
ROPE_NEEDED = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": set[str](),
}
# Keys of RoPE settings that change positions in programs that support them. Any other key is ignored as a note.
_ROPE_OF_OTHERS = {"alpha", "long_factor", "long_mscale", "mrope_section", "short_factor", "short_mscale"}


def read_config(
    model_type: str,
    hf: Mapping[str, Any],
    kind: type[Config] = LlamaLikeConfig,  # type: ignore[assignment]
    keys: Mapping[str, str] = MappingProxyType({}),
    **values: Any,
) -> Config:
    """The config, of the class `kind`, for the values `hf` of the keys of config.json. keys: fields of the class that
    have the values of keys; values: those of other fields. Raises ValueError for values that no model can have."""
    heads = hf["num_attention_heads"]
    kv_heads, head_dim = hf["num_key_value_heads"] or heads, hf.get("head_dim")
    if head_dim is None:
        if hf["hidden_size"] % heads:
            raise ValueError(f"hidden_size: {hf['hidden_size']} is not a multiple of num_attention_heads: {heads}")
        head_dim = hf["hidden_size"] // heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads: {heads} is not a multiple of num_key_value_heads: {kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim: {head_dim}; expected an even number, to rotate positions in pairs")
    common: dict[str, Any] = {
        "architecture": model_type,
        "hidden": hf["hidden_size"],
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": hf["vocab_size"],
        "windows": windows_of(hf),
        "head_is_embedding": hf["tie_word_embeddings"],
        "mlp": hf["intermediate_size"],
        "norm_eps": hf["rms_norm_eps"],
        "activation": hf["hidden_act"],
        "rope": rope_config(hf["rope_parameters"], hf["max_position_embeddings"], head_dim),
    }
    return kind(**common | {field: hf[key] for field, key in keys.items()} | values)


def rotary_dimension(head_dim: int, settings: Mapping[str, Any]) -> int:
    """The number of entries of a head that are rotated, by RoPE's settings. Raises ValueError where these are not
    pairs."""
    rotary_dim = int(head_dim * settings.get("partial_rotary_factor", 1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"partial_rotary_factor: rotates {rotary_dim} of head_dim {head_dim}; expected pairs")
    return rotary_dim


def windows_of(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """The number of positions that each layer attends to."""
    layers, window, kinds = hf["num_hidden_layers"], hf.get("sliding_window"), hf.get("layer_types")
    if kinds is None:  # Llama, and Mistral: one window for all layers
        return (min(window or NO_WINDOW, NO_WINDOW),) * layers
    windows = {"full_attention": NO_WINDOW, "sliding_attention": min(window or NO_WINDOW, NO_WINDOW)}
    unknown = sorted(set(kinds) - set(windows))
    if unknown or len(kinds) != layers:
        fault = f"{len(kinds)} of them" if len(kinds) != layers else shown(unknown[0])
        raise ValueError(f"layer_types: {fault}; expected {layers} of {', '.join(windows)}")
    return tuple(windows[kind] for kind in kinds)


def sliding_layers(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """1 for a layer with a sliding window, 0 for a layer with full attention. Raises ValueError where a layer has a
    sliding window and the config gives no size."""
    sliding = tuple(int(kind == "sliding_attention") for kind in hf["layer_types"])
    if any(sliding) and hf["sliding_window"] is None:
        raise ValueError(f"sliding_window: null; expected {SIZE.words}, for layers with sliding_attention")
    return sliding


def rope_config(settings: Mapping[str, Any], max_position: int, dim: int) -> RopeConfig:
    """The RoPE of `settings`, in transformers' spelling; dim: the number of entries of a head that are rotated."""
    rope = {key: value for key, value in settings.items() if value is not None}
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    if kind not in ROPE_KEYS:
        raise ValueError(f"rope_type: {shown(kind)} is not supported (expected {', '.join(ROPE_KEYS)})")
    read = {"rope_theta", *set().union(*ROPE_KEYS.values())}
    # transformers adds original_max_position_embeddings to every scaled kind.
    others = rope.keys() & (read | _ROPE_OF_OTHERS) - ROPE_KEYS[kind] - {
        "rope_theta", "original_max_position_embeddings",
    }  # fmt: skip
    if others:
        raise ValueError(f"rope settings: {sorted(others)} not supported for rope_type {kind!r}")
    original = rope.get("original_max_position_embeddings") or max_position
    missing = ROPE_NEEDED[kind] - rope.keys()
    if missing:
        raise ValueError(f"rope settings: {sorted(missing)} missing for rope_type {kind!r}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError("rope settings: low_freq_factor is not below high_freq_factor")
    if kind == "dynamic" and dim <= 2:
        raise ValueError(f"head_dim: {dim}; expected more than 2 for rope_type {kind!r}")
    factor = float(rope.get("factor") or (max_position / original if kind == "yarn" else 1.0))
    return RopeConfig(
        kind=kind,
        theta=float(theta),
        factor=factor,
        # Only dynamic scaling depends on the longest position: with other kinds it must not make parents differ.
        max_position=max_position if kind == "dynamic" else 0,
        original_max_position=original if kind in ("llama3", "yarn") else 0,
        low_freq_factor=float(rope.get("low_freq_factor") or 1.0),
        high_freq_factor=float(rope.get("high_freq_factor") or 1.0),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=_yarn_attention_factor(rope, factor) if kind == "yarn" else 1.0,
        truncate=bool(rope.get("truncate", True)),
    )


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    """YaRN (arXiv 2309.00071), equation 22, with DeepSeek's two multipliers where a config names them."""

    def temperature(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature(1.0)


def llama_like(
    model_type: str, config_class: str, keys: dict[str, Expected], read: Any, *, unread: str = "", **fields: Any
) -> Architecture:  # fmt: skip
    """An architecture with this module's tensors and forward pass. keys: the keys that its class reads beside `KEYS`;
    unread: a key of these that it does not read; read: its `Architecture.read_config`; fields: those of `Architecture`
    in which it differs."""
    common: dict[str, Any] = {
        "leaves": LEAVES, "keys": {key: KEYS[key] for key in KEYS if key != unread} | keys, "dimensions": dimensions,
        "embed": embed, "position_tables": position_tables, "block": block, "final_norm": final_norm,
        "filters": FILTERS,
    }  # fmt: skip
    return Architecture(model_type=model_type, config_class=config_class, read_config=read, **common | fields)
