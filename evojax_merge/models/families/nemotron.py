"""Nemotron 3 and 4, Minitron (arXiv 2407.14679): LayerNorm with gains that are stored less one; a part of each head is
rotated; an MLP without gate."""

from collections.abc import Mapping
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import EPSILON, SWITCH
from evojax_merge.models.families import llama_like


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    settings = {**hf, "rms_norm_eps": hf["norm_eps"]}
    return llama_like.read_config(
        "nemotron", settings, keys=llama_like.BIASES | {"mlp_bias": "mlp_bias"}, norm="layer", norm_offset=1.0
    )


NEMOTRON = llama_like.llama_like(
    "nemotron",
    "NemotronConfig",
    llama_like.PARTIAL_KEYS | {"attention_bias": SWITCH, "mlp_bias": SWITCH, "norm_eps": EPSILON},
    read,
    unread="rms_norm_eps",
    leaves=(
        *llama_like.LAYER_NORMS,
        *(leaf for leaf in llama_like.PROJECTIONS if leaf.name not in ("gate", "gate_bias")),
        *llama_like.SHARED,
        llama_like.FINAL_NORM_BIAS,
    ),
    filters=llama_like.LAYER_NORM_FILTERS,
)
