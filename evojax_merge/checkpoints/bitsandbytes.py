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
from collections.abc import Sequence
from typing import Any

import numpy as np

from evojax_merge.checkpoints.folder import ComputedTensor, Tensor
from evojax_merge.checkpoints.quantised import BYTES, FLOATS, QuantisedFolder, check_matrix
from evojax_merge.errors import InputError, shown
from evojax_merge.models.config_keys import FINITE, SIZE

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
        nested = np.repeat(parts[4].astype(np.float32), min(nested_block, len(largest)))[: len(largest)]
        largest = parts[3].astype(np.float32)[largest] * nested + np.float32(nested_offset)
    values = parts[1].astype(np.float32)[codes]
    # A block may be longer than the matrix: no more is written out than the matrix has.
    values *= np.repeat(largest.astype(np.float32, copy=False), min(block, count))[:count]
    return values.reshape(shape)


def dequantise_bitsandbytes(folder: QuantisedFolder) -> None:
    """Exchange the matrices of a bitsandbytes folder. Raises InputError for a matrix whose parts do not fit each
    other."""
    stored = folder.stored
    for name in [name for name in stored if name.endswith(SCALES) or STATE in name]:
        eight = name.endswith(SCALES)
        module = name.removesuffix(SCALES)
        weight = f"{module}.weight" if eight else name.partition(STATE)[0]
        if weight not in stored:
            raise InputError(stored[name].file, f"{name}: there is no {weight}, which it is a part of")
        if isinstance(folder.entries.get(weight), ComputedTensor):
            raise InputError(stored[name].file, f"{name}: a second SCB or quant_state of {weight}; expected one")
        if not eight:
            _exchange_four_bits(folder, weight, name)
            continue
        values = stored[weight]
        check_matrix(weight, values, np.dtype(np.int8))
        layout = stored.get(f"{module}{LAYOUT}")
        if layout is not None and layout.load().any():
            expected = "expected 0, rows of outputs; save it again with transformers"
            raise InputError(values.file, f"{module}{LAYOUT}: {expected}")
        parts = (values, folder.part(values, name, FLOATS, values.shape[:1]))
        folder.entries.pop(f"{module}{LAYOUT}", None)
        folder.exchange(weight, values.shape, parts, row_scales)
    folder.check_dequantised("SCB or quant_state")


def _exchange_four_bits(folder: QuantisedFolder, name: str, state_name: str) -> None:
    weight, state = folder.stored[name], _read_state(folder.stored[state_name], state_name)
    shape, block, nested = (state["shape"][0], state["shape"][1]), state["blocksize"], state.get("nested_blocksize")
    count = math.prod(shape)
    if math.prod(weight.shape) * weight.dtype.itemsize != -(-count // 2):
        raise InputError(weight.file, f"{name}: {list(weight.shape)} {weight.dtype} do not hold {count:,} codes")
    blocks = -(-count // block)
    parts = [
        weight,
        folder.part(weight, f"{name}.quant_map", FLOATS, (CODES,)),
        folder.part(weight, f"{name}.absmax", FLOATS if nested is None else BYTES, (blocks,)),
    ]
    settings: tuple[Any, ...] = (shape, block)
    if nested is not None:
        parts += [
            folder.part(weight, f"{name}.nested_quant_map", FLOATS, (2**8,)),
            folder.part(weight, f"{name}.nested_absmax", FLOATS, (-(-blocks // nested),)),
        ]
        settings += (nested, state["nested_offset"])
    for part in [key for key in folder.entries if key.startswith(f"{name}.")]:
        del folder.entries[part]
    folder.exchange(name, shape, parts, coded_blocks, *settings)


def _read_state(tensor: Tensor, name: str) -> dict[str, Any]:
    """The settings of a matrix of four bits, from the bytes of a tensor. Raises InputError for any other content."""
    if tensor.dtype not in BYTES:
        raise InputError(tensor.file, f"{name} is {tensor.dtype}; expected uint8, the bytes of JSON")
    try:
        state = json.loads(tensor.load().tobytes())
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        whole = len(state["shape"]) == 2 and all(map(SIZE.accepts, sizes))
        if whole and FINITE.accepts(state.get("nested_offset", 0.0)):
            return {"nested_offset": 0.0, **state}
        content = shown(state)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        content = f"{type(error).__name__}: {error}"
    raise InputError(tensor.file, f"{name}: {content}; expected JSON with shape, blocksize, nested_offset")
