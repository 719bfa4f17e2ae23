"""Checkpoints in the formats of compressed-tensors (llm-compressor) with scales for rows, groups or blocks, dequantised
as they are read.

A weight is `(q − z) · scale`. `int-quantized`, `float-quantized` and `mxfp8-quantized` keep q in the tensor `weight`,
int8 or float8_e4m3[out, in]. `pack-quantized` keeps `weight_packed int32[out, in · b / 32]` of 32 / b numbers in a
word, lowest bits first, each plus 2^(b − 1), and `weight_shape`. `weight_scale` has one value, one for each output
([out, 1]), for each group of inputs ([out, groups]; where uint8, the exponents of powers of two, 2^(byte − 127)), or
for each block; `weight_zero_point`, where there is one, has the scale's shape (packed along the outputs, where the
weight is packed), and `weight_g_idx int32[in]` has the group of each input.

Where a folder has several formats (`mixed-precision`), each of its `config_groups` names a format and its modules: by
their names, by patterns (`re:…`), or by their class, in this order.

`nvfp4-pack-quantized` and `mxfp4-pack-quantized` keep codes of four-bit floats in `weight_packed uint8[out, in / 2]`
(see `fp4`), the former with a `weight_global_scale`, by which the scales of the groups are divided.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.checkpoints.folder import Folder, Tensor, open_folder
from evojax_merge.checkpoints.fp4 import MXFP4_GROUP, NVFP4_GROUP, Outer, four_bit_matrix
from evojax_merge.checkpoints.quantised import (
    ACTIVATION_SUFFIXES,
    BYTES,
    EXPONENT,
    FLOATS,
    FP8,
    INDICES,
    WITH_FP8,
    WORDS,
    QuantisedTensor,
    block_size,
    check_dequantised,
    check_groups,
    check_matrix,
    check_once,
    checked_setting,
    dequantised_dtype,
    group_size,
    part_of,
    quantisation,
    unpack,
)
from evojax_merge.errors import InputError, shown
from evojax_merge.schema.patterns import pattern_matches

MIXED, PACKED = "mixed-precision", "pack-quantized"
INT8 = np.dtype(np.int8)
# The dtypes of weights that are kept as they are.
PLAIN = {
    "int-quantized": (INT8,), "float-quantized": (FP8,), "naive-quantized": (INT8, FP8), "mxfp8-quantized": (FP8,),
}  # fmt: skip
# The format whose scales are exponents.
MXFP8 = "mxfp8-quantized"
# The number of inputs that share a scale, and how the matrix's scale changes it.
FOUR_BITS: dict[str, tuple[int, Outer | None]] = {
    "mxfp4-pack-quantized": (MXFP4_GROUP, None),
    "nvfp4-pack-quantized": (NVFP4_GROUP, "divides"),
}
SCALE, SHAPE = ".weight_scale", ".weight_shape"
# The prefix of a target that is a regular expression.
PATTERN = "re:"
# The suffixes, after a module's `weight`, of the tensors that a matrix may be made of.
_SUFFIXES = ("", "_packed", "_scale", "_global_scale", "_zero_point", "_shape", "_g_idx")


@dataclass(frozen=True)
class Group:
    """The quantisation of the modules of `targets`. how: the format of their weights; weights: the format's settings;
    bits: of packed numbers, else 0."""

    targets: tuple[str, ...]
    how: str
    weights: Mapping[str, Any]
    bits: int


def scaled(
    parts: Sequence[np.ndarray],
    shape: tuple[int, int],
    step: tuple[int, int],
    bits: int,
    has_zeros: bool,
    zeros_packed: bool,
) -> np.ndarray:
    """The matrix of `weight` or `weight_packed`, `weight_scale` and, if present, `weight_zero_point` and
    `weight_g_idx`. step: the rows and columns that share a scale; bits: of packed weights, else 0."""

    def numbers(words: np.ndarray, axis: int) -> np.ndarray:
        return unpack(words, bits, axis).astype(np.float32) - np.float32(2 ** (bits - 1))

    rows, columns = shape
    weight = numbers(parts[0], axis=1)[:, :columns] if bits else parts[0].astype(np.float32)
    columns_of = parts[-1] if len(parts) > 2 + has_zeros else np.arange(columns) // step[1]
    places = np.ix_(np.arange(rows) // step[0], columns_of)
    grid = (-(-rows // step[0]), -1)
    scale = (parts[1].view(EXPONENT) if parts[1].dtype == np.uint8 else parts[1]).astype(np.float32).reshape(grid)
    if has_zeros:
        zeros = numbers(parts[2], axis=0)[: grid[0]] if zeros_packed else parts[2].astype(np.float32)
        weight = weight - zeros.reshape(grid)[places]
    return weight * scale[places]


def open_compressed_tensors(path: Path, quantised: Path) -> Folder:
    """The dequantised model of a compressed-tensors folder, as a folder at `path`. Raises InputError for another
    format, and for a matrix whose parts do not fit each other."""
    settings = quantisation(quantised)
    for key in ("sparsity_config", "transform_config"):
        given = settings.get(key)
        dense = not given or (isinstance(given, dict) and given.get("format") == "dense")
        checked_setting(quantised, key, None if dense else given, (None,))
    groups = groups_of(quantised)
    dtype, stored = dequantised_dtype(quantised, "bfloat16"), open_folder(quantised, WITH_FP8).entries
    entries = {name: tensor for name, tensor in stored.items() if not name.endswith(ACTIVATION_SUFFIXES)}
    for name in [name for name in entries if name.endswith(SCALE)]:
        module = name.removesuffix(SCALE)
        group = group_of(quantised, groups, module)
        how = group.how
        for suffix in _SUFFIXES:
            entries.pop(f"{module}.weight{suffix}", None)
        kept_name, other = f"{module}.weight", f"{module}.weight_packed"
        if how not in PLAIN:
            kept_name, other = other, kept_name
        if kept_name not in stored:
            raise InputError(stored[name].file, f"{name}: expected the matrix that it scales, as {how} keeps it")
        kept = stored[kept_name]
        check_once(stored, kept_name, other)
        if how in FOUR_BITS:
            parts = [f"{module}.weight{part}" for part in ("_packed", "_scale", "_global_scale")]
            entries[f"{module}.weight"] = four_bit_matrix(stored, parts, *FOUR_BITS[how], dtype)
            continue
        check_matrix(kept_name, kept, *(WORDS if how == PACKED else PLAIN[how]))
        shape = _packed_shape(stored, kept, module, group.bits) if group.bits else (kept.shape[0], kept.shape[1])
        entries[f"{module}.weight"] = _dequantised(quantised, stored, kept, module, shape, group, dtype)
    check_dequantised(entries, "weight_scale")
    return Folder(path, entries)


def groups_of(quantised: Path) -> list[Group]:
    """The groups of modules that a folder's config names. Raises InputError for an unknown format or setting."""
    settings = quantisation(quantised)
    how, given = settings.get("format"), settings.get("config_groups")
    entries = [entry for entry in given.values() if isinstance(entry, dict)] if isinstance(given, dict) else []
    entries = [entry for entry in entries if isinstance(entry.get("weights"), dict)]
    groups = [_group(quantised, group, group.get("format") if how == MIXED else how) for group in entries]
    if not groups:
        raise InputError(
            quantised / "config.json", f"quantization_config.config_groups: {shown(given)}; expected groups of modules "
            "and what is said of their weights",
        )  # fmt: skip
    return groups


def _group(quantised: Path, entry: Mapping[str, Any], how: Any) -> Group:
    checked_setting(quantised, "format", how, (PACKED, *PLAIN, *FOUR_BITS))
    weights, targets = entry["weights"], entry.get("targets")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    checked_setting(quantised, "strategy", strategy, ("tensor", "channel", "group", "tensor_group", "block"))
    bits = checked_setting(quantised, "num_bits", weights.get("num_bits"), (2, 4, 8)) if how == PACKED else 0
    named = tuple(map(str, targets)) if isinstance(targets, list) else ()
    return Group(named, how, {**weights, "strategy": strategy}, bits)


def group_of(quantised: Path, groups: Sequence[Group], module: str) -> Group:
    """The group that a module belongs to: the first that has the module's name, else the first with a pattern that
    matches the name's beginning, else the first that names a class, which may be any module's. Raises InputError where
    no group has the module, and for an invalid pattern."""
    if all((other.how, other.weights) == (groups[0].how, groups[0].weights) for other in groups):
        return groups[0]
    where = f"{quantised / 'config.json'}: quantization_config.config_groups"
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: target == module,
        lambda target: (
            target.startswith(PATTERN) and pattern_matches(where, target.removeprefix(PATTERN), module, "match")
        ),
        # Classes have no dots in their names, and modules begin with small letters.
        lambda target: target[:1].isupper() and "." not in target,
    )
    matches = (group for test in tests for group in groups if any(map(test, group.targets)))
    group = next(matches, None)
    if group is None:
        raise InputError(where, f"none of them has {module}, whose weight is quantised")
    return group


def _packed_shape(stored: Mapping[str, Tensor], packed: Tensor, module: str, bits: int) -> tuple[int, int]:
    """The shape of a packed matrix, whose last words may be padded. Raises InputError for another number of words."""
    stored_shape = part_of(stored, packed, f"{module}{SHAPE}", INDICES, (2,)).load()
    rows, columns = (int(size) for size in stored_shape)
    if packed.shape != (rows, -(-columns * bits // 32)):
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
    group: Group,
    dtype: np.dtype,
) -> QuantisedTensor:
    rows, columns = shape
    weights, bits = group.weights, group.bits
    strategy, size = weights["strategy"], group_size(quantised, weights.get("group_size"))
    step = {"tensor": shape, "channel": (1, columns), "group": (1, size or columns)}.get(strategy)
    if step is None:
        step = block_size(quantised, "block_structure", weights.get("block_structure"))
    grid = (-(-rows // step[0]), -(-columns // step[1]))
    # One value may have no axis, or one.
    shapes = (grid, *(((), (1,)) if grid == (1, 1) else ()), *((grid[:1],) if grid[1] == 1 else ()))
    dtypes = (EXPONENT, *BYTES) if group.how == MXFP8 else FLOATS
    parts = [kept, part_of(stored, kept, f"{module}{SCALE}", dtypes, *shapes)]
    zeros, packed = stored.get(f"{module}.weight_zero_point"), False
    if zeros is not None:
        packed = bool(bits) and zeros.dtype == np.int32
        expected = ((-(-grid[0] * bits // 32), grid[1]),) if packed else shapes
        kinds = WORDS if packed else (INT8, FP8)
        parts.append(part_of(stored, kept, f"{module}.weight_zero_point", kinds, *expected))
    name = f"{module}.weight_g_idx"
    if name in stored and strategy == "group":
        indices = part_of(stored, kept, name, INDICES, (columns,))
        # -1 throughout: inputs are grouped in their order.
        if (indices.load() != -1).any():
            check_groups(name, indices, grid[1])
            parts.append(indices)
    settings = (shape, step, bits, zeros is not None, packed)
    return QuantisedTensor(dtype, shape, tuple(parts), scaled, settings)
