"""The compiled passes of an evaluation that has one layer of the bank at a time: the embedding, a layer, the head.

A candidate's hidden states wait between the layers while other batches and candidates go through the same one. Shapes:
P candidates of a chunk (leading axis on every leaf that each has), hidden states `[P, B, T, hidden]`. `leaves` are one
layer of the bank, with a leading axis of one on every array; `parameters` are that layer's part of the recipes, `[P, 1,
…]`. Children of a pool have no leaves in common, and their weights in the place of parameters.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.evaluation import passes
from evojax_merge.evaluation.devices import shard_population, size_of, vmap_sharded
from evojax_merge.evaluation.passes import MaterialiseSpec, PassSpec, ScoreSpec
from evojax_merge.models.architecture import LAYERS, architecture_of, layer_types
from evojax_merge.models.bank import Bank, LeafBank, Parameters, Recipe, take_candidate
from evojax_merge.models.decoder import LayerInputs, first_row, image_layout, run_layer
from evojax_merge.models.decoder import embed as embed_tokens
from evojax_merge.models.layers import SequenceLayout, Weights, layer_kinds
from evojax_merge.models.sharding import replicate, shard
from evojax_merge.models.sources import LazyMerge

Leaves = dict[str, LeafBank]


def _ends(spec: PassSpec | MaterialiseSpec, leaves: Leaves, parameters: dict[str, Parameters]) -> LazyMerge:
    """The merge of the leaves outside of the layers. parameters: by leaf, of one candidate."""
    merge: LazyMerge = spec.factory(Bank({}, leaves), Recipe({}, parameters))
    return merge


def _layer(factory: Any, leaves: Leaves, parameters: Parameters) -> tuple[LazyMerge, Any]:
    """The merge of one layer, and the slice of it that its layer is merged from. parameters: of one candidate."""
    merge: LazyMerge = factory(Bank({LAYERS: leaves}, {}), Recipe({LAYERS: parameters}, {}))
    return merge, jax.tree.map(lambda array: array[0], merge.stacks[LAYERS])


def _layout(batch: Any) -> SequenceLayout:
    return SequenceLayout(batch["positions"], batch["segment_ids"])


def _embedded(spec: PassSpec, shared: Any, parameters: Any) -> jax.Array:
    leaves, batch = shared
    images = batch.get("images")
    layout = image_layout(spec.config, batch["tokens"], _layout(batch), images)
    return embed_tokens(spec.config, _ends(spec, leaves, parameters), batch["tokens"], layout, images)


@partial(jax.jit, static_argnums=0)
def embed(spec: PassSpec, shared: Any, parameters: Any) -> jax.Array:
    """The hidden states before the first layer. shared: the bank's leaves outside of the layers, and a batch's arrays
    (`tokens`, `positions`, `segment_ids`, and its `images` where it has any)."""
    return vmap_sharded(spec.mesh, lambda *arguments: replicate(_embedded(spec, *arguments)), shared, parameters)


def _merged(spec: MaterialiseSpec, leaves: Leaves, parameters: Parameters) -> Weights:
    merge, slice_ = _layer(spec.factory, leaves, parameters)
    return merge.layer(slice_)


@partial(jax.jit, static_argnums=0)
def merge_layer(spec: MaterialiseSpec, leaves: Leaves, parameters: Parameters) -> Weights:
    """One layer's weights of each candidate, rounded to the export dtype, in the dtype of the computation."""
    return vmap_sharded(spec.mesh, partial(_merged, spec), leaves, parameters)


@dataclass(frozen=True)
class LayerSpec(PassSpec):
    """A pass through a layer. layer_type: the name of the layer's type."""

    layer_type: str


def _run(spec: LayerSpec, shared: Any, each: Any) -> Any:
    """One candidate's hidden states behind a layer, and what the layer keeps (see `run`)."""
    (number, batch), ((weights, prefix), x), config = shared, each, spec.config
    type_ = layer_types(config)[spec.layer_type]
    inputs = LayerInputs.of(config, batch["tokens"], _layout(batch), batch.get("images"), x.dtype)
    kind = jax.tree.map(lambda values: values[number], layer_kinds(config))
    before = None if prefix is None else first_row(type_.memory, prefix)
    return run_layer(config, type_, weights, x, number, kind, inputs, before)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def run(spec: LayerSpec, shared: Any, each: Any, x: jax.Array) -> jax.Array:
    """The hidden states of a batch behind a layer, in the place of those before it. shared: the layer's number int32[],
    and the batch's arrays; each: the layer's weights, and what it kept of the prefix or None."""
    return vmap_sharded(spec.mesh, lambda shared, each: _run(spec, shared, each)[0], shared, (each, x))


@partial(jax.jit, static_argnums=0)
def run_keeping(spec: LayerSpec, shared: Any, each: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """Like `run`, with what the layer keeps, and the hidden states before it left as they are."""
    return vmap_sharded(spec.mesh, partial(_run, spec), shared, (each, x))


def _answers(spec: ScoreSpec, shared: Any, parameters: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One candidate's answers from the hidden states behind its last layer."""
    leaves, batch = shared
    source = _ends(spec, leaves, parameters)
    hidden = architecture_of(spec.config).final_norm(spec.config, source, x)
    return passes.logprobs_from_hidden(spec.config, source, hidden, batch, spec.logits_fn)


@partial(jax.jit, static_argnums=0)
def answer(spec: ScoreSpec, shared: Any, each: Any) -> tuple[jax.Array, jax.Array]:
    """float32[P, R] and bool[P, R]: the answers of a batch (see `passes.logprobs_from_hidden`). shared: as for `embed`;
    each: the recipes of the leaves outside of the layers, and the hidden states behind the last layer."""
    return vmap_sharded(spec.mesh, lambda shared, each: _answers(spec, shared, *each), shared, each)


@partial(jax.jit, static_argnums=0)
def materialise_ends(spec: MaterialiseSpec, leaves: Leaves, parameters: Any) -> Weights:
    """The leaves outside of the layers of each candidate, in the export dtype."""

    def local(leaves: Leaves, parameters: Any) -> Weights:
        merged = _one_by_one(lambda parameters: _ends(spec, leaves, parameters).materialise().shared, parameters)
        return {name: _placed(leaves[name], array) for name, array in merged.items()}

    return shard_population(spec.mesh, local, leaves, parameters)


def _placed(leaf: LeafBank, array: jax.Array) -> jax.Array:
    """Candidates' weights, sharded like the sources that they are merged from."""
    return replicate(array) if leaf.shard_axis is None else shard(array, leaf.shard_axis)


def _one_by_one(function: Any, candidates: Any) -> Any:
    results = [function(take_candidate(candidates, i)) for i in range(size_of(candidates))]
    return jax.tree.map(lambda *each: jnp.stack(each), *results)


@dataclass(frozen=True)
class StackSpec(MaterialiseSpec):
    """Materialising layer by layer, into stacks of `depth` layers."""

    depth: int


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def materialise_layer(spec: StackSpec, shared: Any, parameters: Parameters, stacks: Weights | None) -> Weights:
    """The layers of each candidate, `[P, L, …]` in the export dtype, with layer `number` written in place. shared: the
    layer's leaves, and its number int32[]; stacks: None: all other layers are zeros."""

    def local(shared: Any, each: Any) -> Weights:
        (leaves, number), (parameters, stacks) = shared, each

        def one(parameters: Parameters) -> Weights:
            merge, slice_ = _layer(spec.factory, leaves, parameters)
            return merge.merge_layer(slice_)

        def written(name: str, layer: jax.Array) -> jax.Array:
            leaf = leaves[name]
            if stacks is None:
                # No device has zeros for the parts of the others.
                whole = _placed(leaf, jnp.zeros((layer.shape[0], spec.depth, *layer.shape[1:]), layer.dtype))
            else:
                whole = stacks[name]
            return _placed(leaf, jax.lax.dynamic_update_slice_in_dim(whole, layer[:, None], number, axis=1))

        return {name: written(name, layer) for name, layer in _one_by_one(one, parameters).items()}

    return shard_population(spec.mesh, local, shared, (parameters, stacks))


@partial(jax.jit, static_argnums=0)
def answer_gradient(spec: ScoreSpec, shared: Any, each: Any) -> Any:
    """The results of `answer`, and the derivatives of `sum_r weights[r] totals[r]` with respect to the recipes of the
    leaves outside of the layers, float32, and to the hidden states. each: as for `answer`, and weights
    `float32[P, R]`."""

    def one(shared: Any, each: Any) -> Any:
        parameters, x, weights = each
        function = partial(_answers, spec, shared)
        answers, (slope, cotangent) = passes.answers_and_gradients(function, weights, parameters, x)
        return *answers, passes.to_float32(slope), cotangent

    return vmap_sharded(spec.mesh, one, shared, each)


@partial(jax.jit, static_argnums=0)
def run_gradient(spec: LayerSpec, shared: Any, each: Any) -> Any:
    """The derivatives of a layer's pass with respect to its weights, the hidden states before it, and the prefix's keys
    and values (None where there is no prefix). shared, each: as for `run_keeping`, and x; and the derivatives with
    respect to the hidden states behind the layer and to its keys and values (None: nothing depends on these)."""

    def one(shared: Any, each: Any) -> Any:
        (weights, prefix), x, (behind, kept) = each

        def function(weights: Weights, x: jax.Array, prefix: Any) -> Any:
            output, kv = _run(spec, shared, ((weights, prefix), x))
            return output, kv if kept is not None else None

        _, pull_back = jax.vjp(function, weights, x, prefix)
        return pull_back((behind, kept))

    return vmap_sharded(spec.mesh, one, shared, each)


@partial(jax.jit, static_argnums=0)
def merge_gradient(spec: MaterialiseSpec, leaves: Leaves, each: Any) -> Parameters:
    """The derivative with respect to a layer's parameters, float32, of a function that depends on them through the
    layer's weights. each: the parameters, and the derivative with respect to the weights."""
    return passes.gradient_through(spec.mesh, partial(_merged, spec), leaves, each)


@partial(jax.jit, static_argnums=0)
def embed_gradient(spec: PassSpec, shared: Any, each: Any) -> Any:
    """The derivative with respect to the recipes of the leaves outside of the layers, float32, of a function that
    depends on them through the hidden states before the first layer. shared: as for `embed`; each: those recipes, and
    the derivative with respect to the hidden states."""
    return passes.gradient_through(spec.mesh, partial(_embedded, spec), shared, each)
