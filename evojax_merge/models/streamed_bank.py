"""A bank whose layers are brought to the devices one after the other, from the host's memory or from files."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import LAYERS
from evojax_merge.models.bank import Bank, LeafBank

Leaves = dict[str, LeafBank]


@dataclass(frozen=True)
class StreamedBank:
    """A bank without its layers, and the function that loads one.

    shared: the leaves outside of the layers, on the devices. depth: L. load: (number) -> the layer's leaves on the
    devices, with a leading axis of one on every array. shapes: the whole bank as abstract arrays. check: raises where
    layers can no longer be loaded as they were.
    """

    shared: Leaves
    depth: int
    load: Callable[[int], Leaves]
    shapes: Bank
    check: Callable[[], None] = lambda: None

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's sources."""
        leaves = jax.tree.leaves(self.shapes.stacks)
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves) // self.depth

    def layers(self, numbers: Sequence[int]) -> Iterator[tuple[int, Leaves]]:
        """Each layer, in the order of `numbers`; the next one is loaded while the caller uses the one before."""
        self.check()
        with ThreadPoolExecutor(1, "layers") as pool:
            ahead = pool.submit(self.load, numbers[0])
            for number, following in zip(numbers, [*numbers[1:], None], strict=True):
                leaves = ahead.result()
                if following is not None:
                    ahead = pool.submit(self.load, following)
                yield number, leaves
                del leaves


def abstract_streamed(bank: Bank) -> StreamedBank:
    """The streamed bank of a bank of abstract arrays, for plans."""
    first = partial(jax.tree.map, lambda array: _shape(array, (1, *array.shape[1:])), bank.stacks[LAYERS])
    return StreamedBank(bank.shared, depth_of(bank), lambda number: first(), bank)


def depth_of(bank: Bank) -> int:
    """The number of layers of a bank."""
    return int(jax.tree.leaves(bank.stacks[LAYERS])[0].shape[0])


def _shape(array: Any, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape or array.shape, array.dtype, sharding=getattr(array, "sharding", None))
