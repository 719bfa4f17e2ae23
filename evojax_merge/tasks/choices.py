"""The choices of a question, and which of them is right, as data sets write them."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from evojax_merge.errors import InputError
from evojax_merge.schema.section import Form, Name, Text
from evojax_merge.tasks.templates import field_path, fill, look_up, named_fields

# The field that lists the choices; or a template for each choice, in a list or by its label.
ChoiceTemplates = Annotated[
    Name
    | Annotated[list[Text], Field(min_length=2, max_length=1000)]
    | Annotated[dict[str, Text], Field(min_length=2, max_length=1000)],
    BeforeValidator(lambda value: {str(k): v for k, v in value.items()} if isinstance(value, dict) else value),
    Form("the name of a field, a list of two or more templates, or {label: template}", "a field, or templates"),
]


def read_choices(
    where: str, key: str, choices: ChoiceTemplates, fields: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """The texts of a record's choices, and their labels, if they have some. key: that of `choices` in the config."""
    if isinstance(choices, str):
        return listed_choices(where, choices, look_up(where, key, field_path(choices, fields), fields))
    if isinstance(choices, list):
        return listed_choices(where, key, [fill(where, key, template, fields) for template in choices])
    # Tables have an empty cell where a question has fewer choices than others.
    has = {
        label: template for label, template in choices.items()
        if not (names := named_fields(template)) or any(fields.get(name) not in (None, "") for name in names)
    }  # fmt: skip
    return listed_choices(where, key, {label: fill(where, key, template, fields) for label, template in has.items()})


def templates_of(choices: ChoiceTemplates) -> list[str]:
    """The templates of the choices; none where a field lists them."""
    return [] if isinstance(choices, str) else list(choices.values()) if isinstance(choices, dict) else choices


def choice_fields(choices: ChoiceTemplates) -> set[str]:
    """The fields of a record that the choices are read from."""
    templates = templates_of(choices)
    return {choices} if isinstance(choices, str) else {name for text in templates for name in named_fields(text)}


def listed_choices(where: str, name: str, value: Any) -> tuple[list[str], list[str]]:
    """The texts of a record's choices, and their labels in ARC's form, `{"text": […], "label": […]}`, or in that of
    `{"A": …, "B": …}`."""
    texts, labels = value, []
    if isinstance(value, Mapping) and isinstance(value.get("label"), list):
        texts, labels = value.get("text"), [str(label) for label in value["label"]]
    elif isinstance(value, Mapping):
        # Parquet has null where a record lacks a label that others have.
        by_label = {str(label): text for label, text in value.items() if text is not None}
        texts, labels = list(by_label.values()), list(by_label)
    if not (isinstance(texts, list) and len(texts) >= 2 and all(isinstance(text, str) and text for text in texts)):
        raise InputError(where, f"{name}: expected a list of two or more texts, found {brief(value)}")
    if labels and not len(texts) == len(labels) == len(set(labels)):
        raise InputError(
            where, f"{name}: labels {brief(labels)} of {len(texts)} texts; expected one of its own for each"
        )
    return texts, labels


def right_choice(where: str, name: str, answer: Any, choices: Sequence[str], labels: Sequence[str]) -> int:
    """The place of the choice that an answer means: by its label, text, index (also as a text), letter, or [0, 1, …].
    name: the answer's field."""
    chosen = _chosen(answer, choices, labels)
    if chosen is None:
        expected = f"one of {', '.join(labels)}" if labels else f"an index below {len(choices)}, its letter"
        raise InputError(where, f"{name}: {brief(answer)}; expected {expected} or a choice")
    if choices.count(choices[chosen]) > 1:
        raise InputError(
            where, f"{name}: the right choice, {brief(choices[chosen])}, is there twice, and cannot win; expected "
            "choices that differ"
        )  # fmt: skip
    return chosen


def _chosen(answer: Any, choices: Sequence[str], labels: Sequence[str]) -> int | None:
    # JSON writes true, Python True.
    label = next((name for name in (str(answer), str(answer).lower()) if name in labels), None)
    if label is not None:
        return labels.index(label)
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if labels:
            return None
        if re.fullmatch("[A-Z]", answer):
            answer = ord(answer) - ord("A")
        elif re.fullmatch("[0-9]{1,3}", answer):
            answer = int(answer)
    elif isinstance(answer, list) and (answer.count(1), answer.count(0)) == (1, len(choices) - 1):
        answer = answer.index(1)
    is_place = type(answer) is int and 0 <= answer < len(choices) and not any(map(str.isdecimal, labels))
    return answer if is_place else None


def brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"
