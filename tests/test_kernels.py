"""Merge kernels against float64 NumPy written from the methods' formulas, and against the installed mergekit."""

import hashlib
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from merge_kernels import (
    DENSITY_STEPS,
    METHODS,
    Options,
    combine,
    draw_scores,
    grid_index,
    look_up,
    measure,
    measure_grid,
)

# Shapes and numbers of parents: vectors, matrices, odd sizes, a single entry.
SIZES = (((7,), 1), ((64,), 4), ((5, 9), 2), ((16, 32), 3), ((1, 1), 2))
# Two of them serve the other tests, so that little has to be compiled.
SMALL, LARGE = (5, 9), (16, 32)
RANDOM = [name for name, method in METHODS.items() if method.sparsifier is not None and method.sparsifier.random]
SPARSE = [name for name, method in METHODS.items() if method.sparsifier is not None]
BASED = [name for name, method in METHODS.items() if method.needs_base]
SEED = 11


def digest(k: int, tensor: str = "tensor") -> bytes:
    return hashlib.sha256(f"parent {k} {tensor}".encode()).digest()


def make_sources(name: str, shape: tuple[int, ...], parents: int, dtype: Any = np.float32) -> list[np.ndarray]:
    """The base (where the method needs one) and K parents; deltas of different sizes, no two magnitudes equal."""
    rng = np.random.default_rng([parents, *shape])
    base = rng.normal(size=shape)
    tuned = [base + 0.1 * (k + 1) * rng.normal(size=shape) for k in range(parents)]
    return [np.asarray(x, dtype) for x in ([base] if METHODS[name].needs_base else []) + tuned]


def scores_for(name: str, shape: tuple[int, ...], parents: int, order: Sequence[int] | None = None) -> Any:
    if name not in RANDOM:
        return None
    drawn = draw_scores(SEED, [digest(k) for k in order or range(parents)], shape)
    return list(np.asarray(drawn))


def merged(
    name: str,
    options: Options,
    sources: Sequence[np.ndarray],
    parameters: dict[str, Any],
    scores: Any = None,
    densities: Sequence[float] | None = None,
) -> np.ndarray:
    """One merge as a user of the kernels does it. `densities`: in float64, where float32 would count differently."""
    method = METHODS[name]
    exact = densities if densities is not None else parameters.get("density", ())
    statistics = measure(method, sources, scores, [float(d) for d in exact])
    numbers = {key: jnp.asarray(value, jnp.float32) for key, value in parameters.items()}
    tensors = tuple(jnp.asarray(x) for x in sources)
    return np.asarray(combine(method, options, tensors, scores, statistics, numbers))


def reference(
    name: str, options: Options, sources: Sequence[np.ndarray], parameters: dict[str, Any], scores: Any = None
) -> np.ndarray:
    """The methods' formulas in float64, entry by entry; ties at a threshold are all kept."""
    wide = [np.asarray(x, np.float64) for x in sources]
    if name == "linear":
        weight = np.asarray(parameters["weight"], np.float64)
        total = sum(w * x for w, x in zip(weight, wide, strict=True))
        return total / weight.sum() if options.normalize else total
    if name == "slerp":
        first, second, t = *wide, float(parameters["t"])
        lengths = [np.linalg.norm(x) if np.linalg.norm(x) > 1e-8 else 1.0 for x in wide]
        cosine = np.clip((first * second).sum() / (lengths[0] * lengths[1]), -1, 1)
        if abs(cosine) > 0.9995:
            return (1 - t) * first + t * second
        angle = np.arccos(cosine)
        return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)

    base, parents = wide[0], wide[1:]
    weight = np.asarray(parameters["weight"], np.float64)
    addends = []
    for k, parent in enumerate(parents):
        delta = parent - base
        kept = np.ones(delta.shape, bool)
        if name in SPARSE:
            density = float(parameters["density"][k])
            if name in RANDOM:
                kept = scores[k].astype(int) < round(density * 65536)
            elif density <= 0:
                kept[:] = False
            elif density < 1:
                count = max(1, int(density * delta.size))
                kept = np.abs(delta) >= np.sort(np.abs(delta), axis=None)[-count]
        sparse = np.where(kept, delta, 0.0)
        mass = np.abs(sparse).sum()
        if name in SPARSE and options.rescale == "l1" and mass >= 1e-7:
            sparse = sparse * np.abs(delta).sum() / mass
        if name in SPARSE and options.rescale == "density" and density > 0:
            sparse = sparse / density
        addends.append(weight[k] * sparse)
    stack = np.stack(addends)
    columns = weight.reshape(-1, *[1] * base.ndim)
    if name in ("task_arithmetic", "dare_linear"):
        total, divisor = stack.sum(0), np.asarray(weight.sum())
        divisor = np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
    else:
        elected = np.where(stack.sum(0) >= 0, 1.0, -1.0)
        agrees = np.sign(stack) == elected
        total, divisor = (stack * agrees).sum(0), (columns * agrees).sum(0)
        divisor = np.where(divisor == 0, 1.0, divisor)
    return base + parameters["lambda"] * (total / divisor if options.normalize else total)


def of_mergekit(
    name: str,
    options: Options,
    sources: Sequence[np.ndarray],
    parameters: dict[str, Any],
    scores: Any = None,
    monkeypatch: pytest.MonkeyPatch | None = None,
) -> np.ndarray:
    """The same merge by mergekit in float32. Its random masks are replaced by those of `scores`."""
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    tensors = [torch.tensor(np.asarray(x, np.float32)) for x in sources]
    based = METHODS[name].needs_base or name == "slerp"
    group = TensorGroup.from_tensors(tensors, base_index=0 if based else None)
    given = {key: list(value) if np.ndim(value) else float(value) for key, value in parameters.items()}
    if name != "slerp":
        given["normalize"] = options.normalize
    if name in BASED:
        given["rescale"] = options.rescale == "l1"
    if monkeypatch is not None and scores is not None:
        masks = iter([np.where(s.astype(int) < round(d * 65536), 1.0, 0.0) for s, d in _below_one(scores, parameters)])
        monkeypatch.setattr(torch, "bernoulli", lambda probabilities: torch.tensor(next(masks), dtype=torch.float32))
    return registry.get(name)([group], parameters=given)[0].numpy()


def _below_one(scores: Any, parameters: dict[str, Any]) -> list[tuple[np.ndarray, float]]:
    """mergekit draws nothing for a parent of density 1."""
    return [(s, d) for s, d in zip(scores, parameters["density"], strict=True) if d < 1]


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Within `tolerance` relative to each entry; sums that cancel are held to the tensor's own scale."""
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0.1 * tolerance * float(np.abs(expected).max()))


def cases(name: str, parents: int) -> list[tuple[Options, dict[str, Any]]]:
    """Options and parameters: densities of each kind, negative weights, weights that sum to zero where they may."""
    method = METHODS[name]
    if name == "slerp":
        return [(method.options, {"t": t}) for t in (0.0, 0.25, 0.5, 1.0, 1.2, -0.3)]
    # Multiples of 1/64, so that weights which cancel do so in every precision.
    spread = np.rint(64 * np.linspace(0.2, 0.9, parents)) / 64
    negative = spread * np.where(np.arange(parents) % 2, -0.5, 1.0)
    opposed = np.resize([0.5, -0.25, -0.25, 0.75], parents) if parents != 2 else np.array([0.5, -0.5])
    opposed[-1] -= opposed.sum()
    rows = []
    for normalize in (False, True):
        weights = [spread, negative] if parents > 1 else [spread, -spread]
        if parents > 1 and not (name == "linear" and normalize):
            weights.append(opposed)
        for i, weight in enumerate(weights):
            if name == "linear":
                rows.append((Options(normalize), {"weight": weight}))
                continue
            scale = (1.0, 0.7, 1.3)[i]
            if name == "task_arithmetic":
                rows.append((Options(normalize), {"weight": weight, "lambda": scale}))
                continue
            for density in (np.zeros(parents), np.full(parents, 0.001), np.full(parents, 0.3), np.ones(parents)):
                mixed = density if i else np.roll(np.resize([0.3, density[0], 0.7], parents), 1)
                for rescale in ("none", "l1"):
                    rows.append((Options(normalize, rescale), {"weight": weight, "density": mixed, "lambda": scale}))
    return rows


@pytest.mark.parametrize(("shape", "parents"), SIZES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_methods_equal_float64_formulas_and_mergekit(
    name: str, shape: tuple[int, ...], parents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = min(parents, METHODS[name].max_parents or parents)
    parents = max(parents, METHODS[name].min_parents)
    sources, scores = make_sources(name, shape, parents), scores_for(name, shape, parents)
    for options, parameters in cases(name, parents):
        found = merged(name, options, sources, parameters, scores)
        assert found.dtype == np.float32
        assert found.shape == shape
        assert_close(found, reference(name, options, sources, parameters, scores))
        assert_close(found, of_mergekit(name, options, sources, parameters, scores, monkeypatch))


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_inputs_are_merged_in_float32(name: str) -> None:
    parents = METHODS[name].max_parents or 3
    sources = make_sources(name, LARGE, parents, ml_dtypes.bfloat16)
    scores = scores_for(name, LARGE, parents)
    for options, parameters in cases(name, parents):
        # The reference keeps every entry that ties at the threshold, as the kernels promise.
        assert_close(
            merged(name, options, sources, parameters, scores), reference(name, options, sources, parameters, scores)
        )


def test_ties_keeps_every_entry_at_the_threshold() -> None:
    base = np.zeros((4, 4), np.float32)
    parent = np.full((4, 4), 0.5, np.float32)
    parent[0] = 2.0
    found = merged("ties", Options(True), [base, parent], {"weight": [1.0], "density": [0.5], "lambda": 1.0})
    # int(0.5 * 16) = 8 entries; the eighth largest ties with all the small ones.
    np.testing.assert_array_equal(found, parent)


def test_density_option_divides_by_the_density() -> None:
    for name in SPARSE:
        sources, scores = make_sources(name, LARGE, 3), scores_for(name, LARGE, 3)
        options = Options(False, "density")
        parameters = {"weight": [0.4, 0.3, 0.5], "density": [0.2, 0.55, 1.0], "lambda": 1.0}
        assert_close(
            merged(name, options, sources, parameters, scores), reference(name, options, sources, parameters, scores)
        )


@pytest.mark.parametrize("name", BASED)
def test_parents_equal_to_the_base_give_the_base(name: str) -> None:
    base = make_sources(name, SMALL, 1)[0]
    scores = scores_for(name, SMALL, 2)
    for options, parameters in cases(name, 2):
        np.testing.assert_array_equal(merged(name, options, [base, base, base], parameters, scores), base)


@pytest.mark.parametrize("name", SPARSE)
def test_one_zero_delta_among_others(name: str) -> None:
    sources = make_sources(name, LARGE, 2)
    sources.append(sources[0])
    scores = scores_for(name, LARGE, 3)
    for options, parameters in cases(name, 3):
        assert_close(
            merged(name, options, sources, parameters, scores), reference(name, options, sources, parameters, scores)
        )


# ---------------------------------------------------------------------------------------------------------------
# The table that a search looks densities up in


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("shape", [(1, 1), SMALL], ids=str)
def test_table_equals_exact_measurement_on_the_grid(name: str, shape: tuple[int, ...]) -> None:
    method, sources, scores = METHODS[name], make_sources(name, shape, 2), scores_for(name, shape, 2)
    table = measure_grid(method, sources, scores)
    for values in table.values():
        assert values.shape == (2, DENSITY_STEPS + 1)
    for step in (0, 1, 2, 7, 290, 333, 500, 537, 571, 999, 1000):
        density = step / DENSITY_STEPS
        exact = measure(method, sources, scores, [density, 1 - density])
        numbers = {"density": jnp.asarray([density, 1 - density], jnp.float32)}
        found = look_up(method, {key: jnp.asarray(rows) for key, rows in table.items()}, numbers)
        np.testing.assert_array_equal(np.asarray(found["threshold"]), exact["threshold"])
        np.testing.assert_allclose(np.asarray(found["l1_scale"]), exact["l1_scale"], rtol=1e-6)


def test_table_counts_as_python_does() -> None:
    """`int(density * n)` in float64 for every density of the grid; float32 products give other counts."""
    size, method = 1000, METHODS["ties"]
    base = np.zeros(size, np.float32)
    parent = np.arange(1, size + 1, dtype=np.float32)
    table = measure_grid(method, [base, parent], None)
    kept = (parent[None, :] >= table["threshold"][0][:, None]).sum(axis=1)
    expected = [0] + [max(1, int(step / DENSITY_STEPS * size)) for step in range(1, DENSITY_STEPS + 1)]
    np.testing.assert_array_equal(kept, expected)


def test_grid_index_rounds_to_the_nearest_step_and_stays_inside() -> None:
    density = jnp.asarray([-0.2, 0.0, 0.0004, 0.0006, 0.5371, 0.9996, 1.0, 1.7], jnp.float32)
    np.testing.assert_array_equal(np.asarray(grid_index(density)), [0, 0, 0, 1, 537, 1000, 1000, 1000])


@pytest.mark.parametrize("name", METHODS)
def test_population_equals_one_by_one(name: str) -> None:
    """jit, vmap over candidates and the table give what single merges give."""
    method, shape = METHODS[name], LARGE
    parents = METHODS[name].max_parents or 3
    sources, scores = make_sources(name, shape, parents), scores_for(name, shape, parents)
    table = {key: jnp.asarray(rows) for key, rows in measure_grid(method, sources, scores).items()}
    rng = np.random.default_rng(0)
    population: dict[str, np.ndarray] = {}
    for parameter in method.parameters:
        size = (6, parents) if parameter.per_parent else (6,)
        values = rng.uniform(0.05, 1.0, size)
        population[parameter.name] = np.rint(values * 1000) / 1000 if parameter.name == "density" else values

    @jax.jit
    def all_at_once(numbers: dict[str, jax.Array]) -> jax.Array:
        def one(numbers: dict[str, jax.Array]) -> jax.Array:
            statistics = look_up(method, table, numbers)
            return combine(method, method.options, tuple(map(jnp.asarray, sources)), scores, statistics, numbers)

        return jax.vmap(one)(numbers)

    found = np.asarray(all_at_once({key: jnp.asarray(values, jnp.float32) for key, values in population.items()}))
    for p in range(6):
        alone = {key: values[p] for key, values in population.items()}
        assert_close(found[p], reference(name, method.options, sources, alone, scores))


@pytest.mark.parametrize("name", METHODS)
def test_rows_may_be_merged_alone(name: str) -> None:
    """With the whole tensor's statistics, some rows give those rows of the merged tensor."""
    method, parents = METHODS[name], 2
    sources, scores = make_sources(name, SMALL, parents), scores_for(name, SMALL, parents)
    options, parameters = cases(name, parents)[-1]
    numbers = {key: jnp.asarray(value, jnp.float32) for key, value in parameters.items()}
    statistics = measure(method, sources, scores, [float(d) for d in parameters.get("density", ())])
    rows = np.array([3, 0, 4, 3])
    part = combine(
        method, options, tuple(jnp.asarray(x[rows]) for x in sources),
        None if scores is None else [s[rows] for s in scores], statistics, numbers,
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(part), merged(name, options, sources, parameters, scores)[rows], rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# DARE's random masks


def dare_mask(density: float, seed: int = SEED, who: bytes = digest(0), size: int = 200_000) -> np.ndarray:
    scores = draw_scores(seed, [who], (size,))
    parameters = {"weight": [1.0], "density": [density], "lambda": 1.0}
    sources = [np.zeros(size, np.float32), np.ones(size, np.float32)]
    found = merged("dare_linear", Options(False), sources, parameters, list(np.asarray(scores)))
    assert set(np.unique(found)) <= {0.0, 1.0}
    return found.astype(bool)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 0.5371, 1.0])
def test_mask_is_score_below_threshold(density: float) -> None:
    score = np.asarray(draw_scores(SEED, [digest(0)], (200_000,)))[0]
    assert score.dtype == np.uint16
    np.testing.assert_array_equal(dare_mask(density), score.astype(int) < round(density * 2**16))


def test_masks_are_nested_in_density() -> None:
    masks = [dare_mask(density) for density in (0.0, 0.05, 0.3, 0.31, 0.9, 1.0)]
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()
        assert smaller.sum() < larger.sum()
    assert masks[0].sum() == 0
    assert masks[-1].all()


@pytest.mark.parametrize("density", [0.02, 0.3, 0.7])
def test_masks_are_bernoulli(density: float) -> None:
    """The mean, the variance of counts in blocks, and no correlation between neighbours."""
    mask = dare_mask(density).astype(float)
    spread = np.sqrt(density * (1 - density) / mask.size)
    assert abs(mask.mean() - density) < 4 * spread
    blocks = mask.reshape(-1, 100).sum(axis=1)
    # The sample variance of m near-normal counts has a relative spread of sqrt(2/m); allow 4.
    assert abs(blocks.var() / (100 * density * (1 - density)) - 1) < 4 * np.sqrt(2 / len(blocks)) + 0.02
    assert abs(np.corrcoef(mask[1:], mask[:-1])[0, 1]) < 4 / np.sqrt(mask.size)


def test_masks_depend_on_seed_and_digest_alone() -> None:
    again = dare_mask(0.5)
    np.testing.assert_array_equal(dare_mask(0.5), again)
    for other in (
        dare_mask(0.5, seed=SEED + 1),
        dare_mask(0.5, who=digest(1)),
        dare_mask(0.5, who=digest(0, "other tensor")),
    ):
        assert abs(np.corrcoef(again, other)[0, 1]) < 4 / np.sqrt(again.size)


def test_mask_of_a_parent_does_not_depend_on_the_others() -> None:
    alone = np.asarray(draw_scores(SEED, [digest(2)], LARGE))[0]
    among = np.asarray(draw_scores(SEED, [digest(0), digest(1), digest(2)], LARGE))[2]
    np.testing.assert_array_equal(alone, among)


@pytest.mark.parametrize("name", BASED)
def test_permuting_parents_permutes_nothing_else(name: str) -> None:
    order, shape = [2, 0, 1], LARGE
    sources = make_sources(name, shape, 3)
    for options, parameters in cases(name, 3):
        straight = merged(name, options, sources, parameters, scores_for(name, shape, 3))
        permuted = {k: np.asarray(v)[order] if np.ndim(v) else v for k, v in parameters.items()}
        swapped = [sources[0], *(sources[1 + k] for k in order)]
        assert_close(merged(name, options, swapped, permuted, scores_for(name, shape, 3, order)), straight, 2e-6)


@pytest.mark.parametrize("name", RANDOM)
def test_l1_rescale_restores_each_delta_s_norm(name: str) -> None:
    sources, scores = make_sources(name, LARGE, 1), scores_for(name, LARGE, 1)
    for density in (0.05, 0.3, 1.0):
        found = merged(
            name, Options(False, "l1"), sources, {"weight": [1.0], "density": [density], "lambda": 1.0}, scores
        )
        delta = sources[1].astype(np.float64) - sources[0]
        np.testing.assert_allclose(np.abs(found - sources[0].astype(np.float64)).sum(), np.abs(delta).sum(), rtol=1e-4)


def test_density_rescale_is_right_on_average() -> None:
    """The DARE paper's promise: the expectation of the rescaled sparse delta is the delta."""
    sources = make_sources("dare_linear", (7,), 1)
    parameters = {"weight": [1.0], "density": [0.5], "lambda": 1.0}
    draws = [
        merged("dare_linear", Options(False, "density"), sources, parameters, list(np.asarray(scores)))
        for scores in (draw_scores(seed, [digest(0)], (7,)) for seed in range(400))
    ]
    delta = np.abs(sources[1] - sources[0])
    # Each draw is 0 or 2 delta: a spread of delta, over 400 draws.
    assert (np.abs(np.mean(draws, axis=0) - sources[1]) <= 5 * delta / np.sqrt(400) + 1e-6).all()


# ---------------------------------------------------------------------------------------------------------------
# Sign election


@pytest.mark.parametrize(("weight", "ratio"), [((0.3, 0.3), 1.0), ((0.1, 0.1), 1.0), ((0.3, 0.6), 0.5)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_exact_cancellation_elects_plus(weight: tuple[float, float], ratio: float, dtype: Any) -> None:
    """Weighted deltas that are equal and opposite: the sum is 0, and 0 counts as +, however it is compiled."""
    rng = np.random.default_rng(0)
    delta = (rng.integers(1, 256, (64, 32)) * rng.choice([-1, 1], (64, 32)) / 64).astype(dtype)
    sources = [np.zeros((64, 32), dtype), delta, (-ratio * delta.astype(np.float32)).astype(dtype)]
    method, normalized = METHODS["ties"], Options(True)
    statistics = measure(method, sources, None, [1.0, 1.0])
    numbers = {"weight": jnp.asarray(weight, jnp.float32), "density": jnp.ones(2), "lambda": jnp.float32(1.0)}
    run = partial(combine, method, normalized, tuple(map(jnp.asarray, sources)), None, statistics)
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
laws = settings(max_examples=60, deadline=None, derandomize=True)


@laws
@given(st.data(), st.sampled_from(SPARSE))
def test_density_one_trims_nothing(data: st.DataObject, name: str) -> None:
    base, one, two = (data.draw(tensors) for _ in range(3))
    weight = [data.draw(weights), data.draw(weights)]
    parameters = {"weight": weight, "density": [1.0, 1.0], "lambda": 1.0}
    scores = scores_for(name, SMALL, 2)
    found = merged(name, Options(False, "l1"), [base, one, two], parameters, scores)
    if METHODS[name].kind == "sum":
        untrimmed = merged("task_arithmetic", Options(False), [base, one, two], {"weight": weight, "lambda": 1.0})
    else:
        stack = np.stack([w * (x.astype(np.float64) - base) for w, x in zip(weight, (one, two), strict=True)])
        assume(np.abs(stack.sum(0)).min() > 1e-5 * np.abs(stack).max() or not stack.any())
        positive = stack.sum(0) >= 0
        untrimmed = base + np.where(positive, np.maximum(stack, 0), np.minimum(stack, 0)).sum(0)
    np.testing.assert_allclose(found, untrimmed, rtol=1e-5, atol=2e-5)


@laws
@given(tensors, tensors, weights)
def test_ties_of_one_parent_at_density_one_is_that_parent(base: np.ndarray, parent: np.ndarray, weight: float) -> None:
    parameters = {"weight": [weight], "density": [1.0], "lambda": 1.0}
    found = merged("ties", METHODS["ties"].options, [base, parent], parameters)
    np.testing.assert_allclose(found, parent, rtol=1e-5, atol=2e-6)


@laws
@given(st.data(), st.sampled_from(["linear", *BASED]), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_scaling_all_weights_changes_nothing_when_normalized(data: st.DataObject, name: str, factor: float) -> None:
    # Factors are powers of two, so that not even a rounding differs and no election can flip.
    count = 2 + METHODS[name].needs_base
    sources = [data.draw(tensors) for _ in range(count)]
    weight = np.array([data.draw(weights), data.draw(weights)], np.float32)
    parameters: dict[str, Any] = {"weight": weight}
    if METHODS[name].needs_base:
        parameters["lambda"] = 1.0
    if name in SPARSE:
        parameters["density"] = [0.6, 0.6]
    scores = scores_for(name, SMALL, 2)
    one = merged(name, Options(True), sources, parameters, scores)
    other = merged(name, Options(True), sources, parameters | {"weight": factor * weight}, scores)
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=2e-6)


@laws
@given(tensors, tensors)
def test_slerp_ends_are_its_two_models(first: np.ndarray, second: np.ndarray) -> None:
    for t, expected in ((0.0, first), (1.0, second)):
        found = merged("slerp", METHODS["slerp"].options, [first, second], {"t": t})
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@laws
@given(tensors, tensors, st.integers(0, 64).map(lambda i: i / 64))
def test_slerp_is_symmetric(first: np.ndarray, second: np.ndarray, t: float) -> None:
    options = METHODS["slerp"].options
    forth = merged("slerp", options, [first, second], {"t": t})
    back = merged("slerp", options, [second, first], {"t": 1 - t})
    np.testing.assert_allclose(forth, back, rtol=1e-4, atol=1e-4)


def test_slerp_of_near_parallel_tensors_is_linear() -> None:
    first = np.random.default_rng(0).normal(size=(30, 30)).astype(np.float32)
    second = 1.5 * first + 1e-4
    found = merged("slerp", METHODS["slerp"].options, [first, second], {"t": 0.3})
    np.testing.assert_allclose(found, 0.7 * first + 0.3 * second, rtol=1e-5, atol=1e-6)
