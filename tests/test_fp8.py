"""FP8 checkpoints with scales of blocks as models: dequantised by NumPy's arithmetic, merged like any other."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.commands import assert_refused, command, linear_merge
from helpers.families import Family
from helpers.files import edit_json
from helpers.models import state
from safetensors.torch import load_file, save_file

from evojax_merge.checkpoints.derived import open_model, resolve_model

BLOCK = (32, 20)


def quantise(base: Path, folder: Path) -> dict[str, np.ndarray]:
    """A copy of a model with its projections in FP8, and the values that these mean, float64."""
    shutil.copytree(base, folder)
    tensors, exact = load_file(base / "model.safetensors"), {}
    for name, values in list(tensors.items()):
        if "proj" not in name:
            continue
        rows, columns = (-(-size // step) for size, step in zip(values.shape, BLOCK, strict=True))
        scales = 0.01 + torch.rand((rows, columns), generator=torch.Generator().manual_seed(len(exact)))
        whole = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[
            : values.shape[0], : values.shape[1]
        ]
        tensors[name] = (values / whole).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        exact[name] = tensors[name].double().numpy() * whole.double().numpy()
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=settings, dtype="bfloat16"))
    return exact


def test_weights_are_their_values_times_the_scales_of_their_blocks(family: Family, tmp_path: Path) -> None:
    exact = quantise(family.base, tmp_path / "fp8")
    folder = open_model(resolve_model("test", str(tmp_path / "fp8"), Path()))
    assert not any("scale" in name for name in folder.entries)
    assert "quantization_config" not in folder.config
    for name, values in exact.items():
        found = folder.read(name)
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found, values.astype(np.float32).astype(ml_dtypes.bfloat16), err_msg=name)
    assert command(*linear_merge(tmp_path, "fp8", str(family.parents[0]))) == 0
    merged, other = state(tmp_path / "out"), state(family.parents[0])
    for name, values in exact.items():
        np.testing.assert_allclose(merged[name], (values + other[name]) / 2, rtol=2**-8, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("case", ["no scales", "scales of other blocks", "a block that is none", "another method"])
def test_weights_that_nobody_can_dequantise_are_refused(case: str, family: Family, tmp_path: Path) -> None:
    quantise(family.base, tmp_path / "fp8")
    file, name = tmp_path / "fp8" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors, settings = load_file(file), {}
    if case == "no scales":
        del tensors[f"{name}_scale_inv"]
    elif case == "scales of other blocks":
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    elif case == "a block that is none":
        settings = {"weight_block_size": [128]}
    else:
        settings = {"quant_method": "gptq"}
    save_file(tensors, file)
    edit_json(tmp_path / "fp8" / "config.json", lambda config: config["quantization_config"].update(settings))
    says = {
        "no scales": (name, "F8_E4M3", "no such tensor"),
        "scales of other blocks": (name, "[1, 1]", "expected the scales of its blocks, [3, 3]"),
        "a block that is none": ("weight_block_size", "[128]"),
        "another method": ("quantised",),
    }[case]
    assert_refused(says, *linear_merge(tmp_path, "fp8"))
    assert not (tmp_path / "out").exists()
