"""Which tensors an architecture has, and what its config means. May import models.config.

One row per tensor says its leaf name in the pytree, its Hugging Face name, its component and its shape. A config
attribute that is neither handled here nor at its default raises: a model that loads is a model that is right.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from evojax_merge.errors import InputError
from evojax_merge.models.config import NO_WINDOW, DecoderConfig, RopeConfig

# The components of a layer, in the order of the recipe's component axis.
COMPONENTS = ("attention", "mlp", "norm")


@dataclass(frozen=True)
class Leaf:
    """One tensor: `name` in the pytree, `tensor` in the file (`{i}`: the layer), its component and shape.

    `wanted(config)` says whether a model of that config has it. Shapes are in terms of `dimensions(config)`.
    """

    name: str
    tensor: str
    component: str
    shape: tuple[str, ...]
    wanted: Callable[[DecoderConfig], bool] = lambda config: True


def _layer_leaves() -> tuple[Leaf, ...]:
    attention, mlp = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    rows = [
        Leaf("attention_norm", "model.layers.{i}.input_layernorm.weight", "norm", ("hidden",)),
        Leaf("mlp_norm", "model.layers.{i}.post_attention_layernorm.weight", "norm", ("hidden",)),
    ]
    for name, out, into in (("q", "queries", "hidden"), ("k", "keys", "hidden"), ("v", "keys", "hidden")):
        rows.append(Leaf(name, f"{attention}{name}_proj.weight", "attention", (out, into)))
        rows.append(Leaf(f"{name}_bias", f"{attention}{name}_proj.bias", "attention", (out,), lambda c: c.qkv_bias))
    rows += [
        Leaf("o", f"{attention}o_proj.weight", "attention", ("hidden", "queries")),
        Leaf("o_bias", f"{attention}o_proj.bias", "attention", ("hidden",), lambda c: c.o_bias),
        Leaf("q_norm", f"{attention}q_norm.weight", "attention", ("head_dim",), lambda c: c.qk_norm),
        Leaf("k_norm", f"{attention}k_norm.weight", "attention", ("head_dim",), lambda c: c.qk_norm),
    ]
    for name, out, into in (("gate", "mlp", "hidden"), ("up", "mlp", "hidden"), ("down", "hidden", "mlp")):
        rows.append(Leaf(name, f"{mlp}{name}_proj.weight", "mlp", (out, into)))
        rows.append(Leaf(f"{name}_bias", f"{mlp}{name}_proj.bias", "mlp", (out,), lambda c: c.mlp_bias))
    return tuple(rows)


LAYER_LEAVES = _layer_leaves()
SHARED_LEAVES = (
    Leaf("embed", "model.embed_tokens.weight", "embedding", ("vocab", "hidden")),
    Leaf("final_norm", "model.norm.weight", "norm", ("hidden",)),
    Leaf("head", "lm_head.weight", "head", ("vocab", "hidden"), lambda c: not c.head_is_embedding),
)


def dimensions(config: DecoderConfig) -> dict[str, int]:
    """The sizes that the shapes of the leaves are written in."""
    return {
        "hidden": config.hidden,
        "queries": config.heads * config.head_dim,
        "keys": config.kv_heads * config.head_dim,
        "head_dim": config.head_dim,
        "mlp": config.mlp,
        "vocab": config.vocab,
    }


def layer_leaves(config: DecoderConfig) -> list[Leaf]:
    return [leaf for leaf in LAYER_LEAVES if leaf.wanted(config)]


def shared_leaves(config: DecoderConfig) -> list[Leaf]:
    return [leaf for leaf in SHARED_LEAVES if leaf.wanted(config)]


# ---------------------------------------------------------------------------------------------------------------
# Hugging Face configs

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# Attributes that say nothing about the forward pass.
IRRELEVANT = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache", "_attn_implementation", "_attn_implementation_autoset",
}  # fmt: skip
HANDLED = {
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "max_window_layers", "mlp_bias", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps", "rope_parameters", "sliding_window", "tie_word_embeddings",
    "use_sliding_window", "vocab_size",
}  # fmt: skip
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


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of the layers themselves, as it says it: not how many there are, nor of how many tokens."""
    sizes = {"num_hidden_layers", "tie_word_embeddings", "vocab_size"}
    return {key: value for key, value in config.items() if key in HANDLED - sizes or key not in HANDLED | IRRELEVANT}


@lru_cache(maxsize=1)
def _config_classes() -> dict[str, Any]:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    return dict(zip(MODEL_TYPES, (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config), strict=True))


def decoder_config(path: Path) -> DecoderConfig:
    """Read `config.json`. Raises InputError for an unknown architecture or an attribute that is not handled."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(path, "not found; expected a Hugging Face model folder with a config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(path, f"not valid JSON ({error})") from None
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise InputError(path, f"model_type is {kind!r}; expected one of {', '.join(MODEL_TYPES)}")
    config_class = _config_classes()[kind]
    try:
        hf = config_class.from_dict(raw)
    except Exception as error:  # whatever transformers' own validation raises is about the file
        raise InputError(path, f"not a valid {kind} config: {' '.join(str(error).split())}") from None
    default = config_class().to_dict()
    for key, value in hf.to_dict().items():
        if key in HANDLED or key in IRRELEVANT or value == default.get(key) or value in (None, [], {}):
            continue
        raise InputError(path, f"{key}: {value!r} is not supported (expected {default.get(key)!r})")
    if hf.hidden_act not in ACTIVATIONS:
        raise InputError(path, f"hidden_act: {hf.hidden_act!r}; expected one of {', '.join(ACTIVATIONS)}")
    heads, layers = hf.num_attention_heads, hf.num_hidden_layers
    return DecoderConfig(
        hidden=hf.hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=hf.num_key_value_heads or heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        mlp=hf.intermediate_size,
        vocab=hf.vocab_size,
        norm_eps=hf.rms_norm_eps,
        activation=hf.hidden_act,
        rope=_rope(path, hf),
        windows=_windows(path, hf),
        qkv_bias=kind == "qwen2" or bool(getattr(hf, "attention_bias", False)),
        o_bias=kind != "qwen2" and bool(getattr(hf, "attention_bias", False)),
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        qk_norm=kind == "qwen3",
        head_is_embedding=bool(hf.tie_word_embeddings),
    )


def _windows(path: Path, hf: Any) -> tuple[int, ...]:
    layers, window = hf.num_hidden_layers, getattr(hf, "sliding_window", None)
    kinds = getattr(hf, "layer_types", None)
    if kinds is None:  # Mistral: one window for all layers
        return (window or NO_WINDOW,) * layers
    known = {"full_attention": NO_WINDOW, "sliding_attention": window or NO_WINDOW}
    unknown = sorted(set(kinds) - set(known))
    if unknown or len(kinds) != layers:
        raise InputError(path, f"layer_types: {unknown or kinds}; expected {layers} of {', '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def _rope(path: Path, hf: Any) -> RopeConfig:
    rope = dict(hf.rope_parameters)
    kind = rope.pop("rope_type", "default")
    theta = rope.pop("rope_theta")
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(path, "rope_parameters.partial_rotary_factor is not supported (expected 1.0)")
    if kind not in ROPE_KEYS:
        raise InputError(path, f"rope_type: {kind!r} is not supported (expected {', '.join(ROPE_KEYS)})")
    unknown = {key for key, value in rope.items() if value is not None} - ROPE_KEYS[kind]
    if unknown - {"original_max_position_embeddings"}:  # transformers adds that one to every scaled kind
        raise InputError(path, f"rope_parameters: {sorted(unknown)} not supported for rope_type {kind!r}")
    factor = float(rope.get("factor") or 1.0)
    return RopeConfig(
        kind=kind,
        theta=float(theta),
        factor=factor,
        # Only dynamic scaling looks at the longest position: elsewhere it must not make parents differ.
        max_position=hf.max_position_embeddings if kind == "dynamic" else 0,
        original_max_position=(rope.get("original_max_position_embeddings") or hf.max_position_embeddings)
        if kind in ("llama3", "yarn")
        else 0,
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
