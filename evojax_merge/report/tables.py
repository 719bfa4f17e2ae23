"""The held-out table, for the terminal and for Markdown."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from evojax_merge.report.comparison import Row


def score_columns(rows: Sequence[Row]) -> list[str]:
    return list(rows[0].scores)


def terminal_table(rows: Sequence[Row], title: str) -> Table:
    """Names stand in it as they are, whatever console prints it: `[/INST]` is a name, not markup."""
    table = Table(title=Text(title, "table.title"), title_justify="left")
    table.add_column("model")
    table.add_column("fitness", justify="right")
    for column in score_columns(rows):
        table.add_column(Text(column), justify="right")
    for row in rows:
        style = "bold" if row.role == "winner" else ""
        label = row.name if _says_its_role(row) else f"{row.role} {row.name}"
        numbers = [f"{row.scores[column]:.4f}" for column in score_columns(rows)]
        table.add_row(Text(label), f"{row.fitness:.4f}", *numbers, style=style)
    return table


def _says_its_role(row: Row) -> bool:
    """Whether the name needs no role before it: `evolved ties`, a model that is called `base`, or one of several that
    are compared."""
    return row.role in ("winner", "uniform", "model", row.name)


def markdown_table(rows: Sequence[Row]) -> str:
    columns = ["fitness", *score_columns(rows)]
    lines = [f"| model | {' | '.join(map(_cell, columns))} |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        numbers = [row.fitness, *(row.scores[column] for column in columns[1:])]
        label = row.name if _says_its_role(row) else f"{row.role} `{row.name}`"
        lines.append(f"| {_cell(label)} | " + " | ".join(f"{number:.4f}" for number in numbers) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """What stands in a cell of Markdown as it is."""
    return text.replace("|", "\\|").replace("\n", " ")
