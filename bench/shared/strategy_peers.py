"""Peers of the strategies: pymoo's algorithms, with which mergenetic searches, and PSO-Merging. Imports
pymoo where one of its is run."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

# Module and class, and what the class calls its population.
PEERS = {
    "pymoo_ga": ("pymoo.algorithms.soo.nonconvex.ga", "GA", "pop_size"),
    "pymoo_de": ("pymoo.algorithms.soo.nonconvex.de", "DE", "pop_size"),
    "pymoo_pso": ("pymoo.algorithms.soo.nonconvex.pso", "PSO", "pop_size"),
    "pymoo_cma_es": ("pymoo.algorithms.soo.nonconvex.cmaes", "CMAES", "popsize"),
    "pymoo_nsga2": ("pymoo.algorithms.moo.nsga2", "NSGA2", "pop_size"),
}
PSO_MERGING = "pso_merging"
# A swarm's constants: how much of its velocity a particle keeps, and the most that it is drawn to the best place of
# its own and to that of all, both times a random number (constriction: Clerc and Kennedy, 2002).
INERTIA, ATTRACTION = 0.7298, 1.49618
# The shares of its task vector that a sparsified expert keeps, one after the other.
KEPT = (0.8, 0.5, 0.2)
# The loss of a candidate that failed.
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


def run_pso_merging(
    evaluate: Callable[[Sequence[Any]], np.ndarray], base: Any, experts: Sequence[Any], population: int, seed: int
) -> None:
    """A swarm of whole models that move in the space of their weights, until `evaluate` raises (PSO-Merging, arXiv
    2508.19839): the base, the experts and sparsified experts (DARE, arXiv 2311.03099: entries of the task vector are
    dropped at random, the others enlarged), as many as fill the population.

    evaluate: P models -> fitness float64[P], NaN for one that failed. A model is a pytree of float32 arrays.
    """
    rng = np.random.default_rng(seed)

    def sparsified(number: int) -> Any:
        expert, kept = experts[number % len(experts)], KEPT[number // len(experts) % len(KEPT)]
        return jax.tree.map(
            lambda own, first: first + (own - first) * (rng.random(own.shape, np.float32) < kept) / kept, expert, base
        )

    places = [base, *experts]
    places += [sparsified(number) for number in range(population - len(places))]
    velocities = [jax.tree.map(np.zeros_like, place) for place in places]
    own_best, own_fitness = list(places), np.full(len(places), -np.inf)
    while True:
        values = np.nan_to_num(evaluate(places), nan=-np.inf)
        for number in np.flatnonzero(values > own_fitness):
            own_best[number], own_fitness[number] = places[number], values[number]
        leader = own_best[int(np.argmax(own_fitness))]
        for i, place in enumerate(places):
            to_own, to_leader = (ATTRACTION * rng.random() for _ in range(2))

            def moved(speed: Any, here: Any, own: Any, best: Any, a: float = to_own, b: float = to_leader) -> Any:
                return INERTIA * speed + np.float32(a) * (own - here) + np.float32(b) * (best - here)

            velocities[i] = jax.tree.map(moved, velocities[i], place, own_best[i], leader)
            places[i] = jax.tree.map(np.add, place, velocities[i])
