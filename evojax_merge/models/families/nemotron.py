"""Nemotron 3 and 4, Minitron (arXiv 2407.14679): LayerNorm with gains that are stored less one; a part of each head is
rotated; an MLP without gate."""

from collections.abc import Mapping
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import EPSILON, SWITCH
from evojax_merge.models.families.llama_like import (
    BIASES,
    FINAL_NORM_BIAS,
    LAYER_NORM_FILTERS,
    LAYER_NORMS,
    PARTIAL_KEYS,
    PROJECTIONS,
    SHARED,
    llama_like,
    read_config,
)


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    settings = {**hf, "rms_norm_eps": hf["norm_eps"]}
    return read_config("nemotron", settings, keys=BIASES | {"mlp_bias": "mlp_bias"}, norm="layer", norm_offset=1.0)


NEMOTRON = llama_like(
    "nemotron",
    "NemotronConfig",
    PARTIAL_KEYS | {"attention_bias": SWITCH, "mlp_bias": SWITCH, "norm_eps": EPSILON},
    read,
    unread="rms_norm_eps",
    leaves=(
        *LAYER_NORMS,
        *(leaf for leaf in PROJECTIONS if leaf.name not in ("gate", "gate_bias")),
        *SHARED,
        FINAL_NORM_BIAS,
    ),
    filters=LAYER_NORM_FILTERS,
)
