"""FP8 checkpoints, dequantised as they are read: a weight `w float8_e4m3[out, in]` with scales in a second tensor, one
value for each block of n x m weights. The weight is `w · scale`.

A block may be all of the matrix (`weight_scale`, one value; transformers and Mistral call it `weight_scale_inv`), the
weights of an output (`weight_scale [out, 1]`, as FBGEMM's), or what `weight_block_size` says
(`weight_scale_inv [out / n, in / m]`, as DeepSeek-V3 was published; DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.folder import Folder, Tensor, open_folder
from evojax_merge.checkpoints.quantised import (
    ACTIVATION_SUFFIXES,
    EXPONENT,
    FLOATS,
    FP8,
    WITH_FP8,
    QuantisedTensor,
    block_size,
    check_dequantised,
    check_matrix,
    dequantised_dtype,
    part_of,
    quantisation,
)
from evojax_merge.errors import InputError

SCALES = ("_scale_inv", "_scale")


def block_scales(parts: Sequence[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """The matrix of `w [out, in]` and `scale`, with one scale for each block of `rows` and `columns`."""
    weight, scale = (part.astype(np.float32) for part in parts)
    scale = scale.reshape(-(-weight.shape[0] // rows), -1)
    scales = np.repeat(np.repeat(scale, rows, axis=0), columns, axis=1)
    return weight * scales[: weight.shape[0], : weight.shape[1]]


def open_fp8(path: Path, quantised: Path) -> Folder:
    """The dequantised model of an FP8 folder, as a folder at `path`. Raises InputError for an invalid block, and for a
    weight without the scales that its shape needs."""
    size = quantisation(quantised).get("weight_block_size")
    block = None if size is None else block_size(quantised, "weight_block_size", size, ", or null")
    dtype, stored = dequantised_dtype(quantised, "bfloat16"), open_folder(quantised, WITH_FP8).entries
    return Folder(path, scaled_matrices(stored, block, dtype))


def scaled_matrices(stored: Mapping[str, Tensor], block: tuple[int, int] | None, dtype: np.dtype) -> dict[str, Tensor]:
    """The tensors of a folder, with matrices of FP8 dequantised. block: the rows and columns that share a scale; None:
    one scale for a matrix or for each output, which the shape of each matrix's scales tells apart."""
    entries = {name: tensor for name, tensor in stored.items() if not name.endswith(ACTIVATION_SUFFIXES)}
    for name in [name for name, tensor in entries.items() if tensor.dtype == FP8 and not name.endswith(SCALES)]:
        weight = entries[name]
        scale = next((f"{name}{end}" for end in SCALES if f"{name}{end}" in entries), None)
        parts, steps = _scaled(name, weight, entries, scale, block)
        entries[name] = QuantisedTensor(dtype, weight.shape, parts, block_scales, steps)
        if scale is not None:
            del entries[scale]
    check_dequantised(entries, "weight_scale")
    return entries


def _scaled(
    name: str, weight: Tensor, stored: Mapping[str, Tensor], scale: str | None, block: tuple[int, int] | None
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The parts of a matrix, whose scales are the tensor `scale`, and the rows and columns of a block. Raises
    InputError where the parts do not fit each other."""
    check_matrix(name, weight, FP8)
    rows, columns = weight.shape
    if block is not None:
        grid = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
        shapes, words = {grid: block}, f"the scales of its blocks, {list(grid)}"
    else:
        of_outputs, of_all = (1, columns), (rows, columns)
        shapes = {(rows,): of_outputs, (rows, 1): of_outputs, (): of_all, (1,): of_all, (1, 1): of_all}
        words = f"one scale, or one for each output, {[rows, 1]}"
    if scale is None or stored[scale].shape not in shapes:
        actual = "no such tensor" if scale is None else str(list(stored[scale].shape))
        end = SCALES[0] if block is not None else SCALES[1]
        raise InputError(
            weight.file, f"{name} is quantised (F8_E4M3): found {actual} for {name}{end}; expected {words}"
        )
    scales = part_of(stored, weight, scale, (*FLOATS, EXPONENT), *shapes)
    return (weight, scales), shapes[scales.shape]
