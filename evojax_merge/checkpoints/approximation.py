"""Rows of tokens that a model lacks, approximated from its own rows, as mergekit-tokensurgeon does.

A *donor* has the tokens. Letters: S tokens that both have, N tokens that the model lacks, D and H the widths of the
donor's and the model's rows. `points` `[S, D]` and `targets` `[N, D]` are the donor's rows of these tokens, `anchors`
`[S, H]` the model's rows of the shared ones. Which tokens are equal: see `token_keys`.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.checkpoints.folder import Tensor
from evojax_merge.schema.approximation import Approximation

# Tokens that are approximated at a time, and the approximations that combine shared tokens.
BATCH, COMBINED = 256, ("omp", "common_interpolation")
ONE_AT_A_TIME = Lock()
# Rows this near, as a share of a vector's length, are linearly dependent in float32.
DEPENDENT = 1e-5
# A token's key: (`text`, its bytes), (`special`, its name) or (`role`, its role).
Key = tuple[str, bytes | str]
MARK = "▁"


# ---------------------------------------------------------------------------------------------------------------
# Tokens


def token_keys(tokenizer: Any) -> dict[int, tuple[Key, ...]]:
    """The keys of each row's token: tokens of two tokenizers that share a key are equal, by the first such key.

    A token is the bytes that it stands for, whether a tokenizer writes them as text with ▁, as GPT-2's letters for
    bytes, or as <0x0A>. A special token is its name, else its role (the end of a text, and so forth).
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    roles: dict[str, list[Key]] = {}
    for role, name in tokenizer.special_tokens_map.items():
        for text in [name] if isinstance(name, str) else []:
            roles.setdefault(text, []).append(("role", role))
    added = {row: token.content for row, token in tokenizer.added_tokens_decoder.items()}
    # GPT-2's letter for each byte.
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()} if _is_byte_level(tokenizer) else None
    keys: dict[int, tuple[Key, ...]] = {}
    for token, row in tokenizer.get_vocab().items():
        if token in roles or token in tokenizer.all_special_tokens:
            keys[row] = (("special", token), *roles.get(token, ()))
        elif row in added:
            keys[row] = (("text", token.encode()),)
        else:
            keys[row] = (("text", token_bytes(token, letters)),)
    return keys


def token_bytes(token: str, letters: Mapping[str, int] | None) -> bytes:
    """The bytes that a token stands for; letters: those of a byte-level tokenizer."""
    if letters is not None and all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(MARK, " ").encode()


def _is_byte_level(tokenizer: Any) -> bool:
    if not tokenizer.is_fast:
        return False
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    return "ByteLevel" in [part.get("type") for part in (decoder, *(decoder.get("decoders") or []))]


def pieces_of(tokenizer: Any, keys: Sequence[Key]) -> list[list[int]]:
    """The rows of the tokens into which a model's tokenizer splits the texts of other tokens."""
    texts = [key.decode(errors="replace") if isinstance(key, bytes) else key for _, key in keys]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts]


# ---------------------------------------------------------------------------------------------------------------
# Rows


def sparse_combination(how: Approximation, targets: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers int32[N, k] of shared tokens, and coefficients float32[N, k]: each target as a combination of points,
    by orthogonal matching pursuit or by interpolation between the nearest."""
    count, total = min(how.k, len(points)), len(targets)
    if how.approximate == "omp":
        solve = partial(_matching_pursuit, count)
    else:
        solve = partial(_interpolation, count, how.weight_scheme, how.cosine_similarity)
    on_device = jnp.asarray(points, jnp.float32)
    numbers, coefficients = np.empty((total, count), np.int32), np.empty((total, count), np.float32)
    for start in range(0, total, BATCH):
        batch = np.asarray(targets[start : start + BATCH], np.float32)
        size = len(batch)
        # The last batch is filled up, so that one program serves all.
        full = np.concatenate([batch, np.zeros((min(BATCH, total) - size, batch.shape[1]), np.float32)])
        # One batch has work for the whole device, whichever thread is its.
        with ONE_AT_A_TIME:
            chosen, weights = map(np.asarray, solve(jnp.asarray(full), on_device))
        numbers[start : start + size], coefficients[start : start + size] = chosen[:size], weights[:size]
    return numbers, coefficients


def combine_rows(numbers: np.ndarray, coefficients: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """float32[N, H]: the combinations of a model's rows `[V, H]` with the numbers int32[N, k]."""
    rows = np.empty((len(numbers), stored.shape[1]), np.float32)
    for start in range(0, len(numbers), BATCH):
        part = slice(start, start + BATCH)
        rows[part] = np.einsum("nk,nkh->nh", coefficients[part], np.asarray(stored[numbers[part]], np.float32))
    return rows


@partial(jax.jit, static_argnums=0)
def _matching_pursuit(count: int, targets: jax.Array, points: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Orthogonal matching pursuit (Pati et al. 1993): take the point with the largest product with what is left of a
    target, orthogonalise, and go on. A target that its points span gets no more of them."""
    size, width = targets.shape
    lengths = jnp.linalg.norm(targets, axis=1)
    each = jnp.arange(size)

    def step(t: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        basis, triangle, left, numbers, taken = state
        products = jnp.abs(jnp.matmul(left, points.T, precision="highest"))
        number = jnp.argmax(jnp.where(taken, -1.0, products), axis=1)
        point = points[number]
        # Twice, for one projection leaves errors of float32 in the basis.
        first = jnp.einsum("bkd,bd->bk", basis, point, precision="highest")
        rest = point - jnp.einsum("bk,bkd->bd", first, basis, precision="highest")
        second = jnp.einsum("bkd,bd->bk", basis, rest, precision="highest")
        rest = rest - jnp.einsum("bk,bkd->bd", second, basis, precision="highest")
        norm = jnp.linalg.norm(rest, axis=1)
        is_new = norm > DEPENDENT * jnp.linalg.norm(point, axis=1)
        is_new &= jnp.linalg.norm(left, axis=1) > DEPENDENT * lengths
        direction = jnp.where(is_new[:, None], rest / jnp.where(is_new, norm, 1)[:, None], 0)
        column = (first + second).at[:, t].set(jnp.where(is_new, norm, 1))
        left = left - direction * jnp.sum(direction * left, axis=1, keepdims=True)
        return (
            basis.at[:, t].set(direction), triangle.at[:, :, t].set(column), left, numbers.at[:, t].set(number),
            taken.at[each, number].set(True),
        )  # fmt: skip

    start = (
        jnp.zeros((size, count, width)), jnp.zeros((size, count, count)), targets,
        jnp.zeros((size, count), jnp.int32), jnp.zeros((size, len(points)), bool),
    )  # fmt: skip
    basis, triangle, _, numbers, _ = jax.lax.fori_loop(0, count, step, start)
    products = jnp.einsum("bkd,bd->bk", basis, targets, precision="highest")

    def solve(i: jax.Array, coefficients: jax.Array) -> jax.Array:
        row = count - 1 - i
        rest = products[:, row] - jnp.sum(triangle[:, row] * coefficients, axis=1)
        return coefficients.at[:, row].set(rest / triangle[:, row, row])

    return numbers, jax.lax.fori_loop(0, count, solve, jnp.zeros((size, count)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _interpolation(
    count: int, scheme: str, cosine: bool, targets: jax.Array, points: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The nearest points of each target, and their weights."""
    products = jnp.matmul(targets, points.T, precision="highest")
    squares, lengths = jnp.sum(targets**2, axis=1, keepdims=True), jnp.linalg.norm(points, axis=1)
    if cosine:
        distances = 1 - products / jnp.maximum(jnp.sqrt(squares) * lengths, 1e-6)
    else:
        distances = squares + lengths**2 - 2 * products
    _, numbers = jax.lax.top_k(-distances, count)
    near = points[numbers]
    if scheme == "distance_proportional":
        chosen = jnp.take_along_axis(distances, numbers, axis=1)
        # From the differences: those of squares are lost in rounding where points are near.
        direct = jnp.linalg.norm(near - targets[:, None], axis=-1)
        weights = 1 - chosen if cosine else 1 / jnp.maximum(direct, 1e-6)
        return numbers, weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-6)
    if scheme == "least_squares":
        return numbers, jnp.einsum("bkd,bd->bk", jnp.linalg.pinv(near.swapaxes(1, 2)), targets)
    # Least squares with weights that add up to 1, by a Lagrange multiplier.
    gram = jnp.pad(jnp.einsum("bkd,bjd->bkj", near, near), ((0, 0), (0, 1), (0, 1)), constant_values=1)
    gram = gram.at[:, -1, -1].set(0)
    right = jnp.pad(jnp.einsum("bkd,bd->bk", near, targets), ((0, 0), (0, 1)), constant_values=1)
    return numbers, jnp.einsum("bij,bj->bi", jnp.linalg.pinv(gram, hermitian=True), right)[:, :-1]


def rotated_rows(targets: np.ndarray, points: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """float32[N, H]: the targets in the principal components of the points, rotated onto those of the anchors by the
    orthogonal matrix that brings the shared tokens nearest to each other (Schönemann 1966), with the means
    exchanged."""
    points, anchors = (np.asarray(values, np.float64) for values in (points, anchors))
    means = points.mean(axis=0), anchors.mean(axis=0)
    points, anchors = points - means[0], anchors - means[1]
    width = min(points.shape[1], anchors.shape[1])
    bases = [np.linalg.eigh(values.T @ values)[1][:, : -width - 1 : -1] for values in (points, anchors)]
    left, _, right = np.linalg.svd(bases[0].T @ (points.T @ anchors) @ bases[1])
    turn = bases[0] @ (left @ right) @ bases[1].T
    return ((np.asarray(targets, np.float64) - means[0]) @ turn + means[1]).astype(np.float32)


def joined_pieces(how: Approximation, rows: np.ndarray, pieces: Sequence[Sequence[int]], is_head: bool) -> np.ndarray:
    """float32[N, H]: each token from the rows of its pieces; the mean of all rows where it has none. A token's last
    piece says most of what comes next, so that an embedding weighs it most; a head has to choose its first."""
    result = np.empty((len(pieces), rows.shape[1]), np.float32)
    mean = np.asarray(rows, np.float32).mean(axis=0)
    for i, numbers in enumerate(pieces):
        if not numbers:
            result[i] = mean
            continue
        piece_rows = np.asarray(rows[list(numbers)], np.float32)
        weights = np.ones(len(piece_rows), np.float32)
        if how.subword_method == "weighted_mean":
            weights = np.arange(1, len(piece_rows) + 1, dtype=np.float32)
        elif how.subword_method == "first_last":
            weights = np.eye(len(piece_rows), dtype=np.float32)[-1]
        weights = weights[::-1] if is_head else weights
        result[i] = weights @ piece_rows / (1 if how.subword_method == "sum" else weights.sum())
    return result


def _picked(donor: Tensor, missing: np.ndarray, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The donor's rows with these numbers, int[n] each; its other rows do not stay in memory."""
    values = donor.load()
    return values[missing], values[shared]


@dataclass(frozen=True)
class Transplant:
    """How the rows of tokens that models lack are approximated. donor: the folder of the model that has all tokens, in
    the order of its rows; pieces: by model, the pieces of each token that it lacks, for `subword`; combinations: those
    that were computed, by model and tensor."""

    how: Approximation
    donor: Path
    pieces: Mapping[int, list[list[int]]]
    combinations: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def rows(
        self, model: int, numbers: np.ndarray, tensor: str, stored: np.ndarray, donor: Tensor, is_head: bool
    ) -> np.ndarray:
        """float32[V, …]: model `model`'s tensor `stored` with its rows in the donor's order. numbers: its rows by
        token, -1 where it lacks the token; donor: the donor's tensor, whose rows may be of another width."""
        # Where even the donor has no row for a token there is nothing to go by.
        lacking, has_row = numbers < 0, np.arange(len(numbers)) < donor.shape[0]
        missing, shared = np.flatnonzero(lacking & has_row), np.flatnonzero(~lacking & has_row)
        how, key, is_made = self.how, (model, tensor), stored.ndim > 1 and missing.size > 0
        if is_made and how.approximate in COMBINED and key not in self.combinations:
            # Before the result is in memory.
            self.combinations[key] = sparse_combination(how, *_picked(donor, missing, shared))
        result = np.asarray(stored[np.maximum(numbers, 0)], np.float32)
        mean = np.asarray(stored, np.float32).mean(axis=0)
        result[lacking] = 0 if how.approximate == "zero" or stored.ndim == 1 else mean
        if not is_made or how.approximate in ("mean", "zero"):
            return result
        if how.approximate == "landmark_pca":
            result[missing] = rotated_rows(*_picked(donor, missing, shared), stored[numbers[shared]])
        elif how.approximate == "subword":
            split = dict(zip(np.flatnonzero(lacking), self.pieces[model], strict=True))
            result[missing] = joined_pieces(how, stored, [split[number] for number in missing], is_head)
        elif how.approximate == "randn":
            scale = np.asarray(stored, np.float32).std(axis=0)
            drawn = np.random.default_rng(zlib.crc32(tensor.encode())).standard_normal(result[missing].shape)
            result[missing] = mean + scale * drawn
        else:
            chosen, coefficients = self.combinations[key]
            result[missing] = combine_rows(numbers[shared][chosen], coefficients, stored)
        return result
