"""EXAONE 4 (arXiv 2507.11407): RMSNorm behind attention and MLP alone; queries and keys are normalised by head; in
models with sliding windows, layers with full attention have no positions."""

from collections.abc import Mapping
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import TEXTS, Expected, or_null
from evojax_merge.models.families import llama_like


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    has_rope = llama_like.sliding_layers(hf) if hf["sliding_window"] is not None else (1,) * hf["num_hidden_layers"]
    return llama_like.read_config("exaone4", hf, LlamaLikeConfig, qk_norm=True, position_kinds=has_rope)


EXAONE4 = llama_like.llama_like(
    "exaone4",
    "Exaone4Config",
    {
        "layer_types": or_null(TEXTS),
        "sliding_window": llama_like.WINDOW,
        "sliding_window_pattern": Expected(lambda value: True, "any value, which layer_types overrides"),
    },
    read,
    leaves=(
        llama_like.norm_leaf("post_attention_norm", "post_attention_layernorm", writes_residual=True),
        llama_like.norm_leaf("post_mlp_norm", "post_feedforward_layernorm", writes_residual=True),
        *llama_like.INNER_PROJECTIONS,
        *llama_like.SHARED,
    ),
    position_tables=llama_like.switched_position_tables,
)
