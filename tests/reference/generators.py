"""Merges by the installed sd-mecha, tensor by tensor, and its blocks of Stable Diffusion's tensors."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.builtin.lycoris import LoraAlgorithm, StateDictKeyHelper
from sd_mecha.extensions.builtin.merge_methods import cosine, linear, slicing, ties
from sd_mecha.extensions.builtin.model_configs.convert_sd1_blocks import convert_sd1_blocks_to_ldm
from sd_mecha.extensions.builtin.model_configs.convert_sd1_kohya_to_original import convert_sd1_kohya_to_original
from sd_mecha.extensions.builtin.model_configs.convert_sdxl_blocks import convert_sdxl_blocks_to_sgm
from sd_mecha.extensions.builtin.model_configs.convert_sdxl_diffusers_unet_to_original import convert_unet_key
from sd_mecha.extensions.builtin.model_configs.convert_sdxl_kohya_to_original import (
    convert_sdxl_kohya_but_diffusers_to_original,
    convert_sdxl_kohya_to_original,
)


def of_sd_mecha(name: str, models: Sequence[np.ndarray], parameters: Mapping[str, Any]) -> np.ndarray:
    """Merge one tensor in float64 (the geometric median ends where float32 rounds). models: the base first, always."""
    c, a, b, *more = (torch.tensor(np.asarray(x, np.float64)) for x in models)
    numbers = {key: torch.tensor(float(value)) if key == "alpha" else value for key, value in parameters.items()}
    functions = {
        "add_cosine_a": cosine.add_cosine_a, "add_cosine_b": cosine.add_cosine_b, "tensor_sum": slicing.tensor_sum,
        "top_k_tensor_sum": slicing.top_k_tensor_sum, "geometric_median": ties.geometric_median,
    }  # fmt: skip
    if name == "weighted_sum":
        return np.asarray(linear.weighted_sum.__wrapped__({"key": a}, {"key": b}, **numbers, key="key"))
    if name in functions:
        return np.asarray(functions[name].__wrapped__(a, b, *more, **numbers))
    if name == "train_difference_mask":
        numbers["alpha"] = linear.train_difference_mask.__wrapped__(a, b, c, **numbers)
    return np.asarray(linear.add_difference.__wrapped__({"key": a}, {"key": b - c}, **numbers, key="key"))


class _Map(dict[str, str]):
    """The block of each tensor, as a conversion writes it down."""

    class _Same:
        def __getitem__(self, key: str) -> str:
            return key

    keys = _Same()  # type: ignore[assignment]


def blocks_of_sd_mecha(kind: str) -> dict[str, str]:
    """The block of every tensor of SD 1 (sd1) or SDXL (sdxl)."""
    conversion = convert_sd1_blocks_to_ldm if kind == "sd1" else convert_sdxl_blocks_to_sgm
    blocks = _Map()
    conversion.__wrapped__.map_keys(blocks)
    return dict(blocks.items())


def tensor_names(config: str) -> list[str]:
    """The names of a model's tensors, by one of sd-mecha's configs."""
    return list(model_configs.resolve(config).keys())


def diffusers_name(tensor: str) -> str | None:
    """diffusers' name of a tensor of SDXL's U-Net; None where it has none."""
    try:
        return str(convert_unet_key(tensor))
    except ValueError:
        return None


class _Modules(_Map):
    """The tensors of a conversion's results, by the tensors that each is made of."""

    class _Keys:
        def __getitem__(self, names: Any) -> "_Modules._Names":
            return _Modules._Names((names,) if isinstance(names, str) else tuple(names))

    class _Names(tuple[str, ...]):
        def __matmul__(self, transpose: Any) -> tuple[str, ...]:
            return self

    keys = _Keys()  # type: ignore[assignment]


def lora_modules_of_sd_mecha(trainer: str, checkpoint: str) -> dict[str, tuple[str, int | None]]:
    """The checkpoint's tensor of each module that a trainer's LoRA may change, and which third of the tensor it is, by
    the module's name in the file."""
    conversion = {
        "sd1-kohya": convert_sd1_kohya_to_original, "sdxl-kohya": convert_sdxl_kohya_to_original,
        "sdxl-kohya_but_diffusers": convert_sdxl_kohya_but_diffusers_to_original,
    }[trainer]  # fmt: skip
    tensors = _Modules()
    conversion.__wrapped__.map_keys(tensors)
    shapes = {name: one.shape for name, one in model_configs.resolve(checkpoint).keys().items()}
    modules: dict[str, tuple[str, int | None]] = {}
    for tensor, names in tensors.items():
        for number, name in enumerate(names):
            # Trainers leave norms, which have vectors, and what is around a text encoder's layers alone.
            is_module = name.startswith(("unet.", "te")) and not re.search("projection|embeddings", name)
            if is_module and name.endswith(".weight") and len(shapes[tensor]) > 1:
                module = f"lora_{name.removesuffix('.weight').replace('.', '_')}"
                modules[module] = (tensor, number if len(names) > 1 else None)
    return modules


def lora_change_of_sd_mecha(down: np.ndarray, up: np.ndarray, alpha: float, shape: tuple[int, ...]) -> np.ndarray:
    """The change of a weight by a LoRA's factors, in float64."""
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(alpha)}
    tensors = {f"module.{name}": torch.tensor(part.astype(np.float64)) for name, part in parts.items()}
    state = StateDictKeyHelper(tensors, "module")
    return np.asarray(LoraAlgorithm.compose_alpha(state, torch.Size(shape)))
