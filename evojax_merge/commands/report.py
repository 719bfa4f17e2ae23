"""`evojax-merge report`: a run as one HTML page."""

import time
from pathlib import Path

from evojax_merge import plugins
from evojax_merge.report.page import page_file, write_page
from evojax_merge.report.run_data import RunData
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.system.console import console
from evojax_merge.system.file_system import check_outputs

# Seconds between two looks at the files of a run.
POLL = 1.0


def report(path: Path, out: Path | None, watch: bool) -> None:
    """Write the page of a run. out: see `write_page`; watch: write it again whenever the run goes on, until it is
    finished."""
    plugins.load()
    folder = RunFolder(path)
    if out is not None:
        check_outputs([page_file(folder, out)], {})
    # The run may write while its page is made: that is seen as a change afterwards.
    sizes, run = _sizes(folder), write_page(folder, out)
    console.print(f"wrote {out or folder.page}: {_progress(run)}", soft_wrap=True)
    while watch and run.state != "finished":
        while _sizes(folder) == sizes:
            time.sleep(POLL)
        sizes, run = _sizes(folder), write_page(folder, out)
        console.print(_progress(run), soft_wrap=True)


def _sizes(folder: RunFolder) -> list[int]:
    files = (folder.history, folder.timing, folder.result, folder.lock)
    return [file.stat().st_size if file.exists() else -1 for file in files]


def _progress(run: RunData) -> str:
    best = "" if run.best is None else f", {run.best.describe()}"
    return f"{run.state}, {run.count} generations{best}"
