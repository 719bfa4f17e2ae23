"""The log of a run, `run.log`: the lines that the program prints while it works on the run, each with its time in UTC.

Nothing depends on the log, and a log that cannot be written ends no search. A run that is refused, or was complete
before, gets no line.
"""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler

from evojax_merge.errors import LOG, Failed, InputError, Paused, PeerLostError, print_warning, without_secrets
from evojax_merge.search.run_parts import LOG_MARK, RunFolder
from evojax_merge.system.file_system import may_replace

# The token in the address of the judges' page.
_TOKEN = re.compile(r"(?<=//127\.0\.0\.1:)(\d+/)[\w-]{22}(?=/)")


class _RunLines(MemoryHandler):
    """The lines for the log of a run, kept until the work on it begins. folder: None until it is open."""

    def __init__(self) -> None:
        super().__init__(0, flushLevel=logging.CRITICAL)
        self.folder: RunFolder | None = None


@contextmanager
def early_lines() -> Iterator[None]:
    """Keep the lines of the block for the run whose log is opened in it."""
    lines = _RunLines()
    LOG.addHandler(lines)
    try:
        yield
    finally:
        LOG.removeHandler(lines)


@contextmanager
def run_log(folder: RunFolder) -> Iterator[None]:
    """The log of a run that is worked on in the block, with the lines kept before and the error that ends the block."""
    lines = next((handler for handler in LOG.handlers if isinstance(handler, _RunLines)), _RunLines())
    lines.folder = folder
    LOG.addHandler(lines)
    try:
        yield
    except (InputError, Failed, PeerLostError) as error:
        LOG.error("error: %s", error)
        raise
    except Paused as pause:
        LOG.info("%s", pause)
        raise
    except KeyboardInterrupt:
        LOG.error("interrupted")
        raise
    except Exception:
        LOG.exception("error:")
        raise
    finally:
        LOG.removeHandler(lines)
        if lines.target is not None:
            with suppress(OSError):
                lines.target.close()


def begin_logs() -> None:
    """Write the logs of open runs from now on: the work on them has begun."""
    for lines in [handler for handler in LOG.handlers if isinstance(handler, _RunLines)]:
        if lines.folder is not None and lines.target is None:
            lines.setTarget(_opened(lines.folder))
            lines.flush()


def _opened(folder: RunFolder) -> logging.Handler:
    """The log's file; where it cannot be written, a handler that drops all lines, and a warning."""
    try:
        if not may_replace(folder.log, LOG_MARK.match):
            raise InputError(folder.log, "is no log of evojax-merge, so this run has none")
        file = _LogFile(folder)
    except InputError as error:
        print_warning(str(error))
        return logging.NullHandler()
    except OSError as error:
        print_warning(f"{folder.log}: cannot be written ({error.strerror}), so this run has no log")
        return logging.NullHandler()
    formatter = _Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    file.setFormatter(formatter)
    return file


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # A traceback, too, may quote a request. Others may read the log, and not the token of the judges' page.
        return _TOKEN.sub(r"\1[judge-token]", without_secrets(super().format(record)))


class _LogFile(logging.FileHandler):
    """A log file that takes no further line after an error."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder.log, encoding="utf-8", errors="backslashreplace")
        self._has_failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._has_failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self._has_failed = True
        print_warning(f"{self.baseFilename}: could not be written, and ends with the line before")
