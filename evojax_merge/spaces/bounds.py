"""The map between a free genome and values inside bounds. Imports JAX alone.

As pycma's boundary transformation: the identity inside, quadratic edges of width `EDGE` outside which it is
mirrored. It is continuously differentiable and reaches both bounds at finite genomes (a sigmoid would put a
density of 1 at infinity). Everything is in units of the range: 0 is the lower bound, 1 the upper.
"""

import jax
import jax.numpy as jnp
import numpy as np

EDGE = 0.05


def to_unit(free: jax.Array) -> jax.Array:
    """Any real -> [0, 1]. `-EDGE` gives 0, `1 + EDGE` gives 1, and between EDGE and 1 - EDGE nothing changes."""
    span = 1 + 2 * EDGE
    folded = jnp.mod(free + EDGE, 2 * span)
    x = jnp.where(folded > span, 2 * span - folded, folded) - EDGE
    low = jnp.square(x + EDGE) / (4 * EDGE)
    high = 1 - jnp.square(1 + EDGE - x) / (4 * EDGE)
    return jnp.clip(jnp.where(x < EDGE, low, jnp.where(x > 1 - EDGE, high, x)), 0.0, 1.0)


def from_unit(unit: np.ndarray) -> np.ndarray:
    """[0, 1] -> the genome in [-EDGE, 1 + EDGE] that `to_unit` maps there."""
    unit = np.asarray(unit, np.float64)
    low = 2 * np.sqrt(EDGE * np.clip(unit, 0, 1)) - EDGE
    high = 1 + EDGE - 2 * np.sqrt(EDGE * np.clip(1 - unit, 0, 1))
    return np.where(unit < EDGE, low, np.where(unit > 1 - EDGE, high, unit))
