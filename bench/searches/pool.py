"""A pool of six experts that breed, over eleven seeds (11 minutes, and some to train them once).

    python -m bench pool

Searches of configs/automerge.yaml over eleven seeds. A seed draws who breeds with whom, and how; experts and problems
stay the same. Each search chooses its winner on the search split. It is compared with the founder that is best on the
held-out problems, which is more than a search could know. The experts are trained when they are first asked for.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.shared.machine import describe
from evojax_merge.backends.decoder.kinds.member import PoolCandidates
from evojax_merge.evaluation.scores import TaskScores, fitness, means
from evojax_merge.problem import build_problem, read_config
from evojax_merge.search.loop import evolve
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.steps.selection import open_evaluators, rescore

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "automerge.yaml"
SHOWN = "whole_answers/accuracy"


@dataclass(frozen=True)
class Found:
    """The result of a search. fitness: float64[1 + K], held out, of the winner and of the founders; accuracy: the
    winner's share of whole answers; ancestors: how many members were bred for it, itself among them; seconds: of the
    search, without the choice of the winner."""

    fitness: np.ndarray
    accuracy: float
    ancestors: int
    seconds: float


def run(seed: int, overrides: list[str]) -> Found:
    problem = build_problem(CONFIG, read_config(CONFIG, overrides, seed))
    on = open_evaluators(problem, problem.prepare())
    begun = time.perf_counter()
    archive = evolve(problem, on, Storage(), Reporter())
    seconds = time.perf_counter() - begun
    winner = rescore(problem.space, on.search, archive, lambda done: None)[0].genome
    candidates = problem.backend.candidates
    assert isinstance(candidates, PoolCandidates)
    genomes = np.concatenate([winner[None], candidates.space.genealogy.founders])
    scores: TaskScores = on.heldout.within(archive.context).score(genomes)
    lineage = candidates.space.within(archive.context).member(winner).lineage()
    accuracy = means(on.heldout.tasks, scores)[0][SHOWN]
    return Found(fitness(on.heldout.tasks, scores), accuracy, len(lineage), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=11)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    print(describe(), "\n")
    print("| seed | best founder | best child | its sums right | members bred for it | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    founders, children = [], []
    for seed in range(options.seeds):
        found = run(seed, options.overrides)
        child, *others = found.fitness
        founders.append(max(others))
        children.append(child)
        print(
            f"| {seed} | {max(others):.3f} | {child:.3f} | {found.accuracy:.0%} | {found.ancestors} "
            f"| {found.seconds:.0f} |",
            flush=True,
        )
    ahead = np.subtract(children, founders)
    print(
        f"\nHeld out, the best child is better than the best founder in {int((ahead > 0).sum())} of {len(ahead)} "
        f"searches, by {np.median(ahead):.3f} in the median and {ahead.min():.3f} at least."
    )


if __name__ == "__main__":
    main()
