"""The inputs of merges: the bank of weights, the statistics that were measured on it, and recipes.

Letters: L layers of a stack, S sources (the base first where the method needs one, then the K parents), P candidates, C
components of a layer (attention, mlp, norm; router), E experts of a leaf that has a tensor for each, G densities of the
search grid.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import struct
from merge_kernels import METHODS, Method, Options, add_low_rank

Parameters = dict[str, jax.Array]


@dataclass(frozen=True)
class MergeSpec:
    """The static half of a merge: the method, its switches, the seed of random methods, the export dtype, and the
    parameters that are the same for every candidate because the prepared statistics and mask keys depend on them."""

    method_name: str
    options: Options
    seed: int
    export_dtype: str
    constants: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @property
    def method(self) -> Method:
        return METHODS[self.method_name]

    def prepared_for(self, parents: int) -> dict[str, Any]:
        """The constants in the form that the kernels take: `float64[K]` per parent, or `float64[]`."""
        method = self.method
        return {
            name: np.broadcast_to(np.asarray(values, np.float64), (parents,))
            if method.parameter(name).per_parent
            else np.float64(values[0])
            for name, values in self.constants
        }


@struct.dataclass
class Factors:
    """Low-rank factors of parents that are LoRA adapters of one base: parent k is `base + b[k] a[k]` (see
    `merge_kernels.add_low_rank`).

    a: `float32[L, K, r, in]`, b: `float32[L, K, out, r]`; without L for a leaf outside of the layers, with E after K
    where each expert has a tensor. A parent of lower rank is padded with zeros.
    """

    a: jax.Array
    b: jax.Array

    def expand(self, base: jax.Array) -> list[jax.Array]:
        """The parents' weights `[…, in]`, in the dtype of `base: [1, …, in]`; of one layer, or of some rows of it where
        `b` has the same rows alone."""
        return [add_low_rank(base[0], self.a[k], self.b[k]) for k in range(self.a.shape[0])]


@struct.dataclass
class LeafBank:
    """One leaf of all S sources, in their own dtype, with the masks and statistics that a method needs.

    A leaf of a stack has a leading axis L on every array; a scan takes one layer at a time.

    sources: `[S, …]`, or the base alone `[1, …]` where the parents are its low-rank changes (`factors`). mask_keys:
    `[N, …]`, N arrays of a number per entry or of two per row (see `merge_kernels.Prepared`); None: the method draws no
    masks. statistics: name -> `[…]`, with the grid of densities as last axis where the method has a density, until `at`
    picks its point. group: the leaf's row among the groups of a recipe's parameters (the component of a layer).
    shard_axis: the axis, counted from the end, along which devices that share a model shard the leaf. has_experts: each
    expert has a tensor of its own: `[S, E, …]`, `[N, E, …]` and statistics `[E, …]`, measured and merged tensor by
    tensor.
    """

    sources: jax.Array
    factors: Factors | None = None
    mask_keys: jax.Array | None = None
    statistics: dict[str, jax.Array] = struct.field(default_factory=dict)
    group: int = struct.field(pytree_node=False, default=0)
    shard_axis: int | None = struct.field(pytree_node=False, default=None)
    has_experts: bool = struct.field(pytree_node=False, default=False)

    def rows(self, pick: Callable[[jax.Array], jax.Array]) -> "LeafBank":
        """The leaf bank of some rows: `pick` takes them from `[S, n, …]`, for every array that has rows."""
        return replace(
            self,
            sources=pick(self.sources),
            factors=None if self.factors is None else Factors(self.factors.a, pick(self.factors.b)),
            mask_keys=None if self.mask_keys is None else pick(self.mask_keys),
        )


@struct.dataclass
class Bank:
    """All sources' weights: the leaves of each stack of layers, and those outside of the layers, by their names."""

    stacks: dict[str, dict[str, LeafBank]]
    shared: dict[str, LeafBank]


@struct.dataclass
class Recipe:
    """One merge. stacks: stack -> parameter -> `float32[L, C, K]` (per parent) or `[L, C]`; shared: leaf -> parameter
    -> `float32[K]` or `[]`. Densities lie on the search grid. A population has a leading axis P on every leaf."""

    stacks: dict[str, Parameters]
    shared: dict[str, Parameters]


def take_candidate(population: Any, index: Any) -> Any:
    """Row `index` of a pytree whose leaves have a leading population axis."""
    return jax.tree.map(lambda leaf: leaf[index], population)


def vmap_population(function: Callable[..., Any], *candidates: Any) -> Any:
    """`function` applied to every candidate: vmap over the leading axis."""
    if jax.tree.leaves(candidates)[0].shape[0] > 1:
        return jax.vmap(function)(*candidates)
    # A population axis of one would turn plain matmuls into batched ones, which are slower.
    return jax.tree.map(lambda leaf: leaf[None], function(*take_candidate(candidates, 0)))
