"""Merge methods in float64 NumPy, written from the formulas of their papers.

Tensors may have any shape; parents have the base's. Where entries tie at a threshold, all of them are kept.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from merge_kernels import Options

from reference.spectral import SPECTRAL, spectral

# Uniform 16-bit numbers uint16[...] of a parent, in the shape of the tensor: where one is small, an entry is kept.
Uniform = Callable[[int], np.ndarray]

# Methods by family, listed here and not read from the registry under test.
MAGNITUDE, BAND = ("ties",), ("breadcrumbs", "breadcrumbs_ties")
DARE, DELLA = ("dare_linear", "dare_ties"), ("della", "della_linear")
SPARSE = (*MAGNITUDE, *BAND, *DARE, *DELLA)
TASK_VECTORS = ("task_arithmetic", *SPARSE)
ELECTED = ("ties", "dare_ties", "della", "breadcrumbs_ties")
RAM = ("ram", "ramplus_tl")
# Names of sd-mecha.
DIFFUSION = (
    "weighted_sum", "add_difference", "train_difference_mask", "add_cosine_a", "add_cosine_b", "tensor_sum",
    "top_k_tensor_sum", "geometric_median",
)  # fmt: skip
# Without moments RegMean is the average, and Fisher merging that of the weights.
ACTIVATIONS = ("regmean", "regmean_plusplus", "fisher")
LEVELS = 2**16


def merge(
    name: str,
    options: Options,
    models: Sequence[np.ndarray],
    parameters: Mapping[str, Any],
    uniform: Uniform | None = None,
) -> np.ndarray:
    """Merge one tensor of `models`, the base first, by the method `name`: float64[...].

    A multislerp without an answer gives NaN. `uniform`: the numbers of random methods.
    """
    base, *parents = [np.asarray(x, np.float64) for x in models]
    weight = np.asarray(parameters.get("weight", ()), np.float64)
    if name in TASK_VECTORS:
        return task_vectors(name, options, base, parents, parameters, uniform)
    if name == "linear":
        total = sum(w * x for w, x in zip(weight, parents, strict=True))
        return np.asarray(total / weight.sum() if options.normalize else total)
    if name == "slerp":
        return slerp(parents[0], parents[1], float(parameters["t"]))
    if name == "karcher":
        return karcher(parents, int(parameters["max_iter"]), float(parameters["tol"]))
    if name == "model_stock":
        return model_stock(base, parents, by_row=options.axis is not None)
    if name == "sce":
        return sce(base, parents, float(parameters["select_topk"]))
    if name == "nearswap":
        share = np.clip(parameters["t"] / np.maximum(np.abs(base - parents[0]), 1e-6), 0, 1)
        return np.asarray(base + share * (parents[0] - base))
    if name == "arcee_fusion":
        return arcee_fusion(base, parents[0])
    if name in RAM:
        return ram(base, parents, *(float(parameters.get(key, 0)) for key in ("epsilon", "r", "alpha")))
    if name == "passthrough":
        return np.asarray(parameters["scale"][0] * parents[0])
    if name in SPECTRAL:
        return spectral(name, models, parameters)
    if name in DIFFUSION:
        return diffusion(name, base, parents, parameters)
    # Those that take deltas where there is a base.
    origin = base if options.has_base else np.zeros_like(base)
    vectors = [x - origin for x in parents]
    if name in ACTIVATIONS:
        total = sum(w * x for w, x in zip(weight, vectors, strict=True))
        return np.asarray(origin + total / (len(parents) if name != "fisher" else weight.sum()))
    if name == "nuslerp":
        t = 0.5 if abs(weight.sum()) < 1e-6 else weight[1] / weight.sum()
        return origin + slerp(vectors[0], vectors[1], t, options.axis, 1 - 1e-9, 0.0)
    assert name == "multislerp"
    return origin + multislerp(vectors, weight, options.normalize, float(parameters["eps"]))


# ---------------------------------------------------------------------------------------------------------------
# Interpolation on the sphere


def slerp(
    first: np.ndarray,
    second: np.ndarray,
    t: float,
    axis: int | None = None,
    straight_above: float = 0.9995,
    shortest: float = 1e-8,
) -> np.ndarray:
    """Interpolate spherically (Shoemake 1985) between raw vectors: whole tensors, or along an axis.

    `sin((1 - t) a) / sin(a) first + sin(t a) / sin(a) second` with the angle `a`. A length of at most `shortest` counts
    as 1; vectors whose |cosine| is above `straight_above` are interpolated linearly.
    """
    if first.ndim < 2:
        axis = None
    length = [np.sqrt(np.square(x).sum(axis=axis, keepdims=True)) for x in (first, second)]
    length = [np.where(x > shortest, x, 1.0) for x in length]
    cosine = np.clip((first * second).sum(axis=axis, keepdims=True) / (length[0] * length[1]), -1, 1)
    straight = np.abs(cosine) > straight_above
    angle = np.arccos(np.where(straight, 0.0, cosine))
    curved = (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)
    return np.where(straight, (1 - t) * first + t * second, curved)


def multislerp(vectors: Sequence[np.ndarray], weight: np.ndarray, normalize: bool, eps: float) -> np.ndarray:
    """Barycentric interpolation on the sphere, as in mergekit: a step through the tangent space at the mean direction.

    The tangents cancel, so that the step changes nothing but for a factor of cos(eps). Lengths are averaged by weight.
    """
    if len(vectors) == 1:
        return vectors[0]
    weight = weight / weight.sum() if normalize else weight
    units = [x / (np.linalg.norm(x) + eps) for x in vectors]
    mean = sum(w * u for w, u in zip(weight, units, strict=True))
    if np.linalg.norm(mean) < eps:
        chord = sum(w * x for w, x in zip(weight, vectors, strict=True))
        return chord if len(vectors) == 2 else np.full_like(chord, np.nan)
    direction = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - (u * direction).sum() * direction) for w, u in zip(weight, units, strict=True))
    angle = np.linalg.norm(tangent) + eps
    unit = np.cos(angle) * direction + np.sin(angle) / angle * tangent
    return unit * sum(w * np.linalg.norm(x) for w, x in zip(weight, vectors, strict=True))


def karcher(vectors: Sequence[np.ndarray], max_iter: int, tol: float) -> np.ndarray:
    """Karcher mean (arXiv 2603.04972): the point of the sphere at which the tangents to all unit vectors cancel, times
    the mean length of the vectors."""
    units = [x / np.linalg.norm(x) for x in vectors if np.linalg.norm(x) > tol]
    if not units:
        return np.zeros_like(vectors[0])
    mean = np.mean(units, axis=0)
    mean = units[0] if np.linalg.norm(mean) < tol else mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        tangents = []
        for unit in units:
            cosine = np.clip((unit * mean).sum(), -1, 1)
            angle = np.arccos(cosine)
            tangents.append(0 * unit if angle < tol else angle / np.sin(angle) * (unit - cosine * mean))
        step = np.mean(tangents, axis=0)
        size = np.linalg.norm(step)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
        mean = mean / np.linalg.norm(mean)
    return mean * np.mean([np.linalg.norm(x) for x in vectors])


def model_stock(base: np.ndarray, parents: Sequence[np.ndarray], by_row: bool) -> np.ndarray:
    """Model Stock (arXiv 2403.19522): `t mean(parents) + (1 - t) base` with `t = n cos / (1 + (n - 1) cos)`.

    The cosine is the mean over all pairs of deltas, of the whole tensor or of each row.
    """
    axis = -1 if by_row and base.ndim > 1 else None
    deltas = [x - base for x in parents]
    cosines = []
    for one, two in itertools.combinations(deltas, 2):
        lengths = [np.sqrt(np.square(x).sum(axis=axis, keepdims=True)) for x in (one, two)]
        inner = (one * two).sum(axis=axis, keepdims=True)
        cosines.append(np.clip(inner / np.maximum(lengths[0] * lengths[1], 1e-6), -1, 1))
    cosine, n = np.mean(cosines, axis=0), len(parents)
    denominator = 1 + (n - 1) * cosine
    singular = np.abs(denominator) < 1e-6
    t = np.where(singular, 0.0, n * cosine / np.where(singular, 1.0, denominator))
    return t * np.mean(parents, axis=0) + (1 - t) * base


# ---------------------------------------------------------------------------------------------------------------
# Entry by entry


def agreeing(stack: np.ndarray) -> np.ndarray:
    """Return where an entry of `stack` [K, ...] has the sign of the sum over parents: bool[K, ...]. A sum of 0 is +."""
    return np.sign(stack) == np.where(stack.sum(axis=0) >= 0, 1.0, -1.0)


def sce(base: np.ndarray, parents: Sequence[np.ndarray], select_topk: float) -> np.ndarray:
    """SCE (arXiv 2408.07990): select the entries that vary most between parents, weigh parents by the mean squares of
    their deltas, erase the minority's sign."""
    stack = np.stack([x - base for x in parents])
    if select_topk < 1:
        # From pairs of deltas, which is exactly 0 where they are equal.
        variance = sum(np.square(one - two) for one, two in itertools.combinations(stack, 2)) + np.zeros(base.shape)
        # Counted in float32, as mergekit counts for this method and for no other.
        count = int(np.float32(np.count_nonzero(variance)) * np.float32(select_topk)) if select_topk > 0 else 0
        kept = np.zeros(base.size, bool)
        kept[np.argsort(-variance.ravel(), kind="stable")[:count]] = True
        stack = stack * kept.reshape(base.shape)
    squares = np.square(stack).reshape(len(stack), -1).mean(axis=1)
    share = np.full(len(stack), 1 / len(stack)) if squares.sum() < 1e-6 else squares / squares.sum()
    weight = share.reshape(-1, *[1] * base.ndim) * agreeing(stack)
    return base + (stack * weight).sum(axis=0) / np.maximum(weight.sum(axis=0), 1e-6)


def arcee_fusion(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Arcee Fusion, as in mergekit: take the entries of `other` whose importance is far above the median.

    Importance is |change| times the Kullback-Leibler divergence of the row's softmaxes; far is 1.5 interquartile
    ranges.
    """
    rows = [np.atleast_1d(x) for x in (other, base)]
    p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) + 1e-8 for x in rows)
    importance = np.abs(rows[0] - rows[1]) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    low, median, high = np.quantile(importance, [0.25, 0.5, 0.75], method="lower")
    return np.where((importance >= median + 1.5 * (high - low)).reshape(base.shape), other, base)


def ram(base: np.ndarray, parents: Sequence[np.ndarray], epsilon: float, r: float, alpha: float) -> np.ndarray:
    """RAM and RAM+ (arXiv 2601.13572): entries that several parents change by more than `epsilon` get the mean change.

    A change that one parent alone makes counts `1 + r min(shared / alone, alpha)`, by how many of the parent's changed
    entries are shared and how many are its alone.
    """
    deltas = np.stack([x - base for x in parents])
    changed = np.abs(deltas) > epsilon
    count = changed.sum(axis=0)
    merged = base.copy()
    for delta, mask in zip(deltas, changed, strict=True):
        shared, alone = int((mask & (count > 1)).sum()), int((mask & (count == 1)).sum())
        ratio = shared / max(alone, epsilon) if shared else 0.0
        factor = np.where(count > 1, 1 / np.maximum(count, 1), 1 + r * min(ratio, alpha))
        merged = merged + np.where(mask, factor * delta, 0.0)
    return merged


# ---------------------------------------------------------------------------------------------------------------
# Image generators


def diffusion(name: str, c: np.ndarray, parents: Sequence[np.ndarray], parameters: Mapping[str, Any]) -> np.ndarray:
    """Merge by one of sd-mecha's methods; c: the base of those that have one."""
    if name == "geometric_median":
        return geometric_median(parents, *(float(parameters[key]) for key in ("eps", "maxiter", "ftol")))
    a, b = parents
    alpha = float(parameters.get("alpha", 0))
    if name == "weighted_sum":
        return (1 - alpha) * a + alpha * b
    if name == "add_difference":
        return a + alpha * (b - c)
    if name == "train_difference_mask":
        both = np.abs(b - a) + np.abs(b - c)
        mask = np.where(both > 0, np.abs(b - a) / np.where(both > 0, both, 1.0), 0.0)
        return np.asarray(a + 1.8 * alpha * mask * (b - c))
    if name in ("add_cosine_a", "add_cosine_b"):
        cosine = cosines(a, b, 0)
        if name == "add_cosine_b":
            cosine = (cosine + cosines(a, b, None)) / 2
        share = 1 - np.clip(cosine - alpha, 0, 1)
        return np.asarray((1 - share) * a + share * b)
    width, offset = float(parameters["width"]), float(parameters["offset"]) % 1.0
    size = a.size if name == "top_k_tensor_sum" else len(a)
    inverted = width + offset > 1
    first, last = (width + offset - 1, offset) if inverted else (offset, width + offset)
    start, stop = round(first * size), round(last * size)
    if name == "tensor_sum":
        inside = (np.arange(size) >= start) & (np.arange(size) < stop)
        return np.where((inside != inverted).reshape(-1, *[1] * (a.ndim - 1)), b, a)
    # The entries of a, dealt out in the order of b's; those of a middle share of the magnitudes stay dealt out.
    dealt = np.empty(size)
    dealt[np.argsort(b, axis=None, kind="stable")] = np.sort(a, axis=None)
    ascending = np.sort(np.abs(a), axis=None)
    low, high = (ascending[rank - 1] if rank > 0 else -1.0 for rank in (start, stop))
    inside = (np.abs(dealt) >= low) & (np.abs(dealt) <= high)
    return np.where(inside != inverted, dealt, a.ravel()).reshape(a.shape)


def cosines(a: np.ndarray, b: np.ndarray, axis: int | None) -> np.ndarray:
    """The cosines of vectors along an axis, kept with length 1; 0 with a vector of zeros."""
    lengths = [np.maximum(np.sqrt(np.square(x).sum(axis=axis, keepdims=True)), 1e-8) for x in (a, b)]
    return np.asarray((a * b).sum(axis=axis, keepdims=True) / (lengths[0] * lengths[1]))


def geometric_median(points: Sequence[np.ndarray], eps: float, maxiter: float, ftol: float) -> np.ndarray:
    """The point whose distances to all points add up to the least, by Weiszfeld's iteration."""
    median = sum(points) / len(points)
    objective = np.mean([np.linalg.norm(x - median) for x in points])
    for _ in range(int(maxiter)):
        weights = [1 / max(float(np.linalg.norm(x - median)), eps) for x in points]
        median = sum(w * x for w, x in zip(weights, points, strict=True)) / sum(weights)
        before, objective = objective, np.mean([np.linalg.norm(x - median) for x in points])
        if abs(before - objective) <= ftol * objective:
            break
    return np.asarray(median)


def clipped_task_arithmetic(
    base: np.ndarray, parents: Sequence[np.ndarray], weights: Sequence[float], cap: float
) -> np.ndarray:
    """Add weighted deltas, each clipped at `cap` times its root mean square: the method that test_method_seam adds."""
    merged = base.astype(np.float64)
    for parent, weight in zip(parents, weights, strict=True):
        delta = parent.astype(np.float64) - base
        limit = cap * np.sqrt((delta**2).mean())
        merged = merged + weight * np.minimum(np.maximum(delta, -limit), limit)
    return merged


# ---------------------------------------------------------------------------------------------------------------
# Task vectors


def task_vectors(
    name: str,
    options: Options,
    base: np.ndarray,
    parents: Sequence[np.ndarray],
    parameters: Mapping[str, Any],
    uniform: Uniform | None,
) -> np.ndarray:
    """Task arithmetic (arXiv 2212.04089) of sparse deltas: `base + lambda sum_k w_k delta_k`.

    With sign election (TIES, arXiv 2306.01708) only the deltas of the elected sign count. `options.normalize` divides
    by the sum of the weights that count.
    """
    weight = np.asarray(parameters["weight"], np.float64)
    addends = []
    for k, parent in enumerate(parents):
        delta = parent - base
        if name in SPARSE:
            density = float(parameters["density"][k])
            sparse = np.where(kept_mask(name, delta, parameters, k, uniform), delta, 0.0)
            before, after = np.abs(delta).sum(), np.abs(sparse).sum()
            if options.rescale == "l1" and before >= 1e-7 and after >= 1e-7:
                sparse = sparse * before / after
            if options.rescale == "density" and density > 0:
                sparse = sparse / density
            delta = sparse
        addends.append(weight[k] * delta)
    stack = np.stack(addends)
    if name in ELECTED:
        agrees = agreeing(stack)
        total, divisor = (stack * agrees).sum(0), (weight.reshape(-1, *[1] * base.ndim) * agrees).sum(0)
        divisor = np.where(divisor == 0, 1.0, divisor)
    else:
        total, divisor = stack.sum(0), np.asarray(weight.sum())
        divisor = np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
    return base + parameters["lambda"] * (total / divisor if options.normalize else total)


def kept_mask(
    name: str, delta: np.ndarray, parameters: Mapping[str, Any], k: int, uniform: Uniform | None
) -> np.ndarray:
    """Return which entries of parent `k`'s delta a sparse method keeps: bool[...].

    TIES keeps the largest magnitudes; Model Breadcrumbs (arXiv 2312.06795) those below the largest share `gamma`; DARE
    (arXiv 2311.03099) random ones; DELLA (arXiv 2406.11617) random ones with a probability that rises with the rank.
    """
    size, magnitude, density = delta.size, np.abs(delta), float(parameters["density"][k])
    if density >= 1:
        return np.ones(delta.shape, bool)
    if name in MAGNITUDE:
        count = max(1, int(density * size)) if density > 0 else 0
        return kept_by_rank(magnitude, size - count, count)
    if name in BAND:
        count = int(density * size)
        return kept_by_rank(magnitude, max(0, size - count - int(parameters["gamma"][k] * size)), count)
    # Probabilities are kept to 16 bits.
    chance = np.full(delta.shape, round(density * LEVELS))
    if name in DELLA and density > 0:
        chance = chance + np.rint(parameters["epsilon"][k] * (2 * rank_in_row(magnitude) - 1) * LEVELS)
    assert uniform is not None
    return uniform(k) < chance


def kept_by_rank(magnitude: np.ndarray, first: int, count: int) -> np.ndarray:
    """Return the entries of ascending ranks first … first + count - 1, and all that tie with one of them: bool[...]."""
    return np.isin(magnitude, np.sort(magnitude, axis=None)[first : first + count])


def rank_in_row(magnitude: np.ndarray) -> np.ndarray:
    """Return each entry's rank in its row, from 0 (the smallest) to 1. Rows lie along axis 1; a vector is one row."""
    rows = magnitude if magnitude.ndim > 1 else magnitude[None]
    ranks = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1, kind="stable")
    return (ranks / max(rows.shape[1] - 1, 1)).reshape(magnitude.shape)
