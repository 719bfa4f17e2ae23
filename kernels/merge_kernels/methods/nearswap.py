"""NearSwap: the base moves to the other model where they are near each other, and by a limited step elsewhere."""

import jax
import jax.numpy as jnp

from merge_kernels.method import CombineInputs, Method, Options, Parameter
from merge_kernels.registry import register

# Smaller differences count as this.
MIN_DIFFERENCE = 1e-6


def _combine(options: Options, inputs: CombineInputs) -> jax.Array:
    """`b + w (x - b)` with `w = clamp(t / max(|b - x|, 1e-6), 0, 1)`: far entries move by `t`."""
    base, other = (x.astype(jnp.float32) for x in inputs.sources)
    distance = jnp.maximum(jnp.abs(base - other), MIN_DIFFERENCE)
    weight = jnp.clip(inputs.parameters["t"] / distance, 0.0, 1.0)
    return weight * other + (1 - weight) * base


register(
    Method(
        "nearswap",
        (Parameter("t", per_parent=False, default=None, low=0.0, high=0.01, valid_min=0.0),),
        base="required",
        combine=_combine,
        options=Options(has_base=True),
        max_parents=1,
    )
)
