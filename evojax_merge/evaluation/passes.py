"""The compiled passes over a chunk of candidates: read a header, score a batch, materialise, write.

May import models and evaluation.devices. A pass takes what all candidates share and what each has (leading axis P on
every leaf); a static `build` makes a layer source of the two.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from evojax_merge.evaluation.devices import over_population, size_of, spread
from evojax_merge.models.bank import Bank, MergeSpec, Recipe
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import Cache, Columns, HeadSource, forward, logits, prefix_columns, score_targets
from evojax_merge.models.generate import Writing, blank, continue_, start
from evojax_merge.models.sources import Apart, Merged, Stored, merge_of
from evojax_merge.tasks.task import Reduce

Whole = TypeVar("Whole", Stored, Apart)


class Build(Protocol):
    """How a candidate's layer source is made. Hashable: part of what is compiled."""

    def __call__(self, shared: Any, member: Any) -> Any: ...


@dataclass(frozen=True)
class MergeOf:
    """Candidates are recipes, over a shared bank."""

    spec: MergeSpec
    compute_dtype: str

    def __call__(self, shared: Bank, member: Recipe) -> Merged:
        return merge_of(shared, member, self.spec, self.compute_dtype)


@dataclass(frozen=True)
class Alone:
    """One stored model, which is what is shared; its member says nothing."""

    def __call__(self, shared: Whole, member: Any) -> Whole:
        return shared


@dataclass(frozen=True)
class Each:
    """Candidates are stored models of their own."""

    def __call__(self, shared: None, member: Whole) -> Whole:
        return member


def score_states(
    config: DecoderConfig, source: HeadSource, hidden: jax.Array, batch: Any, reduce: Reduce | None
) -> tuple[jax.Array, jax.Array]:
    """For each slot of a batch its targets' total log-probability float32[R] and whether they are the likeliest tokens
    bool[R]; or what `reduce` makes of its logits. hidden: `[B, T, hidden]`, the final states; batch: a ScoringBatch's
    arrays, as a dict."""
    # Only positions that predict a target meet the head.
    picked = hidden.reshape(-1, hidden.shape[-1])[batch["at"]]
    targets, spread_ = batch["targets"], batch["spread"]
    if reduce is not None:
        return _reduced(config, source, picked, batch, reduce)
    found, likeliest = score_targets(config, source, picked, targets)
    inside = spread_ < targets.shape[0]
    index = jnp.minimum(spread_, targets.shape[0] - 1)
    totals = jnp.where(inside, found[index], 0.0).sum(axis=-1)
    return totals, jnp.where(inside, likeliest[index], True).all(axis=-1)


def _reduced(
    config: DecoderConfig, source: HeadSource, picked: jax.Array, batch: Any, reduce: Reduce
) -> tuple[jax.Array, jax.Array]:
    scores, targets = logits(config, source, picked), batch["targets"]

    def one(own: jax.Array) -> jax.Array:
        index = jnp.minimum(own, targets.shape[0] - 1)
        return jnp.asarray(reduce(scores[index], targets[index], own < targets.shape[0]), jnp.float32).reshape(())

    # A slot that holds no row has no logits to look at.
    totals = jnp.where(batch["rows"] < 0, 0.0, jax.lax.map(one, batch["spread"]))
    return totals, jnp.zeros(totals.shape, bool)


@partial(jax.jit, static_argnums=(0, 1, 2))
def read_header(
    config: DecoderConfig, build: Build, mesh: Mesh | None, shared: Any, members: Any, header: jax.Array
) -> Cache:
    """Keys and values of a header int32[H], of one row, for each of P candidates."""

    def one(shared: Any, member: Any) -> Cache:
        known, header = shared
        tokens = header[None]
        _, cache = forward(config, build(known, member), tokens, prefix_columns(header.shape[0]), keep_cache=True)
        assert cache is not None
        return cache

    return over_population(mesh, one, (shared, header), members)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def score(
    config: DecoderConfig,
    build: Build,
    mesh: Mesh | None,
    reduce: Reduce | None,
    shared: Any,
    members: Any,
    prefix: Cache | None,
    batch: Any,
) -> tuple[jax.Array, jax.Array]:
    """float32[P, R] and bool[P, R]: a chunk of candidates on one batch (see score_states)."""

    def one(shared: Any, member: Any) -> tuple[jax.Array, jax.Array]:
        (known, batch), (own, prefix) = shared, member
        source = build(known, own)
        columns = Columns(batch["positions"], batch["branches"])
        hidden, _ = forward(config, source, batch["tokens"], columns, prefix=prefix)
        return score_states(config, source, hidden, batch, reduce)

    return over_population(mesh, one, (shared, batch), (members, prefix))


@partial(jax.jit, static_argnums=(0, 1))
def materialise(build: MergeOf, mesh: Mesh | None, bank: Bank, recipes: Recipe) -> Stored:
    """Each candidate as a whole."""

    def local(bank: Bank, recipes: Recipe) -> Stored:
        def one(recipe: Recipe) -> Stored:
            # Else the compiler takes the shared leaves' deltas, which no candidate changes, out of the loop and keeps
            # them.
            own, recipe = jax.lax.optimization_barrier((bank, recipe))
            return build(own, recipe).materialise()

        return jax.lax.map(one, recipes)

    return spread(mesh, local, bank, recipes)


@jax.jit
def lay_apart(model: Stored) -> Apart:
    """A model with its layers in arrays of their own."""
    return model.apart()


@partial(jax.jit, static_argnums=0)
def lay_each_apart(mesh: Mesh | None, members: Stored) -> Apart:
    """Candidates with the layers of each in arrays of their own."""
    return spread(mesh, lambda _, members: jax.vmap(Stored.apart)(members), None, members)


@partial(jax.jit, static_argnums=(0, 1, 2, 4, 5, 6, 7))
def open_writing(
    config: DecoderConfig, dtype: str, mesh: Mesh | None, members: Any, rows: int, width: int, new: int, window: int
) -> Writing:
    """Room for as many candidates as `members: [P]` has (see models.generate)."""

    def local(_: Any, members: Any) -> Writing:
        return blank(config, dtype, size_of(members), rows, width, new, window)

    return spread(mesh, local, None, members)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=(8,))
def begin_writing(
    config: DecoderConfig,
    build: Build,
    mesh: Mesh | None,
    width: int,
    stop: tuple[int, ...],
    shared: Any,
    members: Any,
    prefix: Cache | None,
    writing: Writing,
    row: jax.Array,
    tokens: jax.Array,
    first: jax.Array,
) -> Writing:
    """Read prompts and write a first token after each (see models.generate)."""

    def local(shared: Any, members: Any) -> Writing:
        (known, row, tokens, first), (own, writing, prefix) = shared, members
        return start(config, partial(build, known), own, writing, width, row, tokens, first, stop, prefix)

    return spread(mesh, local, (shared, row, tokens, first), (members, writing, prefix))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5), donate_argnums=(8,))
def keep_writing(
    config: DecoderConfig,
    build: Build,
    mesh: Mesh | None,
    count: int,
    window: int,
    stop: tuple[int, ...],
    shared: Any,
    members: Any,
    writing: Writing,
    prefix: Cache | None,
    tokens: jax.Array,
    seen: jax.Array,
) -> Writing:
    """`count` further passes (see models.generate)."""

    def local(shared: Any, members: Any) -> Writing:
        (known, tokens, seen), (own, writing, prefix) = shared, members
        return continue_(config, partial(build, known), own, writing, count, window, stop, tokens, seen, prefix)

    return spread(mesh, local, (shared, tokens, seen), (members, writing, prefix))
