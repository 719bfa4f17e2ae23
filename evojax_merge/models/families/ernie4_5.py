"""ERNIE 4.5's dense models: a Llama whose RoPE pairs neighbours, with biases where the config says so."""

from functools import partial

from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import llama_like, read_config

ERNIE4_5 = llama_like(
    "ernie4_5",
    "Ernie4_5Config",
    {"use_bias": SWITCH},
    partial(
        read_config,
        "ernie4_5",
        keys={"qkv_bias": "use_bias", "o_bias": "use_bias", "mlp_bias": "use_bias"},
        interleaved=True,
    ),
    defaults={"tie_word_embeddings": True},
)
