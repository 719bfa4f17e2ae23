"""The files of a run folder as they are read: a schema for each, with limits, because the run may be a stranger's.

Files of earlier versions fit: a key that came later may be missing, and further keys are allowed. A line, or a file,
with a value that no search writes cannot be read, as one that is damaged.
"""

import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from evojax_merge.config.search_config import MAX_GENERATIONS
from evojax_merge.errors import InputError
from evojax_merge.schema.section import FLOAT32_MAX
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.system.regular_file import check_regular, read_regular

# The most bytes of a file of lines, of one of its lines, and of any other file.
MAX_FILE, MAX_LINE, MAX_DOCUMENT = 4 * 2**30, 2**26, 2**26
# The name of a file in messages.
A_FILE = "a file of a run"
# The largest number: sums of some are still finite.
MAX_NUMBER = 1e300
# The values of keys that lines of histories of earlier versions lack.
MISSING: dict[str, Any] = {
    "best": None, "mean": None, "best_so_far": None, "evaluations": 0, "failed": 0, "scores_of_best": {},
    "task_scores": {},
}  # fmt: skip
# The key of config.yaml for the labels of the groups of tensors of models that are no language models, in the genome's
# order: the names of searched parameters need no other file.
GROUPS = "groups"
# The most layers of a model, members that a winner descends from, and models of the held-out table: a search has at
# most a thousand parents.
MAX_LAYERS, MAX_MEMBERS, MAX_ROWS = 100_000, 100_000, 2_000


def _bounded(value: float) -> float:
    """Raises ValueError for a finite number of more than MAX_NUMBER."""
    if math.isfinite(value) and abs(value) > MAX_NUMBER:
        raise ValueError(f"Input should be a number of at most {MAX_NUMBER:g}")
    return value


Count = Annotated[int, Field(ge=0, le=10**15)]
Number = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER, allow_inf_nan=False)]
Float32 = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX, allow_inf_nan=False)]
# Python's JSON holds NaN and infinity, which the held-out scores of a model may be.
Score = Annotated[float, AfterValidator(_bounded)]
Interval = Annotated[list[Score], Field(min_length=2, max_length=2)]
# A small JPEG, which a page shows.
Thumbnail = Annotated[str, Field(max_length=2**16, pattern=r"^data:image/jpeg;base64,[A-Za-z0-9+/=]+$")]
Scalar = str | Annotated[int, Field(ge=-(10**15), le=10**15)] | Number | bool | None
Fact = Scalar | list[Scalar] | dict[str, Scalar]


class Stored(BaseModel):
    """A file, a line, or a part of them. Values have their own types: a text is no number."""

    model_config = ConfigDict(strict=True)


Kind = TypeVar("Kind", bound=Stored)


# ---------------------------------------------------------------------------------------------------------------
# Lines


class Look(Stored):
    """A generation's scores on the validation split."""

    best_so_far: Number | None = None
    standard_error: Number | None = None
    finalists: list[Number | None] = []


class HistoryLine(Stored):
    """A line of history.jsonl. Further numbers in it are the strategy's metrics. The lists have an entry for each
    candidate; `examples` is empty in a run of an earlier version."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Fact]

    generation: Count
    best: Number | None = None
    mean: Number | None = None
    worst: Number | None = None
    best_so_far: Number | None = None
    evaluations: Count = 0
    failed: Count = 0
    scores_of_best: dict[str, Number | None] = {}
    fitness: list[Number | None]
    examples: list[Count] = []
    task_scores: dict[str, list[Number | None]] = {}
    genomes: list[list[Float32]]
    companion: bool = False
    validation: Look = Look()

    @model_validator(mode="after")
    def _has_one_population(self) -> Self:
        counts = {len(self.genomes), *map(len, self.task_scores.values()), len(self.examples or self.fitness)}
        if counts != {len(self.fitness)}:
            raise ValueError(f"lists of {len(self.fitness)} candidates and of {max(counts - {len(self.fitness)})}")
        if len(set(map(len, self.genomes))) > 1:
            raise ValueError("genomes of several lengths")
        return self

    @property
    def dims(self) -> int | None:
        """The length of genomes; None where there is no candidate."""
        return len(self.genomes[0]) if self.genomes else None


class TimingLine(Stored):
    """A line of timing.jsonl."""

    generation: Count
    # None in a run of an earlier version.
    passes: Annotated[Number, Field(ge=0)] | None = None
    seconds: Annotated[Number, Field(ge=0)]
    validation_seconds: Annotated[Number, Field(ge=0)] = 0.0


class AnswerLine(Stored):
    """A line of heldout_answers.jsonl."""

    model: str
    task: str
    example: str | int | None = None
    image: str | None = None
    thumbnail: Thumbnail | None = None
    score: Float32 | None = None
    outputs: list[str] | None = None
    prompt: str | None = None
    target: str | None = None


# ---------------------------------------------------------------------------------------------------------------
# Documents


class Scored(Stored):
    """A model in the table of result.json. interval: of the winner's lead over it, None where it is given: too few
    examples to say; a run of an earlier version has those of the rivals alone, in `better_than`."""

    role: str
    name: str
    heldout_fitness: Score
    heldout_scores: dict[str, Score] = {}
    interval: Interval | None = None


class Rival(Stored):
    name: str
    interval: Interval | None = None


class Loss(Stored):
    """A task on which the winner is worse than a model."""

    score: str


class FrontMember(Stored):
    """A member of a front."""

    member: Count
    fitness: Score
    scores: dict[str, Score]
    heldout_fitness: Score
    heldout_scores: dict[str, Score]
    genome: list[Float32]


class Bred(Stored):
    """A member of a pool that the winner descends from, or the winner. parameters: one value for each parent, or one;
    for layers from `split` on, the second parent comes before the first."""

    name: str
    method: str
    parents: Annotated[list[str], Field(min_length=2, max_length=2)]
    parameters: dict[str, Number | Annotated[list[Number], Field(min_length=2, max_length=2)]]
    split: Annotated[Count, Field(le=MAX_LAYERS)]


class StoredPath(Stored):
    """A layer path. scales: of the layers' outputs, one after the other."""

    layers: Annotated[list[Count], Field(max_length=MAX_LAYERS)]
    scales: Annotated[list[Number], Field(max_length=MAX_LAYERS)]

    @model_validator(mode="after")
    def _has_an_inverse(self) -> Self:
        product = 1.0
        for scale in self.scales:
            product *= scale
            if not 1 / MAX_NUMBER <= abs(product) <= MAX_NUMBER:
                raise ValueError("scales: a product of them has no inverse")
        return self


class StoredFate(Stored):
    """The tensors of a model that met one fate; see `mergekit.account`."""

    fate: str
    why: str
    model: str
    count: Count
    tensors: list[str] = []


class StoredResult(Stored):
    """result.json, the document of a finished run."""

    generations: Count = 0
    table: Annotated[list[Scored], Field(max_length=MAX_ROWS)] = []
    better_than: dict[str, Rival] = {}
    worse_on: list[Loss] = []
    # Of an earlier version's run these are empty.
    tensors: list[StoredFate] = []
    shares: dict[str, Number] = {}
    units: dict[str, str] = {}
    held_out: bool = True
    chosen_on: Literal["search", "validation"] = "search"
    search_fitness: dict[str, Score] = {}
    validation_fitness: dict[str, Score] = {}
    compute_dtype: str = ""
    stopped_by: str | None = None
    kept_from: Count | None = None
    members: Annotated[list[FrontMember], Field(max_length=MAX_MEMBERS)] = []
    lineage: Annotated[list[Bred], Field(max_length=MAX_MEMBERS)] = []
    # The layers of a pool's models; 0 in a run of an earlier version.
    layers: Annotated[Count, Field(le=MAX_LAYERS)] = 0
    path: StoredPath | None = None
    groups: list[str] = []
    # Parameter -> [groups][columns]; by version 0.1 also group -> parameter -> [columns].
    parameters: dict[str, list[list[Number]] | dict[str, list[Number]]] = {}
    genome: list[Float32] = []
    # The sentences of the terminal; a run of an earlier version has none.
    sentences: list[str] = Field([], alias="verdicts")
    warnings: list[str] = []

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if len({(tuple(member.scores), tuple(member.heldout_scores)) for member in self.members}) > 1:
            raise ValueError("members: scores of several tasks")
        names = {member.name for member in self.lineage}
        for member in self.lineage:
            # Parents are founders, or stand before their children.
            if member.name not in names or names.intersection(member.parents):
                raise ValueError(f"lineage: {member.name[:80]} is bred of a later member, or of itself")
            names.remove(member.name)
        for name, table in self.parameters.items() if self.groups else ():
            if not isinstance(table, list) or (len(table) != len(self.groups) or len(set(map(len, table))) > 1):
                raise ValueError(f"parameters.{name[:80]}: not a row of one length for each of groups")
        return self

    @cached_property
    def winner(self) -> Scored | None:
        return next((scored for scored in self.table if scored.role == "winner"), None)

    def interval_over(self, scored: Scored) -> Interval | None:
        """The 95% interval of the winner's lead over a model of the table; None where there is none."""
        rival = self.better_than.get(scored.role)
        return scored.interval or (rival.interval if rival is not None and rival.name == scored.name else None)


class Environment(Stored):
    """environment.json."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Fact]

    sessions: list[dict[str, Fact]] = []


class StoredControl(Stored):
    """The facts of a control in controls.safetensors: the settings that it was made by, and, where it was trained, its
    fitness, its learning rate and steps, and the learning rates whose change ceased to be finite."""

    settings: dict[str, Any]
    fitness: Score = math.nan
    search: Score = math.nan
    rate: Number = 0.0
    step: Count = 0
    steps: Count = 0
    diverged: list[Number] = []


class StoredSearch(Stored):
    """A section `search` of config.yaml."""

    model_config = ConfigDict(extra="allow")

    generations: Annotated[Count, Field(le=MAX_GENERATIONS)] | None = None
    strategy: str | None = None
    budget: str | None = None


class StoredStage(Stored):
    model_config = ConfigDict(extra="allow")

    search: StoredSearch


class StoredConfig(Stored):
    """The keys of config.yaml that are read without the rest: a run of an earlier version may have others."""

    model_config = ConfigDict(extra="allow")

    base: str | None = None
    parents: list[str] = []
    backend: str = ""
    plugins: list[str] = []
    seed: int | None = None
    search: StoredSearch | None = None
    stages: Annotated[list[StoredStage], Field(min_length=1)] | None = None
    space: dict[str, Any] | None = None
    data_flow: dict[str, Any] | None = None
    pool: dict[str, Any] | None = None
    mixture: dict[str, Any] | None = None
    tasks: list[dict[str, Any]] = []
    groups: list[str] = []
    inputs: dict[str, str]


# ---------------------------------------------------------------------------------------------------------------
# Reading


def whole_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, without their ends; none where there is no file. A last line without an end is being
    written. Raises InputError for what is no file, or larger than any that a search writes."""
    if not file.is_file():
        return
    if (size := check_regular(file, A_FILE)) > MAX_FILE:
        raise InputError(file, f"has {size:,} bytes; expected at most {MAX_FILE:,}")
    with file.open("rb") as handle:
        for number in range(MAX_GENERATIONS + 1):
            line = handle.readline(MAX_LINE)
            if not line.endswith(b"\n") and len(line) < MAX_LINE:
                return
            if number == MAX_GENERATIONS:
                raise InputError(file, f"has more than {MAX_GENERATIONS:,} lines; expected fewer")
            yield line.removesuffix(b"\n")


def parse(kind: type[Kind], text: bytes) -> tuple[Kind, Any]:
    """A file's or a line's document, and its plain data. Raises ValueError, in words, for one of another form."""
    try:
        # Python's parser, since result.json may hold NaN.
        plain = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    try:
        return kind.model_validate(plain), plain
    except ValidationError as error:
        raise ValueError(_first_fault(error)) from None


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(str(part)[:80] for part in fault["loc"])
    return f"{key or 'document'}: {fault['msg'].removeprefix('Value error, ')}"


def read_lines(file: Path, kind: type[Kind]) -> list[dict[str, Any]]:
    """The lines of a file, from its start to the first that cannot be read, or whose genomes have another length than
    the first ones. Lines of the history of an earlier version get the keys that they lack."""
    rows, dims = [], None
    for line in whole_lines(file):
        try:
            parsed, row = parse(kind, line)
        except ValueError:
            break
        if isinstance(parsed, HistoryLine):
            dims = parsed.dims if dims is None else dims
            if parsed.dims not in (None, dims):
                break
            missing = MISSING | {"examples": [0] * len(parsed.fitness)}
            row |= {key: missing[key] for key in missing if key not in row}
        rows.append(row)
    return rows


def read_result(file: Path) -> StoredResult | None:
    """A `result.json`, or None where there is none that can be read."""
    try:
        return parse(StoredResult, read_regular(file, A_FILE, MAX_DOCUMENT))[0] if file.is_file() else None
    except (OSError, ValueError):
        return None


def read_run_config(file: Path, notes: list[str] | None = None) -> dict[str, Any]:
    """The document of a run's config.yaml, in which keys of `StoredConfig` have their forms. Raises InputError for one
    of another form; where there are `notes`, the key is left out, which a note says."""
    document: dict[str, Any] = load_yaml(file)
    try:
        StoredConfig.model_validate(document)
    except ValidationError as error:
        if notes is None:
            raise InputError(file, _first_fault(error)) from None
        notes.append(f"{file.name} cannot be read: {_first_fault(error)}")
        for key in {fault["loc"][0] for fault in error.errors() if fault["loc"]}:
            document.pop(str(key), None)
    return document
