"""Moments of the parents' activations on calibration prompts, for methods that look at them.

A parent's moments are measured with its own weights and tokens, for the first tensor that asks for them, and stay in
the memory of the host. Covariances of inputs come layer by layer, so that one layer's weights are in memory; gradients
come from the whole model. Vectors that were prepared of moments are kept by the prompts and the models
(`Moments.content`), so that they are read again before any prompt is.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from importlib.metadata import version
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import Method, combine_tensor, prepare
from merge_kernels.method import LooksAt

from evojax_merge.checkpoints.bank import load_stored, read_layers
from evojax_merge.checkpoints.decoder_folder import DecoderFolder
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.models.architecture import (
    first_of_each_type,
    layer_types,
    leaves_of,
    leaves_of_layer,
    shared_leaves,
    tensor_grid,
    tensor_shape,
    tensors_of,
    types_of_layers,
)
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import LayerInputs, embed, forward, run_layer, target_logprobs
from evojax_merge.models.layers import RecordedWeights, SequenceLayout, Weights, layer_kinds, left_padded
from evojax_merge.models.sources import StackedWeights
from evojax_merge.system.file_system import code_digest

Rows = Sequence[Sequence[int]]
# The most prompts of one batch, and the step of its width, which is rounded up so that few programs are compiled.
BATCH_ROWS, WIDTH_STEP = 16, 32


@dataclass(frozen=True)
class Batch:
    """Prompts that are computed together. tokens: int32[B, T], padded on the left; counted: bool[B, T], False for
    padding and for rows that fill the batch up."""

    tokens: np.ndarray
    counted: np.ndarray
    layout: SequenceLayout


def batches_of(rows: Rows, size: int = BATCH_ROWS) -> Iterator[Batch]:
    """Prompts of like lengths in batches of `size`, all of as few widths as rounding gives."""
    ordered = sorted(rows, key=len)
    for begin in range(0, len(ordered), size):
        chosen = ordered[begin : begin + size]
        filled = [*chosen, *[chosen[-1]] * (size - len(chosen))]
        width = -(-max(map(len, chosen)) // WIDTH_STEP) * WIDTH_STEP
        tokens, layout = left_padded(filled, width)
        counted = (np.asarray(layout.segment_ids) >= 0) & (np.arange(size) < len(chosen))[:, None]
        yield Batch(tokens, counted, layout)


@partial(jax.jit, static_argnums=(0, 1))
def _run_layer(
    config: DecoderConfig, layer_type: str, number: jax.Array, weights: Weights, x: jax.Array, layout: SequenceLayout,
    counted: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """The hidden states behind a layer, and `Xᵀ X` of the inputs X of its weights, float32[in, in], by the names of all
    weights that have the same inputs, with spaces between them."""
    type_, recorded = layer_types(config)[layer_type], RecordedWeights(weights)
    kind = jax.tree.map(lambda values: values[number], layer_kinds(config))
    behind, _ = run_layer(
        config, type_, recorded, x, None, kind, LayerInputs.of_layout(config, layout, None), None
    )  # fmt: skip
    names: dict[int, list[str]] = {}
    for name, inputs in recorded.inputs.items():
        if inputs.shape[:2] == counted.shape:
            names.setdefault(id(inputs), []).append(name)
    products = {}
    for same in names.values():
        inputs = jnp.where(counted[..., None], recorded.inputs[same[0]], 0).astype(jnp.float32)
        products[" ".join(same)] = jnp.einsum("bti,btj->ij", inputs, inputs, precision=jax.lax.Precision.HIGHEST)
    return behind, products


@dataclass
class Reading:
    """Prompts on their way through the layers of a decoder: their batches, and the hidden states of each."""

    config: DecoderConfig
    batches: list[Batch]
    states: list[jax.Array]

    @classmethod
    def of(cls, config: DecoderConfig, shared: Weights, rows: Rows) -> "Reading":
        """Prompts before the first layer. shared: the weights outside of the layers."""
        batches, ends = list(batches_of(rows)), StackedWeights({}, shared)
        states = [embed(config, ends, jnp.asarray(batch.tokens), batch.layout, None) for batch in batches]
        return cls(config, batches, states)

    def layer(self, number: int, weights: Weights) -> tuple[list[jax.Array], dict[str, np.ndarray]]:
        """The states behind layer `number` with some weights, and `Xᵀ X`, float32[in, in], of the inputs X of these, by
        their names; those of weights with the same inputs are one array."""
        behind, totals = list[jax.Array](), dict[str, np.ndarray]()
        layer_type = types_of_layers(self.config)[number]
        for batch, x in zip(self.batches, self.states, strict=True):
            state, products = _run_layer(
                self.config, layer_type, jnp.int32(number), weights, x, batch.layout, jnp.asarray(batch.counted)
            )
            behind.append(state)
            for names, product in products.items():
                totals[names] = totals.get(names, 0.0) + np.asarray(product, np.float64)
        singles = {names: total.astype(np.float32) for names, total in totals.items()}
        return behind, {name: total for names, total in singles.items() for name in names.split()}


# (the weights of each model, their covariances by the weights' names) -> the weights of the merge.
MergeWeights = Callable[[Sequence[Weights], Sequence[dict[str, np.ndarray]]], Weights]


def merge_weights(
    method: Method, models: Sequence[Weights], covariances: Sequence[dict[str, np.ndarray]]
) -> Weights:  # fmt: skip
    """A merge of weights by a method's defaults, float32."""
    options, keys = replace(method.options, has_base=False), np.zeros((0, 2), np.uint32)
    numbers = {p.name: np.full(len(models), p.default) if p.per_parent else p.default for p in method.parameters}

    def merge(name: str) -> jax.Array:
        tensors, dtype = [np.asarray(weights[name]) for weights in models], np.dtype(np.float32)
        prepared = prepare(method, options, tensors, numbers, lambda k: keys, lambda k: covariances[k].get(name))
        return jnp.asarray(combine_tensor(method, options, tensors, numbers, dtype, prepared))

    return {name: merge(name) for name in models[0]}


def input_covariances(
    folders: Sequence[DecoderFolder], rows: Sequence[Rows], merge: MergeWeights | None = None
) -> list[dict[str, np.ndarray]]:
    """For each of several models the covariances of the inputs that its matrices multiply on its prompts (see
    `Reading.layer`), by the tensors' names. merge: a layer receives the states behind the merges of all models' earlier
    layers; None: those behind the model's own."""
    sources, config = [Sources((folder,)) for folder in folders], folders[0].decoder_config()
    shared: list[Weights] = [
        {leaf.name: jnp.asarray(each.load_finite(0, leaf.tensor), jnp.float32) for leaf in shared_leaves(config)}
        for each in sources
    ]
    if merge is not None:
        shared = [merge(shared, [{} for _ in folders])] * len(folders)
    readings = [Reading.of(config, *each) for each in zip(shared, rows, strict=True)]
    measured: list[dict[str, np.ndarray]] = [{} for _ in folders]
    for number in range(config.layers):
        leaves = {leaf.name: leaf for leaf in leaves_of_layer(config, number)}
        weights: list[Weights] = [
            {
                name: jnp.asarray(read_layers(source, config, leaf, [(0, number)], np.dtype(np.float32))[0])
                for name, leaf in leaves.items()
            }
            for source in sources
        ]
        results = [reading.layer(number, each) for reading, each in zip(readings, weights, strict=True)]
        merged = None if merge is None else merge(weights, [totals for _, totals in results])
        for reading, by_tensor, (behind, totals) in zip(readings, measured, results, strict=True):
            reading.states = behind if merged is None else reading.layer(number, merged)[0]
            by_tensor |= {leaves[name].tensor_of(number): total for name, total in totals.items() if name in leaves}
    return measured


@partial(jax.jit, static_argnums=0)
def _add_squares(config: DecoderConfig, total: StackedWeights, model: StackedWeights, batch: Any) -> StackedWeights:
    """A sum of squares plus those of the gradient of one prompt's log-probability, token by token."""
    tokens, layout, is_target = batch

    def log_probability(model: StackedWeights) -> jax.Array:
        hidden, _ = forward(config, model, tokens, layout)
        values, _ = target_logprobs(config, model, hidden[0, :-1], tokens[0, 1:])
        return jnp.where(is_target[0], values, 0.0).sum()

    return jax.tree.map(lambda sum_, gradient: sum_ + jnp.square(gradient), total, jax.grad(log_probability)(model))


def mean_squared_gradients(folder: DecoderFolder, config: DecoderConfig, rows: Rows) -> dict[str, np.ndarray]:
    """The mean squares over prompts of the gradients of a prompt's log-probability, float32 of each tensor's shape, by
    the tensors' names: the diagonal of the empirical Fisher information."""
    stored = load_stored(Sources((folder,)), config)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    total = jax.tree.map(jnp.zeros_like, model)
    width = max(map(len, rows))
    for row in rows:
        tokens, layout = left_padded([row], width)
        is_target = jnp.arange(1, width)[None] > width - len(row)
        total = _add_squares(config, total, model, (jnp.asarray(tokens), layout, is_target))
    return {
        name: np.asarray(total.shared[leaf.name] if leaf.stack is None else total.stacks[leaf.stack][leaf.name][place])
        / len(rows)
        for name, leaf, place in tensors_of(config)
    }


def moment_costs(config: DecoderConfig, looks_at: LooksAt, rows: Rows) -> tuple[int, float]:
    """The bytes that a parent's moments take, and the FLOP that measuring them on its prompts takes at least: those of
    products with its matrices and, for covariances, of the inputs with each other."""
    tokens = sum(map(len, rows))
    sizes = {leaf: prod((*tensor_grid(config, leaf), *tensor_shape(config, leaf))) for leaf in leaves_of(config)}
    matrices = sum(size for leaf, size in sizes.items() if leaf.stack is not None and len(leaf.shape) > 1)
    if looks_at == "gradients":
        return 4 * sum(sizes.values()), 6.0 * tokens * matrices
    batch = next(batches_of(rows[:1], 1))
    x = jax.ShapeDtypeStruct((*batch.tokens.shape, config.hidden), jnp.float32)
    nbytes, flops = 0, 2.0 * tokens * matrices * (2 if looks_at == "merged inputs" else 1)
    for name, number in first_of_each_type(config).items():
        weights = {
            leaf.name: jax.ShapeDtypeStruct((*tensor_grid(config, leaf)[1:], *tensor_shape(config, leaf)), jnp.float32)
            for leaf in leaves_of_layer(config, number)
        }
        arguments = (jnp.int32(number), weights, x, batch.layout, jnp.asarray(batch.counted))
        _, products = jax.eval_shape(partial(_run_layer, config, name), *arguments)
        entries = sum(product.size for product in products.values()) * types_of_layers(config).count(name)
        nbytes, flops = nbytes + 4 * entries, flops + 2.0 * tokens * entries
    return nbytes, flops


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments of sources that a method looks at. rows: the tokens of each source's prompts; None for one that has
    no moments, such as a base; files: those of the prompts."""

    method: Method
    folders: tuple[DecoderFolder, ...]
    rows: tuple[Rows | None, ...]
    files: tuple[Path, ...]
    _measured: dict[int, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False)

    def of(self, source: int, tensor: str) -> np.ndarray | None:
        """A source's moments of a tensor (see `merge_kernels.PrepareInputs`); None: it has none."""
        if self.rows[source] is None:
            return None
        with self._lock:
            if source not in self._measured:
                self._measure(source)
        return self._measured[source].get(tensor)

    def content(self, source: int, tensor: str) -> bytes:
        """sha256 of everything that a source's moments of a tensor follow from: prompts and models, those of all
        parents where merges of them are read through, and this program; empty: it has none."""
        if self.rows[source] is None:
            return b""
        with self._lock:
            models = self._models
        together = b"".join(models) if self.method.looks_at == "merged inputs" else b""
        program = f"{self.method.name} {tensor} {version('jax')} {code_digest(Path(__file__).parents[1])}"
        return sha256(models[source] + together + program.encode()).digest()

    @cached_property
    def _models(self) -> list[bytes]:
        """sha256 of each source's prompts, settings and tensors."""

        def content(folder: DecoderFolder, rows: Rows | None) -> bytes:
            if rows is None:
                return b""
            digest = sha256(json.dumps([rows, folder.config], sort_keys=True, default=str).encode())
            for name in sorted(folder.entries):
                digest.update(folder.digest(name))
                folder.entries[name].release()
            return digest.digest()

        with ThreadPoolExecutor() as pool:
            return list(pool.map(content, self.folders, self.rows))

    def costs(self, config: DecoderConfig) -> tuple[int, float]:
        """The bytes that all moments take, and the FLOP that measuring them takes (see `moment_costs`)."""
        costs = [moment_costs(config, self.method.looks_at, rows) for rows in self.rows if rows is not None]
        return sum(nbytes for nbytes, _ in costs), sum(flops for _, flops in costs)

    def _measure(self, source: int) -> None:
        looks_at = self.method.looks_at
        rows = {number: each for number, each in enumerate(self.rows) if each is not None}
        if looks_at != "merged inputs":
            rows = {source: rows[source]}
        folders = [self.folders[number] for number in rows]
        if looks_at == "gradients":
            measured = [mean_squared_gradients(folders[0], folders[0].decoder_config(), rows[source])]
        else:
            merge = partial(merge_weights, self.method) if looks_at == "merged inputs" else None
            measured = input_covariances(folders, list(rows.values()), merge)
        self._measured.update(zip(rows, measured, strict=True))
