"""Answers in generated texts: how they are extracted and compared, and which targets no text can equal."""

import re
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal
from typing import Any

from evojax_merge.errors import InputError, shown
from evojax_merge.tasks.patterns import find_all

# The last number, after `####` where there is one.
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def extract_answer(text: str, pattern: str | None, where: str = "tasks") -> str | None:
    """The answer in an output: the last match of `pattern` that is not empty, or the last number (after any `####`)."""
    if pattern is None:
        numbers = numbers_in(text)
        return numbers[-1].replace(",", "") if numbers else None
    filled = [match for match in find_all(where, pattern, text) if match[0]]
    if not filled:
        return None
    taken = [group for group in filled[-1].groups() if group is not None] if filled[-1].re.groups else [filled[-1][0]]
    return taken[0].strip() if taken else None


def numbers_in(text: str) -> list[str]:
    """The numbers after the last `####`; where there are none, all numbers of the text."""
    return re.findall(NUMBER, text.rsplit("####", 1)[-1]) or re.findall(NUMBER, text)


def same_answer(found: str | None, wanted: str, pattern: str | None) -> bool:
    if found is None:
        return False
    if pattern is not None:
        return found == wanted.strip()
    # The wanted text may be a worked answer that ends in `#### 42`.
    number = extract_answer(wanted, None)
    return number is not None and Decimal(found) == Decimal(number)


def check_answerable(
    name: str, targets: Sequence[tuple[str, Sequence[str]]], tokenizer: Any, ids: Collection[int], stop: Iterable[str],
    max_new_tokens: int,
) -> None:  # fmt: skip
    """Raises InputError for the first example of the task `name` that no output answers, since all its targets contain
    a special token that decoding drops, or a text of `stop`, before which an output ends; and where even the shortest
    of all targets has more tokens than a model may write. targets: each example's place and its targets, one of which
    an output must contain to be right; none where that is not known; ids: the tokens of the targets."""
    obstacles = {
        token: f"{shown(token)}, a special token, which outputs never contain"
        for number, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)
        if not tokenizer.decode([number], skip_special_tokens=True) and token in tokenizer.decode([number])
    }
    obstacles |= {text: f"{shown(text)}, a text of stop, before which outputs end" for text in stop}
    unattainable = [
        (place, texts[0], next(text for text in obstacles if text in texts[0]))
        for place, texts in targets
        if texts and all(any(text in target for text in obstacles) for target in texts)
    ]
    if unattainable:
        place, target, text = unattainable[0]
        raise InputError(
            place, f"task {name}: no output can be right: the target {shown(target)} contains {obstacles[text]} "
            f"(so do {len(unattainable)} of {len(targets)} targets); leave it out of "
            + ("stop, or out of the target" if text in stop else "the target")
        )  # fmt: skip
    if not all(texts for _, texts in targets):
        return
    tokens = tokenizer([text for _, texts in targets for text in texts], add_special_tokens=False)["input_ids"]
    shortest = min(map(len, tokens), default=0)
    if shortest > max_new_tokens:
        raise InputError(
            targets[0][0], f"task {name}: no output can be right: max_new_tokens is {max_new_tokens}, and the shortest "
            f"target has {shortest} tokens; expected max_new_tokens of more than that",
        )  # fmt: skip
