"""Seed-OSS: a Llama with biases of queries, keys and values, and of other projections where the config says so."""

from functools import partial

from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import llama_like, read_config

SEED_OSS = llama_like(
    "seed_oss",
    "SeedOssConfig",
    {"attention_bias": SWITCH, "attention_out_bias": SWITCH, "mlp_bias": SWITCH},
    partial(
        read_config,
        "seed_oss",
        keys={"qkv_bias": "attention_bias", "o_bias": "attention_out_bias", "mlp_bias": "mlp_bias"},
    ),
)
