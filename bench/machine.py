"""What a benchmark ran on. May import JAX, where it is loaded already."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe() -> str:
    """One line: processor, cores, JAX and its device."""
    import jax

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    software = f"Python {platform.python_version()}, JAX {jax.__version__}"
    return f"{processor()}, {cores} cores; {software} on {device.device_kind}"
