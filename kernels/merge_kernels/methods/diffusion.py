"""The methods that people who merge image generators know by name, with the numbers that sd-mecha gives them.

`a` is the first model of a merge and `b` the second; `c`, where there is one, is the base.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels.method import CombineInputs, Method, Options, Parameter, Prepared, PrepareInputs, constant
from merge_kernels.methods.interpolation import combine_coefficients, gram
from merge_kernels.registry import register

# The factor of the mask of train difference.
TRAIN_SCALE = 1.8
# Vectors no longer than this count as this long in a cosine.
MIN_NORM = 1e-8


def _alpha(default: float) -> Parameter:
    return Parameter("alpha", per_parent=False, default=default, low=0.0, high=1.0)


def _wide(inputs: CombineInputs) -> list[jax.Array]:
    return [source.astype(jnp.float32) for source in inputs.sources]


def _interpolated(a: jax.Array, b: jax.Array, share: Any) -> jax.Array:
    """`(1 - share) a + share b`, which is `a` at 0 and `b` at 1, to the bit."""
    return jnp.where(share < 0.5, a + share * (b - a), b - (1 - share) * (b - a))


# ---------------------------------------------------------------------------------------------------------------
# Entry by entry


def _combine_weighted_sum(options: Options, inputs: CombineInputs) -> jax.Array:
    a, b = _wide(inputs)
    return _interpolated(a, b, inputs.parameters["alpha"])


def _combine_add_difference(options: Options, inputs: CombineInputs) -> jax.Array:
    c, a, b = _wide(inputs)
    return a + inputs.parameters["alpha"] * (b - c)


def _combine_train_difference(options: Options, inputs: CombineInputs) -> jax.Array:
    """`a + m (b - c)` with `m = 1.8 alpha |b - a| / (|b - a| + |b - c|)`, 0 where both are 0."""
    c, a, b = _wide(inputs)
    from_a, from_c = jnp.abs(b - a), jnp.abs(b - c)
    total = from_a + from_c
    share = jnp.where(total > 0, from_a / jnp.where(total > 0, total, 1.0), 0.0)
    return a + inputs.parameters["alpha"] * TRAIN_SCALE * share * (b - c)


register(
    Method(
        "weighted_sum", (_alpha(0.5),), base="parent", combine=_combine_weighted_sum, min_parents=2, max_parents=2,
        averages=True, interpolates="alpha",
    )
)  # fmt: skip
for _name, _combine in (
    ("add_difference", _combine_add_difference), ("train_difference_mask", _combine_train_difference),
):  # fmt: skip
    register(
        Method(
            _name, (_alpha(1.0),), base="required", combine=_combine, options=Options(has_base=True), min_parents=2,
            max_parents=2,
        )
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# By the cosine of the columns


def _prepare_cosine(options: Options, inputs: PrepareInputs, whole: bool) -> Prepared:
    """`cosine`: of the two models' vectors along the first axis, float32 `[1, ...]`; whole: averaged with the cosine of
    the whole tensors."""

    def cosine(axis: int | None) -> np.ndarray:
        products = gram(inputs.sources, None, axis)
        lengths = [np.maximum(np.sqrt(products[k, k]), MIN_NORM) for k in range(2)]
        return np.asarray(products[0, 1] / (lengths[0] * lengths[1]))

    columns = cosine(0)
    return Prepared((), {"cosine": ((columns + cosine(None)) / 2 if whole else columns).astype(np.float32)})


def _combine_cosine(options: Options, inputs: CombineInputs) -> jax.Array:
    """Interpolated with `b` counting `1 - clamp(cosine - alpha, 0, 1)`: less, the more alike the two are."""
    a, b = _wide(inputs)
    share = 1 - jnp.clip(inputs.statistics["cosine"] - inputs.parameters["alpha"], 0.0, 1.0)
    return _interpolated(a, b, share)


for _name, _whole in (("add_cosine_a", False), ("add_cosine_b", True)):
    register(
        Method(
            _name, (Parameter("alpha", per_parent=False, default=1.0, low=0.0, high=1.0, start=0.5),), base="parent",
            combine=_combine_cosine, prepare=partial(_prepare_cosine, whole=_whole), options=Options(axis=0),
            min_parents=2, max_parents=2,
        )
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# A region of one model in the other


def _region(width: np.ndarray, offset: float, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first and the end of a region of `width` from `offset` on, as shares of `size`; and whether it runs over the
    end, so that the region is what lies outside of the two."""
    offset = float(np.fmod(offset, 1.0))
    inverted = width + offset > 1
    start = np.where(inverted, (width + offset - 1) * size, offset * size)
    stop = np.where(inverted, offset * size, (width + offset) * size)
    return np.rint(start), np.rint(stop), inverted


def _prepare_rows(options: Options, inputs: PrepareInputs) -> Prepared:
    """Mask keys: the number of each row, `uint32[rows, 2]` (the second is 0). `start`, `stop`, `inverted`: float32[G],
    the region for each width."""
    (width,) = inputs.densities
    shape = np.shape(inputs.sources[0])
    rows = shape[0] if shape else 1
    keys = np.zeros((*shape[:1], 2), np.uint32)
    keys[..., 0] = np.arange(rows, dtype=np.uint32) if shape else 0
    region = _region(width, float(inputs.parameters["offset"]), rows)
    names = ("start", "stop", "inverted")
    return Prepared((keys,), {name: x.astype(np.float32) for name, x in zip(names, region, strict=True)})


def _combine_rows(options: Options, inputs: CombineInputs) -> jax.Array:
    a, b = _wide(inputs)
    number = inputs.mask_keys[0][..., 0]
    number = number.reshape(number.shape + (1,) * (a.ndim - number.ndim)).astype(jnp.float32)
    inside = (number >= inputs.statistics["start"]) & (number < inputs.statistics["stop"])
    return jnp.where(inside != (inputs.statistics["inverted"] > 0), b, a)


def _prepare_top_k(options: Options, inputs: PrepareInputs) -> Prepared:
    """Mask keys: the upper and the lower half of the float32 that an entry gets, `uint16[...]` each: a's entries, dealt
    out in the order of b's. `low`, `high`, `inverted`: float32[G], the magnitudes between which entries get it."""
    (width,) = inputs.densities
    a, b = (np.asarray(source, np.float32).reshape(-1) for source in inputs.sources)
    dealt, magnitudes = np.empty_like(a), np.sort(np.abs(a))
    dealt[np.argsort(b, kind="stable")] = np.sort(a)
    start, stop, inverted = _region(width, float(inputs.parameters["offset"]), a.size)

    def magnitude(rank: np.ndarray) -> np.ndarray:
        """The magnitude of ascending rank `rank`, from 1 on; -1 for 0."""
        at = np.maximum(rank.astype(np.int64) - 1, 0)
        return np.where(rank > 0, magnitudes[at] if a.size else 0.0, -1.0).astype(np.float32)

    bits = dealt.view(np.uint32).reshape(np.shape(inputs.sources[0]))
    halves = ((bits >> 16).astype(np.uint16), (bits & 0xFFFF).astype(np.uint16))
    statistics = {"low": magnitude(start), "high": magnitude(stop), "inverted": inverted.astype(np.float32)}
    return Prepared(halves, statistics)


def _combine_top_k(options: Options, inputs: CombineInputs) -> jax.Array:
    a, _ = _wide(inputs)
    upper, lower = (half.astype(jnp.uint32) for half in inputs.mask_keys)
    dealt = jax.lax.bitcast_convert_type((upper << 16) | lower, jnp.float32)
    size = jnp.abs(dealt)
    inside = (size >= inputs.statistics["low"]) & (size <= inputs.statistics["high"])
    return jnp.where(inside != (inputs.statistics["inverted"] > 0), dealt, a)


def _width(default: float) -> Parameter:
    return Parameter(
        "width", per_parent=False, default=default, low=0.0, high=1.0, valid_min=0.0, valid_max=1.0, quantised=True,
        start=0.5, clipped_below=False,
    )  # fmt: skip


OFFSET = constant("offset", 0.0, 0.0, 1.0, valid_max=1.0)
register(
    Method(
        "tensor_sum", (_width(0.5), OFFSET), base="parent", combine=_combine_rows, prepare=_prepare_rows,
        min_parents=2, max_parents=2, has_row_keys=True, mask_keys=lambda parents: 1,
    )
)  # fmt: skip
register(
    Method(
        "top_k_tensor_sum", (_width(1.0), OFFSET), base="parent", combine=_combine_top_k, prepare=_prepare_top_k,
        min_parents=2, max_parents=2, mask_keys=lambda parents: 2,
    )
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Geometric median


def _prepare_median(options: Options, inputs: PrepareInputs) -> Prepared:
    """`coefficient`: float32[K], of the point whose distances to the models add up to the least, by Weiszfeld's
    iteration. The point never leaves the span of the models: distances follow from the Gram matrix of their differences
    to the first."""
    count = len(inputs.sources)
    eps, ftol = (float(inputs.parameters[name]) for name in ("eps", "ftol"))
    products = gram(inputs.sources, inputs.sources[0], None)
    share = np.full(count, 1 / count)

    def distances(share: np.ndarray) -> np.ndarray:
        steps = np.eye(count) - share
        return np.sqrt(np.maximum(np.einsum("ki,ij,kj->k", steps, products, steps), 0.0))

    distance = distances(share)
    for _ in range(int(inputs.parameters["maxiter"])):
        before = distance.mean()
        share = 1 / np.maximum(distance, eps)
        share = share / share.sum()
        distance = distances(share)
        if abs(before - distance.mean()) <= ftol * distance.mean():
            break
    return Prepared((), {"coefficient": share.astype(np.float32)})


register(
    Method(
        "geometric_median",
        (
            constant("eps", 1e-6, 1e-30, 1.0, valid_min=1e-30),
            constant("maxiter", 100, 0, 1000, valid_min=0, valid_max=1_000_000),
            constant("ftol", 1e-20, 0.0, 1.0),
        ),
        base="parent", combine=combine_coefficients, prepare=_prepare_median,
    )
)  # fmt: skip
