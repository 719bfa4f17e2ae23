"""The gradient of a path's scales after path_ga, two families, five seeds (trains them once).

    python -m bench path-scales

On each seed's families (evojax_merge/zoo/loops.py, in which a path matters, and the quickstart's, in which it hardly
does) three searches from the same parents take as many forward passes; a gradient counts as `GRADIENT_PASSES`:

- `path_ga, layers`: moves without scales;
- `path_ga, layers and scales`: moves with scales;
- `path_ga, then gradient`: half of the passes on moves without scales, half on the gradient of the scales of the
  winner's layers, one for each layer.

Printed are means over the seeds: the fitness on the search split, the fitness on the held-out one, and held-out exact
match; and how many forward passes a gradient took.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from bench.searches import loops, zoo
from bench.searches.zoo import SHOWN, evolve_stages
from bench.shared.machine import describe
from evojax_merge.problem import SearchProblem
from evojax_merge.report.comparison import Result
from evojax_merge.steps.selection import open_evaluators

# Forward passes that a gradient is counted as.
GRADIENT_PASSES = 5
POPULATION = 16
MOVES = "space=null", "search.strategy=path_ga", "search.seeds=[parents]", f"search.population={POPULATION}"


@dataclass(frozen=True)
class Family:
    """problem_for: a seed and overrides -> a search; parents_of: a seed's; layers: that a path has at most."""

    problem_for: Callable[[int, Sequence[str]], SearchProblem]
    parents_of: Callable[[int], list[str]]
    layers: int
    moves: int


FAMILIES = {
    "zoo:loops": Family(loops.problem_for, loops.parents_of, 12, 4),
    "quickstart's": Family(zoo.problem_for, lambda seed: [f"zoo:{seed}/maths", f"zoo:{seed}/japanese"], 6, 3),
}


def searches(family: Family, passes: int) -> dict[str, list[list[str]]]:
    """The stages of each search of so many passes."""

    def moves(passes: int, scales: str) -> list[str]:
        flow = f"{{form: moves, moves: {family.moves}, window: 2, scales: {scales}, max_layers: {family.layers}}}"
        return [*MOVES, f"data_flow={flow}", f"search.generations={passes // POPULATION}"]

    return {
        "path_ga, layers": [moves(passes, "none")],
        "path_ga, layers and scales": [moves(passes, "block")],
        "path_ga, then gradient": [moves(passes // 2, "none"), gradient(family, passes // 2 // GRADIENT_PASSES)],
    }


def gradient(family: Family, steps: int) -> list[str]:
    """A scale for each layer of the first parent, by so many steps along the gradient."""
    flow = f"data_flow={{form: moves, moves: {family.layers}, window: 1, max_layers: {family.layers}}}"
    search = f"search={{strategy: gradient, population: 1, generations: {steps}}}"
    return ["space=null", flow, search]


def figures(result: Result) -> list[float]:
    return [result.search_fitness, result.winner.fitness, result.winner.scores[SHOWN]]


def passes_of_a_gradient(family: Family, seed: int) -> float:
    """The time of a candidate's scores and gradient, as a multiple of that of its scores."""
    problem = family.problem_for(seed, gradient(family, 1))
    (evaluator,) = open_evaluators(problem, problem.prepare()).minibatches
    genome, paths = problem.space.start[None], evaluator.evaluator.score_cache

    def scored() -> None:
        # What is known of a path is not computed again.
        paths.clear()
        evaluator.score(genome)

    return seconds(lambda: evaluator.value_and_gradient(genome)) / seconds(scored)


def seconds(call: Callable[[], object], times: int = 20) -> float:
    """The median of so many calls after the first."""
    call()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=640)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    arguments = parser.parse_args()
    lines = ["| family | search | search split | held out | right |", "| --- | --- |" + " ---: |" * 3]
    for name in arguments.families:
        family = FAMILIES[name]
        for search, stages in searches(family, arguments.passes).items():
            found = []
            for seed in range(arguments.seeds):
                results = evolve_stages(partial(family.problem_for, seed), family.parents_of(seed), stages)
                found.append(figures(results[-1]))
                shown = " -> ".join(", ".join(f"{value:.4f}" for value in figures(result)) for result in results)
                print(f"{name}, seed {seed}, {search}: {shown}", flush=True)
            searched, heldout, right = np.mean(found, axis=0)
            lines.append(f"| {name} | {search} | {searched:.4f} | {heldout:.4f} | {right:.0%} |")
        print(f"{name}: a gradient takes {passes_of_a_gradient(family, 0):.1f} forward passes", flush=True)
    print("\n" + "\n".join(lines) + f"\n\n{describe()}")


if __name__ == "__main__":
    main()
