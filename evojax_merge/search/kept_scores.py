"""Scores of base and parents that outlive a run: a later search with the same models and tasks reads them.

A score is kept by content: of the models' files and of the task's, of the settings that scores depend on, of this
program and of the libraries below it. Tasks that ask people, other programs or a user's functions are scored anew.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from evojax_merge.config.search_config import Config
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.targets import processor_name
from evojax_merge.system.data_packages import cache_folder
from evojax_merge.system.file_system import code_digest, remove_file
from evojax_merge.system.kept_files import keep, read_kept

# Kinds of tasks whose scores follow from a model and a file: no code runs but this program's.
TEXT_KINDS = frozenset({"likelihood", "exact_match", "multiple_choice", "gsm", "generation"})
# Keys of a resolved config on which the scores of a stored model do not depend, whatever the search makes of them.
SEARCH_KEYS = frozenset({*Config.kinds, "calibration", "search", "stages", "scale", "inputs", "out", "log"})
LIBRARIES = ("jax", "jaxlib", "numpy", "transformers", "tokenizers")
# The most models and splits whose scores are kept, and the bytes of each.
MAX_FILES, MAX_BYTES = 256, 2**26


class _Kept(BaseModel):
    """The scores of one model. matrices: by task and metric, float32[N]; outputs: by task; log_probabilities: by task,
    float32[S]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    matrices: dict[str, dict[str, list[float]]]
    outputs: dict[str, list[str]] = Field(default_factory=dict)
    log_probabilities: dict[str, list[float]] = Field(default_factory=dict)
    sizes: Annotated[dict[str, int], Field(min_length=1)]


@dataclass(frozen=True)
class KeptScores:
    """The scores that are kept of the models of one search. document: its resolved config."""

    document: Mapping[str, Any]

    def read(self, split: str, model: Path, sizes: Mapping[str, int]) -> TaskScores | None:
        """The scores of a stored model on a split; None: they are not kept, or damaged. sizes: examples by task."""
        file = self._file(split, model)
        if file is None:
            return None
        content = read_kept(file, MAX_BYTES)
        if content is None:
            return None
        # This program has written it: its version is a part of the file's name.
        kept = _Kept.model_validate_json(content)
        lengths = {(task, len(values)) for task, metrics in kept.matrices.items() for values in metrics.values()}
        if kept.sizes != sizes or lengths != set(sizes.items()):
            return None

        def row(values: list[float]) -> np.ndarray:
            return np.array([values], np.float32)

        return TaskScores(
            {
                task: {metric: row(values) for metric, values in metrics.items()}
                for task, metrics in kept.matrices.items()
            },
            {task: [texts] for task, texts in kept.outputs.items()},
            {task: row(values) for task, values in kept.log_probabilities.items()},
        )

    def keep(self, split: str, model: Path, sizes: Mapping[str, int], scores: TaskScores) -> None:
        """Keep the finite scores of a stored model on a split, if the folder can be written, and remove the oldest."""
        file = self._file(split, model)
        if file is None:
            return
        rows = [*(values for metrics in scores.matrices.values() for values in metrics.values())]
        if not all(np.isfinite(values).all() for values in (*rows, *scores.log_probabilities.values())):
            return
        kept = _Kept(
            matrices={
                task: {metric: values[0].tolist() for metric, values in metrics.items()}
                for task, metrics in scores.matrices.items()
            },
            outputs={task: texts for task, (texts,) in scores.outputs.items()},
            log_probabilities={task: values[0].tolist() for task, values in scores.log_probabilities.items()},
            sizes=dict(sizes),
        )
        keep(file, kept.model_dump_json().encode())
        with suppress(OSError):
            by_age = sorted(file.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
            for old in by_age[:-MAX_FILES]:
                remove_file(old)

    def _file(self, split: str, model: Path) -> Path | None:
        """The file of a model's scores; None for a model that is no input, such as the winner of an earlier stage."""
        inputs, search = self.document["inputs"], self.document.get("search", {})
        content = _by_content(str(model), inputs)
        if isinstance(content, str):
            return None
        settings = {key: value for key, value in self.document.items() if key not in SEARCH_KEYS}
        if split != "heldout":
            # These divide the examples.
            settings |= {key: search.get(key) for key in ("validation", "rungs")}
        parts = [split, content, _by_content(settings, inputs), _program()]
        return cache_folder() / "scores" / f"{sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}.json"


def kept_scores(document: Mapping[str, Any], processes: int) -> KeptScores | None:
    """The kept scores of a search with this resolved config. None where a task's scores do not follow from its file
    alone; and in several processes, which score a model together and may not keep the same."""
    kinds = {task.get("kind") for task in document["tasks"]}
    return KeptScores(document) if processes == 1 and kinds <= TEXT_KINDS and not document.get("plugins") else None


def _by_content(value: Any, inputs: Mapping[str, str]) -> Any:
    """A config's value, with files' hashes in place of their paths, and those of all files in place of a folder's."""
    if isinstance(value, Mapping):
        return {key: _by_content(part, inputs) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(part, inputs) for part in value]
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    inside = {
        os.path.relpath(file, value): digest for file, digest in inputs.items() if Path(file).is_relative_to(value)
    }
    return inside or value


@cache
def _program() -> list[str]:
    """The parts of a score that are not in a config: this program, the libraries below it, and the device."""
    devices, flags = jax.devices(), os.environ.get("XLA_FLAGS", "")
    settings = [
        str(jax.config.values[f"jax_{name}"])
        for name in ("default_matmul_precision", "disable_most_optimizations", "enable_x64")
    ]
    device = processor_name() if devices[0].platform == "cpu" else devices[0].device_kind
    return [
        code_digest(Path(__file__).parents[1]),
        *map(version, LIBRARIES),
        f"{len(devices)} x {device}",
        flags,
        *settings,
    ]
