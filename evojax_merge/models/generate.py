"""Greedy generation of a population over one batch of prompts. May import models' other files.

In two programs, so that the host can look at what was written so far: `start` reads the prompts, `continue_` writes a
number of further tokens. Sequences that ended, by a stop token or because the host says so, are no longer written.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import Cache, Columns, columns_of, forward, logits, step
from evojax_merge.models.sources import Stored

# What stands in the output after a sequence has ended.
ENDED = -1
# What stands there where the model gave no finite logits.
BROKEN = -2


@struct.dataclass
class Writing:
    """Where P candidates stand on B prompts; every leaf has the leading axis P. token: int32[P, B], the next token of
    each, not yet in the cache; first: int32[P, B], the column of each prompt's first token; column: int32[P], where the
    next token goes, the same for all; done: bool[P, B], the sequences that have ended."""

    token: jax.Array
    cache: Cache
    first: jax.Array
    column: jax.Array
    done: jax.Array


# A member of the population -> its model.
SourceOf = Callable[[Any], Stored]


def start(
    config: DecoderConfig,
    source_of: SourceOf,
    members: Any,
    tokens: jax.Array,
    first: jax.Array,
    room: int,
    prefix: Cache | None = None,
) -> Writing:
    """Read prompts `int32[B, T]`, padded at the left, behind a prefix (leading axis P) where there is one.

    members: P of them, leading axis P on every leaf; room: for how many further tokens the cache has space.
    """
    width = tokens.shape[1]
    plain = columns_of(width, first, width - first)
    before = 0 if prefix is None else prefix.width
    columns = Columns(before + plain.positions, plain.branches)

    def read(member: Any, prefix: Cache | None) -> tuple[jax.Array, Cache]:
        model = source_of(member)
        hidden, cache = forward(config, model, tokens, columns, prefix=prefix, keep_cache=True)
        assert cache is not None
        still, more = (0, 0), (0, room)
        keys = jnp.pad(cache.keys, [still, still, still, still, more])
        return _greedy(config, model, hidden[:, -1]), Cache(
            keys, jnp.pad(cache.values, [still, still, still, more, still])
        )

    token, cache = _each(read, members, prefix)
    size = token.shape[0]
    return Writing(
        token,
        cache,
        jnp.broadcast_to(first, (size, *first.shape)),
        jnp.full(size, width, jnp.int32),
        jnp.zeros(token.shape, bool),
    )


def continue_(
    config: DecoderConfig,
    source_of: SourceOf,
    members: Any,
    writing: Writing,
    count: int,
    stop: tuple[int, ...],
    prefix: Cache | None = None,
) -> tuple[jax.Array, Writing]:
    """Up to `count` further tokens, int32[P, B, count]: `ENDED` after a stop token (which is not included), `BROKEN`
    where logits are not finite. stop: token ids that end a sequence."""
    stops = jnp.asarray(stop or (ENDED,), jnp.int32)
    # One column and one set of prompts for the whole population: the candidates' caches are then written in place.
    first, column = writing.first[0], writing.column[0]

    def unfinished(carry: Any) -> jax.Array:
        made, _, _, _, done = carry
        return (made < count) & ~done.all()

    def body(carry: Any) -> Any:
        made, token, cache, out, done = carry
        done = done | (token[..., None] == stops).any(-1)
        out = jax.lax.dynamic_update_slice(out, jnp.where(done, ENDED, token)[..., None], (0, 0, made))

        def further(member: Any, cache: Cache, last: jax.Array, prefix: Any) -> tuple[jax.Array, Cache]:
            model = source_of(member)
            hidden, cache = step(config, model, cache, column + made, last, first, prefix)
            return _greedy(config, model, hidden), cache

        # The very last step is not needed, but a branch in the loop would cost more than it saves.
        token, cache = _each(further, members, cache, token, prefix)
        return made + 1, token, cache, out, done

    out = jnp.full((*writing.token.shape, count), ENDED, jnp.int32)
    carry = (jnp.int32(0), writing.token, writing.cache, out, writing.done)
    made, token, cache, out, done = jax.lax.while_loop(unfinished, body, carry)
    return out, Writing(token, cache, writing.first, writing.column + made, done)


def _each(function: Callable[..., Any], *members: Any) -> Any:
    """`function` for every member of the population."""
    if jax.tree.leaves(members)[0].shape[0] > 1:
        return jax.vmap(function)(*members)
    # A population axis of one would make batched products of plain ones, which are slower.
    return jax.tree.map(lambda leaf: leaf[None], function(*jax.tree.map(lambda leaf: leaf[0], members)))


def _greedy(config: DecoderConfig, model: Stored, hidden: jax.Array) -> jax.Array:
    scores = logits(config, model, hidden)
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    # A NaN counts as the largest, so that what is found is finite only where all are, but for minus infinities.
    most = jnp.take_along_axis(scores, best[..., None], axis=-1)[..., 0]
    return jnp.where(jnp.isfinite(most), best, BROKEN)
