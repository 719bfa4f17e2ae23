"""Tasks whose answers people compare: `kind: human`.

A model writes an answer to each prompt. A judge sees the answers of two candidates to one prompt, and says which is
better (evojax_merge.judge); a candidate's score is its strength in the judges' votes, in logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from pydantic import Field, model_validator

from evojax_merge.schema import Location, Text, Whole
from evojax_merge.tasks.function import NO_TARGET, UserFunction, guard_user_function, load_function
from evojax_merge.tasks.language_judge import LanguageModelJudge
from evojax_merge.tasks.prompts import PromptConfig
from evojax_merge.tasks.task import Opening, Place, Responses, TaskDefaults, TaskKind, TaskRequests
from evojax_merge.tasks.templates import check_stop
from evojax_merge.tasks.text import TextTask, checked_fields, read_prompted
from evojax_merge.tasks.votes import Choice
from evojax_merge.users_traceback import WrongResultError

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
    judge_address: Text | None = Field(
        None, description="an OpenAI-compatible address, such as http://127.0.0.1:8000/v1, whose model votes"
    )
    judge_model: Text | None = Field(None, description="the name of the model at judge_address")
    target: Text = Field("{target}", description="of shown examples: a template over a record's fields")
    max_new_tokens: Whole = Field(256, ge=1, le=1_000_000, description="how many tokens a model may write")
    stop: list[Text] = Field([], max_length=100, description="texts that end what a model writes")

    @model_validator(mode="after")
    def _has_one_judge(self) -> "HumanConfig":
        if (self.judge_address is None) != (self.judge_model is None):
            raise ValueError("judge_address: goes with judge_model, the name of the model there")
        if self.judge is not None and self.judge_address is not None:
            raise ValueError("judge: a function votes, or the model at judge_address; leave one out")
        if self.judge_address is not None and not self.judge_address.startswith(("http://", "https://")):
            raise ValueError(f"judge_address: {self.judge_address!r}; expected http://… or https://…")
        return self


class Judge(Protocol):
    """Votes in place of people. `name`: the judge's, in votes; `files`: source files that it was made from."""

    @property
    def name(self) -> str: ...
    @property
    def files(self) -> tuple[Path, ...]: ...

    def choose(self, record: dict[str, Any], prompt: str, left: str, right: str) -> Choice:
        """The choice between two answers to a prompt, which was made of a record."""
        ...

    def report(self) -> str | None:
        """A line on the votes so far; None: there is nothing to say."""
        ...


@dataclass(frozen=True)
class FunctionJudge:
    """A user's function as judge."""

    function: UserFunction

    @property
    def name(self) -> str:
        return self.function.reference

    @property
    def files(self) -> tuple[Path, ...]:
        return self.function.files

    def choose(self, record: dict[str, Any], prompt: str, left: str, right: str) -> Choice:
        with guard_user_function(self.name):
            choice: Choice = self.function.call(record, left, right)
        if choice not in get_args(Choice):
            raise WrongResultError(f"{self.name} returned {choice!r}; expected one of {', '.join(get_args(Choice))}")
        return choice

    def report(self) -> str | None:
        return None


@dataclass(frozen=True)
class HumanTask(TaskDefaults):
    """A task (tasks.task) whose metric, `preference`, comes from votes on the texts. `text` makes the requests to a
    model; `records` are the examples in the file's form; `judge`: votes in place of people; None: people do;
    `judge_place`: the function's name, valid from any folder."""

    text: TextTask
    records: tuple[dict[str, Any], ...]
    question: str
    votes: int
    heldout_votes: int
    judge: Judge | None = None
    judge_place: str | None = None

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
        return self.text.paths() | ({} if self.judge_place is None else {"judge": self.judge_place})


def open_human(config: HumanConfig, opening: Opening) -> HumanTask:
    """The task on the records of one file. Raises InputError for a fault of the config, the function or the file."""
    where = opening.where
    judge: Judge | None = None
    place = None
    if config.judge is not None:
        function = load_function(f"{where}.judge", config.judge, "answers", opening.folder)
        judge, place = FunctionJudge(function), function.place
    elif config.judge_address is not None:
        judge = LanguageModelJudge(config.judge_address, str(config.judge_model), config.question)
    fields = checked_fields(where, config)
    check_stop(where, config.stop)
    # The answers are compared with each other: a scored record needs no target, and this placeholder is never read.
    data = read_prompted(config, opening, "exact_match", replace(fields, target=NO_TARGET), fields)
    text = TextTask(
        config.name, "exact_match", METRIC, config.weight, data.file, data.examples,
        max_new_tokens=config.max_new_tokens, stop=tuple(config.stop), prompts=data.prompts,
        fewshot_file=data.fewshot_file,
    )  # fmt: skip
    return HumanTask(
        text, tuple(map(dict, data.records)), config.question, config.votes, config.heldout_votes, judge, place
    )


KIND = TaskKind(HumanConfig, open_human, source="file")
