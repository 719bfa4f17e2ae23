"""Tables, for the terminal, for Markdown and for pages; the held-out table among them."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from evojax_merge.errors import escaped, escaped_lines
from evojax_merge.report.comparison import Row, label_of, titled
from evojax_merge.report.intervals import SAME, TOO_FEW, Lead
from evojax_merge.report.meetings import TOO_FEW_VOTES

LEAD = "winner ahead by (95% interval)"


@dataclass(frozen=True)
class Table:
    """A table, whose fractions have four digits. numbers: the columns that are aligned to the right; winner: the row
    that stands out; wrap: whether a page breaks long cells; folded: the columns in which a terminal that is too narrow
    breaks them anywhere; whole: those in which it breaks none; repeated: a
    column whose numbers stand in a later one as well, which such a terminal leaves out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numbers: Collection[int] = ()
    winner: int | None = None
    wrap: bool = False
    folded: Collection[int] = ()
    whole: Collection[int] = ()
    repeated: int | None = None

    def terminal(self, title: str | None = None) -> "TerminalTable":
        """The table for the terminal. Names stand in it unchanged, whichever console prints it: `[/INST]` is a name,
        not markup. Where the console is narrow, headings and cells go on in a next line behind spaces, / and _."""
        return TerminalTable(self, title)

    @property
    def turned(self) -> "Table":
        """The table with a row for each column, and a column for each row."""
        first, *columns = zip(self.columns, *self.rows, strict=True)
        headings = [_shown(value) for value in first]
        return Table(headings, columns, range(1, len(headings)), folded=range(1, len(headings)))

    def without(self, column: int) -> "Table":
        """The table without a column, in which all others are numbers but the first."""
        columns, *rows = ([*row[:column], *row[column + 1 :]] for row in (self.columns, *self.rows))
        numbers = range(1, len(columns))
        return replace(self, columns=columns, rows=rows, numbers=numbers, folded=numbers, repeated=None)

    @property
    def natural_width(self) -> int:
        """The columns of the terminal that take every text in one line."""
        return 1 + sum(3 + _widest(column) for column in zip(*self.texts, strict=True))

    @property
    def texts(self) -> list[list[str]]:
        """The headings and the cells, row by row, as the terminal shows them."""
        return [[escaped_lines(_shown(value)) for value in row] for row in (self.columns, *self.rows)]

    def fitted(self, width: int) -> list[list[str]] | None:
        """The texts, with line breaks where one line is too wide for a terminal of so many columns; None where words
        would have to be broken."""
        texts = self.texts
        columns = list(zip(*texts, strict=True))
        least = [
            _widest(column)
            if number in self.whole
            else max(cell_len(part.rstrip()) for text in column for part in _PART.findall(text))
            for number, column in enumerate(columns)
        ]
        # A column has a blank and a rule on each side.
        room = width - 3 * len(columns) - 1 - sum(least)
        if room < 0:
            return None
        widths = list(least)
        # Cells stay whole for longer than headings do, and narrow columns for longer than wide ones.
        for wanted in ([max(map(_width, cells), default=0) for _, *cells in columns], [*map(_widest, columns)]):
            while room and (wider := [k for k, size in enumerate(wanted) if widths[k] < size]):
                widths[min(wider, key=widths.__getitem__)] += 1
                room -= 1
        return [[_broken(text, size) for text, size in zip(row, widths, strict=True)] for row in texts]

    def markdown(self) -> str:
        """The table as Markdown."""
        rules = ["---:" if number in self.numbers else "---" for number in range(len(self.columns))]
        rows = [[escaped(_shown(value)).replace("|", "\\|") for value in row] for row in (self.columns, *self.rows)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rules, *rows[1:]))


@dataclass(frozen=True)
class TerminalTable:
    """A table that Rich prints: turned where only that fits the console without breaking words."""

    table: Table
    title: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table, width = self.table, options.max_width
        if table.repeated is not None and table.natural_width > width:
            table = table.without(table.repeated)
        texts = table.fitted(width)
        if texts is None and table.rows and (turned := table.turned.fitted(width)) is not None:
            table, texts = table.turned, turned
        heading = None if self.title is None else Text(escaped_lines(self.title), "table.title")
        shown = RichTable(title=heading, title_justify="left")
        headings, *rows = table.texts if texts is None else texts
        for number, name in enumerate(headings):
            shown.add_column(
                Text(name), justify="right" if number in table.numbers else "left",
                overflow="fold" if number in table.folded else "ellipsis",
            )  # fmt: skip
        for number, row in enumerate(rows):
            shown.add_row(*map(Text, row), style="bold" if number == table.winner else "")
        yield shown


# A word with the signs behind it at which a line may end.
_PART = re.compile(r"[^\s/_]*[\s/_]*")


def _width(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def _widest(texts: Sequence[str]) -> int:
    return max(map(_width, texts))


def _broken(text: str, width: int) -> str:
    """The text in lines of at most so many columns of the terminal."""
    lines = []
    for whole in text.split("\n"):
        line = ""
        for part in _PART.findall(whole):
            if line and cell_len(f"{line}{part}".rstrip()) > width:
                lines.append(line)
                line = ""
            line += part
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


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
    return Table(columns, cells, scores, winner, folded=scores, repeated=repeated_fitness(cells))


def repeated_fitness(rows: Sequence[Sequence[Any]]) -> int | None:
    """The number of the column of the fitness, 1, where another one has the same numbers: that of the one task that
    counts; else None."""
    columns = [repr(column) for column in zip(*rows, strict=True)]
    return 1 if columns[1:2] and columns[1] in columns[2:] else None


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
    interval = (
        "" if lead.remark == TOO_FEW or lead.low == lead.high else f" ({lead.low:{digits}} to {lead.high:{digits}})"
    )
    return f"{lead.difference:+{digits}}{interval}" + (f", {lead.remark}" if lead.remark else "")
