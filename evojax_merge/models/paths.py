"""Layer paths: a candidate that is a walk through the layers of all parents.

Letters: M layers of all parents in series, T steps of a path, K parents. A path visits layers in any order, any number
of times, and scales the hidden state by a positive number before each. After an RMSNorm a scale only changes how much a
layer adds to the residual stream, so the scales are folded into the weights: each layer's leaves that write to it (a
Llama's `o` and `down`, or the gains of the norms after them) are multiplied by one over the product of the scales up to
it. The result is the same model (up to the norms' epsilon), in the ordinary form. Where a layer has no norm before its
projections (OLMo 2), its output is multiplied all the same, which is then the meaning of a scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.models.architecture import LAYERS, architecture_of
from evojax_merge.models.attention import prefill_attention
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import add_deepstack, deepstack_rows, embed, image_layout
from evojax_merge.models.images import ImageInputs
from evojax_merge.models.layers import LayerKind, SequenceLayout, Weights, prefix_layout, tables_of
from evojax_merge.models.sources import MaterialisedWeights, StackedWeights
from evojax_merge.models.streamed_bank import load_ahead

# A layer's number among all parents' layers, and the factor of its output.
Step = tuple[int, float]


@dataclass(frozen=True)
class LayerPath:
    """A walk through layers. layers: numbers of the M layers, step by step; scales: positive factors of the hidden
    state, one before each layer.

    `embedding_parent`: the parent whose embedding, final norm and head the path has.
    """

    layers: tuple[int, ...]
    scales: tuple[float, ...]
    embedding_parent: int = 0

    def residual_scales(self) -> np.ndarray:
        """The factors float32[T] of the layers' outputs: one over the running product of scales."""
        return (1.0 / np.cumprod(np.asarray(self.scales, np.float64))).astype(np.float32)

    def scale_gradient(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient float64[T] with respect to each scale, from the gradient float[T] with respect to each residual
        scale. A scale divides the outputs of its layer and of all layers after it: dF/ds_i = -1/s_i sum_(t >= i) r_t
        dF/dr_t."""
        weighted = np.asarray(gradient, np.float64) * self.residual_scales()
        return -np.cumsum(weighted[::-1])[::-1] / np.asarray(self.scales, np.float64)


@dataclass(frozen=True)
class PathSpec:
    """The static half of a path search: the parents' configs, and the dtype that a path is written in."""

    configs: tuple[DecoderConfig, ...]
    export_dtype: str
    method_name = "path"

    @property
    def origins(self) -> tuple[tuple[int, int], ...]:
        """The (parent, layer) that each of the M layers is."""
        return tuple((k, i) for k, config in enumerate(self.configs) for i in range(config.layers))


@struct.dataclass
class PathBank:
    """All layers of all parents in one series. layers: leaf -> `[M, …]`, of the stack that a path walks through;
    shared: leaf -> K arrays `[…]`; kinds: of the M layers. `origins[m]`: the (parent, layer) that layer m is.
    `residual_outputs`: the leaves that a layer's scale is folded into, each with its `gain_offset`."""

    layers: Weights
    shared: dict[str, tuple[jax.Array, ...]]
    kinds: LayerKind
    origins: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)
    residual_outputs: tuple[tuple[str, float], ...] = struct.field(pytree_node=False)
    export_dtype: str = struct.field(pytree_node=False)
    compute_dtype: str = struct.field(pytree_node=False, default="float32")

    # Whether all batches of a task go through a layer before the next one comes.
    by_layer = False

    def check(self) -> None:
        """Raises where the layers can no longer be loaded as they were."""

    def with_compute_dtype(self, compute_dtype: str) -> "PathBank":
        return replace(self, compute_dtype=compute_dtype)

    @property
    def layout(self) -> "PathBank":
        """A bank that holds the layers' kinds."""
        return self

    def ends(self, parent: int) -> StackedWeights:
        """One parent's embedding, final norm and LM head, rounded as they would be exported: a model without layers."""
        dtype = jnp.dtype(self.export_dtype)
        shared = {name: leaves[parent].astype(dtype) for name, leaves in self.shared.items()}
        return StackedWeights({LAYERS: {}}, shared, self.compute_dtype)

    def run(
        self, config: DecoderConfig, states: "Sequence[Activations]", steps: Sequence[Step], capacity: int
    ) -> "list[Activations]":
        """Take the states of some batches through some steps, `capacity` at most."""
        layers, residual_scales = np.zeros(capacity, np.int32), np.zeros(capacity, np.float32)
        layers[: len(steps)] = [layer for layer, _ in steps]
        residual_scales[: len(steps)] = [value for _, value in steps]
        count = np.int32(len(steps))
        return [run_layers(config, self, state, layers, residual_scales, count) for state in states]

    def materialise(
        self, path: LayerPath, config: DecoderConfig, steps: int | None = None
    ) -> tuple[StackedWeights, DecoderConfig]:
        """The path as stacked weights in the export dtype, and its config; padded to `steps`, as by `padded_steps`."""
        layers, residual_scales = padded_steps(path, steps or len(path.layers))
        stacked = _scale_layers(self, jnp.asarray(layers, jnp.int32), jnp.asarray(residual_scales))
        model = StackedWeights({LAYERS: stacked}, self.ends(path.embedding_parent).shared, self.compute_dtype)
        return model, path_config(self, layers, config)

    def scaled_layer(self, index: jax.Array, scale: jax.Array) -> Weights:
        """Layer `index` with its output multiplied by `scale`, rounded to the export dtype, in the compute dtype."""
        dtype = jnp.dtype(self.compute_dtype)
        return {name: leaf.astype(dtype) for name, leaf in self.exported_layer(index, scale).items()}

    def exported_layer(self, index: jax.Array, scale: jax.Array) -> Weights:
        """Layer `index` with its output multiplied by `scale`, in the export dtype."""
        dtype, offsets = jnp.dtype(self.export_dtype), dict(self.residual_outputs)
        return {
            name: (scale_gain(leaf[index], scale, offsets[name]) if name in offsets else leaf[index]).astype(dtype)
            for name, leaf in self.layers.items()
        }


@dataclass(frozen=True)
class StreamedPathBank:
    """The functions that bring parts of a bank of paths to the device, where a `PathBank` holds all of them.

    layout: the bank without arrays of weights. load: (number) -> leaves of that one of the M layers, `[1, …]`.
    load_ends: (parent) -> its leaves outside of the layers. check: raises where these can no longer be loaded as they
    were.
    """

    layout: PathBank
    load: Callable[[int], Weights]
    load_ends: Callable[[int], Weights]
    check: Callable[[], None]

    by_layer = True

    def with_compute_dtype(self, compute_dtype: str) -> "StreamedPathBank":
        return replace(self, layout=self.layout.with_compute_dtype(compute_dtype))

    def layer(self, number: int) -> PathBank:
        """The bank of one layer."""
        kind = jax.tree.map(lambda each: each[number : number + 1], self.layout.kinds)
        return replace(
            self.layout, layers=self.load(number), kinds=kind, origins=self.layout.origins[number : number + 1]
        )

    def ends(self, parent: int) -> StackedWeights:
        return replace(self.layout, shared={name: (leaf,) for name, leaf in self.load_ends(parent).items()}).ends(0)

    def run(
        self, config: DecoderConfig, states: "Sequence[Activations]", steps: Sequence[Step], capacity: int
    ) -> "list[Activations]":
        first, one, behind = np.zeros(1, np.int32), np.int32(1), list(states)
        for (_, layer), (_, scale) in zip(load_ahead(self.layer, [m for m, _ in steps]), steps, strict=True):
            scales = np.full(1, scale, np.float32)
            # The layer before is free when the one after this is on its way.
            behind = jax.block_until_ready([run_layers(config, layer, state, first, scales, one) for state in behind])
        return behind

    def materialise(self, path: LayerPath, config: DecoderConfig, steps: int) -> tuple[StackedWeights, DecoderConfig]:
        layers, scales = padded_steps(path, steps)
        stacks = None
        for number, (_, layer) in enumerate(load_ahead(self.layer, layers)):
            stacks = _write_step(steps, stacks, layer, np.int32(number), scales[number])
            jax.block_until_ready(stacks)
        shared = self.ends(path.embedding_parent).shared
        model = StackedWeights({LAYERS: stacks or {}}, shared, self.layout.compute_dtype)
        return model, path_config(self.layout, layers, config)


def scale_gain(stored: jax.Array, scale: jax.Array, offset: float) -> jax.Array:
    """The float32 weights to store after the gain `offset + stored` is multiplied by `scale: float32[]`, with the same
    bits in every compiled program."""
    scaled = scale * stored.astype(jnp.float32)
    if not offset:
        return scaled
    # Clipping forces a product to be rounded: else some programs would fuse it with the sum after it, and round once.
    largest = jnp.finfo(jnp.float32).max
    shift = jnp.clip(scale * offset, -largest, largest) - offset
    return jnp.clip(scaled, -largest, largest) + shift


@struct.dataclass
class PathWeights(MaterialisedWeights):
    """A path as a layer source: each layer is taken from the bank and scaled when the forward pass needs it, so that a
    pass can be differentiated with respect to the scales; gradients ignore the rounding to the export dtype (a
    straight-through estimator). layers: int32[T]; residual_scales: float32[T]; ends: the embedding, final norm and
    head."""

    bank: PathBank
    ends: StackedWeights
    layers: jax.Array
    residual_scales: jax.Array

    @property
    def shared(self) -> Weights:  # type: ignore[override]
        return self.ends.shared

    @property
    def compute_dtype(self) -> str:  # type: ignore[override]
        return self.ends.compute_dtype

    @property
    def stacks(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        return {LAYERS: (self.layers, self.residual_scales)}

    def layer(self, slice_: tuple[jax.Array, jax.Array]) -> Weights:  # type: ignore[override]
        return self.bank.scaled_layer(*slice_)


def path_config(bank: PathBank, layers: Sequence[int], config: DecoderConfig) -> DecoderConfig:
    """The config of a model that consists of the given ones of the M layers."""
    kinds = jax.tree.map(lambda each: np.asarray(each)[list(layers)].tolist(), bank.kinds)
    positions = tuple(kinds.positions or ())
    return replace(config, layers=len(layers), windows=tuple(kinds.window), position_kinds=positions)


@struct.dataclass
class Activations:
    """Hidden states of a batch's rows, and of the shared prefix before the rows, if there is one, behind the first
    `depth: int32[]` layers of a path."""

    rows: "Sequences"
    shared_prefix: "Sequences | None"
    depth: jax.Array


@struct.dataclass
class Sequences:
    """Hidden states `[B, T, hidden]`, their layout, and the rows `[D, B, T, hidden]` that images add to them behind the
    first D layers, or None."""

    hidden: jax.Array
    layout: SequenceLayout
    added: jax.Array | None


@partial(jax.jit, static_argnums=0)
def embed_batch(
    config: DecoderConfig,
    source: StackedWeights,
    tokens: jax.Array,
    layout: SequenceLayout,
    shared_prefix: jax.Array | None,
    images: ImageInputs | None = None,
    prefix_images: ImageInputs | None = None,
) -> Activations:
    """The activations before the first layer. shared_prefix: int32[1, H]; images, prefix_images: see
    `decoder.embed`."""

    def sequences(tokens: jax.Array, layout: SequenceLayout, images: ImageInputs | None) -> Sequences:
        hidden = embed(config, source, tokens, layout, images)
        added = deepstack_rows(tokens, images, hidden.dtype)
        return Sequences(hidden, image_layout(config, tokens, layout, images), added)

    before = None
    if shared_prefix is not None:
        before = sequences(shared_prefix, prefix_layout(shared_prefix.shape[1]), prefix_images)
    return Activations(sequences(tokens, layout, images), before, jnp.int32(0))


@partial(jax.jit, static_argnums=0)
def run_layers(
    config: DecoderConfig,
    bank: PathBank,
    state: Activations,
    layers: jax.Array,
    residual_scales: jax.Array,
    count: jax.Array,
) -> Activations:
    """Run `count` layers: layers `int32[S]` and residual scales `float32[S]`, of which the first `count` are used.

    The number of steps is not part of the compiled shape: paths of all lengths, and any part of one, share a program,
    and a step gives the same bits in every part of a path.
    """
    architecture, rows, before = architecture_of(config), state.rows, state.shared_prefix
    tables = architecture.position_tables(config, rows.layout)

    def step(i: jax.Array, hidden: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        (x, prefix_x), prefix = hidden, None
        weights = bank.scaled_layer(layers[i], residual_scales[i])
        kind = jax.tree.map(lambda each: each[layers[i]], bank.kinds)
        if before is not None:
            attend = prefill_attention(kind.window, before.layout)
            prefix_tables = tables_of(kind, architecture.position_tables(config, before.layout))
            prefix_x, kv = architecture.block(config, weights, prefix_x, prefix_tables, attend)
            prefix_x = add_deepstack(prefix_x, before.added, state.depth + i)
            prefix = (kv[0][:, 0], kv[1][:, 0])
        attend = prefill_attention(kind.window, rows.layout, prefix)
        x, _ = architecture.block(config, weights, x, tables_of(kind, tables), attend)
        return add_deepstack(x, rows.added, state.depth + i), prefix_x

    x, prefix_x = jax.lax.fori_loop(0, count, step, (rows.hidden, None if before is None else before.hidden))
    if before is not None:
        before = replace(before, hidden=prefix_x)
    return Activations(replace(rows, hidden=x), before, state.depth + count)


def padded_steps(path: LayerPath, steps: int) -> tuple[list[int], np.ndarray]:
    """The layers of a path and the factors float32[steps] of their outputs, with layers behind it that add nothing to
    the residual stream."""
    added = steps - len(path.layers)
    scales = np.concatenate([path.residual_scales(), np.zeros(added, np.float32)])
    return [*path.layers, *path.layers[:1] * added], scales


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _write_step(
    depth: int, stacks: Weights | None, bank: PathBank, number: jax.Array, residual_scale: jax.Array
) -> Weights:
    """The stacked layers of a path, `[depth, …]` in the export dtype, with step `number` written in place: the one
    layer of the bank, whose output is multiplied by `residual_scale`. stacks: None: all other steps are zeros."""

    def written(name: str, layer: jax.Array) -> jax.Array:
        whole = jnp.zeros((depth, *layer.shape), layer.dtype) if stacks is None else stacks[name]
        return jax.lax.dynamic_update_index_in_dim(whole, layer, number, 0)

    return {name: written(name, layer) for name, layer in bank.exported_layer(jnp.int32(0), residual_scale).items()}


@jax.jit
def _scale_layers(bank: PathBank, layers: jax.Array, residual_scales: jax.Array) -> Weights:
    return jax.lax.map(lambda step: bank.exported_layer(*step), (layers, residual_scales))
