"""Evolutionary model merging as one program on the accelerator.

Importing this package imports neither JAX nor transformers; its rooms do, where they need them.
"""

from typing import TYPE_CHECKING, Any

from evojax_merge.version import __version__

if TYPE_CHECKING:
    from evojax_merge.pytrees import host_callback, search_pytrees

__all__ = ["__version__", "host_callback", "search_pytrees"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from evojax_merge import pytrees

        return getattr(pytrees, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
