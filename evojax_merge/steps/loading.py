"""A search's models are loaded, beside other work where they are large."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import jax

from evojax_merge.backends.backend import Backend, Progress
from evojax_merge.evaluation.devices import Devices

# (the name of a part of the work, its steps at most) -> a context that yields the function that receives steps done.
Phase = Callable[[str, int], AbstractContextManager[Progress]]
# (a phase to show it in) -> the bank, once it is loaded.
Load = Callable[[Phase], Any]
# Models of fewer bytes load in less time than threads are worth.
BESIDE_BYTES = 2**28
# Seconds between two looks at a load in its thread.
LOOK = 0.05


def silent_phase(name: str, steps: int) -> AbstractContextManager[Progress]:
    """A part of the work that shows no progress."""
    return nullcontext(lambda steps: None)


@contextmanager
def loading_beside(backend: Backend, devices: Devices, folder: Path | None, seconds: list[float]) -> Iterator[Load]:
    """Load a bank in a thread while the block plans and compiles: large models of one process; others load when the
    block asks for them. seconds: receives those that loading takes by itself; folder: see `Backend.load`. The thread
    ends at its next tensor where the block raises."""
    size, ended, pieces = backend.facts.stored_bytes, Event(), SimpleQueue[int]()

    def load_shown(phase: Phase) -> Any:
        started = time.monotonic()
        with phase("loading", size) as progress:
            bank = backend.load(devices, progress, folder)
        seconds.append(time.monotonic() - started)
        return bank

    def count(done: int) -> None:
        if ended.is_set():
            raise _Ended
        pieces.put(done)

    # Several processes load together, each in its main thread as all else that they do together.
    if size < BESIDE_BYTES or jax.process_count() > 1:
        yield load_shown
        return
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(backend.load, devices, count, folder)

        def shown(phase: Phase) -> Any:
            started, waiting, done = time.monotonic(), pieces.qsize(), list[int]()
            with phase("loading", size) as progress:
                while wait([loading], LOOK).not_done or not pieces.empty():
                    while not pieces.empty():
                        done.append(pieces.get())
                        progress(done[-1])
            # The tensors that came beside the plan took longer than they do by themselves.
            alone = sum(done[waiting:])
            seconds.append((time.monotonic() - started) * sum(done) / alone if alone else 0.0)
            return loading.result()

        try:
            yield shown
        finally:
            ended.set()


class _Ended(Exception):
    """The block has ended before the bank was loaded."""
