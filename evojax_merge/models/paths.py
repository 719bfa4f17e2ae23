"""Layer paths: a candidate that is a walk through the layers of all parents. May import models' other files.

Letters: M layers of all parents in series, T steps of a path, K parents. A path visits layers in any order, any number
of times, and scales the hidden state by a positive number before each. The decoder runs the *folded* form: behind an
RMSNorm a scale only shows in how much a layer adds, so that dividing a layer's `o` and `down` (biases too) by the
product of the scales up to it is the same model (up to the norms' epsilon), and an ordinary one.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import Columns, Weights, prefix_columns, rotary_of, run_layer
from evojax_merge.models.sources import Stored

# What a layer adds to the residual stream goes through these.
WRITERS = ("o", "down", "o_bias", "down_bias")


@dataclass(frozen=True)
class Path:
    """layers: which of the M layers, step by step; scales: positive, what the state is multiplied by before each.

    `ends`: the parent whose embedding, final norm and head the path has.
    """

    layers: tuple[int, ...]
    scales: tuple[float, ...]
    ends: int = 0

    def folds(self) -> np.ndarray:
        """What each step's `o` and `down` are multiplied by, float32[T]: one over the running product of scales."""
        return (1.0 / np.cumprod(np.asarray(self.scales, np.float64))).astype(np.float32)


@dataclass(frozen=True)
class PathSpec:
    """The static half of a path search: the parents' configs, and the dtype that a path is written in."""

    configs: tuple[DecoderConfig, ...]
    export_dtype: str
    method_name = "path"

    @property
    def origins(self) -> tuple[tuple[int, int], ...]:
        """Which parent's which layer each of the M layers is."""
        return tuple((k, i) for k, config in enumerate(self.configs) for i in range(config.layers))


@struct.dataclass
class PathBank:
    """All layers of all parents in one series: layers: leaf -> `[M, …]`; shared: leaf -> K arrays `[…]`; windows:
    int32[M]. `origins[m]`: which parent's which layer m is."""

    layers: Weights
    shared: dict[str, tuple[jax.Array, ...]]
    windows: jax.Array
    origins: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)
    export_dtype: str = struct.field(pytree_node=False)
    compute_dtype: str = struct.field(pytree_node=False, default="float32")

    def rounded(self, x: jax.Array) -> jax.Array:
        """As it would be written, in the dtype that is computed in."""
        return x.astype(jnp.dtype(self.export_dtype)).astype(jnp.dtype(self.compute_dtype))

    def folded(self, index: jax.Array, fold: jax.Array) -> Weights:
        """Layer `index` with what it adds multiplied by `fold`."""
        return {
            name: self.rounded(fold * leaf[index].astype(jnp.float32) if name in WRITERS else leaf[index])
            for name, leaf in self.layers.items()
        }


def ends_of(bank: PathBank, parent: int) -> Stored:
    """What comes before and after the layers, of one parent, rounded as it would be written: a model without layers."""
    dtype = jnp.dtype(bank.export_dtype)
    return Stored({}, {name: leaves[parent].astype(dtype) for name, leaves in bank.shared.items()}, bank.compute_dtype)


@struct.dataclass
class State:
    """Hidden states `[B, T, hidden]` of a batch's rows, and `[1, H, hidden]` of the header before them, if there is
    one."""

    rows: jax.Array
    header: jax.Array | None


@jax.jit
def begin(source: Stored, tokens: jax.Array, header: jax.Array | None) -> State:
    """Before the first layer. header: int32[1, H]."""
    return State(source.embed(tokens), None if header is None else source.embed(header))


@partial(jax.jit, static_argnums=0)
def advance(
    config: DecoderConfig,
    bank: PathBank,
    state: State,
    columns: Columns,
    layers: jax.Array,
    folds: jax.Array,
    count: jax.Array,
) -> State:
    """`count` steps further: layers `int32[S]` and folds `float32[S]`, of which the first `count` are taken.

    The number of steps is not part of the compiled shape: paths of all lengths, and any part of one, share a program,
    and a step gives the same bits in whichever part of a path it is taken.
    """
    rotary = rotary_of(config, columns)

    def step(i: jax.Array, state: State) -> State:
        weights, window = bank.folded(layers[i], folds[i]), bank.windows[layers[i]]
        header, prefix = state.header, None
        if header is not None:
            before = prefix_columns(header.shape[1])
            header, kept = run_layer(config, weights, header, rotary_of(config, before), window, before)
            prefix = (kept[0][:, 0], kept[1][:, 0])
        rows, _ = run_layer(config, weights, state.rows, rotary, window, columns, prefix)
        return State(rows, header)

    return jax.lax.fori_loop(0, count, step, state)


def fold(bank: PathBank, path: Path, config: DecoderConfig, steps: int | None = None) -> tuple[Stored, DecoderConfig]:
    """The path as a stored model in the export dtype, and its config; filled up to `steps` with layers that add
    nothing."""
    layers = list(path.layers)
    folds = np.concatenate([path.folds(), np.zeros((steps or len(layers)) - len(layers), np.float32)])
    layers += [layers[0]] * (len(folds) - len(layers))
    stacked = _fold_layers(bank, jnp.asarray(layers, jnp.int32), jnp.asarray(folds))
    windows = np.asarray(bank.windows)
    model = Stored(stacked, ends_of(bank, path.ends).shared, bank.compute_dtype)
    return model, replace(config, layers=len(layers), windows=tuple(int(windows[m]) for m in layers))


@jax.jit
def _fold_layers(bank: PathBank, layers: jax.Array, folds: jax.Array) -> Weights:
    def one(step: Any) -> Weights:
        index, fold = step
        return {
            name: (fold * leaf[index].astype(jnp.float32) if name in WRITERS else leaf[index]).astype(
                jnp.dtype(bank.export_dtype)
            )
            for name, leaf in bank.layers.items()
        }

    return jax.lax.map(one, (layers, folds))
