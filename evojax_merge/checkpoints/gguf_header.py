"""The header of a GGUF file: its metadata, and the positions of its tensors. Every number in it is checked.

The reader of the package gguf trusts the counts, lengths and offsets in a file: it loops over a list of 2^60 entries in
a file of a kilobyte, and an offset of nearly 2^64 wraps around. The reader here checks each number against the file's
size before it uses the number, so that the file's size and the limits below bound its time and memory.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from evojax_merge.errors import InputError, shown

MAGIC, VERSIONS = b"GGUF", (2, 3)
# Four times as much as the largest vocabularies take, with their merges.
MOST_HEADER_BYTES = 512 * 2**20
MOST_ENTRIES = 2**22  # in all lists together
MOST_KEYS = MOST_TENSORS = 2**16
MOST_NAME_BYTES = 2**16 - 1  # of a key or a tensor; the format's limit for keys
MOST_NESTED, MOST_AXES = 4, 4
DEFAULT_ALIGNMENT = 32
# The numbers of the types of values: types of one size, with struct's letters, and types whose values begin with their
# size.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
# The fewest bytes of an entry of the metadata (a key's length, a type, a value) and of a tensor's description.
LEAST_KEY, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8


@dataclass(frozen=True)
class TensorPlace:
    """The position of a tensor. kind: a number of gguf.GGMLQuantizationType; shape: the sizes of its axes in NumPy's
    order; start, stop: the offsets of its bytes in the file."""

    kind: int
    shape: tuple[int, ...]
    start: int
    stop: int


# The metadata by key, and the tensors' positions by name.
Header = tuple[dict[str, Any], dict[str, TensorPlace]]


def read_gguf_header(path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> Header:
    """Read a file's header. block_sizes: the number of entries and of bytes of a block, for each kind of tensor.

    Raises InputError where the file is not a GGUF file, is damaged or truncated, or has more in its header than any
    model needs.
    """
    try:
        with path.open("rb") as handle:
            if handle.read(len(MAGIC)) != MAGIC:
                raise InputError(path, "not a GGUF file; expected the letters GGUF at its beginning")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content, len(content), len(MAGIC)).header(block_sizes)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror}); expected a GGUF file") from None


@dataclass
class _Reader:
    """Reads one value after the other, none beyond the file's end. position: the offset of the next value; entries: the
    number of entries of all lists before it."""

    path: Path
    content: mmap.mmap
    size: int
    position: int
    entries: int = 0

    def header(self, block_sizes: Mapping[int, tuple[int, int]]) -> Header:
        version = self._number("I", "its version")
        if version & 0xFFFF == 0 and version:
            raise InputError(self.path, "a big-endian GGUF file; convert it once (gguf-convert-endian FILE little)")
        if version not in VERSIONS:
            raise InputError(
                self.path, f"GGUF version {version}; expected {' or '.join(map(str, VERSIONS))}; convert the model anew"
            )
        tensor_count, key_count = (self._number("Q", "its counts of tensors and keys") for _ in range(2))
        for what, count, most, least_bytes in (
            ("tensors", tensor_count, MOST_TENSORS, LEAST_TENSOR), ("keys", key_count, MOST_KEYS, LEAST_KEY),
        ):  # fmt: skip
            says = f"says that it has {count:,} {what}"
            if count * least_bytes > self.size:
                raise InputError(self.path, f"damaged or truncated: {says}; the file has {self.size:,} bytes")
            if count > most:
                raise InputError(self.path, f"{says}; expected at most {most:,}")
        metadata: dict[str, Any] = {}
        for i in range(key_count):
            key = self._text(f"key {i}", MOST_NAME_BYTES)
            if key in metadata:
                raise InputError(self.path, f"damaged: holds the key {_name(key)} twice")
            metadata[key] = self._value(_name(key), self._number("I", f"the type of {_name(key)}"), 0)
        rows: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for i in range(tensor_count):
            name = self._text(f"the name of tensor {i}", MOST_NAME_BYTES)
            if name in rows:
                raise InputError(self.path, f"damaged: holds the tensor {_name(name)} twice")
            what = _name(name)
            axes = self._number("I", what)
            if not 1 <= axes <= MOST_AXES:
                raise InputError(self.path, f"{what} has {axes:,} axes; expected 1 to {MOST_AXES}")
            shape = tuple(self._number("Q", what) for _ in range(axes))[::-1]
            if 0 in shape:
                raise InputError(self.path, f"{what} has shape {list(shape)}; expected sizes above 0")
            rows[name] = self._number("I", what), shape, self._number("Q", what)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise InputError(self.path, f"general.alignment: {shown(alignment)}; expected a power of two")
        return metadata, self._places(rows, alignment, block_sizes)

    def _take(self, count: int, what: str) -> int:
        """Step over the next `count` bytes, and return their position."""
        start, end = self.position, self.position + count
        if end > self.size:
            raise InputError(
                self.path,
                f"damaged or truncated: {what} would take {count:,} bytes from byte {start:,} on; the file has "
                f"{self.size:,}",
            )
        if end > MOST_HEADER_BYTES:
            raise InputError(
                self.path, f"{what} ends at byte {end:,}; expected a header of at most {MOST_HEADER_BYTES:,}"
            )
        self.position = end
        return start

    def _number(self, letter: str, what: str) -> Any:
        layout = f"<{letter}"
        return struct.unpack_from(layout, self.content, self._take(struct.calcsize(layout), what))[0]

    def _text(self, what: str, most: int = MOST_HEADER_BYTES) -> str:
        length = self._number("Q", what)
        start = self._take(length, what)
        if length > most:
            raise InputError(self.path, f"{what} has {length:,} bytes; expected at most {most:,}")
        try:
            return self.content[start : start + length].decode()
        except UnicodeDecodeError:
            raise InputError(self.path, f"{what} is not UTF-8; expected text") from None

    def _value(self, what: str, kind: int, depth: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind], what)
        if kind == TEXT:
            return self._text(what)
        if kind != LIST:
            raise InputError(self.path, f"{what} has a value of type {kind}, which GGUF does not have; damaged?")
        if depth == MOST_NESTED:
            raise InputError(self.path, f"{what} nests too deep; expected lists of at most {MOST_NESTED} levels")
        kind, count = self._number("I", what), self._number("Q", what)
        least = struct.calcsize(SCALARS[kind]) if kind in SCALARS else 8
        if count * least > self.size - self.position:
            raise InputError(
                self.path,
                f"damaged or truncated: {what} says that it has {count:,} entries; the file has "
                f"{self.size - self.position:,} bytes from there on",
            )
        self.entries += count
        if self.entries > MOST_ENTRIES:
            raise InputError(self.path, f"{what} has {count:,} entries; expected at most {MOST_ENTRIES:,} in all lists")
        if kind in SCALARS:
            return list(struct.unpack_from(f"<{count}{SCALARS[kind]}", self.content, self._take(count * least, what)))
        if kind == TEXT:
            return self._texts(what, count)
        return [self._value(f"{what}[{i}]", kind, depth + 1) for i in range(count)]

    def _texts(self, what: str, count: int) -> list[str]:
        """A list of texts. Vocabularies have hundreds of thousands, and naming and checking each text would take too
        long: from a fault on, the texts are read one by one, for the message."""
        length_at, position, texts = struct.Struct("<Q").unpack_from, self.position, list[str]()
        try:
            for _ in range(count):
                start = position + 8
                end = start + length_at(self.content, position)[0]
                if end > min(self.size, MOST_HEADER_BYTES):
                    break
                texts.append(self.content[start:end].decode())
                position = end
        except (struct.error, UnicodeDecodeError):
            pass
        self.position = position
        return texts + [self._text(f"{what}[{i}]") for i in range(len(texts), count)]

    def _places(
        self,
        rows: Mapping[str, tuple[int, tuple[int, ...], int]],
        alignment: int,
        block_sizes: Mapping[int, tuple[int, int]],
    ) -> dict[str, TensorPlace]:
        """The positions of the tensors. Raises InputError unless they lie behind the header, within the file, and do
        not overlap."""
        first, places = -(-self.position // alignment) * alignment, dict[str, TensorPlace]()
        for name, (kind, shape, offset) in rows.items():
            what = _name(name)
            if kind not in block_sizes:
                raise InputError(self.path, f"{what} is of kind {kind}, which the package gguf does not know")
            entries, nbytes = block_sizes[kind]
            if shape[-1] % entries:
                raise InputError(
                    self.path, f"{what} has rows of {shape[-1]:,} entries; its kind has blocks of {entries} of them"
                )
            if offset % alignment:
                raise InputError(
                    self.path, f"damaged: {what} has the offset {offset:,}; expected a multiple of {alignment}"
                )
            start = first + offset
            stop = start + math.prod(shape) // entries * nbytes
            if stop > self.size:
                raise InputError(
                    self.path, f"damaged or truncated: {what} ends at byte {stop:,}; the file has {self.size:,}"
                )
            places[name] = TensorPlace(kind, shape, start, stop)
        for (before, place), (after, next_place) in pairwise(sorted(places.items(), key=lambda item: item[1].start)):
            if place.stop > next_place.start:
                raise InputError(self.path, f"damaged: the tensors {_name(before)} and {_name(after)} overlap")
        return places


def _name(name: str) -> str:
    """A key's or a tensor's name for a message, shortened where it is long."""
    return name if 1 <= len(name) <= 100 else shown(name)
