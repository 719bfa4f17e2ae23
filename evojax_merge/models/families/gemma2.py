"""Gemma 2 (arXiv 2408.00118): soft caps on the attention's products and on the logits, sliding windows in every other
layer."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from evojax_merge.models.config_keys import above, or_null
from evojax_merge.models.families.gemma_like import GemmaConfig, gemma_like, gguf_metadata, gguf_settings, read_gemma
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf


def read(hf: Mapping[str, Any]) -> GemmaConfig:
    return read_gemma("gemma2", hf, qk_norm=False, attention_softcap=hf["attn_logit_softcapping"])


GEMMA2 = gemma_like(
    "gemma2",
    "Gemma2Config",
    {"attn_logit_softcapping": or_null(above(0))},
    read,
    always_maps_logits=True,
    gguf=llama_like_gguf("gemma2", partial(gguf_settings, large=46), norm_offset=1.0, write_settings=gguf_metadata),
)
