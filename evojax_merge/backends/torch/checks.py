"""Checks of a folder before torch's libraries open it: these take a stranger's numbers as they are, and would build and
allocate for hours what no file holds."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from evojax_merge.checkpoints.folder import open_folder
from evojax_merge.checkpoints.json_files import read_json, read_json_object
from evojax_merge.errors import InputError, shown

# Files of a tokenizer, which are larger than any other JSON of a model, and which `load_tokenizer` checks.
VOCABULARIES = ("tokenizer.json", "vocab.json")
# Keys of configs that count modules, each of which has a tensor, and keys that count entries of a list.
MODULES = re.compile(r"(?:.*_)?(?:layers?|depths?|blocks?|stages|experts|layers_per_block)")
ENTRIES = re.compile(r"(?:.*_)?(?:labels|timesteps|mel_bins|feature_size|n_fft|chunk_length|hop_length)")
MOST_MODULES, MOST_ENTRIES = 1_000, 1_000_000
# Numbers of a module that may be in no file: such as tables of positions.
MOST_UNSTORED = 10**8
# The sides of a picture, and their names in the configs of image processors.
SIDES, MOST_SIDE = {"height", "width", "shortest_edge", "longest_edge"}, 16_384


def check_json(folder: Path) -> None:
    """Raises InputError for JSON files of a folder that the libraries' readers would fail on, or never end."""
    for file in sorted(folder.glob("*.json")):
        if file.name not in VOCABULARIES:
            read_json(file)


def check_counts(file: Path, tensors: int = 0) -> None:
    """Raises InputError for a config that asks for more modules than there are tensors, or for endless lists.
    tensors: how many the weights beside it have."""
    for key, name, value in _numbers("", read_json_object(file, missing={})):
        most = MOST_ENTRIES if ENTRIES.fullmatch(name) else max(MOST_MODULES, tensors)
        if (MODULES.fullmatch(name) or ENTRIES.fullmatch(name)) and not value <= most:
            raise InputError(file, f"{key}: {value:,}; expected at most {most:,}")
    labels = read_json_object(file, missing={}).get("id2label")
    if labels is not None and not (
        isinstance(labels, dict) and all(key.isascii() and key.isdigit() and len(key) < 10 for key in labels)
    ):
        raise InputError(file, f"id2label: {shown(labels)}; expected a mapping of labels' numbers to their names")


def _numbers(above: str, document: Any) -> Iterator[tuple[str, str, float]]:
    """The numbers of a JSON document: the path of each, the name of its last key, and the number."""
    for name, value in document.items() if isinstance(document, dict) else ():
        key = f"{above}{name}"
        if isinstance(value, dict):
            yield from _numbers(f"{key}.", value)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, int | float) and not isinstance(entry, bool):
                yield key, name, entry


def check_model(folder: Path, build: Callable[[Mapping[str, Any]], Any]) -> None:
    """Raises InputError for a folder whose weights are damaged, or whose config.json describes a much larger module
    than they are. build: config -> the module, whose tensors are not allocated."""
    check_json(folder)
    config = folder / "config.json"
    if not any(folder.glob("*.safetensors")):
        check_counts(config)
        return
    entries = open_folder(folder).entries.values()
    check_counts(config, len(entries))
    try:
        with torch.device("meta"):
            module = build(read_json_object(config, missing={}))
        asked = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
    # Not every module can be built without its tensors. The library says what is wrong with the config.
    except Exception:
        return
    stored = sum(math.prod(entry.shape) for entry in entries)
    if asked > 2 * stored + MOST_UNSTORED:
        raise InputError(config, f"describes a model of {asked:,} numbers; its weights have {stored:,}")


def check_processor(folder: Path) -> None:
    """Raises InputError for an image processor or a feature extractor whose config has impossible sizes or rates."""
    check_json(folder)
    file = folder / "preprocessor_config.json"
    check_counts(file)
    for key, name, value in _numbers("", read_json_object(file, missing={})):
        if (name in SIDES or name in ("size", "crop_size")) and not 0 < value <= MOST_SIDE:
            raise InputError(file, f"{key}: {value:,}; expected a picture's side of 1 to {MOST_SIDE:,} pixels")
