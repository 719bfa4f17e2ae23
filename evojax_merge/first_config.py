"""The commented config of a first search: the kind of task by the data's fields, and the text of the file."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from merge_kernels import Method, Parameter

from evojax_merge.errors import InputError, shown
from evojax_merge.tasks.gsm import read_problem
from evojax_merge.tasks.harness import is_benchmark
from evojax_merge.tasks.prompts import read_turns
from evojax_merge.tasks.records import FORMS, Record, is_file_name

# Fields of a prompt and of what follows it, by the names that data sets have for them.
PAIRS = (
    ("prompt", "completion"), ("prompt", "target"), ("prompt", "response"), ("prompt", "answer"),
    ("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("question", "response"),
    ("problem", "solution"), ("input", "output"), ("input", "target"), ("source", "target"),
)  # fmt: skip
CHOICES, ANSWERS, STEMS = ("choices", "options"), ("answer", "answerKey", "label", "gold"), ("question", "prompt")
TEXTS = ("text", "content")
# Fields of conversations.
CHATS = ("messages", "conversations")
EXPECTED = (
    "question and answer, prompt and completion (or instruction and output, and the like), choices and answer, "
    "messages, or text"
)
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?")
# Groups of neighbouring layers that share their parameters: enough to tell the ends from the middle.
LAYER_GROUPS = 8
COMMENT_COLUMN = 41
# The first line of a file that `init` wrote.
HEAD = re.compile(rb"# A search for the best merge of \d+ parents; all keys: evojax-merge keys all\n")
# The budget of a first search: about 50 generations of CMA-ES, or more steps than gradients need.
PASSES = 600
# The examples above which a share is kept back to choose the winner on, and worked examples are shown.
ENOUGH_TO_VALIDATE, ENOUGH_TO_SHOW = 40, 10
MEANINGS = {
    "weight": "how much of each parent; starts at 1/K, the uniform merge",
    "density": "the share of each task vector that is kept",
    "t": "from the first parent, at 0, to the second, at 1",
    "scale": "of the parent",
}

# A line of a section: key, value, and comment.
Line = tuple[str, Any, str]


@dataclass(frozen=True)
class TaskSection:
    """The section of a task: its keys in order, with their comments."""

    lines: tuple[Line, ...]

    @property
    def uses_template(self) -> bool:
        """Return whether prompts go through a chat template."""
        return any(key == "apply_chat_template" and value for key, value, _ in self.lines)


@dataclass(frozen=True)
class ModelTemplates:
    """The chat templates of a search's models. owner: the model whose template prompts can go through; None where no
    model has one. is_shared: whether all parents have it, and the base as well unless it has none."""

    owner: str | None = None
    is_shared: bool = False

    def lines(self) -> list[Line]:
        """The key of a task whose prompts are written for chats and as plain text alike."""
        if self.is_shared:
            return [("apply_chat_template", True, "prompts go through the chat template that the models share")]
        if self.owner is not None:
            return [("apply_chat_template", False, "plain text, since not all models have the same chat template")]
        return []


# ---------------------------------------------------------------------------------------------------------------
# The kind of task


def task_for_records(source: str, records: Sequence[Record], templates: ModelTemplates) -> TaskSection:
    """The section of a task on these records, by the fields of the first. source: the reference to the data. Raises
    InputError where the fields say no kind of task, and where conversations cannot be scored as plain text."""
    record = records[0]
    fields = record.fields
    choices = next((name for name in CHOICES if name in fields), None)
    if choices is not None:
        return _multiple_choice(source, record, choices, templates)
    if {"question", "answer"} <= fields.keys() and _is_problem(record):
        return _problems(source, records, templates)
    chat = next((name for name in CHATS if "assistant" in _roles(record, name)[1:]), None)
    if chat is not None:
        return _chat(source, chat, templates) if templates.owner else _plain_chat(source, chat, records)
    pair = next((pair for pair in PAIRS if {*pair} <= fields.keys()), None)
    if pair is not None:
        return _pair(source, fields, *pair, templates)
    text = next((name for name in TEXTS if name in fields), None)
    if text is not None:
        prompt = ("prompt", "", "the whole text is predicted")
        return _likelihood(source, [prompt, ("target", f"{{{text}}}", "a template over a record's fields")])
    for name in CHATS:
        if name in fields:
            # Its message about a turn says more than the names of the fields.
            read_turns(record.where, name, name, fields)
    names = ", ".join(map(str, list(fields)[:12])) or "none"
    raise InputError(record.where, f"its fields ({names}) say no kind of task; expected {EXPECTED}")


def _roles(record: Record, field: str) -> list[str]:
    """The roles of a conversation's turns, by their names in chat templates; empty where a field holds none."""
    try:
        return [turn["role"] for turn in read_turns(record.where, field, field, record.fields)]
    except InputError:
        return []


def _chat(source: str, field: str, templates: ModelTemplates) -> TaskSection:
    template = "that the models share" if templates.is_shared else f"of {templates.owner}; not all models have the same"
    return _likelihood(
        source,
        [
            ("messages", field, "a record's turns: the assistant's last is scored, and all before it are its prompt"),
            ("apply_chat_template", True, f"turns go through the chat template {template}"),
        ],
    )


def _plain_chat(source: str, field: str, records: Sequence[Record]) -> TaskSection:
    """Without a chat template a task has templates of its own, which read the same turns of every record."""
    roles = _roles(records[0], field)
    first = roles.index("assistant", 1)
    for record in records:
        others = _roles(record, field)
        if others[: first + 1] != roles[: first + 1]:
            raise InputError(
                record.where, f"{field}: its turns ({', '.join(others) or 'none'}) are others than the first record's "
                f"({', '.join(roles)}); expected the same up to the first reply, or models with a chat template, for "
                f"which `messages: {field}` reads any turns"
            )  # fmt: skip
    text = "content" if "content" in records[0].fields[field][0] else "value"
    longer = any(len(_roles(record, field)) > first + 1 for record in records)
    rest = "; later turns are left out: to score the last reply takes a chat template" if longer else ""
    return _likelihood(
        source,
        [
            (
                "prompt", "".join(f"{{{field}[{number}][{text}]}}\n" for number in range(first)),
                "the turns before the model's first, as plain text: no model has a chat template",
            ),
            ("target", f"{{{field}[{first}][{text}]}}", f"the model's first turn{rest}"),
        ],
    )  # fmt: skip


def _is_problem(record: Record) -> bool:
    try:
        read_problem(record)
    except InputError:
        return False
    return True


def _problems(source: str, records: Sequence[Record], templates: ModelTemplates) -> TaskSection:
    worked = "####" in str(records[0].fields["answer"])
    lines: list[Line] = [
        ("name", "problems", "what the task is called in tables"),
        ("kind", "gsm", "worked problems with a number as answer, as in GSM8K"),
        ("source", source, _form(source)),
        ("heldout", 0.2, "this share is never searched on; or a second source"),
        ("match", "strict" if worked else "flexible", "strict: the number after ####; flexible: the last"),
        *templates.lines(),
    ]
    if worked and len(records) >= ENOUGH_TO_SHOW:
        lines.append(("num_fewshot", 2, "the first two are shown with their answers, and not scored"))
    return TaskSection((*lines, ("max_new_tokens", 256, "how much a model may write")))


def _form(source: str) -> str:
    """The form of a data source, for its comment."""
    return FORMS.get(Path(source).suffix, "one JSON object a line") if is_file_name(source) else "a data set to fetch"


def _multiple_choice(source: str, record: Record, choices: str, templates: ModelTemplates) -> TaskSection:
    answer, stem = (next((name for name in names if name in record.fields), None) for names in (ANSWERS, STEMS))
    if answer is None or stem is None:
        missing = " or ".join(ANSWERS if answer is None else STEMS)
        raise InputError(record.where, f"has {choices}, but no {missing}; expected a question, choices and an answer")
    return TaskSection(
        (
            ("name", "choices", "what the task is called in tables"),
            ("kind", "multiple_choice", "the most likely of the choices is the answer"),
            ("file", source, _form(source)),
            ("heldout", 0.2, "this share is never searched on; or a second file"),
            *templates.lines(),
            ("prompt", _question(stem, templates), "a template over a record's fields"),
            ("choices", choices, "the field with the choices"),
            ("answer", answer, "the field with the right one: by text, place or letter"),
            ("metric", "margin", "smoother than accuracy: the right choice's lead over the best wrong one"),
        )
    )


def _question(field: str, templates: ModelTemplates) -> str:
    """The template of a prompt that asks a question: a chat's turn is the question alone."""
    return f"{{{field}}}" if templates.is_shared else f"Question: {{{field}}}\nAnswer:"


def _pair(source: str, fields: Mapping[str, Any], prompt: str, target: str, templates: ModelTemplates) -> TaskSection:
    template = _question(prompt, templates) if prompt == "question" else f"{{{prompt}}}"
    if prompt == "instruction" and isinstance(fields.get("input"), str):
        template += "\n{input}"
    answer = str(fields[target]).rpartition("####")
    lines: list[Line] = [
        *templates.lines(),
        ("prompt", template, "a template over a record's fields"),
        ("target", f"{{{target}}}", "what should follow it"),
    ]
    if NUMBER.fullmatch(answer[2].strip()) is None:
        return _likelihood(source, lines)
    # In a chat models explain their answers.
    written = 256 if answer[1] or templates.is_shared else 32
    return TaskSection(
        (
            ("name", "answers", "what the task is called in tables"),
            ("kind", "exact_match", "right where the last number is the target's (whole texts: pattern: ^(.+)$)"),
            ("file", source, _form(source)),
            ("heldout", 0.2, "this share is never searched on; or a second file"),
            *lines,
            ("max_new_tokens", written, "how much a model may write"),
        )
    )


def _likelihood(source: str, lines: Sequence[Line]) -> TaskSection:
    return TaskSection(
        (
            ("name", "text", "what the task is called in tables"),
            ("kind", "likelihood", "the mean log-probability of the target's tokens; answers to find: exact_match"),
            ("file", source, _form(source)),
            ("heldout", 0.2, "this share is never searched on; or a second file"),
            *lines,
        )
    )


def task_of_harness(name: str, templates: ModelTemplates) -> TaskSection:
    """The section of a task of lm-eval."""
    lines: list[Line] = [
        ("lm_eval", name, "the task's name in lm-eval"),
        ("heldout", 0.2, "this share is never searched on; or a second task"),
    ]
    if is_benchmark(name):
        lines.append(("split", "train", "models are compared on its test examples, which no search should see"))
    return TaskSection((*lines, *templates.lines(), ("docs", 200, "only its first examples")))


# ---------------------------------------------------------------------------------------------------------------
# The text


@dataclass(frozen=True)
class FirstConfig:
    """The choices of a first config. tokenizer_source: the model whose tokenizer the winner has, and why it is named;
    None: no key is needed. examples: those of the data; None: not known. generations: None: the search has a budget of
    passes."""

    base: str | None
    parents: tuple[str, ...]
    tokenizer_source: tuple[str, str] | None
    method: Method
    layers: int
    task: TaskSection
    examples: int | None
    generations: int | None
    out: str | None

    def text(self, commands: Sequence[str]) -> str:
        """The YAML. commands: the next ones, for its head."""
        head = [f"A search for the best merge of {len(self.parents)} parents; all keys: evojax-merge keys all", ""]
        lines = [f"# {text}".rstrip() for text in (*head, *(f"    {shown_command(line)}" for line in commands))]
        lines.append("")
        if self.base is not None:
            lines.append(_line("base", self.base, "the model that task vectors are taken from"))
        lines.append(_row("parents:", "the models that are merged"))
        lines += [f"  - {_value(parent)}" for parent in self.parents]
        if self.tokenizer_source is not None:
            lines.append(_line("tokenizer_source", *self.tokenizer_source))
        lines += ["", *self._space(), "", _row("tasks:", "what candidates are scored on")]
        for number, line in enumerate(self.task.lines):
            lines.append(_line(*line, indent="    " if number else "  - "))
        lines += ["", *self._search(), "", _line("seed", 0, "of everything that is drawn at random")]
        if self.out is not None:
            lines.append(_line("out", self.out, "the run folder"))
        return "".join(f"{line}\n" for line in lines)

    def _space(self) -> list[str]:
        together = -(-self.layers // LAYER_GROUPS)
        shares = f"{self.layers} layers; so many neighbours share their parameters"
        lines = [
            _row("space:", "what is searched"),
            _line("method", self.method.name, "any of `evojax-merge methods`", indent="  "),
            _line("layers_per_group", together, shares, indent="  "),
            _row("  components: [attention, mlp, norm]", "parts with parameters of their own; + joins parts"),
            _row("  parameters:", "searched between these bounds; all others have the method's default"),
        ]
        for parameter in searched_parameters(self.method):
            bounds = f"{{low: {parameter.low:g}, high: {parameter.high:g}}}"
            lines.append(_row(f"    {parameter.name}: {bounds}", MEANINGS.get(parameter.name, "")))
        return lines

    def _search(self) -> list[str]:
        chosen = "chosen by what has derivatives; any of `evojax-merge strategies`"
        lines = ["search:", _line("strategy", "auto", chosen, indent="  ")]
        if self.generations is not None:
            comment = "of 4 + 3 ln D candidates each, or steps of a gradient"
            lines.append(_line("generations", self.generations, comment, indent="  "))
        else:
            comment = "a pass is one candidate on all examples; or a time, such as 2h"
            lines.append(_row(f"  budget: {PASSES} passes", comment))
        if self.examples is None or self.examples >= ENOUGH_TO_VALIDATE:
            comment = "this share of the searched examples is kept back, to choose the winner on"
            lines.append(_line("validation", 0.25, comment, indent="  "))
        return lines


def searched_parameters(method: Method) -> list[Parameter]:
    """The parameters that a first search has: those that every parent has its own of, else the method's first."""
    searched = [parameter for parameter in method.parameters if parameter.searched]
    return [parameter for parameter in searched if parameter.per_parent] or searched[:1]


def _line(key: str, value: Any, comment: str, indent: str = "") -> str:
    return _row(f"{indent}{key}: {_value(value)}", comment)


def _row(content: str, comment: str) -> str:
    return f"{content:<{COMMENT_COLUMN}} # {comment}" if comment else content


def _value(value: Any) -> str:
    """A value in YAML, on one line: a text as it is where that reads as the same text, else in double quotes."""
    if not isinstance(value, str):
        return json.dumps(value)
    plain = re.fullmatch(r"[\w./~][\w./+@:~-]*", value, re.ASCII) is not None and not value.endswith(":")
    if plain and yaml.safe_load(value) == value:
        return value
    return str(yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf"))).strip()


def shown_command(command: str) -> str:
    """A command as one line of a comment."""
    return command if command.isprintable() else shown(command)
