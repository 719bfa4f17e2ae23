"""Checkpoints of four-bit floats as models: packed by reference/quantisation.py and read back."""

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.commands import assert_refused, command, linear_merge
from helpers.families import build_family
from helpers.files import edit_json, read_json, read_lines, write_json, write_yaml
from helpers.models import random_model, save, state, tiny_config
from helpers.searches import search_config, task_section
from reference.quantisation import four_bit_floats
from reference.torch_models import text_logprobs
from safetensors import torch as torch_files
from safetensors.numpy import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from evojax_merge.checkpoints.derived import open_model, resolve_model
from evojax_merge.errors import InputError

NAME = "model.layers.0.mlp.up_proj"


def compressed(how: str, strategy: str, group: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": strategy, "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": how}}
    return {"quant_method": "compressed-tensors", "format": how, "config_groups": groups, "ignore": ["lm_head"]}


FORMATS = {
    "NVFP4": compressed("nvfp4-pack-quantized", "tensor_group", 16),
    "MXFP4": compressed("mxfp4-pack-quantized", "group", 32),
    "NVFP4 of Model Optimizer": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(hidden_size=64, intermediate_size=96, num_hidden_layers=1, tie_word_embeddings=True)
    return save(random_model(config), tmp_path_factory.mktemp("fp4") / "base")


def quantised(base: Path, folder: Path, case: str) -> dict[str, np.ndarray]:
    """A copy of a model with its linear modules quantised at random, and the values that their weights have then."""
    shutil.copytree(base, folder)
    tensors, values, rng = load_file(base / "model.safetensors"), {}, np.random.default_rng(0)
    for name in [name for name in tensors if "proj" in name]:
        codes, scales, meant = four_bit_floats(tensors.pop(name).shape, 32 if case == "MXFP4" else 16, rng)
        outer = rng.uniform(1000, 3000, 1).astype(np.float32)
        module = name.removesuffix(".weight")
        if case == "NVFP4 of Model Optimizer":
            outer = (1 / outer).reshape(())
            tensors |= {name: codes, f"{name}_scale": scales, f"{name}_scale_2": outer}
            tensors |= {f"{module}.input_scale": outer, f"{module}.k_scale": outer}
            values[name] = meant * float(outer)
            continue
        tensors |= {f"{name}_packed": codes, f"{name}_scale": scales}
        if case == "NVFP4":
            tensors |= {f"{name}_global_scale": outer, f"{module}.input_global_scale": outer}
        values[name] = meant / float(outer[0]) if case == "NVFP4" else meant
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", lambda config: config.update(dtype="float32"))
    if case == "NVFP4 of Model Optimizer":
        write_json(folder / "hf_quant_config.json", FORMATS[case])
    else:
        edit_json(folder / "config.json", lambda config: config.update(quantization_config=FORMATS[case]))
    return values


@pytest.mark.parametrize("case", FORMATS)
def test_weights_are_what_their_codes_mean(case: str, base: Path, tmp_path: Path) -> None:
    values, plain = quantised(base, tmp_path / "q", case), state(base)
    folder = open_model(resolve_model("test", str(tmp_path / "q"), Path()))
    assert set(folder.entries) == set(plain)
    for name in plain:
        found, expected = folder.read(name), values.get(name, plain[name])
        assert found.dtype == np.float32 and folder.entries[name].shape == found.shape
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8, err_msg=name)
    assert command(*linear_merge(tmp_path, tmp_path / "q", base)) == 0
    merged, name = state(tmp_path / "out"), f"{NAME}.weight"
    np.testing.assert_allclose(merged[name], (values[name] + plain[name]) / 2, rtol=1e-5, atol=1e-7)


def test_experts_in_mxfp4_are_those_that_transformers_reads(tmp_path: Path) -> None:
    """As gpt-oss has them: transposed, beside tensors of other dtypes."""
    rng, name = np.random.default_rng(0), "model.layers.0.mlp.experts.gate_up_proj"
    blocks = rng.integers(0, 256, (3, 10, 2, 16)).astype(np.uint8)
    scales = rng.integers(110, 130, (3, 10, 2)).astype(np.uint8)
    bias = rng.normal(size=(3, 10)).astype(ml_dtypes.bfloat16)
    save_file(
        {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": bias}, tmp_path / "model.safetensors"
    )
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config = {"model_type": "gpt_oss", "dtype": "bfloat16", "quantization_config": settings}
    write_json(tmp_path / "config.json", config)
    folder = open_model(resolve_model("test", str(tmp_path), Path()))
    assert set(folder.entries) == {name, f"{name}_bias"}
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales)).float().numpy()
    assert folder.entries[name].shape == theirs.shape and folder.entries[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(folder.read(name).astype(np.float32), theirs)
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales[:2]}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"gate_up_proj_scales: found \[2, 10, 2\]; expected \[3, 10, 2\]"):
        open_model(resolve_model("test", str(tmp_path), Path()))


def test_a_search_takes_experts_in_mxfp4_and_writes_them_whole(tmp_path: Path) -> None:
    """Two published gpt-oss, which differ in their experts' codes: the winner is in bfloat16, without quantisation."""
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=96, num_local_experts=3, num_experts_per_tok=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    family = build_family(tmp_path, config, dtype=torch.bfloat16)
    for seed, folder in enumerate((family.base, *family.parents)):
        rng, file = np.random.default_rng(seed), folder / "model.safetensors"
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, _, outputs = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = rng.integers(0, 256, (experts, outputs, 1, 16)).astype(np.uint8)
            tensors[f"{name}_scales"] = rng.integers(122, 125, (experts, outputs, 1)).astype(np.uint8)
        save_file(tensors, file, {"format": "pt"})
        edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "mxfp4"}))
    tasks = [task_section(heldout="tasks.jsonl")]
    path = write_yaml(tmp_path / "search.yaml", search_config(space={"method": "linear"}, tasks=tasks))
    assert command("search", path, "--out", tmp_path / "run") == 0
    winner = tmp_path / "run/best/model"
    assert "quantization_config" not in read_json(winner / "config.json")
    model, report = GptOssForCausalLM.from_pretrained(winner, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and model.dtype == torch.bfloat16
    # Scored as float32: in bfloat16 torch rounds after every layer.
    model, records = model.float(), read_lines(family.tasks)
    means = [text_logprobs(model, record["prompt"], record["target"]).mean() for record in records]
    (row,) = (row for row in read_json(tmp_path / "run/result.json")["table"] if row["role"] == "winner")
    assert row["heldout_scores"]["text/log_probability"] == pytest.approx(np.mean(means), abs=2e-2)


WRONG = {
    "without scales": ("NVFP4", "weight_scale", None, ("weight_packed",)),
    "without the scale of all": ("NVFP4", "weight_global_scale", None, ("weight_global_scale", "no such tensor")),
    "scales of other groups": (
        "MXFP4", "weight_scale", np.ones((96, 4), np.uint8), ("weight_scale", "found [96, 4]; expected [96, 2]"),
    ),
    "scales that are whole numbers": (
        "MXFP4", "weight_scale", np.ones((96, 2), np.int32), ("weight_scale is int32", "uint8"),
    ),
    "codes in words": ("MXFP4", "weight_packed", np.ones((96, 32), np.int32), ("weight_packed is int32", "uint8")),
    "Model Optimizer's without the scale of all": (
        "NVFP4 of Model Optimizer", "weight_scale_2", None, ("weight is quantised (uint8)",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_dequantised_is_refused_by_name(case: str, base: Path, tmp_path: Path) -> None:
    kind, part, changed, says = WRONG[case]
    quantised(base, tmp_path / "q", kind)
    file = tmp_path / "q" / "model.safetensors"
    # By torch, which reads eight-bit floats.
    tensors = torch_files.load_file(file)
    del tensors[f"{NAME}.{part}"]
    torch_files.save_file(tensors | ({} if changed is None else {f"{NAME}.{part}": torch.from_numpy(changed)}), file)
    assert_refused((NAME, *says), *linear_merge(tmp_path, tmp_path / "q"))
    assert not (tmp_path / "out").exists()
