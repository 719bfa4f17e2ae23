"""Files for programs that watch a search: one that is touched while it works, and one with its figures."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import jax

from evojax_merge.errors import Failed, InputError, first_line, print_warning
from evojax_merge.search.recording import Generation
from evojax_merge.system.file_system import OutputFile

# Name, kind and meaning of each figure, and how it is read off a generation.
FIGURES = (
    ("generation", "counter", "the last finished generation", lambda g: g.number),
    ("generations", "gauge", "generations that are wanted", lambda g: g.generations),
    ("best_fitness", "gauge", "the best fitness so far, on all examples", lambda g: g.best_so_far),
    ("seconds_per_candidate", "gauge", "in the last generation's evaluation", lambda g: g.seconds / g.population),
    ("failed_candidates", "gauge", "candidates of the last generation without a finite fitness", lambda g: g.failed),
    ("seconds_left", "gauge", "about the seconds until the end", lambda g: g.seconds_left),
)  # fmt: skip
PREFIX, MARK = "evojax_merge_", b"# HELP evojax_merge_"
# Seconds between two touches, at least.
TOUCH_EVERY = 1.0


@dataclass
class Monitor:
    """The files of programs that watch a search. heartbeat: is touched at each pass; metrics: is written after each
    generation, in Prometheus' text format; None: nobody asked for it."""

    heartbeat: Path | None = None
    metrics: Path | None = None
    _touched: float = field(default=-TOUCH_EVERY, init=False, repr=False)

    def outputs(self) -> list[OutputFile | None]:
        """The files. Neither takes the place of one that this program did not write: a heartbeat's is empty."""
        heartbeat = self.heartbeat and OutputFile(self.heartbeat, "--heartbeat", "is no heartbeat", lambda content: 0)
        metrics = self.metrics and OutputFile(
            self.metrics, "--metrics", "holds no metrics", lambda content: content.startswith(MARK)
        )
        return [heartbeat or None, metrics or None]

    def passed(self) -> None:
        """Say that work goes on."""
        now = time.monotonic()
        if self.heartbeat is not None and now - self._touched >= TOUCH_EVERY:
            self._touched = now
            try:
                self.heartbeat.touch()
            except OSError as error:
                print_warning(f"{self.heartbeat}: --heartbeat: cannot be touched any more ({error.strerror})")
                self.heartbeat = None

    def finished(self, generation: Generation) -> None:
        self.passed()
        output = self.outputs()[1]
        if output is not None:
            try:
                output.write(metrics_text(generation))
            except (OSError, InputError, Failed) as error:
                # A search does not end for want of a watcher.
                print_warning(f"{output.path}: --metrics: cannot be written any more ({first_line(error)})")
                self.metrics = None


def metrics_text(generation: Generation) -> str:
    """A generation in Prometheus' text format, with the bytes of the devices' memory in use where they say so."""
    figures = [(name, kind, what, read(generation)) for name, kind, what, read in FIGURES]
    used = [(device.memory_stats() or {}).get("bytes_in_use") for device in jax.local_devices()]
    counted = [each for each in used if each is not None]
    figures.append(
        ("device_bytes", "gauge", "bytes in use on this process's devices", sum(counted) if counted else None)
    )
    lines = []
    for name, kind, what, value in figures:
        if value is not None:
            lines += [f"# HELP {PREFIX}{name} {what}", f"# TYPE {PREFIX}{name} {kind}", f"{PREFIX}{name} {value:.10g}"]
    return "\n".join(lines) + "\n"


_monitor: ContextVar[Monitor] = ContextVar("monitor", default=Monitor())  # noqa: B039


def monitor() -> Monitor:
    """The files of the search under way."""
    return _monitor.get()


@contextmanager
def watched_by(watching: Monitor) -> Iterator[None]:
    """Have progress in the block reach these files. One of several processes writes them."""
    token = _monitor.set(watching if jax.process_index() == 0 else Monitor())
    try:
        yield
    finally:
        _monitor.reset(token)
