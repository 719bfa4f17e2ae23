"""A config -> everything a search needs, checked before any long work.

A user's mistakes are found here, cheapest first: the space, the task files, the parents' headers, their tokenizers,
then the run folder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from merge_kernels import Method

from evojax_merge.candidates import Candidates, MergeCandidates, PathCandidates, PoolCandidates
from evojax_merge.checkpoints.config_file import decoder_settings
from evojax_merge.checkpoints.decoder_folder import DecoderFolder
from evojax_merge.checkpoints.derived import ignored_revisions, input_files, reference_to
from evojax_merge.checkpoints.folder import FLOAT_DTYPES, Folder, file_hash
from evojax_merge.checkpoints.json_files import read_json_object, shown
from evojax_merge.checkpoints.parents import Sources, open_decoders, open_sources
from evojax_merge.checkpoints.tokens import TokenizerChoice, load_tokenizer
from evojax_merge.config import (
    MAX_PATH_LAYERS,
    Config,
    DataFlowConfig,
    PoolConfig,
    SearchConfig,
    SpaceConfig,
    StageConfig,
    apply_overrides,
    parse,
)
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.evaluation.batched_tasks import BatchedTask, batch_tasks, suitable_tokens
from evojax_merge.evaluation.memory import available_memory, require_memory
from evojax_merge.evaluation.targets import Target, live_target
from evojax_merge.genealogy import founding_genealogy
from evojax_merge.mergekit.evolve_config import from_mergekit_evolve
from evojax_merge.mergekit.schema import check_parent_count
from evojax_merge.models.architecture import ROUTER, architecture_of, shared_leaves
from evojax_merge.models.bank import MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.paths import PathSpec
from evojax_merge.plugins import files_of, named_plugins, source_files
from evojax_merge.references import recipe_reference, resolve_file, resolve_reference
from evojax_merge.report.comparison import model_names
from evojax_merge.search.example_choice import ExampleChoice, length_strata
from evojax_merge.search.fronts import check_front_options
from evojax_merge.search.gradients import check_gradient_options
from evojax_merge.search.protocols import Differentiates, HasMoves, Space, Strategy, differentiates
from evojax_merge.search.run_folder import RUN_KEYS, random_numbers
from evojax_merge.search.seeding import seed_genomes, seeded
from evojax_merge.search.stopping import check_stop
from evojax_merge.search.strategies.cma_es import default_population
from evojax_merge.search.strategies.registry import (
    PoolSettings,
    StrategySettings,
    find_strategy,
    make_strategy,
    seeds_of,
)
from evojax_merge.search.successive_halving import example_lengths, stratified_parts, stratified_shards
from evojax_merge.search.validation import validation_split
from evojax_merge.spaces.bounds import from_unit
from evojax_merge.spaces.breeding import PARENTS, BreedingSpace, genome_genes
from evojax_merge.spaces.layer_path import IndicatorSpace, MoveSpace, PathSpace, ScaleBounds
from evojax_merge.spaces.parameter import ParameterSpace, component_groups
from evojax_merge.spaces.search_parameters import (
    check_active,
    find_method,
    options_of,
    parent_groups_of,
    search_parameters_of,
)
from evojax_merge.tasks.opening import open_task, resolved_config
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.task import Task
from evojax_merge.yaml_reader import load_yaml

# The most dimensions of a search: a mean and a standard deviation of each are kept and saved in every generation.
MAX_DIMS = 1_000_000
# The least members of a pool, where its config does not say.
SMALLEST_POOL = 8
# Arrays of a population's genomes that a generation has at a time.
GENOME_COPIES = 6


@dataclass(frozen=True)
class SearchProblem:
    """A search, ready to run: opened sources, space, and the tasks' splits.

    `models`: (role, folder) of base and parents, in the order of the table; `references`: each folder's name in
    recipes. `sources`: the models of the bank, the base first where the method needs one. `other_modules`: the model
    whose other modules the winner has, where text decoders of larger models are merged. `splits`: the tasks on each
    split of the examples. `strata`: where rungs choose their examples, for each task of `splits.choice` the strata that
    every rung has its share of, int[n] each. `target`: the devices that the search is made for.
    """

    config: Config
    search: SearchConfig
    base: Path | None
    parents: tuple[Path, ...]
    references: Mapping[Path, str]
    sources: Sources
    decoder: DecoderConfig
    space: ParameterSpace | PathSpace | BreedingSpace
    candidates: Candidates
    strategy: Strategy
    tokenizer: Any
    tokenizer_folder: Path
    other_modules: Path | None
    splits: Splits[list[Task]]
    strata: list[list[np.ndarray]]
    context: int
    stop: tuple[int, ...]
    target: Target

    @property
    def tokens_per_batch(self) -> int:
        return self.config.evaluation.tokens_per_batch or suitable_tokens(self.target)

    @property
    def compute_dtype(self) -> str:
        dtypes = {stored_dtype(self.sources, i) for i in range(len(self.sources.folders))}
        return self.target.compute_dtype(self.config.evaluation.compute_dtype, dtypes | {self.candidates.export_dtype})

    @property
    def final_compute_dtype(self) -> str:
        """The dtype of the splits that no generation is scored on: the winner is chosen, and reported, on them."""
        return self.config.evaluation.final_compute_dtype or self.compute_dtype

    def batched_tasks(self) -> Splits[list[BatchedTask]]:
        """The batches of the tasks on each split. Batches of all shards have the same shapes."""
        splits = self.splits
        scored = [*splits.shards, splits.search, *([] if splits.validation is None else [splits.validation])]
        *searched, heldout = self._batch([*scored, splits.heldout])
        searched = list(map(_weighted, searched))
        validation = None if splits.validation is None else searched.pop()
        *shards, search = searched
        choice = None
        if splits.choice is not None:
            # In batches like those of the shards, with room for any chosen examples.
            *_, everything = self._batch([*map(_weighted_tasks, splits.shards), splits.choice])
            choice = [batched_task.for_any_examples() for batched_task in everything]
        minibatches = self._batch(splits.minibatches) if splits.minibatches else []
        return Splits(shards, search, validation, heldout, minibatches, choice)

    def example_choice(self, evaluators: Splits[Any]) -> ExampleChoice | None:
        """The examples that rungs choose from; None where shards take turns. evaluators: of genomes, on each split."""
        if evaluators.choice is None:
            return None
        return ExampleChoice(evaluators.choice, self.strata, len(self.splits.shards))

    def _batch(self, splits: Sequence[Sequence[Task]]) -> list[list[BatchedTask]]:
        decoder = self.decoder
        return batch_tasks(
            splits, self.tokenizer, self.tokens_per_batch, self.context, self.stop, decoder.vocab,
            decoder.position_switch, self.target.merge_tokens,
        )  # fmt: skip

    def within(self, context: Any) -> "SearchProblem":
        """The problem once its strategy has a state that genomes refer to: the state lends `context` to the space;
        None: genomes are complete by themselves."""
        if context is None:
            return self
        assert isinstance(self.space, BreedingSpace) and isinstance(self.candidates, PoolCandidates)
        space = self.space.within(context)
        return replace(self, space=space, candidates=replace(self.candidates, space=space))

    @property
    def models(self) -> list[tuple[str, Path]]:
        base = [] if self.base is None else [("base", self.base)]
        return base + [("parent", parent) for parent in self.parents]

    @property
    def merged_from(self) -> list[Path]:
        return [folder.path for folder in self.sources.folders]


def read_config(path: Path, overrides: Sequence[str], seed: int | None) -> Config:
    """A config from its file, with `key.path=value` overrides."""
    document = load_yaml(path)
    if not isinstance(document, dict):
        raise InputError(path, "expected a mapping with parents, space and tasks")
    return config_from(path, document, overrides, seed)


def config_from(path: Path, document: dict[str, Any], overrides: Sequence[str], seed: int | None) -> Config:
    """A config from a parsed document: ours, or one of mergekit-evolve. `path` names it in messages."""
    if "merge_method" in document:
        raise InputError(path, "is a mergekit recipe, not the config of a search; do it with evojax-merge merge")
    if "genome" in document:
        document = from_mergekit_evolve(path, document)
    document = apply_overrides(path, document, list(overrides))
    if seed is not None:
        document["seed"] = seed
    # A run folder's config.yaml can be searched with again; the keys of that run are dropped.
    for key in RUN_KEYS:
        document.pop(key, None)
    return parse(path, document, Config)


def stage_config(config: Config, stage: StageConfig, winner: str | None) -> Config:
    """The config of one stage of a chain; `winner`: the model of the stage before."""
    parents = config.parents if winner is None else [winner, *config.parents]
    changes = {"stages": None, "space": stage.space, "data_flow": stage.data_flow, "search": stage.search}
    return config.model_copy(update=changes | {"parents": parents})


def stage_configs(config: Config) -> list[Config]:
    """The configs of a search's stages; until there is a winner, the first parent stands for it."""
    if config.stages is None:
        return [config]
    return [stage_config(config, stage, config.parents[0] if i else None) for i, stage in enumerate(config.stages)]


def revision_warnings(path: Path, config: Config) -> list[str]:
    """A line for each revision that a config names and that does not exist. `path` is the config's file."""
    lines = ignored_revisions((config.base, *config.parents, config.other_modules), path.parent)
    return [f"{path}: {line}" for line in lines]


def build_problem(
    path: Path, config: Config, *, chained: bool = False, target: Target | None = None,
    resolve: Callable[[object, str, Path], Path] = resolve_reference,
) -> SearchProblem:  # fmt: skip
    """Check everything and open the sources. `path` is the config's file: relative paths start there.

    `chained`: the first parent is the winner of the stage before, or stands for it. `target`: None: this machine's
    devices. `resolve`: finds the folder of a model from its reference in the config.
    """
    where, folder = str(path), path.parent
    target = target or live_target()
    target.check_shards(f"{where}: evaluation.model", config.evaluation.model)
    method = None
    if config.space is not None:
        method = find_method(f"{where}: space.method", config.space.method)
        check_models(where, method, config.base is not None, len(config.parents))
    bred_by = () if config.pool is None else _breeding_methods(where, config, config.pool)
    tasks = [
        open_task(f"{where}: tasks[{i}]", task, folder, config.seed, resolve_file)
        for i, task in enumerate(config.tasks)
    ]
    base = None if config.base is None else resolve(f"{where}: base", config.base, folder)
    parents = tuple(resolve(f"{where}: parents[{i}]", parent, folder) for i, parent in enumerate(config.parents))
    _check_distinct(where, base, parents, config.parents, first=1 if chained else 0)
    references = {
        folder: recipe_reference(reference, folder)
        for reference, folder in zip([config.base, *config.parents], [base, *parents], strict=True)
        if reference is not None and folder is not None
    }
    base_reference = None if base is None else references[base]
    merges_by = bred_by if method is None else (method,)
    has_base = any(merge_method.uses_base(base is not None) for merge_method in merges_by)
    paths = [base, *parents] if base is not None and has_base else list(parents)
    tokenizer_dir = None
    if config.tokenizer_source is not None:
        tokenizer_dir = (
            base
            if config.tokenizer_source == "base"
            else resolve(f"{where}: tokenizer_source", config.tokenizer_source, folder)
        )
        if tokenizer_dir is None or tokenizer_dir not in [base, *parents]:
            raise InputError(where, "tokenizer_source: expected base or one of the parents")
        if tokenizer_dir not in paths and (method is None or method.base_is_first_parent):
            # The base_model of its recipe is one of the parents.
            what = "a layer path" if method is None else method.name
            raise InputError(where, f"tokenizer_source: the base takes no part in {what}; take one of the parents")
    # A base that takes no part in the merge is opened all the same, to be checked against the parents.
    unmerged_base = [base] if base is not None and base not in paths else []
    opened = [*paths, *unmerged_base]
    tokenizer_choice = None if tokenizer_dir is None else TokenizerChoice(opened.index(tokenizer_dir))
    # Layers of a path may come from models of any depth.
    open_all = open_decoders if config.data_flow else _of_one_depth
    sources, configs = open_all(opened, tokenizer_choice)
    _check_tokens(opened, sources)
    other_modules = _other_modules(where, config, folder, sources.folders, base, parents)
    if None not in (other_modules, tokenizer_dir) and tokenizer_dir != other_modules:
        raise InputError(
            where, f"tokenizer_source: expected {other_modules}, whose other modules the winner has: its images have "
            "tokens of its own",
        )  # fmt: skip
    sources, decoder = replace(sources, folders=sources.folders[: len(paths)]), configs[0]
    export_dtype = config.export_dtype or stored_dtype(sources, 0)
    space: ParameterSpace | PathSpace | BreedingSpace
    candidates: Candidates
    pool_settings = None
    names = tuple(references[parent] for parent in parents)
    if method is not None and config.space is not None:
        space = build_space(f"{where}: space", config.space, method, config.parents, decoder)
        spec = MergeSpec(
            method.name,
            options_of(f"{where}: space", method, has_base, config.space.normalize, config.space.rescale),
            config.seed,
            export_dtype,
            tuple((name, values) for name, values in space.constants if not method.parameter(name).searched),
        )
        candidates = MergeCandidates(space, spec, sources, decoder, base_reference, names)
    elif config.pool is not None:
        _check_heads(where, sources)
        genes = genome_genes(bred_by, config.pool.split)
        space = BreedingSpace(bred_by, decoder.layers, config.pool.split, founding_genealogy(len(parents), genes))
        size = config.pool.size or max(SMALLEST_POOL, 2 * len(parents))
        pool_settings = PoolSettings(len(parents), len(bred_by), size, config.pool.selection, config.pool.replace)
        candidates = pooled = PoolCandidates(
            space, sources, decoder, has_base, base_reference if has_base else None, names, export_dtype, config.seed,
            config.pool.slots or size,
        )  # fmt: skip
        # While a member is bred again, at most as many of its ancestors are held as the pool had members.
        held = pooled.slots + size
        require_memory(
            f"{where}: pool", f"holding {held:,} bred members", held * pooled.bank.member_bytes(),
            available_memory(),
        )  # fmt: skip
    else:
        assert config.data_flow is not None
        path_spec = PathSpec(tuple(configs[: len(paths)]), export_dtype)
        space = build_path_space(f"{where}: data_flow", config.data_flow, path_spec)
        candidates = PathCandidates(space, path_spec, sources, names)
    objectives = sum(task.weight > 0 for task in config.tasks)
    strategy = build_strategy(f"{where}: search", config.search, space, objectives, pool_settings)
    # The winner's generation_config.json is the first model's, or that of the model whose ends a path keeps; a pool's
    # member may have that of any.
    leaders = {0, 0 if config.data_flow is None else config.data_flow.embedding_parent}
    for number in leaders if config.pool is None else range(len(sources.folders)):
        read_json_object(sources.folders[number].path / "generation_config.json", missing={})
    tokenizer_folder = tokenizer_dir or (base if base is not None else parents[0])
    tokenizer, context = load_tokenizer(tokenizer_folder), context_length(sources.folders, decoder.positions)
    full, validation = validation_split(
        f"{where}: search.validation", [task for task, _ in tasks], config.search.validation, config.seed
    )
    searched = [_limited(task, section.limit) for task, section in zip(full, config.tasks, strict=True)]

    def lengths(task: Task) -> np.ndarray:
        return example_lengths(task, tokenizer, context)

    shards = stratified_shards(f"{where}: search.rungs", searched, lengths, config.search.rungs, config.seed)
    choice = _weighted_tasks(searched) if config.search.rung_examples == "item_response" else None
    return SearchProblem(
        config=config,
        search=config.search,
        base=base,
        parents=parents,
        references=references,
        sources=sources,
        decoder=decoder,
        space=space,
        candidates=candidates,
        strategy=strategy,
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        other_modules=other_modules,
        splits=Splits(
            shards=shards,
            search=full,
            validation=validation or None,
            heldout=[heldout for _, heldout in tasks],
            minibatches=_minibatches(where, config, strategy, searched, lengths),
            choice=choice,
        ),
        strata=[length_strata(lengths(task), len(shards)) for task in choice or ()],
        context=context,
        stop=stop_tokens(tokenizer_folder, tokenizer),
        target=target,
    )


def _minibatches(
    where: str, config: Config, strategy: Strategy, searched: Sequence[Task], lengths: Callable[[Task], np.ndarray]
) -> list[list[Task]]:
    """The tasks that a strategy differentiates, in minibatches of their examples; none for a strategy that follows no
    gradient. Raises InputError for a space without a differentiable parameter, for a goal that is not differentiable,
    and where a minibatch has no example."""
    what = differentiates(strategy)
    if what is None:
        return []
    if config.data_flow is not None and config.data_flow.scales == "none":
        raise InputError(
            f"{where}: search.strategy",
            f"{strategy.name}: which layers a path takes has no gradient, and scales: none leaves nothing that has "
            "one; take other scales, or path_ga (form: moves) or cma_es for the layers",
        )
    weighted = [(i, task) for i, task in enumerate(searched) if task.weight > 0]
    smooth = [_smooth(f"{where}: tasks[{i}]", task, what, strategy) for i, task in weighted]
    parts, least = config.search.gradient.minibatches, min(task.size for task in smooth)
    if parts > least:
        raise InputError(
            f"{where}: search.gradient.minibatches",
            f"{parts}; expected {least} at most, as many as the smallest task has examples to search on",
        )
    return stratified_parts(smooth, lengths, parts, config.seed)


def _smooth(where: str, task: Task, what: Differentiates, strategy: Strategy) -> Task:
    """The task itself where it is differentiable, else its companion. Raises InputError where neither is."""
    if task.derivative is not None:
        return task
    companion = task.companion()
    if what == "companion" and companion is not None:
        return companion
    if companion is None:
        raise InputError(
            where,
            f"{task.name}: the strategy {strategy.name} follows a gradient, and {task.metric} has none, nor anything "
            "differentiable that stands for it; take another strategy, such as cma_es",
        )
    raise InputError(
        where,
        f"{task.name}: the strategy {strategy.name} follows the gradient of the fitness, and {task.metric} has none; "
        f"take hybrid, which begins with {companion.metric}",
    )


def _check_distinct(where: str, base: Path | None, parents: Sequence[Path], names: Sequence[str], first: int) -> None:
    """Raises InputError where a model is named twice, by whatever path: it would have two weights, or none. Checks the
    parents from the number `first` on."""
    named = {} if base is None else {base: "base"}
    for i, parent in enumerate(parents[first:], first):
        if parent in named:
            raise InputError(where, f"parents[{i}]: {names[i]} is {named[parent]} already; expected models that differ")
        named[parent] = f"parents[{i}]"


def _other_modules(
    where: str,
    config: Config,
    folder: Path,
    opened: Sequence[DecoderFolder],
    base: Path | None,
    parents: Sequence[Path],
) -> Path | None:
    """The model whose other modules the winner has: the one that the config names, else the base or the first parent
    that has any. None where all are decoders alone. Raises InputError for a model that is not in the search, or that
    has no other modules."""
    models = [*parents] if base is None else [base, *parents]
    larger = [opened_folder.path for opened_folder in opened if opened_folder.other_modules]
    if config.other_modules is None:
        return next((model for model in models if model in larger), None)
    named = base if config.other_modules == "base" else None
    if config.other_modules != "base":
        named = resolve_reference(f"{where}: other_modules", config.other_modules, folder)
    if named is None or named not in models:
        raise InputError(where, "other_modules: expected base or one of the parents")
    if named not in larger:
        raise InputError(where, f"other_modules: {named} is a text decoder alone; expected a larger model")
    return named


def _of_one_depth(paths: Sequence[Path], tokenizer: TokenizerChoice | None) -> tuple[Sources, list[DecoderConfig]]:
    sources, config = open_sources(paths, tokenizer)
    return sources, [config] * len(paths)


def build_path_space(where: str, config: DataFlowConfig, spec: PathSpec) -> PathSpace:
    """The data-flow space of a config. Raises InputError for an end that no parent has, or an impossible path."""
    depths = tuple(decoder.layers for decoder in spec.configs)
    if config.embedding_parent >= len(depths):
        raise InputError(
            where,
            f"embedding_parent: there is no parent {config.embedding_parent} "
            f"(they are numbered from 0 to {len(depths) - 1})",
        )
    bounds = ScaleBounds(config.scale_low, config.scale_high)
    if config.max_layers is not None and config.max_layers < depths[0]:
        raise InputError(where, f"max_layers: {config.max_layers}; the first parent has {depths[0]} layers already")
    if config.form == "moves":
        max_length = config.max_layers or 2 * depths[0]
        return MoveSpace(
            depths,
            config.moves,
            min(config.window, depths[0]),
            bounds,
            config.scales != "none",
            max_length,
            config.embedding_parent,
        )
    places = sum(depths) * config.repetitions
    if places > MAX_PATH_LAYERS:
        raise InputError(
            where,
            f"repetitions: {config.repetitions} times {sum(depths)} layers are paths of up to {places:,}; expected "
            f"{MAX_PATH_LAYERS // sum(depths)} repetitions at most, for paths of {MAX_PATH_LAYERS:,}",
        )
    max_length = config.max_layers or places
    return IndicatorSpace(
        depths, config.repetitions, config.scales or "matrix", bounds, max_length, config.embedding_parent
    )


def build_strategy(
    where: str, search: SearchConfig, space: Space, objectives: int = 1, pool: PoolSettings | None = None
) -> Strategy:
    """The strategy of a config, with its seeds. objectives: the number of tasks that the fitness is made of; pool: of a
    search over a pool's members. Raises InputError for an unknown strategy, for dimensions, objectives, a population or
    seeds that it cannot have, for a search whose genomes do not fit into memory, and for one that would end before its
    first generation."""
    dims = space.dims
    if dims > MAX_DIMS:
        raise InputError(
            where.removesuffix(": search"),
            f"the search has {dims:,} dimensions; expected {MAX_DIMS:,} at most: let more layers share their "
            "parameters (layers_per_group), or take other scales",
        )  # fmt: skip
    named_seeds = seeds_of(f"{where}.strategy", search)
    population = search.population or default_population(dims)
    require_memory(
        where,
        f"population {population:,} (and {search.finalists:,} finalists) of {dims:,} dimensions",
        GENOME_COPIES * 4 * dims * (population + search.finalists),
        available_memory(),
    )
    seeds = seed_genomes(where, named_seeds, space)
    settings = StrategySettings(
        dims,
        search.population,
        search.sigma,
        search.generations,
        from_unit,
        len(seeds),
        search.gradient,
        where,
        objectives,
        space.move_genes if isinstance(space, HasMoves) else (),
        pool,
    )
    strategy = make_strategy(where, search.strategy, settings)
    check_stop(where, search.stop, strategy.population)
    check_gradient_options(where, search, strategy)
    check_front_options(where, search, strategy)
    return seeded(strategy, seeds)


def _check_tokens(folders: Sequence[Path], sources: Sources) -> None:
    """Raises InputError where a model of a search lacks a token: a made-up row would be searched like a trained one."""
    vocabulary = sources.vocabulary
    if vocabulary is None or not vocabulary.fills:
        return
    for folder, rows in zip(folders, vocabulary.rows, strict=True):
        missing = np.flatnonzero(rows < 0)
        if missing.size:
            token = vocabulary.tokenizer.convert_ids_to_tokens(int(missing[0]))
            raise InputError(
                folder, f"lacks {missing.size} of the tokens (such as {shown(token)}); cannot align its rows"
            )


def check_models(where: str, method: Method, has_base: bool, parents: int) -> None:
    """Raises InputError for a base that is missing, and for a number of parents that the method cannot merge."""
    if method.base == "required" and not has_base:
        raise InputError(where, f"base: missing; {method.name} takes task vectors from a base model")
    check_parent_count(f"{where}: parents", method, parents)


def parameter_space(path: Path, config: Config) -> tuple[ParameterSpace, list[str]] | None:
    """The parameter space of a config, and what its parents are called in tables; None where it searches something
    else. Opens the first parent's headers alone."""
    if config.space is None:
        return None
    names = [f"{path}: parents[{k}]" for k in range(len(config.parents))]
    parents = [resolve_reference(name, one, path.parent) for name, one in zip(names, config.parents, strict=True)]
    _, decoder = open_sources(parents[:1])
    method = find_method(f"{path}: space.method", config.space.method)
    return build_space(f"{path}: space", config.space, method, config.parents, decoder), model_names(parents)


def _breeding_methods(where: str, config: Config, pool: PoolConfig) -> tuple[Method, ...]:
    """The methods that breed a pool's children. Raises InputError for methods that cannot, and for a pool of one
    model."""
    if len(config.parents) < PARENTS:
        raise InputError(where, f"parents: 1 model; a pool breeds from {PARENTS} or more")
    if config.tokenizer_source is not None:
        raise InputError(
            where, "tokenizer_source: a pool's models share their tokens; merge each with the tokenizer first, or "
            "leave it out",
        )  # fmt: skip
    methods = []
    for i, name in enumerate(pool.methods):
        key = f"{where}: pool.methods[{i}]"
        method = find_method(key, name)
        check_parent_count(key, method, PARENTS)
        if method.base == "required" and config.base is None:
            raise InputError(where, f"base: missing; {name} (pool.methods[{i}]) takes task vectors from a base model")
        if method in methods:
            raise InputError(key, f"{name} stands there already; expected methods that differ")
        methods.append(method)
    return tuple(methods)


def _check_heads(where: str, sources: Sources) -> None:
    """Raises InputError where some of a pool's models share their head with the embedding and others do not."""
    tied = [bool(folder.config.get("tie_word_embeddings", False)) for folder in sources.folders]
    if any(tied) and not all(tied):
        paths = [sources.folders[tied.index(is_tied)].path for is_tied in (True, False)]
        raise InputError(
            where, f"parents: the head of {paths[0]} is its embedding (tie_word_embeddings), that of {paths[1]} is "
            "not; a pool breeds models that are alike in this",
        )  # fmt: skip


def stored_dtype(sources: Sources, number: int) -> str:
    """The dtype of a source's weights, by its embedding; float32 where that is no dtype that a model is written in."""
    dtype = sources.entry(number, sources.token_tensors.embedding).dtype
    return next((name for name, float_dtype in FLOAT_DTYPES.items() if float_dtype == dtype), "float32")


def build_space(
    where: str, config: SpaceConfig, method: Method, parents: Sequence[str], decoder: DecoderConfig
) -> ParameterSpace:
    """The parameter space of a config. parents: their names in the config. Raises InputError for unknown parameters and
    parents, and for meaningless bounds."""
    shared = [leaf.name for leaf in architecture_of(decoder).shared]
    components = architecture_of(decoder).components
    named = [name.strip() for part in config.components for name in part.split("+")]
    # A router that is not named has parameters of its own, like shared leaves.
    alone = [ROUTER] if ROUTER in components and ROUTER not in named else []
    groups = component_groups([*config.components, *alone], components, shared)
    if groups is None:
        unknown = [
            f"{name!r}{did_you_mean(name, [*components, *shared])}"
            for name in named
            if name not in {*components, *shared}
        ]
        wrong = unknown[0] if unknown else str(config.components)
        raise InputError(where, f"components: {wrong}; expected each of {', '.join(components)} once (join with +)")
    parent_groups = parent_groups_of(where, config.parent_groups, parents)
    search_parameters, constants = search_parameters_of(
        where, method, len(parents), config.parameters, config.fixed, parent_groups
    )
    together = config.layers_per_group
    space = ParameterSpace(
        method=method,
        parents=len(parents),
        layers=decoder.layers,
        layers_per_group=decoder.layers if together == "all" else min(together, decoder.layers),
        names=components,
        components=groups,
        shared=tuple(leaf.name for leaf in shared_leaves(decoder)),
        search_parameters=search_parameters,
        constants=constants,
        smooth=config.smooth,
        parent_groups=parent_groups,
        active=config.active,
    )
    check_active(where, config.active, space)
    return space


def _weighted(batched_tasks: list[BatchedTask]) -> list[BatchedTask]:
    """The batches of tasks that are part of the fitness: a task of weight 0 is only shown in the held-out table."""
    return [batched_task for batched_task in batched_tasks if batched_task.task.weight > 0]


def _weighted_tasks(tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks if task.weight > 0]


def _limited(task: Task, limit: int | None) -> Task:
    return task if limit is None else task.subset(range(min(limit, task.size)))


def context_length(folders: Sequence[Folder], positions: int | None = None) -> int:
    """The most tokens that all of these models take: no model is asked for positions that it was not trained on.
    positions: the number of embedded positions; None: positions are not embedded."""
    trained = min(int(folder.config.get("max_position_embeddings") or 2**30) for folder in folders)
    return trained if positions is None else min(trained, positions)


def stop_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The token ids that end a generation: of generation_config.json, else of config.json, and the tokenizer's own.

    Raises InputError where a file gives anything but ids of the model's vocabulary; other keys of the files are not
    read.
    """
    eos_ids: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        document = read_json_object(folder / name, missing={})
        ids = document.get("eos_token_id", decoder_settings(document).get("eos_token_id"))
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        settings = decoder_settings(read_json_object(folder / "config.json", missing={}))
        rows = settings.get("vocab_size", len(tokenizer))
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < rows:
                raise InputError(
                    folder / name,
                    f"eos_token_id: {shown(token_id)}; expected a token id from 0 to {rows - 1}, or a list of them",
                )
        return tuple(sorted(eos_ids | set(ids)))
    return tuple(sorted(eos_ids))


def failure_hint(task: Task) -> str:
    """Advice for a task on which every candidate fails."""
    return task.failure_hint() or (
        "Merges overflow where the bounds of their parameters are wide, and paths fail that have no layer or more than "
        "max_layers: narrow the bounds, lower search.sigma, or evaluate the parents by themselves"
    )


def resolved_space(problem: SearchProblem) -> dict[str, Any] | None:
    """The config's space for the run folder: its groups of parents with absolute paths."""
    space = problem.config.space
    if space is None:
        return None
    members = {}
    for name, patterns in space.parent_groups.items():
        alone = parent_groups_of("space", {name: patterns}, problem.config.parents)
        # In a chain the first parent may stand for itself and for the winner of the stage before.
        members[name] = list(
            dict.fromkeys(reference_to(p) for p, g in zip(problem.parents, alone, strict=True) if g == 0)
        )
    return space.model_copy(update={"parent_groups": members}).model_dump(mode="json")


def resolved_document(problem: SearchProblem) -> dict[str, Any]:
    """The config for the run folder: absolute paths, defaults filled in, the hash of every file that scores depend on
    (weights, the models' configs, the files of their tokenizers and chat templates, data, functions, plugins), and the
    scheme of random masks."""
    document = problem.config.model_dump(mode="json")
    document.pop("out")
    document["base"] = None if problem.base is None else reference_to(problem.base)
    document["parents"] = list(map(reference_to, problem.parents))
    document["space"] = resolved_space(problem)
    if problem.config.tokenizer_source not in (None, "base"):
        document["tokenizer_source"] = reference_to(problem.tokenizer_folder)
    if problem.other_modules is not None and problem.config.other_modules not in (None, "base"):
        document["other_modules"] = reference_to(problem.other_modules)
    document["export_dtype"] = problem.candidates.export_dtype
    document["evaluation"]["compute_dtype"] = problem.compute_dtype
    document["tasks"] = list(map(resolved_config, problem.config.tasks, problem.splits.search, problem.splits.heldout))
    files = {file for task in problem.splits.search + problem.splits.heldout for file in task.files}
    for _, folder in problem.models:
        files |= input_files(folder)
    architecture = architecture_of(problem.decoder)
    factory = find_strategy("search.strategy", problem.search.strategy)
    tasks = [*problem.config.tasks, *problem.splits.search]
    extensible = [*problem.candidates.methods, factory, problem.strategy, architecture, *tasks]
    plugins = sorted({*problem.config.plugins, *named_plugins(extensible)})
    if plugins:
        document["plugins"] = plugins
    files |= source_files(extensible) | files_of(plugins)
    document["inputs"] = {str(file): file_hash(file) for file in sorted(files)}
    return document | random_numbers(problem.candidates.is_random)
