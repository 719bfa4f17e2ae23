"""The text decoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: Qwen2 and Qwen3 with M-RoPE (arXiv 2409.12191).

Time, height and width have a position each, and a share of the frequencies; for text the three are equal, which makes
M-RoPE plain RoPE.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from evojax_merge.errors import shown
from evojax_merge.models.architecture import Architecture
from evojax_merge.models.config_keys import SWITCH, Expected, list_of, mapping, or_null, whole
from evojax_merge.models.families.llama_like import BIASES, QWEN_WINDOWS, ROPE, Config, llama_like, read_config

SECTION = "mrope_section"
_WORDS = "three whole numbers: the frequencies of time, height and width"
SECTIONS = or_null(list_of(whole(0, 2**16), _WORDS, 3))
# Qwen3-VL's frequencies always take turns, whatever its switch mrope_interleaved says.
MROPE = or_null(mapping({**ROPE.keys, SECTION: SECTIONS, "mrope_interleaved": or_null(SWITCH)}))


def one_after_the_other(sections: Sequence[int], count: int) -> tuple[int, ...]:
    """The axis of each of `count` frequencies: first those of time, then of height, then of width."""
    if sum(sections) != count:
        raise ValueError(f"{SECTION}: {shown(list(sections))}; expected {count} frequencies together")
    return tuple(axis for axis, size in enumerate(sections) for _ in range(size))


def in_turns(sections: Sequence[int], count: int) -> tuple[int, ...]:
    """The axis of each of `count` frequencies: time, height and width take turns, as long as they have some left; time
    has the rest."""
    return tuple(i % 3 if i < 3 * sections[i % 3] else 0 for i in range(count))


def read_mrope(
    read: Callable[[Mapping[str, Any]], Config],
    axes: Callable[[Sequence[int], int], tuple[int, ...]],
    default: Sequence[int],
    hf: Mapping[str, Any],
) -> Config:
    """The config that `read` makes for the text decoder, with M-RoPE, whose sections are by default `default`; empty:
    plain RoPE. The whole model's config says whether the head is the embedding."""
    settings = hf["rope_parameters"]
    rope = {key: value for key, value in settings.items() if key not in (SECTION, "mrope_interleaved")}
    text = read({**hf, "rope_parameters": rope, "tie_word_embeddings": hf.get("tie_word_embeddings", False)})
    return replace(text, rope_axes=axes(settings.get(SECTION) or default, text.rotary_dim // 2) if default else ())


def qwen_vl(model_type: str, config_class: str, keys: dict[str, Expected], text: str, read: Any) -> Architecture:
    """The text decoder of a larger model. text: the model_type of text models with the same layers."""
    roped = {"rope_parameters": MROPE, "rope_scaling": MROPE}
    return llama_like(model_type, config_class, keys | roped, read, text_model=text)


QWEN2_VL_TEXT, QWEN2_5_VL_TEXT = (
    qwen_vl(
        kind, config_class, QWEN_WINDOWS, "qwen2",
        partial(read_mrope, partial(read_config, kind, qkv_bias=True), one_after_the_other, (16, 24, 24)),
    )
    for kind, config_class in (("qwen2_vl_text", "Qwen2VLTextConfig"), ("qwen2_5_vl_text", "Qwen2_5_VLTextConfig"))
)  # fmt: skip
QWEN3_VL_TEXT = qwen_vl(
    "qwen3_vl_text", "Qwen3VLTextConfig", {"attention_bias": SWITCH}, "qwen3",
    partial(read_mrope, partial(read_config, "qwen3_vl_text", keys=BIASES, qk_norm=True), in_turns, (24, 20, 20)),
)  # fmt: skip
