"""Llama, and the many models that say they are one: biases where the config says so, no windows."""

from functools import partial

from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import BIASES, llama_like, read_config
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf

LLAMA = llama_like(
    "llama",
    "LlamaConfig",
    {"attention_bias": SWITCH, "mlp_bias": SWITCH},
    partial(read_config, "llama", keys=BIASES | {"mlp_bias": "mlp_bias"}),
    gguf=llama_like_gguf("llama", interleaved=True),
)
