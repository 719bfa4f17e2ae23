"""Tasks whose answers judges compare: what a config says about votes, and judges that are no people.

A judge sees the answers of two candidates to one example, and says which is better (evojax_merge.judge); a candidate's
score is its strength in the judges' votes, in logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args, runtime_checkable

from pydantic import Field

from evojax_merge.schema.section import Form, Location, Name, Real, Text, Whole
from evojax_merge.system.users_traceback import WrongResultError
from evojax_merge.tasks.function import UserFunction, guard_user_function, load_function
from evojax_merge.tasks.task import Opening, ScoredTask, TaskConfig

METRIC = "preference"
# The choices that a judge of two answers has.
Choice = Literal["left", "right", "tie", "both_bad"]
# The same choice where the answers change sides.
SWAPPED: dict[Choice, Choice] = {"left": "right", "right": "left", "tie": "tie", "both_bad": "both_bad"}
Weight = Annotated[Real, Field(ge=0.0, le=1000.0)]


class VotesConfig(TaskConfig):
    """The keys of tasks whose answers people compare, or a function in their place."""

    question: Text = Field("Which answer is better?", description="what a judge is asked about two answers")
    votes: Whole = Field(150, ge=1, le=1_000_000, description="how many votes the generations may ask for")
    heldout_votes: Whole = Field(
        10, ge=1, le=100_000, description="at the end: on how many held-out prompts the winner meets each other model"
    )
    bout: Whole = Field(
        1, ge=1, le=100, description="on how many prompts in a row two candidates meet; 1: each vote has its own pair"
    )
    judges: Annotated[dict[Name, Weight], Form("names of judges, each with a number from 0 to 1,000")] = Field(
        {}, description="how much a judge's votes count, by the judge's name; 1 where it is not listed"
    )
    judge: Location | None = Field(
        None, description="path/to/file.py:name, which votes in place of people: (record, left, right) -> the choice"
    )


class Judge(Protocol):
    """Votes in place of people. `name`: the judge's, in votes; `files`: source files that it was made from."""

    @property
    def name(self) -> str: ...
    @property
    def files(self) -> tuple[Path, ...]: ...

    def choose(self, record: dict[str, Any], prompt: str, left: Any, right: Any) -> Choice:
        """The choice between two answers to a prompt, which was made of a record."""

    def report(self) -> str | None:
        """A line on the votes so far; None: there is nothing to say."""


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

    def choose(self, record: dict[str, Any], prompt: str, left: Any, right: Any) -> Choice:
        with guard_user_function(self.name):
            choice: Choice = self.function.call(record, left, right)
        if choice not in get_args(Choice):
            raise WrongResultError(f"{self.name} returned {choice!r}; expected one of {', '.join(get_args(Choice))}")
        return choice

    def report(self) -> str | None:
        return None


@dataclass(frozen=True)
class Voting:
    """How a task's answers are voted on. judge: None: people vote; judge_place: its name, valid from any folder."""

    config: VotesConfig
    judge: Judge | None = None
    judge_place: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return () if self.judge is None else self.judge.files

    @property
    def paths(self) -> dict[str, str]:
        return {} if self.judge_place is None else {"judge": self.judge_place}


@runtime_checkable
class JudgedTask(ScoredTask, Protocol):
    """A task whose answers are compared. An answer is a text, or the name of a picture (`shows_pictures`)."""

    @property
    def voting(self) -> Voting: ...
    @property
    def shows_pictures(self) -> bool: ...

    def subset(self, examples: Sequence[int]) -> "JudgedTask": ...

    def prompt(self, example: int) -> str:
        """The prompt of an example, as a judge reads it; empty: there is none."""

    def record(self, example: int) -> dict[str, Any]:
        """The example in the file's form."""

    def content(self, answer: str) -> Any:
        """An answer as functions see it: the text, or the picture's pixels, float32[H, W, C] from 0 to 1."""

    def picture(self, name: str) -> bytes | None:
        """A picture that was drawn, as a PNG; None: none has the name."""


def voting_of(config: VotesConfig, opening: Opening, judge: Judge | None = None) -> Voting:
    """The voting of a config. judge: where it names no function. Raises InputError for a fault of the function."""
    place = None
    if config.judge is not None:
        function = load_function(f"{opening.where}.judge", config.judge, "answers", opening.folder)
        judge, place = FunctionJudge(function), function.place
    return Voting(config, judge, place)
