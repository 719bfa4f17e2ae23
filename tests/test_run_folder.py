"""Run folders that were damaged, cut short or are fought over: what continues is what would have been."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.files import read_json, write_json
from hostile import changing
from test_racing import climb

from evojax_merge.commands.search import run_search
from evojax_merge.config.search_config import Config
from evojax_merge.errors import Failed, InputError
from evojax_merge.search import checkpoints
from evojax_merge.search.checkpoints import Checkpoints
from evojax_merge.search.run_folder import RunFolder, locked, open_run

GENERATIONS = 5
DOCUMENT: dict[str, Any] = {"inputs": {}}
TASK = {"name": "text", "kind": "likelihood", "file": "no-file.jsonl"}

pytestmark = pytest.mark.usefixtures("every_generation_is_saved")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small search over plain numbers."""
    run, _, _ = climb(tmp_path_factory.mktemp("searched") / "run", GENERATIONS)
    return run.path


@pytest.fixture
def run(searched: Path, tmp_path: Path) -> Path:
    return shutil.copytree(searched, tmp_path / "run")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@changing
def each_file(step: Path, change: Callable[[Path], Any]) -> None:
    for file in [path for path in step.rglob("*") if path.is_file()]:
        change(file)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": each_file(halve),
    "emptied": each_file(lambda file: file.write_bytes(b"")),
    "garbage": each_file(lambda file: file.write_bytes(np.random.default_rng(0).bytes(300))),
    "a bit of the data": each_file(lambda file: flip(file) if file.parent.name == "d" else None),
    "an empty folder": lambda step: (shutil.rmtree(step), step.mkdir()),
    "deleted": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, searched, run, tmp_path):
    damage(run / "checkpoints" / str(GENERATIONS))
    open_run(run, DOCUMENT, resume=True, overwrite=False)
    said: list[str] = []
    saved = Checkpoints(RunFolder(run)).restore(said.append)
    assert saved is not None and saved.generations == GENERATIONS - 1
    assert damage is DAMAGES["deleted"] or said == [
        "the checkpoint of generation 5 is damaged; going on from the one of generation 4"
    ]
    climb(run, GENERATIONS, resume=True)
    assert (run / "history.jsonl").read_bytes() == (searched / "history.jsonl").read_bytes()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"3", "4", "5"}


def test_checkpoints_are_kept_by_number_and_by_age(run: Path) -> None:
    """Two hours lie between a generation and the next."""
    folder = RunFolder(run)
    for generation in (2, 1):
        shutil.copytree(folder.step(3), folder.step(generation))
    for generation in range(1, 6):
        metadata = folder.step(generation) / "_CHECKPOINT_METADATA"
        document = read_json(metadata) | {"commit_timestamp_nsecs": generation * 2 * 3600 * 10**9}
        write_json(metadata, document)
    for keep, kept in (
        ({"every_hours": 2}, [1, 2, 3, 4, 5]),
        ({"last": 1, "every_hours": 3}, [1, 3, 5]),
        ({"last": 2}, [3, 5]),
        ({"last": 1}, [5]),
    ):
        open_run(run, DOCUMENT | {"keep": keep}, resume=True, overwrite=False)
        assert folder.steps() == kept


def test_a_search_goes_on_from_an_older_checkpoint(searched: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "5")
    shutil.rmtree(run / "checkpoints" / "4")
    climb(run, GENERATIONS, resume=True)
    assert (run / "history.jsonl").read_bytes() == (searched / "history.jsonl").read_bytes()


def test_checkpoints_take_a_tenth_of_the_time(searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save takes as long as four generations: the first is saved, then every thirty-sixth, and the last."""
    now = 0

    def save(self: Checkpoints, *arguments: Any) -> None:
        nonlocal now
        now += 12
        whole(self, *arguments)

    def line(*arguments: Any) -> None:
        nonlocal now
        now += 1
        append(*arguments)

    whole, append = Checkpoints.save, checkpoints.append_line
    monkeypatch.setattr(checkpoints, "SAVING_SHARE", 0.1)
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(checkpoints, "append_line", line)
    run, _, _ = climb(tmp_path / "run", 80)
    assert run.steps() == [37, 73, 80]
    shutil.rmtree(run.step(80))
    written = run.history.read_bytes()
    climb(run.path, 80, resume=True)
    assert run.history.read_bytes() == written


HISTORIES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:-30],
    "emptied": lambda content: b"",
    "garbage": lambda content: bytes(range(256)) * 4,
    "a line missing": lambda content: b"".join(content.splitlines(keepends=True)[i] for i in (0, 2, 3, 4)),
    "a line twice": lambda content: b"".join(content.splitlines(keepends=True)[i] for i in (0, 1, 1, 2, 3, 4)),
    "edited": lambda content: content.replace(b'"generation": 1', b'"generation": 7'),
    "not UTF-8": lambda content: content.replace(b"best", b"b\xffst", 1),
    "deeply nested": lambda content: b"[" * 100_000 + b"\n" + content,
}


@pytest.mark.parametrize("change", HISTORIES.values(), ids=HISTORIES)
def test_a_damaged_history_is_restored_to_the_byte(change, searched, run):
    history, timing = run / "history.jsonl", run / "timing.jsonl"
    history.write_bytes(change(history.read_bytes()))
    timing.write_bytes(change(timing.read_bytes()))
    climb(run, GENERATIONS, resume=True)
    assert history.read_bytes() == (searched / "history.jsonl").read_bytes()
    assert len(RunFolder(run).read_history()) == GENERATIONS
    assert all(line in (searched / "timing.jsonl").read_bytes() for line in timing.read_bytes().splitlines())


def test_what_a_killed_process_left_is_removed_and_a_model_put_back(run):
    model = run / "best/model"
    moved = run / "best/.model.evojax-merge-old.abcd1234"
    shutil.copytree(run / "checkpoints/5", moved)
    shutil.copytree(run / "checkpoints/5", run / "best/.model.evojax-merge-new.efgh5678")
    halves = [f".{name}.evojax-merge-new.0123abcd" for name in ("config.yaml", "history.jsonl", "report.html")]
    for name in (*halves, "best/.recipe.yaml.evojax-merge-new.0123abcd"):
        (run / name).write_text("half")
    shutil.copytree(run / "checkpoints/4", run / "checkpoints/.2.evojax-merge-gone.0123abcd")
    (run / "checkpoints/6.orbax-checkpoint-tmp").mkdir()
    (run / ".config.yaml.swp").write_text("an editor's")
    before = {path.name for path in run.iterdir()}
    open_run(run, DOCUMENT, resume=True, overwrite=False)
    assert {path.name for path in run.iterdir()} == before - {*halves}
    assert [path.name for path in (run / "best").iterdir()] == ["model"] and (model / "state").is_dir()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"3", "4", "5"}


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_was_only_begun_is_taken_over(resume, tmp_path):
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / ".config.yaml.evojax-merge-new.0123abcd").write_text("base: /mod")
    (run / "lock").write_text("4711 on host\n")
    with locked(run, resume=resume):
        open_run(run, DOCUMENT, resume=resume, overwrite=not resume)
    assert {path.name for path in run.iterdir()} == {"config.yaml", "best"}


@pytest.mark.parametrize(
    "stage", ["result.json", "recipe.yaml", "history.jsonl", "5", "4", "3", "history.backup.jsonl"]
)
def test_starting_again_can_be_killed_at_any_step(stage, searched, run, monkeypatch):
    """Afterwards the run is still the old one, or has not begun."""
    from evojax_merge.search import run_parts

    def killed_at(remove: Callable[[Path], None]) -> Callable[[Path], None]:
        def killed(path: Path) -> None:
            if path.name == stage and path.exists():
                raise KeyboardInterrupt
            remove(path)

        return killed

    for name in ("remove_file", "remove_folder"):
        monkeypatch.setattr(run_parts, name, killed_at(getattr(run_parts, name)))
    (run / "result.json").write_text("{}")
    (run / "best").mkdir(exist_ok=True)
    (run / "best/recipe.yaml").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        open_run(run, DOCUMENT, resume=False, overwrite=True)
    monkeypatch.undo()
    climb(run, GENERATIONS, resume=True)
    assert (run / "history.jsonl").read_bytes() == (searched / "history.jsonl").read_bytes()
    assert not list(run.glob(".*"))


def test_a_lock_goes_with_its_process(tmp_path):
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, pathlib\n"
         "from evojax_merge.search.run_folder import locked\n"
         "with locked(pathlib.Path(sys.argv[1]), resume=False):\n"
         "    print(flush=True); sys.stdin.read()", run],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    who = f"in use by process {holder.pid} on {os.uname().nodename}"
    with pytest.raises(InputError, match=who), locked(run, resume=False):
        pass
    # Before anything else that a search would have to look at: here its models, which there are not.
    config = Config.model_validate({"parents": ["no-model"], "data_flow": {}, "tasks": [TASK]})
    for out, named in ((run, who), (tmp_path / "other", "no such file")):
        with pytest.raises(InputError, match=named):
            run_search(tmp_path / "config.yaml", config, out, resume=False, overwrite=False)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locked(run, resume=False):
        assert (run / "lock").read_text().startswith(f"{os.getpid()} on ")
    # It was made for the lock, and holds nothing.
    assert (run / "lock").exists() is False


def test_a_disk_that_fills_ends_the_search_in_one_line(searched, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        climb(disk / "run", 2)
        rest = os.open(disk / "rest", os.O_WRONLY | os.O_CREAT)
        with suppress(OSError):
            while True:
                os.write(rest, b"x" * 4096)
        os.close(rest)
        with pytest.raises(Failed, match="No space left on device") as failed:
            climb(disk / "run", GENERATIONS, resume=True)
        assert "\n" not in str(failed.value)
        (disk / "rest").unlink()
        climb(disk / "run", GENERATIONS, resume=True)
        assert (disk / "run/history.jsonl").read_bytes() == (searched / "history.jsonl").read_bytes()
        assert {path.name for path in (disk / "run/checkpoints").iterdir()} == {"3", "4", "5"}
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_of_another_config_names_its_key_before_its_files(tmp_path: Path) -> None:
    def document(file: str, seed: int) -> dict[str, Any]:
        return {"inputs": {file: "0" * 64}, "seed": seed}

    open_run(tmp_path / "run", document("a.jsonl", 0), resume=False, overwrite=False)
    with pytest.raises(InputError, match="belongs to another config: seed differs"):
        open_run(tmp_path / "run", document("b.jsonl", 1), resume=True, overwrite=False)
    with pytest.raises(InputError, match=r"belongs to other inputs: .*a\.jsonl was removed"):
        open_run(tmp_path / "run", document("b.jsonl", 0), resume=True, overwrite=False)


def test_runs_of_several_threads_are_saved_side_by_side(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / str(number)) for number in range(8)]
    for folder in folders:
        folder.checkpoints.mkdir(parents=True)

    def save(folder: RunFolder) -> None:
        for generation in range(1, 13):
            Checkpoints(folder).save(generation, {"mean": 1.0}, 0, bytes(32))

    with ThreadPoolExecutor(len(folders)) as pool:
        list(pool.map(save, folders))
    assert all(folder.steps() for folder in folders)
