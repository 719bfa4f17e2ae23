"""Helium: a Llama whose RoPE pairs neighbours."""

from functools import partial

from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import llama_like, read_config

HELIUM = llama_like(
    "helium",
    "HeliumConfig",
    {"attention_bias": SWITCH, "mlp_bias": SWITCH},
    partial(
        read_config,
        "helium",
        keys={"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        norm="rms_float32",
        interleaved=True,
    ),
)
