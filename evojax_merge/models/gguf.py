"""How GGUF files (llama.cpp's format) keep the models of an architecture: plain data that an `Architecture` carries."""

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
        """The metadata of `key(name)`. Raises InputError where it is missing and has no default, or is not what is
        expected."""
        ...


@dataclass(frozen=True)
class Gguf:
    """The form of an architecture's GGUF files.

    name: general.architecture; has_experts: whether the files with experts are this architecture's, where two
    architectures share a name. read_settings: a file -> the keys of config.json; those that the architecture does not
    read are left out.

    names: the tensor of each leaf, by the leaf's name, with `{layer}` where it has one; empty where the package gguf
    knows the architecture's tensors. interleaved: whether rows of the query and key projections are kept in pairs.
    norm_offset: how much more than Hugging Face's the norms' weights are. setting_tensors: tensors that hold settings,
    and belong to no leaf.

    config_keys, size_keys: the metadata, as `GgufFile.value` takes it, behind each key of config.json, and behind each
    of `Architecture.dimensions`: what messages name instead.
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
