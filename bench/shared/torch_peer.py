"""The peer of the benchmarks: transformers and torch score the same rows, one model at a time. Imports torch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from evojax_merge.tasks.task import Row


def batches_of(rows: Sequence[Row], tokens_per_batch: int) -> Iterator[np.ndarray]:
    """The numbers of rows that go through a pass together: neighbours in length, about as many tokens as told."""
    order = np.argsort([len(row.tokens) for row in rows], kind="stable")[::-1]
    begin = 0
    while begin < len(order):
        size = max(1, tokens_per_batch // len(rows[order[begin]].tokens))
        yield order[begin : begin + size]
        begin += size


def score_rows(model: Any, rows: Sequence[Row], tokens_per_batch: int = 4096) -> np.ndarray:
    """The targets' total log-probability of each row, float64[S], from whole rows in padded batches."""
    import torch

    totals = np.zeros(len(rows))
    for members in batches_of(rows, tokens_per_batch):
        width = max(len(rows[r].tokens) for r in members)
        tokens = torch.zeros(len(members), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for b, r in enumerate(members):
            tokens[b, : len(rows[r].tokens)] = torch.tensor(rows[r].tokens)
            mask[b, : len(rows[r].tokens)] = 1
        with torch.inference_mode():
            logits = model(input_ids=tokens, attention_mask=mask).logits
            for b, r in enumerate(members):
                start, end = rows[r].start, len(rows[r].tokens)
                shares = logits[b, start - 1 : end - 1].float().log_softmax(-1)
                totals[r] = float(shares.gather(1, tokens[b, start:end, None]).sum())
    return totals


def mean_log_probability(model: Any, rows: Sequence[Row]) -> float:
    """Mean over rows of the mean log-probability per token of the target."""
    return float(np.mean(score_rows(model, rows) / [len(row.tokens) - row.start for row in rows]))


def continued(model: Any, tokenizer: Any, prompts: Sequence[Row], tokens: int) -> list[str]:
    """The greedy continuations of prompts, of at most so many tokens, in batches of left-padded rows."""
    import torch

    texts = [""] * len(prompts)
    for members in batches_of(prompts, 4096):
        width = max(len(prompts[r].tokens) for r in members)
        rows = torch.zeros(len(members), width, dtype=torch.long)
        mask = torch.zeros_like(rows)
        for b, r in enumerate(members):
            rows[b, width - len(prompts[r].tokens) :] = torch.tensor(prompts[r].tokens)
            mask[b, width - len(prompts[r].tokens) :] = 1
        with torch.inference_mode():
            made = model.generate(rows, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        decoded = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        for r, text in zip(members, decoded, strict=True):
            texts[r] = text
    return texts
