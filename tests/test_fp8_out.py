"""Folders in FP8, with scales as compressed-tensors keeps them."""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.commands import refusal, run_here
from helpers.files import read_json, write_yaml
from helpers.models import random_model, save, state, tiny_config
from safetensors.torch import load_file

from evojax_merge.checkpoints.derived import open_model, resolve_model
from evojax_merge.mergekit.as_fp8 import LARGEST, scaled_to_fp8


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_folder_in_fp8_is_the_merge_to_its_rounding(kind: str, tmp_path: Path) -> None:
    folder = save(random_model(tiny_config(kind, tie_word_embeddings=False)), tmp_path / "model")
    models = [{"model": str(folder), "parameters": {"weight": 1.0}}]
    recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    path = write_yaml(tmp_path / "recipe.yaml", recipe)
    run_here("merge", path, tmp_path / "out", "--dtype", "float8_e4m3", "--shard-size", "100K")
    run_here("merge", path, tmp_path / "plain")
    stored, plain = {}, state(tmp_path / "plain")
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(file)
    scaled = {name for name in stored if name.endswith("weight_scale")}
    # torch reads the numbers as they were meant.
    for name, values in plain.items():
        found = stored[name].float()
        scale = stored.get(f"{name}_scale")
        if scale is None:
            np.testing.assert_array_equal(found.numpy(), values)
            continue
        assert stored[name].dtype == torch.float8_e4m3fn and scale.shape == (len(values), 1)
        close = (
            np.abs((found * scale.float()).numpy() - values) <= 2**-4 * np.abs(values) + scale.float().numpy() * 2**-9
        )
        assert close.all(), name
    layers = [
        name for name in plain if ".layers." in name and plain[name].ndim == 2 and not name.endswith("mlp.gate.weight")
    ]
    assert scaled == {f"{name}_scale" for name in layers}
    settings = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "float-quantized")
    ignored = {name.removesuffix(".weight") for name in plain if plain[name].ndim == 2 and name not in layers}
    assert set(settings["ignore"]) == ignored and "lm_head" in ignored
    # The program reads it as every folder of compressed-tensors.
    opened = open_model(resolve_model("test", str(tmp_path / "out"), tmp_path))
    for name in layers:
        product = stored[name].float() * stored[f"{name}_scale"].float()
        expected = product.numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.array(opened.read(name)).astype(np.float32), expected)


def test_scales_fit_the_largest_value_and_empty_rows() -> None:
    values = np.array([[1.0, -448.0, 3.0], [0.0, 0.0, 0.0], [1e-5, 2e-5, 0.0], [3e4, 1.0, 0.0]], np.float32)
    numbers, scale = scaled_to_fp8(values)
    assert np.isfinite(numbers.astype(np.float32)).all() and np.abs(numbers.astype(np.float32)).max() <= LARGEST
    np.testing.assert_allclose(numbers.astype(np.float32) * scale.astype(np.float32), values, rtol=0.07, atol=1e-7)


def test_fp8_is_for_folders_of_known_linear_modules(tmp_path: Path) -> None:
    from transformers import GPT2Config

    sizes = {"n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": 64}
    folder = save(random_model(GPT2Config(**sizes)), tmp_path / "gpt2")
    models = [{"model": str(folder), "parameters": {"weight": 1.0}}]
    recipe = write_yaml(tmp_path / "recipe.yaml", {"merge_method": "linear", "models": models})
    for out, says in ((tmp_path / "out", "no linear modules"), (tmp_path / "out.gguf", "--type q8_0")):
        assert says in refusal("merge", recipe, out, "--dtype", "float8_e4m3")
        assert not out.exists()


# What vLLM keeps as one matrix, by its module.
TOGETHER = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_vllm_loads_a_folder_in_fp8(kind: str, tmp_path: Path) -> None:
    """vLLM 0.33, whose wheel from PyPI is for CUDA, and needs an environment of its own."""
    pytest.importorskip("vllm", reason="needs vLLM")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "num_attention_heads": 2}
    config = tiny_config(kind, tie_word_embeddings=False, num_key_value_heads=1, **sizes)
    folder = save(random_model(config), tmp_path / "model")
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}], "dtype": "bfloat16"}
    path = write_yaml(tmp_path / "recipe.yaml", recipe)
    run_here("merge", path, tmp_path / "out", "--dtype", "float8_e4m3", "--no-copy-tokenizer")
    script = Path(__file__).parent / "reference/vllm_loading.py"
    command = [sys.executable, str(script), str(tmp_path / "out"), str(tmp_path / "loaded.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "CompressedTensorsW8A8Fp8"
    stored, loaded = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "loaded.safetensors")
    # Beside them vLLM has scales of its cache.
    for name, values in loaded.items():
        module, last = name.split(".")[-2:]
        if not last.startswith("weight"):
            continue
        parts = [stored[name.replace(module, part)] for part in TOGETHER.get(module, (module,))]
        expected = torch.cat([part.float() for part in parts])
        np.testing.assert_array_equal(values.float()[: len(expected)], expected, err_msg=name)
    assert sum(values.dtype == torch.float8_e4m3fn for values in loaded.values()) == 4 * config.num_hidden_layers
