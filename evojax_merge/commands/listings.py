"""`evojax-merge methods`, `strategies`, `architectures` and `keys`."""

from collections.abc import Callable
from functools import partial

from rich.table import Table

from evojax_merge import plugins
from evojax_merge.report.listings import (
    ALL,
    architectures_table,
    keys_table,
    methods_table,
    sections_table,
    strategies_table,
)
from evojax_merge.system.console import console


def list_known(what: str, section: str | None = None) -> None:
    """Print the tables of methods, strategies, architectures, the sections of a config, or the keys of one."""
    plugins.load()
    tables: dict[str, Callable[[], Table]] = {
        "methods": methods_table,
        "strategies": strategies_table,
        "architectures": architectures_table,
        "keys": sections_table if section is None else partial(keys_table, section),
    }
    console.print(tables[what]())
    if what == "keys" and section is None:
        console.print(
            f"evojax-merge keys search: the keys in one of these, here search; evojax-merge keys {ALL}: all keys"
        )
