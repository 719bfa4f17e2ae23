"""Merges of one random tensor, many times over: the kernels apart from models."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from merge_kernels import METHODS, CombineInputs, Method, combine, draw_row_keys, look_up, tabulate

from evojax_merge.errors import Failed

WIDTH = 1024
# Entries that may differ between two ways of computing one merge: a threshold or an election that rounding decides.
MAX_DECIDED_BY_ROUNDING = 1e-4

# Parameters of P candidates `[P, ...]`, and statistics that each of them has for itself (see `candidates_of`).
Candidates = tuple[dict[str, jax.Array], dict[str, jax.Array]]


@dataclass(frozen=True)
class MergeProblem:
    """One tensor to merge in P ways. `sources`: base first where the method takes deltas; `numbers`: float64[P, ...];
    `constants`: the parameters that are never searched, float64."""

    method: Method
    sources: tuple[np.ndarray, ...]
    numbers: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]

    @property
    def parents(self) -> int:
        return len(self.sources) - int(self.method.options.has_base)

    @property
    def size(self) -> int:
        return self.sources[0].size


# ---------------------------------------------------------------------------------------------------------------
# What is merged


def build_problem(name: str, size: int, parents: int, candidates: int, dtype: str) -> MergeProblem:
    """Random tensors a small step away from their base, and random recipes around the middle of their range."""
    method = METHODS[name]
    parents = min(max(parents, method.min_parents), method.max_parents or parents)
    rng = np.random.default_rng(0)
    shape = (size // WIDTH, WIDTH)

    def noise(scale: float) -> np.ndarray:
        return np.float32(scale) * rng.standard_normal(shape, np.float32)

    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    base = noise(0.02)
    models = [base + noise(0.002 * (k + 1)) for k in range(parents)]
    sources = [base, *models] if method.options.has_base else models
    numbers, constants = {}, {}
    for parameter in method.parameters:
        shape_of_value = (parents,) if parameter.per_parent else ()
        if not parameter.searched:
            assert parameter.default is not None
            constants[parameter.name] = np.full(shape_of_value, parameter.default, np.float64)
            continue
        middle, reach = (parameter.low + parameter.high) / 2, (parameter.high - parameter.low) / 2
        # Densities stay near one half, so that DELLA's stay possible and all methods do like work.
        step = (0.1 if parameter.quantised else 0.8 * reach) * rng.uniform(-1, 1, (candidates, *shape_of_value))
        numbers[parameter.name] = np.round(middle + step, 3)
    return MergeProblem(method, tuple(x.astype(stored) for x in sources), numbers, constants)


def seed_of(parent: int) -> bytes:
    return hashlib.sha256(bytes([parent])).digest()


def candidates_of(problem: MergeProblem, statistics: Mapping[str, np.ndarray], count: int) -> Candidates:
    """The population on the device. Where nothing is searched each candidate has a copy of the statistics, or the
    compiler would merge once and copy."""
    parameters = dict(problem.numbers)
    for name, value in problem.constants.items():
        parameters[name] = np.broadcast_to(value, (count, *value.shape))
    copies = {} if problem.numbers else {k: np.broadcast_to(v, (count, *v.shape)) for k, v in statistics.items()}
    return (
        {name: jnp.asarray(value, jnp.float32) for name, value in parameters.items()},
        {name: jnp.asarray(value) for name, value in copies.items()},
    )


# ---------------------------------------------------------------------------------------------------------------
# What is timed


class Kernels:
    """The compiled forms of one problem, and its data on the device."""

    def __init__(self, problem: MergeProblem, count: int) -> None:
        self.problem = problem
        prepared = self.tabulate()
        self.is_prepared = bool(prepared.mask_keys or prepared.statistics)
        self.candidates = candidates_of(problem, prepared.statistics, count)
        table = prepared.statistics if problem.numbers else {}
        self.shared: Any = (
            tuple(map(jnp.asarray, problem.sources)),
            tuple(map(jnp.asarray, prepared.mask_keys)),
            {name: jnp.asarray(rows) for name, rows in table.items()},
        )
        method, options = problem.method, problem.method.options

        def one(shared: Any, candidate: Any) -> jax.Array:
            (sources, mask_keys, table), (parameters, copies) = shared, candidate
            statistics = look_up(method, {**table, **copies}, parameters)
            return combine(method, options, CombineInputs(sources, mask_keys, statistics, parameters))

        def scan(merge: Callable[[Any, Any], jax.Array], shared: Any, candidates: Any) -> jax.Array:
            # The largest of all results, entry by entry: each one is needed, and none has memory of its own.
            def step(carry: jax.Array, candidate: Any) -> tuple[jax.Array, None]:
                merged = merge(*jax.lax.optimization_barrier((shared, candidate)))
                return jnp.maximum(carry, merged), None

            start = jnp.full(problem.sources[0].shape, -jnp.inf, jnp.float32)
            return jax.lax.scan(step, start, candidates)[0]

        self.one = jax.jit(one)
        self.scan = jax.jit(partial(scan, one)).lower(self.shared, self.candidates).compile()
        self.constants = np.linspace(0, 1, count, dtype=np.float32)
        self.one_add = jax.jit(partial(scan, lambda x, c: x.astype(jnp.float32) + c))

    def tabulate(self) -> Any:
        problem = self.problem
        shape = problem.sources[0].shape
        return tabulate(
            problem.method, problem.method.options, problem.sources, problem.constants,
            lambda k: draw_row_keys(0, seed_of(k), shape),
        )  # fmt: skip

    def check(self) -> None:
        """The scan gives the largest of the candidates' merges, each made alone."""
        alone = [
            np.asarray(self.one(self.shared, jax.tree.map(lambda leaf, i=i: leaf[i], self.candidates)))
            for i in range(len(self.constants))
        ]
        largest = self.scan(self.shared, self.candidates)
        require_equal(f"{self.problem.method.name}: in the scan and alone", largest, np.maximum.reduce(alone))


def require_equal(what: str, merged: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Raises Failed where two ways of computing one merge differ beyond rounding."""
    merged, expected = np.asarray(merged), np.asarray(expected)
    share = float(np.mean(~np.isclose(merged, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())))
    if not share <= MAX_DECIDED_BY_ROUNDING:
        raise Failed(f"{what}: {100 * share:.3g}% of the entries differ")


def medians(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each run, taken in turn; the first round, with its compilations, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            result = run()
            jax.block_until_ready(result)
            seconds[name].append(time.perf_counter() - start)
            # Given back before the next run asks for memory.
            del result
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}
