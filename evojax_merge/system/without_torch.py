"""transformers without PyTorch, which it does not need for tokenizers and configs, all that text models take of it.

It logs a note when it is imported so: there will be no models. The note is dropped where this program imports
transformers, and stays where other code does. Where PyTorch is installed, importing it takes seconds: a command that
searches text models leaves it out.
"""

import logging
import sys

from evojax_merge.system.imports import importing

# Whether the process is a command of this program, in which no other code goes on to use models of torch.
is_command = False
# The beginning of the note, in the versions of transformers.
NOTES = ("PyTorch was not found", "None of PyTorch")


def _is_ours() -> bool:
    """Return whether a module of this package is among the callers."""
    frame = sys._getframe().f_back
    while frame is not None:
        # `__package__` identifies a module that is run as a program, too.
        package = str(frame.f_globals.get("__package__")).partition(".")[0]
        if package == __name__.partition(".")[0] and frame.f_globals.get("__name__") != __name__:
            return True
        frame = frame.f_back
    return False


def drop_in_our_imports() -> None:
    """Filter the logger that the note goes to. Imports nothing of transformers."""
    logging.getLogger("transformers").addFilter(lambda record: not (str(record.msg).startswith(NOTES) and _is_ours()))


def leave_torch_out() -> None:
    """Have transformers load as where PyTorch is not installed, if the process is a command and has not loaded it."""
    if "torch" in sys.modules or not is_command:
        return
    with importing():
        from transformers.utils import import_utils

    checks = [import_utils.is_torch_available, import_utils.is_torchvision_available]
    if not all(hasattr(check, "cache_clear") for check in checks) or not hasattr(import_utils, "_is_package_available"):
        return
    look = import_utils._is_package_available
    import_utils._is_package_available = lambda name, return_version=False: (False, "N/A")
    try:
        for check in checks:
            # The first answer is kept.
            check.cache_clear()
            check()
    finally:
        import_utils._is_package_available = look
