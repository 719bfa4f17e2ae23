"""The compiled passes over a chunk of candidates: prefill a shared prefix, score a batch, materialise, generate.

A pass takes a static spec, arrays that all candidates share, and arrays that each has (leading axis P on every leaf).
The spec's factory makes a layer source of the first of the shared arrays and the first of those of each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from evojax_merge.evaluation.devices import AnyMesh, Devices, shard_population, size_of, vmap_sharded
from evojax_merge.evaluation.liveness import flat_program
from evojax_merge.evaluation.sharding_axes import Axis, axis_of
from evojax_merge.evaluation.targets import Platform
from evojax_merge.models import generate
from evojax_merge.models.adapted import AdaptedModel, LowRankLayout
from evojax_merge.models.architecture import LAYERS
from evojax_merge.models.bank import Bank, MergeSpec, Recipe, take_candidate
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import CacheUpdate, HeadSource, LayerStates, forward, logits, target_logprobs
from evojax_merge.models.generate import DecodeState
from evojax_merge.models.layers import SequenceLayout, Weights, prefix_layout
from evojax_merge.models.sources import LazyMerge, StackedWeights, UnstackedWeights
from evojax_merge.tasks.task import LogitsFn


@dataclass(frozen=True)
class TracedPass:
    """A pass, traced: the parts of a `jax.stages.Traced`. cut: for each of its arguments the axis that devices which
    share a model cut, None where each has the whole."""

    jaxpr: Any
    args_info: Any
    out_info: Any
    lower: Callable[..., Any]
    cut: tuple[Axis, ...]


def trace(function: Any, *arguments: Any) -> TracedPass:
    """Trace a pass over arrays, or over abstract ones, which are cut by their shardings."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "dtype")]
    cut = tuple(axis_of(each.spec) if isinstance(each, NamedSharding) else None for each in shardings)
    traced = function.trace(*arguments)
    return TracedPass(traced.jaxpr, traced.args_info, traced.out_info, traced.lower, cut)


def abstract_results(traced: TracedPass, devices: Devices, platform: Platform | None = None) -> Any:
    """The results of a pass, leading axis P on every leaf, as abstract arrays with the shardings that the pass leaves
    them in on a platform."""
    leaves, tree = jax.tree.flatten(traced.out_info)
    axes = flat_program(traced.jaxpr, traced.cut, devices.model, platform).axes
    return jax.tree.unflatten(
        tree, [devices.abstract_of_candidates(*leaf_and_axis) for leaf_and_axis in zip(leaves, axes, strict=True)]
    )


Materialised = TypeVar("Materialised", StackedWeights, UnstackedWeights)


@dataclass(frozen=True)
class LazyMergeFactory:
    """Candidates are recipes, over a shared bank. prefetch_layers: see `LazyMerge`; kind: a `DifferentiableMerge` where
    passes are differentiated with respect to the recipes."""

    spec: MergeSpec
    compute_dtype: str
    prefetch_layers: bool = False
    kind: type[LazyMerge] = LazyMerge

    def __call__(self, replicated: Bank, candidate: Recipe) -> LazyMerge:
        return self.kind.of(replicated, candidate, self.spec, self.compute_dtype, self.prefetch_layers)


@dataclass(frozen=True)
class SharedModel:
    """One model, replicated; the candidate's own argument is a placeholder. experts: see `in_place`."""

    experts: tuple[str, ...] = ()

    def __call__(self, replicated: Materialised, candidate: Any) -> Any:
        return replicated.in_place(self.experts)

    def unstack(self, mesh: AnyMesh, replicated: StackedWeights, candidates: Any) -> tuple[UnstackedWeights, Any]:
        return unstack_layers(replicated), candidates


@dataclass(frozen=True)
class PerCandidateModel:
    """Each candidate has materialised weights of its own."""

    def __call__(self, replicated: None, candidate: Materialised) -> Materialised:
        return candidate

    def unstack(self, mesh: AnyMesh, replicated: None, candidates: StackedWeights) -> tuple[None, UnstackedWeights]:
        return None, unstack_population(mesh, candidates)


@dataclass(frozen=True)
class AdaptedFactory:
    """Candidates are low-rank changes of one stored model, float32[D] each, which are differentiable."""

    layout: LowRankLayout

    def __call__(self, replicated: StackedWeights, candidate: jax.Array) -> AdaptedModel:
        pairs = self.layout.split(candidate)
        stacks = {
            stack: (weights, {name: pairs[f"{stack}/{name}"] for name in weights if f"{stack}/{name}" in pairs})
            for stack, weights in replicated.stacks.items()
        }
        return AdaptedModel(stacks, replicated.shared, self.layout, replicated.compute_dtype)


@dataclass(frozen=True)
class SharedExpertsFactory:
    """Candidates are some leaves of the layers of a model whose other weights all candidates share: a mixture's router,
    and its `SLOTS`. experts: see `in_place`."""

    experts: tuple[str, ...]

    def __call__(self, replicated: StackedWeights | UnstackedWeights, candidate: Any) -> Any:
        if isinstance(replicated, UnstackedWeights):
            layers = zip(replicated.per_layer[LAYERS], candidate, strict=True)
            return replace(replicated, per_layer={LAYERS: tuple(weights | each for weights, each in layers)})
        stacks = {LAYERS: replicated.stacks[LAYERS] | candidate}
        return replace(replicated, stacks=stacks).in_place(self.experts)

    def unstack(self, mesh: AnyMesh, replicated: StackedWeights, candidates: Weights) -> tuple[UnstackedWeights, Any]:
        return unstack_layers(replicated), unstack_leaves(mesh, replicated.compute_dtype, candidates)


@dataclass(frozen=True)
class PassSpec:
    """The static half of a pass: the decoder's config, the factory of the candidates' models, and the devices. A
    factory of models that exist in memory has `unstack`: the candidates' shared arrays, and the arrays of each, with
    every layer in arrays of its own."""

    config: DecoderConfig
    factory: Any
    mesh: AnyMesh


@dataclass(frozen=True)
class ScoreSpec(PassSpec):
    """Scoring. logits_fn: reduces a row's logits to a number; None: its targets' total log-probability."""

    logits_fn: LogitsFn | None = None


@dataclass(frozen=True)
class MaterialiseSpec:
    """Materialising, and its derivative: the factory of lazy merges, and the devices."""

    factory: Any
    mesh: AnyMesh


@dataclass(frozen=True)
class DecodeSpec(PassSpec):
    """Generation for a batch of `rows` prompts of up to `width` tokens, of which at most `new` follow (see
    models.generate). cache_dtype: of the caches; step_tokens: of a sequence in a step, with drafts; steps: of one run;
    update_rows: writes into caches; stop: the tokens that end a generation."""

    cache_dtype: str
    rows: int
    width: int
    new: int
    step_tokens: int
    steps: int
    update_rows: CacheUpdate
    stop: tuple[int, ...]


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
        scores = logits(config, source, picked)

        def one(span: jax.Array) -> jax.Array:
            index = jnp.minimum(span, targets.shape[0] - 1)
            number = logits_fn(scores[index], targets[index], span < targets.shape[0])
            return jnp.asarray(number, jnp.float32).reshape(())

        # A padded span has no logits to look at.
        totals = jnp.where(batch["rows"] < 0, 0.0, jax.lax.map(one, spread_))
        return totals, jnp.zeros(totals.shape, bool)
    logprobs, is_greedy = target_logprobs(config, source, picked, targets)
    inside = spread_ < targets.shape[0]
    index = jnp.minimum(spread_, targets.shape[0] - 1)
    totals = jnp.where(inside, logprobs[index], 0.0).sum(axis=-1)
    return totals, jnp.where(inside, is_greedy[index], True).all(axis=-1)


def _prefix_cache(spec: PassSpec, shared: Any, candidate: Any) -> LayerStates | None:
    replicated, shared_prefix, images = shared
    layout = prefix_layout(shared_prefix.shape[0])
    source = spec.factory(replicated, candidate)
    return forward(spec.config, source, shared_prefix[None], layout, return_states=True, images=images)[1]


@partial(jax.jit, static_argnums=0)
def prefill_prefix(spec: PassSpec, shared: Any, each: Any) -> LayerStates:
    """The KV cache of a shared prefix for each of P candidates. shared: the models' arrays, the prefix int32[H], one
    row, and its images or None; each: the candidates."""
    return vmap_sharded(spec.mesh, partial(_prefix_cache, spec), shared, each)


def _answers(spec: ScoreSpec, shared: Any, candidate: Any, prefix: LayerStates | None) -> tuple[jax.Array, jax.Array]:
    """One candidate's answers to a batch (see `logprobs_from_hidden`)."""
    replicated, batch = shared
    source = spec.factory(replicated, candidate)
    layout = SequenceLayout(batch["positions"], batch["segment_ids"])
    hidden, _ = forward(spec.config, source, batch["tokens"], layout, prefix=prefix, images=batch.get("images"))
    return logprobs_from_hidden(spec.config, source, hidden, batch, spec.logits_fn)


@partial(jax.jit, static_argnums=0)
def score(spec: ScoreSpec, shared: Any, each: Any) -> tuple[jax.Array, jax.Array]:
    """float32[P, R] and bool[P, R]: a chunk of candidates on one batch (see `logprobs_from_hidden`). shared: the
    models' arrays, and a batch's, its `images` among them where it has any; each: the candidates, and their prefix's
    cache or None."""
    return vmap_sharded(spec.mesh, lambda shared, each: _answers(spec, shared, *each), shared, each)


@partial(jax.jit, static_argnums=0)
def score_gradient(spec: ScoreSpec, shared: Any, each: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """The results of `score`, and for each of P candidates the derivative of `sum_r weights[r] totals[r]` with respect
    to the candidate and to its prefix, float32. each: the candidates, their prefix's cache or None, and weights,
    float32[P, R]."""

    def one(shared: Any, each: Any) -> tuple[Any, Any]:
        candidate, prefix, weights = each
        answers, gradients = answers_and_gradients(partial(_answers, spec, shared), weights, candidate, prefix)
        return answers, to_float32(gradients)

    return vmap_sharded(spec.mesh, one, shared, each)


def answers_and_gradients(function: Callable[..., Any], weights: jax.Array, first: Any, second: Any) -> tuple[Any, Any]:
    """The answers `function(first, second)` to R rows, and the derivatives of `sum_r weights[r] totals[r]` with respect
    to both arguments."""

    def goal(first: Any, second: Any) -> tuple[jax.Array, Any]:
        totals, is_greedy = function(first, second)
        return jnp.sum(weights * totals), (totals, is_greedy)

    (_, answers), gradients = jax.value_and_grad(goal, argnums=(0, 1), has_aux=True)(first, second)
    return answers, gradients


@partial(jax.jit, static_argnums=0)
def prefix_gradient(spec: PassSpec, shared: Any, each: Any) -> Any:
    """The derivative with respect to each of P candidates of a function that depends on it through its prefix's cache,
    float32. shared: as for `prefill_prefix`; each: the candidates, and the derivative with respect to the cache."""
    return gradient_through(spec.mesh, partial(_prefix_cache, spec), shared, each)


def gradient_through(mesh: AnyMesh, function: Callable[[Any, Any], Any], shared: Any, each: Any) -> Any:
    """The derivative with respect to each of P candidates' arrays, float32, of a function that depends on them through
    the results of `function(shared, arrays)`. each: the arrays, and the derivative with respect to these results."""

    def one(shared: Any, each: Any) -> Any:
        arrays, cotangents = each
        output, pull_back = jax.vjp(partial(function, shared), arrays)
        cotangents = jax.tree.map(lambda cotangent, leaf: cotangent.astype(leaf.dtype), cotangents, output)
        return to_float32(pull_back(cotangents)[0])

    return vmap_sharded(mesh, one, shared, each)


@partial(jax.jit, static_argnums=0)
def recipe_gradient(spec: MaterialiseSpec, bank: Bank, each: Any) -> Recipe:
    """The derivative with respect to each of P recipes of a function that depends on it through its materialised
    candidate, float32. each: the recipes, and the derivative with respect to the candidates' weights."""

    def local(bank: Bank, each: Any) -> Recipe:
        def one(candidate: Any) -> Recipe:
            recipe, cotangent = candidate
            model, pull_back = jax.vjp(lambda varied_recipe: spec.factory(bank, varied_recipe).materialise(), recipe)
            cotangent = jax.tree.map(lambda weight, leaf: weight.astype(leaf.dtype), cotangent, model)
            gradient: Recipe = pull_back(cotangent)[0]
            return gradient

        return jax.lax.map(one, each)

    return shard_population(spec.mesh, local, bank, each)


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


@partial(jax.jit, static_argnums=0)
def materialise(spec: MaterialiseSpec, bank: Bank, recipes: Recipe) -> StackedWeights:
    """The whole weights of each candidate."""

    def local(bank: Bank, recipes: Recipe) -> StackedWeights:
        def one(recipe: Recipe) -> StackedWeights:
            # Without the barrier the compiler takes the shared leaves' deltas, which no candidate changes, out of the
            # loop and keeps them.
            held_bank, recipe = jax.lax.optimization_barrier((bank, recipe))
            weights: StackedWeights = spec.factory(held_bank, recipe).materialise()
            return weights

        if size_of(recipes) == 1:
            return jax.tree.map(lambda leaf: leaf[None], one(take_candidate(recipes, 0)))
        return jax.lax.map(one, recipes)

    return shard_population(spec.mesh, local, bank, recipes)


@jax.jit
def unstack_layers(model: StackedWeights) -> UnstackedWeights:
    """A model with its layers in arrays of their own."""
    return model.unstack()


@partial(jax.jit, static_argnums=0)
def unstack_population(mesh: AnyMesh, candidates: StackedWeights) -> UnstackedWeights:
    """Candidates with the layers of each in arrays of their own."""
    return shard_population(mesh, lambda _, candidates: jax.vmap(StackedWeights.unstack)(candidates), None, candidates)


@partial(jax.jit, static_argnums=(0, 1))
def unstack_leaves(mesh: AnyMesh, dtype: str, candidates: Weights) -> tuple[Weights, ...]:
    """Each candidate's leaves of all layers, as leaves of each layer."""

    def local(_: None, candidates: Weights) -> tuple[Weights, ...]:
        return jax.vmap(lambda leaves: tuple(StackedWeights({LAYERS: leaves}, {}, dtype).each_layer(LAYERS)))(
            candidates
        )

    return shard_population(mesh, local, None, candidates)


@partial(jax.jit, static_argnums=0)
def init_decode(spec: DecodeSpec, shared: None, each: jax.Array) -> DecodeState:
    """The decode state (see models.generate). each: [P], one number for each candidate."""

    def local(_: Any, each: Any) -> DecodeState:
        return generate.init_decode_state(
            spec.config, spec.cache_dtype, size_of(each), spec.rows, spec.width, spec.new, spec.step_tokens
        )

    return shard_population(spec.mesh, local, shared, each)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def prefill(spec: DecodeSpec, shared: Any, each: Any, state: DecodeState) -> DecodeState:
    """Prefill prompts and generate a first token after each (see models.generate). shared: the models' arrays, the
    number of the first row, the prompts' tokens and left padding, their images or None, and their draws or None (greedy
    tokens); each: the candidates, and their prefix's cache or None."""

    def local(shared: Any, each: Any) -> DecodeState:
        (replicated, row, tokens, left_pad, images, draws), ((candidates, prefix), state) = shared, each
        make = partial(spec.factory, replicated)
        return generate.prefill(
            spec.config, make, candidates, state, spec.width, row, tokens, left_pad, spec.stop, prefix, images,
            draws,
        )  # fmt: skip

    return shard_population(spec.mesh, local, shared, (each, state))


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode(spec: DecodeSpec, shared: Any, each: Any, state: DecodeState) -> DecodeState:
    """`spec.steps` further passes (see models.generate). shared: the models' arrays, the prompts' tokens, the
    lookup corpus, the shift of their positions or None, and their draws or None; each: as for `prefill`."""

    def local(shared: Any, each: Any) -> DecodeState:
        (replicated, prompts, lookup_corpus, shift, draws), ((candidates, prefix), state) = shared, each
        make = partial(spec.factory, replicated)
        return generate.decode(
            spec.config, make, candidates, state, spec.steps, spec.step_tokens, spec.update_rows, spec.stop,
            (prompts, lookup_corpus), prefix, shift, draws,
        )  # fmt: skip

    return shard_population(spec.mesh, local, shared, (each, state))
