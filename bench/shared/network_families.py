"""Searches over families of networks that the zoo trains: held-out scores by model and seed, and the winner's leads."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from bench.shared.machine import describe
from evojax_merge.evaluation.compilations import keep_compiled_programs
from evojax_merge.problem import SearchProblem, build_problem, read_config
from evojax_merge.report.intervals import Lead, paired_lead
from evojax_merge.search import loop
from evojax_merge.search.checkpoints import Checkpoints, FolderStorage
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.recording import Reporter
from evojax_merge.search.run_folder import open_run
from evojax_merge.steps.selection import open_evaluators, select_best
from evojax_merge.tasks.splits import Splits

UNIFORM = "uniform merge"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Scored:
    """The held-out scores of a seed's models. examples: float[N] of each model; targets: of the N examples, where they
    have any; leads: of each winner over the best parent and over the uniform merge; beside: the mean scores of each
    model by other metrics."""

    examples: dict[str, np.ndarray]
    targets: tuple[str | None, ...]
    leads: dict[str, dict[str, Lead]]
    beside: dict[str, dict[str, float]]

    @property
    def means(self) -> dict[str, float]:
        """The mean score of each model."""
        return {name: float(scores.mean()) for name, scores in self.examples.items()}


def open_problem(config: str, family: str | None, seed: int, overrides: Sequence[str]) -> SearchProblem:
    """The search of a config over two experts, on the family of a seed, whose search has that seed as well. family: a
    name of the zoo's, "" for the demo family, or None for models that are the same for all seeds."""
    path, prefix = CONFIGS / config, f"zoo:{family}/" if family else "zoo:"
    written = read_config(path, overrides, seed)
    if family is None:
        return build_problem(path, written)
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
    archive = loop.evolve(problem, on, FolderStorage(run, Checkpoints(run)), Reporter())
    return select_best(problem, on, archive).genome


def run_seed(
    seed: int,
    config: str,
    family: str | None,
    score: str,
    searches: Mapping[str, Sequence[str]],
    starts: Mapping[str, Sequence[str]],
    folder: Path,
    beside: Sequence[str] = (),
) -> Scored:
    """The models of a family, merges that nobody searched, and the winners of searches, on held-out examples.

    score: `task/metric`, and beside: others; searches: the overrides of each; starts: those of searches whose start is
    such a merge, opened once where they are those of a search as well. The models of one are in memory at a time.
    """
    parents: list[str] = []
    examples: dict[str, np.ndarray] = {}
    leads: dict[str, dict[str, Lead]] = {}
    means: dict[str, dict[str, float]] = {other: {} for other in beside}

    def keep(name: str, scores: Any) -> None:
        for key in (score, *beside):
            task, metric = key.split("/")
            row = scores.matrices[task][metric][0]
            if key == score:
                examples[name] = row
                # A seed of large models takes hours.
                print(f"seed {seed}: {name}: {row.mean():.4f}", file=sys.stderr, flush=True)
            else:
                means[key][name] = float(row.mean())

    for overrides in dict.fromkeys(map(tuple, (*searches.values(), *starts.values()))):
        problem = open_problem(config, family, seed, overrides)
        on = open_evaluators(problem, problem.prepare())
        if not examples:
            for role, path in problem.facts.compared:
                keep(path.name, problem.backend.score_stored(path, on.heldout, lambda done: None))
                parents.extend([path.name] if role == "parent" else [])
            keep(UNIFORM, on.heldout.score(problem.space.baselines()[1][:1]))
        for name in (name for name, its in searches.items() if tuple(its) == overrides):
            keep(name, on.heldout.score(evolve(problem, on, folder / f"{name}-{seed}")[None]))
            best = max(parents, key=lambda parent: float(examples[parent].mean()))
            rivals = {"best parent": best, UNIFORM: UNIFORM} | {first: first for first in list(leads)[:1]}
            compared = {rival: paired_lead([examples[name]], [examples[key]], [1.0]) for rival, key in rivals.items()}
            leads[name] = {rival: lead for rival, lead in compared.items() if lead is not None}
        for name in (name for name, its in starts.items() if tuple(its) == overrides):
            keep(name, on.heldout.score(problem.space.start[None]))
        # Before the next one is loaded.
        del on
    for name in starts:
        # The last rows of the tables.
        examples[name] = examples.pop(name)
        for row in means.values():
            row[name] = row.pop(name)
    scored = next(one for one in problem.splits.heldout if f"{one.name}/{one.metric}" == score)
    return Scored(examples, tuple(scored.target(i) for i in range(scored.size)), leads, means)


def table(title: str, results: Mapping[int, Mapping[str, float]], cell: Callable[[float], str]) -> str:
    """Markdown: a row for each model, its score for each seed, and their mean."""
    head = [*(f"seed {seed}" for seed in results), "mean"]
    lines = [f"| {title} | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
    for name in next(iter(results.values())):
        values = [means[name] for means in results.values()]
        lines.append(f"| {name} | {' | '.join(map(cell, [*values, float(np.mean(values))]))} |")
    return "\n".join(lines)


def lead_table(results: Mapping[int, Scored], cell: Callable[[float], str]) -> str:
    """Markdown: by how much each winner is ahead of others, with 95% intervals over the examples, and in the mean of
    several seeds, with those over the families."""
    many = len(results) > 1
    lines = ["| ahead of | " + " | ".join([*(f"seed {seed}" for seed in results), *["mean"] * many]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(results) + many))
    for name, by_rival in next(iter(results.values())).leads.items():
        for rival in by_rival:
            leads = [scored.leads[name][rival] for scored in results.values()]
            if many:
                differences = np.array([lead.difference for lead in leads])
                half = stdtrit(len(leads) - 1, 0.975) * differences.std(ddof=1) / np.sqrt(len(leads))
                mean = float(differences.mean())
                leads = [*leads, Lead(mean, mean - half, mean + half)]
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
    beside: Callable[[float], str] | None = None,
) -> tuple[argparse.Namespace, dict[int, Scored]]:
    """The program: run as many seeds as the command line says, and print their tables. Returns its options as well.
    cell, beside: a value of the score, and of the others, as text; beside: None: like `cell`."""
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    keep_compiled_programs()
    results = {}
    for seed in range(arguments.seeds):
        results[seed] = run_seed(seed)
        print(f"seed {seed}: {results[seed].means}\n{lead_table({seed: results[seed]}, cell)}", flush=True)
    print(f"\n{table(title, {seed: one.means for seed, one in results.items()}, cell)}\n\n{lead_table(results, cell)}")
    for key in results[0].beside:
        print(f"\n{table(key, {seed: one.beside[key] for seed, one in results.items()}, beside or cell)}")
    print(f"\n{describe()}")
    return arguments, results
