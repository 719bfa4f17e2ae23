"""What a task is to the rest of the program: what it asks of a model, and how it scores the answers.

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
LogitsFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Row:
    """Tokens, of which those from `start` on are scored (for a prompt: generated). `example`: which of the task's
    examples it belongs to; rows of one example may share their beginning. `where` names it in messages."""

    tokens: tuple[int, ...]
    start: int
    where: str
    example: int


@dataclass(frozen=True)
class TaskRequests:
    """What a task asks: rows whose targets are scored, and prompts that are continued greedily by at most
    `max_new_tokens` tokens, or up to the first of the texts `stop`. `logits_fn`: what a scored row's logits are reduced
    to; None: the targets' total log-probability."""

    scored: tuple[Row, ...] = ()
    prompts: tuple[Row, ...] = ()
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    logits_fn: LogitsFn | None = None


@dataclass(frozen=True)
class Responses:
    """The responses of P candidates, in the order of `TaskRequests`. totals: float32[P, S], the scored rows' total
    log-probabilities; counts: int[S], how many targets each has; greedy: bool[P, S], whether the targets are the greedy
    tokens; texts: P lists of continuations, cut before the first stop text."""

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

    def subset(self, examples: Sequence[int]) -> "Task":
        """The same task on some of its examples."""
        ...

    def requests(self, tokenizer: Any, context: int) -> TaskRequests:
        """What is asked of a model that sees at most `context` tokens. Raises InputError for an example that
        cannot be asked."""
        ...

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        """Metric -> float32[P, N]."""
        ...

    def extraction_failure(self, texts: Sequence[str]) -> str | None:
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
