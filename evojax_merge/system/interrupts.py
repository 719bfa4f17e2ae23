"""Signals that ask the program to end: SIGINT, SIGTERM, SIGHUP, SIGUSR1. Imports nothing heavy; called from the main
thread.

A signal unwinds the program as KeyboardInterrupt, so that nothing half-done is left. At the start, before any work has
begun, a signal ends the program at once instead. An import finishes first: a module in C turns an exception that is
raised in its import into an error of its own, or aborts the process, and a library may take the exception for a package
that is not installed. The garbage collector's callbacks and finalizers finish first as well, because Python prints an
exception in them and goes on. For the same reason `received` tells an interruption, and not the exception that reaches
the top.
"""

import _thread
import errno
import gc
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

# Batch systems announce the end of a job's time with SIGTERM or, as its script asks, SIGUSR1.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
INTERRUPTED = 130
# After how many seconds a signal is acknowledged, and how many more the program may take to unwind.
SILENT, UNWINDING = 1.0, 10.0
# After how many seconds a signal comes again that came where an exception would be lost.
LATER = 0.02


class Terminal(io.FileIO):
    """A terminal that drops all text after its window was closed. The search of a shell that has gone goes on, and an
    interrupted one saves its state: each write to such a terminal fails."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)


def lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """A stream that outlives its terminal, in place of one to a terminal; any other stream itself."""
    if not stream.isatty():
        return stream
    terminal = Terminal(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(terminal), stream.encoding, stream.errors, line_buffering=True)


_received = False
# The signal that is to come again; None: none is.
_postponed: object | None = None
# It has come again.
_again = False
# The number of signals that Python has handled: it handles none while the main thread is in compiled code.
_handled = 0
# A signal has come in a block of `ending_within`, noticed or not.
_has_come = False


def install() -> None:
    """Unwind at a signal from here on. A signal that the parent process ignores (nohup, a shell's `&`) stays
    ignored."""
    _handle(_unwind)


def received() -> bool:
    """Return whether a signal has come, and the main thread has noticed it."""
    return _received


def has_come() -> bool:
    """Return whether a signal has come, noticed or not."""
    return _received or _has_come


def check() -> None:
    """Raise KeyboardInterrupt once more where a signal has come: a library's `except ImportError` may have caught the
    first exception. Meant for the start of each piece of work."""
    if _received:
        raise KeyboardInterrupt


def end_at_once(status: int, message: str = "") -> None:
    """From here on a signal ends the process with this status, and this message on stderr."""

    def end(number: int, frame: Any) -> NoReturn:
        _say(message)
        os._exit(status)

    _forget_postponed()
    _handle(end)


@contextmanager
def nothing_begun(message: str) -> Iterator[None]:
    """Make a signal in the block end the process at once, with `message` on stderr. Meant for imports at the start."""
    usual = {number: signal.getsignal(number) for number in SIGNALS}
    end_at_once(INTERRUPTED, message)
    try:
        yield
    finally:
        _restore(usual)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Delay a signal that arrives in the block to the block's end; a second signal acts at once. Meant for work that
    may not be cut short: orbax waits in an event loop, which an interruption leaves half closed, with the files that it
    was saving. Signals reach the main thread alone; in another thread the block delays nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    usual = {number: signal.getsignal(number) for number in SIGNALS}
    usual = {number: handler for number, handler in usual.items() if handler not in (signal.SIG_IGN, None)}

    def hold(number: int, frame: Any) -> None:
        _count()
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


@contextmanager
def ending_within(seconds: float, last_words: Callable[[], str]) -> Iterator[None]:
    """End the process where a signal comes in the block and the main thread has not noticed it after so many seconds,
    or has not left the block after UNWINDING more: a compiled pass may take minutes, in this thread or in one that it
    waits for, or wait for another process that has left. Meant for work that survives a kill; nothing more is unwound.
    last_words: printed on stderr."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()

    def watch() -> None:
        global _has_come
        handled = _handled
        while signals := os.read(reading, 64):
            if not set(signals) & set(SIGNALS):
                continue
            _has_come = True
            if ended.wait(min(SILENT, seconds)):
                break
            _say("stopping …\n")
            is_seen = ended.wait(max(0.0, seconds - SILENT)) or _received or _handled != handled
            is_left = is_seen and (ended.wait(UNWINDING) or not _received)
            if not is_left:
                _say(f"{last_words()}interrupted\n")
                os._exit(INTERRUPTED)
            handled = _handled
        os.close(reading)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writing)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal has gone
        os.write(2, text.encode(errors="replace"))


def _count() -> None:
    global _handled
    _handled += 1


def _unwind(number: int, frame: FrameType | None) -> None:
    global _received, _again
    _count()
    waits = not _received or _again
    _received, _again = True, False
    if waits and _is_fenced(frame):
        _postpone(number)
        return
    _forget_postponed()
    raise KeyboardInterrupt


def _postpone(number: int) -> None:
    """Have the signal come again in a moment, to the main thread. A thread sends it: each timer of a process is another
    signal, and libraries take those for themselves. It is started without the lock of Python's class of threads, which
    the interrupted code may hold."""
    global _postponed
    token = _postponed = object()

    def send() -> None:
        global _again
        time.sleep(LATER)
        if _postponed is token:
            _again = True
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    _thread.start_new_thread(send, ())


def _forget_postponed() -> None:
    global _postponed
    _postponed = None


def _is_fenced(frame: FrameType | None) -> bool:
    """Return whether an exception in this frame would not reach the top: in an import, a callback of the garbage
    collector, or a finalizer."""
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
