"""Uniform numbers that are hashed where they are needed, and stored nowhere.

The number of a tensor's entry is a hash of its column j, keyed by its row's 64 bits (a, b), in arithmetic of 32 bits:

    x = j ^ a;  x ^= x >> 16;  x *= 0x7feb352d;  x ^= b;  x ^= x >> 15;  x *= 0x846ca68b;  u = x >> 16

A row is one index of the first axis, its columns counted in the order of the file; each entry of a vector is a row of
its own. So some rows, with their keys, have the numbers that they have in the whole tensor: a device's shard, a tile of
the head, or the rows of the embedding that a batch looks up.

The multipliers and shifts are those of lowbias32 (Wellons, hash-prospector), whose last shift leaves the upper 16 bits
alone. Half of the key comes in between: `j ^ a` alone only puts the columns of an aligned block into another order, and
rows whose `a` agree in their upper bits would have the same numbers. The keys themselves are Philox's (Salmon et al.
2011, doi:10.1145/2063384.2063405), a block cipher of the row's number under the seed and the parent's digest.

Integers wrap alike everywhere, so NumPy, CPUs, GPUs and TPUs give the same bits.
"""

from math import prod
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

# The name of these numbers, which a search that is continued compares: other numbers get another name.
SCHEME = "philox-lowbias32"
# u is below this.
LEVELS = 2**16
# Entries that the host hashes at a time: they stay in the cache.
BLOCK = 2**16

Integers = TypeVar("Integers", np.ndarray, jax.Array)


def draw_row_keys(seed: int, digest: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The keys of a tensor's rows, `uint32[rows, 2]` (of a single number `[2]`), fixed by (seed, digest).

    `digest` names the parent and the tensor (at least 8 bytes of a hash), so that neither the order of the parents
    nor anything about a candidate changes a number.
    """
    key = np.array([seed, int.from_bytes(digest[:8], "little")], np.uint64)
    words = np.random.Philox(key=key).random_raw(prod(shape[:1]))
    return words.astype("<u8", copy=False).view("<u4").astype(np.uint32, copy=False).reshape(*shape[:1], 2)


def host_uniform(row_keys: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of a whole tensor, `uint16[*shape]`, from its row keys."""
    keys, width = row_keys.reshape(-1, 2), prod(shape[1:])
    columns = np.arange(width, dtype=np.uint32)[None]
    numbers = np.empty((len(keys), width), np.uint16)
    step = max(1, BLOCK // max(width, 1))
    for start in range(0, len(keys), step):
        block = keys[start : start + step]
        numbers[start : start + step] = _hash(columns, block[:, :1], block[:, 1:])
    return numbers.reshape(shape)


def device_uniform(row_keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The numbers of any rows, `uint32[*shape]`, from their keys `[*rows, 2]`.

    The leading axes of `shape` are the rows', the others all of their columns; with keys of `keys_from_column`, as many
    columns from that one on.
    """
    rows = row_keys.ndim - 1
    columns = jax.lax.iota(jnp.uint32, prod(shape[rows:])).reshape(shape[rows:])
    row_shape = (*shape[:rows], *[1] * (len(shape) - rows))
    first, second, *begin = (row_keys[..., i].reshape(row_shape) for i in range(row_keys.shape[-1]))
    return _hash(columns + begin[0] if begin else columns, first, second)


def keys_from_column(row_keys: jax.Array, column: jax.Array) -> jax.Array:
    """Keys `uint32[*rows, 3]` of rows that begin at a column, `uint32[]`, from the rows' keys `[*rows, 2]`. A device
    that holds some of all rows' columns uses them."""
    begin = jnp.broadcast_to(column.astype(jnp.uint32), (*row_keys.shape[:-1], 1))
    return jnp.concatenate([row_keys, begin], axis=-1)


def _hash(column: Integers, first: Integers, second: Integers) -> Integers:
    """The number, below 2^16, of a column in a row of keys (first, second); all uint32."""
    x = column ^ first
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = x ^ second
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x >> np.uint32(16)
