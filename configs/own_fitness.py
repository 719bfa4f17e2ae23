"""Fitness functions of one's own, for configs/own_fitness.yaml: one of each of the three forms.

A function on the host returns one number for each record, higher is better; NaN says that the candidate failed.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def weakest_token(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """By how much the weakest token of the answer leads over any other: above 0, the whole answer is written.

    Compiled into the scoring pass. logits: float32[Q, V], what the model says where the target's tokens
    `targets: int32[Q]` are due; `mask: bool[Q]` is False where a shorter row is filled up.
    """
    right = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    others = jnp.where(jax.nn.one_hot(targets, logits.shape[1], dtype=bool), -jnp.inf, logits).max(axis=1)
    return jnp.min(jnp.where(mask, right - others, jnp.inf))


def digits_and_ending(records: Sequence[Mapping[str, str]], texts: Sequence[str]) -> list[float]:
    """Half a point for the digits that are right, half for a Japanese ending: what a plain match cannot tell apart."""
    scores = []
    for record, text in zip(records, texts, strict=True):
        wanted, found = record["target"].split(), text.split()
        digits = [a == b for a, b in zip(wanted[:3], found[:3], strict=False)]
        scores.append(0.5 * sum(digits) / 3 + 0.5 * (found[3:] == wanted[3:]))
    return scores


def harder_sums_count_more(records: Sequence[Mapping[str, str]], log_probabilities: np.ndarray) -> np.ndarray:
    """The answers' log-probabilities, those to sums above 99 twice."""
    hard = np.array([record["target"].split()[2] != "0" for record in records])
    return log_probabilities * np.where(hard, 2.0, 1.0)
