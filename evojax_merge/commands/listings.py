"""`evojax-merge methods`, `strategies`, `architectures` and `keys`."""

from collections.abc import Callable
from functools import partial

from rich.table import Table

from evojax_merge import plugins
from evojax_merge.report.listings import architectures_table, keys_table, methods_table, strategies_table
from evojax_merge.report.progress import console


def list_known(what: str, section: str | None = None) -> None:
    """Print the tables of methods, strategies, architectures, or keys of a config, all or a section's."""
    plugins.load()
    tables: dict[str, Callable[[], Table]] = {
        "methods": methods_table,
        "strategies": strategies_table,
        "architectures": architectures_table,
        "keys": partial(keys_table, section),
    }
    console.print(tables[what]())
