"""Images of a task's records: `image` or `images`, each a file, a data URI or its base64, or the bytes of a column of
parquet.

The tokenizer of a model that sees images has two more methods, and `placeholder`, the text in an image's place:
`expand_images` replaces the placeholders of a text as the model's own processor does, and `number_images` numbers the
tokens in the images' positions (see `task.Row`).
"""

import base64
import binascii
import hashlib
import io
import os
import re
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.errors import InputError, shown
from evojax_merge.system.regular_file import file_inside, read_regular
from evojax_merge.tasks.records import Record

# The fields of a record that hold images.
FIELDS = ("image", "images")
# The formats that are opened: Pillow has others, whose readers call other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# The pixels of a thumbnail's longer side.
THUMBNAIL = 96
# A larger file or image is no picture that a model was trained on.
MAX_BYTES, MAX_PIXELS = 64 * 2**20, 64 * 10**6
EXPECTED = "expected an image: a path from the data file's folder on, base64, or {bytes}"
# The beginnings of PNG, JPEG, WebP and GIF in base64, as records have it without `data:` before it.
BARE = re.compile("(?:iVBORw0KGgo|/9j/|UklGR|R0lGODl?)[A-Za-z0-9+/]{20}")
# The end of messages on files that records name outside of the folder.
ELSEWHERE = "; where the files lie elsewhere, name their folder in the task: images: FOLDER"
EXTRA = "pip install 'evojax-merge[vision]'"
# Pillow's modes without a range from black to white, in words.
RANGELESS = {"I": "signed or 32-bit whole numbers", "F": "floating-point numbers"}
# The tags of a TIFF for the bits of a channel, and for its colours; the value there of one in which 0 is white.
BITS, COLOURS, WHITE_IS_ZERO = 258, 262, 0
# Held while stderr leads elsewhere.
_STDERR = threading.RLock()


@dataclass(frozen=True)
class RecordImage:
    """An image of a record. where: its place, for messages; sha256: of its file's content; file: None for an image
    inside of the record, whose content is `inside`."""

    where: str = field(compare=False)
    sha256: str
    file: Path | None = field(compare=False)
    inside: bytes | None = field(compare=False, repr=False)

    def open(self) -> Any:
        """The image, see `read_rgb`."""
        content = self.inside if self.file is None else image_content(self.where, self.file)
        assert content is not None
        return read_rgb(self.where, content)


def thumbnail(image: Any) -> str:
    """A small copy of one of Pillow's RGB images: a data URI of a JPEG of THUMBNAIL pixels at most on each side."""
    small, written = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(written, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"


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
    file, content = None, None
    if hasattr(value, "convert"):
        # An image of Pillow's.
        written = io.BytesIO()
        _rgb(f"{where}: {place}", value).save(written, "PNG")
        content = written.getvalue()
    # A column of images in parquet has their bytes, or the paths of files beside it.
    if isinstance(value, Mapping):
        content = value.get("bytes")
        value = value.get("path") if content is None else value
    if isinstance(value, str) and BARE.match(value):
        value = f"data:;base64,{value}"
    if isinstance(value, str) and value.startswith("data:"):
        head, comma, data = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise InputError(where, f"{place}: {shown(value)}; expected data:image/png;base64,… or the like")
        try:
            content = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(where, f"{place}: not valid base64 ({error})") from None
    elif isinstance(value, str) and value.startswith(("http://", "https://")):
        raise InputError(where, f"{place}: {shown(value)} is on the net; download it, and name the file")
    elif isinstance(value, str):
        file = file_inside(f"{where}: {place}", folder, value, advice=ELSEWHERE)
        content = image_content(f"{where}: {place}: {value}", file)
    if not isinstance(content, bytes):
        raise InputError(where, f"{place}: {shown(value)}; {EXPECTED}")
    named = f"{where}: {place}" + ("" if file is None else f": {value}")
    open_image(named, content).close()
    return RecordImage(named, hashlib.sha256(content).hexdigest(), file, None if file is not None else content)


def image_content(where: str, file: Path) -> bytes:
    """The content of an image's file. Raises InputError where it cannot be read."""
    try:
        return read_regular(file, "an image", MAX_BYTES)
    except FileNotFoundError:
        raise InputError(where, f"no such file in {file.parent}; {EXPECTED}") from None
    except InputError as error:
        raise InputError(where, error.what) from None
    except (OSError, ValueError) as error:
        raise _unreadable(where, error) from None


def open_image(where: str, content: bytes) -> Any:
    """Pillow's image of a file's content, its pixels not yet read. Raises InputError for what is no image of `FORMATS`,
    and for one of no or too many pixels."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError(where, f"needs the package pillow; {EXTRA}") from None
    with _decoding(where):
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    if not 0 < image.width * image.height <= MAX_PIXELS:
        size = f"{image.width:,} × {image.height:,} pixels"
        raise InputError(where, f"has {size}; expected {MAX_PIXELS:,} at most, and 1 at least")
    return image


def read_rgb(where: str, content: bytes) -> Any:
    """Pillow's RGB image of a file's content: the first of several frames or pages, turned as its camera says, without
    its transparency, 16 bits of a channel as 8. Raises InputError as `open_image` does, for pixels that cannot be read,
    and for those that have no range from black to white."""
    with open_image(where, content) as image:
        return _rgb(where, image)


def _rgb(where: str, image: Any) -> Any:
    """An image of Pillow's as `read_rgb` returns it."""
    from PIL import Image, ImageOps

    if image.mode in RANGELESS:
        what = f"has pixels of {RANGELESS[image.mode]}, whose black and white its format does not say"
        raise InputError(where, f"{what}; expected 8 or 16 bits a channel")
    with _decoding(where):
        image.load()
        tags = getattr(image, "tag_v2", {})
        # A damaged EXIF turns nothing.
        with suppress(Exception):
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            levels = np.asarray(image) * (255 / (2 ** tags.get(BITS, (16,))[0] - 1))
            levels = 255 - levels if tags.get(COLOURS) == WHITE_IS_ZERO else levels
            image = Image.fromarray(levels.round().astype(np.uint8))
        return image.convert("RGB")


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Raise InputError for all that Pillow's decoders raise, and print neither warnings nor what libtiff writes."""
    from PIL import UnidentifiedImageError

    with _STDERR, warnings.catch_warnings(), open(os.devnull, "wb") as nowhere:
        warnings.simplefilter("ignore")
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        except UnidentifiedImageError:
            raise _unreadable(where) from None
        except Exception as error:
            raise _unreadable(where, error) from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _unreadable(where: str, error: Exception | None = None) -> InputError:
    reason = "" if error is None else f" ({' '.join(str(error).split())[:200] or type(error).__name__})"
    return InputError(where, f"cannot be read as an image{reason}; expected {', '.join(FORMATS)}")
