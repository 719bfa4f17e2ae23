"""Sums over the parents: written out where they are few, a loop where they are many.

A sum that is written out is one pass over memory, and a program that grows with the parents, as does the time that it
takes to compile. The loop is a program of one size. It reads and writes the total once for every `BLOCK` of parents,
and a compiler for CPUs makes a pass for each array of a total.
"""

from collections.abc import Callable, Sequence
from operator import add
from typing import Any

import jax
import jax.numpy as jnp

# Arrays of one shape, one after the other or stacked `[K, ...]`.
Arrays = Sequence[jax.Array] | jax.Array
# The most parents that are written out. On CPUs the loop of a sum with signs takes twice the time of the other form
# for 32 to 64 parents, and is as quickly compiled from 48 on.
UNROLLED = 32
# Parents that the loop adds up in one pass.
BLOCK = 8


def is_looped(parents: int) -> bool:
    """True if a sum over so many parents is a loop. `sum_over` then calls its term with a traced k."""
    return parents > UNROLLED


def sum_over(term: Callable[[Any], Any], parents: int) -> Any:
    """`term(0) + … + term(parents - 1)`, added up in this order.

    term: the number of a parent -> a pytree of arrays, of the same shapes for each. The derivative of the loop computes
    the terms again, so that it keeps nothing of each.
    """
    if not is_looped(parents):
        total = term(0)
        for k in range(1, parents):
            total = jax.tree.map(add, total, term(k))
        return total
    again = jax.checkpoint(term, prevent_cse=False)

    def addend(k: jax.Array) -> Any:
        """Parent k's term; zeros behind the last parent, where a block is not full."""
        return jax.tree.map(lambda x: jnp.where(k < parents, x, 0.0), again(jnp.minimum(k, parents - 1)))

    def step(total: Any, first: jax.Array) -> tuple[Any, None]:
        for i in range(BLOCK):
            total = jax.tree.map(add, total, addend(first + i))
        return total, None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(term, 0))
    return jax.lax.scan(step, zeros, jnp.arange(0, parents, BLOCK))[0]
