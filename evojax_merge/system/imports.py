"""Imports without the garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
        if gc.get_freeze_count() == 0:
            gc.freeze()
        if was_enabled:
            gc.enable()
