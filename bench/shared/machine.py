"""The machine that a benchmark runs on. May import JAX, where it is loaded already."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def processor() -> str:
    """The processor's name as the kernel gives it, and its widest vector instructions: clouds give one name to
    machines of which one computes three times as fast as the other."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = dict(reversed([line.partition(":")[::2] for line in lines if ":" in line]))
    told = {key.strip(): value.strip() for key, value in told.items()}
    flags = told.get("flags", "").split()
    widest = next((f" with {name}" for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    return told.get("model name", platform.machine()) + widest


def host() -> str:
    """The processor, and how many cores there are for this process."""
    cores = len(os.sched_getaffinity(0))
    return f"{processor()}, {cores} core{'s' if cores > 1 else ''}"


def describe() -> str:
    """One line: processor, cores, JAX and its device."""
    import jax

    software = f"Python {platform.python_version()}, JAX {jax.__version__}"
    return f"{host()}; {software} on {jax.devices()[0].device_kind}"


def device_name() -> str:
    """The name of JAX's device; for a CPU, that of its processor."""
    import jax

    device = jax.devices()[0]
    return host() if device.platform == "cpu" else device.device_kind


# ---------------------------------------------------------------------------------------------------------------
# Time, and what it is compared with


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median_seconds(run: Callable[[], Any], times: int) -> float:
    """The median over `times` runs, after one that is not counted."""
    run()
    return float(np.median([seconds_of(run) for _ in range(times)]))


# Rows, inner axis and columns of matrix products, of which one is the device's best; bytes of an array that no cache
# holds.
CPU_PRODUCTS = ((2048, 2048, 2048), (4096, 1024, 4096), (1536, 576, 1536), (4096, 4096, 4096))
ACCELERATOR_PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 16384))
CPU_COPY_BYTES, ACCELERATOR_COPY_BYTES = 2**28, 2**31


def matrix_peak(dtype: str = "float32") -> float:
    """FLOP per second of the device's best matrix product of operands of a dtype, over a few sizes."""
    import jax
    import jax.numpy as jnp

    def rate(rows: int, inner: int, columns: int) -> float:
        a, b = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        product = jax.jit(jnp.matmul)
        return 2 * rows * inner * columns / median_seconds(lambda: product(a, b).block_until_ready(), 5)

    sizes = CPU_PRODUCTS if jax.devices()[0].platform == "cpu" else ACCELERATOR_PRODUCTS
    return max(rate(*size) for size in sizes)


def copy_bandwidth() -> float:
    """Bytes per second, read and written together, of one addition to a large array, into memory of its own."""
    import jax
    import jax.numpy as jnp

    nbytes = CPU_COPY_BYTES if jax.devices()[0].platform == "cpu" else ACCELERATOR_COPY_BYTES
    x = jnp.zeros(nbytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * nbytes / median_seconds(lambda: add(x).block_until_ready(), 5)
