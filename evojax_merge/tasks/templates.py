"""Templates that users write, such as `"Q: {question}\\nA:"`: text, and the names of a record's fields.

They look like Python's format strings, of which they may have only names: `{name}`, `{name[key]}` for a field of a
field, `{{` and `}}` for braces. No attribute, conversion, width or format is followed: a template can reach nothing but
the record.
"""

import difflib
import functools
import math
import re
import string
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from evojax_merge.errors import InputError

# Text, or the path to a field.
Part = str | tuple[str, ...]

NAME = re.compile(r"[^\[\].!:{}]+(?:\[[^\[\]{}]+\])*")
# Far beyond any model's context; a longer text would only be slow to refuse.
LONGEST = 10_000_000
EXPECTED = "expected the names of fields in braces, such as {question}, and {{ }} for braces themselves"


@functools.cache
def _parts(template: str) -> tuple[Part, ...]:
    """The texts and fields of a template. Raises ValueError, with the invalid part, for a text that is no template."""
    parts: list[Part] = []
    for text, name, form, conversion in string.Formatter().parse(template):
        if text:
            parts.append(text)
        if name is None:
            continue
        shown = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        if form or conversion or not NAME.fullmatch(name) or name.isdecimal():
            raise ValueError(f"{{{shown[:100]}}} is not the name of a field")
        parts.append(tuple(re.split(r"[\[\]]+", name.removesuffix("]"))))
    return tuple(parts)


def check_template(where: str, template: str) -> None:
    """Raises InputError for an invalid template; `where` is its key."""
    try:
        template.encode()
    except UnicodeEncodeError:
        raise InputError(where, "holds half of a surrogate pair, which is no character") from None
    try:
        _parts(template)
    except ValueError as error:
        raise InputError(where, f"{error}; {EXPECTED}") from None


def check_names_field(where: str, template: str, refuse: bool) -> None:
    """Check that a template names a field: otherwise it gives every record the same text. Raises InputError where that
    cannot be meant (`refuse`), and warns otherwise. `where` is its key."""
    if any(isinstance(part, tuple) for part in _parts(template)):
        return
    problem = "names no field of the records, so that every one of them gives the same text"
    if refuse:
        raise InputError(where, f"{problem}; {EXPECTED}")
    print(f"warning: {where}: {problem}", file=sys.stderr)


def check_stop(where: str, stop: Sequence[str]) -> None:
    """Raises InputError for an empty stop text, with which every output begins, so that nothing would be left of it."""
    for number, text in enumerate(stop):
        if not text:
            raise InputError(f"{where}.stop[{number}]", "is empty, and would end every output at once; leave it out")


def fill(where: str, key: str, template: str, record: Mapping[str, Any]) -> str:
    """Fill a template from a record. Raises InputError where the record lacks a field that it names, or has no text or
    number there. `where` is the record's place, `key` the template's own in the config."""
    text = "".join(part if isinstance(part, str) else _value(where, key, part, record) for part in _parts(template))
    if len(text) > LONGEST:
        raise InputError(where, f"{key}: a text of {len(text):,} characters; expected at most {LONGEST:,}")
    return text


def fields_of_any(template: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields that a template names and at least one of the records has."""
    return [name for name in named_fields(template) if any(name in record for record in records)]


def fill_prompt(where: str, key: str, template: str, record: Mapping[str, Any], fields: Sequence[str]) -> str:
    """Fill a prompt's template. A field that is null, or missing and one that other records have (`fields`), is empty
    text, unless all are. Line feeds between an empty field and an end of the prompt are left out."""
    given = record
    if any(record.get(name) is not None for name in named_fields(template)):
        given = {name: "" if value is None else value for name, value in {**dict.fromkeys(fields), **record}.items()}
    text, parts = fill(where, key, template, given), _parts(template)
    for part, strip in ((parts[:1], str.lstrip), (parts[-1:], str.rstrip)):
        if part and isinstance(part[0], tuple) and not _value(where, key, part[0], given):
            text = strip(text, "\n")
    return text


def named_fields(template: str) -> set[str]:
    """The fields of a record that a template names."""
    return {part[0] for part in _parts(template) if isinstance(part, tuple)}


def only_field(template: str) -> tuple[str, ...] | None:
    """The path of the field that is the whole template; None for any other template."""
    parts = _parts(template)
    return parts[0] if len(parts) == 1 and isinstance(parts[0], tuple) else None


def field_path(name: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    """The path of the field that a config names, `name[key]` as in templates; a record's own field of that name comes
    first."""
    is_path = name not in record and NAME.fullmatch(name) and not name.isdecimal()
    return (is_path and only_field(f"{{{name}}}")) or (name,)


def look_up(where: str, key: str, path: tuple[str, ...], record: Mapping[str, Any]) -> Any:
    """The value of a record at a path of names. Raises InputError, with the record's names, where there is none."""
    value: Any = record
    for depth, name in enumerate(path):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and depth and name.isdecimal() and len(name) < 10 and int(name) < len(value):
            value = value[int(name)]
        else:
            has = ""
            if isinstance(value, Mapping):
                names = list(map(str, value))
                near = difflib.get_close_matches(name[:100], [key[:100] for key in names], n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? " if near else ""
                listed = ", ".join(key[:40] for key in names[:12]) + (", …" if len(names) > 12 else "")
                has = f" ({hint}it has {listed})"
            if isinstance(value, list) and name.isdecimal() and all(isinstance(entry, Mapping) for entry in value):
                turns = f"of a conversation, messages: {path[0]} and apply_chat_template: true read any number"
                has = f" (it has {len(value)}; {turns})"
            raise InputError(where, f"the record has no field {_shown(path[: depth + 1])!r}, which {key} names{has}")
    return value


def _value(where: str, key: str, path: tuple[str, ...], record: Mapping[str, Any]) -> str:
    value = look_up(where, key, path, record)
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    kind = "null" if value is None else f"{value}" if isinstance(value, float) else type(value).__name__
    inner = next(iter(value), "key") if isinstance(value, Mapping) else 0
    advice = f"; name one that it holds: {_shown(path)}[{inner}]" if isinstance(value, Mapping | list) else ""
    what = f"the field {_shown(path)!r}, which {key} names, is {kind}; expected a text or a number{advice}"
    raise InputError(where, what)


def _shown(path: tuple[str, ...]) -> str:
    return path[0] + "".join(f"[{name}]" for name in path[1:])
