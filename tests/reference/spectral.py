"""Merges by singular vectors and Gram matrices in float64 NumPy and SciPy, from the formulas of their papers.

Whole decompositions and pseudo-inverses, where the kernels take thin ones. Directions that no parent has are left out.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
from scipy.linalg import expm, polar

# Relative to the largest: what is smaller is no direction.
CUTOFF = 1e-5
INTERFERENCE = ("wudi", "swudi", "swudi_filter", "swudi_a", "actmat")
SPECTRAL = ("tsv_m", "iso_c", "iso_cts", "svc", "dc_merge", *INTERFERENCE)


def spectral(name: str, models: Sequence[np.ndarray], parameters: Mapping[str, Any]) -> np.ndarray:
    """Merge a tensor of `models`, the base first, by the method `name`: float64[...]."""
    base, *parents = (np.asarray(x, np.float64) for x in models)
    deltas = [x - base for x in parents]
    weight = np.asarray(parameters.get("weight", np.ones(len(parents))), np.float64)
    if base.ndim not in (2, 3) or min(base.shape[-2:]) == 1:
        vectors = [delta / len(parents) for delta in deltas]
    elif base.ndim == 2:
        vectors = purified(name, deltas, parameters)
    else:
        layers = [purified(name, [delta[i] for delta in deltas], parameters) for i in range(len(base))]
        vectors = [np.stack(each) for each in zip(*layers, strict=True)]
    if name == "iso_c":
        vectors = [sum(vectors)]
        weight = np.ones(1)
    if all(x.dtype.itemsize <= 2 for x in models):
        vectors = [x.astype(ml_dtypes.bfloat16).astype(np.float64) for x in vectors]
    if name == "swudi_filter":
        share = parameters["filter"]
        vectors = [(1 - share) * delta + share * x for delta, x in zip(deltas, vectors, strict=True)]
    return base + parameters["lambda"] * sum(w * x for w, x in zip(weight, vectors, strict=True))


def purified(name: str, deltas: list[np.ndarray], parameters: Mapping[str, Any]) -> list[np.ndarray]:
    """The change that each parent adds at weight 1."""
    parents, rank = len(deltas), min(deltas[0].shape)
    if name in INTERFERENCE:
        return interference(name, deltas, parameters)
    if name == "iso_c":
        u, s, vt = svd(sum(deltas))
        return [s.mean() * u @ vt if len(s) else 0 * deltas[0]]
    if name == "svc":
        return calibrated(deltas, parameters["alpha"])
    if name == "iso_cts":
        common = int(rank * parameters["common_share"])
        specific = round((rank - common) / parents) * parents
        if specific > rank:
            specific -= parents
        u, s, vt = (x[: rank - specific] for x in rows(svd(sum(deltas))))
        triples = [rows(svd(delta - u.T @ u @ delta, np.linalg.norm(delta)), specific // parents) for delta in deltas]
        lefts, values, rights = zip(*triples, (u, s, vt), strict=True)
    else:
        share = parameters["rank_share"] if name == "tsv_m" else 1.0
        lefts, values, rights = zip(
            *(rows(svd(delta), max(1, int(share * rank / parents))) for delta in deltas), strict=True
        )
    left, right = nearest_orthonormal(np.concatenate(lefts)), nearest_orthonormal(np.concatenate(rights))
    bounds = np.cumsum([0, *map(len, values)])
    spans = [slice(a, b) for a, b in pairwise(bounds)]
    if name == "tsv_m":
        return [left[span].T @ np.diag(s) @ right[span] for span, s in zip(spans, values, strict=True)]
    if name == "iso_cts":
        together = np.concatenate(values)
        mean = together.mean() if len(together) else 0.0
        *specific_parts, shared = (mean * left[span].T @ right[span] for span in spans)
        return [part + shared / parents for part in specific_parts]
    # The mean singular value, so that a parent's own numbers are those of its vectors alone.
    smooth = [s.mean() * u.T @ vt if len(s) else 0 * deltas[0] for u, s, vt in zip(lefts, values, rights, strict=True)]
    cores = [left @ x @ right.T for x in smooth]
    for core, s in zip(cores, values, strict=True):
        kept = max(len(s), int(parameters["core_density"] * core.size))
        if kept:
            core[np.abs(core) < np.sort(np.abs(core).ravel())[-kept] * (1 - 1e-6)] = 0
    sign = np.sign(sum(cores))
    agreeing = [np.sign(core) == sign for core in cores]
    count = np.maximum(sum(agree.astype(int) for agree in agreeing), 1)
    block = np.zeros_like(cores[0])
    for span in spans:
        block[span, span] = 1
    return [left.T @ (block * agree * core / count) @ right for core, agree in zip(cores, agreeing, strict=True)]


def svd(x: np.ndarray, scale: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular values and vectors of x, what is left of a matrix of the norm `scale`."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    count = int((s > CUTOFF * s.max(initial=scale)).sum())
    return u[:, :count], s[:count], vt[:count]


def rows(triples: tuple[np.ndarray, np.ndarray, np.ndarray], count: int | None = None) -> tuple[np.ndarray, ...]:
    """The largest triples, with left vectors as rows."""
    u, s, vt = triples
    return u.T[:count], s[:count], vt[:count]


def nearest_orthonormal(x: np.ndarray) -> np.ndarray:
    """The isometry of the polar decomposition of x, on its rows' span."""
    if np.linalg.matrix_rank(x, tol=CUTOFF) == len(x):
        return polar(x)[0] if len(x) else x
    u, _, vt = svd(x)
    return u @ vt


def interference(name: str, deltas: list[np.ndarray], parameters: Mapping[str, Any]) -> list[np.ndarray]:
    squares = [np.square(delta).sum() for delta in deltas]
    scale = [1.0 if name == "actmat" else 1 / x if x else 0.0 for x in squares]
    grams = [delta.T @ delta for delta in deltas]
    total = sum(c * gram for c, gram in zip(scale, grams, strict=True))
    inverse = np.linalg.pinv(total, rcond=CUTOFF**2, hermitian=True)
    if name in ("wudi", "actmat"):
        return [c * d @ gram @ inverse for c, d, gram in zip(scale, deltas, grams, strict=True)]
    values, vectors = np.linalg.eigh(total)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if name == "swudi_a":
        values = np.where(values > CUTOFF**2 * values[0], values, 0.0)
        rank = int(np.ceil(np.sqrt(values).sum() ** 2 / values.sum())) if values.any() else 0
    else:
        rank = max(1, int(parameters["rank_share"] * len(values)))
    # The flow of the descent for so long, in the directions of the largest eigenvalues alone.
    into = vectors[:, :rank] @ vectors[:, :rank].T
    stays = expm(-parameters["steps"] * into @ total @ into)
    moved = np.eye(len(total)) - stays
    return [d @ stays + c * d @ gram @ inverse @ moved for c, d, gram in zip(scale, deltas, grams, strict=True)]


def calibrated(deltas: list[np.ndarray], alpha: float) -> list[np.ndarray]:
    """Singular vector by singular vector of the sum."""
    u, _, _ = svd(sum(deltas))
    results = [np.zeros_like(delta) for delta in deltas]
    for vector in u.T:
        whole = vector @ sum(deltas)
        overlaps = []
        for delta in deltas:
            own = vector @ delta
            overlaps.append(max(alpha, whole @ own / (own @ own)) if own @ own else alpha)
        for result, delta in zip(results, deltas, strict=True):
            result += len(deltas) / sum(overlaps) * np.outer(vector, vector @ delta)
    return results
