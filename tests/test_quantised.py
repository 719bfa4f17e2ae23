"""Quantised checkpoints as models: packed by reference/quantisation.py, number by number, and read back to the values
that these numbers mean."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.commands import assert_refused, command, linear_merge
from helpers.families import Family, build_family
from helpers.files import edit_json, read_json
from helpers.models import load_torch, state, tiny_config
from helpers.sampling import sample
from hostile import changing
from reference.quantisation import (
    GROUP,
    Quantise,
    Tensors,
    awq,
    blocks,
    eight_bits,
    exponents,
    four_bits,
    gptq,
    mlx,
    one_scale,
    packed,
    pairs,
    rows,
)
from safetensors import torch as torch_files
from safetensors.numpy import load_file, save_file

from evojax_merge.checkpoints.derived import open_model, resolve_model


def compressed(how: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors", "format": how, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "quantization_status": "compressed", "sparsity_config": {"format": "dense"}, "kv_cache_scheme": None,
    }  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
PACKED = {"strategy": "group", "group_size": GROUP, "num_bits": 4}
FORMATS: dict[str, tuple[dict[str, Any], Quantise]] = {
    "GPTQ": (GPTQ, gptq()),
    "GPTQ, without g_idx": (GPTQ, gptq(indexed=False)),
    "GPTQ, in order of activations, 8 bits": (GPTQ | {"bits": 8, "desc_act": True}, gptq(8, shuffled=True)),
    "GPTQ, 2 bits, the second format": (GPTQ | {"bits": 2, "checkpoint_format": "gptq_v2"}, gptq(2, version=2)),
    "AWQ": (AWQ, awq),
    "bitsandbytes, 8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, eight_bits),
    "bitsandbytes, 4 bits": (BITS, four_bits(nested=False)),
    "bitsandbytes, 4 bits, twice, in float32": (BITS, four_bits(nested=True, storage=np.float32)),
    "compressed-tensors, packed": (compressed("pack-quantized", **PACKED), packed()),
    "compressed-tensors, packed, zeros": (compressed("pack-quantized", **PACKED), packed(zeros=True)),
    "compressed-tensors, packed, in order of activations": (
        compressed("pack-quantized", **PACKED | {"num_bits": 8}, actorder="group"), packed(8, shuffled=True),
    ),
    "compressed-tensors, int8": (compressed("int-quantized", strategy="channel"), rows(np.int8)),
    "compressed-tensors, float8 rows": (
        compressed("float-quantized", strategy="channel", type="float"), rows(ml_dtypes.float8_e4m3fn),
    ),
    "compressed-tensors, float8": (compressed("float-quantized", strategy="tensor", type="float"), one_scale()),
    "compressed-tensors, float8 blocks": (
        compressed("float-quantized", strategy="block", type="float", block_structure=[20, 32]), blocks,
    ),
    "compressed-tensors, MXFP8": (
        compressed("mxfp8-quantized", strategy="group", group_size=GROUP, type="float"), exponents,
    ),
    "FP8, as AutoFP8's": ({"quant_method": "fp8", "activation_scheme": "static"}, one_scale(shape=())),
    "FP8, as Mistral's": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False},
        one_scale("weight_scale_inv", (), "activation_scale"),
    ),
    "FP8, as FBGEMM's": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, rows(ml_dtypes.float8_e4m3fn),
    ),
    "FP8, as Model Optimizer's": ({"quant_method": "modelopt", "quant_algo": "FP8"}, one_scale(shape=())),
    "FP8 rows, as Model Optimizer's": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        rows(ml_dtypes.float8_e4m3fn, axes=1),
    ),
    "MLX": ({"group_size": GROUP, "bits": 4, "mode": "affine"}, mlx(4)),
    "AutoRound, as GPTQ": (
        {
            "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": GROUP,
            "sym": True, "data_type": "int", "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}},
        },
        gptq(),
    ),
    "AWQ, as Model Optimizer's": (
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": GROUP, "pre_quant_scale": True}, pairs,
    ),
}  # fmt: skip
# Several ways in one folder: the settings, and by parts of modules' names the way of each, the first that fits.
NAMED = "model.layers.1.mlp.down_proj"
SEVERAL: dict[str, tuple[dict[str, Any], dict[str, Quantise]]] = {
    "compressed-tensors": (
        compressed("mixed-precision") | {"ignore": ["re:.*lm_head"], "config_groups": {
            "classes": {"targets": ["Linear"], "format": "pack-quantized", "weights": PACKED},
            "patterns": {
                "targets": ["re:.*self_attn\\.[qkvo]_proj$"], "format": "float-quantized",
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            },
            "names": {"targets": [NAMED], "format": "pack-quantized", "weights": PACKED | {"num_bits": 8}},
            "of activations": {"targets": ["Attention"], "weights": None},
        }},
        {NAMED: packed(8), "self_attn": rows(ml_dtypes.float8_e4m3fn), "": packed()},
    ),
    "compressed-tensors, of one format": (
        compressed("pack-quantized") | {"config_groups": {
            "group_0": {"targets": ["re:.*self_attn.*"], "weights": PACKED | {"num_bits": 8}},
            "group_1": {"targets": ["Linear"], "weights": PACKED},
        }},
        {"self_attn": packed(8), "": packed()},
    ),
    "MLX, of 4 and 6 bits": (
        {"group_size": GROUP, "bits": 4, NAMED: {"group_size": GROUP, "bits": 6}, "lm_head": False},
        {NAMED: mlx(6), "": mlx(4)},
    ),
    "Model Optimizer": (
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            NAMED: {"quant_algo": "W4A16_AWQ", "group_size": GROUP}, "model.layers.0.mlp": {"quant_algo": "FP8"},
        }},
        {NAMED: pairs, "": one_scale(shape=())},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base whose matrices are all of whole words, and a fine-tune of it."""
    config = tiny_config(num_key_value_heads=4, tie_word_embeddings=True)
    return build_family(tmp_path_factory.mktemp("family"), config, parents=1)


def quantised(base: Path, folder: Path, case: str) -> Tensors:
    """A copy of a model with its linear modules quantised at random, and the values that their weights have then."""
    settings, quantise = FORMATS[case]
    return quantised_each(base, folder, settings, {"": quantise})


def quantised_each(base: Path, folder: Path, settings: dict[str, Any], ways: dict[str, Quantise]) -> Tensors:
    """As `quantised`, each module in the first of the ways that is called by a part of its name."""
    shutil.copytree(base, folder)
    tensors, values, rng = load_file(base / "model.safetensors"), {}, np.random.default_rng(0)
    for name in [name for name in tensors if "proj" in name]:
        module = name.removesuffix(".weight")
        quantise = next(way for part, way in ways.items() if part in name)
        parts, values[name] = quantise(tensors.pop(name), rng)
        tensors |= {f"{module}.{part}": np.ascontiguousarray(one) for part, one in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    # MLX says it twice, and names no method.
    own = {} if "quant_method" in settings else {"quantization": settings}
    edit_json(folder / "config.json", lambda config: config.update(own, quantization_config=settings, dtype="float32"))
    return values


@pytest.mark.parametrize("case", sample([*FORMATS, *SEVERAL], 12))
def test_weights_are_what_their_numbers_mean(case: str, family: Family, tmp_path: Path) -> None:
    plain = state(family.base)
    if case in FORMATS:
        values = quantised(family.base, tmp_path / "q", case)
    else:
        values = quantised_each(family.base, tmp_path / "q", *SEVERAL[case])
    folder = open_model(resolve_model("test", str(tmp_path / "q"), Path()))
    assert set(folder.entries) == set(plain)
    assert not {"quantization_config", "quantization"} & set(folder.config)
    for name in plain:
        found, expected = folder.read(name), values.get(name, plain[name])
        assert found.dtype == np.float32 and folder.entries[name].shape == found.shape
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("case", ["GPTQ", "compressed-tensors, packed"])
def test_a_text_decoders_own_quantisation_is_read(case: str, family: Family, tmp_path: Path) -> None:
    """Transformers reads it where a larger model's config has none outside of `text_config`."""
    values = quantised(family.base, tmp_path / "q", case)
    edit_json(
        tmp_path / "q" / "config.json",
        lambda config: config.update(text_config={"quantization_config": config.pop("quantization_config")}),
    )
    folder = open_model(resolve_model("test", str(tmp_path / "q"), Path()))
    assert folder.config["text_config"] == {}
    for name, one in values.items():
        np.testing.assert_allclose(folder.read(name), one, rtol=1e-6, atol=1e-8, err_msg=name)


def test_matrices_are_rounded_once_to_the_dtype_that_the_config_names(family: Family, tmp_path: Path) -> None:
    values = quantised(family.base, tmp_path / "q", "GPTQ")
    edit_json(tmp_path / "q" / "config.json", lambda config: config.update(dtype="bfloat16"))
    folder = open_model(resolve_model("test", str(tmp_path / "q"), Path()))
    for name, one in values.items():
        np.testing.assert_array_equal(folder.read(name), one.astype(np.float32).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("case", ["AWQ", "bitsandbytes, 4 bits", "compressed-tensors, packed"])
def test_a_merge_of_one_is_read_by_transformers(case: str, family: Family, tmp_path: Path) -> None:
    values = quantised(family.base, tmp_path / "q", case)
    assert command(*linear_merge(tmp_path, tmp_path / "q", family.parents[0])) == 0
    merged, other = load_torch(tmp_path / "out").state_dict(), state(family.parents[0])
    for name, one in values.items():
        np.testing.assert_allclose(merged[name].numpy(), (one + other[name]) / 2, rtol=1e-5, atol=1e-7, err_msg=name)


def test_an_adapter_of_a_quantised_base_is_merged_into_its_values(family: Family, tmp_path: Path) -> None:
    from test_adapters import adapter

    values = quantised(family.base, tmp_path / "q", "bitsandbytes, 4 bits")
    lora, _ = adapter(family.base, tmp_path / "lora", target_modules=["q_proj"])
    folder, name = (
        open_model(resolve_model("test", f"{tmp_path / 'q'}+{lora}", Path())),
        "model.layers.1.self_attn.q_proj",
    )
    factors = load_file(lora / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
    np.testing.assert_allclose(
        folder.read(f"{name}.weight"), values[f"{name}.weight"] + 1.5 * b @ a, rtol=1e-5, atol=1e-6
    )


def test_biases_of_zeros_that_autogptq_adds_are_left_out(family: Family, tmp_path: Path) -> None:
    quantised(family.base, tmp_path / "q", "GPTQ")
    file = tmp_path / "q" / "model.safetensors"
    bias = {"model.layers.0.mlp.up_proj.bias": np.zeros(80, np.float16)}
    save_file(load_file(file) | bias, file)
    assert set(open_model(resolve_model("test", str(tmp_path / "q"), Path())).entries) == set(state(family.base))
    save_file(load_file(file) | {name: values + 1 for name, values in bias.items()}, file)
    assert bias.keys() < open_model(resolve_model("test", str(tmp_path / "q"), Path())).entries.keys()


def test_a_quantisation_that_a_config_still_names_is_none_where_no_weight_is_quantised(
    family: Family, tmp_path: Path
) -> None:
    """Trainers merge into full weights, and leave the config of the base that they were trained on."""
    shutil.copytree(family.base, tmp_path / "left")
    edit_json(tmp_path / "left" / "config.json", lambda config: config.update(quantization_config=BITS))
    assert command(*linear_merge(tmp_path, tmp_path / "left")) == 0
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    for name, values in state(tmp_path / "out").items():
        np.testing.assert_allclose(values, state(family.base)[name], rtol=1e-6)


NAME = "model.layers.0.mlp.up_proj"


def setting(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / "config.json", lambda config: config["quantization_config"].update(changes)
    )


def mlx_setting(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config["quantization"].update(changes))


def without(part: str) -> Callable[[Path], None]:
    return tensor(part, lambda values: None)


@changing
def tensor(folder: Path, part: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    # By torch, which reads eight-bit floats.
    tensors = torch_files.load_file(folder / "model.safetensors")
    changed = change(tensors.pop(f"{NAME}.{part}").numpy())
    own = {} if changed is None else {f"{NAME}.{part}": torch.from_numpy(changed)}
    torch_files.save_file(tensors | own, folder / "model.safetensors")


STATE = "weight.quant_state.bitsandbytes__nf4"
WRONG: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "GPTQ of three bits": ("GPTQ", setting(bits=3), ("bits: 3", "2, 4, 8")),
    "GPTQ for Marlin": ("GPTQ", setting(checkpoint_format="marlin"), ("checkpoint_format: 'marlin'", "gptq_v2")),
    "GPTQ of several widths": ("GPTQ", setting(dynamic={"down": {"bits": 8}}), ("dynamic",)),
    "GPTQ of other groups": ("GPTQ", setting(group_size=24), ("down_proj.qzeros", "found [5, 6]; expected [4, 6]")),
    "GPTQ of no groups": ("GPTQ", setting(group_size=0), ("group_size: 0",)),
    "GPTQ without scales": ("GPTQ", without("scales"), (f"{NAME}.scales", "no such tensor")),
    "GPTQ with a group too many": ("GPTQ", tensor("g_idx", lambda one: one + 1), (f"{NAME}.g_idx", "3 groups")),
    "AWQ for GEMV": ("AWQ", setting(version="gemv"), ("version: 'gemv'", "gemm")),
    "AWQ of eight bits": ("AWQ", setting(bits=8), ("bits: 8",)),
    "AWQ without zeros": ("AWQ", without("qzeros"), (f"{NAME}.qzeros", "no such tensor")),
    "eight bits without scales": (
        "bitsandbytes, 8 bits", without("SCB"), (f"{NAME}.weight is quantised (int8)", "SCB"),
    ),
    "eight bits in tiles": (
        "bitsandbytes, 8 bits", tensor("weight_format", lambda one: one + 1), (f"{NAME}.weight_format",),
    ),
    "four bits of no state": ("bitsandbytes, 4 bits", tensor(STATE, lambda one: one[:-5]), (STATE, "expected JSON")),
    "four bits of half the codes": (
        "bitsandbytes, 4 bits", tensor("weight", lambda one: one[::2].copy()), (f"{NAME}.weight", "3,840 codes"),
    ),
    "four bits without scales": (
        "bitsandbytes, 4 bits", without("weight.absmax"), (f"{NAME}.weight.absmax", "no such tensor"),
    ),
    "several formats": (
        "compressed-tensors, packed", setting(format="mixed-precision"), ("format: None", "pack-quantized"),
    ),
    "float8 of some block": (
        "FP8, as AutoFP8's", tensor("weight_scale", lambda one: np.ones((2, 2), np.float32)),
        (f"{NAME}.weight_scale", "[2, 2]", "one for each output, [80, 1]"),
    ),
    "FP8 without a scale": (
        "FP8, as FBGEMM's", without("weight_scale"), (f"{NAME}.weight_scale", "no such tensor"),
    ),
    "an algorithm of Model Optimizer's": (
        "FP8, as Model Optimizer's", setting(quant_algo="W4A8_AWQ"), ("quant_algo: 'W4A8_AWQ'", "NVFP4"),
    ),
    "another method, of float8": (
        "FP8, as AutoFP8's", setting(quant_method="quark"), ("quantization_config", "'quark'", "unquantised"),
    ),
    "packed and sparse": (
        "compressed-tensors, packed", setting(sparsity_config={"format": "sparse-24-bitmask"}), ("sparsity_config",),
    ),
    "packed without a shape": (
        "compressed-tensors, packed", without("weight_shape"), (f"{NAME}.weight_shape", "no such tensor"),
    ),
    "packed in another shape": (
        "compressed-tensors, packed", tensor("weight_shape", lambda one: one * 2), (f"{NAME}.weight_packed", "160"),
    ),
    "groups of several kinds": (
        "compressed-tensors, packed",
        setting(config_groups={"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}),
        ("config_groups", "none of them has model.layers.", "quantised"),
    ),
    "groups of a pattern without end": (
        "compressed-tensors, packed",
        setting(config_groups={
            "a": {"targets": [r"re:(\w|\.|[a-z])*\d\d"], "weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}},
        }),
        ("config_groups", "[a-z])*", "regular expression"),
    ),
    "groups of a pattern of a billion parts": (
        "compressed-tensors, packed",
        setting(config_groups={
            "a": {"targets": ["re:x{0}((.{999}){999}){999}"], "weights": {"num_bits": 4}},
            "b": {"weights": {"num_bits": 8}},
        }),
        ("config_groups", "repeats more than"),
    ),
    "groups of no pattern": (
        "compressed-tensors, packed",
        setting(config_groups={
            "a": {"targets": ["re:("], "weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}},
        }),
        ("config_groups", "regular expression"),
    ),
    "groups that say nothing of weights": (
        "compressed-tensors, packed", setting(config_groups={"a": {"targets": ["Linear"]}}),
        ("config_groups", "weights"),
    ),
    "Model Optimizer's AWQ of other groups": (
        "AWQ, as Model Optimizer's", tensor("weight_scale", lambda one: one[:-2].copy()),
        (f"{NAME}.weight_scale", "[78, 3]", "[80, 3]"),
    ),
    "Model Optimizer's inputs of another number": (
        "AWQ, as Model Optimizer's", tensor("pre_quant_scale", lambda one: one[:-1].copy()),
        (f"{NAME}.pre_quant_scale is float32[47]", "each input"),
    ),
    "MLX in another mode": ("MLX", mlx_setting(mode="mxfp4"), ("mode: 'mxfp4'", "affine")),
    "MLX of seven bits": ("MLX", mlx_setting(bits=7), ("bits: 7", "2, 3, 4, 5, 6, 8")),
    "MLX of other groups": ("MLX", mlx_setting(group_size=64), (".weight: found uint32[", "in groups of 64")),
    "MLX without biases": ("MLX", without("biases"), (f"{NAME}.biases", "no such tensor")),
    "MLX without scales": ("MLX", without("scales"), (f"{NAME}.weight is quantised (uint32)", "no scales")),
    "AutoRound of another packing": (
        "AutoRound, as GPTQ", setting(packing_format="auto_round:llm_compressor"),
        ("packing_format: 'auto_round:llm_compressor'", "auto_round:auto_gptq"),
    ),
    "AutoRound of several widths": (
        "AutoRound, as GPTQ", setting(extra_config={"model.layers.0.mlp.up_proj": {"bits": 8}}),
        ("extra_config.model.layers.0.mlp.up_proj.bits: 8",),
    ),
    "several algorithms of Model Optimizer's": (
        "FP8, as Model Optimizer's",
        setting(quant_algo="MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "W4A8_MXFP4_FP8"}}),
        ("quant_algo: 'W4A8_MXFP4_FP8'", "W4A16_AWQ"),
    ),
    "float8 without a scale": (
        "compressed-tensors, float8", without("weight_scale"), (f"{NAME}.weight is quantised (float8", "weight_scale"),
    ),
    "another method": ("GPTQ", setting(quant_method="hqq"), ("quantization_config", "'hqq'", "dequantise")),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of each format, made once."""
    root, folders = tmp_path_factory.mktemp("quantised"), dict[str, Path]()

    def make(case: str) -> Path:
        if case not in folders:
            folders[case] = root / str(len(folders))
            quantised(family.base, folders[case], case)
        return folders[case]

    return make


@pytest.mark.parametrize("case", sample(WRONG, 12))
def test_what_cannot_be_dequantised_is_refused_by_name(case: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    kind, change, says = WRONG[case]
    shutil.copytree(made(kind), tmp_path / "q")
    change(tmp_path / "q")
    assert_refused(says, *linear_merge(tmp_path, tmp_path / "q"))
    assert not (tmp_path / "out").exists()
