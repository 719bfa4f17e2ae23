"""Disks that fill up, or that become read-only, while a command works: one line on stderr, nothing of the user's lost,
no file half-written under its name, and a search that goes on ends in the bytes of one that nothing befell.

The disk is a file system in memory; where this user may not mount one, the tests are skipped."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import run_here
from helpers.families import Family, build_family
from helpers.files import read_json, read_lines, write_lines, write_yaml
from helpers.models import even_records, tiny_config
from helpers.sampling import sample
from helpers.searches import search_config, task_section
from hostile import run_python

from evojax_merge import core
from evojax_merge.checkpoints.adapter_writer import AdapterWriter
from evojax_merge.checkpoints.gguf_writer import GgufOutput
from evojax_merge.checkpoints.members import MembersInFiles
from evojax_merge.checkpoints.writer import ShardWriter
from evojax_merge.judge.votes import VoteFile
from evojax_merge.search.checkpoints import Checkpoints, FolderStorage
from evojax_merge.steps.controls import KeptControls

PAGE = 4096
REASONS = ("No space left on device", "Read-only file system", "is not writable for you")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
    family = build_family(root, tiny_config(num_hidden_layers=2, tie_word_embeddings=False), parents=3)
    write_lines(family.tasks, even_records(8))
    experts = [
        {"source_model": str(root / f"parent{k}"), "positive_prompts": [text]} for k, text in ((0, "w4"), (1, "w9"))
    ]
    write_yaml(root / "moe.yaml", {"base_model": str(root / "base"), "experts": experts})
    (root / "judge.py").write_text("def first(record, left, right):\n    return 'left' if left < right else 'right'\n")
    return family


def mount(*arguments: object) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=24m", "tmpfs", folder):
        pytest.skip("this user may not mount a file system")
    yield folder
    # A test that fails leaves the mount above the disk's own.
    while folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)


class Full:
    """A disk on which so many bytes are left."""

    def __init__(self, disk: Path, left: int) -> None:
        self.ballast, self.left = disk / "ballast", left

    def __call__(self) -> None:
        with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(PAGE))
        size = self.ballast.stat().st_size
        with self.ballast.open("r+b") as file:
            file.truncate(max(0, size - self.left))

    def end(self) -> None:
        self.ballast.unlink()


class ReadOnly:
    """A disk that nobody may write to, root neither."""

    def __init__(self, disk: Path, left: int = 0) -> None:
        self.disk = disk

    def __call__(self) -> None:
        # A mount of its own: files of the former one are open for writing.
        assert mount("--bind", self.disk, self.disk) and mount("-o", "remount,bind,ro", self.disk)

    def end(self) -> None:
        subprocess.run(["umount", self.disk], check=True)


# The moments at which the disk fails: before this call of a method, by the kinds of searches that have it.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "a generation's line": (FolderStorage, "save", 2),
    "a checkpoint": (Checkpoints, "save", 2),
    "the winner": (core, "write_winner", 1),
    "the winner's weights": (ShardWriter, "write", 1),
    "a member": (MembersInFiles, "write", 1),
    "a vote": (VoteFile, "_append", 6),
    "a control": (KeptControls, "keep", 1),
    "the polish": (KeptControls, "keep", 2),
    "a tensor of a GGUF file": (GgufOutput, "encoded", 4),
    "an adapter's factors": (AdapterWriter, "add_factors", 4),
    "a mixture's weights": (ShardWriter, "write", 4),
}
KINDS = {
    "host": ("a generation's line", "a checkpoint", "the winner", "the winner's weights"),
    "disk": ("a generation's line", "a checkpoint", "the winner"),
    "pool": ("a member", "a generation's line", "the winner"),
    "judged": ("a vote", "a generation's line", "the winner"),
    "polished": ("a control", "the polish", "the winner", "an adapter's factors"),
}


@contextmanager
def failing(moment: str, fail: Callable[[], None]) -> Iterator[None]:
    """Have the disk fail once, at this moment."""
    holder, name, number = MOMENTS[moment]
    work, calls = getattr(holder, name), 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            fail()
        return work(*arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(holder, name, wrapped)
        yield
    assert calls >= number, f"{moment}: met {calls} times"


def write_config(family: Family, kind: str) -> Path:
    bred: dict[str, Any] = {"space": {"method": "ties", "parameters": {"weight": {}, "density": {}}}}
    if kind == "pool":
        bred = {"space": None, "pool": {"methods": ["slerp", "dare_ties"], "split": True, "size": 3}}
    evaluation = {"bank": "host" if kind == "host" else "disk"}
    document = search_config(family, 4 if kind == "pool" else 3, seed=3, evaluation=evaluation, **bred)
    document["parents"] = document["parents"][: 3 if kind == "pool" else 2]
    if kind == "polished":
        document |= {"evaluation": {}, "tasks": [task_section(family.tasks, heldout=0.25)]}
        document["search"] |= {"controls": ["random"], "then": "polish"}
    if kind == "judged":
        judged = {"kind": "human", "max_new_tokens": 2, "votes": 9, "heldout_votes": 1, "judge": "judge.py:first"}
        document |= {"tasks": [task_section(family.tasks, **judged)], "evaluation": {}}
    return write_yaml(family.root / f"{kind}.yaml", document)


def run_files(run: Path) -> dict[str, Any]:
    names = ("history.jsonl", "best/model/model.safetensors", "best/recipe.yaml", "result.json")
    files: dict[str, Any] = {name: (run / name).read_bytes() for name in names}
    if (run / "best/adapter").exists():
        files["adapter"] = (run / "best/adapter/adapter_model.safetensors").read_bytes()
    if (run / "votes.jsonl").exists():
        rows = read_lines(run / "votes.jsonl")
        files["votes"] = [row | {"vote": row["vote"] | {"time": ""}} if "vote" in row else row for row in rows]
    return files


@pytest.fixture(scope="module")
def undisturbed(family: Family) -> Callable[[str], dict[str, Any]]:
    """The files of a run of each kind that nothing befell."""
    references: dict[str, dict[str, Any]] = {}

    def files(kind: str) -> dict[str, Any]:
        if kind not in references:
            run_here("search", write_config(family, kind), "--out", family.root / kind)
            references[kind] = run_files(family.root / kind)
        return references[kind]

    return files


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of the error; others are warnings, of files that nothing depends on."""
    lines = done.stderr.splitlines()
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert lines and lines[-1].startswith("error: ") and lines[-1].isprintable(), done.stderr
    assert all(line.startswith("warning: ") for line in lines[:-1]), done.stderr
    return lines[-1]


def test_a_checkpoint_on_a_full_disk_ends_in_one_line(disk: Path) -> None:
    """Tensorstore's threads say nothing of the other writes."""
    Full(disk, 0)()
    script = (
        "import sys, time\nfrom pathlib import Path\nimport numpy as np\nfrom evojax_merge.errors import Failed\n"
        "from evojax_merge.search.checkpoints import Checkpoints\n"
        "from evojax_merge.search.run_parts import RunFolder\n"
        "state = {f'{i}': np.random.default_rng(i).random(5000) for i in range(40)}\n"
        "try:\n    Checkpoints(RunFolder(Path(sys.argv[1]))).save(1, state, 0, bytes(32))\n"
        "except Failed as error:\n    print(error)\n    time.sleep(1)\n"
    )
    done = run_python(script, disk / "run")
    assert "generation 1 could not be saved (No space left on device)" in done.stdout and not done.stderr


def mine(folder: Path) -> dict[Path, str]:
    """Files of a user's beside a run and in its parts."""
    for name in ("mine.txt", "best/mine.txt", "checkpoints/mine.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return {folder / name: "mine" for name in ("mine.txt", "best/mine.txt", "checkpoints/mine.txt")}


CASES = [
    (kind, moment, fault, left)
    for kind, moments in KINDS.items()
    for moment in moments
    for fault, left in ((Full, 0), (Full, 3 * PAGE), (Full, 10 * PAGE), (ReadOnly, 0))
]


@pytest.mark.parametrize(("fault", "left"), [(Full, 0), (Full, 3 * PAGE), (ReadOnly, 0)])
def test_a_finished_run_that_is_resumed_needs_no_disk(fault: Any, left: int, family: Family, disk: Path) -> None:
    """More generations, and another config, are refused as ever."""
    path, run, trouble = write_config(family, "host"), disk / "run", fault(disk, left)
    run_here("search", path, "--out", run)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    trouble()
    done = run_here("search", path, "--out", run, "--resume")
    assert "3 generations are saved, and 3 wanted: nothing to search" in done.stdout
    assert f"the run is complete; its winner: {run}/best/model" in " ".join(done.stdout.split())
    more = run_here("search", path, "--out", run, "--resume", "--set", "search.generations=4", status=None)
    assert any(reason in error_of(more) for reason in (*REASONS, "but the disk has"))
    other = run_here("search", path, "--out", run, "--resume", "--seed", 4, status=None)
    assert "seed" in error_of(other)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    trouble.end()


@pytest.mark.parametrize(("kind", "moment", "fault", "left"), sample(CASES, 1))
def test_a_search_whose_disk_fails_goes_on_to_the_same_bytes(
    kind: str, moment: str, fault: Any, left: int, family: Family, disk: Path,
    undisturbed: Callable[[str], dict[str, Any]],
) -> None:  # fmt: skip
    expected, path, run, trouble = undisturbed(kind), write_config(family, kind), disk / "run", fault(disk, left)
    with failing(moment, trouble):
        done = run_here("search", path, "--out", run, status=None)
    trouble.end()
    if done.returncode:
        line = error_of(done)
        assert str(disk) in line and any(reason in line for reason in REASONS), line
    else:
        # What was left was enough for what matters.
        assert left
    # Whatever has its name is whole.
    for file in (run / "history.jsonl", run / "votes.jsonl"):
        for row in file.read_bytes().split(b"\n")[:-1] if file.exists() else ():
            json.loads(row)
    if (run / "result.json").exists():
        read_json(run / "result.json")
    users = mine(run)
    run_here("search", path, "--out", run, "--resume")
    assert run_files(run) == expected
    assert {file: file.read_text() for file in users} == users
    assert not list(run.rglob(".*evojax-merge*"))


@pytest.fixture(scope="module")
def finished(family: Family, undisturbed: Callable[[str], dict[str, Any]]) -> Path:
    undisturbed("host")
    return family.root / "host"


COMMANDS: dict[str, Callable[[Path, Path, Path], tuple[object, ...]]] = {
    "export": lambda root, run, out: ("export", run, out / "model"),
    "export over a model": lambda root, run, out: ("export", run, out / "earlier", "--overwrite"),
    "export as an adapter": lambda root, run, out: ("export", run, out / "adapter", "--as", "adapter", "--rank", "2"),
    "merge": lambda root, run, out: ("merge", run / "best/recipe.yaml", out / "merged"),
    "merge into a GGUF file": lambda root, run, out: (
        "merge", run / "best/recipe.yaml", out / "merged.gguf", "--type", "q8_0", "--no-copy-tokenizer"),
    "extract-lora": lambda root, run, out: (
        "extract-lora", root / "parent0", out / "adapter", "--base", root / "base", "--max-rank", "2"),
    "moe": lambda root, run, out: ("moe", root / "moe.yaml", out / "mixture"),
    "transplant-tokenizer": lambda root, run, out: (
        "transplant-tokenizer", root / "parent0", root / "base", out / "transplanted"),
    "evaluate --json": lambda root, run, out: (
        "evaluate", root / "base", "--tasks", root / "host.yaml", "--json", out / "scores.json"),
    "evaluate --samples": lambda root, run, out: (
        "evaluate", root / "base", "--tasks", root / "host.yaml", "--samples", out / "samples.jsonl"),
    "plan --json": lambda root, run, out: ("plan", root / "host.yaml", "--json", out / "plans.json"),
    "inspect --picture": lambda root, run, out: (
        "inspect", root / "base", root / "parent0", "--picture", out / "a.png"),
    "compare": lambda root, run, out: ("compare", run, out / "../run", "--out", out / "compare.html"),
    "init": lambda root, run, out: (
        "init", out / "first.yaml", "--base", root / "base", "--parents", root / "parent0", root / "parent1", "--data",
        root / "tasks.jsonl"),
    "search": lambda root, run, out: ("search", root / "host.yaml", "--out", out / "new"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "fault"), sample([(command, fault) for command in COMMANDS for fault in (Full, ReadOnly)], 4)
)
def test_a_command_whose_output_cannot_be_written_leaves_nothing(
    command: str, fault: Any, family: Family, finished: Path, disk: Path, tmp_path: Path
) -> None:
    if not (tmp_path / "run").exists():
        (tmp_path / "run").symlink_to(finished)
    run_here("export", finished, disk / "earlier")
    (disk / "mine.txt").write_text("mine")

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in disk.rglob("*") if path.is_file() and path.name != "ballast"}

    before, trouble = files(), fault(disk, 0)
    trouble()
    arguments = COMMANDS[command](family.root, finished, disk)
    done = run_here(*arguments, status=None)
    assert files() == before
    trouble.end()
    line = error_of(done)
    assert str(disk) in line and "\n" not in line
    assert files() == before
    run_here(*arguments)
    assert len(files()) > len(before) or command == "export over a model"


@pytest.mark.parametrize(("command", "moment"), [
    ("merge into a GGUF file", "a tensor of a GGUF file"), ("extract-lora", "an adapter's factors"),
    ("moe", "a mixture's weights"), ("transplant-tokenizer", "a mixture's weights"),
])  # fmt: skip
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_half_written(
    command: str, moment: str, family: Family, finished: Path, disk: Path
) -> None:
    arguments, trouble = COMMANDS[command](family.root, finished, disk), Full(disk, 0)
    with failing(moment, trouble):
        done = run_here(*arguments, status=1)
    assert [path.name for path in disk.iterdir()] == ["ballast"]
    trouble.end()
    line = error_of(done)
    assert str(disk) in line and "could not be written (No space left on device)" in line, line
    run_here(*arguments)
    assert len(list(disk.iterdir())) == 1


@pytest.mark.parametrize("fault", sample([ReadOnly, Full], 1))
def test_pairs_for_votes_are_whole_or_not_there(fault: Any, family: Family, disk: Path, tmp_path: Path) -> None:
    """The run is on a disk with room, its pairs are not."""
    document = yaml.safe_load(write_config(family, "judged").read_text())
    del document["tasks"][0]["judge"]
    write_yaml(family.root / "people.yaml", document)
    trouble = fault(disk, 0)
    arguments = ("judge", family.root / "people.yaml", "--out", tmp_path / "run", "--export", disk / "pairs.jsonl")
    with pytest.MonkeyPatch.context() as patched:
        work = VoteFile.ask

        def ask(self: VoteFile, *pair: Any) -> None:
            if not (disk / "ballast").exists() and not self.pairs:
                trouble()
            work(self, *pair)

        patched.setattr(VoteFile, "ask", ask)
        done = run_here(*arguments, status=None)
    assert str(disk) in error_of(done) and not (disk / "pairs.jsonl").exists()
    trouble.end()
    run_here(*arguments, "--resume")
    assert len((disk / "pairs.jsonl").read_text().splitlines()) > 0 and (disk / "pairs.html").exists()
