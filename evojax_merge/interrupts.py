"""Signals that ask the program to end: SIGINT, SIGTERM and SIGHUP. Imports nothing heavy; called from the main thread.

They unwind the program as KeyboardInterrupt, so that nothing half-done is left. At the start, where nothing is begun
yet, they end it at once instead. An import is let finish: one in C turns what is raised in it into an error of its own,
or aborts the process, and a library may take it for a package that is not installed. So are garbage collectors'
callbacks and finalizers, in which Python prints an exception and goes on. For the same reason `received` is what tells
an interruption, and not the exception that reaches the top.
"""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130
# Tells that a bit of processor time has passed. (A user's function, or a limit on time, may use SIGALRM.)
LATER = signal.SIGPROF

_received = False


def install() -> None:
    """Unwind at a signal from here on. One that the parent process has ignored (nohup, a shell's `&`) stays so."""
    _handle(_unwind)


def received() -> bool:
    """Whether a signal has come."""
    return _received


def check() -> None:
    """Raise KeyboardInterrupt once more where a signal has come: a library's `except ImportError` may have caught it
    as such. For the start of each piece of work."""
    if _received:
        raise KeyboardInterrupt


def end_at_once(status: int, message: str = "") -> None:
    """From here on a signal ends the process with this status, and this message on stderr."""

    def end(number: int, frame: Any) -> NoReturn:
        os.write(2, message.encode(errors="replace"))
        os._exit(status)

    signal.setitimer(signal.ITIMER_PROF, 0)
    _handle(end)


@contextmanager
def nothing_begun(message: str) -> Iterator[None]:
    """Around imports at the start: a signal ends the process at once, with `message` on stderr."""
    usual = {number: signal.getsignal(number) for number in SIGNALS}
    end_at_once(INTERRUPTED, message)
    try:
        yield
    finally:
        _restore(usual)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Signals that arrive in this block act at its end; a second one acts at once. For what may not be cut short: orbax
    waits in an event loop that an interruption leaves half closed, with what it was saving. Signals reach the main
    thread alone; in another this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    usual = {number: signal.getsignal(number) for number in (*SIGNALS, LATER)}
    usual = {number: handler for number, handler in usual.items() if handler not in (signal.SIG_IGN, None)}

    def hold(number: int, frame: Any) -> None:
        held.append(number)
        if len(held) > 1:
            _restore(usual)
            signal.raise_signal(number)

    for number in usual:
        signal.signal(number, hold)
    try:
        yield
    finally:
        _restore(usual)
    if held:
        signal.raise_signal(held[0])


def _unwind(number: int, frame: FrameType | None) -> None:
    global _received
    first, _received = not _received, True
    if (first or number == LATER) and _is_fenced(frame):
        signal.signal(LATER, _unwind)
        signal.setitimer(signal.ITIMER_PROF, 0.02)
        return
    signal.setitimer(signal.ITIMER_PROF, 0)
    raise KeyboardInterrupt


def _is_fenced(frame: FrameType | None) -> bool:
    """Whether what is raised here would not reach the top: in an import, a callback of the garbage collector, or a
    finalizer."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        code = frame.f_code
        if code.co_filename == "<frozen importlib._bootstrap>" or code.co_name == "__del__" or code in callbacks:
            return True
        frame = frame.f_back
    return False


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _handle(handler: Callable[[int, Any], Any]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
