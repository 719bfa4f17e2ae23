"""Rules on singular vectors of the task matrices `D_k = U_k diag(s_k) V_kᵀ`, of which there are `r = min(out, in)`.

- TSV-M (arXiv 2412.00081): the `r / K` largest triples of each, all left vectors and all right ones made orthonormal;
- Iso-C (arXiv 2502.04959): the sum of the task matrices with all its singular values at their mean; Iso-CTS: so is the
  common subspace of the sum, with the triples of each parent that are largest beside it;
- SVC (arXiv 2602.05536): the sum of the task matrices, each of its left vectors scaled down by how much of it the
  parents share;
- DC-Merge (arXiv 2603.06242): the `r / K` largest triples of each at their mean, elected as by TIES on the joint bases
  of all.

Authors lift the singular values of directions that no parent has, if there are such; here they stay out.
"""

from dataclasses import replace

import numpy as np

from merge_kernels.method import LAMBDA, Numbers, constant
from merge_kernels.purified import orthogonalise, register_purified, thin_svd

RANK_SHARE = constant("rank_share", 1.0, 0.1, 1.0, valid_min=0.001, valid_max=1.0)
COMMON_SHARE = constant("common_share", 0.8, 0.1, 0.9, valid_max=1.0)
# The least share of a direction that a parent counts with: at 1 no direction is scaled up.
ALPHA = constant("alpha", 1.0, 0.1, 2.0, valid_min=0.001)
CORE_DENSITY = constant("core_density", 0.001, 0.001, 1.0, valid_max=1.0)
ISOTROPIC_LAMBDA = replace(LAMBDA, default=1.5, high=3.0)
# Entries that are this close to a threshold, relative to it, tie with it.
TIE = 1e-6


def _parts(blocks: list[np.ndarray]) -> list[slice]:
    """The columns of each block in the blocks side by side."""
    ends = np.cumsum([block.shape[1] for block in blocks])
    return [slice(end - block.shape[1], end) for block, end in zip(blocks, ends, strict=True)]


def _tsv_m(deltas: np.ndarray, numbers: Numbers) -> np.ndarray:
    count = max(1, int(numbers["rank_share"] * min(deltas.shape[1:]) / len(deltas)))
    lefts, values, rights = zip(*([x[..., :count] for x in thin_svd(delta)] for delta in deltas), strict=True)
    left, right = (orthogonalise(np.concatenate(blocks, axis=1)) for blocks in (lefts, rights))
    parts = _parts(list(lefts))
    return np.stack([left[:, part] * s @ right[:, part].T for part, s in zip(parts, values, strict=True)])


def _iso_c(deltas: np.ndarray, numbers: Numbers) -> np.ndarray:
    left, values, right = thin_svd(deltas.sum(axis=0))
    return np.asarray((values.sum() / max(len(values), 1) * left @ right.T)[None])


def _iso_cts(deltas: np.ndarray, numbers: Numbers) -> np.ndarray:
    """Each parent has its own triples, and an equal part of the common ones."""
    rank, parents = min(deltas.shape[1:]), len(deltas)
    per_parent = min(round((rank - int(rank * numbers["common_share"])) / parents), rank // parents)
    common = [x[..., : rank - parents * per_parent] for x in thin_svd(deltas.sum(axis=0))]
    outside = deltas - common[0] @ (common[0].T @ deltas)
    squares = np.square(deltas).sum(axis=(1, 2))
    triples = [[x[..., :per_parent] for x in thin_svd(*each)] for each in zip(outside, squares, strict=True)]
    lefts, values, rights = zip(*triples, common, strict=True)
    left, right = (orthogonalise(np.concatenate(blocks, axis=1)) for blocks in (lefts, rights))
    together = np.concatenate(values)
    *individual, shared = (left[:, part] @ right[:, part].T for part in _parts(list(lefts)))
    return np.asarray(together.sum() / max(len(together), 1) * (np.stack(individual) + shared / parents))


def _svc(deltas: np.ndarray, numbers: Numbers) -> np.ndarray:
    left, _, _ = thin_svd(deltas.sum(axis=0))
    rows = left.T @ deltas
    squares = np.square(rows).sum(axis=2)
    overlap = (rows * rows.sum(axis=0)).sum(axis=2) / np.where(squares > 0, squares, 1.0)
    calibration = len(deltas) / np.maximum(overlap, numbers["alpha"]).sum(axis=0)
    return np.asarray(left * calibration @ rows)


def _dc_merge(deltas: np.ndarray, numbers: Numbers) -> np.ndarray:
    count = max(1, min(deltas.shape[1:]) // len(deltas))
    lefts, values, rights = zip(*([x[..., :count] for x in thin_svd(delta)] for delta in deltas), strict=True)
    left, right = (orthogonalise(np.concatenate(blocks, axis=1)) for blocks in (lefts, rights))
    size, parts = left.shape[1], _parts(list(lefts))
    cores = np.zeros((len(deltas), size, size))
    for core, u, s, v in zip(cores, lefts, values, rights, strict=True):
        core[:] = s.sum() / max(len(s), 1) * (left.T @ u) @ (v.T @ right)
        # As many entries as there are triples at the least: of small matrices a share has hardly any.
        kept = max(len(s), int(numbers["core_density"] * size * size))
        threshold = np.partition(np.abs(core), -kept, axis=None)[-kept] if kept else 0.0
        core[np.abs(core) < (1 - TIE) * threshold] = 0.0
    agrees = np.sign(cores) == np.sign(cores.sum(axis=0))
    shares = np.where(agrees, cores, 0.0) / np.maximum(agrees.sum(axis=0), 1)
    # A block is of one parent's left and right vectors.
    blocks = np.zeros((size, size))
    for part in parts:
        blocks[part, part] = 1.0
    return np.asarray(left @ (shares * blocks) @ right.T)


register_purified("tsv_m", _tsv_m, (RANK_SHARE,))
register_purified("iso_c", _iso_c, strength=ISOTROPIC_LAMBDA, has_weights=False)
register_purified("iso_cts", _iso_cts, (COMMON_SHARE,), ISOTROPIC_LAMBDA)
register_purified("svc", _svc, (ALPHA,))
register_purified("dc_merge", _dc_merge, (CORE_DENSITY,))
