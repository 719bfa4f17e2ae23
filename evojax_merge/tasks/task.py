"""Tasks: their requests to a model, and the scoring of its answers.

A task is a frozen dataclass with the members of `Task`; it may inherit those of `TaskDefaults`. It turns its examples
into rows of tokens once for a whole run, the evaluator answers them for every candidate, and the task reduces the
answers to scores per example, of which higher is better. A *kind* of task (`TaskKind`) makes a task of a section of a
YAML.
"""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, cast, get_args

import jax
import numpy as np
from pydantic import Field, model_validator

from evojax_merge.errors import InputError
from evojax_merge.models.sampling import Sampler
from evojax_merge.schema.section import Heldout, Name, Real, Section, Whole
from evojax_merge.tasks.patterns import answer_end
from evojax_merge.tasks.records import Source, is_file_name, read_source

# (logits float32[Q, V], targets int32[Q], mask bool[Q]) -> a number: a traced function's score of a row.
LogitsFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Row:
    """Tokens, of which those from `start` on are scored (for a prompt: generated); a negative one stands for row
    `~token` of the features of images, and is never scored. `example`: the number of the task's example that it
    belongs to; rows of one example may share their beginning. `where` names it in messages. `seed`: of 64 bits, for the
    draws of a continuation that is sampled."""

    tokens: tuple[int, ...]
    start: int
    where: str
    example: int
    seed: int = 0


@dataclass(frozen=True)
class TaskRequests:
    """A task's requests: rows whose targets are scored, and prompts that are continued by at most `max_new_tokens`
    tokens, or up to the first of the texts `stop`; expected_tokens: how many of these an answer is likely to take,
    which plans go by. `logits_fn`: reduces a scored row's logits to a number; None: the targets' total log-probability.
    `sampler`: the distribution of generated tokens; None: they are greedy. `counts_tokens`: true where the task scores
    the continuations' lengths. `answer`: a regular expression, behind whose first match a continuation ends, too; None:
    none does."""

    scored: tuple[Row, ...] = ()
    prompts: tuple[Row, ...] = ()
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    logits_fn: LogitsFn | None = None
    expected_tokens: int | None = None
    sampler: Sampler | None = None
    counts_tokens: bool = False
    answer: str | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """The scored rows, then the prompts."""
        return self.scored + self.prompts

    @property
    def generated(self) -> tuple[Any, ...]:
        """Tasks for which this is equal, such as the accuracy and the length of one answer, share continuations."""
        return self.prompts, self.max_new_tokens, self.stop, self.sampler, self.answer

    @property
    def ends_early(self) -> bool:
        """Whether the host looks into a continuation for its end."""
        return bool(self.stop) or self.answer is not None

    def cut(self, text: str) -> str:
        """A continuation up to the first of the stop texts, or the end of the answer, whichever comes first."""
        ends = [position for word in self.stop if (position := text.find(word)) >= 0]
        if self.answer is not None and (end := answer_end("tasks", self.answer, text)) is not None:
            ends.append(end)
        return text[: min(ends)] if ends else text

    def subset(self, examples: Sequence[int]) -> "TaskRequests":
        """The requests for some of the examples, ascending: `examples[i]` becomes example i."""
        places = {example: place for place, example in enumerate(examples)}

        def rows_of(rows: tuple[Row, ...]) -> tuple[Row, ...]:
            return tuple(replace(row, example=places[row.example]) for row in rows if row.example in places)

        return replace(self, scored=rows_of(self.scored), prompts=rows_of(self.prompts))

    def unanswered(self, size: int) -> "Responses":
        """The responses of `size` candidates, in which passes enter their results."""
        counts = np.array([len(row.tokens) - row.start for row in self.scored])
        shape = (size, len(counts))
        return Responses(np.zeros(shape, np.float32), counts, np.zeros(shape, bool), [[]] * size)


@dataclass(frozen=True)
class Responses:
    """The responses of P candidates, in the order of `TaskRequests`. totals: float32[P, S], the scored rows' total
    log-probabilities; counts: int[S], the number of targets of each; greedy: bool[P, S], true where the targets are the
    greedy tokens; texts: P lists of continuations, cut at their ends; lengths: P lists of the numbers of
    tokens generated for them, up to the one that shows the end, where the task counts tokens."""

    totals: np.ndarray
    counts: np.ndarray
    greedy: np.ndarray
    texts: list[list[str]]
    lengths: list[list[int]] = field(default_factory=list)


# The dependence of a score on total log-probabilities: linear, or not.
Derivative = Literal["linear", "nonlinear"]


class ScoredTask(Protocol):
    """The part of a task that fitness depends on: `metric`, the metric that is its score; `weight`, its weight in the
    fitness; `size`, the number of its examples."""

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def size(self) -> int: ...


class SplittableTask(ScoredTask, Protocol):
    def subset(self, examples: Sequence[int]) -> Any:
        """The same task on some of its examples."""


class TaskDefaults(Protocol):
    """Members of `Task` with the defaults that a kind inherits where it has no use for them."""

    # The fields of the dataclass that have an entry for each example; all but the first may be empty.
    by_example: ClassVar[tuple[str, ...]] = ()

    @property
    def units(self) -> Mapping[str, str]:
        """The unit of each metric that has one, in the words of tables, without a metric's filter (`acc,none`)."""
        return {}

    @property
    def size(self) -> int:
        """The number of examples."""
        return len(getattr(self, self.by_example[0]))

    def subset(self, examples: Sequence[int]) -> Self:
        """The same task on some of its examples."""
        fields = ((name, getattr(self, name)) for name in self.by_example)
        chosen = {name: tuple(values[i] for i in examples) if values else () for name, values in fields}
        changed: Self = replace(cast(Any, self), **chosen)
        return changed

    @property
    def is_divisible(self) -> bool:
        """Return whether the examples can be divided among splits; otherwise every split has the whole task."""
        return True

    @property
    def derivative(self) -> Derivative | None:
        """The dependence of an example's score on its rows' total log-probabilities; None: it is not differentiable."""
        return None

    def score_gradient(self, responses: Responses) -> np.ndarray:
        """float32[P, S]: the derivative of each scored row's example's score with respect to the row's total. A linear
        derivative depends on `responses.counts` alone. The task must have a derivative."""
        raise TypeError(f"{type(self).__name__} has no derivative")

    def companion(self) -> "Task | None":
        """A task with a derivative on the same examples, whose score grows with this one's; None: there is none."""
        return None

    def extraction_failure(self, texts: Sequence[str]) -> str | None:
        """The expression that scoring looks for, if no output contains it; else None."""
        return None

    def prompt(self, example: int) -> str | None:
        """An example's question, in the words of the data; None: it is none of words."""
        return None

    def target(self, example: int) -> str | None:
        """The right answer to an example, in the words of the data; None: the data have none."""
        return None

    def image(self, example: int) -> Any:
        """An example's image, one of Pillow's; None: it has none. Raises InputError where it cannot be read."""
        return None

    def extracted(self, example: int, outputs: Sequence[str]) -> str | None:
        """The answer that scoring finds in the outputs for an example; None: none, or it looks for none."""
        return None

    def contents(self) -> Sequence[tuple[Hashable, "Place"]]:
        """Each example's content, by which equal ones are recognised, and its place. Empty: it does not know them."""
        return ()

    def paths(self) -> dict[str, str]:
        """Keys of the config that name files or folders -> their absolute paths. The file of the examples is under the
        kind's `source`, also where `heldout` named it."""
        return {}

    def failure_hint(self) -> str | None:
        """Advice for scores that are not finite for every candidate; None: the task is not the cause."""
        return None


class Task(TaskDefaults, ScoredTask, Protocol):
    """A named task of N examples of one split. `metric`: the score that is its fitness; `weight`: its share in the
    fitness of the whole, 0 for a task that is only shown; `files`: the input files that it was made from."""

    @property
    def files(self) -> tuple[Path, ...]: ...

    def requests(self, tokenizer: Any, context: int) -> TaskRequests:
        """The requests to a model of `context` tokens. Raises InputError for an example that cannot be asked."""

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        """Metric -> float32[P, N]."""


def about_backend(task: Any, lacking: str) -> str:
    """The reason why a task asks no language model: its kind is for another backend, or it has no member `lacking`."""
    kind, backend = getattr(task, "kind", None), getattr(task, "backend", None)
    if kind is None or backend is None:
        return f"a {type(task).__name__} asks no language model (it has no {lacking})"
    return f"tasks of kind: {kind} are for backend: {backend}"


# The unit of metrics of several kinds.
SHARE_RIGHT = "share right"


# A file, and a line of it; 0 where there are none.
Place = tuple[str, int]


# The weight of a guarded task whose section has weight 0: every generation is scored on such a task, and it adds
# nothing to a sum of float64.
GUARD_WEIGHT = 1e-300

# ---------------------------------------------------------------------------------------------------------------
# Kinds of tasks


class TaskConfig(Section):
    """The keys of every kind of task."""

    name: Name = Field(description="what the task is called in tables")
    heldout: Heldout = Field(
        0.2, description="the share of the examples that the search never sees, or their own source"
    )
    weight: Real = Field(
        1.0, ge=0.0, le=1e9, description="how much the task counts in the fitness; 0: it is only shown"
    )
    limit: Whole | None = Field(
        None,
        ge=1,
        description="on how many examples generations are scored; default: all, on which finalists always are",
    )
    guard: bool = Field(False, description="whether no candidate may score below the base, whatever the weight")
    tolerance: Real = Field(0.0, ge=0.0, le=1e9, description="by how much a guarded score may be below the base's")

    @model_validator(mode="after")
    def _tolerates_with_a_guard(self) -> "TaskConfig":
        if self.tolerance and not self.guard:
            raise ValueError("tolerance: is that of a guard; give guard: true as well, or leave it out")
        return self

    @property
    def heldout_source(self) -> str | None:
        """The second source of examples, all of them held out; None: a share of the only source is."""
        return self.heldout if isinstance(self.heldout, str) else None


# The description of the key `images`.
IMAGES = "the folder in which records name their files; default: the data file's"
# (where, reference, folder) -> the existing file that `reference` names, looked for from `folder` on.
FindFile = Callable[[str, str, Path], Path]


def local_file(where: str, reference: str, folder: Path) -> Path:
    """A file by its path. Raises InputError, with the key `where`, if there is none."""
    paths = (Path(os.path.expanduser(reference)), folder / reference)
    for path in paths:
        # The path's own methods raise for a name that no file can have, and for a user that does not exist.
        if os.path.exists(path):
            return path.resolve()
    record = next((f"{path}.dvc" for path in paths if os.path.exists(f"{path}.dvc")), None)
    advice = "" if record is None else f"; DVC tracks it: run `dvc pull {record}`"
    raise InputError(where, f"{reference}: no such file{advice}")


@dataclass(frozen=True)
class Opening:
    """The arguments, beside its config, that a task is opened with. `where` names it in messages (`config.yaml:
    tasks[0]`); relative paths start in `folder`; `seed` is the search's, for examples that are drawn at random.
    `heldout`: the second source of examples, if that one is opened; None: the first. `find_file` finds files."""

    where: str
    folder: Path
    seed: int = 0
    heldout: str | None = None
    find_file: FindFile = local_file

    def file(self, key: str, reference: str) -> Path:
        """The file that a key of the config names."""
        return self.find_file(f"{self.where}.{key}", reference, self.folder)

    def images(self, named: str | None, default: Path) -> Path:
        """The folder in which records name files: the one that the config's `images` names, or the default."""
        folder = default if named is None else (self.folder / os.path.expanduser(named)).resolve()
        if not folder.is_dir():
            raise InputError(f"{self.where}.images", f"{named}: is no folder; expected one in which records name files")
        return folder

    def read(self, key: str, reference: str) -> Source:
        """The records of a file that a key of the config names, or of a source such as `hub:owner/dataset`."""
        return read_source(self.file(key, reference) if is_file_name(reference) else reference)

    def source(self, key: str, reference: str) -> tuple[str, str]:
        """The key that names the examples, and their source: `reference` of the config's `key`, or the second one."""
        return (key, reference) if self.heldout is None else ("heldout", self.heldout)


@dataclass(frozen=True)
class TestSet:
    """Examples that models are compared by. `name`: their name; `instead`: examples to search on instead; `meant`:
    whether the config says that a search may see them."""

    __test__ = False  # Not for pytest, which collects classes of such names.

    name: str
    instead: str
    meant: bool


@dataclass(frozen=True)
class TaskKind:
    """A kind of task: makes a task of a section under `tasks:`.

    `config`: the section's schema. The names of the kind are the values of its field `kind`, a Literal; or the kind has
    no such field, and is recognised by its `key`, which no other kind has. `open`: (config, opening) -> the task on all
    examples of one source. `source`: the key whose place `heldout` takes if it names a second source; None: `heldout`
    can only be a share. `test_set`: config -> the test set that a search with it would see, if any.
    """

    config: type[TaskConfig]
    open: Callable[[Any, Opening], Any]
    source: str | None = None
    key: str | None = None
    test_set: Callable[[Any], TestSet | None] = lambda config: None

    @property
    def names(self) -> tuple[str, ...]:
        field = self.config.model_fields.get("kind")
        return () if field is None else get_args(field.annotation)


# ---------------------------------------------------------------------------------------------------------------
# Tokens and texts


def token_ids(tokenizer: Any, text: str, **options: bool) -> list[int]:
    """The tokens of a text. Raises InputError where the tokenizer fails: it may lack a token for unknown words."""
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(tokenizer.name_or_path, f"its tokenizer fails on {text[:80]!r} ({reason})") from None


def brevity(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """float32[P, N]: minus the number of characters of P lists of N outputs, so that the shorter one is better."""
    return np.array([[-len(text) for text in row] for row in texts], np.float32).reshape(len(texts), -1)
