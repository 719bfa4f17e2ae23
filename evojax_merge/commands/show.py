"""`evojax-merge show`: a run in the terminal."""

from pathlib import Path

from evojax_merge.report.comparison import scores_title
from evojax_merge.report.run_data import read_run
from evojax_merge.report.run_tables import facts, heldout_table, notes, sentences
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.system.console import console


def show(path: Path) -> None:
    """Print a run's state, its progress and, where it has chosen a winner, its held-out scores."""
    run, folder = read_run(path), RunFolder(path)
    lines = [f"{run.name}: {run.state}", facts(run)]
    if run.best is not None:
        lines.append(run.best.describe())
    for line in (*lines, *notes(run)):
        console.print(line, soft_wrap=True)
    if run.result is None:
        return
    if run.result.table:
        console.print(heldout_table(run.result).terminal(scores_title(run.result.held_out)))
    if folder.model.exists():
        console.print(f"winner: {folder.model}", soft_wrap=True)
    for sentence in sentences(run.result):
        console.print(sentence, style="bold", soft_wrap=True)
