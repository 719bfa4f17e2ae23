"""Greedy generation of a population over one batch of prompts. May import models' other files.

`start` reads prompts, in parts of their own widths; then `continue_` writes on after all of them together, in several
calls, so that the host can look at what was written so far. Sequences that ended, by a stop token or because the host
says so, are no longer written.

A pass reads all weights to write a token, and would read as much to write a few. So each pass is given a *window*: the
last token, and a guess at what follows it, looked up in what other candidates wrote after the same prompt, in the
prompt, and in the text itself. What the model writes after each of them is computed side by side; as far as the guess
was what the model writes, it is kept (speculative decoding, arXiv 2211.17192, in its greedy form, with a look-up in
place of a smaller model, as in prompt look-up decoding). The text is the one that a window of one token gives.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import Cache, Columns, columns_of, forward, likeliest, step
from evojax_merge.models.sources import Apart, Stored

# What stands in the output after a sequence has ended.
ENDED = -1
# What stands there where the model gave no finite logits.
BROKEN = -2
# How many of a text's last tokens are compared with the places that its continuation is looked up in.
LOOK = 4


@struct.dataclass
class Writing:
    """Where P candidates stand on B prompts; every leaf has the leading axis P. tokens: int32[P, B, new], what each has
    written, `ENDED` behind it; made: int32[P, B], how many those are, the last of them not yet in the cache; cache: of
    each layer, without the axis L; first: int32[P, B], the column of each prompt's first token; done: bool[P, B], the
    sequences that have ended."""

    tokens: jax.Array
    made: jax.Array
    cache: tuple[Cache, ...]
    first: jax.Array
    done: jax.Array


# A member of the population -> its model, to read with and to write with.
Reader = Callable[[Any], Stored]
Writer = Callable[[Any], Stored | Apart]


def blank(config: DecoderConfig, dtype: str, size: int, rows: int, width: int, new: int, window: int) -> Writing:
    """Room for `size` candidates to write up to `new` tokens, `window` in a pass, after `rows` prompts of up to `width`
    tokens; none has been read, and so all are done."""
    room, heads, dim = width + new + window - 1, (size, config.kv_heads, rows), config.head_dim
    cache = tuple(
        Cache(jnp.zeros((*heads, dim, room), jnp.dtype(dtype)), jnp.zeros((*heads, room, dim), jnp.dtype(dtype)))
        for _ in range(config.layers)
    )
    nothing = jnp.zeros((size, rows), jnp.int32)
    return Writing(jnp.full((size, rows, new), ENDED, jnp.int32), nothing, cache, nothing + width - 1, nothing == 0)


def start(
    config: DecoderConfig,
    source_of: Reader,
    members: Any,
    writing: Writing,
    width: int,
    row: jax.Array,
    tokens: jax.Array,
    first: jax.Array,
    stop: tuple[int, ...],
    prefix: Cache | None = None,
) -> Writing:
    """Read prompts `int32[B, T]`, padded at the left, behind a prefix (leading axis P) where there is one, as the rows
    from `row` on of what has room for prompts of `width`, and write a first token after each.

    members: P of them, leading axis P on every leaf; stop: token ids that end a sequence and are not part of it.
    """
    own = tokens.shape[1]
    plain = columns_of(own, first, own - first)
    before = 0 if prefix is None else prefix.width
    columns = Columns(before + plain.positions, plain.branches)

    def read(member: Any, prefix: Cache | None) -> tuple[jax.Array, Cache]:
        model = source_of(member)
        hidden, cache = forward(config, model, tokens, columns, prefix=prefix, keep_cache=True)
        assert cache is not None
        return _greedy(config, model, hidden[:, -1]), cache

    def put(there: jax.Array, fresh: jax.Array, *at: jax.Array | int) -> jax.Array:
        return jax.lax.dynamic_update_slice(there, fresh.astype(there.dtype), at)

    token, fresh = _each(read, members, prefix)
    done, column = _among(token, stop), width - own
    cache = tuple(
        Cache(
            put(kept.keys, fresh.keys[:, i], 0, 0, row, 0, column),
            put(kept.values, fresh.values[:, i], 0, 0, row, column, 0),
        )
        for i, kept in enumerate(writing.cache)
    )
    return Writing(
        put(writing.tokens, jnp.where(done, ENDED, token)[..., None], 0, row, 0),
        put(writing.made, jnp.where(done, 0, 1), 0, row),
        cache,
        put(writing.first, jnp.broadcast_to(first + column, token.shape), 0, row),
        put(writing.done, done | (writing.tokens.shape[-1] == 1), 0, row),
    )


def continue_(
    config: DecoderConfig,
    source_of: Writer,
    members: Any,
    writing: Writing,
    passes: int,
    window: int,
    stop: tuple[int, ...],
    prompts: jax.Array,
    seen: jax.Array,
    prefix: Cache | None = None,
) -> Writing:
    """Up to `passes` further passes, each of which writes 1 to `window` tokens of every sequence; `BROKEN` where logits
    are not finite. prompts: int32[B, T], as they were read; seen: int32[B, M], any texts that the continuations are
    likely to have parts of, negative where there is none."""
    width, new = prompts.shape[1], writing.tokens.shape[-1]
    # One set of prompts for the whole population.
    first = writing.first[0]
    # A population of one goes without its axis: the compiler would copy every cache to put it on and take it off.
    alone = writing.made.shape[0] == 1
    given_all = (members, writing, prefix)
    members, writing, prefix = jax.tree.map(lambda leaf: leaf[0], given_all) if alone else given_all

    def unfinished(carry: Any) -> jax.Array:
        number, writing = carry
        return (number < passes) & ~writing.done.all()

    def body(carry: Any) -> Any:
        number, writing = carry
        # Without guesses all that still write stand in one column: the caches are then written in place.
        together = width + jnp.max(jnp.where(writing.done, 0, writing.made)) - 1 if window == 1 else None

        def further(
            member: Any, cache: tuple[Cache, ...], tokens: jax.Array, made: jax.Array, prefix: Cache | None
        ) -> tuple[jax.Array, jax.Array, tuple[Cache, ...]]:
            model = source_of(member)
            text = jnp.concatenate([seen, prompts, tokens], axis=1)
            column = width + made - 1
            given = look_up_next(text, seen.shape[1] + column, window)
            hidden, cache = step(config, model, cache, column if together is None else together, given, first, prefix)
            return given, _greedy(config, model, hidden), cache

        run = further if alone else jax.vmap(further)
        given, found, cache = run(members, writing.cache, writing.tokens, writing.made, prefix)
        # What follows the last token is right, and what follows a token that was guessed rightly.
        right = jnp.cumprod(found[..., :-1] == given[..., 1:], axis=-1).sum(axis=-1) + 1
        stops = _among(found, stop)
        ends = jnp.where(stops.any(axis=-1), jnp.argmax(stops, axis=-1), window)
        kept = jnp.where(writing.done, 0, jnp.minimum(jnp.minimum(right, ends), new - writing.made))
        place = jnp.arange(new) - writing.made[..., None]
        fresh = jnp.take_along_axis(found, jnp.clip(place, 0, window - 1), axis=-1)
        tokens = jnp.where((place >= 0) & (place < kept[..., None]), fresh, writing.tokens)
        made = writing.made + kept
        done = writing.done | (ends < right) | (made >= new)
        return number + 1, Writing(tokens, made, cache, writing.first, done)

    writing = jax.lax.while_loop(unfinished, body, (jnp.int32(0), writing))[1]
    return jax.tree.map(lambda leaf: leaf[None], writing) if alone else writing


def look_up_next(text: jax.Array, last: jax.Array, window: int) -> jax.Array:
    """The tokens in column `last: int32[B]` of texts `int32[B, M]`, and a guess at the `window - 1` that follow them:
    what follows the place before it whose last `LOOK` tokens are most like the text's; of equals, the latest."""
    columns = jnp.arange(text.shape[1])
    alike = jnp.ones(text.shape, bool)
    length = jnp.zeros(text.shape, jnp.int32)
    for back in range(LOOK):
        token = jnp.take_along_axis(text, jnp.maximum(last - back, 0)[:, None], axis=1)
        alike &= (jnp.roll(text, back, axis=1) == token) & (columns >= back)
        length += alike
    earlier = columns < last[:, None]
    best = jnp.argmax(jnp.where(earlier, length * text.shape[1] + columns, -1), axis=1)
    follows = jnp.take_along_axis(text, best[:, None] + jnp.arange(window), axis=1, mode="clip")
    own = jnp.take_along_axis(text, last[:, None], axis=1)
    return jnp.concatenate([own, follows[:, 1:]], axis=1)


def _each(function: Callable[..., Any], *members: Any) -> Any:
    """`function` for every member of the population."""
    if jax.tree.leaves(members)[0].shape[0] > 1:
        return jax.vmap(function)(*members)
    # A population axis of one would make batched products of plain ones, which are slower.
    return jax.tree.map(lambda leaf: leaf[None], function(*jax.tree.map(lambda leaf: leaf[0], members)))


def _among(tokens: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    return (tokens[..., None] == jnp.asarray(stop or (ENDED,), jnp.int32)).any(-1)


def _greedy(config: DecoderConfig, model: Stored | Apart, hidden: jax.Array) -> jax.Array:
    best, most = likeliest(config, model, hidden)
    # What is found is finite only where all are, but for minus infinities.
    return jnp.where(jnp.isfinite(most), best, BROKEN)
