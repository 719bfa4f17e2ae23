"""A Hugging Face model folder, opened for reading: tensors by name out of memory-mapped safetensors files.

May import errors and NumPy. Everything is checked while opening, from the headers alone: a missing or truncated
shard, an index that points outside its folder, a folder that only holds pickles.
"""

import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np

from evojax_merge.errors import InputError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, dtype, shape and byte range."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def is_float(dtype: np.dtype) -> bool:
    return dtype in FLOAT_DTYPES.values() or dtype == np.float64


def resolve(where: object, reference: str, relative_to: Path) -> Path:
    """A local folder, or a hub id (`owner/name`, `owner/name@revision`) that is downloaded, with its progress bar.

    A local folder needs no network. `where` says in messages who names it.
    """
    # These two take any text, also what no file can be called.
    for local in (os.path.expanduser(reference), relative_to / reference):
        if os.path.exists(local):
            return Path(local).resolve()
    looks_local = reference.startswith((".", "/", "~")) or reference.count("/") != 1
    if looks_local:
        raise InputError(where, f"{reference}: no such folder; expected a model folder or a hub id 'owner/name'")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(where, f"{reference}: no such folder, and the hub did not give it ({reason})") from None


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises InputError where the file is missing, damaged or truncated."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(file, f"truncated: the header wants {length:,} bytes, the file has {size:,}")
            header = json.loads(handle.read(length))
    except OSError as error:
        raise InputError(file, f"cannot be read ({error.strerror}); expected a safetensors file") from None
    except ValueError:
        raise InputError(file, "not a safetensors file (its header is not valid)") from None
    header.pop("__metadata__", None)
    entries = {}
    for name, row in header.items():
        if row["dtype"] not in DTYPES:
            raise InputError(file, f"{name} has dtype {row['dtype']}; expected one of {', '.join(DTYPES)}")
        start, stop = (8 + length + offset for offset in row["data_offsets"])
        dtype, shape = DTYPES[row["dtype"]], tuple(row["shape"])
        if stop - start != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise InputError(file, f"damaged: {name} {list(shape)} does not fill its {stop - start:,} bytes")
        entries[name] = Entry(file, dtype, shape, start, stop)
    end = max((entry.stop for entry in entries.values()), default=0)
    if end > size:
        raise InputError(file, f"truncated: expected {end:,} bytes, found {size:,}")
    return entries


@dataclass(frozen=True)
class Folder:
    """An opened model folder. `entries` maps tensor names to where they lie; nothing is read until asked for."""

    path: Path
    entries: dict[str, Entry]

    @cached_property
    def config(self) -> dict:
        try:
            return json.loads((self.path / "config.json").read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(self.path / "config.json", f"not valid JSON ({error})") from None

    @cached_property
    def _maps(self) -> dict[Path, mmap.mmap]:
        maps = {}
        for file in self.files:
            with file.open("rb") as handle:
                maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return maps

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, mapped: `uint8[n]`."""
        entry = self.entries[name]
        return np.frombuffer(self._maps[entry.file], np.uint8, entry.stop - entry.start, entry.start)

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own dtype, mapped, not copied (unless the file leaves it unaligned)."""
        entry, raw = self.entries[name], self.raw(name)
        if entry.start % entry.dtype.itemsize:
            raw = raw.copy()
        return raw.view(entry.dtype).reshape(entry.shape)

    def forget(self, name: str) -> None:
        """Let go of the pages that reading a tensor has mapped; the next reading maps them again."""
        entry = self.entries[name]
        start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self._maps[entry.file].madvise(mmap.MADV_DONTNEED, start, entry.stop - start)

    def digest(self, name: str) -> bytes:
        """sha256 of the tensor's content and name: what names this parent in random methods."""
        content = hashlib.sha256(self.raw(name).data)
        content.update(b"\0" + name.encode())
        return content.digest()


def open_folder(path: Path) -> Folder:
    """Open a model folder (one safetensors file, or shards with an index)."""
    if not path.is_dir():
        raise InputError(path, "not a folder; expected a Hugging Face model folder")
    index, single = path / INDEX_FILE, path / SINGLE_FILE
    if index.exists():
        return Folder(path, _open_shards(index))
    if single.exists():
        return Folder(path, read_header(single))
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return Folder(path, read_header(others[0]))
    if others:
        raise InputError(path, f"holds {len(others)} safetensors files but no {INDEX_FILE}")
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise InputError(
            path,
            "holds pickle files only, which can run code when they are read; convert it once with "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) and use that folder",
        )
    raise InputError(path, f"holds no {SINGLE_FILE} and no {INDEX_FILE}")


def _open_shards(index: Path) -> dict[str, Entry]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise InputError(index, "not a safetensors index (expected JSON with a weight_map)") from None
    headers = {}
    for file in sorted(set(weight_map.values())):
        shard = index.parent / file
        # The name itself must stay inside; the file may be a link (the hub's cache is made of links).
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise InputError(index, f"weight_map points outside its folder: {file!r}")
        if not shard.exists():
            raise InputError(index, f"shard {file!r} is missing")
        headers[file] = read_header(shard)
    entries = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise InputError(index, f"says that {name} is in {file!r}, which does not hold it")
        entries[name] = headers[file][name]
    return entries


def file_hash(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
