"""Layer sources, which give the decoder its weights.

`StackedWeights` and `UnstackedWeights` are models that exist in memory. `LazyMerge` merges each layer from the bank and
a recipe when the scan needs it, so that a candidate never exists as a whole; `materialise` turns it into stacked
weights for decoding, where every token would redo the merge.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, ClassVar, Self

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
from evojax_merge.models.bank import Bank, Factors, LeafBank, MergeSpec, Parameters, Recipe
from evojax_merge.models.layers import Weights, without_upcast
from evojax_merge.models.sharding import cut_at, map_shards, replicate, shard, shards_of, slice_shards

# A leaf int32[] of a layer whose weights are the experts of all layers: the number of its own first one.
FIRST_EXPERT = "first_expert"


class MaterialisedWeights:
    """The methods of weights that are in memory: all of them, or those outside of the layers."""

    shared: Weights
    compute_dtype: str

    @property
    def prefetch(self) -> bool:
        return False

    def _cast(self, x: jax.Array) -> jax.Array:
        is_number = jnp.issubdtype(x.dtype, jnp.integer)
        return x if is_number else x.astype(jnp.dtype(self.compute_dtype))

    def layer(self, slice_: Weights) -> Weights:
        return {name: self._cast(leaf) for name, leaf in slice_.items()}

    def rows(self, name: str, ids: jax.Array) -> jax.Array:
        return self._cast(self.shared[name][ids])

    def leaf(self, name: str) -> jax.Array:
        return self._cast(self.shared[name])

    def lm_head_rows(self, start: jax.Array | int, rows: int, shards: int) -> jax.Array:
        head = self.shared[HEAD if HEAD in self.shared else EMBEDDING]
        return slice_shards(head, start, rows, shards)

    def head(self, slices: jax.Array) -> jax.Array:
        return self._cast(slices)

    def in_place(self, experts: Sequence[str]) -> "MaterialisedWeights":
        """The same weights for a pass without derivatives, whose scan over layers leaves the experts' leaves where they
        are: a slice of a layer's experts, which are most of its weights, is a copy."""
        return self


@struct.dataclass
class StackedWeights(MaterialisedWeights):
    """A model with its layers stacked. stacks: stack -> leaf -> `[L, …]`; shared: leaf -> `[…]` (`head` only where it
    is untied)."""

    stacks: dict[str, Weights]
    shared: Weights
    compute_dtype: str = struct.field(pytree_node=False, default="float32")

    def each_layer(self, stack: str) -> Sequence[Weights]:
        leaves = self.stacks[stack]
        depth = len(next(iter(leaves.values()), ()))
        return [self.layer({name: leaf[i] for name, leaf in leaves.items()}) for i in range(depth)]

    def in_place(self, experts: Sequence[str]) -> MaterialisedWeights:
        named = [stack for stack, leaves in self.stacks.items() if experts and leaves.keys() >= set(experts)]
        return ExpertsInPlace(self, named[0], tuple(experts)) if named else self

    def unstack(self) -> "UnstackedWeights":
        """The same weights, with each layer in arrays of its own."""
        per_layer = {stack: tuple(self.each_layer(stack)) for stack in self.stacks}
        return UnstackedWeights(per_layer, self.shared, self.compute_dtype)


@struct.dataclass
class ExpertsInPlace(MaterialisedWeights):
    """A model with its layers stacked. A scan takes the layers of `stack` without their experts, the leaves of these
    names, which each layer has of all layers, `[L E, …]`, in the dtype that they are stored in."""

    model: StackedWeights
    stack: str = struct.field(pytree_node=False)
    experts: tuple[str, ...] = struct.field(pytree_node=False)

    @property
    def shared(self) -> Weights:  # type: ignore[override]
        return self.model.shared

    @property
    def compute_dtype(self) -> str:  # type: ignore[override]
        return self.model.compute_dtype

    @property
    def stacks(self) -> dict[str, Weights]:
        leaves = self.model.stacks[self.stack]
        layers, count = leaves[self.experts[0]].shape[:2]
        others = {name: leaf for name, leaf in leaves.items() if name not in self.experts}
        first = count * jnp.arange(layers, dtype=jnp.int32)
        return self.model.stacks | {self.stack: others | {FIRST_EXPERT: first}}

    def layer(self, slice_: Weights) -> Weights:
        weights, leaves = super().layer(slice_), self.model.stacks[self.stack]
        if FIRST_EXPERT in slice_:
            weights |= {name: leaves[name].reshape(-1, *leaves[name].shape[2:]) for name in self.experts}
        return weights

    def each_layer(self, stack: str) -> Sequence[Weights]:
        return self.model.each_layer(stack)


@struct.dataclass
class UnstackedWeights(MaterialisedWeights):
    """A model with each layer in arrays of its own, which a decode step takes one by one without copying. per_layer:
    stack -> leaf -> `[…]` of each of its layers."""

    per_layer: dict[str, tuple[Weights, ...]]
    shared: Weights
    compute_dtype: str = struct.field(pytree_node=False, default="float32")

    def each_layer(self, stack: str) -> Sequence[Weights]:
        return self.per_layer[stack]


@struct.dataclass
class LazyMerge:
    """The merge of `bank` by `recipe`, computed on demand and rounded to the export dtype. Made by `of`.

    The statistics of `bank` are those at the recipe's densities. prefetch_layers: whether a pass loads the next layer's
    sources ahead, where that takes little memory; an accelerator's compiler makes equally fast code for a merge that
    picks its layer itself.
    """

    combine: ClassVar[Callable[..., jax.Array]] = staticmethod(combine)
    look_up: ClassVar[Callable[..., Any]] = staticmethod(look_up)

    bank: Bank
    recipe: Recipe
    spec: MergeSpec = struct.field(pytree_node=False)
    compute_dtype: str = struct.field(pytree_node=False, default="float32")
    prefetch_layers: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def of(
        cls, bank: Bank, recipe: Recipe, spec: MergeSpec, compute_dtype: str = "float32", prefetch_layers: bool = False
    ) -> Self:
        """The merge of `bank` by `recipe`."""
        return cls(_at_densities(cls.look_up, bank, recipe, spec), recipe, spec, compute_dtype, prefetch_layers)

    @property
    def stacks(self) -> dict[str, tuple[dict[str, LeafBank], Parameters]]:
        """The pytrees that a scan over each stack slices: the leaves, and the recipe's parameters of the layers."""
        return {stack: (leaves, self.recipe.stacks[stack]) for stack, leaves in self.bank.stacks.items()}

    @property
    def _stack_leaves(self) -> list[LeafBank]:
        return [leaf for leaves in self.bank.stacks.values() for leaf in leaves.values()]

    @property
    def prefetch(self) -> bool:
        # A number per entry would take the memory of another layer. A loop over many parents gets the layer's slices as
        # a copy anyway.
        is_small = self.spec.method.has_row_keys or all(leaf.mask_keys is None for leaf in self._stack_leaves)
        return self.prefetch_layers and is_small and not is_looped(self.parents)

    @property
    def parents(self) -> int:
        """K."""
        # A gain is no matrix, so that the bank has the gains of all sources.
        sources = self.bank.shared[FINAL_NORM].sources.shape[0]
        return sources - int(self.spec.options.has_base)

    def layer(self, slice_: tuple[dict[str, LeafBank], Parameters]) -> Weights:
        return {name: leaf.astype(jnp.dtype(self.compute_dtype)) for name, leaf in self.merge_layer(slice_).items()}

    def merge_layer(self, slice_: tuple[dict[str, LeafBank], Parameters]) -> Weights:
        """One layer's weights, rounded to the export dtype."""
        leaves, parameters = slice_

        def merge(leaf: LeafBank) -> jax.Array:
            merge_tensor = partial(self._merge, parameters=_pick(parameters, leaf.group))
            if not leaf.has_experts:
                return merge_tensor(leaf)
            expert_axes = replace(jax.tree.map(lambda _: 1, leaf), statistics=dict.fromkeys(leaf.statistics, 0))
            return jax.vmap(merge_tensor, in_axes=(expert_axes,))(leaf)

        return {name: merge(leaf) for name, leaf in leaves.items()}

    def _merge(self, leaf: LeafBank, parameters: Parameters) -> jax.Array:
        """Merge one tensor. Devices that share a model each merge their own part, where the tensor can be sharded."""
        shape, axis = leaf.sources.shape[1:], leaf.shard_axis
        has_row_keys, rows = self.spec.method.has_row_keys, -len(shape)
        if axis is None or axis < rows or shards_of(shape[axis]) == 1:
            return self._merge_part(leaf, parameters)
        if has_row_keys and axis > rows + 1:
            # No device has consecutive columns.
            return self._merge_part(leaf, parameters)

        def part(device: jax.Array, leaf: LeafBank, parameters: Parameters) -> jax.Array:
            if self.spec.method.random and leaf.mask_keys is not None and has_row_keys and axis != rows:
                first_column = device * prod(leaf.sources.shape[2:])
                leaf = replace(leaf, mask_keys=keys_from_column(leaf.mask_keys, first_column))
            return self._merge_part(leaf, parameters)

        def spec_at(array: jax.Array, at: int | None) -> Any:
            return cut_at(array.ndim, at)

        def spec_like_tensor(array: jax.Array) -> Any:
            """Statistics of rows or of columns have the tensor's axes."""
            return spec_at(array, axis if array.ndim >= len(shape) and array.shape[axis] == shape[axis] else None)

        factors, keys = leaf.factors, leaf.mask_keys
        specs = replace(
            leaf,
            sources=spec_at(leaf.sources, axis),
            # `a` has the weight's inputs, `b` its outputs.
            factors=None
            if factors is None
            else Factors(*(spec_at(x, axis if axis == end else None) for x, end in ((factors.a, -1), (factors.b, -2)))),
            mask_keys=None
            if keys is None
            else spec_at(keys, axis if not has_row_keys else -2 if axis == rows else None),
            statistics=jax.tree.map(spec_like_tensor, leaf.statistics),
        )
        whole = jax.tree.map(partial(spec_at, at=None), parameters)
        return map_shards(part, (specs, whole), cut_at(len(shape), axis), leaf, parameters)

    def _merge_part(self, leaf: LeafBank, parameters: Parameters) -> jax.Array:
        spec, stored = self.spec, leaf.sources
        numbers = () if leaf.mask_keys is None else leaf.mask_keys
        with jax.named_scope("merge"):
            sources = (
                stored
                if leaf.factors is None
                else [*stored[: int(spec.options.has_base)], *leaf.factors.expand(stored)]
            )
            inputs = CombineInputs(sources, numbers, leaf.statistics, parameters)
            merged = self.combine(spec.method, spec.options, inputs)
        # Candidates are scored as they would be written.
        return merged.astype(jnp.dtype(spec.export_dtype))

    def rows(self, name: str, ids: jax.Array) -> jax.Array:
        # Every device has the picked rows. `ids` are flattened: a TPU's compiler would copy the picked rows of all
        # sources into the layout of `ids`.
        leaf = self.bank.shared[name].rows(lambda array: array[:, ids.reshape(-1)])
        picked = self._merge_part(leaf, self.recipe.shared[name])
        return picked.reshape(*ids.shape, *picked.shape[1:]).astype(jnp.dtype(self.compute_dtype))

    def leaf(self, name: str) -> jax.Array:
        merged = self._merge(self.bank.shared[name], self.recipe.shared[name])
        return merged.astype(jnp.dtype(self.compute_dtype))

    @property
    def _head(self) -> str:
        return HEAD if HEAD in self.bank.shared else EMBEDDING

    def lm_head_rows(self, start: jax.Array | int, rows: int, shards: int) -> LeafBank:
        return self.bank.shared[self._head].rows(
            lambda array: slice_shards(*without_upcast(array, start), rows, shards, axis=1)
        )

    def head(self, slices: LeafBank) -> jax.Array:
        return self._merge(slices, self.recipe.shared[self._head]).astype(jnp.dtype(self.compute_dtype))

    def materialise(self) -> StackedWeights:
        """The whole candidate, in the export dtype."""
        # All layers at once by vmap: a compiler that fuses the choice of a layer into its merge makes slow code of
        # both. Low-rank parents go layer by layer, so that their whole weights never all exist.
        is_low_rank = any(leaf.factors is not None for leaf in self._stack_leaves)
        each = partial(jax.lax.map, self.merge_layer) if is_low_rank else jax.vmap(self.merge_layer)
        return self._materialise(each)

    def _materialise(self, merge_layers: Callable[[Any], Weights]) -> StackedWeights:
        """The whole candidate. merge_layers: merges all layers of a stack. The merged weights are sharded like the
        sources, not as the compiler would choose."""

        def place(weights: Weights, leaves: dict[str, LeafBank]) -> Weights:
            return {
                name: replicate(array) if (axis := leaves[name].shard_axis) is None else shard(array, axis)
                for name, array in weights.items()
            }

        shared = {name: self._merge(leaf, self.recipe.shared[name]) for name, leaf in self.bank.shared.items()}
        stacks = {stack: place(merge_layers(slices), self.bank.stacks[stack]) for stack, slices in self.stacks.items()}
        return StackedWeights(stacks, place(shared, self.bank.shared), self.compute_dtype)


@struct.dataclass
class DifferentiableMerge(LazyMerge):
    """A lazy merge that can be differentiated with respect to its recipe (see merge_kernels.gradients): its statistics
    include those of the densities' neighbourhood. Gradients ignore the rounding to the export dtype (a straight-through
    estimator, with the cotangents in that dtype)."""

    combine: ClassVar[Callable[..., jax.Array]] = staticmethod(combine_differentiable)
    look_up: ClassVar[Callable[..., Any]] = staticmethod(look_up_differentiable)

    @property
    def prefetch(self) -> bool:
        # Slices in a scan's carry would be kept for every layer.
        return False

    def materialise(self) -> StackedWeights:
        """The whole candidate, in the export dtype, one layer after the other: a layer's derivative computes the values
        that it needs again."""
        return self._materialise(partial(jax.lax.map, jax.checkpoint(self.merge_layer)))


def _at_densities(look_up: Callable[..., Any], bank: Bank, recipe: Recipe, spec: MergeSpec) -> Bank:
    """The bank with its statistics at a recipe's densities. The statistics are looked up once for all layers, not where
    a layer is merged: the compiler would fuse the look-up into the merge and repeat it for every entry of the
    weights."""

    def of_layer(leaf: LeafBank, parameters: Parameters) -> Any:
        look_up_tensor = partial(look_up, spec.method, parameters=_pick(parameters, leaf.group))
        return jax.vmap(look_up_tensor)(leaf.statistics) if leaf.has_experts else look_up_tensor(leaf.statistics)

    def of_shared(leaf: LeafBank, parameters: Parameters) -> Any:
        return look_up(spec.method, leaf.statistics, parameters)

    def at(look_up_leaf: Callable[..., Any], leaf: LeafBank, parameters: Parameters) -> LeafBank:
        return replace(leaf, statistics=look_up_leaf(leaf, parameters)) if leaf.statistics else leaf

    return Bank(
        {
            stack: {name: at(jax.vmap(of_layer), leaf, recipe.stacks[stack]) for name, leaf in leaves.items()}
            for stack, leaves in bank.stacks.items()
        },
        {name: at(of_shared, leaf, recipe.shared[name]) for name, leaf in bank.shared.items()},
    )


def _pick(parameters: Parameters, component: int) -> Parameters:
    """The parameters of one component: `[C, K] -> [K]`, `[C] -> []`."""
    return {name: values[component] for name, values in parameters.items()}
