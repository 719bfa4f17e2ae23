"""GPTQ checkpoints (Frantar et al. 2023, arXiv:2210.17323), as AutoGPTQ and GPTQModel write them, dequantised as they
are read.

A linear module of `b` bits has, in the place of its weight, `qweight int32[in · b / 32, out]` and
`qzeros int32[groups, out · b / 32]`, which hold 32 / b whole numbers in a word, lowest bits first, and
`scales float[groups, out]`; `g_idx int32[in]` has the group of each input. The weight is `(q − z) · scale`, transposed.
The format `gptq` keeps z less one, `gptq_v2` keeps z.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.config_file import decoder_settings, read_decoder_config
from evojax_merge.checkpoints.folder import Folder, Tensor, open_folder
from evojax_merge.checkpoints.quantised import (
    FLOATS,
    INDICES,
    WORDS,
    QuantisedTensor,
    check_groups,
    checked_setting,
    dequantised_config,
    dequantised_dtype,
    group_size,
    packed_matrices,
    part_of,
    quantisation,
    unpack,
)
from evojax_merge.models.architecture import known_architecture, tensors_of

SUFFIX = ".qweight"


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


def open_gptq(path: Path, quantised: Path) -> Folder:
    """The dequantised model of a GPTQ folder, as a folder at `path`. Raises InputError for settings of another
    packing, and for a matrix whose parts do not fit each other."""
    settings = quantisation(quantised)
    bits = checked_setting(quantised, "bits", settings.get("bits"), (2, 4, 8))
    kept = settings.get("checkpoint_format") or "gptq"
    checked_setting(quantised, "checkpoint_format", kept, ("gptq", "gptq_v2"))
    checked_setting(quantised, "is_marlin_format", settings.get("is_marlin_format") or False, (False,))
    checked_setting(quantised, "dynamic", settings.get("dynamic") or None, (None,))
    size = group_size(quantised, settings.get("group_size"))
    dtype, stored = dequantised_dtype(quantised, "float16"), open_folder(quantised).entries
    entries = dict(stored)
    for module, packed in packed_matrices(stored, SUFFIX):
        del entries[module + SUFFIX]
        inputs, outputs = packed.shape[0] * 32 // bits, packed.shape[1]
        group = inputs if size is None else size
        groups = -(-inputs // group)
        parts = [
            packed,
            part_of(stored, packed, f"{module}.qzeros", WORDS, (groups, outputs * bits // 32)),
            part_of(stored, packed, f"{module}.scales", FLOATS, (groups, outputs)),
        ]
        indices = f"{module}.g_idx"
        if indices in stored:
            parts.append(part_of(stored, packed, indices, INDICES, (inputs,)))
            check_groups(indices, parts[-1], groups)
        for part in ("qzeros", "scales", "g_idx"):
            entries.pop(f"{module}.{part}", None)
        grouping = (bits, group, 1 if kept == "gptq" else 0)
        entries[f"{module}.weight"] = QuantisedTensor(dtype, (outputs, inputs), tuple(parts), input_groups, grouping)
    return Folder(path, _without_padding_biases(quantised, entries))


def _without_padding_biases(quantised: Path, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the biases of zeros that AutoGPTQ gave to modules whose architecture has no biases."""
    config = decoder_settings(dequantised_config(quantised))
    if known_architecture(config.get("model_type")) is None:
        return dict(entries)
    expected = {name for name, _, _ in tensors_of(read_decoder_config(quantised / "config.json", config))}
    quantised_modules = {
        name.rpartition(".")[0] for name, entry in entries.items() if isinstance(entry, QuantisedTensor)
    }
    return {
        name: tensor
        for name, tensor in entries.items()
        if name in expected
        or not name.endswith(".bias")
        or name.rpartition(".")[0] not in quantised_modules
        or tensor.load().any()
    }
