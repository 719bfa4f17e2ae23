"""The comparison of two run folders: whether one reproduces the other to the bit, and where it parts from it."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.checkpoints.folder import file_hash
from evojax_merge.schema.yaml_reader import load_documents
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import HistoryLine, parse, whole_lines
from evojax_merge.system.file_system import resolved
from evojax_merge.zoo.references import canonical_reference


def parting(run: RunFolder, again: RunFolder) -> str | None:
    """The first difference of two runs, in words: of their stages, then of their history, recipe and model. None where
    all are the same to the bit; paths of the run folders themselves may differ in recipes."""
    pairs = [(stage, RunFolder(again.stages / stage.path.name)) for stage in run.begun_stages()]
    for one, other in [*pairs, (run, again)]:
        difference = _difference(one, other, run, again)
        if difference is not None:
            return difference if one is run else f"{one.path.name}: {difference}"
    return None


def _difference(one: RunFolder, other: RunFolder, run: RunFolder, again: RunFolder) -> str | None:
    lines, other_lines = (list(whole_lines(folder.history)) for folder in (one, other))
    for number, (line, other_line) in enumerate(itertools.zip_longest(lines, other_lines), start=1):
        if line != other_line:
            return f"generation {number} of {len(lines)} is the first that differs{_scores(line, other_line)}"
    if _recipe(one, run) != _recipe(other, again):
        return f"all {len(lines)} generations are the same, and {one.recipe.relative_to(one.path)} differs"
    weights, other_weights = _weights(one.model), _weights(other.model)
    names = sorted(weights.keys() | other_weights.keys())
    name = next((name for name in names if weights.get(name) != other_weights.get(name)), None)
    return None if name is None else f"all generations and the recipe are the same, and best/model/{name} differs"


def _scores(line: bytes | None, other_line: bytes | None) -> str:
    """By how much the scores of a generation differ in two histories, in words."""
    if line is None or other_line is None:
        return ": one run has no such generation"
    try:
        row, other = (parse(HistoryLine, text)[0] for text in (line, other_line))
    except ValueError:
        return ": its line is damaged"
    if row.genomes != other.genomes:
        return ": its candidates are others"
    # A failed candidate has null for its fitness.
    gaps = np.abs(np.subtract(*(np.array(history_line.fitness, np.float64) for history_line in (row, other))))
    gap = float(gaps[np.isfinite(gaps)].max(initial=0.0))
    return f": its candidates are the same, and their fitness differs by up to {gap:.1e}"


def _recipe(folder: RunFolder, run: RunFolder) -> Any:
    """The documents of a winner's recipe, in which the path of its run folder has another name, and models go by their
    canonical references: the config of a run folder has paths, where the user's had names."""
    place = str(resolved(run.path))

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(part) for key, part in value.items()}
        if isinstance(value, list):
            return [renamed(part) for part in value]
        return canonical_reference(value).replace(place, "RUN") if isinstance(value, str) else value

    return renamed(load_documents(folder.recipe)) if folder.recipe.is_file() else None


def _weights(model: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights in a model folder, by its name."""
    return {file.name: file_hash(file) for file in sorted(model.glob("*.safetensors"))}
