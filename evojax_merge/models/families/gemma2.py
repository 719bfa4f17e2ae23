"""Gemma 2 (arXiv 2408.00118): soft caps on the attention's products and on the logits, sliding windows in every other
layer."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from evojax_merge.models.config_keys import above, or_null
from evojax_merge.models.families import gemma_like
from evojax_merge.models.families.gemma_like import GEMMA_KEYS, GemmaConfig, read_gemma
from evojax_merge.models.families.llama_like import llama_like
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf


def read(hf: Mapping[str, Any]) -> GemmaConfig:
    return read_gemma("gemma2", hf, qk_norm=False, attention_softcap=hf["attn_logit_softcapping"])


GEMMA2 = replace(
    llama_like("gemma2", "Gemma2Config", {}, read),
    leaves=gemma_like.LEAVES,
    keys=GEMMA_KEYS | {"attn_logit_softcapping": or_null(above(0))},
    embed=gemma_like.embed,
    block=gemma_like.block,
    final_norm=gemma_like.final_norm,
    map_logits=gemma_like.map_logits,
    always_maps_logits=True,
    gguf=llama_like_gguf("gemma2", partial(gemma_like.gguf_settings, large=46), norm_offset=1.0),
)
