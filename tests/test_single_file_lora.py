"""LoRA files in single-file checkpoints: names and values are those of sd-mecha."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.generators import lora_change_of_sd_mecha, lora_modules_of_sd_mecha, tensor_names
from safetensors.numpy import load_file, save_file
from test_diffusion import linear, merged

from evojax_merge.checkpoints.generator_lora import Place, places_of
from evojax_merge.errors import InputError

UNET = "model.diffusion_model."
# The tensors of an SDXL checkpoint that a LoRA changes, and the names of kohya's trainer, or diffusers', for them.
WEIGHTS = {
    f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (6, 4),
    f"{UNET}input_blocks.1.0.in_layers.2.weight": (5, 4, 3, 3),
    f"{UNET}input_blocks.3.0.op.weight": (4, 4, 3, 3),
    f"{UNET}middle_block.1.proj_in.weight": (6, 4, 1, 1),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (8, 4),
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (12, 4),
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (8, 4),
}
UNCHANGED = {f"{UNET}out.2.weight": (4, 4, 3, 3), "first_stage_model.decoder.conv_in.weight": (5, 4, 3, 3)}
KOHYA = (
    ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 0, None),
    ("lora_unet_input_blocks_1_0_in_layers_2", 1, None),
    ("lora_unet_middle_block_1_proj_in", 3, None),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 4, None),
    ("lora_te2_text_model_encoder_layers_0_self_attn_k_proj", 5, 1),
    ("lora_te2_text_model_encoder_layers_0_self_attn_v_proj", 5, 2),
    ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 6, None),
)
DIFFUSERS = (
    ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 0, None),
    ("unet.down_blocks.0.downsamplers.0.conv", 2, None),
    ("unet.mid_block.attentions.0.proj_in", 3, None),
    ("text_encoder.text_model.encoder.layers.0.mlp.fc1", 4, None),
    ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", 5, 0),
)
PARTS = {"kohya": ("lora_down.weight", "lora_up.weight"), "diffusers": ("lora_A.weight", "lora_B.weight")}


def save_checkpoint(file: Path, seed: int, dtype: Any = np.float32) -> Path:
    rng = np.random.default_rng(seed)
    shapes = {**WEIGHTS, **UNCHANGED}
    save_file({name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}, file)
    return file


def lora_tensors(keys: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors of a LoRA of rank 2, and the change of each weight by sd-mecha."""
    rng, tensors = np.random.default_rng(3), dict[str, np.ndarray]()
    changes = {name: np.zeros(shape) for name, shape in WEIGHTS.items()}
    for module, number, part in KOHYA if keys == "kohya" else DIFFUSERS:
        name, shape = list(WEIGHTS.items())[number]
        rows = shape[0] if part is None else shape[0] // 3
        ones = (1,) * (len(shape) - 2)
        down, up = (rng.normal(size=size).astype(np.float32) for size in ((2, *shape[1:]), (rows, 2, *ones)))
        tensors |= {f"{module}.{end}": values for end, values in zip(PARTS[keys], (down, up), strict=True)}
        if keys == "kohya":
            tensors[f"{module}.alpha"] = np.array(3.0, np.float32)
        alpha = 3.0 if keys == "kohya" else 2.0
        first = 0 if part is None else rows * part
        changes[name][first : first + rows] += lora_change_of_sd_mecha(down, up, alpha, (rows, *shape[1:]))
    return tensors, changes


@pytest.mark.parametrize(
    ("trainer", "checkpoint", "count"),
    [("sd1-kohya", "sd1-ldm", 300), ("sdxl-kohya", "sdxl-sgm", 1000), ("sdxl-kohya_but_diffusers", "sdxl-sgm", 1000)],
)
def test_modules_have_the_names_of_sd_mecha(trainer: str, checkpoint: str, count: int) -> None:
    expected = lora_modules_of_sd_mecha(trainer, checkpoint)
    places = places_of(dict.fromkeys(tensor_names(checkpoint)))
    assert len(expected) > count
    assert {module: places.get(module) for module in expected} == {
        module: Place(*place) for module, place in expected.items()
    }


@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_lora_is_fused_into_the_checkpoint_before_it(keys: str, dtype: Any, tmp_path: Path) -> None:
    first, second = (save_checkpoint(tmp_path / f"{k}.safetensors", k, dtype) for k in range(2))
    tensors, changes = lora_tensors(keys)
    save_file(tensors, tmp_path / "lora.safetensors")
    fused = Path(f"{first}+{tmp_path / 'lora.safetensors'}")
    merged({"merge_method": "passthrough", "models": [{"model": str(fused)}]}, tmp_path / "fused")
    merged(linear([fused, second], [0.5, 0.5]), tmp_path / "half")
    assert sorted(path.name for path in (tmp_path / "half").glob("*.safetensors*")) == ["model.safetensors"]
    a, b = load_file(first), load_file(second)
    alone, half = (load_file(tmp_path / name / "model.safetensors") for name in ("fused", "half"))
    assert alone.keys() == half.keys() == a.keys()
    for name, values in a.items():
        # In float64, and rounded once; a merge is rounded once more.
        wanted = (values.astype(np.float64) + changes.get(name, 0.0)).astype(dtype)
        step = np.finfo(dtype).eps * 8
        np.testing.assert_allclose(alone[name], wanted, rtol=step / 8, atol=step, err_msg=name)
        np.testing.assert_allclose(half[name], (wanted.astype(float) + b[name]) / 2, rtol=step, atol=step, err_msg=name)


FAULTS = {
    "other modules": "changes 1 modules, of which base.safetensors has 0, and not lora_unet_no_such_module",
    "LoHa": "hada_w1_a: is no part of a plain LoRA",
    "no up": "has no lora_up",
    "shapes": "do not fit the 6 x 4 entries",
    "twice": "by the names of two tools",
    "integers": "expected float factors",
    "alpha": "expected a finite number",
    "none": "holds no factors of a LoRA",
    "pickle": "expected a LoRA in safetensors",
    "no generator": "holds no image generator",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lora_that_does_not_fit_is_refused_in_a_line(fault: str, tmp_path: Path) -> None:
    base, file = save_checkpoint(tmp_path / "base.safetensors", 0), tmp_path / "lora.safetensors"
    down, up = np.zeros((2, 4), np.float32), np.zeros((6, 2), np.float32)
    module = KOHYA[0][0]
    tensors: dict[str, np.ndarray] = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    if fault == "other modules":
        tensors = {name.replace(module, "lora_unet_no_such_module"): values for name, values in tensors.items()}
    elif fault == "LoHa":
        tensors[f"{module}.hada_w1_a"] = up
    elif fault == "no up":
        del tensors[f"{module}.lora_up.weight"]
    elif fault == "shapes":
        tensors[f"{module}.lora_up.weight"] = up[:4]
    elif fault == "twice":
        tensors |= {f"{DIFFUSERS[0][0]}.lora_A.weight": down, f"{DIFFUSERS[0][0]}.lora_B.weight": up}
    elif fault == "integers":
        tensors[f"{module}.lora_up.weight"] = up.astype(np.int64)
    elif fault == "alpha":
        tensors[f"{module}.alpha"] = np.array(np.nan, np.float32)
    elif fault == "none":
        tensors = {"weight": up}
    elif fault == "no generator":
        save_file({"weight": up}, base)
    save_file(tensors, file)
    if fault == "pickle":
        torch.save({}, file := tmp_path / "lora.bin")
    with pytest.raises(InputError) as caught:
        merged(linear([Path(f"{base}+{file}"), base], [0.5, 0.5]), tmp_path / "out")
    assert FAULTS[fault] in str(caught.value) and "\n" not in str(caught.value)
