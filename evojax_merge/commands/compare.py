"""`evojax-merge compare`: several runs on one page, and as a table."""

from pathlib import Path

from evojax_merge.errors import InputError
from evojax_merge.report.comparison import short_names
from evojax_merge.report.page import compare_page
from evojax_merge.report.run_data import read_run
from evojax_merge.report.run_tables import gaps_table, runs_table, task_note
from evojax_merge.search.run_parts import RunFolder, is_page
from evojax_merge.system.console import console
from evojax_merge.system.file_system import OutputFile, check_outputs


def compare(paths: list[Path], out: Path) -> None:
    """Print a line for each run, and write their page."""
    if len({path.absolute() for path in paths}) < len(paths):
        raise InputError("compare", "names a run twice; expected different runs")
    page = OutputFile(out, "--out", "is no page", is_page)
    check_outputs([page], {f"the page of {path}": RunFolder(path).page for path in paths})
    names = short_names([str(path.absolute()) for path in paths])
    runs = {name: read_run(path) for name, path in zip(names, paths, strict=True)}
    console.print(runs_table(runs).terminal())
    gaps = gaps_table(runs)
    if gaps is not None:
        console.print(gaps.terminal("The winners on the held-out examples of each task"))
    if (note := task_note(runs)) is not None:
        console.print(f"note: {note}", soft_wrap=True)
    page.write(compare_page(runs, gaps))
    console.print(f"wrote {out}", soft_wrap=True)
