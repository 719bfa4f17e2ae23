"""How often `path_ga` finds the loops of one family, from 20 seeds (a minute, and 3 more to train the family once).

    python -m bench path-seeds
    python -m bench path-seeds --family 1 --generations 40

Searches of `configs/loops.yaml` that differ in their seed alone. A search has the loops where a candidate is as
good as `plus` with its middle layers four times, or better. All searches share one evaluator, which computes the scores
of a path once.
"""

import argparse
from dataclasses import dataclass, replace

import numpy as np

from bench.searches.loops import problem_for
from bench.searches.zoo import accuracies
from bench.shared.machine import describe
from evojax_merge.evaluation.scores import fitness
from evojax_merge.models.paths import LayerPath
from evojax_merge.problem import SearchProblem
from evojax_merge.search.loop import evolve
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.steps.selection import open_evaluators
from evojax_merge.tasks.splits import Splits
from evojax_merge.zoo.loops import LOOPED, MAX_LOOPS, SIZES

LOOPS = (*range(LOOPED[0]), *LOOPED * MAX_LOOPS, *range(LOOPED[-1] + 1, SIZES.layers))


@dataclass(frozen=True)
class Outcome:
    """The result of one search. candidates: the number of candidates until it had the loops, None: it never had them;
    fitness: the best on the search split; right: that path's held-out exact match."""

    candidates: int | None
    fitness: float
    right: float


def loops_fitness(problem: SearchProblem, on: Splits) -> float:
    """The fitness of `plus` with its middle layers four times."""
    paths = on.shards[0].evaluator
    path = LayerPath(LOOPS, (1.0,) * len(LOOPS), problem.space.embedding_parent)
    return float(fitness(paths.tasks, paths.evaluate([path]))[0])


def search(problem: SearchProblem, on: Splits, seed: int, goal: float) -> Outcome:
    storage = Storage()
    archive = evolve(replace(problem, seed=seed), on, storage, Reporter())
    reached = [row["evaluations"] for row in storage.read_history() if (row["best_so_far"] or -np.inf) >= goal]
    right = accuracies(on.heldout, archive.genomes[:1])[0]
    return Outcome(reached[0] if reached else None, float(archive.fitness[0]), float(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--family", type=int, default=0)
    parser.add_argument("--generations", type=int, help="default: the config's")
    arguments = parser.parse_args()
    generations = arguments.generations
    problem = problem_for(arguments.family, [] if generations is None else [f"search.generations={generations}"])
    on = open_evaluators(problem, problem.prepare())
    goal = loops_fitness(problem, on)
    lines = ["| seed | candidates until it has the loops | fitness | held-out sums right |", "| ---: |" + " ---: |" * 3]
    outcomes = []
    for seed in range(arguments.seeds):
        outcome = search(problem, on, seed, goal)
        outcomes.append(outcome)
        candidates = "–" if outcome.candidates is None else f"{outcome.candidates:,}"
        lines.append(f"| {seed} | {candidates} | {outcome.fitness:.4f} | {100 * outcome.right:.0f}% |")
        print(lines[-1], flush=True)
    successes = sum(outcome.candidates is not None for outcome in outcomes)
    print("\n" + "\n".join(lines))
    print(f"\n{successes} of {len(outcomes)} searches have the loops, whose fitness is {goal:.4f}. {describe()}")


if __name__ == "__main__":
    main()
