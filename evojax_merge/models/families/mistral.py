"""Mistral: a Llama without biases, with one sliding window for all layers."""

from functools import partial

from evojax_merge.models.families.llama_like import WINDOW, llama_like, read_config

MISTRAL = llama_like("mistral", "MistralConfig", {"sliding_window": WINDOW}, partial(read_config, "mistral"))
