"""Searching for a merge of any pytrees: Flax parameters, a whole nnx module, nested dicts and lists of arrays.

Every candidate of a generation is merged and scored inside one compiled program.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from merge_kernels import combine, draw_uniform, look_up, tabulate
from pydantic import ValidationError

from evojax_merge import plugins
from evojax_merge.config import MAX_SEED, Bounds, Numbers, SearchConfig, Section, explain
from evojax_merge.errors import Failed, InputError
from evojax_merge.mergekit.schema import check_parent_count
from evojax_merge.models.bank import MergeSpec
from evojax_merge.search.search_parameters import find_method, options_of, search_parameters_of
from evojax_merge.search.strategy import default_population, make_strategy
from evojax_merge.spaces.parameter import GroupSpace

WHERE = "search_pytrees"
Path = tuple[Any, ...]


@dataclass(frozen=True)
class HostFitness:
    """A fitness that is called with each merged pytree in turn, instead of being compiled with the merge."""

    function: Callable[[Any], Any]


def host_callback(function: Callable[[Any], Any]) -> HostFitness:
    """Marks a fitness that JAX cannot trace: a simulator, a metric of another library, an evaluation in batches."""
    return HostFitness(function)


@dataclass(frozen=True)
class Generation:
    """What one generation showed. fitness: float64[P], NaN where a candidate failed."""

    number: int
    fitness: np.ndarray
    sigma: float
    best_so_far: float

    @property
    def failed(self) -> int:
        return int(np.isnan(self.fitness).sum())


@dataclass(frozen=True)
class PytreeSearch:
    """What a search found: the best merge, its fitness, its scores per example (float32[N], one number where the
    fitness is one), by group the searched parameters (one per parent, or one), and how it went."""

    best: Any = field(repr=False)
    fitness: float
    scores: np.ndarray = field(repr=False)
    parameters: dict[str, dict[str, tuple[float, ...]]]
    history: tuple[Generation, ...] = field(repr=False)


def search_pytrees(
    parents: Sequence[Any],
    fitness: Callable[[Any], Any] | HostFitness,
    *,
    base: Any = None,
    method: str = "linear",
    parameters: Mapping[str, Bounds | Mapping[str, Any]] | None = None,
    fixed: Mapping[str, Numbers] | None = None,
    normalize: bool | None = None,
    rescale: bool | str | None = None,
    groups: Callable[[str], str] | None = None,
    population: int | None = None,
    generations: int = 50,
    sigma: float = 1 / 6,
    seed: int = 0,
    chunk: int | None = None,
    on_generation: Callable[[Generation], None] = lambda generation: None,
) -> PytreeSearch:
    """Search for the merge of `parents` with the highest fitness.

    parents: pytrees of one structure, whose leaves have the same shapes; `base` one more, from which methods that need
    it take task vectors. Floating-point leaves are merged; all others (counts, keys) are the base's, or the first
    parent's. fitness: a merged pytree -> a number, or an array [N] of one per example, whose mean counts; higher is
    better, and a candidate whose fitness is not finite has failed. It is traced, unless it is `host_callback(...)`.

    method: any of merge_kernels.METHODS. parameters: the searched ones, with `low`, `high` and `start` (None: the
    method's first, within its usual bounds); `fixed`, `normalize`, `rescale` as in a config's space. groups: a leaf's
    path ("encoder/0/kernel") -> the name of the group whose parameters it shares; None: a group for each module of
    the top level. population None: 4 + floor(3 ln D). chunk: how many candidates are computed together; None: one
    after the other on a CPU, else all.

    Deterministic for a seed. Raises InputError for what cannot be merged or searched, and Failed in a generation of
    which no candidate has a finite fitness.
    """
    if not parents:
        raise InputError(WHERE, "parents: is empty")
    plugins.load()
    chosen = find_method(f"{WHERE}: method", method)
    has_base = chosen.uses_base(base is not None)
    if has_base and base is None:
        raise InputError(WHERE, f"base: missing; {method} takes task vectors from a base")
    if base is not None and not has_base:
        raise InputError(WHERE, f"base: {method} takes no base; leave it out, or choose another method")
    check_parent_count(f"{WHERE}: parents", chosen, len(parents))
    search = _valid("search", SearchConfig, population=population, generations=generations, sigma=sigma)
    if chunk is not None and chunk < 1:
        raise InputError(WHERE, f"chunk: {chunk}; expected 1 or more")
    if not 0 <= seed <= MAX_SEED:
        raise InputError(WHERE, f"seed: {seed}; expected a whole number from 0 to {MAX_SEED:,}")

    names = ["base"] * has_base + [f"parents[{k}]" for k in range(len(parents))]
    tree = _open(names, [base, *parents] if has_base else list(parents))
    labels = _labels(tree.paths, groups)
    searched = {name: _bounds(name, value) for name, value in (parameters or {}).items()}
    search_parameters, others = search_parameters_of(WHERE, chosen, len(parents), searched, fixed or {})
    kinds = tuple(dict.fromkeys(label for label, leaf in zip(labels, tree.leaves, strict=True) if leaf.merged))
    if not kinds:
        raise InputError(WHERE, "parents: hold no floating-point array to merge")
    space = GroupSpace(chosen, len(parents), kinds, search_parameters, others)
    options = options_of(WHERE, chosen, has_base, normalize, rescale)
    constants = tuple((name, values) for name, values in others if not chosen.parameter(name).searched)
    spec = MergeSpec(method, options, seed, "float32", constants)
    bank = [
        _prepare(leaf, path, spec, kinds.index(label)) if leaf.merged else leaf.sources[0]
        for leaf, path, label in zip(tree.leaves, tree.paths, labels, strict=True)
    ]

    def merge(bank: Sequence[Any], genome: jax.Array) -> Any:
        numbers = space.parameters(genome)
        return tree.structure.unflatten([x.merge(numbers) if isinstance(x, LeafBank) else x for x in bank])

    size = search.population or default_population(space.dims)
    score = (
        _score_on_host(fitness.function, merge, bank)
        if isinstance(fitness, HostFitness)
        else _score_traced(fitness, merge, bank, space.dims, _chunk(chunk, size))
    )
    strategy = make_strategy(space.dims, size, search.sigma, seed)
    state = strategy.init(space.start)
    best, best_fitness, history = space.start, np.nan, []
    for number in range(search.generations):
        genomes, state_after_ask = strategy.ask(state, number)
        values = _fitness(score(np.asarray(genomes)))
        if np.isnan(values).all():
            raise Failed(
                f"{WHERE}: generation {number}: all {size} candidates failed, their fitness is not finite; look at "
                "what the fitness function returns for the parents, and at the bounds of the parameters"
            )
        state = strategy.tell(state_after_ask, number, genomes, values)
        if not np.nanmax(values) <= best_fitness:
            best, best_fitness = np.asarray(genomes[int(np.nanargmax(values))]), float(np.nanmax(values))
        history.append(Generation(number, values, float(state.std), best_fitness))
        on_generation(history[-1])

    # The start and the mean of the last distribution may be better than anything that was drawn. Filled up to a
    # population, they go through the program that is compiled already.
    finalists = np.stack([best, np.asarray(state.mean, np.float32), space.start])
    scores = score(np.concatenate([finalists, np.repeat(finalists[:1], max(0, size - 3), axis=0)]))[:3]
    values = _fitness(scores)
    if np.isnan(values).all():
        # Each generation had a candidate with a finite fitness: the function gives another one now.
        raise Failed(f"{WHERE}: the best of {search.generations} generations has no finite fitness any more")
    winner = int(np.nanargmax(values))
    return PytreeSearch(
        best=jax.jit(merge)(bank, finalists[winner]),
        fitness=float(values[winner]),
        scores=scores[winner],
        parameters=_by_group(space, finalists[winner]),
        history=tuple(history),
    )


def _valid(where: str, schema: type[Section], **values: Any) -> Any:
    try:
        return schema(**values)
    except ValidationError as error:
        raise InputError(f"{WHERE}: {where}", explain(schema, error, values)) from None


def _bounds(name: str, value: Bounds | Mapping[str, Any]) -> Bounds:
    return value if isinstance(value, Bounds) else _valid(f"parameters.{name}", Bounds, **value)


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
    """One leaf of all sources, and whether it is merged (else it is the first source's)."""

    sources: tuple[Any, ...]
    merged: bool


@dataclass(frozen=True)
class Tree:
    """All sources, leaf by leaf. paths: each leaf's keys."""

    paths: tuple[Path, ...]
    leaves: tuple[Leaf, ...]
    structure: Any


def _shown(path: Path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _open(names: Sequence[str], sources: Sequence[Any]) -> Tree:
    """Check that the sources are alike. Raises InputError that names the first leaf that is not."""
    flat = [jax.tree_util.tree_flatten_with_path(source) for source in sources]
    paths: tuple[Path, ...] = tuple(path for path, _ in flat[0][0])
    structure: Any = flat[0][1]
    for name, (leaves, own) in zip(names[1:], flat[1:], strict=True):
        here = {_shown(path): None for path, _ in leaves}
        there = {_shown(path): None for path in paths}
        for one, other, holder, lacks in ((there, here, names[0], name), (here, there, name, names[0])):
            missing = next((path for path in one if path not in other), None)
            if missing is not None:
                raise InputError(f"{WHERE}: {lacks}", f"has no leaf {missing!r}, which {holder} has")
        if own != structure:
            raise InputError(f"{WHERE}: {name}", f"has other containers than {names[0]}: {own} and {structure}")
    columns = [[leaf for _, leaf in leaves] for leaves, _ in flat]
    return Tree(paths, tuple(_leaf(names, _shown(p), row) for p, *row in zip(paths, *columns, strict=True)), structure)


def _is_real(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _leaf(names: Sequence[str], path: str, values: Sequence[Any]) -> Leaf:
    first = values[0]
    if isinstance(first, jax.Array) and jax.dtypes.issubdtype(first.dtype, jax.dtypes.extended):
        return Leaf(tuple(values), merged=False)  # Random keys are no numbers.
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
    """The group of each leaf: what `groups` says, or the first key at which the paths part."""
    if groups is not None:
        return [groups(_shown(path)) for path in paths]
    depth = 0
    while len({path[depth : depth + 1] for path in paths}) == 1 and all(len(path) > depth + 1 for path in paths):
        depth += 1
    return [_shown(path[: depth + 1][depth:]) or "all" for path in paths]


# ---------------------------------------------------------------------------------------------------------------
# Merging and scoring


@struct.dataclass
class LeafBank:
    """One leaf of all S sources, `stack: [S, …]`, and what the method has to know of it: `keep_keys: uint16[N, …]` and
    `table` (see models.bank). `group` says whose parameters it is merged with."""

    stack: jax.Array
    keep_keys: jax.Array | None
    table: dict[str, jax.Array]
    group: int = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    spec: MergeSpec = struct.field(pytree_node=False)

    def merge(self, parameters: Mapping[str, jax.Array]) -> jax.Array:
        """The merged leaf, in its own dtype. parameters: name -> float32[groups, K] or [groups]."""
        method, own = self.spec.method, {name: block[self.group] for name, block in parameters.items()}
        numbers = () if self.keep_keys is None else tuple(self.keep_keys)
        statistics = look_up(method, self.table, own)
        merged = combine(method, self.spec.options, tuple(self.stack), numbers, statistics, own)
        return merged.astype(self.stack.dtype).reshape(self.shape)


def _prepare(leaf: Leaf, path: Path, spec: MergeSpec, group: int) -> LeafBank:
    """Measure a leaf. Random numbers are fixed by the seed, a parent's content and the leaf's path."""
    shape = leaf.sources[0].shape
    # To the kernels a single number is a vector of one.
    sources = [np.ascontiguousarray(np.atleast_1d(source)) for source in leaf.sources]
    has_base = int(spec.options.has_base)

    def uniform_noise(k: int) -> np.ndarray:
        content = hashlib.sha256(sources[has_base + k].view(np.uint8).data)
        content.update(b"\0" + _shown(path).encode())
        return draw_uniform(spec.seed, content.digest(), sources[0].shape)

    prepared = tabulate(spec.method, spec.options, sources, spec.prepared_for(len(sources) - has_base), uniform_noise)
    return LeafBank(
        jnp.asarray(np.stack(sources)),
        jnp.asarray(np.stack(prepared.keep_keys)) if prepared.keep_keys else None,
        {name: jnp.asarray(values) for name, values in prepared.statistics.items()},
        group, shape, spec,
    )  # fmt: skip


def _chunk(chunk: int | None, population: int) -> int:
    """Sharing a pass is slower than one candidate after the other on a CPU, and faster on what has more to share."""
    if chunk is None:
        return 1 if jax.default_backend() == "cpu" else population
    return min(chunk, population)


Score = Callable[[np.ndarray], np.ndarray]
Merge = Callable[[Sequence[Any], jax.Array], Any]


def _score_traced(fitness: Callable[[Any], Any], merge: Merge, bank: Sequence[Any], dims: int, chunk: int) -> Score:
    """genomes float32[P, D] -> scores float32[P, N], merged and scored in one program."""

    def one(bank: Sequence[Any], genome: jax.Array) -> jax.Array:
        return _row(jnp.asarray(fitness(merge(bank, genome)))).astype(jnp.float32)

    # What the function does wrong shows here, before the long work of compiling it with the merges.
    try:
        jax.eval_shape(one, bank, jax.ShapeDtypeStruct((dims,), jnp.float32))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        error.add_note(
            "A fitness that JAX cannot trace goes in as host_callback(fitness): from evojax_merge import host_callback"
        )
        raise

    @jax.jit
    def program(bank: Sequence[Any], genomes: jax.Array) -> jax.Array:
        return jax.lax.map(lambda genome: one(bank, genome), genomes, batch_size=chunk)

    return lambda genomes: np.asarray(program(bank, genomes))


def _score_on_host(fitness: Callable[[Any], Any], merge: Merge, bank: Sequence[Any]) -> Score:
    """genomes float32[P, D] -> scores float32[P, N], one merge and one call after the other."""
    merged = jax.jit(merge)

    def score(genomes: np.ndarray) -> np.ndarray:
        rows = [_row(np.asarray(fitness(merged(bank, genome)))).astype(np.float32) for genome in genomes]
        sizes = sorted({row.size for row in rows})
        if len(sizes) > 1:
            raise TypeError(f"the fitness returned {sizes[0]} numbers for one candidate and {sizes[1]} for another")
        return np.stack(rows)

    return score


def _row(scores: Any) -> Any:
    """A number or an array [N] as an array [N]. Raises TypeError for anything else."""
    if scores.ndim > 1 or scores.size == 0 or not _is_real(scores.dtype):
        found = f"{scores.dtype}{list(scores.shape)}"
        raise TypeError(f"the fitness returned {found}; expected a real number, or one number per example")
    return scores.reshape(-1)


def _fitness(scores: np.ndarray) -> np.ndarray:
    """float64[P]: the mean over examples; NaN where a candidate failed."""
    means = scores.mean(axis=1, dtype=np.float64)
    return np.where(np.isfinite(means), means, np.nan)
