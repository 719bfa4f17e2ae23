"""Llama, and the many models that say they are one: biases where the config says so, no windows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import llama_like, read_config
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    bias = hf["attention_bias"]
    return read_config("llama", hf, qkv_bias=bias, o_bias=bias, mlp_bias=hf["mlp_bias"])


LLAMA = replace(
    llama_like("llama", "LlamaConfig", {"attention_bias": SWITCH, "mlp_bias": SWITCH}, read),
    gguf=llama_like_gguf("llama", interleaved=True),
)
