"""The text decoders of Qwen2-VL and Qwen2.5-VL: Qwen2.

Their M-RoPE (arXiv 2409.12191) gives time, height and width a position each; those of a text are the same, which makes
it RoPE as it is.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.families.llama_like import QWEN_WINDOWS, llama_like, read_config


def read(model_type: str, hf: Mapping[str, Any]) -> LlamaLikeConfig:
    rope = {key: value for key, value in hf["rope_parameters"].items() if key != "mrope_section"}
    # The larger model's config says whether the head is the embedding.
    tied = hf.get("tie_word_embeddings", False)
    return read_config(model_type, {**hf, "rope_parameters": rope, "tie_word_embeddings": tied}, qkv_bias=True)


QWEN2_VL_TEXT, QWEN2_5_VL_TEXT = (
    llama_like(f"{name}_text", config_class, QWEN_WINDOWS, partial(read, f"{name}_text"))
    for name, config_class in (("qwen2_vl", "Qwen2VLTextConfig"), ("qwen2_5_vl", "Qwen2_5_VLTextConfig"))
)
