"""The gates of a mixture of experts made of dense models: a row of each layer's router for each expert.

A router multiplies a token's hidden state with each expert's row, and the largest products choose the experts. A row
that is the mean hidden state of an expert's prompts therefore sends similar prompts to that expert. The base's hidden
states come from the program's own decoder, a layer at a time: no more than one layer's weights are in memory.

Letters: L layers, E experts, H the hidden size, N prompts, B rows of T tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.checkpoints.config_file import trained_positions
from evojax_merge.checkpoints.folder import Tensor
from evojax_merge.errors import InputError, shown
from evojax_merge.models.architecture import stack_leaves
from evojax_merge.models.attention import prefill_attention
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.families import llama_like
from evojax_merge.models.layers import LayerKind, SequenceLayout, Weights, layer_kinds, left_padded, rms_norm

# Gates that are nearer to each other than this many degrees make a router that hardly tells their experts apart.
LEAST_ANGLE = 22.6
# The most pairs of experts that warnings name.
MAX_LINES = 5
# The most prompts of one batch, and the step of its width, which is rounded up so that few programs are compiled.
BATCH_ROWS, WIDTH_STEP = 16, 8
# A Llama's name of its embedding.
EMBEDDING = "model.embed_tokens.weight"
# Norms below this count as this much.
LEAST_NORM = 1e-8


# The texts that an expert should receive, and the texts that it should not.
Prompts = tuple[Sequence[str], Sequence[str]]


@dataclass(frozen=True)
class DenseModel:
    """A dense model that gives a mixture its MLPs or all other weights: a Llama-like decoder, with its tensors under a
    Llama's names. kind: its model_type; settings: its config.json as that of a model with a Llama's tensors, with the
    defaults of its class."""

    where: object
    config: LlamaLikeConfig
    entries: Mapping[str, Tensor]
    path: Path
    kind: str
    settings: Mapping[str, Any]


def random_gates(mode: str, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Gates float32[L, E, H] that no prompt determines: standard normal, or uniform as torch initialises a linear
    layer."""
    rng = np.random.default_rng([seed, *mode.encode()])
    if mode == "random":
        return rng.standard_normal(shape, np.float32)
    bound = shape[-1] ** -0.5
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def prompt_gates(base: DenseModel, tokenizer: Any, experts: Sequence[Prompts], mode: str, normed: bool) -> np.ndarray:
    """Gates float32[L, E, H] of length 1: the mean vector of an expert's positive prompts, less that of its negative
    prompts.

    mode: a prompt's vector in a layer is the hidden state of the last token (`hidden`, `hidden_last`), the mean over
    its tokens (`hidden_avg`), or the sum of its tokens' embeddings in every layer (`cheap_embed`). normed: take the
    hidden states behind attention and norm, which the router receives, in place of those that enter the layer. Raises
    InputError for a prompt without a token.
    """
    texts = list(dict.fromkeys(text for prompts in experts for some in prompts for text in some))
    rows = [tokenizer((tokenizer.bos_token or "") + text, add_special_tokens=False)["input_ids"] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise InputError(base.where, f"the prompt {shown(text)} has no token; expected a text")
        if len(row) > trained_positions(base.settings):
            raise InputError(
                base.where, f"the prompt {shown(text)} has {len(row):,} tokens; expected no more than the model's "
                f"context, {trained_positions(base.settings):,}",
            )  # fmt: skip
        if max(row) >= base.config.vocab:
            raise InputError(
                base.where, f"the prompt {shown(text)} has token {max(row)}, and the embedding {base.config.vocab} "
                "rows; expected the model's own tokenizer",
            )  # fmt: skip
    number = {text: i for i, text in enumerate(texts)}

    def gates_of(vectors: np.ndarray, average: bool) -> np.ndarray:
        def combined(prompts: Sequence[str]) -> np.ndarray:
            chosen = vectors[:, [number[text] for text in prompts]]
            return chosen.mean(axis=1) if average else _unit(chosen.sum(axis=1))

        gates = [
            combined(positive) - combined(negative) if negative else combined(positive)
            for positive, negative in experts
        ]
        return np.stack([_unit(gate) for gate in gates], axis=1)

    if mode == "cheap_embed":
        table = base.entries[EMBEDDING].read()
        sums = np.stack([table[row].astype(np.float32).sum(axis=0) for row in rows])
        return np.repeat(gates_of(sums[None], average=False), base.config.layers, axis=0)
    return gates_of(_hidden_vectors(base, rows, mode == "hidden_avg", normed), average=True)


def router_rows(gates: np.ndarray, experts: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Routers float32[…, L, E, H] of layers whose experts have scaled and biased gates.

    gates: float32[L, K, H] of K models; experts: int[…, L, E], the model of each expert; scale, bias: float[…, L, E].
    A row is `scale` times the difference of a gate from the layer's mean gate, plus `bias` times the mean gate's
    direction: what all rows have in common chooses no expert, and hidden states have about as much of that direction
    each, so that its share of a row is a bias, for which mixtures' files have no tensor of their own.
    """
    wide = gates.astype(np.float64)
    mean = wide.mean(axis=1, keepdims=True)
    each = (wide - mean)[np.arange(len(gates))[:, None], experts]
    return (scale[..., None] * each + bias[..., None] * _unit(mean)).astype(np.float32)


def close_gates(gates: np.ndarray, names: Sequence[str]) -> list[str]:
    """A line for each pair of experts whose gates `[L, E, H]` are nearly parallel in some layer, with their angles.
    names: the experts' models."""
    wide = _unit(gates.astype(np.float64))
    angles = np.degrees(np.arccos(np.clip(wide @ wide.swapaxes(1, 2), -1, 1)))
    lines = []
    for first, second in combinations(range(len(names)), 2):
        between = angles[:, first, second]
        close = np.flatnonzero(between < LEAST_ANGLE)
        if close.size:
            layers = f"layer{'s' * (close.size > 1)} {', '.join(map(str, close[:5]))}{', …' * (close.size > 5)}"
            lines.append(
                f"the router hardly tells expert {first} ({names[first]}) from expert {second} ({names[second]}) in "
                f"{'all layers' if close.size == len(between) else layers}: their gates are {between.min():.1f}° to "
                f"{between.max():.1f}° apart, and below {LEAST_ANGLE}° is close; give them prompts that differ more, "
                "negative_prompts, or gate_input: normed"
            )
    more = len(lines) - MAX_LINES
    return lines[:MAX_LINES] + [f"{more} more pairs of experts are as close"] * (more > 0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors `[…, H]` of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), LEAST_NORM)


def _hidden_vectors(base: DenseModel, rows: Sequence[Sequence[int]], average: bool, normed: bool) -> np.ndarray:
    """The vectors float32[L, N, H] of prompts, given as tokens."""
    config, table = base.config, base.entries[EMBEDDING].read()
    batches = list(_batches(rows))
    states = [jnp.asarray(table[tokens].astype(np.float32)) for _, tokens, _ in batches]
    vectors = np.empty((config.layers, len(rows), config.hidden), np.float32)
    for layer in range(config.layers):
        weights = {leaf.name: jnp.asarray(base.entries[leaf.tensor_of(layer)].load()) for leaf in stack_leaves(config)}
        for i, (numbers, _, layout) in enumerate(batches):
            kind = layer_kinds(config, layer)
            states[i], batch = _run_layer(config, average, normed, weights, states[i], kind, layout)
            vectors[layer, numbers] = np.asarray(batch)[: len(numbers)]
    return vectors


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], np.ndarray, SequenceLayout]]:
    """Batches of prompts of like lengths: the prompts' numbers, their tokens int32[B, T], padded on the left, and the
    layout. The last row may be repeated."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), BATCH_ROWS):
        numbers = by_length[start : start + BATCH_ROWS]
        height = 1 << (len(numbers) - 1).bit_length()
        chosen = [rows[i] for i in numbers] + [rows[numbers[-1]]] * (height - len(numbers))
        width = -(-len(chosen[-1]) // WIDTH_STEP) * WIDTH_STEP
        yield numbers, *left_padded(chosen, width)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run_layer(
    config: LlamaLikeConfig, average: bool, normed: bool, weights: Weights, x: jax.Array, kind: LayerKind,
    layout: SequenceLayout,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The hidden states float32[B, T, H] behind a layer, and the rows' vectors in it, float32[B, H]."""
    weights = {name: leaf.astype(jnp.float32) for name, leaf in weights.items()}
    rope = llama_like.position_tables(config, layout)
    behind_attention, _ = llama_like.attention(config, weights, x, rope, prefill_attention(kind.window, layout))
    mlp_input = rms_norm(behind_attention, weights["mlp_norm"], config.norm_eps)
    states = mlp_input if normed else x
    tokens = (layout.segment_ids >= 0)[..., None]
    vectors = jnp.sum(states * tokens, axis=1) / jnp.sum(tokens, axis=1) if average else states[:, -1]
    return behind_attention + llama_like.gated_mlp(config, weights, mlp_input), vectors
