"""Checkpoints that Apple's MLX has quantised, dequantised as they are read.

A linear module or an embedding has `weight uint32[out, in · b / 32]`, a stream of numbers of b bits for each row, from
the lowest bits of the first word on, and `scales` and `biases` [out, in / g]. The weight is `q · scale + bias`.
config.json says b and g under `quantization`, and for single modules under their names.
"""

from collections.abc import Sequence

import numpy as np

from evojax_merge.checkpoints.folder import DTYPES
from evojax_merge.checkpoints.quantised import FLOATS, QuantisedFolder, unpack
from evojax_merge.errors import InputError

WITH_WORDS = DTYPES | {"U32": np.dtype(np.uint32)}
SCALES, BIASES = ".scales", ".biases"
BITS, DEFAULT_GROUP = (2, 3, 4, 5, 6, 8), 64


def affine(parts: Sequence[np.ndarray], bits: int) -> np.ndarray:
    """The matrix of `weight`, `scales` and `biases`; each number of the weight has `bits` bits."""
    words = np.ascontiguousarray(parts[0])
    if 8 % bits == 0:
        numbers = unpack(words, bits, axis=1)
    else:
        octets = words.astype("<u4", copy=False).view(np.uint8)
        stream = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(words), -1, bits)
        numbers = np.packbits(stream, axis=2, bitorder="little")[..., 0]
    scales, biases = (part.astype(np.float32) for part in parts[1:])
    weight = numbers.reshape(*scales.shape, -1).astype(np.float32)
    weight *= scales[..., None]
    weight += biases[..., None]
    return weight.reshape(numbers.shape)


def dequantise_mlx(folder: QuantisedFolder) -> None:
    """Exchange the matrices of an MLX folder. Raises InputError for other settings, and for a matrix whose parts do not
    fit each other."""
    settings, stored = folder.settings, folder.stored
    for name in [name for name in stored if name.endswith(SCALES)]:
        module = name.removesuffix(SCALES)
        # config.json may have settings of this module alone.
        module_settings = settings.get(module)
        of_module = {**settings, **module_settings} if isinstance(module_settings, dict) else settings
        folder.checked("mode", of_module.get("mode"), (None, "affine"))
        bits: int = folder.checked("bits", of_module.get("bits"), BITS)
        size = folder.group_size(of_module.get("group_size")) or DEFAULT_GROUP
        packed, scales = stored.get(f"{module}.weight"), stored[name]
        matrix = packed is not None and len(packed.shape) == 2 and 0 not in packed.shape and packed.dtype == np.uint32
        if packed is None or not matrix or packed.shape[1] * 32 % (bits * size):
            actual = "no such tensor" if packed is None else f"{packed.dtype}{list(packed.shape)}"
            raise InputError(
                scales.file, f"{module}.weight: found {actual}; expected a matrix of uint32, of {bits} bits for each "
                f"number, in groups of {size}",
            )  # fmt: skip
        outputs, inputs = packed.shape[0], packed.shape[1] * 32 // bits
        groups = (outputs, inputs // size)
        parts = (packed, *(folder.part(packed, f"{module}{part}", FLOATS, groups) for part in (SCALES, BIASES)))
        folder.exchange(f"{module}.weight", (outputs, inputs), parts, affine, bits)
    left = next((name for name, tensor in folder.entries.items() if tensor.dtype == np.uint32), None)
    if left is not None:
        raise InputError(stored[left].file, f"{left} is quantised (uint32), and there are no scales of it")
