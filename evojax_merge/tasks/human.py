"""Tasks whose answers people compare: `kind: human`.

A model writes an answer to each prompt. A judge sees the answers of two candidates to one prompt, and says which is
better (evojax_merge.judge); a candidate's score is its strength in the judges' votes, in logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from evojax_merge.schema import Location, Text, Whole
from evojax_merge.tasks.function import NO_TARGET, UserFunction, load_function
from evojax_merge.tasks.prompts import PromptConfig
from evojax_merge.tasks.task import Opening, Place, Responses, TaskDefaults, TaskKind, TaskRequests
from evojax_merge.tasks.templates import check_stop
from evojax_merge.tasks.text import TextTask, checked_fields, read_prompted

METRIC = "preference"


class HumanConfig(PromptConfig):
    """A task whose answers people compare, or a function in their place."""

    kind: Literal["human"] = Field(description="the kind of task")
    question: Text = Field("Which answer is better?", description="what a judge is asked about two answers")
    votes: Whole = Field(150, ge=1, le=1_000_000, description="how many votes the generations may ask for")
    heldout_votes: Whole = Field(
        10, ge=1, le=100_000, description="at the end: on how many held-out prompts the winner meets each other model"
    )
    judge: Location | None = Field(
        None, description="path/to/file.py:name, which votes in place of people: (record, left, right) -> the choice"
    )
    target: Text = Field("{target}", description="of shown examples: a template over a record's fields")
    max_new_tokens: Whole = Field(256, ge=1, le=1_000_000, description="how many tokens a model may write")
    stop: list[Text] = Field([], max_length=100, description="texts that end what a model writes")


@dataclass(frozen=True)
class HumanTask(TaskDefaults):
    """A task (tasks.task) whose metric, `preference`, comes from votes on the texts. `text` makes the requests to a
    model; `records` are the examples in the file's form; `judge`: votes in place of people; None: people do."""

    text: TextTask
    records: tuple[dict[str, Any], ...]
    question: str
    votes: int
    heldout_votes: int
    judge: UserFunction | None = None

    @property
    def name(self) -> str:
        return self.text.name

    @property
    def metric(self) -> str:
        return METRIC

    @property
    def weight(self) -> float:
        return self.text.weight

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.text.files, *(() if self.judge is None else self.judge.files))

    @property
    def size(self) -> int:
        return self.text.size

    def subset(self, examples: Sequence[int]) -> "HumanTask":
        return replace(self, text=self.text.subset(examples), records=tuple(self.records[i] for i in examples))

    def requests(self, tokenizer: Any, context: int) -> TaskRequests:
        return self.text.requests(tokenizer, context)

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        """Zeros: votes are asked for once the texts of all candidates are there (see judge.evaluation)."""
        return {METRIC: np.zeros((len(responses.texts), self.size), np.float32)}

    def prompt(self, example: int) -> str:
        """The prompt of an example, as a judge reads it."""
        shown = self.text.examples[example]
        turns = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in shown.turns)
        return turns or shown.prompt

    def contents(self) -> Sequence[tuple[Any, Place]]:
        return self.text.contents()

    def paths(self) -> dict[str, str]:
        return self.text.paths() | ({} if self.judge is None else {"judge": self.judge.place})


def open_human(config: HumanConfig, opening: Opening) -> HumanTask:
    """The task on the records of one file. Raises InputError for a fault of the config, the function or the file."""
    where = opening.where
    judge = None
    if config.judge is not None:
        judge = load_function(f"{where}.judge", config.judge, "answers", opening.folder)
    fields = checked_fields(where, config)
    check_stop(where, config.stop)
    # The answers are compared with each other: a scored record needs no target, and this placeholder is never read.
    data = read_prompted(config, opening, "exact_match", replace(fields, target=NO_TARGET), fields)
    text = TextTask(
        config.name, "exact_match", METRIC, config.weight, data.file, data.examples,
        max_new_tokens=config.max_new_tokens, stop=tuple(config.stop), prompts=data.prompts,
        fewshot_file=data.fewshot_file,
    )  # fmt: skip
    return HumanTask(text, tuple(map(dict, data.records)), config.question, config.votes, config.heldout_votes, judge)


KIND = TaskKind(HumanConfig, open_human, source="file")
