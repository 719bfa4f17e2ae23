"""Merge kernels against the float64 formulas of reference/merging.py, the installed mergekit and sd-mecha."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.models import OF_MERGEKIT
from helpers.sampling import ALL, sample
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from merge_kernels import (
    DENSITY_STEPS,
    METHODS,
    CombineInputs,
    Method,
    Options,
    add_low_rank,
    combine,
    draw_row_keys,
    grid_index,
    host_uniform,
    look_up,
    prepare,
    tabulate,
)
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
from mergekit.sparsify import della_magprune
from reference import merging
from reference.generators import of_sd_mecha
from reference.merging import (
    ACTIVATIONS,
    BAND,
    DARE,
    DELLA,
    DIFFUSION,
    ELECTED,
    MAGNITUDE,
    RAM,
    SPARSE,
    TASK_VECTORS,
    agreeing,
    rank_in_row,
)
from reference.spectral import SPECTRAL

Numbers = dict[str, Any]
Draws = Callable[[int], np.ndarray]

# Shapes and numbers of parents: single entries, vectors, matrices, three axes, odd sizes.
SIZES = (((1,), 2), ((7,), 5), ((1, 1), 3), ((5, 9), 2), ((16, 32), 3), ((4, 3, 5), 4))
# Two of them serve the other tests, so that little has to be compiled.
SMALL, LARGE = (5, 9), (16, 32)
BERNOULLI = (*DARE, *DELLA)
BASED = (*TASK_VECTORS, *RAM, "model_stock", "sce", "nearswap", *SPECTRAL, "arcee_fusion")
SYMMETRIC = (*TASK_VECTORS, *RAM, "linear", "nuslerp", "multislerp", "karcher", "model_stock", "sce")
NORMALIZED = ("linear", "nuslerp", "multislerp", *TASK_VECTORS)
SEED = 11


def digest(k: int, tensor: str = "tensor") -> bytes:
    return hashlib.sha256(f"parent {k} {tensor}".encode()).digest()


def draws_of(shape: tuple[int, ...], order: Sequence[int] | None = None, seed: int = SEED) -> Draws:
    """The row keys of each parent; `order` names the parents where they are not 0, 1, 2 …"""
    return lambda k: draw_row_keys(seed, digest(k if order is None else order[k]), shape)


def make_models(shape: tuple[int, ...], parents: int, dtype: Any = np.float32, scale: float = 0.1) -> list[np.ndarray]:
    """A base and K parents; deltas of different sizes, no two magnitudes equal."""
    rng = np.random.default_rng([parents, *shape])
    base = rng.normal(size=shape)
    tuned = [base + scale * (k + 1) * rng.normal(size=shape) for k in range(parents)]
    return [np.asarray(x, dtype) for x in [base, *tuned]]


def count_of(name: str, wanted: int) -> int:
    method = METHODS[name]
    return max(method.min_parents, min(wanted, method.max_parents or wanted))


def on_device(parameters: Numbers) -> dict[str, jax.Array]:
    return {key: jnp.asarray(value, jnp.float32) for key, value in parameters.items()}


def sources_of(options: Options, models: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """models: the base first, always."""
    return models if options.has_base else models[1:]


def merged(
    name: str, options: Options, models: Sequence[np.ndarray], parameters: Numbers, row_keys: Draws | None = None
) -> np.ndarray:
    """One merge as a user of the kernels does it: counts in float64 on the host, the merge in float32."""
    method, sources = METHODS[name], sources_of(options, models)
    prepared = prepare(method, options, sources, parameters, row_keys or draws_of(models[0].shape))
    tensors = tuple(jnp.asarray(x) for x in sources)
    inputs = CombineInputs(tensors, prepared.mask_keys, prepared.statistics, on_device(parameters))  # type: ignore[arg-type]
    return np.asarray(combine(method, options, inputs))


def expected_merge(
    name: str, options: Options, models: Sequence[np.ndarray], parameters: Numbers, row_keys: Draws | None = None
) -> np.ndarray:
    """The same merge by its formula in float64, with the numbers that random methods draw from the row keys."""
    shape = models[0].shape
    keys = row_keys or draws_of(shape)
    return merging.merge(name, options, models, parameters, lambda k: host_uniform(keys(k), shape))


# ---------------------------------------------------------------------------------------------------------------
# mergekit in process


def switches_of(name: str, options: Options) -> Numbers:
    """`options` as mergekit's YAML says them."""
    if name == "nuslerp":
        return {"nuslerp_flatten": options.axis is None, "nuslerp_row_wise": options.axis == 0}
    if name == "multislerp":
        return {"normalize_weights": options.normalize}
    if name == "model_stock":
        return {"filter_wise": options.axis is not None}
    given: Numbers = {"normalize": options.normalize} if name in ("linear", *TASK_VECTORS) else {}
    return given | ({"rescale": options.rescale == "l1"} if name in TASK_VECTORS else {})


def masks_for_mergekit(
    name: str, options: Options, models: Sequence[np.ndarray], parameters: Numbers, row_keys: Draws
) -> Iterator[torch.Tensor]:
    """Our masks in the order in which mergekit would draw its own."""
    prepared = prepare(METHODS[name], options, sources_of(options, models), parameters, row_keys)
    masks = []
    for k, density in enumerate(parameters["density"]):
        # Nothing is drawn at density 1, nor at 0 by DELLA, which sees a vector as one row.
        if density < 1 and (density > 0 or name in DARE):
            keys = prepared.mask_keys[k]
            numbers = host_uniform(keys, models[0].shape) if name in DARE else keys
            mask = numbers < int(prepared.statistics["threshold"][k])
            rows = mask[None] if name in DELLA and mask.ndim < 2 else mask
            masks.append(torch.tensor(rows.astype(np.float32)))
    return iter(masks)


def of_mergekit(
    name: str, options: Options, models: Sequence[np.ndarray], parameters: Numbers, row_keys: Draws | None = None
) -> np.ndarray:
    """The same merge by mergekit, in float32 (but Arcee Fusion). Its random masks are replaced by ours."""
    # In float32 rounding decides what the divergence of similar rows is.
    dtype = np.float64 if name == "arcee_fusion" else np.float32
    tensors = [torch.tensor(np.asarray(x, dtype)) for x in sources_of(options, models)]
    # mergekit calls SLERP's first model its base.
    group = TensorGroup.from_tensors(tensors, base_index=0 if options.has_base or name == "slerp" else None)
    given = {key: [float(v) for v in value] if np.ndim(value) else value for key, value in parameters.items()}
    with pytest.MonkeyPatch.context() as patch:
        if name in BERNOULLI:
            masks = masks_for_mergekit(name, options, models, parameters, row_keys or draws_of(models[0].shape))
            patch.setattr(torch, "bernoulli", lambda probabilities: next(masks))
        return registry.get(name)([group], parameters=given | switches_of(name, options))[0].numpy()


def check(name: str, options: Options, models: Sequence[np.ndarray], parameters: Numbers) -> None:
    """Kernel against formula and mergekit. Where there is no answer, the kernel's is not finite; mergekit refuses."""
    found, expected = merged(name, options, models, parameters), expected_merge(name, options, models, parameters)
    assert found.dtype == np.float32
    assert found.shape == models[0].shape
    if name in (*SPECTRAL, *ACTIVATIONS):
        assert_close(found, expected)
        return
    if name in DIFFUSION:
        # Sums of parents, which may cancel in a tensor of one entry.
        scale = max(float(np.abs(x).max()) for x in models)
        assert_close(found, expected, scale=scale)
        assert_close(found, of_sd_mecha(name, models, parameters), scale=scale)
        return
    if np.isnan(expected).all():
        assert not np.isfinite(found).any()
        with pytest.raises(ValueError, match="zero"):
            of_mergekit(name, options, models, parameters)
        return
    assert_close(found, expected)
    # Its float32 norms cancel where weights do.
    cancels = name == "multislerp" and abs(np.sum(parameters["weight"])) < 0.01
    assert_close(found, of_mergekit(name, options, models, parameters), 1e-4 if cancels else 1e-5)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5, scale: float = 0.0) -> None:
    """Within `tolerance` relative to each entry; sums that cancel are held to the tensor's own scale, or to `scale` if
    that is larger."""
    assert np.isfinite(found).all()
    scale = max(scale, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0.1 * tolerance * scale)


# ---------------------------------------------------------------------------------------------------------------
# All methods, all options


def weights_for(name: str, options: Options, parents: int) -> list[np.ndarray]:
    """Positive, negative, and such as sum to zero where they may; multiples of 1/64, so that they do so exactly."""
    spread = np.rint(64 * np.linspace(0.2, 0.9, parents)) / 64
    if parents == 1:
        return [spread] if name == "multislerp" else [spread, -spread]
    negative = spread * np.where(np.arange(parents) % 2, -0.5, 1.0)
    opposed = np.resize([0.5, -0.25, -0.25, 0.75], parents) if parents != 2 else np.array([0.5, -0.5])
    opposed[-1] -= opposed.sum()
    refused = name in ("linear", "multislerp") and options.normalize
    return [spread, negative] if refused else [spread, negative, opposed]


def options_for(name: str) -> list[Options]:
    both = (False, True)
    if name == "linear":
        return [Options(normalize) for normalize in both]
    if name == "nuslerp":
        return [Options(has_base=has_base, axis=axis) for has_base in both for axis in (None, -1, 0)]
    if name == "multislerp":
        return [Options(normalize, has_base=has_base) for normalize in both for has_base in both]
    if name == "model_stock":
        return [Options(has_base=True, axis=axis) for axis in (None, -1)]
    if name in TASK_VECTORS:
        return [Options(normalize, has_base=True) for normalize in both]
    return [Options(has_base=name in BASED)]


def densities_for(name: str, parents: int) -> list[np.ndarray]:
    """None, some, half, all; one entry in a thousand."""
    some, tiny = np.full(parents, 0.5), np.full(parents, 0.001)
    mixed = [np.resize(row, parents) for row in ([0.3, 0.0, 0.7, 1.0], [0.001, 0.5, 0.0, 0.999], [1.0, 0.6, 0.25])]
    return [np.zeros(parents), tiny, some, np.ones(parents), *mixed]


def constants_for(name: str, density: np.ndarray, turn: int) -> Numbers:
    """What is never searched: DELLA's epsilon where its keep probabilities stay inside (0, 1), and gamma."""
    parents = len(density)
    if name in DELLA:
        room = np.where((density > 0) & (density < 1), np.minimum(density, 1 - density), 0.5)
        return {"epsilon": room * np.resize(([0.9, 0.3, 0.6], [0.0, 0.5, 0.99])[turn % 2], parents)}
    if name in BAND:
        return {"gamma": np.resize(([0.01, 0.1, 0.5], [0.0, 0.25, 1.0])[turn % 2], parents)}
    return {}


def cases(name: str, parents: int) -> list[tuple[Options, Numbers]]:
    rows: list[tuple[Options, Numbers]] = []
    for options in options_for(name):
        if name == "slerp":
            rows += [(options, {"t": t}) for t in (0.0, 0.25, 0.5, 1.0, 1.2, -0.3)]
        elif name == "karcher":
            rows += [(options, {"max_iter": n, "tol": tol}) for n, tol in ((10, 1e-5), (0, 1e-5), (1, 1e-4), (50, 0.1))]
        elif name in ("model_stock", "arcee_fusion"):
            rows.append((options, {}))
        elif name in RAM:
            extras: list[Numbers] = [{}] if name == "ram" else [{"r": 0.1, "alpha": 0.2}, {"r": 0.7, "alpha": 5.0}]
            rows += [(options, {"epsilon": epsilon} | extra) for epsilon in (1e-5, 0.05, 0.2) for extra in extras]
        elif name == "sce":
            rows += [(options, {"select_topk": share}) for share in (0.0, 0.001, 0.1, 0.5, 0.9, 1.0)]
        elif name in DIFFUSION:
            rows += [(METHODS[name].options, parameters) for parameters in diffusion_cases(name)]
        elif name in ACTIVATIONS:
            given = {p.name: p.default for p in METHODS[name].parameters}
            for based, low in ((True, 1.0), (False, 0.2)):
                weight = np.linspace(low, 1.0, parents)
                rows.append((replace(options, has_base=based), given | {"weight": weight}))
        elif name in SPECTRAL:
            rows += [(METHODS[name].options, parameters) for parameters in spectral_cases(name, parents)]
        elif name == "nearswap":
            rows += [(options, {"t": t}) for t in (0.0, 1e-4, 0.05, 10.0)]
        elif name == "passthrough":
            rows += [(options, {"scale": [scale]}) for scale in (1.0, 0.0, -1.3)]
        elif name == "multislerp":
            pairs = itertools.product(weights_for(name, options, parents), (1e-8, 1e-3, 0.1))
            rows += [(options, {"weight": weight, "eps": eps}) for weight, eps in pairs]
        elif name not in SPARSE:
            extra: Numbers = {"lambda": 0.7} if name == "task_arithmetic" else {}
            rows += [(options, {"weight": weight} | extra) for weight in weights_for(name, options, parents)]
        else:
            weights = itertools.cycle(weights_for(name, options, parents))
            for turn, density in enumerate(densities_for(name, parents)):
                extra = {"density": density, "lambda": (1.0, 0.7, 1.3)[turn % 3]} | constants_for(name, density, turn)
                rows += [
                    (replace(options, rescale=rescale), {"weight": next(weights)} | extra) for rescale in ("none", "l1")
                ]
    return rows


def spectral_cases(name: str, parents: int) -> list[Numbers]:
    """The defaults, and others, at weights of both signs."""
    given = {p.name: p.default for p in METHODS[name].parameters if not p.per_parent}
    other = {"rank_share": 0.5, "common_share": 0.4, "alpha": 0.6, "core_density": 0.1, "steps": 20.0, "filter": 0.4}
    changed = given | {"lambda": 0.7} | {key: value for key, value in other.items() if key in given}
    if name == "iso_c":
        return [given, changed]
    weights = [np.ones(parents), *weights_for(name, METHODS[name].options, parents)]
    return [{"weight": weight} | numbers for weight, numbers in zip(weights, itertools.cycle([given, changed]))]


def diffusion_cases(name: str) -> list[Numbers]:
    if name == "geometric_median":
        return [{"eps": eps, "maxiter": n, "ftol": ftol} for eps, n, ftol in ((1e-6, 100, 1e-20), (0.1, 3, 0.0))]
    if "tensor_sum" in name:
        regions = ((0.5, 0.0), (0.0, 0.0), (1.0, 0.0), (0.3, 0.25), (0.6, 0.7), (0.137, 1.0), (1.0, 0.4))
        return [{"width": width, "offset": offset} for width, offset in regions]
    return [{"alpha": alpha} for alpha in (0.0, 0.3, 0.8, 1.0)]


@pytest.mark.parametrize(("shape", "parents"), sample(SIZES, 1), ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_methods_equal_float64_formulas_and_mergekit(name: str, shape: tuple[int, ...], parents: int) -> None:
    models = make_models(shape, count_of(name, parents))
    for options, parameters in cases(name, len(models) - 1):
        check(name, options, models, parameters)


@pytest.mark.parametrize("name", sample(METHODS, 8))
def test_bfloat16_inputs_are_merged_in_float32(name: str) -> None:
    # The reference keeps every entry that ties at a threshold, as the kernels promise.
    models = make_models(LARGE, count_of(name, 3), ml_dtypes.bfloat16)
    for options, parameters in cases(name, len(models) - 1):
        assert_close(merged(name, options, models, parameters), expected_merge(name, options, models, parameters))


@pytest.mark.parametrize(
    "name", sample([name for name in METHODS if METHODS[name].max_parents != 1 and name != "slerp"], 6)
)
def test_one_zero_delta_among_others(name: str) -> None:
    base, one, two = make_models(LARGE, 2)
    models = [base, one, base] if METHODS[name].max_parents == 2 else [base, one, two, base]
    for options, parameters in cases(name, len(models) - 1):
        check(name, options, models, parameters)


@pytest.mark.parametrize("name", sample(BASED, 6))
def test_parents_equal_to_the_base_give_the_base(name: str) -> None:
    parents = count_of(name, 2)
    base = make_models(SMALL, 1)[0]
    for options, parameters in cases(name, parents):
        np.testing.assert_array_equal(merged(name, options, [base] * (parents + 1), parameters), base)


@pytest.mark.parametrize("name", sample(METHODS, 8))
def test_identical_parents(name: str) -> None:
    base, parent = make_models(SMALL, 1)
    models = [base, *[parent] * count_of(name, 3)]
    for options, parameters in cases(name, len(models) - 1):
        if name == "sce":
            # The variance of equal numbers is not always 0 in torch.
            assert_close(merged(name, options, models, parameters), expected_merge(name, options, models, parameters))
        else:
            check(name, options, models, parameters)


@pytest.mark.parametrize(
    "name", sample(["linear", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce"], 3)
)
def test_averages_of_identical_parents_are_that_parent(name: str) -> None:
    base, parent = make_models(SMALL, 1)
    models = [base, *[parent] * count_of(name, 3)]
    weight = np.arange(1, len(models)) / 4
    own = {parameter.name: parameter.default for parameter in METHODS[name].parameters}
    parameters = own | {key: value for key, value in {"weight": weight, "t": 0.5}.items() if key in own}
    for options in options_for(name):
        if options.normalize or name not in ("linear", "multislerp"):
            assert_close(merged(name, options, models, parameters), parent)


@pytest.mark.parametrize("name", sample([*BASED[:-1], "slerp", "karcher"], 5))
@pytest.mark.parametrize("scale", sample([1e-9, 1e-8, 1e-5], 1))
def test_tiny_vectors(name: str, scale: float) -> None:
    """On both sides of the norms below which nothing is rescaled, divided or given a direction."""
    rng = np.random.default_rng(6)
    base = np.zeros(SMALL, np.float32)
    models = [base, *(np.float32(scale) * rng.normal(size=SMALL).astype(np.float32) for _ in range(count_of(name, 2)))]
    for options, parameters in cases(name, len(models) - 1):
        check(name, options, models, parameters)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.999, 1.0])
def test_sce_keeps_the_first_of_entries_that_tie(share: float) -> None:
    """Deltas of few values, most of whose variances are equal."""
    rng, options = np.random.default_rng(2), Options(has_base=True)
    models = [np.zeros((7, 11), np.float32), *rng.integers(-2, 3, (3, 7, 11)).astype(np.float32)]
    expected = expected_merge("sce", options, models, {"select_topk": share})
    np.testing.assert_allclose(merged("sce", options, models, {"select_topk": share}), expected, rtol=1e-6, atol=1e-6)


def test_light_deltas_count_alike_in_sce() -> None:
    """Below mean squares of 1e-6 in all, as light fine-tunes have them."""
    models = make_models(LARGE, 3, scale=1e-4)
    for share in (0.5, 1.0):
        found = merged("sce", Options(has_base=True), models, {"select_topk": share})
        # The deltas themselves are held to float32's resolution of the weights.
        np.testing.assert_allclose(found, of_mergekit("sce", Options(has_base=True), models, {"select_topk": share}),
                                   rtol=3e-7)  # fmt: skip
        delta = np.stack([x.astype(np.float64) - models[0] for x in models[1:]])
        agrees = agreeing(delta)
        mean = (delta * agrees).sum(0) / agrees.sum(0)
        kept = np.abs(found - models[0]) > 0
        np.testing.assert_allclose((found - models[0])[kept], mean[kept], atol=1e-6)
        assert kept.mean() == pytest.approx(share, abs=0.01)


def test_sources_of_unlike_shapes_are_refused() -> None:
    sources, numbers = [np.ones((6, 5), np.float32), np.ones((1, 5), np.float32)], {"weight": np.array([0.5, 0.5])}
    for measure in (prepare, tabulate):
        with pytest.raises(ValueError, match=r"shapes \(6, 5\), \(1, 5\); expected one"):
            measure(METHODS["linear"], Options(), sources, numbers, draws_of((6, 5)))


def test_zero_vectors_have_no_direction() -> None:
    """A parent of zeros, and a row of zeros, where vectors are interpolated."""
    base, one, two = make_models(SMALL, 2)
    nothing, gap = np.zeros_like(one), one * (np.arange(5)[:, None] != 2)
    for name in ("slerp", "nuslerp", "multislerp", "karcher"):
        for models in ([base, one, nothing], [base, nothing, nothing], [base, gap, two]):
            for options, parameters in cases(name, 2):
                if not options.has_base:
                    found = merged(name, options, models, parameters)
                    assert_close(found, expected_merge(name, options, models, parameters))
                    assert_close(found, of_mergekit(name, options, models, parameters))


@pytest.mark.parametrize("has_base", [False, True])
def test_multislerp_of_antipodal_vectors(has_base: bool) -> None:
    """Where the mean direction vanishes, two vectors are added up, and more have no answer."""
    base, one = make_models(LARGE, 1)
    origin = base if has_base else np.zeros_like(base)
    delta = np.rint(256 * (one - origin)) / 256
    origin = np.rint(256 * origin) / 256
    models = [origin, origin + delta, origin - 2 * delta]
    for weight in (0.5, 0.3, 0.7):
        for normalize in (True, False):
            options, parameters = Options(normalize, has_base=has_base), {"weight": [weight] * 2, "eps": 1e-8}
            share = 0.5 if normalize else weight
            assert_close(merged("multislerp", options, models, parameters), origin - share * delta)
            assert_close(of_mergekit("multislerp", options, models, parameters), origin - share * delta)
    more = [*models, origin + delta]
    parameters = {"weight": [0.25, 0.5, 0.25], "eps": 1e-6}
    with pytest.raises(ValueError, match="antipodal"):
        of_mergekit("multislerp", Options(True, has_base=has_base), more, parameters)
    assert not np.isfinite(merged("multislerp", Options(True, has_base=has_base), more, parameters)).any()


def test_fusion_of_close_models_takes_what_mergekit_takes_in_float64() -> None:
    """In float32 mergekit's divergence of such models is lost in rounding: some of it is negative."""
    from mergekit.merge_methods.arcee_fusion import _compute_importance

    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.02, (80, 48)).astype(np.float32)
    parent = (base + rng.normal(0, 0.0005, base.shape)).astype(np.float32)
    given = ("arcee_fusion", METHODS["arcee_fusion"].options, [base, parent], {})
    # An entry more or less would be a change of about 1e-3.
    np.testing.assert_allclose(merged(*given), of_mergekit(*given), rtol=0, atol=1e-7)
    assert (_compute_importance(torch.tensor(parent), torch.tensor(base)) < 0).any()


def test_multislerp_of_one_parent_is_that_parent() -> None:
    base, parent = make_models(SMALL, 1)
    for options in options_for("multislerp"):
        for weight in (1.0, 0.3):
            parameters = {"weight": [weight], "eps": 1e-8}
            assert_close(merged("multislerp", options, [base, parent], parameters), parent)
            assert_close(of_mergekit("multislerp", options, [base, parent], parameters), parent)


def test_karcher_mean_is_where_the_tangents_cancel() -> None:
    """The defining property, on vectors far apart."""
    models = make_models(LARGE, 4, scale=1.0)
    parents = np.asarray(models[1:], np.float64)
    units = [x / np.linalg.norm(x) for x in parents]
    found = merged("karcher", Options(), models, {"max_iter": 50, "tol": 1e-7}).astype(np.float64)
    assert np.linalg.norm(found) == pytest.approx(np.mean([np.linalg.norm(x) for x in parents]), rel=1e-5)
    mean = found / np.linalg.norm(found)
    angles = [np.arccos((unit * mean).sum()) for unit in units]
    tangents = [a / np.sin(a) * (u - np.cos(a) * mean) for a, u in zip(angles, units, strict=True)]
    assert np.linalg.norm(np.mean(tangents, axis=0)) < 1e-5 * max(angles)
    assert min(angles) > 0.1


# ---------------------------------------------------------------------------------------------------------------
# What the registry says of a method


@pytest.mark.parametrize("name", sample(OF_MERGEKIT, 9))
def test_registry_has_mergekit_s_names_defaults_and_numbers_of_parents(name: str) -> None:
    method, theirs = METHODS[name], registry.get(name).spec
    known = {parameter.name: parameter for parameter in theirs.parameters}
    # nuslerp_row_wise and the like are options here.
    assert {p.name for p in method.parameters} | {*method.yaml_options, *method.ignored_settings} == set(known)
    for parameter in method.parameters:
        expected = known[parameter.name]
        if parameter.name in (
            "select_topk",
            "density",
            "lambda",
            "epsilon",
            "gamma",
            "max_iter",
            "tol",
            "eps",
            "r",
            "alpha",
        ):
            assert parameter.default == expected.default
        assert parameter.per_parent == (expected.scope.name != "SHARED")
        assert parameter.valid_min <= parameter.low <= parameter.high <= parameter.valid_max
    for switch, option in (("normalize", method.options.normalize), ("rescale", method.options.rescale == "l1")):
        if switch in known:
            # A rescaling has nothing to restore where nothing is thinned out.
            assert known[switch].default == option
    contract = theirs.contract
    needed = 1 if contract.base.name == "REQUIRED" else 0
    if name == "slerp":
        needed = 0
    else:
        assert (method.base == "required") == (contract.base.name == "REQUIRED")
        assert (method.base == "optional") == (contract.base.name == "OPTIONAL")
    most = contract.max_non_base or (contract.max_inputs and contract.max_inputs - needed)
    assert method.max_parents == most
    assert method.min_parents == max(1, contract.min_non_base or 0, contract.min_inputs - needed)


@pytest.mark.parametrize("name", sample(METHODS, 9))
def test_prepared_arrays_are_as_many_as_the_method_says(name: str) -> None:
    parents = count_of(name, 3)
    options, parameters = cases(name, parents)[0]
    sources = sources_of(options, make_models(SMALL, parents))
    drawn = []

    def row_keys(k: int) -> np.ndarray:
        drawn.append(k)
        return draw_row_keys(SEED, digest(k), SMALL)

    prepared = prepare(METHODS[name], options, sources, parameters, row_keys)
    assert len(prepared.mask_keys) == METHODS[name].mask_keys(parents)
    expected = ((SMALL[0], 2), np.uint32) if name in (*DARE, "tensor_sum") else (SMALL, np.uint16)
    if METHODS[name].stores_vectors:
        expected = (SMALL, np.float32)
    assert all((keys.shape, keys.dtype) == expected for keys in prepared.mask_keys)
    assert METHODS[name].mask_key_array(SMALL, np.dtype(np.float32)) == expected
    assert sorted(drawn) == (list(range(parents)) if name in BERNOULLI else [])
    assert METHODS[name].random == (name in BERNOULLI)


@pytest.mark.parametrize("name", DELLA)
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.45])
def test_della_complains_where_mergekit_refuses(name: str, epsilon: float) -> None:
    tensor = torch.tensor(make_models(SMALL, 1)[1])
    for density in (0.0, 0.05, 0.1, 0.2, 0.5, 0.8, 0.95, 1.0):
        try:
            della_magprune(tensor, density, epsilon)
            refused = False
        except ValueError:
            refused = True
        complaint = METHODS[name].validate(
            METHODS[name].options, {"density": [0.5, density], "epsilon": [0.2, epsilon]}
        )
        assert (complaint is not None) == refused, (density, complaint)


@pytest.mark.parametrize("name", ["linear", "multislerp"])
def test_weights_that_cancel_are_refused_where_mergekit_s_result_is_not_finite(name: str) -> None:
    models, complaint = make_models(SMALL, 2), METHODS[name].validate
    parameters = {"weight": [0.5, -0.5], "eps": 1e-8} if name == "multislerp" else {"weight": [0.5, -0.5]}
    assert not np.isfinite(of_mergekit(name, Options(True), models, parameters)).any()
    assert complaint(Options(True), parameters) is not None
    assert complaint(Options(False), parameters) is None
    assert complaint(Options(True), parameters | {"weight": [0.5, -0.25]}) is None


# ---------------------------------------------------------------------------------------------------------------
# Sparsifiers


def test_ties_keeps_every_entry_at_the_threshold() -> None:
    base = np.zeros((4, 4), np.float32)
    parent = np.full((4, 4), 0.5, np.float32)
    parent[0] = 2.0
    parameters = {"weight": [1.0], "density": [0.5], "lambda": 1.0}
    # int(0.5 * 16) = 8 entries; the eighth largest ties with all the small ones.
    np.testing.assert_array_equal(merged("ties", METHODS["ties"].options, [base, parent], parameters), parent)


@pytest.mark.parametrize("name", sample([*MAGNITUDE, *BAND], 3))
def test_massively_tied_deltas(name: str) -> None:
    """Light fine-tunes in bfloat16: hundreds of entries at a threshold, and all of them are kept."""
    rng, shape = np.random.default_rng(5), (128, 64)
    base = rng.normal(size=shape).astype(ml_dtypes.bfloat16)
    parents = [(base.astype(float) + 0.01 * rng.normal(size=shape)).astype(ml_dtypes.bfloat16) for _ in range(2)]
    delta = [x.astype(np.float32) - base.astype(np.float32) for x in parents]
    models = [base, *parents]
    for density in (0.05, 0.2, 0.5):
        count = int(density * base.size)
        for k in range(2):
            parameters = {"weight": [1.0], "density": [density], "lambda": 1.0, "gamma": [0.02]}
            found = merged(name, Options(has_base=True), [base, parents[k]], parameters)
            kept = found != base.astype(np.float32)
            assert kept.sum() + (delta[k] == 0).sum() >= count
            # Of equal magnitudes all are kept or none.
            magnitudes = np.abs(delta[k])
            assert not np.intersect1d(magnitudes[kept], magnitudes[~kept & (magnitudes > 0)]).size
            np.testing.assert_array_equal(found[kept], parents[k].astype(np.float32)[kept])
        parameters = {"weight": [0.5, 0.25], "density": [density] * 2, "lambda": 1.0, "gamma": [0.02, 0.02]}
        if name == "ties":
            del parameters["gamma"]
        for normalize in (False, True):
            options = Options(normalize, has_base=True)
            found = merged(name, options, models, parameters)
            assert_close(found, expected_merge(name, options, models, parameters))
            # mergekit's choice among equals is arbitrary: away from the entries at a threshold.
            clear = np.ones(shape, bool)
            for k in range(2):
                ranked = np.sort(np.abs(delta[k]), axis=None)
                dropped = 0 if name == "ties" else int(0.02 * base.size)
                first = max(0, base.size - count - dropped)
                for edge in (ranked[first], ranked[first + count - 1]):
                    clear &= np.abs(delta[k]) != edge
            assert 0.3 < clear.mean() < 1
            theirs = of_mergekit(name, options, models, parameters)
            assert_close(found[clear], theirs[clear])


def test_density_option_divides_by_the_density() -> None:
    for name in SPARSE:
        models, options = make_models(LARGE, 3), Options(rescale="density", has_base=True)
        density = np.array([0.2, 0.55, 1.0])
        parameters = {"weight": [0.4, 0.3, 0.5], "density": density, "lambda": 1.0} | constants_for(name, density, 0)
        assert_close(merged(name, options, models, parameters), expected_merge(name, options, models, parameters))


@pytest.mark.parametrize("name", sample(SPARSE, 4))
def test_l1_rescale_restores_each_delta_s_norm(name: str) -> None:
    base, parent = make_models(LARGE, 1)
    delta = parent.astype(np.float64) - base
    for density in (0.05, 0.3, 1.0):
        parameters = {"weight": [1.0], "density": [density], "lambda": 1.0}
        parameters |= constants_for(name, np.array([density]), 0)
        found = merged(name, Options(rescale="l1", has_base=True), [base, parent], parameters)
        np.testing.assert_allclose(np.abs(found - base.astype(np.float64)).sum(), np.abs(delta).sum(), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# The table that a search looks densities up in

TABULATED = (*SPARSE, "sce")


def table_of(
    method: Method, options: Options, models: Sequence[np.ndarray], parameters: Numbers
) -> tuple[Sequence[np.ndarray], dict[str, jax.Array]]:
    never = {p.name: parameters[p.name] for p in method.parameters if not p.searched}
    prepared = tabulate(method, options, sources_of(options, models), never, draws_of(models[0].shape))
    return prepared.mask_keys, {key: jnp.asarray(rows) for key, rows in prepared.statistics.items()}


def steps_for(name: str) -> tuple[int, ...]:
    """Places on the grid; DELLA's keep probabilities have to stay inside (0, 1)."""
    return (
        (0, 200, 290, 333, 500, 537, 571, 799, 1000) if name in DELLA else (0, 1, 2, 7, 290, 333, 500, 537, 999, 1000)
    )


@pytest.mark.parametrize("name", sample(TABULATED, 4))
@pytest.mark.parametrize("shape", sample([(1, 1), SMALL, LARGE], 1), ids=str)
def test_table_equals_exact_preparation_on_the_grid(name: str, shape: tuple[int, ...]) -> None:
    method, parents = METHODS[name], 2
    models = make_models(shape, parents)
    options = Options(rescale="l1" if name in SPARSE else "none", has_base=True)
    parameters: Numbers = {"weight": [0.5, 0.25], "lambda": 1.0} if name in SPARSE else {}
    parameters |= {"epsilon": [0.199, 0.1]} if name in DELLA else {}
    parameters |= {"gamma": [0.02, 0.1]} if name in BAND else {}
    scores, table = table_of(method, options, models, parameters)
    for rows in table.values():
        assert rows.shape[-1] == DENSITY_STEPS + 1
    for step in steps_for(name):
        density = step / DENSITY_STEPS
        given = {"select_topk": density} if name == "sce" else {"density": [density, 1 - density]}
        exact = prepare(method, options, models, parameters | given, draws_of(shape))
        found = look_up(method, table, on_device(given))
        assert set(found) == set(exact.statistics)
        for key, values in exact.statistics.items():
            assert found[key].shape == values.shape
            if name != "sce":
                # An export measures what the search had, so that entries which cancel keep their sign.
                np.testing.assert_array_equal(np.asarray(found[key]), values)
            elif key != "threshold":
                np.testing.assert_allclose(np.asarray(found[key]), values, rtol=1e-6)
        inputs = CombineInputs(tuple(map(jnp.asarray, models)), scores, found, on_device(parameters | given))  # type: ignore[arg-type]
        looked_up = combine(method, options, inputs)
        assert_close(np.asarray(looked_up), merged(name, options, models, parameters | given), 2e-6)


def test_table_counts_as_python_does() -> None:
    """`int(density * n)` in float64 for every density of the grid; float32 products give other counts."""
    size = 1000
    counts = [int(step / DENSITY_STEPS * size) for step in range(DENSITY_STEPS + 1)]
    base, parent = np.zeros(size, np.float32), np.arange(1, size + 1, dtype=np.float32)

    _, table = table_of(METHODS["ties"], METHODS["ties"].options, [base, parent], {})
    kept = (parent[None, :] >= np.asarray(table["threshold"])[0][:, None]).sum(axis=1)
    np.testing.assert_array_equal(kept, [0, *(max(1, count) for count in counts[1:])])

    options = METHODS["breadcrumbs"].options
    _, table = table_of(METHODS["breadcrumbs"], options, [base, parent], {"gamma": [0.1]})
    low, high = (np.asarray(table[key])[0][:, None] for key in ("threshold", "upper"))
    np.testing.assert_array_equal(((parent[None, :] >= low) & (parent[None, :] <= high)).sum(axis=1), counts)

    scores, table = table_of(METHODS["sce"], METHODS["sce"].options, [base, parent, -parent], {})
    kept = (scores[0][None, :].astype(int) < np.asarray(table["threshold"])[:, None]).sum(axis=1)
    # But for SCE, whose count torch takes in float32.
    counts = [int(torch.tensor(size) * (step / DENSITY_STEPS)) for step in range(DENSITY_STEPS + 1)]
    np.testing.assert_array_equal(kept, counts)


def test_grid_index_rounds_to_the_nearest_step_and_stays_inside() -> None:
    density = jnp.asarray([-0.2, 0.0, 0.0004, 0.0006, 0.5371, 0.9996, 1.0, 1.7], jnp.float32)
    np.testing.assert_array_equal(np.asarray(grid_index(density)), [0, 0, 0, 1, 537, 1000, 1000, 1000])


@pytest.mark.parametrize("name", sample(METHODS, 10))
def test_population_equals_one_by_one(name: str) -> None:
    """jit, vmap over candidates and the table give what single merges give."""
    method, parents = METHODS[name], count_of(name, 3)
    options, models = method.options, make_models(LARGE, parents)
    never: Numbers = {
        p.name: [p.default] * parents if p.per_parent else p.default for p in method.parameters if not p.searched
    }
    scores, table = table_of(method, options, models, never)
    rng = np.random.default_rng(0)
    population: dict[str, np.ndarray] = {}
    for parameter in method.parameters:
        if parameter.searched:
            size = (6, parents) if parameter.per_parent else (6,)
            low, high = (0.2, 0.8) if name in DELLA and parameter.quantised else (0.05, 1.0)
            values = rng.uniform(low, high, size)
            population[parameter.name] = np.rint(values * 1000) / 1000 if parameter.quantised else values
    # A method without anything to search still merges a population.
    population["candidate"] = np.arange(6.0)
    tensors = tuple(map(jnp.asarray, sources_of(options, models)))

    @jax.jit
    def all_at_once(numbers: dict[str, jax.Array]) -> jax.Array:
        def one(numbers: dict[str, jax.Array]) -> jax.Array:
            everything = numbers | on_device(never)
            statistics = look_up(method, table, everything)
            return combine(method, options, CombineInputs(tensors, scores, statistics, everything))  # type: ignore[arg-type]

        return jax.vmap(one)(numbers)

    found = np.asarray(all_at_once(on_device(population)))
    for p in range(6):
        alone = {key: values[p] for key, values in population.items() if key != "candidate"} | never
        assert_close(found[p], expected_merge(name, options, models, alone))


@pytest.mark.parametrize("name", sample(METHODS, 8))
def test_rows_may_be_merged_alone(name: str) -> None:
    """With the whole tensor's statistics, some rows give those rows of the merged tensor."""
    method, parents = METHODS[name], count_of(name, 2)
    models, rows = make_models(SMALL, parents), np.array([3, 0, 4, 3])
    everything = cases(name, parents)
    # One case per set of options, the last, where weights and densities differ.
    for options, parameters in {case[0]: case for case in everything}.values():
        sources = sources_of(options, models)
        prepared = prepare(method, options, sources, parameters, draws_of(SMALL))
        # Statistics of rows go with their rows.
        by_row = {
            key: values[rows] if options.axis == -1 and values.ndim == 2 else values
            for key, values in prepared.statistics.items()
        }
        inputs = CombineInputs(
            tuple(jnp.asarray(x[rows]) for x in sources),
            tuple(jnp.asarray(s[rows]) for s in prepared.mask_keys), by_row, on_device(parameters),
        )  # fmt: skip
        part = combine(method, options, inputs)
        np.testing.assert_allclose(np.asarray(part), merged(name, options, models, parameters)[rows], rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Random masks


def random_mask(
    name: str, density: float, seed: int = SEED, who: bytes = digest(0), shape: tuple[int, ...] = (400, 500),
    epsilon: float = 0.1,
) -> np.ndarray:  # fmt: skip
    """What is kept of a delta whose magnitudes rise along each row."""
    parameters = {"weight": [1.0], "density": [density], "lambda": 1.0}
    if name in DELLA:
        parameters["epsilon"] = [epsilon]
    rising = np.broadcast_to(np.arange(1, shape[-1] + 1, dtype=np.float32), shape)
    models = [np.zeros(shape, np.float32), np.ascontiguousarray(rising)]
    found = merged(name, Options(has_base=True), models, parameters, lambda k: draw_row_keys(seed, who, shape))
    kept = found != 0
    np.testing.assert_array_equal(found[kept], models[1][kept])
    return kept


@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 0.5371, 1.0])
def test_dare_keeps_where_the_draw_is_below_the_density(density: float) -> None:
    numbers = host_uniform(draw_row_keys(SEED, digest(0), (400, 500)), (400, 500))
    assert numbers.dtype == np.uint16
    np.testing.assert_array_equal(random_mask("dare_linear", density), numbers < round(density * 2**16))


@pytest.mark.parametrize(("name", "shape"), [("dare_linear", (400, 500)), ("della_linear", (200, 1000))])
def test_masks_are_nested_in_density(name: str, shape: tuple[int, ...]) -> None:
    masks = [random_mask(name, density, shape=shape) for density in (0.0, 0.15, 0.3, 0.31, 0.85, 1.0)]
    for halve_batches, larger in itertools.pairwise(masks):
        assert not (halve_batches & ~larger).any()
        assert halve_batches.sum() < larger.sum()
    assert masks[0].sum() == 0
    assert masks[-1].all()


@pytest.mark.parametrize("density", [0.02, 0.3, 0.7])
def test_masks_are_bernoulli(density: float) -> None:
    """The mean, the variance of counts in blocks, and no correlation between neighbours."""
    mask = random_mask("dare_linear", density).astype(float).ravel()
    spread = np.sqrt(density * (1 - density) / mask.size)
    assert abs(mask.mean() - density) < 4 * spread
    blocks = mask.reshape(-1, 100).sum(axis=1)
    # The sample variance of m near-normal counts has a relative spread of sqrt(2/m); allow 4.
    assert abs(blocks.var() / (100 * density * (1 - density)) - 1) < 4 * np.sqrt(2 / len(blocks)) + 0.02
    assert abs(np.corrcoef(mask[1:], mask[:-1])[0, 1]) < 4 / np.sqrt(mask.size)


def test_masks_depend_on_seed_and_digest_alone() -> None:
    again = random_mask("dare_linear", 0.5)
    np.testing.assert_array_equal(random_mask("dare_linear", 0.5), again)
    for other in (
        random_mask("dare_linear", 0.5, seed=SEED + 1),
        random_mask("dare_linear", 0.5, who=digest(1)),
        random_mask("dare_linear", 0.5, who=digest(0, "other tensor")),
    ):
        assert abs(np.corrcoef(again.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(again.size)


@pytest.mark.parametrize(("density", "epsilon"), [(0.3, 0.25), (0.5, 0.1), (0.7, 0.0), (0.6, 0.39)])
def test_della_keeps_with_a_probability_that_rises_with_the_rank(density: float, epsilon: float) -> None:
    """Per entry of a row over many rows, and per tenth of the ranks against mergekit's own random masks."""
    rows, width = 4000, 50
    kept = random_mask("della_linear", density, shape=(rows, width), epsilon=epsilon)
    # Magnitudes rise along each row.
    chance = (density - epsilon) + 2 * epsilon * np.arange(width) / (width - 1)
    spread = np.sqrt(chance * (1 - chance) / rows)
    assert (np.abs(kept.mean(axis=0) - chance) < 4.5 * spread).all()
    # Independent between rows and neighbours, as far as means tell.
    counts = kept.sum(axis=1)
    assert counts.var() == pytest.approx((chance * (1 - chance)).sum(), rel=5 * np.sqrt(2 / rows))

    rng = np.random.default_rng(3)
    base, parent = np.zeros((400, 250), np.float32), rng.normal(size=(400, 250)).astype(np.float32)
    torch.manual_seed(0)
    theirs = della_magprune(torch.tensor(parent), density, epsilon).numpy() != 0
    parameters = {"weight": [1.0], "density": [density], "lambda": 1.0, "epsilon": [epsilon]}
    ours = merged("della_linear", Options(has_base=True), [base, parent], parameters) != 0
    tenth = np.minimum((10 * rank_in_row(np.abs(parent))).astype(int), 9)
    for decile in range(10):
        inside = tenth == decile
        tolerance = 4.5 * np.sqrt(2 * density * (1 - density) / inside.sum())
        assert abs(ours[inside].mean() - theirs[inside].mean()) < tolerance


def test_della_ranks_run_along_the_second_axis_of_any_tensor() -> None:
    """As mergekit's do: vectors, matrices and tensors of three axes."""
    rng, density, epsilon = np.random.default_rng(4), 0.5, 0.45
    for shape in ((40_000,), (200, 200), (50, 40, 20)):
        parent = rng.normal(size=shape).astype(np.float32)
        parameters = {"weight": [1.0], "density": [density], "lambda": 1.0, "epsilon": [epsilon]}
        ours = merged("della_linear", Options(has_base=True), [np.zeros(shape, np.float32), parent], parameters) != 0
        torch.manual_seed(1)
        theirs = della_magprune(torch.tensor(parent), density, epsilon).numpy() != 0
        share = rank_in_row(np.abs(parent))
        for mask in (ours, theirs):
            # Kept with probability p: the mean of mask - p along ranks has a spread of about 0.5/sqrt(n).
            for low in np.arange(10) / 10:
                inside = (share >= low) & (share <= low + 0.1)
                expected = (density - epsilon) + 2 * epsilon * share[inside]
                assert abs((mask[inside] - expected).mean()) < 4.5 * 0.5 / np.sqrt(inside.sum())


@pytest.mark.parametrize("name", sample((*SYMMETRIC, *SPECTRAL), 5))
def test_permuting_parents_permutes_nothing_else(name: str) -> None:
    order = [1, 0] if METHODS[name].max_parents == 2 else [2, 0, 1]
    models = make_models(LARGE, len(order))
    swapped = [models[0], *(models[1 + k] for k in order)]
    for options, parameters in cases(name, len(order)):
        permuted = {k: np.asarray(v)[order] if np.ndim(v) else v for k, v in parameters.items()}
        found = merged(name, options, swapped, permuted, draws_of(LARGE, order))
        assert_close(found, merged(name, options, models, parameters), 3e-6)


def test_density_rescale_is_right_on_average() -> None:
    """The DARE paper's promise: the mean of the rescaled sparse delta is the delta; its variance is known, too."""
    base, parent = make_models((7,), 1)
    delta = parent.astype(np.float64) - base
    for density, weight in ((0.5, 1.0), (0.2, 0.6)):
        parameters = {"weight": [weight], "density": [density], "lambda": 1.0}
        options = Options(rescale="density", has_base=True)
        many = np.stack(
            [merged("dare_linear", options, [base, parent], parameters, draws_of((7,), seed=s)) for s in range(400)]
        )
        variance = (weight * delta) ** 2 * (1 - density) / density
        assert (np.abs(many.mean(axis=0) - (base + weight * delta)) <= 5 * np.sqrt(variance / 400) + 1e-6).all()
        # Two values only: the spread of the sample variance follows from the fourth moment.
        fourth = (1 - 2 * density) ** 2 / (density * (1 - density)) + 1
        ratio = many.var(axis=0) / variance
        assert (np.abs(ratio - 1) <= 5 * np.sqrt((fourth - 1) / 400) + 0.02).all()


def test_variance_of_dare_falls_with_the_number_of_entries() -> None:
    """One large constant delta: the mean over entries is 1, the variance over entries (1 - p) / p."""
    shape = (200_000,)
    base, parent = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    for density in (0.1, 0.5, 0.9):
        parameters = {"weight": [1.0], "density": [density], "lambda": 1.0}
        found = merged("dare_ties", Options(rescale="density", has_base=True), [base, parent], parameters)
        variance = (1 - density) / density
        assert abs(found.mean(dtype=np.float64) - 1) < 5 * np.sqrt(variance / found.size)
        assert found.var(dtype=np.float64) == pytest.approx(variance, rel=0.03)
        # The norm that l1 restores is restored exactly, not on average.
        restored = merged("dare_ties", Options(rescale="l1", has_base=True), [base, parent], parameters)
        assert restored.mean(dtype=np.float64) == pytest.approx(1, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Sign election


@pytest.mark.parametrize(("weight", "ratio"), [((0.3, 0.3), 1.0), ((0.1, 0.1), 1.0), ((0.3, 0.6), 0.5)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_exact_cancellation_elects_plus(weight: tuple[float, float], ratio: float, dtype: Any) -> None:
    """Weighted deltas that are equal and opposite: the sum is 0, and 0 counts as +, however it is compiled."""
    rng = np.random.default_rng(0)
    delta = (rng.integers(1, 256, (64, 32)) * rng.choice([-1, 1], (64, 32)) / 64).astype(dtype)
    sources = [np.zeros((64, 32), dtype), delta, (-ratio * delta.astype(np.float32)).astype(dtype)]
    method, normalized = METHODS["ties"], Options(True, has_base=True)
    parameters = {"weight": weight, "density": [1.0, 1.0], "lambda": 1.0}
    statistics = prepare(method, normalized, sources, parameters, draws_of((64, 32))).statistics
    numbers, tensors = on_device(parameters), tuple(map(jnp.asarray, sources))

    def run(numbers: dict[str, jax.Array]) -> jax.Array:
        return combine(method, normalized, CombineInputs(tensors, (), statistics, numbers))

    wide = np.stack([x.astype(np.float64) for x in sources[1:]])
    # Whichever of the two is positive is kept alone, and its weight divides out again.
    expected = wide.max(axis=0)
    for compiled in (run, jax.jit(run), jax.jit(lambda n: jax.vmap(run)(jax.tree.map(lambda x: x[None], n))[0])):
        np.testing.assert_allclose(np.asarray(compiled(numbers)), expected, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Laws

# Zeros are common and equal magnitudes too: 1/256 is the step.
tensors = arrays(np.float32, SMALL, elements=st.integers(-512, 512).map(lambda i: i / 256))
weights = st.integers(1, 96).map(lambda i: i / 64)
laws = settings(max_examples=200 if ALL else 15)


@laws
@given(st.data(), st.sampled_from(TABULATED))
def test_density_one_trims_nothing(data: st.DataObject, name: str) -> None:
    base, one, two = (data.draw(tensors) for _ in range(3))
    if name == "sce":
        found = merged(name, METHODS[name].options, [base, one, two], {"select_topk": 1.0})
        # The same signs are elected, and where one parent agrees alone it comes through.
        agrees = agreeing(np.stack([x.astype(np.float64) - base for x in (one, two)]))
        alone = [agrees[k] & ~agrees[1 - k] & (agrees.sum(0) == 1) for k in range(2)]
        squares = np.array([np.square(x.astype(np.float64) - base).mean() for x in (one, two)])
        assume((squares > 1e-4 * squares.sum()).all())
        for parent, mask in zip((one, two), alone, strict=True):
            np.testing.assert_allclose(found[mask], parent[mask], rtol=1e-5, atol=2e-5)
        return
    weight = [data.draw(weights), data.draw(weights)]
    parameters: Numbers = {"weight": weight, "density": [1.0, 1.0], "lambda": 1.0}
    parameters |= constants_for(name, np.ones(2), 0)
    found = merged(name, Options(rescale="l1", has_base=True), [base, one, two], parameters)
    if name not in ELECTED:
        plain = {"weight": weight, "lambda": 1.0}
        untrimmed = merged("task_arithmetic", Options(has_base=True), [base, one, two], plain)
    else:
        stack = np.stack([w * (x.astype(np.float64) - base) for w, x in zip(weight, (one, two), strict=True)])
        positive = stack.sum(0) >= 0
        untrimmed = base + np.where(positive, np.maximum(stack, 0), np.minimum(stack, 0)).sum(0)
    np.testing.assert_allclose(found, untrimmed, rtol=1e-5, atol=2e-5)


@laws
@given(tensors, tensors, weights)
def test_ties_of_one_parent_at_density_one_is_that_parent(base: np.ndarray, parent: np.ndarray, weight: float) -> None:
    parameters = {"weight": [weight], "density": [1.0], "lambda": 1.0}
    found = merged("ties", METHODS["ties"].options, [base, parent], parameters)
    np.testing.assert_allclose(found, parent, rtol=1e-5, atol=2e-6)


def lawful_numbers(data: st.DataObject, name: str) -> Numbers:
    """Numbers of two parents; densities at which DELLA's probabilities stay inside (0, 1)."""
    parameters: Numbers = {p.name: 0.25 if p.default is None else p.default for p in METHODS[name].parameters}
    for key, choices in (("weight", weights), ("density", st.sampled_from([0.2, 0.4, 0.6, 1.0]))):
        if key in parameters:
            parameters[key] = np.array([data.draw(choices), data.draw(choices)])
    if "select_topk" in parameters:
        parameters["select_topk"] = data.draw(st.sampled_from([0.25, 0.5, 1.0]))
    for key in ("epsilon", "gamma"):
        if key in parameters and METHODS[name].parameter(key).per_parent:
            parameters[key] = np.array([0.1, 0.15])
    return parameters


@laws
@given(st.data(), st.sampled_from(SYMMETRIC))
def test_swapping_two_parents_swaps_nothing_else(data: st.DataObject, name: str) -> None:
    """Zeros, ties and all: which entries are kept does not depend on the order of the parents."""
    base, one, two = (data.draw(tensors) for _ in range(3))
    options = data.draw(st.sampled_from(options_for(name)))
    if name in ("nuslerp", "multislerp", "karcher"):
        origin = base.astype(np.float64) if options.has_base else np.zeros(SMALL)
        inner = ((one - origin) * (two - origin)).sum()
        lengths = np.linalg.norm(one - origin) * np.linalg.norm(two - origin)
        # Opposite vectors have no great circle between them.
        assume(options.axis is None and inner > -0.99 * lengths)
    parameters = lawful_numbers(data, name)
    swapped = {k: np.asarray(v)[::-1] if np.ndim(v) else v for k, v in parameters.items()}
    forth = merged(name, options, [base, one, two], parameters)
    back = merged(name, options, [base, two, one], swapped, draws_of(SMALL, [1, 0]))
    np.testing.assert_allclose(back, forth, rtol=1e-5, atol=1e-5)


@laws
@given(st.data(), st.sampled_from(NORMALIZED), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_scaling_all_weights_changes_nothing_when_normalized(data: st.DataObject, name: str, factor: float) -> None:
    # Factors are powers of two, so that not even a rounding differs and no election can flip.
    models = [data.draw(tensors) for _ in range(3)]
    normalized = [options for options in options_for(name) if options.normalize or name == "nuslerp"]
    options = data.draw(st.sampled_from(normalized))
    parameters = lawful_numbers(data, name)
    one = merged(name, options, models, parameters)
    other = merged(name, options, models, parameters | {"weight": factor * parameters["weight"]})
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=2e-6)


@laws
@given(st.data(), tensors, tensors, tensors, weights)
def test_ends_of_an_arc_are_its_two_models(
    data: st.DataObject, base: np.ndarray, first: np.ndarray, second: np.ndarray, weight: float
) -> None:
    options = data.draw(st.sampled_from(options_for("nuslerp")))
    for t, expected in ((0.0, first), (1.0, second)):
        found = merged("slerp", METHODS["slerp"].options, [base, first, second], {"t": t})
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
        shares = [weight * (1 - t), weight * t]
        found = merged("nuslerp", options, [base, first, second], {"weight": shares})
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@laws
@given(tensors, tensors, st.integers(0, 64).map(lambda i: i / 64))
def test_slerp_is_symmetric(first: np.ndarray, second: np.ndarray, t: float) -> None:
    options = METHODS["slerp"].options
    forth = merged("slerp", options, [first, first, second], {"t": t})
    back = merged("slerp", options, [first, second, first], {"t": 1 - t})
    np.testing.assert_allclose(forth, back, rtol=1e-4, atol=1e-4)


@laws
@given(st.data(), tensors, tensors, st.sampled_from(BERNOULLI))
def test_a_larger_density_keeps_all_that_a_smaller_one_keeps(
    data: st.DataObject, base: np.ndarray, parent: np.ndarray, name: str
) -> None:
    steps = sorted(data.draw(st.lists(st.integers(200, 800), min_size=2, max_size=3)))
    constants = {"epsilon": [data.draw(st.sampled_from([0.0, 0.1, 0.199]))]} if name in DELLA else {}
    options, before = Options(has_base=True), np.zeros(SMALL, bool)
    for density in [0.0, *(step / 1000 for step in steps), 1.0]:
        parameters = {"weight": [1.0], "density": [density], "lambda": 1.0} | constants
        kept = merged(name, options, [base, parent], parameters) != base
        assert not (before & ~kept).any()
        before = kept
    np.testing.assert_array_equal(before, parent != base)


def test_slerp_of_near_parallel_tensors_is_linear() -> None:
    first = np.random.default_rng(0).normal(size=(30, 30)).astype(np.float32)
    second = 1.5 * first + 1e-4
    found = merged("slerp", METHODS["slerp"].options, [first, first, second], {"t": 0.3})
    np.testing.assert_allclose(found, 0.7 * first + 0.3 * second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_low_rank_changes_are_added_in_float32_and_rounded_once(rank: int, dtype: Any) -> None:
    rng = np.random.default_rng(rank)
    base = jnp.asarray(rng.normal(size=(2, 9, 14)), dtype)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((rank, 14), (2, 9, rank)))
    found = add_low_rank(base, a, b)
    assert found.dtype == dtype
    exact = np.asarray(base, np.float64) + b.astype(np.float64) @ a.astype(np.float64)
    # Half a unit in the last place of the dtype, and what float32 loses in the sum.
    np.testing.assert_allclose(
        np.asarray(found, np.float64), exact, rtol=float(jnp.finfo(dtype).eps) / 2 + 1e-6, atol=2e-6
    )
