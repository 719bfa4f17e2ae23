"""The commented config of a first search: the kind of task by the data's fields, and the text of the file."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from merge_kernels import Method, Parameter

from evojax_merge.errors import InputError, shown
from evojax_merge.tasks.gsm import read_problem
from evojax_merge.tasks.harness import is_benchmark
from evojax_merge.tasks.records import Record

# Fields of a prompt and of what follows it, by the names that data sets have for them.
PAIRS = (
    ("prompt", "completion"), ("prompt", "target"), ("prompt", "response"), ("prompt", "answer"),
    ("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("question", "response"),
    ("problem", "solution"), ("input", "output"), ("input", "target"), ("source", "target"),
)  # fmt: skip
CHOICES, ANSWERS, STEMS = ("choices", "options"), ("answer", "answerKey", "label", "gold"), ("question", "prompt")
TEXTS = ("text", "content")
# Conversations: the field, and a turn's keys for its role and its text; and the roles of a model's turns.
CHATS = (("messages", "role", "content"), ("conversations", "from", "value"))
MODEL_ROLES = ("assistant", "gpt", "model")
EXPECTED = (
    "question and answer, prompt and completion (or instruction and output, and the like), choices and answer, "
    "messages, or text"
)
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?")
# Groups of neighbouring layers that share their parameters: enough to tell the ends from the middle.
LAYER_GROUPS = 8
COMMENT_COLUMN = 41
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
    """The section of a task: its keys in order, with their comments. from_hub: whether its data may come from a hub."""

    lines: tuple[Line, ...]
    from_hub: bool = False


# ---------------------------------------------------------------------------------------------------------------
# The kind of task


def task_for_records(source: str, records: Sequence[Record], has_chat_template: bool) -> TaskSection:
    """The section of a task on these records, by the fields of the first. source: the reference to the data. Raises
    InputError where the fields say no kind of task."""
    record = records[0]
    fields = record.fields
    chat, choices = _conversation(fields), next((name for name in CHOICES if name in fields), None)
    if choices is not None:
        return _multiple_choice(source, record, choices)
    if {"question", "answer"} <= fields.keys() and _is_problem(record):
        return _problems(source, records, has_chat_template)
    if chat is not None:
        comment = "the turns before the model's first, without a chat template"
        return _likelihood(source, (("prompt", chat[0], comment), ("target", chat[1], "the model's first turn")))
    pair = next((pair for pair in PAIRS if {*pair} <= fields.keys()), None)
    if pair is not None:
        return _pair(source, fields, *pair)
    text = next((name for name in TEXTS if name in fields), None)
    if text is not None:
        prompt = ("prompt", "", "the whole text is predicted")
        return _likelihood(source, (prompt, ("target", f"{{{text}}}", "a template over a record's fields")))
    names = ", ".join(map(str, list(fields)[:12])) or "none"
    raise InputError(record.where, f"its fields ({names}) say no kind of task; expected {EXPECTED}")


def _conversation(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """The templates of the turns before the model's first, and of that turn; None where the record is no
    conversation."""
    for name, role, text in CHATS:
        turns = fields.get(name)
        if not isinstance(turns, list):
            continue
        roles = [turn.get(role) if isinstance(turn, Mapping) else None for turn in turns]
        first = next((number for number, who in enumerate(roles) if who in MODEL_ROLES), 0)
        if first:
            before = "".join(f"{{{name}[{number}][{text}]}}\n" for number in range(first))
            return before, f"{{{name}[{first}][{text}]}}"
    return None


def _is_problem(record: Record) -> bool:
    try:
        read_problem(record)
    except InputError:
        return False
    return True


def _problems(source: str, records: Sequence[Record], has_chat_template: bool) -> TaskSection:
    worked = "####" in str(records[0].fields["answer"])
    lines: list[Line] = [
        ("name", "problems", "what the task is called in tables"),
        ("kind", "gsm", "worked problems with a number as answer, as in GSM8K"),
        ("source", source, "a file of JSON lines or parquet, or hub:owner/dataset"),
        ("heldout", 0.2, "this share is never searched on; or a second source"),
        ("match", "strict" if worked else "flexible", "strict: the number after ####; flexible: the last"),
    ]
    if has_chat_template:
        lines.append(("apply_chat_template", True, "problems are asked in the models' chat template"))
    if worked and len(records) >= ENOUGH_TO_SHOW:
        lines.append(("num_fewshot", 2, "the first two are shown with their answers, and not scored"))
    return TaskSection((*lines, ("max_new_tokens", 256, "how much a model may write")), from_hub=True)


def _multiple_choice(source: str, record: Record, choices: str) -> TaskSection:
    answer, stem = (next((name for name in names if name in record.fields), None) for names in (ANSWERS, STEMS))
    if answer is None or stem is None:
        missing = " or ".join(ANSWERS if answer is None else STEMS)
        raise InputError(record.where, f"has {choices}, but no {missing}; expected a question, choices and an answer")
    return TaskSection(
        (
            ("name", "choices", "what the task is called in tables"),
            ("kind", "multiple_choice", "the most likely of the choices is the answer"),
            ("file", source, "one JSON object a line"),
            ("heldout", 0.2, "this share is never searched on; or a second file"),
            ("prompt", f"Question: {{{stem}}}\nAnswer:", "a template over a record's fields"),
            ("choices", choices, "the field with the choices"),
            ("answer", answer, "the field with the right one: by text, place or letter"),
            ("metric", "margin", "smoother than accuracy: the right choice's lead over the best wrong one"),
        )
    )


def _pair(source: str, fields: Mapping[str, Any], prompt: str, target: str) -> TaskSection:
    template = f"Question: {{{prompt}}}\nAnswer:" if prompt == "question" else f"{{{prompt}}}"
    if prompt == "instruction" and isinstance(fields.get("input"), str):
        template += "\n{input}"
    answer = str(fields[target]).rpartition("####")
    lines: tuple[Line, ...] = (
        ("prompt", template, "a template over a record's fields"), ("target", f"{{{target}}}", "what should follow it"),
    )  # fmt: skip
    if NUMBER.fullmatch(answer[2].strip()) is None:
        return _likelihood(source, lines)
    written = 256 if answer[1] else 32
    return TaskSection(
        (
            ("name", "answers", "what the task is called in tables"),
            ("kind", "exact_match", "right where the last number is the target's (whole texts: pattern: ^(.+)$)"),
            ("file", source, "one JSON object a line"),
            ("heldout", 0.2, "this share is never searched on; or a second file"),
            *lines,
            ("max_new_tokens", written, "how much a model may write"),
        )
    )


def _likelihood(source: str, lines: tuple[Line, ...]) -> TaskSection:
    return TaskSection(
        (
            ("name", "text", "what the task is called in tables"),
            ("kind", "likelihood", "the mean log-probability of the target's tokens; answers to find: exact_match"),
            ("file", source, "one JSON object a line"),
            ("heldout", 0.2, "this share is never searched on; or a second file"),
            *lines,
        )
    )


def task_of_harness(name: str, has_chat_template: bool) -> TaskSection:
    """The section of a task of lm-eval."""
    lines: list[Line] = [
        ("lm_eval", name, "the task's name in lm-eval"),
        ("heldout", 0.2, "this share is never searched on; or a second task"),
    ]
    if is_benchmark(name):
        lines.append(("split", "train", "models are compared on its test examples, which no search should see"))
    if has_chat_template:
        lines.append(("apply_chat_template", True, "prompts go through the models' chat template"))
    return TaskSection((*lines, ("docs", 200, "only its first examples")), from_hub=True)


# ---------------------------------------------------------------------------------------------------------------
# The text


@dataclass(frozen=True)
class FirstConfig:
    """The choices of a first config. tokenizer_source: None where the models share their tokens. examples: those of the
    data; None: not known. generations: None: the search has a budget of passes."""

    base: str | None
    parents: tuple[str, ...]
    tokenizer_source: str | None
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
            comment = "the tokenizers differ: rows of the vocabulary are aligned by token"
            lines.append(_line("tokenizer_source", self.tokenizer_source, comment))
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
