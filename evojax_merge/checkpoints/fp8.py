"""FP8 checkpoints with a scale for each block of a matrix, as DeepSeek-V3 was published, dequantised as they are read.

A weight `w float8_e4m3[out, in]` has a second tensor, `weight_scale_inv float32[out / n, in / m]`, of which every value
belongs to a block of n x m weights: the weight is `w · scale` (DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.folder import DTYPES, Folder, open_folder
from evojax_merge.checkpoints.quantised import FP8, KEYS, QuantisedTensor, dequantised_dtype, quantisation
from evojax_merge.errors import InputError, shown

SCALE = "_scale_inv"


@dataclass(frozen=True)
class BlockScales:
    """A matrix `w`, of which each block of `rows` and `columns` has a scale: parts `w [out, in]`, `scale`."""

    rows: int
    columns: int

    def values(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        weight, scale = (part.astype(np.float32) for part in parts)
        scales = np.repeat(np.repeat(scale, self.rows, axis=0), self.columns, axis=1)
        return weight * scales[: weight.shape[0], : weight.shape[1]]


def open_fp8(path: Path, quantised: Path) -> Folder:
    """The dequantised model of an FP8 folder, as a folder at `path`. Raises InputError for a block that is none, and
    for a weight without the scales that its shape needs."""
    block = quantisation(quantised).get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise InputError(
            quantised / "config.json", f"{KEYS[0]}.weight_block_size: {shown(block)}; expected [rows, columns]"
        )
    dtype = dequantised_dtype(quantised, "bfloat16")
    entries = dict(open_folder(quantised, DTYPES | {"F8_E4M3": FP8}).entries)
    for name in [name for name, tensor in entries.items() if tensor.dtype == FP8]:
        weight, scale = entries[name], entries.pop(f"{name}{SCALE}", None)
        expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=False))
        if scale is None or scale.shape != expected or len(weight.shape) != len(block):
            found = "no such tensor" if scale is None else str(list(scale.shape))
            raise InputError(
                weight.file, f"{name} is quantised (F8_E4M3): found {found} for {name}{SCALE}; expected the scales of "
                f"its blocks, {list(expected)}",
            )  # fmt: skip
        entries[name] = QuantisedTensor(dtype, weight.shape, (weight, scale), BlockScales(*block))
    return Folder(path, entries)
