"""Searches over families of networks that the zoo trains: held-out scores by model and seed, and the winner's leads."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.shared.machine import describe
from evojax_merge.problem import SearchProblem, build_problem, read_config
from evojax_merge.report.intervals import Lead, leads_over
from evojax_merge.search import loop
from evojax_merge.search.loop import Reporter
from evojax_merge.search.run_folder import Checkpoints, FolderStorage, open_run
from evojax_merge.selection import open_evaluator, open_evaluators, select_best

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Scored:
    """The held-out scores of a seed's models. means: by model; leads: of each winner over the best parent and over the
    uniform merge."""

    means: dict[str, float]
    leads: dict[str, dict[str, Lead]]


def open_problem(config: str, family: str, seed: int, overrides: Sequence[str]) -> SearchProblem:
    """The search of a config over two experts, on the family of a seed, whose search has that seed as well."""
    path, prefix = CONFIGS / config, f"zoo:{family}/"
    written = read_config(path, overrides, seed)
    of_seed = [f"parents=[{', '.join(str(one).replace(prefix, f'{prefix}{seed}/') for one in written.parents)}]"]
    for key, model in (("base", written.base), ("tokenizer_source", written.tokenizer_source)):
        of_seed += [f"{key}={str(model).replace(prefix, f'{prefix}{seed}/')}"] if model is not None else []
    for number, task in enumerate(written.tasks):
        for key in ("file", "heldout"):
            value = getattr(task, key, None)
            if isinstance(value, str) and value.startswith(prefix):
                of_seed.append(f"tasks.{number}.{key}={value.replace(prefix, f'{prefix}{seed}/')}")
    return build_problem(path, read_config(path, [*overrides, *of_seed], seed))


def evolve(problem: SearchProblem, folder: Path) -> np.ndarray:
    """The winner of a search."""
    run = open_run(folder, {}, resume=False, overwrite=True)
    on = open_evaluators(problem, problem.prepare())
    archive = loop.evolve(
        problem.search, problem.seed, problem.strategy, problem.space, on.shards,
        FolderStorage(run, Checkpoints(run)), Reporter(), minibatches=on.minibatches,
    )  # fmt: skip
    return select_best(problem, on, archive).genome


def run_seed(
    seed: int,
    config: str,
    family: str,
    score: str,
    searches: Mapping[str, Sequence[str]],
    starts: Mapping[str, Sequence[str]],
    folder: Path,
) -> Scored:
    """The models of a family, the merges that searches start from, and the winners of searches, on held-out examples.

    score: `task/metric`; searches, starts: the overrides of each; the first start is the uniform merge.
    """
    task, metric = score.split("/")
    by_model: dict[str, np.ndarray] = {}
    parents: list[str] = []

    def score_genome(problem: SearchProblem, genome: np.ndarray) -> np.ndarray:
        heldout = open_evaluator(problem, problem.prepare().heldout)
        if not by_model:
            for role, path in problem.backend.compared:
                stored = problem.backend.score_stored(path, heldout, lambda done: None)
                by_model[path.name] = stored.matrices[task][metric][0]
                parents.extend([path.name] if role == "parent" else [])
        return heldout.score(genome[None]).matrices[task][metric][0]

    for name, overrides in starts.items():
        problem = open_problem(config, family, seed, overrides)
        by_model[name] = score_genome(problem, problem.space.start)
    leads: dict[str, dict[str, Lead]] = {}
    for name, overrides in searches.items():
        problem = open_problem(config, family, seed, overrides)
        by_model[name] = score_genome(problem, evolve(problem, folder / f"{name}-{seed}"))
        best = max(parents, key=lambda parent: float(by_model[parent].mean()))
        rivals = {"best parent": by_model[best], "uniform": by_model[next(iter(starts))]}
        compared = leads_over([by_model[name]], [[scores] for scores in rivals.values()], [1.0], seed)
        leads[name] = {rival: lead for rival, lead in zip(rivals, compared, strict=True) if lead is not None}
    return Scored({name: float(scores.mean()) for name, scores in by_model.items()}, leads)


def table(title: str, results: Mapping[int, Scored], cell: Callable[[float], str]) -> str:
    """Markdown: a row for each model, its score for each seed, and their mean."""
    names = list(next(iter(results.values())).means)
    head = [*(f"seed {seed}" for seed in results), "mean"]
    lines = [f"| {title} | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
    for name in names:
        values = [scored.means[name] for scored in results.values()]
        lines.append(f"| {name} | {' | '.join(map(cell, [*values, float(np.mean(values))]))} |")
    return "\n".join(lines)


def lead_table(results: Mapping[int, Scored], cell: Callable[[float], str]) -> str:
    """Markdown: by how much each winner is ahead of the best parent and of the uniform merge, with 95% intervals."""
    lines = ["| ahead of | " + " | ".join(f"seed {seed}" for seed in results) + " |"]
    lines.append("| --- |" + " ---: |" * len(results))
    for name, by_rival in next(iter(results.values())).leads.items():
        for rival in by_rival:
            leads = [scored.leads[name][rival] for scored in results.values()]
            cells = [f"{cell(lead.difference)} ({cell(lead.low)} to {cell(lead.high)})" for lead in leads]
            lines.append(f"| {name}: {rival} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def print_tables(
    description: str, title: str, run_seed: Callable[[int], Scored], cell: Callable[[float], str] = percent
) -> None:
    """The program: run as many seeds as the command line says, and print their tables."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    results = {}
    for seed in range(arguments.seeds):
        results[seed] = run_seed(seed)
        print(f"seed {seed}: {results[seed].means}", flush=True)
    print(f"\n{table(title, results, cell)}\n\n{lead_table(results, cell)}\n\n{describe()}")
