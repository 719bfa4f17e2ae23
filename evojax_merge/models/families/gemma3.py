"""Gemma 3's language model (arXiv 2503.19786): queries and keys are normalised by head; most layers have a sliding
window, and RoPE with a base frequency of their own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evojax_merge.models.config_keys import SIZE, above, or_null
from evojax_merge.models.families import gemma_like
from evojax_merge.models.families.gemma_like import GemmaConfig, read_gemma
from evojax_merge.models.families.llama_like import LOCAL_ROPE, local_position_tables, rope_config, sliding_layers
from evojax_merge.models.families.llama_like_gguf import THETA, llama_like_gguf
from evojax_merge.models.gguf import GgufFile, Settings

# In GGUF files: the base frequency of layers with a sliding window, and the period of layers without: all but every
# sixth layer have a window.
LOCAL_THETA, WINDOW_PATTERN = 10_000.0, 6


def read(hf: Mapping[str, Any]) -> GemmaConfig:
    ropes, positions = hf["rope_parameters"], hf["max_position_embeddings"]
    common = read_gemma(
        "gemma3_text", {**hf, "rope_parameters": ropes["full_attention"]}, qk_norm=True, attention_softcap=None
    )
    local = rope_config(ropes["sliding_attention"], positions, common.head_dim)
    return replace(common, position_kinds=sliding_layers(hf), local_rope=local)


def gguf_settings(file: GgufFile) -> dict[str, Any]:
    settings = gemma_like.gguf_settings(file, large=62)
    pattern = file.value(".attention.sliding_window_pattern", SIZE, WINDOW_PATTERN)
    kinds = ("sliding_attention", "full_attention")
    settings["layer_types"] = [kinds[(i + 1) % pattern == 0] for i in range(settings["num_hidden_layers"])]
    local = {"rope_type": "default", "rope_theta": file.value(".rope.freq_base_swa", THETA, LOCAL_THETA)}
    settings["rope_parameters"] = {"full_attention": settings["rope_parameters"], "sliding_attention": local}
    return settings


def gguf_metadata(values: Mapping[str, Any]) -> Settings:
    """The inverse of `gguf_settings`."""
    ropes, kinds = values["rope_parameters"], values["layer_types"]
    metadata, tensors = gemma_like.gguf_metadata({**values, "rope_parameters": ropes["full_attention"]})
    theta = float(ropes["sliding_attention"]["rope_theta"])
    pattern = 1 + kinds.index("full_attention") if "full_attention" in kinds else len(kinds) + 1
    metadata |= {} if theta == LOCAL_THETA else {".rope.freq_base_swa": theta}
    # Of fewer layers than a period, the pattern that llama.cpp assumes is right as well.
    is_usual = pattern == WINDOW_PATTERN or len(kinds) < min(pattern, WINDOW_PATTERN)
    return metadata | ({} if is_usual else {".attention.sliding_window_pattern": pattern}), tensors


GEMMA3 = gemma_like.gemma_like(
    "gemma3_text",
    "Gemma3TextConfig",
    {
        "rope_local_base_freq": above(1),
        "rope_parameters": LOCAL_ROPE,
        "sliding_window_pattern": or_null(SIZE),
    },
    read,
    position_tables=local_position_tables,
    bidirectional_images=True,
    gguf=llama_like_gguf("gemma3", gguf_settings, norm_offset=1.0, write_settings=gguf_metadata),
)
