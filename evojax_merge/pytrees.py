"""Searching for a merge of any pytrees: Flax parameters, a whole nnx module, nested dicts and lists of arrays.

The search is the one for checkpoints (search.loop). This module adds the space of group parameters, and the evaluator
that merges and scores every candidate of a generation inside one compiled program.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import CombineInputs, combine_differentiable, draw_row_keys, look_up_differentiable, tabulate
from pydantic import ValidationError

from evojax_merge import plugins
from evojax_merge.arguments import check_arguments, check_call
from evojax_merge.config import MAX_SEED, Bounds, Numbers, SearchConfig, Section, explain
from evojax_merge.errors import Failed, InputError, shown
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.targets import live_target
from evojax_merge.file_system import atomic_write, atomic_write_bytes
from evojax_merge.models.bank import LeafBank, MergeSpec
from evojax_merge.search.example_choice import ExampleChoice, length_strata
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.gradients import check_gradient_options
from evojax_merge.search.loop import Generation, MemoryStorage, Reporter, evolve, rescore
from evojax_merge.search.protocols import Progress, differentiates
from evojax_merge.search.run_folder import Checkpoints, FolderStorage, RunFolder, opened, random_numbers
from evojax_merge.search.run_parts import check_room
from evojax_merge.search.seeding import seed_genomes, seeded
from evojax_merge.search.stopping import check_stop
from evojax_merge.search.strategies.registry import StrategySettings, make_strategy, seeds_of
from evojax_merge.search.successive_halving import rung_size, stratified_parts, stratified_shards
from evojax_merge.search.validation import validation_split
from evojax_merge.spaces.bounds import from_unit
from evojax_merge.spaces.parameter import GroupSpace
from evojax_merge.spaces.search_parameters import method_with_base, options_of, search_parameters_of

WHERE = "search_pytrees"
# The number of candidates that are compared on the validation split; without such a split the best candidate wins.
FINALISTS = 5
Path = tuple[Any, ...]


@dataclass(frozen=True)
class HostFitness:
    """A fitness that is called with each merged pytree in turn, instead of being compiled with the merge."""

    function: Callable[[Any], Any]


def host_callback(function: Callable[[Any], Any]) -> HostFitness:
    """Mark a fitness that JAX cannot trace: a simulator, a metric of another library, an evaluation in batches."""
    check_arguments(host_callback, locals())
    return HostFitness(function)


@dataclass(frozen=True)
class PytreeSearch:
    """The result of a search. best: the best merge; fitness, scores: its fitness and its scores per example
    (float32[N], N = 1 where the fitness is one number), on the examples that it was chosen on; parameters: by group,
    the searched parameters (one per parent, or one); history: a mapping a generation, as in a run folder's
    history.jsonl. chosen_on: the numbers of the validation split's examples, on which the winner was chosen; None
    without such a split; stopped: the criterion that ended the search before its last generation."""

    best: Any = field(repr=False)
    fitness: float
    scores: np.ndarray = field(repr=False)
    parameters: dict[str, dict[str, tuple[float, ...]]]
    history: tuple[dict[str, Any], ...] = field(repr=False)
    chosen_on: tuple[int, ...] | None = field(repr=False, default=None)
    stopped: str | None = None


def search_pytrees(
    parents: Sequence[Any],
    fitness: Callable[..., Any] | HostFitness,
    *,
    base: Any = None,
    examples: Any = None,
    method: str = "linear",
    parameters: Mapping[str, Bounds | Mapping[str, Any]] | None = None,
    fixed: Mapping[str, Numbers] | None = None,
    normalize: bool | None = None,
    rescale: bool | str | None = None,
    groups: Callable[[str], str] | None = None,
    strategy: str = "cma_es",
    population: int | None = None,
    generations: int = 50,
    sigma: float = 1 / 6,
    seeds: Sequence[str] | None = None,
    rungs: int = 1,
    rung_examples: str = "random",
    validation: float = 0.0,
    validate_every: int | None = None,
    stop: Mapping[str, float] | None = None,
    gradient: Mapping[str, Any] | None = None,
    seed: int = 0,
    chunk: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_generation: Callable[[Generation], None] = lambda generation: None,
) -> PytreeSearch:
    """Search for the merge of `parents` with the highest fitness.

    parents: pytrees of one structure, whose leaves have the same shapes; `base` one more, for methods that take task
    vectors. Floating-point leaves are merged; all others (counts, keys) are the base's, or the first parent's. fitness:
    a merged pytree -> a number, or an array [N] with one number per example, whose mean counts; higher is better, and a
    candidate whose fitness is not finite has failed. JAX traces it, unless it is `host_callback(...)`. examples: a
    pytree of arrays with a leading axis N; fitness is then called with the merged pytree and some rows of it, and
    returns one number for each, so that candidates can be compared on few examples first (`rungs` above 1: successive
    halving, as in a config; `rung_examples="item_response"`: on the examples that best distinguish candidates).

    method: any of merge_kernels.METHODS. parameters: the searched ones, with `low`, `high` and `start` (None: the
    method's first, within its usual bounds); `fixed`, `normalize`, `rescale` as in a config's space. groups: a leaf's
    path ("encoder/0/kernel") -> the name of the group whose parameters it shares; None: a group for each module of the
    top level. strategy, population, generations, sigma, seeds, rungs, gradient: as in a config's search; the strategies
    `gradient` and `hybrid` differentiate a traced fitness. validation: the share of the examples that is kept out of
    the generations, and on which the winner is chosen; validate_every: the number of generations between two
    evaluations on them. stop: the criteria that end the search before its last generation, any of `evaluations`,
    `seconds`, `target` and `stagnation`, as in a config. chunk: the number of candidates that are computed together;
    None: one on a CPU, else all.

    out: a run folder: history.jsonl, checkpoints, result.json and best/params.safetensors (leaves by their paths).
    resume continues a run there; overwrite starts it again.

    Deterministic for a seed. Raises InputError for arguments that cannot be merged or searched, and Failed where no
    candidate of a generation has a finite fitness.
    """
    check_arguments(search_pytrees, locals())
    _check_examples(examples)
    function = fitness.function if isinstance(fitness, HostFitness) else fitness
    check_call(f"{WHERE}: fitness", function, ["merged", *([] if examples is None else ["examples"])])
    check_call(f"{WHERE}: on_generation", on_generation, ["generation"])
    if out is None and (resume or overwrite):
        raise InputError(WHERE, f"{'resume' if resume else 'overwrite'}: there is no run folder; give it `out`")
    if not parents:
        raise InputError(WHERE, "parents: is empty")
    plugins.load()
    chosen, has_base = method_with_base(WHERE, method, base is not None, len(parents))
    search = _valid(
        "search", SearchConfig, strategy=strategy, population=population, generations=generations, sigma=sigma,
        finalists=FINALISTS if validation else 1, seeds=None if seeds is None else list(seeds), rungs=rungs,
        rung_examples=rung_examples, validation=validation, validate_every=validate_every,
        stop={} if stop is None else dict(stop) if isinstance(stop, Mapping) else stop,
        gradient={} if gradient is None else gradient,
    )  # fmt: skip
    if chunk is not None and chunk < 1:
        raise InputError(WHERE, f"chunk: {chunk}; expected 1 or more")
    if not 0 <= seed <= MAX_SEED:
        raise InputError(WHERE, f"seed: {seed}; expected a whole number from 0 to {MAX_SEED:,}")
    if rungs > 1 and examples is None:
        raise InputError(WHERE, f"rungs: {rungs} compares candidates on few examples first; give it `examples`")
    if validation and examples is None:
        raise InputError(
            WHERE, f"validation: {validation:g} keeps examples back to choose the winner on; give it `examples`"
        )

    names = ["base"] * has_base + [f"parents[{k}]" for k in range(len(parents))]
    tree = _open(names, [base, *parents] if has_base else list(parents))
    labels = _labels(tree.paths, groups)
    searched = {name: _bounds(name, value) for name, value in (parameters or {}).items()}
    search_parameters, others = search_parameters_of(WHERE, chosen, len(parents), searched, fixed or {})
    kinds = tuple(dict.fromkeys(label for label, leaf in zip(labels, tree.leaves, strict=True) if leaf.merged))
    if not kinds:
        raise InputError(WHERE, "parents: hold no floating-point array to merge")
    space = PytreeSpace(GroupSpace(chosen, len(parents), kinds, search_parameters, others))
    options = options_of(WHERE, chosen, has_base, normalize, rescale)
    constants = tuple((name, values) for name, values in others if not chosen.parameter(name).searched)
    spec = MergeSpec(method, options, seed, "float32", constants)
    bank: TreeBank = [
        _prepare(leaf, path, spec, kinds.index(label)) if leaf.merged else leaf.sources[0]
        for leaf, path, label in zip(tree.leaves, tree.paths, labels, strict=True)
    ]

    def merge(bank: TreeBank, genome: jax.Array) -> Any:
        parameters = space.groups.parameters(genome)
        return tree.structure.unflatten(
            _merge_leaf(spec, leaf, parameters, source.sources[0].shape) if source.merged else leaf
            for leaf, source in zip(bank, tree.leaves, strict=True)
        )

    first_genomes = seed_genomes(WHERE, seeds_of(WHERE, search), space)
    settings = StrategySettings(
        space.dims, search.population, search.sigma, search.generations, from_unit, len(first_genomes),
        search.gradient, WHERE,
    )  # fmt: skip
    chosen_strategy = seeded(make_strategy(WHERE, strategy, settings), first_genomes)
    check_stop(WHERE, search.stop, chosen_strategy.population)
    check_gradient_options(WHERE, search, chosen_strategy)
    size = chosen_strategy.population
    score_on, count = (
        _score_on_host(fitness.function, merge, bank, space, examples)
        if isinstance(fitness, HostFitness)
        else _score_traced(fitness, merge, bank, space, size, _chunk(chunk, size), examples)
    )
    example_count = count if examples is None else len(jax.tree.leaves(examples)[0])
    if count not in (1, example_count):
        raise InputError(
            f"{WHERE}: fitness", f"returned {count} numbers for {example_count} examples; expected one for each"
        )
    everything = FitnessTask(tuple(range(count)))

    def evaluator_of(task: FitnessTask) -> PytreeEvaluator:
        rows = examples if task.size == count else _rows_of(examples, task.indices)
        return PytreeEvaluator(task, score_on(rows), divide=evaluator_of)

    (to_search,), kept_back = validation_split(f"{WHERE}: validation", [everything], validation, seed)
    parts = stratified_shards(f"{WHERE}: rungs", [to_search], _ones, rungs, seed)
    shards = [evaluator_of(part) for (part,) in parts]
    choice = None
    if search.rung_examples == "item_response":
        strata = [length_strata(_ones(to_search), len(shards))]
        choice = ExampleChoice(SpaceEvaluator(space, evaluator_of(to_search)), strata, len(shards))
    selection = evaluator_of(kept_back[0] if kept_back else to_search)
    minibatches: list[PytreeEvaluator] = []
    if differentiates(chosen_strategy) is not None:
        if isinstance(fitness, HostFitness):
            raise InputError(
                WHERE, f"strategy: {strategy} follows the gradient of the fitness, and host_callback has none; pass a "
                "function that JAX can trace, or take another strategy, such as cma_es",
            )  # fmt: skip
        differentiate = partial(_differentiate, fitness, merge, bank, _chunk(chunk, size))
        minibatches = [
            replace(evaluator_of(part), gradient=differentiate(_rows_of(examples, part.indices)))
            for (part,) in _minibatches(search.gradient.minibatches, to_search, examples is not None, seed)
        ]
    with ExitStack() as stack:
        storage: MemoryStorage | FolderStorage = MemoryStorage()
        folder = None
        if out is not None:
            document = {
                "search_pytrees": {
                    "method": method, "seed": seed, "groups": list(kinds),
                    "parameters": {item.name: [item.low, item.high, *item.start] for item in search_parameters},
                    "constants": {name: list(values) for name, values in others}, "options": asdict(options),
                },
                "search": search.model_dump(mode="json"),
                "inputs": {name: _digest_of(source) for name, source in zip(names, tree.columns, strict=True)}
                | ({} if examples is None else {"examples": _digest_of(jax.tree.leaves(examples))}),
            } | random_numbers(chosen.random)  # fmt: skip
            folder = stack.enter_context(opened(FilePath(out), document, resume=resume, overwrite=overwrite))
            check_room(folder, search.generations)
            storage = FolderStorage(folder, Checkpoints(folder))
        archive = evolve(
            search, seed, chosen_strategy, space, [SpaceEvaluator(space, shard) for shard in shards], storage,
            _Reporter(on_generation), hint=lambda task: HINT,
            minibatches=[SpaceEvaluator(space, item) for item in minibatches],
            validation=SpaceEvaluator(space, selection) if kept_back else None, choice=choice,
        )  # fmt: skip
        finalists = rescore(space, SpaceEvaluator(space, selection), archive, lambda done: None)
        if not finalists:
            # Each generation had a candidate with a finite fitness, so the function now returns another fitness, or the
            # split differs.
            split = " on the validation split" if kept_back else " any more"
            raise Failed(f"{WHERE}: the best of {archive.generations} generations has no finite fitness{split}")
        winner = finalists[0]
        result = PytreeSearch(
            best=jax.jit(merge)(bank, winner.genome),
            fitness=winner.fitness,
            scores=selection.known(winner.genome),
            parameters=_by_group(space.groups, winner.genome),
            history=tuple(storage.read_history()),
            chosen_on=kept_back[0].indices if kept_back else None,
            stopped=None if archive.stopped is None else archive.stopped.describe(),
        )
        if folder is not None:
            _write(folder, result, winner.genome)
    return result


HINT = "Look at what the fitness function returns for the parents, and at the bounds of the parameters"


class _Reporter(Reporter):
    """Hands each generation on."""

    def __init__(self, on_generation: Callable[[Generation], None]) -> None:
        self._on_generation = on_generation

    def finished(self, generation: Generation) -> None:
        self._on_generation(generation)

    def warn(self, text: str) -> None:
        # The warning names the caller of `search_pytrees`.
        warnings.warn(text, stacklevel=4)


def _write(folder: RunFolder, result: PytreeSearch, genome: np.ndarray) -> None:
    """Write best/params.safetensors and result.json into a run folder."""
    from safetensors.numpy import save

    leaves, _ = jax.tree_util.tree_flatten_with_path(result.best)
    arrays = {
        _shown(path) or "params": np.ascontiguousarray(np.asarray(leaf))
        for path, leaf in leaves
        if not jax.dtypes.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.extended)
    }
    atomic_write_bytes(folder.params, save(arrays))
    document = {
        "generations": len(result.history),
        "chosen_on": "search" if result.chosen_on is None else "validation",
        f"{'search' if result.chosen_on is None else 'validation'}_fitness": {"winner": result.fitness},
        "parameters": result.parameters,
        "genome": [float(gene) for gene in genome],
    }
    atomic_write(folder.result, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _valid(where: str, schema: type[Section], **values: Any) -> Any:
    try:
        return schema(**values)
    except ValidationError as error:
        raise InputError(f"{WHERE}: {where}", explain(schema, error, values)) from None


def _bounds(name: str, value: Bounds | Mapping[str, Any]) -> Bounds:
    return value if isinstance(value, Bounds) else _valid(f"parameters.{name}", Bounds, **dict(value))


def _by_group(space: GroupSpace, genome: np.ndarray) -> dict[str, dict[str, tuple[float, ...]]]:
    blocks = {name: np.asarray(block) for name, block in space.values(jnp.asarray(genome)).items()}
    return {
        group: {name: tuple(block[g].tolist()) for name, block in blocks.items()}
        for g, group in enumerate(space.groups)
    }


# ---------------------------------------------------------------------------------------------------------------
# Pytrees in


@dataclass(frozen=True)
class Leaf:
    """One leaf of all sources. merged: whether it is merged; otherwise the merge has the first source's leaf."""

    sources: tuple[Any, ...]
    merged: bool


@dataclass(frozen=True)
class Tree:
    """All sources, leaf by leaf. paths: each leaf's keys; columns: each source's leaves, unchanged."""

    paths: tuple[Path, ...]
    leaves: tuple[Leaf, ...]
    structure: Any
    columns: tuple[Sequence[Any], ...]


def _shown(path: Path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _flatten(name: str, tree: Any) -> tuple[list[tuple[Path, Any]], Any]:
    """The leaves of an argument, with their paths, and its structure."""
    try:
        return jax.tree_util.tree_flatten_with_path(tree)
    # These are raised for keys that cannot be sorted, and for a tree that contains itself, by the depth of JAX's calls.
    except (TypeError, ValueError, RecursionError, SystemError) as error:
        raise InputError(f"{WHERE}: {name}", f"is no pytree ({error})") from None


def _open(names: Sequence[str], sources: Sequence[Any]) -> Tree:
    """Flatten the sources, and check that their structures agree. Raises InputError, which names the first leaf that
    differs."""
    flat = [_flatten(name, source) for name, source in zip(names, sources, strict=True)]
    paths: tuple[Path, ...] = tuple(path for path, _ in flat[0][0])
    structure: Any = flat[0][1]
    for name, (leaves, containers) in zip(names[1:], flat[1:], strict=True):
        own_paths = {_shown(path): None for path, _ in leaves}
        first_paths = {_shown(path): None for path in paths}
        for paths_of_holder, paths_of_other, holder, lacks in (
            (first_paths, own_paths, names[0], name),
            (own_paths, first_paths, name, names[0]),
        ):
            missing = next((path for path in paths_of_holder if path not in paths_of_other), None)
            if missing is not None:
                raise InputError(f"{WHERE}: {lacks}", f"has no leaf {missing!r}, which {holder} has")
        if containers != structure:
            raise InputError(f"{WHERE}: {name}", f"has other containers than {names[0]}: {containers} and {structure}")
    columns = [[leaf for _, leaf in leaves] for leaves, _ in flat]
    rows = tuple(_leaf(names, _shown(p), values) for p, *values in zip(paths, *columns, strict=True))
    return Tree(paths, rows, structure, tuple(columns))


def _is_real(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _leaf(names: Sequence[str], path: str, values: Sequence[Any]) -> Leaf:
    if _is_key(values[0]):
        return Leaf(tuple(values), merged=False)
    arrays = [np.asarray(value) for value in values]
    for name, array in zip(names, arrays, strict=True):
        if not _is_real(array.dtype):
            raise InputError(f"{WHERE}: {name}", f"leaf {path!r} is of {array.dtype}; expected real numbers")
        if array.shape != arrays[0].shape:
            raise InputError(
                f"{WHERE}: {name}", f"leaf {path!r} has shape {array.shape}, but {arrays[0].shape} in {names[0]}"
            )
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
            raise InputError(f"{WHERE}: {name}", f"leaf {path!r} holds NaN or Inf")
    dtype = jnp.result_type(*arrays)
    if not jnp.issubdtype(dtype, jnp.floating) or arrays[0].size == 0:
        return Leaf((arrays[0],), merged=False)
    return Leaf(tuple(array.astype(dtype) for array in arrays), merged=True)


def _labels(paths: Sequence[Path], groups: Callable[[str], str] | None) -> list[str]:
    """The group of each leaf: the result of `groups`, or the first key at which the paths differ."""
    if groups is not None:
        check_call(f"{WHERE}: groups", groups, ["path"])
        labels = [groups(_shown(path)) for path in paths]
        for label, path in zip(labels, paths, strict=True):
            if not isinstance(label, str):
                raise InputError(f"{WHERE}: groups", f"returned {shown(label)} for {_shown(path)!r}; expected a text")
        return labels
    depth = 0
    while len({path[depth : depth + 1] for path in paths}) == 1 and all(len(path) > depth + 1 for path in paths):
        depth += 1
    return [_shown(path[: depth + 1][depth:]) or "all" for path in paths]


# ---------------------------------------------------------------------------------------------------------------
# Merging and scoring


# Leaves that are merged, in the kernels' form, and leaves that no merge changes.
TreeBank = list[LeafBank | Any]


def _merge_leaf(spec: MergeSpec, leaf: LeafBank, parameters: Mapping[str, jax.Array], shape: tuple[int, ...]) -> Any:
    """The merged leaf `[…]` in its own dtype. parameters: name -> float32[groups, K] or [groups]."""
    of_group = {name: block[leaf.group] for name, block in parameters.items()}
    statistics = look_up_differentiable(spec.method, leaf.statistics, of_group)
    keys = () if leaf.mask_keys is None else leaf.mask_keys
    merged = combine_differentiable(spec.method, spec.options, CombineInputs(leaf.sources, keys, statistics, of_group))
    return merged.astype(leaf.sources.dtype).reshape(shape)


def _prepare(leaf: Leaf, path: Path, spec: MergeSpec, group: int) -> LeafBank:
    """Measure a leaf. Random numbers are fixed by the seed, a parent's content and the leaf's path."""
    # The kernels take a single number as a vector of length 1.
    sources = [np.ascontiguousarray(np.atleast_1d(source)) for source in leaf.sources]
    has_base = int(spec.options.has_base)

    def row_keys(k: int) -> np.ndarray:
        content = hashlib.sha256(sources[has_base + k].view(np.uint8).data)
        content.update(b"\0" + _shown(path).encode())
        return draw_row_keys(spec.seed, content.digest(), sources[0].shape)

    prepared = tabulate(spec.method, spec.options, sources, spec.prepared_for(len(sources) - has_base), row_keys)
    return LeafBank(
        jnp.asarray(np.stack(sources)),
        mask_keys=jnp.asarray(np.stack(prepared.mask_keys)) if prepared.mask_keys else None,
        statistics={name: jnp.asarray(values) for name, values in prepared.statistics.items()},
        group=group,
    )


def _chunk(chunk: int | None, population: int) -> int:
    """The number of candidates that are computed together. By default one on a CPU, where computing several together is
    slower, and the whole population on an accelerator, where it is faster."""
    if chunk is None:
        return population if live_target().is_accelerator else 1
    return min(chunk, population)


# Genomes float32[P, D] -> their scores float32[P, N].
Score = Callable[[np.ndarray], np.ndarray]
Merge = Callable[[TreeBank, jax.Array], Any]


@dataclass(frozen=True)
class PytreeSpace:
    """The parameters of the groups of leaves. Genomes go to the evaluator unchanged: its program merges them."""

    groups: GroupSpace

    @property
    def dims(self) -> int:
        return self.groups.dims

    @property
    def start(self) -> np.ndarray:
        return self.groups.start

    def decode(self, genomes: np.ndarray) -> np.ndarray:
        return genomes

    def pull_back(self, genomes: np.ndarray, cotangents: np.ndarray) -> np.ndarray:
        return cotangents

    def seed_genomes(self, where: str, name: str) -> np.ndarray:
        return self.groups.seed_genomes(where, name)


@dataclass(frozen=True)
class FitnessTask:
    """A task that the fitness function scores, on the examples with these `indices`."""

    indices: tuple[int, ...]
    name: str = "fitness"
    metric: str = "fitness"
    weight: float = 1.0

    @property
    def size(self) -> int:
        return len(self.indices)

    def subset(self, examples: Sequence[int]) -> "FitnessTask":
        return FitnessTask(tuple(self.indices[i] for i in examples))


def _minibatches(parts: int, task: FitnessTask, has_examples: bool, seed: int) -> list[list[FitnessTask]]:
    """The task in `parts` minibatches. Raises InputError where there are fewer examples than minibatches."""
    if parts > 1 and not has_examples:
        raise InputError(WHERE, f"gradient.minibatches: {parts} are parts of the examples; give it `examples`")
    if parts > task.size:
        raise InputError(WHERE, f"gradient.minibatches: {parts}; expected {task.size} at most, as many as examples")
    return stratified_parts([task], _ones, parts, seed)


def _ones(task: FitnessTask) -> np.ndarray:
    """The lengths of a task's examples, which are unknown: float64[N] of ones."""
    return np.ones(task.size)


@dataclass(frozen=True)
class PytreeEvaluator:
    """Scores genomes with the fitness function on some of the examples, and differentiates their mean where it has a
    `gradient`. `divide`: a task of fewer examples -> its evaluator. Caches the last population's scores."""

    task: FitnessTask
    function: Score
    divide: Callable[[FitnessTask], "PytreeEvaluator"]
    gradient: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    last: dict[bytes, np.ndarray] = field(default_factory=dict)

    @property
    def tasks(self) -> list[FitnessTask]:
        return [self.task]

    def passes(self, population: int) -> int:
        return population

    def subset(self, examples: Sequence[np.ndarray]) -> "PytreeEvaluator":
        """The evaluator of a subset of the examples, int[M], ascending."""
        (indices,) = examples
        return self.divide(self.task.subset(indices.tolist()))

    def evaluate(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        rows = self.function(genomes)
        if rows.shape[1] != self.task.size:
            raise InputError(
                f"{WHERE}: fitness", f"returned {rows.shape[1]} numbers for a candidate; expected {self.task.size}, "
                "as before, or one for each example",
            )  # fmt: skip
        self.last.clear()
        self.last.update((genome.tobytes(), scores) for genome, scores in zip(genomes, rows, strict=True))
        progress(len(genomes))
        return TaskScores({self.task.name: {self.task.metric: rows}})

    def value_and_gradient(
        self, genomes: np.ndarray, progress: Progress = lambda done: None
    ) -> tuple[TaskScores, np.ndarray]:
        """The scores, and float32[P, D], the derivative of each genome's mean score with respect to it."""
        assert self.gradient is not None
        rows, gradients = self.gradient(genomes)
        progress(len(genomes))
        return TaskScores({self.task.name: {self.task.metric: rows}}), gradients

    def known(self, genome: np.ndarray) -> np.ndarray:
        """float32[N], the cached scores of a genome of the last population."""
        return self.last[genome.tobytes()]


def _check_examples(examples: Any) -> None:
    """Raises InputError where the leaves do not have the same number of examples."""
    leaves = [leaf for _, leaf in _flatten("examples", examples)[0]]
    sizes = sorted({np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in leaves})
    if examples is not None and (len(sizes) != 1 or not sizes[0]):
        raise InputError(WHERE, f"examples: leading axes of {sizes}; expected arrays with one number of examples")


def _rows_of(examples: Any, indices: Sequence[int]) -> Any:
    return jax.tree.map(lambda leaf: leaf[np.asarray(indices)], examples)


def _digest_of(leaves: Sequence[Any]) -> str:
    """SHA-256 of arrays in their order."""
    digest = hashlib.sha256()
    for leaf in leaves:
        array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def _is_key(leaf: Any) -> bool:
    """Return whether a leaf is an array of random keys, which are no numbers."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)


def _score_traced(
    fitness: Callable[..., Any],
    merge: Merge,
    bank: TreeBank,
    space: PytreeSpace,
    population: int,
    chunk: int,
    examples: Any,
) -> tuple[Callable[[Any], Score], int]:
    """Merge and score in one program, compiled for a whole population and for each rung's size. Returns a function,
    rows of the examples -> `Score` on them, and N, the number of all examples."""

    def merge_and_score(bank: TreeBank, genome: jax.Array, arguments: Any) -> jax.Array:
        return _row(fitness(merge(bank, genome), *arguments), jnp.asarray).astype(jnp.float32)

    for path, leaf in _flatten("examples", examples)[0]:
        dtype = leaf.dtype if isinstance(leaf, jax.Array) else np.asarray(leaf).dtype
        if dtype.kind in "OSUMmV" and not jnp.issubdtype(dtype, jnp.floating):
            raise InputError(
                f"{WHERE}: examples", f"leaf {_shown(path)!r} is of {dtype}, which JAX has not; expected numbers, or a "
                "fitness that is host_callback(fitness)",
            )  # fmt: skip
    # Errors of the function appear here, before the long compilation with the merges.
    try:
        shape = jax.eval_shape(
            merge_and_score, bank, jax.ShapeDtypeStruct((space.dims,), jnp.float32), _arguments(examples)
        )
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            WHERE, f"fitness: JAX cannot trace it ({reason}); pass host_callback(fitness), which is called with each "
            "merged pytree (from evojax_merge import host_callback)",
        ) from error  # fmt: skip

    @jax.jit
    def program(bank: TreeBank, genomes: jax.Array, arguments: Any) -> jax.Array:
        return jax.lax.map(lambda genome: merge_and_score(bank, genome, arguments), genomes, batch_size=chunk)

    sizes = sorted({rung_size(population, rung) for rung in range(population.bit_length())})

    def score(examples: Any, genomes: np.ndarray) -> np.ndarray:
        rows = []
        for begin in range(0, len(genomes), population):
            part = genomes[begin : begin + population]
            # Padded to a size for which the program is compiled.
            size = population if examples is None else next(size for size in sizes if size >= len(part))
            padded = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
            rows.append(np.asarray(program(bank, padded, _arguments(examples)))[: len(part)])
        return np.concatenate(rows)

    return lambda examples: partial(score, examples), shape.size


def _arguments(examples: Any) -> tuple[Any, ...]:
    """The arguments of a fitness beside the merged pytree."""
    return () if examples is None else (examples,)


def _differentiate(
    fitness: Callable[..., Any], merge: Merge, bank: TreeBank, chunk: int, examples: Any
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Genomes float32[P, D] -> their scores float32[P, N], and the derivatives of the scores' mean, float32[P, D]."""
    arguments = _arguments(examples)

    @jax.jit
    def program(bank: TreeBank, genomes: jax.Array, arguments: Any) -> tuple[jax.Array, jax.Array]:
        def mean(genome: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = _row(fitness(merge(bank, genome), *arguments), jnp.asarray).astype(jnp.float32)
            return scores.mean(), scores

        def score_and_gradient(genome: jax.Array) -> tuple[jax.Array, jax.Array]:
            (_, scores), gradient = jax.value_and_grad(mean, has_aux=True)(genome)
            return scores, gradient

        return jax.lax.map(score_and_gradient, genomes, batch_size=min(chunk, len(genomes)))

    def differentiate(genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, gradients = program(bank, jnp.asarray(genomes), arguments)
        return np.asarray(rows), np.asarray(gradients)

    return differentiate


def _score_on_host(
    fitness: Callable[..., Any], merge: Merge, bank: TreeBank, space: PytreeSpace, examples: Any
) -> tuple[Callable[[Any], Score], int]:
    """Merge and score one genome after the other. Returns a function, rows of the examples -> `Score` on them, and N,
    the number of all examples, from the first call, for the start."""
    merged = jax.jit(merge)

    def call(examples: Any, genome: np.ndarray) -> np.ndarray:
        return _row(fitness(merged(bank, genome), *_arguments(examples)), np.asarray).astype(np.float32)

    start = space.start.tobytes()
    of_start = call(examples, space.start)

    def score(rows: Any, genomes: np.ndarray) -> np.ndarray:
        cached = {start: of_start} if rows is examples else {}
        scores = [cached[genome.tobytes()] if genome.tobytes() in cached else call(rows, genome) for genome in genomes]
        sizes = sorted({example_scores.size for example_scores in scores})
        if len(sizes) > 1:
            raise InputError(
                f"{WHERE}: fitness", f"returned {sizes[0]} numbers for one candidate and {sizes[1]} for another"
            )
        return np.stack(scores)

    return lambda rows: partial(score, rows), of_start.size


def _row(scores: Any, as_array: Callable[[Any], Any]) -> Any:
    """The fitness's result, a number or an array [N], as an array [N]. Raises InputError for anything else."""
    expected = "expected a real number, or one number per example"
    try:
        array = as_array(scores)
    except jax.errors.JAXTypeError:
        raise
    except (TypeError, ValueError):
        raise InputError(f"{WHERE}: fitness", f"returned {shown(scores)}; {expected}") from None
    if array.ndim > 1 or array.size == 0 or not _is_real(array.dtype):
        result = shown(scores) if array.dtype.kind in "OSU" else f"{array.dtype}{list(array.shape)}"
        raise InputError(f"{WHERE}: fitness", f"returned {result}; {expected}")
    return array.reshape(-1)
