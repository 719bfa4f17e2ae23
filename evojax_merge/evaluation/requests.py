"""What is asked of every candidate: a task's rows, tokenised once for a whole run, in batches. May import tasks and
evaluation.devices.

Several splits of the same tasks get batches of the same shapes, and so share what is compiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evojax_merge.errors import InputError
from evojax_merge.evaluation.devices import on_accelerator
from evojax_merge.tasks.batches import Batches, PromptBatch, ScoringBatch, prompt_batches, scoring_batches
from evojax_merge.tasks.task import Asked, Task

# Tokens of a candidate in one pass: on a CPU as many as its caches like, on others as many as keep it busy.
CPU_TOKENS, ACCELERATOR_TOKENS = 2048, 8192
# So many times as many go together, prompts and what is written, while it is written: each row is then few tokens of a
# pass.
PROMPT_TOKENS = 4
# Of an example's tokens so many may be unknown ones before it is worth a word.
UNKNOWN_SHARE = 0.05


@dataclass(frozen=True)
class Requests:
    """A task, what it asks, and the batches of its scored rows and of its prompts. `stop`: token ids that end a
    generation; `tokens_per_batch`: what the batches were made for."""

    task: Task
    asked: Asked
    scoring: Batches[ScoringBatch] | None
    prompts: Batches[PromptBatch] | None
    stop: tuple[int, ...]
    tokens_per_batch: int

    @property
    def batches(self) -> int:
        return sum(len(part.batches) for part in (self.scoring, self.prompts) if part is not None)


def build_requests(
    splits: Sequence[Sequence[Task]],
    tokenizer: Any,
    tokens_per_batch: int | None,
    context: int,
    stop: tuple[int, ...],
    vocab: int = 2**31,
) -> list[list[Requests]]:
    """Tokenise and batch several splits of the same tasks, in batches of the same shapes, made for the first split;
    `tokens_per_batch` None: as many tokens as suit the devices.

    Raises InputError for an example that is longer than `context`, the model's, or that holds a token beyond the
    `vocab` rows of its embedding.
    """
    if tokens_per_batch is None:
        tokens_per_batch = ACCELERATOR_TOKENS if on_accelerator() else CPU_TOKENS
    asked = [[task.ask(tokenizer, context) for task in split] for split in splits]
    for part in (part for split in asked for part in split):
        _check_lengths(part, context)
        _check_tokens(part, tokenizer, vocab)
    columns = [_requests([split[i] for split in asked], tokens_per_batch) for i in range(len(splits[0]))]
    return [
        [
            Requests(task, asked[s][i], *columns[i][s], stop=stop, tokens_per_batch=tokens_per_batch)
            for i, task in enumerate(split)
        ]
        for s, split in enumerate(splits)
    ]


def _requests(
    splits: Sequence[Asked], tokens_per_batch: int
) -> list[tuple[Batches[ScoringBatch] | None, Batches[PromptBatch] | None]]:
    """One task's batches in each split."""
    scored: Sequence[Batches[ScoringBatch] | None] = [None] * len(splits)
    prompts: Sequence[Batches[PromptBatch] | None] = [None] * len(splits)
    if splits[0].scored:
        # A function of a row's logits may look at all of them, so no other row is laid beside it.
        scored = scoring_batches([part.scored for part in splits], tokens_per_batch, splits[0].reduce is None)
    if splits[0].prompts:
        together = PROMPT_TOKENS * tokens_per_batch
        new = splits[0].max_new_tokens
        prompts = prompt_batches([part.prompts for part in splits], tokens_per_batch, together, new)
    return list(zip(scored, prompts, strict=True))


def smaller(request: Requests) -> Requests | None:
    """The same request in batches of half the size; None where a batch has one row already."""
    parts = [part for part in (request.scoring, request.prompts) if part is not None]
    if all(batch.tokens.shape[0] == 1 for part in parts for batch in part.batches):
        return None
    tokens = request.tokens_per_batch // 2
    ((scored, prompts),) = _requests([request.asked], tokens)
    return Requests(request.task, request.asked, scored, prompts, request.stop, tokens)


def _check_lengths(asked: Asked, context: int) -> None:
    # The last token of a scored row is predicted, not read.
    for rows, new, longest in ((asked.scored, 0, context + 1), (asked.prompts, asked.max_new_tokens, context)):
        for row in rows:
            if len(row.tokens) + new > longest:
                wanted = f"{len(row.tokens)} tokens" + (f" and {new} new ones" if new else "")
                raise InputError(row.where, f"{wanted} do not fit the models' context of {context}")


def _check_tokens(asked: Asked, tokenizer: Any, vocab: int) -> None:
    for row in (*asked.scored, *asked.prompts):
        number = max(row.tokens, default=0)
        if number >= vocab:
            token = tokenizer.convert_ids_to_tokens(number)
            raise InputError(
                row.where,
                f"token {token!r} has the number {number:,}, and the models' embedding {vocab:,} rows; expected the "
                f"tokenizer that they were trained with, not that of {tokenizer.name_or_path}",
            )


def token_warnings(requests: Sequence[Requests], tokenizer: Any, vocab: int) -> list[str]:
    """One line each for what is amiss with the tokens of a model with `vocab` embedding rows: that the tokenizer has
    some beyond the rows (trainers add such, and no example holds one, or `build_requests` had raised), and that many of
    the examples' are unknown to it."""
    found = []
    outside = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= vocab)
    if outside:
        found.append(
            f"{tokenizer.name_or_path}: {len(outside):,} tokens (such as {outside[0][1]!r}) are beyond the "
            f"{vocab:,} rows of the models' embedding; no example holds one"
        )
    unknown = tokenizer.unk_token_id
    # Where another token stands in for the unknown one, it is there for its own sake.
    if unknown is not None and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        rows = [row for request in requests for row in (*request.asked.scored, *request.asked.prompts)]
        counts = [row.tokens.count(unknown) for row in rows]
        share = sum(counts) / max(1, sum(len(row.tokens) for row in rows))
        if share > UNKNOWN_SHARE:
            first = next(row.where for row, count in zip(rows, counts, strict=True) if count)
            found.append(
                f"{share:.0%} of the examples' tokens are unknown to the tokenizer ({tokenizer.unk_token!r}), "
                f"first in {first}"
            )
    return found


def _shapes(batch: ScoringBatch | PromptBatch) -> list[Any]:
    """What is compiled for a batch: prompts are read in parts, and written on together."""
    if isinstance(batch, PromptBatch):
        return [batch.tokens.shape, *((part.end - part.begin, part.width, "read") for part in batch.parts)]
    return [tuple(array.shape for array in vars(batch).values())]


def describe_requests(requests: Sequence[Requests]) -> str:
    """One line: what each candidate is asked."""
    parts: list[Batches[Any]] = [p for r in requests for p in (r.scoring, r.prompts) if p is not None]
    rows = sum(len(request.asked.scored) + len(request.asked.prompts) for request in requests)
    shapes = {(len(p.header), shape) for p in parts for batch in p.batches for shape in _shapes(batch)}
    tokens, computed = sum(part.tokens for part in parts), sum(part.computed for part in parts)
    shared = 1 - (computed - sum(part.padding for part in parts)) / tokens
    return (
        f"each candidate: {tokens:,} tokens of {rows:,} rows in {sum(len(part.batches) for part in parts)} batches of "
        f"{len(shapes)} shapes, {shared:.0%} shared, {sum(part.padding for part in parts) / computed:.0%} padding"
    )
