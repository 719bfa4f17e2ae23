"""Everything that a search's YAML may say, as one typed schema. May import errors and merge_kernels' registry.

`load_config` reads, checks and resolves; every error names the file, the key and what was expected.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from evojax_merge.errors import InputError, did_you_mean


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Numbers = float | list[float]


class Bounds(Section):
    """A searched parameter: bounds, and where the search starts (one number, or one per parent)."""

    low: float | None = None
    high: float | None = None
    start: Numbers | None = None


class SpaceConfig(Section):
    """The search space: the method, which of its parameters are searched, and how finely.

    `parameters`: searched ones with their bounds. `fixed`: the others that should not have their default.
    `components`: the parts of a layer that have parameters of their own; join with `+` to let them share. The shared
    embed, final_norm and head may be joined too, else embed and head have parameters of their own.
    `layers_per_group`: a number or `all`. `smooth`: layers get what is interpolated between these groups.
    """

    kind: Literal["parameter"] = "parameter"
    method: str
    layers_per_group: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    components: list[str] = ["attention", "mlp", "norm"]
    smooth: bool = False
    parameters: dict[str, Bounds] = {}
    fixed: dict[str, Numbers] = {}
    normalize: bool | None = None
    rescale: bool | Literal["none", "l1", "density"] | None = None


class DataFlowConfig(Section):
    """A data-flow space: the path through the layers of all parents, from the first parent as it is.

    `form` moves: `moves` edits of the first parent (scale, repeat, skip, or take from another parent a block of at
    most `window` layers). `form` indicator: a gene for each of `repetitions` times all layers, as in the paper.
    `scales`: what the state is multiplied by, within `scale_low` and `scale_high`: one per move (`block`), a `matrix`
    over pairs of layers or a `network` (indicator), or `none`. `max_layers` None: twice the first parent's, and with
    `indicator` all. `ends`: number of the parent whose embedding, final norm and head are taken.
    """

    form: Literal["moves", "indicator"] = "moves"
    moves: int = Field(4, ge=1)
    window: int = Field(4, ge=1)
    repetitions: int = Field(3, ge=1)
    scales: Literal["block", "matrix", "network", "none"] | None = None
    scale_low: float = Field(0.5, gt=0.0)
    scale_high: float = Field(4.0, gt=0.0)
    max_layers: int | None = Field(None, ge=1)
    ends: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "DataFlowConfig":
        allowed = ("block", "none") if self.form == "moves" else ("matrix", "network", "none")
        if self.scales is not None and self.scales not in allowed:
            raise ValueError(f"scales: the form {self.form} has {', '.join(allowed)}")
        if not self.scale_low < self.scale_high or not self.scale_low <= 1 <= self.scale_high:
            raise ValueError("scale_low, scale_high: expected bounds around 1")
        return self


class TaskConfig(Section):
    """What every kind of task has. `heldout`: a second source of examples, or the share of the first that the search
    never sees. `weight` 0: no part of the fitness, only shown in the held-out table. `limit`: how many examples of the
    search split every generation is scored on; the finalists are scored on all."""

    name: str
    heldout: str | Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    weight: float = Field(1.0, ge=0.0)
    limit: int | None = Field(None, ge=1)


class TextConfig(TaskConfig):
    """A task of text: a JSONL file, and what its fields are called.

    `prompt`, `target`: templates over a record's fields. `delimiter`: what joins a prompt to a target or choice where
    neither has white space there.
    """

    kind: Literal["likelihood", "multiple_choice", "exact_match"]
    file: str
    prompt: str = "{prompt}"
    target: str = "{target}"
    choices: str = "choices"
    answer: str = "answer"
    delimiter: str = " "
    metric: Literal["log_probability", "accuracy", "margin"] | None = None
    pattern: str | None = None
    max_new_tokens: int = Field(256, ge=1)
    stop: list[str] = []


class GsmConfig(TaskConfig):
    """Worked problems with a number as answer, as in GSM8K and MGSM.

    `source`, and `heldout` where it names a second one: a JSONL or parquet file, `hub:owner/dataset[/config][:split]`,
    or `gsm-symbolic:language`. `style`: whose prompts and patterns; by the data's fields where there is none. `prompt`,
    `pattern` (of the strict match) and `stop` take the place of the style's. `language`: an output counts only if it
    is in it. `num_fewshot` worked examples are the first of `fewshot_source`, or of `source`; none of them is scored.
    `on_test_set`: whether a search may see the examples that models are compared by.
    """

    kind: Literal["gsm"]
    source: str
    match: Literal["strict", "flexible"] = "strict"
    language: str | None = None
    style: str | None = None
    prompt: str | None = None
    pattern: str | None = None
    stop: list[str] | None = None
    num_fewshot: int = Field(0, ge=0)
    fewshot_source: str | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    max_new_tokens: int = Field(256, ge=1)
    on_test_set: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "GsmConfig":
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ValueError("prompt: expected {question} where the problem goes")
        if self.system_instruction is not None and not self.apply_chat_template:
            raise ValueError("system_instruction: a turn of a chat; say apply_chat_template: true, or put it in prompt")
        if self.fewshot_source is not None and not self.num_fewshot:
            raise ValueError("fewshot_source: say num_fewshot, how many examples to take from it")
        return self


class HarnessConfig(TaskConfig):
    """A task of the lm-eval harness, by its name there; `heldout` may name a second one.

    `metric`: in the harness's notation, `exact_match,flexible-extract`; the task's first where there is none. `docs`:
    only the first so many examples of the task, the harness's `--limit`. `split` train: its training examples instead
    of those that it is scored on. `include_path`: a folder with task YAMLs of your own. `on_test_set`: whether a search
    may see the examples that models are compared by. The others are the harness's own.
    """

    name: str = ""
    lm_eval: str
    metric: str | None = None
    docs: int | None = Field(None, ge=2)
    split: Literal["train"] | None = None
    num_fewshot: int | None = Field(None, ge=0)
    include_path: str | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    on_test_set: bool = False

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value["lm_eval"]} | value if isinstance(value, dict) and "lm_eval" in value else value


class FunctionConfig(TaskConfig):
    """A task that a user's own function scores: `module:name` or `path/to/file.py:name`, from the config's folder.

    `gets`: what the function gets. `texts`: the records and what a candidate writes after each prompt. On the other two
    it runs on the target given the prompt: `log_probabilities`: the records and each target's total log-probability.
    `logits`: a row's logits, targets and mask, traced and compiled into the scoring pass.
    """

    kind: Literal["function"]
    function: str
    gets: Literal["texts", "log_probabilities", "logits"] = "texts"
    file: str
    prompt: str = "{prompt}"
    target: str = "{target}"
    delimiter: str = " "
    max_new_tokens: int = Field(256, ge=1)
    stop: list[str] = []

    @model_validator(mode="after")
    def _fits(self) -> "FunctionConfig":
        foreign = ("target", "delimiter") if self.gets == "texts" else ("max_new_tokens", "stop")
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: has no meaning where the function gets {self.gets}")
        return self


# Which of the kinds of task a mapping is: told by its keys, and no part of the key that a message names.
TASK_KINDS: dict[Any, type[TaskConfig]] = {
    "text": TextConfig, "gsm": GsmConfig, "lm_eval": HarnessConfig, "function": FunctionConfig,
}  # fmt: skip


# The values of `kind`; a harness task has none.
KINDS = [
    kind for part in (TextConfig, GsmConfig, FunctionConfig) for kind in get_args(part.model_fields["kind"].annotation)
]


def _task_tag(value: Any) -> str:
    if isinstance(value, TaskConfig):
        value = value.model_dump()
    if not isinstance(value, dict):
        return "text"
    if "lm_eval" in value:
        return "lm_eval"
    return value["kind"] if value.get("kind") in ("gsm", "function") else "text"


AnyTask = Annotated[
    Annotated[TextConfig, Tag("text")]
    | Annotated[GsmConfig, Tag("gsm")]
    | Annotated[HarnessConfig, Tag("lm_eval")]
    | Annotated[FunctionConfig, Tag("function")],
    Discriminator(_task_tag),
]


class SearchConfig(Section):
    """The strategy and its budget. `population` None: 4 + floor(3 ln D). `sigma` is in units of the bounds' range.
    `rungs` above 1: the candidates of a generation race. All are scored on a first part of the examples, the better
    half on twice as many, and so forth; in so many rungs the last few are scored on all."""

    population: int | None = Field(None, ge=2)
    generations: int = Field(50, ge=1)
    sigma: float = Field(1 / 6, gt=0.0)
    finalists: int = Field(5, ge=1)
    rungs: int = Field(1, ge=1, le=8)


class StageConfig(Section):
    """One stage of a chain. From the second on, the first parent is the winner of the stage before."""

    space: SpaceConfig | None = None
    data_flow: DataFlowConfig | None = None
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _one_space(self) -> "StageConfig":
        if (self.space is None) == (self.data_flow is None):
            raise ValueError("expected exactly one of the keys space, data_flow")
        return self


class EvaluationConfig(Section):
    """How candidates are scored. `chunk`, how many share a pass on a device, None: chosen from the device's memory.
    `tokens_per_batch`: how many tokens of each go through a pass, at most (of prompts that are continued, four times
    as many); None: 2,048 on a CPU, 8,192 on others, or fewer where they do not fit. `model`: how many devices hold one
    bank."""

    chunk: int | None = Field(None, ge=1)
    tokens_per_batch: int | None = Field(None, ge=1)
    model: int = Field(1, ge=1)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


class Config(Section):
    """A whole search: over one space, or in stages."""

    base: str | None = None
    parents: list[str] = Field(min_length=1)
    tokenizer_source: str | None = None
    space: SpaceConfig | None = None
    data_flow: DataFlowConfig | None = None
    stages: list[StageConfig] | None = Field(None, min_length=1)
    tasks: list[AnyTask] = Field(min_length=1)
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    seed: int = Field(0, ge=0)
    out: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        _check_names(self.tasks)
        if not any(task.weight > 0 for task in self.tasks):
            raise ValueError("tasks: all weights are 0; at least one task must be part of the fitness")
        if sum(part is not None for part in (self.space, self.data_flow, self.stages)) != 1:
            raise ValueError("expected exactly one of the keys space, data_flow, stages")
        return self


class TaskFile(Section):
    """The YAML that `evojax-merge evaluate --tasks` takes: `tasks:` as in a search, all examples are scored."""

    tasks: list[AnyTask] = Field(min_length=1)
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _fits(self) -> "TaskFile":
        _check_names(self.tasks)
        return self


def _check_names(tasks: Sequence[TaskConfig]) -> None:
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"tasks: names must differ; {twice!r} stands more than once")


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that the mapping at `location` may have."""
    for part in location:
        if part in TASK_KINDS:
            model = TASK_KINDS[part]
        if isinstance(part, int) or part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        nested = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        model = next((a for a in nested if issubclass(a, BaseModel)), model)
    return sorted(model.model_fields)


def _explain(path: Path, schema: type[BaseModel], error: ValidationError) -> InputError:
    first = error.errors()[0]
    location = first["loc"]
    tagged = location[:1] == ("tasks",) and len(location) > 2 and location[2] in TASK_KINDS
    shown_parts = (*location[:2], *location[3:]) if tagged else location
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in shown_parts).lstrip(".")
    if first["type"] == "extra_forbidden":
        known = _known_keys(schema, location[:-1])
        return InputError(path, f"{key}: unknown key{did_you_mean(str(location[-1]), known)}")
    if first["type"] == "missing":
        return InputError(path, f"{key}: missing")
    found = first.get("input")
    if location[:1] == ("tasks",) and location[-1] == "kind" and isinstance(found, str):
        return InputError(path, f"{key}: there is no kind of task {found!r}{did_you_mean(found, KINDS)}")
    shown = f", found {found!r}" if isinstance(found, (str, int, float, bool)) else ""
    message = first["msg"].removeprefix("Value error, ")
    return InputError(path, f"{key}: {message}{shown}" if key else message)


def parse(path: Path, document: Any, schema: type[Section]) -> Any:
    """Check a parsed document against a schema; InputError names the first key that does not fit."""
    if not isinstance(document, dict):
        raise InputError(path, f"expected a mapping, found {type(document).__name__}")
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise _explain(path, schema, error) from None


def apply_overrides(path: Path, document: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`key.path=value` pairs, values as YAML; list items by their number."""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise InputError("--set", f"{override!r}; expected key.path=value")
        target: Any = document
        parts = key.split(".")
        try:
            for part in parts[:-1]:
                target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
            last: Any = int(parts[-1]) if isinstance(target, list) else parts[-1]
            target[last] = yaml.safe_load(text)
        except (ValueError, IndexError, TypeError, AttributeError):
            raise InputError("--set", f"{key}: there is no such key in {path}") from None
        except yaml.YAMLError:
            raise InputError("--set", f"{key}: {text!r} is not a YAML value") from None
    return document
