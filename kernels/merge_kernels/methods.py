"""The registry of merge methods, and the four functions through which every method is used; `register` adds one.

    prepared   = prepare(method, options, sources, parameters, row_keys)     host, once; exact, for one recipe
    prepared   = tabulate(method, options, sources, parameters, row_keys)    host, once; for every density on a grid
    statistics = look_up(method, prepared.statistics, parameters)            device, per candidate
    merged     = combine(method, options, sources, prepared.mask_keys, statistics, parameters)
                                                                             device, per candidate

`sources` are K arrays `[...]` of one shape, after the base where `options.has_base`: a sequence of arrays, or one array
`[S, ...]` in which they are stacked. `parameters` are numbers by name,
per parent `[K]` or shared `[]`: float64 on the host (a density counts entries), float32 on the device. `options` are
the static options. Results are float32; the caller casts. Tensors may be merged in pieces along their first axis,
as long as their statistics are those of the whole tensor.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels import elementwise, interpolation, task_vectors
from merge_kernels.noise import LEVELS, device_uniform, host_uniform
from merge_kernels.sums import Arrays, is_looped
from merge_kernels.task_vectors import BAND, BERNOULLI, MAGNITUDE, MAGPRUNE, Sparsifier

# A searched density is rounded to this grid, and the recipe carries the rounded value.
DENSITY_STEPS = 1000
GRID = np.arange(DENSITY_STEPS + 1, dtype=np.float64) / DENSITY_STEPS

Rescale = Literal["none", "l1", "density"]
Numbers = Mapping[str, Any]
# The row keys of parent k's uniform numbers (see noise.draw_row_keys).
RowKeys = Callable[[int], np.ndarray]
HostSources = Sequence[np.ndarray]
# What recipes call the fields of `Options`: mergekit's names.
YAML_OPTIONS = ("normalize", "normalize_weights", "rescale", "filter_wise", "nuslerp_row_wise", "nuslerp_flatten")


@dataclass(frozen=True)
class Parameter:
    """A number of a recipe: its default, the default bounds of a search, and the values that have a meaning.

    `default` None: required in a recipe; in a search 1/K per parent (the uniform merge), else required. `start`: where
    a search begins, where there is no default, or one outside of the default bounds; None: at the default. `searched`
    False: what is prepared depends on it, so it is fixed for a whole run. `quantised`: a density, which a search rounds
    to the grid.
    """

    name: str
    per_parent: bool
    default: float | None
    low: float
    high: float
    valid_min: float = -np.inf
    valid_max: float = np.inf
    searched: bool = True
    quantised: bool = False
    start: float | None = None


@dataclass(frozen=True)
class Options:
    """Static switches of a merge.

    `rescale`: none, l1 (restore each delta's L1 norm) or density (1/density). `has_base`: the sources begin with a
    base, from which deltas are taken. `axis`: what counts as one vector to NuSLERP and Model Stock: None the whole
    tensor, -1 its rows, 0 its columns.
    """

    normalize: bool = False
    rescale: Rescale = "none"
    has_base: bool = False
    axis: int | None = None


@dataclass(frozen=True)
class Prepared:
    """What does not depend on a candidate: some arrays of mask keys (none, one, or one per parent), each a number per
    entry, `uint16[*shape]`, or the row keys that numbers are hashed with, `uint32[rows, 2]`; and statistics, whose last
    axis is the grid's where they were tabulated."""

    mask_keys: tuple[np.ndarray, ...]
    statistics: dict[str, np.ndarray]


Prepare = Callable[[Options, HostSources, Numbers, Sequence[np.ndarray], RowKeys], Prepared]
Combine = Callable[[Options, Arrays, Arrays, Mapping[str, jax.Array], Mapping[str, jax.Array]], jax.Array]


def _prepare_nothing(
    options: Options, sources: HostSources, parameters: Numbers, densities: Sequence[np.ndarray],
    row_keys: RowKeys,
) -> Prepared:  # fmt: skip
    return Prepared((), {})


@dataclass(frozen=True)
class Method:
    """One merge method.

    - `base`: required, optional (deltas are taken where there is one), or parent (a base model is one of the models
      that are merged).
    - `prepare(options, sources, parameters, densities, row_keys)`: `densities` are float64[G] per value of the
      density.
    - `combine(options, sources, mask_keys, statistics, parameters)`.
    - `mask_keys(K)`: how many arrays of mask keys are prepared; `random`: whether they are drawn; `has_row_keys`:
      whether they are row keys, of which `combine` makes the numbers, and not a number per entry.
    - `validate(options, parameters)`: why these numbers have no meaning, or None.
    - `yaml_options`: the names (of `YAML_OPTIONS`) under which a recipe may set `options`; `ignored_settings`:
      settings that it takes and that change nothing.

    Tensors are merged in pieces, so `combine` is elementwise in the sources: whatever needs a whole tensor (a norm, a
    quantile) is a statistic that `prepare` measures. The sources and mask keys of many parents are stacked, and it sums
    over them with `sum_over`, lest the program grow with them. A method is a constant of compiled programs, so it is
    hashable.
    """

    name: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "parent"]
    combine: Combine
    prepare: Prepare = _prepare_nothing
    options: Options = Options()
    min_parents: int = 1
    max_parents: int | None = None
    random: bool = False
    has_row_keys: bool = False
    mask_keys: Callable[[int], int] = lambda parents: 0
    validate: Callable[[Options, Numbers], str | None] = lambda options, parameters: None
    yaml_options: tuple[str, ...] = ()
    ignored_settings: tuple[str, ...] = ()

    def parameter(self, name: str) -> Parameter:
        return next(p for p in self.parameters if p.name == name)

    @property
    def keeps_base(self) -> bool:
        """Whether the merge of a base with no parents is the base: whether any number of them adds to it."""
        return self.base == "required" and self.min_parents == 1 and self.max_parents is None

    @property
    def measures(self) -> bool:
        """Whether anything is prepared of a tensor."""
        return self.prepare is not _prepare_nothing

    def mask_key_array(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], np.dtype]:
        """The shape and the dtype of one array of mask keys of a tensor."""
        return ((*shape[:1], 2), np.dtype(np.uint32)) if self.has_row_keys else (shape, np.dtype(np.uint16))

    @property
    def density(self) -> Parameter | None:
        """The parameter that the prepared tables have an axis for."""
        return next((p for p in self.parameters if p.quantised), None)

    def uses_base(self, base_given: bool) -> bool:
        """Whether a merge takes deltas from a base, where there is a base model or not."""
        return self.base == "required" or (self.base == "optional" and base_given)


# ---------------------------------------------------------------------------------------------------------------
# Registering


def register(method: Method) -> Method:
    """Make a method known by its name: recipes, searches and listings take it from then on. Returns it.

    Raises ValueError for a name that is taken (compiled programs know a method by its name), and for a method that
    could not be used.
    """
    if not isinstance(method, Method):
        raise ValueError(f"{method!r} is no merge method; expected a merge_kernels.Method")
    problem = _problem(method)
    if problem is not None:
        raise ValueError(f"merge method {method.name!r}: {problem}")
    METHODS[method.name] = method
    return method


def _problem(method: Method) -> str | None:
    """Why a method cannot be registered, or None."""
    names = [parameter.name for parameter in method.parameters]
    settings = [*names, *method.yaml_options]
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", method.name):
        return "the name is no word of letters, digits and _"
    if method.name in METHODS:
        return "the name is registered already; choose another"
    if len(set(settings)) < len(settings):
        return f"{max(settings, key=settings.count)} stands more than once among its parameters and YAML options"
    foreign = [name for name in method.yaml_options if name not in YAML_OPTIONS]
    if foreign:
        return f"{foreign[0]!r} is no YAML option; expected some of {', '.join(YAML_OPTIONS)}, or a Parameter"
    if method.base not in ("required", "optional", "parent"):
        return f"base is {method.base!r}; expected required, optional or parent"
    if sum(parameter.quantised for parameter in method.parameters) > 1:
        return "has two quantised parameters; tables have an axis for one"
    for parameter in method.parameters:
        if not parameter.valid_min <= parameter.low < parameter.high <= parameter.valid_max:
            return f"{parameter.name}: bounds [{parameter.low:g}, {parameter.high:g}]; expected low < high, both valid"
    try:
        hash(method)
    except TypeError as error:
        return f"cannot be hashed ({error}); give tuples in place of lists"
    return None


# ---------------------------------------------------------------------------------------------------------------
# Use


def prepare(method: Method, options: Options, sources: HostSources, parameters: Numbers, row_keys: RowKeys) -> Prepared:
    """Measure one tensor for one recipe, exactly. Statistics have no grid axis."""
    density = method.density
    if density is None:
        return method.prepare(options, sources, parameters, (), row_keys)
    values = np.atleast_1d(np.asarray(parameters[density.name], np.float64))
    prepared = method.prepare(options, sources, parameters, [np.array([value]) for value in values], row_keys)
    return Prepared(prepared.mask_keys, {name: rows[..., 0] for name, rows in prepared.statistics.items()})


def tabulate(
    method: Method, options: Options, sources: HostSources, parameters: Numbers, row_keys: RowKeys
) -> Prepared:
    """Measure one tensor for a search: for every density `0, 1/1000 … 1`. `parameters` are those never searched."""
    if method.density is None:
        return method.prepare(options, sources, parameters, (), row_keys)
    count = len(sources) - int(options.has_base) if method.density.per_parent else 1
    return method.prepare(options, sources, parameters, [GRID] * count, row_keys)


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
    sources: Arrays,
    mask_keys: Arrays,
    statistics: Mapping[str, jax.Array],
    parameters: Mapping[str, jax.Array],
) -> jax.Array:
    """One merged tensor, float32, of the sources' shape. Elementwise but for the broadcast of coefficients."""
    sources, mask_keys = _for_sums(options, sources, mask_keys)
    if is_looped(len(sources) - int(options.has_base)):
        statistics, parameters = jax.tree.map(jnp.asarray, (dict(statistics), dict(parameters)))
    return method.combine(options, sources, mask_keys, statistics, parameters)


def _for_sums(options: Options, sources: Arrays, mask_keys: Arrays) -> tuple[Arrays, Arrays]:
    """Sources and mask keys as `sum_over` needs them: arrays each, or stacked where it is a loop, for that picks a
    parent by a number which is known only while it runs."""
    if not is_looped(len(sources) - int(options.has_base)):
        return tuple(sources), tuple(mask_keys)
    return jnp.stack(sources), jnp.stack(mask_keys) if len(mask_keys) else ()


def combine_population(
    method: Method,
    options: Options,
    sources: Arrays,
    mask_keys: Arrays,
    table: Mapping[str, jax.Array],
    parameters: Mapping[str, jax.Array],
) -> jax.Array:
    """P candidates of one tensor at once: float32 `[rows, P, …]` for sources `[rows, …]`.

    parameters: `[P, K]` or `[P]`; table: as tabulated, of whole tensors. The candidates stand beside each other at
    every row, so that a row of the sources is read once, from the nearest cache, for all of them: with the candidates
    outermost each would read every source again.
    """
    statistics = jax.vmap(lambda own: look_up(method, table, own))(dict(parameters))

    def row(sources: Any, mask_keys: Any) -> jax.Array:
        def one(own: Any, keys: Any) -> jax.Array:
            return combine(method, options, sources, mask_keys, own, keys)

        return jax.vmap(one)(statistics, dict(parameters))

    sources, mask_keys = _for_sums(options, sources, mask_keys)
    # Of stacked sources the rows are the second axis.
    return jax.vmap(row, in_axes=int(is_looped(len(sources) - int(options.has_base))))(sources, mask_keys)


# ---------------------------------------------------------------------------------------------------------------
# The methods


def _axis(options: Options, tensor: np.ndarray) -> int | None:
    return options.axis if tensor.ndim > 1 else None


def _split(options: Options, sources: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    return (sources[0], sources[1:]) if options.has_base else (None, sources)


def _add_up(options: Options, sources: Arrays, coefficients: Arrays) -> jax.Array:
    return (interpolation.from_base if options.has_base else interpolation.weighted_sum)(sources, coefficients)


def _combine_linear(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    return interpolation.weighted_sum(
        sources, interpolation.linear_coefficients(parameters["weight"], options.normalize)
    )


def _prepare_slerp(options: Options, sources: Any, parameters: Any, densities: Any, row_keys: Any) -> Prepared:
    return Prepared((), interpolation.slerp_angle(*sources))


def _combine_slerp(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    return interpolation.weighted_sum(sources, interpolation.slerp_coefficients(statistics["angle"], parameters["t"]))


def _prepare_nuslerp(options: Options, sources: Any, parameters: Any, densities: Any, row_keys: Any) -> Prepared:
    base, vectors = _split(options, sources)
    return Prepared((), interpolation.nuslerp_angle(vectors, base, _axis(options, sources[0])))


def _combine_nuslerp(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    t = interpolation.nuslerp_fraction(parameters["weight"])
    return _add_up(options, sources, interpolation.slerp_coefficients(statistics["angle"], t))


def _prepare_multislerp(options: Options, sources: Any, parameters: Any, densities: Any, row_keys: Any) -> Prepared:
    base, vectors = _split(options, sources)
    return Prepared((), interpolation.lengths_and_gaps(vectors, base))


def _combine_multislerp(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    coefficients = interpolation.multislerp_coefficients(
        statistics["length"], statistics["gap"], parameters["weight"], options.normalize, parameters["eps"]
    )
    return _add_up(options, sources, coefficients)


def _prepare_karcher(options: Options, sources: Any, parameters: Any, densities: Any, row_keys: Any) -> Prepared:
    return Prepared(
        (), interpolation.karcher_coefficients(sources, int(parameters["max_iter"]), float(parameters["tol"]))
    )


def _combine_karcher(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    return interpolation.weighted_sum(sources, statistics["coefficient"])


def _prepare_stock(options: Options, sources: Any, parameters: Any, densities: Any, row_keys: Any) -> Prepared:
    return Prepared((), interpolation.stock_ratio(sources[1:], sources[0], _axis(options, sources[0])))


def _combine_stock(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    parents, ratio = len(sources) - 1, statistics["ratio"]
    return interpolation.from_base(sources, jnp.broadcast_to(ratio / parents, (parents, *ratio.shape)))


def _prepare_sce(options: Options, sources: Any, parameters: Any, densities: Any, row_keys: Any) -> Prepared:
    base = np.asarray(sources[0], np.float32)
    number, statistics = elementwise.sce_select([np.asarray(x, np.float32) - base for x in sources[1:]], densities[0])
    return Prepared((number,), statistics)


def _combine_sce(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    delta = elementwise.sce_sum(sources, mask_keys[0], statistics["threshold"], statistics["share"])
    return sources[0].astype(jnp.float32) + delta


def _combine_nearswap(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    return elementwise.nearswap(sources[0], sources[1], parameters["t"])


def _prepare_fusion(options: Options, sources: Any, parameters: Any, densities: Any, row_keys: Any) -> Prepared:
    return Prepared((elementwise.fusion_select(*(np.asarray(x, np.float32) for x in sources)),), {})


def _combine_fusion(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    return elementwise.fusion(sources[0], sources[1], mask_keys[0])


def _combine_ram(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    factors = jnp.ones(len(sources) - 1, jnp.float32)
    return sources[0].astype(jnp.float32) + elementwise.ram_sum(sources, parameters["epsilon"], factors)


def _prepare_ram_plus(options: Options, sources: Any, parameters: Any, densities: Any, row_keys: Any) -> Prepared:
    base = np.asarray(sources[0], np.float32)
    deltas = [np.asarray(x, np.float32) - base for x in sources[1:]]
    return Prepared((), elementwise.ram_overlap(deltas, float(parameters["epsilon"])))


def _combine_ram_plus(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    factors = 1 + parameters["r"] * jnp.clip(statistics["overlap"], 0.0, parameters["alpha"])
    return sources[0].astype(jnp.float32) + elementwise.ram_sum(sources, parameters["epsilon"], factors)


def _combine_passthrough(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
    return parameters["scale"][0] * sources[0].astype(jnp.float32)


def _validate_linear(options: Options, parameters: Numbers) -> str | None:
    if options.normalize and np.sum(parameters["weight"]) == 0:
        return "the weights sum to zero, which cannot be normalised"
    return None


def _validate_della(options: Options, parameters: Numbers) -> str | None:
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            return f"density {density:g} ± epsilon {epsilon:g} leaves (0, 1)"
    return None


WEIGHT = Parameter("weight", per_parent=True, default=None, low=0.0, high=1.0)
DENSITY = Parameter(
    "density", per_parent=True, default=1.0, low=0.0, high=1.0, valid_min=0.0, valid_max=1.0, quantised=True
)  # fmt: skip
LAMBDA = Parameter("lambda", per_parent=False, default=1.0, low=0.0, high=2.0)
FRACTION = Parameter("t", per_parent=False, default=None, low=0.0, high=1.0, start=0.5)
EPSILON = Parameter(
    "epsilon", per_parent=True, default=0.15, low=0.0, high=0.5, valid_min=0.0, valid_max=0.5, searched=False
)
GAMMA = Parameter(
    "gamma", per_parent=True, default=0.01, low=0.0, high=1.0, valid_min=0.0, valid_max=1.0, searched=False
)
RAM_EPSILON = Parameter(
    "epsilon", per_parent=False, default=1e-5, low=0.0, high=0.01, valid_min=0.0, searched=False
)  # fmt: skip

TASK_VECTOR_YAML_OPTIONS = ("normalize", "rescale")


def _task_vectors(
    name: str,
    options: Options,
    sparsifier: Sparsifier | None,
    add: Callable[[task_vectors.Weighted, jax.Array, bool], jax.Array],
    constants: tuple[Parameter, ...] = (),
    density: Parameter = DENSITY,
    validate: Callable[[Options, Numbers], str | None] = lambda options, parameters: None,
) -> Method:
    """`b + lambda * S_k(w_k s_k (x_k - b))`, S the plain or the sign-elected sum over what the sparsifier keeps, s_k
    the rescaling."""

    random = sparsifier is not None and sparsifier.random
    has_row_keys = random and sparsifier is not None and sparsifier.stored_key is None

    def prepare_(options: Options, sources: Any, parameters: Any, densities: Any, row_keys: Any) -> Prepared:
        if sparsifier is None:
            return Prepared((), {})
        base = np.asarray(sources[0], np.float32)
        buffer = np.empty_like(base)
        mask_keys, rows = [], []
        for k, parent in enumerate(sources[1:]):
            own = {p.name: float(parameters[p.name][k]) for p in constants}
            np.abs(np.subtract(parent, base, out=buffer, dtype=np.float32), out=buffer)
            flat = None
            if random:
                keys = row_keys(k)
                numbers = host_uniform(keys, base.shape)
                if sparsifier.stored_key is not None:
                    keys = numbers = sparsifier.stored_key(buffer, numbers, own)
                mask_keys.append(keys)
                flat = numbers.reshape(-1)
            rows.append(sparsifier.measure(buffer.reshape(-1), flat, densities[k], own, options.rescale == "l1"))
        return Prepared(tuple(mask_keys), {name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def combine_(options: Options, sources: Any, mask_keys: Any, statistics: Any, parameters: Any) -> jax.Array:
        base = sources[0]
        weight = factors = parameters["weight"]
        if sparsifier is not None and options.rescale == "l1":
            factors = factors * statistics["l1_scale"]
        elif sparsifier is not None and options.rescale == "density":
            factors = factors / jnp.clip(parameters["density"], 1.0 / LEVELS, 1.0)

        def weighted(k: Any) -> jax.Array:
            mask_key = None
            if has_row_keys:
                mask_key = device_uniform(mask_keys[k], base.shape)
            elif random:
                mask_key = mask_keys[k]
            own = {name: values[k] for name, values in statistics.items()}
            return task_vectors.kept_delta(sparsifier, base, sources[k + 1], mask_key, own, factors[k])

        return base.astype(jnp.float32) + parameters["lambda"] * add(weighted, weight, options.normalize)

    return Method(
        name,
        (WEIGHT, LAMBDA) if sparsifier is None else (WEIGHT, density, LAMBDA, *constants),
        base="required",
        combine=combine_,
        prepare=prepare_,
        options=options,
        random=random,
        has_row_keys=has_row_keys,
        mask_keys=lambda parents: parents if random else 0,
        validate=validate,
        yaml_options=TASK_VECTOR_YAML_OPTIONS,
        # To mergekit every method of this family has a density; here it would have nothing to thin out.
        ignored_settings=("int8_mask", "density") if sparsifier is None else ("int8_mask",),
    )


_PLAIN, _NORMALIZED = Options(has_base=True), Options(normalize=True, has_base=True)
_RESCALED = Options(rescale="l1", has_base=True)
_DELLA_DENSITY = Parameter(
    "density", per_parent=True, default=1.0, low=0.2, high=0.8, valid_min=0.0, valid_max=1.0, quantised=True, start=0.5
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "linear", (WEIGHT,), base="parent", combine=_combine_linear, options=Options(normalize=True),
            validate=_validate_linear, yaml_options=("normalize",),
        ),
        Method(
            "slerp", (FRACTION,), base="parent", combine=_combine_slerp,
            prepare=_prepare_slerp, min_parents=2, max_parents=2,
        ),
        Method(
            "nuslerp", (WEIGHT,), base="optional", combine=_combine_nuslerp, prepare=_prepare_nuslerp,
            min_parents=2, max_parents=2, yaml_options=("nuslerp_row_wise", "nuslerp_flatten"),
        ),
        Method(
            "multislerp",
            (WEIGHT, Parameter("eps", False, default=1e-8, low=0.0, high=1.0, valid_min=0.0, searched=False)),
            base="optional", combine=_combine_multislerp, prepare=_prepare_multislerp,
            options=Options(normalize=True), validate=_validate_linear, yaml_options=("normalize_weights",),
        ),
        Method(
            "karcher",
            (
                Parameter(
                    "max_iter", False, default=10, low=0, high=100, valid_min=0, valid_max=1_000_000, searched=False
                ),
                Parameter("tol", False, default=1e-5, low=0.0, high=1.0, valid_min=0.0, searched=False),
            ),
            base="parent", combine=_combine_karcher, prepare=_prepare_karcher,
        ),
        Method(
            "model_stock", (), base="required", combine=_combine_stock, prepare=_prepare_stock,
            options=Options(has_base=True), min_parents=2, yaml_options=("filter_wise",),
        ),
        _task_vectors("task_arithmetic", _PLAIN, None, task_vectors.plain_sum),
        _task_vectors("ties", _NORMALIZED, MAGNITUDE, task_vectors.elected_sum),
        _task_vectors("dare_linear", _RESCALED, BERNOULLI, task_vectors.plain_sum),
        _task_vectors("dare_ties", _RESCALED, BERNOULLI, task_vectors.elected_sum),
        _task_vectors(
            "della", Options(normalize=True, rescale="l1", has_base=True), MAGPRUNE, task_vectors.elected_sum,
            (EPSILON,), _DELLA_DENSITY, _validate_della,
        ),
        _task_vectors(
            "della_linear", _RESCALED, MAGPRUNE, task_vectors.plain_sum, (EPSILON,), _DELLA_DENSITY, _validate_della
        ),
        _task_vectors("breadcrumbs", _PLAIN, BAND, task_vectors.plain_sum, (GAMMA,)),
        _task_vectors("breadcrumbs_ties", _PLAIN, BAND, task_vectors.elected_sum, (GAMMA,)),
        Method(
            "sce",
            (
                Parameter(
                    "select_topk", False, default=1.0, low=0.0, high=1.0, valid_min=0.0, valid_max=1.0, quantised=True
                ),
            ),
            base="required", combine=_combine_sce, prepare=_prepare_sce, options=Options(has_base=True),
            mask_keys=lambda parents: 1, ignored_settings=("int8_mask",),
        ),
        Method(
            "nearswap", (Parameter("t", False, default=None, low=0.0, high=0.01, valid_min=0.0),), base="required",
            combine=_combine_nearswap, options=Options(has_base=True), max_parents=1,
        ),
        Method(
            "arcee_fusion", (), base="required", combine=_combine_fusion, prepare=_prepare_fusion,
            options=Options(has_base=True), max_parents=1, mask_keys=lambda parents: 1,
        ),
        Method("ram", (RAM_EPSILON,), base="required", combine=_combine_ram, options=Options(has_base=True)),
        Method(
            "ramplus_tl",
            (
                Parameter("r", False, default=0.1, low=0.0, high=1.0),
                Parameter("alpha", False, default=0.2, low=0.0, high=1.0),
                RAM_EPSILON,
            ),
            base="required", combine=_combine_ram_plus, prepare=_prepare_ram_plus, options=Options(has_base=True),
        ),
        Method(
            "passthrough", (Parameter("scale", True, default=1.0, low=0.0, high=2.0),), base="parent",
            combine=_combine_passthrough, max_parents=1,
        ),
    )
}  # fmt: skip
