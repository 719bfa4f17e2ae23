"""Reading and writing model folders: the bank, its memory, streamed shards, folders that appear complete or not."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.commands import assert_refused, linear_merge, run_here
from helpers.decoders import stored_logits
from helpers.families import Family
from helpers.files import edit_json, read_json, read_recipe, write_json, write_yaml
from helpers.mergekit import assert_same_tensors
from helpers.models import finetune, load_torch, random_model, save, state, tiny_config, word_tokenizer, words
from helpers.sampling import thorough
from hostile import run_python
from merge_kernels import METHODS, draw_row_keys, tabulate
from reference.torch_models import torch_logits
from safetensors.numpy import load_file, save_file

from evojax_merge.backends.decoder.opening import context_length, stop_tokens
from evojax_merge.checkpoints.bank import bank_bytes, load_bank, load_stored, stored_tensors
from evojax_merge.checkpoints.folder import PIECE, copy_finite, is_finite, open_folder
from evojax_merge.checkpoints.parents import open_sources, tensor_shapes
from evojax_merge.checkpoints.references import resolve
from evojax_merge.checkpoints.tokens import TokenizerChoice, load_tokenizer, vocabulary_warnings
from evojax_merge.checkpoints.writer import (
    MARKER,
    ShardWriter,
    TensorSpec,
    check_new_model,
    check_output,
    require_space,
    write_marker,
)
from evojax_merge.errors import Failed, InputError
from evojax_merge.mergekit.execute import merge_to
from evojax_merge.mergekit.execute import prepare as prepare_merge
from evojax_merge.models.architecture import LAYERS
from evojax_merge.models.bank import MergeSpec
from evojax_merge.report.card import merge_card
from evojax_merge.system.file_system import atomic_folder, atomic_write, recover

SHARDED: dict[str, Any] = {"max_shard_size": "40KB"}


def spec_of(method: str, seed: int = 0) -> MergeSpec:
    return MergeSpec(method, METHODS[method].options, seed, "float32")


def leaves(config: Any) -> list[tuple[str, str, int | None]]:
    """(leaf of the bank, tensor name, layer) for every tensor of an untied Llama, written out by hand."""
    named = [("embed", "model.embed_tokens.weight", None), ("final_norm", "model.norm.weight", None)]
    named.append(("head", "lm_head.weight", None))
    inside = {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
        "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
        "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    for i in range(config.num_hidden_layers):
        named += [(leaf, f"model.layers.{i}.{tensor}.weight", i) for leaf, tensor in inside.items()]  # type: ignore[misc]
    return named


def test_bank_holds_every_tensor_of_every_source(tmp_path: Path) -> None:
    """Base first, one file or shards, parents of different dtypes: values and stacking are right everywhere."""
    config = tiny_config()
    model = random_model(config)
    base = save(model, tmp_path / "base", **SHARDED)
    half = save(finetune(model, 1).to(torch.bfloat16), tmp_path / "half")
    full = save(finetune(model, 2), tmp_path / "full", **SHARDED)
    assert len(list(base.glob("*.safetensors"))) > 2
    folders = [base, half, full]
    sources, decoder = open_sources(folders)
    bank = load_bank(sources, decoder, spec_of("task_arithmetic"))
    tensors = [state(folder) for folder in folders]
    rows = leaves(config)
    assert {name for _, name, _ in rows} == set(tensors[0])
    assert len(bank.stacks[LAYERS]) + len(bank.shared) == len({leaf for leaf, _, _ in rows})
    for leaf, name, layer in rows:
        stacked = np.asarray(bank.shared[leaf].sources if layer is None else bank.stacks[LAYERS][leaf].sources[layer])
        # bfloat16 and float32 together are stacked as float32, which holds both.
        assert stacked.dtype == np.float32
        for found, tensor in zip(stacked, tensors, strict=True):
            np.testing.assert_array_equal(found, tensor[name])


def test_bank_keeps_the_sources_own_dtype(tmp_path: Path) -> None:
    model = random_model(tiny_config()).to(torch.bfloat16)
    folders = [save(model, tmp_path / "a"), save(finetune(model, 1), tmp_path / "b")]
    sources, decoder = open_sources(folders)
    bank = load_bank(sources, decoder, spec_of("linear"))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((bank.stacks, bank.shared))} == {"bfloat16"}
    for k, folder in enumerate(folders):
        np.testing.assert_array_equal(
            np.asarray(bank.stacks[LAYERS]["up"].sources[1, k], np.float32),
            state(folder)["model.layers.1.mlp.up_proj.weight"],
        )


def test_bank_of_float16_and_bfloat16_loses_nothing(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    folders = [save(model.to(torch.float16), tmp_path / "a"), save(finetune(model, 1).bfloat16(), tmp_path / "b")]
    bank = load_bank(*open_sources(folders), spec_of("linear"))
    assert bank.shared["embed"].sources.dtype == jnp.float32
    for k, folder in enumerate(folders):
        np.testing.assert_array_equal(
            np.asarray(bank.shared["embed"].sources[k]), state(folder)["model.embed_tokens.weight"]
        )


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_bank_measures_each_tensor(method: str, family: Family) -> None:
    sources, decoder = open_sources([family.base, *family.parents])
    bank = load_bank(sources, decoder, spec_of(method, seed=5))
    tensors = [state(folder) for folder in (family.base, *family.parents)]
    for leaf, name, i in (
        ("down", "model.layers.2.mlp.down_proj.weight", 2),
        ("embed", "model.embed_tokens.weight", 0),
    ):
        values = [tensor[name] for tensor in tensors]
        bank_of_tensor = (
            bank.shared[leaf] if leaf == "embed" else jax.tree.map(lambda array: array[i], bank.stacks[LAYERS][leaf])  # noqa: B023
        )
        if method == "dare_ties":
            digests = [open_folder(folder).digest(name) for folder in family.parents]
            drawn = [draw_row_keys(5, digest, values[0].shape) for digest in digests]
            np.testing.assert_array_equal(np.asarray(bank_of_tensor.mask_keys), drawn)
        else:
            drawn = []
            assert bank_of_tensor.mask_keys is None
        prepared = tabulate(METHODS[method], METHODS[method].options, values, {}, drawn.__getitem__)
        for statistic, expected in prepared.statistics.items():
            np.testing.assert_array_equal(np.asarray(bank_of_tensor.statistics[statistic]), expected)


def test_progress_adds_up_to_the_bank(family: Family) -> None:
    sources, decoder = open_sources([family.base, *family.parents])
    told: list[int] = []
    bank = load_bank(sources, decoder, spec_of("task_arithmetic"), told.append)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((bank.stacks, bank.shared)))
    assert sum(told) == bank_bytes(sources, decoder) == held


def test_stored_model_gives_its_tensors_back(family: Family) -> None:
    sources, decoder = open_sources([family.parents[0]])
    found = dict(stored_tensors(load_stored(sources, decoder), decoder))
    expected = state(family.parents[0])
    assert_same_tensors(found, expected)


# Loads a bank while a thread watches the anonymous memory of the process (mapped files are not its own), and prints
# by how much it grew at most, the size of the bank, and that of the largest tensor.
WATCHED = """
import sys, threading, time
from contextlib import nullcontext
from pathlib import Path
from merge_kernels import METHODS
from evojax_merge.checkpoints.bank import bank_bytes, load_bank
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.models.bank import MergeSpec
import jax, numpy as np

def own():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

jax.block_until_ready(jax.device_put(np.ones(100)))
sources, config = open_sources([Path(p) for p in sys.argv[2:]])
largest = max(np.prod(entry.shape) * entry.dtype.itemsize for entry in sources.folders[0].entries.values())
before, peak, done = own(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], own())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
bank = load_bank(sources, config, MergeSpec(sys.argv[1], METHODS[sys.argv[1]].options, 0, "float32"))
done.set()
thread.join()
print(peak[0] - before, bank_bytes(sources, config), int(largest))
"""


@pytest.fixture(scope="module")
def larger_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of about 50 MB each whose tensors are small beside the bank."""
    root = tmp_path_factory.mktemp("larger")
    config = tiny_config(hidden_size=320, intermediate_size=864, num_hidden_layers=12)
    model = random_model(config)
    return [save(finetune(model, k) if k else model, root / str(k)) for k in range(3)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process' memory")
@thorough
def test_loading_needs_the_bank_and_little_more(larger_models: list[Path]) -> None:
    command = [sys.executable, "-c", WATCHED, "task_arithmetic", *map(str, larger_models)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    grown, bank, tensor = map(int, done.stdout.split())
    assert bank > 100 * 2**20
    # Arrays are filled where they stay: neither a second copy of a leaf (a ninth of the bank) nor of a source.
    assert 0.9 * bank < grown < bank + 4 * tensor + 10 * 2**20


def test_merging_one_tensor_at_a_time_needs_no_whole_model(larger_models: list[Path], tmp_path: Path) -> None:
    """A one-off merge holds a tensor of each source, never a model."""
    import tracemalloc

    from evojax_merge.mergekit.execute import merge_to, prepare

    models = "".join(f"  - {{model: {path}, parameters: {{weight: 0.5}}}}\n" for path in larger_models[1:])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {larger_models[0]}\nmodels:\n{models}")
    job = prepare(read_recipe(recipe))
    tracemalloc.start()
    merge_to(job, tmp_path / "out", card="")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A few tensors, and the pieces that the workers are at: neither grows with the model.
    assert peak < job.nbytes / 2


# ---------------------------------------------------------------------------------------------------------------
# What names a parent in random methods


def test_digest_is_of_content_and_name_whatever_the_sharding(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1.0)
    one, many = save(model, tmp_path / "one"), save(model, tmp_path / "many", **SHARDED)
    other = save(finetune(model, 1), tmp_path / "other")
    opened = [open_folder(path) for path in (one, many, other)]
    names = list(opened[0].entries)
    for name in names:
        assert opened[0].digest(name) == opened[1].digest(name) != opened[2].digest(name)
    # Tensors of one content under different names draw different masks.
    assert len({opened[0].digest(name) for name in names}) == len(names)


# ---------------------------------------------------------------------------------------------------------------
# Writing


def written(folder: Path, tensors: dict[str, np.ndarray], **options: Any) -> list[str]:
    specs = {name: TensorSpec(values.shape, values.dtype) for name, values in tensors.items()}
    with ShardWriter(folder, specs, **options) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
        return writer.order


@pytest.mark.parametrize("shard", [None, 4000])
def test_written_tensors_are_read_by_safetensors(shard: int | None, tmp_path: Path) -> None:
    from safetensors import safe_open

    rng = np.random.default_rng(0)
    tensors = {
        "float32": rng.normal(size=(20, 30)).astype(np.float32),
        "bfloat16": rng.normal(size=(7, 11, 3)).astype(ml_dtypes.bfloat16),
        "float16": rng.normal(size=(50,)).astype(np.float16),
        "int64": rng.integers(-(2**40), 2**40, (9,)),
        "bool": rng.random((5, 5)) > 0.5,
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        # Views whose memory is not in the order of their entries.
        "transposed": rng.normal(size=(31, 17)).astype(np.float32).T,
        "strided": rng.normal(size=(40, 12)).astype(np.float32)[::3, ::-2],
    }
    options = {} if shard is None else {"max_shard_bytes": shard}
    assert sorted(written(tmp_path, tensors, **options)) == sorted(tensors)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard is None)
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: (file.name, opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    assert set(found) == set(tensors)
    for name, values in tensors.items():
        tensor = found[name][1]
        if name == "bfloat16":
            tensor, values = tensor.float(), values.astype(np.float32)
        np.testing.assert_array_equal(tensor.numpy(), values)
        assert tensor.numpy().dtype == values.dtype
    if shard is not None:
        index = read_json(tmp_path / "model.safetensors.index.json")
        assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
        assert index["metadata"]["total_size"] == sum(values.nbytes for values in tensors.values())


@pytest.mark.parametrize("shard", [10**9, 40_000])
def test_written_models_load_in_transformers(shard: int, tmp_path: Path) -> None:
    config = tiny_config("qwen3", head_dim=16)
    original = save(random_model(config).bfloat16(), tmp_path / "original")
    sources, decoder = open_sources([original])
    tensors = dict(stored_tensors(load_stored(sources, decoder), decoder))
    assert {name: values.shape for name, values in tensors.items()} == tensor_shapes(decoder)
    copy = tmp_path / "copy"
    copy.mkdir()
    written(copy, tensors, max_shard_bytes=shard)
    assert (len(list(copy.glob("*.safetensors"))) > 1) == (shard < 10**9)
    (copy / "config.json").write_bytes((original / "config.json").read_bytes())
    one, other = load_torch(original).state_dict(), load_torch(copy).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert open_sources([copy])[1] == decoder


def test_writer_refuses_another_order_dtype_or_shape(tmp_path: Path) -> None:
    values = np.zeros((2, 3), np.float32)
    specs = {name: TensorSpec((2, 3), np.dtype(np.float32)) for name in "ab"}
    for name, wrong in (("b", values), ("a", values.astype(np.float64)), ("a", values.T)):
        with pytest.raises(RuntimeError), ShardWriter(tmp_path, specs) as writer:
            writer.write(name, wrong)
    with pytest.raises(RuntimeError, match="1 tensors were not written"), ShardWriter(tmp_path, specs) as writer:
        writer.write("a", values)


# ---------------------------------------------------------------------------------------------------------------
# Folders that appear complete or not at all


def test_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with atomic_folder(target) as work:
        (work / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_nothing_behind(failure: type[BaseException], existing: bool, tmp_path: Path) -> None:
    target = tmp_path / "folder"
    if existing:
        target.mkdir()
        (target / "file").write_text("old")
    # An error of the file system is the user's to put right; others pass through.
    raised = InputError if failure is OSError else failure

    def fail_halfway() -> None:
        with atomic_folder(target, overwrite=True) as work:
            (work / "file").write_text("half")
            raise failure

    with pytest.raises(raised):
        fail_halfway()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] * existing
    if existing:
        assert (target / "file").read_text() == "old"


def test_a_file_is_no_place_for_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "model.yaml"
    target.write_text("a user's")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is a file"), atomic_folder(target, overwrite=overwrite):
            pass
    assert target.read_text() == "a user's"


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "stale").write_text("old")
    with pytest.raises(InputError, match="exists already"), atomic_folder(target):
        pass
    assert (target / "stale").exists()
    with atomic_folder(target, overwrite=True) as work:
        (work / "file").write_text("new")
    assert [path.name for path in target.iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_failure_in_the_last_step_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "file").write_text("old")
    rename = os.rename

    def fail_on_the_new_folder(source: Path, destination: Path) -> None:
        if (Path(source) / "new").exists():
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_on_the_new_folder)

    def overwrite() -> None:
        with atomic_folder(target, overwrite=True) as work:
            (work / "new").write_text("new")

    with pytest.raises(Failed, match="Input/output error"):
        overwrite()
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_appears_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def write() -> None:
        with atomic_folder(target) as work:
            (work / "file").write_text("new")
            target.mkdir()
            (target / "file").write_text("another's")

    with pytest.raises(InputError, match="exists already"):
        write()
    assert (target / "file").read_text() == "another's"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# Starts to write over, or beside, `folder` and is killed: while it writes, between the two steps of the swap, and
# while it removes what was there.
KILLED = """
import os, shutil, signal, sys
from contextlib import nullcontext
from pathlib import Path
from evojax_merge.system import file_system
target, moment = Path(sys.argv[1]), sys.argv[2]
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if moment == "swapping":
    rename, calls = os.rename, []
    os.rename = lambda *names: (kill() if calls else None, calls.append(1), rename(*names))
if moment == "removing":
    before = file_system.recover
    file_system.recover = lambda target: kill() if (target / "new").exists() else before(target)
with file_system.atomic_folder(target, overwrite=True) as work:
    (work / "new").write_text("new")
    if moment == "writing":
        kill()
    if moment == "running":
        print("running", flush=True)
        sys.stdin.read()
"""


def killed(target: Path, moment: str) -> None:
    run_python(KILLED, target, moment, status=-signal.SIGKILL)


@pytest.mark.parametrize("moment", ["writing", "swapping", "removing"])
def test_what_a_killed_process_left_is_put_back_or_removed(moment: str, tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("old")
    # Names that are like ours, and a folder of another name.
    mine = [tmp_path / name for name in (".folder.old.0123abcd", ".folder", ".other.evojax-merge-new.0123abcd")]
    for path in mine:
        path.mkdir()
        (path / "file").write_text("mine")
    killed(target, moment)
    assert len(list(tmp_path.iterdir())) > len(mine) + (moment != "swapping")
    recover(target)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", *(path.name for path in mine)}
    assert [path.name for path in target.iterdir()] == ["new" if moment == "removing" else "old"]
    assert all((path / "file").read_text() == "mine" for path in mine)


def test_what_a_running_process_writes_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    command = [sys.executable, "-c", KILLED, target, "running"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (work,) = tmp_path.iterdir()
        recover(target)
        assert (work / "new").exists()
        other.communicate()
    assert other.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def model_of_ours(family: Family, folder: Path) -> Path:
    rows = [{"model": str(path), "parameters": {"weight": 1}} for path in family.parents]
    recipe = write_yaml(folder.parent / "recipe.yaml", {"merge_method": "linear", "models": rows})
    merge_to(prepare_merge(read_recipe(recipe)), folder, card=merge_card("name", ["linear"], {}, "recipe"))
    return folder


@pytest.mark.parametrize("kind", ["empty", "ours", "copied", "linked", "of a tokenizer's making", "without a marker"])
def test_what_this_program_wrote_may_be_replaced(kind: str, family: Family, tmp_path: Path) -> None:
    target = tmp_path / "folder"
    if kind == "empty":
        target.mkdir()
    elif kind == "linked":
        target.symlink_to(model_of_ours(family, tmp_path / "place"))
    else:
        model_of_ours(family, target)
    if kind == "copied":
        # Times are lost.
        target = Path(shutil.copytree(target, tmp_path / "copy", copy_function=shutil.copyfile))
    elif kind == "of a tokenizer's making":
        (target / "additional_chat_templates").mkdir()
        (target / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
        (target / MARKER).unlink()
        write_marker(target)
    elif kind == "without a marker":
        (target / MARKER).unlink()
    check_output(target, [family.base, *family.parents])
    with atomic_folder(target, overwrite=True, check=lambda: check_output(target, [family.base])) as work:
        (work / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    # A link still leads to where it led.
    assert target.is_symlink() == (kind == "linked")


@pytest.mark.parametrize("overwrite", [False, True])
def test_overwrite_is_suggested_for_a_folder_that_it_would_replace_alone(
    family: Family, tmp_path: Path, overwrite: bool
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes\.txt', which evojax-merge did not write; choose"):
        check_new_model(mine, overwrite, [])
    ours = model_of_ours(family, tmp_path / "ours")
    with pytest.raises(InputError, match="which this command reads; choose another folder"):
        check_new_model(ours, overwrite, [ours])
    with nullcontext() if overwrite else pytest.raises(InputError, match=r"exists already; .* or pass --overwrite"):
        check_new_model(ours, overwrite, [family.base])


def test_runs_and_models_are_no_place_for_a_model(family: Family, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    (run / "best").mkdir(parents=True)
    for name in ("config.yaml", "history.jsonl"):
        (run / name).touch()
    (tmp_path / "models").mkdir()
    model_of_ours(family, tmp_path / "models" / "one")
    for place, says in (
        (run, "is a run of a search; choose another folder"),
        (run.parent, "holds 'one', a run of a search; choose another folder"),
        (tmp_path / "models", "holds 'one', a model; choose another folder"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            check_new_model(place, True, [])
        assert "did not write" not in str(caught.value)


def test_what_a_user_adds_during_a_merge_is_kept(family: Family, tmp_path: Path) -> None:
    target = model_of_ours(family, tmp_path / "folder")

    def write() -> None:
        with atomic_folder(target, overwrite=True, check=lambda: check_output(target, [])) as work:
            (work / "new").write_text("new")
            (target / "notes.txt").write_text("mine")

    with pytest.raises(InputError, match=r"holds 'notes\.txt', which evojax-merge did not write"):
        write()
    assert (target / "notes.txt").read_text() == "mine"


def test_an_error_s_text_is_one_line_that_can_be_printed() -> None:
    for text, shown in (
        ("a\nb\r\x1b[2J\x00", "a\\nb\\r\\x1b[2J\\x00"), ("\ud800", "\\ud800"), ("\u2028\u202e", "\\u2028\\u202e"),
        ("日本語　é 🙂", "日本語　é 🙂"),
    ):  # fmt: skip
        assert str(InputError("file", text)) == f"file: {shown}"
        str(InputError("file", text)).encode()
    long = str(InputError("file", "\x1b" * 10**6 + "; do this"))
    assert len(long) <= 1000
    assert long.startswith("file: \\x1b")
    assert long.endswith("; do this")


def test_atomic_write_replaces_or_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    atomic_write(target, "one")
    atomic_write(target, "two")
    assert target.read_text() == "two"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(Failed, match="No space left"):
        atomic_write(target, "three")
    assert target.read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------------------------------------------------------
# Vocabularies


def test_rows_are_aligned_by_token(tmp_path: Path) -> None:
    """With a tokenizer source, row i of every source is the row of the source tokenizer's token i."""
    model = random_model(tiny_config())
    tokens, order = words(), np.random.default_rng(0).permutation(64)
    one = save(model, tmp_path / "one", tokens)
    shuffled = finetune(model, 1)
    embedding, head = shuffled.get_input_embeddings().weight, shuffled.get_output_embeddings().weight
    unshuffled = embedding.detach().numpy().copy(), head.detach().numpy().copy()
    with torch.no_grad():
        embedding.copy_(embedding[order].clone())
        head.copy_(head[order].clone())
    other = save(shuffled, tmp_path / "other", [tokens[i] for i in order])
    assert word_tokenizer(tokens).get_vocab() != word_tokenizer([tokens[i] for i in order]).get_vocab()

    (warning,) = open_sources([one, other])[0].warnings
    assert "tokenizer_source" in warning
    bank = load_bank(*open_sources([one, other], TokenizerChoice(0)), spec_of("linear"))
    np.testing.assert_array_equal(np.asarray(bank.shared["embed"].sources[1]), unshuffled[0])
    np.testing.assert_array_equal(np.asarray(bank.shared["head"].sources[1]), unshuffled[1])
    np.testing.assert_array_equal(np.asarray(bank.shared["embed"].sources[0]), state(one)["model.embed_tokens.weight"])
    # The other way round, both come in the other's order.
    bank = load_bank(*open_sources([one, other], TokenizerChoice(1)), spec_of("linear"))
    np.testing.assert_array_equal(np.asarray(bank.shared["embed"].sources[1]), unshuffled[0][order])
    np.testing.assert_array_equal(
        np.asarray(bank.shared["embed"].sources[0]), state(one)["model.embed_tokens.weight"][order]
    )


# ---------------------------------------------------------------------------------------------------------------
# Folders and repositories that hold more than a model


BESIDE = (
    "original/consolidated.00.pth", "original/params.json", "onnx/model.safetensors", "model.fp16.gguf", "README.md",
    "consolidated.00.pth", "consolidated.safetensors", "consolidated-00001-of-00001.safetensors", "metal/model.bin",
    "openvino/config.json", "coreml/model.mlpackage", "pytorch_model.bin", "model.onnx", "params.json",
)  # fmt: skip


def _with_files_beside(folder: Path) -> Path:
    for name in BESIDE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no tensors")
    return folder


def download(
    repository: Path, cache: Path, revisions: list[str | None], name: str, *, revision: str | None, **patterns: Any
) -> str:
    """huggingface_hub's download of a repository that lies here."""
    from huggingface_hub.utils import filter_repo_objects

    assert name == "owner/name"
    revisions.append(revision)
    names = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
    if not (files := [*filter_repo_objects(names, **patterns)]):
        logging.getLogger("huggingface_hub").warning("No files matched %s", patterns)
    for file in files:
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(repository / file, cache / file)
    return str(cache)


@pytest.mark.parametrize("layout", ["single", "sharded", "single and an index that is left of shards", "another name"])
def test_a_repository_gives_the_model_and_nothing_else(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only what is read is downloaded, from one commit, and for its tokenizer no weights; a folder with everything in
    it opens as the same model."""

    model = random_model(tiny_config())
    repository = _with_files_beside(
        save(model, tmp_path / "repository", max_shard_size="30KB" if layout == "sharded" else "1GB")
    )
    weights = {path.name for path in repository.glob("model*.safetensors")}
    assert (len(weights) > 1) == (layout == "sharded")
    if "index" in layout:
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        write_json(repository / "model.safetensors.index.json", index)
    if layout == "another name":
        (repository / "model.safetensors").rename(repository / "weights.safetensors")
        weights = {"weights.safetensors"}
    cache = tmp_path / "snapshots" / ("0123456789abcdef" * 3)[:40]
    revisions = []

    monkeypatch.setattr("huggingface_hub.snapshot_download", partial(download, repository, cache, revisions))
    small = resolve("MODELS", "owner/name@main", tmp_path, weights=False)
    assert (small / "tokenizer.json").exists() and not list(small.glob("*.safetensors"))
    revisions.clear()
    found = resolve("MODELS", "owner/name@main", tmp_path)
    assert set(revisions[1:]) == {cache.name} and revisions[0] == "main"
    files = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert files & set(BESIDE) == {"params.json", "README.md"}
    assert {file for file in files if file.endswith(".safetensors")} == weights
    assert ("No files matched" in caplog.text) == (layout == "another name")
    expected = {name: values.shape for name, values in model.state_dict().items()}
    for folder in (found, repository):
        assert {name: entry.shape for name, entry in open_folder(folder).entries.items()} == expected


def test_a_repository_of_diffusers_has_its_components_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_generators import make_ddpm

    repository, cache = make_ddpm(tmp_path / "repository", 0), tmp_path / "snapshots" / ("0123456789abcdef" * 3)[:40]
    weights = repository / "unet" / "diffusion_pytorch_model.safetensors"
    beside = [weights.with_suffix(suffix) for suffix in (".bin", ".fp16.safetensors", ".non_ema.safetensors")]
    for file in [*beside, repository / "whole.safetensors"]:
        file.write_bytes(b"0")

    monkeypatch.setattr("huggingface_hub.snapshot_download", partial(download, repository, cache, []))
    folder = resolve("MODELS", "owner/name", tmp_path)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip


def test_a_repository_in_the_hubs_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    save(random_model(tiny_config()), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for reference in ("owner/name", "owner/name@main", f"owner/name@{commit}"):
        _, config = open_sources([resolve("MODELS", reference, tmp_path)])
        assert config.layers == 3
    with pytest.raises(
        InputError, match=r"owner/other: no such folder, and the hub did not give it \(.*HF_HUB_OFFLINE"
    ):
        resolve("MODELS", "owner/other", tmp_path)


def test_a_model_that_is_nowhere_says_that_there_is_no_network_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> str:
        try:
            raise socket.gaierror(-2, "Name or service not known")
        except socket.gaierror as error:
            raise OSError("Got: ConnectError: [Errno -2]\nPlease check your connection") from error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError) as caught:
        resolve("parents", "owner/name", tmp_path)
    assert "no network reaches https://huggingface.co: [Errno -2] Name or service not known" in str(caught.value)
    assert str(caught.value).endswith("check the name, or give the path of a model folder on this machine")


# ---------------------------------------------------------------------------------------------------------------
# Models that differ in what need not be alike


def test_rows_padded_differently_are_aligned_by_token(tmp_path: Path) -> None:
    """One tokenizer, but a trainer has rounded the number of rows up: aligned by token, it is the same model."""
    small = save(random_model(tiny_config(vocab_size=60)), tmp_path / "small")
    model = random_model(tiny_config(vocab_size=64), seed=1)
    padded = save(model, tmp_path / "padded", words(60))
    for order in ([small, padded], [padded, small]):
        with pytest.raises(InputError, match="say tokenizer_source: base"):
            open_sources(order)
        sources, config = open_sources(order, TokenizerChoice(0))
        assert config.vocab == 60
        rows = sources.read(order.index(padded), "model.embed_tokens.weight")
        np.testing.assert_array_equal(rows, model.get_input_embeddings().weight.detach().numpy()[:60])


def test_the_shortest_context_of_all_models_counts(tmp_path: Path) -> None:
    paths = []
    for positions in (256, 64, 128):
        paths.append(save(random_model(tiny_config(max_position_embeddings=positions)), tmp_path / str(positions)))
    sources, _ = open_sources(paths)
    assert context_length(sources.folders) == 64


# ---------------------------------------------------------------------------------------------------------------
# What ends a generation


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({}, {}, (2,)),
        ({"eos_token_id": 7}, {"eos_token_id": 5}, (2, 7)),
        ({"eos_token_id": [7, 9, 2]}, {}, (2, 7, 9)),
        ({"eos_token_id": None}, {"eos_token_id": [5]}, (2, 5)),
        # What is not read may be anything, as for transformers.
        ({"eos_token_id": 7, "temperature": "hot", "top_p": [], "cache_implementation": {"a": 1}}, {}, (2, 7)),
        (None, {"eos_token_id": 5}, (2, 5)),
        (None, {"eos_token_id": None}, (2,)),
    ],
)
def test_stop_tokens(generation: Any, config: dict[str, Any], expected: tuple[int, ...], tmp_path: Path) -> None:
    save(random_model(tiny_config()), tmp_path)
    edit_json(tmp_path / "config.json", lambda document: document.update(config))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
    assert stop_tokens(tmp_path, load_tokenizer(tmp_path)) == expected


# ---------------------------------------------------------------------------------------------------------------
# Files of others


def write_safetensors(file: Path, rows: dict[str, Any], data: bytes) -> Path:
    header = json.dumps(rows).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


def row_of(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_unusual_files_that_are_right_are_read(tmp_path: Path) -> None:
    """Metadata of null, tensors without values and without axes, data that is not aligned, rows in any order."""
    rows = {
        "__metadata__": None,
        "last": row_of("F32", [2], 5, 13),
        "scalar": row_of("BF16", [], 1, 3),
        "none": row_of("F32", [0, 7], 13, 13),
        "byte": row_of("U8", [1], 0, 1),
        "half": row_of("F16", [1], 3, 5),
    }
    values = np.array([1.5, -2.5], np.float32).tobytes()
    scalar, half = np.array(3.0, ml_dtypes.bfloat16).tobytes(), np.array(0.5, np.float16).tobytes()
    write_safetensors(tmp_path / "model.safetensors", rows, b"\7" + scalar + half + values)
    folder = open_folder(tmp_path)
    assert folder.entries.keys() == rows.keys() - {"__metadata__"}
    np.testing.assert_array_equal(folder.read("last"), [1.5, -2.5])
    assert folder.read("scalar") == 3 and folder.read("half") == 0.5
    assert folder.read("none").shape == (0, 7) and folder.read("byte").tolist() == [7]


def test_tensors_that_an_index_forgets_are_read_as_by_transformers(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    folder = save(model, tmp_path / "model", **SHARDED)
    index = folder / "model.safetensors.index.json"
    content = read_json(index)
    content["weight_map"].pop("model.norm.weight")
    write_json(index, content)
    assert len(set(content["weight_map"].values())) > 2
    theirs = load_torch(folder).state_dict()["model.norm.weight"].numpy()
    np.testing.assert_array_equal(open_folder(folder).read("model.norm.weight"), theirs)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE + 3])
def test_values_that_are_not_finite_are_found_wherever_they_are(dtype: Any, size: int) -> None:
    # What is wider than float32 must be finite in it.
    limits = ml_dtypes.finfo(dtype if dtype != np.float64 else np.float32)
    finite = np.resize(np.array([0.0, -0.0, 1.0, limits.max, limits.min, limits.smallest_subnormal], dtype), size)
    into = np.empty_like(finite)
    assert is_finite(finite) and copy_finite(finite, into)
    np.testing.assert_array_equal(into.view(np.uint8), finite.view(np.uint8))
    for place in {0, size // 2, size - 1} if size else ():
        beyond = [1e39, -1e300] if dtype == np.float64 else []
        for value in (np.nan, -np.nan, np.inf, -np.inf, *beyond):
            broken = finite.copy()
            broken[place] = value
            assert not is_finite(broken)
            assert not copy_finite(broken.reshape(1, -1), into.reshape(1, -1))
    wide = np.empty(size, np.float32)
    assert copy_finite(np.ones(size, dtype), wide) and (wide == 1).all()


def test_code_of_a_tokenizer_is_not_run_where_its_file_says_the_same(tmp_path: Path) -> None:
    folder = save(random_model(tiny_config()), tmp_path / "model")
    expected = load_tokenizer(folder)
    settings = folder / "tokenizer_config.json"
    content = read_json(settings) | {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    write_json(settings, content | {"tokenizer_class": "Mine"})
    (folder / "mine.py").write_text("raise SystemExit('run')")
    found = load_tokenizer(folder)
    assert found.get_vocab() == expected.get_vocab()
    assert found("w4 w5 </s>") == expected("w4 w5 </s>") and found.eos_token_id == expected.eos_token_id
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: auto_map: .*mine\.Mine.* custom code"):
        load_tokenizer(folder)


def test_a_tokenizer_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    folder = save(random_model(tiny_config()), tmp_path / "model")
    os.truncate(folder / "tokenizer.json", 2**40)
    for read in (load_tokenizer, lambda folder: vocabulary_warnings([folder, folder])):
        with pytest.raises(InputError, match=r"tokenizer\.json: has 1,099,511,627,776 bytes"):
            read(folder)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that is no disk")
def test_a_place_on_no_disk_is_not_called_full() -> None:
    with pytest.raises(InputError, match="/proc/merged: cannot be written: /proc is on no disk"):
        require_space(Path("/proc/merged"), 1)


def test_a_stored_head_that_differs_is_the_head_though_the_config_ties_it(tmp_path: Path) -> None:
    """transformers takes it as well; a copy of the embedding is none of its own, and is it where it is alone."""
    folder = save(random_model(tiny_config(tie_word_embeddings=True)), tmp_path / "model", words())
    tensors, tokens = load_file(folder / "model.safetensors"), np.arange(3, 12)[None]
    for factor, left_out in ((1, ""), (2, ""), (1, "model.embed_tokens.weight")):
        stored = tensors | {"lm_head.weight": factor * tensors["model.embed_tokens.weight"]}
        stored.pop(left_out, None)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        expected = torch_logits(load_torch(folder), tokens)
        np.testing.assert_allclose(stored_logits(folder, tokens), expected, atol=1e-4)
        run_here(*linear_merge(tmp_path, folder), "--overwrite")
        np.testing.assert_allclose(torch_logits(load_torch(tmp_path / "out"), tokens), expected, atol=1e-4)
        assert read_json(tmp_path / "out/config.json")["tie_word_embeddings"] == (factor == 1)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("checkpoint-500/model.safetensors", "did you mean {path}/checkpoint-500?"),
        ("checkpoint-500/adapter_config.json", "did you mean {path}/checkpoint-500?"),
        ("snapshots/0a1b/model.safetensors.index.json", "did you mean {path}/snapshots/0a1b?"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "accelerate merge-weights"),
        ("notes/readme.txt", "expected safetensors weights"),
    ],
)
def test_a_folder_without_weights_names_those_inside_of_it(place: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    with pytest.raises(InputError, match=re.escape(says.format(path=tmp_path))):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("inside", "wrapper", "says"),
    [
        ("", "module.", "begin with 'module.'"),
        ("", "_orig_mod.", "begin with '_orig_mod.'"),
        ("", "module._orig_mod.", "begin with 'module._orig_mod.'"),
        ("", "_fsdp_wrapped_module.", "begin with '_fsdp_wrapped_module.'"),
        ("", "base_model.model.", "begin with 'base_model.model.'"),
        ("model.layers.0.", "_orig_mod.", "hold '_orig_mod.'"),
    ],
)
def test_names_of_a_wrapper_are_named(inside: str, wrapper: str, says: str, family: Family, tmp_path: Path) -> None:
    shutil.copytree(family.base, tmp_path / "model")
    tensors = load_file(family.base / "model.safetensors")
    wrapped = {
        inside + wrapper + name.removeprefix(inside) if name.startswith(inside) else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(wrapped, tmp_path / "model/model.safetensors")
    assert_refused([says, "torch.compile"], *linear_merge(tmp_path, tmp_path / "model"))
