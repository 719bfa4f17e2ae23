"""`evojax-merge runs`: the runs below a folder."""

import os
import time
from pathlib import Path

from evojax_merge.errors import InputError, print_warning
from evojax_merge.report.run_data import RunData, read_run
from evojax_merge.report.run_tables import best_cell, progress_cell
from evojax_merge.report.tables import Table
from evojax_merge.search.run_folder import is_run
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.system.console import console

# The depth below the folder down to which runs are looked for.
DEPTH = 3
UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def runs(root: Path) -> None:
    """Print a line for each run below a folder, the newest first."""
    if not root.is_dir():
        raise InputError(root, "no such folder; expected one that holds runs")
    listed: list[tuple[float, str, RunData]] = []
    for place, names, files in os.walk(root):
        path, folder = Path(place), RunFolder(Path(place))
        is_search, run = False, None
        try:
            is_search = "config.yaml" in files and is_run(folder)
            run = read_run(path) if is_search else None
        except InputError as error:
            print_warning(str(error))
        except PermissionError as error:
            print_warning(f"{error.filename}: may not be read by you ({error.strerror})")
        # A run's own folders are those of its stages.
        if is_search or len(path.relative_to(root).parts) >= DEPTH:
            names.clear()
        names.sort()
        if run is None:
            continue
        changed = max(file.stat().st_mtime for file in (folder.config, folder.history, folder.result) if file.exists())
        listed.append((changed, run.name if path == root else str(path.relative_to(root)), run))
    if not listed:
        console.print(f"no runs in {root}", soft_wrap=True)
        return
    now = time.time()
    rows = [
        [name, run.method, progress_cell(run), best_cell(run), run.state, f"{max(0, int(age // size))} {unit} ago"]
        for changed, name, run in sorted(listed, key=lambda row: (-row[0], row[1]))
        for age in [now - changed]
        for unit, size in [next((unit for unit in UNITS if age >= unit[1]), UNITS[-1])]
    ]  # fmt: skip
    columns = ["run", "method", "generations", "best fitness", "state", "last change"]
    console.print(Table(columns, rows, frozenset({2, 3})).terminal())
