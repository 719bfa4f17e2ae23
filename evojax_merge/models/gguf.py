"""The form of an architecture's GGUF files (llama.cpp's format): plain data that an `Architecture` carries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from evojax_merge.models.config_keys import Expected


class GgufTensor(Protocol):
    """A tensor of a GGUF file, with its shape in Hugging Face's order."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> np.ndarray: ...


class GgufFile(Protocol):
    """A GGUF file's metadata and tensors, by their names in the file."""

    @property
    def path(self) -> object: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, GgufTensor]: ...
    @property
    def embedding(self) -> GgufTensor:
        """The tokens' embedding, `[vocab, hidden]`."""
        ...

    def key(self, name: str) -> str:
        """A key of the metadata: `name`, behind the architecture's name where `name` begins with a dot."""
        ...

    def value(self, name: str, expected: Expected, default: Any = None) -> Any:
        """The metadata of `key(name)`. Raises InputError where the key is missing and has no default, or its value
        breaks the rule `expected`."""
        ...


@dataclass(frozen=True)
class Gguf:
    """The form of an architecture's GGUF files.

    name: general.architecture; has_experts: whether this architecture reads the files with experts, where two
    architectures share a name. read_settings: a file -> the keys of config.json; keys that the architecture does not
    read are dropped.

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
