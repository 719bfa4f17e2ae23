"""Checkpoints in the formats of compressed-tensors (llm-compressor's) whose scales are of rows, of groups or of blocks,
dequantised as they are read.

A weight is `(q − z) · scale`. `int-quantized`, `float-quantized` and `mxfp8-quantized` keep q in the tensor `weight`,
int8 or float8_e4m3[out, in]. `pack-quantized` keeps `weight_packed int32[out, in · b / 32]` of 32 / b numbers in a
word, lowest bits first, each plus 2^(b − 1), and `weight_shape`. `weight_scale` has one value, one for each output
([out, 1]), for each group of inputs ([out, groups]; where uint8, the exponents of powers of two, 2^(byte − 127)), or
for each block; `weight_zero_point`, where there is one, is like it (packed
along the outputs, where the weight is packed), and `weight_g_idx int32[in]` says which group an input is of.

`nvfp4-pack-quantized` and `mxfp4-pack-quantized` keep codes of four-bit floats in `weight_packed uint8[out, in / 2]`
(see `fp4`), the former with a `weight_global_scale`, by which the scales of the groups are divided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.checkpoints.folder import Folder, Tensor, open_folder
from evojax_merge.checkpoints.fp4 import MXFP4_GROUP, NVFP4_GROUP, Outer, four_bit_matrix
from evojax_merge.checkpoints.quantised import (
    EXPONENT,
    OF_ACTIVATIONS,
    WITH_FP8,
    QuantisedTensor,
    check_dequantised,
    checked_setting,
    dequantised_dtype,
    group_size,
    part_of,
    quantisation,
    unpack,
)
from evojax_merge.errors import InputError, shown

PACKED, PLAIN = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
# How many inputs have a scale in common, and what the scale of all does to it.
FOUR_BITS: dict[str, tuple[int, Outer | None]] = {
    "mxfp4-pack-quantized": (MXFP4_GROUP, None),
    "nvfp4-pack-quantized": (NVFP4_GROUP, "divides"),
}
SCALE, SHAPE = ".weight_scale", ".weight_shape"
# What a matrix may be made of, behind its module's `weight`.
_SUFFIXES = ("", "_packed", "_scale", "_global_scale", "_zero_point", "_shape", "_g_idx")


@dataclass(frozen=True)
class Scales:
    """Parts `weight` or `weight_packed`, `weight_scale` and, as far as there are, `weight_zero_point` and
    `weight_g_idx`. step: how many rows and columns have a scale in common; bits: of packed weights, else 0."""

    shape: tuple[int, int]
    step: tuple[int, int]
    bits: int
    has_zeros: bool
    zeros_packed: bool

    def values(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        rows, columns = self.shape
        weight = self._numbers(parts[0], axis=1)[:, :columns] if self.bits else parts[0].astype(np.float32)
        columns_of = parts[-1] if len(parts) > 2 + self.has_zeros else np.arange(columns) // self.step[1]
        places = np.ix_(np.arange(rows) // self.step[0], columns_of)
        grid = (-(-rows // self.step[0]), -1)
        scale = (parts[1].view(EXPONENT) if parts[1].dtype == np.uint8 else parts[1]).astype(np.float32).reshape(grid)
        if self.has_zeros:
            zeros = self._numbers(parts[2], axis=0)[: grid[0]] if self.zeros_packed else parts[2].astype(np.float32)
            weight = weight - zeros.reshape(grid)[places]
        return weight * scale[places]

    def _numbers(self, words: np.ndarray, axis: int) -> np.ndarray:
        return unpack(words, self.bits, axis).astype(np.float32) - np.float32(2 ** (self.bits - 1))


def open_compressed_tensors(path: Path, quantised: Path) -> Folder:
    """The dequantised model of such a folder, as a folder at `path`. Raises InputError for another format, and for a
    matrix whose parts do not fit each other."""
    settings = quantisation(quantised)
    how = settings.get("format")
    checked_setting(quantised, "format", how, (PACKED, *PLAIN, *FOUR_BITS))
    for key in ("sparsity_config", "transform_config"):
        given = settings.get(key)
        dense = not given or (isinstance(given, dict) and given.get("format") == "dense")
        checked_setting(quantised, key, None if dense else given, (None,))
    weights = _weight_settings(quantised, settings)
    bits = packed_bits(quantised) if how == PACKED else 0
    dtype, stored = dequantised_dtype(quantised, "bfloat16"), open_folder(quantised, WITH_FP8).entries
    entries = {name: tensor for name, tensor in stored.items() if not name.endswith(OF_ACTIVATIONS)}
    for name in [name for name in entries if name.endswith(SCALE)]:
        module = name.removesuffix(SCALE)
        own = {key: entries.pop(key, None) for key in (f"{module}.weight{one}" for one in _SUFFIXES)}
        kept = own[f"{module}.weight" if how in PLAIN else f"{module}.weight_packed"]
        if kept is None or len(kept.shape) != 2:
            raise InputError(stored[name].file, f"{name}: expected the matrix that it scales, as {how} keeps it")
        if how in FOUR_BITS:
            parts = [f"{module}.weight{part}" for part in ("_packed", "_scale", "_global_scale")]
            entries[f"{module}.weight"] = four_bit_matrix(stored, parts, *FOUR_BITS[how], dtype)
            continue
        shape = _packed_shape(stored, kept, module, bits) if bits else (kept.shape[0], kept.shape[1])
        entries[f"{module}.weight"] = _dequantised(quantised, stored, kept, module, shape, bits, weights, dtype)
    check_dequantised(entries, "weight_scale")
    return Folder(path, entries)


def packed_bits(quantised: Path) -> int:
    """How many bits a packed number has. Raises InputError where words are not filled with such numbers."""
    weights = _weight_settings(quantised, quantisation(quantised))
    bits: int = checked_setting(quantised, "num_bits", weights.get("num_bits"), (2, 4, 8))
    return bits


def _weight_settings(quantised: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of weights, the same in all groups of modules."""
    groups = settings.get("config_groups")
    found = [one.get("weights") for one in groups.values() if isinstance(one, dict)] if isinstance(groups, dict) else []
    first = next((one for one in found if isinstance(one, dict)), None)
    if first is None or any(one not in (first, None) for one in found):
        raise InputError(
            quantised / "config.json", f"quantization_config.config_groups: {shown(groups)}; expected groups of "
            "modules that say the same of their weights",
        )  # fmt: skip
    strategy = first.get("strategy") or ("group" if first.get("group_size") else "tensor")
    checked_setting(quantised, "strategy", strategy, ("tensor", "channel", "group", "tensor_group", "block"))
    return {**first, "strategy": strategy}


def _packed_shape(stored: Mapping[str, Tensor], packed: Tensor, module: str, bits: int) -> tuple[int, int]:
    """The shape of a packed matrix, of which the last words may be filled up."""
    found = part_of(stored, packed, f"{module}{SHAPE}", (2,)).read()
    rows, columns = (int(size) for size in found)
    if packed.dtype != np.int32 or packed.shape != (rows, -(-columns * bits // 32)):
        raise InputError(
            packed.file, f"{module}.weight_packed is {packed.dtype}{list(packed.shape)}; {module}.weight_shape says "
            f"[{rows}, {columns}], of {bits} bits",
        )  # fmt: skip
    return rows, columns


def _dequantised(
    quantised: Path,
    stored: Mapping[str, Tensor],
    kept: Tensor,
    module: str,
    shape: tuple[int, int],
    bits: int,
    weights: Mapping[str, Any],
    dtype: np.dtype,
) -> QuantisedTensor:
    rows, columns = shape
    strategy, group = weights["strategy"], group_size(quantised, weights.get("group_size"))
    step = {"tensor": shape, "channel": (1, columns), "group": (1, group or columns)}.get(strategy)
    if step is None:
        block = weights.get("block_structure")
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            raise InputError(
                quantised / "config.json", f"quantization_config.block_structure: {shown(block)}; expected [rows, "
                "columns]",
            )  # fmt: skip
        step = (block[0], block[1])
    grid = (-(-rows // step[0]), -(-columns // step[1]))
    # One value may have no axis, or one.
    shapes = (grid, *(((), (1,)) if grid == (1, 1) else ()), *((grid[:1],) if grid[1] == 1 else ()))
    parts = [kept, part_of(stored, kept, f"{module}{SCALE}", *shapes)]
    zeros, packed = stored.get(f"{module}.weight_zero_point"), False
    if zeros is not None:
        packed = bool(bits) and zeros.dtype == np.int32
        expected = ((-(-grid[0] * bits // 32), grid[1]),) if packed else shapes
        parts.append(part_of(stored, kept, f"{module}.weight_zero_point", *expected))
    indices = stored.get(f"{module}.weight_g_idx")
    # -1 throughout: inputs are grouped in their order.
    if indices is not None and strategy == "group" and indices.shape == (columns,) and indices.read().min() >= 0:
        if indices.read().max() >= grid[1]:
            raise InputError(indices.file, f"{module}.weight_g_idx: expected the numbers of {grid[1]} groups")
        parts.append(indices)
    formula = Scales(shape, step, bits, zeros is not None, packed)
    return QuantisedTensor(dtype, shape, tuple(parts), formula)
