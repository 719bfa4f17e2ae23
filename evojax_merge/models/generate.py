"""Greedy generation of a population over one batch of prompts. May import models' other files."""

from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import Cache, forward, logits, step
from evojax_merge.models.sources import Stored

# What stands in the output after a sequence has ended.
ENDED = -1
# What stands there where the model gave no finite logits.
BROKEN = -2


def generate(
    config: DecoderConfig,
    models: Stored,
    tokens: jax.Array,
    first: jax.Array,
    max_new_tokens: int,
    stop: tuple[int, ...],
) -> jax.Array:
    """Greedy continuations `int32[P, B, max_new_tokens]`, `ENDED` after a stop token (which is not included),
    `BROKEN` where logits are not finite.

    models: P stored models, leading axis P on every leaf; tokens: int32[B, T], padded at the left; first:
    int32[B], the column of each prompt's first token; stop: token ids that end a sequence.
    """
    batch, width = tokens.shape
    stops = jnp.asarray(stop or (ENDED,), jnp.int32)

    def prefill(model: Stored) -> tuple[jax.Array, Cache]:
        hidden, cache = forward(config, model, tokens, first, width - first, keep_cache=True)
        assert cache is not None
        room = [(0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0)]
        cache = Cache(jnp.pad(cache.keys, room), jnp.pad(cache.values, room))
        return _greedy(config, model, hidden[:, -1]), cache

    def advance(model: Stored, cache: Cache, column: jax.Array, last: jax.Array) -> tuple[jax.Array, Cache]:
        hidden, cache = step(config, model, cache, column, last, first)
        return _greedy(config, model, hidden), cache

    # The column is one number for the whole population: the candidates' caches are then written in place.
    advance_all = jax.vmap(advance, in_axes=(0, 0, None, 0))
    token, cache = jax.vmap(prefill)(models)
    out = jnp.full((token.shape[0], batch, max_new_tokens), ENDED, jnp.int32)

    def unfinished(carry: Any) -> jax.Array:
        made, _, _, _, done = carry
        return (made < max_new_tokens) & ~done.all()

    def body(carry: Any) -> Any:
        made, token, cache, out, done = carry
        done = done | (token[..., None] == stops).any(-1)
        out = jax.lax.dynamic_update_slice(out, jnp.where(done, ENDED, token)[..., None], (0, 0, made))
        # The last round's step is not needed, but a branch in the loop would cost more than it saves.
        token, cache = advance_all(models, cache, width + made, token)
        return made + 1, token, cache, out, done

    done = jnp.zeros(token.shape, bool)
    carry = (jnp.int32(0), token, cache, out, done)
    return jax.lax.while_loop(unfinished, body, carry)[3]


def _greedy(config: DecoderConfig, model: Stored, hidden: jax.Array) -> jax.Array:
    scores = logits(config, model, hidden)
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(scores).all(axis=-1), best, BROKEN)
