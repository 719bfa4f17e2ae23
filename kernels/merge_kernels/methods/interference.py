"""Rules that take the least interference from Gram matrices of the task vectors, which stand in for the inputs'.

The rows of a task matrix `D_k [out, in]` span about the inputs that its training has seen, so that `B_k = D_kᵀ D_k`
stands in for their covariance. With `C = sum_k c_k B_k = V diag(λ) Vᵀ` and a filter `f(λ)` the purified matrix is

    P_k = D_k + (c_k D_k B_k V diag(1/λ) - D_k V) diag(f) Vᵀ

- WUDI (arXiv 2503.08099) minimises `sum_k ‖(θ - D_k) D_kᵀ‖² / ‖D_k‖²`: `c_k = 1 / ‖D_k‖²`, f = 1;
- SWUDI (arXiv 2606.07289) stops early, as a descent does: `f = 1 - exp(-steps λ)` for the largest eigenvalues, a share
  of as many as there are inputs, or in its adaptive form `(sum √λ)² / sum λ` of them;
- ACTMat (arXiv 2604.01329) is RegMean with these covariances: `c_k = 1`, f = 1.
"""

from collections.abc import Callable
from math import ceil

import numpy as np

from merge_kernels.method import Numbers, Parameter, constant
from merge_kernels.purified import Rule, gram_spectrum, register_purified

# The eigenvalues, falling, float64[r], the size of the matrix, and the constants -> the filter, float64[r].
Filter = Callable[[np.ndarray, int, Numbers], np.ndarray]

STEPS = constant("steps", 300.0, 1.0, 1000.0)
# 0.65 for vision transformers.
RANK_SHARE = constant("rank_share", 0.85, 0.1, 1.0, valid_min=0.001, valid_max=1.0)
FILTER = Parameter("filter", per_parent=False, default=1.0, low=0.0, high=1.5)


def _no_filter(values: np.ndarray, size: int, numbers: Numbers) -> np.ndarray:
    return np.ones_like(values)


def _top_share(values: np.ndarray, size: int, numbers: Numbers) -> np.ndarray:
    return _early_stop(values, max(1, int(numbers["rank_share"] * size)), numbers)


def _effective_rank(values: np.ndarray, size: int, numbers: Numbers) -> np.ndarray:
    total = values.sum()
    return _early_stop(values, ceil(np.sqrt(values).sum() ** 2 / total) if total > 0 else 0, numbers)


def _early_stop(values: np.ndarray, rank: int, numbers: Numbers) -> np.ndarray:
    return np.where(np.arange(len(values)) < rank, -np.expm1(-numbers["steps"] * values), 0.0)


def interference_rule(filter_: Filter, by_norm: bool) -> Rule:
    """The rule of a filter; by_norm: each task matrix counts by its norm."""

    def rule(deltas: np.ndarray, numbers: Numbers) -> np.ndarray:
        squares = np.square(deltas).sum(axis=(1, 2))
        scales = (
            np.where(squares > 0, 1 / np.where(squares > 0, squares, 1.0), 0.0) if by_norm else np.ones_like(squares)
        )
        values, vectors = gram_spectrum(np.concatenate(deltas * np.sqrt(scales)[:, None, None]))
        filtered = (filter_(values, deltas.shape[2], numbers) * vectors).T

        def purified(delta: np.ndarray, scale: float) -> np.ndarray:
            along = delta @ vectors
            return delta + (scale * (delta @ (delta.T @ along)) / values - along) @ filtered

        return np.stack([purified(delta, scale) for delta, scale in zip(deltas, scales, strict=True)])

    return rule


register_purified("wudi", interference_rule(_no_filter, by_norm=True))
register_purified("swudi", interference_rule(_top_share, by_norm=True), (RANK_SHARE, STEPS))
register_purified("swudi_filter", interference_rule(_top_share, by_norm=True), (RANK_SHARE, STEPS), filter_=(FILTER,))
register_purified("swudi_a", interference_rule(_effective_rank, by_norm=True), (STEPS,))
register_purified("actmat", interference_rule(_no_filter, by_norm=False))
