"""The errors that a user meets. Imports nothing.

`InputError` is for whatever the user can put right: the command line prints it as one line and exits with
status 2. `Failed` is for what went wrong although the input is right: one line too, status 1. Anything else that
reaches the top is a failure of the program or of a user's own function (status 1, with its traceback).
"""

import difflib
import errno
from collections.abc import Iterable


class InputError(Exception):
    """Wrong input: `where` names the file (and key or line), `what` says what was found and expected."""

    def __init__(self, where: object, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where, self.what = str(where), what


class Failed(Exception):
    """The input is right, and yet it came to nothing: says what was tried, a likely cause and what to look at."""


def cannot_write(where: object, error: OSError, more: str = "") -> Exception:
    """What to raise where a file could not be written. A disk that fills is no wrong input."""
    text = f"could not be written ({error.strerror or error}){more}"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return Failed(f"{where}: {text}") if full else InputError(where, text)


class LostProcess(Exception):
    """Another process of the run has gone."""

    def __init__(self) -> None:
        super().__init__("another process of this run has gone; the run ends here and can be resumed")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'density'?)"`, or a list of what is known where nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else f" (known: {', '.join(known)})"
