"""The family that is linear in the parents: the result is `sum_k c_k x_k`.

The coefficients depend on the recipe and on a few inner products of the tensors, which are accumulated once in
float64 (in float32 the inner products of near-identical tensors cancel).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Beyond this |cos| the great circle is indistinguishable from its chord, and sin(theta) divides badly.
SLERP_LINEAR_ABOVE = 0.9995
# A vector shorter than this has no direction; its length counts as 1.
SLERP_MIN_NORM = 1e-8


def weighted_sum(sources: Sequence[jax.Array], coefficients: Sequence[jax.Array]) -> jax.Array:
    """`sum_k c_k x_k` in float32. sources: K arrays `[...]`; coefficients: K scalars."""
    total = coefficients[0] * sources[0].astype(jnp.float32)
    for coefficient, source in zip(coefficients[1:], sources[1:], strict=True):
        total = total + coefficient * source.astype(jnp.float32)
    return total


def linear_coefficients(weight: jax.Array, normalize: bool) -> jax.Array:
    """Model soups (arXiv 2203.05482): `w_k`, or `w_k / sum w` with `normalize`. weight: float32[K].

    Weights that sum to zero cannot be normalised and give non-finite values; callers refuse them.
    """
    return weight / jnp.sum(weight) if normalize else weight


def slerp_angle(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The angle between two flattened tensors, float32 in (0, pi), or 0 where SLERP falls back to LERP."""
    a, b = (np.asarray(x, np.float32).ravel().astype(np.float64) for x in (first, second))
    norms = [norm if norm > SLERP_MIN_NORM else 1.0 for norm in (np.linalg.norm(a), np.linalg.norm(b))]
    cosine = float(np.clip(a @ b / (norms[0] * norms[1]), -1.0, 1.0)) if a.size else 1.0
    return np.asarray(0.0 if abs(cosine) > SLERP_LINEAR_ABOVE else np.arccos(cosine), np.float32)


def slerp_coefficients(angle: jax.Array, t: jax.Array) -> jax.Array:
    """Shoemake's spherical interpolation applied to the raw tensors: float32[2].

    `sin((1-t) angle) / sin(angle)` and `sin(t angle) / sin(angle)`; `1-t` and `t` where `angle` is 0.
    """
    safe = jnp.where(angle > 0, angle, 1.0)
    curved = jnp.stack([jnp.sin((1 - t) * safe), jnp.sin(t * safe)]) / jnp.sin(safe)
    return jnp.where(angle > 0, curved, jnp.stack([1 - t, t]))
