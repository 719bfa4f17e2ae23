"""Qwen3: queries and keys are normalised by head; biases where the config says so; sliding windows in some layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import QWEN_WINDOWS, llama_like, read_config
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    bias = hf["attention_bias"]
    return read_config("qwen3", hf, qkv_bias=bias, o_bias=bias, qk_norm=True)


QWEN3 = replace(
    llama_like("qwen3", "Qwen3Config", QWEN_WINDOWS | {"attention_bias": SWITCH}, read), gguf=llama_like_gguf("qwen3")
)
