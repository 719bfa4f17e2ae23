"""Model folders of headers alone: enough to plan a search whose weights are not on this machine.

Only the headers of a hub model's safetensors files are downloaded. Each becomes a sparse file that has the whole file's
size and takes the disk space of its header, so that all code that opens model folders can open this one. The tensors
are zeros, except those in which quantised folders store the shapes of their matrices (`shape_contents`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from evojax_merge.checkpoints.adapters import ADAPTER_FILE
from evojax_merge.checkpoints.bitsandbytes import STATE
from evojax_merge.checkpoints.compressed_tensors import SHAPE, group_of, groups_of
from evojax_merge.checkpoints.config_file import decoder_settings, read_decoder_config
from evojax_merge.checkpoints.derived import sources_of
from evojax_merge.checkpoints.folder import (
    FOREIGN_FILES,
    INDEX_FILE,
    PICKLES,
    PIPELINE_INDEX,
    SINGLE_FILE,
    SMALL_FILES,
    VARIANTS,
    weight_map,
)
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.checkpoints.parents import tensor_shapes
from evojax_merge.checkpoints.quantised import QuantisedFolder, dequantised_config
from evojax_merge.checkpoints.references import resolve_by
from evojax_merge.checkpoints.remote import cached, fetched, header, is_address, opened
from evojax_merge.errors import InputError, name_in_messages, print_warning, shown
from evojax_merge.models.architecture import known_architecture
from evojax_merge.system.regular_file import file_inside

# Names of dtypes in safetensors, and bytes.
STORED_DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf", ".npz", *PICKLES})
# No file has more bytes of tensors: file systems refuse files of some more.
MOST_BYTES = 2**42
EMPTY: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's description in a safetensors header; `dtype` as written in the header (F32, BF16, …)."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def write_header_only(file: Path, tensors: Mapping[str, TensorHeader], contents: Mapping[str, bytes] = EMPTY) -> int:
    """Write a safetensors file of these tensors and return its size in bytes. The tensors are zeros, which take no disk
    space, except the bytes of those in `contents`."""
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
    """Resolves the references of a config like `references.resolve_reference`, without downloading weights: a model of
    the hub or of a store that is not in the cache gets a folder of headers below `root`. download_bytes: the size of
    the weights that are not on this machine."""

    root: Path
    download_bytes: int = 0
    known: dict[str, Path] = field(default_factory=dict)

    def resolve(self, where: object, reference: str, relative_to: Path) -> Path:
        """A model's folder, or a folder of its headers. Raises InputError where there is no such model, or where the
        hub does not answer."""

        def fetch(name: str, revision: str | None) -> Path:
            if reference not in self.known:
                self.known[reference] = self._cached(name, revision) or self._fetch(name, revision)
            return self.known[reference]

        if is_address(reference):
            if reference not in self.known:
                self.known[reference] = cached(reference) or self._fetch_from_store(where, reference)
            return self.known[reference]
        return resolve_by(where, reference, relative_to, "its headers", fetch)

    def shaped(self, model: Path) -> Path:
        """The model, or where it is a folder with a config.json and no weights, one of headers with the shapes that the
        config means. Raises InputError as `read_decoder_config` does."""
        config = model / "config.json"
        has_weights = sources_of(model).kind or any(file.suffix.lower() in WEIGHT_SUFFIXES for file in model.iterdir())
        if not config.is_file() or has_weights:
            return model
        if str(model) not in self.known:
            settings = decoder_settings(read_json_object(config, missing={}))
            dtype = str(settings.get("dtype") or settings.get("torch_dtype") or "bfloat16")
            stored, itemsize = STORED_DTYPES.get(dtype, STORED_DTYPES["bfloat16"])
            headers = {
                tensor: TensorHeader(stored, shape, itemsize * math.prod(shape))
                for tensor, shape in tensor_shapes(read_decoder_config(config, settings)).items()
            }
            self.known[str(model)] = self._written(str(model), model, {SINGLE_FILE: headers}, False)
            print_warning(f"{model}: holds no weights; planned by the shapes that its config.json means, in {stored}")
        return self.known[str(model)]

    def _fetch_from_store(self, where: object, reference: str) -> Path:
        """A folder of the small files and the headers of a model in a store; a model of one file as a whole."""
        model = opened(where, reference)
        if model.is_file:
            return fetched(where, reference)
        small = fetched(where, reference, weights=False)
        tensors = {
            file: _tensor_headers(f"{where}: {reference}: {file}", header(model, file))
            for file in model.weight_names(small)
        }
        return self._written(reference, small, tensors, PIPELINE_INDEX in model.sizes)

    @staticmethod
    def _cached(name: str, revision: str | None) -> Path | None:
        """The model's folder in the hub's cache; None unless all files are there."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        if (folder / PIPELINE_INDEX).exists():
            # The components that have weights have the config of a model.
            parts = [part for part in folder.iterdir() if (part / "config.json").is_file()]
            return folder if all(any(part.glob("*.safetensors")) for part in parts) else None
        index = folder / INDEX_FILE
        weights = weight_map(index).values() if index.exists() else [ADAPTER_FILE]
        is_whole = (folder / SINGLE_FILE).exists() or all((folder / file).exists() for file in weights)
        return folder if is_whole else None

    def _fetch(self, name: str, revision: str | None) -> Path:
        """A folder of a repository's small files and the headers of its weights; of a repository of diffusers, with
        those of its components."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.utils import filter_repo_objects

        small = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_FILES, ignore_patterns=["*/*"]))
        # The snapshot's folder has the name of its commit: the headers come from the same one.
        commit, index, is_pipeline = small.name, small / INDEX_FILE, (small / PIPELINE_INDEX).exists()
        listed = HfApi().list_repo_files(name, revision=commit)
        if is_pipeline:
            patterns = [PIPELINE_INDEX, *(f"*/{pattern}" for pattern in SMALL_FILES)]
            small = Path(snapshot_download(name, revision=commit, allow_patterns=patterns, ignore_patterns=VARIANTS))
            files = filter_repo_objects(listed, allow_patterns=["*/*.safetensors"], ignore_patterns=VARIANTS)
        elif SINGLE_FILE in listed:
            files = [SINGLE_FILE]
        elif index.exists():
            files = sorted(set(weight_map(index).values()))
        else:
            # An adapter, or a file of another name.
            files = filter_repo_objects(
                listed, allow_patterns=["*.safetensors"], ignore_patterns=["*/*", FOREIGN_FILES]
            )
        tensors = {}
        for file in files:
            metadata = HfApi().parse_safetensors_file_metadata(name, file, revision=commit)
            document = {tensor: vars(each) for tensor, each in metadata.tensors.items()}
            tensors[file] = _tensor_headers(f"{name}: {file}", document)
        return self._written(name, small, tensors, is_pipeline)

    def _written(
        self, name: str, small: Path, tensors: Mapping[str, dict[str, TensorHeader]], is_pipeline: bool
    ) -> Path:
        """A folder with links to small files, and files of headers. tensors: by file; name: the model's, in
        messages."""
        # Its path ends as that of the hub's cache does, which holds the model's name.
        folder = self.root.joinpath(str(len(self.known)), *small.relative_to(small.anchor).parts[-3:])
        folder.mkdir(parents=True)
        name_in_messages(folder, name)
        for source in small.rglob("*") if is_pipeline else small.iterdir():
            # A file of weights that is in the cache would be written to through its link.
            if source.suffix != ".safetensors" and not (is_pipeline and source.is_dir()):
                link = folder / source.relative_to(small)
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(source.resolve())
        every = {tensor: header for headers in tensors.values() for tensor, header in headers.items()}
        contents = {} if is_pipeline else shape_contents(folder, every)
        for file, headers in tensors.items():
            file_contents = {tensor: contents[tensor] for tensor in headers if tensor in contents}
            self.download_bytes += write_header_only(file_inside(name, folder, file), headers, file_contents)
        return folder


def _tensor_headers(where: str, document: Mapping[str, Any]) -> dict[str, TensorHeader]:
    """The headers of the tensors that the header of a safetensors file describes. Raises InputError for an entry that
    is no tensor's."""
    headers = {}
    for tensor, entry in document.items():
        try:
            begin, end = map(int, entry["data_offsets"])
            headers[tensor] = TensorHeader(str(entry["dtype"]), tuple(map(int, entry["shape"])), end - begin)
            if not all(0 <= number <= MOST_BYTES for number in (end - begin, *headers[tensor].shape)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise InputError(where, f"{shown(tensor)}: expected a tensor's dtype, shape and data_offsets") from None
    total = sum(header.nbytes for header in headers.values())
    if total > MOST_BYTES:
        raise InputError(where, f"describes {total:,} bytes of tensors; expected at most {MOST_BYTES:,}")
    return headers


# ---------------------------------------------------------------------------------------------------------------
# Shapes of quantised matrices


def shape_contents(folder: Path, tensors: Mapping[str, TensorHeader]) -> dict[str, bytes]:
    """The bytes of those tensors of a quantised folder that store the shapes of its packed matrices, bitsandbytes'
    states of four bits and compressed-tensors' `weight_shape`, as far as headers and the config imply them.

    A matrix has the shape of the architecture's tensor whose name ends as its own does, if the number of elements fits.
    Any other is a single row or, in compressed-tensors, as wide as its words.
    """
    states = {name: name.partition(STATE)[0] for name in tensors if STATE in name}
    shapes = {name: name.removesuffix(SHAPE) for name in tensors if name.endswith(SHAPE)}
    if not states and not shapes:
        return {}
    tail_shapes, contents = dict[str, tuple[int, ...]](), dict[str, bytes]()
    settings = decoder_settings(dequantised_config(folder))
    if known_architecture(settings.get("model_type")) is not None:
        # By the ends of names, which are the same in larger models.
        for name, shape in tensor_shapes(read_decoder_config(folder / "config.json", settings)).items():
            tail_shapes[name.partition(".")[2] if name.count(".") > 1 else name] = shape
    quantised = QuantisedFolder(folder)
    groups = groups_of(quantised) if shapes else []
    for name, weight in states.items():
        contents[name] = _state(tail_shapes, weight, tensors).ljust(tensors[name].nbytes)[: tensors[name].nbytes]
    for name, module in shapes.items():
        packed = tensors.get(f"{module}.weight_packed")
        if packed is None or len(packed.shape) != 2 or tensors[name].nbytes not in (8, 16):
            continue
        rows, words = packed.shape
        bits = group_of(quantised, groups, module).bits
        if not bits:
            continue
        most, per_word = rows * words * 32 // bits, 32 // bits
        shape = _shape_of(tail_shapes, f"{module}.weight", most - rows * (per_word - 1), most)
        shape = shape if shape[0] == rows else (rows, words * per_word)
        contents[name] = np.array(shape, np.int64).astype(f"<i{tensors[name].nbytes // 2}").tobytes()
    return contents


def _shape_of(tail_shapes: Mapping[str, tuple[int, ...]], name: str, least: int, most: int) -> tuple[int, ...]:
    """The shape of a packed matrix of `least` to `most` numbers; a single row where no tensor of the architecture
    fits."""
    parts = name.split(".")
    candidates = (tail_shapes.get(".".join(parts[start:])) for start in range(len(parts)))
    fitting = (
        shape for shape in candidates if shape is not None and len(shape) == 2 and least <= math.prod(shape) <= most
    )
    return next(fitting, (1, most))


def _state(tail_shapes: Mapping[str, tuple[int, ...]], weight: str, tensors: Mapping[str, TensorHeader]) -> bytes:
    """A bitsandbytes state that fits the headers of its parts, with the keys that are read."""
    parts = {part: tensors.get(f"{weight}{part}") for part in ("", ".absmax", ".nested_absmax")}
    codes, scales, outer = parts.values()
    if codes is None or scales is None:
        return b""
    shape = _shape_of(tail_shapes, weight, 2 * codes.nbytes - 1, 2 * codes.nbytes)
    blocks = math.prod(scales.shape)
    state = {"shape": list(shape), "blocksize": _block(math.prod(shape), blocks)}
    if outer is not None:
        state |= {"nested_blocksize": _block(blocks, math.prod(outer.shape)), "nested_offset": 0.0}
    return json.dumps(state, separators=(",", ":")).encode()


def _block(count: int, blocks: int) -> int:
    """The smallest power of two of which at most `blocks` blocks cover `count` values; 1 without blocks."""
    size = 1
    while blocks and -(-count // size) > blocks:
        size *= 2
    return size
