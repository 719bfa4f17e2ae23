"""What a task is to the rest of the program: what it asks of a model, and how it scores the answers.

May import errors and NumPy.

Every kind of task (text, gsm, harness, function) is a frozen dataclass with these members. A task turns its examples
into rows of tokens once for a whole run, the evaluator answers them for every candidate, and the task reduces the
answers to scores per example, of which higher is better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from evojax_merge.errors import InputError

# (logits float32[Q, V], targets int32[Q], mask bool[Q]) -> a number: what a traced function makes of a row.
Reduce = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Row:
    """Tokens, of which those from `start` on are scored (for a prompt: generated). `example`: which of the task's
    examples it belongs to; rows of one example may share their beginning. `where` names it in messages."""

    tokens: tuple[int, ...]
    start: int
    where: str
    example: int


@dataclass(frozen=True)
class Asked:
    """What a task asks: rows whose targets are scored, and prompts that are continued greedily by at most
    `max_new_tokens` tokens, or up to the first of the texts `stop`. `reduce`: what a scored row's logits are reduced
    to; None: the targets' total log-probability."""

    scored: tuple[Row, ...] = ()
    prompts: tuple[Row, ...] = ()
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    reduce: Reduce | None = None


@dataclass(frozen=True)
class Answers:
    """What P candidates answered, in the order of `Asked`. totals: float32[P, S], of the scored rows; counts: int[S],
    how many tokens of each are targets; greedy: bool[P, S], whether the targets are what the model would have
    written; texts: P lists of continuations, cut before the first stop text."""

    totals: np.ndarray
    counts: np.ndarray
    greedy: np.ndarray
    texts: list[list[str]]


class Task(Protocol):
    """A named task of N examples of one split. `metric`: which of its scores is its fitness; `weight`: its share in
    the fitness of the whole, 0 for a task that is only shown; `files`: the input files that it was made from."""

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def size(self) -> int: ...

    def part(self, examples: Sequence[int]) -> "Task":
        """The same task on some of its examples."""
        ...

    def ask(self, tokenizer: Any, context: int) -> Asked:
        """What is asked of a model that sees at most `context` tokens. Raises InputError for an example that
        cannot be asked."""
        ...

    def score(self, answers: Answers) -> dict[str, np.ndarray]:
        """Metric -> float32[P, N]."""
        ...

    def unanswered(self, texts: Sequence[str]) -> str | None:
        """What was looked for in the outputs, if it is in none of them; else None."""
        ...


def token_ids(tokenizer: Any, text: str, **options: bool) -> list[int]:
    """The tokens of a text. Raises InputError where the tokenizer fails on it: one may lack a token for unknown words,
    say."""
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(tokenizer.name_or_path, f"its tokenizer fails on {text[:80]!r} ({said})") from None


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop texts."""
    ends = [position for word in stop if (position := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text
