"""The held-out table, for the terminal and for Markdown."""

from collections.abc import Sequence

from rich.table import Table

from evojax_merge.errors import escaped
from evojax_merge.report.comparison import Row
from evojax_merge.report.intervals import Lead
from evojax_merge.report.meetings import TOO_FEW_VOTES
from evojax_merge.report.progress import cell

LEAD = "winner ahead by (95% interval)"


def score_columns(rows: Sequence[Row]) -> list[str]:
    return list(rows[0].scores)


def terminal_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """A table of scores. Names stand in it unchanged, whichever console prints it: `[/INST]` is a name, not markup."""
    table = Table(title=None if title is None else cell(title, "table.title"), title_justify="left")
    table.add_column("model")
    table.add_column("fitness", justify="right")
    leads = [LEAD] if any(lead_cell(row.lead, row.has_too_few_votes) for row in rows) else []
    for column in leads:
        table.add_column(column, justify="right")
    for column in score_columns(rows):
        table.add_column(cell(column), justify="right")
    for row in rows:
        style = "bold" if row.role == "winner" else ""
        numbers = [f"{row.scores[column]:.4f}" for column in score_columns(rows)]
        table.add_row(
            cell(row.label()),
            f"{row.fitness:.4f}",
            *(lead_cell(row.lead, row.has_too_few_votes) for _ in leads),
            *numbers,
            style=style,
        )
    return table


def lead_cell(lead: Lead | None, has_too_few_votes: bool = False) -> str:
    """The winner's lead over a row's model; `noise` where the interval holds 0."""
    if lead is None:
        return TOO_FEW_VOTES if has_too_few_votes else ""
    interval = f"{lead.difference:+.4f} ({lead.low:.4f} to {lead.high:.4f})"
    return f"{interval}, noise" if lead.within_noise else interval


def markdown_table(rows: Sequence[Row]) -> str:
    leads = [LEAD] if any(lead_cell(row.lead, row.has_too_few_votes) for row in rows) else []
    columns = ["fitness", *leads, *score_columns(rows)]
    lines = [f"| model | {' | '.join(map(_cell, columns))} |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        numbers = [f"{row.scores[column]:.4f}" for column in score_columns(rows)]
        cells = [f"{row.fitness:.4f}", *(lead_cell(row.lead, row.has_too_few_votes) for _ in leads), *numbers]
        lines.append(f"| {_cell(row.label('`'))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """The text of a cell of Markdown."""
    return escaped(text).replace("|", "\\|")
