"""Pictures of forms, sizes and depths that no model was trained on, and damaged ones: in folders of classes, in records
and data URIs, and in parquet."""

import base64
import functools
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hostile import Case, World, changing, config, link
from hostile.images import png

Change = Callable[[World], Any]
FORMS = "expected PNG, JPEG, WEBP, GIF, BMP, TIFF"
UNREADABLE = "cannot be read as an image"
PLAN = ("plan", "config.yaml")
# Time enough to load torch and transformers.
SLOW = 60.0


def picture(form: str, pixels: Any = None, **options: Any) -> bytes:
    """A small picture as a file of a form."""
    from PIL import Image

    content = io.BytesIO()
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3) if pixels is None else pixels
    Image.fromarray(pixels).save(content, form, **options)
    return content.getvalue()


def sized(width: int, height: int) -> bytes:
    """A PNG that says that it has another size."""
    return png(width, height) + picture("PNG")[33:]


def png_chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def with_chunk(name: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    content = picture("PNG")
    return content[:33] + png_chunk(name, data) + content[33:]


def bmp(width: int, height: int) -> bytes:
    content = picture("BMP")
    return content[:18] + width.to_bytes(4, "little", signed=True) + height.to_bytes(4, "little", signed=True) + (
        content[26:]
    )  # fmt: skip


def exif(data: bytes) -> bytes:
    return picture("JPEG", exif=b"Exif\0\0" + data)


def long_gif() -> bytes:
    """A GIF whose frame is larger than its picture, by far."""
    content = bytearray(picture("GIF"))
    frame = content.index(b"\x2c\0\0\0\0")
    content[frame + 5 : frame + 9] = b"\xff" * 4
    return bytes(content)


def damaged_tiff() -> bytes:
    content = picture("TIFF", compression="tiff_lzw")
    return content[:8] + b"\xff" * 32 + content[40:]


# Files that are refused by their headers: their contents, and the words of the message.
HEADERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "PostScript": (lambda: picture("EPS"), f"{UNREADABLE}; {FORMS}"),
    "PostScript that writes a file": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(owned) (w) file pop\nshowpage\n", UNREADABLE),
    "a PPM": (lambda: picture("PPM"), UNREADABLE),
    "a TGA": (lambda: picture("TGA"), UNREADABLE),
    "a PCX": (lambda: picture("PCX"), UNREADABLE),
    "an icon": (lambda: picture("ICO"), UNREADABLE),
    "an SGI picture": (lambda: picture("SGI"), UNREADABLE),
    "a JPEG 2000": (lambda: picture("JPEG2000"), UNREADABLE),
    "an SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>', UNREADABLE),
    "a PDF": (lambda: b"%PDF-1.7\n%%EOF\n", UNREADABLE),
    "an error page": (lambda: b"<!DOCTYPE html><title>404</title>", UNREADABLE),
    "a pickle": (lambda: b"\x80\x04\x95\x15\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", UNREADABLE),
    "nothing": (lambda: b"", UNREADABLE),
    "the signature of a PNG alone": (lambda: picture("PNG")[:8], UNREADABLE),
    "a PNG without width": (lambda: sized(0, 8), UNREADABLE),
    "a PNG of too many pixels": (lambda: sized(9_000, 9_000), "has 9,000 × 9,000 pixels; expected 64,000,000 at most"),
    "a PNG that Pillow warns of": (lambda: sized(11_000, 11_000), "has 11,000 × 11,000 pixels"),
    "a BMP that is a bomb": (lambda: bmp(60_000, 60_000), "could be decompression bomb"),
    "a BMP without height": (lambda: bmp(8, 0), UNREADABLE),
    "a BMP of negative width": (lambda: bmp(-8, 8), UNREADABLE),
    "a comment that unpacks to more": (
        lambda: with_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b" * 9_000_000)), UNREADABLE),
    "a header twice, and short": (lambda: with_chunk(b"IHDR", b"\0" * 3), UNREADABLE),
    "a TIFF of no tag": (lambda: b"II*\0\x08\0\0\0\0\0\0\0\0\0", UNREADABLE),
    "a TIFF whose tags go round": (lambda: b"II*\0\x08\0\0\0\x01\0\0\x01\x03\0\x01\0\0\0\x08\0\0\0\x08\0\0\0",
                                   UNREADABLE),
    "a cut GIF": (lambda: picture("GIF")[:9], UNREADABLE),
    "a cut WebP": (lambda: picture("WEBP")[:20], UNREADABLE),
}  # fmt: skip
# Files whose pixels cannot be had.
PIXELS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a cut PNG": (lambda: picture("PNG", np.random.default_rng(0).integers(0, 255, (9, 9, 3)).astype(np.uint8))[:-60],
                  "(image file is truncated"),
    "a cut JPEG": (lambda: picture("JPEG", np.tile(np.arange(192, dtype=np.uint8).reshape(8, 8, 3), (9, 9, 1)))[:-200],
                   "(image file is truncated"),
    "a TIFF of floats": (lambda: picture("TIFF", np.eye(8, dtype=np.float32)), "has pixels of floating-point numbers"),
    "a TIFF of 32 bits": (lambda: picture("TIFF", np.eye(8, dtype=np.int32)), "has pixels of signed or 32-bit whole"),
    "a GIF whose frame is a bomb": (long_gif, "could be decompression bomb"),
    "a TIFF of damaged pixels": (damaged_tiff, UNREADABLE),
}  # fmt: skip
# Files that are odd, and read.
READ: dict[str, Callable[[], bytes]] = {
    "a grey PNG of 16 bits": lambda: picture("PNG", np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000),
    "an EXIF that is no EXIF": lambda: exif(b"XXXXXXXXXXXXXXXX"),
    "an EXIF that points outside": lambda: exif(b"II*\0\xff\xff\xff\xff"),
    "an EXIF of numbers that are texts": lambda: exif(b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0a\0\0\0\0\0\0\0"),
    "two frames": lambda: picture("GIF", save_all=True, append_images=[_black()]),
}


def _black() -> Any:
    from PIL import Image

    return Image.new("RGB", (8, 8))


@functools.cache
def _classifiers() -> Path:
    """Image classifiers `one` and `two`."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = Path(tempfile.mkdtemp())
    settings = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    for name in ("one", "two"):
        ViTForImageClassification(settings).save_pretrained(folder / name)
        (folder / name / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def classes(world: World, file: str = "pictures") -> None:
    """A search over classifiers, whose models are looked at once the pictures are right."""
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        world.write(f"pictures/{name}", picture("PNG"))
    task = {"name": "classes", "kind": "classification", "file": file}
    world.write("config.yaml", config(backend="torch", base=None, space={"method": "linear"}, tasks=[task]))


@changing
def in_folder(world: World, content: Callable[[], bytes], models: bool = False) -> None:
    """A picture among those of a class."""
    classes(world)
    world.write("pictures/dog/2.png", content())
    for name in ("one", "two") if models else ():
        shutil.rmtree(world / name)
        shutil.copytree(_classifiers() / name, world / name)


@changing
def placed(world: World, make: Callable[[Path], Any]) -> None:
    """Something that is no file, with a picture's name."""
    classes(world)
    make(world / "pictures/dog/2.png")


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(65 * 2**20)


@changing
def record(world: World, /, value: Any, content: bytes = b"", **fields: Any) -> None:
    """A record of a classifier's task with this image, behind a good one."""
    classes(world, "pictures.jsonl")
    world.write("2.png", content)
    lines = [{"image": "pictures/cat/1.png", "label": 0}, {"image": value, "label": 1} | fields]
    world.write("pictures.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


@changing
def asked(world: World, value: Any) -> None:
    """A question about an image, for models of language."""
    record = {"prompt": "<image> w5", "target": "w6"}
    given = value() if callable(value) else value
    world.write("tasks.jsonl", "".join(json.dumps(record | {"image": one}) + "\n" for one in (uri(), given)))


def uri(content: bytes | None = None, head: str = "data:image/png;base64") -> str:
    return f"{head},{base64.b64encode(picture('PNG') if content is None else content).decode()}"


@changing
def column(world: World, *values: Any) -> None:
    """A column of images in parquet."""
    import pyarrow
    import pyarrow.parquet

    given = [value() if callable(value) else value for value in ({"bytes": picture("PNG"), "path": None}, *values)]
    rows = [{"prompt": "<image> w5", "target": "w6", "image": value} for value in given]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), world / "tasks.parquet")
    task = {"name": "text", "kind": "likelihood", "file": "tasks.parquet"}
    world.write("config.yaml", config(tasks=[task]))


def inside(content: Callable[[], bytes]) -> Callable[[], dict[str, Any]]:
    return lambda: {"bytes": content(), "path": "cat.png"}


FOLDERS = [
    *(Case(f"{name} in a folder of classes", in_folder(content), ("pictures/dog/2.png: ", says))
      for name, (content, says) in HEADERS.items()),
    Case("a link to nowhere as a picture", placed(link("nowhere.png")),
         ("pictures/dog/2.png: no such file",)),
    Case("a link to itself as a picture", placed(lambda path: path.symlink_to(path)),
         ("pictures/dog/2.png: ", UNREADABLE)),
    Case("a pipe as a picture", placed(os.mkfifo), ("pictures/dog/2.png: is no regular file but a pipe",)),
    Case("a device as a picture of a class", placed(link("/dev/zero")),
         ("pictures/dog/2.png: is no regular file but a device",)),
    Case("a folder as a picture", placed(Path.mkdir), ("pictures/dog/2.png: is no regular file but a folder",)),
    Case("a picture of 65 MB", placed(large), ("pictures/dog/2.png: has 68,157,440 bytes; expected an image of",)),
]  # fmt: skip
LINE = "pictures.jsonl:2: "
RECORDS = [
    *(Case(f"{name} in a record", record("2.png", HEADERS[name][0]()), (f"{LINE}2.png: ", HEADERS[name][1]), PLAN)
      for name in ("PostScript", "a TGA", "an error page", "a PNG that Pillow warns of")),
    Case("a picture that is not there, of a classifier", record("3.png"), (f"{LINE}image: 3.png: no such file",)),
    Case("a number as a picture", record(3), (f"{LINE}image: 3; expected a text",)),
    Case("pictures for a classifier", record(["2.png"]), (f"{LINE}image: ['2.png']; expected a text",)),
    Case("an empty name of a picture", record(""), (f"{LINE}image: ''; expected a text",)),
    Case("a picture and a text", record("2.png", text="w5"), (f"{LINE}has both an image and a text",)),
]  # fmt: skip
ASKED = "tasks.jsonl:2: image: "
URIS = [
    *(Case(f"{name} in a data URI", asked(lambda name=name: uri(HEADERS[name][0]())), (ASKED, HEADERS[name][1]))
      for name in ("PostScript", "a PCX", "an SVG", "a PNG of too many pixels", "a BMP that is a bomb", "nothing",
                   "a comment that unpacks to more")),
    Case("a data URI without data", asked("data:image/png;base64"), (ASKED, "expected data:image/png;base64,…")),
    Case("a data URI of text", asked("data:text/plain,w5"), (ASKED, "expected data:image/png;base64,…")),
    Case("a data URI whose base64 is cut", asked(lambda: uri()[:-3]), (ASKED, "not valid base64")),
    Case("a data URI of other letters", asked("data:image/png;base64,äöü="), (ASKED, "not valid base64")),
    Case("a data URI with line feeds", asked(lambda: uri().replace(",", ",\n")), (ASKED, "not valid base64")),
    Case("a data URI of PostScript by its own name", asked(lambda: uri(picture("EPS"), "data:image/eps;base64")),
         (ASKED, UNREADABLE)),
]  # fmt: skip
PARQUET = [
    *(Case(f"{name} in parquet", column(inside(HEADERS[name][0])), ("image: ", HEADERS[name][1]))
      for name in ("PostScript", "an icon", "a pickle", "nothing", "a BMP without height", "a cut WebP")),
    Case("neither bytes nor a path", column({"bytes": None, "path": None}), ("image: ", "expected an image")),
    Case("a path in parquet that leads nowhere", column({"bytes": None, "path": "nowhere.png"}),
         ("image: nowhere.png: no such file",)),
    Case("a path in parquet of a text", column({"bytes": None, "path": "config.yaml"}), ("config.yaml: ", UNREADABLE)),
]  # fmt: skip
WHOLE = [
    *(Case(f"{name} in a folder of classes", in_folder(content, models=True), ("pictures/dog/2.png: ", says), PLAN,
           seconds=SLOW) for name, (content, says) in PIXELS.items()),
    *(Case(f"{name} in a folder of classes", in_folder(content, models=True), (), PLAN, 0, seconds=SLOW)
      for name, content in READ.items()),
]  # fmt: skip
CASES = [*FOLDERS, *RECORDS, *URIS, *PARQUET, *WHOLE]
