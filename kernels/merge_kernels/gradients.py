"""Merges that can be differentiated with respect to their parameters.

`look_up_differentiable` and `combine_differentiable` are `look_up` and `combine` with a derivative for every searched
parameter. Weights, scales and fractions are differentiated by JAX, with the masks and the elected signs as they are. A
density selects entries: the merge is a step function of it. Its derivative here is the difference quotient of the
merged tensor between the densities `HALF_WIDTH` below and above (fewer where the interval [0, 1] ends), with the
thresholds and norms that the tables have there: exact for the effect of those entries whose rank lies in between, to
first order in the loss. A density outside of [0, 1] keeps what the nearer end keeps, so that its derivative is zero.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from merge_kernels.apply import DENSITY_STEPS, combine, grid_index, look_up
from merge_kernels.method import CombineInputs, Method, Options

# The distance, as a density, at which a density's difference quotient is taken on either side.
HALF_WIDTH = 0.01


class Neighbourhood(NamedTuple):
    """Statistics at a candidate's densities and on both sides of them.

    at, below, above: arrays by name, as `look_up` returns them; low, high: the densities of `below` and `above`,
    float32[K], or [] for a density that all parents share.
    """

    at: Mapping[str, jax.Array]
    below: Mapping[str, jax.Array]
    above: Mapping[str, jax.Array]
    low: jax.Array
    high: jax.Array


@jax.custom_jvp
def on_grid(density: jax.Array) -> jax.Array:
    """Round a density to the nearest of `0, 1/1000 … 1`, float32. The derivative is that of the density itself (a
    straight-through estimator)."""
    return grid_index(density).astype(jnp.float32) / DENSITY_STEPS


@on_grid.defjvp
def _on_grid_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return on_grid(*primals), tangents[0]


def look_up_differentiable(
    method: Method, table: Mapping[str, jax.Array], parameters: Mapping[str, jax.Array]
) -> Neighbourhood | Mapping[str, jax.Array]:
    """The statistics for `combine_differentiable`: a neighbourhood for a method with a density, else the table."""
    if method.density is None:
        return table
    name = method.density.name
    density = jax.lax.stop_gradient(parameters[name])
    low, high = (on_grid(jnp.clip(density + step, 0.0, 1.0)) for step in (-HALF_WIDTH, HALF_WIDTH))
    at, below, above = (look_up(method, table, {name: value}) for value in (density, low, high))
    return Neighbourhood(at, below, above, low, high)


def combine_differentiable(method: Method, options: Options, inputs: CombineInputs) -> jax.Array:
    """`combine`, float32, with derivatives with respect to `inputs.parameters` (and to nothing else).
    `inputs.statistics` is the result of `look_up_differentiable`."""
    if not isinstance(inputs.statistics, Neighbourhood):
        return combine(method, options, inputs)
    return _combine(method, options, replace(inputs, parameters=dict(inputs.parameters)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _combine(method: Method, options: Options, inputs: CombineInputs) -> jax.Array:
    return combine(method, options, replace(inputs, statistics=inputs.statistics.at))


def _backward(method: Method, options: Options, inputs: CombineInputs, cotangent: jax.Array) -> tuple[CombineInputs]:
    neighbourhood, parameters = inputs.statistics, inputs.parameters
    at_densities = replace(inputs, statistics=neighbourhood.at)
    _, pull_back = jax.vjp(
        lambda numbers: combine(method, options, replace(at_densities, parameters=numbers)), parameters
    )
    (gradients,) = pull_back(cotangent)
    assert method.density is not None
    name, per_parent = method.density.name, method.density.per_parent
    density = parameters[name]

    def moved(at: jax.Array, side: jax.Array) -> jax.Array:
        """Each density's turn of being moved, the others where they are: [K, K], or [1, ...] where all share one."""
        return jnp.where(jnp.eye(at.shape[0], dtype=bool), side, at) if per_parent else side[None]

    def effect(variant: tuple[Any, jax.Array]) -> jax.Array:
        """The merge with one density moved, weighed by the cotangent."""
        statistics, value = variant
        moved_inputs = replace(inputs, statistics=statistics, parameters={**parameters, name: value})
        merged = combine(method, options, moved_inputs)
        return jnp.sum(cotangent * merged)

    # One after the other: unrolled, they would be most of what there is to compile.
    below, above = (
        jax.lax.map(effect, (jax.tree.map(moved, dict(neighbourhood.at), dict(side)), moved(density, value)))
        for side, value in ((neighbourhood.below, neighbourhood.low), (neighbourhood.above, neighbourhood.high))
    )
    inside = (density >= 0) & (density <= 1)
    # Further outside than HALF_WIDTH both are the same end.
    width = jnp.where(inside, neighbourhood.high - neighbourhood.low, 1.0)
    slopes = jnp.where(inside, (above - below) / width, 0.0)
    # None: no derivative.
    return (CombineInputs(None, None, None, gradients | {name: slopes.reshape(density.shape)}),)  # type: ignore[arg-type]


_combine.defvjp(lambda method, options, inputs: (_combine(method, options, inputs), inputs), _backward)
