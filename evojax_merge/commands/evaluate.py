"""`evojax-merge evaluate`: scores of stored models, as a table and as files."""

import json
import os
from pathlib import Path
from typing import Any

from evojax_merge.errors import InputError, print_warning
from evojax_merge.file_system import atomic_write
from evojax_merge.report.progress import console, say
from evojax_merge.report.tables import terminal_table
from evojax_merge.search.run_folder import (
    to_line,
)
from evojax_merge.stored_models import (
    Answers,
    Split,
    check_own_file,
    is_samples_file,
    is_score_table,
    read_tasks,
    score_models,
    score_table,
)


def evaluate(
    models: list[str],
    tasks_path: Path,
    json_file: Path | None,
    samples_file: Path | None = None,
    split: Split = "all",
) -> None:
    tasks = read_tasks(tasks_path, split)
    if json_file is not None:
        check_own_file(json_file, "--json", "scores", is_score_table)
    if samples_file is not None:
        if json_file is not None and os.path.realpath(samples_file) == os.path.realpath(json_file):
            raise InputError(samples_file, "--samples: is the file of --json as well; choose another name")
        check_own_file(samples_file, "--samples", "samples", is_samples_file)
    samples: list[dict[str, Any]] = []

    def keep(model: str, answers: Answers) -> None:
        if samples_file is not None:
            samples.extend(answers())

    rows = score_models(models, tasks, say, print_warning, keep)
    # A title of the table would break at its width.
    console.print(f"Scores on {'; '.join(tasks.sizes)}", soft_wrap=True)
    console.print(terminal_table(rows))
    if json_file is not None:
        atomic_write(json_file, json.dumps(score_table(models, rows), indent=1, ensure_ascii=False) + "\n")
    if samples_file is not None:
        atomic_write(samples_file, "".join(map(to_line, samples)))
