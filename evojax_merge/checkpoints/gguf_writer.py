"""Writes GGUF files with the package gguf: which tensors they hold, their types, and their metadata.

Every change that llama.cpp makes to a family's weights is the inverse of one that `gguf_file` undoes. Before anything
is written, the metadata are read again: a model whose settings they cannot express is refused.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from evojax_merge.checkpoints.config_file import config_values, read_decoder_config
from evojax_merge.checkpoints.folder import is_finite
from evojax_merge.checkpoints.gguf_file import (
    ROUTER,
    GgufModel,
    import_gguf,
    interleaved_heads,
    norm_offset,
    tensor_names,
)
from evojax_merge.checkpoints.gguf_header import MAGIC
from evojax_merge.errors import InputError, shown
from evojax_merge.models.architecture import Architecture, architecture_of, tensor_grid, tensor_shape, tensors_of
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.gguf import EMBEDDING, HEAD, Gguf, Settings
from evojax_merge.schema.section import FLOAT32_MAX
from evojax_merge.version import __version__

# Values that are quantised together.
PIECE = 2**20
# The key that tells files of this program from anybody else's; it is among the first.
OWN_KEY, OWN_TYPE = "evojax_merge.version", "evojax_merge.file_type"
# Keys of a base that say what the base is, not how it is read.
OF_ITS_OWN = (
    "general.name", "general.basename", "general.finetune", "general.version", "general.description", "general.uuid",
    "general.url", "general.repo_url", "general.doi", "general.author", "general.organization", "general.quantized_by",
    "general.source.", "general.base_model.", "general.file_type", "general.quantization_version",
    "general.parameter_count", "general.alignment", "general.size_label", "quantize.", "split.", "evojax_merge.",
)  # fmt: skip


@dataclass(frozen=True)
class GgufOutput:
    """A tensor to write. kind: its type, of gguf.GGMLQuantizationType; shape: the sizes of its axes, in NumPy's order;
    parts: the architecture's tensors that it holds, one after the other; heads, offset: see `GgufTensor`; values:
    those of a tensor that holds settings, which has no parts."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    parts: tuple[str, ...] = ()
    heads: int = 0
    offset: float = 0.0
    values: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        block, size = import_gguf(self.name).GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size

    def read(self) -> np.ndarray:
        assert self.values is not None
        return self.values

    def encoded(self, values: np.ndarray, pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        """The bytes of a part, in pieces of whole rows."""
        gguf = import_gguf(self.name)
        if self.heads:
            # The inverse of what `GgufTensor.read` does.
            split = values.reshape(self.heads, 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
        kind_of = gguf.GGMLQuantizationType
        stored = {kind_of.F32: np.float32, kind_of.F16: np.float16, kind_of.BF16: ml_dtypes.bfloat16}.get(self.kind)
        rows = values.reshape(-1, self.shape[-1])
        step = max(1, PIECE // self.shape[-1])

        def encode(start: int) -> np.ndarray:
            piece = rows[start : start + step]
            if stored is None or self.offset:
                piece = piece.astype(np.float32) + np.float32(self.offset)
            with np.errstate(over="ignore"):
                encoded = gguf.quantize(piece, self.kind) if stored is None else piece.astype(stored)
            if stored == np.float16 and not is_finite(encoded) and is_finite(piece):
                raise InputError("--type", f"f16: {self.name} has values beyond its range; expected bf16, or f32")
            return np.ascontiguousarray(encoded).reshape(-1).view(np.uint8)

        return pool.map(encode, range(0, len(rows), step))


def check_type(name: str) -> Any:
    """The type of gguf.GGMLQuantizationType of this name. Raises InputError for one that the package gguf does not
    quantise to."""
    gguf = import_gguf("--type")
    usable = {kind.name.lower(): kind for kind in gguf.GGMLQuantizationType if _can_quantise(gguf, kind)}
    if name.lower() not in usable:
        raise InputError(
            "--type", f"{shown(name)}: the package gguf does not quantise to it; expected one of {', '.join(usable)}, "
            f"or --type bf16 and then: llama-quantize OUT.gguf OUT-{name.lower()}.gguf {name.upper()}",
        )  # fmt: skip
    return usable[name.lower()]


def _can_quantise(gguf: Any, kind: Any) -> bool:
    try:
        gguf.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return hasattr(gguf.LlamaFileType, f"MOSTLY_{kind.name}") or kind.name == "F32"


def plan_outputs(where: object, config: DecoderConfig, kind: Any) -> tuple[list[GgufOutput], list[str]]:
    """The tensors of a GGUF file of this type, and a line about those that it keeps in another type. Raises InputError
    for an architecture without GGUF files."""
    gguf, architecture = import_gguf(where), architecture_of(replace(config, projector=None))
    form, _ = writable(where, architecture)
    types, lines = gguf.GGMLQuantizationType, list[str]()
    names = tensor_names(where, architecture, config.layers)
    block, type_size = gguf.GGML_QUANT_SIZES[kind]
    # As in llama.cpp, the head keeps more bits than the rest: the embedding, where it is the head.
    head = EMBEDDING if config.head_is_embedding else HEAD
    head_kind = types.Q8_0 if block > 1 and type_size < block else kind
    outputs: dict[str, GgufOutput] = {}
    for name, leaf, place in tensors_of(config):
        file_name = names(name, leaf, place)
        if file_name in outputs:
            outputs[file_name] = replace(outputs[file_name], parts=(*outputs[file_name].parts, name))
            continue
        shape = tensor_shape(config, leaf)
        if leaf.has_experts:
            shape = (tensor_grid(config, leaf)[1], *shape)
        shape = shape[1:] if shape[0] == 1 and len(shape) > 1 else shape
        wanted = head_kind if file_name == head else kind
        used = types.F32 if len(shape) == 1 or ROUTER in file_name else wanted
        if shape[-1] % gguf.GGML_QUANT_SIZES[used][0]:
            used = types.F16
            lines.append(file_name)
        heads = interleaved_heads(form, config.heads, config.kv_heads, file_name)
        outputs[file_name] = GgufOutput(file_name, used, shape, (name,), heads, norm_offset(form, name))
    notes = []
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        listed = ", ".join(lines[:3]) + more
        notes.append(f"{kind.name.lower()} has blocks of {block} values, which do not divide the rows of {listed}: f16")
    if head_kind != kind:
        notes.append(f"{head}, which is the head, is {head_kind.name.lower()}, as llama-quantize keeps more bits of it")
    # The two largest tensors, embedding and head, are not merged at the same time where layers lie between them.
    return sorted(outputs.values(), key=lambda output: output.name == HEAD), notes


def writable(where: object, architecture: Architecture) -> tuple[Gguf, Callable[[Mapping[str, Any]], Settings]]:
    """The form of an architecture's GGUF files, and what gives their settings. Raises InputError where it has none."""
    if architecture.gguf is None or architecture.gguf.write_settings is None:
        raise InputError(
            where, f"model_type is {architecture.model_type}, of which GGUF files are not written; choose a folder, "
            "which llama.cpp's convert_hf_to_gguf.py may know",
        )  # fmt: skip
    return architecture.gguf, architecture.gguf.write_settings


def settings_metadata(
    where: object, settings: Mapping[str, Any], config: DecoderConfig, outputs: Sequence[GgufOutput]
) -> tuple[dict[str, Any], list[GgufOutput], list[str]]:
    """The metadata of a decoder's settings, the tensors that hold settings, and warnings. Raises InputError where a
    file that says so would be another model."""
    gguf, architecture = import_gguf(where), architecture_of(replace(config, projector=None))
    form, write_settings = writable(where, architecture)
    short, arrays = write_settings(config_values(where, settings, architecture))
    metadata = {f"{form.name}{key}": value for key, value in short.items()}
    kind = gguf.GGMLQuantizationType.F32
    tensors = [GgufOutput(name, kind, array.shape, values=array.astype(np.float32)) for name, array in arrays.items()]
    holding = {tensor.name: tensor for tensor in (*outputs, *tensors)}
    file = GgufModel(Path(str(where)), {"general.architecture": form.name, **metadata}, holding)  # type: ignore[arg-type]
    read = {key: value for key, value in file.form.read_settings(file).items() if key in file.architecture.keys}
    again = read_decoder_config(where, {"model_type": file.architecture.model_type, **read})
    differing = _differing(replace(again, architecture=config.architecture), replace(config, projector=None))
    warnings = []
    if "windows" in differing and architecture.model_type != file.architecture.model_type:
        if min(config.windows) < short[".context_length"]:
            warnings.append(
                f"llama.cpp's {form.name} has no sliding window, which the model has: texts of more than "
                f"{min(config.windows):,} tokens are read otherwise"
            )
        differing.remove("windows")
    if differing:
        raise InputError(where, f"{', '.join(differing)}: GGUF files of {form.name} cannot express this model's")
    return metadata, tensors, warnings


def _differing(first: Any, second: Any) -> list[str]:
    """The fields in which two configs differ by more than float32's rounding."""

    def alike(a: Any, b: Any) -> bool:
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            return not _differing(a, b)
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(map(alike, a, b))
        return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, float) else bool(a == b)

    names = [field.name for field in dataclasses.fields(first)]
    return [name for name in names if not alike(getattr(first, name), getattr(second, name, None))]


def write_gguf(
    file: Path, metadata: Mapping[str, Any], outputs: Sequence[GgufOutput], values: Iterator[np.ndarray]
) -> None:
    """Write a new GGUF file. metadata: with general.architecture; values: those of all parts, in their order."""
    gguf = import_gguf(file)
    writer = gguf.GGUFWriter(file, metadata["general.architecture"])
    with closing(writer), ThreadPoolExecutor() as pool:
        for key, value in {OWN_KEY: __version__, **metadata}.items():
            if key != "general.architecture":
                _add(writer, key, value)
        for output in outputs:
            rows, (block, nbytes) = output.shape, gguf.GGML_QUANT_SIZES[output.kind]
            if block > 1:
                rows = (*rows[:-1], rows[-1] // block * nbytes)
            dtype = np.dtype(np.uint8 if block > 1 else np.float32)
            writer.add_tensor_info(output.name, rows, dtype, output.nbytes, raw_dtype=output.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (handle,) = writer.fout
        writer.write_padding(handle, handle.tell())
        for output in outputs:
            written = 0
            for part in [output.read()] if output.values is not None else (next(values) for _ in output.parts):
                for piece in output.encoded(part, pool):
                    handle.write(piece.data)
                    written += piece.nbytes
            writer.write_padding(handle, written)


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a key of the metadata, but for empty texts and lists, in the type that llama.cpp reads such values in, or,
    for numbers that a stranger's file has, in one that holds them."""
    types = import_gguf(key).GGUFValueType
    is_list = isinstance(value, list | tuple)
    values = value if is_list else [value]
    first = values[0] if values else ""
    if isinstance(first, bool | str):
        kind = types.BOOL if isinstance(first, bool) else types.STRING
    elif isinstance(first, float):
        kind = types.FLOAT64 if any(FLOAT32_MAX < abs(x) < math.inf for x in values) else types.FLOAT32
    elif min(values) >= 0 and (not is_list or max(values) >= 2**31):
        kind = types.UINT32 if max(values) < 2**32 else types.UINT64
    else:
        kind = types.INT32 if min(values) >= -(2**31) and max(values) < 2**31 else types.INT64
    if value not in ("", [], ()):
        writer.add_key_value(key, value, *((types.ARRAY, kind) if is_list else (kind,)))


def carried_metadata(base: Mapping[str, Any], with_tokens: bool) -> dict[str, Any]:
    """The metadata of a GGUF file that stay true of a merge with it as the first model, without lists of lists, which
    no key of llama.cpp has. with_tokens: the merge has its tokens."""
    dropped = OF_ITS_OWN if with_tokens else (*OF_ITS_OWN, "tokenizer.")
    kept = {key: value for key, value in base.items() if not key.startswith(dropped)}
    return {key: value for key, value in kept.items() if not (isinstance(value, list) and list in map(type, value))}


def is_our_gguf(content: bytes) -> bool:
    """Return whether this program wrote the GGUF file that begins with this content. A program that quantises a file
    keeps its keys, but for the type."""
    types = [content.partition(key.encode())[2][4:8] for key in ("general.file_type", OWN_TYPE)]
    return content.startswith(MAGIC) and OWN_KEY.encode() in content[:4096] and types[0] == types[1]
