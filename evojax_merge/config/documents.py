"""Documents of YAML: the check against a schema, overrides of keys, the keys that there are, and the messages about
documents that do not fit. Every error names the file, the key and what was expected.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from evojax_merge import plugins
from evojax_merge.errors import InputError, did_you_mean, nearest
from evojax_merge.schema.section import FLOAT32_MAX, Form, Section
from evojax_merge.schema.yaml_reader import load_yaml, parse_yaml
from evojax_merge.tasks.kinds import find_kind, kinds
from evojax_merge.tasks.task import TaskConfig


def describe_value(value: Any) -> str:
    """A value of a document, in YAML's words and short enough for a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        return repr(value) if len(value) <= 80 else f"{value[:60]!r} and {len(value) - 60:,} more characters"
    if isinstance(value, list):
        return f"a list of {len(value):,}" if value else "an empty list"
    return "a mapping" if isinstance(value, dict) else f"a {type(value).__name__}"


def _parts(annotation: Any) -> tuple[Any, list[Any]]:
    """An annotation without `Annotated` and `None`, and its metadata."""
    metadata: list[Any] = []
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            # The metadata nearest to the field come first.
            metadata += reversed(
                [one for item in more for one in (_flat(item) if isinstance(item, FieldInfo) else [item])]
            )
        elif get_origin(annotation) in (Union, UnionType):
            members = [one for one in get_args(annotation) if one is not NoneType]
            if len(members) != 1:
                return annotation, metadata
            annotation = members[0]
        else:
            return annotation, metadata


def _flat(field: FieldInfo) -> list[Any]:
    return [*field.metadata, field]


def _expected(annotation: Any, metadata: Sequence[Any], short: bool = False) -> str:
    """The expected values of an annotation, in words; `short`: in those of a table."""
    annotation, more = _parts(annotation)
    metadata = [*metadata, *more]
    form = next((item for item in metadata if isinstance(item, Form)), None)
    if form is not None:
        return (short and form.short) or form.words
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping" if short else f"a mapping (of {', '.join(annotation.model_fields)})"
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(", ".join(map(str, get_args(annotation))).rsplit(", ", 1))
    if origin is list:
        low, high = _limit(metadata, "min_length"), _limit(metadata, "max_length")
        inner, _ = _parts(get_args(annotation)[0])
        what = {str: "strings", float: "numbers", int: "whole numbers"}.get(inner, "mappings")
        if get_origin(inner) is Literal:
            what = f"of {_expected(inner, [])}"
        amount = "" if high is None else f"{low} to {high:,} " if low else f"up to {high:,} "
        return f"a list of {amount}{what}"
    if origin is dict:
        return "a mapping"
    if annotation is bool:
        return "true or false"
    what = "a whole number" if annotation is int else "a number"
    low, high = _limit(metadata, "ge"), _limit(metadata, "le")
    if low is None and high is None:
        return f"a finite {what[2:]}" if annotation is float else what
    if high is None:
        return f"{what}, {low:,} or more"
    if high == FLOAT32_MAX:
        return f"{what} that float32 holds"
    return f"{what} from {low:,} to {high:,}" if annotation is int else f"{what} from {low:g} to {high:g}"


def is_section(field: FieldInfo) -> bool:
    """Return whether a field's value is a section of its own."""
    type_ = _parts(field.annotation)[0]
    return isinstance(type_, type) and issubclass(type_, BaseModel)


def _limit(metadata: Sequence[Any], name: str) -> Any:
    return next((getattr(item, name) for item in metadata if getattr(item, name, None) is not None), None)


@dataclass(frozen=True)
class Key:
    """A key that a config may have. name: with the keys that it is in, `[]` for each item of a list and NAME for any
    name in a mapping; of: the kinds of tasks that have it (empty: every kind, or no task); takes: its values, in words;
    default: in YAML, "required" where it has to be given; meaning: a line."""

    name: str
    of: tuple[str, ...]
    takes: str
    default: str
    meaning: str


def keys_of(schema: type[BaseModel], above: str = "", of: tuple[str, ...] = ()) -> Iterator[Key]:
    """All keys of a section and of the sections in it, in their order; for tasks, those of every kind. The keys
    inside of `stages` are left out: a config without stages has the same ones."""
    for name, field in schema.model_fields.items():
        annotation, _ = _parts(field.annotation)
        name_with_sections = f"{above}{name}"
        takes = _expected(field.annotation, list(reversed(_flat(field))), short=True)
        yield Key(name_with_sections, of, takes, _default_of(field), field.description or "")
        items = get_args(annotation)[-1] if get_origin(annotation) in (list, dict) else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from keys_of(annotation, f"{name_with_sections}.")
        elif get_origin(annotation) is dict and isinstance(items, type) and issubclass(items, BaseModel):
            yield from keys_of(items, f"{name_with_sections}.NAME.")
        elif items is not None and _parts(items)[0] is TaskConfig:
            # The keys that every kind has, and then each kind's own, or keys with another meaning or default for it.
            shared = list(keys_of(TaskConfig, f"{name_with_sections}[]."))
            yield from shared
            for kind in kinds():
                names = kind.names or (str(kind.key),)
                of_kind = [replace(key, of=names) for key in shared]
                keys = keys_of(kind.config, f"{name_with_sections}[].", names)
                yield from (key for key in keys if key not in of_kind)


def _default_of(field: FieldInfo) -> str:
    """A field's default in YAML; empty for None and for a section of defaults."""
    if field.is_required():
        return "required"
    value = field.default
    if value is None or isinstance(value, BaseModel):
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and value.isidentifier():
        return value
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else json.dumps(value)


def _find(schema: type[BaseModel], location: Sequence[Any], document: Any) -> tuple[str, Any, list[Any], Any]:
    """The place of one of pydantic's locations in the YAML: its key, the annotation and metadata there, and the value.
    Parts of the location that are no keys (the members of a union) are left out."""
    key, value = "", document
    annotation: Any = schema
    metadata: list[Any] = []
    for part in location:
        inside: Any = None
        if part == "[key]":
            break
        annotation, more = _parts(annotation)
        metadata = [*metadata, *more]
        annotation = _section_of(annotation, value)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(part))
            key += f".{part}"
            # An unknown key has no annotation.
            annotation, metadata = (None, []) if field is None else (field.annotation, list(reversed(_flat(field))))
        elif get_origin(annotation) is list and isinstance(part, int):
            key += f"[{part}]"
            annotation, metadata = get_args(annotation)[0], []
        elif get_origin(annotation) is dict:
            key += f".{part}"
            annotation, metadata = get_args(annotation)[1], []
        else:
            break
        if isinstance(value, dict):
            inside = value.get(part)
        elif isinstance(value, (list, tuple)) and isinstance(part, int) and part < len(value):
            inside = value[part]
        value = inside
    return key.lstrip("."), _section_of(annotation, value), metadata, value


def _fields(schema: type[BaseModel], location: Sequence[Any], document: Any) -> dict[str, FieldInfo]:
    """The fields of the section at one of pydantic's locations."""
    fields: dict[str, FieldInfo] = _parts(_find(schema, location, document)[1])[0].model_fields
    return fields


def _section_of(annotation: Any, value: Any) -> Any:
    """The annotation; for that of any task, the section of the value's kind."""
    kind = find_kind(value) if _parts(annotation)[0] is TaskConfig else None
    return annotation if kind is None else kind.config


def explain(schema: type[BaseModel], error: ValidationError, document: Any) -> str:
    """The first error of a document, in one line: the key, the expected and the actual value."""
    first, *others = error.errors(include_url=False)
    if first["type"] == "missing":
        # A misspelt key says more than a missing one, and first the key that was likely meant to be the missing one.
        unknown = [each for each in others if each["type"] == "extra_forbidden"]
        near = [(each, nearest(str(each["loc"][-1]), _fields(schema, each["loc"][:-1], document))) for each in unknown]
        intended = [each for each, name in near if (*each["loc"][:-1], name) == tuple(first["loc"])]
        first = next(iter([*intended, *(each for each, name in near if name is not None)]), first)
    location, kind = first["loc"], first["type"]
    key, annotation, metadata, value = _find(schema, location, document)
    if kind in ("extra_forbidden", "invalid_key"):
        fields = _fields(schema, location[:-1], document)
        # The key of a section beside it, such as search.generations, or one of the document, such as seed.
        outer, dot, last = key.rpartition(".")
        meant = [
            f" (did you mean '{outer}{dot}{name}.{last}'?)"
            for name, field in fields.items()
            if is_section(field) and last in _parts(field.annotation)[0].model_fields
        ]
        if outer and last in schema.model_fields and not is_section(schema.model_fields[last]):
            meant.append(f" (did you mean '{last}', outside of {outer}?)")
        return f"{key}: unknown key{meant[0] if len(meant) == 1 else did_you_mean(str(location[-1]), fields)}"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        shown = f", found {describe_value(value)}" if isinstance(value, (str, int, float)) else ""
        return f"{key}: {message}{shown}" if key else message
    if location[-1] == "[key]":
        return f"{key}: the key is no text; put it in quotes"
    if kind == "task_kind":
        return f"{key}: {first['msg']}"
    # YAML reads no, on, 12 and {name} as other things than texts.
    is_unquoted = isinstance(value, bool | int | float) or (isinstance(value, dict) and [*value.values()] == [None])
    expected = _expected(annotation, metadata)
    advice = "; put it in quotes" if is_unquoted and expected.startswith("a text") else ""
    return f"{key}: expected {expected}, found {describe_value(value)}{advice}"


def parse(path: Path | str, document: Any, schema: type[Section]) -> Any:
    """Check a parsed document against a schema; InputError names the first key that does not fit. The plugins that the
    document names are loaded first, and have absolute paths afterwards: they add kinds of tasks."""
    if not isinstance(document, dict):
        raise InputError(path, f"expected a mapping, found {type(document).__name__}")
    named = document.get("plugins")
    if (
        isinstance(path, Path)
        and "plugins" in schema.model_fields
        and isinstance(named, list)
        and all(isinstance(name, str) for name in named)
    ):
        document = document | {"plugins": plugins.load_named(f"{path}: plugins", named, path.parent)}
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise InputError(path, explain(schema, error, document)) from None


def apply_overrides(path: Path, document: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Apply `key.path=value` pairs, values as YAML; list items by their number, from 0: `tasks.1.metric`, or
    `tasks[1].metric` like in messages. The last value of a key that is set twice counts."""
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
        if not separator or not all(parts):
            raise InputError("--set", f"{describe_value(override)}; expected key.path=value")
        value = parse_yaml(f"--set {key}", text)
        target: Any = document
        try:
            for part in parts[:-1]:
                target = target[_position(part)] if isinstance(target, list) else target.setdefault(part, {})
            target[_position(parts[-1]) if isinstance(target, list) else parts[-1]] = value
        except (ValueError, IndexError, TypeError, AttributeError):
            raise InputError("--set", f"{describe_value(key)}: there is no such key in {path}") from None
    return document


def _position(part: str) -> int:
    """The number of a list's item; ValueError for anything else, including a number that counts from the end."""
    if not re.fullmatch(r"[0-9]{1,9}", part):
        raise ValueError
    return int(part)


@contextmanager
def attribute_errors_to_overrides(path: Path, overrides: Sequence[str]) -> Iterator[None]:
    """In errors of the block about a key of the config that an override gave, name the override and not the file."""
    try:
        yield
    except InputError as error:
        text, prefix = f"{error.where}: {error.what}", f"{path}: "
        # The last value of a key that is set twice counts.
        for override in reversed(overrides) if text.startswith(prefix) else ():
            key, _, value = override.partition("=")
            complaint = _complaint(path, key, text.removeprefix(prefix))
            if complaint is not None:
                shown = override if len(override) <= 80 else f"{override[:60]} […]"
                # The override names the value already.
                raise InputError(f"--set {shown}", complaint.removeprefix(f"{value}; ")) from None
        raise


def _complaint(path: Path, key: str, text: str) -> str | None:
    """The part of a message on the config (`space: parameters.weight: …`) that concerns a key, or None if it is of
    another one."""
    named_key, message = "", text
    while match := re.match(r"([^\s:]+): ", message):
        named_key, message = f"{named_key}.{match[1]}".lstrip("."), message[match.end() :]
        named = re.sub(r"\[(\d+)\]", r".\1", named_key)
        if named == key:
            return message
        if named.startswith(f"{key}."):
            return f"{named.removeprefix(f'{key}.')}: {message}"
        # The message is about a section that holds the key: it names the key in it, or the override has made the whole
        # section.
        above, _, last = key.rpartition(".")
        if named == above and message.startswith(f"{last}: "):
            continue
        part_named = named == above and re.search(rf"\b{re.escape(last)}\b", message)
        if part_named or (key.startswith(f"{named}.") and not _holds(path, named)):
            return f"{named_key}: {message}"
    return None


def _holds(path: Path, key: str) -> bool:
    """Return whether a config file has a key."""
    value = load_yaml(path)
    for part in key.split("."):
        try:
            value = value[_position(part)] if isinstance(value, list) else value[part]
        except (ValueError, IndexError, TypeError, KeyError):
            return False
    return True
