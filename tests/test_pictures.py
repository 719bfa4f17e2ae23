"""Every picture comes in by one function: the pixels that it gives for each form of file, and the files that it
refuses."""

import ast
import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.EpsImagePlugin
import PIL.PngImagePlugin
import pytest
from PIL import Image

import evojax_merge
from evojax_merge.errors import InputError
from evojax_merge.tasks.images import images_of, read_rgb
from evojax_merge.tasks.networks import ClassificationConfig, open_network
from evojax_merge.tasks.task import Opening

HEIGHT, WIDTH = 4, 6
# Pictures by their pixels: grey of 16 and 8 bits, and colours.
GREY16 = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
GREY = (np.arange(HEIGHT * WIDTH) * 10).astype(np.uint8).reshape(HEIGHT, WIDTH)
COLOURS = np.stack([GREY, GREY.T.reshape(HEIGHT, WIDTH), 255 - GREY], axis=-1)
OTHER = np.zeros_like(COLOURS)
IN_COLOURS = Image.fromarray(COLOURS)


def file_of(pixels: Any, form: str, **options: Any) -> bytes:
    """A picture, or an array of pixels, as a file of a form."""
    content = io.BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(content, form, **options)
    return content.getvalue()


def turned(orientation: int, form: str = "JPEG", change: Callable[[bytes], bytes] = bytes) -> bytes:
    """A picture whose camera was held in one of eight ways; `change`: of the bytes of its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    return file_of(IN_COLOURS, form, exif=change(exif.tobytes()), **options)


def paletted(**options: Any) -> bytes:
    return file_of(IN_COLOURS.quantize(256), "PNG", **options)


def commented(size: int, compressed: bool) -> bytes:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("comment", "b" * size, zip=compressed)
    return file_of(COLOURS, "PNG", pnginfo=info)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels.round().astype(np.uint8)[..., None], 3, axis=-1)


OF_16_BITS = grey(GREY16 / 257)
LOSSY = 12
# Files, their pixels, and how far pixels may be off.
READ: dict[str, tuple[bytes, np.ndarray, int]] = {
    "grey PNG of 16 bits": (file_of(GREY16, "PNG"), OF_16_BITS, 0),
    "grey TIFF of 16 bits": (file_of(GREY16, "TIFF"), OF_16_BITS, 0),
    "big-endian TIFF of 16 bits": (file_of(Image.fromarray(GREY16.astype(">u2")), "TIFF"), OF_16_BITS, 0),
    "TIFF of 16 bits whose 0 is white": (file_of(GREY16, "TIFF", tiffinfo={262: 0}), 255 - OF_16_BITS, 0),
    "PNG of 16 bits that is dark": (file_of(GREY16 // 256, "PNG"), grey(GREY16 // 256 / 257), 0),
    "grey PNG": (file_of(GREY, "PNG"), grey(GREY), 0),
    "PNG of 1 bit": (file_of(GREY > 100, "PNG"), grey((GREY > 100) * 255), 0),
    "TIFF of 1 bit": (file_of(GREY > 100, "TIFF"), grey((GREY > 100) * 255), 0),
    "PNG": (file_of(COLOURS, "PNG"), COLOURS, 0),
    "BMP": (file_of(COLOURS, "BMP"), COLOURS, 0),
    "TIFF, compressed": (file_of(COLOURS, "TIFF", compression="tiff_lzw"), COLOURS, 0),
    "WebP": (file_of(COLOURS, "WEBP", lossless=True), COLOURS, 0),
    "JPEG": (file_of(COLOURS, "JPEG", quality=100, subsampling=0), COLOURS, LOSSY),
    "CMYK TIFF": (file_of(IN_COLOURS.convert("CMYK"), "TIFF"), COLOURS, 0),
    "CMYK JPEG": (file_of(IN_COLOURS.convert("CMYK"), "JPEG", quality=100, subsampling=0), COLOURS, LOSSY),
    "grey with transparency": (file_of(np.stack([GREY, GREY], -1), "PNG"), grey(GREY), 0),
    "colours with transparency": (file_of(np.dstack([COLOURS, GREY]), "PNG"), COLOURS, 0),
    "palette": (paletted(), COLOURS, 0),
    "palette with one transparent colour": (paletted(transparency=3), COLOURS, 0),
    "palette with transparencies": (paletted(transparency=bytes(range(24))), COLOURS, 0),
    "colours of which one is transparent": (file_of(COLOURS, "PNG", transparency=(0, 0, 255)), COLOURS, 0),
    "long comment": (commented(3_000_000, compressed=False), COLOURS, 0),
    **{
        f"{form} of {frames}": (
            file_of(IN_COLOURS, form, save_all=True, append_images=[Image.fromarray(OTHER)], **options), COLOURS, 0
        )
        for form, frames, options in (
            ("GIF", "two frames", {}), ("WEBP", "two frames", {"lossless": True}), ("PNG", "two frames", {}),
            ("TIFF", "two pages", {}),
        )
    },
    "turned by a quarter": (turned(6), np.rot90(COLOURS, -1), LOSSY),
    "turned by a half": (turned(3), np.rot90(COLOURS, 2), LOSSY),
    "mirrored": (turned(2), COLOURS[:, ::-1], LOSSY),
    "turned PNG": (turned(8, "PNG"), np.rot90(COLOURS), 0),
    "turned WebP": (turned(8, "WEBP"), np.rot90(COLOURS), 0),
    "EXIF of an unknown turn": (turned(77), COLOURS, LOSSY),
    "EXIF that is no EXIF": (turned(6, change=lambda exif: exif[:6] + b"XXXXXXXX" + exif[14:]), COLOURS, LOSSY),
    "EXIF that is cut short": (turned(6, change=lambda exif: exif[:16]), COLOURS, LOSSY),
    "EXIF that points outside": (turned(6, change=lambda exif: exif[:10] + b"\xff" * 4 + exif[14:]), COLOURS, LOSSY),
    "WebP with broken EXIF": (turned(6, "WEBP", lambda exif: b"\0" + exif[6:]), COLOURS, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_picture_has_the_pixels_that_its_file_means(
    name: str, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    content, expected, error = READ[name]
    picture = read_rgb("a picture", content)
    assert picture.mode == "RGB"
    pixels = np.asarray(picture).astype(int)
    assert pixels.shape == expected.shape and np.abs(pixels - expected).max() <= error
    assert not recwarn.list and capfd.readouterr().err == ""


def bmp(width: int, height: int) -> bytes:
    content = bytearray(file_of(COLOURS, "BMP"))
    content[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(content)


def long_gif() -> bytes:
    """A GIF whose first frame is larger than the picture."""
    content = bytearray(file_of(COLOURS, "GIF"))
    frame = content.index(b"\x2c\0\0\0\0")
    content[frame + 5 : frame + 9] = b"\xff" * 4
    return bytes(content)


def damaged(content: bytes) -> bytes:
    """A compressed TIFF whose pixels, behind the header of 8 bytes, are no code."""
    return content[:8] + b"\xff" * 32 + content[40:]


FORMATS = "cannot be read as an image"
REFUSED: dict[str, tuple[bytes, str]] = {
    **{form: (file_of(COLOURS, form), f"{FORMATS}; expected PNG, JPEG, WEBP, GIF, BMP, TIFF")
       for form in ("EPS", "PPM", "TGA", "PCX", "ICO", "SGI", "JPEG2000")},
    "no picture": (b"no picture", FORMATS),
    "nothing": (b"", FORMATS),
    "TIFF of 32 bits": (file_of(GREY.astype(np.int32), "TIFF"), "pixels of signed or 32-bit whole numbers"),
    "TIFF of floats": (file_of((GREY / 255).astype(np.float32), "TIFF"), "pixels of floating-point numbers"),
    "cut PNG": (file_of(GREY16, "PNG")[:-30], f"{FORMATS} (image file is truncated"),
    "cut JPEG": (file_of(np.tile(COLOURS, (20, 20, 1)), "JPEG")[:-300], f"{FORMATS} (image file is truncated"),
    "cut GIF": (file_of(COLOURS, "GIF")[:40], FORMATS),
    "cut WebP": (file_of(COLOURS, "WEBP")[:-8], FORMATS),
    "damaged TIFF": (damaged(file_of(COLOURS, "TIFF", compression="tiff_lzw")), FORMATS),
    "cut TIFF": (file_of(COLOURS, "TIFF")[:40], FORMATS),
    "bomb": (bmp(60_000, 60_000), "could be decompression bomb"),
    "picture below Pillow's bombs": (bmp(10_000, 10_000), "has 10,000 × 10,000 pixels; expected 64,000,000 at most"),
    "GIF whose frame is a bomb": (long_gif(), "could be decompression bomb"),
    "no width": (bmp(0, HEIGHT), FORMATS),
    "comment that unpacks to much more": (commented(3_000_000, compressed=True), f"{FORMATS} (Decompressed data"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("inside", [True, False])
def test_a_picture_that_cannot_be_had_is_refused(
    name: str, inside: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    content, message = REFUSED[name]
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError) as caught:
        [image.open() for image in images_of(
            "tasks.jsonl:1", "image", {"bytes": content} if inside else "a.png", tmp_path,
        )]  # fmt: skip
    assert str(caught.value).startswith("tasks.jsonl:1: image: " + ("" if inside else "a.png: "))
    assert message in str(caught.value) and not recwarn.list and capfd.readouterr().err == ""


def test_a_picture_of_pillows_has_the_pixels_of_its_file(tmp_path: Path) -> None:
    """A data set's own reader may have opened it."""
    (image,) = images_of("task", "doc_to_image", Image.fromarray(GREY16), tmp_path)
    np.testing.assert_array_equal(np.asarray(image.open()), OF_16_BITS)
    with pytest.raises(InputError, match="task: doc_to_image: has pixels of floating-point numbers"):
        images_of("task", "doc_to_image", Image.fromarray(GREY.astype(np.float32)), tmp_path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_base64_is_a_picture_without_data_before_it(form: str, tmp_path: Path) -> None:
    content = file_of(COLOURS, form)
    (image,) = images_of("task", "image", base64.b64encode(content).decode(), tmp_path)
    assert image.inside == content and image.where == "task: image"


def test_a_classifiers_pictures_are_checked_before_models_are_opened(tmp_path: Path) -> None:
    section = {"name": "classes", "kind": "classification", "file": "pictures"}
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        (tmp_path / "pictures" / label / "1.png").write_bytes(file_of(COLOURS, "PNG"))
    opening, config = Opening("tasks[0]", tmp_path), ClassificationConfig(**section)
    assert open_network(config, opening).size == 2
    file = tmp_path / "pictures" / "dog" / "2.png"
    file.write_bytes(file_of(COLOURS, "EPS"))
    with pytest.raises(InputError) as caught:
        open_network(config, opening)
    assert str(caught.value) == f"{file}: {FORMATS}; expected PNG, JPEG, WEBP, GIF, BMP, TIFF"
    (tmp_path / "pictures.jsonl").write_text('{"image": "pictures/dog/2.png", "label": 1}\n')
    with pytest.raises(InputError, match=r"pictures.jsonl:1: 2.png: cannot be read as an image"):
        open_network(ClassificationConfig(**section | {"file": "pictures.jsonl"}), opening)


# The names by which libraries open a file as a picture.
OPENERS = {"imread", "read_image", "decode_image", "decode_jpeg", "decode_png", "load_image", "pil_loader", "imopen"}


def test_one_function_opens_pictures() -> None:
    calls = []
    package = Path(evojax_merge.__file__).parent
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.rpartition(".")[2] in OPENERS or (name.endswith("Image.open") and name != "RecordImage.open"):
                calls.append((str(file.relative_to(package)), name))
    assert calls == [("tasks/images.py", "Image.open")]
