"""`evojax-merge evaluate`: scores of stored models, as a table and as files."""

import json
from pathlib import Path
from typing import Any

from evojax_merge.errors import print_warning
from evojax_merge.evaluation.scores import have_one_unit
from evojax_merge.report.tables import scores_table
from evojax_merge.search.checkpoints import to_line
from evojax_merge.steps.stored_models import (
    Answers,
    Split,
    is_samples_file,
    is_score_table,
    read_tasks,
    score_models,
    score_table,
)
from evojax_merge.system.console import console, say
from evojax_merge.system.file_system import OutputFile, check_outputs


def evaluate(
    models: list[str],
    tasks_path: Path,
    json_file: Path | None,
    samples_file: Path | None = None,
    split: Split = "all",
) -> None:
    table = None if json_file is None else OutputFile(json_file, "--json", "holds no scores", is_score_table)
    answers_file = (
        None if samples_file is None else OutputFile(samples_file, "--samples", "holds no samples", is_samples_file)
    )
    check_outputs([table, answers_file], {"--tasks": tasks_path})
    tasks = read_tasks(tasks_path, split)
    samples: list[dict[str, Any]] = []

    def keep(model: str, answers: Answers) -> None:
        if answers_file is not None:
            samples.extend(answers())

    rows = score_models(models, tasks, say, print_warning, keep)
    # A title of the table would break at its width.
    console.print(f"Scores on {'; '.join(tasks.sizes)}", soft_wrap=True)
    # A log-probability and an accuracy add up to nothing, and no parents scale them here.
    shown = scores_table(rows) if have_one_unit(tasks.tasks) else scores_table(rows).without(1)
    console.print(shown.terminal())
    if table is not None:
        table.write(json.dumps(score_table(models, rows), indent=1, ensure_ascii=False) + "\n")
    if answers_file is not None:
        answers_file.write("".join(map(to_line, samples)))
