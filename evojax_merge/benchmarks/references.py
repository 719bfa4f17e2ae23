"""The references of the benchmarks: seconds of a run, the best matrix product of the device, and its own copy."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Rows, inner axis and columns of matrix products, of which one is the device's best, from the smallest; bytes of an
# array that no cache holds.
CPU_PRODUCTS = ((1536, 576, 1536), (2048, 2048, 2048), (4096, 1024, 4096), (4096, 4096, 4096))
ACCELERATOR_PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 16384))
CPU_COPY_BYTES, ACCELERATOR_COPY_BYTES = 2**28, 2**31
# Runs that a reference is the median of.
RUNS = 5


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median_seconds(run: Callable[[], Any], times: int, enough: float = math.inf) -> float:
    """The median over `times` runs, after one that is not counted; over fewer where they have taken `enough` seconds
    together."""
    run()
    seconds = [seconds_of(run)]
    while len(seconds) < times and sum(seconds) < enough:
        seconds.append(seconds_of(run))
    return float(np.median(seconds))


def _wait(run: Callable[[], jax.Array]) -> None:
    run().block_until_ready()


def matrix_peak(dtype: str = "float32", enough: float = math.inf) -> float:
    """FLOP per second of the device's best matrix product of operands of a dtype, over a few sizes; over the smaller
    ones alone where these have taken `enough` seconds."""
    rates, begun = list[float](), time.perf_counter()
    for rows, inner, columns in CPU_PRODUCTS if jax.devices()[0].platform == "cpu" else ACCELERATOR_PRODUCTS:
        a, b = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        product = partial(jax.jit(jnp.matmul), a, b)
        seconds = median_seconds(partial(_wait, product), RUNS, enough)
        rates.append(2 * rows * inner * columns / seconds)
        if time.perf_counter() - begun >= enough:
            break
    return max(rates)


def copy_bandwidth(enough: float = math.inf) -> float:
    """Bytes per second, read and written together, of one addition to a large array in place; `enough`: seconds after
    which fewer runs do. Into fresh memory a CPU's system would have to map every page first, which takes far longer."""
    nbytes = CPU_COPY_BYTES if jax.devices()[0].platform == "cpu" else ACCELERATOR_COPY_BYTES
    x = jnp.zeros(nbytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run() -> None:
        nonlocal x
        x = add(x).block_until_ready()

    return 2 * nbytes / median_seconds(run, RUNS, enough)
