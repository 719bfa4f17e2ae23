"""Checks of a folder before torch's libraries open it: these take a stranger's numbers as they are, and would build and
allocate for hours what no file holds."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.folder import open_folder
from evojax_merge.checkpoints.json_files import read_json, read_json_object
from evojax_merge.errors import InputError, shown

# Files of a tokenizer, which are larger than any other JSON of a model, and which `load_tokenizer` checks.
VOCABULARIES = ("tokenizer.json", "vocab.json")
# Keys of configs that count modules, each of which has a tensor.
MODULES = re.compile(r"(?:.*_)?(?:layers?|depths?|blocks?|stages|experts|layers_per_block)")
# Keys of configs, each with the least and the most that its numbers may be: also of entries of lists, and of sizes.
KEYS: tuple[tuple[re.Pattern[str], int, int], ...] = (
    (MODULES, 0, 1_000),
    (re.compile(r"(?:.*_)?labels"), 0, 10**6),
    (re.compile(r"(?:.*_)?(?:timesteps|mel_bins|feature_size|sampling_rate|n_fft|chunk_length|hop_length)"), 1, 10**6),
    (re.compile(r"(?:.*_)?heads|(?:hidden|image|patch|sample)_size|(?:num|in|out)_channels|d_model"), 1, 10**6),
    (re.compile(r"(?:.*_)?(?:size|dim|channels|embeddings)"), -1, 10**8),
)
# Numbers of a module that may be in no file: such as tables of positions.
MOST_UNSTORED = 10**8
# The sides of a picture, and their names in the configs of image processors. Some have pixels for edges.
SIDES, EDGES, MOST_SIDE = ("size", "crop_size", "height", "width"), ("shortest_edge", "longest_edge"), 16_384


def check_json(folder: Path) -> None:
    """Raises InputError for JSON files of a folder that the libraries' readers would fail on, or never end."""
    for file in sorted(folder.glob("*.json")):
        if file.name not in VOCABULARIES:
            read_json(file)


def check_counts(file: Path, tensors: int = 0) -> None:
    """Raises InputError for a config that asks for more modules than there are tensors in the weights beside it, or for
    sizes that no model has."""
    for key, name, value in _numbers("", read_json_object(file, missing={})):
        names, least, most = next((known for known in KEYS if known[0].fullmatch(name)), (None, value, value))
        most = max(most, tensors) if names is MODULES else most
        if not least <= value <= most:
            raise InputError(file, f"{key}: {value:,}; expected {least:,} to {most:,}")
    labels = read_json_object(file, missing={}).get("id2label")
    if labels is not None and not (
        isinstance(labels, dict) and all(key.isascii() and key.isdigit() and len(key) < 10 for key in labels)
    ):
        raise InputError(file, f"id2label: {shown(labels)}; expected a mapping of labels' numbers to their names")


def check_labels(where: object, labels: Any, first: object, expected: Any) -> None:
    """Raises InputError where a classifier's id2label has a label under another number than that of the `first` one: a
    merge has one head."""
    numbers, first_numbers = (
        {name: str(number) for number, name in one.items() if isinstance(name, str)} if isinstance(one, dict) else {}
        for one in (labels, expected)
    )
    for name, number in numbers.items():
        if first_numbers.get(name, number) != number:
            raise InputError(
                where, f"label {name!r} is number {number}, but {first_numbers[name]} in {first}; expected the labels "
                f"of {first}, in the same order",
            )  # fmt: skip


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
    import torch

    entries = open_folder(folder).entries.values()
    stored = sum(math.prod(entry.shape) for entry in entries)
    check_counts(config, len(entries))
    try:
        with torch.device("meta"):
            module = build(read_json_object(config, missing={}))
        asked = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
    # Not every module can be built without its tensors. The library says what is wrong with the config.
    except Exception:
        return
    if asked > 2 * stored + MOST_UNSTORED:
        raise InputError(config, f"describes a model of {asked:,} numbers; its weights have {stored:,}")


def processor_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a folder's image processor or feature extractor, and its settings in it. Where a model takes texts as
    well, transformers 5 writes these into the file of the whole processor, and looks for them there first."""
    whole, alone = folder / "processor_config.json", folder / "preprocessor_config.json"
    document = read_json_object(whole, missing={})
    for part in ("image_processor", "feature_extractor"):
        if isinstance(document.get(part), dict):
            return whole, document[part]
    return alone, read_json_object(alone, missing={})


def check_processor(folder: Path) -> None:
    """Raises InputError for an image processor or a feature extractor whose config has impossible sizes or rates."""
    check_json(folder)
    file, document = processor_settings(folder)
    rate = document.get("sampling_rate", 1)
    if not isinstance(rate, int) or isinstance(rate, bool):
        raise InputError(file, f"sampling_rate: {shown(rate)}; expected the number of samples in a second")
    numbers = list(_numbers("", document))
    sides = SIDES if {*EDGES} <= {name for _, name, _ in numbers} else SIDES + EDGES
    for key, name, value in numbers:
        if name in sides and not 0 < value <= MOST_SIDE:
            raise InputError(file, f"{key}: {value:,}; expected a picture's side of 1 to {MOST_SIDE:,} pixels")
    check_counts(file)
