"""Images of a task's records: `image` or `images`, each a file, a data URI, or the bytes of a column of parquet.

The tokenizer of a model that sees images has two more methods, and `placeholder`, the text in an image's place:
`expand_images` replaces the placeholders of a text as the model's own processor does, and `number_images` numbers the
tokens in the images' positions (see `task.Row`).
"""

import base64
import binascii
import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evojax_merge.errors import InputError, shown
from evojax_merge.regular_file import file_inside, read_regular
from evojax_merge.tasks.records import Record

# The fields of a record that hold images.
FIELDS = ("image", "images")
# The formats that are opened: Pillow has others, whose readers call other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# A larger file or image is no picture that a model was trained on.
MAX_BYTES, MAX_PIXELS = 64 * 2**20, 64 * 10**6
EXPECTED = "expected an image: a path from the data file's folder on, a data URI, or {bytes}"
# The end of messages on files that records name outside of the folder.
ELSEWHERE = "; where the files lie elsewhere, name their folder in the task: images: FOLDER"
EXTRA = "pip install 'evojax-merge[vision]'"


@dataclass(frozen=True)
class RecordImage:
    """An image of a record. where: its place, for messages; sha256: of its file's content; file: None for an image
    inside of the record, whose content is `inside`."""

    where: str = field(compare=False)
    sha256: str
    file: Path | None = field(compare=False)
    inside: bytes | None = field(compare=False, repr=False)

    def open(self) -> Any:
        """The image as Pillow has it: RGB, turned as its camera says. Raises InputError where it cannot be read."""
        from PIL import ImageOps

        content = read_regular(self.file, "an image", MAX_BYTES) if self.file is not None else self.inside
        assert content is not None
        try:
            with _opened(self.where, content) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise _unreadable(self.where, error) from None


def expand_images(tokenizer: Any, where: str, text: str, images: Sequence[RecordImage]) -> str:
    """The text with its images' placeholders expanded. Raises InputError where the model sees no images, and where
    there are more or fewer placeholders than images."""
    placeholder = getattr(tokenizer, "placeholder", "")
    if not images and not (placeholder and placeholder in text):
        return text
    if not hasattr(tokenizer, "expand_images"):
        what = "has an image, and the models see none; expected a vision-language model among them, or a record"
        raise InputError(where, f"{what} without the image")
    expanded: str = tokenizer.expand_images(where, text, images)
    return expanded


def number_images(tokenizer: Any, where: str, tokens: Sequence[int], images: Sequence[RecordImage]) -> list[int]:
    """The tokens of an expanded text, those of images numbered."""
    numbered: list[int] = tokenizer.number_images(where, tokens, images) if images else list(tokens)
    return numbered


def read_images(record: Record, folder: Path, texts: Collection[str]) -> tuple[RecordImage, ...]:
    """The images of a record. folder: paths start there, and stay inside; texts: the fields that a task reads as texts.

    Raises InputError where an image cannot be opened; its pixels are not read.
    """
    named = [name for name in FIELDS if name not in texts and record.fields.get(name) not in (None, "", [])]
    if len(named) > 1:
        raise InputError(record.where, "has image and images; expected one of them")
    if not named:
        return ()
    return images_of(record.where, named[0], record.fields[named[0]], folder)


def images_of(where: str, place: str, value: Any, folder: Path) -> tuple[RecordImage, ...]:
    """The images of a value, an image or a list of images. place: its name in messages; folder: paths start there,
    and stay inside. Raises InputError where an image cannot be opened."""
    if not isinstance(value, list):
        return (_image(where, place, value, folder),)
    return tuple(_image(where, f"{place}[{i}]", one, folder) for i, one in enumerate(value))


def _image(where: str, place: str, value: Any, folder: Path) -> RecordImage:
    file, content = None, _written(value)
    # A column of images in parquet has their bytes, or the paths of files beside it.
    if isinstance(value, Mapping):
        content = value.get("bytes")
        value = value.get("path") if content is None else value
    if isinstance(value, str) and value.startswith("data:"):
        content = _decoded(where, place, value)
    elif isinstance(value, str) and value.startswith(("http://", "https://")):
        raise InputError(where, f"{place}: {shown(value)} is on the net; download it, and name the file")
    elif isinstance(value, str):
        file = file_inside(f"{where}: {place}", folder, value, advice=ELSEWHERE)
        try:
            content = read_regular(file, "an image", MAX_BYTES)
        except FileNotFoundError:
            raise InputError(where, f"{place}: {value}: no such file in {folder}; {EXPECTED}") from None
        except InputError as error:
            raise InputError(where, f"{place}: {value}: {error.what}") from None
        except (OSError, ValueError) as error:
            raise _unreadable(f"{where}: {place}: {value}", error) from None
    if not isinstance(content, bytes):
        raise InputError(where, f"{place}: {shown(value)}; {EXPECTED}")
    named = f"{where}: {place}" + ("" if file is None else f": {value}")
    try:
        _opened(named, content).close()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise _unreadable(named, error) from None
    return RecordImage(named, hashlib.sha256(content).hexdigest(), file, None if file is not None else content)


def _written(value: Any) -> bytes | None:
    """An image of Pillow's as a file; None for another value."""
    if not hasattr(value, "convert"):
        return None
    file = io.BytesIO()
    value.convert("RGB").save(file, "PNG")
    return file.getvalue()


def _decoded(where: str, place: str, value: str) -> bytes:
    head, comma, data = value.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError(where, f"{place}: {shown(value)}; expected data:image/png;base64,… or the like")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(where, f"{place}: not valid base64 ({error})") from None


def _opened(where: str, content: bytes) -> Any:
    """Pillow's image of a file's content, its pixels not yet read. Raises InputError for one of too many pixels."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError(where, f"needs the package pillow; {EXTRA}") from None
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _unreadable(where, error) from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width:,} × {image.height:,} pixels"
        raise InputError(where, f"has {size}; expected {MAX_PIXELS:,} at most")
    return image


def _unreadable(where: str, error: Exception) -> InputError:
    formats = ", ".join(FORMATS)
    return InputError(where, f"cannot be read as an image ({' '.join(str(error).split())[:200]}); expected {formats}")
