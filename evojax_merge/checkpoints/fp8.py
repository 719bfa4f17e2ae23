"""FP8 checkpoints with a scale for each block of a matrix, as DeepSeek-V3 was published, dequantised as they are read.

A weight `w float8_e4m3[out, in]` has a second tensor, `weight_scale_inv float32[out / n, in / m]`, of which every value
belongs to a block of n x m weights: the weight is `w · scale` (DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from evojax_merge.checkpoints.folder import DTYPES, FLOAT_DTYPES, Folder, MappedFile, Tensor, Whole, open_folder
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.errors import InputError, shown

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE = "_scale_inv"
KEY = "quantization_config"


@dataclass(frozen=True)
class Fp8Tensor(Whole):
    """A matrix of which each block of `block` rows and columns has a scale."""

    dtype: np.dtype
    weight: Tensor
    scale: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.weight.shape

    @property
    def file(self) -> Path:
        return self.weight.file

    @property
    def mapped_files(self) -> tuple[MappedFile, ...]:
        return (*self.weight.mapped_files, *self.scale.mapped_files)

    def read(self) -> np.ndarray:
        scales = self.scale.read().astype(np.float32)
        for axis, size in enumerate(self.block):
            scales = np.repeat(scales, size, axis=axis)
        rows, columns = self.shape
        return (self.weight.read().astype(np.float32) * scales[:rows, :columns]).astype(self.dtype)

    def content(self) -> Iterator[np.ndarray]:
        yield from self.weight.content()
        yield from self.scale.content()

    def release(self) -> None:
        self.weight.release()
        self.scale.release()


def is_fp8(path: Path) -> bool:
    """Whether a model folder's config says that its weights are FP8 with scales of blocks."""
    found = read_json_object(path / "config.json", missing={}).get(KEY)
    return isinstance(found, dict) and found.get("quant_method") == "fp8" and bool(found.get("weight_block_size"))


def dequantised_config(path: Path) -> dict[str, Any]:
    """The config of such a folder, as that of the dequantised model."""
    config = read_json_object(path / "config.json", missing={})
    return {key: value for key, value in config.items() if key != KEY}


def open_fp8(path: Path, quantised: Path) -> Folder:
    """The dequantised model of an FP8 folder, as a folder at `path`. Raises InputError for a block that is none, and
    for a weight without the scales that its shape needs."""
    config = read_json_object(quantised / "config.json", missing={})
    block = config[KEY]["weight_block_size"]
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise InputError(
            quantised / "config.json", f"{KEY}.weight_block_size: {shown(block)}; expected [rows, columns]"
        )
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = FLOAT_DTYPES.get(name, FLOAT_DTYPES["bfloat16"]) if isinstance(name, str) else FLOAT_DTYPES["bfloat16"]
    stored = open_folder(quantised, DTYPES | {"F8_E4M3": FP8}).entries
    return Folder(
        path,
        {
            name: tensor if tensor.dtype != FP8 else _dequantised(stored, name, (block[0], block[1]), dtype)
            for name, tensor in stored.items()
            if not name.endswith(SCALE)
        },
    )


def _dequantised(stored: Mapping[str, Tensor], name: str, block: tuple[int, int], dtype: np.dtype) -> Fp8Tensor:
    weight, scale = stored[name], stored.get(f"{name}{SCALE}")
    expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=False))
    if scale is None or scale.shape != expected or len(weight.shape) != len(block):
        found = "no such tensor" if scale is None else str(list(scale.shape))
        raise InputError(
            weight.file, f"{name} is quantised (F8_E4M3): found {found} for {name}{SCALE}; expected the scales of its "
            f"blocks, {list(expected)}",
        )  # fmt: skip
    return Fp8Tensor(dtype, weight, scale, block)
