"""Quantised checkpoints in general: matrices that are computed from several stored tensors while they are read.

A format's own module says which tensors these are and which formula computes the matrix: one function that exchanges
the matrices of a `QuantisedFolder`. `derived` selects the format by the `quant_method` that a config names.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from evojax_merge.checkpoints.folder import DTYPES, FLOAT_DTYPES, ComputedTensor, Formula, Tensor, open_folder
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.errors import InputError, shown
from evojax_merge.models.config_keys import SIZE

# The keys of config.json that describe a checkpoint's quantisation; the second is compressed-tensors' first name for
# it.
KEYS = ("quantization_config", "compression_config")
# MLX's key for the quantisation, which names no method.
OF_MLX = "quantization"
# Other files that describe a quantisation, each with its method and the key of the settings (None: the whole file):
# those of early AutoGPTQ, and of NVIDIA's Model Optimizer.
OTHER_FILES = (("quantize_config.json", "gptq", None), ("hf_quant_config.json", "modelopt", "quantization"))
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
# A power of two alone, 2^(byte - 127).
EXPONENT = np.dtype(ml_dtypes.float8_e8m0fnu)
WITH_FP8 = DTYPES | {"F8_E4M3": FP8, "F8_E8M0": EXPONENT}
# Dtypes of parts: scales and biases, packed words, codes, numbers of groups and sizes.
FLOATS = (*FLOAT_DTYPES.values(), np.dtype(np.float64))
WORDS = (np.dtype(np.int32),)
BYTES = (np.dtype(np.uint8),)
EIGHT_BITS = (FP8, np.dtype(np.int8), *BYTES)
INDICES = (np.dtype(np.int32), np.dtype(np.int64))
# Suffixes of tensors that quantise activations and caches, and that belong to no weight.
ACTIVATION_SUFFIXES = (
    ".activation_scale", ".input_global_scale", ".input_scale", ".input_scale_ub", ".input_zero_point", ".k_scale",
    ".kv_scale", ".output_scale", ".output_zero_point", ".q_scale", ".v_scale",
)  # fmt: skip
# Ends of names that tensors of quantised matrices alone have, by the formats that have them.
ENDS_OF_PARTS = {
    "GPTQ and AWQ": (".qweight", ".qzeros", ".g_idx"),
    "bitsandbytes": (
        ".SCB", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
        ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4",
    ),
    "compressed-tensors": (
        ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale",
    ),
    "FP8 and four-bit floats": (".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".pre_quant_scale"),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# A folder's settings


def quantisation(path: Path) -> dict[str, Any]:
    """A model folder's quantisation settings, its own or, as in transformers, its text decoder's, with `quant_method`;
    empty without quantisation."""
    config = read_json_object(path / "config.json", missing={})
    places = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    named = (part[key] for part in places for key in KEYS if isinstance(part.get(key), dict) and part[key])
    in_config = next(named, None)
    mlx = config.get(OF_MLX)
    if "quant_method" not in (in_config or {}) and isinstance(mlx, dict) and {"bits", "group_size"} <= set(mlx):
        return {**mlx, "quant_method": "mlx"}
    for name, method, key in OTHER_FILES if in_config is None and config else ():
        if (path / name).is_file():
            document = read_json_object(path / name, missing={})
            settings = document if key is None else document.get(key)
            return {"quant_method": method, **(settings if isinstance(settings, dict) else {})}
    return in_config or {}


def dequantised_config(path: Path) -> dict[str, Any]:
    """A quantised folder's config without its quantisation, for the dequantised model."""

    def without(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in settings.items() if key not in (*KEYS, OF_MLX)}

    config = without(read_json_object(path / "config.json", missing={}))
    text = config.get("text_config")
    return config | ({"text_config": without(text)} if isinstance(text, dict) else {})


# ---------------------------------------------------------------------------------------------------------------
# A folder's tensors


@dataclass(frozen=True)
class QuantisedFolder:
    """A quantised folder, whose matrices are exchanged for dequantised ones. default_dtype: that of matrices where the
    config names none; dtypes: those that its files may hold; unused: the ends of the names of tensors that no weight
    has. Every method that checks raises InputError."""

    path: Path
    default_dtype: str = "bfloat16"
    dtypes: Mapping[str, np.dtype] = field(default_factory=lambda: WITH_FP8)
    unused: tuple[str, ...] = ACTIVATION_SUFFIXES

    @cached_property
    def settings(self) -> dict[str, Any]:
        return quantisation(self.path)

    @cached_property
    def dtype(self) -> np.dtype:
        """The dtype that matrices are dequantised to: the one that the folder's config names, else the default."""
        config = read_json_object(self.path / "config.json", missing={})
        name = config.get("dtype") or config.get("torch_dtype")
        default = FLOAT_DTYPES[self.default_dtype]
        return FLOAT_DTYPES.get(name, default) if isinstance(name, str) else default

    @cached_property
    def stored(self) -> Mapping[str, Tensor]:
        """All tensors that the files hold, by name."""
        return open_folder(self.path, self.dtypes).entries

    @cached_property
    def entries(self) -> dict[str, Tensor]:
        """The tensors of the dequantised model: at first all that are stored and used, then without the parts of the
        matrices that `exchange` enters."""
        return {name: tensor for name, tensor in self.stored.items() if not name.endswith(self.unused)}

    def checked(self, key: str, value: Any, allowed: Iterable[Any]) -> Any:
        """The one of the `allowed` values that a setting equals."""
        for candidate in allowed:
            if value == candidate and isinstance(value, bool) == isinstance(candidate, bool):
                return candidate
        expected = ", ".join(str(candidate) for candidate in allowed)
        raise InputError(
            self.path / "config.json", f"{KEYS[0]}.{key}: {shown(value)} cannot be dequantised; expected {expected}, "
            "or the unquantised model",
        )  # fmt: skip

    def group_size(self, value: Any) -> int | None:
        """A `group_size`: the number of inputs that share a scale; None: all."""
        if value in (-1, None) and not isinstance(value, bool):
            return None
        if not SIZE.accepts(value):
            where = self.path / "config.json"
            raise InputError(where, f"{KEYS[0]}.group_size: {shown(value)}; expected a number of inputs")
        return value

    def block_size(self, key: str, value: Any, or_null: str = "") -> tuple[int, int]:
        """The rows and columns of a block that shares a scale."""
        if not isinstance(value, list) or len(value) != 2 or not all(map(SIZE.accepts, value)):
            where = self.path / "config.json"
            raise InputError(where, f"{KEYS[0]}.{key}: {shown(value)}; expected [rows, columns]{or_null}")
        return value[0], value[1]

    def part(self, whole: Tensor, name: str, dtypes: Sequence[np.dtype], *shapes: tuple[int, ...]) -> Tensor:
        """Take the tensor of that name, of one of the dtypes and shapes, out of the entries. Where there is no such
        tensor, the message names the file of `whole`, the matrix that the tensor is a part of."""
        part = self.stored.get(name)
        if part is None or part.shape not in shapes:
            what = "no such tensor" if part is None else str(list(part.shape))
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise InputError(whole.file, f"{name}: found {what}; expected {expected}, to dequantise its matrix with")
        if part.dtype not in dtypes:
            expected = " or ".join(map(str, dtypes))
            raise InputError(part.file, f"{name} is {part.dtype}; expected {expected}, to dequantise its matrix with")
        self.entries.pop(name, None)
        return part

    def exchange(
        self, name: str, shape: tuple[int, ...], parts: Iterable[Tensor], formula: Formula, *settings: Any
    ) -> None:
        """Enter the matrix, float32[out, in], that a formula computes from these parts, cast to the folder's dtype."""
        self.entries[name] = ComputedTensor(self.dtype, shape, tuple(parts), formula, settings)

    def packed_matrices(self, suffix: str) -> Iterator[tuple[str, Tensor]]:
        """Take the tensors of that suffix, each with its module, whose weight they hold as words, out of the entries.
        Raises InputError for one that is no matrix of int32, and for a module that also has its weight."""
        for name, tensor in self.stored.items():
            if name.endswith(suffix):
                check_matrix(name, tensor, *WORDS)
                module = name.removesuffix(suffix)
                self.check_once(name, f"{module}.weight")
                del self.entries[name]
                yield module, tensor

    def check_once(self, packed: str, weight: str) -> None:
        """Raises InputError where the folder holds a weight beside the tensor `packed` that it is packed into."""
        if weight in self.stored:
            raise InputError(self.stored[weight].file, f"holds {weight} and {packed}; expected one of them")

    def check_dequantised(self, part: str) -> None:
        """Raises InputError where a weight of eight bits, or of several numbers to a word, is left for lack of its
        `part`."""
        for name, tensor in self.entries.items():
            eight = name.endswith(".weight") and tensor.dtype in EIGHT_BITS
            if eight or name.endswith(".weight_packed"):
                raise InputError(tensor.file, f"{name} is quantised ({tensor.dtype}), and there is no {part} of it")


def check_matrix(name: str, tensor: Tensor, *dtypes: np.dtype) -> None:
    """Raises InputError unless a tensor is a matrix of one of the dtypes, with rows and columns."""
    if len(tensor.shape) != 2 or 0 in tensor.shape or tensor.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise InputError(tensor.file, f"{name} is {tensor.dtype}{list(tensor.shape)}; expected a matrix of {expected}")


def check_groups(name: str, tensor: Tensor, groups: int) -> None:
    """Raises InputError where a tensor of `INDICES` holds a number that no group has."""
    numbers = tensor.load()
    if numbers.min() < 0 or numbers.max() >= groups:
        raise InputError(tensor.file, f"{name}: expected the numbers of {groups} groups, from 0 on")


def check_no_parts(entries: Mapping[str, Tensor], method: str | None) -> None:
    """Raises InputError where a part of a quantised matrix is left that the quantisation of config.json does not use.
    method: its `quant_method`; None: config.json names none."""
    for name, tensor in entries.items():
        formats = next((formats for formats, ends in ENDS_OF_PARTS.items() if name.endswith(ends)), None)
        if formats is None and method is not None and name.endswith(".weight") and tensor.dtype in EIGHT_BITS:
            formats = "formats of eight bits"
        if formats is not None:
            says = "names no quantization_config" if method is None else f"says quant_method: {method}"
            raise InputError(
                tensor.file, f"{name} ({tensor.dtype}) is a part of a quantised matrix, as {formats} have it, and of "
                f"none by config.json, which {says}; expected all parts of each matrix, and their quantization_config",
            )  # fmt: skip


def unpack(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Small whole numbers, unpacked from words that hold several each, lowest bits first: `uint8` of `words`' shape,
    with `axis` as many times as long as a word has numbers. words: int32 or uint8 of two axes; bits: 1, 2, 4 or 8."""
    # The lowest byte of a word comes first in the file, whatever the machine.
    rows = np.ascontiguousarray(np.moveaxis(words, axis, -1))
    octets = rows.astype(rows.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    parts = octets[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8(2**bits - 1)
    return np.moveaxis(parts.reshape(len(rows), -1), -1, axis)


def scaled(
    parts: Sequence[np.ndarray], shape: tuple[int, int], step: tuple[int, int], bits: int = 0, has_zeros: bool = False,
    zeros_packed: bool = False,
) -> np.ndarray:  # fmt: skip
    """The matrix `(q - z) · scale` of a weight, its scales and, if present, its zeros and the group of each column.
    step: the rows and columns that share a scale; bits: of weights, and zeros, that are packed into words, else 0."""

    def numbers(words: np.ndarray, axis: int) -> np.ndarray:
        return unpack(words, bits, axis).astype(np.float32) - np.float32(2 ** (bits - 1))

    rows, columns = shape
    weight = numbers(parts[0], axis=1)[:, :columns] if bits else parts[0].astype(np.float32)
    columns_of = parts[-1] if len(parts) > 2 + has_zeros else np.arange(columns) // step[1]
    places = np.ix_(np.arange(rows) // step[0], columns_of)
    grid = (-(-rows // step[0]), -1)
    scale = (parts[1].view(EXPONENT) if parts[1].dtype == np.uint8 else parts[1]).astype(np.float32).reshape(grid)
    if has_zeros:
        zeros = numbers(parts[2], axis=0)[: grid[0]] if zeros_packed else parts[2].astype(np.float32)
        weight = weight - zeros.reshape(grid)[places]
    return weight * scale[places]
