"""Lines end at line feeds alone where data are read: code that splits texts otherwise has a reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from evojax_merge.errors import InputError
from evojax_merge.system.regular_file import lines_of

ROOT = Path(__file__).parent.parent
# Calls that split at other line ends as well, or that turn them into line feeds, by the file and the function.
REASONS = {
    ("evaluation/compilers.py", "collectives"): "XLA's text of a compiled program",
    ("evaluation/memory.py", "_address_space"): "a file of the kernel",
    ("evaluation/memory.py", "_groups"): "a file of the kernel",
    ("evaluation/memory.py", "_left"): "a file of the kernel",
    ("evaluation/memory.py", "_machine"): "a file of the kernel",
    ("evaluation/targets.py", "processor_name"): "a file of the kernel",
    ("system/console.py", "print"): "a table that the program has drawn",
    ("system/jax_environment.py", "_try_flags"): "what XLA prints",
    ("system/jinja_process.py", "_limit_memory"): "a file of the kernel",
    ("system/jinja_process.py", "_serve"): "JSON in ASCII from the process that started this one",
    ("report/loggers.py", "log"): "CSV, whose reader and writer have rules of their own for line ends",
    ("search/environment.py", "_first_line"): "a file of the kernel",
    ("search/checkpoints.py", "append_line"): "a line that is written",
    ("tasks/function.py", "_one_line"): "the message of a user's exception, whose lines are joined",
}


def callers(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the name of the function that it stands in."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else name
            if isinstance(child, ast.Call):
                yield inner, child
            yield from walk(child, inner)

    return walk(tree, "")


def mode_of(call: ast.Call, place: int) -> str | None:
    """The mode of a call of `open`; None: it is none of a file."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[place : place + 1]
    if not given:
        return "r"
    return given[0].value if isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else None


def splits_elsewhere(call: ast.Call) -> bool:
    """Return whether a call splits a text at other line ends than line feeds, or opens a file so that they are turned
    into line feeds, or splits a text that was read so."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "splitlines":
        return True
    if name == "open" and isinstance(call.func, ast.Name):
        # open(os.open(…)), and sys.stdin and pipes.
        mode = mode_of(call, 1)
        return mode is not None and "b" not in mode
    if name == "open" and isinstance(call.func, ast.Attribute):
        owner = ast.unparse(call.func.value)
        texts = {keyword.arg for keyword in call.keywords} & {"encoding", "newline", "errors"}
        return bool(texts) or (owner.endswith(("path", "file")) and not call.args)
    if name == "split" and isinstance(call.func, ast.Attribute):
        return ".read_text(" in ast.unparse(call.func.value)
    return False


def iterates_standard_input(tree: ast.AST) -> Iterator[str]:
    for name, function in [(node.name, node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        loops = [node for node in ast.walk(function) if isinstance(node, ast.For | ast.comprehension)]
        if any(ast.unparse(loop.iter) == "sys.stdin" for loop in loops):
            yield name


def test_who_reads_lines_otherwise_has_a_reason() -> None:
    found = set()
    for folder in (ROOT / "evojax_merge", ROOT / "kernels" / "merge_kernels"):
        for path in folder.rglob("*.py"):
            tree, name = ast.parse(path.read_text()), path.relative_to(folder).as_posix()
            found |= {(name, function) for function, call in callers(tree) if splits_elsewhere(call)}
            found |= {(name, function) for function in iterates_standard_input(tree)}
    assert found - REASONS.keys() == set(), "read lines with regular_file.lines_of, or give a reason"
    assert REASONS.keys() - found == set(), "has no such call any more"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("text.splitlines()", True), ("path.open()", True), ("path.open(encoding='utf-8')", True),
        ("open(path)", True), ("path.read_text().split('\\n')", True), ("path.open('rb')", False),
        ("open(path, 'rb')", False), ("task.open(config, opening)", False), ("text.split('\\n')", False),
    ],
)  # fmt: skip
def test_what_counts_as_reading_lines_otherwise(code: str, expected: bool) -> None:
    call = ast.parse(code).body[0].value  # type: ignore[attr-defined]
    assert splits_elsewhere(call) == expected


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes("a\u2028b\x85c\x0bd\re\r\n\nf".encode())
    assert lines_of(path, "lines", 100) == (["a\u2028b\x85c\x0bd\re\r".encode(), b""], b"f")
    path.write_bytes(b"")
    assert lines_of(path, "lines", 100) == ([], b"")
    path.write_bytes(b"a\n\n")
    with pytest.raises(InputError, match=r"has 3 bytes; expected lines of at most 2"):
        lines_of(path, "lines", 2)
