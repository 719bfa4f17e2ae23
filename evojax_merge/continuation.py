"""The command that continues a search, told wherever it is broken off."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from evojax_merge import interrupts
from evojax_merge.errors import LONGEST_LINE, PeerLostError, printable
from evojax_merge.interrupts import defer_signals
from evojax_merge.search.run_folder import RunFolder


class Continuation:
    """The command that continues a search, wherever it is broken off: at first, the one that was given."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._folder: RunFolder | None = None

    def begun(self, command: str, folder: RunFolder) -> None:
        self._command, self._folder = command, folder

    @contextmanager
    def told(self) -> Iterator[None]:
        """Print it where a signal or the loss of another process ends the block."""
        try:
            yield
        except BaseException as error:
            if interrupts.received() or isinstance(error, PeerLostError):
                with defer_signals():
                    how = printable(f"stopped; {self._saved()}. Continue with: {self._command}", LONGEST_LINE)
                    print(how, file=sys.stderr, flush=True)
            raise

    def _saved(self) -> str:
        if self._folder is None:
            return "nothing was searched yet"
        count = len(self._folder.read_history())
        return "1 generation is saved" if count == 1 else f"{count} generations are saved"
