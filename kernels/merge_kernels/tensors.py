"""The merge of one tensor, from the sources to the dtype that it is written in, in pieces that stay in the cache."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from merge_kernels.apply import combine, prepare
from merge_kernels.method import CombineInputs, Method, Numbers, Options, Prepared, RowKeys

# Entries that are combined at a time: pieces stay in the cache, and tensors of many sizes share a compiled shape.
PIECE = 2**18


@partial(jax.jit, static_argnums=(0, 1, 3))
def _combine(method: Method, options: Options, inputs: CombineInputs, dtype: np.dtype) -> jax.Array:
    return combine(method, options, inputs).astype(dtype)


def merge_tensor(
    method: Method,
    options: Options,
    sources: Sequence[np.ndarray],
    parameters: Numbers,
    row_keys: RowKeys,
    dtype: np.dtype,
) -> np.ndarray:
    """Merge one tensor: measure it exactly for these parameters (float64), merge in float32, cast to `dtype`.

    sources: arrays `[...]` of one shape, each in its own dtype, the base first where `options.has_base`; row_keys: see
    `PrepareInputs`. The same arguments give the same bits in every caller.
    """
    prepared = prepare(method, options, sources, parameters, row_keys)
    return combine_tensor(method, options, sources, parameters, dtype, prepared)


def combine_tensor(
    method: Method, options: Options, sources: Sequence[np.ndarray], parameters: Numbers, dtype: np.dtype,
    prepared: Prepared,
) -> np.ndarray:  # fmt: skip
    """Merge one tensor that was measured: `merge_tensor` with the result of `prepare`.

    Pieces of the tensors are combined: whole rows where statistics or mask keys are by row, flat runs otherwise. A
    tensor of more axes is a matrix whose rows (or columns) are the vectors that were measured, or whose rows have the
    keys. The last piece is filled up, so that all pieces of all tensors (all of one width) have one shape.
    """
    shape = sources[0].shape
    by_vector = options.axis is not None and len(shape) > 1
    by_row = by_vector or method.has_row_keys
    width = 1 if not by_row else shape[-1] if options.axis == -1 else int(np.prod(shape[1:]))
    flat = (sources[0].size // max(width, 1), width) if by_row else (sources[0].size,)
    tensors = [x.reshape(flat) for x in sources]
    numbers = [x.reshape((-1, 2) if method.has_row_keys else flat) for x in prepared.mask_keys]
    total = tensors[0].shape[0]
    step = max(1, PIECE // max(width, 1))
    if total <= step // 16:
        step = max(1, step // 16)
    merged = np.empty(tensors[0].shape, dtype)
    # Statistics of rows are cut like the rows; those of columns, or of everything, serve every piece.
    vectors = (-1, 1) if options.axis == -1 else (1, -1)
    statistics = {
        name: x.reshape(vectors) if by_vector and x.ndim > 1 else x for name, x in prepared.statistics.items()
    }
    numeric: dict[str, Any] = {name: np.asarray(value, np.float32) for name, value in parameters.items()}
    for start in range(0, total, step):
        stop = min(start + step, total)

        def cut(x: np.ndarray, start: int = start, stop: int = stop) -> Any:
            part = x[start:stop]
            if stop - start == step:
                return part
            return np.concatenate([part, np.zeros((step - (stop - start), *x.shape[1:]), x.dtype)])

        rows = {name: cut(x) if by_vector and x.shape[:1] == (total,) else x for name, x in statistics.items()}
        inputs = CombineInputs(tuple(map(cut, tensors)), tuple(map(cut, numbers)), rows, numeric)
        piece = _combine(method, options, inputs, dtype)
        merged[start:stop] = np.asarray(piece)[: stop - start]
    return merged.reshape(shape)
