"""A Hugging Face model folder, opened for reading: tensors by name out of memory-mapped safetensors files.

A tensor's values need not be stored the way they are read: every object that has a dtype and a shape, and can compute
the values, is a `Tensor`.

Everything is checked while opening, from the headers alone: a missing or truncated shard, an index that points outside
its folder, a folder that only holds pickles.
"""

import hashlib
import json
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from evojax_merge.checkpoints.hints import inner_folder
from evojax_merge.checkpoints.json_files import read_json_object, shown
from evojax_merge.errors import Failed, InputError
from evojax_merge.system.regular_file import (
    check_no_pointer,
    check_regular,
    file_inside,
    open_regular,
)

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
# A tensor without a byte may have any sizes beside 0: NumPy and JAX fail on more.
MOST_AXES = 32
# The beginnings of dtypes that are packed several to a byte, or that need scales from other tensors.
QUANTISED_DTYPES = ("F8_", "F6_", "F4")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The beginnings of the names of weights' files: transformers', and diffusers'.
STEMS = ("model", "diffusion_pytorch_model")
# Files that may be pickles, which can run code when they are read.
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
# Everything about a model but its weights, as transformers reads it, and its card.
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]
# The blocks of a large file by which hosts compare it before they read all of it, and their bytes.
SAMPLED, BLOCK = 16, 2**18
# The index of a diffusers folder, and other precisions and trainings of its components' weights.
PIPELINE_INDEX = "model_index.json"
VARIANTS = ["*.fp16*.safetensors", "*.bf16*.safetensors", "*.non_ema*.safetensors", "*/*/*"]
# Another program's names for the same weights, which some repositories hold beside the ones that transformers reads.
FOREIGN_FILES = "consolidated*"

# The slices of a tensor's first axes that a process needs, such as its devices' rows; empty: all of it.
Part = tuple[slice, ...]


@dataclass(frozen=True)
class MappedFile:
    """A file whose bytes are mapped into memory when they are first asked for, or copied without being mapped."""

    path: Path

    @cached_property
    def _handle(self) -> FileIO:
        handle = FileIO(self.path)
        # Python warns of a file that is left to be closed.
        weakref.finalize(self, handle.close)
        return handle

    def copy(self, start: int, into: np.ndarray) -> None:
        """Copy the bytes from `start` on into a contiguous array. Raises Failed where the file ends before, or its disk
        fails: the system kills a process that reads such pages of a mapped file."""
        buffer, copied = into.reshape(-1).view(np.uint8).data, 0
        while copied < len(buffer):
            try:
                count = os.preadv(self._handle.fileno(), [buffer[copied:]], start + copied)
                reason = "the file ends there, in the middle of a tensor"
            except OSError as error:
                count, reason = 0, error.strerror or str(error)
            if not count:
                raise Failed(
                    f"{self.path}: cannot be read from byte {start + copied:,} on ({reason}); put the whole file back "
                    "on a sound disk: a search goes on with --resume"
                )
            copied += count

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The bytes from `start` to `stop`, mapped, not copied: `uint8[stop - start]`."""
        return np.frombuffer(self._map, np.uint8, stop - start, start)

    def release(self, start: int, stop: int) -> None:
        """Release the pages that reading these bytes has mapped; the next reading maps them again."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if "_map" in self.__dict__ and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, stop - first)

    def close(self) -> None:
        """Release the file; the next reading opens it again. An array that was read keeps its mapping."""
        self.__dict__.pop("_map", None)
        if "_handle" in self.__dict__:
            self.__dict__.pop("_handle").close()


class Tensor:
    """One tensor of a model: its dtype, shape and files, which are known before it is read, and its values. A tensor is
    computed from its `parts`, unless it overrides the methods that read them; the first part has the file that messages
    name. Equal tensors have equal values."""

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: "tuple[Tensor, ...]"

    @property
    def file(self) -> Path:
        """The file that messages about the tensor name."""
        return self.parts[0].file

    @property
    def mapped_files(self) -> tuple[MappedFile, ...]:
        """All files that the tensor is made of."""
        return tuple(mapped for part in self.parts for mapped in part.mapped_files)

    @property
    def core(self) -> "Tensor":
        """The tensor that the factors are added to; the tensor itself where it has no factors."""
        return self

    @property
    def rank(self) -> int:
        """The rank of the factors; 0 without factors."""
        return 0

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """The factors `a float32[rank, in]` and `b float32[out, rank]` of a matrix `core + b a`."""
        outputs, inputs = self.shape
        return np.zeros((0, inputs), np.float32), np.zeros((outputs, 0), np.float32)

    def read(self) -> np.ndarray:
        """The values, `[*shape]` in the tensor's dtype, not to be written to."""
        raise NotImplementedError

    def load(self) -> np.ndarray:
        """The values in memory of their own. Raises Failed where the file cannot be read."""
        # A tensor that is computed loads its parts.
        return self.read()

    def copy_into(self, part: Part, into: np.ndarray) -> bool:
        """Copy a part of the values into a contiguous array of its shape; False where one is NaN or infinite. Raises
        Failed where the file cannot be read."""
        return copy_finite(self.load()[part], into)

    def content(self) -> Iterator[np.ndarray]:
        """The bytes that the tensor is made of, `uint8[n]` each, which identify it on every machine."""
        for part in self.parts:
            yield from part.content()

    def release(self) -> None:
        """Release the memory that reading the tensor has mapped."""
        for part in self.parts:
            part.release()


class ChangedTensor(Tensor):
    """A tensor with the dtype and, unless it says otherwise, the shape of its first part."""

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.parts[0].shape


# (the parts' values in their order, *settings) -> a tensor's values, cast to its dtype afterwards.
Formula = Callable[..., np.ndarray]


@dataclass(frozen=True)
class ComputedTensor(Tensor):
    """A tensor that is computed from its parts, and cast once. The formula is a function of a module, so that two
    tensors of equal parts, formulas and settings are equal. identity: bytes that identify the tensor, beside its parts'
    content."""

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]
    formula: Formula
    settings: tuple[Any, ...] = ()
    identity: bytes = b""

    def read(self) -> np.ndarray:
        return self.formula([part.load() for part in self.parts], *self.settings).astype(
            self.dtype, order="C", copy=False
        )

    def content(self) -> Iterator[np.ndarray]:
        # The parts, not the values: their last bits depend on the machine, and random masks must not.
        yield from super().content()
        yield np.frombuffer(self.identity, np.uint8)


@dataclass(frozen=True)
class BytesOfFile(Tensor):
    """A tensor whose bytes lie together in a file, in any encoding. dtype and shape describe the values, start and stop
    the range of the bytes."""

    mapped: MappedFile
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def file(self) -> Path:
        return self.mapped.path

    @property
    def mapped_files(self) -> tuple[MappedFile, ...]:
        return (self.mapped,)

    def content(self) -> Iterator[np.ndarray]:
        for start in range(self.start, self.stop, CONTENT_PIECE):
            piece = np.empty(min(CONTENT_PIECE, self.stop - start), np.uint8)
            self.mapped.copy(start, piece)
            yield piece

    def release(self) -> None:
        self.mapped.release(self.start, self.stop)


@dataclass(frozen=True)
class Entry(BytesOfFile):
    """A tensor that a file stores in the form in which it is read."""

    def read(self) -> np.ndarray:
        """The tensor in its own dtype, mapped, not copied (unless the file leaves it unaligned)."""
        raw = self.mapped.read(self.start, self.stop)
        if self.start % self.dtype.itemsize:
            raw = raw.copy()
        return raw.view(self.dtype).reshape(self.shape)

    def load(self) -> np.ndarray:
        values = np.empty(self.shape, self.dtype)
        self.mapped.copy(self.start, values)
        return values

    def copy_into(self, part: Part, into: np.ndarray) -> bool:
        """Read no more of the file than the part, and map nothing."""
        direct = into.dtype == self.dtype
        piece = np.empty(0 if direct else PIECE, self.dtype)
        target, finite, done = into.reshape(-1), True, 0
        for start, count in _runs(self.shape, part):
            for offset in range(0, count, PIECE):
                size = min(PIECE, count - offset)
                values = target[done : done + size] if direct else piece[:size]
                self.mapped.copy(self.start + (start + offset) * self.dtype.itemsize, values)
                if not direct:
                    target[done : done + size] = values
                finite, done = finite and _finite_piece(values), done + size
        return finite


def _runs(shape: tuple[int, ...], part: Part) -> Iterator[tuple[int, int]]:
    """The beginnings and lengths of the runs of elements that a part of an array takes, in the order of the array."""
    axes = [*part, *[slice(None)] * (len(shape) - len(part))]
    bounds = [axis.indices(size)[:2] for axis, size in zip(axes, shape, strict=True)]
    # The last axis that is not whole, with all behind it, makes one run.
    last = max((i for i, (begin, end) in enumerate(bounds) if end - begin < shape[i]), default=0)
    behind = prod(shape[last + 1 :])
    begin, end = bounds[last] if bounds else (0, 1)
    strides = [prod(shape[i + 1 :]) for i in range(last)]
    for place in product(*(range(*bound) for bound in bounds[:last])):
        first = sum(number * stride for number, stride in zip(place, strides, strict=True))
        yield first + begin * behind, (end - begin) * behind


def is_float(dtype: np.dtype) -> bool:
    return dtype in FLOAT_DTYPES.values() or dtype == np.float64


# Bytes of a file that are read together to identify them.
CONTENT_PIECE = 2**24
# The number of values that are copied and checked together: few enough to stay in a processor's last cache, and so many
# that threads seldom wait for the interpreter, which a search's plan keeps busy.
PIECE = 2**20


def is_finite(values: np.ndarray) -> bool:
    """Return whether no value of a float array of any shape is NaN or infinite; float64 values count as infinite where
    float32 rounds them to infinity."""
    flat = values.reshape(-1)
    return all(_finite_piece(flat[start : start + PIECE]) for start in range(0, flat.size, PIECE))


def copy_finite(values: np.ndarray, into: np.ndarray) -> bool:
    """Copy `values`, cast to the dtype of `into` (contiguous, of the same shape); False where one is NaN or infinite.

    Costs little more than the copy alone: each piece is checked while it is in the cache.
    """
    source, target, finite = values.reshape(-1), into.reshape(-1), True
    for start in range(0, source.size, PIECE):
        piece = source[start : start + PIECE]
        target[start : start + PIECE] = piece
        finite = finite and _finite_piece(piece)
    return finite


def _finite_piece(piece: np.ndarray) -> bool:
    """Return whether a piece holds neither NaN nor infinity. Both have all bits of the exponent set: as integers they
    are above all other values of their sign. NumPy compares integers many times as fast as it calls isfinite on
    two-byte floats."""
    signed, unsigned = _INTEGERS[piece.dtype.itemsize]
    limit = np.inf if piece.dtype != np.float64 else BEYOND_FLOAT32
    infinity, minus = np.array([limit, -limit], piece.dtype).view(unsigned)
    bits = np.ascontiguousarray(piece)
    return bool(bits.view(signed).max() < infinity and bits.view(unsigned).max() < minus)


# The first number that float32 rounds to infinity: a merge is computed in float32, whatever its sources are.
BEYOND_FLOAT32 = (2 - 2**-24) * 2.0**127
_INTEGERS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32), 8: (np.int64, np.uint64)}


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as a safetensors index maps them. Raises InputError where the file is anything else, or
    names anything but safetensors files of its folder."""
    names = read_json_object(index, missing={}).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(
            index, f"weight_map: {shown(names)}; expected a safetensors index (tensor names -> file names)"
        )
    for name, file in names.items():
        if file_inside(f"{index}: weight_map.{name}", index.parent, file).suffix != ".safetensors":
            raise InputError(index, f"weight_map.{name}: {shown(file)}; expected the name of a safetensors file")
    return names


def read_header(file: Path, dtypes: Mapping[str, np.dtype] = DTYPES) -> dict[str, Entry]:
    """The tensors of one safetensors file, of these dtypes. Raises InputError where the file is missing, damaged or
    truncated, or holds a tensor of another dtype.

    The safetensors library checks the header against the file: that it is JSON of the right form, of at most 100 MB,
    and that the tensors, of the sizes that their shapes and dtypes give, cover the rest of the file one after the
    other. It reads no tensor for that. It accepts a name that is there twice, which this function refuses.
    """
    try:
        if not file.exists():
            what = "is a link to nothing" if file.is_symlink() else "is missing"
            raise InputError(file, f"{what}; expected a safetensors file")
        size = check_regular(file, "a safetensors file")
        check_no_pointer(file)
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(file, f"truncated: the header wants {length:,} bytes, the file has {size:,}")
            refused = None
            try:
                with safe_open(file, framework="numpy"):
                    pass
            except SafetensorError as error:
                refused = str(error).removeprefix("Error while deserializing header: ")[:200]
            # Only a header that the library accepted is parsed or, to count the bytes of a truncated file, one that it
            # found well formed.
            if refused is not None and "not fully covered" not in refused:
                raise InputError(file, f"not a safetensors file, or damaged ({refused})")
            header = json.loads(handle.read(length), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise InputError(file, f"cannot be read ({error.strerror}); expected a safetensors file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(file, f"not a safetensors file (its header is not valid: {error})") from None
    header.pop("__metadata__", None)
    end = 8 + length + max((description["data_offsets"][1] for description in header.values()), default=0)
    if end > size:
        raise InputError(file, f"truncated: expected {end:,} bytes, found {size:,}")
    if end < size:
        raise InputError(file, f"damaged: holds {size - end:,} bytes after its last tensor")
    entries, mapped = {}, MappedFile(file)
    for name, description in header.items():
        if description["dtype"].startswith(QUANTISED_DTYPES) and description["dtype"] not in dtypes:
            raise InputError(
                file, f"{name} is quantised (dtype {description['dtype']}); expected weights of full precision"
            )
        if description["dtype"] not in dtypes:
            raise InputError(file, f"{name} has dtype {description['dtype']}; expected one of {', '.join(dtypes)}")
        shape = tuple(description["shape"])
        if len(shape) > MOST_AXES or max(shape, default=0) >= 2**31:
            raise InputError(
                file, f"{name} has shape {shown(shape)}; expected at most {MOST_AXES} axes, each shorter than 2^31"
            )
        start, stop = (8 + length + offset for offset in description["data_offsets"])
        entries[name] = Entry(mapped, dtypes[description["dtype"]], shape, start, stop)
    return entries


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that stand beside the tensors of a safetensors file that `read_header` accepts."""
    with safe_open(file, framework="numpy") as handle:
        return dict(handle.metadata() or {})


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        ordered = sorted(name for name, _ in pairs)
        twice = next(name for name, after in pairwise(ordered) if name == after)
        raise ValueError(f"{shown(twice)} is there twice")
    return made


@dataclass(frozen=True)
class Folder:
    """An opened model folder. `entries` are its tensors by name; values are read only on request."""

    path: Path
    entries: Mapping[str, Tensor]

    @cached_property
    def config(self) -> dict:
        return read_json_object(self.path / "config.json", missing={})

    @property
    def files(self) -> list[Path]:
        """The files that the weights lie in."""
        return files_of(self.entries.values())

    def read(self, name: str) -> np.ndarray:
        return self.entries[name].read()

    def close(self) -> None:
        """Release the mapped files; the next reading maps them again. An array that was read keeps its mapping."""
        for mapped in {mapped for entry in self.entries.values() for mapped in entry.mapped_files}:
            mapped.close()

    def digest(self, name: str) -> bytes:
        """sha256 of the tensor's content and name, which identifies this parent's tensor in random methods."""
        return tensor_digest(name, self.entries[name].content())


def files_of(tensors: Iterable[Tensor]) -> list[Path]:
    """The files that tensors lie in."""
    return sorted({mapped.path for tensor in tensors for mapped in tensor.mapped_files})


def tensor_digest(name: str, content: Iterable[np.ndarray]) -> bytes:
    """sha256 of a tensor's content (the bytes that the tensor is made of) and of its name in a file. content:
    contiguous, any dtype."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(part.reshape(-1).view(np.uint8).data)
    digest.update(b"\0" + name.encode())
    return digest.digest()


def open_folder(path: Path, dtypes: Mapping[str, np.dtype] = DTYPES) -> Folder:
    """Open a model folder: one safetensors file, or shards with an index, in the order in which transformers looks; or
    a safetensors file by itself, which is a model without a config or a tokenizer. dtypes: the dtypes that tensors may
    have, by their names in safetensors.

    The shards of a variant, such as fp16, are opened where a folder has no others. Files beside them (another program's
    weights, an index that a single file has replaced) are ignored. Raises InputError for a folder without safetensors
    weights, or with several unlisted files.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return Folder(path, read_header(path, dtypes))
    if path.is_file():
        check_no_pickle(path)
    if not path.is_dir():
        raise InputError(path, "not a folder; expected a Hugging Face model folder, or a safetensors file")
    for stem in STEMS:
        index, single = path / f"{stem}.safetensors.index.json", path / f"{stem}.safetensors"
        if single.exists():
            return Folder(path, read_header(single, dtypes))
        if index.exists():
            return Folder(path, _open_shards(index, dtypes))
    variants = [index for stem in STEMS for index in path.glob(f"{stem}.safetensors.index.*.json")]
    if len(variants) == 1:
        return Folder(path, _open_shards(variants[0], dtypes))
    winner = path / "best/model"
    if winner.is_dir() and (path / "config.yaml").exists():
        raise InputError(path, f"is a run of a search; its model is {winner}")
    others = sorted(set(path.glob("*.safetensors")) - set(path.glob(FOREIGN_FILES)))
    if len(others) == 1:
        return Folder(path, read_header(others[0], dtypes))
    if others and not (path / "config.json").exists():
        return Folder(path, _open_files(others, dtypes))
    if others:
        raise InputError(path, f"holds {len(others)} safetensors files but no {INDEX_FILE}")
    if any(file.suffix.lower() in PICKLES for file in path.iterdir()):
        raise InputError(
            path,
            "holds pickle files only, which can run code when they are read; convert it once with "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) and use that folder",
        )
    model = inner_folder(path, SINGLE_FILE, INDEX_FILE, "adapter_config.json")
    advice = "expected safetensors weights, or a GGUF file by its own name"
    if model is not None:
        advice = f"did you mean {model}?"
    elif next(path.glob("*/*.distcp"), None) is not None:
        advice = "the shards of FSDP become a model by `accelerate merge-weights`"
    raise InputError(path, f"holds no {SINGLE_FILE} and no {INDEX_FILE}; {advice}")


def check_no_pickle(file: Path) -> None:
    """Raises InputError for a file with the name of a pickle."""
    if file.suffix.lower() in PICKLES:
        raise InputError(
            file, "is a pickle, which can run code when it is read; expected a safetensors file (its author, or your "
            "image generator's interface, or safetensors.torch.save_file of its state dict, converts it)",
        )  # fmt: skip


def _open_files(files: Sequence[Path], dtypes: Mapping[str, np.dtype]) -> dict[str, Entry]:
    """The tensors of several files together. Raises InputError where two files hold a tensor of one name."""
    entries: dict[str, Entry] = {}
    for file in files:
        tensors = read_header(file, dtypes)
        twice = entries.keys() & tensors.keys()
        if twice:
            name = min(twice)
            raise InputError(file, f"holds {name}, which {entries[name].file.name} holds as well")
        entries |= tensors
    return entries


def _open_shards(index: Path, dtypes: Mapping[str, np.dtype]) -> dict[str, Entry]:
    """The tensors of all shards that the index names, listed or not, as transformers reads them."""
    places = weight_map(index)
    shards = {file: index.parent / file for file in sorted(set(places.values()))}
    for file, shard in shards.items():
        if not os.path.lexists(shard):
            raise InputError(index, f"shard {shown(file)} is missing")
    entries = _open_files(list(shards.values()), dtypes)
    for name, file in places.items():
        if name not in entries or entries[name].file != shards[file]:
            raise InputError(index, f"says that {name} is in {file!r}, which does not hold it")
    return entries


def file_hash(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open_regular(path, "a file whose content can be compared") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_sample(path: Path) -> str:
    """A line on a file's content, the same for equal files: its bytes and the start of its sha256; of a large file that
    of some blocks, the first and the last among them, which takes no longer for a terabyte."""
    size = path.stat().st_size
    if size <= SAMPLED * BLOCK:
        return f"{size:,} bytes, sha256 {file_hash(path)[:12]}…"
    digest = hashlib.sha256()
    with open_regular(path, "a file whose content can be compared") as handle:
        for number in range(SAMPLED):
            handle.seek((size - BLOCK) * number // (SAMPLED - 1))
            digest.update(handle.read(BLOCK))
    return f"{size:,} bytes, sha256 of {SAMPLED} blocks {digest.hexdigest()[:12]}…"
