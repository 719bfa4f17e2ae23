"""Random numbers for strategies that draw on the host."""

import jax
import numpy as np


def generator(key: jax.Array) -> np.random.Generator:
    """NumPy's random numbers, from a key of JAX."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
