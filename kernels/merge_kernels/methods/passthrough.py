"""Passthrough: one parent's tensors, scaled. Merges of slices stack layers of several models by it."""

import jax
import jax.numpy as jnp

from merge_kernels.method import CombineInputs, Method, Options, Parameter
from merge_kernels.registry import register


def _combine(options: Options, inputs: CombineInputs) -> jax.Array:
    return inputs.parameters["scale"][0] * inputs.sources[0].astype(jnp.float32)


register(
    Method(
        "passthrough",
        (Parameter("scale", per_parent=True, default=1.0, low=0.0, high=2.0),),
        base="parent",
        combine=_combine,
        max_parents=1,
        copies="scale",
    )
)
