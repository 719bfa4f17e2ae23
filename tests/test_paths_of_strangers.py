"""Names that a stranger's file gives become paths through one function, `file_inside`: a table of names, and a sweep
over all places of the package that join a path with something that is no constant."""

import ast
from base64 import b64decode
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.files import write_lines

import evojax_merge
from evojax_merge.config.search_config import TaskFile
from evojax_merge.errors import InputError
from evojax_merge.system.regular_file import file_inside
from evojax_merge.tasks.networks import INPUTS as NETWORKS
from evojax_merge.tasks.opening import open_splits, resolved_config

ROOT = Path(evojax_merge.__file__).parent
# Methods and functions of others that give a path, or several.
GIVING = {"Path", "absolute", "glob", "iterdir", "joinpath", "resolve", "rglob", "with_name", "with_suffix"}
# Names of paths that no annotation tells: of loops, and of blocks that make a folder.
PATHS = {"folder", "work", "place", "cache", "root", "file", "path", "named"}


def is_constant(node: ast.expr) -> bool:
    """A text in the code, or a name in capitals."""
    if isinstance(node, ast.JoinedStr):
        values = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
        return all(is_constant(value) for value in values)
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return isinstance(node, ast.Constant) or (name.isupper() and bool(name))


@cache
def modules() -> dict[str, ast.Module]:
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in sorted(ROOT.rglob("*.py"))}


def named_type(annotation: ast.expr | None) -> str:
    return "" if annotation is None else ast.unparse(annotation).strip("\"'")


@cache
def paths_of_package() -> tuple[frozenset[str], frozenset[str]]:
    """The names of attributes, and those of functions, that are annotated as paths."""
    attributes, functions = set(), set()
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and named_type(node.returns).startswith("Path"):
                functions.add(node.name)
            if isinstance(node, ast.ClassDef):
                attributes |= {
                    part.target.id for part in node.body
                    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
                    and named_type(part.annotation).startswith("Path")
                }  # fmt: skip
                attributes |= {
                    part.name for part in node.body
                    if isinstance(part, ast.FunctionDef) and named_type(part.returns).startswith("Path")
                }  # fmt: skip
                attributes |= {
                    target.id for part in node.body
                    if isinstance(part, ast.Assign) and ast.unparse(part.value).startswith("_Place(")
                    for target in part.targets if isinstance(target, ast.Name)
                }  # fmt: skip
    return frozenset(attributes | {"parent"}), frozenset(functions)


def is_path(node: ast.expr, names: set[str]) -> bool:
    attributes, functions = paths_of_package()
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Div) and is_path(node.left, names)
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Attribute):
        return node.attr in attributes
    if isinstance(node, ast.Call):
        called = node.func
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        return name in GIVING | functions and not ast.unparse(called).startswith("math.")
    return isinstance(node, ast.IfExp) and (is_path(node.body, names) or is_path(node.orelse, names))


def path_names(function: ast.AST) -> set[str]:
    """The names in a function that are paths: by its annotations, and by what is assigned to them."""
    names = set(PATHS)
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and named_type(node.annotation).startswith("Path"):
            names.add(node.arg)
    for node in ast.walk(function):
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and is_path(node.iter, names):
            names.add(node.target.id)
        if isinstance(node, ast.Assign) and is_path(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def entry_names(function: ast.AST) -> set[str]:
    """The names in a function that run over texts in the code: `for name in FILES`."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
            parts = node.iter.elts if isinstance(node.iter, ast.Tuple | ast.List) else [node.iter]
            if all(is_constant(part.value if isinstance(part, ast.Starred) else part) for part in parts):
                names.add(node.target.id)
    return names


def is_safe(node: ast.expr, names: set[str], entries: set[str]) -> bool:
    """A constant, the name of a file that is there, or its path from a folder above."""
    if isinstance(node, ast.Attribute) and node.attr == "name":
        return is_path(node.value, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "relative_to":
        return is_path(node.func.value, names)
    return is_constant(node) or (isinstance(node, ast.Name) and node.id in entries)


def joins(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(function, expression) of every path that is made of something that is no constant."""

    def visit(node: ast.AST, function: str, names: set[str], entries: set[str]) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef):
            function, names, entries = node.name, names | path_names(node), entries | entry_names(node)
        parts: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and is_path(node.left, names):
            parts = [node.right]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("Path", "os.path.join") or called.endswith((".joinpath", ".with_name")):
                parts = node.args[called in ("Path", "os.path.join") :]
            if called in ("Path", "open") and node.args and isinstance(node.args[0], ast.JoinedStr):
                parts = node.args
        if not all(is_safe(part, names, entries) for part in parts):
            yield function, ast.unparse(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function, names, entries)

    yield from visit(tree, "", set(), set())


# Places that join paths by themselves, by the reason why they may.
ALLOWED = {
    "the one function": ["system/regular_file.py: file_inside"],
    "the program's own names and numbers": [
        "backends/decoder/kinds/member.py: load_bank", "backends/decoder/vision.py: _file",
        "checkpoints/derived.py: _stand_in", "checkpoints/folder.py: open_folder",
        "checkpoints/headers.py: _written", "checkpoints/members.py: _place", "checkpoints/remote.py: _place",
        "checkpoints/remote.py: fetched",
        "checkpoints/writer.py: write",
        "checkpoints/writer.py: reserve", "checkpoints/writer.py: _write_index",
        "commands/export.py: _stage_begun_last", "commands/reproduce.py: reproduce",
        "commands/reproduce.py: _without_clock", "commands/search.py: run_search",
        "system/file_system.py: _hidden_name",
        "judge/server.py: application", "mergekit/execute.py: merge_to",
        "mergekit/stages.py: prepare_stream", "report/loggers.py: __init__",
        "report/page.py: _vega", "report/stored_run.py: last_stage", "search/kept_scores.py: _file",
        "search/run_folder.py: keep_winner",
        "search/run_folder.py: write_front", "search/run_folder.py: find_member", "search/run_parts.py: step",
        "search/run_parts.py: __get__", "search/kept_scores.py: _file",
        "tasks/generated_images.py: add",
        "checkpoints/quantised.py: quantisation", "checkpoints/generator_lora.py: _save",
        "checkpoints/kept_vectors.py: prepare_or_read",
    ],
    "the names of a folder's entries": [
        "commands/publish.py: stage",
        "checkpoints/derived.py: _link", "checkpoints/writer.py: _check_entries", "tasks/task_folders.py: _yaml_paths",
    ],
    "a name that Pipeline.classes has checked": [
        "backends/torch/generator.py: save_generator", "checkpoints/generator_lora.py: write_fused",
        "checkpoints/generator_lora.py: _save", "checkpoints/pipelines.py: files", "checkpoints/pipelines.py: content",
        "checkpoints/pipelines.py: open_component", "checkpoints/pipelines.py: _copy",
        "mergekit/pipelines.py: _of_component", "mergekit/pipelines.py: write",
    ],
    "a name that weight_map has checked": [
        "checkpoints/folder.py: _open_shards", "checkpoints/headers.py: _cached",
    ],
    "a name that a pattern or a check before it allows": [
        "search/run_parts.py: sweep", "tasks/data_versions.py: oxen_file",
        "tasks/generated_images.py: read", "tasks/task_folders.py: _read", "tasks/task_folders.py: _yaml_files",
    ],
    "what the user says, in a config, a recipe or on the command line": [
        "backends/function/opening.py: model_path", "checkpoints/gguf_file.py: gguf_files",
        "system/user_modules.py: reference_from_anywhere",
        "checkpoints/references.py: local_path", "commands/search.py: default_out",
        "plugins.py: _load_named",
        "tasks/data_versions.py: dvc_record", "tasks/data_versions.py: _recorded_md5",
        "tasks/function.py: users_module", "tasks/task.py: images", "tasks/harness.py: open_task",
        "tasks/task.py: local_file",
    ],
    "what the system says": [
        "evaluation/memory.py: _groups", "evaluation/memory.py: _left", "system/file_system.py: regular_file",
    ],
}  # fmt: skip
# Folders of modules that write and read the package's own models.
EXAMPLES = ("zoo/", "benchmarks/")


def test_paths_are_made_of_strangers_names_by_one_function() -> None:
    places = {
        f"{module}: {function}": expression
        for module, tree in modules().items() if not module.startswith(EXAMPLES)
        for function, expression in joins(tree)
    }  # fmt: skip
    allowed = {place for listed in ALLOWED.values() for place in listed}
    unlisted = {place: expression for place, expression in places.items() if place not in allowed}
    assert not unlisted, f"join a path with a name; use regular_file.file_inside, or say why not: {unlisted}"
    assert not allowed - places.keys(), "listed, and no longer there"


@pytest.mark.parametrize(
    "expression",
    ["folder / name", "Path(folder, name)", "os.path.join(folder, name)", "folder.joinpath(name)", "path.parent / name",
     "path.with_name(name)", "open(f'{folder}/{name}')", "Path(f'{folder}/{name}')", "cache_folder() / name"],
)  # fmt: skip
def test_the_sweep_sees(expression: str) -> None:
    assert [place for place, _ in joins(ast.parse(f"def f(folder: Path, name: str):\n    return {expression}"))] == [
        "f"
    ]


# ---------------------------------------------------------------------------------------------------------------
# Names

OUTSIDE = [
    "", ".", "./", "..", "../notes", "a/../../notes", "a/..", "/etc/passwd", "//host/share", "~", "~/notes",
    "~root/notes", "..\\notes", "a\\b", "C:notes", "C:/notes", "c:\\notes", "a\0b", "a\nb", "a\x1b[31m", "a\u202eb",
    "\ud800", "a" * 256, "é" * 128, "a/" * 600 + "b", None, 7, 1.5, True, ["a"], {"a": 1},
]  # fmt: skip
INSIDE = ["a", "a.safetensors", "onnx/a.safetensors", "./a", "a b", "é" * 127, "...", ".hidden", "a~", "日本.png"]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
@pytest.mark.parametrize("plain", [False, True])
def test_names_that_are_refused(name: object, plain: bool, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        file_inside("index.json: key", tmp_path, name, plain=plain)
    message = str(caught.value)
    assert message.startswith("index.json: key: ") and "lies outside of its folder" in message and "\n" not in message


@pytest.mark.parametrize("name", INSIDE)
def test_names_that_are_taken(name: str, tmp_path: Path) -> None:
    assert file_inside("index.json", tmp_path, name) == tmp_path / name
    if "/" not in name:
        assert file_inside("index.json", tmp_path, name, plain=True) == tmp_path / name
    else:
        with pytest.raises(InputError):
            file_inside("index.json", tmp_path, name, plain=True)


# ---------------------------------------------------------------------------------------------------------------
# Images, which the user's config may place


PNG = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
TASKS: dict[str, dict[str, Any]] = {
    "likelihood": {}, "exact_match": {}, "generation": {}, "multiple_choice": {}, "entropy": {}, "human": {"votes": 1},
    "classification": {"target": "number"}, "regression": {"target": "number"}, "text_to_text": {},
    "transcription": {"audio": "image", "target": "target"},
}  # fmt: skip


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_names_the_folder_of_its_images(kind: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "pictures/below").mkdir(parents=True)
    for number in range(4):
        (tmp_path / f"pictures/below/{number}.png").write_bytes(PNG)
    fields = {"target": "w6", "choices": ["w6", "w7"], "answer": 0, "number": 1} | (
        {} if kind in NETWORKS else {"prompt": "w5"}
    )

    def opened(prefix: str, **more: Any) -> dict[str, Any]:
        records = [fields | {"image": f"{prefix}{number}.png"} for number in range(4)]
        write_lines(tmp_path / "data/a.jsonl", records)
        section = {"name": "task", "kind": kind, "file": "data/a.jsonl", **TASKS[kind], **more}
        config = TaskFile(tasks=[section]).tasks[0]  # type: ignore[list-item]
        search, heldout = open_splits("tasks", config, tmp_path, 0)
        files = {file for file in (*search.files, *heldout.files) if file.suffix == ".png"}
        assert {file.resolve() for file in files} == {tmp_path / f"pictures/below/{n}.png" for n in range(4)}
        return resolved_config(config, search, heldout)

    for prefix, more in {
        "../pictures/below/": {},
        f"{tmp_path}/pictures/below/": {},
        "../": {"images": "pictures"},
    }.items():
        with pytest.raises(InputError, match=r"a.jsonl:1: image: .* lies outside of its folder; .* images: FOLDER"):
            opened(prefix, **more)
    section = opened("below/", images="pictures")
    assert section["images"] == str(tmp_path / "pictures")
    # A run's config is read from another folder.
    assert opened("below/", **{key: section[key] for key in ("images", "file")}) == section
