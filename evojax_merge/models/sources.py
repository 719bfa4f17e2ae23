"""Layer sources: where the decoder's weights come from.

`StackedWeights` and `UnstackedWeights` are models that exist in memory. `LazyMerge` merges each layer from the bank and
a recipe when the scan asks for it, so that a candidate never exists as a whole; `materialise` turns it into stacked
weights for decoding, where every token would redo the merge.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from merge_kernels import (
    CombineInputs,
    combine,
    combine_differentiable,
    is_looped,
    keys_from_column,
    look_up,
    look_up_differentiable,
)

from evojax_merge.models.architecture import EMBEDDING, FINAL_NORM, HEAD
from evojax_merge.models.bank import Bank, Factors, MergeSpec, Parameters, Recipe, Tables
from evojax_merge.models.layers import Weights, without_upcast
from evojax_merge.models.sharding import cut_at, map_shards, replicate, shard, shards_of, slice_shards

# Sources, factors and scores of a leaf, or of some rows of it.
Slices = tuple[jax.Array, Factors | None, jax.Array | None]


class _MaterialisedWeights:
    """What stacked and unstacked weights have in common."""

    shared: Weights
    compute_dtype: str

    @property
    def prefetch(self) -> bool:
        return False

    def _cast(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.dtype(self.compute_dtype))

    def layer(self, slice_: Weights) -> Weights:
        return {name: self._cast(leaf) for name, leaf in slice_.items()}

    def rows(self, name: str, ids: jax.Array) -> jax.Array:
        return self._cast(self.shared[name][ids])

    def leaf(self, name: str) -> jax.Array:
        return self._cast(self.shared[name])

    def lm_head_rows(self, start: jax.Array | int, rows: int, shards: int) -> jax.Array:
        return slice_shards(self.shared.get(HEAD, self.shared[EMBEDDING]), start, rows, shards)

    def head(self, slices: jax.Array) -> jax.Array:
        return self._cast(slices)


@struct.dataclass
class StackedWeights(_MaterialisedWeights):
    """A model with its layers stacked. stacks: stack -> leaf -> `[L, …]`; shared: leaf -> `[…]` (`head` only where it
    is untied)."""

    stacks: dict[str, Weights]
    shared: Weights
    compute_dtype: str = struct.field(pytree_node=False, default="float32")

    def each_layer(self, stack: str) -> Sequence[Weights]:
        leaves = self.stacks[stack]
        depth = len(next(iter(leaves.values()), ()))
        return [self.layer({name: leaf[i] for name, leaf in leaves.items()}) for i in range(depth)]

    def unstack(self) -> "UnstackedWeights":
        """The same weights, each layer in arrays of its own."""
        per_layer = {stack: tuple(self.each_layer(stack)) for stack in self.stacks}
        return UnstackedWeights(per_layer, self.shared, self.compute_dtype)


@struct.dataclass
class UnstackedWeights(_MaterialisedWeights):
    """A model with each layer in arrays of its own, which a decode step takes one by one without copying. per_layer:
    stack -> leaf -> `[…]` of each of its layers."""

    per_layer: dict[str, tuple[Weights, ...]]
    shared: Weights
    compute_dtype: str = struct.field(pytree_node=False, default="float32")

    def each_layer(self, stack: str) -> Sequence[Weights]:
        return self.per_layer[stack]


@struct.dataclass
class LazyMerge:
    """The merge of `bank` by `recipe`, computed on demand and rounded to the export dtype. Made by `lazy_merge`.

    statistics: what the recipe's densities find in the bank's tables, of each stack and of shared leaves: leaf ->
    statistic -> `[L, …]` and `[…]`. prefetch_layers: whether a pass loads the next layer's sources ahead, where that
    takes little memory; an accelerator's compiler makes as fast code of a merge that picks its layer itself.
    """

    combine: ClassVar[Callable[..., jax.Array]] = staticmethod(combine)

    bank: Bank
    recipe: Recipe
    stack_statistics: dict[str, Tables]
    shared_statistics: Tables
    spec: MergeSpec = struct.field(pytree_node=False)
    compute_dtype: str = struct.field(pytree_node=False, default="float32")
    prefetch_layers: bool = struct.field(pytree_node=False, default=False)

    @property
    def stacks(self) -> dict[str, Any]:
        bank = self.bank
        return {
            stack: (
                leaves, bank.stack_factors.get(stack, {}), bank.stack_mask_keys[stack], self.stack_statistics[stack],
                self.recipe.stacks[stack],
            )
            for stack, leaves in bank.stacks.items()
        }  # fmt: skip

    @property
    def prefetch(self) -> bool:
        # A number per entry would take the memory of another layer. A loop over many parents is given the layer's
        # slices as a copy anyway.
        is_small = self.spec.method.has_row_keys or not any(self.bank.stack_mask_keys.values())
        return self.prefetch_layers and is_small and not is_looped(self.parents)

    @property
    def parents(self) -> int:
        """K."""
        # A gain is no matrix, so that the bank has it of every source.
        sources = self.bank.shared[FINAL_NORM].shape[0]
        return sources - int(self.spec.options.has_base)

    def layer(self, slice_: Any) -> Weights:
        return {name: leaf.astype(jnp.dtype(self.compute_dtype)) for name, leaf in self.merge_layer(slice_).items()}

    def merge_layer(self, slice_: Any) -> Weights:
        """One layer's weights, rounded to the export dtype."""
        leaves, factors, mask_keys, statistics, parameters = slice_
        component, axes = self.bank.component_of, self.bank.axis_of

        def merge(name: str, leaf: jax.Array) -> jax.Array:
            own = _pick(parameters, component[name])
            merge_tensor = partial(self._merge, parameters=own, axis=axes.get(name))
            # Sources, factors and mask keys have the experts behind their own axis, statistics have them first.
            each = jax.vmap(merge_tensor, in_axes=(1, 0)) if name in self.bank.expert_leaves else merge_tensor
            return each((leaf, factors.get(name), mask_keys.get(name)), statistics.get(name, {}))

        return {name: merge(name, leaf) for name, leaf in leaves.items()}

    def _merge(
        self, slices: Slices, statistics: Parameters, parameters: Parameters, axis: int | None = None
    ) -> jax.Array:
        """One tensor. axis: that at which devices that share a model cut it, counted from its end, where they can; each
        of them then merges its own part."""
        leaf, factors, mask_keys = slices
        shape = leaf.shape[1:]
        by_row, rows = self.spec.method.has_row_keys, -len(shape)
        if axis is None or axis < rows or shards_of(shape[axis]) == 1:
            return self._merge_part(slices, statistics, parameters)
        if by_row and axis > rows + 1:
            # No device has columns that follow each other.
            return self._merge_part(slices, statistics, parameters)

        def part(device: jax.Array, slices: Slices, statistics: Parameters, parameters: Parameters) -> jax.Array:
            leaf, factors, mask_keys = slices
            if mask_keys is not None and by_row and axis != rows:
                mask_keys = keys_from_column(mask_keys, device * prod(leaf.shape[2:]))
            return self._merge_part((leaf, factors, mask_keys), statistics, parameters)

        cut: Any = cut_at(leaf.ndim, axis)
        keys_cut: Any = None
        factors_cut: Any = None
        if mask_keys is not None:
            keys_cut = cut if not by_row else cut_at(mask_keys.ndim, -2 if axis == rows else None)
        if factors is not None:
            # `a` has the weight's inputs, `b` its outputs.
            ends = (factors.a, -1), (factors.b, -2)
            factors_cut = Factors(*(cut_at(one.ndim, axis if axis == end else None) for one, end in ends))  # type: ignore[arg-type]
        # Those of rows or of columns have the tensor's axes.
        statistics_cut = jax.tree.map(
            lambda x: cut_at(x.ndim, axis if x.ndim >= len(shape) and x.shape[axis] == shape[axis] else None),
            statistics,
        )
        cuts = ((cut, factors_cut, keys_cut), statistics_cut, jax.tree.map(lambda x: cut_at(x.ndim, None), parameters))
        return map_shards(part, cuts, cut_at(len(shape), axis), slices, statistics, parameters)

    def _merge_part(self, slices: Slices, statistics: Parameters, parameters: Parameters) -> jax.Array:
        spec, (leaf, factors, mask_keys) = self.spec, slices
        numbers = () if mask_keys is None else mask_keys
        with jax.named_scope("merge"):
            sources = leaf if factors is None else [*leaf[: int(spec.options.has_base)], *factors.expand(leaf)]
            inputs = CombineInputs(sources, numbers, statistics, parameters)
            merged = self.combine(spec.method, spec.options, inputs)
        return spec.round_to_export(merged)

    def _shared(self, name: str, rows: Callable[[jax.Array], jax.Array] = lambda leaf: leaf) -> Slices:
        """A shared leaf's sources, factors and scores, or only the rows that `rows(leaf: [S, n, …])` picks."""
        mask_keys, factors = self.bank.shared_mask_keys.get(name), self.bank.shared_factors.get(name)
        if factors is not None:
            factors = Factors(factors.a, rows(factors.b))
        return rows(self.bank.shared[name]), factors, None if mask_keys is None else rows(mask_keys)

    def _merge_shared(self, name: str, slices: Slices) -> jax.Array:
        return self._merge(slices, *self._numbers(name), self.bank.axis_of.get(name))

    def _numbers(self, name: str) -> tuple[Parameters, Parameters]:
        """The statistics and the parameters of a shared leaf."""
        return self.shared_statistics.get(name, {}), self.recipe.shared[name]

    def rows(self, name: str, ids: jax.Array) -> jax.Array:
        # Every device has what is picked. In one row after the other: a TPU's compiler would copy what is picked of all
        # sources to lay it as `ids` are.
        picked = self._merge_part(self._shared(name, lambda leaf: leaf[:, ids.reshape(-1)]), *self._numbers(name))
        return picked.reshape(*ids.shape, *picked.shape[1:]).astype(jnp.dtype(self.compute_dtype))

    def leaf(self, name: str) -> jax.Array:
        return self._merge_shared(name, self._shared(name)).astype(jnp.dtype(self.compute_dtype))

    @property
    def _head(self) -> str:
        return HEAD if HEAD in self.bank.shared else EMBEDDING

    def lm_head_rows(self, start: jax.Array | int, rows: int, shards: int) -> Slices:
        return self._shared(self._head, lambda leaf: slice_shards(*without_upcast(leaf, start), rows, shards, axis=1))

    def head(self, slices: Slices) -> jax.Array:
        return self._merge_shared(self._head, slices).astype(jnp.dtype(self.compute_dtype))

    def materialise(self) -> StackedWeights:
        """The whole candidate, in the export dtype."""
        # All layers side by side: a compiler that fuses the choice of a layer into its merge makes slow code of both.
        # Of low-rank parents one after the other, lest all of them exist as a whole.
        each = jax.lax.map if any(self.bank.stack_factors.values()) else _side_by_side
        return self._materialise(lambda slices: each(self.merge_layer, slices))

    def _materialise(self, merge_layers: Callable[[Any], Weights]) -> StackedWeights:
        """merge_layers: merges all layers of a stack. What is merged lies as the sources do, and not as the compiler
        would like its results best."""
        axes = self.bank.axis_of

        def place(leaves: Weights) -> Weights:
            return {name: shard(leaf, axes[name]) if name in axes else replicate(leaf) for name, leaf in leaves.items()}

        shared = {name: self._merge_shared(name, self._shared(name)) for name in self.bank.shared}
        stacks = {stack: place(merge_layers(slices)) for stack, slices in self.stacks.items()}
        return StackedWeights(stacks, place(shared), self.compute_dtype)


@struct.dataclass
class DifferentiableMerge(LazyMerge):
    """A lazy merge that can be differentiated with respect to its recipe (see merge_kernels.gradients): its statistics
    are those of the densities' neighbourhood, too. Rounding to the export dtype counts as no rounding (a
    straight-through estimator, with the cotangents in that dtype). Made by `differentiable_merge`."""

    combine: ClassVar[Callable[..., jax.Array]] = staticmethod(combine_differentiable)

    @property
    def prefetch(self) -> bool:
        # Slices in a scan's carry would be kept for every layer.
        return False

    def materialise(self) -> StackedWeights:
        """The whole candidate, in the export dtype, one layer after the other: whatever the derivative of one needs is
        computed again when it is asked for."""
        return self._materialise(partial(jax.lax.map, jax.checkpoint(self.merge_layer)))


def _side_by_side(function: Callable[[Any], Any], slices: Any) -> Any:
    return jax.vmap(function)(slices)


def lazy_merge(
    bank: Bank, recipe: Recipe, spec: MergeSpec, compute_dtype: str = "float32", prefetch_layers: bool = False
) -> LazyMerge:
    """The merge of `bank` by `recipe`."""
    return LazyMerge(bank, recipe, *_statistics(look_up, bank, recipe, spec), spec, compute_dtype, prefetch_layers)


def differentiable_merge(
    bank: Bank, recipe: Recipe, spec: MergeSpec, compute_dtype: str = "float32"
) -> DifferentiableMerge:
    """The merge of `bank` by `recipe`, to be differentiated with respect to the recipe."""
    return DifferentiableMerge(
        bank, recipe, *_statistics(look_up_differentiable, bank, recipe, spec), spec, compute_dtype
    )


def _statistics(
    look_up: Callable[..., Any], bank: Bank, recipe: Recipe, spec: MergeSpec
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What a recipe's densities find in the bank's tables, of each stack and of shared leaves. It is looked up here,
    not where a layer is merged: the compiler would fuse the look-up into the merge and do it anew for every entry of
    the weights."""
    component = bank.component_of

    def of_layer(name: str, table: Parameters, parameters: Parameters) -> Any:
        one = partial(look_up, spec.method, parameters=_pick(parameters, component[name]))
        return jax.vmap(one)(table) if name in bank.expert_leaves else one(table)

    stacks = {
        stack: {name: jax.vmap(partial(of_layer, name))(table, recipe.stacks[stack]) for name, table in tables.items()}
        for stack, tables in bank.stack_tables.items()
    }
    shared = {name: look_up(spec.method, table, recipe.shared[name]) for name, table in bank.shared_tables.items()}
    return stacks, shared


def _pick(parameters: Parameters, component: int) -> Parameters:
    """The parameters of one component: `[C, K] -> [K]`, `[C] -> []`."""
    return {name: values[component] for name, values in parameters.items()}
