"""AWQ checkpoints (Lin et al. 2024, arXiv:2306.00978) of AutoAWQ's `gemm` version, dequantised as they are read.

A linear module has, in place of its weight, `qweight int32[in, out / 8]`, `qzeros int32[in / g, out / 8]` and
`scales float16[in / g, out]`. A word holds eight numbers of four bits, which belong, from its lowest bits on, to the
outputs 0, 2, 4, 6, 1, 3, 5 and 7 of its eight. The weight is `(q − z) · scale`, transposed. The scales of activations
are folded into the norms and into neighbouring matrices.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.folder import Folder, open_folder
from evojax_merge.checkpoints.quantised import (
    FLOATS,
    WORDS,
    QuantisedTensor,
    checked_setting,
    dequantised_dtype,
    group_size,
    packed_matrices,
    part_of,
    quantisation,
    unpack,
)

SUFFIX = ".qweight"
BITS, PER_WORD = 4, 8
# The position in a word of each of its outputs.
PLACES = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])


def interleaved_outputs(parts: Sequence[np.ndarray], group: int) -> np.ndarray:
    """The matrix of `qweight`, `qzeros` and `scales`; `group` inputs share a scale."""
    # The numbers float32[rows, 8 · columns] that are packed into int32[rows, columns].
    weight, zeros = (
        unpack(words, BITS, axis=1).reshape(len(words), -1, PER_WORD)[..., PLACES].reshape(len(words), -1)
        for words in parts[:2]
    )
    groups = np.arange(len(weight)) // group
    weight = weight.astype(np.float32)
    weight -= zeros.astype(np.float32)[groups]
    weight *= parts[2].astype(np.float32)[groups]
    return weight.T


def open_awq(path: Path, quantised: Path) -> Folder:
    """The dequantised model of an AWQ folder, as a folder at `path`. Raises InputError for settings of another
    packing, and for a matrix whose parts do not fit each other."""
    settings = quantisation(quantised)
    version = settings.get("version") or "gemm"
    checked_setting(quantised, "bits", settings.get("bits", settings.get("w_bit")), (BITS,))
    checked_setting(quantised, "version", version.lower() if isinstance(version, str) else version, ("gemm",))
    size = group_size(quantised, settings.get("group_size", settings.get("q_group_size")))
    dtype, stored = dequantised_dtype(quantised, "float16"), open_folder(quantised).entries
    entries = dict(stored)
    for module, packed in packed_matrices(stored, SUFFIX):
        del entries[module + SUFFIX]
        inputs, words = packed.shape
        group = inputs if size is None else size
        groups = -(-inputs // group)
        parts = (
            packed,
            part_of(stored, packed, f"{module}.qzeros", WORDS, (groups, words)),
            part_of(stored, packed, f"{module}.scales", FLOATS, (groups, words * PER_WORD)),
        )
        for part in ("qzeros", "scales"):
            del entries[f"{module}.{part}"]
        shape = (words * PER_WORD, inputs)
        entries[f"{module}.weight"] = QuantisedTensor(dtype, shape, parts, interleaved_outputs, (group,))
    return Folder(path, entries)
