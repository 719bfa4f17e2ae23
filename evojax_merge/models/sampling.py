"""Sampling of tokens by temperature, top-k and top-p, with noise that depends on a seed and a position alone.

A token is the argmax of its logits plus Gumbel noise, which is a draw from their softmax. The noise of a position does
not depend on the batch, so draft tokens can be verified as in greedy decoding: the text is that of single steps.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct


@dataclass(frozen=True)
class Sampler:
    """The distribution of a token, given its logits: their softmax at `temperature`, above 0, on the `top_k` largest
    (None: on all), and of these on the fewest whose probabilities sum to `top_p` or more. Tokens that are as probable
    as the last one stay as well."""

    temperature: float
    top_p: float = 1.0
    top_k: int | None = None

    def log_weights(self, logits: jax.Array) -> jax.Array:
        """The logits `[…, V]` of the distribution, minus infinity for tokens that are left out."""
        scaled = logits / self.temperature
        if self.top_k is None and self.top_p >= 1:
            return scaled
        vocab = logits.shape[-1]
        largest = jax.lax.top_k(scaled, vocab if self.top_k is None else min(self.top_k, vocab))[0]
        probabilities = jax.nn.softmax(largest, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The first one stays, however small top_p is.
        stays = (before < self.top_p).at[..., 0].set(True)
        least = jnp.min(jnp.where(stays, largest, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scaled >= least, scaled, -jnp.inf)


@struct.dataclass
class Draws:
    """The random draws of B sequences. seeds: uint32[B, 2], one seed for each sequence."""

    seeds: jax.Array
    sampler: Sampler = struct.field(pytree_node=False)

    def tokens(self, logits: jax.Array, first: jax.Array | int) -> jax.Array:
        """The sequences' tokens int32[B, T], drawn from logits `[B, T, V]`. first: int32[B], the number of tokens that
        were generated before the first of the T."""
        rows, width, vocab = logits.shape
        numbers = jnp.broadcast_to(first, rows)[:, None] + jnp.arange(width)

        def noise(seed: jax.Array, number: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), number)
            return jax.random.gumbel(key, (vocab,), jnp.float32)

        noises = jax.vmap(jax.vmap(noise, (None, 0)))(self.seeds, numbers)
        return jnp.argmax(self.sampler.log_weights(logits) + noises, axis=-1).astype(jnp.int32)
