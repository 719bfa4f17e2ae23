"""`evojax-merge inspect`: what several models are, how their weights differ, and what that means for a merge."""

import json
import os
from pathlib import Path

from evojax_merge import plugins
from evojax_merge.checkpoints.derived import ignored_revisions
from evojax_merge.errors import InputError
from evojax_merge.file_system import atomic_write
from evojax_merge.inspection.findings import findings
from evojax_merge.inspection.models import read_models
from evojax_merge.inspection.weights import compare_weights
from evojax_merge.references import resolve_reference
from evojax_merge.report.comparison import model_names
from evojax_merge.report.inspection import (
    PICTURE_STARTS,
    as_json,
    draw,
    is_inspection_file,
    is_picture,
    tables,
)
from evojax_merge.report.notices import print_warnings
from evojax_merge.report.progress import bytes_bar, console
from evojax_merge.stored_models import check_own_file


def inspect(references: list[str], base: str | None, json_file: Path | None, picture: Path | None) -> None:
    """Print tables and sentences about the models. base: the model that the user calls the base, one of the others or
    not."""
    if json_file is not None:
        check_own_file(json_file, "--json", "report", is_inspection_file)
    if picture is not None:
        if picture.suffix.lower() not in PICTURE_STARTS:
            raise InputError(picture, f"--picture: expected a name that ends in {' or '.join(PICTURE_STARTS)}")
        if json_file is not None and os.path.realpath(json_file) == os.path.realpath(picture):
            raise InputError(picture, "--picture: is the file of --json as well; choose another name")
        check_own_file(picture, "--picture", "picture", is_picture)
    plugins.load()
    folder = Path.cwd()
    paths = [resolve_reference("MODEL", reference, folder) for reference in references]
    number = None
    if base is not None:
        base_path = resolve_reference("--base", base, folder)
        if base_path not in paths:
            references, paths = [base, *references], [base_path, *paths]
        number = paths.index(base_path)
    print_warnings(ignored_revisions(references, folder))
    models, names = read_models(references, paths), model_names(paths)
    comparison = compare_weights(models, number, bytes_bar)
    sentences = findings(models, names, comparison)
    for table in tables(models, names, comparison):
        console.print(table)
    for finding in sentences:
        console.print(f"- {finding.text}", soft_wrap=True)
    if json_file is not None:
        document = as_json(models, names, comparison, sentences)
        atomic_write(json_file, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if picture is not None:
        draw(names, comparison, picture)
