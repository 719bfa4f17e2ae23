"""Searches over families of networks that the zoo trains: held-out scores by model and seed, and the winner's leads."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.shared.machine import describe
from evojax_merge.problem import SearchProblem, build_problem, read_config
from evojax_merge.report.intervals import Lead, leads_over
from evojax_merge.search import loop
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import Reporter
from evojax_merge.search.run_folder import Checkpoints, FolderStorage, open_run
from evojax_merge.selection import open_evaluator, open_evaluators, select_best
from evojax_merge.tasks.splits import Splits

UNIFORM = "uniform merge"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Scored:
    """The held-out scores of a seed's models. examples: float[N] of each model; targets: of the N examples; leads: of
    each winner over the best parent and over the uniform merge."""

    examples: dict[str, np.ndarray]
    targets: tuple[str, ...]
    leads: dict[str, dict[str, Lead]]

    @property
    def means(self) -> dict[str, float]:
        """The mean score of each model."""
        return {name: float(scores.mean()) for name, scores in self.examples.items()}


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


def evolve(problem: SearchProblem, on: Splits[SpaceEvaluator[Any]], folder: Path) -> np.ndarray:
    """The winner of a search."""
    run = open_run(folder, {}, resume=False, overwrite=True)
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
    """The models of a family, merges that nobody searched, and the winners of searches, on held-out examples.

    score: `task/metric`; searches: the overrides of each; starts: those of searches whose start is such a merge.
    """
    task, metric = score.split("/")
    parents: list[str] = []
    examples: dict[str, np.ndarray] = {}
    leads: dict[str, dict[str, Lead]] = {}

    def score_genome(heldout: SpaceEvaluator[Any], genome: np.ndarray) -> np.ndarray:
        row: np.ndarray = heldout.score(genome[None]).matrices[task][metric][0]
        return row

    for name, overrides in searches.items():
        problem = open_problem(config, family, seed, overrides)
        on = open_evaluators(problem, problem.prepare())
        if not examples:
            for role, path in problem.backend.compared:
                stored = problem.backend.score_stored(path, on.heldout, lambda done: None)
                examples[path.name] = stored.matrices[task][metric][0]
                parents.extend([path.name] if role == "parent" else [])
            examples[UNIFORM] = score_genome(on.heldout, problem.space.baselines()[1][0])
        examples[name] = score_genome(on.heldout, evolve(problem, on, folder / f"{name}-{seed}"))
        best = max(parents, key=lambda parent: float(examples[parent].mean()))
        rivals = [best, UNIFORM]
        compared = leads_over([examples[name]], [[examples[rival]] for rival in rivals], [1.0], seed)
        leads[name] = {
            rival: lead for rival, lead in zip(("best parent", UNIFORM), compared, strict=True) if lead is not None
        }
    for name, overrides in starts.items():
        problem = open_problem(config, family, seed, overrides)
        examples[name] = score_genome(open_evaluator(problem, problem.prepare().heldout), problem.space.start)
    scored = next(one for one in problem.splits.heldout if (one.name, one.metric) == (task, metric))
    return Scored(examples, tuple(scored.target(i) for i in range(scored.size)), leads)


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
    parser: argparse.ArgumentParser,
    title: str,
    run_seed: Callable[[int], Scored],
    cell: Callable[[float], str] = percent,
) -> tuple[argparse.Namespace, dict[int, Scored]]:
    """The program: run as many seeds as the command line says, and print their tables. Returns its options as well."""
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    results = {}
    for seed in range(arguments.seeds):
        results[seed] = run_seed(seed)
        print(f"seed {seed}: {results[seed].means}\n{lead_table({seed: results[seed]}, cell)}", flush=True)
    print(f"\n{table(title, results, cell)}\n\n{lead_table(results, cell)}\n\n{describe()}")
    return arguments, results
