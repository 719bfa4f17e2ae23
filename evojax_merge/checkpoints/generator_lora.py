"""LoRA files of image generators: fused by diffusers into a diffusers folder, or expanded while the tensors of a
single-file checkpoint are read.

A LoRA names the modules that it changes by the names of kohya's trainer, which joins their parts by `_`
(`lora_unet_input_blocks_4_1_….lora_down.weight`, or with diffusers' names of the modules), or by those of diffusers
and PEFT (`unet.down_blocks.0.….lora_A.weight`). The fused weight is `W + alpha / r · up down`, computed in float32 and
rounded to the checkpoint's dtype once; alpha is r where the file names none. The factors of a convolution are those of
its weight as a matrix `[out, in · height · width]`. OpenCLIP's text encoders hold queries, keys and values in one
tensor, of which three modules change a third each.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.checkpoints.folder import ComputedTensor, Folder, Tensor, is_float, open_folder, read_header
from evojax_merge.checkpoints.generator_keys import diffusers_module, scheme_of
from evojax_merge.checkpoints.pipelines import Pipeline, open_pipeline
from evojax_merge.checkpoints.quiet import quiet_diffusers
from evojax_merge.errors import InputError, library_errors, shown
from evojax_merge.models.config_keys import FINITE

# The file of a LoRA in a folder, as diffusers saves it.
LORA_FILE = "pytorch_lora_weights.safetensors"
OUTER_MODULE = "text_model."
# The ends of the names of a module's factors.
DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight")
ALPHA = ".alpha"
# The ends of the first of a module's two factors' names, in the files that diffusers reads.
FIRST_FACTORS = (*DOWN, "_lora.down.weight")
# The names that trainers have for the network, in kohya's file, in diffusers' and in that of its authors.
NETWORK = ("lora_unet", "unet", "diffusion_model")
# The text encoders of a checkpoint: a prefix of tensors' names -> the names that trainers have for the encoder.
ENCODERS = {
    "cond_stage_model.transformer.": ("lora_te", "text_encoder"),
    "cond_stage_model.model.": ("lora_te", "text_encoder"),
    "conditioner.embedders.0.transformer.": ("lora_te1", "text_encoder"),
    "conditioner.embedders.1.model.": ("lora_te2", "text_encoder_2"),
}
# OpenCLIP's names, and transformers' names for the same, in which trainers speak.
OPENCLIP = (
    ("transformer.resblocks.", "text_model.encoder.layers."), (".attn.", ".self_attn."), (".mlp.c_fc", ".mlp.fc1"),
    (".mlp.c_proj", ".mlp.fc2"),
)  # fmt: skip
PACKED = ".attn.in_proj_weight"


def lora_file(where: str, path: Path) -> Path:
    """The file of a LoRA, which `path` is, or which lies in the folder `path`. Raises InputError for anything else."""
    file = path / LORA_FILE if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise InputError(where, f"{file}: expected a LoRA in safetensors: reading a pickled one would run its code")
    if not any(name.endswith(FIRST_FACTORS) for name in read_header(file)):
        raise InputError(where, f"{file}: holds no factors of a LoRA; expected names such as unet.….lora_A.weight")
    return file


def factor_ranks(file: Path) -> list[int]:
    """The different ranks of the factors that a LoRA's file holds, in rising order; empty for any other file."""
    return sorted({
        tensor.shape[0] for name, tensor in read_header(file).items()
        if tensor.shape and name.endswith((*DOWN, ".lora_embedding_A"))
    })  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Diffusers folders


def write_fused(where: str, base: Path, lora: Path, folder: Path) -> None:
    """Write the pipeline of the folder `base` with a LoRA fused in: the components that it changes, and links to all
    other files. Raises InputError where diffusers does not open both, and for a LoRA of another generator."""
    if find_spec("diffusers") is None or find_spec("peft") is None:
        raise InputError(where, "needs diffusers and peft; pip install 'evojax-merge[diffusion]'")
    pipeline = Pipeline(base)
    if not hasattr(pipeline.pipeline_class(), "load_lora_weights"):
        raise InputError(where, f"a {pipeline.class_name} takes no LoRA")
    fused = _fused(where, pipeline, lora)
    for file in base.rglob("*"):
        relative = file.relative_to(base)
        if file.is_file() and not (relative.parts[0] in fused and file.name.endswith((".safetensors", ".index.json"))):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file.resolve(), folder / relative)
    for name, (module, changed) in fused.items():
        _save(pipeline, name, module, changed, folder / name)


def _fused(where: str, pipeline: Pipeline, lora: Path) -> dict[str, tuple[Any, set[str]]]:
    """The modules, in float32, that a LoRA changes, by the names of their components, and the weights that it
    changes."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    opened = open_pipeline(pipeline, {})
    with quiet_diffusers(), library_errors(where, "diffusers cannot fuse it"):
        opened.load_lora_weights(str(lora.parent), weight_name=lora.name, local_files_only=True, use_safetensors=True)
        modules = {name: one for name, one in opened.components.items() if isinstance(one, torch.nn.Module)}
        weights = {
            name: {f"{path}.weight" for path, part in module.named_modules() if isinstance(part, BaseTunerLayer)}
            for name, module in modules.items()
        }
        fused = {name: (modules[name], changed) for name, changed in weights.items() if changed}
        opened.fuse_lora(components=list(fused))
        opened.unload_lora_weights()
    expected = sum(name.endswith(FIRST_FACTORS) for name in read_header(lora))
    actual = sum(len(changed) for _, changed in fused.values())
    if actual < expected:
        raise InputError(
            where, f"{lora.name} has factors of {expected} modules, of which {pipeline.path} has {actual}; expected a "
            "LoRA of this generator",
        )  # fmt: skip
    return fused


def _save(pipeline: Pipeline, name: str, module: Any, changed: set[str], folder: Path) -> None:
    """Write a component's weights, by the names and in the dtypes of the base's files: the `changed` ones of a module,
    and all others as they are."""
    from safetensors.torch import load_file, save_file

    files = [file for file in pipeline.files(name) if file.suffix == ".safetensors"]
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    # Transformers' modules in memory have names without the outer module that files of text encoders name.
    in_file = {key.removeprefix(OUTER_MODULE): key for key in tensors} | {key: key for key in tensors}
    state = module.state_dict()
    for weight in changed:
        if weight not in in_file:
            raise InputError(pipeline.path / name, f"has no tensor {weight}, which the LoRA changes")
        key = in_file[weight]
        tensors[key] = state[weight].to(tensors[key].dtype).contiguous()
    stem = files[0].name.partition("-00001-of-")[0].removesuffix(".safetensors")
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})


# ---------------------------------------------------------------------------------------------------------------
# Single-file checkpoints


@dataclass(frozen=True)
class Place:
    """The rows of a tensor that a LoRA's module changes: the third `part` of them; None: all."""

    tensor: str
    part: int | None = None


def fused(parts: Sequence[np.ndarray], changes: Sequence[tuple[int, int, float]]) -> np.ndarray:
    """A weight with the changes of a LoRA, of which each is `scale · up down` for some rows. parts: the weight, and
    `down [r, in, …]` and `up [rows, r, …]` of each change; changes: the first row, the one behind the last, and the
    scale."""
    values = parts[0].astype(np.float32).reshape(len(parts[0]), -1)
    for (begin, end, scale), down, up in zip(changes, parts[1::2], parts[2::2], strict=True):
        rank = len(down)
        down, up = (factor.astype(np.float32) for factor in (down, up))
        values[begin:end] += np.float32(scale) * (up.reshape(-1, rank) @ down.reshape(rank, -1))
    return values.reshape(parts[0].shape)


def open_with_lora(base: Path, lora: Path) -> Folder:
    """Open a single-file checkpoint with a LoRA. Reads headers, and the alphas.

    Raises InputError for a file of another kind than a plain LoRA, and for one that changes other modules, or modules
    of other shapes, than the checkpoint has.
    """
    checkpoint = open_folder(base)
    if scheme_of(checkpoint.entries) is None:
        raise InputError(base, f"holds no image generator, which {lora.name} might change; expected one before the +")
    modules, places = _read_modules(lora), places_of(checkpoint.entries)
    missing = [module for module in modules if module not in places]
    if missing:
        raise InputError(
            lora, f"changes {len(modules)} modules, of which {base.name} has {len(modules) - len(missing)}, and not "
            f"{missing[0]}; expected a LoRA of this kind of generator",
        )  # fmt: skip
    # Of each tensor, by the part that is changed: the rows with the scale, and the factors.
    changes: dict[str, dict[int | None, tuple[tuple[int, int, float], tuple[Tensor, Tensor]]]] = {}
    for module, parts in modules.items():
        place, down, up = places[module], parts["down"], parts["up"]
        of_tensor, weight = changes.setdefault(place.tensor, {}), checkpoint.entries[place.tensor]
        if place.part in of_tensor:
            raise InputError(lora, f"{module}: changes {place.tensor} twice, by the names of two tools")
        outputs, rank = weight.shape[0] if weight.shape else 0, down.shape[0] if down.shape else 0
        rows = outputs // (1 if place.part is None else 3)
        begin, columns = rows * (place.part or 0), math.prod(weight.shape[1:])
        fits = rank and len(down.shape) >= 2 and len(up.shape) >= 2 and math.prod(down.shape) == rank * columns
        if not fits or up.shape[0] != rows or math.prod(up.shape) != rows * rank:
            raise InputError(
                lora, f"{module}: has factors of shapes {list(down.shape)} and {list(up.shape)}, which do not fit the "
                f"{rows} x {columns} entries of {place.tensor}; expected a LoRA of this kind of generator",
            )  # fmt: skip
        alphas = parts["alpha"].load().reshape(-1).tolist() if "alpha" in parts else [float(rank)]
        if len(alphas) != 1 or not FINITE.accepts(alphas[0]):
            raise InputError(lora, f"{module}.alpha: {shown(alphas)}; expected a finite number")
        of_tensor[place.part] = (begin, begin + rows, alphas[0] / rank), (down, up)
    entries = dict(checkpoint.entries)
    for name, of_tensor in changes.items():
        rows_and_scales, factors = zip(*of_tensor.values(), strict=True)
        weight, identity = entries[name], np.array([scale for _, _, scale in rows_and_scales]).tobytes()
        whole = (weight, *(factor for pair in factors for factor in pair))
        entries[name] = ComputedTensor(weight.dtype, weight.shape, whole, fused, (rows_and_scales,), identity)
    return Folder(base, entries)


def _read_modules(lora: Path) -> dict[str, dict[str, Tensor]]:
    """The modules that a LoRA changes, by their flat names (see `places_of`), with their `down`, `up` and `alpha`.
    Raises InputError for tensors of any other kind of adapter."""
    modules: dict[str, dict[str, Tensor]] = {}
    ends = {end: part for part, group in (("down", DOWN), ("up", UP), ("alpha", (ALPHA,))) for end in group}
    for name, tensor in read_header(lora).items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            raise InputError(
                lora, f"{name}: is no part of a plain LoRA; expected lora_down or lora_A, lora_up or lora_B, and alpha "
                "(LoHa, LoKr, DoRA and the like are not supported: fuse them with the tool that trained them)",
            )  # fmt: skip
        if not is_float(tensor.dtype):
            raise InputError(lora, f"{name}: holds {tensor.dtype}; expected float factors")
        modules.setdefault(name.removesuffix(end).replace(".", "_"), {})[ends[end]] = tensor
    for module, parts in modules.items():
        lacking = next((part for part in ("down", "up") if part not in parts), None)
        if lacking is not None:
            raise InputError(lora, f"{module}: has no lora_{lacking}; expected lora_down and lora_up of each module")
    return modules


def places_of(names: Mapping[str, Tensor]) -> dict[str, Place]:
    """The weights of a checkpoint by the names that trainers have for their modules, with `_` in place of each dot."""
    places: dict[str, Place] = {}
    scheme = scheme_of(names)
    prefix = "" if scheme is None else scheme.prefix
    network = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    for name in names:
        if name.endswith(PACKED):
            for part, letter in enumerate("qkv"):
                for stem in _of_encoders(name.removesuffix("in_proj_weight") + f"{letter}_proj"):
                    places[stem] = Place(name, part)
        elif name.endswith(".weight"):
            module = name.removesuffix(".weight")
            stems = _of_encoders(module)
            if module.startswith(prefix) and not stems:
                inner = module.removeprefix(prefix)
                stems = [
                    f"{network_name}_{spoken}" for spoken in (inner, diffusers_module(inner, network))
                    for network_name in NETWORK if spoken is not None
                ]  # fmt: skip
            places |= dict.fromkeys(stems, Place(name))
    return {stem.replace(".", "_"): place for stem, place in places.items()}


def _of_encoders(module: str) -> list[str]:
    """The names that trainers have for a module of a text encoder; empty for any other module."""
    for prefix, encoders in ENCODERS.items():
        if module.startswith(prefix):
            inner = module.removeprefix(prefix)
            if prefix.endswith(".model."):
                for theirs, ours in OPENCLIP:
                    inner = inner.replace(theirs, ours)
            return [f"{encoder}_{inner}" for encoder in encoders]
    return []
