"""mergekit-evolve's YAML -> a config of ours.

Every key has its meaning here or is refused by name. The options of mergekit-evolve's command line (budget, population,
sigma, seed) become keys under `search:` and `seed:`, which may stand in the same file: mergekit-evolve ignores unknown
keys.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from merge_kernels import METHODS
from pydantic import Field, field_validator

from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import EvaluationConfig, SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.models.architecture import COMPONENTS
from evojax_merge.models.families.llama_like import LEAVES
from evojax_merge.schema.section import MAX_SEED, Form, Heldout, Location, Name, Real, Section, Text, Whole
from evojax_merge.tasks.task import TaskConfig

# mergekit-evolve's default of `normalize` for the methods that weigh parents.
NORMALIZES = {"linear": True, "task_arithmetic": False, "ties": True, "dare_ties": True}
# The number of layers that a filter is tried on, to check that it matches all of them or none.
PROBED_LAYERS = 100
HELDOUT: float = TaskConfig.model_fields["heldout"].default


class Genome(Section):
    """The search space. `layer_granularity` below 1: all layers are one group."""

    models: list[Location] = Field(min_length=1, max_length=1000)
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: Location | None = None
    tokenizer_source: Location | None = None
    layer_granularity: Whole = Field(0, ge=-10_000, le=10_000)
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: list[Text] | None = Field(None, max_length=1000)
    smooth: bool = False


class EvolveTask(Section):
    """One lm-eval task; the keys from `limit` on are ours."""

    name: Name
    weight: Real = Field(1.0, ge=-1e9, le=1e9)
    metric: Name = "acc,none"
    limit: Whole | None = Field(None, ge=1, le=10**9)
    heldout: Heldout = HELDOUT
    include_path: Location | None = None
    split: Literal["train"] | None = None
    on_test_set: bool = False


class EvolveConfig(Section):
    """The file; the keys from `search` on are ours. `model_name`: the run folder's name."""

    genome: Genome
    tasks: list[EvolveTask] = Field(min_length=1, max_length=1000)
    limit: Whole | None = Field(None, ge=1, le=10**9)
    num_fewshot: Whole | None = Field(None, ge=0, le=10_000)
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True
    random_seed: Whole = Field(0, ge=0, le=MAX_SEED)
    model_name: Annotated[Name, Form("a name of letters, digits, '.', '_' and '-'")] | None = Field(
        None, pattern=r"^[\w.-]+$"
    )
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export_dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    out: Location | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _named(cls, tasks: Any) -> Any:
        return (
            [{"name": task} if isinstance(task, str) else task for task in tasks] if isinstance(tasks, list) else tasks
        )


def from_mergekit_evolve(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """The document of a Config that searches the same merges by the same tasks."""
    theirs: EvolveConfig = parse(path, document, EvolveConfig)
    for key in ("shuffle", "random_init"):
        if getattr(theirs, key):
            raise InputError(path, f"{key}: not supported; a search here scores the same examples from the same start")
    space, base, parents = _space(path, theirs.genome)
    ours = {
        "base": base,
        "parents": parents,
        "tokenizer_source": _tokenizer_source(path, theirs.genome, base),
        "space": space,
        "tasks": [_task(path, theirs, i) for i in range(len(theirs.tasks))],
        # mergekit-evolve adds up scores as they are.
        **({"scale": "none"} if len(theirs.tasks) > 1 else {}),
        "search": theirs.search.model_dump(),
        "evaluation": theirs.evaluation.model_dump(),
        "export_dtype": theirs.export_dtype,
        "seed": theirs.random_seed,
        "out": theirs.out or (None if theirs.model_name is None else f"runs/{theirs.model_name}"),
    }
    return {key: value for key, value in ours.items() if value is not None}


def _space(path: Path, genome: Genome) -> tuple[dict[str, Any], str | None, list[str]]:
    """The space, the base that task vectors are taken from, and the parents."""
    method, base, parents = METHODS[genome.merge_method], genome.base_model, list(genome.models)
    if method.base == "required":
        if base is None:
            raise InputError(path, f"genome.base_model: missing; {method.name} takes task vectors from a base model")
    else:
        if base is not None and base not in parents:
            where = f"genome.base_model: {method.name} has no base"
            raise InputError(path, f"{where}; add it to models to merge it as well")
        base = None
    # The base has no task vector of its own; as one of the models it only counts in the starting weight.
    parents = [model for model in parents if model != base]
    space: dict[str, Any] = {
        "method": method.name,
        "layers_per_group": genome.layer_granularity if genome.layer_granularity > 0 else "all",
        "components": filter_components(path, genome.filters or []),
    }
    if method.interpolates is not None:
        for key in ("smooth", "filters"):
            if getattr(genome, key):
                raise InputError(path, f"genome.{key}: not with {method.name}")
        if len(parents) != 2:
            raise InputError(path, f"genome.models: {method.name} of {len(parents)} models; here it takes two")
        return space | {"parameters": {method.interpolates: {}}}, base, parents
    weight: dict[str, Any] = {"start": 1 / len(genome.models)}
    if genome.allow_negative_weights:
        weight["low"] = -1.0
    parameters: dict[str, Any] = {"weight": weight}
    if method.density is not None:
        parameters[method.density.name] = {"start": 1.0}
    normalize = NORMALIZES[method.name] if genome.normalize is None else genome.normalize
    return space | {"parameters": parameters, "normalize": normalize, "smooth": genome.smooth}, base, parents


def filter_components(path: Path, filters: list[str]) -> list[str]:
    """Filters (substrings of a tensor's name; the first that matches counts) -> component groups, with all unmatched
    components last. The embedding, final norm and head go with the layers, as in mergekit-evolve. Raises InputError for
    a filter that takes no tensor, or a part of a component."""

    def chosen(tensor: str) -> int:
        return next((i for i, text in enumerate(filters) if text == "*" or text in tensor), len(filters))

    members: dict[str, int] = {}
    names: dict[str, str] = {}
    for leaf in LEAVES:
        part = leaf.name if leaf.stack is None else leaf.component
        for layer in range(PROBED_LAYERS):
            tensor = leaf.tensor_of(layer)
            number, first = chosen(tensor), names.setdefault(part, tensor)
            if members.setdefault(part, number) != number:
                raise InputError(
                    path,
                    f"genome.filters: {filters[min(number, members[part])]!r} parts {tensor} from {first}; only whole "
                    f"components can have parameters of their own ({', '.join(COMPONENTS)} of all layers)",
                )
    groups = [[part for part, number in members.items() if number == i] for i in range(len(filters) + 1)]
    for text, group in zip(filters, groups, strict=False):
        if not group:
            raise InputError(path, f"genome.filters: {text!r} takes no tensor (that no filter before it takes)")
    return ["+".join(group) for group in groups if group]


def _tokenizer_source(path: Path, genome: Genome, base: str | None) -> str | None:
    source = genome.tokenizer_source
    if source is None:
        return None
    if source == "base":
        return "base" if base is not None else genome.base_model or genome.models[0]
    model = source.removeprefix("model:")
    if model not in [*genome.models, genome.base_model]:
        raise InputError(path, f"genome.tokenizer_source: {source}; expected base or model: and one of the models")
    return model


def _task(path: Path, theirs: EvolveConfig, i: int) -> dict[str, Any]:
    task = theirs.tasks[i]
    if task.weight < 0:
        raise InputError(
            path,
            f"tasks[{i}].weight: {task.weight:g}; higher is better in every score here (a perplexity is negated), so "
            "that weights are positive",
        )
    is_alone = sum(other.name == task.name for other in theirs.tasks) == 1
    ours: dict[str, Any] = {
        "name": task.name if is_alone else f"{task.name}/{task.metric}", "lm_eval": task.name,
        **task.model_dump(exclude={"name", "limit"}),
        **theirs.model_dump(include={"num_fewshot", "apply_chat_template", "fewshot_as_multiturn"}),
    }  # fmt: skip
    limit = theirs.limit if task.limit is None else task.limit
    if limit is not None:
        # Enough documents for `limit` of them to score a candidate, beside the held-out ones.
        share = 0.0 if isinstance(task.heldout, str) else task.heldout
        ours |= {"limit": limit, "docs": max(2, math.ceil(limit / (1 - share)))}
    return {key: value for key, value in ours.items() if value is not None}
