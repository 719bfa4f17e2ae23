"""LoRA files in single-file checkpoints of image generators: a LoRA's factors are expanded while tensors are read.

A LoRA names the modules that it changes by the names of kohya's trainer, which joins their parts by `_`
(`lora_unet_input_blocks_4_1_….lora_down.weight`, or with diffusers' names of the modules), or by those of diffusers
and PEFT (`unet.down_blocks.0.….lora_A.weight`). The fused weight is `W + alpha / r · up down`, computed in float32 and
rounded to the checkpoint's dtype once; alpha is r where the file names none. The factors of a convolution are those of
its weight as a matrix `[out, in · height · width]`. OpenCLIP's text encoders hold queries, keys and values in one
tensor, of which three modules change a third each.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.folder import ChangedTensor, Folder, Tensor, is_float, open_folder, read_header
from evojax_merge.checkpoints.generator_keys import diffusers_module, scheme_of
from evojax_merge.errors import InputError

# The ends of the names of a module's factors.
DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight")
ALPHA = ".alpha"
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


@dataclass(frozen=True)
class Place:
    """The rows of a tensor that a LoRA's module changes: the third `part` of them; None: all."""

    tensor: str
    part: int | None = None


@dataclass(frozen=True)
class Change:
    """A LoRA's change of some rows of a weight: `scale · up down`. down: `[r, in, …]`; up: `[rows, r, …]`."""

    rows: slice
    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class FusedTensor(ChangedTensor):
    """A weight of a checkpoint with the changes of a LoRA."""

    base: Tensor
    changes: tuple[Change, ...]

    @property
    def parts(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.base, *(part for change in self.changes for part in (change.down, change.up)))

    def read(self) -> np.ndarray:
        fused = self.base.load().astype(np.float32).reshape(self.shape[0], -1)
        for change in self.changes:
            down, up = (part.load().astype(np.float32) for part in (change.down, change.up))
            rank = len(down)
            fused[change.rows] += np.float32(change.scale) * (up.reshape(-1, rank) @ down.reshape(rank, -1))
        return fused.reshape(self.shape).astype(self.dtype)

    def content(self) -> Iterator[np.ndarray]:
        # The parts, not the product: its last bits depend on the machine, and random masks must not.
        yield from super().content()
        yield np.array([change.scale for change in self.changes]).view(np.uint8)


def open_with_lora(base: Path, lora: Path) -> Folder:
    """Open a single-file checkpoint with a LoRA. Reads headers, and the alphas.

    Raises InputError for a file of another kind than a plain LoRA, and for one that changes other modules, or modules
    of other shapes, than the checkpoint has.
    """
    checkpoint = open_folder(base)
    if scheme_of(checkpoint.entries) is None:
        raise InputError(base, f"holds no image generator, which {lora.name} might change; expected one before the +")
    modules, places = read_modules(lora), places_of(checkpoint.entries)
    missing = [module for module in modules if module not in places]
    if missing:
        raise InputError(
            lora, f"changes {len(modules)} modules, of which {base.name} has {len(modules) - len(missing)}, and not "
            f"{missing[0]}; expected a LoRA of this kind of generator",
        )  # fmt: skip
    changes: dict[str, dict[int | None, Change]] = {}
    for module, parts in modules.items():
        place = places[module]
        of_tensor = changes.setdefault(place.tensor, {})
        if place.part in of_tensor:
            raise InputError(lora, f"{module}: changes {place.tensor} twice, by the names of two tools")
        of_tensor[place.part] = _change(lora, module, parts, place, checkpoint.entries[place.tensor])
    fused = {
        name: FusedTensor(checkpoint.entries[name], tuple(of_tensor.values())) for name, of_tensor in changes.items()
    }
    return Folder(base, {**checkpoint.entries, **fused})


def read_modules(lora: Path) -> dict[str, dict[str, Tensor]]:
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
        modules.setdefault(_flat(name.removesuffix(end)), {})[ends[end]] = tensor
    for module, parts in modules.items():
        lacking = next((part for part in ("down", "up") if part not in parts), None)
        if lacking is not None:
            raise InputError(lora, f"{module}: has no lora_{lacking}; expected lora_down and lora_up of each module")
    return modules


def factor_ranks(file: Path) -> list[int]:
    """The different ranks of the factors that a LoRA's file holds, in rising order; empty for any other file."""
    return sorted({
        tensor.shape[0] for name, tensor in read_header(file).items()
        if tensor.shape and name.endswith((*DOWN, ".lora_embedding_A"))
    })  # fmt: skip


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
    return {_flat(stem): place for stem, place in places.items()}


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


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _change(lora: Path, module: str, parts: Mapping[str, Tensor], place: Place, weight: Tensor) -> Change:
    """The change of one module. Raises InputError where factors and weight do not fit each other."""
    down, up = parts["down"], parts["up"]
    rows, rank = weight.shape[0], down.shape[0] if down.shape else 0
    begin = 0
    if place.part is not None:
        rows //= 3
        begin = rows * place.part
    entries = math.prod(weight.shape[1:])
    if (
        len(down.shape) < 2
        or len(up.shape) < 2
        or math.prod(down.shape) != rank * entries
        or (up.shape[0] != rows or math.prod(up.shape) != rows * rank)
    ):
        raise InputError(
            lora, f"{module}: has factors of shapes {list(down.shape)} and {list(up.shape)}, which do not fit the "
            f"{rows} x {entries} entries of {place.tensor}; expected a LoRA of this kind of generator",
        )  # fmt: skip
    alpha = float(parts["alpha"].load().reshape(-1)[0]) if "alpha" in parts else float(rank)
    if not math.isfinite(alpha):
        raise InputError(lora, f"{module}.alpha: {alpha}; expected a finite number")
    return Change(slice(begin, begin + rows), down, up, alpha / rank)
