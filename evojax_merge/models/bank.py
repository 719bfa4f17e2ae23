"""What merges are made of: the bank of weights, what was measured of it, and recipes.

Letters: L layers of a stack, S sources (the base first where the method needs one, then the K parents), P candidates,
C components of a layer (attention, mlp, norm; router), E experts of a leaf of which each has a tensor, G densities of
the search grid.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from merge_kernels import METHODS, Method, Options, add_low_rank

Leaves = dict[str, jax.Array]
Tables = dict[str, dict[str, jax.Array]]
Parameters = dict[str, jax.Array]


@dataclass(frozen=True)
class MergeSpec:
    """The static half of a merge: which method, its switches, the seed of random methods, the export dtype, and the
    parameters that are the same for every candidate because what is prepared depends on them."""

    method_name: str
    options: Options
    seed: int
    export_dtype: str
    constants: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @property
    def method(self) -> Method:
        return METHODS[self.method_name]

    def mask_key_bytes(self, sources: int, shape: tuple[int, ...]) -> int:
        """Bytes of what is prepared of a tensor's entries, or of its rows, in a bank of that many sources."""
        of_one, dtype = self.method.mask_key_array(shape)
        return self.method.mask_keys(sources - int(self.options.has_base)) * prod(of_one) * dtype.itemsize

    def prepared_for(self, parents: int) -> dict[str, Any]:
        """The constants as the kernels take them: `float64[K]` per parent, or `float64[]`."""
        method = self.method
        return {
            name: np.broadcast_to(np.asarray(values, np.float64), (parents,))
            if method.parameter(name).per_parent
            else np.float64(values[0])
            for name, values in self.constants
        }

    def round_to_export(self, merged: jax.Array) -> jax.Array:
        """Candidates are scored as they would be written, so round them to the export dtype."""
        return merged.astype(jnp.dtype(self.export_dtype))


@struct.dataclass
class Factors:
    """What tells parents apart whose weights are low-rank changes of one base: parent k's is `base + b[k] a[k]` (see
    `merge_kernels.add_low_rank`).

    a: `float32[L, K, r, in]`, b: `float32[L, K, out, r]`; of a leaf outside of the layers without L, of one of which
    each expert has a tensor with E behind K. A parent of lower rank has zeros besides.
    """

    a: jax.Array
    b: jax.Array

    def expand(self, base: jax.Array) -> list[jax.Array]:
        """The parents' weights `[…, in]`, in the dtype of `base: [1, …, in]`; a layer's, or some rows of it where `b`
        has the same rows alone."""
        return [add_low_rank(base[0], self.a[k], self.b[k]) for k in range(self.a.shape[0])]


@struct.dataclass
class Bank:
    """All sources' weights, in their own dtype, and what the method has to know of them.

    stacks: stack -> leaf -> `[L, S, …]`, of the L layers that this stack has; shared: leaf -> `[S, …]`, outside of the
    layers; what the kernels prepared: mask keys, `[L, N, …]` and `[N, …]` for the N arrays that the method has, each of
    a number per entry or of two per row (see `merge_kernels.Prepared`), and tables, leaf -> statistic -> `[L, …]` and
    `[…]` (with the density grid as last axis where the method has a density); without a leaf where the method prepares
    nothing. components: each leaf's row of the component axis. axes: of leaves that devices share the axis at which
    they are cut, counted from the end (`Leaf.sharded_axis`). expert_leaves: those of which each expert has a tensor,
    `[L, S, E, …]`: they are measured and merged tensor by tensor, so that their tables are `[L, E, …]`.

    factors: leaf -> factors, of leaves in which all parents are low-rank changes of one base: of these the bank has the
    base alone, `[L, 1, …]` and `[1, …]`.
    """

    stacks: dict[str, Leaves]
    shared: Leaves
    stack_mask_keys: dict[str, Leaves]
    shared_mask_keys: Leaves
    stack_tables: dict[str, Tables]
    shared_tables: Tables
    components: tuple[tuple[str, int], ...] = struct.field(pytree_node=False)
    stack_factors: dict[str, dict[str, Factors]] = struct.field(default_factory=dict)
    shared_factors: dict[str, Factors] = struct.field(default_factory=dict)
    expert_leaves: frozenset[str] = struct.field(pytree_node=False, default=frozenset())
    axes: tuple[tuple[str, int], ...] = struct.field(pytree_node=False, default=())

    @property
    def component_of(self) -> dict[str, int]:
        return dict(self.components)

    @property
    def axis_of(self) -> dict[str, int]:
        return dict(self.axes)


@struct.dataclass
class Recipe:
    """One merge. stacks: stack -> parameter -> `float32[L, C, K]` (per parent) or `[L, C]`; shared: leaf -> parameter
    -> `float32[K]` or `[]`. Densities lie on the search grid. A population has a leading axis P on every leaf."""

    stacks: dict[str, Parameters]
    shared: dict[str, Parameters]


def take_candidate(population: Any, index: Any) -> Any:
    """Row `index` of a pytree whose leaves have a leading population axis."""
    return jax.tree.map(lambda leaf: leaf[index], population)
