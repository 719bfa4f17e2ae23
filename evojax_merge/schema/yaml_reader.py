"""Reads YAML from strangers, and refuses content that would be lost in silence or would never end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evojax_merge.errors import InputError
from evojax_merge.system.regular_file import read_regular

# libyaml where PyYAML was built with it: ten times as fast.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
RESOLVER = yaml.resolver.Resolver()
# The recipe of two hundred parents with a number for every part of every layer stays well below these.
MAX_BYTES = 16 * 2**20
MAX_NODES = 1_000_000
MAX_DEPTH = 100
MAX_DIGITS = 1000
# Called for a key that its mapping has already, with the key's place and the message about it.
Repeated = Callable[[str, str], None]


def refuse_repeated(place: str, said: str) -> None:
    """Raises InputError for a key that a mapping has twice."""
    raise InputError(place, f"{said}; expected one of them")


def take_last(place: str, said: str) -> None:
    """Accepts a key that a mapping has twice: the last counts, as in PyYAML."""


def load_yaml(path: Path) -> Any:
    """Parse a YAML file of one document. Raises InputError, with the line, for content that `parse_yaml` refuses, and
    for anything but a file of UTF-8 text."""
    return parse_yaml(path, read_text(path))


def load_documents(path: Path, repeated: Repeated = refuse_repeated, loader: Any = LOADER) -> list[Any]:
    """Parse all documents of a YAML file as `parse_documents` does, and raise InputError as `load_yaml` does."""
    return parse_documents(path, read_text(path), repeated, loader)


def read_text(path: Path) -> str:
    """The text of a YAML file. Raises InputError for anything but a file of UTF-8 text of at most MAX_BYTES."""
    try:
        return read_regular(path, "a YAML file", MAX_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise InputError(path, "no such file") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not UTF-8 text (byte {error.start + 1}: {error.reason})") from None
    except ValueError as error:  # a name that no file can have
        raise InputError(path, f"cannot be read ({error})") from None


def parse_yaml(where: object, text: str) -> Any:
    """The one document of a YAML text as plain Python data. `where` names the text in messages.

    Raises InputError for text that is not YAML, for a key that a mapping has twice, for an alias inside of the value
    that it stands for, and for more than `MAX_NODES` values, aliases written out, or `MAX_DEPTH` levels.
    """
    with _refusing(where):
        _check_events(where, text, refuse_repeated)
        return yaml.load(text, Loader=LOADER)


def parse_documents(where: object, text: str, repeated: Repeated = refuse_repeated, loader: Any = LOADER) -> list[Any]:
    """All documents of a YAML text, each as `parse_yaml` returns it. An empty document, such as one after a last `---`,
    is None. Raises InputError as `parse_yaml` does; an alias stands for an anchor of its own document. Where `repeated`
    does not refuse a key that a mapping has twice, the last counts. `loader`: a subclass of LOADER that knows more
    tags."""
    with _refusing(where):
        _check_events(where, text, repeated)
        return list(yaml.load_all(text, Loader=loader))


# How to mend the commonest mistakes, by the beginning of libyaml's problem.
REMEDIES = {
    "found character that cannot start": "indent with spaces, no tabs; put a text that begins with @ or ` in quotes",
    "mapping values are not allowed": "put a text that holds ': ' in quotes",
    "found unexpected ':'": "put a text that holds ': ' in quotes",
    "did not find expected key": "check the indentation; put a text with more behind a brace or quote in quotes",
    "did not find expected '-'": "check the indentation",
    "found unexpected end of stream": "close the quotes",
    "found undefined alias": "put a text that begins with * in quotes",
    "did not find expected ','": "close the bracket, or put a text that holds ': ' or brackets in quotes",
}


@contextmanager
def _refusing(where: object) -> Iterator[None]:
    """Raises InputError in place of PyYAML's errors."""
    try:
        yield
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        remedy = next((f"; {remedy}" for begin, remedy in REMEDIES.items() if str(problem).startswith(begin)), "")
        raise InputError(where if mark is None else _at(where, mark), f"not valid YAML ({problem}){remedy}") from None
    except ValueError as error:  # a date or a number that there is not
        raise InputError(where, f"not valid YAML ({error})") from None


@dataclass
class _Open:
    """A mapping or list that has begun. `nodes`: the values in it so far, itself included."""

    anchor: str | None
    mapping: bool
    nodes: int = 1
    children: int = 0
    keys: dict[tuple[str, str], int] = field(default_factory=dict)


def _check_events(where: object, text: str, repeated: Repeated) -> None:
    open_nodes: list[_Open] = []
    sizes: dict[str, int] = {}
    of_documents = 0

    def closed(anchor: str | None, nodes: int) -> None:
        nonlocal of_documents
        if anchor is not None:
            sizes[anchor] = nodes
        if open_nodes:
            open_nodes[-1].nodes += nodes
            open_nodes[-1].children += 1
            nodes = open_nodes[-1].nodes
        else:
            of_documents += nodes
            nodes = of_documents
        if nodes > MAX_NODES:
            raise InputError(where, f"stands for more than {MAX_NODES:,} values; expected fewer")

    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(open_nodes) > MAX_DEPTH:
                raise InputError(_at(where, event.start_mark), f"is nested more than {MAX_DEPTH} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = open_nodes.pop()
            closed(ended.anchor, ended.nodes)
        elif isinstance(event, yaml.AliasEvent):
            if any(node.anchor == event.anchor for node in open_nodes):
                raise InputError(_at(where, event.start_mark), f"*{event.anchor} is inside of what it stands for")
            closed(None, sizes.get(event.anchor or "", 1))
        elif isinstance(event, yaml.ScalarEvent):
            if open_nodes and open_nodes[-1].mapping and open_nodes[-1].children % 2 == 0:
                # The number 1 and the text "1" are two keys; `<<`, which merges another mapping in, may stand twice.
                keys, key, mark = open_nodes[-1].keys, (_tag(event), event.value), event.start_mark
                if key in keys:
                    repeated(_at(where, mark), f"{event.value}: is on line {keys[key]} already")
                if key[0] != "tag:yaml.org,2002:merge" and mark is not None:
                    keys[key] = mark.line + 1
            if len(event.value) > MAX_DIGITS and event.implicit[0] and _tag(event) == "tag:yaml.org,2002:int":
                raise InputError(_at(where, event.start_mark), f"a number of more than {MAX_DIGITS:,} digits")
            closed(event.anchor, 1)


def _tag(scalar: Any) -> str:
    return str(scalar.tag or RESOLVER.resolve(yaml.ScalarNode, scalar.value, scalar.implicit))


def _at(where: object, mark: Any) -> str:
    return f"{where}:{mark.line + 1}"
