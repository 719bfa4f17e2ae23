"""The family that is linear in the sources: the result is `sum_k c_k x_k`, or `b + sum_k c_k (x_k - b)`.

The coefficients depend on the recipe and on the lengths of the interpolated vectors and the angles between them: on
their Gram matrix, which is accumulated once per tensor, in float64 (in float32 the inner products of near-identical
tensors cancel). Vectors are the flattened tensors, or their rows or columns; a statistic of rows has shape `[R, 1]`
and one of columns `[1, C]`, so that coefficients broadcast against the tensor.

Angles are kept as `gap = 1 - cos`, which float32 holds to full relative precision where vectors are almost parallel.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels.method import (
    WEIGHT,
    CombineInputs,
    Method,
    Numbers,
    Options,
    Parameter,
    Prepared,
    PrepareInputs,
    constant,
)
from merge_kernels.registry import register
from merge_kernels.sums import Arrays, sum_over

# Beyond this |cos| SLERP's great circle is indistinguishable from its chord, and sin(theta) divides badly.
SLERP_LINEAR_ABOVE = 0.9995
# A vector shorter than this has no direction for SLERP; its length counts as 1.
SLERP_MIN_NORM = 1e-8
# NuSLERP is linear where sin^2(theta) is below this, which float32 cannot tell from 0.
NUSLERP_COLINEAR = 1e-7
# Below this sum of NuSLERP's weights both models count alike.
NUSLERP_MIN_SUM = 1e-6
# Model Stock: the smallest product of lengths, and the smallest denominator that is not singular.
STOCK_MIN_NORMS = 1e-6
# Entries of up to 15 vectors that are widened to float64 at a time; with twice as many vectors half as many.
BLOCK = 2**20


# ---------------------------------------------------------------------------------------------------------------
# Shared by the family


def gram(vectors: Sequence[np.ndarray], base: np.ndarray | None, axis: int | None) -> np.ndarray:
    """Inner products of `x_k` (or `x_k - base`), accumulated in float64.

    vectors: K arrays `[...]`; axis None: of the flattened tensors, `float64[K, K]`; else along that axis, kept with
    length 1: `float64[K, K, ...]`.
    """
    count = len(vectors)

    def wide(x: np.ndarray, part: Any) -> np.ndarray:
        values = np.asarray(x[part], np.float32)
        # The difference is taken in float32, as every method that uses it takes it.
        return (values if base is None else values - np.asarray(base[part], np.float32)).astype(np.float64)

    if axis is None or vectors[0].ndim < 2:
        vectors = [x.reshape(-1) for x in vectors]
        base = None if base is None else base.reshape(-1)
        total = np.zeros((count, count))
        step = BLOCK // max(1, count // 8)
        for start in range(0, vectors[0].size, step):
            block = np.stack([wide(x, slice(start, start + step)) for x in vectors])
            total += block @ block.T
        return total.reshape(count, count, *[1] * (vectors[0].ndim if axis is not None else 0))
    whole = [wide(x, ...) for x in vectors]
    products = np.empty((count, count, *whole[0].sum(axis=axis, keepdims=True).shape))
    for i, j in itertools.combinations_with_replacement(range(count), 2):
        products[i, j] = products[j, i] = (whole[i] * whole[j]).sum(axis=axis, keepdims=True)
    return products


def _directions(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths `[K, ...]` and cosines `[K, K, ...]` (0 with a vector of length 0) from a Gram matrix."""
    lengths = np.sqrt(np.einsum("kk...->k...", products))
    divisors = lengths[:, None] * lengths[None]
    cosines = np.divide(products, divisors, out=np.zeros_like(products), where=divisors > 0)
    return lengths, np.clip(cosines, -1.0, 1.0)


def _split(options: Options, sources: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """The base, or None where there is none, and the parents."""
    return (sources[0], sources[1:]) if options.has_base else (None, sources)


def _axis(options: Options, tensor: np.ndarray) -> int | None:
    return options.axis if tensor.ndim > 1 else None


def weighted_sum(sources: Arrays, coefficients: Arrays) -> jax.Array:
    """`sum_k c_k x_k` in float32. sources: K arrays `[...]`; coefficients: K scalars, or what broadcasts."""
    return sum_over(lambda k: coefficients[k] * sources[k].astype(jnp.float32), len(sources))


def combine_coefficients(options: Options, inputs: CombineInputs) -> jax.Array:
    """The sum of the sources with the coefficients that were prepared."""
    return weighted_sum(inputs.sources, inputs.statistics["coefficient"])


def from_base(sources: Arrays, coefficients: Arrays) -> jax.Array:
    """`b + sum_k c_k (x_k - b)` in float32; sources: the base first."""
    base = sources[0].astype(jnp.float32)
    total = sum_over(lambda k: coefficients[k] * (sources[k + 1].astype(jnp.float32) - base), len(sources) - 1)
    return base + total


def _add_up(options: Options, sources: Arrays, coefficients: Arrays) -> jax.Array:
    return (from_base if options.has_base else weighted_sum)(sources, coefficients)


def _validate_weights(options: Options, parameters: Numbers) -> str | None:
    if options.normalize and np.sum(parameters["weight"]) == 0:
        return "the weights sum to zero, which cannot be normalised"
    return None


# ---------------------------------------------------------------------------------------------------------------
# Linear


def _combine_linear(options: Options, inputs: CombineInputs) -> jax.Array:
    """Model soups (arXiv 2203.05482): coefficients `w_k`, or `w_k / sum w` with `normalize`.

    Weights that sum to zero cannot be normalised and give non-finite values; callers refuse them.
    """
    weight = inputs.parameters["weight"]
    return weighted_sum(inputs.sources, weight / jnp.sum(weight) if options.normalize else weight)


register(
    Method(
        "linear",
        (WEIGHT,),
        base="parent",
        combine=_combine_linear,
        options=Options(normalize=True),
        averages=True,
        validate=_validate_weights,
        yaml_options=("normalize",),
    )
)


# ---------------------------------------------------------------------------------------------------------------
# SLERP and NuSLERP


def _prepare_slerp(options: Options, inputs: PrepareInputs) -> Prepared:
    """`angle`: between the two flattened tensors, float32 in (0, pi), or 0 where SLERP falls back to LERP."""
    products = gram(inputs.sources, None, None)
    lengths = np.sqrt(np.diag(products))
    cosine = products[0, 1] / np.prod(np.where(lengths > SLERP_MIN_NORM, lengths, 1.0))
    cosine = float(np.clip(cosine, -1.0, 1.0)) if inputs.sources[0].size else 1.0
    angle = 0.0 if abs(cosine) > SLERP_LINEAR_ABOVE else np.arccos(cosine)
    return Prepared((), {"angle": np.asarray(angle, np.float32)})


def _slerp_coefficients(angle: jax.Array, t: jax.Array) -> list[jax.Array]:
    """Shoemake's spherical interpolation applied to the raw vectors.

    `sin((1-t) angle) / sin(angle)` and `sin(t angle) / sin(angle)`; `1-t` and `t` where `angle` is 0.
    """
    curved = angle > 0
    safe = jnp.where(curved, angle, 1.0)
    return [jnp.where(curved, jnp.sin(share * safe) / jnp.sin(safe), share) for share in (1 - t, t)]


def _combine_slerp(options: Options, inputs: CombineInputs) -> jax.Array:
    coefficients = _slerp_coefficients(inputs.statistics["angle"], inputs.parameters["t"])
    return weighted_sum(inputs.sources, coefficients)


register(
    Method(
        "slerp",
        (Parameter("t", per_parent=False, default=None, low=0.0, high=1.0, start=0.5),),
        base="parent",
        combine=_combine_slerp,
        prepare=_prepare_slerp,
        base_is_first_parent=True,
        min_parents=2,
        max_parents=2,
        interpolates="t",
    )
)


def _prepare_nuslerp(options: Options, inputs: PrepareInputs) -> Prepared:
    """`angle`: float32 `[]`, `[R, 1]` or `[1, C]`, 0 where the two vectors are colinear."""
    base, vectors = _split(options, inputs.sources)
    _, cosines = _directions(gram(vectors, base, _axis(options, inputs.sources[0])))
    cosine = cosines[0, 1]
    straight = 1 - np.square(cosine) <= NUSLERP_COLINEAR
    return Prepared((), {"angle": np.where(straight, 0.0, np.arccos(cosine)).astype(np.float32)})


def _combine_nuslerp(options: Options, inputs: CombineInputs) -> jax.Array:
    """SLERP at `t = w_2 / (w_1 + w_2)`; one half where the weights cancel."""
    weight = inputs.parameters["weight"]
    total = weight[0] + weight[1]
    tiny = jnp.abs(total) < NUSLERP_MIN_SUM
    t = jnp.where(tiny, 0.5, weight[1] / jnp.where(tiny, 1.0, total))
    return _add_up(options, inputs.sources, _slerp_coefficients(inputs.statistics["angle"], t))


register(
    Method(
        "nuslerp",
        (WEIGHT,),
        base="optional",
        combine=_combine_nuslerp,
        prepare=_prepare_nuslerp,
        min_parents=2,
        max_parents=2,
        yaml_options=("nuslerp_row_wise", "nuslerp_flatten"),
    )
)


# ---------------------------------------------------------------------------------------------------------------
# Multi-SLERP


def _prepare_multislerp(options: Options, inputs: PrepareInputs) -> Prepared:
    """`length`: float32[K]; `gap`: `1 - cos`, float32[K, K] (1 with a vector of length 0)."""
    base, vectors = _split(options, inputs.sources)
    lengths, cosines = _directions(gram(vectors, base, None))
    gaps = 1 - cosines
    # A rounding error of 1e-16 on the diagonal would be a large share of the gap of near-identical vectors.
    np.fill_diagonal(gaps, np.where(lengths > 0, 0.0, 1.0))
    return Prepared((), {"length": lengths.astype(np.float32), "gap": np.maximum(gaps, 0.0).astype(np.float32)})


def _combine_multislerp(options: Options, inputs: CombineInputs) -> jax.Array:
    """Barycentric interpolation on the sphere: coefficients float32[K].

    With `u_k = x_k / (|x_k| + eps)` and `m = sum w_k u_k`, the result is `cos(eps) m / |m| * sum w_k |x_k|`: the
    weighted tangents at `m` sum to zero, and of the published tangent step only its eps remains. Where `|m| < eps`,
    or no larger than its rounding error: the weighted sum for two vectors or where all have length 0, else NaN.
    """
    length, gap = inputs.statistics["length"], inputs.statistics["gap"]
    weight, eps = inputs.parameters["weight"], inputs.parameters["eps"]
    count = weight.shape[0]
    if count == 1:
        return _add_up(options, inputs.sources, jnp.ones(1, jnp.float32))
    share = weight / jnp.sum(weight) if options.normalize else weight
    shrunk = share * length / (length + eps)
    squares = jnp.square(jnp.sum(shrunk))
    # Sums of products: an accelerator may round the operands of a matrix product to fewer bits.
    products = shrunk[:, None] * gap * shrunk
    square = squares - jnp.sum(products)
    noise = 4 * float(jnp.finfo(jnp.float32).eps) * (squares + jnp.sum(jnp.abs(products)))
    size = jnp.sqrt(jnp.maximum(square, 0.0))
    vanishes = (size < eps) | (square <= noise)
    spherical = jnp.cos(eps) * share / (length + eps) * jnp.sum(share * length) / jnp.where(vanishes, 1.0, size)
    straight = share if count == 2 else jnp.where(jnp.max(length) > 0, jnp.nan, share)
    return _add_up(options, inputs.sources, jnp.where(vanishes, straight, spherical))


register(
    Method(
        "multislerp",
        (WEIGHT, constant("eps", 1e-8, 0.0, 1.0)),
        base="optional",
        combine=_combine_multislerp,
        prepare=_prepare_multislerp,
        options=Options(normalize=True),
        validate=_validate_weights,
        yaml_options=("normalize_weights",),
    )
)


# ---------------------------------------------------------------------------------------------------------------
# Karcher mean


def _prepare_karcher(options: Options, inputs: PrepareInputs) -> Prepared:
    """`coefficient`: float32[K], of the Karcher mean of the unit vectors, times the mean length (arXiv 2603.04972).

    The iteration runs on coefficients, since the mean never leaves the span of the vectors. Vectors no longer than
    `tol` have no direction and only count in the mean length.
    """
    count, tol = len(inputs.sources), float(inputs.parameters["tol"])
    if count == 1:
        return Prepared((), {"coefficient": np.ones(1, np.float32)})
    lengths, cosines = _directions(gram(inputs.sources, None, None))
    valid = np.flatnonzero(lengths > tol)
    if not valid.size:
        return Prepared((), {"coefficient": np.zeros(count, np.float32)})
    cosines = cosines[np.ix_(valid, valid)]
    share = 1.0 / valid.size

    def length(coefficients: np.ndarray) -> float:
        return float(np.sqrt(max(coefficients @ cosines @ coefficients, 0.0)))

    mean = np.full(valid.size, share)
    size = length(mean)
    mean = np.eye(valid.size)[0] if size < tol else mean / size
    for _ in range(int(inputs.parameters["max_iter"])):
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(dots)
        far = angles >= tol
        pull = share * np.where(far, angles / np.where(far, np.sin(angles), 1.0), 0.0)
        tangent = pull - (pull * dots).sum() * mean
        size = length(tangent)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * tangent
        unit = length(mean)
        if unit > tol:
            mean = mean / unit
    coefficients = np.zeros(count)
    coefficients[valid] = lengths.mean() * mean / lengths[valid]
    return Prepared((), {"coefficient": coefficients.astype(np.float32)})


register(
    Method(
        "karcher",
        (constant("max_iter", 10, 0, 100, valid_min=0, valid_max=1_000_000), constant("tol", 1e-5, 0.0, 1.0)),
        base="parent",
        combine=combine_coefficients,
        prepare=_prepare_karcher,
    )
)


# ---------------------------------------------------------------------------------------------------------------
# Model Stock


def _prepare_stock(options: Options, inputs: PrepareInputs) -> Prepared:
    """The interpolation ratio (arXiv 2403.19522): `ratio`, float32 `[]` or `[R, 1]`.

    `t = n cos / (1 + (n - 1) cos)` with the mean pairwise cosine of the deltas; 0 at the singularity.
    """
    base, *parents = inputs.sources
    products, count = gram(parents, base, _axis(options, base)), len(parents)
    lengths = np.sqrt(np.einsum("kk...->k...", products))
    pairs = [
        np.clip(products[i, j] / np.maximum(lengths[i] * lengths[j], STOCK_MIN_NORMS), -1.0, 1.0)
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = np.mean(pairs, axis=0)
    denominator = 1 + (count - 1) * cosine
    singular = np.abs(denominator) < 1e-6
    ratio = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, denominator))
    return Prepared((), {"ratio": ratio.astype(np.float32)})


def _combine_stock(options: Options, inputs: CombineInputs) -> jax.Array:
    parents, ratio = len(inputs.sources) - 1, inputs.statistics["ratio"]
    return from_base(inputs.sources, jnp.broadcast_to(ratio / parents, (parents, *ratio.shape)))


register(
    Method(
        "model_stock",
        (),
        base="required",
        combine=_combine_stock,
        prepare=_prepare_stock,
        options=Options(has_base=True),
        min_parents=2,
        yaml_options=("filter_wise",),
    )
)
