"""The registry of merge methods, and the four functions through which every method is used.

    prepared   = prepare(method, options, sources, parameters, draws)     host, once; exact, for one recipe
    prepared   = tabulate(method, options, sources, parameters, draws)    host, once; for every density on a grid
    statistics = look_up(method, prepared.statistics, parameters)         device, per candidate
    merged     = combine(method, options, sources, prepared.scores, statistics, parameters)
                                                                          device, per candidate

`sources` are K arrays `[...]` of one shape, after the base where `options.based`. `parameters` are numbers by name,
per parent `[K]` or shared `[]`: float64 on the host (a density counts entries), float32 on the device. `options` are
the static switches. Results are float32; the caller casts. Tensors may be merged in pieces along their first axis,
as long as their statistics are those of the whole tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels import entrywise, span, sparse
from merge_kernels.sparse import BAND, MAGNITUDE, RANDOM, RANKED, SCORE_LEVELS, Sparsifier

# A searched density is rounded to this grid, and the recipe carries the rounded value.
DENSITY_STEPS = 1000
GRID = np.arange(DENSITY_STEPS + 1, dtype=np.float64) / DENSITY_STEPS

Rescale = Literal["none", "l1", "density"]
Numbers = Mapping[str, Any]
# The uniform 16-bit numbers of parent k, of the tensor's shape (see sparse.draw).
Draws = Callable[[int], np.ndarray]
HostSources = Sequence[np.ndarray]


@dataclass(frozen=True)
class Parameter:
    """A number of a recipe: its default, the default bounds of a search, and the values that have a meaning.

    `default` None: required in a recipe; in a search 1/K per parent (the uniform merge), else required. `searched`
    False: what is prepared depends on it, so it is fixed for a whole run. `on_grid`: a density, which a search rounds
    to the grid.
    """

    name: str
    per_parent: bool
    default: float | None
    low: float
    high: float
    lowest: float = -np.inf
    highest: float = np.inf
    searched: bool = True
    on_grid: bool = False


@dataclass(frozen=True)
class Options:
    """Static switches of a merge.

    `rescale`: none, l1 (restore each delta's L1 norm) or density (1/density). `based`: the sources begin with a
    base, from which deltas are taken. `axis`: what counts as one vector to NuSLERP and Model Stock: None the whole
    tensor, -1 its rows, 0 its columns.
    """

    normalize: bool = False
    rescale: Rescale = "none"
    based: bool = False
    axis: int | None = None


@dataclass(frozen=True)
class Prepared:
    """What does not depend on a candidate: a `uint16` number per entry, `[*shape]`, for each of some arrays (none,
    one, or one per parent), and statistics, whose last axis is the grid's where they were tabulated."""

    scores: tuple[np.ndarray, ...]
    statistics: dict[str, np.ndarray]


Prepare = Callable[[Options, HostSources, Numbers, Sequence[np.ndarray], Draws], Prepared]
Combine = Callable[
    [Options, Sequence[jax.Array], Sequence[jax.Array], Mapping[str, jax.Array], Mapping[str, jax.Array]], jax.Array
]


@dataclass(frozen=True)
class Method:
    """One merge method.

    - `base`: required, optional (deltas are taken where there is one), or parent (a base model is one of the models
      that are merged).
    - `prepare(options, sources, parameters, densities, draws)`: `densities` are float64[G] per value of the density.
    - `combine(options, sources, scores, statistics, parameters)`.
    - `scores(K)`: how many arrays of numbers are prepared; `random`: whether they are drawn.
    - `complaint(options, parameters)`: why these numbers have no meaning, or None.
    - `switches`: the names that mergekit's YAML has for `options`; `inert`: settings it takes that change nothing.
    """

    name: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "parent"]
    combine: Combine
    prepare: Prepare = lambda options, sources, parameters, densities, draws: Prepared((), {})
    options: Options = Options()
    min_parents: int = 1
    max_parents: int | None = None
    random: bool = False
    scores: Callable[[int], int] = lambda parents: 0
    complaint: Callable[[Options, Numbers], str | None] = lambda options, parameters: None
    switches: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()

    def parameter(self, name: str) -> Parameter:
        return next(p for p in self.parameters if p.name == name)

    @property
    def density(self) -> Parameter | None:
        """The parameter that the prepared tables have an axis for."""
        return next((p for p in self.parameters if p.on_grid), None)

    def based(self, has_base: bool) -> bool:
        """Whether a merge takes deltas from a base, where there is a base model or not."""
        return self.base == "required" or (self.base == "optional" and has_base)


# ---------------------------------------------------------------------------------------------------------------
# Use


def prepare(method: Method, options: Options, sources: HostSources, parameters: Numbers, draws: Draws) -> Prepared:
    """Measure one tensor for one recipe, exactly. Statistics have no grid axis."""
    density = method.density
    if density is None:
        return method.prepare(options, sources, parameters, (), draws)
    values = np.atleast_1d(np.asarray(parameters[density.name], np.float64))
    prepared = method.prepare(options, sources, parameters, [np.array([value]) for value in values], draws)
    return Prepared(prepared.scores, {name: rows[..., 0] for name, rows in prepared.statistics.items()})


def tabulate(method: Method, options: Options, sources: HostSources, parameters: Numbers, draws: Draws) -> Prepared:
    """Measure one tensor for a search: for every density `0, 1/1000 … 1`. `parameters` are those never searched."""
    if method.density is None:
        return method.prepare(options, sources, parameters, (), draws)
    count = len(sources) - int(options.based) if method.density.per_parent else 1
    return method.prepare(options, sources, parameters, [GRID] * count, draws)


def grid_index(density: jax.Array) -> jax.Array:
    """The place of a density on the grid: int32, nearest of `0 … DENSITY_STEPS`."""
    return jnp.clip(jnp.round(density * DENSITY_STEPS), 0, DENSITY_STEPS).astype(jnp.int32)


def look_up(
    method: Method, table: Mapping[str, jax.Array], parameters: Mapping[str, jax.Array]
) -> Mapping[str, jax.Array]:
    """The statistics of one candidate out of the table: `[..., G] -> [...]`."""
    density = method.density
    if density is None:
        return table
    index = grid_index(parameters[density.name])
    if density.per_parent:
        return {name: jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0] for name, rows in table.items()}
    return {name: jnp.take(rows, index, axis=-1) for name, rows in table.items()}


def combine(
    method: Method,
    options: Options,
    sources: Sequence[jax.Array],
    scores: Sequence[jax.Array],
    statistics: Mapping[str, jax.Array],
    parameters: Mapping[str, jax.Array],
) -> jax.Array:
    """One merged tensor, float32, of the sources' shape. Elementwise but for the broadcast of coefficients."""
    return method.combine(options, sources, scores, statistics, parameters)


def combine_population(
    method: Method,
    options: Options,
    sources: Sequence[jax.Array],
    scores: Sequence[jax.Array],
    table: Mapping[str, jax.Array],
    parameters: Mapping[str, jax.Array],
) -> jax.Array:
    """P candidates of one tensor at once: float32 `[rows, P, …]` for sources `[rows, …]`.

    parameters: `[P, K]` or `[P]`; table: as tabulated, of whole tensors. The candidates stand beside each other at
    every row, so that a row of the sources is read once, from the nearest cache, for all of them: with the candidates
    outermost each would read every source again.
    """
    statistics = jax.vmap(lambda own: look_up(method, table, own))(dict(parameters))

    def row(sources: Any, scores: Any) -> jax.Array:
        def one(own: Any, numbers: Any) -> jax.Array:
            return combine(method, options, sources, scores, own, numbers)

        return jax.vmap(one)(statistics, dict(parameters))

    return jax.vmap(row)(tuple(sources), tuple(scores))


# ---------------------------------------------------------------------------------------------------------------
# The methods


def _axis(options: Options, tensor: np.ndarray) -> int | None:
    return options.axis if tensor.ndim > 1 else None


def _split(options: Options, sources: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    return (sources[0], sources[1:]) if options.based else (None, sources)


def _add_up(options: Options, sources: Sequence[jax.Array], coefficients: Sequence[jax.Array]) -> jax.Array:
    return (span.from_base if options.based else span.weighted_sum)(sources, coefficients)


def _combine_linear(options: Options, sources: Any, scores: Any, statistics: Any, parameters: Any) -> jax.Array:
    return span.weighted_sum(sources, list(span.linear_coefficients(parameters["weight"], options.normalize)))


def _combine_slerp(options: Options, sources: Any, scores: Any, statistics: Any, parameters: Any) -> jax.Array:
    return span.weighted_sum(sources, span.slerp_coefficients(statistics["angle"], parameters["t"]))


def _prepare_nuslerp(options: Options, sources: Any, parameters: Any, densities: Any, draws: Any) -> Prepared:
    base, vectors = _split(options, sources)
    return Prepared((), span.nuslerp_angle(vectors, base, _axis(options, sources[0])))


def _combine_nuslerp(options: Options, sources: Any, scores: Any, statistics: Any, parameters: Any) -> jax.Array:
    t = span.nuslerp_fraction(parameters["weight"])
    return _add_up(options, sources, span.slerp_coefficients(statistics["angle"], t))


def _prepare_multislerp(options: Options, sources: Any, parameters: Any, densities: Any, draws: Any) -> Prepared:
    base, vectors = _split(options, sources)
    return Prepared((), span.lengths_and_gaps(vectors, base))


def _combine_multislerp(options: Options, sources: Any, scores: Any, statistics: Any, parameters: Any) -> jax.Array:
    coefficients = span.multislerp_coefficients(
        statistics["length"], statistics["gap"], parameters["weight"], options.normalize, parameters["eps"]
    )
    return _add_up(options, sources, list(coefficients))


def _prepare_karcher(options: Options, sources: Any, parameters: Any, densities: Any, draws: Any) -> Prepared:
    return Prepared((), span.karcher_coefficients(sources, int(parameters["max_iter"]), float(parameters["tol"])))


def _combine_karcher(options: Options, sources: Any, scores: Any, statistics: Any, parameters: Any) -> jax.Array:
    return span.weighted_sum(sources, list(statistics["coefficient"]))


def _prepare_stock(options: Options, sources: Any, parameters: Any, densities: Any, draws: Any) -> Prepared:
    return Prepared((), span.stock_ratio(sources[1:], sources[0], _axis(options, sources[0])))


def _combine_stock(options: Options, sources: Any, scores: Any, statistics: Any, parameters: Any) -> jax.Array:
    return span.from_base(sources, [statistics["ratio"] / (len(sources) - 1)] * (len(sources) - 1))


def _prepare_sce(options: Options, sources: Any, parameters: Any, densities: Any, draws: Any) -> Prepared:
    base = np.asarray(sources[0], np.float32)
    number, statistics = entrywise.sce_select([np.asarray(x, np.float32) - base for x in sources[1:]], densities[0])
    return Prepared((number,), statistics)


def _combine_sce(options: Options, sources: Any, scores: Any, statistics: Any, parameters: Any) -> jax.Array:
    base, parents = sources[0], sources[1:]
    delta = entrywise.sce_sum(base, parents, scores[0], statistics["threshold"], statistics["share"])
    return base.astype(jnp.float32) + delta


def _combine_nearswap(options: Options, sources: Any, scores: Any, statistics: Any, parameters: Any) -> jax.Array:
    return entrywise.nearswap(sources[0], sources[1], parameters["t"])


def _combine_passthrough(options: Options, sources: Any, scores: Any, statistics: Any, parameters: Any) -> jax.Array:
    return parameters["scale"][0] * sources[0].astype(jnp.float32)


def _linear_complaint(options: Options, parameters: Numbers) -> str | None:
    if options.normalize and np.sum(parameters["weight"]) == 0:
        return "the weights sum to zero, which cannot be normalised"
    return None


def _della_complaint(options: Options, parameters: Numbers) -> str | None:
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            return f"density {density:g} ± epsilon {epsilon:g} leaves (0, 1)"
    return None


WEIGHT = Parameter("weight", per_parent=True, default=None, low=0.0, high=1.0)
DENSITY = Parameter(
    "density", per_parent=True, default=1.0, low=0.0, high=1.0, lowest=0.0, highest=1.0, on_grid=True
)  # fmt: skip
LAMBDA = Parameter("lambda", per_parent=False, default=1.0, low=0.0, high=2.0)
FRACTION = Parameter("t", per_parent=False, default=0.5, low=0.0, high=1.0)
EPSILON = Parameter(
    "epsilon", per_parent=True, default=0.15, low=0.0, high=0.5, lowest=0.0, highest=0.5, searched=False
)
GAMMA = Parameter("gamma", per_parent=True, default=0.01, low=0.0, high=1.0, lowest=0.0, highest=1.0, searched=False)

TASK_VECTOR_SWITCHES = ("normalize", "rescale")


def _task_vectors(
    name: str,
    options: Options,
    sparsifier: Sparsifier | None,
    add: Callable[[Sequence[jax.Array], jax.Array, bool], jax.Array],
    constants: tuple[Parameter, ...] = (),
    density: Parameter = DENSITY,
    complaint: Callable[[Options, Numbers], str | None] = lambda options, parameters: None,
) -> Method:
    """`b + lambda * S_k(w_k s_k (x_k - b))`, S the plain or the sign-elected sum over what the sparsifier keeps, s_k
    the rescaling."""

    def prepare_(options: Options, sources: Any, parameters: Any, densities: Any, draws: Any) -> Prepared:
        if sparsifier is None:
            return Prepared((), {})
        base = np.asarray(sources[0], np.float32)
        buffer = np.empty_like(base)
        scores, rows = [], []
        for k, parent in enumerate(sources[1:]):
            own = {p.name: float(parameters[p.name][k]) for p in constants}
            np.abs(np.subtract(parent, base, out=buffer, dtype=np.float32), out=buffer)
            if sparsifier.score is not None:
                scores.append(sparsifier.score(buffer, draws(k), own))
            flat = None if sparsifier.score is None else scores[k].reshape(-1)
            rows.append(sparsifier.measure(buffer.reshape(-1), flat, densities[k], own, options.rescale == "l1"))
        return Prepared(tuple(scores), {name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def combine_(options: Options, sources: Any, scores: Any, statistics: Any, parameters: Any) -> jax.Array:
        base, *parents = sources
        weight = factors = parameters["weight"]
        if sparsifier is not None and options.rescale == "l1":
            factors = factors * statistics["l1_scale"]
        elif sparsifier is not None and options.rescale == "density":
            factors = factors / jnp.maximum(parameters["density"], 1.0 / SCORE_LEVELS)
        weighted = sparse.kept_deltas(sparsifier, base, parents, scores or None, statistics, factors)
        return base.astype(jnp.float32) + parameters["lambda"] * add(weighted, weight, options.normalize)

    random = sparsifier is not None and sparsifier.random
    return Method(
        name,
        (WEIGHT, LAMBDA) if sparsifier is None else (WEIGHT, density, LAMBDA, *constants),
        base="required",
        combine=combine_,
        prepare=prepare_,
        options=options,
        random=random,
        scores=lambda parents: parents if random else 0,
        complaint=complaint,
        switches=TASK_VECTOR_SWITCHES,
        # To mergekit every method of this family has a density; here it would have nothing to thin out.
        inert=("int8_mask", "density") if sparsifier is None else ("int8_mask",),
    )


_PLAIN, _NORMALIZED = Options(based=True), Options(normalize=True, based=True)
_RESCALED = Options(rescale="l1", based=True)
_DELLA_DENSITY = Parameter(
    "density", per_parent=True, default=1.0, low=0.2, high=0.8, lowest=0.0, highest=1.0, on_grid=True
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "linear", (WEIGHT,), base="parent", combine=_combine_linear, options=Options(normalize=True),
            complaint=_linear_complaint, switches=("normalize",),
        ),
        Method(
            "slerp", (FRACTION,), base="parent", combine=_combine_slerp,
            prepare=lambda options, sources, parameters, densities, draws: Prepared((), span.slerp_angle(*sources)),
            min_parents=2, max_parents=2,
        ),
        Method(
            "nuslerp", (WEIGHT,), base="optional", combine=_combine_nuslerp, prepare=_prepare_nuslerp,
            min_parents=2, max_parents=2, switches=("nuslerp_row_wise", "nuslerp_flatten"),
        ),
        Method(
            "multislerp",
            (WEIGHT, Parameter("eps", False, default=1e-8, low=0.0, high=1.0, lowest=0.0, searched=False)),
            base="optional", combine=_combine_multislerp, prepare=_prepare_multislerp,
            options=Options(normalize=True), complaint=_linear_complaint, switches=("normalize_weights",),
        ),
        Method(
            "karcher",
            (
                Parameter("max_iter", False, default=10, low=0, high=100, lowest=0, highest=10_000, searched=False),
                Parameter("tol", False, default=1e-5, low=0.0, high=1.0, lowest=0.0, searched=False),
            ),
            base="parent", combine=_combine_karcher, prepare=_prepare_karcher,
        ),
        Method(
            "model_stock", (), base="required", combine=_combine_stock, prepare=_prepare_stock,
            options=Options(based=True), min_parents=2, switches=("filter_wise",),
        ),
        _task_vectors("task_arithmetic", _PLAIN, None, sparse.plain_sum),
        _task_vectors("ties", _NORMALIZED, MAGNITUDE, sparse.elected_sum),
        _task_vectors("dare_linear", _RESCALED, RANDOM, sparse.plain_sum),
        _task_vectors("dare_ties", _RESCALED, RANDOM, sparse.elected_sum),
        _task_vectors(
            "della", Options(normalize=True, rescale="l1", based=True), RANKED, sparse.elected_sum, (EPSILON,),
            _DELLA_DENSITY, _della_complaint,
        ),
        _task_vectors(
            "della_linear", _RESCALED, RANKED, sparse.plain_sum, (EPSILON,), _DELLA_DENSITY, _della_complaint
        ),
        _task_vectors("breadcrumbs", _PLAIN, BAND, sparse.plain_sum, (GAMMA,)),
        _task_vectors("breadcrumbs_ties", _PLAIN, BAND, sparse.elected_sum, (GAMMA,)),
        Method(
            "sce",
            (
                Parameter(
                    "select_topk", False, default=1.0, low=0.0, high=1.0, lowest=0.0, highest=1.0, on_grid=True
                ),
            ),
            base="required", combine=_combine_sce, prepare=_prepare_sce, options=Options(based=True),
            scores=lambda parents: 1, inert=("int8_mask",),
        ),
        Method(
            "nearswap", (Parameter("t", False, default=None, low=0.0, high=0.01, lowest=0.0),), base="required",
            combine=_combine_nearswap, options=Options(based=True), max_parents=1,
        ),
        Method(
            "passthrough", (Parameter("scale", True, default=1.0, low=0.0, high=2.0),), base="parent",
            combine=_combine_passthrough, max_parents=1,
        ),
    )
}  # fmt: skip
