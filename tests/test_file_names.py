"""GPT-2 and GPT-NeoX as their files are: with and without a prefix, with buffers, with another name of the head."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from helpers.commands import command
from helpers.decoders import stored_logits
from helpers.files import edit_json, write_lines, write_yaml
from helpers.models import finetune, load_torch, random_model, save
from reference.torch_models import torch_logits
from safetensors.numpy import load_file, save_file

from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources

GPT2 = {"vocab_size": 64, "n_embd": 32, "n_inner": 40, "n_layer": 3, "n_head": 4, "n_positions": 20}
NEOX = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 96,
}  # fmt: skip
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2(**changes: Any) -> Any:
    return transformers.GPT2Config(**GPT2 | SPECIAL | changes)


def neox(**changes: Any) -> Any:
    return transformers.GPTNeoXConfig(**NEOX | SPECIAL | changes)


def tokens_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 64, (2, 11)).astype(np.int32)


def change_tensors(folder: Path, change: Any) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def as_openais(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """GPT-2 as it is on the hub: without the prefix, and with the causal masks."""
    masks = {f"h.{i}.attn.bias": np.tri(20, dtype=np.float32)[None, None] for i in range(3)}
    masks |= {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(3)}
    return {name.removeprefix("transformer."): values for name, values in tensors.items()} | masks


def as_pythias(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """GPT-NeoX as Pythia's files have it."""
    layers = [f"gpt_neox.layers.{i}.attention" for i in range(2)]
    buffers = {f"{layer}.bias": np.tri(96, dtype=bool)[None, None] for layer in layers}
    buffers |= {f"{layer}.masked_bias": np.array(-1e9, np.float32) for layer in layers}
    buffers |= {f"{layer}.rotary_emb.inv_freq": np.ones(2, np.float32) for layer in layers}
    return {name.replace("lm_head.", "embed_out."): values for name, values in tensors.items()} | buffers


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (gpt2(), as_openais),
        (gpt2(tie_word_embeddings=False), as_openais),
        (neox(), as_pythias),
        (neox(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True), as_pythias),
    ],
    ids=["gpt2", "gpt2 untied", "gpt_neox", "gpt_neox one after the other, tied, no biases"],
)
def test_names_and_buffers_do_not_matter(config: Any, change: Any, tmp_path: Path) -> None:
    save(random_model(config, std=0.3), tmp_path)
    expected = torch_logits(load_torch(tmp_path), tokens_of(0))
    np.testing.assert_allclose(stored_logits(tmp_path, tokens_of(0)), expected, atol=1e-4)
    change_tensors(tmp_path, change)
    np.testing.assert_allclose(stored_logits(tmp_path, tokens_of(0)), expected, atol=1e-4)


@pytest.mark.parametrize("first", ["plain", "prefixed"])
def test_the_names_are_those_of_the_first_models_file(first: str, tmp_path: Path) -> None:
    model = random_model(gpt2(), std=0.3)
    for seed, name in enumerate(("plain", "prefixed")):
        save(finetune(model, seed), tmp_path / name)
    change_tensors(tmp_path / "plain", as_openais)
    names = [first, *({"plain", "prefixed"} - {first})]
    recipe = {
        "merge_method": "slerp", "base_model": str(tmp_path / first), "parameters": {"t": 0.4}, "dtype": "float32",
        "slices": [{"sources": [{"model": str(tmp_path / name), "layer_range": [0, 3]} for name in names]}],
    }  # fmt: skip
    assert command("merge", write_yaml(tmp_path / "recipe.yaml", recipe), tmp_path / "out") == 0
    merged, parent = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / first / "model.safetensors")
    assert merged.keys() == {name for name in parent if not name.endswith((".attn.bias", ".masked_bias"))}
    tokens = tokens_of(1)
    np.testing.assert_allclose(
        stored_logits(tmp_path / "out", tokens), torch_logits(load_torch(tmp_path / "out"), tokens), atol=1e-4
    )


def test_no_row_is_longer_than_there_are_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever else its config says."""
    save(random_model(gpt2()), tmp_path / "model")
    edit_json(tmp_path / "model/config.json", lambda config: config.update(max_position_embeddings=100))
    task = {"name": "text", "kind": "likelihood", "file": "tasks.jsonl"}
    write_yaml(tmp_path / "tasks.yaml", {"tasks": [task]})
    # The last token is predicted, not read.
    write_lines(tmp_path / "tasks.jsonl", [{"prompt": "w5 " * 20, "target": "w6 w7"}])
    assert command("evaluate", tmp_path / "model", "--tasks", tmp_path / "tasks.yaml") == 2
    assert "22 tokens do not fit the models' context of 20" in capsys.readouterr().err


def test_models_of_both_names_have_one_bank(tmp_path: Path) -> None:
    model = random_model(gpt2())
    for seed, name in enumerate(("plain", "prefixed")):
        save(finetune(model, seed), tmp_path / name)
    change_tensors(tmp_path / "plain", as_openais)
    sources, config = open_sources([tmp_path / "plain", tmp_path / "prefixed"])
    for source, prefix in enumerate(("", "transformer.")):
        tensors = load_file(sources.folders[source].path / "model.safetensors")
        stored = load_stored(sources, config, source)
        found = stored.stacks["layers"]["qkv"][1]
        np.testing.assert_array_equal(found, tensors[f"{prefix}h.1.attn.c_attn.weight"])
        np.testing.assert_array_equal(stored.shared["positions"], tensors[f"{prefix}wpe.weight"])
