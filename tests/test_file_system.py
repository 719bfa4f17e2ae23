"""Files that appear complete or not at all, links that stay, and the one module that deletes."""

import ast
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from evojax_merge.errors import InputError
from evojax_merge.system.file_system import atomic_write, regular_file, remove_file, remove_folder, remove_leftovers

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


# Calls that write a file, beside those of file_system.py itself.
WRITERS = {
    "write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "symlink", "link", "copy2", "copyfile",
    "copyfileobj", "copytree", "copy_regular", "save", "savez", "savetxt", "savefig", "save_file", "save_model",
    "save_pretrained", "tofile", "memmap", "to_csv", "FileHandler", "SummaryWriter", "mkstemp", "NamedTemporaryFile",
    "truncate", "extractall", "extract",
}  # fmt: skip
# The functions that write without file_system.py, by the reason why nothing of a user's can be lost there.
FILLS = "fills a new folder, which `atomic_folder` or `hidden_folder` made and which gets its name at the end"
TEMPORARY = "fills a temporary folder, which goes when the command ends"
ATOMIC = "writes a new file of `atomic_file`"
APPENDS = "appends a line to a file of the run, which was checked when the run was opened"
MEMORY = "writes to memory"
NO_FILE = "saves through one of the functions above and below, or opens for reading"
WITHOUT_FILE_SYSTEM = {
    FILLS: {
        "backends/function/opening.py": ["save_tree"], "backends/function/backend.py": ["FunctionBackend.export"],
        "backends/torch/folders.py": ["save_merge", "OwnModules.save"],
        "backends/torch/generator.py": ["save_generator"], "backends/torch/pipelines.py": ["PipelineBackend.pictures"],
        "checkpoints/adapter_writer.py": ["AdapterWriter.__exit__"],
        "checkpoints/derived.py": ["_link", "_as_folder.write", "_stand_in"],
        "checkpoints/generator_lora.py": ["write_fused", "_save"],
        "checkpoints/gguf_file.py": ["write_config", "write_tokenizer", "write_tensor_table"],
        "checkpoints/pipelines.py": ["Components.write_others", "_copy"], "checkpoints/remote.py": ["fetched"],
        "checkpoints/writer.py": [
            "write_marker", "ShardWriter.write", "ShardWriter.reserve", "ShardWriter._write_index",
            "GrowingFile.__init__",
        ],
        "mergekit/mixtures.py": ["MixturePlan.write"],
        "mergekit/as_adapter.py": ["write_as_adapter"], "mergekit/as_fp8.py": ["Fp8Merge.write"],
        "mergekit/execute.py": ["merge_to", "write_small_files"],
        "system/regular_file.py": ["copy_regular"], "search/run_folder.py": ["keep_winner", "write_front"],
        "zoo/__init__.py": ["save_records"], "zoo/ddpm.py": ["make_family.save"],
        "zoo/evovlm.py": ["save_questions", "save_small_files"],
        "zoo/smollm2.py": ["make_expert"], "zoo/t5.py": ["make_family.save"],
        "zoo/tiny_llama.py": ["save_small_files", "save_tokenizer"],
        "zoo/torch_training.py": ["train_experts"], "zoo/vit.py": ["save_images", "make_family.save"],
    },
    TEMPORARY: {
        "benchmarks/header_models.py": ["write_model", "write_examples", "problem_for"],
        "checkpoints/headers.py": ["write_header_only", "HeaderFolders._written"],
        "checkpoints/tokens.py": ["align"], "commands/publish.py": ["stage"],
        "tasks/data_versions.py": ["oxen_file"], "tasks/generated_images.py": ["Pictures.add"],
        "zoo/smollm2.py": ["make_base"],
    },
    ATOMIC: {
        "backends/decoder/vision.py": ["VisionSide._store"], "system/data_packages.py": ["cached_wheel"],
        "judge/opening.py": ["_token"],
        "tasks/data_versions.py": ["oxen_file"],
    },
    APPENDS: {
        "judge/votes.py": ["VoteFile.mend"],
        "report/loggers.py": ["TensorBoard.log", "Table.log"], "report/monitor.py": ["Monitor.passed"],
        "search/checkpoints.py": ["append_line", "Checkpoints.save"],
        "search/run_lock.py": ["acquire", "check_not_in_use"],
    },
    MEMORY: {
        "backends/torch/pipelines.py": ["PipelineBackend.contact_sheet"],
        "steps/controls.py": ["KeptControls.keep"], "tasks/images.py": ["_image", "_decoding", "thumbnail"],
        "checkpoints/bank.py": ["LeafReader.gathered"],
        "report/inspection.py": ["picture"], "tasks/generated_images.py": ["png_of"],
    },
    NO_FILE: {
        "cli.py": ["main"], "search/recording.py": ["Recorder.record"],
        "evaluation/devices.py": ["_silence_libraries"],
        "search/checkpoints.py": ["FolderStorage.close"],
    },
}  # fmt: skip


def writes_in(node: ast.AST, function: str = "") -> Iterator[str]:
    """The functions below a node that write, each by its name within the module."""
    for child in ast.iter_child_nodes(node):
        inside = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{function}.{child.name}".removeprefix(".")
        if isinstance(child, ast.Call):
            called = child.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            of_module = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id
            arguments = (*child.args[:2], *(word.value for word in child.keywords if word.arg == "mode"))
            modes = [arg.value for arg in arguments if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            writing = any(re.fullmatch("[rwaxbt+]*[wax+][bt+]*", mode) for mode in modes)
            opens = name == "open" and (of_module == "os" or writing)
            copies = name == "copy" and of_module == "shutil"
            if name in WRITERS or opens or copies or (name == "dump" and len(child.args) > 1):
                yield inside
        yield from writes_in(child, inside)


def test_every_file_is_written_by_one_module_or_for_a_reason() -> None:
    """`atomic_write` and its like replace a file only where it stands whole, and `OutputFile` a user's never."""
    expected = {f"{file}: {name}" for files in WITHOUT_FILE_SYSTEM.values() for file in files for name in files[file]}
    written = {
        f"{file.relative_to(package)}: {name}"
        for package in PACKAGES
        for file in sorted(package.rglob("*.py"))
        if file.name != "file_system.py"
        for name in writes_in(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert written - expected == set(), "write through file_system.py, or say in WITHOUT_FILE_SYSTEM why not"
    assert expected - written == set(), "in WITHOUT_FILE_SYSTEM, and writes nothing"


@pytest.mark.parametrize(
    ("code", "writes"),
    [
        ("open(x, 'w')", True), ("x.open(mode='ab')", True), ("x.open('r+b')", True), ("os.open(x, 1)", True),
        ("np.save(x, y)", True), ("shutil.copy(x, y)", True), ("json.dump(x, y)", True), ("x.touch()", True),
        ("open(x)", False), ("x.open('rb')", False), ("json.dumps(x)", False), ("x.copy()", False),
    ],
)  # fmt: skip
def test_the_search_for_writes_sees_them(code: str, writes: bool) -> None:
    assert bool([*writes_in(ast.parse(f"def f():\n    {code}"))]) is writes


def test_commands_write_files_that_users_name_as_output_files() -> None:
    """Each has a kind by which the command recognises its own (see `OutputFile`): none is written in another way."""
    commands = [*(PACKAGES[0] / "commands").glob("*.py"), PACKAGES[0] / "judge" / "batch.py"]
    named = {"atomic_write", "atomic_write_bytes", "atomic_file"}
    importing = [
        f"{file.name}: {alias.name}"
        for file in commands
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in named
    ]
    assert importing == []
    makers = {file.name for file in commands if "OutputFile(" in file.read_text(encoding="utf-8")}
    assert makers == {"bench.py", "compare.py", "evaluate.py", "init.py", "inspect.py", "plan.py", "batch.py"}


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
