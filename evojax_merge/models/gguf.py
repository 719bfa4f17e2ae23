"""The form of an architecture's GGUF files (llama.cpp's format): plain data that an `Architecture` carries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.models.config_keys import Expected

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# The metadata of an architecture, and the tensors that hold settings.
Settings = tuple[dict[str, Any], dict[str, np.ndarray]]


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header was read: the metadata of the model and the tokenizer, and the tensors by their names in
    the file, with shapes in Hugging Face's order."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def key(self, name: str) -> str:
        """A key of the metadata: `name`, behind the architecture's name where `name` begins with a dot."""
        return f"{self.metadata['general.architecture']}{name}" if name.startswith(".") else name

    def value(self, name: str, expected: Expected, default: Any = None) -> Any:
        """The metadata of `key(name)`. Raises InputError where the key is missing and has no default, or its value
        breaks the rule `expected`."""
        value = self.metadata.get(self.key(name), default)
        if value is None:
            raise InputError(self.path, f"{self.key(name)}: missing; expected {expected.words} for this architecture")
        return expected.check(self.path, self.key(name), value)

    @property
    def embedding(self) -> Any:
        """The tensor of the tokens' embedding, `[vocab, hidden]`."""
        tensor = self.tensors.get(EMBEDDING)
        if tensor is None:
            raise InputError(self.path, f"has no tensor {EMBEDDING}; expected a whole model")
        if len(tensor.shape) != 2:
            raise InputError(self.path, f"{EMBEDDING} has shape {list(tensor.shape)}; expected a matrix")
        return tensor


@dataclass(frozen=True)
class Gguf:
    """The form of an architecture's GGUF files.

    name: general.architecture; has_experts: whether this architecture reads the files with experts, where two
    architectures share a name. read_settings: a file -> the keys of config.json; keys that the architecture does not
    read are dropped. write_settings: the inverse: the values of the keys that the architecture reads -> the metadata,
    in the form that `GgufFile.value` takes, and the tensors that hold settings; None: files are only read.

    names: the tensor of each leaf, by the leaf's name, with `{layer}` where it has one; empty where the package gguf
    has names for the architecture's tensors. interleaved: whether the rows of the query and key projections are stored
    in pairs. norm_offset: the number by which the norms' weights exceed Hugging Face's. setting_tensors: tensors that
    hold settings, and belong to no leaf.

    config_keys, size_keys: the metadata, in the form that `GgufFile.value` takes, behind each key of config.json, and
    behind each of `Architecture.dimensions`: messages name the metadata instead.
    """

    name: str
    read_settings: Callable[[GgufFile], dict[str, Any]]
    has_experts: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norm_offset: float = 0.0
    setting_tensors: tuple[str, ...] = ()
    config_keys: Mapping[str, str] = field(default_factory=dict)
    size_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    write_settings: Callable[[Mapping[str, Any]], "Settings"] | None = None
