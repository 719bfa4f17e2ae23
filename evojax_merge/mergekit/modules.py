"""Modules: the parts of a model, such as a text decoder and a vision tower, that a recipe may merge apart."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleKind:
    """A kind of module. tensors: the beginnings of its tensors' names; depths: the keys of config.json, with dots, that
    may hold its number of layers."""

    tensors: tuple[str, ...]
    depths: tuple[str, ...] = ()


_VISION = ModuleKind(
    ("vision_tower.", "vision_model.", "visual.", "model.vision_tower.", "model.vision_model.", "model.visual."),
    ("vision_config.num_hidden_layers", "vision_config.depth"),
)
# mergekit's names.
MODULES = {
    # Architectures' keys for their number of layers.
    "default": ModuleKind(("",), ("num_hidden_layers", "n_layer", "n_layers", "num_layers")),
    "text_decoder": ModuleKind(
        ("model.", "lm_head.", "language_model.", "model.language_model."),
        ("text_config.num_hidden_layers", "num_hidden_layers"),
    ),
    "vision_tower": _VISION,
    "vision_model": _VISION,
    "multi_modal_projector": ModuleKind(
        (
            "multi_modal_projector.", "model.multi_modal_projector.", "visual.merger.", "model.visual.merger.",
            "visual.deepstack_merger_list.", "model.visual.deepstack_merger_list.",
        )
    ),
    "encoder": ModuleKind(("encoder.", "model.encoder."), ("encoder_layers", "num_layers", "num_hidden_layers")),
    "decoder": ModuleKind(("decoder.", "model.decoder."), ("decoder_layers", "num_decoder_layers")),
    "shared": ModuleKind(("shared.", "model.shared.", "lm_head.")),
}  # fmt: skip


def module_kind(name: str) -> ModuleKind:
    """One of `MODULES`; any other name is the beginning of the module's tensors' names."""
    return MODULES.get(name) or ModuleKind((f"{name}.",))


def module_of(tensor: str, modules: Sequence[str]) -> int | None:
    """The number of the module that a tensor belongs to, by the longest beginning that fits its name; None where none
    fits."""
    fits = [
        (len(start), -number)
        for number, name in enumerate(modules)
        for start in module_kind(name).tensors
        if tensor.startswith(start)
    ]
    return -max(fits)[1] if fits else None
