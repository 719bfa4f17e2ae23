"""A config -> everything a search needs, checked before any long work. May import every room below search.

What a user can get wrong is found here, cheapest first: the space, the task files, the parents' headers, their
tokenizers, then the place to write.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from merge_kernels import METHODS, Method, Options

from evojax_merge.checkpoints.architectures import COMPONENTS, shared_leaves
from evojax_merge.checkpoints.folder import EMBEDDING, FLOAT_DTYPES, file_hash, resolve
from evojax_merge.checkpoints.parents import Sources, open_decoders, open_sources
from evojax_merge.checkpoints.recipes import check_parent_count, load_yaml, number, options_from
from evojax_merge.checkpoints.tokens import TokenizerChoice, load_tokenizer
from evojax_merge.config import (
    Config,
    DataFlowConfig,
    SearchConfig,
    SpaceConfig,
    StageConfig,
    TaskConfig,
    apply_overrides,
    parse,
)
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.evaluation.evaluator import Requests, build_requests
from evojax_merge.models.bank import MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.paths import PathSpec
from evojax_merge.spaces.data_flow import IndicatorSpace, MoveSpace, PathSpace, ScaleBounds
from evojax_merge.spaces.parameter import Axis, ParameterSpace, component_groups, uniform_start
from evojax_merge.tasks.tasks import METRICS, Fields, Task, read_examples


@dataclass(frozen=True)
class Problem:
    """A search, ready to run: opened sources, space, and the tasks' splits.

    `models`: (role, name, folder) of base and parents, in the order of the table. `sources` are what the bank is
    made of: the base first where the method needs one. `searched` are the tasks on the examples that every
    generation is scored on, `full` on the whole search split, `heldout` on what the search never sees.
    """

    config: Config
    search: SearchConfig
    base: Path | None
    parents: tuple[Path, ...]
    sources: Sources
    decoder: DecoderConfig
    spec: MergeSpec | PathSpec
    space: ParameterSpace | PathSpace
    tokenizer: Any
    tokenizer_folder: Path
    searched: list[Task]
    full: list[Task]
    heldout: list[Task]
    context: int
    stop: tuple[int, ...]

    def requests(self) -> list[list[Requests]]:
        """What is asked for the searched, the full and the held-out tasks."""
        splits = (self.searched, self.full, self.heldout)
        tokens = self.config.evaluation.tokens_per_batch
        searched, full, heldout = build_requests(splits, self.tokenizer, tokens, self.context, self.stop)
        return [_weighted(searched), _weighted(full), heldout]

    @property
    def models(self) -> list[tuple[str, Path]]:
        base = [] if self.base is None else [("base", self.base)]
        return base + [("parent", parent) for parent in self.parents]

    @property
    def merged_from(self) -> list[Path]:
        return [folder.path for folder in self.sources.folders]


def read_config(path: Path, overrides: list[str], seed: int | None) -> Config:
    document = load_yaml(path)
    if not isinstance(document, dict):
        raise InputError(path, "expected a mapping with parents, space and tasks")
    document = apply_overrides(path, document, overrides)
    if seed is not None:
        document["seed"] = seed
    return parse(path, document, Config)


def locate(reference: str, relative_to: Path) -> Path:
    """A model folder or data file: a path, a hub id, or `zoo:name` from the demo family, which is made on demand."""
    if reference.startswith("zoo:"):
        from evojax_merge.zoo import locate as locate_in_zoo

        return locate_in_zoo(reference)
    return resolve(reference, relative_to)


def locate_file(where: str, reference: str, relative_to: Path) -> Path:
    if reference.startswith("zoo:"):
        return locate(reference, relative_to)
    for path in (Path(reference).expanduser(), relative_to / reference):
        if path.exists():
            return path.resolve()
    raise InputError(where, f"{reference}: no such file")


def stage_config(config: Config, stage: StageConfig, winner: str | None) -> Config:
    """The config of one stage of a chain; `winner`: the model that the stage before gave."""
    parents = config.parents if winner is None else [winner, *config.parents]
    changes = {"stages": None, "space": stage.space, "data_flow": stage.data_flow, "search": stage.search}
    return config.model_copy(update=changes | {"parents": parents})


def build_problem(path: Path, config: Config) -> Problem:
    """Check everything and open the sources. `path` is the config's file: relative paths start there."""
    where, folder = str(path), path.parent
    method = None if config.space is None else _method(where, config, config.space)
    tasks = [load_task(f"{where}: tasks[{i}]", task, folder, config.seed) for i, task in enumerate(config.tasks)]
    base = None if config.base is None else locate(config.base, folder)
    parents = tuple(locate(parent, folder) for parent in config.parents)
    based = method is not None and method.based(base is not None)
    paths = [base, *parents] if base is not None and based else list(parents)
    whose = None
    if config.tokenizer_source is not None:
        whose = base if config.tokenizer_source == "base" else locate(config.tokenizer_source, folder)
        if whose is None or whose not in [base, *parents]:
            raise InputError(where, "tokenizer_source: expected base or one of the parents")
    # A base that takes no part in the merge is opened all the same, to be checked against the parents.
    bystander = [base] if base is not None and base not in paths else []
    opened = [*paths, *bystander]
    tokenizer = None if whose is None else TokenizerChoice(opened.index(whose))
    # Layers of a path may come from models of any depth.
    sources, configs = open_decoders(opened, tokenizer) if method is None else _of_one_depth(opened, tokenizer)
    _check_tokens(opened, sources)
    sources, decoder = Sources(sources.folders[: len(paths)], sources.vocabulary), configs[0]
    export_dtype = config.export_dtype or _dtype_name(sources)
    space: ParameterSpace | PathSpace
    spec: MergeSpec | PathSpec
    if method is not None and config.space is not None:
        space = build_space(f"{where}: space", config.space, method, len(parents), decoder)
        spec = MergeSpec(
            method.name,
            _options(f"{where}: space", method, config.space, based),
            config.seed,
            export_dtype,
            tuple((name, values) for name, values in space.fixed if not method.parameter(name).searched),
        )
    else:
        assert config.data_flow is not None
        spec = PathSpec(tuple(configs[: len(paths)]), export_dtype)
        space = build_path_space(f"{where}: data_flow", config.data_flow, spec)
    tokenizer_folder = whose or (base if base is not None else parents[0])
    return Problem(
        config=config,
        search=config.search,
        base=base,
        parents=parents,
        sources=sources,
        decoder=decoder,
        spec=spec,
        space=space,
        tokenizer=load_tokenizer(tokenizer_folder),
        tokenizer_folder=tokenizer_folder,
        searched=[_limited(full, task.limit) for (full, _), task in zip(tasks, config.tasks, strict=True)],
        full=[full for full, _ in tasks],
        heldout=[heldout for _, heldout in tasks],
        context=context_length(sources.folders[0].config),
        stop=stop_tokens(tokenizer_folder),
    )


def _of_one_depth(paths: Sequence[Path], tokenizer: TokenizerChoice | None) -> tuple[Sources, list[DecoderConfig]]:
    sources, config = open_sources(paths, tokenizer)
    return sources, [config] * len(paths)


def build_path_space(where: str, config: DataFlowConfig, spec: PathSpec) -> PathSpace:
    """The data-flow space of a config. Raises InputError for an end that no parent has, or a path that cannot be."""
    depths = tuple(one.layers for one in spec.configs)
    if config.ends >= len(depths):
        raise InputError(
            where, f"ends: there is no parent {config.ends} (they are numbered from 0 to {len(depths) - 1})"
        )
    bounds = ScaleBounds(config.scale_low, config.scale_high)
    if config.max_layers is not None and config.max_layers < depths[0]:
        raise InputError(where, f"max_layers: {config.max_layers}; the first parent has {depths[0]} layers already")
    if config.form == "moves":
        longest = config.max_layers or 2 * depths[0]
        return MoveSpace(
            depths, config.moves, min(config.window, depths[0]), bounds, config.scales != "none", longest, config.ends
        )
    longest = config.max_layers or sum(depths) * config.repetitions
    return IndicatorSpace(depths, config.repetitions, config.scales or "matrix", bounds, longest, config.ends)


def _check_tokens(folders: Sequence[Path], sources: Sources) -> None:
    """Every model of a search has every token: a row that was made up would be searched like one that was trained."""
    vocabulary = sources.vocabulary
    if vocabulary is None or not vocabulary.fills:
        return
    for folder, rows in zip(folders, vocabulary.rows, strict=True):
        missing = np.flatnonzero(rows < 0)
        if missing.size:
            token = vocabulary.tokenizer.convert_ids_to_tokens(int(missing[0]))
            raise InputError(folder, f"lacks {missing.size} of the tokens (such as {token!r}); cannot align its rows")


def _options(where: str, method: Method, space: SpaceConfig, based: bool) -> Options:
    """The method's switches, as the config has them."""
    switches: dict[str, Any] = {}
    for name, value in (("normalize", space.normalize), ("rescale", space.rescale)):
        own = "normalize_weights" if name == "normalize" and "normalize_weights" in method.switches else name
        if value is not None and own not in method.switches:
            raise InputError(where, f"{name}: {method.name} has no such switch")
        switches[own] = value
    return options_from(where, method, switches, based)


def _method(where: str, config: Config, space: SpaceConfig) -> Method:
    name = space.method
    if name not in METHODS:
        raise InputError(where, f"space.method: unknown method {name!r}{did_you_mean(name, METHODS)}")
    method = METHODS[name]
    if method.base == "required" and config.base is None:
        raise InputError(where, f"base: missing; {name} takes task vectors from a base model")
    check_parent_count(f"{where}: parents", method, len(config.parents))
    return method


def _dtype_name(sources: Sources) -> str:
    dtype = sources.entry(0, EMBEDDING).dtype
    return next((name for name, known in FLOAT_DTYPES.items() if known == dtype), "float32")


def build_space(
    where: str, config: SpaceConfig, method: Method, parents: int, decoder: DecoderConfig
) -> ParameterSpace:
    """The parameter space of a config. Raises InputError for unknown parameters and bounds without a meaning."""
    groups = component_groups(config.components, COMPONENTS)
    if groups is None:
        raise InputError(
            where,
            f"components: {config.components}; expected each of {', '.join(COMPONENTS)} once (join with +)",
        )
    known = [parameter.name for parameter in method.parameters]
    for key, names in (("parameters", config.parameters), ("fixed", config.fixed)):
        for name in names:
            if name not in known:
                raise InputError(where, f"{key}.{name}: {method.name} has no such parameter{did_you_mean(name, known)}")
    both = sorted(set(config.parameters) & set(config.fixed))
    if both:
        raise InputError(where, f"{both[0]}: is both searched and fixed")
    searched = config.parameters or {}
    open_ = [parameter.name for parameter in method.parameters if parameter.searched]
    for name in searched:
        if name not in open_:
            raise InputError(where, f"parameters.{name}: what is prepared depends on it; give it under fixed")
    if not open_:
        raise InputError(where, f"method: {method.name} has no parameter to search; use evojax-merge merge")
    if not searched:
        raise InputError(where, f"parameters: nothing is searched; name at least one of {', '.join(open_)}")
    axes = [_axis(where, method, name, bounds, parents) for name, bounds in searched.items()]
    fixed = []
    for parameter in method.parameters:
        if parameter.name in searched:
            continue
        values = config.fixed.get(parameter.name)
        if values is None and parameter.default is None and not parameter.per_parent:
            raise InputError(where, f"{parameter.name}: missing; give it under parameters or under fixed")
        given = uniform_start(method, parameter.name, parents) if values is None else _numbers(values)
        fixed.append((parameter.name, _checked(f"{where}: fixed", method, parameter.name, given, parents)))
    _check_bounds(where, method, axes, dict(fixed), parents)
    return ParameterSpace(
        method=method,
        parents=parents,
        layers=decoder.layers,
        layers_per_group=min(config.layers_per_group, decoder.layers),
        names=COMPONENTS,
        components=groups,
        shared=tuple(leaf.name for leaf in shared_leaves(decoder)),
        axes=tuple(axes),
        fixed=tuple(fixed),
    )


def _check_bounds(
    where: str, method: Method, axes: Sequence[Axis], fixed: dict[str, tuple[float, ...]], parents: int
) -> None:
    """No corner of the bounds may have a value without a meaning (a DELLA density too near its epsilon, say)."""
    for axis in axes:
        if not method.parameter(axis.name).on_grid:
            continue
        for value in (axis.low, axis.high):
            numbers = {
                name: np.broadcast_to(values, parents) for name, values in (fixed | {axis.name: (value,)}).items()
            }
            complaint = method.complaint(method.options, numbers | {"weight": np.ones(parents)})
            if complaint is not None:
                raise InputError(where, f"parameters.{axis.name}: {complaint}")


def _numbers(values: float | list[float]) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, list) else (values,)


def _checked(where: str, method: Method, name: str, values: tuple[float, ...], parents: int) -> tuple[float, ...]:
    parameter = method.parameter(name)
    allowed = (1, parents) if parameter.per_parent else (1,)
    if len(values) not in allowed:
        raise InputError(where, f"{name}: {len(values)} numbers; expected {' or '.join(map(str, allowed))}")
    return tuple(number(where, parameter, value) for value in values)


def _axis(where: str, method: Method, name: str, bounds: Any, parents: int) -> Axis:
    parameter = method.parameter(name)
    low = parameter.low if bounds.low is None else bounds.low
    high = parameter.high if bounds.high is None else bounds.high
    for value in (low, high):
        number(f"{where}: parameters.{name}", parameter, value)
    if not low < high:
        raise InputError(where, f"parameters.{name}: low {low:g} is not below high {high:g}")
    if bounds.start is not None:
        start = _numbers(bounds.start)
    elif parameter.default is None and not parameter.per_parent:
        start = ((low + high) / 2,)
    else:
        start = uniform_start(method, name, parents)
    start = _checked(f"{where}: parameters.{name}", method, name, start, parents)
    if bounds.start is not None and not all(low <= value <= high for value in start):
        raise InputError(where, f"parameters.{name}: start {list(start)} is outside [{low:g}, {high:g}]")
    return Axis(name, low, high, tuple(float(np.clip(value, low, high)) for value in start))


def load_task(where: str, config: TaskConfig, folder: Path, seed: int) -> tuple[Task, Task]:
    """A task's search split and held-out split."""
    metric = config.metric or METRICS[config.kind][0]
    if metric not in METRICS[config.kind]:
        raise InputError(where, f"metric: {metric!r}; {config.kind} has {', '.join(METRICS[config.kind])}")
    if config.pattern is not None:
        try:
            re.compile(config.pattern)
        except re.error as error:
            raise InputError(where, f"pattern: {config.pattern!r} is not a regular expression ({error})") from None
    file = locate_file(f"{where}.file", config.file, folder)
    fields = Fields(config.prompt, config.target, config.choices, config.answer, config.delimiter)
    examples = read_examples(file, config.kind, fields)
    task = Task(
        config.name, config.kind, metric, config.weight, str(file), tuple(examples), config.pattern,
        config.max_new_tokens, tuple(config.stop),
    )  # fmt: skip
    if isinstance(config.heldout, str):
        other = locate_file(f"{where}.heldout", config.heldout, folder)
        return task, replace(task, file=str(other), examples=tuple(read_examples(other, config.kind, fields)))
    if len(examples) < 2:
        raise InputError(file, "holds one example; a held-out share needs at least two")
    order = np.random.default_rng([seed, len(examples)]).permutation(len(examples))
    count = min(max(1, round(config.heldout * len(examples))), len(examples) - 1)
    return (
        replace(task, examples=tuple(examples[i] for i in sorted(order[count:]))),
        replace(task, examples=tuple(examples[i] for i in sorted(order[:count]))),
    )


def _weighted(requests: list[Requests]) -> list[Requests]:
    """Those that are part of the fitness: a task of weight 0 is only shown in the held-out table."""
    return [request for request in requests if request.task.weight > 0]


def _limited(task: Task, limit: int | None) -> Task:
    return task if limit is None else replace(task, examples=task.examples[:limit])


def context_length(config: Mapping[str, Any]) -> int:
    return int(config.get("max_position_embeddings") or 2**30)


def stop_tokens(folder: Path) -> tuple[int, ...]:
    """The token ids that end a generation: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).exists():
            continue
        ids = json.loads((folder / name).read_text()).get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()


def resolved_document(problem: Problem) -> dict[str, Any]:
    """The config as it is kept in the run folder: absolute paths, defaults filled in, hashes of all inputs."""
    document = problem.config.model_dump(mode="json")
    document.pop("out")
    document["base"] = None if problem.base is None else str(problem.base)
    document["parents"] = [str(parent) for parent in problem.parents]
    if problem.config.tokenizer_source not in (None, "base"):
        document["tokenizer_source"] = str(problem.tokenizer_folder)
    document["export_dtype"] = problem.spec.export_dtype
    for row, full, heldout in zip(document["tasks"], problem.full, problem.heldout, strict=True):
        row["file"] = full.file
        if isinstance(row["heldout"], str):
            row["heldout"] = heldout.file
    files = {Path(task.file) for task in problem.full + problem.heldout}
    for _, folder in problem.models:
        files |= set(folder.glob("*.safetensors"))
        files |= {path for path in (folder / "config.json", folder / "tokenizer.json") if path.exists()}
    document["inputs"] = {str(file): file_hash(file) for file in sorted(files)}
    return document
