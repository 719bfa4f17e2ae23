"""Gemma (arXiv 2403.08295): a Llama with norms that store their gain less one, and embeddings times the square root of
the hidden size."""

from functools import partial

from evojax_merge.models.config_keys import OFF, SWITCH
from evojax_merge.models.families.gemma_like import embed
from evojax_merge.models.families.llama_like import BIASES, llama_like, read_config
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf

GEMMA = llama_like(
    "gemma",
    "GemmaConfig",
    {"attention_bias": SWITCH, "use_bidirectional_attention": OFF},
    partial(read_config, "gemma", keys=BIASES, norm="rms_float32", norm_offset=1.0),
    defaults={"tie_word_embeddings": True},
    embed=embed,
    gguf=llama_like_gguf("gemma", norm_offset=1.0),
)
