"""Methods whose candidates are the base plus a weighted sum of vectors that were prepared once.

A rule takes the task matrices `D_k` of a tensor apart (singular vectors, Gram matrices) and returns a *purified* vector
`P_k` of each parent: their sum is the rule's merge. With weights a candidate is `b + lambda · sum_k w_k P_k`, which
costs as much as task arithmetic. The vectors are stored where other methods have their mask keys.

Rules are for matrices `[out, in]`; a tensor of three axes is a stack of them (experts that are stored together). Task
vectors of other tensors (vectors, convolutions, matrices with a side of 1) are averaged, as the rules' authors do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels.method import LAMBDA, CombineInputs, Method, Numbers, Options, Parameter, Prepared, PrepareInputs
from merge_kernels.registry import register
from merge_kernels.sums import sum_over

# The task matrices of K parents, float64[K, out, in], and the method's constants -> as many purified ones, or fewer of
# the same sum where the method has no weights.
Rule = Callable[[np.ndarray, Numbers], np.ndarray]

# The vectors are fixed where their rule is one of a sum: at weight 1 each.
WEIGHT = Parameter("weight", per_parent=True, default=1.0, low=0.0, high=2.0)
# Eigenvalues of a Gram matrix below this share of the largest are rounding errors.
TOLERANCE = 1e-10


def gram_spectrum(x: np.ndarray, scale: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues of `xᵀ x` that are not zero, falling, float64[r], and their eigenvectors, float64[n, r], of
    `x: float64[m, n]`, by way of the smaller one of `xᵀ x` and `x xᵀ`. scale: a square that x is a remainder of."""
    is_wide = x.shape[0] < x.shape[1]
    values, vectors = np.linalg.eigh(x @ x.T if is_wide else x.T @ x)
    kept = values > TOLERANCE * values.max(initial=scale)
    values, vectors = values[kept][::-1], vectors[:, kept][:, ::-1]
    return values, x.T @ vectors / np.sqrt(values) if is_wide else vectors


def thin_svd(x: np.ndarray, scale: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`u[m, r], s[r], v[n, r]` with `x = u diag(s) vᵀ`, the singular values falling and none of them zero; scale: as
    `gram_spectrum` takes it."""
    if x.shape[0] < x.shape[1]:
        v, s, u = thin_svd(x.T, scale)
        return u, s, v
    values, v = gram_spectrum(x, scale)
    s = np.sqrt(values)
    return x @ v / s, s, v


def orthogonalise(x: np.ndarray) -> np.ndarray:
    """The matrix nearest to `x[m, c]` whose columns are orthonormal, float64[m, c]; where the columns of x depend on
    each other, it is so on their span, and adds no directions that x does not have."""
    values, vectors = gram_spectrum(x)
    return x @ (vectors / np.sqrt(values)) @ vectors.T


def purify(rule: Rule, has_weights: bool, inputs: PrepareInputs) -> tuple[np.ndarray, ...]:
    """The purified vectors of a tensor `[...]`, one for each parent, or one alone without weights; in `vector_dtype`. A
    tensor with NaN or Inf, which recipes may allow, keeps its task vectors."""
    base, *parents = (np.asarray(x, np.float64) for x in inputs.sources)
    deltas = np.stack([x - base for x in parents])
    if base.ndim in (2, 3) and min(base.shape[-2:]) > 1 and np.isfinite(deltas).all():
        matrices = deltas.reshape(len(parents), -1, *base.shape[-2:])
        each = [rule(matrices[:, i], inputs.parameters) for i in range(matrices.shape[1])]
        vectors = np.stack(each, axis=1).reshape(-1, *base.shape)
    else:
        vectors = deltas / len(parents)
    if not has_weights:
        vectors = vectors.sum(axis=0, keepdims=True)
    return inputs.stored(vectors)


def register_purified(
    name: str,
    rule: Rule,
    constants: tuple[Parameter, ...] = (),
    strength: Parameter = LAMBDA,
    has_weights: bool = True,
    filter_: tuple[Parameter, ...] = (),
) -> None:
    """Register `b + lambda · sum_k w_k P_k`, or `b + lambda P` without weights. constants: the rule's parameters, which
    are never searched; strength: the parameter lambda; filter_: with weights, the parameter f, if there is one, that
    leads from the task vectors to the purified ones, `D_k + f (P_k - D_k)`."""

    def prepare(options: Options, inputs: PrepareInputs) -> Prepared:
        return Prepared(purify(rule, has_weights, inputs), {})

    def combine(options: Options, inputs: CombineInputs) -> jax.Array:
        base, numbers = inputs.sources[0].astype(jnp.float32), inputs.parameters

        def weighted(k: Any) -> jax.Array:
            vector = inputs.mask_keys[k].astype(jnp.float32)
            for parameter in filter_:
                delta = inputs.sources[k + 1].astype(jnp.float32) - base
                vector = delta + numbers[parameter.name] * (vector - delta)
            return numbers["weight"][k] * vector if has_weights else vector

        return base + numbers["lambda"] * sum_over(weighted, len(numbers["weight"]) if has_weights else 1)

    register(
        Method(
            name,
            ((WEIGHT,) if has_weights else ()) + (strength, *filter_, *constants),
            base="required",
            combine=combine,
            prepare=prepare,
            options=Options(has_base=True),
            mask_keys=lambda parents: parents if has_weights else 1,
            stores_vectors=True,
            ignored_settings=("int8_mask",),
        )
    )
