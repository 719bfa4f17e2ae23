"""NumPy's linear algebra, on one thread of each caller."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import OpenBLASController, threadpool_limits

_lock = threading.Lock()
# The limits that hold while anybody is inside, for each caller once.
_inside: list[threadpool_limits] = []


@contextmanager
def one_blas_thread(is_needed: bool = True) -> Iterator[None]:
    """Run linear algebra on the calling thread alone, where that is needed: its sums are then in one order on any
    number of cores, and callers on several threads work side by side, for whom BLAS would queue its own threads."""
    if not is_needed:
        yield
        return
    with _lock:
        if not _inside:
            # The limits of one thread alone count, the first that set some; those of others change nothing.
            OpenBLASController.clear_controlling_thread(force=True)
        _inside.append(_inside[0] if _inside else threadpool_limits(limits=1, user_api="blas"))
    try:
        yield
    finally:
        with _lock:
            limits = _inside.pop()
            if not _inside:
                OpenBLASController.clear_controlling_thread(force=True)
                limits.restore_original_limits()
                OpenBLASController.clear_controlling_thread(force=True)
