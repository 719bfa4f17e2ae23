"""What the strategies are compared with: pymoo's algorithms, with which mergenetic searches. Imports pymoo where one is
run."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

# Module and class, and what the class calls its population.
PEERS = {
    "pymoo_ga": ("pymoo.algorithms.soo.nonconvex.ga", "GA", "pop_size"),
    "pymoo_de": ("pymoo.algorithms.soo.nonconvex.de", "DE", "pop_size"),
    "pymoo_pso": ("pymoo.algorithms.soo.nonconvex.pso", "PSO", "pop_size"),
    "pymoo_cma_es": ("pymoo.algorithms.soo.nonconvex.cmaes", "CMAES", "popsize"),
    "pymoo_nsga2": ("pymoo.algorithms.moo.nsga2", "NSGA2", "pop_size"),
}
# What a candidate that failed is told to have lost.
FAILED = 1e6


def is_installed() -> bool:
    return importlib.util.find_spec("pymoo") is not None


def run_peer(
    name: str, evaluate: Callable[[np.ndarray], np.ndarray], dims: int, population: int, budget: int, seed: int
) -> None:
    """Maximise over the unit cube. evaluate: float64[P, D] -> fitness float64[P], NaN for candidates that failed."""
    from importlib import import_module

    from pymoo.config import Config
    from pymoo.core.problem import Problem
    from pymoo.optimize import minimize

    class Cube(Problem):
        def __init__(self) -> None:
            super().__init__(n_var=dims, n_obj=1, xl=0.0, xu=1.0)

        def _evaluate(self, units: np.ndarray, out: dict[str, Any], *arguments: Any, **options: Any) -> None:
            out["F"] = np.nan_to_num(-evaluate(np.asarray(units)), nan=FAILED)[:, None]

    Config.warnings["not_compiled"] = False
    module, algorithm, size = PEERS[name]
    made = getattr(import_module(module), algorithm)(**{size: population})
    minimize(Cube(), made, ("n_eval", budget), seed=seed, verbose=False)
