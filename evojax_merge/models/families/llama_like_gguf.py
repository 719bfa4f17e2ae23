"""The settings of Llama-like models in llama.cpp's GGUF files."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from evojax_merge.errors import InputError, shown
from evojax_merge.models.config_keys import CONTEXT, DEPTH, EPSILON, SIZE, SWITCH, TEXT, above, whole
from evojax_merge.models.gguf import Gguf, GgufFile, Settings

# Rules for the values of files, beside the rules for configs.
FACTOR, THETA, COUNT = above(0), above(1), whole(0, 2**31 - 1)
# The RoPE scalings of Llama 3.1 and later, which GGUF keeps as a tensor of factors.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FREQUENCIES = "rope_freqs.weight"
# The errors of the config classes say "hidden size" and "number of attention heads".
CONFIG_KEYS = {
    "hidden_size": ".embedding_length", "hidden size": ".embedding_length", "head_dim": ".attention.key_length",
    "intermediate_size": ".feed_forward_length", "num_hidden_layers": ".block_count",
    "num_attention_heads": ".attention.head_count", "number of attention heads": ".attention.head_count",
    "num_key_value_heads": ".attention.head_count_kv", "max_position_embeddings": ".context_length",
    "original_max_position_embeddings": ".rope.scaling.original_context_length",
    "partial_rotary_factor": ".rope.dimension_count", "rope_theta": ".rope.freq_base", "factor": ".rope.scaling.factor",
    "sliding_window": ".attention.sliding_window", "num_experts": ".expert_count", "num_local_experts": ".expert_count",
    "num_experts_per_tok": ".expert_used_count", "moe_intermediate_size": ".expert_feed_forward_length",
}  # fmt: skip
SIZE_KEYS = {
    "hidden": (".embedding_length",), "queries": (".attention.head_count", ".attention.key_length"),
    "keys": (".attention.head_count_kv", ".attention.head_count", ".attention.key_length"),
    "queries_keys_values": (".attention.head_count", ".attention.head_count_kv", ".attention.key_length"),
    "head_dim": (".attention.key_length", ".attention.head_count"), "gate_up": (".feed_forward_length",),
    "mlp": (".feed_forward_length", ".expert_feed_forward_length"), "experts": (".expert_count",),
    "shared_mlp": (".expert_shared_feed_forward_length",), "vocab": ("tokenizer.ggml.tokens",),
}  # fmt: skip


def llama_settings(file: GgufFile) -> dict[str, Any]:
    """The keys of config.json for a Llama in which every entry of a head is rotated."""
    rotated = file.key(".rope.dimension_count")
    if rotated not in file.metadata:
        head_dim = head_size(file)
    else:
        # Every entry of a head is rotated: the number of rotated entries is the head's size.
        head_dim = file.value(".attention.key_length", SIZE, file.value(".rope.dimension_count", SIZE))
        if file.metadata[rotated] != head_dim:
            raise InputError(
                file.path, f"{rotated}: {file.metadata[rotated]}; expected all {head_dim} entries of a head"
            )
    return common_settings(file, head_dim, _rope_parameters(file, head_dim))


def common_settings(file: GgufFile, head_dim: int, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that the configs of all these families share. rope: `rope_parameters`."""
    heads = file.value(".attention.head_count", SIZE)
    return {
        "vocab_size": file.embedding.shape[0],
        "hidden_size": file.value(".embedding_length", SIZE),
        "intermediate_size": file.value(".feed_forward_length", SIZE),
        "num_hidden_layers": file.value(".block_count", DEPTH),
        "num_attention_heads": heads,
        "num_key_value_heads": file.value(".attention.head_count_kv", SIZE, heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.value(".context_length", CONTEXT),
        # The shortest decimal that is this float32: 1e-05, not 9.999999747e-06.
        "rms_norm_eps": float(str(np.float32(file.value(".attention.layer_norm_rms_epsilon", EPSILON)))),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **({"attention_bias": True} if "blk.0.attn_q.bias" in file.tensors else {}),
    }


def head_size(file: GgufFile) -> int:
    """The number of entries of each head."""
    hidden, heads = file.value(".embedding_length", SIZE), file.value(".attention.head_count", SIZE)
    if hidden % heads and file.key(".attention.key_length") not in file.metadata:
        raise InputError(
            file.path, f"{file.key('.attention.head_count')}: {heads:,}; expected a divisor of "
            f"{file.key('.embedding_length')}, {hidden:,}",
        )  # fmt: skip
    size: int = file.value(".attention.key_length", SIZE, hidden // heads)
    return size


def _rope_parameters(file: GgufFile, head_dim: int) -> dict[str, Any]:
    theta = file.value(".rope.freq_base", THETA, 10000.0)
    scaling = file.value(".rope.scaling.type", TEXT, "none")
    frequencies = file.tensors.get(FREQUENCIES)
    if frequencies is not None:
        rope = _llama3_rope(frequencies.read(), theta, head_dim)
        if rope is None:
            raise InputError(
                file.path, f"{FREQUENCIES}: not the factors of a Llama 3.1; expected a RoPE scaling that is known"
            )
        return rope
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling not in ("linear", "yarn"):
        raise InputError(
            file.path, f"{file.key('.rope.scaling.type')}: {shown(scaling)}; expected none, linear or yarn"
        )
    rope = {"rope_type": scaling, "rope_theta": theta, "factor": file.value(".rope.scaling.factor", FACTOR)}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = file.value(".rope.scaling.original_context_length", CONTEXT)
    return rope


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """float64[head_dim / 2]: the divisor of each pair's frequency in Llama 3.1."""
    share = np.clip((_turns(rope, head_dim) - rope["low_freq_factor"]) / _width(rope), 0, 1)
    return 1 / ((1 - share) / rope["factor"] + share)


def _turns(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """float64[head_dim / 2]: how often each pair turns within the context before its extension."""
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    return rope["original_max_position_embeddings"] / waves


def _width(rope: Mapping[str, Any]) -> float:
    return float(rope["high_freq_factor"] - rope["low_freq_factor"])


def _llama3_rope(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The scaling whose `llama3_factors` these are; None where there is none."""
    if factors.shape != (-(-head_dim // 2),) or not np.all(factors >= 1):
        return None
    # A factor of float32, to the digits that it has.
    factor = float(f"{factors.max():.6g}")
    rope: dict[str, Any] = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3_ROPE}
    share = (1 / factors - 1 / factor) / (1 - 1 / factor) if factor > 1 else np.zeros(len(factors))
    between = (share > 0.01) & (share < 0.99)
    if between.any():
        # Pairs between both ends say how long the context was.
        turns = rope["low_freq_factor"] + share[between] * _width(rope)
        length = np.median(turns / _turns({**rope, "original_max_position_embeddings": 1}, head_dim)[between])
        rope["original_max_position_embeddings"] = round(length)
    return rope if np.allclose(factors, llama3_factors(rope, head_dim), rtol=1e-4) else None


def mixture_settings(file: GgufFile, experts_key: str, *, weights_sum_to_one: bool | None = None) -> dict[str, Any]:
    """The keys of config.json for a Llama with experts. experts_key: the config's key for the number of experts.
    weights_sum_to_one: whether the weights of a token's experts sum to 1 where the file has no key for it (llama.cpp
    decides by the architecture); None where the config has no such key. Widths that older files do not name are read
    from the tensors' shapes."""
    settings = llama_settings(file) | {
        experts_key: file.value(".expert_count", SIZE),
        "num_experts_per_tok": file.value(".expert_used_count", SIZE),
    }
    if weights_sum_to_one is None:
        return settings
    experts, shared = (file.tensors.get(f"blk.0.ffn_gate_{kind}.weight") for kind in ("exps", "shexp"))
    width = experts.shape[-2] if experts is not None and len(experts.shape) == 3 else None
    settings["moe_intermediate_size"] = file.value(".expert_feed_forward_length", SIZE, width)
    settings["norm_topk_prob"] = file.value(".expert_weights_norm", SWITCH, weights_sum_to_one)
    if shared is not None:
        key = ".expert_shared_feed_forward_length"
        settings["shared_expert_intermediate_size"] = file.value(key, SIZE, shared.shape[0])
    return settings


def common_metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of all these families, by the values of the keys of config.json."""
    heads = values["num_attention_heads"]
    head_dim = values.get("head_dim") or values["hidden_size"] // heads
    return {
        ".vocab_size": values["vocab_size"], ".context_length": values["max_position_embeddings"],
        ".embedding_length": values["hidden_size"], ".block_count": values["num_hidden_layers"],
        ".feed_forward_length": values["intermediate_size"], ".attention.head_count": heads,
        ".attention.head_count_kv": values["num_key_value_heads"] or heads, ".attention.key_length": head_dim,
        ".attention.value_length": head_dim, ".attention.layer_norm_rms_epsilon": values["rms_norm_eps"],
        ".rope.dimension_count": head_dim,
    }  # fmt: skip


def llama_metadata(values: Mapping[str, Any]) -> Settings:
    """The inverse of `llama_settings`."""
    metadata, rope = common_metadata(values), values["rope_parameters"]
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    metadata[".rope.freq_base"] = theta
    if kind == "llama3":
        return metadata, {FREQUENCIES: llama3_factors(rope, metadata[".rope.dimension_count"])}
    if kind in ("linear", "yarn"):
        metadata |= {".rope.scaling.type": kind, ".rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
        metadata[".rope.scaling.original_context_length"] = original
    return metadata, {}


def mixture_metadata(
    values: Mapping[str, Any], experts_key: str, *, weights_sum_to_one: bool | None = None
) -> Settings:
    """The inverse of `mixture_settings`."""
    metadata, tensors = llama_metadata(values)
    keys = {
        ".expert_count": experts_key, ".expert_used_count": "num_experts_per_tok",
        ".expert_feed_forward_length": "moe_intermediate_size",
        ".expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    }  # fmt: skip
    metadata |= {name: values[key] for name, key in keys.items() if key in values}
    if values.get("norm_topk_prob", weights_sum_to_one) != weights_sum_to_one:
        metadata[".expert_weights_norm"] = values["norm_topk_prob"]
    return metadata, tensors


def llama_like_gguf(
    name: str, read_settings: Callable[[GgufFile], dict[str, Any]] = llama_settings, **options: Any
) -> Gguf:
    """The form of a Llama-like architecture's GGUF files. options: further fields of `Gguf`."""
    fields: dict[str, Any] = {"setting_tensors": (FREQUENCIES,), "config_keys": CONFIG_KEYS, "size_keys": SIZE_KEYS,
              "write_settings": llama_metadata} | options  # fmt: skip
    return Gguf(name, read_settings, **fields)


def mixture_gguf(name: str, experts_key: str, weights_sum_to_one: bool | None = None, **options: Any) -> Gguf:
    """The form of the GGUF files of a Llama with experts (see `mixture_settings`)."""
    rule: dict[str, Any] = {"experts_key": experts_key, "weights_sum_to_one": weights_sum_to_one}
    return llama_like_gguf(
        name, partial(mixture_settings, **rule), has_experts=True, write_settings=partial(mixture_metadata, **rule),
        **options,
    )  # fmt: skip
