"""Phi-3, Phi-3.5 and Phi-4: a Llama whose queries, keys and values are one projection, as are gate and up; some models
rotate only a part of each head, and models of long contexts use LongRoPE (arXiv 2402.13753)."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from evojax_merge.errors import InputError, shown
from evojax_merge.models.architecture import LAYERS, Leaf
from evojax_merge.models.config import LlamaLikeConfig, RopeConfig
from evojax_merge.models.config_keys import CONTEXT, TEXT, Expected, above, is_number, mapping, or_null, whole
from evojax_merge.models.families import llama_like, llama_like_gguf
from evojax_merge.models.gguf import GgufFile, Settings

# In GGUF files: LongRoPE's divisors of the frequencies, beyond the length of the first training and up to it.
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


_ATTENTION, _MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
LEAVES = (
    llama_like.norm_leaf("attention_norm", "input_layernorm"),
    llama_like.norm_leaf("mlp_norm", "post_attention_layernorm"),
    Leaf("qkv", f"{_ATTENTION}qkv_proj.weight", "attention", ("queries_keys_values", "hidden"), LAYERS, -2),
    Leaf("gate_up", f"{_MLP}gate_up_proj.weight", "mlp", ("gate_up", "hidden"), LAYERS, -2),
    *(leaf for leaf in llama_like.PROJECTIONS if leaf.name in ("o", "down")),
    *llama_like.SHARED,
)


# ---------------------------------------------------------------------------------------------------------------
# config.json

_FACTORS = Expected(
    lambda value: isinstance(value, list) and all(is_number(one) and 0 < one <= 1e30 for one in value),
    "a list of finite numbers above 0",
)
ROPE = or_null(
    mapping(
        {
            "attention_factor": or_null(above(0)),
            "factor": or_null(above(0)),
            "long_factor": or_null(_FACTORS),
            "original_max_position_embeddings": or_null(CONTEXT),
            "partial_rotary_factor": llama_like.PARTIAL_ROTARY,
            "rope_theta": above(1),
            "rope_type": TEXT,
            "short_factor": or_null(_FACTORS),
            "type": TEXT,
        }
    )
)


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    settings = {key: value for key, value in hf["rope_parameters"].items() if value is not None}
    kept = {key: settings[key] for key in ("rope_theta", "partial_rotary_factor") if key in settings}
    config: LlamaLikeConfig = llama_like.read_config(
        "phi3", {**hf, "rope_parameters": {"rope_type": "default", **kept}}
    )
    if settings.get("rope_type", "default") == "default":
        return config
    return replace(config, rope=longrope_config(settings, hf["max_position_embeddings"], config.rotary_dim))


def longrope_config(settings: Mapping[str, Any], max_position: int, dim: int) -> RopeConfig:
    """LongRoPE, whose earlier names are su and yarn. dim: the number of entries of a head that are rotated."""
    missing = {"long_factor", "short_factor"} - settings.keys()
    if missing:
        raise ValueError(f"rope settings: {sorted(missing)} missing for rope_type 'longrope'")
    for key in ("long_factor", "short_factor"):
        if len(settings[key]) != dim // 2:
            raise ValueError(f"rope settings: {key} has {len(settings[key])} numbers; expected {dim // 2}")
    original = settings.get("original_max_position_embeddings") or max_position
    factor = settings.get("factor") or max_position / original
    stretched = 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        kind="longrope",
        theta=float(settings["rope_theta"]),
        original_max_position=original,
        attention_factor=float(settings.get("attention_factor") or stretched),
        # Float32: transformers computes with it, and GGUF files store it.
        short_factors=tuple(float(np.float32(divisor)) for divisor in settings["short_factor"]),
        long_factors=tuple(float(np.float32(divisor)) for divisor in settings["long_factor"]),
    )


def gguf_settings(file: GgufFile) -> dict[str, Any]:
    head_dim = llama_like_gguf.head_size(file)
    return llama_like_gguf.common_settings(file, head_dim, _gguf_rope(file, head_dim)) | {
        "original_max_position_embeddings": _first_length(file),
        # 0 where there is no window.
        "sliding_window": file.value(".attention.sliding_window", llama_like_gguf.COUNT, 0) or None,
    }


def _first_length(file: GgufFile) -> int:
    """The length in tokens of the texts of a model's first training."""
    length: int = file.value(".rope.scaling.original_context_length", CONTEXT, file.value(".context_length", CONTEXT))
    return length


def _gguf_rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """RoPE of a part of each head, or LongRoPE, whose factors lie in tensors, float32."""
    scaling = file.value(".rope.scaling.type", TEXT, "none")
    if scaling not in ("none", "longrope"):
        raise InputError(file.path, f"{file.key('.rope.scaling.type')}: {shown(scaling)}; expected none or longrope")
    rotated = file.value(".rope.dimension_count", whole(1, head_dim), head_dim)
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": file.value(".rope.freq_base", llama_like_gguf.THETA, 10000.0),
        "partial_rotary_factor": rotated / head_dim,
    }
    factors = {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
    missing = [name for name in factors.values() if name not in file.tensors]
    if len(missing) == len(factors):
        return rope
    if missing:
        raise InputError(file.path, f"has no tensor {missing[0]}; expected LongRoPE's factors, long and short")
    for name in factors.values():
        if file.tensors[name].shape != (rotated // 2,):
            raise InputError(
                file.path, f"{name} has shape {list(file.tensors[name].shape)}; by {file.key('.rope.dimension_count')} "
                f"it would be {[rotated // 2]}",
            )  # fmt: skip
    context, original = file.value(".context_length", CONTEXT), _first_length(file)
    rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    rope |= {key: file.tensors[name].read().tolist() for key, name in factors.items()}
    # A factor that the lengths imply is computed from the lengths: the file's factor is rounded.
    stretched = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original > 1 else 1.0
    attention = file.value(".rope.scaling.attn_factor", llama_like_gguf.FACTOR, stretched)
    return rope if math.isclose(attention, stretched, rel_tol=1e-6) else rope | {"attention_factor": attention}


def gguf_metadata(values: Mapping[str, Any]) -> Settings:
    """The inverse of `gguf_settings`."""
    metadata, rope = llama_like_gguf.common_metadata(values), values["rope_parameters"]
    head_dim, context = metadata[".rope.dimension_count"], values["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings") or context
    metadata |= {
        ".rope.dimension_count": llama_like.rotary_dimension(head_dim, rope),
        ".rope.freq_base": float(rope["rope_theta"]),
        ".rope.scaling.original_context_length": original,
        ".attention.sliding_window": values.get("sliding_window") or 0,
    }  # fmt: skip
    if rope.get("rope_type", "default") == "default":
        return metadata, {}
    metadata[".rope.scaling.attn_factor"] = longrope_config(
        rope, context, metadata[".rope.dimension_count"]
    ).attention_factor
    return metadata, {LONG_FACTORS: np.array(rope["long_factor"]), SHORT_FACTORS: np.array(rope["short_factor"])}


PHI3 = llama_like.llama_like(
    "phi3",
    "Phi3Config",
    {
        "partial_rotary_factor": llama_like.PARTIAL_ROTARY,
        "rope_parameters": ROPE,
        "rope_scaling": ROPE,
        "sliding_window": llama_like.WINDOW,
    },
    read,
    leaves=LEAVES,
    dimensions=lambda config: {
        **llama_like.dimensions(config),
        "queries_keys_values": (config.heads + 2 * config.kv_heads) * config.head_dim,
        "gate_up": 2 * config.mlp,
    },
    gguf=llama_like_gguf.llama_like_gguf(
        "phi3", gguf_settings, setting_tensors=(LONG_FACTORS, SHORT_FACTORS), write_settings=gguf_metadata
    ),
)
