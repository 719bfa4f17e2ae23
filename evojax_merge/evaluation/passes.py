"""The compiled passes over a chunk of candidates: prefill a shared prefix, score a batch, materialise, generate.

A pass takes arrays that all candidates share and arrays that each has (leading axis P on every leaf); a static
`factory` makes a layer source of the two.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from evojax_merge.evaluation.costs import result_axes
from evojax_merge.evaluation.cut_axes import Axis, axis_of
from evojax_merge.evaluation.devices import AnyMesh, Devices, shard_population, size_of, vmap_sharded
from evojax_merge.models import generate
from evojax_merge.models.bank import Bank, MergeSpec, Recipe, take_candidate
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import (
    CacheUpdate,
    HeadSource,
    KVCache,
    forward,
    logits,
    target_logprobs,
)
from evojax_merge.models.generate import DecodeState
from evojax_merge.models.layers import SequenceLayout, prefix_layout
from evojax_merge.models.sources import (
    DifferentiableMerge,
    LazyMerge,
    StackedWeights,
    UnstackedWeights,
    differentiable_merge,
    lazy_merge,
)
from evojax_merge.tasks.task import LogitsFn


@dataclass(frozen=True)
class TracedPass:
    """A pass, traced. cut: for each of its arguments the axis that devices which share a model cut, None where each has
    the whole."""

    traced: jax.stages.Traced
    cut: tuple[Axis, ...]

    @property
    def jaxpr(self) -> Any:
        return self.traced.jaxpr

    @property
    def args_info(self) -> Any:
        return self.traced.args_info

    @property
    def out_info(self) -> Any:
        return self.traced.out_info

    def lower(self, **options: Any) -> Any:
        return self.traced.lower(**options)


def trace(function: Any, *arguments: Any) -> TracedPass:
    """Trace a pass over arrays, or over abstract ones, which are cut by their shardings."""
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "dtype")]
    cut = [axis_of(leaf.sharding.spec) if _is_named(leaf) else None for leaf in leaves]
    return TracedPass(function.trace(*arguments), tuple(cut))


def abstract_results(traced: TracedPass, devices: Devices) -> Any:
    """The results of a pass, leading axis P on every leaf, as abstract arrays with the shardings that the pass leaves
    them in (see `costs.result_axes`)."""
    leaves, tree = jax.tree.flatten(traced.out_info)
    axes = result_axes(traced.jaxpr, traced.cut, devices.model)
    return jax.tree.unflatten(
        tree, [devices.abstract_of_candidates(*leaf_and_axis) for leaf_and_axis in zip(leaves, axes, strict=True)]
    )


def _is_named(leaf: Any) -> bool:
    return isinstance(getattr(leaf, "sharding", None), NamedSharding)


Materialised = TypeVar("Materialised", StackedWeights, UnstackedWeights)


class WeightsFactory(Protocol):
    """Makes a candidate's layer source. Hashable: part of the compiled program."""

    def __call__(self, replicated: Any, candidate: Any) -> Any: ...


@dataclass(frozen=True)
class LazyMergeFactory:
    """Candidates are recipes, over a shared bank. prefetch_layers: see `LazyMerge`."""

    spec: MergeSpec
    compute_dtype: str
    prefetch_layers: bool = False

    def __call__(self, replicated: Bank, candidate: Recipe) -> LazyMerge:
        return lazy_merge(replicated, candidate, self.spec, self.compute_dtype, self.prefetch_layers)


@dataclass(frozen=True)
class DifferentiableFactory(LazyMergeFactory):
    """Candidates are recipes, over a shared bank, to be differentiated with respect to the recipes."""

    def __call__(self, replicated: Bank, candidate: Recipe) -> DifferentiableMerge:
        return differentiable_merge(replicated, candidate, self.spec, self.compute_dtype)


class MaterialisedFactory(WeightsFactory, Protocol):
    """A factory of models that exist in memory."""

    def unstack(self, mesh: AnyMesh, replicated: Any, candidates: Any) -> tuple[Any, Any]:
        """The candidates' shared arrays, and the arrays of each, with every layer in arrays of its own."""
        ...


@dataclass(frozen=True)
class SharedModel:
    """One model, replicated; the candidate's own argument is a placeholder."""

    def __call__(self, replicated: Materialised, candidate: Any) -> Materialised:
        return replicated

    def unstack(self, mesh: AnyMesh, replicated: StackedWeights, candidates: Any) -> tuple[UnstackedWeights, Any]:
        return unstack_layers(replicated), candidates


@dataclass(frozen=True)
class PerCandidateModel:
    """Each candidate has materialised weights of its own."""

    def __call__(self, replicated: None, candidate: Materialised) -> Materialised:
        return candidate

    def unstack(self, mesh: AnyMesh, replicated: None, candidates: StackedWeights) -> tuple[None, UnstackedWeights]:
        return None, unstack_population(mesh, candidates)


def logprobs_from_hidden(
    config: DecoderConfig, source: HeadSource, hidden: jax.Array, batch: Any, logits_fn: LogitsFn | None
) -> tuple[jax.Array, jax.Array]:
    """For each span of a batch its targets' total log-probability float32[R] and whether they are the greedy tokens,
    bool[R]; or the result of `logits_fn` on its logits. hidden: `[B, T, hidden]`, the final states; batch: a
    ScoringBatch's arrays, as a dict."""
    # Only positions that predict a target go through the head.
    picked = hidden.reshape(-1, hidden.shape[-1])[batch["predict_at"]]
    targets, spread_ = batch["targets"], batch["target_index"]
    if logits_fn is not None:
        return _apply_logits_fn(config, source, picked, batch, logits_fn)
    logprobs, is_greedy = target_logprobs(config, source, picked, targets)
    inside = spread_ < targets.shape[0]
    index = jnp.minimum(spread_, targets.shape[0] - 1)
    totals = jnp.where(inside, logprobs[index], 0.0).sum(axis=-1)
    return totals, jnp.where(inside, is_greedy[index], True).all(axis=-1)


def _apply_logits_fn(
    config: DecoderConfig, source: HeadSource, picked: jax.Array, batch: Any, logits_fn: LogitsFn
) -> tuple[jax.Array, jax.Array]:
    scores, targets = logits(config, source, picked), batch["targets"]

    def one(span: jax.Array) -> jax.Array:
        index = jnp.minimum(span, targets.shape[0] - 1)
        return jnp.asarray(logits_fn(scores[index], targets[index], span < targets.shape[0]), jnp.float32).reshape(())

    # A padded span has no logits to look at.
    totals = jnp.where(batch["rows"] < 0, 0.0, jax.lax.map(one, batch["target_index"]))
    return totals, jnp.zeros(totals.shape, bool)


@partial(jax.jit, static_argnums=(0, 1, 2))
def prefill_prefix(
    config: DecoderConfig,
    factory: WeightsFactory,
    mesh: AnyMesh,
    replicated: Any,
    candidates: Any,
    shared_prefix: jax.Array,
) -> KVCache:
    """The KV cache of a shared prefix int32[H] (one row) for each of P candidates."""

    def one(replicated: Any, candidate: Any) -> KVCache:
        shared, shared_prefix = replicated
        tokens = shared_prefix[None]
        _, cache = forward(
            config, factory(shared, candidate), tokens, prefix_layout(shared_prefix.shape[0]), return_kv=True
        )
        assert cache is not None
        return cache

    return vmap_sharded(mesh, one, (replicated, shared_prefix), candidates)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def score(
    config: DecoderConfig,
    factory: WeightsFactory,
    mesh: AnyMesh,
    logits_fn: LogitsFn | None,
    replicated: Any,
    candidates: Any,
    prefix: KVCache | None,
    batch: Any,
) -> tuple[jax.Array, jax.Array]:
    """float32[P, R] and bool[P, R]: a chunk of candidates on one batch (see `logprobs_from_hidden`)."""

    def one(replicated: Any, candidate: Any) -> tuple[jax.Array, jax.Array]:
        (shared, batch), (arrays, prefix) = replicated, candidate
        source = factory(shared, arrays)
        layout = SequenceLayout(batch["positions"], batch["segment_ids"])
        hidden, _ = forward(config, source, batch["tokens"], layout, prefix=prefix)
        return logprobs_from_hidden(config, source, hidden, batch, logits_fn)

    return vmap_sharded(mesh, one, (replicated, batch), (candidates, prefix))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def score_gradient(
    config: DecoderConfig,
    factory: WeightsFactory,
    mesh: AnyMesh,
    logits_fn: LogitsFn | None,
    replicated: Any,
    candidates: Any,
    prefix: KVCache | None,
    batch: Any,
    weights: Any,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """The results of `score`, and for each of P candidates the derivative of `sum_r weights[r] totals[r]` with respect
    to the candidate and to its prefix, float32. weights: float32[P, R]."""

    def one(replicated: Any, candidate: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
        (shared, batch), (arrays, prefix, weights) = replicated, candidate
        layout = SequenceLayout(batch["positions"], batch["segment_ids"])

        def goal(arrays: Any, prefix: KVCache | None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            source = factory(shared, arrays)
            hidden, _ = forward(config, source, batch["tokens"], layout, prefix=prefix)
            totals, is_greedy = logprobs_from_hidden(config, source, hidden, batch, logits_fn)
            return jnp.sum(weights * totals), (totals, is_greedy)

        (_, answers), gradients = jax.value_and_grad(goal, argnums=(0, 1), has_aux=True)(arrays, prefix)
        return answers, to_float32(gradients)

    return vmap_sharded(mesh, one, (replicated, batch), (candidates, prefix, weights))


@partial(jax.jit, static_argnums=(0, 1, 2))
def prefix_gradient(
    config: DecoderConfig,
    factory: WeightsFactory,
    mesh: AnyMesh,
    replicated: Any,
    candidates: Any,
    shared_prefix: jax.Array,
    cotangents: KVCache,
) -> Any:
    """The derivative with respect to each of P candidates of a function that depends on it through its prefix's cache,
    float32. cotangents: the derivative with respect to the cache."""

    def one(replicated: Any, candidate: Any) -> Any:
        (shared, shared_prefix), (arrays, cotangents) = replicated, candidate

        def cache(arrays: Any) -> KVCache | None:
            tokens, layout = shared_prefix[None], prefix_layout(shared_prefix.shape[0])
            return forward(config, factory(shared, arrays), tokens, layout, return_kv=True)[1]

        output, pull_back = jax.vjp(cache, arrays)
        cotangents = jax.tree.map(lambda cotangent, leaf: cotangent.astype(leaf.dtype), cotangents, output)
        return to_float32(pull_back(cotangents)[0])

    return vmap_sharded(mesh, one, (replicated, shared_prefix), (candidates, cotangents))


@partial(jax.jit, static_argnums=(0, 1))
def recipe_gradient(
    factory: DifferentiableFactory, mesh: AnyMesh, bank: Bank, recipes: Recipe, cotangents: StackedWeights
) -> Recipe:
    """The derivative with respect to each of P recipes of a function that depends on it through its materialised
    candidate, float32. cotangents: the derivative with respect to the candidate's weights."""

    def local(bank: Bank, candidates: Any) -> Recipe:
        def one(candidate: Any) -> Recipe:
            recipe, cotangent = candidate
            model, pull_back = jax.vjp(lambda varied_recipe: factory(bank, varied_recipe).materialise(), recipe)
            cotangent = jax.tree.map(lambda weight, leaf: weight.astype(leaf.dtype), cotangent, model)
            gradient: Recipe = pull_back(cotangent)[0]
            return gradient

        return jax.lax.map(one, candidates)

    return shard_population(mesh, local, bank, (recipes, cotangents))


@partial(jax.jit, donate_argnums=0)
def add(total: Any, part: Any) -> Any:
    """The sum of two pytrees, in the place of the first."""
    return jax.tree.map(jnp.add, total, part)


@partial(jax.jit, static_argnums=1)
def to_dtype(tree: Any, dtype: str) -> Any:
    """A pytree with floating-point leaves in another dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), tree)


def to_float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


@partial(jax.jit, static_argnums=(0, 1))
def materialise(factory: LazyMergeFactory, mesh: AnyMesh, bank: Bank, recipes: Recipe) -> StackedWeights:
    """The whole weights of each candidate."""

    def local(bank: Bank, recipes: Recipe) -> StackedWeights:
        def one(recipe: Recipe) -> StackedWeights:
            # Without the barrier the compiler takes the shared leaves' deltas, which no candidate changes, out of the
            # loop and keeps them.
            held_bank, recipe = jax.lax.optimization_barrier((bank, recipe))
            return factory(held_bank, recipe).materialise()

        if size_of(recipes) == 1:
            return jax.tree.map(lambda leaf: leaf[None], one(take_candidate(recipes, 0)))
        return jax.lax.map(one, recipes)

    return shard_population(mesh, local, bank, recipes)


@jax.jit
def unstack_layers(model: StackedWeights) -> UnstackedWeights:
    """A model with its layers in arrays of their own."""
    return model.unstack()


@partial(jax.jit, static_argnums=0)
def unstack_population(mesh: AnyMesh, candidates: StackedWeights) -> UnstackedWeights:
    """Candidates with the layers of each in arrays of their own."""
    return shard_population(mesh, lambda _, candidates: jax.vmap(StackedWeights.unstack)(candidates), None, candidates)


@partial(jax.jit, static_argnums=(0, 1, 2, 4, 5, 6, 7))
def init_decode(
    config: DecoderConfig,
    dtype: str,
    mesh: AnyMesh,
    candidates: Any,
    rows: int,
    width: int,
    new: int,
    step_tokens: int,
) -> DecodeState:
    """The decode state for `candidates: [P]` candidates (see models.generate)."""

    def local(_: Any, candidates: Any) -> DecodeState:
        return generate.init_decode_state(config, dtype, size_of(candidates), rows, width, new, step_tokens)

    return shard_population(mesh, local, None, candidates)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=(8,))
def prefill(
    config: DecoderConfig,
    factory: WeightsFactory,
    mesh: AnyMesh,
    width: int,
    stop: tuple[int, ...],
    replicated: Any,
    candidates: Any,
    prefix: KVCache | None,
    state: DecodeState,
    row: jax.Array,
    tokens: jax.Array,
    left_pad: jax.Array,
) -> DecodeState:
    """Prefill prompts and generate a first token after each (see models.generate)."""

    def local(replicated: Any, candidates: Any) -> DecodeState:
        (shared, row, tokens, left_pad), (arrays, state, prefix) = replicated, candidates
        return generate.prefill(
            config, partial(factory, shared), arrays, state, width, row, tokens, left_pad, stop, prefix
        )

    return shard_population(mesh, local, (replicated, row, tokens, left_pad), (candidates, state, prefix))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6), donate_argnums=(9,))
def decode(
    config: DecoderConfig,
    factory: WeightsFactory,
    mesh: AnyMesh,
    steps: int,
    step_tokens: int,
    update_rows: CacheUpdate,
    stop: tuple[int, ...],
    replicated: Any,
    candidates: Any,
    state: DecodeState,
    prefix: KVCache | None,
    tokens: jax.Array,
    lookup_corpus: jax.Array,
) -> DecodeState:
    """`steps` further passes (see models.generate)."""

    def local(replicated: Any, candidates: Any) -> DecodeState:
        (shared, tokens, lookup_corpus), (arrays, state, prefix) = replicated, candidates
        return generate.decode(
            config,
            partial(factory, shared),
            arrays,
            state,
            steps,
            step_tokens,
            update_rows,
            stop,
            tokens,
            lookup_corpus,
            prefix,
        )

    return shard_population(mesh, local, (replicated, tokens, lookup_corpus), (candidates, state, prefix))
