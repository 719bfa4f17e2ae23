"""Kernels that loop over many parents: as exact as those of few, in programs that do not grow."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.sampling import sample
from merge_kernels import (
    METHODS,
    CombineInputs,
    Method,
    combine,
    combine_differentiable,
    look_up,
    look_up_differentiable,
    prepare,
    tabulate,
)
from merge_kernels.sums import UNROLLED
from reference.unrolled import unrolled_merge
from test_kernels import (
    Numbers,
    cases,
    check,
    draws_of,
    expected_merge,
    make_models,
    on_device,
    sources_of,
)

# More than are written out, by a number that fills no block of the loop.
MANY = UNROLLED + 4
SHAPE = (5, 9)
# What takes more than two parents.
LOOPING = [name for name, method in METHODS.items() if method.max_parents is None]
SEARCHED = {"weight": 0.4, "density": 0.6, "lambda": 1.1, "select_topk": 0.6, "epsilon": 0.1, "gamma": 0.01,
            "eps": 1e-8, "max_iter": 10, "maxiter": 100, "ftol": 1e-20, "tol": 1e-5, "r": 0.3,
            "alpha": 2.0, "rank_share": 0.8, "common_share": 0.8, "core_density": 0.01, "steps": 30.0,
            "filter": 0.7}  # fmt: skip


def numbers_of(method: Method, parents: int) -> Numbers:
    """A value of every parameter; those of parents differ."""
    slope = np.linspace(0.8, 1.2, parents)
    return {
        p.name: SEARCHED[p.name] * slope if p.per_parent and p.searched
        else np.full(parents, SEARCHED[p.name]) if p.per_parent else np.float64(SEARCHED[p.name])
        for p in method.parameters
    }  # fmt: skip


def stacked(arrays: Sequence[np.ndarray]) -> Any:
    return jnp.asarray(np.stack(arrays)) if len(arrays) else ()


@pytest.mark.parametrize("name", sample(LOOPING, 3))
def test_many_parents_equal_float64_formulas_and_mergekit(name: str) -> None:
    models = make_models(SHAPE, MANY)
    # The second of each kind of options has, of the sparse methods, a norm that is restored.
    by_options = {options: parameters for options, parameters in cases(name, MANY) if options.rescale != "none"}
    by_options = by_options or dict(cases(name, MANY))
    for options, parameters in by_options.items():
        check(name, options, models, parameters)


@pytest.mark.parametrize(("parents", "dtype"), sample([(3, np.float32), (8, ml_dtypes.bfloat16)], 1))
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties"])
def test_few_parents_are_merged_as_ever_to_the_bit(name: str, parents: int, dtype: Any) -> None:
    method, options = METHODS[name], METHODS[name].options
    models = make_models((16, 33), parents, dtype)
    # Zeros of both signs, and deltas that cancel.
    models[0][:2] = 0.0
    models[1][:2] = -0.0
    models[2][2] = 2 * models[0][2] - models[1][2]
    sources, numbers = tuple(map(jnp.asarray, sources_of(options, models))), numbers_of(method, parents)
    prepared = prepare(method, options, sources_of(options, models), numbers, draws_of(models[0].shape))
    thresholds = prepared.statistics.get("threshold", np.zeros(parents, np.float32))

    def as_ever(sources: Any, thresholds: Any, parameters: Any) -> jax.Array:
        return unrolled_merge(name, options, sources, lambda k, delta: jnp.abs(delta) >= thresholds[k], parameters)

    expected = jax.jit(as_ever)(sources, thresholds, on_device(numbers))
    merge = jax.jit(lambda *given: combine(method, options, CombineInputs(given[0], (), given[1], given[2])))
    for given in (sources, jnp.stack(sources)):
        assert np.asarray(merge(given, prepared.statistics, on_device(numbers))).tobytes() == expected.tobytes()


def lowered(name: str, parents: int, function: Callable[..., Any]) -> str:
    """The program of a function of (sources, mask keys, statistics, parameters) for so many parents."""
    method = METHODS[name]
    models = make_models((4,), parents)
    numbers = numbers_of(method, parents)
    prepared = tabulate(method, method.options, sources_of(method.options, models), numbers, draws_of((4,)))
    arguments = (stacked(sources_of(method.options, models)), stacked(prepared.mask_keys), prepared.statistics)
    return jax.jit(function).lower(*arguments, on_device(numbers)).as_text()


@pytest.mark.parametrize("name", sample(LOOPING, 2))
def test_programs_do_not_grow_with_the_parents(name: str) -> None:
    method = METHODS[name]

    def merge(sources: Any, mask_keys: Any, table: Any, parameters: Any) -> jax.Array:
        statistics = look_up_differentiable(method, table, parameters)
        inputs = CombineInputs(sources, mask_keys, statistics, parameters)
        return combine_differentiable(method, method.options, inputs)

    def slope(sources: Any, mask_keys: Any, table: Any, parameters: Any) -> Any:
        return jax.grad(lambda own: merge(sources, mask_keys, table, own).sum())(parameters)

    # All slopes are made by the same rules, and take longer to trace.
    for function in (merge, slope) if name in ("linear", "ties", "dare_linear") else (merge,):
        few, many = (lowered(name, UNROLLED + more, function).count(" = ") for more in (4, 40))
        # JAX 0.12 lowers a stack of mask keys as two instructions each.
        written_out = 2 * 36 if name.startswith("dare") and jax.__version_info__ >= (0, 11) else 0
        assert 0 < few <= many <= few + written_out


def test_gradients_of_many_parents_keep_no_layer_for_each() -> None:
    method, options = METHODS["ties"], METHODS["ties"].options
    shape = (256, 256)

    def temporaries(parents: int) -> int:
        def goal(parameters: Any, sources: Any, thresholds: Any) -> jax.Array:
            inputs = CombineInputs(sources, (), {"threshold": thresholds}, parameters)
            return combine(method, options, inputs).sum()

        float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        parameters = {"weight": float32(parents), "density": float32(parents), "lambda": float32()}
        arguments = (parameters, float32(parents + 1, *shape), float32(parents))
        memory = jax.jit(jax.grad(goal)).lower(*arguments).compile().memory_analysis()
        return int(memory.temp_size_in_bytes)

    layer = 4 * 256 * 256
    assert temporaries(UNROLLED + 40) - temporaries(UNROLLED + 8) < layer


@pytest.mark.parametrize("name", ["linear", "dare_ties", "sce"])
def test_many_parents_are_merged_alike_stacked_and_apart(name: str) -> None:
    method, options = METHODS[name], METHODS[name].options
    numbers, sources = numbers_of(method, MANY), sources_of(options, make_models(SHAPE, MANY))
    prepared = tabulate(method, options, sources, numbers, draws_of(SHAPE))
    table = {key: jnp.asarray(rows) for key, rows in prepared.statistics.items()}

    @jax.jit
    def merge(sources: Any, mask_keys: Any, parameters: Any) -> jax.Array:
        statistics = look_up(method, table, parameters)
        return combine(method, options, CombineInputs(sources, mask_keys, statistics, parameters))

    apart, together = (
        np.asarray(merge(shape(sources), shape(prepared.mask_keys), on_device(numbers)))
        for shape in (lambda arrays: tuple(map(jnp.asarray, arrays)), stacked)
    )
    np.testing.assert_array_equal(apart, together)


@pytest.mark.parametrize(("name", "parameter"), [("linear", "weight"), ("dare_ties", "weight"), ("ties", "density")])
def test_gradients_of_many_parents_equal_differences_of_float64_formulas(name: str, parameter: str) -> None:
    from merge_kernels.gradients import HALF_WIDTH

    method, options, shape = METHODS[name], METHODS[name].options, (16, 32)
    models, numbers, draws = make_models(shape, MANY), numbers_of(method, MANY), draws_of(shape)
    numbers = {key: np.round(value, 3) for key, value in numbers.items()}
    prepared = tabulate(method, options, sources_of(options, models), numbers, draws)
    sources, keys = stacked(sources_of(options, models)), stacked(prepared.mask_keys)
    table = {key: jnp.asarray(rows) for key, rows in prepared.statistics.items()}
    cotangent = np.random.default_rng(5).normal(size=shape)

    @jax.jit
    def slope(parameters: Any) -> Any:
        def goal(own: Any) -> jax.Array:
            statistics = look_up_differentiable(method, table, own)
            inputs = CombineInputs(sources, keys, statistics, own)
            return jnp.sum(cotangent * combine_differentiable(method, options, inputs))

        return jax.grad(goal)(parameters)

    found = slope(on_device(numbers))[parameter]
    step = HALF_WIDTH if parameter == "density" else 1e-5
    for k in (0, 5, MANY - 1):
        moved = [numbers | {parameter: numbers[parameter] + by * np.eye(MANY)[k]} for by in (step, -step)]
        at = [(expected_merge(name, options, models, changed, draws) * cotangent).sum() for changed in moved]
        np.testing.assert_allclose(found[k], (at[0] - at[1]) / (2 * step), rtol=2e-3, atol=2e-3)
