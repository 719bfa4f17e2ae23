"""The shape and the switches of a decoder.

`DecoderConfig` is static: it is hashable and serves as a compile-time constant of the forward pass.
`checkpoints.config_file` has the architecture make it from a Hugging Face config.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

# Wider than any context: a layer without a sliding window has this one.
NO_WINDOW = 2**30


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `kind` is one of default, linear, dynamic, llama3, yarn, longrope. LongRoPE divides
    each frequency by one of `short_factors`, or of `long_factors` in sequences longer than `original_max_position`."""

    kind: str
    theta: float
    factor: float = 1.0
    max_position: int = 0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector in front of the decoder of a LLaVA: two linear layers with an activation between them. width: of
    the features that it reads, those of the vision tower."""

    width: int
    activation: str
    has_bias: bool


@dataclass(frozen=True)
class RecurrentShape:
    """The sizes of a recurrent layer's state (see `models.recurrence`): channels of its convolution, tokens that the
    convolution sums over (`kernel`), heads of queries and keys (`groups`; 0: the layer has a convolution alone), heads
    of values for each of these (`repeats`), and the axes `key` and `value` of a head's state."""

    channels: int
    kernel: int
    groups: int = 0
    repeats: int = 1
    key: int = 0
    value: int = 0


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The part of a config that the program reads for any decoder; an architecture's own config adds the fields that
    its block reads.

    `architecture` is its model_type, the key for the lookup (models.architecture). `layer_types[i]` is the name of
    layer i's type among the architecture's; empty where all layers are alike. `recurrent`: the state of recurrent
    layers; None: there are none. `windows[i]` is the number of
    positions that layer i attends to, its own included (`NO_WINDOW`: all). `head_is_embedding` says that the output
    head is the transposed input embedding. `position_kinds[i]` is the index of the position tables that layer i takes;
    empty where there is only one set. `positions`: the number of positions where each has an embedding; None: any
    number. `projector`: the projector of a larger model, where it is merged as the decoder is; None: features of images
    are those behind it. `parts`: the leaves of a layer's experts but for the last bias, each with the axis
    of an expert's inner entries, counted from the end.
    """

    parts: ClassVar[Mapping[str, int]] = MappingProxyType({})

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    windows: tuple[int, ...]
    head_is_embedding: bool = False
    position_kinds: tuple[int, ...] = ()
    positions: int | None = None
    layer_types: tuple[str, ...] = ()
    recurrent: RecurrentShape | None = None
    projector: ProjectorConfig | None = None

    @property
    def position_switch(self) -> int | None:
        """The length in tokens beyond which a sequence has other position tables; None: all lengths have the same."""
        return None


@dataclass(frozen=True, kw_only=True)
class LlamaLikeConfig(DecoderConfig):
    """A decoder with RMSNorm, rotary grouped-query attention and a gated MLP, or with these parts varied.

    `norm` is the kind of its norms: RMSNorm whose gain multiplies in the weights' dtype (rms) or in float32
    (rms_float32), or LayerNorm (layer). `norm_offset` is added to each stored gain. `norm_behind_rope` says that
    queries and keys are normalised behind RoPE, not before. `rotary_dim` is the number of entries of a head that RoPE
    rotates; `interleaved` says that it pairs neighbours, not halves. `rope_axes`: for each frequency of M-RoPE, whether
    it rotates by a token's place in time (0), height (1) or width (2); empty: all by its place in time. `local_rope`:
    the RoPE of layers with a sliding window, where these have one of their own. `clip`: the bound of the entries of
    queries, keys and values; None: they have none. `side_by_side` says that the MLP reads the layer's input, as
    attention does, not attention's output.
    """

    mlp: int
    norm_eps: float
    activation: str
    rope: RopeConfig
    rotary_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm: str = "rms"
    norm_offset: float = 0.0
    norm_behind_rope: bool = False
    interleaved: bool = False
    side_by_side: bool = False
    rope_axes: tuple[int, ...] = ()
    local_rope: RopeConfig | None = None
    clip: float | None = None

    @property
    def position_switch(self) -> int | None:
        return self.rope.original_max_position if self.rope.kind == "longrope" else None


def _default_frequencies(theta: float, dim: int) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


def _yarn_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071), section 3.2: interpolate slow dimensions, keep fast ones, ramp in between."""

    def dimension_of(rotations: float) -> float:
        span = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    keep = _default_frequencies(rope.theta, head_dim)
    return keep / rope.factor * ramp + keep * (1 - ramp)


def _llama3_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Llama 3.1: divide long wavelengths by the factor, keep short ones, blend smoothly in between."""
    keep = _default_frequencies(rope.theta, head_dim)
    wavelength = 2 * math.pi / keep
    low = rope.original_max_position / rope.low_freq_factor
    high = rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * keep / rope.factor + smooth * keep
    return np.where(wavelength > low, keep / rope.factor, np.where(wavelength < high, keep, blended))


def rope_frequencies(rope: RopeConfig, dim: int, lengths: jax.Array) -> jax.Array:
    """Inverse frequencies `float32[B, dim/2]` of the `dim` entries of a head that are rotated, for sequences of
    `lengths: int32[B]`.

    Only dynamic NTK scaling and LongRoPE depend on the length; the other kinds give the same row for every sequence.
    """
    if rope.kind == "dynamic":
        grown = jnp.maximum(lengths, rope.max_position).astype(jnp.float32)
        stretch = rope.factor * grown / rope.max_position - (rope.factor - 1)
        theta = rope.theta * stretch ** (dim / (dim - 2))
        exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
        return 1.0 / theta[:, None] ** exponents
    if rope.kind == "longrope":
        is_long = lengths[:, None] > rope.original_max_position
        factors = jnp.where(is_long, jnp.asarray(rope.long_factors), jnp.asarray(rope.short_factors))
        return jnp.asarray(_default_frequencies(rope.theta, dim), jnp.float32) / factors
    rows = {
        "default": lambda: _default_frequencies(rope.theta, dim),
        "linear": lambda: _default_frequencies(rope.theta, dim) / rope.factor,
        "llama3": lambda: _llama3_frequencies(rope, dim),
        "yarn": lambda: _yarn_frequencies(rope, dim),
    }[rope.kind]()
    return jnp.broadcast_to(jnp.asarray(rows, jnp.float32), (lengths.shape[0], dim // 2))
