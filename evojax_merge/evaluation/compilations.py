"""Counts of the programs that this process has compiled, and of those that the folder of compiled programs had."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache

import jax.monitoring

_HIT = "/jax/compilation_cache/cache_hits"
_REQUEST = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_retrieval_time_sec"


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


@cache
def _listening() -> tuple[Counter[str], defaultdict[str, float]]:
    """The numbers and the seconds of JAX's events by name, which grow."""
    counts, seconds = Counter[str](), defaultdict[str, float](float)

    def on_event(event: str, **kwargs: str | int) -> None:
        counts[event] += 1

    def on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
        counts[event] += 1
        seconds[event] += duration_secs

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    return counts, seconds
