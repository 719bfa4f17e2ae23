"""Folders of strangers that transformers, diffusers or sentence-transformers open: by classes of their own, and out of
safetensors. Code that comes with a model is never run, and nobody is asked whether to run it.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.config_file import check_dtype
from evojax_merge.checkpoints.folder import check_no_pickle, weight_map
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.errors import InputError, shown
from evojax_merge.system.regular_file import file_inside

# The kinds of classes that a component of a pipeline may have, by library; the first kind has weights.
COMPONENTS = {
    "diffusers": ("ModelMixin", "SchedulerMixin"),
    "transformers": (
        "PreTrainedModel", "PreTrainedTokenizerBase", "ImageProcessingMixin", "FeatureExtractionMixin",
        "ProcessorMixin",
    ),
}  # fmt: skip
# The keys by which files name classes that transformers opens by itself, and the kinds that these may have.
NAMING = {
    "tokenizer_class": ("PreTrainedTokenizerBase",),
    "processor_class": ("ProcessorMixin",),
    "image_processor_type": ("ImageProcessingMixin",),
    "video_processor_type": ("ImageProcessingMixin",),
    "feature_extractor_type": ("FeatureExtractionMixin", "ImageProcessingMixin"),
}
# The files in which they stand.
NAMED_IN = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip


def is_kind(library: str, kind: Any, kinds: Sequence[str]) -> bool:
    """Return whether a class is one of these kinds in a library, or stands for one that lacks another package."""
    bases = tuple(getattr(importlib.import_module(library), name) for name in kinds)
    return isinstance(kind, type) and ((issubclass(kind, bases) and kind not in bases) or hasattr(kind, "_backends"))


def library_class(where: object, key: str, library: str, name: object, kinds: Sequence[str]) -> Any:
    """The class that a file names. Raises InputError, with the file `where`, unless it is one of the library's own, of
    one of these kinds (none: the library is another): an Auto class opens others, by code that comes with a model."""
    module = importlib.import_module(library) if kinds else None
    kind = getattr(module, name, None) if isinstance(name, str) else None
    if module is None or not is_kind(library, kind, kinds):
        owner = f"{library} {getattr(module, '__version__', '')}".strip()
        what = f"{owner} has no such class of a model, and code that comes with a model is not run"
        raise InputError(where, f"{key}: {shown(name)}; {what}")
    return kind


def check_folder(folder: Path) -> None:
    """Raises InputError for a folder of which a library would open more than its own classes and safetensors: files
    that name another class, weights that are pickles, and files outside of the folder."""
    from transformers import dynamic_module_utils

    # With no time for an answer, transformers asks no question.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    documents = {name: read_json_object(folder / name, missing={}) for name in NAMED_IN}
    for name, document in documents.items():
        for part in (document, *(value for value in document.values() if isinstance(value, dict))):
            for key, kinds in NAMING.items():
                _check_named(folder / name, key, part.get(key), kinds)
    check_dtype(folder / "config.json", documents["config.json"])
    for name, key in (("tokenizer_config.json", "fast_tokenizer_files"), ("config.json", "transformers_weights")):
        value = documents[name].get(key)
        for file in value if isinstance(value, list) else [] if value is None else [value]:
            check_no_pickle(file_inside(f"{folder / name}: {key}", folder, file))
    templates = documents["tokenizer_config.json"].get("chat_template")
    if isinstance(templates, list):
        templates = [one.get("name", "default") for one in templates if isinstance(one, dict)]
    # A saved tokenizer has a file for each of several templates.
    for template in templates if isinstance(templates, (list, dict)) else ():
        file_inside(f"{folder / 'tokenizer_config.json'}: chat_template", folder, template, plain=True)
    if "audio_tokenizer" in documents["processor_config.json"]:
        raise InputError(folder / "processor_config.json", "audio_tokenizer: names another model; expected none")
    for index in folder.glob("*.safetensors.index.json"):
        weight_map(index)


def _check_named(file: Path, key: str, name: Any, kinds: Sequence[str]) -> None:
    """Raises InputError where a name is that of something else in transformers. A name that transformers does not have
    stands for a class of old, or for code that is not run."""
    import transformers

    stem = name.removesuffix("Fast") if isinstance(name, str) else ""
    for candidate in (name, stem, f"{stem}Fast") if stem else ():
        kind = getattr(transformers, candidate, None)
        if kind is not None and not is_kind("transformers", kind, kinds):
            raise InputError(file, f"{key}: {shown(name)}; expected a class of the kind {kinds[0]}")
