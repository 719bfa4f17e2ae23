"""Which tensors an architecture has, and what its config means.

One row per tensor says its leaf name in the pytree, its Hugging Face name, its component and its shape. A config
attribute that the family's class in transformers declares, and that is neither handled here nor at its default,
raises: a model that loads is a model that is right. What the class does not declare cannot change its forward pass
and is no reason to refuse, unless its very name says that another program's forward pass reads it.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.json_files import read_json_object, shown
from evojax_merge.errors import InputError
from evojax_merge.models.config import NO_WINDOW, DecoderConfig, RopeConfig

# The components of a layer, in the order of the recipe's component axis.
COMPONENTS = ("attention", "mlp", "norm")


@dataclass(frozen=True)
class Leaf:
    """One tensor: `name` in the pytree, `tensor` in the file (`{i}`: the layer), its component and shape.

    `present_if(config)` says whether a model of that config has it. Shapes are in terms of `dimensions(config)`.
    """

    name: str
    tensor: str
    component: str
    shape: tuple[str, ...]
    present_if: Callable[[DecoderConfig], bool] = lambda config: True


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
    return [leaf for leaf in LAYER_LEAVES if leaf.present_if(config)]


def shared_leaves(config: DecoderConfig) -> list[Leaf]:
    return [leaf for leaf in SHARED_LEAVES if leaf.present_if(config)]


# ---------------------------------------------------------------------------------------------------------------
# Hugging Face configs

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# Attributes that classes declare, or that every trainer leaves, and that say nothing about the forward pass.
IGNORED_KEYS = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# What each family's class reads. `head_dim` and the spellings of rope count for all, declared or not.
_EVERY = {
    "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings", "partial_rotary_factor",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
}  # fmt: skip
_WINDOWS = {"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"}
USED_KEYS = {
    "llama": _EVERY | {"attention_bias", "mlp_bias"},
    "mistral": _EVERY | {"sliding_window"},
    "qwen2": _EVERY | _WINDOWS,
    "qwen3": _EVERY | _WINDOWS | {"attention_bias"},
}
# Layers beyond this number are a slip or a trap: tables as long as the model is deep are made before a tensor is read.
MOST_LAYERS = 10_000
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
ROPE_READ = {"rope_theta", *set().union(*ROPE_KEYS.values())}
# Keys of rope settings that change positions in programs that know them. Any other key is somebody's note.
_ROPE_OF_OTHERS = {"alpha", "long_factor", "long_mscale", "mrope_section", "short_factor", "short_mscale"}


# What a value must be: a test, and the words for it in a message.
_Expected = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(low: int, high: int) -> _Expected:
    return (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"a whole number from {low:,} to {high:,}",
    )


def _above(low: float) -> _Expected:
    # A comparison that NaN and infinity fail.
    return lambda value: _is_number(value) and low < value <= 1e30, f"a finite number above {low:g}"


def _or_null(expected: _Expected) -> _Expected:
    accepts, words = expected
    return lambda value: value is None or accepts(value), f"null or {words}"


_SIZE, _SWITCH = _whole(1, 2**31 - 1), (lambda value: isinstance(value, bool), "true or false")
_TEXT, _MAPPING = (lambda value: isinstance(value, str), "a text"), (lambda value: isinstance(value, dict), "a mapping")
_VALUES: dict[str, _Expected] = {
    "attention_bias": _SWITCH,
    "head_dim": _or_null(_SIZE),
    "hidden_act": (lambda value: value in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "layer_types": _or_null(
        (lambda value: isinstance(value, list) and all(isinstance(kind, str) for kind in value), "a list of texts")
    ),
    "max_position_embeddings": _whole(1, NO_WINDOW),
    "max_window_layers": _whole(0, 2**31 - 1),
    "mlp_bias": _SWITCH,
    "num_attention_heads": _SIZE,
    "num_hidden_layers": _whole(1, MOST_LAYERS),
    "num_key_value_heads": _or_null(_SIZE),
    "original_max_position_embeddings": _or_null(_whole(1, NO_WINDOW)),
    "partial_rotary_factor": _or_null((lambda value: _is_number(value) and value == 1, "1")),
    "rms_norm_eps": (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to 1"),
    "rope_parameters": _or_null(_MAPPING),
    "rope_scaling": _or_null(_MAPPING),
    "rope_theta": _above(1),
    "sliding_window": _or_null(_SIZE),
    "tie_word_embeddings": _SWITCH,
    "use_sliding_window": _SWITCH,
    "vocab_size": _SIZE,
}
_ROPE_VALUES: dict[str, _Expected] = {
    "attention_factor": _or_null(_above(0)),
    "beta_fast": _or_null(_above(0)),
    "beta_slow": _or_null(_above(0)),
    "factor": _or_null(_above(0)),
    "high_freq_factor": _or_null(_above(0)),
    "low_freq_factor": _or_null(_above(0)),
    "mscale": _or_null((lambda value: _is_number(value) and 0 <= value <= 1e6, "a number from 0 to 1,000,000")),
    "mscale_all_dim": _or_null((lambda value: _is_number(value) and 0 <= value <= 1e6, "a number from 0 to 1,000,000")),
    "original_max_position_embeddings": _or_null(_whole(1, NO_WINDOW)),
    "partial_rotary_factor": _or_null((lambda value: _is_number(value) and value == 1, "1")),
    "rope_theta": _above(1),
    "rope_type": _TEXT,
    "truncate": _SWITCH,
    "type": _TEXT,
}


def _neutral(head_dim: int, hidden: int, layers: int) -> dict[str, tuple[float, ...]]:
    """Attributes of other families that change a forward pass, and the values with which they do not."""
    one = (1.0,)
    off = (0.0,)
    return {
        # Granite, MiniCPM, Falcon-H1, Cohere and others of maximal update parametrisation
        "attention_in_multiplier": one, "attention_multiplier": (1.0, head_dim**-0.5), "attention_out_multiplier": one,
        "dim_model_base": (1.0, float(hidden)), "embedding_multiplier": one, "embedding_scale": one,
        "embeddings_multiplier": one, "key_multiplier": one, "lm_head_multiplier": one, "logit_scale": one,
        "logits_multiplier": one, "logits_scaling": one, "mlp_multipliers": one, "mup_attn_multiplier": one,
        "mup_embedding_multiplier": one, "mup_width_multiplier": one, "residual_multiplier": one,
        "residual_scale": one, "scale_depth": (1.0, layers**0.5), "scale_emb": one,
        # Gemma, Grok, OLMo, SmolLM3, Qwen-VL, nanotron
        "attn_logit_softcapping": off, "clip_qkv": off, "final_logit_softcapping": off, "logits_soft_cap": off,
        "no_rope_layer_interval": off, "no_rope_layers": one, "query_pre_attn_scalar": (float(head_dim),),
        "rope_interleaved": off, "rotary_pct": one, "use_mrope": off,
    }  # fmt: skip


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a decoder's config says of the layers themselves, as it says it: not how many there are, nor of how many
    tokens."""
    sizes = {"num_hidden_layers", "tie_word_embeddings", "vocab_size"}
    read = USED_KEYS[config["model_type"]] | set(_neutral(1, 1, 1))
    return {key: value for key, value in config.items() if key in read - sizes}


def unread_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of a decoder's config that its family's class does not read, and that are not everybody's."""
    unread = [key for key in config if key not in USED_KEYS[config["model_type"]] | IGNORED_KEYS]
    for name in ("rope_scaling", "rope_parameters"):
        settings = config.get(name) or {}
        unread += [f"{name}.{key}" for key in settings if key not in ROPE_READ | {"type", "rope_type"}]
    return sorted(unread)


def check_unquantised(path: Path, config: Mapping[str, Any]) -> None:
    """Raises InputError where a config says that the weights are quantised. `path`: that of the config."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            how = config[key].get("quant_method") if isinstance(config[key], dict) else None
            by = "" if how is None else f" ({shown(how)})"
            raise InputError(
                path,
                f"{key}: a quantised checkpoint{by} cannot be merged; use the unquantised model, or dequantise it "
                "with transformers (model.dequantize(), then save_pretrained; remove the key)",
            )


def check_values(path: Path, config: Mapping[str, Any]) -> None:
    """Raises InputError for a value of a decoder's config that cannot be, naming its key. `path`: that of the config.

    Nothing is allocated that would grow with what a value says.
    """
    read = USED_KEYS[config["model_type"]]
    # Qwen's windows are not read where they are switched off.
    unused = {"sliding_window"} if "use_sliding_window" in read and config.get("use_sliding_window") is not True else ()
    for key, value in config.items():
        if key in read and key not in unused:
            _check_value(path, key, value, _VALUES[key])
    for name in ("rope_scaling", "rope_parameters"):
        for key, value in (config.get(name) or {}).items():
            if key in _ROPE_VALUES:
                _check_value(path, f"{name}.{key}", value, _ROPE_VALUES[key])


def _check_value(path: Path, key: str, value: Any, expected: _Expected) -> None:
    accepts, words = expected
    if not accepts(value):
        raise InputError(path, f"{key}: {shown(value)}; expected {words}")


@lru_cache(maxsize=1)
def _config_classes() -> dict[str, Any]:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    return dict(zip(MODEL_TYPES, (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config), strict=True))


def decoder_config(path: Path) -> DecoderConfig:
    """Read `config.json`. Raises InputError for an unknown architecture, a value that cannot be, or an attribute that
    matters and is not handled."""
    raw = read_json_object(path, missing="expected a Hugging Face model folder with a config.json")
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise InputError(path, f"model_type is {shown(kind)}; expected one of {', '.join(MODEL_TYPES)}")
    check_unquantised(path, raw)
    check_values(path, raw)
    config_class = _config_classes()[kind]
    _check_declared(path, raw, config_class)
    try:
        # What is not declared is not handed over: transformers would set whatever attribute a stranger's file names.
        read = USED_KEYS[kind] | {field.name for field in dataclasses.fields(config_class)}
        hf = config_class(**{key: copy.deepcopy(value) for key, value in raw.items() if key in read})
        # As transformers does when it makes a model: only now `original_max_position_embeddings` outside counts.
        hf.standardize_rope_params()
    except Exception as error:  # whatever transformers' own validation raises is about the file
        raise InputError(path, f"not a valid {kind} config: {' '.join(str(error).split())[:300]}") from None
    heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads or hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None)
    if head_dim is None:
        if hf.hidden_size % heads:
            raise InputError(path, f"hidden_size: {hf.hidden_size} is not a multiple of num_attention_heads: {heads}")
        head_dim = hf.hidden_size // heads
    if heads % kv_heads:
        raise InputError(path, f"num_attention_heads: {heads} is not a multiple of num_key_value_heads: {kv_heads}")
    if head_dim % 2:
        raise InputError(path, f"head_dim: {head_dim}; expected an even number, to rotate positions in pairs")
    for key, neutral in _neutral(head_dim, hf.hidden_size, hf.num_hidden_layers).items():
        if not _is_neutral(raw.get(key), neutral):
            raise InputError(
                path,
                f"{key}: {shown(raw[key])} changes the forward pass of another family; a {kind} does not read it "
                f"(expected {neutral[0]:g}, or no such key)",
            )
    return DecoderConfig(
        hidden=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=hf.intermediate_size,
        vocab=hf.vocab_size,
        norm_eps=hf.rms_norm_eps,
        activation=hf.hidden_act,
        rope=_rope(path, hf, head_dim),
        windows=_windows(path, hf),
        qkv_bias=kind == "qwen2" or bool(getattr(hf, "attention_bias", False)),
        o_bias=bool(getattr(hf, "attention_bias", False)),
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        qk_norm=kind == "qwen3",
        head_is_embedding=hf.tie_word_embeddings,
    )


def _check_declared(path: Path, raw: Mapping[str, Any], config_class: Any) -> None:
    """Raises InputError for what the class declares, or reads, and we know nothing of, unless it is at its default."""
    known = USED_KEYS[config_class.model_type] | IGNORED_KEYS
    declared = {field.name: field.default for field in dataclasses.fields(config_class)}
    for key, value in raw.items():
        # transformers reads per_layer_config whatever the family, and declares it nowhere.
        if (key in declared and key not in known) or key == "per_layer_config":
            default = declared.get(key)
            if value != default and value not in (None, [], {}):
                raise InputError(path, f"{key}: {shown(value)} is not supported (expected {default!r})")


def _is_neutral(value: Any, neutral: tuple[float, ...]) -> bool:
    if isinstance(value, list):
        return all(_is_neutral(item, neutral) for item in value)
    if value is None:
        return True
    return isinstance(value, int | float) and any(math.isclose(value, one, abs_tol=1e-12) for one in neutral)


def _windows(path: Path, hf: Any) -> tuple[int, ...]:
    layers, window = hf.num_hidden_layers, getattr(hf, "sliding_window", None)
    kinds = getattr(hf, "layer_types", None)
    if kinds is None:  # Llama, and Mistral: one window for all layers
        return (min(window or NO_WINDOW, NO_WINDOW),) * layers
    known = {"full_attention": NO_WINDOW, "sliding_attention": min(window or NO_WINDOW, NO_WINDOW)}
    unknown = sorted(set(kinds) - set(known))
    if unknown or len(kinds) != layers:
        found = f"{len(kinds)} of them" if len(kinds) != layers else shown(unknown[0])
        raise InputError(path, f"layer_types: {found}; expected {layers} of {', '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def _rope(path: Path, hf: Any, head_dim: int) -> RopeConfig:
    rope = {key: value for key, value in hf.rope_parameters.items() if value is not None}
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    if kind not in ROPE_KEYS:
        raise InputError(path, f"rope_type: {shown(kind)} is not supported (expected {', '.join(ROPE_KEYS)})")
    # transformers adds original_max_position_embeddings to every scaled kind.
    others = rope.keys() & (ROPE_READ | _ROPE_OF_OTHERS) - ROPE_KEYS[kind] - {
        "rope_theta", "original_max_position_embeddings",
    }  # fmt: skip
    if others:
        raise InputError(path, f"rope settings: {sorted(others)} not supported for rope_type {kind!r}")
    original = rope.get("original_max_position_embeddings") or hf.max_position_embeddings
    missing = ROPE_NEEDED[kind] - rope.keys()
    if missing:
        raise InputError(path, f"rope settings: {sorted(missing)} missing for rope_type {kind!r}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(path, "rope settings: low_freq_factor is not below high_freq_factor")
    if kind == "dynamic" and head_dim <= 2:
        raise InputError(path, f"head_dim: {head_dim}; expected more than 2 for rope_type {kind!r}")
    factor = float(rope.get("factor") or (hf.max_position_embeddings / original if kind == "yarn" else 1.0))
    return RopeConfig(
        kind=kind,
        theta=float(theta),
        factor=factor,
        # Only dynamic scaling looks at the longest position: elsewhere it must not make parents differ.
        max_position=hf.max_position_embeddings if kind == "dynamic" else 0,
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
