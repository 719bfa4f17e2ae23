"""A bank whose layers are brought to the devices one after the other, from the host's memory or from files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import EMBEDDING, HEAD
from evojax_merge.models.bank import Bank, LeafBank

Leaves = dict[str, LeafBank]
T = TypeVar("T")


@dataclass(frozen=True)
class StreamedBank:
    """The functions that bring the parts of a bank to the devices.

    rows: for each layer its stacks, and its row in each. load: (number) -> the layer's leaves on the devices, with a
    leading axis of one on every array. load_ends: (names) -> leaves outside of the layers. shapes: the whole bank as
    abstract arrays. check: raises where these can no longer be loaded as they were.
    """

    rows: Sequence[Mapping[str, int]]
    load: Callable[[int], Leaves]
    load_ends: Callable[[Sequence[str]], Leaves]
    shapes: Bank
    check: Callable[[], None] = lambda: None

    @property
    def depth(self) -> int:
        """L."""
        return len(self.rows)

    @property
    def layer_bytes(self) -> int:
        """Bytes of an average layer's sources."""
        leaves = jax.tree.leaves(self.shapes.stacks)
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves) // self.depth

    def embedding_leaves(self) -> Leaves:
        """The leaves outside of the layers that embed tokens: all but the head, where that is a leaf of its own."""
        self.check()
        return self.load_ends([name for name in self.shapes.shared if name != HEAD])

    def resident_leaves(self, ends: Leaves) -> Leaves:
        """The leaves that stay while layers come and go: an embedding only where it is the head as well."""
        dropped = EMBEDDING if HEAD in self.shapes.shared else None
        return {name: leaf for name, leaf in ends.items() if name != dropped}

    def head_leaves(self, ends: Leaves) -> Leaves:
        """The leaves outside of the layers that follow them, with the head. ends: those that stayed."""
        return ends | self.load_ends([name for name in self.shapes.shared if name == HEAD])

    def layers(self, numbers: Sequence[int]) -> Iterator[tuple[int, Leaves]]:
        """Each layer, in the order of `numbers`; the next one is loaded while the caller uses the one before."""
        self.check()
        yield from load_ahead(self.load, numbers)


def load_ahead(load: Callable[[int], T], numbers: Sequence[int]) -> Iterator[tuple[int, T]]:
    """Each number and what it loads; the next one is loaded while the caller uses the one before."""
    with ThreadPoolExecutor(1, "layers") as pool:
        ahead = pool.submit(load, numbers[0])
        for number, following in zip(numbers, [*numbers[1:], None], strict=True):
            layer = ahead.result()
            if following is not None:
                ahead = pool.submit(load, following)
            yield number, layer
            del layer


def abstract_streamed(bank: Bank, rows: Sequence[Mapping[str, int]]) -> StreamedBank:
    """The streamed bank of a bank of abstract arrays, for plans. rows: see `StreamedBank`."""

    def first(array: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(array, "sharding", None)
        return jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype, sharding=sharding)

    return StreamedBank(
        rows,
        lambda number: jax.tree.map(
            first, {k: leaf for stack in rows[number] for k, leaf in bank.stacks[stack].items()}
        ),
        lambda names: {name: bank.shared[name] for name in names},
        bank,
    )
