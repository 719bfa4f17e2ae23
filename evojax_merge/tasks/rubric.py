"""Tasks whose texts a model judges: `kind: rubric`.

A candidate writes an answer to each prompt. Another model, the judge, reads a rubric with that answer, and the score is
the logarithm of the odds that it goes on with "yes" rather than "no". The judge runs in this process, on the answers of
all candidates of a generation at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from evojax_merge.errors import Failed, InputError
from evojax_merge.schema.section import Location, Text, Whole
from evojax_merge.tasks.prompts import PromptConfig, Prompts
from evojax_merge.tasks.task import Opening, Responses, TaskKind
from evojax_merge.tasks.templates import check_template, fill, named_fields
from evojax_merge.tasks.text import Example, PromptedTask, TextTask, check_texts, open_prompted

METRIC = "log_odds"
# The field of a rubric that has the candidate's text.
RESPONSE = "response"
# A task of multiple choice -> each example's margin, float[N], by a stored model.
Margins = Callable[[TextTask], np.ndarray]
# (key of the config, reference to a model, the config's folder) -> the model's folder, and its margins.
OpenJudge = Callable[[str, str, Path], tuple[Path, Margins]]
_judges: list[OpenJudge] = []


def provide_judges(open_judge: OpenJudge) -> None:
    """Say how models are opened: tasks know none."""
    _judges[:] = [open_judge]


class RubricConfig(PromptConfig):
    """A task whose texts a model in this process judges by a rubric."""

    kind: Literal["rubric"] = Field(description="the kind of task")
    judge: Location = Field(description="the model that judges: a folder, zoo:NAME or a hub id")
    rubric: Text = Field(description="what the judge reads: a template over a record's fields and {response}")
    good: Text = Field(" yes", description="what the judge goes on with where a response is good")
    bad: Text = Field(" no", description="what it goes on with where a response is bad")
    judge_chat_template: bool = Field(False, description="true: the rubric goes through the judge's chat template")
    target: Text = Field("{target}", description="of shown examples: a template over a record's fields")
    max_new_tokens: Whole = Field(256, ge=1, le=1_000_000, description="how many tokens a candidate may write")
    stop: list[Text] = Field([], max_length=100, description="texts that end what a candidate writes")

    @model_validator(mode="after")
    def _has_two_verdicts(self) -> "RubricConfig":
        if not self.good.strip() or not self.bad.strip() or self.good == self.bad:
            raise ValueError("good, bad: expected two different texts")
        return self


@dataclass(frozen=True)
class RubricJudge:
    """A judge and its rubric. folder: the model's; where: the section of the config."""

    folder: Path
    margins: Margins
    rubric: str
    verdicts: tuple[str, str]
    prompts: Prompts
    where: str

    def log_odds(self, asked: Sequence[tuple[dict[str, Any], str]]) -> np.ndarray:
        """float32[M]: the logarithm of the odds of yes for M records with a response each."""
        texts = [fill(self.where, "rubric", self.rubric, record | {RESPONSE: text}) for record, text in asked]
        examples = tuple(Example(text, self.verdicts, 0, 0, where=f"{self.where}: a response") for text in texts)
        task = TextTask("rubric", "multiple_choice", "margin", 1.0, self.where, examples, prompts=self.prompts)
        return self.margins(task).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class RubricTask(PromptedTask):
    """A task (tasks.task) whose metric, `log_odds`, is a judge's verdict."""

    units: ClassVar[Mapping[str, str]] = {METRIC: "log-odds of the good verdict"}

    judge: RubricJudge

    @cached_property
    def files(self) -> tuple[Path, ...]:
        return (*super().files, *sorted(file for file in self.judge.folder.iterdir() if file.is_file()))

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        # Candidates often agree: each distinct response is judged once.
        asked = list(dict.fromkeys((n, text) for texts in responses.texts for n, text in enumerate(texts)))
        values = self.judge.log_odds([(self.records[n], text) for n, text in asked])
        verdicts = dict(zip(asked, values, strict=True))
        scores = [[verdicts[n, text] for n, text in enumerate(texts)] for texts in responses.texts]
        return {METRIC: np.array(scores, np.float32).reshape(-1, self.size)}

    def paths(self) -> dict[str, str]:
        return super().paths() | {"judge": str(self.judge.folder)}

    def failure_hint(self) -> str:
        return f"Look at the judge of task {self.name}: its logits may not be finite"


def open_rubric(config: RubricConfig, opening: Opening) -> RubricTask:
    """The task on the records of one file. Raises InputError for a fault of the config, the judge or the file."""
    where = opening.where
    check_texts(where, config)
    check_template(f"{where}.rubric", config.rubric)
    if RESPONSE not in named_fields(config.rubric):
        raise InputError(f"{where}.rubric", f"does not name {{{RESPONSE}}}, the text that is judged")
    if not _judges:
        raise Failed(f"{where}: this program opens no models")
    folder, margins = _judges[0](f"{where}.judge", config.judge, opening.folder)
    prompts = Prompts(where, template=config.judge_chat_template)
    judge = RubricJudge(folder, margins, config.rubric, (config.good, config.bad), prompts, where)
    task = open_prompted(RubricTask, config, opening, "exact_match", METRIC, has_targets=False, judge=judge)
    fill(where, "rubric", config.rubric, task.records[0] | {RESPONSE: ""})
    return task


KIND = TaskKind(RubricConfig, open_rubric, source="file")
