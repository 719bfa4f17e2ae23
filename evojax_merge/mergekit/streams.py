"""Recipes of several documents, in the format of mergekit-multi.

A document with a `name` is a *stage*: any other document may name its result as a model, also with an adapter behind a
+. The document without a name is the result; where all have names, it is the one that no other document needs.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.derived import ignored_revisions, split_reference
from evojax_merge.checkpoints.references import local_path
from evojax_merge.errors import InputError, shown
from evojax_merge.mergekit.other_formats import other_format
from evojax_merge.mergekit.schema import KEYS, RecipeFile, checked_mapping, parse_recipe
from evojax_merge.schema.yaml_reader import load_documents


@dataclass(frozen=True)
class RecipeStream:
    """The merges of a recipe: the stages that the result needs, each after the stages that it needs, and the result.
    `unused`: the other stages."""

    path: Path
    stages: tuple[RecipeFile, ...]
    result: RecipeFile
    unused: tuple[RecipeFile, ...]

    @property
    def merges(self) -> list[RecipeFile]:
        """All merges in their order, the result's last."""
        return [*self.stages, self.result]


def read_stream(path: Path) -> RecipeStream:
    """Read a recipe of one document or several. Raises InputError as `parse_stream` does."""
    return parse_stream(path, load_documents(path))


def parse_stream(path: Path, documents: Sequence[Any]) -> RecipeStream:
    """A recipe of one document or several as plain data. Relative paths start in the folder of `path`, which names the
    recipe in messages; empty documents (None) are skipped.

    Raises InputError, naming the document, for an invalid merge, a duplicate name, stages that need each other's
    results, and several documents that could be the result.
    """
    numbered = [(number, document) for number, document in enumerate(documents, start=1) if document is not None] or [
        (1, None)
    ]
    labels = [f"document {number}" for number, _ in numbered]
    wheres = [str(path)] if len(labels) == 1 else [f"{path}: {label}" for label in labels]
    merges = [_stage(path, where, document) for where, (_, document) in zip(wheres, numbered, strict=True)]
    index: dict[str, int] = {}
    for i, merge in enumerate(merges):
        if merge.name in index:
            raise InputError(wheres[i], f"name: {merge.name}: {labels[index[merge.name]]} has it already")
        if merge.name:
            index[merge.name] = i
    named = [[stage_of(model, index) for model in merge.references] for merge in merges]
    needs = [list(dict.fromkeys(index[name] for name in names if name is not None)) for names in named]
    # Checked for all documents: stages that need each other are wrong even where the result does not need them.
    _in_order(merges, needs, range(len(merges)))
    order = _in_order(merges, needs, [_result(path, labels, merges, needs)])
    unused = set(range(len(merges))).difference(order)
    *stages, result = (merges[i] for i in order)
    return RecipeStream(path, tuple(stages), result, tuple(merges[i] for i in sorted(unused)))


def _stage(path: Path, where: str, document: Any) -> RecipeFile:
    message = other_format(document)
    if message is not None:
        raise InputError(where, message)
    top = checked_mapping(where, document, KEYS["document"] | {"name"})
    name = top.get("name")
    if name is None:
        name = ""
    elif not isinstance(name, str) or not name:
        raise InputError(where, f"name: {shown(name)}; expected a text, by which other documents call the result")
    elif where != str(path):
        where = f"{where} ({name})"
    recipe = parse_recipe(path, {key: value for key, value in top.items() if key != "name"}, where)
    return replace(recipe, name=name)


def stage_of(reference: str, names: Collection[str]) -> str | None:
    """The stage that a recipe's model is the result of, also with an adapter; None: of no stage."""
    base, _ = split_reference(reference, lambda name: name in names)
    return base if base in names else None


def _in_order(merges: Sequence[RecipeFile], needs: Sequence[Sequence[int]], wanted: Iterable[int]) -> list[int]:
    """The wanted documents and all that they need, each after what it needs. Raises InputError for a cycle."""
    done: dict[int, None] = {}
    for first in wanted:
        # The path from the wanted document to the current one, each with its remaining needs.
        path = {} if first in done else {first: iter(needs[first])}
        while path:
            document, left = next(reversed(path.items()))
            needed = next((i for i in left if i not in done), None)
            if needed is None:
                done[document] = None
                del path[document]
            elif needed in path:
                down = list(path)
                names = " -> ".join(merges[i].name for i in [*down[down.index(needed) :], needed])
                raise InputError(merges[needed].where, f"needs its own result ({names})")
            else:
                path[needed] = iter(needs[needed])
    return list(done)


def _result(path: Path, labels: Sequence[str], merges: Sequence[RecipeFile], needs: Sequence[Sequence[int]]) -> int:
    """The number of the document that is the result. No document needs itself, directly or not, so that there is one.
    Raises InputError where there are several."""
    unnamed = [i for i, merge in enumerate(merges) if not merge.name]
    needed = {i for needs_of_stage in needs for i in needs_of_stage}
    possible = unnamed or [i for i in range(len(merges)) if i not in needed]
    if len(possible) > 1:
        two_labels = " and ".join(labels[i] for i in possible[:2])
        why = f"{two_labels} have no name" if unnamed else f"all documents have names, and none needs {two_labels}"
        raise InputError(path, f"{why}; expected one document without a name, which is the result")
    return possible[0]


def stream_warnings(stream: RecipeStream) -> list[str]:
    """Warnings about stages that the result does not need, names that a folder has as well, and revisions of
    folders."""
    unused = [f"{stage.where}: the result does not need it, and it is not merged" for stage in stream.unused]
    shadowed = [
        f"{stage.where}: {folder} has this name as well; the result of the document is taken"
        for stage in stream.stages
        if (folder := local_path(stage.name, stream.path.parent)) is not None
    ]
    revisions = [
        f"{merge.where}: {line}"
        for merge in stream.merges
        for line in ignored_revisions(merge.references, stream.path.parent)
    ]
    return unused + shadowed + revisions


def plain_recipe(documents: Sequence[Any]) -> Any:
    """A recipe in the form that users handle: its only document, or the list of its documents."""
    return documents[0] if len(documents) == 1 else list(documents)
