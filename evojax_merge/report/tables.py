"""The held-out table, for the terminal and for Markdown."""

from collections.abc import Sequence

from rich.table import Table

from evojax_merge.errors import escaped
from evojax_merge.report.comparison import Row, label_of, titled
from evojax_merge.report.intervals import SAME, TOO_FEW, Lead
from evojax_merge.report.meetings import TOO_FEW_VOTES
from evojax_merge.report.progress import terminal_table

LEAD = "winner ahead by (95% interval)"


def _columns(rows: Sequence[Row]) -> list[str]:
    """The headings behind the models' names."""
    leads = [LEAD] if any(lead_cell(row.lead, has_too_few_votes=row.has_too_few_votes) for row in rows) else []
    return [titled("fitness", rows[0].units), *leads, *(titled(score, rows[0].units) for score in rows[0].scores)]


def _cells(row: Row, columns: int) -> list[str]:
    """The cells below `_columns`."""
    leads = [lead_cell(row.lead, has_too_few_votes=row.has_too_few_votes)] if columns > 1 + len(row.scores) else []
    return [f"{row.fitness:.4f}", *leads, *(f"{value:.4f}" for value in row.scores.values())]


def scores_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """A table of scores."""
    columns = ["model", *_columns(rows)]
    cells = [(label_of(row.role, row.name), *_cells(row, len(columns) - 1)) for row in rows]
    winner = next((number for number, row in enumerate(rows) if row.role == "winner"), None)
    scores = range(1, len(columns))
    return terminal_table(columns, cells, title, numbers=scores, folded=scores, bold=winner)


def lead_cell(lead: Lead | None, digits: str = ".4f", has_too_few_votes: bool = False) -> str:
    """The winner's lead over a row's model, its interval, and `Lead.remark`."""
    if lead is None:
        return TOO_FEW_VOTES if has_too_few_votes else ""
    if lead.remark == SAME:
        return SAME
    interval = "" if lead.remark == TOO_FEW else f" ({lead.low:{digits}} to {lead.high:{digits}})"
    return f"{lead.difference:+{digits}}{interval}" + (f", {lead.remark}" if lead.remark else "")


def markdown_table(rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    lines = [f"| model | {' | '.join(map(_cell, columns))} |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        # A name in a label is none of Markdown's marks.
        label = label_of(row.role, row.name).replace(f"{row.role} {row.name}", f"{row.role} `{row.name}`")
        lines.append(f"| {_cell(label)} | {' | '.join(_cells(row, len(columns)))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """The text of a cell of Markdown."""
    return escaped(text).replace("|", "\\|")
