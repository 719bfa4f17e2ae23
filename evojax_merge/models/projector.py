"""The projector of a LLaVA as a part of its decoder: leaves outside of the layers, and its forward pass.

A search that merges projectors reads the features of images in front of them, which no candidate changes, and computes
each candidate's projector in its passes.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jax

from evojax_merge.models.architecture import Architecture, Leaf, SharedWeights
from evojax_merge.models.config import ProjectorConfig
from evojax_merge.models.layers import ACTIVATIONS, matmul

# The beginning of its tensors' names, and their names behind it.
PREFIX, FIRST, SECOND = "multi_modal_projector.", "linear_1", "linear_2"


LEAVES = tuple(
    leaf
    for module, inner in ((FIRST, "features"), (SECOND, "hidden"))
    for leaf in (
        Leaf(f"projector_{module}", f"{PREFIX}{module}.weight", "projector", ("hidden", inner)),
        Leaf(
            f"projector_{module}_bias", f"{PREFIX}{module}.bias", "projector", ("hidden",),
            present_if=lambda config: config.projector is not None and config.projector.has_bias,
        ),
    )
)  # fmt: skip


@cache
def with_projector(architecture: Architecture) -> Architecture:
    """The architecture of decoders whose config has a projector."""

    def dimensions(config: Any) -> Mapping[str, int]:
        return {**architecture.dimensions(config), "features": config.projector.width}

    filters = {leaf.name: leaf.tensor for leaf in LEAVES} if architecture.filters else {}
    return replace(
        architecture, leaves=(*architecture.leaves, *LEAVES), dimensions=dimensions,
        filters={**architecture.filters, **filters}, gguf=None,
    )  # fmt: skip


def project(config: ProjectorConfig, source: SharedWeights, x: jax.Array) -> jax.Array:
    """`[…, hidden]`: what stands in front of the decoder, of features `[…, width]`."""

    def linear(module: str, x: jax.Array) -> jax.Array:
        y = matmul(x, source.leaf(f"projector_{module}"))
        return y + source.leaf(f"projector_{module}_bias") if config.has_bias else y

    with jax.named_scope("projector"):
        return linear(SECOND, ACTIVATIONS[config.activation](linear(FIRST, x)))
