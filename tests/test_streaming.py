"""Banks that stay on the host or in the models' files: the same scores, one bank read per generation."""

import errno
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.commands import run_here
from helpers.families import Family, build_family
from helpers.files import read_json, write_lines, write_yaml
from helpers.models import even_records, tiny_config
from helpers.sampling import sample, thorough
from helpers.searches import open_problem, search_config
from hostile import run_command, run_python, start_command
from test_adapters import adapter
from test_quantised import quantised

from evojax_merge.backends.decoder import placements
from evojax_merge.checkpoints import bank
from evojax_merge.checkpoints.folder import MappedFile
from evojax_merge.checkpoints.members import MembersInFiles, Tensors, member_folders
from evojax_merge.checkpoints.writer import TensorSpec
from evojax_merge.errors import Failed, InputError
from evojax_merge.evaluation.pool import children_by_layer
from evojax_merge.schema.genealogy import FIRST, GENES, METHOD, NUMBER, SECOND, Member, founder_genomes
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.steps.selection import open_evaluator

PLACES = ("device", "host", "disk")
# Methods whose numbers are of rows, of entries, of tensors, or none; and whether they have a base.
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("della", {"weight": {"high": 1.5}, "density": {"low": 0.3, "high": 0.8}}),
    ("linear", {"weight": {"high": 1.5}}),
    ("dare_ties", {"weight": {"high": 1.5}, "density": {"low": 0.1}}),
    ("slerp", {"t": {}}),
]
HEADER = "w5 w6 w7 w8 " * 10
CHOICE = {"name": "choice", "kind": "multiple_choice", "file": "tasks.jsonl", "metric": "margin"}
TEXT = {"name": "text", "kind": "likelihood", "file": "tasks.jsonl", "weight": 0.5}
WORDS = {"name": "words", "kind": "exact_match", "file": "tasks.jsonl", "pattern": r"w\d+ w\d+", "max_new_tokens": 5}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    config = tiny_config(num_hidden_layers=3, tie_word_embeddings=False)
    return build_family(tmp_path_factory.mktemp("streamed"), config, 3)


def write_config(root: Path, **changes: Any) -> Path:
    """A search over a tiny family: choices behind a beginning that all share, likelihoods, and a few written words."""
    records = even_records(8)
    for record in records:
        record["prompt"] = HEADER + record["prompt"]
    write_lines(root / "tasks.jsonl", records)
    document = search_config(
        space={"method": "task_arithmetic", "parameters": {"weight": {"high": 1.5}}}, tasks=[CHOICE, TEXT, WORDS],
        search={"strategy": "cma_es"}, seed=3,
    )  # fmt: skip
    return write_yaml(root / "config.yaml", document | changes)


def scorer(path: Path, place: str, *overrides: str) -> SpaceEvaluator[Any]:
    problem = open_problem(path, f"evaluation.bank={place}", *overrides)
    return open_evaluator(problem, problem.prepare().shards[0])


def some_genomes(evaluator: SpaceEvaluator[Any], count: int = 3) -> np.ndarray:
    dims: int = evaluator.space.dims  # type: ignore[attr-defined]
    return np.random.default_rng(0).normal(size=(count, dims)).astype(np.float32)


@pytest.mark.parametrize(
    ("method", "parameters"), sample(METHODS, 1), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_place_of_the_bank_gives_the_same_scores(family: Family, method: str, parameters: dict[str, Any]) -> None:
    path = write_config(family.root, space={"method": method, "parameters": parameters})
    if method in ("linear", "slerp"):
        document = yaml.safe_load(path.read_text())
        del document["base"]
        write_yaml(path, document)
    assert np.ptp(equal_scores(path)["choice/margin"], axis=0).min() > 1e-3


def equal_scores(path: Path, atol: float = 0.0) -> dict[str, np.ndarray]:
    """The scores and texts of some genomes, the same wherever the bank is: to the bit, or within `atol`."""
    expected: dict[str, np.ndarray] = {}
    for place in PLACES:
        evaluator = scorer(path, place)
        scores = evaluator.score(some_genomes(evaluator))
        answers = {**{f"{task}/{name}": matrix for task, metrics in scores.matrices.items()
                      for name, matrix in metrics.items()}, "words": np.array(scores.outputs["words"])}  # fmt: skip
        expected = expected or answers
        assert answers.keys() == expected.keys()
        for name, values in answers.items():
            if atol and name != "words":
                np.testing.assert_allclose(values, expected[name], atol=atol, err_msg=f"{place}: {name}")
            else:
                np.testing.assert_array_equal(values, expected[name], f"{place}: {name}")
    return expected


def write_paths(root: Path, **changes: Any) -> Path:
    """A search over layer paths of the two parents."""
    path = write_config(root, data_flow={"moves": 2, "window": 2}, **changes)
    document = yaml.safe_load(path.read_text())
    del document["space"], document["base"]
    return write_yaml(path, document)


@thorough
def test_layers_come_to_a_path_in_its_order(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_paths(family.root)
    assert np.ptp(equal_scores(path)["choice/margin"], axis=0).max() > 1e-3
    evaluator = scorer(path, "disk", "tasks=[{name: text, kind: likelihood, file: tasks.jsonl}]")
    genomes = some_genomes(evaluator)
    steps, layers = evaluator.evaluator.work, 0  # type: ignore[attr-defined]
    load = evaluator.evaluator.bank.load  # type: ignore[attr-defined]

    def counted(number: int) -> Any:
        nonlocal layers
        layers += 1
        return load(number)

    monkeypatch.setattr(evaluator.evaluator, "bank", replace(evaluator.evaluator.bank, load=counted))  # type: ignore[attr-defined]
    evaluator.score(genomes)
    # All batches of the task go through a layer that was loaded once, and steps that paths share are taken once.
    assert 0 < layers < steps.steps_requested / len(evaluator.evaluator.evaluator.batched_tasks[0].scoring.batches)  # type: ignore[attr-defined]


def test_a_search_over_paths_in_files_is_that_on_the_device(family: Family, tmp_path: Path) -> None:
    path = write_paths(family.root, tasks=[TEXT | {"weight": 1, "heldout": 0.25}])
    for place in ("device", "disk"):
        run_here("search", path, "--out", tmp_path / place, "--set", f"evaluation.bank={place}")
    histories = [(tmp_path / place / "history.jsonl").read_bytes() for place in ("device", "disk")]
    assert histories[0] == histories[1]
    weights = [(tmp_path / place / "best/model/model.safetensors").read_bytes() for place in ("device", "disk")]
    assert weights[0] == weights[1]
    plan = run_here("plan", path, "--set", "evaluation.bank=disk")
    assert "of models stay in their files; for each step of a path" in plan.stdout
    refused = run_here(
        "search", path, "--out", tmp_path / "none", "--set", "evaluation.bank=host",
        "--set", "search.strategy=gradient", "--set", "data_flow.scales=block", status=2,
    )  # fmt: skip
    assert "have no gradients; take bank: device" in refused.stderr


def test_gradients_come_back_layer_by_layer(family: Family) -> None:
    path = write_config(family.root, tasks=sample([TEXT, CHOICE], 1))
    gradients = []
    for place in PLACES[:2]:
        evaluator = scorer(path, place)
        scores, gradient = evaluator.value_and_gradient(some_genomes(evaluator))
        gradients.append((scores.matrices["choice"]["margin"], gradient))
    (whole_scores, whole), (streamed_scores, streamed) = gradients
    np.testing.assert_allclose(streamed_scores, whole_scores, atol=1e-5)
    np.testing.assert_allclose(streamed, whole, rtol=1e-3, atol=1e-4)
    assert np.abs(whole).max() > 0.1


def bytes_read(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """The bytes that are read from files meanwhile."""
    total, original = 0, MappedFile.copy

    def copy(self: MappedFile, start: int, into: np.ndarray) -> None:
        nonlocal total
        total += into.nbytes
        original(self, start, into)

    with monkeypatch.context() as patched:
        patched.setattr(MappedFile, "copy", copy)
        run()
    return total


def test_a_generation_reads_one_bank(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(family.root, tasks=[TEXT])
    evaluator = scorer(path, "disk")
    genomes = some_genomes(evaluator, 6)
    problem = open_problem(path)
    whole = bank.bank_bytes(problem.backend.models.sources, problem.backend.models.decoder)
    assert bytes_read(lambda: evaluator.score(genomes), monkeypatch) == whole
    # Candidates that generate are materialised together.
    writer = scorer(path, "disk", "tasks=[{name: words, kind: exact_match, file: tasks.jsonl, max_new_tokens: 2}]")
    assert bytes_read(lambda: writer.score(genomes), monkeypatch) == whole
    # The layers come once more, in reverse, and at last what tokens are embedded by.
    ahead, both = bytes_read(lambda: evaluator.value_and_gradient(genomes), monkeypatch), 2 * whole
    assert whole < ahead < both


@pytest.mark.parametrize("place", sample(PLACES[1:], 1))
def test_a_search_of_a_streamed_bank_is_the_search(family: Family, tmp_path: Path, place: str) -> None:
    """The held-out table, whose stored models are streamed too, the winner, and a run that goes on where it ended."""
    path = write_config(family.root, tasks=[TEXT | {"heldout": 0.25}])
    for name, setting in (("device", "device"), (place, place)):
        run_here("search", path, "--out", tmp_path / name, "--set", f"evaluation.bank={setting}")
    whole, streamed = tmp_path / "device", tmp_path / place
    for file in ("history.jsonl", "best/model/model.safetensors"):
        assert (whole / file).read_bytes() == (streamed / file).read_bytes()
    results = [read_json(folder / "result.json") for folder in (whole, streamed)]
    assert results[0] == results[1] and results[0]["table"]
    shorter = tmp_path / "resumed"
    settings = ["--set", f"evaluation.bank={place}"]
    run_here("search", path, "--out", shorter, *settings, "--set", "search.generations=1")
    run_here("search", path, "--out", shorter, "--resume", *settings)
    assert (shorter / "history.jsonl").read_bytes() == (streamed / "history.jsonl").read_bytes()


def test_a_file_that_changes_meanwhile_ends_the_search(family: Family, tmp_path: Path) -> None:
    shutil.copytree(family.root, tmp_path / "family")
    path = write_config(tmp_path / "family", tasks=[TEXT])
    evaluator = scorer(path, "disk")
    genomes = some_genomes(evaluator)
    evaluator.score(genomes)
    file = tmp_path / "family" / "parent1" / "model.safetensors"
    os.utime(file, ns=(0, 0))
    with pytest.raises(Failed, match=re.escape(f"{file}: the file has changed")):
        evaluator.score(genomes)
    file.unlink()
    with pytest.raises(Failed, match=re.escape(f"{file}: cannot be read any more")):
        evaluator.score(genomes)


@pytest.mark.parametrize("fault", sample(("the file ends there", "Input/output error"), 1))
def test_a_disk_that_fails_in_the_middle_ends_the_search_which_goes_on(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """One line, exit status 1, and the history of a search that nothing befell once the file is back."""
    path, setting = write_config(family.root, tasks=[TEXT]), ("--set", "evaluation.bank=disk")
    run_here("search", path, "--out", tmp_path / "whole", *setting)
    count, preadv, file = 0, os.preadv, family.root / "parent1" / "model.safetensors"

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        """Reads as before until a part of the second generation was read."""
        nonlocal count
        history = tmp_path / "run" / "history.jsonl"
        count += has_lines(history, 1)
        if count > 20 and os.path.samestat(os.fstat(descriptor), file.stat()):
            if fault == "the file ends there":
                return preadv(descriptor, buffers, file.stat().st_size)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", failing)
        done = run_here("search", path, "--out", tmp_path / "run", *setting, status=1)
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and re.fullmatch(
        rf"error: {re.escape(str(file))}: cannot be read from byte .*{fault}.*", lines[0]
    )
    assert "--resume" in lines[0] and has_lines(tmp_path / "run" / "history.jsonl", 1)
    run_here("search", path, "--out", tmp_path / "run", *setting, "--resume")
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()


@pytest.mark.parametrize("kind", ["adapters", "quantised"])
def test_a_disk_that_fails_under_packed_weights_and_factors_ends_in_one_line(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Nothing of streamed models is mapped into memory, where the system would kill the process."""
    root = tmp_path / "family"
    shutil.copytree(family.root, root)
    if kind == "adapters":
        file, _ = adapter(root / "base", root / "lora0")
        adapter(root / "base", root / "lora1", seed=1)
        parents, file = ["base+lora0", "base+lora1"], file / "adapter_model.safetensors"
    else:
        quantised(root / "parent1", root / "packed", "GPTQ")
        parents, file = ["parent0", "packed"], root / "packed" / "model.safetensors"

    def mapped(self: MappedFile, start: int, stop: int) -> np.ndarray:
        raise AssertionError(f"{self.path} is mapped")

    monkeypatch.setattr(MappedFile, "read", mapped)
    evaluator, preadv = scorer(write_config(root, tasks=[TEXT], parents=parents), "disk"), os.preadv
    genomes = some_genomes(evaluator, 1)
    evaluator.score(genomes)

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if os.path.samestat(os.fstat(descriptor), file.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(Failed, match=rf"{re.escape(str(file))}: cannot be read from byte .*Input/output error"):
        evaluator.score(genomes)


def write_pool(root: Path, **changes: Any) -> Path:
    """A search over a pool of three founders, whose children are bred by two methods."""
    pool = {"methods": ["slerp", "dare_ties"], "split": True, "size": 3}
    search = {"population": 4, "generations": 3}
    path = write_config(root, pool=pool, search=search, parents=[f"parent{k}" for k in range(3)], **changes)
    document = yaml.safe_load(path.read_text())
    del document["space"]
    return write_yaml(path, document)


def test_a_generation_of_a_pool_reads_its_parents_once(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = scorer(write_pool(family.root, tasks=[TEXT]), "disk")
    genomes, context = bred(evaluator.space)
    evaluator = evaluator.within(context)
    evaluator.score(genomes)
    member = evaluator.evaluator.bank.member_bytes()  # type: ignore[attr-defined]
    # Of three genomes two are children of the same parents, by two methods, and one is a founder; one method takes the
    # base, and hashes founders' tensors for its masks.
    assert bytes_read(lambda: evaluator.score(genomes), monkeypatch) == 4 * member


def bred(space: Any) -> tuple[np.ndarray, np.ndarray]:
    """Genomes of the second generation of a pool, and of all before: children of children, by both methods."""
    rng, births = np.random.default_rng(1), np.zeros((7, space.dims), np.float32)
    births[:, GENES:] = rng.random(births[:, GENES:].shape)
    births[:, NUMBER], births[:, METHOD] = np.arange(7), np.arange(7) % 2
    births[:3] = founder_genomes(3, space.dims - GENES)
    births[3:, FIRST : SECOND + 1] = [[0, 1], [2, 1], [4, 3], [3, 4]]
    return births[[5, 6, 0]], births[3:]


def test_children_are_bred_layer_by_layer(family: Family) -> None:
    """Scores and texts are the same to the bit wherever the members are."""
    path, answers = write_pool(family.root), {}
    for place in PLACES:
        evaluator = scorer(path, place)
        genomes, context = bred(evaluator.space)
        scores = evaluator.within(context).score(genomes)
        answers[place] = [scores.matrices["choice"]["margin"], scores.matrices["text"]["log_probability"]]
        answers[place] += [np.array(scores.outputs["words"])]
    for place in PLACES[1:]:
        for values, expected in zip(answers[place], answers["device"], strict=True):
            np.testing.assert_array_equal(values, expected, place)
    assert np.ptp(answers["device"][0], axis=0).min() > 1e-3


@pytest.mark.parametrize("place", sample(PLACES[1:], 1))
def test_a_search_of_a_streamed_pool_is_the_search(family: Family, tmp_path: Path, place: str) -> None:
    """The history, the table and the winner are those of a pool on the device, to the byte; so they are of a run that
    goes on where it ended. Nothing of the members stays when a run is over."""
    path = write_pool(family.root, tasks=[TEXT | {"heldout": 0.25}])
    for name, setting in (("device", "device"), (place, place)):
        run_here("search", path, "--out", tmp_path / name, "--set", f"evaluation.bank={setting}")
    expected = run_files(tmp_path / "device")
    assert run_files(tmp_path / place) == expected
    settings = ["--set", f"evaluation.bank={place}"]
    for more in (["--set", "search.generations=2"], ["--resume"]):
        run_here("search", path, "--out", tmp_path / "resumed", *settings, *more)
    assert run_files(tmp_path / "resumed") == expected
    assert not [*tmp_path.glob("*/members")]


def test_a_founder_that_changes_or_fails_ends_the_search(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(family.root, tmp_path / "family")
    evaluator = scorer(write_pool(tmp_path / "family", tasks=[TEXT]), "host")
    genomes, context = bred(evaluator.space)
    evaluator, file = evaluator.within(context), tmp_path / "family/parent1/model.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", lambda descriptor, buffers, offset: 0)
        with pytest.raises(Failed, match=r"model.safetensors: cannot be read from byte .*the file ends there"):
            evaluator.score(genomes)
    os.utime(file, ns=(0, 0))
    with pytest.raises(Failed, match=re.escape(f"{file}: the file has changed")):
        evaluator.score(genomes)


def test_a_disk_that_fails_in_the_middle_leaves_members_that_the_run_goes_on_with(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, setting, out = write_pool(family.root, tasks=[TEXT]), ("--set", "evaluation.bank=disk"), tmp_path / "run"
    run_here("search", path, "--out", tmp_path / "whole", *setting)
    preadv, files = os.preadv, [folder / "model.safetensors" for folder in (family.base, *family.parents)]

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        """Reads as before until a member is kept for the third generation."""
        is_founder = any(os.path.samestat(os.fstat(descriptor), file.stat()) for file in files)
        if is_founder and has_lines(out / "history.jsonl", 2) and member_folders(out / "members/process-0"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    def fail() -> set[str]:
        """Search until the disk fails; the members that are left."""
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", failing)
            done = run_here("search", path, "--out", out, "--overwrite", *setting, status=1)
        (line,) = [line for line in done.stderr.splitlines() if "error" in line]
        assert "model.safetensors: cannot be read from byte" in line, line
        return {member.name for member in member_folders(out / "members/process-0")}

    left, written, write = fail(), set[str](), MembersInFiles.write

    def counted(self: MembersInFiles, member: Member, tensors: Tensors) -> None:
        written.add(f"member-{member.number}")
        write(self, member, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(MembersInFiles, "write", counted)
        run_here("search", path, "--out", out, *setting, "--resume")
    assert run_files(out) == run_files(tmp_path / "whole")
    assert left and not left & written and not (out / "members").exists()
    assert fail()
    (out / "members" / "mine.txt").write_text("a user's own")
    done = run_here("search", path, "--out", out, "--overwrite", "--set", "evaluation.bank=host")
    assert "'mine.txt', which evojax-merge did not write, stays" in done.stderr
    assert [*(out / "members").iterdir()] == [out / "members" / "mine.txt"]
    assert run_files(out) == run_files(tmp_path / "whole")


def test_members_in_files_are_complete_or_gone(tmp_path: Path) -> None:
    """A run that goes on takes the members that it wrote, and no others; one whose file changes ends it."""
    first, second = Member(0), Member(1)
    child = Member(2, (first, second), "slerp", {"t": np.float64(0.5)})
    other = Member(2, (first, second), "slerp", {"t": np.float64(0.25)})
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in values.items()}

    def opened(drawn_from: str = "seed 0") -> MembersInFiles:
        return MembersInFiles(tmp_path / "members", specs, drawn_from)

    def broken() -> Iterator[tuple[str, np.ndarray]]:
        yield "a", values["a"]
        raise KeyboardInterrupt

    store = opened()
    with pytest.raises(KeyboardInterrupt):
        store.write(child, broken())
    assert child not in store and not [*tmp_path.glob("members/*")]
    store.write(child, values.items())
    again = opened()
    assert child in again and other not in opened() and child not in opened("seed 1")
    for name, array in values.items():
        np.testing.assert_array_equal(again.read(child, name), array)
    # A member of another lineage takes the name, and what no member is asked for goes.
    third = Member(3, (first, child), "slerp", {"t": np.float64(0.5)})
    again.write(third, values.items())
    fresh = opened()
    fresh.write(other, values.items())
    assert [path.name for path in tmp_path.glob("members/*")] == ["member-2"] and third not in fresh
    fresh.check()
    file = tmp_path / "members/member-2/model.safetensors"
    os.utime(file, ns=(0, 0))
    with pytest.raises(Failed, match=re.escape(f"{file}: the file has changed")):
        fresh.check()
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert other not in opened()
    fresh.drop(other)
    assert not [*tmp_path.glob("members/*")]


def test_slots_bound_the_members_in_files(family: Family, tmp_path: Path) -> None:
    """Parents that are not kept are bred again, to the bit; no more than the parents and `slots` are in files."""
    path, results = write_pool(family.root, tasks=[TEXT]), []
    for slots in (1, 3):
        evaluator = scorer(path, "disk", f"pool.slots={slots}")
        genomes, context = bred(evaluator.space)
        evaluator, store = evaluator.within(context), evaluator.evaluator.bank.store  # type: ignore[attr-defined]
        results += [
            evaluator.score(part).matrices["text"]["log_probability"] for part in (genomes, context[:1], genomes)
        ]
        assert len(member_folders(store.folder)) == 2
    for values in results:
        np.testing.assert_array_equal(values, results[1] if len(values) == 1 else results[0])


@thorough
@pytest.mark.parametrize("place", PLACES[1:])
def test_a_streamed_pool_that_is_killed_goes_on_to_the_byte(family: Family, tmp_path: Path, place: str) -> None:
    path = write_pool(family.root, tasks=[TEXT])
    write_yaml(path, yaml.safe_load(path.read_text()) | {"search": {"population": 4, "generations": 12}})
    setting = ("--set", f"evaluation.bank={place}")
    run_command("search", path, "--out", tmp_path / "whole", *setting)
    kill_at_random(path, tmp_path / "killed", *setting)
    run_command("search", path, "--out", tmp_path / "killed", *setting, "--resume")
    assert run_files(tmp_path / "killed") == run_files(tmp_path / "whole")
    assert not [*tmp_path.glob("*/members")]


def run_files(run: Path) -> dict[str, bytes]:
    names = ("history.jsonl", "best/model/model.safetensors", "best/recipe.yaml", "result.json")
    return {name: (run / name).read_bytes() for name in names}


def test_a_host_that_is_too_small_is_told_of_the_disk(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placements, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"host: the models take .* of the host's memory, and .* available; take disk"):
        scorer(write_config(family.root, tasks=[TEXT]), "host")
    pool = write_pool(family.root, tasks=[TEXT])
    for place in PLACES[:2]:
        with pytest.raises(InputError, match=rf"{place}: the models take .* of the host's memory, and .*; take disk"):
            scorer(pool, place)
    # No place is named: the members are in files.
    assert scorer(pool, "auto").evaluator.populations is children_by_layer


MESH_PROGRAM = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from pathlib import Path
from evojax_merge.evaluation.devices import Devices, mesh_of
from evojax_merge.steps.selection import open_evaluator
from evojax_merge.problem import build_problem, read_config

path, out = Path(sys.argv[1]), sys.argv[2]
answers = {}
for place in ("device", "disk"):
    problem = build_problem(path, read_config(path, [f"evaluation.bank={place}"], None))
    genomes = np.random.default_rng(0).normal(size=(4, problem.space.dims)).astype(np.float32)
    if problem.strategy.name == "pool":
        _, genomes = problem.space.baselines()
    scorer = open_evaluator(problem, problem.prepare().shards[0], Devices(mesh_of(jax.devices(), 2)))
    scores = scorer.score(genomes)
    answers[f"{place}/margin"] = scores.matrices["choice"]["margin"]
    answers[f"{place}/texts"] = np.array([scores.outputs[task] for task in sorted(scores.outputs)])
np.savez(out, **answers)
"""


@thorough
@pytest.mark.parametrize("write", sample((write_pool, write_config), 1))
def test_devices_that_share_a_model_stream_their_shards(
    family: Family, tmp_path: Path, write: Callable[..., Path]
) -> None:
    tasks = [[CHOICE], [CHOICE, WORDS]][len(sample((1, 2), 1)) - 1]
    path, out = write(family.root, tasks=tasks), tmp_path / "answers.npz"
    run_python(MESH_PROGRAM, path, out, seconds=400)
    answers = dict(np.load(out))
    np.testing.assert_allclose(answers["disk/margin"], answers["device/margin"], atol=1e-5)
    assert (answers["disk/texts"] == answers["device/texts"]).all()


@thorough
def test_a_streamed_search_that_is_killed_goes_on_to_the_byte(family: Family, tmp_path: Path) -> None:
    path = write_config(family.root, tasks=[TEXT], search={"population": 4, "generations": 12, "strategy": "cma_es"})
    setting = ("--set", "evaluation.bank=disk")
    run_command("search", path, "--out", tmp_path / "whole", *setting)
    killed = tmp_path / "killed"
    kill_at_random(path, killed, *setting)
    run_command("search", path, "--out", killed, *setting, "--resume")
    for file in ("history.jsonl", "best/model/model.safetensors", "result.json"):
        assert (killed / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def kill_at_random(path: Path, out: Path, *setting: str) -> None:
    """Kill a search of twelve generations three times, each time a little after a line of its history."""
    options, instants = list[str](), random.Random(os.environ.get("EVOJAX_TEST_SEED", "0"))
    for lines in (2, 5, 9):
        process = start_command("search", path, "--out", out, *setting, *options)
        while process.poll() is None and not has_lines(out / "history.jsonl", lines):
            time.sleep(0.005)
        time.sleep(instants.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        options = ["--resume"]


def has_lines(file: Path, count: int) -> bool:
    return file.exists() and file.read_bytes().count(b"\n") >= count
