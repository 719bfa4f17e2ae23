"""Prompts: everything that a model reads before its answer.

A prompt is a text, or a conversation in the chat template of the models' tokenizer. Worked examples stand before the
question, and a prefix may begin the answer. Texts, turns and tokens are those of the lm-eval harness (0.4.13), and the
tokens of a conversation those of transformers' `apply_chat_template`.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from evojax_merge.errors import InputError, shown
from evojax_merge.schema.section import Form, Location, Name, Text, Whole
from evojax_merge.system.jinja_process import FOLDERS_WITH_TEMPLATE, TemplateError, render_chat
from evojax_merge.tasks.images import RecordImage
from evojax_merge.tasks.task import IMAGES, TaskConfig, token_ids
from evojax_merge.tasks.templates import look_up

# One turn of a conversation, with `role` and `content`.
Turn = dict[str, Any]

FEWSHOT_DELIMITER = "\n\n"
# Arguments of a template that the program sets itself.
RESERVED = (
    "messages", "conversations", "conversation", "chat_template", "tools", "documents", "add_generation_prompt",
    "continue_final_message", "return_assistant_tokens_mask",
)  # fmt: skip
# A chat template that reads turns of texts and images asks for the type of each.
PARTS = re.compile(r"""['"]type['"]|\.type\b""")
# Roles of ShareGPT's turns, {from: human, value: a text}, by the names that chat templates have for them.
SHAREGPT_ROLES = {"human": "user", **dict.fromkeys(("gpt", "model", "chatgpt", "bing", "bard"), "assistant")}
# Keys that have no meaning without a chat template.
CHAT_KEYS = ("messages", "system_instruction", "fewshot_as_multiturn", "chat_template_kwargs")

TemplateName = Annotated[bool | Name, Form("true, false, or the name of a chat template")]
FieldsOfTurns = Annotated[
    Name | Annotated[list[Name], Field(min_length=1, max_length=10)],
    Form("the name of a field, or a list of names", "a field, or fields"),
]


class PromptConfig(TaskConfig):
    """The keys of tasks whose examples are records of a file."""

    optional: ClassVar[tuple[str, ...]] = (
        *CHAT_KEYS,
        "apply_chat_template",
        "assistant_prefix",
        "num_fewshot",
        "fewshot_source",
    )

    kind: str = Field(description="the kind of task")
    file: Location = Field(
        description="JSON lines, .json, .csv, .tsv (also .gz) or .parquet, zoo:search.jsonl …, or "
        "hub:owner/dataset:split"
    )
    images: Location | None = Field(None, description=IMAGES)
    prompt: Text = Field("{prompt}", description="a template over a record's fields")
    target: Text = Field("{target}", description="a template over a record's fields")
    delimiter: Text = Field(" ", description="what joins a prompt to its target where neither has white space there")
    apply_chat_template: TemplateName = Field(
        False, description="true: prompts go through the models' chat template; or the name of one of its templates"
    )
    system_instruction: Text | None = Field(None, description="the first turn of a chat")
    messages: FieldsOfTurns | None = Field(
        None,
        description="in place of prompt: the field of a chat's turns, [{role, content}, …]; or a list of such fields",
    )
    assistant_prefix: Text = Field("", description="a text that begins the answer")
    num_fewshot: Whole = Field(0, ge=0, le=10_000, description="how many examples are shown with their answers")
    fewshot_source: Location | None = Field(
        None, description="a file of examples to show; default: the first of file, which are not scored"
    )
    fewshot_as_multiturn: bool = Field(
        True, description="in a chat: whether shown examples are turns of their own, or text before the question"
    )
    chat_template_kwargs: dict[Name, Any] = Field(
        {}, max_length=100, description="variables of the chat template, such as enable_thinking"
    )

    @property
    def turns(self) -> tuple[str, ...]:
        """The fields of a chat's turns; none where there is a prompt."""
        return (self.messages,) if isinstance(self.messages, str) else tuple(self.messages or ())

    @property
    def takes_json(self) -> bool:
        """Return whether a target may be a field of any JSON value."""
        return False

    @model_validator(mode="after")
    def _has_prompts(self) -> "PromptConfig":
        fields = PromptConfig.model_fields
        for name in CHAT_KEYS:
            if not self.apply_chat_template and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name}: has no meaning outside of a chat; say apply_chat_template: true")
        if self.messages is not None and self.prompt != fields["prompt"].default:
            raise ValueError("prompt: has no meaning beside messages, which are the whole prompt")
        if self.messages is not None and not self.fewshot_as_multiturn:
            raise ValueError("fewshot_as_multiturn: the examples of messages are turns; leave the key out")
        if self.fewshot_source is not None and not self.num_fewshot:
            raise ValueError("fewshot_source: say num_fewshot, how many examples to take from it")
        for name in self.chat_template_kwargs:
            if name in RESERVED:
                raise ValueError(f"chat_template_kwargs: {name} is set by the program; leave it out")
        return self


@dataclass(frozen=True)
class Example:
    """One example in text. `targets`: the one target, or the choices, joined to what stands before them; `answer`: the
    number of the right choice, or the wanted text; `line`: its number in the file; `where`: its place, where that is no
    line of the file; `choices`: the choices as the record has them; `turns`: in place of the prompt, a conversation;
    `images`: those of the prompt or the conversation."""

    prompt: str
    targets: tuple[str, ...]
    answer: int | str
    line: int
    where: str = ""
    choices: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = field(default=(), hash=False)
    images: tuple[RecordImage, ...] = ()

    @property
    def solution(self) -> str:
        """The right answer as the record has it."""
        return self.choices[self.answer] if isinstance(self.answer, int) else self.answer


@dataclass(frozen=True)
class Prompts:
    """The form of a task's prompts. where: the section of the config; prefix: the text that begins an answer; shots:
    the examples that are shown; template: whether the tokenizer's chat template writes the prompts, or the name of one
    of its templates; system, multiturn, options: the keys system_instruction, fewshot_as_multiturn and
    chat_template_kwargs; images_from: the folder that the key images names."""

    where: str = "tasks"
    delimiter: str = " "
    prefix: str = ""
    shots: tuple[Example, ...] = ()
    template: bool | str = False
    system: str | None = None
    multiturn: bool = True
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    images_from: Path | None = None

    @property
    def images(self) -> tuple[RecordImage, ...]:
        """The images of the shown examples."""
        return tuple(image for shot in self.shots for image in shot.images)

    def context(
        self, tokenizer: Any, where: str, prompt: str, turns: Sequence[Turn], images: Sequence[RecordImage] = ()
    ) -> str:
        """The text before the answer to a prompt, or to a conversation that ends with the user's turn, with a
        placeholder for each image. `where` names the example. Raises InputError where the chat template fails."""
        if not self.template:
            prefix = self.prefix and joined(prompt, self.delimiter, self.prefix)
            return f"{self._shown}{prompt}{prefix}"
        has_images = bool(images or self.images) and PARTS.search(self._template(tokenizer)) is not None
        written = Written((getattr(tokenizer, "placeholder", "") or None) if has_images else None)
        # A conversation has one system turn at its beginning: that of the scored example.
        systems, asked = _parted(written.turns(prompt, turns, len(images)))
        if self.system is not None:
            if systems:
                raise InputError(where, f"{self.where}.system_instruction: the example has a system turn of its own")
            systems = [written.turn("system", self.system)]
        if not self.multiturn:
            asked = written.turns(f"{self._shown}{prompt}", (), len(images))
            return self._render(tokenizer, where, written, systems, asked)
        shown: list[Turn] = []
        for shot in self.shots:
            turns_shown = written.turns(shot.prompt, shot.turns, len(shot.images))
            shown += [*_parted(turns_shown)[1], written.turn("assistant", shot.solution)]
        return self._render(tokenizer, where, written, systems, [*shown, *asked])

    def _render(
        self, tokenizer: Any, where: str, written: "Written", systems: list[Turn], conversation: list[Turn]
    ) -> str:
        key, template = f"{self.where}.apply_chat_template", self._template(tokenizer)
        answer = [written.turn("assistant", self.prefix)] if self.prefix else []

        def render(turns: list[Turn]) -> str:
            return render_chat(
                template, tokenizer, [*turns, *answer],
                **{**self.options, "add_generation_prompt": not answer, "continue_final_message": bool(answer)},
            )  # fmt: skip

        try:
            text = render([*systems, *conversation])
            # Some templates leave out roles that they do not know.
            if self.system is not None and self.system.strip() not in text and text == render(conversation):
                problem = f"the chat template of {named(tokenizer)} leaves a system turn out"
                raise InputError(f"{self.where}.system_instruction", f"{problem}; write it into prompt instead")
            return text
        except TemplateError as error:
            if error.refused and systems:
                # It refuses the system's turn if it takes the conversation without it.
                with suppress(TemplateError):
                    render(conversation)
                    key = f"{self.where}.system_instruction" if self.system is not None else where
                    problem = f"the chat template of {named(tokenizer)} refuses a system turn ({error})"
                    raise InputError(key, f"{problem}; write it into the user's first turn instead") from None
            raise InputError(where, f"{key}: the chat template of {named(tokenizer)} failed ({error})") from None

    def _template(self, tokenizer: Any) -> str:
        name = None if self.template is True else str(self.template)
        return chat_template(f"{self.where}.apply_chat_template", tokenizer, name)

    @cached_property
    def _shown(self) -> str:
        """The shown examples as a text."""
        return "".join(
            f"{shot.prompt}{joined(shot.prompt, self.delimiter, shot.solution)}{FEWSHOT_DELIMITER}"
            for shot in self.shots
        )

    def encode(self, tokenizer: Any, context: str) -> list[int]:
        """The tokens of a context that is to be continued. A template writes the beginning of the sequence itself."""
        if self.template:
            return token_ids(tokenizer, context, add_special_tokens=False)
        return encode_prompt(tokenizer, context)

    def encode_pair(self, tokenizer: Any, context: str, target: str) -> tuple[list[int], int]:
        """Tokens of context and target together, and the number of the context's. The line feed at the end of most
        templates goes to the target, like all white space there (the convention of the lm-eval harness)."""
        if not self.template:
            return encode_pair(tokenizer, context, target)
        whole = token_ids(tokenizer, context + target, add_special_tokens=False)
        start = len(token_ids(tokenizer, context.rstrip(), add_special_tokens=False))
        return whole, min(start, len(whole) - 1)


@dataclass(frozen=True)
class Written:
    """The form of a conversation's turns. placeholder: the text in an image's place, where turns are lists of texts and
    images, transformers' form for models that see; None: turns are texts."""

    placeholder: str | None = None

    def turn(self, role: str, text: str, images: int = 0) -> Turn:
        """A turn whose images stand where the placeholders are, or, without placeholders, before the text."""
        if self.placeholder is None:
            return {"role": role, "content": text}
        pieces, image = text.split(self.placeholder), {"type": "image"}
        parts: list[Any] = [image] * images if len(pieces) == 1 else []
        for number, piece in enumerate(pieces):
            parts += ([image] if number else []) + ([{"type": "text", "text": piece}] if piece else [])
        return {"role": role, "content": parts}

    def turns(self, prompt: str, turns: Sequence[Turn], images: int) -> list[Turn]:
        """The turns of a conversation, or of a prompt."""
        if not turns:
            return [self.turn("user", prompt, images)]
        return [turn if self.placeholder is None else turn | self.turn(turn["role"], turn["content"]) for turn in turns]


# Texts with nothing before or behind them.
PLAIN = Prompts()


def encode_pair(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], int]:
    """Tokens of prompt and target together, and the number of the prompt's.

    White space at the end of the prompt goes to the target, and both are encoded in one piece, so that the tokens are
    those of the text as a model would write it (the convention of the lm-eval harness).
    """
    kept = prompt.rstrip(" ")
    target = prompt[len(kept) :] + target
    whole = token_ids(tokenizer, kept + target)
    start = len(token_ids(tokenizer, kept))
    end = _closing_tokens(tokenizer)
    # A tokenizer that closes every text (with an end-of-sequence token) closes the prompt as well.
    return whole[: len(whole) - end] if end else whole, min(start - end, len(whole) - end - 1)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a text that is to be continued."""
    tokens = token_ids(tokenizer, prompt)
    return tokens[: len(tokens) - _closing_tokens(tokenizer)]


def joined(before: str, delimiter: str, after: str) -> str:
    """The second text with the delimiter before it, unless white space is there already."""
    return after if before[-1:].isspace() or after[:1].isspace() else delimiter + after


def chat_template(where: str, tokenizer: Any, name: str | None) -> str:
    """A tokenizer's chat template, by its name where it has several; None: the default one. Raises InputError where
    there is none; `where` is the key that asks for it."""
    templates = tokenizer.chat_template
    if not templates:
        others = ", ".join(map(str, FOLDERS_WITH_TEMPLATE[:3]))
        hint = f", or set tokenizer_source to a model that has one ({others})" if others else ""
        raise InputError(where, f"{named(tokenizer)} has no chat template; leave the key out{hint}")
    by_name = {"default": templates} if isinstance(templates, str) else templates
    if (name or "default") not in by_name:
        asked = f"no chat template {name!r}" if name else "several chat templates, and no default"
        raise InputError(where, f"{named(tokenizer)} has {asked}; expected one of {', '.join(sorted(by_name))}")
    return str(by_name[name or "default"])


def named(tokenizer: Any) -> str:
    """The tokenizer by its folder."""
    return f"the tokenizer of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the models' tokenizer"


def read_turns(where: str, key: str, name: str, record: Mapping[str, Any]) -> list[Turn]:
    """The conversation in a field of a record, also in ShareGPT's form. Raises InputError where there is none; `key`
    is the key of the config that names the field."""
    turns = look_up(where, key, (name,), record)
    expected = "expected a list of turns, [{role: user, content: a text}, …] or [{from: human, value: a text}, …]"
    if not isinstance(turns, list) or not turns:
        raise InputError(where, f"{name}: {shown(turns)}; {expected}")
    conversation: list[Turn] = []
    for number, given in enumerate(turns):
        # Parquet has null where a turn lacks a key that others have; transformers leaves such keys out.
        turn = {key: value for key, value in given.items() if value is not None} if isinstance(given, Mapping) else {}
        if isinstance(turn.get("from"), str) and "value" in turn and "role" not in turn:
            role = turn.pop("from")
            turn = {"role": SHAREGPT_ROLES.get(role, role), "content": turn.pop("value")} | turn
        content = turn.get("content")
        if isinstance(content, list) and all(
            isinstance(part, Mapping) and part.get("type") == "text" for part in content
        ):
            texts = [part.get("text") for part in content]
            turn["content"] = "".join(texts) if texts and all(isinstance(text, str) for text in texts) else content
        if isinstance(given, Mapping) and given.get("content", "") is None:
            what = f"{name}[{number}]: its content is null (the turn has {', '.join(map(str, turn))})"
            raise InputError(where, f"{what}; expected a text: write what the turn says there, or leave the record out")
        if not all(isinstance(turn.get(part), str) for part in ("role", "content")):
            raise InputError(where, f"{name}[{number}]: {shown(given)}; {expected}")
        conversation.append(turn)
    return conversation


def prefix_token(tokenizer: Any) -> int:
    """The token before a text that has no context."""
    number = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if number is None:
        raise InputError(tokenizer.name_or_path, "its tokenizer has no token that begins or ends a text")
    return int(number)


def encode_alone(tokenizer: Any, target: str) -> list[int]:
    """The tokens of a target without a context, behind the token that begins a text."""
    prefix, tokens = prefix_token(tokenizer), token_ids(tokenizer, target, add_special_tokens=False)
    return tokens if tokens[:1] == [prefix] else [prefix, *tokens]


def _parted(turns: Sequence[Turn]) -> tuple[list[Turn], list[Turn]]:
    """The system turn at the beginning of a conversation, if there is one, and the others."""
    leading = int(turns[0]["role"] == "system")
    return list(turns[:leading]), list(turns[leading:])


def _closing_tokens(tokenizer: Any) -> int:
    empty = token_ids(tokenizer, "")
    return int(bool(empty) and empty[-1] == tokenizer.eos_token_id and empty[-1] != tokenizer.bos_token_id)
