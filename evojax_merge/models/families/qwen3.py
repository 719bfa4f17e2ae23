"""Qwen3: queries and keys are normalised by head; biases where the config says so; sliding windows in some layers."""

from functools import partial

from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import BIASES, QWEN_WINDOWS, llama_like, read_config
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf

QWEN3 = llama_like(
    "qwen3",
    "Qwen3Config",
    QWEN_WINDOWS | {"attention_bias": SWITCH},
    partial(read_config, "qwen3", keys=BIASES, qk_norm=True),
    gguf=llama_like_gguf("qwen3"),
)
