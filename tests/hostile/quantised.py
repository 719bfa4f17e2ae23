"""Hostile quantised folders, adapters, and folders whose tensors are not those that their config.json implies."""

import importlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from hostile import MERGE, Case, World, changing, everywhere, together

MODULE = "model.layers.0.mlp.up_proj"
STATE = f"{MODULE}.weight.quant_state.bitsandbytes__nf4"
Change = Callable[[World], Any]
# Changes the tensors of a file in place, torch's, which have eight-bit floats.
Edit = Callable[[dict[str, Any]], Any]


@changing
def edited(world: World, edit: Edit, file: str = "one/model.safetensors") -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(world / file)
    edit(tensors)
    save_file(tensors, world / file, {"format": "pt"})


@changing
def packed(world: World, case: str, *changes: Change, module: str = "test_quantised") -> None:
    """`one` as the base, quantised in one of the formats of a module of tests, and changed."""
    shutil.rmtree(world / "one")
    importlib.import_module(module).quantised(world / "base", world / "one", case)
    together(*changes)(world)


four_bit_floats = partial(packed, module="test_fp4")


@changing
def settings(world: World, /, model: str = "one", **changes: Any) -> None:
    """Other settings of the quantisation, `...` for none of that name."""
    path = world / model / "config.json"
    found = json.loads(path.read_text())["quantization_config"] | changes
    world.edit(f"{model}/config.json", quantization_config={k: v for k, v in found.items() if v is not ...})


def instead(**found: Any) -> Change:
    """Another quantisation than the tensors'."""
    return lambda world: world.edit("one/config.json", quantization_config=found)


def part(name: str, make: Callable[[Any], Any], module: str = MODULE) -> Change:
    """One part of a matrix made another tensor, or removed where that is None."""

    def edit(tensors: dict[str, Any]) -> None:
        import torch

        made = make(tensors.pop(f"{module}.{name}"))
        if made is not None:
            made = torch.from_numpy(made) if isinstance(made, np.ndarray) else made
            tensors[f"{module}.{name}"] = made.contiguous()

    return edited(edit)


def cast(name: str, dtype: str) -> Change:
    """One part of a matrix in another dtype."""
    import torch

    return part(name, lambda tensor: tensor.to(getattr(torch, dtype)))


def retyped(case: str, name: str, dtype: str, module: str = "test_quantised") -> tuple[Change, tuple[str, ...]]:
    """A format with one part of a matrix in another dtype, and what the message names."""
    return packed(case, cast(name, dtype), module=module), (f"{MODULE}.{name}", dtype)


def added(name: str, values: np.ndarray) -> Change:
    import torch

    return edited(lambda tensors: tensors.update({f"{MODULE}.{name}": torch.from_numpy(values)}))


def state(**changes: Any) -> Change:
    """Other values in the JSON that a matrix of four bits has beside it."""

    def make(tensor: Any) -> np.ndarray:
        found = json.loads(tensor.numpy().tobytes()) | changes
        return np.frombuffer(json.dumps(found).encode(), np.uint8).copy()

    return part(STATE.removeprefix(f"{MODULE}."), make)


def of_one_block(size: int) -> Change:
    """A matrix of four bits with one scale, for a block of this size."""
    return together(state(blocksize=size), part("weight.absmax", lambda scales: scales[:1]))


HUGE = 10**400
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
    "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 16}},
}}  # fmt: skip
GPTQ, AWQ = "GPTQ", "AWQ"
PACKED, ZEROS = "compressed-tensors, packed", "compressed-tensors, packed, zeros"
ORDERED = "compressed-tensors, packed, in order of activations"
NF4, NESTED = "bitsandbytes, 4 bits", "bitsandbytes, 4 bits, twice, in float32"
INT8, FP8, FP8_ROWS = "bitsandbytes, 8 bits", "FP8, as AutoFP8's", "FP8, as FBGEMM's"
MODELOPT_AWQ = "AWQ, as Model Optimizer's"

# By what is wrong: the change of a good world, and what the message names.
PARTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "GPTQ: zeros of floats": (packed(GPTQ, cast("qzeros", "float32")), (f"{MODULE}.qzeros", "float32", "int32")),
    "GPTQ: zeros of long words": retyped(GPTQ, "qzeros", "int64"),
    "GPTQ: scales of integers": retyped(GPTQ, "scales", "int32"),
    "GPTQ: scales of one axis": (packed(GPTQ, part("scales", lambda one: one.flatten())), (f"{MODULE}.scales",)),
    "GPTQ: weights of floats": retyped(GPTQ, "qweight", "float16"),
    "GPTQ: groups of floats": retyped(GPTQ, "g_idx", "float32"),
    "GPTQ: no groups": (packed(GPTQ, part("g_idx", lambda one: one[:0])), (f"{MODULE}.g_idx", "[0]")),
    "GPTQ: a group below none": (packed(GPTQ, part("g_idx", lambda one: one - 1)), (f"{MODULE}.g_idx", "3 groups")),
    "GPTQ: no rows": (
        packed(GPTQ, part("qweight", lambda one: one[:0]), part("g_idx", lambda one: one[:0])),
        (f"{MODULE}.qweight", "[0, 80]"),
    ),
    "GPTQ: no columns": (packed(GPTQ, part("qweight", lambda one: one[:, :0])), (f"{MODULE}.qweight", "[6, 0]")),
    "GPTQ: no weights": (packed(GPTQ, part("qweight", lambda one: None)), (f"{MODULE}.", "all parts")),
    "GPTQ: the weights of another matrix": (
        packed(GPTQ, edited(lambda all: all.update({
            f"{MODULE}.{name}": all[f"model.layers.0.self_attn.q_proj.{name}"].clone()
            for name in ("qweight", "qzeros", "scales", "g_idx")
        }))),
        (f"{MODULE}.weight", "[48, 48]", "[80, 48]"),
    ),
    "GPTQ: weights besides": (
        packed(GPTQ, added("weight", np.ones((80, 48), np.float32))), (f"{MODULE}.weight", "qweight"),
    ),
    "GPTQ: a group of 30 digits": (packed(GPTQ, settings(group_size=10**30)), ("group_size: 1000",)),
    "AWQ: a group of 30 digits": (packed(AWQ, settings(group_size=10**30)), ("group_size: 1000",)),
    "float8: blocks of 30 digits": (packed(FP8, settings(weight_block_size=[10**30] * 2)), ("weight_block_size: [",)),
    "GPTQ: bits as a fraction": (packed(GPTQ, settings(bits=4.5)), ("bits: 4.5", "2, 4, 8")),
    "AWQ: zeros of floats": retyped(AWQ, "qzeros", "float32"),
    "AWQ: scales of integers": retyped(AWQ, "scales", "int16"),
    "AWQ: no columns": (packed(AWQ, part("qweight", lambda one: one[:, :0])), (f"{MODULE}.qweight", "[48, 0]")),
    "AWQ: zeros of nothing": (packed(AWQ, part("qweight", lambda one: None)), (f"{MODULE}.", "all parts")),
    "four bits: scales of bytes, and no others for these": retyped(NF4, "weight.absmax", "uint8"),
    "four bits: scales of words": retyped(NF4, "weight.absmax", "int32"),
    "four bits: scales of floats, and others for these": retyped(NESTED, "weight.absmax", "float32"),
    "four bits: outer scales of integers": retyped(NESTED, "weight.nested_absmax", "int32"),
    "four bits: a map of integers": retyped(NF4, "weight.quant_map", "int8"),
    "four bits: an outer map of integers": retyped(NESTED, "weight.nested_quant_map", "int64"),
    "four bits: the shape turned": (packed(NF4, state(shape=[48, 80])), (f"{MODULE}.weight", "[48, 80]", "[80, 48]")),
    "four bits: the shape of another matrix": (
        packed(NF4, state(shape=[40, 96])), (f"{MODULE}.weight", "[40, 96]", "[80, 48]"),
    ),
    "four bits: a shape of nothing": (packed(NF4, state(shape=[0, 48])), (STATE, "shape")),
    "four bits: an offset of 400 digits": (packed(NESTED, state(nested_offset=HUGE)), (STATE, "nested_offset")),
    "four bits: no size of blocks": (packed(NF4, state(blocksize=None)), (STATE, "blocksize")),
    "four bits: a shape of thousands of digits": (packed(NF4, state(shape=[10**3000] * 2)), (STATE, "shape")),
    "four bits: blocks of all the memory": (packed(NF4, of_one_block(2**60)), (STATE, "blocksize")),
    "four bits: an offset that is none": (packed(NESTED, state(nested_offset="x")), (STATE, "nested_offset")),
    "four bits: a state of floats": (
        packed(NF4, part(STATE.removeprefix(f"{MODULE}."), lambda one: np.ones(4, np.float32))), (STATE, "uint8"),
    ),
    "four bits: two states": (
        packed(NF4, edited(lambda all: all.update({STATE.replace("nf4", "fp4"): all[STATE].clone()}))),
        (f"{MODULE}.weight", "quant_state"),
    ),
    "eight bits: scales of integers": retyped(INT8, "SCB", "int32"),
    "eight bits: no rows": (
        packed(INT8, part("weight", lambda one: one[:0]), part("SCB", lambda one: one[:0])),
        (f"{MODULE}.weight", "[0, 48]"),
    ),
    "packed: a shape of NaN": (
        packed(PACKED, part("weight_shape", lambda one: np.full(2, np.nan, np.float32))),
        (f"{MODULE}.weight_shape", "float32"),
    ),
    "packed: a shape below zero": (
        packed(PACKED, part("weight_shape", lambda one: -one)), (f"{MODULE}.weight_packed", "-80"),
    ),
    "packed: a shape beyond all": (
        packed(PACKED, part("weight_shape", lambda one: one * 2**56)), (f"{MODULE}.weight_packed",),
    ),
    "packed: no rows": (
        packed(PACKED, *(part(name, lambda one: one[:0]) for name in ("weight_packed", "weight_scale")),
               part("weight_shape", lambda one: np.array([0, 48]))),
        (f"{MODULE}.weight_packed", "[0, 6]"),
    ),
    "packed: scales of integers": retyped(PACKED, "weight_scale", "int8"),
    "packed: scales of bytes": retyped(PACKED, "weight_scale", "uint8"),
    "packed: zeros of floats": (
        packed(ZEROS, part("weight_zero_point", lambda one: np.ones((80, 3), np.float16))),
        (f"{MODULE}.weight_zero_point", "float16"),
    ),
    "packed: groups of floats": (packed(ORDERED, cast("weight_g_idx", "float32")), (f"{MODULE}.weight_g_idx",)),
    "packed: groups of half the inputs": (
        packed(ORDERED, part("weight_g_idx", lambda one: one[::2])), (f"{MODULE}.weight_g_idx", "[24]"),
    ),
    "packed: groups of which one is none": (
        packed(ORDERED, part("weight_g_idx", lambda one: one - 1)), (f"{MODULE}.weight_g_idx", "3 groups"),
    ),
    "packed: weights besides": (
        packed(PACKED, added("weight", np.ones((80, 48), np.float32))), (f"{MODULE}.weight", "weight_packed"),
    ),
    "packed: scales of nothing": (packed(PACKED, part("weight_packed", lambda one: None)), (f"{MODULE}.weight_scale",)),
    "float8: scales of integers": retyped(FP8, "weight_scale", "int32"),
    "float8: no rows": (
        packed(FP8_ROWS, part("weight", lambda one: one[:0]), part("weight_scale", lambda one: one[:0])),
        (f"{MODULE}.weight", "[0, 48]"),
    ),
    "float8: scales of nothing": (packed(FP8, part("weight", lambda one: None)), (f"{MODULE}.weight_scale",)),
    "NVFP4: scales of bytes": (
        four_bit_floats("NVFP4", part("weight_scale", lambda one: np.ones((80, 3), np.uint8))),
        (f"{MODULE}.weight_scale", "uint8"),
    ),
    "NVFP4: the scale of all an integer": retyped("NVFP4", "weight_global_scale", "int32", "test_fp4"),
    "NVFP4: no rows": (
        four_bit_floats("NVFP4", *(part(one, lambda one: one[:0]) for one in ("weight_packed", "weight_scale"))),
        (f"{MODULE}.weight_packed", "[0, 24]"),
    ),
    "Model Optimizer's AWQ: scales of integers": retyped(MODELOPT_AWQ, "weight_scale", "int32"),
    "Model Optimizer's AWQ: inputs scaled by integers": retyped(MODELOPT_AWQ, "pre_quant_scale", "int32"),
    "MLX: scales of integers": retyped("MLX", "scales", "int32"),
    "MLX: biases of bytes": retyped("MLX", "biases", "uint8"),
    "MLX: no rows": (
        packed("MLX", *(part(name, lambda one: one[:0]) for name in ("weight", "scales", "biases"))),
        (f"{MODULE}.weight", "[0, 6]"),
    ),
}  # fmt: skip
# What a folder's config says of tensors that are in another format.
OTHER_FORMATS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "GPTQ, called AWQ": (packed(GPTQ, settings(quant_method="awq", version="gemm")), ("qzeros",)),
    "GPTQ, called MXFP4": (packed(GPTQ, instead(quant_method="mxfp4")), ("mxfp4", "proj.", "GPTQ")),
    "GPTQ, called Model Optimizer's": (
        packed(GPTQ, instead(quant_method="modelopt", quant_algo="NVFP4")), ("modelopt", "proj."),
    ),
    "GPTQ, called bitsandbytes": (packed(GPTQ, instead(quant_method="bitsandbytes")), ("bitsandbytes", "proj.")),
    "GPTQ, called FP8": (packed(GPTQ, instead(quant_method="fp8")), ("fp8", "proj.")),
    "GPTQ, called compressed-tensors": (packed(GPTQ, instead(**COMPRESSED)), ("compressed-tensors", "proj.")),
    "GPTQ, called MLX": (packed(GPTQ, instead(quant_method="mlx", bits=4, group_size=16)), ("proj.",)),
    "GPTQ, called nothing": (
        packed(GPTQ, lambda world: world.edit("one/config.json", quantization_config=...)),
        ("proj.", "quantization_config"),
    ),
    "AWQ, called GPTQ": (packed(AWQ, instead(quant_method="gptq", bits=4, group_size=16)), ("proj.",)),
    "four bits, called GPTQ": (packed(NF4, instead(quant_method="gptq", bits=4, group_size=16)), ("gptq", "proj.")),
    "four bits, called MXFP4": (packed(NF4, instead(quant_method="mxfp4")), ("mxfp4", "proj.")),
    "eight bits, called AWQ": (packed(INT8, instead(quant_method="awq", bits=4, group_size=16)), ("awq", "proj.")),
    "eight bits, called nothing": (
        packed(INT8, lambda world: world.edit("one/config.json", quantization_config=...)), ("proj.", "quantised"),
    ),
    "packed, called bitsandbytes": (packed(PACKED, instead(quant_method="bitsandbytes")), ("proj.weight_packed",)),
    "packed, called of whole numbers": (packed(PACKED, settings(format="int-quantized")), ("proj.weight_scale",)),
    "AWQ of Model Optimizer's, called FP8": (packed(MODELOPT_AWQ, settings(quant_algo="FP8")), ("proj.weight",)),
    "FP8, called MXFP4": (packed(FP8, instead(quant_method="mxfp4")), ("mxfp4", "proj.weight")),
    "MLX, called GPTQ": (
        packed("MLX", lambda world: world.edit("one/config.json", quantization=...),
               instead(quant_method="gptq", bits=4, group_size=16)),
        ("U32",),
    ),
}  # fmt: skip


@changing
def of_all(world: World, edit: Edit) -> None:
    """The same change of the tensors of all models."""
    for model in ("base", "one", "two"):
        edited(edit, f"{model}/model.safetensors")(world)


def without(*names: str) -> Change:
    return of_all(lambda tensors: [tensors.pop(name) for name in names])


UNKNOWN = everywhere(model_type="mystery", architectures=["MysteryForCausalLM"])
GATES = {f"model.layers.{i}.mlp.gate_proj.weight" for i in range(3)}
# Sizes that config.json says and no tensor has, in an architecture that is known; and in one that is not.
SIZES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "hidden_size": ({"hidden_size": 64}, ("has shape", "64")),
    "intermediate_size": ({"intermediate_size": 96}, ("mlp.", "80", "96")),
    "vocab_size, too many": ({"vocab_size": 80}, ("embed_tokens", "[64, 48]", "80")),
    "vocab_size, too few": ({"vocab_size": 32}, ("embed_tokens", "[64, 48]", "32")),
    "num_hidden_layers, too few": ({"num_hidden_layers": 2}, ("num_hidden_layers: 2", "3")),
    "num_hidden_layers, too many": ({"num_hidden_layers": 5}, ("num_hidden_layers: 5", "3")),
    "num_attention_heads": ({"num_attention_heads": 8}, ("self_attn.", "[48, 48]", "96")),
    "num_key_value_heads": ({"num_key_value_heads": 4}, ("self_attn.k_proj", "[24, 48]", "48")),
    "head_dim": ({"head_dim": 16}, ("self_attn.", "has shape")),
    "head_dim left out": ({"head_dim": ..., "num_attention_heads": 2, "num_key_value_heads": 2}, ("self_attn.",)),
}
CONTRADICTIONS: dict[str, tuple[Change, tuple[str, ...]]] = {
    **{f"sizes: {name}": (everywhere(**changes), says) for name, (changes, says) in SIZES.items()},
    **{f"sizes of a stranger: {name}": (together(UNKNOWN, everywhere(**changes)), says)
       for name, (changes, says) in SIZES.items()},
    "sizes: one model's alone": (lambda world: world.edit("two/config.json", intermediate_size=96), ("two", "mlp.")),
    "sizes: a projection wider": (
        of_all(lambda tensors: tensors.update({
            f"{MODULE}.weight": tensors[f"{MODULE}.weight"].repeat(2, 1)})),
        (f"{MODULE}.weight", "[160, 48]", "[80, 48]"),
    ),
    "sizes: a projection turned": (
        of_all(lambda tensors: tensors.update({
            f"{MODULE}.weight": tensors[f"{MODULE}.weight"].T.contiguous()})),
        (f"{MODULE}.weight", "[48, 80]", "[80, 48]"),
    ),
    "sizes: a projection flat": (
        of_all(lambda tensors: tensors.update({f"{MODULE}.weight": tensors[f"{MODULE}.weight"].flatten()})),
        (f"{MODULE}.weight", "[3840]", "[80, 48]"),
    ),
    "sizes: a norm without values": (
        of_all(lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:0].clone()})),
        ("model.norm.weight", "[0]", "[48]"),
    ),
    "tensors: none of a projection": (without(f"{MODULE}.weight"), (f"{MODULE}.weight", "config")),
    "tensors: no gates": (without(*GATES), ("mlp.gate_proj.weight", "config")),
    "tensors: no norm at the end": (without("model.norm.weight"), ("model.norm.weight", "config")),
    "tensors: no embedding": (without("model.embed_tokens.weight"), ("model.embed_tokens.weight",)),
    "tensors: biases that are missing": (everywhere(attention_bias=True), ("q_proj.bias", "config")),
    "tensors: an untied model without its head": (everywhere(tie_word_embeddings=False), ("lm_head.weight",)),
}  # fmt: skip

PEFT = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 8, "target_modules": None}
LORA = "base_model.model.model.layers.0.self_attn.q_proj"
TOKENS = "base_model.model.model.embed_tokens"
FACTORS = {f"{LORA}.lora_A.weight": (4, 48), f"{LORA}.lora_B.weight": (48, 4)}
OF_TOKENS = {f"{TOKENS}.lora_embedding_A": (4, 64), f"{TOKENS}.lora_embedding_B": (48, 4)}
MAGNITUDE = f"{LORA}.lora_magnitude_vector"


@changing
def adapter(world: World, /, shapes: dict[str, tuple[int, ...]], **changes: Any) -> None:
    """An adapter of these tensors in the recipe's place of `one`."""
    from safetensors.numpy import save_file

    world.write("lora/adapter_config.json", json.dumps(PEFT | changes))
    save_file(
        {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()},
        world / "lora/adapter_model.safetensors",
    )
    models = [{"model": name, "parameters": {"weight": 0.5, "density": 0.5}} for name in ("base+lora", "two")]
    world.edit("recipe.yaml", models=models)


ADAPTERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "DoRA without a magnitude": (adapter(FACTORS, use_dora=True), (LORA, "lora_magnitude_vector", "use_dora")),
    "DoRA of tokens without a magnitude": (adapter(OF_TOKENS, use_dora=True), (TOKENS, "lora_magnitude_vector")),
    "DoRA, one magnitude of two": (
        adapter(FACTORS | {f"{MAGNITUDE}.weight": (48,)} | OF_TOKENS, use_dora=True), (TOKENS, "use_dora"),
    ),
    "a magnitude, and no DoRA": (adapter(FACTORS | {MAGNITUDE: (48,)}), (MAGNITUDE, "use_dora")),
    "a magnitude twice": (
        adapter(FACTORS | {MAGNITUDE: (48,), f"{MAGNITUDE}.weight": (48,)}, use_dora=True), (MAGNITUDE, "twice"),
    ),
    "use_dora: a text": (adapter(FACTORS, use_dora="false"), ("use_dora: 'false'", "true or false")),
    "use_rslora: a text": (adapter(FACTORS, use_rslora="true"), ("use_rslora: 'true'", "true or false")),
    "fan_in_fan_out: a number": (adapter(FACTORS, fan_in_fan_out=1), ("fan_in_fan_out: 1", "true or false")),
    "factors of a layer and of tokens": (
        adapter(FACTORS | {f"{LORA}.lora_embedding_A": (4, 48), f"{LORA}.lora_embedding_B": (48, 4)}),
        (f"{LORA}.lora_embedding_A", "lora_A"),
    ),
    "factors of tokens and of a layer": (
        adapter(OF_TOKENS | {f"{TOKENS}.lora_A.weight": (4, 48)}), (f"{TOKENS}.lora_embedding_A", "lora_A"),
    ),
    "one factor of a layer, one of tokens": (
        adapter({f"{LORA}.lora_A.weight": (4, 48), f"{LORA}.lora_embedding_B": (48, 4)}), (LORA, "lora_embedding_B"),
    ),
    "factors twice, with and without PEFT's prefix": (
        adapter(FACTORS | {name.removeprefix("base_model.model."): shape for name, shape in FACTORS.items()}),
        (f"{LORA}.lora_A", "twice"),
    ),
    "factors of no rank": (
        adapter({f"{LORA}.lora_A.weight": (0, 48), f"{LORA}.lora_B.weight": (48, 0)}), (f"{LORA}.lora_A", "[0, 48]"),
    ),
    "a module saved twice": (
        adapter(FACTORS | {"base_model.model.model.norm.weight": (48,), "model.norm.weight": (48,)}),
        ("model.norm.weight", "twice"),
    ),
}  # fmt: skip

CASES: list[Case] = [
    Case(f"{kind}: {name}", change, says, MERGE)
    for kind, cases in (
        ("quantised", PARTS), ("format", OTHER_FORMATS), ("config.json", CONTRADICTIONS), ("adapter", ADAPTERS),
    )
    for name, (change, says) in cases.items()
] + [
    Case("quantised: four bits, one block that is larger than the matrix", packed(NF4, of_one_block(2**31 - 1)), (),
         MERGE, 0, ("out",)),
    # The same where the model is run: what opens folders is one.
    Case("quantised: GPTQ, zeros of floats, searched", *PARTS["GPTQ: zeros of floats"]),
    Case("format: GPTQ, called MXFP4, searched", *OTHER_FORMATS["GPTQ, called MXFP4"]),
    Case("quantised: packed, a shape of NaN, planned", *PARTS["packed: a shape of NaN"], ("plan", "config.yaml")),
]  # fmt: skip
