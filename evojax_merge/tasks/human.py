"""Tasks whose texts people compare: `kind: human`. A model writes an answer to each prompt (see `tasks.voting`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from evojax_merge.schema.section import Text, Whole
from evojax_merge.tasks.language_judge import LanguageModelJudge, check_address, read_key
from evojax_merge.tasks.prompts import PromptConfig
from evojax_merge.tasks.task import Opening, Responses, TaskKind
from evojax_merge.tasks.text import PromptedTask, check_texts, open_prompted
from evojax_merge.tasks.voting import METRIC, VotesConfig, Voting, voting_of


class HumanConfig(VotesConfig, PromptConfig):
    """A task whose texts people compare, or a function or a language model in their place."""

    kind: Literal["human"] = Field(description="the kind of task")
    judge_address: Text | None = Field(
        None, description="an OpenAI-compatible address, such as http://127.0.0.1:8000/v1, whose model votes"
    )
    judge_model: Text | None = Field(None, description="the name of the model at judge_address")
    judge_insecure: bool = Field(False, description="true: an http:// address of another machine may get the key")
    target: Text = Field("{target}", description="of shown examples: a template over a record's fields")
    max_new_tokens: Whole = Field(256, ge=1, le=1_000_000, description="how many tokens a model may write")
    stop: list[Text] = Field([], max_length=100, description="texts that end what a model writes")

    @model_validator(mode="after")
    def _has_one_judge(self) -> "HumanConfig":
        if (self.judge_address is None) != (self.judge_model is None):
            raise ValueError("judge_address: goes with judge_model, the name of the model there")
        if self.judge is not None and self.judge_address is not None:
            raise ValueError("judge: a function votes, or the model at judge_address; leave one out")
        if self.judge_address is not None:
            try:
                check_address(self.judge_address, self.judge_insecure)
            except ValueError as error:
                raise ValueError(f"judge_address: {error}") from None
        return self


@dataclass(frozen=True, kw_only=True)
class HumanTask(PromptedTask):
    """A task (tasks.task) whose metric, `preference`, comes from votes on the texts."""

    voting: Voting

    shows_pictures = False

    @property
    def files(self) -> tuple[Path, ...]:
        return (*super().files, *self.voting.files)

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        """Zeros: votes are asked for once the texts of all candidates are there (see judge.evaluation)."""
        return {METRIC: np.zeros((len(responses.texts), self.size), np.float32)}

    def record(self, example: int) -> dict[str, Any]:
        return dict(self.records[example])

    def content(self, answer: str) -> str:
        return answer

    def picture(self, name: str) -> None:
        return None

    def paths(self) -> dict[str, str]:
        return super().paths() | self.voting.paths


def open_human(config: HumanConfig, opening: Opening) -> HumanTask:
    """The task on the records of one file. Raises InputError for a fault of the config, the function or the file."""
    where, address = opening.where, config.judge_address
    if address is not None:
        read_key()
    model = None if address is None else LanguageModelJudge(address, str(config.judge_model), config.question)
    voting = voting_of(config, opening, model)
    check_texts(where, config)
    return open_prompted(HumanTask, config, opening, "exact_match", METRIC, has_targets=False, voting=voting)


KIND = TaskKind(HumanConfig, open_human, source="file")
