"""The front of two goals on the demo family, three seeds (5 minutes).

    python -m bench pareto
    python -m bench pareto --seeds 5 --generations 100 --examples 256

The goals are sums asked in Japanese (the quickstart's) and the same kind of sums asked in English, both to be answered
in the language of the question; the family's one expert knows sums in English, the other Japanese. Compared are the
strategies that search for a front, pymoo's NSGA-II, and CMA-ES on the weighted mean, which has to be run once for each
weighting: these runs share the budget equally.

Shown is the hypervolume of all candidates so far: of the box around the front of all searches together, a tenth wider
towards the worse, the share of which every point is beaten in both tasks by a candidate.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.searches.strategies import CONFIGS, Experiment, Family, open_experiments, run
from bench.shared.machine import describe
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.evaluation.scores import score_matrix
from evojax_merge.problem import build_problem
from evojax_merge.search.fronts import front_of, hypervolume
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.spaces.bounds import from_unit
from evojax_merge.zoo.arithmetic import ENGLISH, PACKAGED_SEED, PLAN, save_sums, split_hard_sums

# The scores of each strategy's candidates: float64[E, T], in the order of their evaluation.
Search = Callable[[Experiment, int, int, int], np.ndarray]
# How much of the weighted mean the first task is, in each run of CMA-ES.
WEIGHTINGS = (0.2, 0.4, 0.6, 0.8)


def write_config(folder: Path, examples: int) -> Path:
    """The quickstart with a second task, sums in English, and so many examples of each to search on."""
    _, search, heldout = split_hard_sums(PACKAGED_SEED, PLAN)
    for name, sums in (("search", search), ("heldout", heldout)):
        save_sums(folder / f"english-{name}.jsonl", sums, ENGLISH)
    document = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text(encoding="utf-8"))
    japanese = document["tasks"][0] | {"limit": examples}
    english = {"name": "english_sums", "file": "english-search.jsonl", "heldout": "english-heldout.jsonl"}
    document["tasks"] = [japanese, japanese | english]
    (folder / "config.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return folder / "config.yaml"


def search_with(strategy: str, weights: Sequence[float] = (1.0, 1.0)) -> Search:
    """A search of the program."""

    def search(experiment: Experiment, population: int, generations: int, seed: int) -> np.ndarray:
        config = experiment.problem.backend.config
        tasks = [task.model_copy(update={"weight": w}) for task, w in zip(config.tasks, weights, strict=True)]
        settings = SearchConfig(strategy=strategy, population=population, generations=generations)
        changed = config.model_copy(update={"search": settings, "seed": seed, "tasks": tasks})
        storage = Storage()
        run(experiment, build_problem(experiment.config, changed), storage, Reporter())
        rows = [np.array(list(row["task_scores"].values()), np.float64).T for row in storage.read_history()]
        return np.concatenate(rows)

    return search


def scalarised(experiment: Experiment, population: int, generations: int, seed: int) -> np.ndarray:
    """CMA-ES in each weighting, one generation of each in turn."""
    share = generations // len(WEIGHTINGS)
    runs = [search_with("cma_es", (w, 1 - w))(experiment, population, share, seed) for w in WEIGHTINGS]
    return np.stack([one.reshape(share, population, -1) for one in runs], axis=1).reshape(-1, 2)


def pymoo_nsga2(experiment: Experiment, population: int, generations: int, seed: int) -> np.ndarray:
    """pymoo's NSGA-II between the same bounds, otherwise as pymoo has it."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.config import Config
    from pymoo.core.problem import Problem
    from pymoo.optimize import minimize

    found: list[np.ndarray] = []

    class Cube(Problem):
        def __init__(self) -> None:
            super().__init__(n_var=experiment.problem.space.dims, n_obj=2, xl=0.0, xu=1.0)

        def _evaluate(self, units: np.ndarray, out: dict[str, Any], *arguments: Any, **options: Any) -> None:
            found.append(task_means(experiment, from_unit(units).astype(np.float32)))
            out["F"] = -found[-1]

    Config.warnings["not_compiled"] = False
    minimize(Cube(), NSGA2(pop_size=population), ("n_eval", population * generations), seed=seed, verbose=False)
    return np.concatenate(found)


SEARCHES: dict[str, Search] = {
    "pareto": search_with("pareto"),
    "niches": search_with("niches"),
    f"cma_es, {len(WEIGHTINGS)} weightings": scalarised,
    "cma_es, equal weights": search_with("cma_es"),
    "random": search_with("random"),
    "pymoo's NSGA-II": pymoo_nsga2,
}


def task_means(experiment: Experiment, genomes: np.ndarray) -> np.ndarray:
    """float64[P, T]: the means of genomes float32[P, D] on the searched examples."""
    tasks = experiment.searched.tasks
    return score_matrix(tasks, experiment.searched.score(genomes)).task_means


def box_of(results: dict[str, list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The box around the front of all candidates: float64[T], a tenth below the worst in each task, and the best."""
    every = np.concatenate([means for runs in results.values() for means in runs])
    front = every[front_of(every)]
    worst, best = front.min(axis=0), front.max(axis=0)
    return worst - 0.1 * (best - worst), best


def volumes(means: np.ndarray, box: tuple[np.ndarray, np.ndarray], checkpoints: Sequence[int]) -> list[float]:
    """The hypervolume of the first so many candidates of float64[E, T], as a share of the box."""
    (worst, best), found = box, [means[:count] for count in checkpoints]
    return [hypervolume(part[front_of(part)], worst) / float(np.prod(best - worst)) for part in found]


def table(results: dict[str, list[np.ndarray]], checkpoints: Sequence[int]) -> str:
    """Mean ± standard deviation over the seeds of the hypervolume, and how many candidates the front has at the end."""
    box = box_of(results)
    heads = ["search", *(f"{count:,} evaluations" for count in checkpoints), "front"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name, runs in results.items():
        shares = np.array([volumes(means, box, checkpoints) for means in runs])
        cells = [f"{one.mean():.3f} ± {one.std(ddof=1) if len(one) > 1 else 0:.3f}" for one in shares.T]
        members = np.mean([len(front_of(means)) for means in runs])
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {members:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--generations", type=int, default=20, help=f"a multiple of {len(WEIGHTINGS)}")
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--examples", type=int, default=64, help="of each task, at most 256")
    arguments = parser.parse_args()
    if arguments.generations < len(WEIGHTINGS) or arguments.generations % len(WEIGHTINGS):
        parser.error(f"--generations: {arguments.generations}; expected a multiple of {len(WEIGHTINGS)}")
    budget = arguments.population * arguments.generations
    with tempfile.TemporaryDirectory() as folder:
        family = Family(write_config(Path(folder), arguments.examples), {"config": {}})
        experiment = open_experiments(family, ["config"])["config"]
        space = experiment.problem.space
        experts = task_means(experiment, space.seed_genomes("bench", "parents"))
        results: dict[str, list[np.ndarray]] = {}
        for name, search in SEARCHES.items():
            for seed in range(arguments.seeds):
                means = search(experiment, arguments.population, arguments.generations, seed)
                results.setdefault(name, []).append(means)
                front = means[front_of(means)]
                shown = ", ".join(f"({one:.3f}, {other:.3f})" for one, other in (front.min(axis=0), front.max(axis=0)))
                print(f"{name}, seed {seed}: a front of {len(front)}, between {shown}", flush=True)
    print(f"\n{describe()}; {arguments.seeds} seeds; experts in Japanese and English:", *np.round(experts, 3).tolist())
    print(table(results, [budget // 4, budget // 2, budget]))


if __name__ == "__main__":
    main()
