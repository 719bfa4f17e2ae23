"""Files that appear complete or not at all, links that stay, and the one module that deletes."""

import ast
import os
import socket
import stat
from pathlib import Path

import pytest

from evojax_merge.errors import InputError
from evojax_merge.file_system import atomic_write, regular_file, remove_file, remove_folder, remove_leftovers

PACKAGES = [Path(__file__).parents[1] / name for name in ("evojax_merge", "kernels")]
# Names that delete, rename or replace, wherever they are called or handed on.
OF_MODULES = {
    "os": {"remove", "unlink", "rmdir", "removedirs", "rename", "renames", "replace", "truncate"},
    "shutil": {"rmtree", "move"},
}
# Methods of paths; `replace` has one argument there, and more where it is that of a string or a dataclass.
OF_PATHS = {"unlink", "rmdir", "rename"}


def deletions(file: Path) -> list[str]:
    """Each place of a module where a file is deleted, renamed or replaced."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in OF_MODULES:
            found += [(node, alias.name) for alias in node.names if alias.name in OF_MODULES[node.module]]
        if isinstance(node, ast.Attribute):
            of = OF_MODULES.get(node.value.id, set()) if isinstance(node.value, ast.Name) else set()
            found += [(node, node.attr)] if node.attr in of | OF_PATHS else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "replace":
            found += [(node, "replace")] if len(node.args) == 1 and not node.keywords else []
    return [f"{file.name}:{node.lineno}: {name}" for node, name in found]


def test_one_module_deletes_renames_and_replaces_files() -> None:
    files = [file for package in PACKAGES for file in sorted(package.rglob("*.py"))]
    (deleting,) = [file for file in files if file.name == "file_system.py"]
    assert len(deletions(deleting)) > 5
    assert [line for file in files if file != deleting for line in deletions(file)] == []


def test_a_file_is_written_where_its_link_leads(tmp_path: Path) -> None:
    real, link = tmp_path / "disk/real.json", tmp_path / "link.json"
    real.parent.mkdir()
    real.write_text("old")
    link.symlink_to("disk/real.json")
    atomic_write(link, "new")
    assert link.is_symlink() and real.read_text() == "new"
    assert [path.name for path in real.parent.iterdir()] == ["real.json"]


def test_only_a_regular_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    Path("folder").mkdir()
    Path("file").write_text("mine")
    handle = os.open("file", os.O_RDONLY)
    Path("output").symlink_to("open")
    Path("open").symlink_to(f"/proc/self/fd/{handle}")
    Path("nowhere").symlink_to("gone")
    Path("loop").symlink_to("loop")
    before = {path.name: path.lstat().st_ino for path in tmp_path.iterdir()}
    for name in (
        "pipe",
        "socket",
        "folder",
        "output",
        "open",
        "nowhere",
        "loop",
        f"/proc/self/fd/{handle}",
        "/dev/null",
    ):
        with pytest.raises(InputError):
            atomic_write(Path(name), "new")
    os.close(handle)
    assert {path.name: path.lstat().st_ino for path in tmp_path.iterdir()} == before
    assert Path("file").read_text() == "mine" and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert regular_file(Path("new/file")) == tmp_path / "new/file"


def test_what_a_link_leads_to_is_never_removed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "thesis").mkdir(parents=True)
    (tmp_path / "link").symlink_to("mine")
    with pytest.raises(NotADirectoryError):
        remove_folder(tmp_path / "link")
    remove_file(tmp_path / "link")
    (tmp_path / ".a.evojax-merge-gone.01234567").symlink_to("mine")
    (tmp_path / ".a.evojax-merge-new.01234567").symlink_to("mine")
    (tmp_path / ".a.evojax-merge-gone.mine").mkdir()
    remove_leftovers(tmp_path, [tmp_path / "a"])
    assert len(list(tmp_path.iterdir())) == 5
    made = tmp_path / "made"
    made.mkdir()
    (made / "link").symlink_to("../mine")
    remove_folder(made)
    assert not made.exists() and (mine / "thesis").is_dir()
