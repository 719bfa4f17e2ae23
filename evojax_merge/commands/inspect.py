"""`evojax-merge inspect`: what several models are, how their weights differ, and what that means for a merge."""

import json
from functools import partial
from pathlib import Path

from evojax_merge import plugins
from evojax_merge.checkpoints.derived import ignored_revisions, reference_to, sources_of
from evojax_merge.errors import InputError
from evojax_merge.inspection.findings import findings
from evojax_merge.inspection.models import read_models
from evojax_merge.inspection.weights import compare_weights
from evojax_merge.report.comparison import model_names
from evojax_merge.report.inspection import (
    KEYS,
    PICTURE_MARKS,
    as_json,
    picture,
    tables,
)
from evojax_merge.report.notices import print_warnings
from evojax_merge.report.progress import bytes_bar
from evojax_merge.system.console import console
from evojax_merge.system.file_system import OutputFile, check_outputs, holds_json
from evojax_merge.zoo.references import resolve_onto, resolve_reference


def inspect(references: list[str], base: str | None, json_file: Path | None, picture_file: Path | None) -> None:
    """Print tables and sentences about the models. base: the model that the user calls the base, one of the others or
    not."""
    is_own = partial(holds_json, keys=KEYS)
    report = None if json_file is None else OutputFile(json_file, "--json", "holds no report", is_own)
    drawing = None
    if picture_file is not None:
        ending = picture_file.suffix.lower()
        if ending not in PICTURE_MARKS:
            raise InputError(picture_file, f"--picture: expected a name that ends in {' or '.join(PICTURE_MARKS)}")
        drawing = OutputFile(picture_file, "--picture", "is no picture", lambda start: PICTURE_MARKS[ending] in start)
    check_outputs([report, drawing], {})
    plugins.load()
    folder = Path.cwd()
    named = [resolve_onto(resolve_reference, "MODEL", reference, base, folder) for reference in references]
    references, paths, given = [reference for reference, _ in named], [path for _, path in named], "as given"
    base_path = None if base is None else resolve_reference("--base", base, folder)
    bases = {adapted[0] for path in paths if (adapted := sources_of(path).adapted) is not None}
    if base_path is None and len(bases) == 1:
        (base_path,), given = bases, "as the adapters' files say"
    if base_path is not None and base_path not in paths:
        references, paths = [base or reference_to(base_path), *references], [base_path, *paths]
    number = None if base_path is None else paths.index(base_path)
    print_warnings(ignored_revisions(references, folder))
    models, names = read_models(references, paths), model_names(paths)
    comparison = compare_weights(models, number, bytes_bar, given)
    sentences = findings(models, names, comparison)
    for table in tables(models, names, comparison):
        console.print(table)
    for finding in sentences:
        console.print(f"- {finding.text}", soft_wrap=True)
    if report is not None:
        document = as_json(models, names, comparison, sentences)
        report.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if drawing is not None:
        drawing.write(picture(names, comparison, ending))
