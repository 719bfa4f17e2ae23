"""Mistral: a Llama without biases, with one sliding window for all layers."""

from functools import partial

from evojax_merge.models.families.llama_like import WINDOW, llama_like, read_config
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf

# Its GGUF files say that they are a Llama's, and are read as such.
MISTRAL = llama_like(
    "mistral",
    "MistralConfig",
    {"sliding_window": WINDOW},
    partial(read_config, "mistral"),
    gguf=llama_like_gguf("llama", interleaved=True),
)
