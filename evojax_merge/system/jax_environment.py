"""The environment variables that JAX and XLA read, checked before either would end the process over one."""

import os
import re
from functools import cache
from pathlib import Path

from evojax_merge.errors import InputError, first_line, shown

FLAGS, PLATFORMS = "XLA_FLAGS", "JAX_PLATFORMS"
MAX_FILE_BYTES = 2**20
# JAX's defaults in place of a user's: checks that operations of evosax do not pass, and the random numbers of a seed.
SETTINGS = {
    "numpy_rank_promotion": "allow", "numpy_dtype_promotion": "standard", "transfer_guard": "allow",
    "debug_nans": False, "debug_infs": False, "default_prng_impl": "threefry2x32", "threefry_partitionable": True,
}  # fmt: skip


def check_environment() -> None:
    """Import JAX, with these settings. Raises InputError for variables that JAX or XLA cannot take."""
    flags = os.environ.get(FLAGS, "").strip()
    if flags and not flags.startswith("-"):
        # XLA takes such a value for the name of a file of flags, and would read a device without end.
        file = Path(flags)
        if not os.path.isfile(file) or file.stat().st_size > MAX_FILE_BYTES:
            raise InputError(FLAGS, f"{shown(flags)}; expected flags that begin with --, or a file of them")
    try:
        import jax
    except ValueError as error:
        raise InputError("environment", f"JAX cannot be started ({error})") from None
    for name, value in SETTINGS.items():
        jax.config.update(f"jax_{name}", value)
    if flags:
        _try_flags(flags)


@cache
def _try_flags(flags: str) -> None:
    """Raises InputError where XLA does not know the environment's flags. It ends the process that parses such flags, so
    a child parses them first, once."""
    from jax._src.lib import xla_client

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        try:
            _ = xla_client.CompileOptions().executable_build_options.debug_options
        finally:
            os._exit(0)
    os.close(write)
    with open(read, errors="replace") as pipe:
        output = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        first = re.sub(r"^\w+ [\d:. ]+ \S+:\d+\] ", "", output.partition("\n")[0] or "no reason given")
        raise InputError(FLAGS, f"XLA does not take them ({first})")


def no_devices(error: RuntimeError) -> InputError:
    """The InputError for JAX's error about devices that could not be started."""
    given = os.environ.get(PLATFORMS)
    if not given:
        return InputError("JAX", f"finds no devices ({first_line(error)})")
    return InputError(PLATFORMS, f"{shown(given)}; expected cpu, cuda or tpu, or leave it out ({first_line(error)})")
