"""Evaluations that strategies need on functions with a known optimum, against pycma.

    python -m bench strategy-functions
    python -m bench strategy-functions --dims 128 --strategies cma_es lm_ma_es --functions sphere

The sphere from all ones and Rosenbrock's function from all zeros, sigma 0.5, until a value is below 1e-8: the median
over seeds, `>` where most seeds did not get there, and its ratio to the median of pycma's CMA-ES from the same start.
Genomes are float32, between bounds of -5 and 5.
"""

import argparse
import warnings
from collections.abc import Callable

import numpy as np

from bench.shared.machine import describe
from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.loop import INIT_KEY, generation_key
from evojax_merge.search.strategies.registry import StrategySettings, find_strategy, strategy_names

TARGET, SIGMA = 1e-8, 0.5


def sphere(genomes: np.ndarray) -> np.ndarray:
    """float64[..., D] -> float64[...]."""
    return np.square(genomes).sum(axis=-1)


def rosenbrock(genomes: np.ndarray) -> np.ndarray:
    """float64[..., D] -> float64[...]."""
    first, second = genomes[..., :-1], genomes[..., 1:]
    return (100 * np.square(second - np.square(first)) + np.square(1 - first)).sum(axis=-1)


FUNCTIONS = {"sphere": (sphere, 1.0), "rosenbrock": (rosenbrock, 0.0)}
# Those that search any function: no grid, no gradient, no second goal, no moves of a path, no soup or pool of models.
OTHERS = ("grid", "greedy", "gradient", "hybrid", "pareto", "niches", "path_ga", "pool")
FUNCTION_STRATEGIES = [name for name in strategy_names() if name not in OTHERS]


def scores_of(fitness: np.ndarray) -> Scores:
    """float64[P] as scores on one example."""
    values = np.asarray(fitness, np.float32)[:, None]
    everything = np.ones(values.shape, bool)
    return Scores(values, everything, np.zeros(1, int), ("value",), np.ones(1), np.asarray(fitness, np.float64))


def evaluations(
    name: str, function: Callable[[np.ndarray], np.ndarray], start: float, dims: int, seed: int, limit: int
) -> int:
    """The number of evaluations until a value is below `TARGET`; more than `limit` where none was."""
    settings = StrategySettings(dims, None, SIGMA, limit, lambda unit: 10 * np.asarray(unit) - 5)
    strategy = find_strategy("--strategies", name)(settings)
    state = strategy.init(generation_key(seed, INIT_KEY), np.full((1, dims), start, np.float32))
    for generation in range(-(-limit // strategy.population)):
        key = generation_key(seed, generation)
        genomes, state = strategy.ask(key, state)
        values = function(np.asarray(genomes, np.float64))
        if values.min() < TARGET:
            return (generation + 1) * strategy.population
        state = strategy.tell(key, state, genomes, scores_of(-values))
    return limit + 1


def pycma(function: Callable[[np.ndarray], np.ndarray], start: float, dims: int, seed: int, limit: int) -> int:
    import cma

    options = {"ftarget": TARGET, "seed": seed + 1, "verbose": -9, "maxfevals": limit}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cma.fmin2(lambda x: float(function(x)), np.full(dims, start), SIGMA, options)[1].result
    return int(found.evaluations) if found.fbest < TARGET else limit + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[10])
    parser.add_argument("--seeds", type=int, default=11)
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--strategies", nargs="+", default=FUNCTION_STRATEGIES)
    parser.add_argument("--limit", type=int, default=2000, help="evaluations for each dimension, at most")
    arguments = parser.parse_args()
    print(describe())
    for dims in arguments.dims:
        for label in arguments.functions:
            function, start = FUNCTIONS[label]
            limit, seeds = arguments.limit * dims, range(arguments.seeds)
            print(f"\n{label}, {dims} dimensions, {arguments.seeds} seeds\n", flush=True)
            print("| strategy | evaluations | quartiles | of pycma's |\n| --- | ---: | ---: | ---: |", flush=True)
            reference = 0.0
            for name in ["pycma", *arguments.strategies]:
                needed = [
                    pycma(function, start, dims, seed, limit)
                    if name == "pycma"
                    else evaluations(name, function, start, dims, seed, limit)
                    for seed in seeds
                ]
                low, median, high = np.percentile(needed, [25, 50, 75], method="nearest")
                reference = reference or float(median)
                shown = [f"> {limit:,}" if value > limit else f"{int(value):,}" for value in (median, low, high)]
                ratio = "" if median > limit else f"{median / reference:.2f}"
                print(f"| {name} | {shown[0]} | {shown[1]} to {shown[2]} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
