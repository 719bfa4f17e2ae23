"""Data by version: files of Oxen repositories at a commit, files that DVC tracks, pointers of Git LFS, and data sets of
the hub at a revision."""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers.files import write_json, write_yaml
from hostile import run_command, run_python
from safetensors.numpy import save_file
from test_gsm import GSM8K, cache_data_set

import evojax_merge as em
from evojax_merge.errors import InputError
from evojax_merge.tasks.data_versions import dvc_record, pinned_reference
from evojax_merge.tasks.records import read_source
from evojax_merge.zoo.references import resolve_file

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
FIRST, SECOND = "1" * 32, "2" * 32


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Oxen


class Commit:
    def __init__(self, id: str) -> None:
        self.id = self.commit_id = id
        self.name = "main"


class Repo:
    """The part of oxen's interface that is used, over folders of files by commit inside of `.oxen`."""

    def __init__(self, path: str) -> None:
        self.tree = Path(path)

    def log(self) -> list[Commit]:
        return [Commit(path.name) for path in sorted((self.tree / ".oxen").iterdir(), reverse=True)]

    def branches(self) -> list[Commit]:
        return self.log()[:1]

    def restore(self, path: str, source: str) -> None:
        inside = Path(path).relative_to(self.tree)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes((self.tree / ".oxen" / source / inside).read_bytes())


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for an Oxen repository of two commits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = ModuleType("oxen")
    module.Repo = Repo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "oxen", module)
    for commit, text in ((FIRST, "first"), (SECOND, "second")):
        (tmp_path / "repo/.oxen" / commit / "data").mkdir(parents=True)
        (tmp_path / "repo/.oxen" / commit / "data/a.jsonl").write_text(text)
    return tmp_path / "repo"


@pytest.mark.parametrize(
    ("revision", "commit", "text"),
    [(FIRST, FIRST, "first"), (SECOND, SECOND, "second"), ("main", SECOND, "second"), ("111111", FIRST, "first")],
)
def test_a_file_of_an_oxen_repository_is_its_commits(
    repository: Path, revision: str, commit: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = resolve_file("file", f"oxen:repo@{revision}:data/a.jsonl", repository.parent)
    assert file.read_text() == text and repository not in file.parents
    assert pinned_reference(str(file)) == f"oxen:{repository}@{commit}:data/a.jsonl"
    assert [path.name for path in repository.iterdir()] == [".oxen"]
    # A commit never changes: its file is in the cache from now on, and needs no package.
    monkeypatch.setitem(sys.modules, "oxen", None)
    assert resolve_file("file", pinned_reference(str(file)), Path("elsewhere")) == file


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("oxen:repo", "expected oxen:REPOSITORY@COMMIT:FILE"),
        ("oxen:repo@main", "expected oxen:REPOSITORY@COMMIT:FILE"),
        ("oxen:repo@main:../a.jsonl", r"\.\./a.jsonl lies outside of the repository"),
        ("oxen:repo@main:/etc/passwd", "/etc/passwd lies outside of the repository"),
        ("oxen:nowhere@main:a.jsonl", "nowhere is no Oxen repository; expected a folder with .oxen"),
        ("oxen:repo@other:data/a.jsonl", ".*/repo has no commit or branch other"),
        ("oxen:repo@1111:data/a.jsonl", ".*/repo has no commit or branch 1111"),
        ("oxen:repo@../..:data/a.jsonl", r".*/repo has no commit or branch \.\./\.\."),
        (f"oxen:repo@{'3' * 32}:data/a.jsonl", r"Oxen did not give it out of .*repo \(.*No such file"),
        ("oxen:repo@main:b.jsonl", r"Oxen did not give it out of .*repo \(.*No such file"),
    ],
)
def test_other_oxen_references_are_refused(repository: Path, reference: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^tasks\[0\].file: {reference}: {message}") as error:
        resolve_file("tasks[0].file", reference, repository.parent)
    assert "\n" not in str(error.value)


def test_an_oxen_reference_without_the_package_names_the_extra(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "oxen", None)
    with pytest.raises(InputError, match=r"needs the package oxenai; pip install 'evojax-merge\[oxen\]'"):
        resolve_file("file", "oxen:repo@main:data/a.jsonl", repository.parent)


def test_a_real_oxen_repository(tmp_path: Path) -> None:
    """Two commits, in a process of its own, whose user is not this one."""
    pytest.importorskip("oxen")
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "root = Path(sys.argv[1])\n"
        "os.environ |= {'HOME': str(root), 'XDG_CACHE_HOME': str(root / 'cache')}\n"
        "import oxen\n"
        "from evojax_merge.errors import InputError\n"
        "from evojax_merge.zoo.references import resolve_file\n"
        "oxen.user.config_user('one', 'one@example.org')\n"
        "repo, ids = oxen.Repo(str(root / 'repo'), mkdir=True), []\n"
        "repo.init()\n"
        "data = root / 'repo/data/a.jsonl'\n"
        "data.parent.mkdir()\n"
        "for text in ('first', 'second'):\n"
        "    data.write_text(text)\n"
        "    repo.add(str(data))\n"
        "    ids.append(repo.commit(text).id)\n"
        "data.write_text('changed')\n"
        "for revision, text in zip([*ids, ids[0][:8], 'main'], ['first', 'second', 'first', 'second']):\n"
        "    file = resolve_file('file', f'oxen:repo@{revision}:data/a.jsonl', root)\n"
        "    assert file.read_text() == text, (revision, file.read_text())\n"
        "assert data.read_text() == 'changed'\n"
        "status = repo.status()\n"
        "assert not status.added_files() and not status.removed_files()\n"
        "for reference in (f'oxen:repo@{\"0\" * 32}:data/a.jsonl', 'oxen:repo@main:b.jsonl', 'oxen:repo@main:data'):\n"
        "    try:\n"
        "        resolve_file('file', reference, root)\n"
        "    except InputError as error:\n"
        "        print(error)\n"
    )
    done = run_python(script, tmp_path)
    # The package prints what it commits.
    assert sum(line.startswith("file: oxen:repo@") for line in done.stdout.splitlines()) == 3, done.stdout


# ---------------------------------------------------------------------------------------------------------------
# DVC and Git LFS


@pytest.fixture
def tracked(tmp_path: Path) -> Path:
    """A file that DVC tracks alone, and one in a folder that it tracks."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "a.jsonl").write_bytes(b"one\n")
    out = {"md5": md5(b"one\n"), "size": 4, "hash": "md5", "path": "a.jsonl"}
    write_yaml(tmp_path / "a.jsonl.dvc", {"outs": [out]})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/b.jsonl").write_bytes(b"two\n")
    listed = json.dumps([{"md5": md5(b"two\n"), "relpath": "b.jsonl"}]).encode()
    place = tmp_path / ".dvc/cache/files/md5" / md5(listed)[:2] / f"{md5(listed)[2:]}.dir"
    place.parent.mkdir(parents=True)
    place.write_bytes(listed)
    out = {"md5": f"{md5(listed)}.dir", "nfiles": 1, "hash": "md5", "path": "folder"}
    write_yaml(tmp_path / "folder.dvc", {"outs": [out]})
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "folder/b.jsonl"])
def test_a_file_that_dvc_tracks_is_the_recorded_one(tracked: Path, name: str) -> None:
    file = resolve_file("file", name, tracked)
    record = tracked / f"{name.partition('/')[0]}.dvc"
    assert dvc_record(file) == record
    file.write_bytes(b"three\n")
    with pytest.raises(InputError, match=rf"^file: .*{name} is not the file that .* records \(md5 [0-9a-f]{{32}}\)"):
        resolve_file("file", name, tracked)
    record.write_text("outs: [1, {path: 2}]\n")
    assert resolve_file("file", name, tracked) == file


@pytest.mark.parametrize("place", ["../outside", "../../../../outside", "/outside", "ab/../../outside"])
def test_a_list_of_files_outside_of_dvcs_cache_is_not_read(tracked: Path, place: str) -> None:
    """A folder's hash, which is a part of the list's path."""
    md5 = f"{place}.dir"
    out = {"md5": md5, "nfiles": 1, "hash": "md5", "path": "folder"}
    write_yaml(tracked / "folder.dvc", {"outs": [out]})
    outside = (tracked / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).resolve()
    if place != "/outside":
        (tracked / ".dvc/cache/files/md5" / md5[:2]).mkdir(parents=True, exist_ok=True)
        write_json(outside, [{"md5": FIRST, "relpath": "b.jsonl"}])
    assert resolve_file("file", "folder/b.jsonl", tracked) == tracked / "folder/b.jsonl"


def test_what_is_larger_than_any_task_is_not_hashed(tracked: Path) -> None:
    """Files of zeros, none of which is on the disk."""
    os.truncate(tracked / "a.jsonl", 2**40)
    with pytest.raises(InputError, match=r"a\.jsonl: has .* bytes; expected a task file of at most"):
        read_source(resolve_file("file", "a.jsonl", tracked))
    (listed,) = (tracked / ".dvc/cache").rglob("*.dir")
    os.truncate(listed, 2**40)
    with pytest.raises(InputError, match="expected DVC's list of a folder of at most"):
        resolve_file("file", "folder/b.jsonl", tracked)


def test_a_file_that_dvc_has_not_fetched_names_the_command(tracked: Path) -> None:
    (tracked / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"^file: a.jsonl: no such file; DVC tracks it: run `dvc pull .*a.jsonl.dvc`$"):
        resolve_file("file", "a.jsonl", tracked)


def test_an_older_record_ignores_the_form_of_line_ends(tracked: Path) -> None:
    (tracked / "a.jsonl").write_bytes(b"one\r\n")
    write_yaml(tracked / "a.jsonl.dvc", {"outs": [{"md5": md5(b"one\n"), "path": "a.jsonl"}]})
    assert resolve_file("file", "a.jsonl", tracked).name == "a.jsonl"


def test_a_search_records_the_version_of_its_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    one, two, x = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 2), (3, 2), (40, 3)))
    save_file({"layer/w": one}, tmp_path / "one.safetensors")
    save_file({"layer/w": two}, tmp_path / "two.safetensors")
    np.savez(tmp_path / "data.npz", x=x)
    (tmp_path / "scores.py").write_text("def size(model, rows):\n    return (rows['x'] @ model['layer']['w'])[:, 0]\n")
    content = (tmp_path / "data.npz").read_bytes()
    write_yaml(tmp_path / "data.npz.dvc", {"outs": [{"md5": md5(content), "path": "data.npz"}]})
    config = {
        "backend": "function", "parents": ["one.safetensors", "two.safetensors"], "space": {"method": "linear"},
        "tasks": [{"name": "fit", "kind": "arrays", "file": "data.npz", "function": "scores.py:size"}],
        "search": {"generations": 1, "population": 2}, "out": str(tmp_path / "run"),
    }  # fmt: skip
    write_yaml(tmp_path / "config.yaml", config)
    run_command("search", tmp_path / "config.yaml")
    inputs = em.open_run(tmp_path / "run").config["inputs"]
    assert {str(tmp_path / name) for name in ("data.npz", "data.npz.dvc")} <= inputs.keys()
    (tmp_path / "data.npz").write_text(POINTER)
    (tmp_path / "data.npz.dvc").unlink()
    done = run_command("search", tmp_path / "config.yaml", "--overwrite", status=2)
    assert "data.npz: is a pointer of Git LFS" in done.stderr
    assert "run `git lfs pull`" in done.stderr and done.stderr.count("\n") == 1


def test_weights_that_are_a_pointer_are_refused(tmp_path: Path) -> None:
    from evojax_merge.checkpoints.folder import read_header

    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(InputError, match=r"model.safetensors: is a pointer of Git LFS .*`git lfs pull`"):
        read_header(tmp_path / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------
# The hub


def test_a_data_set_of_the_hub_is_named_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_data_set(tmp_path, monkeypatch, {"main/test": GSM8K, "main/train": GSM8K[:2]})
    pinned = f"hub:openai/gsm8k@{'0' * 40}/main:train"
    for source in ("hub:openai/gsm8k/main:train", "hub:openai/gsm8k@main/main:train", pinned):
        read = read_source(source)
        assert read.name == pinned and len(read.records) == 2
    with pytest.raises(InputError, match=r"^hub:openai/gsm8k@v2/main:train: the hub did not give it"):
        read_source("hub:openai/gsm8k@v2/main:train")


def test_a_repository_that_may_want_a_token_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    class Gated(GatedRepoError):
        def __init__(self) -> None:
            Exception.__init__(self, "Cannot access gated repo")

    class Api:
        def list_repo_files(self, *arguments: Any, **options: Any) -> list[str]:
            raise Gated

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match=r"no such repository is public; .* put a token into the variable HF_TOKEN\)"):
        read_source("hub:some/gated:train")
