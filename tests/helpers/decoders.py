"""The program's own decoder on plain rows of tokens."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def load_decoder(folder: Path) -> tuple[Any, Any]:
    """A folder's config, and its weights as a model."""
    from evojax_merge.checkpoints.bank import load_stored
    from evojax_merge.checkpoints.parents import open_sources

    sources, config = open_sources([folder])
    return config, load_stored(sources, config)


@partial(jax.jit, static_argnums=0)
def logits(config: Any, model: Any, tokens: Any) -> jax.Array:
    """float32[R, T, V] of plain rows, tokens int[R, T], by a stored model as it is scored."""
    from evojax_merge.models import decoder

    return decoder.logits(config, model, hidden_states(config, model.in_place(tuple(config.parts)), tokens))


def stored_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The logits of a folder's model."""
    return np.asarray(logits(*load_decoder(folder), tokens))


def hidden_states(config: Any, source: Any, tokens: Any, first: Any = None, length: Any = None) -> jax.Array:
    """The decoder's final states of plain rows, without padding unless `first` and `length` tell of it."""
    from evojax_merge.models.decoder import forward
    from evojax_merge.models.layers import padded_layout

    rows, width = tokens.shape
    first = jnp.zeros(rows, jnp.int32) if first is None else jnp.asarray(first, jnp.int32)
    length = width - first if length is None else jnp.asarray(length, jnp.int32)
    return forward(config, source, jnp.asarray(tokens, jnp.int32), padded_layout(width, first, length))[0]


def greedy_tokens(
    config: Any, model: Any, tokens: Any, first: Any, new: int, stop: tuple[int, ...], window: int = 1,
    seen: Any = None, draws: Any = None,
) -> np.ndarray:  # fmt: skip
    """Continuations int32[B, new] of prompts that are padded at the left, by one stored model: greedy ones, or drawn
    ones."""
    tokens = jnp.asarray(tokens, jnp.int32)
    seen = jnp.zeros((len(tokens), 0), jnp.int32) if seen is None else jnp.asarray(seen, jnp.int32)
    return np.asarray(_greedy(config, new, stop, window, model, tokens, jnp.asarray(first, jnp.int32), seen, draws))[0]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _greedy(
    config: Any,
    new: int,
    stop: tuple[int, ...],
    window: int,
    model: Any,
    tokens: Any,
    first: Any,
    seen: Any,
    draws: Any,
) -> jax.Array:
    from evojax_merge.models.decoder import scatter_columns
    from evojax_merge.models.generate import decode, init_decode_state, prefill

    def alone(_: Any) -> Any:
        return model

    members, (rows, width) = jnp.zeros(1), tokens.shape
    decode_state = init_decode_state(config, model.compute_dtype, 1, rows, width, new, window)
    decode_state = prefill(config, alone, members, decode_state, width, jnp.int32(0), tokens, first, stop, draws=draws)
    return decode(
        config, alone, members, decode_state, new, window, scatter_columns, stop, (tokens, seen), draws=draws
    ).tokens


def score_merges(evaluator: Any, bank: Any, spec: Any, recipes: Any, *progress: Any) -> Any:
    """The scores of P merges of a bank."""
    return evaluator.score(evaluator.merges(bank, spec, recipes), *progress)


def differentiate_merges(evaluator: Any, bank: Any, spec: Any, recipes: Any) -> tuple[Any, Any]:
    """The scores of P merges of a bank, and the derivatives of their fitness."""
    return evaluator.differentiate(evaluator.merges(bank, spec, recipes))
