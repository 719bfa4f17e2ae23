"""The rules that FusionBench implements, on random tensors, against its code; skipped where it is not installed.

    pip install fusion-bench  # 0.2.33, in an environment of its own

Its TSV-M, Iso-C, Iso-CTS, SVC, RegMean and Fisher merging compute our formulas. Its WUDI descends by Adam towards our
closed form.
"""

from typing import Any

import numpy as np
import pytest
import torch
from merge_kernels import METHODS, CombineInputs, combine, prepare

pytest.importorskip("fusion_bench.method", reason="needs fusion-bench")
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.regmean_plusplus.regmean_plusplus import regmean_params_merge
from fusion_bench.method.singular_value_calibration.utils import subspace_consistency_spectral_calibration
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from fusion_bench.method.wudi.wudi import wudi_merging

RNG = np.random.default_rng(4)
SHAPES = [(12, 8), (8, 12), (9, 9)]
DELTAS = {shape: RNG.normal(size=(3, *shape)).astype(np.float32) for shape in SHAPES}
BASE = {shape: RNG.normal(size=shape).astype(np.float32) for shape in SHAPES}


def ours(name: str, sources: list[np.ndarray], moments: Any = lambda k: None, **numbers: Any) -> np.ndarray:
    method = METHODS[name]
    parents = len(sources) - method.options.has_base
    defaults = {p.name: np.full(parents, p.default) if p.per_parent else p.default for p in method.parameters}
    parameters = defaults | numbers
    prepared = prepare(method, method.options, sources, parameters, lambda k: np.zeros((0, 2), np.uint32), moments)
    return np.asarray(combine(method, method.options, CombineInputs(sources, prepared.mask_keys, {}, parameters)))


def tasks_of(deltas: np.ndarray) -> list[dict[str, torch.Tensor]]:
    return [{"w": torch.tensor(delta, dtype=torch.float64)} for delta in deltas]


def svc(deltas: np.ndarray, base: np.ndarray) -> torch.Tensor:
    start, *models = (torch.tensor(x, dtype=torch.float64) for x in (base, *(base + deltas)))
    return subspace_consistency_spectral_calibration(start, models, start + torch.tensor(deltas).sum(0)) - start


RULES = {
    "tsv_m": lambda deltas, base: compute_and_sum_svd_mem_reduction(tasks_of(deltas), accelerator="cpu")["w"],
    "iso_c": lambda deltas, base: iso_c(tasks_of(deltas), "cpu")["w"],
    "iso_cts": lambda deltas, base: iso_cts(tasks_of(deltas), 0.8, "cpu")["w"],
    "svc": svc,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_rules_of_spectra(name: str, shape: tuple[int, int]) -> None:
    deltas, base = DELTAS[shape], BASE[shape]
    added = ours(name, [base, *(base + deltas)], **{"lambda": 1.0}) - base
    np.testing.assert_allclose(added, RULES[name](deltas, base), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wudi_descends_to_the_closed_form(shape: tuple[int, int]) -> None:
    """Adam's steps are of 1e-5, so that task vectors of about 1e-3 are within the reach of a few thousand."""
    deltas = (1e-3 * DELTAS[shape]).astype(np.float32)
    zero = np.zeros(shape, np.float32)
    closed = ours("wudi", [zero, *deltas])
    near, far = (wudi_merging(tasks_of(deltas), "cpu", steps)["w"].detach().numpy() for steps in (300, 5000))
    start = deltas.sum(axis=0)
    distances = [np.linalg.norm(x - closed) / np.linalg.norm(start - closed) for x in (start, near, far)]
    assert distances[0] > distances[1] > distances[2] and distances[2] < 0.02, distances


@pytest.mark.parametrize("alpha", [0.9, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_regmean(shape: tuple[int, int], alpha: float) -> None:
    models = BASE[shape] + DELTAS[shape]
    inputs = RNG.normal(size=(3, 40, shape[1]))
    covariances = [x.T @ x for x in inputs]
    expected = merging_with_regmean_weights(
        {"w.weight": [torch.tensor(x, dtype=torch.float64) for x in models]},
        [{"w": torch.tensor(covariance)} for covariance in covariances], alpha,
    )["w.weight"]  # fmt: skip
    merged = ours("regmean", list(models), lambda k: covariances[k], alpha=alpha)
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=2e-6)
    tensors = [torch.tensor(x, dtype=torch.float64) for x in models]
    plusplus = regmean_params_merge(tensors, [torch.tensor(x) for x in covariances], alpha)
    np.testing.assert_allclose(merged, plusplus, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fisher(shape: tuple[int, int]) -> None:
    models, information = BASE[shape] + DELTAS[shape], RNG.random((3, *shape))
    expected = merging_with_fisher_weights(
        {"w": [torch.tensor(x, dtype=torch.float64) for x in models]},
        [{"w": torch.tensor(x)} for x in information], torch.tensor([1.0, 0.5, 2.0]), normalize_fisher_weight=False,
    )["w"]  # fmt: skip
    merged = ours("fisher", list(models), lambda k: information[k], weight=np.array([1.0, 0.5, 2.0]))
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=2e-6)
