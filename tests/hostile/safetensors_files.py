"""Hostile safetensors files: headers, indexes, and weights that no search can use."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hostile import MERGE, Case, World, changing, instead, link

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
FILE, INDEX = "one/model.safetensors", "one/model.safetensors.index.json"
EVALUATE = ("evaluate", "one", "--tasks", "config.yaml")


def read(file: Path) -> tuple[dict[str, Any], bytes]:
    """A file's header and data."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@changing
def raw_header(world: World, header: bytes, length: int | None = None) -> None:
    """The header, byte by byte, before the data; or one that claims another length."""
    data = read(world / FILE)[1]
    content = with_header(header, data)
    world.write(FILE, content if length is None else length.to_bytes(8, "little") + content[8:])


@changing
def header(
    world: World, edit: Callable[[dict[str, Any]], Any], data: Callable[[bytes], bytes] = lambda data: data
) -> None:
    """The header with some of it edited in place; `data`: what becomes of the bytes behind it."""
    rows, content = read(world / FILE)
    edit(rows)
    world.write(FILE, with_header(json.dumps(rows).encode(), data(content)))


def row(**changes: Any) -> Any:
    """The row of one tensor with other keys; `...` removes one."""

    def edit(rows: dict[str, Any]) -> None:
        for key, value in changes.items():
            if value is ...:
                del rows[NORM][key]
            else:
                rows[NORM][key] = value

    return header(edit)


def moved(by: int) -> Any:
    """The row's offsets, moved by so many bytes."""

    def edit(rows: dict[str, Any]) -> None:
        rows[NORM]["data_offsets"] = [offset + by for offset in rows[NORM]["data_offsets"]]

    return header(edit)


def hole(rows: dict[str, Any]) -> None:
    """64 unused bytes before the last tensor."""
    last = max((entry["data_offsets"], name) for name, entry in rows.items() if name != "__metadata__")[1]
    rows[last]["data_offsets"] = [offset + 64 for offset in rows[last]["data_offsets"]]


def twice(world: World) -> None:
    rows, data = read(world / FILE)
    text = json.dumps(rows)
    again = json.dumps({NORM: rows[NORM]})[1:-1]
    world.write(FILE, with_header(f"{text[:-1]}, {again}}}".encode(), data))


def unknown_key(world: World) -> None:
    """The library passes over what it does not know, however deep it nests."""
    rows, data = read(world / FILE)
    rows[NORM]["x"] = "x"
    deep = b"[" * 50_000 + b"]" * 50_000
    world.write(FILE, with_header(json.dumps(rows).encode().replace(b'"x": "x"', b'"x": ' + deep), data))


@changing
def converted(world: World, name: str, dtype: str, convert: Callable[[np.ndarray], np.ndarray]) -> None:
    """One tensor in another dtype."""
    rows, data = read(world / FILE)
    rows.pop("__metadata__", None)
    content = b""
    for tensor, entry in sorted(rows.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        piece = data[start:stop]
        if tensor == name:
            piece = convert(np.frombuffer(piece, np.float32)).tobytes()
            entry["dtype"] = dtype
        entry["data_offsets"] = [len(content), len(content) + len(piece)]
        content += piece
    world.write(FILE, with_header(json.dumps(rows).encode(), content))


@changing
def value(world: World, name: str, found: float, model: str = "one") -> None:
    """One value in the middle of a tensor."""
    file = world / f"{model}/model.safetensors"
    rows, data = read(file)
    start, stop = rows[name]["data_offsets"]
    values = np.frombuffer(data[start:stop], np.float32).copy()
    values[values.size // 2] = found
    file.write_bytes(with_header(json.dumps(rows).encode(), data[:start] + values.tobytes() + data[stop:]))


in_its_place = partial(instead, FILE)


@changing
def index(world: World, weight_map: Any, keep: bool = False) -> None:
    """Two shards, of which the index says `weight_map`: a function of what it should say, or something else."""
    rows, data = read(world / FILE)
    rows.pop("__metadata__", None)
    (world / FILE).unlink()
    names = list(rows)
    right = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file, content, own = f"model-{number}.safetensors", b"", {}
        for name in part:
            piece = data[slice(*rows[name]["data_offsets"])]
            own[name] = rows[name] | {"data_offsets": [len(content), len(content) + len(piece)]}
            content += piece
            right[name] = file
        world.write(f"one/{file}", with_header(json.dumps(own).encode(), content))
    found = weight_map(world, right) if callable(weight_map) else weight_map
    world.write(INDEX, found if isinstance(found, bytes) else json.dumps({"weight_map": found}).encode())


def shard(name: Any) -> Callable[[World], None]:
    return index(lambda world, right: right | {NORM: name})


def both(world: World, right: dict[str, str]) -> dict[str, str]:
    """A tensor in two shards."""
    first, second = (world / f"one/model-{i}.safetensors" for i in range(2))
    rows, data = read(first)
    others, more = read(second)
    name = next(iter(rows))
    piece = data[slice(*rows[name]["data_offsets"])]
    others[name] = rows[name] | {"data_offsets": [len(more), len(more) + len(piece)]}
    second.write_bytes(with_header(json.dumps(others).encode(), more + piece))
    return right


def fifo_shard(world: World, right: dict[str, str]) -> dict[str, str]:
    (world / "one/model-0.safetensors").unlink()
    os.mkfifo(world / "one/model-0.safetensors")
    return right


def half(values: np.ndarray) -> np.ndarray:
    return np.zeros(values.size, np.uint8)


def small(values: np.ndarray) -> np.ndarray:
    return np.round(values * 10)


IN_FILE, IN_INDEX = ("one/model.safetensors: ",), ("model.safetensors.index.json: ",)

HEADERS = [
    Case("a header that is a list", raw_header(b"[]"), IN_FILE),
    Case("a header that is null", raw_header(b"null"), IN_FILE),
    Case("a header that is a number", raw_header(b"7"), IN_FILE),
    Case("a header that nests deep", raw_header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), IN_FILE),
    Case("a list that nests deep", raw_header(b"[" * 50_000 + b"]" * 50_000), IN_FILE),
    Case("an unknown key that nests deep", unknown_key, IN_FILE),
    Case("a header that is not UTF-8", raw_header(b'{"\xff\xfe": 1}'), IN_FILE),
    Case("a header that is cut", raw_header(b'{"model.norm.weight": {"dtype": "F32", "sha'), IN_FILE),
    Case("a header of no bytes", raw_header(b""), IN_FILE),
    Case("a header of 2^63 bytes", raw_header(b"{}", 2**63), (*IN_FILE, "truncated")),
    Case("a header over 100 MB", raw_header(b"{}" + b" " * 100_000_001), (*IN_FILE, "too large")),
    Case("a header without tensors", lambda world: world.write(FILE, with_header(b"{}")), ("has no tensor",)),
    Case("a name twice", twice, (*IN_FILE, NORM, "twice")),
    Case("a row without dtype", row(dtype=...), (*IN_FILE, "dtype")),
    Case("a row without shape", row(shape=...), (*IN_FILE, "shape")),
    Case("a row without offsets", row(data_offsets=...), (*IN_FILE, "data_offsets")),
    Case("a row that is a list", header(lambda rows: rows.update({NORM: []})), IN_FILE),
    Case("a row that is null", header(lambda rows: rows.update({NORM: None})), IN_FILE),
    Case("offsets of text", row(data_offsets=["0", "192"]), IN_FILE),
    Case("three offsets", row(data_offsets=[0, 64, 192]), IN_FILE),
    Case("fractional offsets", row(data_offsets=[0.5, 192.5]), IN_FILE),
    Case("negative offsets", moved(-10_000_000), IN_FILE),
    Case("offsets the wrong way round", row(data_offsets=[192, 0]), IN_FILE),
    Case("tensors that overlap", moved(-8), IN_FILE),
    Case("a hole between tensors", header(hole, lambda data: data + b"\0" * 64), IN_FILE),
    Case("trailing bytes", header(lambda rows: None, lambda data: data + b"\0" * 12), (*IN_FILE, "12 bytes after")),
    Case("data cut by a byte", header(lambda rows: None, lambda data: data[:-1]), (*IN_FILE, "truncated")),
    Case("a huge shape", row(shape=[2**62, 2**62]), (*IN_FILE, "overflow")),
    Case("a shape beyond 64 bits", row(shape=[10**30]), IN_FILE),
    Case("a negative shape", row(shape=[-48]), IN_FILE),
    Case("a fractional shape", row(shape=[48.0]), IN_FILE),
    Case("a shape that is a text", row(shape="48"), IN_FILE),
    Case("a dtype that nobody knows", row(dtype="F33"), (*IN_FILE, "F33")),
    Case("a dtype of another case", row(dtype="f32"), IN_FILE),
    Case("metadata that is a list", header(lambda rows: rows.update(__metadata__=[1])), IN_FILE),
    Case("an escape in a name", header(lambda rows: rows.update({"a\n\x1b[31m\0": rows.pop(NORM)})), (NORM,)),
    Case(
        "an escape in a name, merged",
        header(lambda rows: rows.update({"a\n\x1b[31m\0": rows.pop(NORM)})),
        (NORM,),
        MERGE,
    ),
    Case("the same for merge", moved(-8), IN_FILE, MERGE),
    Case("the same for evaluate", moved(-8), IN_FILE, EVALUATE),
]
FILES = [
    Case("an empty file", in_its_place(Path.touch), (*IN_FILE, "truncated")),
    Case("a file of eight bytes", lambda world: world.write(FILE, b"\0" * 8), IN_FILE),
    Case("a folder for a file", in_its_place(Path.mkdir), (*IN_FILE, "is no regular file")),
    Case("a pipe for a file", in_its_place(os.mkfifo), (*IN_FILE, "is no regular file")),
    Case("a link to nothing", in_its_place(link("nowhere")), (*IN_FILE, "a link to nothing")),
    Case("a link to itself", in_its_place(link("model.safetensors")), IN_FILE),
    Case(
        "a device for a file",
        in_its_place(link("/dev/zero")),
        (*IN_FILE, "is no regular file"),
    ),
    Case("a gguf under its name", lambda world: world.write(FILE, b"GGUF\3\0\0\0" + b"\0" * 999), IN_FILE),
    Case("a pickle under its name", lambda world: world.write(FILE, b"\x80\2}q\0." * 99), IN_FILE),
    Case("a pickle beside none", in_its_place(lambda path: path.with_name("pytorch_model.bin").touch()), ("pickle",)),
    Case(
        "a gguf beside none",
        in_its_place(lambda path: path.with_name("model-q4.gguf").touch()),
        ("model.safetensors",),
    ),
]
INDEXES = [
    Case("an index of a list", index([]), (*IN_INDEX, "weight_map")),
    Case("an index of a number", index(7), (*IN_INDEX, "weight_map")),
    Case("an index of null", index(None), (*IN_INDEX, "weight_map")),
    Case("an empty index", index({}), (*IN_INDEX, "weight_map")),
    Case("an index that is a list", index(lambda world, right: b"[]"), IN_INDEX),
    Case("an index that is cut", index(lambda world, right: b'{"weight_map": {"a'), IN_INDEX),
    Case("an index that is not UTF-8", index(lambda world, right: b'{"\xff": 1}'), IN_INDEX),
    Case("an index that nests deep", index(lambda world, right: b"[" * 10**6), IN_INDEX),
    Case("a shard that is a number", shard(7), (*IN_INDEX, NORM)),
    Case("a shard that is null", shard(None), (*IN_INDEX, NORM)),
    Case("a shard that is a list", shard(["model-0.safetensors"]), (*IN_INDEX, NORM)),
    Case("a shard without a name", shard(""), (*IN_INDEX, NORM)),
    Case("a shard of 300 characters", shard("x" * 300), (*IN_INDEX, "outside")),
    Case("a shard with NUL", shard("model-0\0.safetensors"), (*IN_INDEX, "outside")),
    Case("a shard with a line feed and colours", shard("a\n\x1b[31mb"), (*IN_INDEX, "outside")),
    Case("a shard outside", shard("../two/model.safetensors"), (*IN_INDEX, "outside")),
    Case("a shard at the root", shard("/etc/passwd"), (*IN_INDEX, "outside")),
    Case("a shard that is the folder", shard("."), (*IN_INDEX, "outside")),
    Case("a shard that is the index", shard("model.safetensors.index.json"), IN_INDEX),
    Case("a shard that is a pipe", index(fifo_shard), ("model-0.safetensors: ", "is no regular file")),
    Case("a tensor in two shards", index(both), ("model-1.safetensors: ", "model-0.safetensors")),
    Case("a tensor that no shard holds", index(lambda _, right: right | {"x": "model-0.safetensors"}), IN_INDEX),
]
WEIGHTS = [
    Case("weights of integers", converted(NORM, "I32", lambda x: small(x).astype(np.int32)), (FILE, NORM, "int32")),
    Case("weights of bytes", converted(NORM, "U8", lambda x: small(x).astype(np.uint8)), (FILE, NORM, "uint8")),
    Case("weights of truth values", converted(NORM, "BOOL", lambda x: x > 0), (FILE, NORM, "bool")),
    Case("an embedding of integers", converted(EMBEDDING, "I8", lambda x: small(x).astype(np.int8)), (EMBEDDING,)),
    Case("weights of eight bits", converted(NORM, "F8_E4M3", half), (FILE, NORM, "F8_E4M3", "quantised")),
    Case("the same for merge", converted(NORM, "F8_E5M2", half), (FILE, NORM, "quantised"), MERGE),
    Case("complex weights", converted(NORM, "C64", lambda x: x.astype(np.complex64)), (FILE, NORM, "C64")),
    Case("NaN in a parent", value("model.layers.1.mlp.up_proj.weight", np.nan), (FILE, "layers.1.mlp.up_proj", "NaN")),
    Case("infinity in the base", value(NORM, np.inf, "base"), ("base/model.safetensors", NORM, "NaN or Inf")),
    Case("minus infinity in an embedding", value(EMBEDDING, -np.inf), (FILE, EMBEDDING, "NaN or Inf")),
    Case("NaN, evaluated", value(NORM, np.nan), (FILE, NORM, "NaN or Inf"), EVALUATE),
    Case("NaN, merged", value(NORM, np.nan), (FILE, NORM, "NaN or Inf"), MERGE),
]


@changing
def without_tensors(world: World, *names: str, metadata: dict[str, str] | None = None) -> None:
    """Files of weights that hold no tensor."""
    for name in names:
        world.write(name, with_header(json.dumps({} if metadata is None else {"__metadata__": metadata}).encode()))


def single_files(world: World) -> None:
    """A recipe of two files by themselves, without tensors."""
    without_tensors("a.safetensors", "b.safetensors")(world)
    world.write("recipe.yaml", {"merge_method": "linear", "models": [
        {"model": name, "parameters": {"weight": 1}} for name in ("a.safetensors", "b.safetensors")
    ]})  # fmt: skip


def empty_index(world: World) -> None:
    (world / FILE).unlink()
    world.write(INDEX, json.dumps({"metadata": {"total_size": 0}, "weight_map": {}}))


@changing
def numbered(world: World, number: str) -> None:
    """Both parents have one more tensor, of a layer of this number."""
    for model in ("base", "one", "two"):
        head, data = read(world / model / "model.safetensors")
        end = len(data)
        head[f"model.layers.{number}.mlp.up_proj.weight"] = {
            "dtype": "F32", "shape": [1, 1], "data_offsets": [end, end + 4],
        }  # fmt: skip
        world.write(f"{model}/model.safetensors", with_header(json.dumps(head).encode(), data + bytes(4)))


NO_TENSOR = "has no tensor"
EMPTY = [
    Case("no tensor", without_tensors(FILE), ("one", NO_TENSOR)),
    Case("no tensor but a text", without_tensors(FILE, metadata={"format": "pt"}), ("one", NO_TENSOR), MERGE),
    Case("no tensor in the base", without_tensors("base/model.safetensors"), ("base", NO_TENSOR), MERGE),
    Case("no tensor in any model", without_tensors(*(f"{name}/model.safetensors" for name in ("base", "one", "two"))),
         ("base", NO_TENSOR), MERGE),
    Case("no tensor in files by themselves", single_files, ("a.safetensors", NO_TENSOR), MERGE),
    Case("no tensor, inspected", without_tensors(FILE), ("one", NO_TENSOR), ("inspect", "one", "two")),
    Case("no tensor, evaluated", without_tensors(FILE), ("one", NO_TENSOR), EVALUATE),
    Case("no tensor, planned", without_tensors(FILE), ("one",), ("plan", "config.yaml")),
    Case("an index of nothing", empty_index, (INDEX, "weight_map: {}"), MERGE),
    Case("a layer of a full-width number", numbered("１"), ("model.layers.１.mlp.up_proj.weight",)),
    Case("a layer that begins with 0", numbered("01"), ("model.layers.01.mlp.up_proj.weight",)),
    Case("a layer of 5,000 digits", numbered("9" * 5000), ("model.layers.999",)),
]  # fmt: skip
CASES = HEADERS + FILES + INDEXES + WEIGHTS + EMPTY
