"""Tables, for the terminal, for Markdown and for pages; the held-out table among them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table as TerminalTable
from rich.text import Text

from evojax_merge.errors import escaped, escaped_lines
from evojax_merge.report.comparison import Row, label_of, titled
from evojax_merge.report.intervals import SAME, TOO_FEW, Lead
from evojax_merge.report.meetings import TOO_FEW_VOTES

LEAD = "winner ahead by (95% interval)"


@dataclass(frozen=True)
class Table:
    """A table, whose fractions have four digits. numbers: the columns that are aligned to the right; winner: the row
    that stands out; wrap: whether a page breaks long cells; folded: the columns in which the terminal breaks them
    anywhere."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numbers: Collection[int] = ()
    winner: int | None = None
    wrap: bool = False
    folded: Collection[int] = ()

    def terminal(self, title: str | None = None) -> TerminalTable:
        """The table for the terminal. Names stand in it unchanged, whichever console prints it: `[/INST]` is a name,
        not markup."""
        heading = None if title is None else Text(escaped_lines(title), "table.title")
        table = TerminalTable(title=heading, title_justify="left")
        for number, name in enumerate(self.columns):
            table.add_column(
                Text(escaped_lines(name)), justify="right" if number in self.numbers else "left",
                overflow="fold" if number in self.folded else "ellipsis",
            )  # fmt: skip
        for number, row in enumerate(self.rows):
            cells = (Text(escaped_lines(_shown(value))) for value in row)
            table.add_row(*cells, style="bold" if number == self.winner else "")
        return table

    def markdown(self) -> str:
        """The table as Markdown."""
        rules = ["---:" if number in self.numbers else "---" for number in range(len(self.columns))]
        rows = [[escaped(_shown(value)).replace("|", "\\|") for value in row] for row in (self.columns, *self.rows)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rules, *rows[1:]))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_shown, value))
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def scores_table(rows: Sequence[Row]) -> Table:
    """A table of scores, with the winner's lead where there is one."""
    leads = [lead_cell(row.lead, has_too_few_votes=row.has_too_few_votes) for row in rows]
    has_leads = any(leads)
    columns = ["model", titled("fitness", rows[0].units), *[LEAD] * has_leads]
    columns += [titled(score, rows[0].units) for score in rows[0].scores]
    cells = [
        [label_of(row.role, row.name), row.fitness, *[lead] * has_leads, *row.scores.values()]
        for row, lead in zip(rows, leads, strict=True)
    ]
    winner = next((number for number, row in enumerate(rows) if row.role == "winner"), None)
    scores = range(1, len(columns))
    return Table(columns, cells, scores, winner, folded=scores)


def markdown_table(rows: Sequence[Row]) -> str:
    """The table of scores as Markdown. A name in a label is none of Markdown's marks."""
    table = scores_table(rows)
    cells = [
        [label.replace(f"{row.role} {row.name}", f"{row.role} `{row.name}`"), *scores]
        for row, (label, *scores) in zip(rows, table.rows, strict=True)
    ]
    return replace(table, rows=cells).markdown()


def lead_cell(lead: Lead | None, digits: str = ".4f", has_too_few_votes: bool = False) -> str:
    """The winner's lead over a row's model, its interval, and `Lead.remark`."""
    if lead is None:
        return TOO_FEW_VOTES if has_too_few_votes else ""
    if lead.remark == SAME:
        return SAME
    interval = "" if lead.remark == TOO_FEW else f" ({lead.low:{digits}} to {lead.high:{digits}})"
    return f"{lead.difference:+{digits}}{interval}" + (f", {lead.remark}" if lead.remark else "")
