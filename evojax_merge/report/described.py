"""Display of the public API's objects in a prompt and in a notebook."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evojax_merge.errors import escaped, shown

# The most rows of a table in a notebook, which aligns all cells to the right where nothing else is said.
MOST_ROWS, LEFT = 40, ' style="text-align:left"'
Table = Sequence[Mapping[str, Any]]


class Described:
    """An object with a `repr` in one line and small tables for notebooks: its facts, and what `tables` adds."""

    def facts(self) -> Mapping[str, Any]:
        """The object's identity and progress: a name -> a text, a number, a list of texts or None."""
        raise NotImplementedError

    def tables(self) -> Mapping[str, Table]:
        """Further tables by their captions: rows with the same columns."""
        return {}

    def __repr__(self) -> str:
        def in_line(value: Any) -> str:
            if isinstance(value, float):
                return f"{value:.6g}"
            return f"[{', '.join(map(shown, value))}]" if isinstance(value, list) else shown(value)

        facts = ", ".join(f"{name}={in_line(value)}" for name, value in self.facts().items())
        return escaped(f"{type(self).__name__}({facts})")

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th{LEFT}>{html_of(name.replace('_', ' '))}</th><td{LEFT}>{html_of(_in_table(value))}</td></tr>"
            for name, value in self.facts().items()
        )
        tables = "".join(_table(caption, table) for caption, table in self.tables().items() if table)
        return f"<table><caption{LEFT}>{html_of(type(self).__name__)}</caption>{rows}</table>{tables}"


def split_name(name: str) -> tuple[str, str, str | None]:
    """The parameter, the group and the parent of a name; None for the parent where all share the parameter, and an
    empty group where there are none. A group of a user's own may have brackets in its name."""
    parameter, _, inner = name.removesuffix("]").partition("[")
    group, separator, parent = inner.partition("][")
    return (parameter, group, parent) if separator else (parameter, inner, None)


def parameter_table(values: Mapping[str, float]) -> Table:
    """Named parameters as a row for each group of tensors: `weight[layers 0-3][maths]` stands in the row `layers 0-3`
    and the column `weight maths`."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        parameter, group, parent = split_name(name)
        row = rows.setdefault(group or name, {"group": group or name})
        row[f"{parameter} {parent or ''}".rstrip() if group else "value"] = value
    return list(rows.values())


def _table(caption: str, table: Table) -> str:
    columns = list(dict.fromkeys(column for row in table for column in row))
    words = {column: LEFT for column in columns if any(isinstance(row.get(column), str) for row in table)}
    head = "".join(f"<th{words.get(column, '')}>{html_of(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td{words.get(column, '')}>{html_of(_in_table(row.get(column), 3))}</td>" for column in columns)
        + "</tr>"
        for row in table[:MOST_ROWS]
    )
    more = len(table) - MOST_ROWS
    rest = f"<tr><td colspan={len(columns)}>… {more} more</td></tr>" if more > 0 else ""
    return f"<table><caption{LEFT}>{html_of(caption)}</caption><tr>{head}</tr>{body}{rest}</table>"


def _in_table(value: Any, digits: int = 6) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def html_of(text: str) -> str:
    """A text as HTML, in one line."""
    return escape(escaped(text))
