"""Writes model folders as streamed safetensors shards, and checks what a new folder may replace."""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import BinaryIO

import numpy as np

from evojax_merge.checkpoints.folder import DTYPE_NAMES, INDEX_FILE, PICKLES, SINGLE_FILE
from evojax_merge.checkpoints.quantised import FP8
from evojax_merge.checkpoints.tokens import TOKENIZER_FILES
from evojax_merge.errors import InputError
from evojax_merge.system.file_system import MOST_READ, check_free
from evojax_merge.system.regular_file import read_regular
from evojax_merge.version import __version__

MAX_SHARD_BYTES = 5 * 10**9


# The list of the folder's files, beside the weights, which tells them from anybody else's.
MARKER = "evojax_merge.json"
CARD = "README.md"
# The recipe of the merge, under the name that mergekit gives it.
RECIPE = "mergekit_config.yml"
# The tag of this program's cards, in their front matter.
TAG = "evojax-merge"
# The settings by which a larger model's images, sounds and films are prepared.
PROCESSOR_FILES = (
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
# The files that a model folder of this program can hold where it has this program's card, but no marker.
USUAL_FILES = {
    "config.json", "generation_config.json", CARD, RECIPE, SINGLE_FILE, INDEX_FILE, *PROCESSOR_FILES, *TOKENIZER_FILES,
}  # fmt: skip
# The files by which a folder is seen to be a search's run.
RUN_FILES = ("config.yaml", "history.jsonl")
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# This many evenly spaced blocks of a large file tell whether it is the file that was written.
BLOCKS, BLOCK_BYTES = 64, 4096
# The names of dtypes in headers.
NAMES = DTYPE_NAMES | {FP8: "F8_E4M3"}
# The metadata by which libraries recognise a file of torch's tensors.
PYTORCH: Mapping[str, str] = MappingProxyType({"format": "pt"})


# ---------------------------------------------------------------------------------------------------------------
# Ownership of folders


def write_marker(folder: Path) -> None:
    """Write the marker, which lists the files of a complete model folder with their fingerprints."""
    files = {
        path.relative_to(folder).as_posix(): fingerprint(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    document = {"written_by": f"evojax-merge {__version__}", "files": files}
    (folder / MARKER).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def fingerprint(file: Path) -> str:
    """sha256 of a file's size and of `BLOCKS` blocks of the file, or of the whole file where it is no larger than the
    blocks."""
    size = file.stat().st_size
    total = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as handle:
        if size <= BLOCKS * BLOCK_BYTES:
            total.update(handle.read())
        else:
            for i in range(BLOCKS):
                handle.seek((size - BLOCK_BYTES) * i // (BLOCKS - 1))
                total.update(handle.read(BLOCK_BYTES))
    return total.hexdigest()


def check_output(target: Path, keep: Sequence[Path]) -> None:
    """Raises InputError where a model must not be written to `target`, or must not replace what is there.

    `keep`: files and folders that are read; the target must not be, hold or lie in any of them. Only a folder that this
    program wrote, without any other file, may be replaced.
    """
    place = Path(os.path.realpath(target))
    check_outside(target, keep)
    for path in keep:
        if _identity(path) is not None and _identity(place) in _lineage(path):
            raise InputError(target, f"holds {path}, which this command reads; choose another folder")
    if os.path.exists(place):
        if _identity(place) in _lineage(Path.cwd()):
            raise InputError(target, "is or holds the working directory; choose another folder")
        if os.path.ismount(place):
            raise InputError(target, "is a mount point, which cannot be replaced; choose a folder inside of it")
        check_ours(target)


def check_new_model(target: Path, overwrite: bool, keep: Sequence[Path]) -> None:
    """Raises InputError where a model must not be written to `target`. The message suggests --overwrite for a folder
    that it would replace, and for no other. keep: see `check_output`."""
    suffix = target.suffix.lower()
    if suffix in (".gguf", ".npz", ".safetensors", *PICKLES):
        what = f"is the name of a {suffix[1:].upper() if suffix == '.gguf' else suffix} file, and a folder is written"
        raise InputError(target, f"{what} (with model.safetensors in it); choose a name of a folder")
    if os.path.isdir(target):
        check_output(target, keep)
    check_free(target, overwrite)


def check_outside(target: Path, keep: Sequence[Path]) -> None:
    """Raises InputError where `target` is one of the files and folders that are read, or lies in one of them."""
    above = _lineage(target)
    for path in keep:
        identity = _identity(path)
        if identity is not None and identity in above:
            lies = "is" if identity == _identity(target) else "lies inside of"
            raise InputError(target, f"{lies} {path}, which this command reads; choose another folder")


def _identity(path: Path) -> tuple[int, int] | None:
    """The device and inode of a file, which all its names share; None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _lineage(path: Path) -> set[tuple[int, int] | None]:
    """The identities of a path and of all folders above it, as far as they exist."""
    real = Path(os.path.realpath(path))
    return {_identity(folder) for folder in (real, *real.parents)} - {None}


def check_ours(folder: Path) -> None:
    """Raises InputError where a folder is a search's run, else naming the first file that this program did not write,
    or that has changed since."""
    if _is_run(folder):
        raise InputError(folder, "is a run of a search; choose another folder")
    _check_entries(folder, "", own_names(folder))


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in RUN_FILES)


def own_names(folder: Path) -> Mapping[str, str | None]:
    """The names, in a model folder, of the files that this program wrote, with their fingerprints where it noted
    them."""
    try:
        files = json.loads(read_regular(folder / MARKER, "a list of files", MOST_READ))["files"]
        return {name: str(files[name]) for name in files} | {MARKER: None}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    try:
        text = read_regular(folder / CARD, "a model card", MOST_READ).decode()
    except (OSError, ValueError):
        text = ""
    # Without a marker: by this program's tag in the front matter of the card.
    carded = text.startswith("---\n") and f"- {TAG}\n" in text.partition("\n---\n")[0] + "\n"
    return {n: None for n in os.listdir(folder) if carded and (n in USUAL_FILES or SHARD_NAME.fullmatch(n))}


def _check_entries(folder: Path, above: str, expected: Mapping[str, str | None]) -> None:
    advice = "choose another folder, or remove this one yourself"
    names = sorted(os.listdir(folder / above))
    if names and not (folder / above).stat().st_mode & stat.S_IWUSR:
        raise InputError(folder, f"{above or 'it'} is write-protected; {advice}")
    for name in (f"{above}{entry}" for entry in names):
        file = folder / name
        if file.is_dir() and not file.is_symlink() and any(other.startswith(f"{name}/") for other in expected):
            _check_entries(folder, f"{name}/", expected)
            continue
        if _is_run(file) or (file / MARKER).is_file():
            kind = "a run of a search" if _is_run(file) else "a model"
            raise InputError(folder, f"holds {name!r}, {kind}; choose another folder")
        if name not in expected or file.is_symlink() or not file.is_file():
            raise InputError(folder, f"holds {name!r}, which evojax-merge did not write; {advice}")
        if not file.stat().st_mode & stat.S_IWUSR:
            raise InputError(folder, f"holds {name!r}, which is write-protected; {advice}")
        if expected[name] not in (None, fingerprint(file)):
            raise InputError(folder, f"holds {name!r}, which was changed after evojax-merge wrote it; {advice}")


def require_space(target: Path, nbytes: int) -> None:
    """Raises InputError where the disk that `target` will be on has less than `nbytes` free."""
    place = Path(os.path.realpath(target))
    folder = next(path for path in (place, *place.parents) if os.path.exists(path))
    disk = shutil.disk_usage(folder)
    if disk.total == 0:
        raise InputError(target, f"cannot be written: {folder} is on no disk; choose another place")
    if disk.free < nbytes:
        raise InputError(target, f"needs {nbytes / 1e6:,.1f} MB, but the disk has {disk.free / 1e6:,.1f} MB free")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that is going to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class ShardWriter:
    """Writes tensors, in the order of `specs`, as one `model.safetensors` or as shards with an index.

    `specs` determine the headers, so that each tensor goes to disk as it comes and is not kept. stem: another beginning
    of the files' names; metadata: the texts beside the tensors.
    """

    def __init__(
        self, folder: Path, specs: dict[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES,
        stem: str = "model", metadata: Mapping[str, str] = PYTORCH,
    ) -> None:  # fmt: skip
        from huggingface_hub import split_state_dict_into_shards_factory

        self.folder, self.specs, self.stem, self.metadata = folder, specs, stem, metadata
        split = split_state_dict_into_shards_factory(
            specs,
            get_storage_size=lambda spec: spec.nbytes,
            get_storage_id=lambda spec: None,
            filename_pattern=f"{stem}{{suffix}}.safetensors",
            max_shard_size=max_shard_bytes,
        )
        self._order = [(file, name) for file, names in split.filename_to_tensors.items() for name in names]
        self._files = split.filename_to_tensors
        self._index = split.tensor_to_filename if split.is_sharded else None
        self._next = 0
        self._handle: BinaryIO | None = None

    @property
    def order(self) -> list[str]:
        """The order in which `write` wants the tensors."""
        return [name for _, name in self._order]

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.close()
        if kind is None and self._next != len(self._order):
            raise RuntimeError(f"{len(self._order) - self._next} tensors were not written")

    def write(self, name: str, values: np.ndarray) -> None:
        file, expected = self._order[self._next]
        spec = self.specs[name]
        if name != expected or values.shape != spec.shape or values.dtype != spec.dtype:
            raise RuntimeError(f"wrote {name} {values.dtype}{values.shape}, expected {expected} {spec}")
        if self._handle is None:
            self._handle = (self.folder / file).open("wb")
            self._handle.write(self._header(self._files[file]))
        self._handle.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._next += 1
        if self._next == len(self._order) or self._order[self._next][0] != file:
            self._handle.close()
            self._handle = None
        if self._next == len(self._order):
            self._write_index()

    def reserve(self) -> None:
        """Write the files in their final size, with zeros for the tensors: holes, which take no space on most disks."""
        for file, names in self._files.items():
            with (self.folder / file).open("wb") as handle:
                handle.write(self._header(names))
                handle.truncate(handle.tell() + sum(self.specs[name].nbytes for name in names))
        self._write_index()

    def _write_index(self) -> None:
        if self._index is not None:
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._index}
            file = self.folder / f"{self.stem}.safetensors.index.json"
            file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _header(self, names: list[str]) -> bytes:
        return safetensors_header({name: self.specs[name] for name in names}, self.metadata)


def safetensors_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], nbytes: int = 0) -> bytes:
    """The header of a safetensors file whose tensors follow in this order, filled up with spaces to `nbytes`."""
    rows: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        rows[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(rows, separators=(",", ":")).encode().ljust(nbytes - 8)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class GrowingFile:
    """A new safetensors file whose tensors are known when they are written: it begins with space for a header of
    `most_tensors` names of up to `longest_name` bytes."""

    def __init__(self, file: Path, most_tensors: int, longest_name: int) -> None:
        # A row of the header has at most 150 bytes beside the name.
        self._space, self._specs = -(-(1024 + most_tensors * (longest_name + 150)) // 8) * 8, dict[str, TensorSpec]()
        self._handle = file.open("wb")
        self._handle.seek(self._space)

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._handle.seek(0)
            self._handle.write(safetensors_header(self._specs, PYTORCH, self._space))
        self._handle.close()

    def write(self, name: str, values: np.ndarray) -> None:
        self._specs[name] = TensorSpec(values.shape, values.dtype)
        self._handle.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
