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
from typing import Any

import numpy as np

from evojax_merge.checkpoints.folder import Tensor
from evojax_merge.checkpoints.fp4 import MXFP4_GROUP, NVFP4_GROUP, Outer, exchange_four_bits
from evojax_merge.checkpoints.quantised import (
    BYTES,
    EXPONENT,
    FLOATS,
    FP8,
    INDICES,
    WORDS,
    QuantisedFolder,
    check_groups,
    check_matrix,
    scaled,
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


def dequantise_compressed_tensors(folder: QuantisedFolder) -> None:
    """Exchange the matrices of a compressed-tensors folder. Raises InputError for another format, and for a matrix
    whose parts do not fit each other."""
    for key in ("sparsity_config", "transform_config"):
        given = folder.settings.get(key)
        dense = not given or (isinstance(given, dict) and given.get("format") == "dense")
        folder.checked(key, None if dense else given, (None,))
    groups, stored, entries = groups_of(folder), folder.stored, folder.entries
    for name in [name for name in entries if name.endswith(SCALE)]:
        module = name.removesuffix(SCALE)
        group = group_of(folder, groups, module)
        how = group.how
        for suffix in _SUFFIXES:
            entries.pop(f"{module}.weight{suffix}", None)
        kept_name, other = f"{module}.weight", f"{module}.weight_packed"
        if how not in PLAIN:
            kept_name, other = other, kept_name
        if kept_name not in stored:
            raise InputError(stored[name].file, f"{name}: expected the matrix that it scales, as {how} keeps it")
        folder.check_once(kept_name, other)
        if how in FOUR_BITS:
            parts = [f"{module}.weight{part}" for part in ("_packed", "_scale", "_global_scale")]
            exchange_four_bits(folder, f"{module}.weight", parts, *FOUR_BITS[how])
            continue
        check_matrix(kept_name, stored[kept_name], *(WORDS if how == PACKED else PLAIN[how]))
        _exchange_scaled(folder, stored[kept_name], module, group)
    folder.check_dequantised("weight_scale")


def groups_of(folder: QuantisedFolder) -> list[Group]:
    """The groups of modules that a folder's config names. Raises InputError for an unknown format or setting."""
    how, given = folder.settings.get("format"), folder.settings.get("config_groups")
    groups = []
    for entry in given.values() if isinstance(given, dict) else ():
        weights = entry.get("weights") if isinstance(entry, dict) else None
        if not isinstance(weights, dict):
            continue
        group_format: Any = entry.get("format") if how == MIXED else how
        folder.checked("format", group_format, (PACKED, *PLAIN, *FOUR_BITS))
        targets = entry.get("targets")
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
        folder.checked("strategy", strategy, ("tensor", "channel", "group", "tensor_group", "block"))
        bits = folder.checked("num_bits", weights.get("num_bits"), (2, 4, 8)) if group_format == PACKED else 0
        named = tuple(map(str, targets)) if isinstance(targets, list) else ()
        groups.append(Group(named, group_format, {**weights, "strategy": strategy}, bits))
    if not groups:
        raise InputError(
            folder.path / "config.json", f"quantization_config.config_groups: {shown(given)}; expected groups of "
            "modules and what is said of their weights",
        )  # fmt: skip
    return groups


def group_of(folder: QuantisedFolder, groups: Sequence[Group], module: str) -> Group:
    """The group that a module belongs to: the first that has the module's name, else the first with a pattern that
    matches the name's beginning, else the first that names a class, which may be any module's. Raises InputError where
    no group has the module, and for an invalid pattern."""
    if all((other.how, other.weights) == (groups[0].how, groups[0].weights) for other in groups):
        return groups[0]
    where = f"{folder.path / 'config.json'}: quantization_config.config_groups"
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


def _exchange_scaled(folder: QuantisedFolder, kept: Tensor, module: str, group: Group) -> None:
    """Exchange a module's matrix of whole numbers or FP8, which `kept` holds. Raises InputError where its parts do not
    fit each other."""
    weights, bits = group.weights, group.bits
    rows, columns = kept.shape
    if bits:
        # The shape is stored: the last words may be padded.
        rows, columns = map(int, folder.part(kept, f"{module}{SHAPE}", INDICES, (2,)).load())
        if kept.shape != (rows, -(-columns * bits // 32)):
            raise InputError(
                kept.file, f"{module}.weight_packed is {kept.dtype}{list(kept.shape)}; {module}.weight_shape says "
                f"[{rows}, {columns}], of {bits} bits",
            )  # fmt: skip
    strategy, size = weights["strategy"], folder.group_size(weights.get("group_size"))
    step = {"tensor": (rows, columns), "channel": (1, columns), "group": (1, size or columns)}.get(strategy)
    if step is None:
        step = folder.block_size("block_structure", weights.get("block_structure"))
    grid = (-(-rows // step[0]), -(-columns // step[1]))
    # One value may have no axis, or one.
    shapes = (grid, *(((), (1,)) if grid == (1, 1) else ()), *((grid[:1],) if grid[1] == 1 else ()))
    dtypes = (EXPONENT, *BYTES) if group.how == MXFP8 else FLOATS
    parts = [kept, folder.part(kept, f"{module}{SCALE}", dtypes, *shapes)]
    zeros, packed = folder.stored.get(f"{module}.weight_zero_point"), False
    if zeros is not None:
        packed = bool(bits) and zeros.dtype == np.int32
        expected = ((-(-grid[0] * bits // 32), grid[1]),) if packed else shapes
        kinds = WORDS if packed else (INT8, FP8)
        parts.append(folder.part(kept, f"{module}.weight_zero_point", kinds, *expected))
    name = f"{module}.weight_g_idx"
    if name in folder.stored and strategy == "group":
        indices = folder.part(kept, name, INDICES, (columns,))
        # -1 throughout: inputs are grouped in their order.
        if (indices.load() != -1).any():
            check_groups(name, indices, grid[1])
            parts.append(indices)
    settings = ((rows, columns), step, bits, zeros is not None, packed)
    folder.exchange(f"{module}.weight", (rows, columns), parts, scaled, *settings)
