"""The machine that a benchmark runs on. May import JAX, where it is loaded already."""

import os
import platform
from pathlib import Path


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
