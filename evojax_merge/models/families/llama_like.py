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
import jax.numpy as jnp

from evojax_merge.errors import shown
from evojax_merge.models.architecture import LAYERS, Architecture, Leaf, SharedWeights, shared_leaves
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
    apply_rope_interleaved,
    dense,
    dense_heads,
    dense_parts,
    layer_norm,
    rms_norm,
    rms_norm_float32,
    rope_tables,
)

Config = TypeVar("Config", bound=LlamaLikeConfig)

# ---------------------------------------------------------------------------------------------------------------
# Tensors


_LAYER = "model.layers.{layer}."


def renamed(leaf: Leaf, names: Mapping[str, str]) -> Leaf:
    """A leaf whose tensor has other names in place of some parts."""
    tensor = leaf.tensor
    for name, other in names.items():
        tensor = tensor.replace(name, other)
    return replace(leaf, tensor=tensor)


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
# The norms of layers with LayerNorm, whose biases are leaves of their own.
LAYER_NORMS = tuple(
    replace(norm_leaf(name, module), name=f"{name}{suffix}", tensor=f"{_LAYER}{module}.{kind}")
    for name, module in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))
    for suffix, kind in (("", "weight"), ("_bias", "bias"))
)
FINAL_NORM_BIAS = Leaf("final_norm_bias", "model.norm.bias", "norm", ("hidden",))
# For layers whose contributions are normalised: the norm behind a projection sets the contribution's scale.
INNER_PROJECTIONS = tuple(replace(leaf, writes_residual=False) for leaf in PROJECTIONS)
# The filters that mergekit's users write.
FILTERS = {
    "attention": "self_attn", "mlp": ".mlp.", "norm": "layernorm",
    "embed": "embed_tokens", "final_norm": "model.norm", "head": "lm_head",
}  # fmt: skip
LAYER_NORM_FILTERS = FILTERS | {"final_norm": "model.norm.weight", "final_norm_bias": "model.norm.bias"}


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


def position_tables(config: Any, layout: SequenceLayout) -> CosSin:
    return rope_tables(config.rope, config.rotary_dim, layout, config.rope_axes)


def switched_position_tables(config: LlamaLikeConfig, layout: SequenceLayout) -> tuple[CosSin, CosSin]:
    """The tables of layers without positions, which rotate by nothing, and of layers with RoPE."""
    cos, sin = rope_tables(config.rope, config.head_dim, layout)
    return (jnp.ones_like(cos), jnp.zeros_like(sin)), (cos, sin)


def local_position_tables(config: Any, layout: SequenceLayout) -> tuple[CosSin, CosSin]:
    """The tables of layers with full attention, and of layers with a sliding window, by `config.local_rope`."""
    return rope_tables(config.rope, config.head_dim, layout), rope_tables(config.local_rope, config.head_dim, layout)


def project_qkv(
    config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin | tuple[()]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, H, d]` and keys `[B, T, G, d]` with RoPE applied, and values `[B, T, G, d]`."""
    with jax.named_scope("qkv"):
        if "qkv" in weights:
            heads = dense(x, weights, "qkv").reshape(*x.shape[:2], -1, config.head_dim)
            query, key, value = jnp.split(heads, [config.heads, config.heads + config.kv_heads], axis=2)
        else:
            query, key, value = (dense_heads(x, weights, name, config.head_dim) for name in ("q", "k", "v"))
        if config.norm_behind_rope:
            query, key = (_rotate(config, part, rope) for part in (query, key))
        if config.qk_norm:
            query, key = _head_norm(config, weights, "q_norm", query), _head_norm(config, weights, "k_norm", key)
        if config.clip is not None:
            query, key, value = (jnp.clip(part, -config.clip, config.clip) for part in (query, key, value))
        if not config.norm_behind_rope:
            query, key = (_rotate(config, part, rope) for part in (query, key))
        return query, key, value


def _head_norm(config: LlamaLikeConfig, weights: Weights, name: str, x: jax.Array) -> jax.Array:
    """The norm of queries or keys over each head's entries, or over all of a token's where the gain has as many."""
    apart = x.reshape(*x.shape[:2], -1, weights[name].shape[-1])
    return norm(config, weights, name, apart).reshape(x.shape)


def _rotate(config: LlamaLikeConfig, x: jax.Array, rope: CosSin | tuple[()]) -> jax.Array:
    """RoPE of queries or keys; no tables: they have no positions."""
    if not rope:
        return x
    cos, sin = (table.astype(x.dtype) for table in rope)
    return (apply_rope_interleaved if config.interleaved else apply_rope)(x, cos, sin)


def norm(config: LlamaLikeConfig, weights: Weights, name: str, x: jax.Array) -> jax.Array:
    """The norm over the last axis whose gain is the leaf `name`; `x` where the layer has no such norm."""
    gain = weights.get(name)
    if gain is None:
        return x
    if config.norm == "rms":
        return rms_norm(x, gain, config.norm_eps)
    if config.norm == "rms_float32":
        return rms_norm_float32(x, gain, config.norm_eps, config.norm_offset)
    return layer_norm(x, gain + config.norm_offset, weights.get(f"{name}_bias"), config.norm_eps)


def gated_mlp(config: LlamaLikeConfig, weights: Weights, x: jax.Array) -> jax.Array:
    """The MLP's output, `[B, T, hidden]`; the activation is that of the gate, or of `up` where there is no gate."""
    activation = ACTIVATIONS[config.activation]
    with jax.named_scope("mlp"):
        if "gate_up" in weights:
            # One half of the devices has the gate's entries, the other half the entries that the gate multiplies.
            gate, up = dense_parts(x, weights, "gate_up", 2)
            return dense(activation(gate) * up, weights, "down")
        if "gate" in weights:
            return dense(activation(dense(x, weights, "gate")) * dense(x, weights, "up"), weights, "down")
        return dense(activation(dense(x, weights, "up")), weights, "down")


def attention(
    config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    """The hidden states plus attention's output, and the keys and values that `attend` returned."""
    with jax.named_scope("attention"):
        normed = norm(config, weights, "attention_norm", x)
        attn_out, kept = attend(*project_qkv(config, weights, normed, rope))
        return x + norm(config, weights, "post_attention_norm", dense(attn_out, weights, "o")), kept


def block(
    config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    """A layer with the norms that its weights have: before attention and MLP, behind them, or both."""
    attended, kept = attention(config, weights, x, rope, attend)
    # Side by side, attention and MLP may share a norm.
    shares = config.side_by_side and "mlp_norm" not in weights
    normed = norm(
        config, weights, "attention_norm" if shares else "mlp_norm", x if config.side_by_side else attended
    )  # fmt: skip
    return attended + norm(config, weights, "post_mlp_norm", gated_mlp(config, weights, normed)), kept


def final_norm(config: LlamaLikeConfig, source: SharedWeights, x: jax.Array) -> jax.Array:
    names = [leaf.name for leaf in shared_leaves(config) if leaf.name in ("final_norm", "final_norm_bias")]
    return norm(config, {name: source.leaf(name) for name in names}, "final_norm", x)


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
PARTIAL_KEYS = {"partial_rotary_factor": PARTIAL_ROTARY, "rope_parameters": PARTIAL_ROPE, "rope_scaling": PARTIAL_ROPE}
# For families whose layers with a sliding window have a RoPE of their own.
LOCAL_ROPE = or_null(mapping({"full_attention": ROPE, "sliding_attention": ROPE}))
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
    rotary_dim = rotary_dimension(head_dim, hf["rope_parameters"])
    common: dict[str, Any] = {
        "architecture": model_type,
        "hidden": hf["hidden_size"],
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": hf["vocab_size"],
        # An architecture's own types of layers are no kinds of windows.
        "windows": windows_of({**hf, "layer_types": None} if values.get("layer_types") else hf),
        "head_is_embedding": hf["tie_word_embeddings"],
        "mlp": hf["intermediate_size"],
        "norm_eps": hf["rms_norm_eps"],
        "activation": hf["hidden_act"],
        "rope": rope_config(hf["rope_parameters"], hf["max_position_embeddings"], rotary_dim),
        "rotary_dim": rotary_dim,
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


def read_types(hf: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """The types of a config's layers. Raises ValueError, with the layer, for a type that is not among `names`, or where
    the types are not as many as the layers."""
    types, layers = tuple(hf["layer_types"]), hf["num_hidden_layers"]
    unknown = next((number for number, name in enumerate(types) if name not in names), None)
    if unknown is not None:
        raise ValueError(f"layer_types: layer {unknown} is {shown(types[unknown])}; expected one of {', '.join(names)}")
    if len(types) != layers:
        raise ValueError(f"layer_types: {len(types)} of them; expected num_hidden_layers, {layers}")
    return types


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
