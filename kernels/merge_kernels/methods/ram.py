"""Reinforced Agent Merging (arXiv 2601.13572): the mean change of the parents that change an entry, and the change of a
parent that alone changes it, which RAM+ amplifies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels.method import CombineInputs, Method, Options, Parameter, Prepared, PrepareInputs, constant
from merge_kernels.registry import register
from merge_kernels.sums import Arrays, sum_over


def _prepare_plus(options: Options, inputs: PrepareInputs) -> Prepared:
    """`overlap`: of each task vector with the others, float32[K].

    It counts the entries that parent k changes by more than epsilon: those that another parent changes too, divided by
    those that it alone changes (by epsilon where there are none).
    """
    base, epsilon = np.asarray(inputs.sources[0], np.float32), float(inputs.parameters["epsilon"])
    deltas = [np.asarray(x, np.float32) - base for x in inputs.sources[1:]]
    limit = np.float32(epsilon)
    count = np.zeros(base.shape, np.int32)
    for delta in deltas:
        count += np.abs(delta) > limit
    overlap = np.zeros(len(deltas), np.float32)
    for k, delta in enumerate(deltas):
        changing_parents = count[np.abs(delta) > limit]
        alone = int(np.count_nonzero(changing_parents == 1))
        if alone < changing_parents.size:
            divisor = max(alone, epsilon)
            overlap[k] = (changing_parents.size - alone) / divisor if divisor > 0 else np.inf
    return Prepared((), {"overlap": overlap})


def _merge(sources: Arrays, epsilon: jax.Array, factors: jax.Array) -> jax.Array:
    """The base and, entry by entry, the mean delta of the parents that change it by more than epsilon; a single such
    parent's delta times its factor. float32.

    sources: the base first; epsilon: float32 `[]`; factors: float32[K].
    """
    base = sources[0].astype(jnp.float32)

    def changes(k: Any) -> tuple[jax.Array, ...]:
        """Parent k's change, the same times its factor, and 1 where there is one."""
        delta = sources[k + 1].astype(jnp.float32) - base
        changed = jnp.abs(delta) > epsilon
        kept = jnp.where(changed, delta, 0.0)
        return kept, factors[k] * kept, changed.astype(jnp.float32)

    total, alone, count = sum_over(changes, len(sources) - 1)
    return base + jnp.where(count > 1, total / jnp.maximum(count, 1.0), alone)


def _combine(options: Options, inputs: CombineInputs) -> jax.Array:
    return _merge(inputs.sources, inputs.parameters["epsilon"], jnp.ones(len(inputs.sources) - 1, jnp.float32))


def _combine_plus(options: Options, inputs: CombineInputs) -> jax.Array:
    parameters = inputs.parameters
    factors = 1 + parameters["r"] * jnp.clip(inputs.statistics["overlap"], 0.0, parameters["alpha"])
    return _merge(inputs.sources, parameters["epsilon"], factors)


EPSILON = constant("epsilon", 1e-5, 0.0, 0.01)

register(Method("ram", (EPSILON,), base="required", combine=_combine, options=Options(has_base=True)))
register(
    Method(
        "ramplus_tl",
        (
            Parameter("r", per_parent=False, default=0.1, low=0.0, high=1.0),
            Parameter("alpha", per_parent=False, default=0.2, low=0.0, high=1.0),
            EPSILON,
        ),
        base="required",
        combine=_combine_plus,
        prepare=_prepare_plus,
        options=Options(has_base=True),
    )
)
