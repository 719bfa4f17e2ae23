"""Compiled programs: the folder that keeps them for later processes, and counts of those that this process compiled."""

import os
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.monitoring
from jax.experimental.compilation_cache import compilation_cache

from evojax_merge.system.data_packages import cache_folder
from evojax_merge.system.file_system import remove_file

# The most bytes of compiled programs that are kept: those used longest ago go first.
MAX_COMPILED_BYTES = 4 * 2**30
_HIT = "/jax/compilation_cache/cache_hits"
_BEGUN = "/jax/compilation_cache/compile_requests_use_cache"
_REQUEST = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_retrieval_time_sec"


@cache
def keep_compiled_programs() -> None:
    """Have JAX keep every compiled program in the user's cache folder, and take it from there in later processes.
    Environment variables of JAX's cache take precedence, and so does a folder that a Python program has chosen."""
    if jax.config.values["jax_compilation_cache_dir"] is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        return
    folder = cache_folder() / "compiled"
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
    with suppress(OSError), os.scandir(folder) as entries:
        programs = [(entry.stat(), entry.path) for entry in entries if entry.name.endswith("-cache")]
        excess = sum(status.st_size for status, _ in programs) - MAX_COMPILED_BYTES
        if excess > 0:
            programs.sort(key=lambda pair: max(pair[0].st_atime, pair[0].st_mtime))
        for status, path in programs:
            if excess <= 0:
                break
            remove_file(Path(path))
            excess -= status.st_size


@dataclass(frozen=True)
class Compilations:
    """compiled: programs, in `seconds`; kept: programs that an earlier process had compiled."""

    compiled: int
    seconds: float
    kept: int

    def __sub__(self, earlier: "Compilations") -> "Compilations":
        return Compilations(self.compiled - earlier.compiled, self.seconds - earlier.seconds, self.kept - earlier.kept)

    def describe(self) -> str:
        """A line about them."""
        kept = f"; {self.kept:,} were kept from before" if self.kept else ""
        return f"compiling took {self.seconds:.1f} s, for {self.compiled:,} programs{kept}"


def compilations() -> Compilations:
    """The compilations since the first call."""
    counts, seconds = _listening()
    return Compilations(counts[_REQUEST] - counts[_HIT], seconds[_REQUEST] - seconds[_READ], counts[_HIT])


def is_compiling() -> bool:
    """Return whether a program is being compiled, or read from the folder, by this process."""
    counts, _ = _listening()
    return counts[_BEGUN] > counts[_REQUEST]


@cache
def _listening() -> tuple[Counter[str], defaultdict[str, float]]:
    """The numbers and the seconds of JAX's events by name, which grow."""
    counts, seconds = Counter[str](), defaultdict[str, float](float)

    def on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
        counts[event] += 1
        seconds[event] += duration_secs

    jax.monitoring.register_event_listener(lambda event, **kwargs: counts.update([event]))
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    return counts, seconds
