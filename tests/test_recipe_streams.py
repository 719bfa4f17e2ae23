"""Recipes of several documents: what mergekit-multi takes gives the same model here, in one command, and only that
model stays."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.commands import command, run_here
from helpers.mergekit import assert_same_tensors
from helpers.models import finetune, random_model, save, state, tiny_config
from hostile import run_python

import evojax_merge as em
from evojax_merge.checkpoints import writer
from evojax_merge.checkpoints.folder import open_folder
from evojax_merge.checkpoints.writer import ShardWriter, TensorSpec
from evojax_merge.errors import InputError
from evojax_merge.mergekit.execute import merge_to
from evojax_merge.mergekit.stages import merge_stream, prepare_stream
from evojax_merge.mergekit.streams import parse_stream, read_stream
from evojax_merge.mergekit.write import dump_documents
from evojax_merge.schema.yaml_reader import parse_documents
from evojax_merge.system.data_packages import cache_folder

# As strangers write them: the result first, stages called by names with dashes and dots wherever a model may stand.
STREAM = """\
---
# What is left in the end.
merge_method: passthrough
slices:
- sources: [{model: ties.a, layer_range: [0, 2]}]
- sources: [{model: task-1, layer_range: [1, 3]}]
dtype: float32
---
name: ties.a
merge_method: ties
base_model: base
models:
- {model: one, parameters: &half {weight: 0.5, density: 0.5}}
- {model: slerp-1.5, parameters: *half}
dtype: float32
---
name: task-1
merge_method: task_arithmetic
base_model: slerp-1.5
models: [{model: two, parameters: {weight: 0.7}}, {model: ties.a, parameters: {weight: 0.2}}]
tokenizer_source: slerp-1.5
dtype: float32
---
name: slerp-1.5
merge_method: slerp
base_model: one
slices:
- sources: [{model: one, layer_range: [0, 3]}, {model: two, layer_range: [0, 3]}]
parameters: {t: 0.3}
dtype: float32
...
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and its fine-tunes `one` and `two`, all of three layers, and `other`, of another width. Read
    only."""
    root = tmp_path_factory.mktemp("models")
    base = random_model(tiny_config())
    for model, name in ((base, "base"), (finetune(base, 1), "one"), (finetune(base, 2), "two")):
        save(model, root / name)
    save(random_model(tiny_config(intermediate_size=96)), root / "other")
    return root


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A folder of one's own with links to the models."""
    root = tmp_path / "own"
    root.mkdir()
    for model in models.iterdir():
        (root / model.name).symlink_to(model)
    return root


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def linear(*models: str, **more: Any) -> dict[str, Any]:
    """A document: the mean of models."""
    rows = [{"model": model, "parameters": {"weight": 1}} for model in models]
    return more | {"merge_method": "linear", "models": rows}


# ---------------------------------------------------------------------------------------------------------------
# What comes out


def test_the_model_is_that_of_mergekit_multi(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit.scripts import multimerge

    recipe, out = written(folder, STREAM), folder / "out"
    said = run_here("merge", recipe, out).stdout
    assert all(f"{number} of 4" in said for number in range(1, 5)) and "(slerp-1.5)" in said
    # Nothing but the model has been added, and its card tells of all merges and of no intermediate model.
    assert {path.name for path in folder.iterdir()} == {"base", "one", "two", "other", "recipe.yaml", "out"}
    card = (out / "README.md").read_text()
    assert all(f"- `{name}`\n" in card for name in ("one", "two", "base"))
    shown = card.partition("```yaml\n")[2].partition("```")[0]
    assert list(yaml.safe_load_all(shown)) == list(yaml.safe_load_all(STREAM))

    monkeypatch.chdir(folder)
    options = ["-I", "stages", "--out-path", "theirs", "--quiet", "--no-write-model-card", "--clone-tensors"]
    multimerge.main.main(["recipe.yaml", *options], standalone_mode=False)
    found = state(out)
    assert any(name.startswith("model.layers.3.") for name in found)
    assert_same_tensors(found, state(folder / "theirs"), rtol=1e-7, scaled=1e-5)


def test_stages_are_the_merges_one_by_one(folder: Path) -> None:
    """To the byte, with an intermediate model of its own dtype; --dtype is for the result, --seed for all."""
    first = {"name": "first", "merge_method": "dare_ties", "base_model": "base", "dtype": "bfloat16"}
    first["models"] = [{"model": name, "parameters": {"weight": 0.6, "density": 0.5}} for name in ("one", "two")]
    last = {"merge_method": "dare_linear", "base_model": "base"}
    last["models"] = [{"model": name, "parameters": {"weight": 0.5, "density": 0.5}} for name in ("first", "two")]
    recipe = written(folder, dump_documents([last, first]))
    assert command("merge", recipe, folder / "out", "--seed", 7, "--dtype", "float16") == 0

    one_by_one = folder / "one-by-one"
    one_by_one.mkdir()
    for name in ("base", "one", "two"):
        (one_by_one / name).symlink_to(folder / name)
    del first["name"]
    assert command("merge", written(one_by_one, dump_documents([first])), one_by_one / "first", "--seed", 7) == 0
    arguments = ("--seed", 7, "--dtype", "float16")
    assert command("merge", written(one_by_one, dump_documents([last])), one_by_one / "out", *arguments) == 0
    assert weights(folder / "out") == weights(one_by_one / "out")
    assert (folder / "out/config.json").read_bytes() == (one_by_one / "out/config.json").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        dump_documents([linear("one", "two", name="my-merge")]),
        "# Mine.\n---\n" + dump_documents([linear("one", "two")]) + "---\n# Nothing more.\n---\n",
        dump_documents([linear("one", "two"), None]),
        dump_documents([linear("middle", name="end"), linear("one", "two", name="middle")]),
    ],
    ids=["one document with a name", "documents of comments", "an empty document", "names for all"],
)
def test_which_document_is_the_result(text: str, folder: Path, tmp_path: Path) -> None:
    assert command("merge", written(folder, text), folder / "out") == 0
    assert command("merge", written(folder, dump_documents([linear("one", "two")])), folder / "expected") == 0
    assert weights(folder / "out") == weights(folder / "expected")


def test_an_adapter_is_merged_into_the_result_of_a_stage(folder: Path) -> None:
    from test_adapters import adapter

    adapter((folder / "base").resolve(), folder / "lora", target_modules=["q_proj", "embed_tokens"])
    documents = [linear("one", "mean-1+lora"), linear("one", "two", name="mean-1")]
    (folder / "recipe.yaml").write_text(dump_documents(documents))
    before = models_in_the_cache()
    assert command("merge", folder / "recipe.yaml", folder / "out") == 0
    # Step by step it is the same, and nothing stays of what stood for the stage.
    (folder / "recipe.yaml").write_text(dump_documents([linear("one", "two")]))
    assert command("merge", folder / "recipe.yaml", folder / "mean") == 0
    assert models_in_the_cache() == before
    (folder / "recipe.yaml").write_text(dump_documents([linear("one", "mean+lora")]))
    assert command("merge", folder / "recipe.yaml", folder / "again") == 0
    assert weights(folder / "out") == weights(folder / "again")
    assert str(folder) not in (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize("tokens", [{}, {"<new>": {"source": {"kind": "zero"}}}], ids=["copied", "made"])
def test_a_stage_may_be_needed_for_its_tokenizer_alone(tokens: dict[str, Any], folder: Path) -> None:
    documents = [
        linear("one", "two", tokenizer={"source": "words", "tokens": tokens}), linear("base", name="words"),
    ]  # fmt: skip
    assert command("merge", written(folder, dump_documents(documents)), folder / "out") == 0
    assert command("merge", written(folder, dump_documents([linear("one", "two")])), folder / "expected") == 0
    found, expected = (state(folder / name)["model.embed_tokens.weight"] for name in ("out", "expected"))
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert not found[len(expected) :].any() and len(found) == len(expected) + len(tokens)
    assert {path.name for path in folder.iterdir()} >= {"out", "expected"}
    assert not list(folder.glob(".out*"))


def models_in_the_cache() -> set[str]:
    return {path.name for path in (cache_folder() / "models").glob("*")}


def test_what_is_not_as_it_looks_is_told(folder: Path) -> None:
    documents = [linear("one", name="two"), linear("two", "base"), linear("base", name="unused")]
    unused, shadowed = run_here("merge", written(folder, dump_documents(documents)), folder / "out").stderr.splitlines()
    assert "warning: " in unused and "recipe.yaml: document 3 (unused)" in unused and "not merged" in unused
    assert "document 1 (two)" in shadowed and str((folder / "two").resolve()) in shadowed
    assert command("merge", written(folder, dump_documents([linear("one", "base")])), folder / "expected") == 0
    assert weights(folder / "out") == weights(folder / "expected")


def test_documents_from_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    documents = [linear("one", "two", name="middle"), linear("middle", "base"), linear("base", name="unused")]
    with pytest.warns(UserWarning, match="unused"):
        out = em.merge(documents, "out")
    assert command("merge", written(folder, dump_documents(documents)), folder / "expected") == 0
    assert weights(out) == weights(folder / "expected")


def test_a_runs_winner_of_several_documents(folder: Path) -> None:
    """What a search leaves, as far as an export reads it."""
    documents = [linear("one", "two", name="member-3"), linear("member-3", "base", dtype="float32")]
    text = dump_documents(documents).replace("one", str(folder / "one")).replace("two", str(folder / "two"))
    best = folder / "run/best"
    best.mkdir(parents=True)
    (folder / "run/config.yaml").write_text("inputs: {}\n")
    (folder / "run/history.jsonl").write_text('{"generation": 0}\n')
    written(best, text.replace("base", str(folder / "base")))
    assert command("export", folder / "run", folder / "out", "--dtype", "bfloat16") == 0
    assert command("merge", best / "recipe.yaml", folder / "expected", "--dtype", "bfloat16") == 0
    assert weights(folder / "out") == weights(folder / "expected")
    recipe = em.open_run(folder / "run").recipe
    assert [document.get("name") for document in recipe] == ["member-3", None]
    assert str(folder) not in (folder / "out/README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------
# The disk

CHAIN = dump_documents(
    [
        linear("one", "two", name="a"),
        linear("a", "base", name="b"),
        linear("b", "one", name="c"),
        linear("c", "a", name="d"),
        linear("d", "two"),
    ]
)


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*.safetensors"))


def test_a_stage_is_removed_after_its_last_use(folder: Path) -> None:
    """a is needed by b and d, each other by the next."""
    out, steps, most = folder / "out", [], 0

    @contextmanager
    def bar(label: str, nbytes: int) -> Iterator[Any]:
        nonlocal most
        yield lambda done: None
        (work,) = folder.glob(".out.*")
        most = max(most, on_disk(work))
        steps.append("".join(sorted(path.name[-1] for path in work.iterdir() if on_disk(path) > nbytes / 2)))

    with prepare_stream(read_stream(written(folder, CHAIN)), out) as plan:
        # Until then only the files' names and sizes are there.
        (work,) = folder.glob(".out.*")
        assert on_disk(work) < plan.result.nbytes / 2
        merge_stream(plan, out, merge_to, card="", bar=bar)
    assert steps == ["a", "ab", "abc", "acd", "d"]
    assert plan.peak_bytes == 3 * plan.result.nbytes
    assert plan.result.nbytes < most < 1.2 * plan.peak_bytes
    assert not list(folder.glob(".out.*"))


def test_a_disk_without_room_for_the_stages_is_found_out_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, before = written(folder, CHAIN), sorted(os.listdir(folder))
    with prepare_stream(read_stream(recipe), folder / "out") as plan:
        needed = plan.peak_bytes
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(total=needed, free=needed - 1))
    assert f"needs {needed / 1e6:,.1f} MB" in run_here("merge", recipe, folder / "out", status=2).stderr
    assert sorted(os.listdir(folder)) == before
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(total=needed, free=needed))
    assert command("merge", recipe, folder / "out") == 0


def test_what_is_reserved_is_what_is_written(tmp_path: Path) -> None:
    """In shards as well: later merges are planned with where the tensors are going to lie."""
    specs = {f"t{i}": TensorSpec((3, i + 1), np.dtype(np.float32)) for i in range(5)}
    ShardWriter(tmp_path, specs, 100).reserve()
    reserved = open_folder(tmp_path).entries
    with ShardWriter(tmp_path, specs, 100) as shards:
        for name in shards.order:
            shards.write(name, np.ones(specs[name].shape, np.float32))
    assert open_folder(tmp_path).entries == reserved
    assert len({entry.file for entry in reserved.values()}) > 1


# Merges, and is killed when the first tensor of the second stage is due.
KILLED = """
import os, signal, sys
from evojax_merge.mergekit import execute, stages
write_weights, calls = stages.write_weights, []

def killed(*arguments):
    calls.append(arguments)
    if len(calls) > 1:
        execute.merge_tensor = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    write_weights(*arguments)

stages.write_weights = killed
from evojax_merge.cli import main
main()
"""


def test_what_a_kill_leaves_the_next_run_removes(folder: Path) -> None:
    recipe, out = written(folder, CHAIN), folder / "out"
    before = set(os.listdir(folder))
    run_python(KILLED, "merge", recipe, out, status=-signal.SIGKILL)
    (left,) = set(os.listdir(folder)) - before
    assert left.startswith(".out.") and (folder / left / "1-a/model.safetensors").exists()
    assert command("merge", recipe, out) == 0
    assert set(os.listdir(folder)) == before | {"out"}


# ---------------------------------------------------------------------------------------------------------------
# Wrong input: the documents, and what the line has to say

WRONG: dict[str, tuple[str | list[Any], tuple[str, ...]]] = {
    "a cycle": (
        [linear("c"), linear("b", name="a"), linear("c", name="b"), linear("a", "one", name="c")],
        ("document 4 (c)", "needs its own result (c -> a -> b -> c)"),
    ),
    "a cycle beside the result": ([linear("one"), linear("b", name="a"), linear("a", name="b")], ("a -> b -> a",)),
    "a merge of itself": ([linear("a"), linear("a", "one", name="a")], ("document 2 (a)", "a -> a")),
    "a cycle of all": ([linear("b", name="a"), linear("a", name="b")], ("document 1 (a)", "a -> b -> a")),
    "a name twice": (
        [linear("a"), linear("one", name="a"), linear("two", name="a")], ("document 3", "name: a: document 2"),
    ),
    "two results": ([linear("one"), linear("two")], ("document 1 and document 2 have no name", "expected one")),
    "no result": ([linear("one", name="a"), linear("two", name="b")], ("all documents have names", "document 1")),
    "a name that is a number": ([linear("one", name=1), linear("two")], ("document 1", "name: 1; expected a text")),
    "a name that is empty": ([linear("one", name=""), linear("two")], ("document 1", "name: ''")),
    "an unknown key": (
        [linear("one", name="a", dtipe="float32"), linear("a")], ("document 1", "dtipe: unknown key", "'dtype'"),
    ),
    "a list": ([linear("one"), ["a"]], ("document 2", "expected a mapping, found list")),
    "a dtype that is none": (
        [linear("a"), linear("one", name="a") | {"dtype": "float8"}], ("document 2 (a)", "dtype: 'float8'"),
    ),
    "a model that is not there": ([linear("./a"), linear("one", name="a")], ("document 1", "./a: no such folder")),
    "an anchor of another document": (
        "name: a\nmerge_method: linear\nmodels: &rows [{model: one, parameters: {weight: 1}}]\n---\n"
        "merge_method: linear\nmodels: *rows\n", ("recipe.yaml:6", "not valid YAML", "alias"),
    ),
    "stages of other shapes": (
        [linear("one", name="stage-1"), linear("other", "stage-1")], ("stage-1: ", "has shape [48, 80]", "other"),
    ),
    "layers that a stage does not have": (
        [
            {"name": "deep", "merge_method": "passthrough", "slices": [
                {"sources": [{"model": name, "layer_range": [0, end]}]} for name, end in (("one", 2), ("two", 3))
            ]},
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "deep", "layer_range": [2, 6]}]}]},
        ],
        (
            "document 2: slices[0].sources[0]: layer_range [2, 6] goes to layer 5, but deep has no layer 5: it has "
            "layers 0 to 4",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_documents_are_refused_before_anything_is_merged(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, says = WRONG[case]
    recipe = written(folder, documents if isinstance(documents, str) else dump_documents(documents))
    before = sorted(os.listdir(folder))
    monkeypatch.setattr("evojax_merge.mergekit.stages.write_weights", lambda *_: pytest.fail("a stage was merged"))
    (line,) = run_here("merge", recipe, folder / "out", "--strict", status=2).stderr.splitlines()
    assert line.startswith("error: ") and ".evojax-merge" not in line
    assert all(part in line for part in says), line
    assert sorted(os.listdir(folder)) == before


def test_many_documents_are_no_way_around_the_limits() -> None:
    """Aliases are counted over all documents; long chains are neither slow nor too deep."""
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 6))
    text = f"a0: &a0 [x, x]\n{bomb}"
    assert len(parse_documents("text", f"{text}---\n{text}")) == 2
    with pytest.raises(InputError, match="more than 1,000,000 values"):
        parse_documents("text", "---\n".join([text] * 10))
    count = 3000
    chain = [linear(f"m{i + 1}" if i + 1 < count else "one", name=f"m{i}") for i in range(count)]
    stream = parse_stream(Path("recipe"), [*chain, linear("m0")])
    assert [stage.name for stage in stream.stages] == [f"m{i}" for i in reversed(range(count))]
