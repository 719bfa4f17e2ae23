"""Chat templates, rendered as transformers renders them, but in a process apart: they are programs of a model's
makers."""

from typing import Any

from evojax_merge import jinja_process

ChatTemplateError = jinja_process.TemplateError
check_chat_template = jinja_process.check


def render_chat(tokenizer: Any, turns: list[dict[str, str]], **options: bool) -> str:
    """A conversation in the tokenizer's chat template: its `apply_chat_template`, with limits.

    turns: with `role` and `content`. options: `add_generation_prompt`, `continue_final_message`. Raises
    ChatTemplateError.
    """
    return jinja_process.render_turns(tokenizer.get_chat_template(), turns, {**tokenizer.special_tokens_map, **options})
