"""How JAX is started: the environment variables that it and XLA read, checked before either would end the process over
one, and the folder of compiled programs."""

import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from evojax_merge.errors import InputError, first_line, shown

# The most bytes of compiled programs that are kept: those used longest ago go first.
MAX_COMPILED_BYTES = 4 * 2**30
FLAGS, PLATFORMS = "XLA_FLAGS", "JAX_PLATFORMS"
MAX_FILE_BYTES = 2**20


def check_environment() -> None:
    """Import JAX. Raises InputError for variables that JAX or XLA cannot take."""
    flags = os.environ.get(FLAGS, "").strip()
    if flags and not flags.startswith("-"):
        # XLA takes such a value for the name of a file of flags, and would read a device without end.
        file = Path(flags)
        if not os.path.isfile(file) or file.stat().st_size > MAX_FILE_BYTES:
            raise InputError(FLAGS, f"{shown(flags)}; expected flags that begin with --, or a file of them")
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise InputError("environment", f"JAX cannot be started ({error})") from None
    if flags:
        _try_flags()


@cache
def keep_compiled_programs() -> None:
    """Have JAX keep every compiled program in the user's cache folder, and take it from there in later processes.
    Environment variables of JAX's cache take precedence, and so does a folder that a Python program has chosen."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.values["jax_compilation_cache_dir"] is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evojax-merge" / "compiled"
    # A search runs a hundred programs that compile in no time, and together take seconds.
    options = {"compilation_cache_dir": str(folder), "persistent_cache_min_compile_time_secs": 0.0}
    for option, value in options.items():
        if f"JAX_{option.upper()}" not in os.environ:
            jax.config.update(f"jax_{option}", value)
    # JAX looks for a cache at its first compilation, which may have been before.
    compilation_cache.reset_cache()
    _remove_oldest(folder)


def _remove_oldest(folder: Path) -> None:
    """Remove compiled programs, those used longest ago first, until the others have at most MAX_COMPILED_BYTES. JAX's
    own limit would look at all of them whenever it adds one."""
    with suppress(OSError):
        programs = [(file.stat(), file) for file in folder.glob("*-cache")]
        excess = sum(status.st_size for status, _ in programs) - MAX_COMPILED_BYTES
        for status, file in sorted(programs, key=lambda pair: max(pair[0].st_atime, pair[0].st_mtime)):
            if excess <= 0:
                break
            file.unlink()
            excess -= status.st_size


def _try_flags() -> None:
    """Raises InputError for flags that XLA does not know. XLA ends the process that parses such flags, so a child
    parses them first."""
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
