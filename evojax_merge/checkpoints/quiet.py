"""Silence of the libraries that open models: no bars, no reports."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing bars and logging reports."""
    from transformers.utils import logging as transformers_logging

    with _quiet(transformers_logging, logging.ERROR):
        yield


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keep diffusers and transformers from drawing bars and logging reports."""
    from diffusers.utils import logging as diffusers_logging

    # A LoRA that does not fit is logged as an error, and raised as well.
    with _quiet(diffusers_logging, logging.CRITICAL), quiet_transformers():
        yield


@contextmanager
def _quiet(library: Any, level: int) -> Iterator[None]:
    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(level)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()
