"""Recurrent layers: causal convolutions, gated linear recurrences, and the state that both keep beside a KV cache.

A head of a gated linear recurrence has a state `S [k, v]`, which token t changes and reads:

    S_t = exp(g_t) S_(t-1) + k_t u_t^T        o_t = S_t^T q_t

with `u_t = v_t` (Mamba-2, arXiv 2405.21060), or by the gated delta rule `u_t = b_t (v_t - exp(g_t) S_(t-1)^T k_t)`
(Gated DeltaNet, arXiv 2412.06464). Tokens go through it in chunks: inside a chunk every pair of tokens is multiplied,
as in attention, and the state passes from chunk to chunk, so that memory grows with a row's length alone.

Letters: B rows of T tokens, C of them in a chunk, W in a step of decoding; G heads of queries and keys, each of which R
heads of values share; D channels of a convolution over the last K tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from evojax_merge.models.config import RecurrentShape
from evojax_merge.models.layers import SequenceLayout

CHUNK = 64
# A state sums over all tokens before it: in float32, also on devices whose matmuls round their operands.
_PRECISION = jax.lax.Precision.HIGHEST


@struct.dataclass
class RecurrentState:
    """The state behind the tokens of B rows. columns: `[B, K-1, D]`, the inputs of the convolution at the last tokens;
    heads: `float32[B, G, R, k, v]`, or None for a layer that has a convolution alone."""

    columns: jax.Array
    heads: jax.Array | None


@struct.dataclass
class Updates:
    """The changes that W tokens make to a state. decay: `float32[B, G, R, W]`, the sum of g up to each token; key:
    `[B, W, G, k]`; value: each token's u, `float32[B, G, R, W, v]`."""

    decay: jax.Array
    key: jax.Array
    value: jax.Array

    def applied(self, heads: jax.Array, last: jax.Array, earlier: jax.Array) -> jax.Array:
        """The state behind token `last: int32[B]`, from the state `heads` before the tokens. earlier: `bool[B, W]`, the
        tokens that come before it or are it."""
        total = jnp.take_along_axis(self.decay, last[:, None, None, None], axis=-1)
        share = jnp.exp(jnp.where(earlier[:, None, None], total - self.decay, -jnp.inf))
        added = jnp.einsum("bgrj,bjgk,bgrjv->bgrkv", share, self.key, self.value, precision=_PRECISION)
        return jnp.exp(total)[..., None] * heads + added


@struct.dataclass
class DraftState:
    """The state of a step of decoding, before it is known how many of its W tokens are accepted. before: the state
    before the step; columns: `[B, K-1+W, D]`, with the inputs of the step's tokens."""

    before: RecurrentState
    columns: jax.Array
    updates: Updates | None

    def accept(self, count: jax.Array) -> RecurrentState:
        """The state behind the first `count: int32[B]` tokens of the step."""
        kernel = self.before.columns.shape[1]
        columns = jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, kernel))(self.columns, count)
        heads = self.before.heads
        if self.updates is not None and heads is not None:
            accepted = jnp.arange(self.columns.shape[1] - kernel) < count[:, None]
            behind = self.updates.applied(heads, jnp.maximum(count - 1, 0), accepted)
            heads = jnp.where(count[:, None, None, None, None] > 0, behind, heads)
        return RecurrentState(columns, heads)


class Recur(Protocol):
    """The convolution and the recurrence that a block receives: those of prefill, or those of a step of decoding."""

    def convolve(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """(inputs `[B, T, D]`, kernel `[D, K]`, bias `[D]`) -> the sum of each token's inputs and those of the K-1
        tokens before it, weighted by the kernel, `[B, T, D]`; and the columns to keep."""

    def scan(
        self, query: jax.Array, key: jax.Array, value: jax.Array, decay: jax.Array, beta: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """(queries and keys `[B, T, G, k]`, values `[B, T, G, R, v]`, g and b `[B, T, G, R]`, all float32) -> o
        `float32[B, T, G, R, v]`, and the heads to keep. Without `beta` u is the value; with it u is the delta rule's.
        """

    def keep(self, columns: jax.Array, heads: Any = None) -> Any:
        """The layer's state to keep, from what the other two returned."""


def empty_state(shape: RecurrentShape, rows: int, dtype: Any) -> RecurrentState:
    """The state before the first token of each row; the columns in a dtype."""
    heads = (rows, shape.groups, shape.repeats, shape.key, shape.value)
    columns = jnp.zeros((rows, shape.kernel - 1, shape.channels), jnp.dtype(dtype))
    return RecurrentState(columns, jnp.zeros(heads, jnp.float32) if shape.groups else None)


# ---------------------------------------------------------------------------------------------------------------
# Chunks


@struct.dataclass
class Pairs:
    """The products of the tokens of a chunk with each other, which no state changes, for a leading batch L.

    decay: `float32[L, G, R, C]`, the sum of g up to each token; read: `float32[L, G, R, C, C]`, how much of each
    token's u (last axis) a token reads; learned: `float32[L, G, R, C, C]`, the matrix by which the delta rule makes u
    of `v - exp(g) S^T k`, or None."""

    decay: jax.Array
    read: jax.Array
    learned: jax.Array | None


def _pairs(query: jax.Array, key: jax.Array, decay: jax.Array, beta: jax.Array | None, ancestors: jax.Array) -> Pairs:
    """The pairs of the chunks `[L, C, …]` of some rows. ancestors: `bool[L, C, C]`, the tokens (last axis) that each
    token's state sums over, itself included."""
    product = jax.tree_util.Partial(jnp.einsum, precision=_PRECISION)
    sums = product("lij,ljgr->lgri", ancestors.astype(jnp.float32), decay)
    between = sums[..., :, None] - sums[..., None, :]
    share = jnp.exp(jnp.where(ancestors[:, None, None], between, -jnp.inf))
    learned = None
    if beta is not None:
        rate = beta.transpose(0, 2, 3, 1)
        alike = product("ligk,ljgk->lgij", key, key)[:, :, None] * share
        learned = unit_inverse(jnp.tril(rate[..., None] * alike, -1)) * rate[..., None, :]
    return Pairs(sums, product("ligk,ljgk->lgij", query, key)[:, :, None] * share, learned)


@jax.custom_jvp
def unit_inverse(strictly: jax.Array) -> jax.Array:
    """The inverse of `I + strictly`, `float32[..., C, C]`, of a lower triangle without its diagonal.

    The blocks on the diagonal double: from the inverses of two neighbours, A and B, and the block L below A, the entry
    below A of their common inverse is `-B L A`. A device runs log2(C) steps, where rows one after the other are C."""
    *lead, _, size = strictly.shape
    full = 1 << (size - 1).bit_length()
    strictly = jnp.pad(strictly, (*((0, 0),) * len(lead), (0, full - size), (0, full - size)))
    inverse, half = jnp.ones((*lead, full, 1, 1), strictly.dtype), 1
    while half < full:
        count = full // (2 * half)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        quarters = strictly.reshape(*lead, count, 2, half, count, 2, half)[..., 1, :, :, 0, :]
        below = jnp.moveaxis(jnp.diagonal(quarters, axis1=-4, axis2=-2), -1, -3)
        below = -jnp.matmul(jnp.matmul(second, below, precision=_PRECISION), first, precision=_PRECISION)
        inverse = jnp.block([[first, jnp.zeros_like(first)], [below, second]])
        half *= 2
    return inverse[..., 0, :size, :size]


@unit_inverse.defjvp
def _unit_inverse_tangent(values: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    inverse = unit_inverse(*values)
    change = jnp.matmul(inverse, tangents[0], precision=_PRECISION)
    return inverse, -jnp.matmul(change, inverse, precision=_PRECISION)


def _chunk(
    query: jax.Array, key: jax.Array, value: jax.Array, pairs: Pairs, read: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, Updates]:
    """o `float32[B, C, G, R, v]` of a chunk's tokens, and their changes to the state. read: (`[B, C, G, k]`) -> the
    products of each token's vector and its state before the chunk, `[B, G, R, C, v]`."""
    product = jax.tree_util.Partial(jnp.einsum, precision=_PRECISION)
    passed = jnp.exp(pairs.decay)[..., None]
    update = value.transpose(0, 2, 3, 1, 4)
    if pairs.learned is None:
        before = read(query)
    else:
        of_key, before = jnp.split(read(jnp.concatenate([key, query], axis=1)), 2, axis=3)
        update = product("bgrij,bgrjv->bgriv", pairs.learned, update - passed * of_key)
    out = passed * before + product("bgrij,bgrjv->bgriv", pairs.read, update)
    return out.transpose(0, 3, 1, 2, 4), Updates(pairs.decay, key, update)


def _add(weighted: list[jax.Array], bias: jax.Array | None) -> jax.Array:
    mixed = sum(weighted[1:], weighted[0])
    return mixed if bias is None else mixed + bias


def _read(heads: jax.Array, x: jax.Array) -> jax.Array:
    """`[B, G, R, C, v]`: the products of vectors `[B, C, G, k]` and a state `[B, G, R, k, v]`."""
    return jnp.einsum("bcgk,bgrkv->bgrcv", x, heads, precision=_PRECISION)


# ---------------------------------------------------------------------------------------------------------------
# Whole rows


@struct.dataclass
class Histories:
    """The tokens before each token of a layout, and behind a row's last one: `back: int32[B, T, K]` and `last: int32[B,
    K-1]` are columns of the row with the K-1 columns of the state before it. A segment's first token follows the last
    token of the segment that all segments share."""

    back: jax.Array
    last: jax.Array


def histories(layout: SequenceLayout, kernel: int) -> Histories:
    """The histories of a layout's tokens, for a convolution over `kernel` tokens."""
    segments, before = layout.segment_ids, kernel - 1
    at = jnp.arange(segments.shape[1])
    shared = jax.lax.cummax(jnp.where(segments == 0, at, -1), axis=1)
    shared = jnp.pad(shared, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    follows = jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1] == segments
    previous = before + jnp.where(follows & (segments >= 0), at - 1, shared)
    # Column K-2 is the last one of the state before the row.
    previous = jnp.concatenate([jnp.broadcast_to(jnp.arange(before) - 1, (len(segments), before)), previous], axis=1)
    previous = jnp.maximum(previous, 0)

    def chain(columns: jax.Array, length: int) -> jax.Array:
        chained = [columns]
        for _ in range(length - 1):
            chained.append(jnp.take_along_axis(previous, chained[-1], axis=1))
        return jnp.stack(chained, axis=-1)

    end = before + jnp.max(jnp.where(segments >= 0, at, -1), axis=1, keepdims=True)
    back = chain(jnp.broadcast_to(before + at, segments.shape), kernel)
    return Histories(back, chain(end, before)[:, 0, ::-1])


@dataclass(frozen=True)
class RowRecurrence:
    """The convolution and the recurrence of whole rows. past: those of the layout; before: the state that all rows
    follow, of one row."""

    layout: SequenceLayout
    past: Histories
    before: RecurrentState

    def convolve(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        earlier = jnp.broadcast_to(self.before.columns, (len(x), *self.before.columns.shape[1:])).astype(x.dtype)
        extended, taps = jnp.concatenate([earlier, x], axis=1), kernel.shape[-1]
        weighted = [
            kernel[:, taps - 1 - i] * jnp.take_along_axis(extended, self.past.back[..., i, None], axis=1)
            for i in range(taps)
        ]
        columns = jnp.take_along_axis(extended, self.past.last[..., None], axis=1)
        return _add(weighted, bias), columns

    def scan(
        self, query: jax.Array, key: jax.Array, value: jax.Array, decay: jax.Array, beta: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        rows, tokens = query.shape[:2]
        size = min(CHUNK, tokens)
        fill = -tokens % size

        def chunks(array: jax.Array, value: float = 0) -> jax.Array:
            padded = jnp.pad(array, ((0, 0), (0, fill), *((0, 0),) * (array.ndim - 2)), constant_values=value)
            return jnp.moveaxis(padded.reshape(rows, -1, size, *array.shape[2:]), 1, 0)

        before = self.before.heads
        assert before is not None
        heads = jnp.broadcast_to(before, (rows, *before.shape[1:]))
        carry = heads, heads, jnp.zeros(rows, jnp.int32)
        segments = chunks(self.layout.segment_ids, -1)
        query, key, value, decay, beta = jax.tree.map(chunks, (query, key, value, decay, beta))
        ancestors = _ancestors(segments)
        pairs = jax.vmap(_pairs)(query, key, decay, beta, ancestors)
        operands = (query, key, value), pairs, ancestors, segments
        (_, heads, _), out = jax.lax.scan(jax.checkpoint(_row_chunk, prevent_cse=False), carry, operands)
        return jnp.moveaxis(out, 0, 1).reshape(rows, tokens + fill, *out.shape[3:])[:, :tokens], heads

    def keep(self, columns: jax.Array, heads: Any = None) -> RecurrentState:
        return RecurrentState(columns, heads)


Carry = tuple[jax.Array, jax.Array, jax.Array]


def _ancestors(segments: jax.Array) -> jax.Array:
    """`bool[..., C, C]`: the tokens of a chunk (last axis) that each token's state sums over, itself included, from the
    segments `int32[..., C]` of the tokens."""
    at, real = jnp.arange(segments.shape[-1]), segments >= 0
    related = (segments[..., :, None] == segments[..., None, :]) | (segments == 0)[..., None, :]
    return related & (at <= at[:, None]) & real[..., None, :] & real[..., :, None]


def _row_chunk(carry: Carry, operands: Any) -> tuple[Carry, jax.Array]:
    """A chunk of whole rows. The carry is the state behind the tokens that all segments share, the state behind the
    last token, and that token's segment `int32[B]`."""
    (shared, current, segment), ((query, key, value), pairs, ancestors, segments) = carry, operands
    at, tokens = jnp.arange(segments.shape[1]), segments.shape[1]
    goes_on = (segments == segment[:, None]) & (segments > 0)

    def read(x: jax.Array) -> jax.Array:
        def of_both() -> jax.Array:
            with_current = jnp.tile(goes_on, x.shape[1] // tokens)
            return jnp.where(with_current[:, None, None, :, None], _read(current, x), _read(shared, x))

        # Most chunks lie within one sequence.
        products: jax.Array = jax.lax.cond(goes_on.all(), lambda: _read(current, x), of_both)
        return products

    out, updates = _chunk(query, key, value, pairs, read)

    def behind(is_token: jax.Array, heads: jax.Array) -> jax.Array:
        """The state behind the last of some tokens, from the state before the chunk where there is none."""
        last = jnp.max(jnp.where(is_token, at, 0), axis=1)
        earlier = jnp.take_along_axis(ancestors, last[:, None, None], axis=1)[:, 0]
        some = is_token.any(axis=1)[:, None, None, None, None]
        return jnp.where(some, updates.applied(heads, last, earlier), heads)

    is_token = segments >= 0
    last = jnp.take_along_axis(segments, jnp.max(jnp.where(is_token, at, 0), axis=1, keepdims=True), axis=1)[:, 0]
    last = jnp.where(is_token.any(axis=1), last, segment)
    stays = (last == segment)[:, None, None, None, None]
    is_shared = segments == 0
    shared_behind = jax.lax.cond(is_shared.any(), lambda: behind(is_shared, shared), lambda: shared)
    return (shared_behind, behind(is_token, jnp.where(stays, current, shared)), last), out


# ---------------------------------------------------------------------------------------------------------------
# Steps of decoding


@dataclass(frozen=True)
class StepRecurrence:
    """The convolution and the recurrence of the W tokens of a step. before: the state of the rows."""

    before: RecurrentState

    def convolve(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        columns = jnp.concatenate([self.before.columns.astype(x.dtype), x], axis=1)
        weighted = [kernel[:, i] * columns[:, i : i + x.shape[1]] for i in range(kernel.shape[-1])]
        return _add(weighted, bias), columns

    def scan(
        self, query: jax.Array, key: jax.Array, value: jax.Array, decay: jax.Array, beta: jax.Array | None = None
    ) -> tuple[jax.Array, Updates]:
        heads, width = self.before.heads, query.shape[1]
        assert heads is not None
        ancestors = jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (len(query), width, width))
        pairs = _pairs(query, key, decay, beta, ancestors)
        return _chunk(query, key, value, pairs, lambda x: _read(heads, x))

    def keep(self, columns: jax.Array, heads: Updates | None = None) -> DraftState:
        return DraftState(self.before, columns.astype(self.before.columns.dtype), heads)
