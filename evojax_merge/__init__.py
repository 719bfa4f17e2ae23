"""Evolutionary model merging as one program on the accelerator.

Importing this package imports neither JAX nor transformers; its rooms do, where they need them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evojax_merge.pytrees import on_host, search_pytrees

__all__ = ["on_host", "search_pytrees"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from evojax_merge import pytrees

        return getattr(pytrees, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
