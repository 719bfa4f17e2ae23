"""transformers logs a note when it is imported without PyTorch: there will be no models, only tokenizers and configs.

This program uses tokenizers and configs alone, so the note is dropped where this program imports transformers, and
stays where other code does.
"""

import logging
import sys

# The beginning of the note, in the versions of transformers.
NOTES = ("PyTorch was not found", "None of PyTorch")


def _is_ours() -> bool:
    """Return whether a module of this package is among the callers."""
    frame = sys._getframe().f_back
    while frame is not None:
        # `__package__` identifies a module that is run as a program, too.
        package = str(frame.f_globals.get("__package__")).partition(".")[0]
        if package == __package__ and frame.f_globals.get("__name__") != __name__:
            return True
        frame = frame.f_back
    return False


def _keep(record: logging.LogRecord) -> bool:
    return not (str(record.msg).startswith(NOTES) and _is_ours())


def drop_in_our_imports() -> None:
    """Filter the logger that the note goes to. Imports nothing of transformers."""
    logging.getLogger("transformers").addFilter(_keep)
