"""Matrices of four-bit floats with a scale for each group of inputs, NVFP4 and MXFP4, and Model Optimizer's other
formats, dequantised as they are read.

Codes of E2M1 (a sign, two bits of exponent, one of mantissa: `VALUES`) lie two to a byte, the first in the lower half.
In NVFP4 16 inputs share a scale, float8_e4m3, and the whole matrix has a second scale, float32; in MXFP4 32 inputs
share an exponent, the scale 2^(byte - 127) (Open Compute Project, Microscaling Formats 1.0, 2023).
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from evojax_merge.checkpoints.folder import ComputedTensor, Formula
from evojax_merge.checkpoints.fp8 import exchange_scaled
from evojax_merge.checkpoints.quantised import (
    BYTES,
    EXPONENT,
    FLOATS,
    FP8,
    QuantisedFolder,
    check_matrix,
    unpack,
)
from evojax_merge.errors import InputError

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NVFP4_GROUP, MXFP4_GROUP = 16, 32
# The effect of a whole matrix's scale on the scales of its groups.
Outer = Literal["multiplies", "divides"]


def group_scales(parts: Sequence[np.ndarray], group: int, outer: Outer | None) -> np.ndarray:
    """The matrix of codes `uint8[out, in / 2]`, scales `[out, in / group]` (exponents where uint8) and, unless `outer`
    is None, one scale of the whole matrix."""
    weight = VALUES[unpack(parts[0], 4, axis=1)]
    scale = (parts[1].view(EXPONENT) if parts[1].dtype == np.uint8 else parts[1]).astype(np.float32)
    if outer is not None:
        whole = parts[2].astype(np.float32).reshape(())
        scale = scale * whole if outer == "multiplies" else scale / whole
    weight *= np.repeat(scale, group, axis=1)
    return weight


def transposed_experts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Expert weights `[experts, in, out]`, which are stored transposed as `blocks uint8[experts, out, groups, 16]` and
    `scales uint8[experts, out, groups]`."""
    experts, outputs, groups, octets = parts[0].shape
    flat = [parts[0].reshape(experts * outputs, groups * octets), parts[1].reshape(experts * outputs, groups)]
    return group_scales(flat, MXFP4_GROUP, None).reshape(experts, outputs, -1).swapaxes(1, 2)


def exchange_four_bits(
    folder: QuantisedFolder, weight: str, names: Sequence[str], group: int, outer: Outer | None
) -> None:
    """Exchange the matrix `weight` of the tensors of these names: codes, scales and, unless `outer` is None, the
    matrix's scale. Raises InputError where the tensors do not fit each other."""
    codes = folder.stored[names[0]]
    check_matrix(names[0], codes, *BYTES)
    outputs, inputs = codes.shape[0], 2 * codes.shape[1]
    if inputs % group:
        raise InputError(codes.file, f"{names[0]} has {inputs} codes in a row; expected groups of {group}")
    dtypes = (EXPONENT, *BYTES) if group == MXFP4_GROUP else (FP8,)
    parts = [codes, folder.part(codes, names[1], dtypes, (outputs, inputs // group))]
    if outer is not None:
        parts.append(folder.part(codes, names[2], FLOATS, (), (1,)))
    folder.exchange(weight, (outputs, inputs), parts, group_scales, group, outer)


def pairs_of_outputs(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The matrix of `uint8[out / 2, in]` and scales `[out, groups]`. A byte holds the numbers, from -8 to 7, of two
    outputs: the first in its lower half, the second in its upper half."""
    weight = (unpack(parts[0], 4, axis=0).astype(np.int8) ^ 8) - 8
    scale = parts[1].astype(np.float32)
    return weight.astype(np.float32) * np.repeat(scale, weight.shape[1] // scale.shape[1], axis=1)


def of_scaled_inputs(parts: Sequence[np.ndarray], formula: Formula, settings: Sequence[Any]) -> np.ndarray:
    """The matrix whose inputs are scaled first, from the parts of `formula` and the inputs' scales `[in]`."""
    return formula(parts[:-1], *settings) * parts[-1].astype(np.float32)


# Model Optimizer's algorithms, and its name for a mixture of them.
MIXED, AWQ = "MIXED_PRECISION", "W4A16_AWQ"
MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", AWQ)
OUTER, OF_INPUTS = ".weight_scale_2", ".pre_quant_scale"


def dequantise_modelopt(folder: QuantisedFolder) -> None:
    """Exchange the matrices of a folder of NVIDIA's Model Optimizer, of FP8, NVFP4 or four bits by AWQ, or of several.
    Raises InputError for another algorithm, and for a matrix whose parts do not fit each other.

    NVFP4 has `weight uint8[out, in / 2]`, `weight_scale` and `weight_scale_2`, which multiplies it; AWQ (`W4A16_AWQ`)
    has `weight uint8[out / 2, in]` and `weight_scale [out, in / group]`. Both may have `pre_quant_scale [in]`, where
    the inputs' scales are not folded into a norm or the matrix before.
    """
    settings = folder.settings
    layers = settings.get("quantized_layers") if settings.get("quant_algo") == MIXED else None
    layer_settings = [layer for layer in layers.values() if isinstance(layer, dict)] if isinstance(layers, dict) else []
    algorithms = [layer.get("quant_algo") for layer in layer_settings or [settings]]
    for algorithm in algorithms:
        folder.checked("quant_algo", algorithm, MODELOPT)
    stored, entries = folder.stored, folder.entries
    for outer in [name for name in stored if name.endswith(OUTER)]:
        weight = outer.removesuffix("_scale_2")
        if weight not in stored:
            raise InputError(stored[outer].file, f"{outer}: there is no {weight}, which it is a part of")
        exchange_four_bits(folder, weight, (weight, f"{weight}_scale", outer), NVFP4_GROUP, "multiplies")
    pairs = [name for name, tensor in entries.items() if name.endswith(".weight") and tensor.dtype == np.uint8]
    for name in pairs if AWQ in algorithms else ():
        packed, scale = stored[name], stored.get(f"{name}_scale")
        check_matrix(name, packed, *BYTES)
        groups = 0 if scale is None or len(scale.shape) != 2 else scale.shape[1]
        if groups == 0 or packed.shape[1] % groups:
            actual = "no such tensor" if scale is None else str(list(scale.shape))
            raise InputError(
                packed.file, f"{name}_scale: found {actual}; expected the scales of groups of {name}'s inputs, "
                f"uint8{list(packed.shape)}",
            )  # fmt: skip
        outputs = 2 * packed.shape[0]
        parts = (packed, folder.part(packed, f"{name}_scale", FLOATS, (outputs, groups)))
        folder.exchange(name, (outputs, packed.shape[1]), parts, pairs_of_outputs)
    exchange_scaled(folder, None)
    for name in [name for name in entries if name.endswith(OF_INPUTS)]:
        weight, scale = f"{name.removesuffix(OF_INPUTS)}.weight", entries.pop(name)
        whole = entries.get(weight)
        if not isinstance(whole, ComputedTensor) or scale.shape != whole.shape[1:] or scale.dtype not in FLOATS:
            actual = f"{scale.dtype}{list(scale.shape)}"
            raise InputError(scale.file, f"{name} is {actual}; expected a float for each input of a quantised {weight}")
        scaled_parts = (*whole.parts, scale)
        folder.exchange(weight, whole.shape, scaled_parts, of_scaled_inputs, whole.formula, whole.settings)


def dequantise_mxfp4(folder: QuantisedFolder) -> None:
    """Exchange the experts of a folder that has them in MXFP4, as gpt-oss was published. Raises InputError where the
    parts of one do not fit each other."""
    for name in [name for name in folder.stored if name.endswith("_blocks")]:
        blocks, whole = folder.entries.pop(name), name.removesuffix("_blocks")
        is_grouped = len(blocks.shape) == 4 and 0 not in blocks.shape and blocks.shape[3] * 2 == MXFP4_GROUP
        if blocks.dtype != np.uint8 or not is_grouped:
            raise InputError(
                blocks.file, f"{name} is {blocks.dtype}{list(blocks.shape)}; expected uint8[experts, outputs, groups, "
                f"{MXFP4_GROUP // 2}]",
            )  # fmt: skip
        scales = folder.part(blocks, f"{whole}_scales", BYTES, blocks.shape[:3])
        folder.check_once(name, whole)
        experts, outputs, groups, _ = blocks.shape
        folder.exchange(whole, (experts, groups * MXFP4_GROUP, outputs), (blocks, scales), transposed_experts)
