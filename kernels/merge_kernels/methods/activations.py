"""Methods that look at activations: moments of the inputs, or of the gradients, that parents have on some prompts.

- RegMean (arXiv 2212.09849): the matrix whose products with all parents' inputs are nearest to the parents' own,
  `(sum_k W_k G_k) (sum_k G_k)^-1`, `G_k = X_kᵀ X_k` the covariances of parent k's inputs; off their diagonals `alpha`
  times as large; RegMean++ (arXiv 2508.03121) takes the inputs behind the merge of the earlier layers;
- Fisher merging (arXiv 2111.09832): `sum_k F_k W_k / sum_k F_k` entry by entry, `F_k` the mean squares of parent k's
  gradients.

Weights multiply each parent's part, of which RegMean's add up and Fisher's are divided by their sum. Tensors without
moments (RegMean: all but the matrices that multiply a layer's states) are averaged.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels.method import CombineInputs, Method, Options, Parameter, Prepared, PrepareInputs, constant
from merge_kernels.purified import WEIGHT
from merge_kernels.registry import register
from merge_kernels.sums import sum_over

ALPHA = constant("alpha", 0.9, 0.1, 1.0, valid_max=1.0)
# The share of RegMean's correction of the average: 0 is the average, 1 RegMean.
FILTER = Parameter("filter", per_parent=False, default=1.0, low=0.0, high=1.0)
# A covariance with a pivot below this share of its mean variance is singular, and is damped by that share.
SINGULAR, DAMPING = 1e-10, 1e-6
# The least of a tensor's Fisher information, as a share of its mean.
FLOOR = 1e-6


def _parents(options: Options, inputs: PrepareInputs) -> np.ndarray:
    """The parents, or their task vectors where there is a base: float64[K, …]."""
    first, *others = (np.asarray(x, np.float64) for x in inputs.sources)
    return np.stack([x - first for x in others]) if options.has_base else np.stack([first, *others])


def _damped(covariances: np.ndarray) -> np.ndarray:
    """Covariances float64[K, n, n] whose sum can be inverted: where it is singular, inputs that never vary get an equal
    variance in all of them."""
    total = covariances.sum(axis=0)
    scale = np.trace(total) / len(total)
    try:
        pivots = np.square(np.diagonal(np.linalg.cholesky(total)))
    except np.linalg.LinAlgError:
        pivots = np.zeros(1)
    if pivots.min() > SINGULAR * scale:
        return covariances
    return np.asarray(covariances + DAMPING * scale / len(covariances) * np.eye(len(total)))


def _prepare_regmean(options: Options, inputs: PrepareInputs) -> Prepared:
    """For each parent the change of its part of the average, `W_k G_k (sum_j G_j)^-1 - W_k / K`."""
    parents = _parents(options, inputs)
    moments = [inputs.moments(k) for k in range(len(parents))]
    corrections = np.zeros_like(parents)
    if parents.ndim == 3 and all(moment is not None for moment in moments) and np.isfinite(parents).all():
        covariances, alpha = np.stack([np.asarray(x, np.float64) for x in moments]), float(inputs.parameters["alpha"])
        diagonals = covariances * np.eye(covariances.shape[-1])
        covariances = alpha * covariances + (1 - alpha) * diagonals
        if np.isfinite(covariances).all() and diagonals.any():
            covariances = _damped(covariances)
            total = covariances.sum(axis=0)
            products = parents @ covariances
            corrections = np.linalg.solve(total, products.swapaxes(1, 2)).swapaxes(1, 2) - parents / len(parents)
    return Prepared(inputs.stored(corrections), {})


def _combine_regmean(options: Options, inputs: CombineInputs) -> jax.Array:
    numbers, first = inputs.parameters, int(options.has_base)
    count = len(inputs.sources) - first
    base = inputs.sources[0].astype(jnp.float32) if options.has_base else 0.0

    def weighted(k: Any) -> jax.Array:
        average = (inputs.sources[k + first].astype(jnp.float32) - base) / count
        return numbers["weight"][k] * (average + numbers["filter"] * inputs.mask_keys[k].astype(jnp.float32))

    return base + sum_over(weighted, count)


def _prepare_fisher(options: Options, inputs: PrepareInputs) -> Prepared:
    """For each parent its Fisher information, in units of the mean over all parents."""
    parents = _parents(options, inputs)
    moments: Sequence[np.ndarray | None] = [inputs.moments(k) for k in range(len(parents))]
    information = np.ones_like(parents)
    if all(moment is not None for moment in moments):
        stacked = np.stack([np.asarray(x, np.float64) for x in moments])
        mean = stacked.mean()
        if np.isfinite(mean) and mean > 0:
            information = stacked / mean + FLOOR
    return Prepared(inputs.stored(information), {})


def _combine_fisher(options: Options, inputs: CombineInputs) -> jax.Array:
    weight, first = inputs.parameters["weight"], int(options.has_base)
    count = len(inputs.sources) - first
    base = inputs.sources[0].astype(jnp.float32) if options.has_base else 0.0

    def parts(k: Any) -> tuple[jax.Array, jax.Array]:
        share = weight[k] * inputs.mask_keys[k].astype(jnp.float32)
        return share * (inputs.sources[k + first].astype(jnp.float32) - base), share

    total, shares = sum_over(parts, count)
    return base + total / jnp.where(jnp.abs(shares) < 1e-30, 1.0, shares)


REGMEAN = Method(
    "regmean",
    (WEIGHT, FILTER, ALPHA),
    base="optional",
    combine=_combine_regmean,
    prepare=_prepare_regmean,
    mask_keys=lambda parents: parents,
    stores_vectors=True,
    looks_at="inputs",
    ignored_settings=("int8_mask",),
)
register(REGMEAN)
register(replace(REGMEAN, name="regmean_plusplus", looks_at="merged inputs"))
register(
    replace(
        REGMEAN, name="fisher", parameters=(WEIGHT,), combine=_combine_fisher, prepare=_prepare_fisher,
        looks_at="gradients",
    )
)  # fmt: skip
