"""The registry of merge methods, and the four functions through which every method is used.

    statistics = measure(method, sources, scores, densities)        host, once; exact, for one recipe
    table      = measure_grid(method, sources, scores)              host, once; for every density in 1/1000 steps
    statistics = look_up(method, table, parameters)                 device, per candidate
    merged     = combine(method, options, sources, scores, statistics, parameters)   device, per candidate

`parameters` holds the searched or given numbers, per parent `float32[K]` or shared `float32[]`. `options` are
the static switches. Results are float32; the caller casts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels import linear, sparse
from merge_kernels.sparse import MAGNITUDE, RANDOM, SCORE_LEVELS, Sparsifier

# A searched density is rounded to this grid, and the recipe carries the rounded value.
DENSITY_STEPS = 1000
GRID = np.arange(DENSITY_STEPS + 1, dtype=np.float64) / DENSITY_STEPS

Rescale = Literal["none", "l1", "density"]


@dataclass(frozen=True)
class Parameter:
    """A number of a recipe: its default, the default bounds of a search, and the values that have a meaning.

    `default` None: 1/K in a search (the uniform merge), required in a recipe.
    """

    name: str
    per_parent: bool
    default: float | None
    low: float
    high: float
    lowest: float = -np.inf
    highest: float = np.inf


@dataclass(frozen=True)
class Options:
    """Static switches of a merge. `rescale`: none, l1 (restore each delta's L1 norm) or density (1/density)."""

    normalize: bool
    rescale: Rescale = "none"


@dataclass(frozen=True)
class Method:
    """One merge method: `kind` says which combination, the rest are its parameters (see `METHODS`)."""

    name: str
    kind: Literal["linear", "slerp", "sum", "elect"]
    parameters: tuple[Parameter, ...]
    options: Options
    needs_base: bool
    min_parents: int = 1
    max_parents: int | None = None
    sparsifier: Sparsifier | None = None

    def parameter(self, name: str) -> Parameter:
        return next(p for p in self.parameters if p.name == name)


WEIGHT = Parameter("weight", per_parent=True, default=None, low=0.0, high=1.0)
DENSITY = Parameter("density", per_parent=True, default=1.0, low=0.0, high=1.0, lowest=0.0, highest=1.0)
LAMBDA = Parameter("lambda", per_parent=False, default=1.0, low=0.0, high=2.0)
FRACTION = Parameter("t", per_parent=False, default=0.5, low=0.0, high=1.0)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", "linear", (WEIGHT,), Options(normalize=True), needs_base=False),
        Method(
            "slerp", "slerp", (FRACTION,), Options(normalize=False), needs_base=False, min_parents=2, max_parents=2
        ),
        Method("task_arithmetic", "sum", (WEIGHT, LAMBDA), Options(normalize=False), needs_base=True),
        Method(
            "ties", "elect", (WEIGHT, DENSITY, LAMBDA), Options(normalize=True), needs_base=True,
            sparsifier=MAGNITUDE,
        ),
        Method(
            "dare_linear", "sum", (WEIGHT, DENSITY, LAMBDA), Options(normalize=False, rescale="l1"),
            needs_base=True, sparsifier=RANDOM,
        ),
        Method(
            "dare_ties", "elect", (WEIGHT, DENSITY, LAMBDA), Options(normalize=False, rescale="l1"),
            needs_base=True, sparsifier=RANDOM,
        ),
    )
}  # fmt: skip


def draw_scores(seed: int, digests: Sequence[bytes], shape: tuple[int, ...]) -> jax.Array:
    """One uniform number per entry and parent, `uint16[K, *shape]`, fixed by (seed, digest).

    `digests[k]` names parent k and the tensor (at least 16 bytes of a hash), so that neither the order of the
    parents nor anything about a candidate changes a mask. Masks are nested in density.
    """

    words = np.stack([np.frombuffer(digest[:16], "<u4") for digest in digests])
    return _draw(np.uint32(seed), words, shape)


@partial(jax.jit, static_argnums=2)
def _draw(seed: jax.Array, words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    def one(own: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        for word in own:
            key = jax.random.fold_in(key, word)
        return jax.random.bits(key, shape, jnp.uint16)

    return jnp.stack([one(own) for own in words])


def _deltas(sources: Sequence[np.ndarray]) -> list[np.ndarray]:
    base = np.asarray(sources[0], np.float32)
    return [np.asarray(parent, np.float32) - base for parent in sources[1:]]


def measure(
    method: Method,
    sources: Sequence[np.ndarray],
    scores: Sequence[np.ndarray] | None,
    densities: Sequence[float],
) -> sparse.Statistics:
    """What one recipe needs to know of a tensor: one exact threshold and scale per parent (`densities: [K]`)."""
    if method.kind == "slerp":
        return {"angle": linear.slerp_angle(*sources)}
    if method.sparsifier is None:
        return {}
    rows = _measure_rows(method.sparsifier, sources, scores, [np.array([d], np.float64) for d in densities])
    return {name: values[:, 0] for name, values in rows.items()}


def measure_grid(
    method: Method, sources: Sequence[np.ndarray], scores: Sequence[np.ndarray] | None
) -> sparse.Statistics:
    """What a search needs to know of a tensor: `threshold` and `l1_scale`, `[K, DENSITY_STEPS + 1]`."""
    if method.sparsifier is None:
        return measure(method, sources, scores, ())
    return _measure_rows(method.sparsifier, sources, scores, [GRID] * (len(sources) - 1))


def _measure_rows(
    sparsifier: Sparsifier,
    sources: Sequence[np.ndarray],
    scores: Sequence[np.ndarray] | None,
    densities: Sequence[np.ndarray],
) -> sparse.Statistics:
    rows = [
        sparsifier.measure(
            np.abs(delta).ravel(), None if scores is None else np.asarray(scores[k]).ravel(), densities[k]
        )
        for k, delta in enumerate(_deltas(sources))
    ]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def grid_index(density: jax.Array) -> jax.Array:
    """The row of the table for a density: int32, nearest of `0 … DENSITY_STEPS`."""
    return jnp.clip(jnp.round(density * DENSITY_STEPS), 0, DENSITY_STEPS).astype(jnp.int32)


def look_up(method: Method, table: dict[str, jax.Array], parameters: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The statistics of one candidate out of the table: `[K, G] -> [K]`."""
    if method.sparsifier is None:
        return table
    index = grid_index(parameters["density"])
    return {name: jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0] for name, rows in table.items()}


def combine(
    method: Method,
    options: Options,
    sources: Sequence[jax.Array],
    scores: Sequence[jax.Array] | None,
    statistics: dict[str, jax.Array],
    parameters: dict[str, jax.Array],
) -> jax.Array:
    """One merged tensor, float32, of the sources' shape. Elementwise: any rows of a tensor may be merged alone.

    sources: base first where the method needs one, then K parents, any float dtype; scores: K arrays uint16 of
    the same shape for random methods, else None; statistics: of the *whole* tensor; parameters: `float32[K]` or
    `float32[]` by name. linear: `sum w x / sum w`. slerp: see `linear.slerp_coefficients`. The others:
    `b + lambda * S_k(w_k s_k (x_k - b))` with S the plain or the sign-elected sum over what is kept, and s_k the
    rescaling.
    """
    if method.kind == "linear":
        coefficients = linear.linear_coefficients(parameters["weight"], options.normalize)
        return linear.weighted_sum(sources, list(coefficients))
    if method.kind == "slerp":
        return linear.weighted_sum(sources, list(linear.slerp_coefficients(statistics["angle"], parameters["t"])))
    base, *parents = sources
    weight = parameters["weight"]
    factors = weight
    if method.sparsifier is not None and options.rescale == "l1":
        factors = factors * statistics["l1_scale"]
    elif method.sparsifier is not None and options.rescale == "density":
        factors = factors / jnp.maximum(parameters["density"], 1.0 / SCORE_LEVELS)
    weighted = sparse.kept_deltas(method.sparsifier, base, parents, scores, statistics, factors)
    add = sparse.elected_sum if method.kind == "elect" else sparse.plain_sum
    return base.astype(jnp.float32) + parameters["lambda"] * add(weighted, weight, options.normalize)
