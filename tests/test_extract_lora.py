"""Adapters that are extracted from fine-tunes: mergekit's where these are right, and all of them loaded by peft."""

import contextlib
import io
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers.commands import refusal, run_here
from helpers.families import Family
from helpers.files import read_json, write_yaml
from helpers.models import VOCAB, finetune, load_torch, random_model, save, state, tiny_config
from helpers.searches import task_section
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

import evojax_merge as em
from evojax_merge.checkpoints.derived import open_model, resolve_model
from evojax_merge.mergekit.as_adapter import AdapterOptions, singular_values

TOKENS = torch.arange(3, 23)[None] % VOCAB


def pair(kind: str, root: Path, **changes: Any) -> tuple[Path, Path]:
    """A base and its fine-tune."""
    if kind == "gpt2":
        sizes = {"n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": VOCAB}
        model = random_model(GPT2Config(**sizes, **changes))
    else:
        model = random_model(tiny_config(kind, **changes))
    return save(model, root / "base"), save(finetune(model, 1), root / "tuned")


def extracted(root: Path, *options: object) -> str:
    done = run_here("extract-lora", root / "tuned", root / "out", "--base", root / "base", *options)
    return done.stdout + done.stderr


def by_mergekit(root: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """mergekit's adapter; its card would ask the hub for names."""
    from mergekit.scripts import extract_lora

    extract_lora.generate_card_lora = lambda *args, **kwargs: ""
    arguments = ["--model", root / "tuned", "--base-model", root / "base", "--out-path", out]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        arguments += [option] if value is True else [f"--no-{option[2:]}"] if value is False else [option, value]
    with contextlib.redirect_stderr(io.StringIO()):
        extract_lora.main([*map(str, arguments)], standalone_mode=False)
    return load_file(out / "adapter_model.safetensors")


def with_peft(root: Path, merge: bool = False) -> Any:
    """The base with the adapter; a warning about keys that peft leaves out is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        model = peft.PeftModel.from_pretrained(load_torch(root / "base"), root / "out").eval()
    return model.merge_and_unload() if merge else model


def products(adapter: dict[str, Any]) -> dict[str, torch.Tensor]:
    """B A of each adapted module, and the other tensors."""
    out = {name: values for name, values in adapter.items() if "lora_" not in name}
    for name, b in adapter.items():
        if name.endswith("lora_B.weight"):
            out[name.removesuffix(".lora_B.weight")] = b @ adapter[name.replace("lora_B", "lora_A")]
        elif name.endswith("lora_embedding_B"):
            out[name.removesuffix(".lora_embedding_B")] = b @ adapter[name.replace("_B", "_A")]
    return out


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}, {"max_rank": 8}),
    "llama, embed-lora": ("llama", {"tie_word_embeddings": False}, {"max_rank": 8, "embed_lora": True}),
    "not distributed": ("llama", {"tie_word_embeddings": False}, {"max_rank": 4, "distribute_scale": False}),
    "a threshold": ("qwen3", {"tie_word_embeddings": False}, {"max_rank": 16, "sv_epsilon": 0.3}),
    "full rank": ("mistral", {}, {"max_rank": 128}),
    "included": ("llama", {"tie_word_embeddings": False}, {"max_rank": 8, "include_regex": "mlp"}),
    "excluded": ("llama", {"tie_word_embeddings": False}, {"max_rank": 8, "exclude_regex": r"layers\.1\.mlp|q_proj"}),
    "no norms": ("llama", {"tie_word_embeddings": False}, {"max_rank": 8, "skip_undecomposable": True}),
    "biases": ("qwen2", {"tie_word_embeddings": False}, {"max_rank": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_mergekits_and_peft_loads_all(case: str, tmp_path: Path) -> None:
    kind, changes, options = CASES[case]
    pair(kind, tmp_path, **changes)
    flags: list[object] = []
    for name, value in options.items():
        option = name.replace("_", "-")
        flags += [f"--{option}"] if value is True else [f"--no-{option}"] if value is False else [f"--{option}", value]
    said = extracted(tmp_path, *flags)
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    theirs = by_mergekit(tmp_path, tmp_path / "theirs", **options)
    # mergekit writes the changes of biases beside the factors, where peft reads them with lora_bias alone.
    for name in [name for name in theirs if name.endswith("lora_B.bias")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.bias")
        bias = ours.pop(name.replace("lora_B", "base_layer"))
        change = bias - load_file(tmp_path / "base" / "model.safetensors")[f"{module}.bias"]
        torch.testing.assert_close(change, theirs.pop(name), rtol=1e-5, atol=1e-6)
    found, expected = products(ours), products(theirs)
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=2e-5, msg=name)
    if not options.get("distribute_scale", True):
        name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
        torch.testing.assert_close(ours[name].norm(dim=0), torch.ones(4))
    # peft, attached and merged in, computes what the tensors say.
    attached, merged = (with_peft(tmp_path, merge)(TOKENS).logits for merge in (False, True))
    torch.testing.assert_close(attached, merged, rtol=1e-4, atol=1e-4)
    tuned, start = (load_torch(tmp_path / name)(TOKENS).logits for name in ("tuned", "base"))
    left_out = float(re.search(r"\(Frobenius norm\): ([\d.]+)%", said)[1])
    if case == "full rank":
        assert left_out < 0.01
        torch.testing.assert_close(merged, tuned, rtol=1e-3, atol=1e-3)
    else:
        assert (merged - tuned).norm() < (start - tuned).norm()
    # The program itself reads what peft reads.
    folder = open_model(resolve_model("test", f"{tmp_path / 'base'}+{tmp_path / 'out'}", tmp_path))
    own, by_peft = {n: np.array(folder.read(n)) for n in folder.entries}, with_peft(tmp_path, True).state_dict()
    for name, values in own.items():
        np.testing.assert_allclose(values, by_peft[name].numpy(), rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("embed_lora", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "llama"])
def test_biases_and_tied_heads_arrive(kind: str, embed_lora: bool, tmp_path: Path) -> None:
    """At full rank the adapted base is the fine-tune: biases in modules beside others without, embeddings that are
    the head, positions, transposed weights."""
    pair(kind, tmp_path, tie_word_embeddings=True)
    extracted(tmp_path, "--max-rank", 64, *(["--embed-lora"] if embed_lora else []))
    merged = with_peft(tmp_path, merge=True)
    expected = load_torch(tmp_path / "tuned")
    torch.testing.assert_close(merged(TOKENS).logits, expected(TOKENS).logits, rtol=1e-3, atol=1e-3)
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert config["bias"] == ("none" if kind == "llama" else "all") and "lora_bias" not in config
    if not embed_lora:
        attached = with_peft(tmp_path)
        torch.testing.assert_close(attached(TOKENS).logits, expected(TOKENS).logits, rtol=1e-3, atol=1e-3)


def test_modules_that_are_saved_whole_are_the_fine_tunes(tmp_path: Path) -> None:
    """mergekit's --save-module ends in an AttributeError."""
    _, tuned = pair("llama", tmp_path, tie_word_embeddings=False)
    extracted(tmp_path, "--max-rank", 2, "--save-module", "down_proj", "--save-module", "model.layers.1.mlp.up_proj")
    merged, expected = with_peft(tmp_path, merge=True).state_dict(), state(tuned)
    whole = {"model.layers.1.mlp.up_proj.weight", *(f"model.layers.{i}.mlp.down_proj.weight" for i in range(3))}
    for name, values in expected.items():
        of_matrix = values.ndim == 2 and "embed" not in name and "lm_head" not in name
        assert np.allclose(merged[name], values, atol=1e-6) == (not of_matrix or name in whole), name


def test_lora_bias_would_not_do(tmp_path: Path) -> None:
    """peft cannot merge an adapter with `lora_bias` where a module has no bias, as in a Qwen2, nor adapt embeddings."""
    base, _ = pair("qwen2", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], lora_bias=True, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, config)
    with pytest.raises(RuntimeError, match="no bias"):
        tuned.merge_and_unload()
    config = peft.LoraConfig(target_modules=["embed_tokens"], lora_bias=True, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match="lora_bias"):
        peft.get_peft_model(model, config)


def test_ranks_by_energy_are_the_least_that_keep_the_share(tmp_path: Path) -> None:
    base, tuned = pair("llama", tmp_path, tie_word_embeddings=False)
    said = extracted(tmp_path, "--energy", 0.8)
    start, end = state(base), state(tuned)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = read_json(tmp_path / "out" / "adapter_config.json")
    ranks = set()
    for key, a in adapter.items():
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        name = f"{module}.weight"
        squares = np.linalg.svd((end[name] - start[name]).astype(np.float64))[1] ** 2
        rank = int(np.searchsorted(np.cumsum(squares) / squares.sum(), 0.8) + 1)
        assert len(a) == rank == config["rank_pattern"].get(module, config["r"])
        assert config["alpha_pattern"].get(module, config["lora_alpha"]) == rank
        ranks.add(rank)
    assert len(ranks) > 1 and f"ranks {min(ranks)} to {max(ranks)}" in said
    for layer in ("layer 0", "layer 1", "layer 2"):
        assert re.search(rf"{layer}\W+0\.4", said), said
    assert "## Left out by layer" in (tmp_path / "out" / "README.md").read_text()
    with_peft(tmp_path)


def test_singular_vectors_of_large_matrices_leave_out_hardly_more_than_the_least() -> None:
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(320, 320)))[0] for _ in range(2))
    for power in (0.0, 0.3, 1.0):
        sizes = np.arange(1, 321.0) ** -power
        matrix = ((u * sizes) @ v.T).astype(np.float32)
        left, found, right = singular_values(matrix, 8)
        assert np.linalg.norm(matrix - (left * found) @ right) < 1.002 * np.linalg.norm(sizes[8:])
        np.testing.assert_allclose(left.T @ left, np.eye(8), atol=1e-5)
        np.testing.assert_array_equal(singular_values(matrix, 8)[1], found)
    a, b = AdapterOptions(8).factors(matrix)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-4)


def test_the_adapter_is_scored_where_tasks_are_given(family: Family, tmp_path: Path) -> None:
    tasks = write_yaml(tmp_path / "tasks.yaml", {"tasks": [task_section(family.tasks)]})
    options = ("--base", family.base, "--max-rank", 4, "--tasks", tasks)
    said = run_here("extract-lora", family.parents[0], tmp_path / "lora", *options).stdout
    assert "wrote" in said and "lora" in said and "fitness" in said
    # A log-probability and an accuracy have no mean.
    both = [task_section(family.tasks), task_section(family.tasks, name="right", kind="exact_match", max_new_tokens=2)]
    write_yaml(tasks, {"tasks": both})
    printed = run_here("evaluate", family.parents[0], "--tasks", tasks).stdout
    assert "accuracy" in printed and "fitness" not in printed
    write_yaml(tasks, {"tasks": [both[0], both[1] | {"weight": 0}]})
    assert "fitness" in run_here("evaluate", family.parents[0], "--tasks", tasks).stdout


def test_python_extracts_as_the_command_does(tmp_path: Path) -> None:
    base, tuned = pair("llama", tmp_path)
    extracted(tmp_path, "--max-rank", 4, "-e", "mlp", "--no-distribute-scale")
    out = em.extract_lora(
        tuned, tmp_path / "again", base=base, max_rank=4, exclude_regex=["mlp"], distribute_scale=False
    )
    first, second = (folder / "adapter_model.safetensors" for folder in (tmp_path / "out", out))
    assert first.read_bytes() == second.read_bytes()
    with pytest.warns(UserWarning, match="was it made from this base"):
        em.extract_lora(save(random_model(tiny_config(), 7), tmp_path / "other"), tmp_path / "far", base=base)


def test_models_that_make_no_adapter_are_refused(tmp_path: Path) -> None:
    base, tuned = pair("llama", tmp_path)
    save(random_model(tiny_config("llama", num_hidden_layers=2)), tmp_path / "short")
    save(random_model(tiny_config("qwen2")), tmp_path / "other")
    save(random_model(tiny_config("llama", vocab_size=VOCAB + 6)), tmp_path / "more tokens")
    save(random_model(tiny_config("llama", tie_word_embeddings=True)), tmp_path / "tied")
    shutil.copytree(base, tmp_path / "copy")
    for model, options, says in (
        (tmp_path / "copy", (), "no matrix differs"),
        (base, (), "is its own base"),
        (tmp_path / "short", (), "models of different widths cannot be merged; `evojax-merge inspect`"),
        (tmp_path / "other", (), "(merge --allow-crimes merges them"),
        (
            tmp_path / "more tokens",
            (),
            "save a copy of the base with 70 rows (transformers' resize_token_embeddings(",
        ),
        (base, ("--base", tmp_path / "tied"), "save a copy of the base with a head of its own"),
        (tuned, ("--include-regex", "("), "--include-regex: the pattern '(' is not a regular expression"),
        (tuned, ("--energy", "1.5"), "--energy"),
        (tuned, ("--max-rank", "0"), "--max-rank"),
        (tmp_path / "missing", (), "missing"),
    ):
        line = refusal("extract-lora", model, tmp_path / "out", "--base", base, *options)
        assert says in line, line
        assert not (tmp_path / "out").exists()
