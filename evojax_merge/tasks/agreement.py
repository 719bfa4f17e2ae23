"""Tasks without labels: `kind: agreement`, how little a model's answers change where its genes change a little.

A candidate's score on a prompt is the share of its neighbours that give the same answer. Du et al. (AdaMMS,
https://arxiv.org/abs/2503.23733) choose so among merges along one weight: the one whose answers differ least from those
of its two neighbours. Neighbours are merges of their own, which `search.genomes` makes and scores beside the candidate;
a stored model has none, and no score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from evojax_merge.schema.section import Form, Real, Text, Whole
from evojax_merge.tasks.answers import extract_answer
from evojax_merge.tasks.entropy import Choices, EntropyTask, with_choices
from evojax_merge.tasks.networks import NEGATIVE_ENTROPY
from evojax_merge.tasks.patterns import check_pattern
from evojax_merge.tasks.prompts import PromptConfig
from evojax_merge.tasks.task import Opening, Responses, TaskKind
from evojax_merge.tasks.text import PromptedTask, check_texts, open_prompted

AGREEMENT = "agreement"


class AgreementConfig(PromptConfig):
    """A task without labels: how many of a candidate's neighbours give the same answer to a prompt."""

    optional: ClassVar = (*PromptConfig.optional, "choices", "pattern", "step", "neighbours")

    kind: Literal["agreement"] = Field(description="the kind of task")
    choices: Choices | None = Field(
        None, description="the answers, or the field that lists them; default: what a model writes"
    )
    pattern: Text | None = Field(
        None, description="a regular expression, whose last match in an output is its answer; default: the whole output"
    )
    max_new_tokens: Whole = Field(256, ge=1, le=1_000_000, description="how many tokens a model may write")
    stop: list[Text] = Field([], max_length=100, description="texts that end what a model writes")
    step: Annotated[Real, Form("a number above 0, at most 1")] = Field(
        0.05, gt=0.0, le=1.0, description="how far each gene of a neighbour is from the candidate's; 1: its whole range"
    )
    neighbours: Whole = Field(
        2, ge=2, le=64, multiple_of=2, description="how many neighbours a candidate has; they are scored as it is"
    )
    target: Text = Field("{target}", description="of shown examples: a template over a record's fields")

    @model_validator(mode="after")
    def _looks_into_outputs_alone(self) -> "AgreementConfig":
        if self.choices is not None and self.pattern is not None:
            raise ValueError("pattern: is looked for in what a model writes; leave it or choices out")
        if self.guard:
            raise ValueError("guard: the base has no neighbours that it could agree with; leave it out")
        return self


@dataclass(frozen=True, kw_only=True)
class AgreementTask(PromptedTask):
    """A task (tasks.task) of prompts on which a candidate and its neighbours should agree: on the likeliest of an
    example's choices (`kind: multiple_choice`), or on what they write, or its last match of `pattern`."""

    units: ClassVar[Mapping[str, str]] = {AGREEMENT: "share of neighbours"}

    neighbours: int
    step: float
    pattern: str | None = None

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        """NaN: a model without neighbours agrees with none."""
        return {AGREEMENT: np.full((len(responses.totals), self.size), np.nan, np.float32)}

    def answers(self, outputs: Sequence[Sequence[str]], totals: np.ndarray) -> np.ndarray:
        """float32[P, N]: a number for each candidate's answer, below 2^24, the same for the same answer. totals:
        float32[P, S], the log-probabilities of the choices."""
        if self.kind == "multiple_choice":
            ends = np.cumsum([len(example.targets) for example in self.examples])[:-1]
            likeliest = [part.argmax(axis=1) for part in np.split(totals, ends, axis=1)]
            return np.stack(likeliest, axis=1).astype(np.float32)
        return np.array([[_number(self._answer(text)) for text in texts] for texts in outputs], np.float32)

    def extracted(self, example: int, outputs: Sequence[str]) -> str | None:
        return self._answer(outputs[0]) if outputs else None

    def companion(self) -> EntropyTask | None:
        """The entropy of the choices: neighbours of a model that is sure choose as it does."""
        if self.kind != "multiple_choice":
            return None
        kept = ("name", "kind", "weight", "file", "examples", "prompts", "fewshot_file", "data_files", "records")
        return EntropyTask(**{key: getattr(self, key) for key in kept}, metric=NEGATIVE_ENTROPY)

    def target(self, example: int) -> None:
        return None

    def _answer(self, output: str) -> str | None:
        return output.strip() if self.pattern is None else extract_answer(output, self.pattern, f"task {self.name}")


def _number(answer: str | None) -> int:
    """24 bits of the answer's hash; outputs without one differ from all others."""
    return int.from_bytes(blake2b(repr(answer).encode("utf-8", "surrogatepass"), digest_size=3).digest())


def open_agreement(config: AgreementConfig, opening: Opening) -> AgreementTask:
    """The task on the records of one file. Raises InputError for a file or config that does not fit."""
    check_texts(opening.where, config, {"prompt": True})
    if config.pattern is not None:
        check_pattern(opening.where, config.pattern, config.max_new_tokens)
    task: Any = open_prompted(
        AgreementTask, config, opening, "exact_match", AGREEMENT, has_targets=False, neighbours=config.neighbours,
        step=config.step, pattern=config.pattern,
    )  # fmt: skip
    return task if config.choices is None else with_choices(task, config.choices)


KIND = TaskKind(AgreementConfig, open_agreement, source="file")
