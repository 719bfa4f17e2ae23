"""Measures of models before a merge: the facts of their headers, and the distances of their weights.

Weights are read tensor by tensor, in pieces of float64, so that a few tensors are in memory at a time. `w` is a model's
weights, `D(i, j) = ‖w_i − w_j‖²` the squared distance of two models over the tensors that both have.

**Unrelated models.** Matrices of two independent initialisations are nearly orthogonal: in `n` dimensions their cosine
is about `1 / √n`, and their distance is `√2` times their norm. A fine-tune keeps a cosine near 1 to its base. Two
models are called unrelated where the median cosine of their matrices is below `UNRELATED`. The median counts every
matrix once, so that a shared embedding decides nothing; norms and biases are left out, because a gain is near 1 in
every model.

**The base.** Let every model be `w_b + d_i`, with task vectors `d_i` that are nearly orthogonal to each other. Then the
base has the least sum of squared distances `S(b) = Σ_i D(i, b)`: that of a parent p exceeds it by

    S(p) − S(b) = (K − 2) ‖d_p‖² − 2 Σ_{j ≠ p} ⟨d_p, d_j⟩        for K models

The *margin* of p is this difference divided by `(K − 2) ‖d_p‖²`: 1 for orthogonal task vectors, 0 where another choice
would be as good. The model of the least sum is named the base where every margin is above `CLEAR`. Two models have no
such difference, since distances are symmetric. Distances cannot tell the common ancestor of a family from the middle of
a chain either (a fine-tune that was trained further): the task vectors are small and nearly orthogonal in both.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np

from evojax_merge.checkpoints.folder import Tensor, is_float
from evojax_merge.inspection.models import Model, place_of

# The median cosine of matrices below which two models are unrelated.
UNRELATED = 0.1
# The margin above which the base is clear.
CLEAR = 0.1
# The entries of a piece of a tensor, of each model.
PIECE = 2**16
# The largest rank that is looked for, the further columns of a sketch, and the share of the largest singular value
# below which the others are rounding.
LARGEST_RANK, OVERSAMPLING, RANK_TOLERANCE = 64, 8, 1e-3

# Receives the bytes that were read since the last call.
OnRead = Callable[[int], None]
# (what is read, its bytes) -> a block with a progress bar.
Bar = Callable[[str, int], AbstractContextManager[OnRead]]
# A layer, None outside of the layers, and a component.
Place = tuple[int | None, str]


# ---------------------------------------------------------------------------------------------------------------
# Distances


@dataclass(frozen=True)
class TensorDistances:
    """One tensor of K models. held: bool[K], true for the models that have it, in the shape that most have;
    squared_norms: float64[K]; squared_distances: float64[K, K]; equal: int64[K, K], the entries that two models have in
    common; nonfinite: int64[K], the entries that are NaN or infinite, which all other figures leave out. Models that
    lack the tensor have zeros."""

    name: str
    layer: int | None
    component: str
    size: int
    is_matrix: bool
    held: np.ndarray
    squared_norms: np.ndarray
    squared_distances: np.ndarray
    equal: np.ndarray
    nonfinite: np.ndarray


def tensor_bytes(models: Sequence[Model]) -> int:
    """The bytes of the values that `measure_distances` reads."""
    return sum(_nbytes(entry) for model in models for entry in _float_tensors(model).values())


def _nbytes(entry: Tensor) -> int:
    return int(np.prod(entry.shape, dtype=np.int64)) * entry.dtype.itemsize


def _float_tensors(model: Model) -> dict[str, Tensor]:
    return {name: entry for name, entry in model.tensors.items() if is_float(entry.dtype)}


def measure_distances(models: Sequence[Model], on_read: OnRead = lambda nbytes: None) -> list[TensorDistances]:
    """The distances of the models in every float tensor that two of them hold in one shape; of a single model, its
    norms."""
    tensors = [_float_tensors(model) for model in models]
    names = dict.fromkeys(name for entries in tensors for name in entries)
    measured = []
    for name in names:
        shapes = Counter(entries[name].shape for entries in tensors if name in entries)
        shape = shapes.most_common(1)[0][0]
        held = np.array([name in entries and entries[name].shape == shape for entries in tensors])
        architecture = models[int(held.argmax())].folder.architecture
        entries = [by_name[name] for by_name, holds in zip(tensors, held, strict=True) if holds]
        measured.append(_measure(name, place_of(architecture, name), held, entries))
        on_read(sum(_nbytes(by_name[name]) for by_name in tensors if name in by_name))
    return measured


def _measure(name: str, place: Place, held: np.ndarray, entries: Sequence[Tensor]) -> TensorDistances:
    count, members = len(held), np.flatnonzero(held)
    shape, size = entries[0].shape, int(np.prod(entries[0].shape, dtype=np.int64))
    norms, nonfinite = np.zeros(count), np.zeros(count, np.int64)
    distances, equal = np.zeros((count, count)), np.zeros((count, count), np.int64)
    for values, bad in _pieces(entries):
        nonfinite[members] += bad
        # einsum, because BLAS may sum so few numbers in several threads, which costs more than it saves.
        norms[members] += np.einsum("knm,knm->k", values, values)
        for a, i in enumerate(members):
            for b, j in enumerate(members[:a]):
                difference = values[a] - values[b]
                distances[i, j] += np.einsum("nm,nm->", difference, difference)
                equal[i, j] += difference.size - np.count_nonzero(difference)
    for entry in entries:
        entry.release()
    equal[members, members] = size
    return TensorDistances(
        name, *place, size, len(shape) >= 2, held, norms, distances + distances.T, equal + np.tril(equal, -1).T,
        nonfinite,
    )  # fmt: skip


def _pieces(entries: Sequence[Tensor]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of several tensors of one shape: `float64[K, rows, columns]`, in which entries that float32 does not hold
    in one of the tensors are 0, and the number of such entries in each tensor, `int64[K]`."""
    arrays = [entry.read() for entry in entries]
    columns = arrays[0].shape[-1] if arrays[0].ndim >= 2 else min(PIECE, arrays[0].size)
    if not arrays[0].size:
        return
    flat = [array.reshape(-1) for array in arrays]
    step = max(1, PIECE // columns) * columns
    for start in range(0, flat[0].size, step):
        # A float64 number that float32 does not hold becomes infinite.
        with np.errstate(over="ignore"):
            piece = np.stack([array[start : start + step].astype(np.float32) for array in flat])
        # The last piece of a vector is a shorter row.
        values = piece.reshape(len(piece), -1, columns if piece.shape[1] % columns == 0 else piece.shape[1])
        finite = np.isfinite(values)
        bad = np.zeros(len(values), np.int64)
        if not finite.all():
            bad += values[0].size - np.count_nonzero(finite, axis=(1, 2))
            values = np.where(finite.all(axis=0), values, np.float32(0.0))
        yield values.astype(np.float64), bad


# ---------------------------------------------------------------------------------------------------------------
# Relations


@dataclass(frozen=True)
class Pair:
    """Two models over the tensors that both have. cosine: the median over matrices; None where they share none.
    relative_distance: `‖w_i − w_j‖ / √((‖w_i‖² + ‖w_j‖²) / 2)`; equal_share: of the entries."""

    first: int
    second: int
    tensors: int
    cosine: float | None
    relative_distance: float
    equal_share: float


def compare_pairs(measured: Sequence[TensorDistances], count: int) -> list[Pair]:
    """Every pair of the models that shares a tensor."""
    pairs = []
    for i, j in combinations(range(count), 2):
        shared = [tensor for tensor in measured if tensor.held[i] and tensor.held[j] and tensor.size]
        if not shared:
            continue
        distance = sum(tensor.squared_distances[i, j] for tensor in shared)
        mean_norm = sum(tensor.squared_norms[i] + tensor.squared_norms[j] for tensor in shared) / 2
        cosines = []
        for tensor in shared:
            a, b = tensor.squared_norms[i], tensor.squared_norms[j]
            if tensor.is_matrix and a and b:
                cosines.append(float((a + b - tensor.squared_distances[i, j]) / (2 * np.sqrt(a * b))))
        cosine = float(np.median(cosines)) if cosines else None
        relative_distance = float(np.sqrt(distance / mean_norm)) if mean_norm else 0.0
        equal_share = float(sum(tensor.equal[i, j] for tensor in shared) / sum(tensor.size for tensor in shared))
        pairs.append(Pair(i, j, len(shared), cosine, relative_distance, equal_share))
    return pairs


def families(pairs: Sequence[Pair], count: int) -> list[list[int]]:
    """The models in groups of related ones, the largest group first."""
    group = list(range(count))
    for pair in pairs:
        if pair.cosine is None or pair.cosine >= UNRELATED:
            joined, left = sorted((group[pair.first], group[pair.second]))
            group = [joined if number == left else number for number in group]
    members = [[model for model in range(count) if group[model] == number] for number in dict.fromkeys(group)]
    return sorted(members, key=len, reverse=True)


@dataclass(frozen=True)
class BaseVerdict:
    """The base of a family, by its place in the family. base: None where the family is too small; margin: the least of
    the others' margins (see the module), and rival: the model that has it. given: who named the base, in words; empty:
    it is chosen by distances."""

    base: int | None
    margin: float | None = None
    rival: int | None = None
    given: str = ""

    @property
    def is_clear(self) -> bool:
        return bool(self.given) or (self.margin is not None and self.margin > CLEAR)


def find_base(squared_distances: np.ndarray) -> BaseVerdict:
    """The base of K models by their squared distances `float64[K, K]`, with the criterion of this module."""
    count = len(squared_distances)
    if count < 3:
        return BaseVerdict(None)
    sums = squared_distances.sum(axis=1)
    base = int(sums.argmin())
    # A model that equals the base is its rival, without a margin.
    margins = {
        model: float((sums[model] - sums[base]) / ((count - 2) * squared_distances[model, base]))
        if squared_distances[model, base] > 0
        else 0.0
        for model in range(count)
        if model != base
    }
    rival = min(margins, key=margins.__getitem__)
    return BaseVerdict(base, margins[rival], rival)


# ---------------------------------------------------------------------------------------------------------------
# Task vectors


@dataclass(frozen=True)
class TaskVector:
    """A parent minus the base. norm: `‖d‖`; relative_norm: `‖d‖ / ‖w_b‖`; unchanged: the share of entries that equal
    the base's; by_place: the relative norm in each layer (None: outside of the layers) and component."""

    parent: int
    norm: float
    relative_norm: float
    unchanged: float
    by_place: Mapping[Place, float]


def task_vectors(tensors: Sequence[TensorDistances], base: int, parents: Sequence[int]) -> list[TaskVector]:
    """The task vectors of the parents over tensors that the base and all of them hold."""
    size = sum(tensor.size for tensor in tensors)
    base_norm = float(np.sqrt(sum(tensor.squared_norms[base] for tensor in tensors)))
    vectors = []
    for parent in parents:
        squared, of_base = Counter[Place](), Counter[Place]()
        for tensor in tensors:
            squared[tensor.layer, tensor.component] += tensor.squared_distances[parent, base]
            of_base[tensor.layer, tensor.component] += tensor.squared_norms[base]
        norm = float(np.sqrt(squared.total()))
        places = {place: float(np.sqrt(squared[place] / (of_base[place] or np.inf))) for place in squared}
        vectors.append(
            TaskVector(
                parent, norm, norm / base_norm if base_norm else 0.0,
                float(sum(tensor.equal[parent, base] for tensor in tensors) / size), places,
            )
        )  # fmt: skip
    return vectors


@dataclass(frozen=True)
class Changes:
    """The changes of P parents, entry by entry: the entries in which two or more parents differ from the base
    (`contested`), and those of them in which two parents' task vectors have opposite signs (`conflicts`), of `size`
    entries. ranks: the largest rank of each parent's changes of matrices, where every one is low; None for any other
    parent, and for one that changes no matrix."""

    size: int
    contested: int
    conflicts: int
    ranks: tuple[int | None, ...]

    @property
    def share(self) -> float:
        return self.conflicts / self.contested if self.contested else 0.0

    @property
    def by_chance(self) -> float:
        """The share that independent signs would have, were every contested entry changed by all parents."""
        return 1 - 2.0 ** (1 - len(self.ranks))


def measure_changes(
    models: Sequence[Model], tensors: Sequence[TensorDistances], base: int, parents: Sequence[int],
    on_read: OnRead = lambda nbytes: None,
) -> Changes:  # fmt: skip
    """The sign conflicts of the parents' task vectors, and their ranks. Reads the tensors a second time."""
    size = contested = conflicts = 0
    # -1: not low. A parent is sketched up to its first matrix of another rank, which is a small one.
    ranks = [0] * len(parents)
    for tensor in sorted(tensors, key=lambda tensor: tensor.size):
        entries = [models[member].tensors[tensor.name] for member in (base, *parents)]
        shape = entries[0].shape
        limit = min(LARGEST_RANK, min(shape) // 4) if len(shape) == 2 else 0
        changed = [tensor.is_matrix and tensor.squared_distances[parent, base] > 0 for parent in parents]
        sketched = [number for number, rank in enumerate(ranks) if rank >= 0 and changed[number]]
        directions = _directions(shape[-1] if shape else 1, limit + OVERSAMPLING) if sketched else None
        grams = {number: np.zeros((limit + OVERSAMPLING,) * 2) for number in sketched if limit}
        for values, _ in _pieces(entries):
            above, below = values[1:] > values[0], values[1:] < values[0]
            size += values[0].size
            once = twice = np.zeros(values[0].shape, bool)
            for differs in above | below:
                twice, once = twice | (once & differs), once | differs
            contested += int(np.count_nonzero(twice))
            conflicts += int(np.count_nonzero(above.any(axis=0) & below.any(axis=0)))
            for number, gram in grams.items():
                sketch = ((values[number + 1] - values[0]).astype(np.float32) @ directions).astype(np.float64)
                gram += sketch.T @ sketch
        for number in sketched:
            # The numerical rank of a difference, by the Gram matrix of its sketch (Halko, Martinsson, Tropp 2011,
            # arXiv:0909.4061). Weights that were rounded to 16 bits after a low-rank change differ in the rounding,
            # too, and have no low rank.
            squared = np.linalg.eigvalsh(grams[number]) if number in grams else np.zeros(0)
            rank = int((squared > RANK_TOLERANCE**2 * squared[-1]).sum()) if squared.size else limit + 1
            ranks[number] = max(ranks[number], rank) if rank <= limit else -1
        for entry in entries:
            entry.release()
        on_read(sum(map(_nbytes, entries)))
    return Changes(size, contested, conflicts, tuple(rank if rank > 0 else None for rank in ranks))


@cache
def _directions(columns: int, count: int) -> np.ndarray:
    """`float32[columns, count]`: fixed random directions, in which a matrix of a smaller rank keeps its rank."""
    return np.random.default_rng(0).standard_normal((columns, count), np.float32)


# ---------------------------------------------------------------------------------------------------------------
# All of it


@dataclass(frozen=True)
class Comparison:
    """The weights of K models, compared. families: the models in groups of related ones, the largest first, or that of
    a given base. reference: the model that the others of this family are compared with: the base, or the first of two
    models; None where the family has one model. vectors, changes: of the others, over the tensors that all of the
    family hold; cosines: `float64[P, P]`, of their task vectors, NaN for a model that equals the reference."""

    measured: Sequence[TensorDistances]
    pairs: Sequence[Pair]
    families: Sequence[Sequence[int]]
    verdict: BaseVerdict
    reference: int | None
    vectors: Sequence[TaskVector]
    cosines: np.ndarray
    changes: Changes | None


def compare_weights(models: Sequence[Model], base: int | None, bar: Bar, given: str = "as given") -> Comparison:
    """Read the weights of all models and compare them. base: the model that the user, or an adapter, calls the base;
    given: which of them does, in words."""
    with bar("distances", tensor_bytes(models)) as on_read:
        measured = measure_distances(models, on_read)
    pairs = compare_pairs(measured, len(models))
    groups = families(pairs, len(models))
    groups.sort(key=lambda group: base not in group)
    family = groups[0]
    # Those that all of the family hold in one shape.
    tensors = [tensor for tensor in measured if tensor.size and tensor.held[list(family)].all()]
    chosen = np.ix_(family, family)
    distances = sum((tensor.squared_distances[chosen] for tensor in tensors), np.zeros((len(family),) * 2))
    verdict = find_base(distances) if base is None else BaseVerdict(family.index(base), given=given)
    if len(family) < 2 or not tensors:
        return Comparison(measured, pairs, groups, verdict, None, (), np.zeros((0, 0)), None)
    place = 0 if verdict.base is None else verdict.base
    reference, parents = family[place], [model for model in family if model != family[place]]
    nbytes = sum(_nbytes(models[member].tensors[tensor.name]) for tensor in tensors for member in family)
    with bar("changes", nbytes) as on_read:
        changes = measure_changes(models, tensors, reference, parents, on_read)
    # Weights that are rounded to 16 bits behind a low-rank change differ from the base in a full rank.
    adapters = [models[parent].adapter for parent in parents]
    ranks = [
        max(adapter.ranks) if adapter and adapter.is_low_rank and adapter.base == models[reference].path else measured
        for adapter, measured in zip(adapters, changes.ranks, strict=True)
    ]  # fmt: skip
    changes = replace(changes, ranks=tuple(ranks))
    # ⟨d_i, d_j⟩ = (D(i, b) + D(j, b) − D(i, j)) / 2
    others = np.delete(np.arange(len(family)), place)
    to_base, distances = distances[place, others], distances[np.ix_(others, others)]
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (to_base[:, None] + to_base - distances) / 2 / np.sqrt(to_base[:, None] * to_base)
    vectors = task_vectors(tensors, reference, parents)
    return Comparison(measured, pairs, groups, verdict, reference, vectors, cosines, changes)
