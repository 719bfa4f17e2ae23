"""Chat templates, rendered as transformers renders them, but in a process apart: they are programs of a model's
makers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evojax_merge.system import jinja_process

# The folders, of the models that were opened last, whose tokenizers have a chat template. A message about one that has
# none names them.
_with_template: tuple[Path, ...] = ()

ChatTemplateError = jinja_process.TemplateError
check_chat_template = jinja_process.check


def render_chat(template: str, tokenizer: Any, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """A conversation in one of the tokenizer's chat templates: its `apply_chat_template`, with limits.

    turns: with `role` and `content`. options: `add_generation_prompt`, `continue_final_message`, and variables of the
    template. Raises ChatTemplateError.
    """
    return jinja_process.render_turns(template, turns, {**tokenizer.special_tokens_map, **options})


def note_templates(folders: Sequence[Path]) -> None:
    """Have messages name the folders, of the models that were just opened, that have a chat template."""
    global _with_template
    _with_template = tuple(folders)


def folders_with_template() -> tuple[Path, ...]:
    """The folders of the last `note_templates`."""
    return _with_template
