"""Checkpoints that transformers saved quantised by bitsandbytes, in 8 or in 4 bits, dequantised as they are read.

In 8 bits (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339) a weight `w int8[out, in]` has the largest magnitude of
each row beside it, `SCB float32[out]`: the weight is `w · SCB / 127`.

In 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) a weight is a row of codes, two to a byte, the first in the
upper half: indices into `quant_map float32[16]`, times the largest magnitude of each block of `blocksize` values,
`absmax float32`. Where these are quantised in turn, `absmax uint8` are indices into `nested_quant_map float32[256]`,
times the `nested_absmax float32` of each `nested_blocksize`, plus `nested_offset`. The blocks, the shape and the offset
stand as JSON in the bytes of a tensor, `quant_state.bitsandbytes__nf4` or `…__fp4`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.checkpoints.folder import Folder, Tensor, open_folder
from evojax_merge.checkpoints.quantised import (
    BYTES,
    FLOATS,
    QuantisedTensor,
    check_dequantised,
    check_matrix,
    dequantised_dtype,
    part_of,
)
from evojax_merge.errors import InputError, shown

SCALES = ".SCB"
# The layout of the int8 weights; 0: plain rows of outputs.
LAYOUT = ".weight_format"
STATE = ".quant_state.bitsandbytes__"
CODES = 16


def row_scales(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The matrix of `weight` and `SCB`."""
    weight, largest = (part.astype(np.float32) for part in parts)
    return weight * largest[:, None] * np.float32(1 / 127)


def coded_blocks(
    parts: Sequence[np.ndarray], shape: tuple[int, int], block: int, nested_block: int = 0, nested_offset: float = 0.0
) -> np.ndarray:
    """The matrix of `weight`, `quant_map`, `absmax` and, where the last is quantised in turn, `nested_quant_map` and
    `nested_absmax`."""
    octets = np.ascontiguousarray(parts[0]).reshape(-1).view(np.uint8)
    count = math.prod(shape)
    codes = np.stack([octets >> 4, octets & 15], axis=-1).reshape(-1)[:count]
    largest = parts[2]
    if nested_block:
        nested = np.repeat(parts[4].astype(np.float32), nested_block)[: len(largest)]
        largest = parts[3].astype(np.float32)[largest] * nested + np.float32(nested_offset)
    values = parts[1].astype(np.float32)[codes]
    values *= np.repeat(largest.astype(np.float32, copy=False), block)[:count]
    return values.reshape(shape)


def open_bitsandbytes(path: Path, quantised: Path) -> Folder:
    """The dequantised model of a bitsandbytes folder, as a folder at `path`. Raises InputError for a matrix whose parts
    do not fit each other."""
    dtype, stored = dequantised_dtype(quantised, "float16"), open_folder(quantised).entries
    entries = dict(stored)
    for name in [name for name in stored if name.endswith(SCALES) or STATE in name]:
        eight = name.endswith(SCALES)
        weight = f"{name.removesuffix(SCALES)}.weight" if eight else name.partition(STATE)[0]
        if weight not in stored:
            raise InputError(stored[name].file, f"{name}: there is no {weight}, which it is a part of")
        if isinstance(entries.get(weight), QuantisedTensor):
            raise InputError(stored[name].file, f"{name}: a second SCB or quant_state of {weight}; expected one")
        made = _eight_bits(stored, weight, dtype) if eight else _four_bits(stored, weight, name, dtype)
        module = weight.removesuffix(".weight")
        parts = (name, f"{module}{LAYOUT}") if eight else [key for key in stored if key.startswith(f"{weight}.")]
        for part in parts:
            entries.pop(part, None)
        entries[weight] = made
    check_dequantised(entries, "SCB or quant_state")
    return Folder(path, entries)


def _eight_bits(stored: Mapping[str, Tensor], name: str, dtype: np.dtype) -> QuantisedTensor:
    weight, module = stored[name], name.removesuffix(".weight")
    check_matrix(name, weight, np.dtype(np.int8))
    layout = stored.get(f"{module}{LAYOUT}")
    if layout is not None and layout.load().any():
        raise InputError(weight.file, f"{module}{LAYOUT}: expected 0, rows of outputs; save it again with transformers")
    scales = part_of(stored, weight, f"{module}{SCALES}", FLOATS, (weight.shape[0],))
    return QuantisedTensor(dtype, weight.shape, (weight, scales), row_scales)


def _four_bits(stored: Mapping[str, Tensor], name: str, state_name: str, dtype: np.dtype) -> QuantisedTensor:
    weight, state = stored[name], _read_state(stored[state_name], state_name)
    shape, block = (state["shape"][0], state["shape"][1]), state["blocksize"]
    count = math.prod(shape)
    if math.prod(weight.shape) * weight.dtype.itemsize != -(-count // 2):
        raise InputError(weight.file, f"{name}: {list(weight.shape)} {weight.dtype} do not hold {count:,} codes")
    blocks = -(-count // block)
    parts = [
        weight,
        part_of(stored, weight, f"{name}.quant_map", FLOATS, (CODES,)),
        part_of(stored, weight, f"{name}.absmax", BYTES if "nested_blocksize" in state else FLOATS, (blocks,)),
    ]
    settings: tuple[Any, ...] = (shape, block)
    if "nested_blocksize" in state:
        nested = state["nested_blocksize"]
        parts += [
            part_of(stored, weight, f"{name}.nested_quant_map", FLOATS, (2**8,)),
            part_of(stored, weight, f"{name}.nested_absmax", FLOATS, (-(-blocks // nested),)),
        ]
        settings += (nested, state["nested_offset"])
    return QuantisedTensor(dtype, shape, tuple(parts), coded_blocks, settings)


def _read_state(tensor: Tensor, name: str) -> dict[str, Any]:
    """The settings of a matrix of four bits, from the bytes of a tensor. Raises InputError for any other content."""
    if tensor.dtype not in BYTES:
        raise InputError(tensor.file, f"{name} is {tensor.dtype}; expected uint8, the bytes of JSON")
    try:
        state = json.loads(tensor.load().tobytes())
        sizes = [*state["shape"], *(state[key] for key in ("blocksize", "nested_blocksize") if key in state)]
        whole = len(state["shape"]) == 2 and all(type(size) is int and size > 0 for size in sizes)
        if whole and math.isfinite(float(state.get("nested_offset", 0.0))):
            return {"nested_offset": 0.0, **state}
        content = shown(state)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        content = f"{type(error).__name__}: {error}"
    raise InputError(tensor.file, f"{name}: {content}; expected JSON with shape, blocksize, nested_offset")
