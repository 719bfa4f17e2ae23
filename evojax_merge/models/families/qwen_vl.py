"""The text decoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: Qwen2 and Qwen3.

Their M-RoPE (arXiv 2409.12191) gives time, height and width a position each; for text the three are equal, which makes
M-RoPE plain RoPE.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import QWEN_WINDOWS, llama_like, read_config


def of_texts(read: Callable[[Mapping[str, Any]], LlamaLikeConfig], hf: Mapping[str, Any]) -> LlamaLikeConfig:
    """The config that `read` makes for the text decoder, with plain RoPE. The whole model's config says whether the
    head is the embedding."""
    rope = {key: value for key, value in hf["rope_parameters"].items() if key != "mrope_section"}
    tied = hf.get("tie_word_embeddings", False)
    return read({**hf, "rope_parameters": rope, "tie_word_embeddings": tied})


def read_qwen3_vl(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    bias = hf["attention_bias"]
    return read_config("qwen3_vl_text", hf, qkv_bias=bias, o_bias=bias, qk_norm=True)


QWEN2_VL_TEXT, QWEN2_5_VL_TEXT = (
    llama_like(kind, config_class, QWEN_WINDOWS, partial(of_texts, partial(read_config, kind, qkv_bias=True)))
    for kind, config_class in (("qwen2_vl_text", "Qwen2VLTextConfig"), ("qwen2_5_vl_text", "Qwen2_5_VLTextConfig"))
)
QWEN3_VL_TEXT = llama_like(
    "qwen3_vl_text", "Qwen3VLTextConfig", {"attention_bias": SWITCH}, partial(of_texts, read_qwen3_vl)
)
