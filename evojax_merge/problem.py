"""A config -> everything a search needs, checked before any long work.

A user's mistakes are found here, cheapest first: the space, the task files, the parents' headers, their tokenizers,
then the run folder.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, cast

import numpy as np
from merge_kernels import METHODS
from typing_extensions import TypeVar

from evojax_merge.backends.backend import Backend, BackendFacts, Prepared, Resolve
from evojax_merge.backends.registry import find_backend
from evojax_merge.checkpoints.derived import ignored_revisions, input_files
from evojax_merge.checkpoints.folder import file_sample
from evojax_merge.checkpoints.kept_hashes import file_hashes
from evojax_merge.checkpoints.references import local_path
from evojax_merge.config.documents import apply_overrides, parse
from evojax_merge.config.search_config import AUTO, JUDGED_KINDS, VOTES, Config, KeepConfig, SearchConfig, StageConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.memory import available_memory, require_memory
from evojax_merge.evaluation.targets import Target, live_target
from evojax_merge.mergekit.evolve_config import from_mergekit_evolve
from evojax_merge.plugins import files_of, named_plugins, source_files
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.search.auto import Traits, choose, gradient_note
from evojax_merge.search.budgets import within_budget
from evojax_merge.search.example_choice import length_strata
from evojax_merge.search.genomes import ComparesNeighbours, Neighbours, neighbours_of
from evojax_merge.search.kept_scores import KeptScores
from evojax_merge.search.protocols import (
    ContextSpace,
    Differentiates,
    HasMoves,
    Space,
    Strategy,
    capabilities_of,
    differentiates,
    plain_merges_of,
)
from evojax_merge.search.run_folder import RANDOM_NUMBERS, random_numbers
from evojax_merge.search.run_schema import GROUPS
from evojax_merge.search.seeding import seed_genomes, seeded
from evojax_merge.search.strategies.cma_es import default_population
from evojax_merge.search.strategies.greedy import averages_of
from evojax_merge.search.strategies.registry import (
    PoolSettings,
    StrategySettings,
    check_options,
    find_strategy,
    make_strategy,
    seeds_of,
)
from evojax_merge.search.successive_halving import stratified_parts, stratified_shards
from evojax_merge.search.validation import validation_split
from evojax_merge.spaces.bounds import from_unit
from evojax_merge.tasks.data_versions import dvc_record
from evojax_merge.tasks.opening import open_task, resolved_config
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.task import GUARD_WEIGHT
from evojax_merge.zoo.references import resolve_file, resolve_reference

# The most dimensions of a search: a mean and a standard deviation of each are kept and saved in every generation.
MAX_DIMS = 1_000_000
# The examples of each task that a step of an adapter's training sees.
TUNING_EXAMPLES = 16
# Arrays of a population's genomes that a generation has at a time.
GENOME_COPIES = 6
# The measure of tasks in the fitness: their own units, or the distance from the base to the best parent.
ScaleBy = Literal["none", "parents"]


# The kind of a problem's backend, for code that knows which one it is.
B = TypeVar("B", bound=Backend, default=Any, covariant=True)


@dataclass(frozen=True)
class SearchProblem(Generic[B]):
    """A search, ready to run. `search`, `seed`: of its config, with the strategy that `auto` stands for, and the
    generations that a budget pays for; `splits`: the tasks on each split; `strata`: where rungs choose their examples,
    for each task of `splits.choice` the strata that every rung has its share of, int[n] each; `scale`: what tasks are
    measured by; `guards`: the tolerance of each guarded task, by its name; `notes`: lines on the choice of the
    strategy; `kept`: the scores of base and parents that earlier searches kept; `config`: the search's, and `reopen`:
    (a changed config, a target) -> its backend; None where no file says what the models are."""

    search: SearchConfig
    seed: int
    backend: B
    strategy: Strategy
    splits: Splits[list[Any]]
    strata: list[list[np.ndarray]]
    scale: ScaleBy = "none"
    guards: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kept: KeptScores | None = None
    config: Config | None = None
    reopen: Callable[[Config, Target], Backend] | None = None

    @property
    def facts(self) -> BackendFacts:
        return self.backend.facts

    @property
    def space(self) -> Any:
        return self.facts.space

    @property
    def target(self) -> Target:
        return self.facts.target

    @property
    def parents(self) -> tuple[Path, ...]:
        return self.facts.parents

    @property
    def keep(self) -> KeepConfig:
        return KeepConfig() if self.config is None else self.config.keep

    @property
    def tunes_by_gradient(self) -> bool:
        """Return whether the tasks of `splits.tuning` have derivatives."""
        return all(task.derivative is not None for tasks in self.splits.tuning for task in tasks)

    def neighbours(self, tasks: Sequence[Any]) -> Neighbours:
        """The genomes that are scored beside each genome, because the tasks compare their answers."""
        return neighbours_of(tasks, self.space.dims, self.seed)

    def prepare(self) -> Prepared:
        """The tasks of each split as the backend evaluates them."""
        return self.backend.prepare(self.splits)

    def exporting(self) -> B:
        """The backend, ready to write candidates: batch norms are measured on the search's examples."""
        if self.facts.settings.recalibrate:
            self.prepare()
        return self.backend

    def within(self, context: Any) -> "SearchProblem[B]":
        """The problem once its strategy's state lends `context` to the space; None: genomes are complete by
        themselves."""
        return replace(self, backend=cast(B, self.backend.within(context)))


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
    # A run folder's config.yaml can be searched with again; these keys are no settings.
    for key in (RANDOM_NUMBERS, GROUPS):
        document.pop(key, None)
    return parse(path, document, Config)


def stage_config(config: Config, stage: StageConfig, winner: str | None) -> Config:
    """The config of one stage of a chain; `winner`: the model of the stage before."""
    parents = config.parents if winner is None else [winner, *config.parents]
    looks = stage.space is not None and stage.space.method in METHODS and METHODS[stage.space.method].looks_at
    calibration = config.calibration if looks else None
    changes = {"stages": None, "space": stage.space, "data_flow": stage.data_flow, "search": stage.search}
    return config.model_copy(update=changes | {"parents": parents, "calibration": calibration})


def stage_configs(config: Config) -> list[Config]:
    """The configs of a search's stages; until there is a winner, the first parent stands for it."""
    if config.stages is None:
        return [config]
    return [stage_config(config, stage, config.parents[0] if i else None) for i, stage in enumerate(config.stages)]


def revision_warnings(path: Path, config: Config) -> list[str]:
    """A line for each revision that a config names and that does not exist. `path` is the config's file."""
    lines = ignored_revisions((config.base, *config.parents, config.other_modules), path.parent)
    return [f"{path}: {line}" for line in lines]


def model_samples(path: Path, config: Config) -> dict[str, str]:
    """Samples of the files of a config's models, by the model's key and the file's name; of models that the config
    names by a path of this machine. `path` is the config's file."""
    references = {"base": config.base, **{f"parents[{i}]": parent for i, parent in enumerate(config.parents)}}
    files: dict[str, Path] = {}
    for key, reference in references.items():
        model = None if reference is None else local_path(reference, path.parent)
        if model is not None:
            files |= {f"{key}: {file.name}": file for file in sorted(input_files(model))}
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(file_sample, files.values()), strict=True))


def open_backend(path: Path, config: Config, *, chained: bool = False) -> Backend:
    """Open a config's models and its space, and none of its tasks (see `build_problem`)."""
    where, folder = str(path), path.parent
    kind = find_backend(f"{where}: backend", config.backend, folder)
    kind.check(where, config)
    return kind.open(where, config, folder, live_target(), resolve_reference, chained)


def build_problem(
    path: Path, config: Config, *, chained: bool = False, target: Target | None = None,
    resolve: Resolve = resolve_reference,
) -> SearchProblem:  # fmt: skip
    """Check everything and open the models. `path` is the config's file: relative paths start there.

    `chained`: the first parent is the winner of the stage before, or stands for it. `target`: None: this machine's
    devices. `resolve`: finds the folder of a model from its reference in the config.
    """
    where, folder = str(path), path.parent
    target = target or live_target()
    target.check_shards(f"{where}: evaluation.model", config.evaluation.model)
    kind = find_backend(f"{where}: backend", config.backend, folder)
    kind.check(where, config)
    tasks = []
    for i, section in enumerate(config.tasks):
        if section.guard and not section.weight:
            # The search scores a guarded task.
            section = section.model_copy(update={"weight": GUARD_WEIGHT})
        tasks.append(open_task(f"{where}: tasks[{i}]", section, folder, config.seed, resolve_file))

    def reopen(config: Config, target: Target) -> Backend:
        return kind.open(where, config, folder, target, resolve, chained)

    backend = reopen(config, target)
    for i, (task, _) in enumerate(tasks):
        backend.check(f"{where}: tasks[{i}]", task)
    pool, limits = config.pool, [section.limit for section in config.tasks]
    settings = None if pool is None else PoolSettings(
        len(config.parents), len(pool.methods), pool.members(len(config.parents)), pool.selection, pool.replace
    )  # fmt: skip
    search, strategy, notes = _open_search(
        f"{where}: search", config.search, backend.facts.space, tasks, limits, backend.facts.has_derivatives, settings,
        any(section.guard for section in config.tasks),
    )  # fmt: skip
    if config.data_flow is not None and config.data_flow.scales == "none" and differentiates(strategy) is not None:
        raise InputError(
            f"{where}: search.strategy",
            f"{strategy.name}: which layers a path takes has no gradient, and scales: none leaves nothing that has "
            "one; take other scales, or path_ga (form: moves) or cma_es for the layers",
        )
    counting = [section for section in config.tasks if section.weight > 0]
    judged = [section for section in counting if getattr(section, "kind", None) in JUDGED_KINDS]
    if config.search.strategy == VOTES and (len(judged), len(counting)) != (1, 1):
        raise InputError(
            f"{where}: search.strategy", f"{VOTES}: needs one task in the fitness, which people judge (kind: "
            f"{' or '.join(JUDGED_KINDS)}); take another strategy, such as cma_es",
        )  # fmt: skip
    _check_guards(where, config, backend, strategy)
    problem = _searchable(where, search, strategy, config.seed, backend, tasks, limits)
    guards = {section.name: section.tolerance for section in config.tasks if section.guard}
    metrics = [task.metric for task, _ in tasks]
    scale = _scale(f"{where}: scale", config, metrics, backend)
    return replace(problem, scale=scale, guards=guards, config=config, reopen=reopen, notes=notes)


def _scale(where: str, config: Config, metrics: Sequence[str], backend: Any) -> ScaleBy:
    """The measure of the tasks: where a config does not say it, the parents if several metrics are unlike.
    metrics: the tasks'."""
    counted = [
        (type(section), getattr(section, "kind", None), metric)
        for section, metric in zip(config.tasks, metrics, strict=True)
        if section.weight > 0
    ]
    comparable = len(backend.facts.compared) > 1
    if config.scale is None:
        return "parents" if comparable and len(set(counted)) > 1 else "none"
    if config.scale == "parents" and not comparable:
        raise InputError(
            where, "parents: there is one parent and no base, and so no distance between two scores; name a base or "
            "another parent, or take scale: none",
        )  # fmt: skip
    return config.scale


def _check_guards(where: str, config: Config, backend: Any, strategy: Strategy) -> None:
    """Raises InputError for a guard where no base is, and for a search that does not compare candidates by one number
    on all examples."""
    number = next((i for i, section in enumerate(config.tasks) if section.guard), None)
    if number is None:
        return
    key, search = f"{where}: tasks[{number}].guard", config.search
    if backend.facts.base is None:
        raise InputError(key, "true: compares candidates with the base, and there is none; name one, or leave it out")
    if search.rungs > 1:
        raise InputError(
            key, f"true: a race (search.rungs: {search.rungs}) stops candidates on a part of the examples, which does "
            "not show whether they keep a guard; leave rungs out",
        )  # fmt: skip
    if config.pool is not None or capabilities_of(strategy).keeps_front or differentiates(strategy) is not None:
        raise InputError(
            key, f"true: the strategy {strategy.name} does not go by one fitness of each candidate, in which a guard "
            "could count; take another, such as cma_es",
        )  # fmt: skip


def _open_search(
    where: str, search: SearchConfig, space: Space, tasks: Sequence[tuple[Any, Any]], limits: Sequence[int | None],
    is_differentiable: bool, pool: PoolSettings | None, is_guarded: bool,
) -> tuple[SearchConfig, Strategy, tuple[str, ...]]:  # fmt: skip
    """Decide on the strategy of a search, where it names `auto`, and on its generations, where it has a budget, and
    make the strategy; with lines on the choice. tasks, limits: see `_searchable`; is_differentiable: whether candidates
    have derivatives with respect to all genes; pool: of a search over a pool's members; is_guarded: whether a task is a
    constraint. Raises InputError as `build_strategy` does, and for a budget that the search cannot keep."""
    weighted = [(task, limit) for (task, _), limit in zip(tasks, limits, strict=True) if task.weight > 0]
    sizes = [task.size - round(search.validation * task.size) for task, _ in weighted]
    examples = min(
        size if limit is None else min(size, limit) for size, (_, limit) in zip(sizes, weighted, strict=True)
    )
    differentiable: Differentiates | None = None
    if is_differentiable and pool is None:
        if all(task.derivative is not None for task, _ in weighted):
            differentiable = "fitness"
        elif all(task.derivative or task.companion() is not None for task, _ in weighted):
            differentiable = "companion"
    traits = Traits(differentiable, max(examples, 1), isinstance(space, HasMoves), is_guarded)
    objectives, notes = sum(task.weight > 0 for task, _ in tasks), []
    if search.strategy == AUTO:
        search, reason = choose(search, traits)
        notes = [reason]

    def make(changed: SearchConfig) -> Strategy:
        return build_strategy(where, changed, space, objectives, pool)

    search = within_budget(where, search, traits.examples, make)
    strategy = make(search)
    most = capabilities_of(strategy).generations
    if most is not None:
        search = search.model_copy(update={"generations": min(most, search.generations)})
    note = gradient_note(search, strategy, traits)
    return search, strategy, (*notes, *([] if note is None else [note]))


def _searchable(
    where: str, search: SearchConfig, strategy: Strategy, seed: int, backend: Backend,
    tasks: Sequence[tuple[Any, Any]], limits: Sequence[int | None],
) -> SearchProblem:  # fmt: skip
    """A search over a backend's models. tasks: each on its searched and its held-out examples (None: it has none);
    limits: for each task the number of searched examples that generations are scored on, None: all.

    Raises InputError where a split would have no example, and for a task that the strategy cannot differentiate."""
    full, validation = validation_split(
        f"{where}: search.validation", [task for task, _ in tasks], search.validation, seed
    )
    searched = [
        task if limit is None else task.subset(range(min(limit, task.size)))
        for task, limit in zip(full, limits, strict=True)
    ]
    lengths = backend.example_lengths
    shards = stratified_shards(f"{where}: search.rungs", searched, lengths, search.rungs, seed)
    choice = [task for task in searched if task.weight > 0] if search.rung_examples == "item_response" else None
    if search.then == "polish" and (backend.facts.not_polishable or search.strategy == VOTES):
        reason = backend.facts.not_polishable or "votes are for the search's candidates"
        raise InputError(f"{where}: search.then", f"polish: {reason}; leave it out")
    if search.controls:
        _check_controls(f"{where}: search.controls", search, backend, any(heldout for _, heldout in tasks))
    _check_neighbours(where, search, backend.facts.space, [*full, *(heldout for _, heldout in tasks)])
    splits = Splits(
        shards=shards,
        search=full,
        validation=validation or None,
        heldout=[heldout for _, heldout in tasks if heldout is not None],
        minibatches=_minibatches(where, search, seed, strategy, searched, lengths),
        choice=choice,
        tuning=_tuning_parts(searched, lengths, seed) if "lora" in search.controls or search.then else [],
    )
    strata = [length_strata(lengths(task), len(shards)) for task in choice or ()]
    return SearchProblem(search, seed, backend, strategy, splits, strata)


def _check_controls(where: str, search: SearchConfig, backend: Backend, has_heldout: bool) -> None:
    """Raises InputError for controls that a search cannot have."""
    if "greedy" in search.controls:
        averages_of(where, backend.facts.space)
    if not has_heldout or search.strategy == VOTES:
        lacking = "votes are for the search's candidates" if has_heldout else "there are no held-out examples"
        raise InputError(where, f"are rows of the held-out table, and {lacking}; leave it out")
    if "uniform" in search.controls and backend.facts.baseline_role != "uniform":
        raise InputError(where, "uniform: the candidates are no merges of all parents; leave it out")
    if "random" in search.controls and isinstance(backend.facts.space, ContextSpace):
        raise InputError(where, "random: candidates are bred from others, and none is random; leave it out")
    if "lora" in search.controls and backend.facts.not_adaptable:
        raise InputError(where, f"lora: {backend.facts.not_adaptable}; leave it out")


def _check_neighbours(where: str, search: SearchConfig, space: Space, tasks: Sequence[Any]) -> None:
    """Raises InputError where candidates have no neighbours that a task compares them with."""
    comparing: list[Any] = [task for task in tasks if isinstance(task, ComparesNeighbours)]
    if comparing and isinstance(space, ContextSpace | HasMoves):
        what = "compares candidates whose genes differ a little, and those of this search are bred, or lists of moves"
        raise InputError(f"{where}: tasks", f"{comparing[0].name} {what}; search for a merge, or take kind: entropy")
    written = next((task.name for task in comparing if task.weight > 0 and task.companion() is None), None)
    if written is not None and ("lora" in search.controls or search.then):
        what = "adapters have no neighbours whose answers task"
        raise InputError(f"{where}: search", f"{what} {written} compares; leave controls: [lora] and then out")


def _tuning_parts(searched: Sequence[Any], lengths: Callable[[Any], np.ndarray], seed: int) -> list[list[Any]]:
    """The parts of the searched examples that a low-rank change is trained on: of the tasks, or of what stands for
    those without a derivative; where a task has neither, the fitness itself."""
    counted = [task for task in searched if task.weight > 0]
    smooth = [task if task.derivative is not None else task.companion() for task in counted]
    tasks = counted if None in smooth else smooth
    return stratified_parts(tasks, lengths, max(1, min(task.size for task in tasks) // TUNING_EXAMPLES), seed)


def _minibatches(
    where: str, search: SearchConfig, seed: int, strategy: Strategy, searched: Sequence[Any],
    lengths: Callable[[Any], np.ndarray],
) -> list[list[Any]]:  # fmt: skip
    """The tasks that a strategy differentiates, in minibatches of their examples; none for a strategy that follows no
    gradient. Raises InputError for a goal that is not differentiable, and where a minibatch has no example."""
    what = differentiates(strategy)
    if what is None:
        return []
    smooth = []
    for i, task in enumerate(searched):
        # The task itself where it is differentiable, else its companion.
        companion = task.companion() if task.weight > 0 and task.derivative is None else task
        if task.weight > 0 and companion is None:
            raise InputError(
                f"{where}: tasks[{i}]",
                f"{task.name}: the strategy {strategy.name} follows a gradient, and {task.metric} has none, nor "
                "anything differentiable that stands for it; take another strategy, such as cma_es",
            )
        if companion is not task and what != "companion":
            raise InputError(
                f"{where}: tasks[{i}]",
                f"{task.name}: the strategy {strategy.name} follows the gradient of the fitness, and {task.metric} has "
                f"none; take hybrid, which begins with {companion.metric}",
            )
        smooth += [companion] if task.weight > 0 else []
    parts, least = search.gradient.minibatches, min(task.size for task in smooth)
    if parts > least:
        raise InputError(
            f"{where}: search.gradient.minibatches",
            f"{parts}; expected {least} at most, as many as the smallest task has examples to search on",
        )
    return stratified_parts(smooth, lengths, parts, seed)


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
    seeds = seed_genomes(where, named_seeds or (), space)
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
        space,
        search.rungs,
    )
    strategy = make_strategy(where, search.strategy, settings)
    if named_seeds is None:
        # As many as fit: nobody asked for them, so there is nothing to refuse.
        seeds = plain_merges_of(space)[0][: strategy.population]
        strategy = make_strategy(where, search.strategy, replace(settings, seeds=len(seeds)))
    check_options(where, search, strategy)
    return seeded(strategy, seeds)


def resolved_search(search: SearchConfig, strategy: Strategy) -> dict[str, Any]:
    """The section `search` for the run folder: the strategy's population, and its options where it has any."""
    options = {} if differentiates(strategy) is None else {"gradient": search.gradient.model_dump(mode="json")}
    return {**search.model_dump(mode="json"), "population": strategy.population, **options}


def extensions(config: Config, problem: SearchProblem) -> list[object]:
    """The objects of a search that plugins may have added."""
    factory = find_strategy("search.strategy", problem.search.strategy)
    return [*problem.facts.extensions, factory, problem.strategy, *config.tasks, *problem.splits.search]


def plugins_of(config: Config, problem: SearchProblem) -> list[str]:
    """The plugins that a config names, and those that were loaded otherwise and define objects of the search."""
    return sorted({*config.plugins, *named_plugins(extensions(config, problem))})


def resolved_document(config: Config, problem: SearchProblem) -> dict[str, Any]:
    """The config for the run folder: absolute paths, defaults filled in, the strategy and its population, the hash of
    every file that scores depend on (weights, the models' configs, the files of their tokenizers and chat templates,
    data, functions, plugins), and the scheme of random masks. Keys whose defaults depend on the machine stay null."""
    facts, splits = problem.facts, problem.splits
    document = {**config.model_dump(mode="json"), **facts.resolved}
    document.pop("out")
    document["search"] = resolved_search(problem.search, problem.strategy)
    document["export_dtype"] = facts.export_dtype
    document["evaluation"]["compute_dtype"] = facts.compute_dtype
    document["tasks"] = list(map(resolved_config, config.tasks, splits.search, splits.heldout))
    if config.scale is not None or problem.scale != "none":
        document["scale"] = problem.scale
    files = {file for task in splits.search + splits.heldout for file in task.files} | problem.backend.files()
    plugins = plugins_of(config, problem)
    if plugins:
        document["plugins"] = plugins
    files |= {record for file in files if (record := dvc_record(file)) is not None}
    files |= source_files(extensions(config, problem)) | files_of(plugins)
    document["inputs"] = file_hashes(sorted(files))
    return document | random_numbers(facts.is_random)
