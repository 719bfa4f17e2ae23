"""Model folders of headers alone: all that a search is planned with, where the weights are not here.

Of a hub model's safetensors files only the headers are fetched. A file is then written that has the whole file's size
and takes the room of its header, so that whatever opens a model folder opens this one; its tensors are zeros, but for
those in which quantised folders say the shapes of their matrices (`shape_contents`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from evojax_merge.checkpoints.bitsandbytes import STATE
from evojax_merge.checkpoints.compressed_tensors import SHAPE, group_of, groups_of
from evojax_merge.checkpoints.config_file import decoder_settings, read_decoder_config
from evojax_merge.checkpoints.folder import (
    INDEX_FILE,
    SINGLE_FILE,
    SMALL_FILES,
    hub_reference,
    local_model,
    weight_map,
)
from evojax_merge.checkpoints.parents import tensor_shapes
from evojax_merge.checkpoints.quantised import dequantised_config
from evojax_merge.errors import InputError
from evojax_merge.models.architecture import known_architecture

NOTHING: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of a tensor: `dtype` as it is written there (F32, BF16, …)."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def write_header_only(file: Path, tensors: Mapping[str, TensorHeader], contents: Mapping[str, bytes] = NOTHING) -> int:
    """Write a safetensors file of these tensors, zeros that take no room but for the bytes of those in `contents`; its
    size in bytes."""
    document, end = dict[str, dict[str, Any]](), 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        document[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(document).encode()
    with file.open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        handle.truncate(8 + len(header) + end)
        for name, content in contents.items():
            handle.seek(8 + len(header) + document[name]["data_offsets"][0])
            handle.write(content)
    return 8 + len(header) + end


@dataclass
class HeaderFolders:
    """Resolves what a config names, as `references.resolve_reference` does, without downloading weights: for a hub
    model that is not in the hub's cache a folder of headers is made below `root`. download_bytes: of what was not
    here."""

    root: Path
    download_bytes: int = 0
    known: dict[str, Path] = field(default_factory=dict)

    def resolve(self, where: object, reference: str, relative_to: Path) -> Path:
        """A model's folder, or that of its headers. Raises InputError where there is none, or no hub to ask."""
        local = local_model(reference, relative_to)
        if local is not None:
            return local
        name, revision = hub_reference(where, reference)
        if reference not in self.known:
            try:
                self.known[reference] = self._cached(name, revision) or self._fetch(name, revision)
            except InputError:
                raise
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise InputError(where, f"{reference}: the hub did not give its headers ({reason})") from None
        return self.known[reference]

    @staticmethod
    def _cached(name: str, revision: str | None) -> Path | None:
        """The model in the hub's cache, where all of it is there."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        files = [SINGLE_FILE] if not (folder / INDEX_FILE).exists() else set(weight_map(folder / INDEX_FILE).values())
        return folder if all((folder / file).exists() for file in files) else None

    def _fetch(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import HfApi, snapshot_download

        small = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_FILES, ignore_patterns=["*/*"]))
        folder = self.root / str(len(self.known))
        folder.mkdir(parents=True)
        for one in small.iterdir():
            (folder / one.name).symlink_to(one.resolve())
        index, files = folder / INDEX_FILE, dict[str, dict[str, TensorHeader]]()
        # The snapshot's folder has the name of its commit: the headers come from the same one.
        for file in sorted(set(weight_map(index).values())) if index.exists() else [SINGLE_FILE]:
            found = HfApi().parse_safetensors_file_metadata(name, file, revision=small.name)
            files[file] = {
                tensor: TensorHeader(row.dtype, tuple(row.shape), row.data_offsets[1] - row.data_offsets[0])
                for tensor, row in found.tensors.items()
            }
        contents = shape_contents(folder, {name: row for tensors in files.values() for name, row in tensors.items()})
        for file, tensors in files.items():
            own = {tensor: contents[tensor] for tensor in tensors if tensor in contents}
            self.download_bytes += write_header_only(folder / file, tensors, own)
        return folder


# ---------------------------------------------------------------------------------------------------------------
# Shapes of quantised matrices


def shape_contents(folder: Path, tensors: Mapping[str, TensorHeader]) -> dict[str, bytes]:
    """The bytes of those tensors of a quantised folder that say the shapes of its packed matrices, as far as headers
    and the config tell them: of bitsandbytes' states of four bits, and of compressed-tensors' `weight_shape`.

    A matrix has the shape of the architecture's tensor whose name ends as its own does, if it has so many numbers;
    one of other modules is a single row.
    """
    states = {name: name.partition(STATE)[0] for name in tensors if STATE in name}
    shapes = {name: name.removesuffix(SHAPE) for name in tensors if name.endswith(SHAPE)}
    if not states and not shapes:
        return {}
    known, contents = _known_shapes(folder), dict[str, bytes]()
    groups = groups_of(folder) if shapes else []
    for name, weight in states.items():
        contents[name] = _state(known, weight, tensors).ljust(tensors[name].nbytes)[: tensors[name].nbytes]
    for name, module in shapes.items():
        packed = tensors.get(f"{module}.weight_packed")
        if packed is None or len(packed.shape) != 2:
            continue
        rows, words = packed.shape
        bits = group_of(folder, groups, module).bits
        if not bits:
            continue
        most, per_word = rows * words * 32 // bits, 32 // bits
        found = _shape_of(known, f"{module}.weight", most - rows * (per_word - 1), most)
        found = found if found[0] == rows else (rows, words * per_word)
        contents[name] = np.array(found, f"<i{tensors[name].nbytes // 2}").tobytes()
    return contents


def _known_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the architecture's tensors by the ends of their names, which larger models have as well."""
    settings = decoder_settings(dequantised_config(folder))
    if known_architecture(settings.get("model_type")) is None:
        return {}
    shapes = tensor_shapes(read_decoder_config(folder / "config.json", settings))
    return {name.partition(".")[2] if name.count(".") > 1 else name: shape for name, shape in shapes.items()}


def _shape_of(known: Mapping[str, tuple[int, ...]], name: str, least: int, most: int) -> tuple[int, ...]:
    """The shape of a packed matrix of `least` to `most` numbers."""
    parts = name.split(".")
    found = (known.get(".".join(parts[start:])) for start in range(len(parts)))
    fitting = (shape for shape in found if shape is not None and len(shape) == 2 and least <= math.prod(shape) <= most)
    return next(fitting, (1, most))


def _state(known: Mapping[str, tuple[int, ...]], weight: str, tensors: Mapping[str, TensorHeader]) -> bytes:
    """A state of bitsandbytes' that fits the headers of its parts, as far as it is read."""
    parts = {part: tensors.get(f"{weight}{part}") for part in ("", ".absmax", ".nested_absmax")}
    codes, scales, outer = parts.values()
    if codes is None or scales is None:
        return b""
    shape = _shape_of(known, weight, 2 * codes.nbytes - 1, 2 * codes.nbytes)
    blocks = math.prod(scales.shape)
    state = {"shape": list(shape), "blocksize": _block(math.prod(shape), blocks)}
    if outer is not None:
        state |= {"nested_blocksize": _block(blocks, math.prod(outer.shape)), "nested_offset": 0.0}
    return json.dumps(state, separators=(",", ":")).encode()


def _block(count: int, blocks: int) -> int:
    """The power of two of which `blocks` make up `count`, the last one in part."""
    size = 1
    while blocks and -(-count // size) > blocks:
        size *= 2
    return size
