"""Chat templates, rendered as transformers renders them, but in a process apart: they are programs of a model's
makers."""

from collections.abc import Mapping, Sequence
from typing import Any

from evojax_merge import jinja_process

ChatTemplateError = jinja_process.TemplateError
check_chat_template = jinja_process.check


def render_chat(template: str, tokenizer: Any, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """A conversation in one of the tokenizer's chat templates: its `apply_chat_template`, with limits.

    turns: with `role` and `content`. options: `add_generation_prompt`, `continue_final_message`, and variables of the
    template. Raises ChatTemplateError.
    """
    return jinja_process.render_turns(template, turns, {**tokenizer.special_tokens_map, **options})
