"""The held-out table, for the terminal and for Markdown. May import search.winner."""

from collections.abc import Sequence

from rich.table import Table

from evojax_merge.search.winner import Row


def score_columns(rows: Sequence[Row]) -> list[str]:
    return list(rows[0].scores)


def terminal_table(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("fitness", justify="right")
    for column in score_columns(rows):
        table.add_column(column, justify="right")
    for row in rows:
        style = "bold" if row.role == "winner" else ""
        label = row.name if row.role in ("winner", "uniform") else f"{row.role} {row.name}"
        numbers = [f"{row.scores[column]:.4f}" for column in score_columns(rows)]
        table.add_row(label, f"{row.fitness:.4f}", *numbers, style=style)
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    columns = ["fitness", *score_columns(rows)]
    lines = [f"| model | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        numbers = [row.fitness, *(row.scores[column] for column in columns[1:])]
        label = row.name if row.role in ("winner", "uniform") else f"{row.role} `{row.name}`"
        lines.append(f"| {label} | " + " | ".join(f"{number:.4f}" for number in numbers) + " |")
    return "\n".join(lines)
