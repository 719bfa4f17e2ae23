"""The family of task vectors, thinned out or not: a score and a threshold per entry, then a sum or a sign consensus.

With deltas `d_k = x_k - b` an entry of parent k is kept where its score passes parent k's threshold:

- magnitude (TIES, arXiv 2306.01708): score `|d|`, kept where `|d| >= threshold`;
- random (DARE, arXiv 2311.03099): score a fixed uniform 16-bit number, kept where `number < threshold`; the number is
  hashed where it is needed (`merge_kernels.noise`);
- ranked (DELLA, arXiv 2406.11617): as random, with the entry's rank folded into its number, which is stored;
- band (Model Breadcrumbs, arXiv 2312.06795): score `|d|`, kept between two thresholds.

Thresholds and the scale that restores the L1 norm are measured once per tensor, for one density or for a grid.
With thresholds all entries that tie at the threshold are kept: where bfloat16 checkpoints tie massively, more
than `int(density * n)` entries survive, and the choice does not depend on the order of anything.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels.method import (
    LAMBDA,
    WEIGHT,
    CombineInputs,
    Method,
    Numbers,
    Options,
    Parameter,
    Prepared,
    PrepareInputs,
    Statistics,
    constant,
)
from merge_kernels.noise import LEVELS, device_uniform, host_uniform
from merge_kernels.registry import register
from merge_kernels.sums import sum_over

# Parent k's task vector, thinned out and weighted: k -> float32 `[...]`.
Weighted = Callable[[Any], jax.Array]

# Norms below this are not rescaled.
MIN_NORM = 1e-7
# Entries that are copied to float64 at a time, in the processor's cache.
BLOCK = 2**16


@dataclass(frozen=True)
class Sparsifier:
    """A way to thin out one parent's delta.

    - `random`: an entry is kept by its mask key, a number of 16 bits; False: by `|d|`.
    - `stored_key(magnitudes, uniform, constants)`: the `uint16` mask key of every entry from `|d|` and uniform numbers
      of the same shape; None: the uniform number itself, so that the row keys alone are stored.
    - `measure(magnitudes, mask_key, densities, constants, with_l1)`: statistics `[G]` for `densities: float64[G]`, from
      flat arrays; `l1_scale` among them where `with_l1`. `magnitudes: float32[n]` is the callee's to reorder.
    - `keep(delta, mask_key, statistics)`: the mask, on the device.

    `constants` are the method's parameters that are never searched (epsilon, gamma), this parent's.
    """

    measure: Callable[[np.ndarray, Any, np.ndarray, Mapping[str, float], bool], Statistics]
    keep: Callable[[jax.Array, jax.Array | None, Mapping[str, jax.Array]], jax.Array]
    random: bool = False
    stored_key: Callable[[np.ndarray, np.ndarray, Mapping[str, float]], np.ndarray] | None = None


# ---------------------------------------------------------------------------------------------------------------
# Once per tensor, on the host


def kept_count(density: float, size: int) -> int:
    """The number of entries that magnitude trimming keeps: `max(1, int(density n))` inside (0, 1), as mergekit counts.

    Python counts in float64: float32 arithmetic gives other counts.
    """
    if density <= 0 or size == 0:
        return 0
    return size if density >= 1 else max(1, int(density * size))


def _l1_scale(total: float, kept: np.ndarray) -> np.ndarray:
    restored = np.full(kept.shape, total) / np.where(kept < MIN_NORM, 1.0, kept)
    return np.where((kept < MIN_NORM) | (total < MIN_NORM), 1.0, restored).astype(np.float32)


def _order_statistic(magnitudes: np.ndarray, position: int) -> float:
    """The entry that would be at `position` in ascending order, in linear time."""
    magnitudes.partition(position)
    return float(magnitudes[position])


def _mass_between(ascending: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[float, np.ndarray]:
    """The total of sorted magnitudes, and the mass of the ones in `[low, high]` (float[G] each)."""
    below = np.concatenate([[0.0], np.cumsum(ascending, dtype=np.float64)])
    inside = below[np.searchsorted(ascending, high, side="right")] - below[np.searchsorted(ascending, low, side="left")]
    return float(below[-1]), np.where(low <= high, inside, 0.0)


def _measure_order(
    magnitudes: np.ndarray, counts: np.ndarray, bottoms: np.ndarray, with_l1: bool
) -> tuple[np.ndarray, np.ndarray, Statistics]:
    """Thresholds `low` and `high` (float32[G]) of the ascending ranks `[bottom, bottom + count)`, and the l1_scale.

    Nothing is kept where the count is 0 (`low` inf), and there is no upper threshold at the top rank (`high` inf).
    """
    size = magnitudes.size
    low, high = np.full(counts.shape, np.inf, np.float32), np.full(counts.shape, np.inf, np.float32)
    some, topped = counts > 0, (counts > 0) & (bottoms + counts < size)
    if len(counts) == 1:
        if some[0] and bottoms[0] > 0:
            low[0] = _order_statistic(magnitudes, int(bottoms[0]))
        elif some[0]:
            low[0] = 0.0
        if topped[0]:
            high[0] = _order_statistic(magnitudes, int(bottoms[0] + counts[0] - 1))
        if not with_l1:
            return low, high, {}
        inside = magnitudes[(magnitudes >= low[0]) & (magnitudes <= high[0])].sum(dtype=np.float64)
        return low, high, {"l1_scale": _l1_scale(float(magnitudes.sum(dtype=np.float64)), np.array([inside]))}
    magnitudes.sort()
    low[some] = np.where(bottoms[some] > 0, magnitudes[np.minimum(bottoms[some], size - 1)], 0.0)
    high[topped] = magnitudes[bottoms[topped] + counts[topped] - 1]
    if not with_l1:
        return low, high, {}
    return low, high, {"l1_scale": _l1_scale(*_mass_between(magnitudes, low, high))}


def measure_magnitude(
    magnitudes: np.ndarray, mask_key: None, densities: np.ndarray, constants: Mapping[str, float], with_l1: bool
) -> Statistics:
    """`threshold`: an order statistic of `|d|`; `inf` keeps nothing, 0 keeps all."""
    counts = np.array([kept_count(density, magnitudes.size) for density in densities], np.int64)
    low, _, scale = _measure_order(magnitudes, counts, magnitudes.size - counts, with_l1)
    return {"threshold": low, **scale}


def measure_band(
    magnitudes: np.ndarray, mask_key: None, densities: np.ndarray, constants: Mapping[str, float], with_l1: bool
) -> Statistics:
    """`threshold` and `upper`: the `int(density n)` largest entries without the `int(gamma n)` largest.

    Fewer outliers are dropped where the density asks for it: ranks begin at
    `max(0, n - int(density n) - int(gamma n))`.
    """
    size = magnitudes.size
    dropped = int(constants["gamma"] * size)
    counts = np.array([size if d >= 1 else int(d * size) for d in densities], np.int64)
    bottoms = np.where(densities >= 1, 0, np.maximum(0, size - counts - dropped))
    low, high, scale = _measure_order(magnitudes, counts, bottoms, with_l1)
    return {"threshold": low, "upper": high, **scale}


def measure_bernoulli(
    magnitudes: np.ndarray, mask_key: np.ndarray, densities: np.ndarray, constants: Mapping[str, float], with_l1: bool
) -> Statistics:
    """`threshold = round(density 2^16)`: each entry is kept with that probability, to 16 bits."""
    threshold = np.rint(np.clip(densities, 0.0, 1.0) * LEVELS).astype(np.int32)
    if not with_l1:
        return {"threshold": threshold}
    if len(densities) == 1:
        # In float64, as the grid's masses below: an export measures the scale that the search had.
        kept = total = 0.0
        for start in range(0, magnitudes.size, BLOCK):
            block = magnitudes[start : start + BLOCK].astype(np.float64)
            kept += float(block @ (mask_key[start : start + BLOCK] < threshold[0]).astype(np.float64))
            total += float(block.sum())
        return {"threshold": threshold, "l1_scale": _l1_scale(total, np.array([kept]))}
    l1_masses = np.bincount(mask_key, weights=magnitudes, minlength=LEVELS)
    below = np.concatenate([[0.0], np.cumsum(l1_masses)])
    return {"threshold": threshold, "l1_scale": _l1_scale(float(below[-1]), below[threshold])}


def magprune_key(magnitudes: np.ndarray, uniform: np.ndarray, constants: Mapping[str, float]) -> np.ndarray:
    """DELLA's keep probability `(density - eps) + 2 eps rank01`, folded into the uniform number.

    `u < p 2^16` is `u - (2 eps rank01 - eps) 2^16 < density 2^16`: the left side no longer depends on the density.
    Numbers beyond 16 bits are clipped, which changes no comparison while `0 < density ± eps < 1`. Ranks go along
    axis 1 (a vector is one row), ties in the order of the tensor.
    """
    rows = magnitudes if magnitudes.ndim > 1 else magnitudes.reshape(1, -1)
    order = np.argsort(rows, axis=1, kind="stable")
    ranks = np.empty_like(order)
    steps = np.arange(rows.shape[1]).reshape(1, -1, *[1] * (rows.ndim - 2))
    np.put_along_axis(ranks, order, np.broadcast_to(steps, order.shape), axis=1)
    share = ranks / max(rows.shape[1] - 1, 1)
    bonus = np.rint((2 * share - 1) * constants["epsilon"] * LEVELS)
    folded = uniform.astype(np.int64) - bonus.astype(np.int64).reshape(uniform.shape)
    return np.clip(folded, 0, LEVELS - 1).astype(np.uint16)


def _below(delta: jax.Array, mask_key: jax.Array | None, statistics: Mapping[str, jax.Array]) -> jax.Array:
    assert mask_key is not None
    return mask_key.astype(jnp.int32) < statistics["threshold"]


def _between(delta: jax.Array, mask_key: jax.Array | None, statistics: Mapping[str, jax.Array]) -> jax.Array:
    size = jnp.abs(delta)
    return (size >= statistics["threshold"]) & (size <= statistics["upper"])


MAGNITUDE = Sparsifier(measure_magnitude, lambda delta, mask_key, row: jnp.abs(delta) >= row["threshold"])
BAND = Sparsifier(measure_band, _between)
BERNOULLI = Sparsifier(measure_bernoulli, _below, random=True)
MAGPRUNE = Sparsifier(measure_bernoulli, _below, random=True, stored_key=magprune_key)


# ---------------------------------------------------------------------------------------------------------------
# Per candidate


def plain_sum(weighted: Weighted, weight: jax.Array, normalize: bool) -> jax.Array:
    """`sum_k D_k`, divided by `sum w` with `normalize` (1 where it vanishes)."""
    total: jax.Array = sum_over(weighted, len(weight))
    if not normalize:
        return total
    divisor = jnp.sum(weight)
    return total / jnp.where(jnp.abs(divisor) < 1e-8, 1.0, divisor)


def elected_sum(weighted: Weighted, weight: jax.Array, normalize: bool) -> jax.Array:
    """TIES' sign election: the sum of the entries that have the sign of the majority by mass (+ on a tie).

    The positive and the negative mass are summed apart and compared, so that entries which cancel exactly
    (they do in bfloat16 fine-tunes) cannot be decided by how a compiler fuses multiplications and additions.
    With `normalize` the result is divided by the weights of the entries that were kept (1 where there are none).
    """

    def masses(k: Any) -> tuple[jax.Array, ...]:
        """The positive and the negative mass, and with `normalize` the weights, of parent k."""
        entry = weighted(k)
        by_sign = jnp.maximum(entry, 0.0), jnp.minimum(entry, 0.0)
        if not normalize:
            return by_sign
        return *by_sign, jnp.where(entry > 0, weight[k], 0.0), jnp.where(entry < 0, weight[k], 0.0)

    up, down, *weights = sum_over(masses, len(weight))
    positive = up >= -down
    total = jnp.where(positive, up, down)
    if not normalize:
        return total
    up_weight, down_weight = weights
    divisor = jnp.where(positive, up_weight, down_weight)
    return total / jnp.where(divisor == 0, 1.0, divisor)


# ---------------------------------------------------------------------------------------------------------------
# The methods


DENSITY = Parameter(
    "density", per_parent=True, default=1.0, low=0.0, high=1.0, valid_min=0.0, valid_max=1.0, quantised=True
)
# DARE draws its masks with the density as a probability.
DARE_DENSITY = replace(DENSITY, clipped_below=False)
DELLA_DENSITY = replace(DENSITY, low=0.2, high=0.8, start=0.5)
EPSILON = constant("epsilon", 0.15, 0.0, 0.5, valid_max=0.5, per_parent=True)
GAMMA = constant("gamma", 0.01, 0.0, 1.0, valid_max=1.0, per_parent=True)


PLAIN, NORMALIZED = Options(has_base=True), Options(normalize=True, has_base=True)
RESCALED = Options(rescale="l1", has_base=True)


def _validate_della(options: Options, parameters: Numbers) -> str | None:
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            return f"density {density:g} ± epsilon {epsilon:g} leaves (0, 1)"
    return None


def _register(
    name: str,
    options: Options,
    add: Callable[[Weighted, jax.Array, bool], jax.Array],
    sparsifier: Sparsifier,
    density: Parameter = DENSITY,
    constants: tuple[Parameter, ...] = (),
    validate: Callable[[Options, Numbers], str | None] = lambda options, parameters: None,
) -> None:
    """Register `b + lambda * S_k(w_k s_k (x_k - b))`, S the sum `add` of the entries that the sparsifier keeps, s_k the
    rescaling. constants: the sparsifier's parameters, which are never searched."""
    has_row_keys = sparsifier.random and sparsifier.stored_key is None

    def prepare(options: Options, inputs: PrepareInputs) -> Prepared:
        base = np.asarray(inputs.sources[0], np.float32)
        buffer = np.empty_like(base)
        mask_keys, rows = [], []
        for k, parent in enumerate(inputs.sources[1:]):
            parent_constants = {p.name: float(inputs.parameters[p.name][k]) for p in constants}
            np.abs(np.subtract(parent, base, out=buffer, dtype=np.float32), out=buffer)
            flat = None
            if sparsifier.random:
                keys = inputs.row_keys(k)
                numbers = host_uniform(keys, base.shape)
                if sparsifier.stored_key is not None:
                    keys = numbers = sparsifier.stored_key(buffer, numbers, parent_constants)
                mask_keys.append(keys)
                flat = numbers.reshape(-1)
            with_l1 = options.rescale == "l1"
            rows.append(sparsifier.measure(buffer.reshape(-1), flat, inputs.densities[k], parent_constants, with_l1))
        return Prepared(tuple(mask_keys), {name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def combine(options: Options, inputs: CombineInputs) -> jax.Array:
        base, *_ = inputs.sources
        factors = inputs.parameters["weight"]
        if options.rescale == "l1":
            factors = factors * inputs.statistics["l1_scale"]
        elif options.rescale == "density":
            factors = factors / jnp.clip(inputs.parameters["density"], 1.0 / LEVELS, 1.0)

        def weighted(k: Any) -> jax.Array:
            mask_key = None
            if has_row_keys:
                mask_key = device_uniform(inputs.mask_keys[k], base.shape)
            elif sparsifier.random:
                mask_key = inputs.mask_keys[k]
            delta = inputs.sources[k + 1].astype(jnp.float32) - base.astype(jnp.float32)
            statistics = {name: values[k] for name, values in inputs.statistics.items()}
            return jnp.where(sparsifier.keep(delta, mask_key, statistics), factors[k] * delta, 0.0)

        total = add(weighted, inputs.parameters["weight"], options.normalize)
        return base.astype(jnp.float32) + inputs.parameters["lambda"] * total

    register(
        Method(
            name,
            (WEIGHT, density, LAMBDA, *constants),
            base="required",
            combine=combine,
            prepare=prepare,
            options=options,
            random=sparsifier.random,
            has_row_keys=has_row_keys,
            mask_keys=lambda parents: parents if sparsifier.random else 0,
            averages=add is plain_sum,
            validate=validate,
            yaml_options=("normalize", "rescale"),
            ignored_settings=("int8_mask",),
        )
    )


def _combine_task_arithmetic(options: Options, inputs: CombineInputs) -> jax.Array:
    """Task arithmetic (arXiv 2212.04089): `b + lambda * sum_k w_k (x_k - b)`."""
    base, weight = inputs.sources[0].astype(jnp.float32), inputs.parameters["weight"]

    def weighted(k: Any) -> jax.Array:
        return weight[k] * (inputs.sources[k + 1].astype(jnp.float32) - base)

    return base + inputs.parameters["lambda"] * plain_sum(weighted, weight, options.normalize)


register(
    Method(
        "task_arithmetic",
        (WEIGHT, LAMBDA),
        base="required",
        combine=_combine_task_arithmetic,
        options=PLAIN,
        averages=True,
        yaml_options=("normalize", "rescale"),
        # To mergekit every method of this family has a density; here it would have nothing to thin out.
        ignored_settings=("int8_mask", "density"),
    )
)
_register("ties", NORMALIZED, elected_sum, MAGNITUDE)
_register("dare_linear", RESCALED, plain_sum, BERNOULLI, DARE_DENSITY)
_register("dare_ties", RESCALED, elected_sum, BERNOULLI, DARE_DENSITY)
_register(
    "della",
    Options(normalize=True, rescale="l1", has_base=True),
    elected_sum,
    MAGPRUNE,
    DELLA_DENSITY,
    (EPSILON,),
    _validate_della,
)
_register("della_linear", RESCALED, plain_sum, MAGPRUNE, DELLA_DENSITY, (EPSILON,), _validate_della)
_register("breadcrumbs", PLAIN, plain_sum, BAND, constants=(GAMMA,))
_register("breadcrumbs_ties", PLAIN, elected_sum, BAND, constants=(GAMMA,))
