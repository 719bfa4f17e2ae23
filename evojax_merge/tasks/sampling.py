"""Sampled answers: the keys of tasks that generate, and the scores of several answers to each example."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from evojax_merge.errors import InputError
from evojax_merge.models.sampling import Sampler
from evojax_merge.schema.section import Form, Real, Whole
from evojax_merge.tasks.task import SHARE_RIGHT, Row, TaskConfig

# The fitness of an example that is answered several times.
Reduction = Literal["mean", "majority", "pass_at_k"]
# The least temperature: logits over a smaller one may not be finite.
LEAST_TEMPERATURE = 1e-3
KEYS = ("temperature", "top_p", "top_k", "samples", "over_samples", "k")
# The units of the scores that this module adds to a task's.
UNITS = {"majority": SHARE_RIGHT, "pass_at_k": "share solved in k samples", "length": "minus tokens"}
# (an example, an output for it) -> the answer in it that votes; None: it has none.
Vote = Callable[[int, str], Hashable | None]


class SamplingConfig(TaskConfig):
    """The keys of tasks that generate, by which tokens are drawn and answers counted."""

    optional: ClassVar[tuple[str, ...]] = (*KEYS, "stop_at")

    kind: str = Field(description="the kind of task")
    temperature: Annotated[Real, Form("0, or a number from 0.001 to 100")] = Field(
        0.0, ge=0.0, le=100.0, description="of generated tokens, which are drawn from the softmax; 0: greedy"
    )
    top_p: Annotated[Real, Form("a number above 0, at most 1")] = Field(
        1.0, gt=0.0, le=1.0, description="draw from the likeliest tokens that together have this probability"
    )
    top_k: Whole | None = Field(
        None, ge=1, le=10_000_000, description="draw from so many likeliest tokens; default: from all"
    )
    samples: Whole = Field(1, ge=1, le=1024, description="how many answers are drawn for each example")
    over_samples: Reduction = Field(
        "mean", description="the fitness of several answers: their mean, the majority's answer, or one right among k"
    )
    k: Whole | None = Field(None, ge=1, description="of pass_at_k: answers of which one is right; default: samples")

    stop_at: Literal["answer"] | None = Field(
        None, description="answer: nothing is written behind the first match of pattern; default: up to stop"
    )

    @model_validator(mode="after")
    def _draws_what_it_counts(self) -> "SamplingConfig":
        changed = [key for key in KEYS if getattr(self, key) != type(self).model_fields[key].default]
        if changed and self.temperature == 0:
            raise ValueError(f"{changed[0]}: greedy answers are all alike; give temperature, above 0, as well")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature: {self.temperature:g}; expected 0, which is greedy, or 0.001 to 100")
        if self.over_samples != "mean" and self.samples == 1:
            raise ValueError(f"over_samples: {self.over_samples} is of several answers; say samples, how many")
        if self.k is not None and self.k > self.samples:
            raise ValueError(f"k: {self.k}; expected at most samples, which is {self.samples}")
        return self

    def sampling(self, seed: int) -> "Sampling":
        """The sampling of a search with this seed."""
        sampler = Sampler(self.temperature, self.top_p, self.top_k) if self.temperature else None
        return Sampling(sampler, self.samples, self.over_samples, self.k or self.samples, seed)

    def stop_pattern(self, where: str, pattern: str | None) -> str | None:
        """The expression of an answer that ends an output, which is the task's `pattern`; None: no answer does. Raises
        InputError where there is no pattern to stop at."""
        if self.stop_at is not None and pattern is None:
            raise InputError(f"{where}.stop_at", "answer, which is what pattern finds; give pattern as well")
        return pattern if self.stop_at is not None else None


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, `samples` for each example, by a search's `seed`, and how they are counted. `sampler`: the
    distribution of tokens; None: they are greedy. `reduction`: the score that is the fitness; `k`: of pass_at_k."""

    sampler: Sampler | None = None
    samples: int = 1
    reduction: Reduction = "mean"
    k: int = 1
    seed: int = 0

    def metric(self, metric: str) -> str:
        """The name of the fitness of answers that are scored by a metric."""
        return metric if self.reduction == "mean" else self.reduction

    def rows(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """The prompts, one row for each answer, each example's together. A seed depends on the search's, on the file's
        name and the example's place in it, on the prompt's tokens, and on the number of the answer."""
        if self.sampler is None:
            return tuple(rows)

        def seed(row: Row, sample: int) -> int:
            place = row.where.rsplit("/", 1)[-1]
            digest = blake2b(repr((self.seed, place, row.tokens, sample)).encode(), digest_size=8).digest()
            return int.from_bytes(digest, "little")

        return tuple(replace(row, seed=seed(row, sample)) for row in rows for sample in range(self.samples))

    def reduce(
        self, scores: dict[str, np.ndarray], texts: Sequence[Sequence[str]], right: str | None, vote: Vote
    ) -> dict[str, np.ndarray]:
        """The scores of examples, float32[P, N] by metric, from those of answers, float32[P, N * samples]: each
        metric's mean, and where `right` names the metric that is 1 for a right answer and else 0, `majority` and
        `pass_at_k`."""
        if self.samples == 1:
            return scores
        by_sample = {metric: values.reshape(len(values), -1, self.samples) for metric, values in scores.items()}
        means = {metric: values.mean(axis=-1, dtype=np.float32) for metric, values in by_sample.items()}
        if right is None:
            return means
        of_majority = np.zeros_like(means[right])
        for p, n in np.ndindex(of_majority.shape):
            chosen = self.majority(n, texts[p][n * self.samples : (n + 1) * self.samples], vote)
            of_majority[p, n] = 0.0 if chosen is None else by_sample[right][p, n, chosen]
        counts = np.rint(by_sample[right].sum(axis=-1)).astype(int)
        return means | {"majority": of_majority, "pass_at_k": pass_at_k(self.samples, self.k)[counts]}

    def majority(self, example: int, outputs: Sequence[str], vote: Vote) -> int | None:
        """The number of the first output with the answer that most outputs have; of equal answers, the one that came
        first. None: no output has an answer."""
        votes = [vote(example, output) for output in outputs]
        ballots = Counter(answer for answer in votes if answer is not None)
        return votes.index(ballots.most_common(1)[0][0]) if ballots else None


GREEDY = Sampling()


def pass_at_k(samples: int, k: int) -> np.ndarray:
    """float32[samples + 1]: by the number of right answers among `samples`, the probability that one of k drawn without
    replacement is right (Chen et al., Evaluating large language models trained on code, 2021)."""
    ways = math.comb(samples, k)
    return np.array([1 - math.comb(samples - right, k) / ways for right in range(samples + 1)], np.float32)


def length_scores(lengths: Sequence[Sequence[int]], samples: int) -> np.ndarray:
    """float32[P, N]: minus the mean number of tokens of each example's answers, so that fewer are better."""
    # Subtracted from 0, since the negative of 0.0 is shown with its sign.
    return np.array([0 - np.asarray(row, np.float64).reshape(-1, samples).mean(axis=1) for row in lengths], np.float32)
