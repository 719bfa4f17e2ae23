"""Merges of vision-language models without a search: mergekit's tensors, and an account of every tensor that is
stored."""

from pathlib import Path
from typing import Any

import pytest
from helpers import sample, state
from reference.vision_models import save_seeing, seeing_model
from safetensors.numpy import load_file, save_file
from test_recipes import assert_same_weights, merge, mergekit_merge

# The names of tensors in files, where transformers writes others than those that mergekit knows.
HUB_NAMES = {"qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."}}
DECODER = ("language_model.", "model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
KINDS = ("llava", "qwen2_5_vl", "qwen3_vl")


def write_pair(folder: Path, kind: str) -> None:
    """A base and two parents, of which each has a vision side of its own."""
    model = seeing_model(kind)
    for seed, name in enumerate(("base", "one", "two")):
        file = save_seeing(model, folder / name, seed, 0.05) / "model.safetensors"
        tensors = load_file(file)
        for old, new in HUB_NAMES.get(kind, {}).items():
            tensors = {tensor.replace(old, new): values for tensor, values in tensors.items()}
        save_file(tensors, file, {"format": "pt"})


def recipe(folder: Path, method: str) -> dict[str, Any]:
    models = [str(folder / name) for name in ("one", "two")]
    if method == "slerp":
        return {
            "merge_method": "slerp", "base_model": models[0], "models": [{"model": model} for model in models],
            "parameters": {"t": 0.3}, "dtype": "float32",
        }  # fmt: skip
    values = [{"weight": 0.7, "density": 0.5}, {"weight": 0.4, "density": 0.8}]
    return {
        "merge_method": method, "base_model": str(folder / "base"), "dtype": "float32",
        "models": [{"model": model, "parameters": chosen} for model, chosen in zip(models, values, strict=True)],
    }  # fmt: skip


CASES = [(kind, method) for kind in KINDS for method in ("ties", "slerp", "task_arithmetic")]


@pytest.mark.parametrize(("kind", "method"), sample(CASES, 3))
def test_whole_models_merge_as_in_mergekit(kind: str, method: str, tmp_path: Path) -> None:
    write_pair(tmp_path, kind)
    document = recipe(tmp_path, method)
    found = merge(tmp_path, document)
    assert set(state(found)) == set(state(tmp_path / "one")), "a stored tensor is missing"
    assert_same_weights(found, mergekit_merge(tmp_path, document))
