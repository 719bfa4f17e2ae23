"""Command R, and Command R7B and Command A: attention and MLP run side by side behind one LayerNorm without bias; RoPE
pairs neighbours. In the later ones layers with a sliding window have RoPE, and layers with full attention have no
positions; in some of the earlier ones queries and keys are normalised, with a gain for each head."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import EPSILON, OFF, SIZE, SWITCH, TEXTS, Expected, above, or_null
from evojax_merge.models.families import llama_like


@dataclass(frozen=True, kw_only=True)
class CohereConfig(LlamaLikeConfig):
    """logit_scale: the factor of the logits."""

    logit_scale: float


_HEAD_NORMS = {"q_norm": ("heads", "head_dim"), "k_norm": ("kv_heads", "head_dim")}
LEAVES = (
    llama_like.norm_leaf("attention_norm", "input_layernorm"),
    *(replace(leaf, shape=_HEAD_NORMS.get(leaf.name, leaf.shape)) for leaf in llama_like.PROJECTIONS),
    *llama_like.SHARED,
)
KEYS: dict[str, Expected] = {
    "attention_bias": SWITCH, "layer_norm_eps": EPSILON, "logit_scale": above(0), "use_qk_norm": or_null(SWITCH),
}  # fmt: skip
WINDOWS: dict[str, Expected] = {
    "layer_types": or_null(TEXTS), "sliding_window": llama_like.WINDOW, "sliding_window_pattern": or_null(SIZE),
    "use_qk_norm": OFF,
}  # fmt: skip


def read(model_type: str, hf: Mapping[str, Any]) -> CohereConfig:
    return llama_like.read_config(
        model_type, {**hf, "rms_norm_eps": hf["layer_norm_eps"]}, CohereConfig,
        llama_like.BIASES | {"logit_scale": "logit_scale"}, qk_norm=bool(hf.get("use_qk_norm")), norm="layer",
        interleaved=True, side_by_side=True,
    )  # fmt: skip


def _cohere(model_type: str, config_class: str, keys: dict[str, Expected], read: Any, **fields: Any) -> Any:
    return llama_like.llama_like(
        model_type, config_class, keys, read, unread="rms_norm_eps", leaves=LEAVES,
        dimensions=lambda config: llama_like.dimensions(config) | {"heads": config.heads, "kv_heads": config.kv_heads},
        map_logits=lambda config, products: products * config.logit_scale, always_maps_logits=True, **fields,
    )  # fmt: skip


COHERE = _cohere("cohere", "CohereConfig", KEYS, lambda hf: read("cohere", hf), defaults={"tie_word_embeddings": True})
COHERE2 = _cohere(
    "cohere2",
    "Cohere2Config",
    KEYS | WINDOWS,
    lambda hf: replace(read("cohere2", hf), position_kinds=llama_like.sliding_layers(hf)),
    position_tables=llama_like.switched_position_tables,
)
