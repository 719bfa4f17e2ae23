"""Texts of the lm-eval harness's requests to tokens, as its own `hf` model makes them for causal models."""

import functools
from collections.abc import Sequence
from typing import Any

from evojax_merge.errors import InputError, shown
from evojax_merge.system.jinja_process import TemplateError, render_chat
from evojax_merge.tasks.images import RecordImage, expand_images, number_images
from evojax_merge.tasks.prompts import Written, encode_alone, prefix_token
from evojax_merge.tasks.task import token_ids

DEFAULT_NEW_TOKENS = 256
# The text in an image's place in the harness's tasks.
IMAGE = "<image>"


def encode(tokenizer: Any, text: str, begin: str | None) -> list[int]:
    """Tokens with the tokenizer's own special ones, unless the text begins with `begin` already."""
    begun = begin is not None and text.startswith(begin)
    return token_ids(tokenizer, text, **({"add_special_tokens": False} if begun else {}))


def encode_pair(tokenizer: Any, context: str, target: str) -> tuple[list[int], list[int]]:
    """Tokens before the target, and the target's. White space at the end of the context goes to the target."""
    if not context:
        tokens = encode_alone(tokenizer, target)
        return tokens[:1], tokens[1:]
    kept = context.rstrip()
    begin = tokenizer.decode(prefix_token(tokenizer))
    whole, before = encode(tokenizer, context + target, begin), encode(tokenizer, kept, begin)
    # Cut at the length of the context alone, even where the texts together give other tokens there.
    return before, whole[len(before) :]


def encode_images(tokenizer: Any, where: str, text: str, images: Sequence[RecordImage]) -> list[int]:
    """The tokens of a text with images, those of images numbered, as the `hf-multimodal` model has them: the models'
    own placeholder in place of the harness's, and the tokenizer's own special tokens, whatever the text begins with."""
    text = text.replace(IMAGE, getattr(tokenizer, "placeholder", "") or IMAGE)
    expanded = expand_images(tokenizer, where, text, images)
    return number_images(tokenizer, where, token_ids(tokenizer, expanded), images)


def check_length(where: str, length: int, context: int) -> None:
    """Raises InputError for a text with images that is too long: without its beginning it would lack some."""
    if length > context:
        raise InputError(where, f"needs {length:,} tokens with its images; the models' context is {context:,}")


def rolling_windows(tokenizer: Any, text: str, context: int) -> list[tuple[list[int], list[int]]]:
    """A whole text as pieces that fit the context, each token predicted once, after the tokens before it."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    prefix = prefix_token(tokenizer)
    tokens = encode(tokenizer, text, tokenizer.decode(prefix))
    windows = get_rolling_token_windows(token_list=tokens, prefix_token=prefix, max_seq_len=context, context_len=1)
    return [make_disjoint_window(window) for window in windows]


def output_limits(where: str, settings: dict[str, Any], tokenizer: Any) -> tuple[int, tuple[str, ...]]:
    """The most new tokens of a generation, and the texts that end it."""
    try:
        temperature = float(settings.get("temperature") or 0.0)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        new = next((int(settings[name]) for name in names if settings.get(name) is not None), DEFAULT_NEW_TOKENS)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(where, f"generation_kwargs: {error}; expected numbers") from None
    if settings.get("do_sample") or (temperature > 0.0 and "do_sample" not in settings):
        raise InputError(where, "the task draws its outputs at random (do_sample); here they are greedy")
    if new < 1:
        raise InputError(where, f"generation_kwargs: asks for {new} new tokens; expected at least 1")
    until = settings.get("until") or []
    stop = [until] if isinstance(until, str) else until
    if not (isinstance(stop, (list, tuple)) and all(isinstance(text, str) for text in stop)):
        raise InputError(where, f"generation_kwargs: until: {shown(until)}; expected texts")
    # The end-of-sequence token ends an output when it is spelled out, too.
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.decode(tokenizer.eos_token_id)]
    return new, tuple(dict.fromkeys(text for text in [*stop, *ends] if text))


def written_chat(
    template: str, tokenizer: Any, history: list[dict[str, str]], add_generation_prompt: bool = True,
    shows_images: bool = False,
) -> str:  # fmt: skip
    """A conversation in the tokenizer's template; without the system's turn where the template refuses it."""
    if shows_images:
        history = [turn | Written(IMAGE).turn(turn["role"], turn["content"]) for turn in history]
    write = functools.partial(
        render_chat,
        template,
        tokenizer,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    try:
        return write(history)
    except TemplateError as error:
        if not error.refused:
            raise
        return write([turn for turn in history if turn["role"] != "system"])
