"""JSON, lines of JSON, YAML and recipes, read and written."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from evojax_merge.mergekit.schema import RecipeFile, parse_recipe
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.tasks.records import read_source
from evojax_merge.tasks.text import Example, TextConfig, read_examples


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    content = read_json(path)
    change(content)
    write_json(path, content)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    """A JSON document of each line of a file."""
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def write_json(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def write_yaml(path: Path, document: Any) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_recipe(path: Path) -> RecipeFile:
    """A recipe of one document."""
    return parse_recipe(path, load_yaml(path))


def examples_in(file: Path, kind: Any, **keys: Any) -> list[Example]:
    """The examples of a file, by the keys of a task's section."""
    return read_examples(read_source(file), kind, TextConfig(name="task", kind=kind, file=str(file), **keys), "tasks")
