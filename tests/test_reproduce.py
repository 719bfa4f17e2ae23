"""A run proves its result: it records its environment, its resolved config and its inputs, and can be reproduced."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from helpers.commands import command, run_here
from helpers.families import Family
from helpers.files import read_json, read_lines, write_json, write_yaml
from helpers.sampling import thorough
from helpers.searches import search_config, task_section
from huggingface_hub import ModelCard

GENERATIONS = 2
CONFIGS = Path(__file__).parent.parent / "configs"


def config_of(family: Family, folder: Path, **changes: Any) -> Path:
    """The config of a short search, on data of its own."""
    data = shutil.copyfile(family.tasks, folder / "data.jsonl")
    space = {"method": "ties", "parameters": {"weight": {}, "density": {}}}
    document = search_config(family, space=space, tasks=[task_section(data)], seed=5)
    return write_yaml(folder / "config.yaml", document | {"search": {"generations": GENERATIONS}} | changes)


@pytest.fixture(scope="module")
def searched(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, beside its data."""
    folder = tmp_path_factory.mktemp("searched")
    assert command("search", config_of(family, folder), "--out", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def finished(searched: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, on a copy of its data."""
    copy = shutil.copytree(searched.parent, tmp_path / "copy") / searched.name
    for file in (copy / "config.yaml", copy.parent / "config.yaml"):
        file.write_text(file.read_text().replace(str(searched.parent), str(copy.parent)))
    return copy


def sessions(folder: Path) -> list[dict[str, Any]]:
    return list(read_json(folder / "environment.json")["sessions"])


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = yaml.safe_load(file.read_text())
    change(document)
    write_yaml(file, document)


def drop_last_line(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


# ---------------------------------------------------------------------------------------------------------------
# The environment


def test_a_run_records_where_it_was_made(searched: Path) -> None:
    (session,) = sessions(searched)
    assert {"python", "evojax-merge", "jax", "jaxlib", "numpy", "evosax", "transformers"} == session["versions"].keys()
    assert all(session["versions"].values())
    assert session["devices"]["platform"] == "cpu" and session["devices"]["count"] >= 1
    assert session["processor"] and session["system"] and session["command"]
    assert session["started"] <= session["ended"] and session["seconds"] > 0


def test_a_continued_run_keeps_its_first_session(finished: Path) -> None:
    (first,) = sessions(finished)
    arguments = ("search", finished / "config.yaml", "--out", finished)
    assert command(*arguments, "--resume") == 0
    assert sessions(finished) == [first]  # nothing was left to search
    assert command(*arguments, "--resume", "--set", f"search.generations={GENERATIONS + 1}") == 0
    assert len(sessions(finished)) == 2 and sessions(finished)[0] == first
    assert command(*arguments, "--overwrite", "--set", "search.generations=1") == 0
    assert len(sessions(finished)) == 1 and sessions(finished) != [first]


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"sessions": 5}', '{"sessions": [5]}'])
def test_a_damaged_record_does_not_end_a_run(finished: Path, damaged: str) -> None:
    from evojax_merge.search.environment import read_sessions
    from evojax_merge.search.run_parts import RunFolder

    (finished / "environment.json").write_text(damaged)
    assert read_sessions(RunFolder(finished)) == []


# ---------------------------------------------------------------------------------------------------------------
# The config


def test_the_config_holds_the_population_that_was_searched(searched: Path) -> None:
    document = yaml.safe_load((searched / "config.yaml").read_text())
    history = read_lines(searched / "history.jsonl")
    assert document["search"]["population"] == len(history[0]["fitness"])
    assert document["evaluation"]["chunk"] is None and document["evaluation"]["tokens_per_batch"] is None


def test_a_run_that_an_earlier_version_began_without_it_goes_on(finished: Path) -> None:
    edit(finished / "config.yaml", lambda document: document["search"].update(population=None))
    longer = ("--set", f"search.generations={GENERATIONS + 1}")
    assert command("search", finished.parent / "config.yaml", "--out", finished, "--resume", *longer) == 0
    assert len((finished / "history.jsonl").read_text().splitlines()) == GENERATIONS + 1
    assert yaml.safe_load((finished / "config.yaml").read_text())["search"]["population"] is not None


@thorough
def test_stages_hold_their_populations(family: Family, tmp_path: Path) -> None:
    search = {"generations": 1}
    path = {"data_flow": {"max_layers": 4, "scales": "none"}, "search": search}
    stages = [{"space": {"method": "linear", "parameters": {"weight": {}}}, "search": search}, path, path]
    config = config_of(family, tmp_path, stages=stages)
    edit(config, lambda document: [document.pop("space"), document.pop("search")])
    assert command("search", config, "--out", tmp_path / "run") == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    populations = [stage["search"]["population"] for stage in written["stages"]]
    # The layers that the third stage begins with are those of the second one's winner.
    assert populations[0] >= 4 and populations[1] >= 4 and populations[2] is None
    assert command("search", config, "--out", tmp_path / "run", "--resume") == 0


# ---------------------------------------------------------------------------------------------------------------
# The inputs


def test_changed_data_is_refused_by_name(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, config, again = finished.parent / "data.jsonl", finished / "config.yaml", finished.parent / "again"
    for arguments in (("search", config, "--out", again), ("evaluate", finished, "--tasks", config)):
        assert "--tasks" not in arguments or command(*arguments) == 0
        capsys.readouterr()
        text = data.read_text()
        drop_last_line(data)
        (line,) = run_here(*arguments, status=2).stderr.splitlines()
        assert f"{data} has changed" in line and "inputs" in line
        data.write_text(text)
    assert not again.exists()


def test_a_missing_file_of_a_parent_is_refused_by_name(finished: Path, family: Family, tmp_path: Path) -> None:
    parent = shutil.copytree(family.parents[0], tmp_path / "parent")
    (parent / "generation_config.json").unlink(missing_ok=True)
    (parent / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "first"
    config = shutil.copyfile(finished.parent / "config.yaml", tmp_path / "first.yaml")
    edit(config, lambda document: document.update(parents=[str(parent), *document["parents"][1:]]))
    edit(config, lambda document: document["search"].update(generations=1))
    assert command("search", config, "--out", out) == 0
    assert str(parent / "chat_template.jinja") in yaml.safe_load((out / "config.yaml").read_text())["inputs"]
    (parent / "chat_template.jinja").unlink()
    (line,) = run_here("search", out / "config.yaml", "--out", tmp_path / "again", status=2).stderr.splitlines()
    assert f"{parent / 'chat_template.jinja'} is missing" in line


@thorough
def test_changed_data_is_searched_where_the_user_says_so(finished: Path) -> None:
    drop_last_line(finished.parent / "data.jsonl")
    short = ("--set", "search.generations=1")
    assert (
        command("search", finished / "config.yaml", "--out", finished.parent / "a", "--set", "inputs=null", *short) == 0
    )
    copy = shutil.copyfile(finished / "config.yaml", finished.parent / "copy.yaml")
    edit(copy, lambda document: document.pop("inputs"))
    assert command("search", copy, "--out", finished.parent / "b", *short) == 0
    assert command("evaluate", finished, "--tasks", copy) == 0


# ---------------------------------------------------------------------------------------------------------------
# Reproducing


def test_a_run_is_reproduced_to_the_bit(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = finished.with_name("run-reproduced")
    printed = run_here("reproduce", finished).stdout
    assert "the environment is the one that the run recorded" in printed and f"bit-identical: {again}" in printed
    for name in ("history.jsonl", "best/recipe.yaml", "best/model/model.safetensors"):
        assert (again / name).read_bytes() == (finished / name).read_bytes(), name
    assert command("reproduce", finished) == 2
    assert f"{again}: exists already; choose a new folder with --out" in capsys.readouterr().err


def test_a_winner_that_later_generations_do_not_beat_stays_and_is_reproduced(family: Family, tmp_path: Path) -> None:
    """The proposal after two generations, which no generation evaluates, is better than the one after three."""
    gradient = {"learning_rate": 0.5, "schedule": "constant", "minibatches": 2}
    search = {"strategy": "gradient", "generations": 2, "population": 1, "gradient": gradient}
    space = {"method": "task_arithmetic", "parameters": {"weight": {"low": -3.0, "high": 3.0}}}
    config, run = config_of(family, tmp_path, search=search, space=space), tmp_path / "run"
    assert command("search", config, "--out", run) == 0
    before = read_json(run / "result.json")
    printed = run_here("search", config, "--out", run, "--resume", "--set", "search.generations=3").stdout
    after = read_json(run / "result.json")
    assert after["genome"] == before["genome"] and (before.get("kept_from"), after["kept_from"]) == (None, 2)
    assert "It is the winner of the run's first 2 generations" in " ".join(printed.split())
    assert "It is the winner of the run's first 2 generations" in " ".join(run_here("show", run).stdout.split())
    assert "bit-identical" in run_here("reproduce", run).stdout
    assert read_json(tmp_path / "run-reproduced" / "result.json") == after


@thorough
def test_a_run_of_models_by_name_is_reproduced(tmp_path: Path) -> None:
    """The run folder's config has the paths of models that the user's calls `zoo:base` and so forth."""
    quick = ("search.population=4", "search.generations=2", "search.finalists=1", "tasks.0.limit=8", "tasks.1.limit=8")
    options = [part for option in quick for part in ("--set", option)]
    assert command("search", CONFIGS / "quickstart.yaml", "--out", tmp_path / "run", *options) == 0
    assert "zoo:base" in (tmp_path / "run/best/recipe.yaml").read_text()
    assert f"bit-identical: {tmp_path / 'run-reproduced'}" in run_here("reproduce", tmp_path / "run").stdout


@thorough
def test_stages_are_reproduced(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = {"generations": 1, "population": 4}
    stages = [{"space": {"method": "linear", "parameters": {"weight": {}}}, "search": search | {"generations": 9}},
              {"data_flow": {"max_layers": 4}, "search": search}]  # fmt: skip
    config = config_of(family, tmp_path, stages=stages)
    edit(config, lambda document: [document.pop("space"), document.pop("search")])
    # The clock ends the first stage after one generation.
    assert command("search", config, "--out", tmp_path / "run", "--set", "stages.0.search.stop.seconds=0.001") == 0
    assert command("reproduce", tmp_path / "run", "--out", tmp_path / "again") == 0
    history = tmp_path / "run" / "stages" / "stage-1" / "history.jsonl"
    assert len(history.read_text().splitlines()) == 1
    history.write_text(history.read_text().replace('"generation": 1', '"generation": 1 '))
    capsys.readouterr()
    assert command("reproduce", tmp_path / "run", "--out", tmp_path / "other") == 1
    assert "stage-1: generation 1 of 1 is the first that differs" in capsys.readouterr().err


def test_a_run_that_parts_says_where_and_why(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = finished / "history.jsonl"
    first, second = read_lines(history)
    second["fitness"][0] += 0.25
    history.write_text("".join(json.dumps(row) + "\n" for row in (first, second)))
    document = read_json(finished / "environment.json")
    document["sessions"][0]["versions"]["jax"] = "0.0.1"
    write_json(finished / "environment.json", document)
    assert command("reproduce", finished) == 1
    out, err = capsys.readouterr()
    assert "versions.jax: 0.0.1 then, " in out
    (line,) = err.splitlines()
    assert "generation 2 of 2 is the first that differs: its candidates are the same, and their fitness" in line
    assert "by up to 2.5e-01; likely cause: versions.jax: 0.0.1 then, " in line


@pytest.mark.parametrize("name", ["best/recipe.yaml", "best/model/model.safetensors"])
def test_another_winner_is_no_reproduction(finished: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = (finished / name).read_bytes()
    (finished / name).write_bytes(content.replace(b"ties", b"sce ") if name.endswith("yaml") else content[:-1] + b"!")
    assert command("reproduce", finished) == 1
    assert f"and {name} differs; likely cause: nothing that was recorded" in capsys.readouterr().err


def test_what_cannot_be_reproduced_is_refused(finished: Path) -> None:
    def refused(run: Path = finished) -> str:
        (line,) = run_here("reproduce", run, status=2).stderr.splitlines()
        return line

    assert "no such folder" in refused(finished / "none")
    assert "is not a run folder of a search" in refused(finished.parent)
    text = (finished.parent / "data.jsonl").read_text()
    drop_last_line(finished.parent / "data.jsonl")
    assert "data.jsonl has changed since the run (sha256" in refused()
    (finished.parent / "data.jsonl").write_text(text)
    (finished / "result.json").unlink()
    assert "has no winner to compare with; finish it with search … --resume" in refused()
    assert not finished.with_name("run-reproduced").exists()


# ---------------------------------------------------------------------------------------------------------------
# Publishing


class FakeHub:
    """Takes the place of the hub's API: an upload is copied to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, list[tuple[Any, ...]]()

    def __call__(self, token: str) -> "FakeHub":
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create_repo", repo, private, exist_ok))

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
        shutil.copytree(folder_path, self.folder)
        return f"commit of {repo_id}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import huggingface_hub

    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: os.environ.get("HF_TOKEN"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return hub


def test_publish_lists_first_and_uploads_with_push(
    finished: Path, family: Family, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "report.html").write_text("<html></html>")
    names = {"README.md", "config.json", "model.safetensors", "recipe.yaml", "result.json", "report.html"}
    listed = run_here("publish", finished, "--repo", "me/mine").stdout
    assert all(f"{name}  " in listed for name in names) and "nothing was uploaded; --push" in listed
    assert "HF_TOKEN: is not set" in run_here("publish", finished, "--repo", "me/mine", "--push", status=2).stderr
    assert not hub.calls
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert command("publish", finished, "--repo", "me/mine", "--push", "--private") == 0
    assert hub.calls == [("token", "secret"), ("create_repo", "me/mine", True, True)]
    assert {file.name for file in hub.folder.iterdir()} > names
    weights = (finished / "best/model/model.safetensors").read_bytes()
    assert (hub.folder / "model.safetensors").read_bytes() == weights
    # The hub refuses, or is out of reach.
    monkeypatch.setattr(hub, "create_repo", Mock(side_effect=Exception("no route")))
    capsys.readouterr()
    assert command("publish", finished, "--repo", "me/mine", "--push") == 1
    assert capsys.readouterr().err == "error: me/mine: could not be uploaded (no route)\n"
    # Neither recipe names a place of this machine.
    texts = [file.read_text() for file in hub.folder.iterdir() if file.suffix in (".yaml", ".yml", ".json", ".md")]
    assert not any(str(family.root) in text or str(finished.parent) in text for text in texts)
    assert ModelCard.load(hub.folder / "README.md").data.eval_results
    printed = capsys.readouterr()
    assert "secret" not in printed.out + printed.err


def test_what_cannot_be_published_is_refused(finished: Path, hub: FakeHub) -> None:
    for repo in ("a/b/c", "-bad-/x", ""):
        assert "--repo: " in run_here("publish", finished, "--repo", repo, status=2).stderr
    (finished / "result.json").unlink()
    assert "has no winner to publish" in run_here("publish", finished, "--repo", "me/mine", status=2).stderr
