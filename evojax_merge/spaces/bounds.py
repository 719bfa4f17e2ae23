"""The map between a free genome and values inside bounds. Imports JAX alone.

It is pycma's boundary transformation: the identity inside, quadratic edges of width `EDGE`, and mirrored outside of
these. It is continuously differentiable and reaches both bounds at finite genomes (a sigmoid would put a density of 1
at infinity). Everything is in units of the range: 0 is the lower bound, 1 the upper.
"""

import jax
import jax.numpy as jnp
import numpy as np

EDGE = 0.05
LEAST_SLOPE = 0.25


def to_unit(free: jax.Array) -> jax.Array:
    """Any real -> [0, 1]. `-EDGE` gives 0, `1 + EDGE` gives 1, and between EDGE and 1 - EDGE it is the identity."""
    span = 1 + 2 * EDGE
    folded = jnp.mod(free + EDGE, 2 * span)
    x = jnp.where(folded > span, 2 * span - folded, folded) - EDGE
    low = jnp.square(x + EDGE) / (4 * EDGE)
    high = 1 - jnp.square(1 + EDGE - x) / (4 * EDGE)
    return jnp.clip(jnp.where(x < EDGE, low, jnp.where(x > 1 - EDGE, high, x)), 0.0, 1.0)


_to_unit = jax.jit(to_unit)


def inside(genomes: np.ndarray) -> np.ndarray:
    """float64[P, D] in [0, 1]: the values of free genomes `[P, D]`, on the host."""
    return np.asarray(_to_unit(jnp.asarray(genomes, jnp.float32)), np.float64)


@jax.custom_jvp
def to_unit_with_slope(free: jax.Array) -> jax.Array:
    """`to_unit`, with a derivative that leads away from the bounds: at them, where the true derivative vanishes, it is
    `LEAST_SLOPE`, so that a step along the gradient is still one uphill."""
    return to_unit(free)


@to_unit_with_slope.defjvp
def _with_slope(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (free,), (tangent,) = primals, tangents
    span = 1 + 2 * EDGE
    folded = jnp.mod(free + EDGE, 2 * span)
    # A gene at the upper bound is not taken for one beyond it, however it was rounded.
    mirrored = folded > span + 1e-4
    # The distance from the nearer bound, in units of the range.
    inside = jnp.minimum(jnp.where(mirrored, 2 * span - folded, folded), jnp.abs(span - folded))
    slope = jnp.clip(inside / (2 * EDGE), LEAST_SLOPE, 1.0)
    return to_unit(free), jnp.where(mirrored, -slope, slope) * tangent


def from_unit(unit: np.ndarray) -> np.ndarray:
    """[0, 1] -> the genome in [-EDGE, 1 + EDGE] that `to_unit` maps there."""
    unit = np.asarray(unit, np.float64)
    low = 2 * np.sqrt(EDGE * np.clip(unit, 0, 1)) - EDGE
    high = 1 + EDGE - 2 * np.sqrt(EDGE * np.clip(1 - unit, 0, 1))
    return np.where(unit < EDGE, low, np.where(unit > 1 - EDGE, high, unit))


def rows_among(genomes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """bool[P]: true for the genomes, float32[P, D], that are one of the rows, float32[S, D]."""
    listed = {row.tobytes() for row in np.asarray(rows, np.float32)}
    return np.array([genome.tobytes() in listed for genome in np.asarray(genomes, np.float32)], bool)
