"""A task's rows, tokenised and batched once for a whole run.

Several splits of the same tasks get batches of the same shapes, and so share compiled programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evojax_merge.errors import InputError, shown
from evojax_merge.evaluation.targets import Target
from evojax_merge.tasks.batches import (
    Batches,
    Pack,
    PromptBatch,
    PromptShapes,
    ScoringBatch,
    ScoringShapes,
    fill_prompt_batches,
    fill_scoring_batches,
    packs_in,
    prompt_shapes,
    scoring_shapes,
)
from evojax_merge.tasks.task import Task, TaskRequests

# Tokens of a candidate in one pass: on a CPU as many as fit its caches; on an accelerator, between the two bounds,
# enough to keep it busy and MERGE_FACTOR times the cost of a merge, so that merging takes little of the time.
CPU_TOKENS, ACCELERATOR_TOKENS, MERGE_FACTOR = 2048, (8192, 16384), 8
# The factor by which a batch may hold more tokens while decoding, prompts and generated tokens together: each row is
# only a few tokens of a step.
DECODE_BATCH_FACTOR = 4
# The share of unknown tokens above which the user sees a warning.
UNKNOWN_SHARE = 0.05


@dataclass(frozen=True)
class TaskShapes:
    """The shapes of a task's batches of scored rows and of prompts; None: the task has none of these."""

    scoring: ScoringShapes | None
    prompts: PromptShapes | None


@dataclass(frozen=True)
class BatchedTask:
    """A task, its requests, and the batches of its scored rows and of its prompts, which have these `shapes`. `stop`:
    token ids that end a generation; `tokens_per_batch`, `merge_tokens`: the arguments that the batches were made for;
    `share_prefixes`: true where rows share their common beginnings; `has_images`: true where rows of any split have
    positions of images."""

    task: Task
    requests: TaskRequests
    shapes: TaskShapes
    scoring: Batches[ScoringBatch] | None
    prompts: Batches[PromptBatch] | None
    stop: tuple[int, ...]
    tokens_per_batch: int
    share_prefixes: bool = True
    merge_tokens: int = 0
    has_images: bool = False

    @property
    def parts(self) -> list[Batches[Any]]:
        """The batches of scored rows and those of prompts, where the task has these."""
        return [part for part in (self.scoring, self.prompts) if part is not None]

    @property
    def batches(self) -> int:
        return sum(len(part.batches) for part in self.parts)

    def for_any_examples(self) -> "BatchedTask":
        """The same task in batches that have room for any examples that `subset` chooses."""
        if self.shapes.scoring is None:
            return self
        shapes = replace(self.shapes, scoring=self.shapes.scoring.for_any(self.requests.scored))
        return replace(self, shapes=shapes, **_filled(self.requests, shapes))

    def subset(self, examples: np.ndarray) -> "BatchedTask":
        """The task on some of its examples, int[M], ascending, in batches of the same shapes. The batches must have
        room for any examples."""
        requests = self.requests.subset(examples.tolist())
        chosen = set(examples.tolist())
        # Rows that were packed together stay so: others may be longer than all shapes.
        numbers = [number for number, row in enumerate(self.requests.scored) if row.example in chosen]
        places = {number: place for place, number in enumerate(numbers)}
        packs = [] if self.scoring is None else [
            tuple(places[number] for number in pack if number in places) for pack in packs_in(self.scoring)
        ]  # fmt: skip
        filled = _filled(requests, self.shapes, list(filter(None, packs)))
        return replace(self, task=self.task.subset(examples.tolist()), requests=requests, **filled)


def suitable_tokens(target: Target) -> int:
    """The default number of a candidate's tokens in a pass."""
    if not target.is_accelerator:
        return CPU_TOKENS
    least, most = ACCELERATOR_TOKENS
    return least if MERGE_FACTOR * target.merge_tokens <= least else most


def batch_tasks(
    splits: Sequence[Sequence[Task]],
    tokenizer: Any,
    tokens_per_batch: int,
    context: int,
    stop: tuple[int, ...],
    vocab: int = 2**31,
    position_switch: int | None = None,
    merge_tokens: int = 0,
) -> list[list[BatchedTask]]:
    """Tokenise and batch several splits of the same tasks, in batches of the same shapes, made for the first split.
    merge_tokens: the cost of merging, which each scored batch does anew, in tokens.

    Raises InputError for an example that is longer than `context`, the model's, that holds a token beyond the `vocab`
    rows of its embedding, or whose generation could grow beyond `position_switch` tokens, where the model's position
    tables change (None: they do not).
    """
    requests = [[task.requests(tokenizer, context) for task in split] for split in splits]
    for part in (part for split in requests for part in split):
        _check(part, tokenizer, context, vocab, position_switch)
    by_task = [[split[i] for split in requests] for i in range(len(splits[0]))]
    # A prefix that a short row shares with a long one would have the positions of one of them.
    shares = [position_switch is None or max(map(_longest, parts)) <= position_switch for parts in by_task]
    shapes = [
        _task_shapes(parts, tokens_per_batch, share, merge_tokens) for parts, share in zip(by_task, shares, strict=True)
    ]
    return [
        [
            BatchedTask(
                task,
                requests[s][i],
                shapes[i],
                **_filled(requests[s][i], shapes[i]),
                stop=stop,
                tokens_per_batch=tokens_per_batch,
                share_prefixes=shares[i],
                merge_tokens=merge_tokens,
                has_images=any(min(row.tokens, default=0) < 0 for part in by_task[i] for row in part.rows),
            )
            for i, task in enumerate(split)
        ]
        for s, split in enumerate(splits)
    ]


def _task_shapes(splits: Sequence[TaskRequests], tokens_per_batch: int, share: bool, merge_tokens: int) -> TaskShapes:
    """The shapes of one task's batches, the same in every split."""
    scoring = prompts = None
    if splits[0].scored:
        # A function of a row's logits may look at all of them, so no other row is packed beside it.
        pack = share and splits[0].logits_fn is None
        scoring = scoring_shapes([part.scored for part in splits], tokens_per_batch, pack, share, merge_tokens)
    if splits[0].prompts:
        together = DECODE_BATCH_FACTOR * tokens_per_batch
        new = splits[0].max_new_tokens
        prompts = prompt_shapes([part.prompts for part in splits], tokens_per_batch, together, new, share)
    return TaskShapes(scoring, prompts)


def _filled(requests: TaskRequests, shapes: TaskShapes, packs: Sequence[Pack] | None = None) -> dict[str, Any]:
    """The fields `scoring` and `prompts`: batches of these shapes. packs: see `fill_scoring_batches`."""
    return {
        "scoring": None if shapes.scoring is None else fill_scoring_batches(requests.scored, shapes.scoring, packs),
        "prompts": None if shapes.prompts is None else fill_prompt_batches(requests.prompts, shapes.prompts),
    }


def halve_batches(batched_task: BatchedTask) -> BatchedTask | None:
    """The same request in batches of half the size; None where a batch has one row already."""
    if all(batch.tokens.shape[0] == 1 for part in batched_task.parts for batch in part.batches):
        return None
    return in_batches_of(batched_task, batched_task.tokens_per_batch // 2)


def in_batches_of(batched_task: BatchedTask, tokens: int) -> BatchedTask:
    """The same request in batches of about so many tokens, and of one row at least."""
    shapes = _task_shapes([batched_task.requests], tokens, batched_task.share_prefixes, batched_task.merge_tokens)
    return replace(batched_task, shapes=shapes, tokens_per_batch=tokens, **_filled(batched_task.requests, shapes))


def _longest(requests: TaskRequests) -> int:
    """The most tokens that a model reads of a row. The last one of a scored row is only predicted."""
    return max([0, *(len(row.tokens) - 1 for row in requests.scored), *(len(row.tokens) for row in requests.prompts)])


def _check(requests: TaskRequests, tokenizer: Any, context: int, vocab: int, switch: int | None) -> None:
    """Raises InputError for a row that the models cannot read (see `batch_tasks`)."""
    # The last token of a scored row is predicted, not read.
    for rows, new, longest in ((requests.scored, 0, context + 1), (requests.prompts, requests.max_new_tokens, context)):
        for row in rows:
            if len(row.tokens) + new > longest:
                wanted = f"{len(row.tokens)} tokens" + (f" and {new} new ones (max_new_tokens)" if new else "")
                raise InputError(row.where, f"{wanted} do not fit the models' context of {context}")
    image_token = getattr(tokenizer, "placeholder_id", None)
    for row in requests.rows:
        if image_token is not None and image_token in row.tokens:
            what = f"holds {shown(tokenizer.convert_ids_to_tokens(image_token))}, the token of an image, and no image"
            raise InputError(row.where, f"{what} for it; expected a record with the image, or a text without the token")
        number = max(row.tokens, default=0)
        if number >= vocab:
            token = tokenizer.convert_ids_to_tokens(number)
            raise InputError(
                row.where,
                f"token {shown(token)} has the number {number:,}, and the models' embedding {vocab:,} rows; expected "
                f"the tokenizer that they were trained with, not that of {tokenizer.name_or_path}",
            )
    for row in requests.prompts:
        if switch is not None and len(row.tokens) <= switch < len(row.tokens) + requests.max_new_tokens:
            raise InputError(
                row.where,
                f"{len(row.tokens)} tokens and {requests.max_new_tokens} new ones: the model's positions change at "
                f"{switch} (original_max_position_embeddings); expected a prompt that stays below or is longer",
            )


def token_warnings(batched_tasks: Sequence[BatchedTask], tokenizer: Any, vocab: int) -> list[str]:
    """One line for each problem with the tokens of a model with `vocab` embedding rows: the tokenizer has tokens beyond
    the rows (trainers add such, and no example holds one, or `batch_tasks` would have raised), or many of the examples'
    tokens are unknown to it."""
    lines = []
    outside = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= vocab)
    if outside:
        lines.append(
            f"{tokenizer.name_or_path}: {len(outside):,} tokens (such as {shown(outside[0][1])}) are beyond the "
            f"{vocab:,} rows of the models' embedding; no example holds one"
        )
    unknown = tokenizer.unk_token_id
    # A token that stands in for the unknown one is in the examples for its own sake.
    if unknown is not None and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        rows = [row for batched_task in batched_tasks for row in batched_task.requests.rows]
        counts = [row.tokens.count(unknown) for row in rows]
        share = sum(counts) / max(1, sum(len(row.tokens) for row in rows))
        if share > UNKNOWN_SHARE:
            first = next(row.where for row, count in zip(rows, counts, strict=True) if count)
            lines.append(
                f"{share:.0%} of the examples' tokens are unknown to the tokenizer ({shown(tokenizer.unk_token)}), "
                f"first in {first}"
            )
    return lines


def shared_and_padding(batched_tasks: Sequence[BatchedTask]) -> tuple[float, float]:
    """The share of the tokens that are computed once for several rows, and the share of the computed tokens that is
    padding."""
    parts = [part for batched_task in batched_tasks for part in batched_task.parts]
    computed, padding = sum(part.computed for part in parts), sum(part.padding for part in parts)
    return 1 - (computed - padding) / sum(part.tokens for part in parts), padding / computed


def describe_batches(batched_tasks: Sequence[BatchedTask]) -> str:
    """One line: the tokens, batches and rows that are computed for each candidate."""
    parts = [part for batched_task in batched_tasks for part in batched_task.parts]
    rows = sum(len(batched_task.requests.rows) for batched_task in batched_tasks)
    shapes = {(len(p.shared_prefix), shape) for p in parts for batch in p.batches for shape in batch.compiled_shapes}
    shared, padding = shared_and_padding(batched_tasks)
    batches = sum(len(part.batches) for part in parts)
    return (
        f"per candidate: {sum(part.tokens for part in parts):,} tokens in {_counted(batches, 'batch', 'batches')} "
        f"({_counted(rows, 'row', 'rows')}, {shared:.0%} of the tokens shared, {padding:.0%} padding, "
        f"{_counted(len(shapes), 'compiled shape', 'compiled shapes')})"
    )


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
