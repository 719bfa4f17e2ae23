"""Imports without the garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Whether a block has ended: the collector itself counts what is frozen one by one.
_frozen: list[bool] = []


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries. Imports make objects that stay: the collector would look through all of them many times
    during the block and, but for the first block of a process, ever after."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Later there may be garbage, which would stay for ever.
        if not _frozen:
            gc.freeze()
            _frozen.append(True)
        if was_enabled:
            gc.enable()
