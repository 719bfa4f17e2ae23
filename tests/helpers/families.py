"""A base and its fine-tunes, with tasks, in a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evojax_merge.zoo import MODELS, VERSION
from helpers.files import write_lines
from helpers.models import even_records, finetune, random_model, save, tiny_config


@dataclass(frozen=True)
class Family:
    """A base and parents that were made from it, their task file, and the folder they lie in."""

    root: Path
    base: Path
    parents: tuple[Path, ...]
    tasks: Path


def build_family(root: Path, config: Any = None, parents: int = 2, dtype: torch.dtype = torch.float32) -> Family:
    """Write base, parents and `tasks.jsonl` (even_records) below `root`."""
    model = random_model(tiny_config(tie_word_embeddings=True) if config is None else config).to(dtype)
    base = save(model, root / "base")
    folders = tuple(save(finetune(model, k + 1), root / f"parent{k}") for k in range(parents))
    tasks = write_lines(root / "tasks.jsonl", even_records(12, model.config.vocab_size))
    return Family(root, base, folders, tasks)


def stand_in_for_the_zoo(cache: Path, family: Family) -> dict[str, Path]:
    """Put a family's models and examples where a cache folder (XDG_CACHE_HOME) has the demo family's; the models by
    their names."""
    packaged = cache / "evojax-merge" / "zoo" / VERSION / "packaged"
    packaged.mkdir(parents=True)
    folders = dict(zip(MODELS, (family.base, *family.parents), strict=True))
    files = dict.fromkeys(("search.jsonl", "heldout.jsonl"), family.tasks)
    for name, target in (folders | files).items():
        (packaged / name).symlink_to(target)
    return folders
