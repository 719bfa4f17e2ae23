"""Small JSON files of model folders (config.json, generation_config.json, an index), read without trusting them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evojax_merge.errors import InputError, shown
from evojax_merge.system.regular_file import read_regular

# The index of the largest checkpoints is some 20 MB; a larger file is no description of a model.
LIMIT_BYTES = 64 << 20
LIMIT_DEPTH = 64


def read_json_object(path: Path, *, missing: Mapping[str, Any] | str) -> dict[str, Any]:
    """The JSON object that the file holds.

    `missing`: the value to return where there is no such file, or, as a text, the message to raise then ("expected a
    Hugging Face model folder with a config.json").

    NaN and Infinity are read as Python's json does (the configs of some architectures hold them): code that uses a
    number has to check it. Raises InputError as `read_json` does, and for a file that holds no object.
    """
    value = read_json(path, missing=missing)
    if not isinstance(value, dict):
        raise InputError(path, f"holds {shown(value)}; expected a JSON object")
    return value


def read_json(path: Path, *, missing: Mapping[str, Any] | str = "expected a JSON file") -> Any:
    """The JSON that the file holds. Raises InputError for a file that cannot be read, that is over `LIMIT_BYTES`, that
    is not UTF-8 or not JSON, that nests deeper than `LIMIT_DEPTH`, or that gives one key two values."""
    try:
        raw = read_regular(path, "a JSON file", LIMIT_BYTES)
    except (FileNotFoundError, NotADirectoryError):  # or `path` lies "in" a single file of weights
        if isinstance(missing, str):
            raise InputError(path, f"not found; {missing}") from None
        return dict(missing)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror}); expected a JSON file") from None
    try:
        text = raw.decode()
        value = json.loads(text, object_pairs_hook=_object)
        if "\\u" in text:  # halves of a pair are JSON, but no text: they could not be written again
            json.dumps(value, ensure_ascii=False).encode()
    except _Duplicate as error:
        raise InputError(path, f"gives the key {shown(error.args[0])} twice, with different values") from None
    except UnicodeEncodeError:
        raise InputError(path, "holds half of a surrogate pair (\\ud800 to \\udfff); expected Unicode text") from None
    except UnicodeDecodeError as error:
        raise InputError(path, f"not UTF-8 (byte {error.start}); expected JSON in UTF-8") from None
    except RecursionError:
        raise InputError(path, f"nests too deep; expected JSON of at most {LIMIT_DEPTH} levels") from None
    except ValueError as error:  # json's own errors, and integers of thousands of digits
        raise InputError(path, f"not valid JSON ({error})") from None
    if _deeper(value, LIMIT_DEPTH):
        raise InputError(path, f"nests too deep; expected JSON of at most {LIMIT_DEPTH} levels")
    return value


class _Duplicate(Exception):
    """A key that an object gives twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        for key, value in pairs:
            if value is not made[key] and value != made[key]:
                raise _Duplicate(key)
    return made


def _deeper(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner: list[object] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            inner.extend(child for child in children if isinstance(child, dict | list))
        if not inner:
            return False
        level = inner
    return True
