"""Qwen2 and Qwen2.5: queries, keys and values have biases; sliding windows in some layers."""

from functools import partial

from evojax_merge.models.families.llama_like import QWEN_WINDOWS, llama_like, read_config
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf

QWEN2 = llama_like(
    "qwen2",
    "Qwen2Config",
    QWEN_WINDOWS,
    partial(read_config, "qwen2", qkv_bias=True),
    gguf=llama_like_gguf("qwen2"),
)
