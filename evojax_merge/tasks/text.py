"""Tasks of text: examples from a JSONL file, their requests to a model, and the scoring of the answers.

Three kinds: `likelihood` (mean log-probability of the target given the prompt), `multiple_choice` (the best choice by
log-probability, and the margin it wins by), `exact_match` (the answer in a greedy continuation). Scores are per
example, and higher is better.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from evojax_merge.errors import InputError, print_warning
from evojax_merge.schema import Location, Name, Text, Whole
from evojax_merge.tasks.patterns import PROBED, check_pattern, find_all
from evojax_merge.tasks.records import read_records
from evojax_merge.tasks.task import (
    Derivative,
    Opening,
    Place,
    Responses,
    Row,
    TaskConfig,
    TaskDefaults,
    TaskKind,
    TaskRequests,
    brevity,
    token_ids,
)
from evojax_merge.tasks.templates import check_characters, check_names_field, check_stop, check_template, fill, look_up

Kind = Literal["likelihood", "multiple_choice", "exact_match"]
METRICS: dict[str, tuple[str, ...]] = {
    "likelihood": ("log_probability",),
    "multiple_choice": ("accuracy", "margin"),
    "exact_match": ("accuracy", "brevity"),
}

# The last number, after `####` where there is one.
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


class TextConfig(TaskConfig):
    """A task of text: a JSONL file, and the names of its fields."""

    kind: Kind = Field(description="the kind of task")
    file: Location = Field(description="JSON lines, or zoo:search.jsonl and its like")
    prompt: Text = Field("{prompt}", description="a template over a record's fields")
    target: Text = Field("{target}", description="of likelihood, exact_match: a template over a record's fields")
    choices: Name = Field("choices", description="of multiple_choice: the field that lists the choices")
    answer: Name = Field("answer", description="of multiple_choice: the field that has the right one, by place or text")
    delimiter: Text = Field(
        " ", description="what joins a prompt to its target or choice where neither has white space there"
    )
    metric: Literal["log_probability", "accuracy", "margin", "brevity"] | None = Field(
        None, description="which of the kind's metrics is the fitness; default: log_probability or accuracy"
    )
    pattern: Text | None = Field(
        None,
        description="of exact_match: a regular expression, whose last match is the answer; default: the last number",
    )
    max_new_tokens: Whole = Field(
        256, ge=1, le=1_000_000, description="of exact_match: how many tokens a model may write"
    )
    stop: list[Text] = Field([], max_length=100, description="of exact_match: texts that end what a model writes")


@dataclass(frozen=True)
class Example:
    """One example in text. `targets`: the one target, or the choices; `answer`: the number of the right choice, or the
    wanted text."""

    prompt: str
    targets: tuple[str, ...]
    answer: int | str
    line: int


@dataclass(frozen=True)
class TextTask(TaskDefaults):
    """A task (tasks.task) of text: its kind, and its examples of one split.

    `pattern` (exact_match) is a regular expression whose last match in the output is the answer: the first of its
    groups that took part, where it has groups. None: the last number, after `####` where there is one.
    """

    name: str
    kind: Kind
    metric: str
    weight: float
    file: str
    examples: tuple[Example, ...]
    pattern: str | None = None
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        return (Path(self.file),)

    @property
    def size(self) -> int:
        return len(self.examples)

    def subset(self, examples: Sequence[int]) -> "TextTask":
        return replace(self, examples=tuple(self.examples[i] for i in examples))

    def requests(self, tokenizer: Any, context: int) -> TaskRequests:
        if self.kind == "exact_match":
            return TaskRequests((), tuple(prompt_rows(self, tokenizer)), self.max_new_tokens, self.stop)
        return TaskRequests(tuple(likelihood_rows(self, tokenizer)))

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        if self.kind == "exact_match":
            asked = {"brevity": brevity(responses.texts)} if self.metric == "brevity" else {}
            return score_outputs(self, responses.texts) | asked
        return score_likelihood(self, responses.totals, responses.counts)

    @property
    def derivative(self) -> Derivative | None:
        return {"log_probability": "linear", "margin": "nonlinear"}.get(self.metric)  # type: ignore[return-value]

    def score_gradient(self, responses: Responses) -> np.ndarray:
        if self.kind == "likelihood":
            return np.broadcast_to(1 / responses.counts, responses.totals.shape).astype(np.float32)
        return margin_gradient(self, responses.totals)

    def companion(self) -> "TextTask | None":
        """The likelihood of wanted answers, or the margin of choices; None for an output's length."""
        if self.metric == "brevity":
            return None
        if self.kind == "multiple_choice":
            return replace(self, metric="margin")
        return replace(self, kind="likelihood", metric="log_probability", pattern=None, max_new_tokens=0, stop=())

    def extraction_failure(self, texts: Sequence[str]) -> str | None:
        if self.kind != "exact_match" or self.metric == "brevity":
            return None
        if any(extract_answer(text, self.pattern, f"task {self.name}") is not None for text in texts):
            return None
        return "a number" if self.pattern is None else f"the pattern {self.pattern!r}"

    def target(self, example: int) -> str:
        """The wanted text; for multiple choice, the text of the right choice."""
        record = self.examples[example]
        return record.targets[record.answer].strip() if isinstance(record.answer, int) else record.answer

    def extracted(self, example: int, outputs: Sequence[str]) -> str | None:
        return extract_answer(outputs[0], self.pattern, f"task {self.name}") if outputs else None

    def contents(self) -> list[tuple[tuple[Any, ...], Place]]:
        return [
            ((example.prompt, example.targets, example.answer), (self.file, example.line)) for example in self.examples
        ]

    def paths(self) -> dict[str, str]:
        return {"file": self.file}


# ---------------------------------------------------------------------------------------------------------------
# From the config and its file to the task


def open_text(config: TextConfig, opening: Opening) -> TextTask:
    """The task on the examples of one file. Raises InputError for a meaningless config or file."""
    where, kind = opening.where, config.kind
    metric = config.metric or METRICS[kind][0]
    if metric not in METRICS[kind]:
        raise InputError(where, f"metric: {metric!r}; {kind} has {', '.join(METRICS[kind])}")
    fields = checked_fields(where, config.prompt, config.target, config.choices, config.answer, config.delimiter)
    check_stop(where, config.stop)
    if config.prompt:
        check_names_field(f"{where}.prompt", config.prompt, refuse=kind == "exact_match")
    if kind != "multiple_choice":
        check_names_field(f"{where}.target", config.target, refuse=False)
    file = opening.file(*opening.source("file", config.file))
    task = TextTask(
        config.name, kind, metric, config.weight, str(file), tuple(read_examples(file, kind, fields)),
        config.pattern, config.max_new_tokens, tuple(config.stop),
    )  # fmt: skip
    repeating = [example.line for example in task.examples if len(set(example.targets)) < len(example.targets)]
    if repeating:
        print_warning(f"{file}:{repeating[0]}: {len(repeating)} of {task.size} records list a wrong choice twice")
    if config.pattern is not None:
        samples = [f"{example.prompt} {''.join(example.targets)}" for example in task.examples[:PROBED]]
        check_pattern(where, config.pattern, config.max_new_tokens, samples)
    elif kind == "exact_match":
        answers = [str(example.answer) for example in task.examples]
        without = [answer for answer in answers if extract_answer(answer, None) is None]
        what = f"a number, which is the answer without a pattern ({without[0][:100]!r})" if without else ""
        if len(without) == len(answers):
            raise InputError(f"{where}.pattern", f"missing; no target of {file} holds {what}")
        if len(without) > len(answers) / 2:
            print_warning(
                f"{where}.pattern: missing; {len(without)} of {len(answers)} targets of {file} do not hold {what}; no "
                "output is right for these"
            )
    return task


KIND = TaskKind(TextConfig, open_text, source="file")


@dataclass(frozen=True)
class Fields:
    """The parts of a record: templates such as `"Q: {question}\\nA:"`, and the names of the choice fields. `where` is
    the section of the config that names them."""

    prompt: str
    target: str
    choices: str
    answer: str
    delimiter: str
    where: str = "tasks"


def checked_fields(where: str, prompt: str, target: str, choices: str, answer: str, delimiter: str) -> Fields:
    for key, template in (("prompt", prompt), ("target", target)):
        check_template(f"{where}.{key}", template)
    check_characters(f"{where}.delimiter", delimiter)
    return Fields(prompt, target, choices, answer, delimiter, where)


def read_examples(path: Path, kind: Kind, fields: Fields) -> list[Example]:
    """Read and check a task file. Raises InputError with the line number of the first record that does not fit."""
    return [_example(f"{path}:{number}", number, record, kind, fields) for number, record in read_records(path)]


def _example(where: str, line: int, record: Mapping[str, Any], kind: Kind, fields: Fields) -> Example:
    prompt = fill(where, f"{fields.where}.prompt", fields.prompt, record)
    if kind != "multiple_choice":
        target = fill(where, f"{fields.where}.target", fields.target, record)
        # White space as an answer is never found; as a target it can be predicted.
        if not (target.strip() if kind == "exact_match" else target):
            raise InputError(where, "target: is empty")
        return Example(prompt, (_joined(prompt, fields.delimiter, target),), target, line)
    choices, labels = _listed_choices(
        where, fields, look_up(where, f"{fields.where}.choices", (fields.choices,), record)
    )
    answer = look_up(where, f"{fields.where}.answer", (fields.answer,), record)
    chosen = _chosen(answer, choices, labels)
    if chosen is None:
        expected = f"one of {', '.join(labels)}" if labels else f"an index below {len(choices)}, its letter"
        raise InputError(where, f"{fields.answer}: {_brief(answer)}; expected {expected} or a choice")
    if choices.count(choices[chosen]) > 1:
        raise InputError(
            where, f"{fields.choices}: the right one, {_brief(choices[chosen])}, is there twice, and cannot win; "
            "expected choices that differ"
        )  # fmt: skip
    return Example(prompt, tuple(_joined(prompt, fields.delimiter, choice) for choice in choices), chosen, line)


def _listed_choices(where: str, fields: Fields, value: Any) -> tuple[list[str], list[str]]:
    """The texts of a record's choices, and their labels where the record has them, in ARC's form: `{"text": […],
    "label": […]}`."""
    texts, labels = value, []
    if isinstance(value, Mapping) and isinstance(value.get("label"), list):
        texts, labels = value.get("text"), [str(label) for label in value["label"]]
    if not (isinstance(texts, list) and len(texts) >= 2 and all(isinstance(text, str) and text for text in texts)):
        raise InputError(where, f"{fields.choices}: expected a list of two or more texts, found {_brief(value)}")
    if labels and not len(texts) == len(labels) == len(set(labels)):
        raise InputError(
            where, f"{fields.choices}: labels {_brief(labels)} of {len(texts)} texts; expected one of its own for each"
        )
    return texts, labels


def _chosen(answer: Any, choices: Sequence[str], labels: Sequence[str]) -> int | None:
    """The number of the choice that an answer means: by its label, the choice itself, its index (also as a text), or
    its letter."""
    if labels and str(answer) in labels:
        return labels.index(str(answer))
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if labels:
            return None
        if re.fullmatch("[A-Z]", answer):
            answer = ord(answer) - ord("A")
        elif re.fullmatch("[0-9]{1,3}", answer):
            answer = int(answer)
    return answer if type(answer) is int and 0 <= answer < len(choices) else None


def _brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def _joined(prompt: str, delimiter: str, target: str) -> str:
    """The target with the delimiter before it, unless white space is there already."""
    return target if prompt[-1:].isspace() or target[0].isspace() else delimiter + target


# ---------------------------------------------------------------------------------------------------------------
# Requests


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


def _closing_tokens(tokenizer: Any) -> int:
    empty = token_ids(tokenizer, "")
    return int(bool(empty) and empty[-1] == tokenizer.eos_token_id and empty[-1] != tokenizer.bos_token_id)


def likelihood_rows(task: TextTask, tokenizer: Any) -> list[Row]:
    """One row per target or choice, examples in order, each one's choices together."""
    rows = []
    for number, example in enumerate(task.examples):
        for target in example.targets:
            tokens, start = encode_pair(tokenizer, example.prompt, target)
            # Without a beginning-of-sequence token an empty prompt leaves the first token unscored.
            rows.append(Row(tuple(tokens), max(start, 1), f"{task.file}:{example.line}", number))
            if len(tokens) < 2 or start >= len(tokens):
                raise InputError(f"{task.file}:{example.line}", "has no token to score; give it a prompt")
    return rows


def prompt_rows(task: TextTask, tokenizer: Any) -> list[Row]:
    """One row per example, the prompt alone."""
    rows = []
    for number, example in enumerate(task.examples):
        tokens = encode_prompt(tokenizer, example.prompt)
        if not tokens:
            raise InputError(f"{task.file}:{example.line}", "prompt: has no token")
        rows.append(Row(tuple(tokens), len(tokens), f"{task.file}:{example.line}", number))
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Scores


def score_likelihood(task: TextTask, sums: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """sums: float32[P, rows], the targets' total log-probabilities; counts: int[rows]. Metric -> float32[P, N]."""
    if task.kind == "likelihood":
        return {"log_probability": (sums / counts).astype(np.float32)}
    accuracy, margin = [], []
    for example, rows in _choices(task):
        choices = sums[:, rows]
        right = choices[:, int(example.answer)]
        others = np.delete(choices, int(example.answer), axis=1).max(axis=1)
        # The first of equal choices counts as chosen, like in argmax.
        accuracy.append(np.where(np.isfinite(right), choices.argmax(axis=1) == example.answer, np.nan))
        margin.append(right - others)
    return {
        "accuracy": np.stack(accuracy, axis=1).astype(np.float32),
        "margin": np.stack(margin, axis=1).astype(np.float32),
    }


def _choices(task: TextTask) -> Iterator[tuple[Example, slice]]:
    """The examples of multiple choice, and the rows of each one's choices."""
    begin = 0
    for example in task.examples:
        yield example, slice(begin, begin + len(example.targets))
        begin += len(example.targets)


def margin_gradient(task: TextTask, sums: np.ndarray) -> np.ndarray:
    """The derivative of each example's margin with respect to its rows' sums, float32[P, rows]: 1 for the right choice,
    -1 for the best of the others (the first of equals). sums: float32[P, rows]."""
    gradient, candidates = np.zeros(sums.shape, np.float32), np.arange(len(sums))
    for example, rows in _choices(task):
        others = sums[:, rows].copy()
        others[:, int(example.answer)] = -np.inf
        gradient[candidates, rows.start + others.argmax(axis=1)] = -1
        gradient[:, rows.start + int(example.answer)] = 1
    return gradient


def extract_answer(text: str, pattern: str | None, where: str = "tasks") -> str | None:
    """The answer in an output: the last match of `pattern` that is not empty, or the last number (after `####` if
    there). `where` names the task in messages."""
    if pattern is None:
        matches = re.findall(NUMBER, text.rsplit("####", 1)[-1]) or re.findall(NUMBER, text)
        return matches[-1].replace(",", "") if matches else None
    filled = [match for match in find_all(where, pattern, text) if match[0]]
    if not filled:
        return None
    taken = [group for group in filled[-1].groups() if group is not None] if filled[-1].re.groups else [filled[-1][0]]
    return taken[0].strip() if taken else None


def same_answer(found: str | None, wanted: str, pattern: str | None) -> bool:
    if found is None:
        return False
    if pattern is not None:
        return found == wanted.strip()
    # The wanted text may be a worked answer that ends in `#### 42`.
    number = extract_answer(wanted, None)
    return number is not None and Decimal(found) == Decimal(number)


def score_outputs(task: TextTask, texts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """texts: P lists of N continuations. Metric -> float32[P, N]."""
    rows = [
        [
            same_answer(extract_answer(text, task.pattern, f"task {task.name}"), str(example.answer), task.pattern)
            for text, example in zip(row, task.examples, strict=True)
        ]
        for row in texts
    ]
    return {"accuracy": np.asarray(rows, np.float32).reshape(len(texts), len(task.examples))}
