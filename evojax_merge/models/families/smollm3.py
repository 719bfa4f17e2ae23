"""SmolLM3: a Llama in which every fourth layer has no positions."""

from collections.abc import Mapping
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SIZE, SWITCH, Expected, or_null
from evojax_merge.models.families import llama_like

_FLAGS = Expected(
    lambda value: isinstance(value, list) and all(item in (0, 1) for item in value), "a list of 0 and 1"
)  # fmt: skip


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    layers, has_rope = hf["num_hidden_layers"], tuple(map(int, hf["no_rope_layers"]))
    if len(has_rope) < layers:
        raise ValueError(f"no_rope_layers: {len(has_rope)} of them; expected num_hidden_layers, {layers}")
    if any(llama_like.sliding_layers(hf)) and not hf["use_sliding_window"]:
        raise ValueError("layer_types: sliding_attention, while use_sliding_window is false; expected true")
    return llama_like.read_config(
        "smollm3", hf, LlamaLikeConfig, llama_like.BIASES | {"mlp_bias": "mlp_bias"}, position_kinds=has_rope[:layers]
    )  # fmt: skip


SMOLLM3 = llama_like.llama_like(
    "smollm3",
    "SmolLM3Config",
    llama_like.QWEN_WINDOWS
    | {
        "attention_bias": SWITCH,
        "mlp_bias": SWITCH,
        "no_rope_layer_interval": SIZE,
        "no_rope_layers": or_null(_FLAGS),
    },
    read,
    defaults={"tie_word_embeddings": True},
    position_tables=llama_like.switched_position_tables,
)
