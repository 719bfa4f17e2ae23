"""Models with a low-rank change, like LoRA's: for each matrix two factors, and all factors together one vector.

Letters: D numbers of a change, r its rank, L layers of a stack. The axis of layers stands before those of the matrix.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from merge_kernels import add_low_rank

from evojax_merge.models.layers import Weights
from evojax_merge.models.sources import MaterialisedWeights, StackedWeights

# The factors of a matrix: a `[…, r, in]`, b `[…, out, r]`.
Pair = tuple[Any, Any]
# A matrix with fewer rows or columns, such as the kernel of a convolution over tokens, is left as it is.
LEAST_ROWS = 4


@dataclass(frozen=True)
class LowRankLayout:
    """The place of each factor in the vector of a change. matrices: the name of each changed matrix, and its shape `(…,
    out, in)`; rank: r; scale: the change of a matrix w is `w + scale b a`."""

    matrices: tuple[tuple[str, tuple[int, ...]], ...]
    rank: int
    scale: float

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """The shapes of a and b, by the matrix's name."""
        return {name: ((*shape[:-2], self.rank, shape[-1]), (*shape[:-1], self.rank)) for name, shape in self.matrices}

    def of_rank(self, rank: int) -> "LowRankLayout":
        """The layout of changes of the same matrices by another rank."""
        return self if rank == self.rank else replace(self, rank=rank)

    def of_dims(self, dims: int) -> "LowRankLayout":
        """The layout of changes of the same matrices by vectors of so many numbers."""
        return self.of_rank(dims * self.rank // self.dims)

    @property
    def dims(self) -> int:
        """D."""
        return sum(prod(shape) for pair in self.shapes.values() for shape in pair)

    def split(self, vectors: Any) -> dict[str, Pair]:
        """The factors by their matrix's name, from vectors `[…, D]`."""
        lead, begin = vectors.shape[:-1], 0
        pairs: dict[str, Pair] = {}
        for name, shapes in self.shapes.items():
            factors = []
            for shape in shapes:
                factors.append(vectors[..., begin : begin + prod(shape)].reshape(*lead, *shape))
                begin += prod(shape)
            pairs[name] = (factors[0], factors[1])
        return pairs

    def join(self, pairs: Mapping[str, Pair], lead: tuple[int, ...] = ()) -> Any:
        """The vectors `[*lead, D]` of factors by their matrix's name."""
        parts = [factor.reshape(*lead, -1) for name in self.shapes for factor in pairs[name]]
        return jnp.concatenate(parts, axis=-1)

    def start(self, seed: int) -> np.ndarray:
        """float32[D]: a change of nothing, as PEFT begins: a uniform within 1 / sqrt(in), b zero."""
        rng, parts = np.random.default_rng(seed), []
        for a, b in self.shapes.values():
            parts += [rng.uniform(-1, 1, a).astype(np.float32).ravel() / np.sqrt(np.float32(a[-1]))]
            parts += [np.zeros(prod(b), np.float32)]
        return np.concatenate(parts)

    def changed(self, name: str, matrix: jax.Array, pair: Pair) -> jax.Array:
        """A changed matrix, float32: a trained step is smaller than a rounding of a weight in bfloat16."""
        return add_low_rank(matrix.astype(jnp.float32), pair[0], self.scale * pair[1])


def layout_of(shapes: Iterable[tuple[str, tuple[int, ...]]], rank: int, scale: float) -> LowRankLayout:
    """The layout of a change of all matrices among arrays, by their names and shapes."""
    matrices = tuple(
        (name, shape) for name, shape in shapes if len(shape) > 1 and min(shape[-2:]) >= LEAST_ROWS
    )  # fmt: skip
    return LowRankLayout(matrices, rank, scale)


def stacked_layout(model: StackedWeights, names: Collection[str], rank: int, scale: float) -> LowRankLayout:
    """The layout of a change of the matrices with these names, `stack/leaf`, in a model's layers."""
    leaves = [
        (f"{stack}/{name}", leaf.shape)
        for stack, weights in model.stacks.items()
        for name, leaf in weights.items()
        # The layers are the first axis. Experts' matrices stay as they are: an adapter's file has no place for them.
        if f"{stack}/{name}" in names and leaf.ndim == 3 and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return layout_of(leaves, rank, scale)


def spread_of(layout: LowRankLayout, model: StackedWeights) -> dict[str, float]:
    """The root mean square of the entries of each matrix that a layout changes, by its name."""
    spread = {}
    for name in layout.shapes:
        stack, leaf = name.split("/")
        spread[name] = float(jnp.sqrt(jnp.mean(jnp.square(model.stacks[stack][leaf].astype(jnp.float32)))))
    return spread


@struct.dataclass
class AdaptedModel(MaterialisedWeights):
    """A stored model with a low-rank change. stacks: stack -> its weights, and the factors by the leaf's name."""

    stacks: dict[str, tuple[Weights, dict[str, Pair]]]
    shared: Weights
    layout: LowRankLayout = struct.field(pytree_node=False)
    compute_dtype: str = struct.field(pytree_node=False, default="float32")

    def layer(self, slice_: Any) -> Weights:
        weights, pairs = slice_
        return {
            name: self._cast(self.layout.changed(name, weight, pairs[name]) if name in pairs else weight)
            for name, weight in weights.items()
        }

    def materialise(self) -> StackedWeights:
        """The whole model, in the dtype that it is computed in."""
        stacks = {stack: jax.lax.map(self.layer, slices) for stack, slices in self.stacks.items()}
        return StackedWeights(stacks, self.shared, self.compute_dtype)
