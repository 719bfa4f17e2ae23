"""GPTQ, AWQ and AutoRound checkpoints, whose matrices are whole numbers of a few bits, packed into words of int32.

GPTQ (Frantar et al. 2023, arXiv:2210.17323), as AutoGPTQ and GPTQModel write it: a linear module of `b` bits has, in
the place of its weight, `qweight int32[in · b / 32, out]` and `qzeros int32[groups, out · b / 32]`, which hold 32 / b
whole numbers in a word, lowest bits first, and `scales float[groups, out]`; `g_idx int32[in]` has the group of each
input. The weight is `(q − z) · scale`, transposed. The format `gptq` keeps z less one, `gptq_v2` keeps z.

AWQ (Lin et al. 2024, arXiv:2306.00978), AutoAWQ's `gemm` version: `qweight int32[in, out / 8]`,
`qzeros int32[in / g, out / 8]` and `scales float16[in / g, out]`. A word holds eight numbers of four bits, which
belong, from its lowest bits on, to the outputs 0, 2, 4, 6, 1, 3, 5 and 7 of its eight. The scales of activations are
folded into the norms and into neighbouring matrices.

AutoRound (Cheng et al. 2023, arXiv:2309.05516) packs its tensors as one of the two.
"""

from collections.abc import Sequence

import numpy as np

from evojax_merge.checkpoints.config_file import decoder_settings, read_decoder_config
from evojax_merge.checkpoints.folder import ComputedTensor
from evojax_merge.checkpoints.quantised import (
    FLOATS,
    INDICES,
    WORDS,
    QuantisedFolder,
    check_groups,
    dequantised_config,
    unpack,
)
from evojax_merge.models.architecture import known_architecture, tensors_of

SUFFIX = ".qweight"
ZEROS, SCALES, INDICES_OF_GROUPS = "qzeros", "scales", "g_idx"
AWQ_BITS, AWQ_PER_WORD = 4, 8
# The position in an AWQ word of each of its outputs.
AWQ_PLACES = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
# A module of this many bits or more is not quantised by AutoRound.
FLOAT_BITS = 16


def input_groups(parts: Sequence[np.ndarray], bits: int, group: int, offset: int) -> np.ndarray:
    """The matrix of `qweight`, `qzeros`, `scales` and, unless inputs are grouped in their order, by `group`, `g_idx`.
    offset: the number that is added to the stored zeros."""
    weight = unpack(parts[0], bits, axis=0).T.astype(np.float32)
    # Modulo 2^bits: a zero of 0, which is stored less one, is stored as the largest number of `bits` bits.
    zeros = (unpack(parts[1], bits, axis=1) + np.uint8(offset)) & np.uint8(2**bits - 1)
    groups = parts[3] if len(parts) > 3 else np.arange(weight.shape[1]) // group
    weight -= zeros.astype(np.float32).T[:, groups]
    weight *= parts[2].astype(np.float32).T[:, groups]
    return weight


def interleaved_outputs(parts: Sequence[np.ndarray], group: int) -> np.ndarray:
    """The matrix of `qweight`, `qzeros` and `scales`; `group` inputs share a scale."""
    # The numbers float32[rows, 8 · columns] that are packed into int32[rows, columns].
    weight, zeros = (
        unpack(words, AWQ_BITS, axis=1).reshape(len(words), -1, AWQ_PER_WORD)[..., AWQ_PLACES].reshape(len(words), -1)
        for words in parts[:2]
    )
    groups = np.arange(len(weight)) // group
    weight = weight.astype(np.float32)
    weight -= zeros.astype(np.float32)[groups]
    weight *= parts[2].astype(np.float32)[groups]
    return weight.T


def dequantise_gptq(folder: QuantisedFolder) -> None:
    """Exchange the matrices of a GPTQ folder. Raises InputError for settings of another packing, and for a matrix whose
    parts do not fit each other."""
    settings = folder.settings
    bits = folder.checked("bits", settings.get("bits"), (2, 4, 8))
    kept = settings.get("checkpoint_format") or "gptq"
    folder.checked("checkpoint_format", kept, ("gptq", "gptq_v2"))
    folder.checked("is_marlin_format", settings.get("is_marlin_format") or False, (False,))
    folder.checked("dynamic", settings.get("dynamic") or None, (None,))
    size = folder.group_size(settings.get("group_size"))
    for module, packed in folder.packed_matrices(SUFFIX):
        inputs, outputs = packed.shape[0] * 32 // bits, packed.shape[1]
        group = inputs if size is None else size
        groups = -(-inputs // group)
        parts = [
            packed,
            folder.part(packed, f"{module}.{ZEROS}", WORDS, (groups, outputs * bits // 32)),
            folder.part(packed, f"{module}.{SCALES}", FLOATS, (groups, outputs)),
        ]
        indices = f"{module}.{INDICES_OF_GROUPS}"
        if indices in folder.stored:
            parts.append(folder.part(packed, indices, INDICES, (inputs,)))
            check_groups(indices, parts[-1], groups)
        offset = 1 if kept == "gptq" else 0
        folder.exchange(f"{module}.weight", (outputs, inputs), parts, input_groups, bits, group, offset)
    _remove_padding_biases(folder)


def _remove_padding_biases(folder: QuantisedFolder) -> None:
    """Remove the biases of zeros that AutoGPTQ gave to modules whose architecture has no biases."""
    config = decoder_settings(dequantised_config(folder.path))
    if known_architecture(config.get("model_type")) is None:
        return
    expected = {name for name, _, _ in tensors_of(read_decoder_config(folder.path / "config.json", config))}
    for name, tensor in list(folder.entries.items()):
        is_bias = name.endswith(".bias") and name not in expected
        weight = folder.entries.get(f"{name.removesuffix('.bias')}.weight")
        if is_bias and isinstance(weight, ComputedTensor) and not tensor.load().any():
            del folder.entries[name]


def dequantise_awq(folder: QuantisedFolder) -> None:
    """Exchange the matrices of an AWQ folder. Raises InputError for settings of another packing, and for a matrix whose
    parts do not fit each other."""
    settings = folder.settings
    version = settings.get("version") or "gemm"
    folder.checked("bits", settings.get("bits", settings.get("w_bit")), (AWQ_BITS,))
    folder.checked("version", version.lower() if isinstance(version, str) else version, ("gemm",))
    size = folder.group_size(settings.get("group_size", settings.get("q_group_size")))
    for module, packed in folder.packed_matrices(SUFFIX):
        inputs, words = packed.shape
        group, outputs = inputs if size is None else size, words * AWQ_PER_WORD
        groups = -(-inputs // group)
        parts = (
            packed,
            folder.part(packed, f"{module}.{ZEROS}", WORDS, (groups, words)),
            folder.part(packed, f"{module}.{SCALES}", FLOATS, (groups, outputs)),
        )
        folder.exchange(f"{module}.weight", (outputs, inputs), parts, interleaved_outputs, group)


PACKINGS = {"auto_round:auto_gptq": dequantise_gptq, "auto_round:auto_awq": dequantise_awq}


def dequantise_auto_round(folder: QuantisedFolder) -> None:
    """Exchange the matrices of an AutoRound folder. Raises InputError for another packing, for numbers that are no
    integers, and for modules of another number of bits."""
    settings = folder.settings
    packing = folder.checked("packing_format", settings.get("packing_format"), tuple(PACKINGS))
    folder.checked("data_type", settings.get("data_type") or "int", ("int",))
    modules = settings.get("extra_config")
    for module, module_settings in modules.items() if isinstance(modules, dict) else ():
        bits = module_settings.get("bits", settings.get("bits")) if isinstance(module_settings, dict) else None
        if not isinstance(bits, int) or bits < FLOAT_BITS:
            folder.checked(f"extra_config.{module}.bits", bits, (settings.get("bits"),))
    PACKINGS[packing](folder)
