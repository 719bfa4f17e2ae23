"""The names of tensors in image generators: which tool's names a file has, and the blocks that people set weights of.

A block has the name that people know: the blocks of a U-Net are IN00, IN01 … M00 … OUT00 …, whichever names its tensors
have; those of a transformer have the name of their list and a number.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

# Everything before, beside and behind the numbered blocks of a network, and the autoencoder of pictures.
BASE, VAE = "BASE", "VAE"
# The prefix of the network in a file that holds a whole generator.
WHOLE = "model.diffusion_model."
VAES = ("first_stage_model.", "vae.")
# The first tensors of the second text encoder, by which SDXL's names differ from SD 1's.
SDXL = "conditioner."


@dataclass(frozen=True)
class Scheme:
    """One tool's names of a generator's tensors. name: as people say; mark: the beginning of some tensors' names in the
    network, by which the scheme is recognised; block: (name of a tensor of the network, all such names) -> its block;
    prefix: of the network's tensors, in a file that holds other modules as well."""

    name: str
    mark: str
    block: Callable[[str, Sequence[str]], str]
    prefix: str = ""


def _ldm_block(name: str, names: Sequence[str]) -> str:
    match = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.", name)
    if match is not None:
        return {"i": f"IN{int(match[2]):02}", "m": "M00", "o": f"OUT{int(match[2]):02}"}[name[0]]
    return f"OUT{_most(r'output_blocks', names):02}" if name.startswith("out.") else BASE


def _diffusers_block(name: str, names: Sequence[str]) -> str:
    """The same blocks of a U-Net in diffusers' names: a resolution has as many residual networks going down, and one
    more going up; the convolution that halves or doubles a picture is a block of its own, or the end of one."""
    depth = _most(r"down_blocks\.\d+\.resnets", names) + 1
    match = re.match(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.", name)
    if match is not None:
        level, part, number = int(match[2]), match[3], int(match[4])
        if match[1] == "down_blocks":
            return f"IN{1 + level * (depth + 1) + (depth if part == 'downsamplers' else number):02}"
        return f"OUT{level * (depth + 1) + (depth if part == 'upsamplers' else number):02}"
    if name.startswith("mid_block."):
        return "M00"
    if name.startswith("conv_in."):
        return "IN00"
    if name.startswith(("conv_norm_out.", "conv_out.")):
        levels = _most(r"up_blocks", names) + 1
        return f"OUT{levels * (depth + 1) - 1:02}"
    return BASE


# The modules of a residual network, and those around a U-Net's blocks, in LDM's names and in diffusers'.
RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
AROUND = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip


def diffusers_module(module: str, names: Sequence[str]) -> str | None:
    """diffusers' name of a module of a U-Net with LDM's names, which `names` are; None where it has none."""
    if module in AROUND:
        return AROUND[module]
    match = re.fullmatch(r"middle_block\.(\d+)\.(.+)", module)
    if match is not None:
        # A residual network, attention, and a residual network.
        number, inner = int(match[1]), match[2]
        return (
            f"mid_block.attentions.0.{inner}" if number == 1 else _residual(f"mid_block.resnets.{number // 2}", inner)
        )
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", module)
    if match is None:
        return None
    number, inner = int(match[2]), match[4]
    # The first convolution that halves the picture ends the first resolution.
    halves = [int(name.split(".")[1]) for name in names if re.match(r"input_blocks\.\d+\.0\.op\.", name)]
    depth = min(halves) if halves else _most(r"input_blocks", names) + 1
    level, place = divmod(number - (match[1] == "input"), depth)
    blocks = f"{'down' if match[1] == 'input' else 'up'}_blocks.{level}"
    if inner == "op":
        return f"{blocks}.downsamplers.0.conv"
    if inner == "conv":
        return f"{blocks}.upsamplers.0.conv"
    return _residual(f"{blocks}.resnets.{place}", inner) if match[3] == "0" else f"{blocks}.attentions.{place}.{inner}"


def _residual(network: str, inner: str) -> str | None:
    return f"{network}.{RESIDUAL[inner]}" if inner in RESIDUAL else None


def _most(module: str, names: Sequence[str]) -> int:
    """The largest number of a numbered list of modules."""
    pattern = re.compile(rf"{module}\.(\d+)\.")
    return max((int(match[1]) for name in names if (match := pattern.match(name)) is not None), default=0)


def _numbered_block(name: str, names: Sequence[str]) -> str:
    match = re.match(r"((?:double|single|joint)_blocks|(?:single_)?transformer_blocks)\.(\d+)\.", name)
    return BASE if match is None else f"{match[1]}.{match[2]}"


LDM, XL = (Scheme(name, r"input_blocks\.", _ldm_block, WHOLE) for name in ("Stable Diffusion", "SDXL"))
SCHEMES = (
    LDM,
    Scheme("a U-Net of Stable Diffusion", r"input_blocks\.", _ldm_block),
    Scheme("a FLUX checkpoint", r"double_blocks\.", _numbered_block, WHOLE),
    Scheme("FLUX", r"double_blocks\.", _numbered_block),
    Scheme("an SD3 checkpoint", r"joint_blocks\.", _numbered_block, WHOLE),
    Scheme("SD3", r"joint_blocks\.", _numbered_block),
    Scheme("diffusers' U-Nets", r"(?:down_blocks|up_blocks)\.\d+\.resnets\.", _diffusers_block),
    Scheme("diffusers' transformers", r"(?:single_)?transformer_blocks\.\d+\.", _numbered_block),
)


def scheme_of(names: Collection[str]) -> Scheme | None:
    """The scheme of a model's tensors; None for a model that is no image generator."""
    for scheme in SCHEMES:
        pattern = re.compile(re.escape(scheme.prefix) + scheme.mark)
        if any(map(pattern.match, names)):
            is_xl = scheme is LDM and any(name.startswith(SDXL) for name in names)
            return XL if is_xl else scheme
    return None


@dataclass(frozen=True)
class Blocks:
    """The blocks of a generator. of: each tensor's block, by the tensor's name; empty for any other model."""

    of: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def names(self) -> list[str]:
        """All blocks, in the order in which a picture goes through them; `BASE` first, `VAE` last."""
        rank = {"BASE": 0, "IN": 1, "M": 2, "OUT": 3, "double_blocks.": 1, "joint_blocks.": 1, "transformer_blocks.": 1,
                "single_blocks.": 2, "single_transformer_blocks.": 2, "VAE": 9}  # fmt: skip

        def key(block: str) -> tuple[int, int]:
            kind = block.rstrip("0123456789")
            return rank[kind], int(block.removeprefix(kind) or 0)

        return sorted(set(self.of.values()), key=key)

    def matches(self, tensor: str, wanted: str) -> bool:
        """Return whether a filter of a recipe means a tensor: the name of the tensor's block, or else a part of the
        tensor's name."""
        return self.of[tensor] == wanted if wanted in self.names else wanted in tensor

    def places(self) -> dict[str, float]:
        """The positions in [0, 1] of the tensors of numbered blocks, in a gradient over these."""
        numbered = [block for block in self.names if block not in (BASE, VAE)]
        last = max(1, len(numbered) - 1)
        place = {block: i / last for i, block in enumerate(numbered)}
        return {tensor: place[block] for tensor, block in self.of.items() if block in place}


def blocks_of(names: Sequence[str]) -> Blocks:
    """The blocks of a model with tensors of these names. SD 1's autoencoder counts as `BASE`, as people have it."""
    scheme = scheme_of(names)
    if scheme is None:
        return Blocks()
    inner = [name.removeprefix(scheme.prefix) for name in names if name.startswith(scheme.prefix)]
    vae = BASE if scheme is LDM else VAE

    def block(name: str) -> str:
        if name.startswith(VAES):
            return vae
        return scheme.block(name.removeprefix(scheme.prefix), inner) if name.startswith(scheme.prefix) else BASE

    return Blocks({name: block(name) for name in names})
