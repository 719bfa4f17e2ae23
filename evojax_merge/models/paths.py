"""Layer paths: a candidate that is a walk through the layers of all parents.

Letters: M layers of all parents in series, T steps of a path, K parents. A path visits layers in any order, any number
of times, and scales the hidden state by a positive number before each. After an RMSNorm a scale only changes how much a
layer adds to the residual stream, so the scales are folded into the weights: each layer's leaves that write to it (a
Llama's `o` and `down`, or the gains of the norms after them) are multiplied by one over the product of the scales up to
it. The result is the same model (up to the norms' epsilon), in the ordinary form. Where a layer has no norm before its
projections (OLMo 2), its output is multiplied all the same, which is then the meaning of a scale.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.models.architecture import LAYERS, layer_types
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import LayerInputs, deepstack_rows, embed, first_row, image_layout, run_layer
from evojax_merge.models.images import ImageInputs
from evojax_merge.models.layers import LayerKind, SequenceLayout, Weights, prefix_layout
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


# A bank, and the layers, residual scales and count that `run_layers` takes with it.
LayerRun = tuple["PathBank", np.ndarray, np.ndarray, np.int32]


@struct.dataclass
class PathBank:
    """All layers of all parents in one series. layers: stack -> leaf -> `[M_s, …]`, of the stacks that a path walks
    through; shared: leaf -> K arrays `[…]`; kinds: of the M layers. `origins[m]`: the (parent, layer) that layer m is;
    `types[m]`: the name of its type; `rows[m]`: its stacks, each with the layer's row in it. `residual_outputs`: the
    leaves that a layer's scale is folded into, each with its `gain_offset`."""

    layers: dict[str, Weights]
    shared: dict[str, tuple[jax.Array, ...]]
    kinds: LayerKind
    origins: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)
    types: tuple[str, ...] = struct.field(pytree_node=False)
    rows: tuple[tuple[tuple[str, int], ...], ...] = struct.field(pytree_node=False)
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

    def parts(self, steps: Sequence[Step], capacity: int) -> Iterator[LayerRun]:
        """The calls of `run_layers` that take states through some steps, `capacity` at most."""
        layers, residual_scales = np.zeros(capacity, np.int32), np.zeros(capacity, np.float32)
        layers[: len(steps)] = [layer for layer, _ in steps]
        residual_scales[: len(steps)] = [value for _, value in steps]
        yield self, layers, residual_scales, np.int32(len(steps))

    def steps_by_stack(self, layers: Sequence[int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each stack that a path's layers have, the rows `int32[T_s]` of those that have it, and their places
        `int32[T_s]` in the path."""
        pairs: dict[str, list[tuple[int, int]]] = {}
        for place, layer in enumerate(layers):
            for stack, row in self.rows[layer]:
                pairs.setdefault(stack, []).append((row, place))
        arrays = {stack: np.array(each, np.int32) for stack, each in pairs.items()}
        return {stack: (array[:, 0], array[:, 1]) for stack, array in arrays.items()}

    def materialise(
        self, path: LayerPath, config: DecoderConfig, steps: int | None = None
    ) -> tuple[StackedWeights, DecoderConfig]:
        """The path as stacked weights in the export dtype, and its config; padded to `steps`, as by `padded_steps`."""
        layers, scales = padded_steps(path, steps or len(path.layers))
        stacks = {
            stack: _scale_rows(stack, self, rows, scales[places])
            for stack, (rows, places) in self.steps_by_stack(layers).items()
        }
        model = StackedWeights(stacks, self.ends(path.embedding_parent).shared, self.compute_dtype)
        return model, path_config(self, layers, config)

    def scaled_layer(self, name: str, index: jax.Array, scale: jax.Array) -> Weights:
        """Layer `index`, whose type has this name, with its output multiplied by `scale`, rounded to the export dtype,
        in the compute dtype."""
        dtype, weights = jnp.dtype(self.compute_dtype), Weights()
        for stack, _ in self.rows[self.types.index(name)]:
            row = jnp.asarray([dict(rows).get(stack, 0) for rows in self.rows], jnp.int32)[index]
            weights |= {name: leaf.astype(dtype) for name, leaf in self.exported_row(stack, row, scale).items()}
        return weights

    def exported_row(self, stack: str, row: jax.Array, scale: jax.Array) -> Weights:
        """The leaves in a row of a stack with the layer's output multiplied by `scale`, in the export dtype."""
        dtype, offsets = jnp.dtype(self.export_dtype), dict(self.residual_outputs)
        return {
            name: (scale_gain(leaf[row], scale, offsets[name]) if name in offsets else leaf[row]).astype(dtype)
            for name, leaf in self.layers[stack].items()
        }


@dataclass(frozen=True)
class StreamedPathBank:
    """The functions that bring parts of a bank of paths to the device, where a `PathBank` holds all of them.

    layout: the bank without arrays of weights. load: (number) -> stack -> leaves of that one of the M layers, `[1, …]`.
    load_ends: (parent) -> its leaves outside of the layers. check: raises where these can no longer be loaded as they
    were.
    """

    layout: PathBank
    load: Callable[[int], dict[str, Weights]]
    load_ends: Callable[[int], Weights]
    check: Callable[[], None]

    by_layer = True

    def with_compute_dtype(self, compute_dtype: str) -> "StreamedPathBank":
        return replace(self, layout=self.layout.with_compute_dtype(compute_dtype))

    def layer(self, number: int) -> PathBank:
        layout, kind = self.layout, jax.tree.map(lambda each: each[number : number + 1], self.layout.kinds)
        rows = tuple((stack, 0) for stack, _ in layout.rows[number])
        # Layers of a type share a program, whatever their origins.
        return replace(
            layout, layers=self.load(number), kinds=kind, origins=(), types=(layout.types[number],), rows=(rows,)
        )

    def ends(self, parent: int) -> StackedWeights:
        return replace(self.layout, shared={name: (leaf,) for name, leaf in self.load_ends(parent).items()}).ends(0)

    def parts(self, steps: Sequence[Step], capacity: int) -> Iterator[LayerRun]:
        first, one = np.zeros(1, np.int32), np.int32(1)
        for (_, layer), (_, scale) in zip(load_ahead(self.layer, [m for m, _ in steps]), steps, strict=True):
            yield layer, first, np.full(1, scale, np.float32), one

    def materialise(self, path: LayerPath, config: DecoderConfig, steps: int) -> tuple[StackedWeights, DecoderConfig]:
        layers, scales = padded_steps(path, steps)
        depths = {stack: len(rows) for stack, (rows, _) in self.layout.steps_by_stack(layers).items()}
        stacks, used = dict[str, Weights](), Counter[str]()
        for scale, (_, layer) in zip(scales, load_ahead(self.layer, layers), strict=True):
            for stack in layer.layers:
                row, before = np.int32(used[stack]), stacks.pop(stack, None)
                stacks[stack] = jax.block_until_ready(_write_row(stack, depths[stack], before, layer, row, scale))
                used[stack] += 1
        shared = self.ends(path.embedding_parent).shared
        return StackedWeights(stacks, shared, self.layout.compute_dtype), path_config(self.layout, layers, config)


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
class PathRows:
    """The steps of a path that have a stack. rows: int32[T_s], their rows in the stack; scales: float32[T_s]."""

    stack: str = struct.field(pytree_node=False)
    rows: jax.Array
    scales: jax.Array


@struct.dataclass
class PathWeights(MaterialisedWeights):
    """A path as a layer source: each layer is taken from the bank and scaled when the forward pass needs it, so that a
    pass can be differentiated with respect to the scales; gradients ignore the rounding to the export dtype (a
    straight-through estimator). steps: see `PathBank.steps_by_stack`; residual_scales: float32[T]; ends: the embedding,
    final norm and head."""

    bank: PathBank
    ends: StackedWeights
    steps: dict[str, tuple[jax.Array, jax.Array]]
    residual_scales: jax.Array

    @property
    def shared(self) -> Weights:  # type: ignore[override]
        return self.ends.shared

    @property
    def compute_dtype(self) -> str:  # type: ignore[override]
        return self.ends.compute_dtype

    @property
    def stacks(self) -> dict[str, PathRows]:
        return {
            stack: PathRows(stack, rows, self.residual_scales[places]) for stack, (rows, places) in self.steps.items()
        }

    def layer(self, slice_: PathRows) -> Weights:  # type: ignore[override]
        dtype = jnp.dtype(self.compute_dtype)
        exported = self.bank.exported_row(slice_.stack, slice_.rows, slice_.scales)
        return {name: leaf.astype(dtype) for name, leaf in exported.items()}


def path_config(bank: PathBank, layers: Sequence[int], config: DecoderConfig) -> DecoderConfig:
    """The config of a model that consists of the given ones of the M layers."""
    kinds = jax.tree.map(lambda each: np.asarray(each)[list(layers)].tolist(), bank.kinds)
    positions = tuple(kinds.positions or ())
    types = tuple(bank.types[layer] for layer in layers) if config.layer_types else ()
    return replace(config, layers=len(layers), windows=tuple(kinds.window), position_kinds=positions, layer_types=types)


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
    rows, before = state.rows, state.shared_prefix
    names = tuple(dict.fromkeys(bank.types))
    branches = jnp.asarray([names.index(name) for name in bank.types], jnp.int32)

    def inputs_of(sequences: Sequences) -> LayerInputs:
        return LayerInputs.of_layout(config, sequences.layout, sequences.added)

    def run(name: str, i: jax.Array, x: jax.Array, prefix_x: Any) -> tuple[jax.Array, Any]:
        type_, prefix = layer_types(config)[name], None
        weights = bank.scaled_layer(name, layers[i], residual_scales[i])
        kind, number = jax.tree.map(lambda each: each[layers[i]], bank.kinds), state.depth + i
        if before is not None:
            prefix_x, kept = run_layer(config, type_, weights, prefix_x, number, kind, inputs_of(before), None)
            prefix = first_row(type_.memory, kept)
        return run_layer(config, type_, weights, x, number, kind, inputs_of(rows), prefix)[0], prefix_x

    def step(i: jax.Array, hidden: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        if len(names) == 1:
            return run(names[0], i, *hidden)
        stepped: tuple[jax.Array, Any] = jax.lax.switch(
            branches[layers[i]], [partial(run, name) for name in names], i, *hidden
        )
        return stepped

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


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _write_row(
    stack: str, depth: int, leaves: Weights | None, bank: PathBank, number: jax.Array, residual_scale: jax.Array
) -> Weights:
    """The leaves of a path's stack, `[depth, …]` in the export dtype, with row `number` written in place: that of the
    one layer of the bank, whose output is multiplied by `residual_scale`. leaves: None: all other rows are zeros."""

    def written(name: str, layer: jax.Array) -> jax.Array:
        whole = jnp.zeros((depth, *layer.shape), layer.dtype) if leaves is None else leaves[name]
        return jax.lax.dynamic_update_index_in_dim(whole, layer, number, 0)

    row = bank.exported_row(stack, jnp.int32(0), residual_scale)
    return {name: written(name, layer) for name, layer in row.items()}


@partial(jax.jit, static_argnums=0)
def _scale_rows(stack: str, bank: PathBank, rows: jax.Array, residual_scales: jax.Array) -> Weights:
    return jax.lax.map(lambda step: bank.exported_row(stack, *step), (rows, residual_scales))
