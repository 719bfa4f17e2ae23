"""Matrices of four-bit floats with a scale for each group of inputs: NVFP4 and MXFP4, dequantised as they are read.

Codes of E2M1 (a sign, two bits of exponent, one of mantissa: `VALUES`) lie two to a byte, the first in the lower half.
In NVFP4 16 inputs have a scale in common, float8_e4m3, and all of the matrix has a second one, float32; in MXFP4 32
inputs have an exponent, the scale 2^(byte - 127) (Open Compute Project, Microscaling Formats 1.0, 2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from evojax_merge.checkpoints.folder import Folder, Tensor, open_folder
from evojax_merge.checkpoints.fp8 import scaled_matrices
from evojax_merge.checkpoints.quantised import (
    EXPONENT,
    FP8,
    OF_ACTIVATIONS,
    WITH_FP8,
    QuantisedTensor,
    checked_setting,
    dequantised_dtype,
    part_of,
    quantisation,
    unpack,
)
from evojax_merge.errors import InputError

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NVFP4_GROUP, MXFP4_GROUP = 16, 32
# What the scale of a whole matrix does to those of its groups.
Outer = Literal["multiplies", "divides"]


@dataclass(frozen=True)
class GroupScales:
    """Parts: codes `uint8[out, in / 2]`, scales `[out, in / group]`, as exponents where they are uint8, and, unless
    `outer` is None, the scale of all, one value."""

    group: int
    outer: Outer | None

    def values(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        weight = VALUES[unpack(parts[0], 4, axis=1)]
        scale = (parts[1].view(EXPONENT) if parts[1].dtype == np.uint8 else parts[1]).astype(np.float32)
        if self.outer is not None:
            outer = parts[2].astype(np.float32).reshape(())
            scale = scale * outer if self.outer == "multiplies" else scale / outer
        weight *= np.repeat(scale, self.group, axis=1)
        return weight


@dataclass(frozen=True)
class Transposed:
    """Of experts: parts `blocks uint8[experts, out, groups, 16]` and `scales uint8[experts, out, groups]`, as
    `[experts, in, out]`."""

    def values(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        experts, outputs, groups, octets = parts[0].shape
        rows = GroupScales(MXFP4_GROUP, None).values(
            [parts[0].reshape(experts * outputs, groups * octets), parts[1].reshape(experts * outputs, groups)]
        )
        return rows.reshape(experts, outputs, -1).swapaxes(1, 2)


def four_bit_matrix(
    stored: Mapping[str, Tensor],
    names: Sequence[str],
    group: int,
    outer: Outer | None,
    dtype: np.dtype,
) -> QuantisedTensor:
    """The matrix of these tensors: codes, scales and, unless `outer` is None, the scale of all. Raises InputError where
    they do not fit each other."""
    codes = stored[names[0]]
    if len(codes.shape) != 2 or codes.dtype != np.uint8 or codes.shape[1] * 2 % group:
        raise InputError(
            codes.file, f"{names[0]} is {codes.dtype}{list(codes.shape)}; expected a matrix of uint8, two codes each, "
            f"in groups of {group}",
        )  # fmt: skip
    outputs, inputs = codes.shape[0], 2 * codes.shape[1]
    scales = part_of(stored, codes, names[1], (outputs, inputs // group))
    if scales.dtype not in (FP8, EXPONENT, np.uint8):
        raise InputError(scales.file, f"{names[1]} is {scales.dtype}; expected scales of eight bits")
    parts = [codes, scales] + ([] if outer is None else [part_of(stored, codes, names[2], (), (1,))])
    return QuantisedTensor(dtype, (outputs, inputs), tuple(parts), GroupScales(group, outer))


def open_modelopt(path: Path, quantised: Path) -> Folder:
    """The dequantised model of a folder of NVIDIA's Model Optimizer, of FP8 or NVFP4, as a folder at `path`. Raises
    InputError for another algorithm, and for a matrix whose parts do not fit each other.

    NVFP4 has `weight uint8[out, in / 2]`, `weight_scale` and `weight_scale_2`, which multiplies it.
    """
    known = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4")
    checked_setting(quantised, "quant_algo", quantisation(quantised).get("quant_algo"), known)
    dtype, stored = dequantised_dtype(quantised, "bfloat16"), open_folder(quantised, WITH_FP8).entries
    entries = dict(stored)
    for outer in [name for name in stored if name.endswith(".weight_scale_2")]:
        weight = outer.removesuffix("_scale_2")
        if weight not in stored:
            raise InputError(stored[outer].file, f"{outer}: there is no {weight}, which it is a part of")
        names = (weight, f"{weight}_scale", outer)
        entries[weight] = four_bit_matrix(stored, names, NVFP4_GROUP, "multiplies", dtype)
        for part in names[1:]:
            del entries[part]
    return Folder(path, scaled_matrices(entries, None, dtype))


def open_mxfp4(path: Path, quantised: Path) -> Folder:
    """The dequantised model of a folder whose experts are MXFP4, as gpt-oss was published, as a folder at `path`.
    Raises InputError where the parts of one do not fit each other."""
    dtype, stored = dequantised_dtype(quantised, "bfloat16"), open_folder(quantised, WITH_FP8).entries
    entries = {name: tensor for name, tensor in stored.items() if not name.endswith(OF_ACTIVATIONS)}
    for name in [name for name in stored if name.endswith("_blocks")]:
        blocks, whole = entries.pop(name), name.removesuffix("_blocks")
        if blocks.dtype != np.uint8 or len(blocks.shape) != 4 or blocks.shape[3] * 2 != MXFP4_GROUP:
            raise InputError(
                blocks.file, f"{name} is {blocks.dtype}{list(blocks.shape)}; expected uint8[experts, outputs, groups, "
                f"{MXFP4_GROUP // 2}]",
            )  # fmt: skip
        scales = part_of(stored, blocks, f"{whole}_scales", blocks.shape[:3])
        if scales.dtype != np.uint8:
            raise InputError(scales.file, f"{whole}_scales is {scales.dtype}; expected uint8")
        entries.pop(f"{whole}_scales")
        experts, outputs, groups, _ = blocks.shape
        shape = (experts, groups * MXFP4_GROUP, outputs)
        entries[whole] = QuantisedTensor(dtype, shape, (blocks, scales), Transposed())
    return Folder(path, entries)
