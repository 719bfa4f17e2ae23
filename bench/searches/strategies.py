"""Search strategies and peers on the quickstart, eleven seeds (hours; finished searches are kept).

    python -m bench strategies --json strategies.jsonl --plot bench/results/strategies.png
    python -m bench strategies --json strategies.jsonl --peers --strategies cma_es pso+parents
    python -m bench strategies --family smollm2 --dimensions one thirds layers components --seeds 1 --passes 240 \\
        --strategies cma_es gradient --json strategies.jsonl
    python -m bench strategies --overhead

Work is counted in *passes*: scoring one candidate on all examples that a generation is scored on is one; on a part of
them, as in a race, its share; with its gradient, `--gradient-cost` times as much. Every search may spend as many passes
as `--generations` of `--population` candidates, or `--passes`, and ends when it has. Seconds are those of evaluating
(what else a generation takes is what `--overhead` measures), everything compiled before.

Followed is the best candidate so far, by its fitness on those examples; its held-out scores are measured after the
search, where it stood after `--checkpoints` passes and at the end. A search's winner may be better still: it is chosen
among finalists on the whole search split.

With `--json` each search's figures are appended to a file as soon as it has ended, and a search whose figures are there
is not run again: the whole takes hours, and can be stopped and continued, or extended by seeds and strategies. The file
knows a search by its options, not by its code: a strategy that was changed needs another file.

Peers drive our evaluator. pymoo's algorithms, which mergenetic (arXiv 2505.11427) searches with, do so in the same
space, in populations as large as ours and otherwise as pymoo has them. PSO-Merging (arXiv 2508.19839) is written from
its paper: a swarm of whole models, the base, the experts and sparsified experts, that move in the space of their
weights.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.shared.machine import describe
from bench.shared.strategy_peers import PEERS, PSO_MERGING, is_installed, run_peer, run_pso_merging
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.evaluator import Evaluator, PopulationEvaluator
from evojax_merge.evaluation.scores import TaskScores, fitness, means
from evojax_merge.models.sources import StackedWeights
from evojax_merge.problem import SearchProblem, build_problem, read_config, resolved_document
from evojax_merge.search.checkpoints import Checkpoints, FolderStorage
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import evolve
from evojax_merge.search.protocols import State, Strategy, wants_gradients
from evojax_merge.search.recording import Generation, Reporter, Storage
from evojax_merge.search.run_folder import open_run
from evojax_merge.spaces.bounds import from_unit
from evojax_merge.steps.selection import open_evaluators
from evojax_merge.zoo import cache_folder
from evojax_merge.zoo.references import resolve_reference
from evojax_merge.zoo.smollm2 import VERSION

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SEEDS = ["uniform", "parents", "task_vectors"]
# The section `search` of each. Where it names no population, that of the others; generations are as many as the budget
# allows, or those that it names where the budget allows more.
VARIANTS: dict[str, dict[str, Any]] = {
    "cma_es": {"strategy": "cma_es"},
    "sep_cma_es": {"strategy": "sep_cma_es"},
    "lm_ma_es": {"strategy": "lm_ma_es"},
    "xnes": {"strategy": "xnes"},
    "ipop_cma_es": {"strategy": "ipop_cma_es"},
    "bipop_cma_es": {"strategy": "bipop_cma_es"},
    "de": {"strategy": "de"},
    "pso": {"strategy": "pso"},
    "ga": {"strategy": "ga"},
    "random": {"strategy": "random"},
    "gradient": {"strategy": "gradient", "population": 1, "generations": 80},
    "gradient+long": {"strategy": "gradient", "population": 1},
    "gradient+minibatches": {
        "strategy": "gradient",
        "population": 1,
        "generations": 160,
        "gradient": {"minibatches": 4},
    },
    "hybrid": {"strategy": "hybrid", "gradient": {"generations": 80, "minibatches": 4}},
    "auto": {"strategy": "auto"},
    "cma_es+none": {"strategy": "cma_es", "seeds": []},
    "cma_es+rungs": {"strategy": "cma_es", "rungs": 4, "generations": 107},
    "cma_es+seeds": {"strategy": "cma_es", "seeds": SEEDS},
    "cma_es+rungs+seeds": {"strategy": "cma_es", "rungs": 4, "seeds": SEEDS, "generations": 107},
    "cma_es+chosen+seeds": {
        "strategy": "cma_es",
        "rungs": 4,
        "rung_examples": "item_response",
        "seeds": SEEDS,
        "generations": 107,
    },
    "pso+parents": {"strategy": "pso", "seeds": ["parents"]},
}
# The strategies that follow gradients here.
FOLLOWS = ("gradient", "hybrid", "auto")
# Generations on minibatches between two looks at all examples.
LOOK_EVERY = 8
# The strategy that others are compared with: how many passes they need to be where it ends.
REFERENCE = "cma_es"


@dataclass(frozen=True)
class Family:
    """A config, and spaces of its experiment by name: what `space:` says in each, beside the config's."""

    config: Path
    spaces: dict[str, dict[str, Any]]


FAMILIES = {
    "zoo": Family(CONFIGS / "quickstart.yaml", {"config": {}}),
    "smollm2": Family(
        CONFIGS / "smollm2.yaml",
        {
            "one": {"layers_per_group": "all", "components": ["attention+mlp+norm+embed"]},
            "thirds": {"layers_per_group": 10, "components": ["attention+mlp+norm"]},
            "layers": {"layers_per_group": 1, "components": ["attention+mlp+norm"]},
            "components": {"layers_per_group": 1, "components": ["attention", "mlp", "norm"]},
        },
    ),
}
DEFAULT_SPACES = {"zoo": "config", "smollm2": "thirds"}

# The figures of one search, as JSON has them: what it was (KEYS; `settings` is what the variant says), `dims`, the
# `machine`, and for each generation its `passes`, `seconds` and `best`, the best fitness so far (None: no candidate
# yet). genomes: the best candidate, by the generation in which it was found; heldout: its held-out fitness and what
# else is shown, by the same.
Row = dict[str, Any]
KEYS = ("family", "space", "variant", "settings", "seed", "population", "budget", "gradient_cost")


# ---------------------------------------------------------------------------------------------------------------
# One search


@dataclass(frozen=True)
class Experiment:
    """A config's problem, and what scores genomes on the examples of every generation and on the held-out ones."""

    config: Path
    problem: SearchProblem
    searched: SpaceEvaluator[PopulationEvaluator]
    heldout: SpaceEvaluator[PopulationEvaluator]


class BudgetSpent(Exception):
    """The search has used its passes."""


class Trace:
    """The trace of a search, generation by generation. Raises BudgetSpent in the one after which no pass is left."""

    def __init__(self, budget: float) -> None:
        self._left = budget
        self.figures: Row = {"passes": [], "seconds": [], "best": [], "genomes": {}, "heldout": {}}

    def add(self, passes: float, seconds: float, best: float | None, genome: np.ndarray) -> None:
        """best: the best fitness so far; genome: float32[D], whose it is."""
        kept = self.figures
        if best is not None and best != (kept["best"] or [None])[-1]:
            kept["genomes"][str(len(kept["best"]) + 1)] = [float(gene) for gene in genome]
        kept["passes"].append(round(passes, 6))
        kept["seconds"].append(round(seconds, 6))
        kept["best"].append(best)
        self._left -= passes
        if self._left < 1e-6:
            raise BudgetSpent


class TracedStorage(Storage):
    """Keeps a search's trace. searched: what scores candidates on all examples of a generation; cost: passes of a
    candidate with its gradient."""

    def __init__(
        self, trace: Trace, strategy: Strategy, searched: SpaceEvaluator[PopulationEvaluator], cost: float
    ) -> None:
        super().__init__()
        self._trace, self._strategy, self._searched, self._cost = trace, strategy, searched, cost
        self._examples = sum(task.size for task in searched.tasks)
        self._by_gradient = False
        self._best, self._genome = -np.inf, np.zeros(0, np.float32)

    def restore(self, like: State, log: Callable[[str], None]) -> tuple[State, int]:
        self._by_gradient = wants_gradients(self._strategy, like["strategy"])
        return super().restore(like, log)

    def save(self, generation: int, state: Any, row: dict[str, Any], timing: dict[str, Any]) -> None:
        super().save(generation, state, row, timing)
        seconds = timing["seconds"]
        passes = sum(row["examples"]) / self._examples * (self._cost if self._by_gradient else 1.0)
        in_part = self._by_gradient and row["best"] is None
        self._by_gradient = wants_gradients(self._strategy, state["strategy"])
        if in_part and generation % LOOK_EVERY == 0:
            # Minibatches score no candidate on all examples: the place that they led to is scored, and counted.
            ends = self._strategy.finalists(state["strategy"])
            started = time.perf_counter()
            values = fitness(self._searched.tasks, self._searched.score(ends))
            seconds += time.perf_counter() - started
            passes += len(ends)
            if np.nanmax(values, initial=-np.inf) > self._best:
                self._best, self._genome = float(np.nanmax(values)), ends[int(np.nanargmax(values))]
        best, genome = row["best_so_far"], state["genomes"][0]
        if np.isfinite(self._best) and (best is None or self._best > best):
            best, genome = self._best, self._genome
        self._trace.add(passes, seconds, best, genome)


def open_experiments(family: Family, spaces: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Experiment]:
    """The family's experiment in each space. The bank and what is compiled are the same in all."""
    experiments: dict[str, Experiment] = {}
    for name in spaces:
        changed = [f"space.{key}={json.dumps(value)}" for key, value in family.spaces[name].items()]
        problem = build_problem(family.config, read_config(family.config, [*overrides, *changed], 0))
        if experiments:
            other = next(iter(experiments.values()))
            searched, heldout = (replace(one, space=problem.space) for one in (other.searched, other.heldout))
        else:
            on = open_evaluators(problem, problem.prepare())
            searched, heldout = on.shards[0], on.heldout
        experiments[name] = Experiment(family.config, problem, searched, heldout)
    return experiments


def search_problem(experiment: Experiment, search: SearchConfig, seed: int) -> SearchProblem:
    """The experiment with another search and seed."""
    changed = experiment.problem.backend.config.model_copy(update={"search": search, "seed": seed})
    return build_problem(experiment.config, changed)


def run(experiment: Experiment, problem: SearchProblem, storage: Storage, reporter: Reporter) -> None:
    """Search, as the program does, with the bank that is in memory."""

    def on(tasks: list[BatchedTask]) -> SpaceEvaluator[PopulationEvaluator]:
        merges = experiment.searched.evaluator
        decoder = replace(merges.evaluator, batched_tasks=tasks, chunk_sizes={}, lookup_corpus={})
        return SpaceEvaluator(problem.space, replace(merges, evaluator=decoder))

    evaluators = problem.prepare().map(on)
    evolve(problem, replace(evaluators, validation=None), storage, reporter)


def run_search(experiment: Experiment, search: SearchConfig, seed: int, cost: float, trace: Trace) -> None:
    """Search until the config's generations are over, or the trace's budget is spent."""
    problem = search_problem(experiment, search, seed)
    with suppress(BudgetSpent):
        run(experiment, problem, TracedStorage(trace, problem.strategy, experiment.searched, cost), Reporter())


def run_peer_search(experiment: Experiment, name: str, population: int, budget: int, seed: int, trace: Trace) -> None:
    """Search with a peer, between the same bounds."""
    best, found = -np.inf, experiment.problem.space.start

    def evaluate(units: np.ndarray) -> np.ndarray:
        nonlocal best, found
        genomes = from_unit(units).astype(np.float32)
        started = time.perf_counter()
        values = fitness(experiment.searched.tasks, experiment.searched.score(genomes))
        seconds = time.perf_counter() - started
        leader = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))
        if values[leader] > best:
            best, found = float(values[leader]), genomes[leader]
        trace.add(len(genomes), seconds, best if np.isfinite(best) else None, found)
        return values

    with suppress(BudgetSpent):
        run_peer(name, evaluate, experiment.problem.space.dims, population, budget, seed)


def run_pso_merging_search(experiment: Experiment, population: int, seed: int, trace: Trace) -> None:
    """Search with PSO-Merging. Its models have no genomes: whatever is best so far is scored held out at once, which is
    not counted."""
    merges = experiment.searched.evaluator
    bank, dtype = merges.bank, experiment.problem.backend.candidates.spec.export_dtype
    best = -np.inf

    def source(s: int) -> Any:
        stacks = {name: {name: leaf.sources[:, s] for name, leaf in own.items()} for name, own in bank.stacks.items()}
        whole = StackedWeights(stacks, {name: leaf.sources[s] for name, leaf in bank.shared.items()})
        return jax.tree.map(lambda values: np.asarray(values, np.float32), whole)

    def scored(decoder: Evaluator, model: Any) -> TaskScores:
        return decoder.score_stored(jax.tree.map(lambda values: jnp.asarray(values, dtype), model))

    def evaluate(models: Sequence[Any]) -> np.ndarray:
        nonlocal best
        started = time.perf_counter()
        tasks = experiment.searched.tasks
        values = np.concatenate([fitness(tasks, scored(merges.evaluator, model)) for model in models])
        seconds = time.perf_counter() - started
        leader = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))
        if values[leader] > best:
            best, generation = float(values[leader]), str(len(trace.figures["best"]) + 1)
            scores = scored(experiment.heldout.evaluator.evaluator, models[leader])
            trace.figures["heldout"][generation] = heldout_figures(experiment, scores)[0]
        trace.add(len(models), seconds, best if np.isfinite(best) else None, np.zeros(0))
        return values

    sources = [source(s) for s in range(1 + len(experiment.problem.parents))]
    with suppress(BudgetSpent):
        run_pso_merging(evaluate, sources[0], sources[1:], population, seed)


def start_row(arguments: argparse.Namespace, experiment: Experiment, space: str, variant: str, seed: int) -> Row:
    """The options that define a search, without figures."""
    settings, search = VARIANTS.get(variant, {}), experiment.problem.search
    population = arguments.population or experiment.problem.strategy.population
    return {
        "family": arguments.family, "space": space, "variant": variant, "settings": settings, "seed": seed,
        "population": settings.get("population", population),
        "budget": arguments.passes or population * (arguments.generations or search.generations),
        "gradient_cost": arguments.gradient_cost if settings.get("strategy") in FOLLOWS else None,
        "dims": experiment.problem.space.dims, "machine": describe(),
    }  # fmt: skip


def search_config(row: Row) -> SearchConfig:
    """A row's search, with as many generations as its budget pays for, or more than it does where the strategy does not
    look at their number; the steps of `gradient` become smaller to the last one."""
    settings, budget, population = row["settings"], row["budget"], row["population"]
    if settings["strategy"] == "auto":
        return SearchConfig.model_validate({**settings, "budget": f"{budget} passes"})
    if settings["strategy"] == "gradient":
        minibatches = settings.get("gradient", {}).get("minibatches", 1)
        looks = 1 / LOOK_EVERY if minibatches > 1 else 0.0
        most = int(budget / (population * (row["gradient_cost"] / minibatches + looks)))
    elif "rungs" in settings:
        most = budget
    else:
        most = budget // population + settings.get("gradient", {}).get("generations", 0)
    generations = max(1, min(most, settings.get("generations", most)))
    return SearchConfig.model_validate({**settings, "population": population, "generations": generations})


def measure(experiment: Experiment, row: Row) -> Row:
    """The row with the figures of its search."""
    trace = Trace(row["budget"])
    if row["variant"] == PSO_MERGING:
        run_pso_merging_search(experiment, row["population"], row["seed"], trace)
    elif row["variant"] in PEERS:
        run_peer_search(experiment, row["variant"], row["population"], row["budget"], row["seed"], trace)
    else:
        run_search(experiment, search_config(row), row["seed"], row["gradient_cost"] or 1.0, trace)
    return row | trace.figures


def programs_of(row: Row) -> tuple[Any, ...]:
    """A key of the compiled programs that a row's search needs: its rungs, and the strategy where it has gradients,
    with its minibatches. Spaces, and strategies without gradients, share theirs."""
    settings = row["settings"]
    minibatches = settings.get("gradient", {}).get("minibatches", 1)
    rungs = settings.get("rungs", 1), settings.get("rung_examples")
    return *rungs, settings["strategy"] if row["gradient_cost"] else None, minibatches


def warm_up(experiment: Experiment, row: Row) -> None:
    """Compile what a row's search needs: a generation of it, or one of gradients and one without."""
    settings = row["settings"] or {"strategy": "random"}
    short: dict[str, Any] = {"generations": 1}
    if settings["strategy"] == "hybrid":
        short = {"generations": 2, "gradient": {**settings.get("gradient", {}), "generations": 1}}
    search = SearchConfig.model_validate({**settings, "population": row["population"], **short})
    run_search(experiment, search, row["seed"], 1.0, Trace(np.inf))


# ---------------------------------------------------------------------------------------------------------------
# Figures of a search


def spent(row: Row) -> np.ndarray:
    """Passes until the end of each generation, float64[G]."""
    return np.cumsum(np.array(row["passes"], np.float64))


def best_of(row: Row) -> np.ndarray:
    """The best fitness so far after each generation, float64[G], NaN before there is one."""
    return np.array([np.nan if value is None else value for value in row["best"]], np.float64)


def generation_after(row: Row, passes: float) -> int:
    """The number of generations that are over after this many passes."""
    return int(np.searchsorted(spent(row), passes + 1e-6, side="right"))


def found_in(row: Row, generation: int) -> str | None:
    """The generation, as the row's genomes are named, in which what is best after `generation` was found."""
    before = [int(number) for number in row["genomes"] if int(number) <= generation]
    return str(max(before)) if before else None


def passes_to(row: Row, target: float) -> float:
    """Passes until the best fitness is `target`; infinite where it never is."""
    reached = np.flatnonzero(best_of(row) >= target)
    return float(spent(row)[reached[0]]) if reached.size else np.inf


def measure_heldout(experiment: Experiment, row: Row, checkpoints: Sequence[int]) -> bool:
    """Enter the held-out scores of what is best at the checkpoints and at the end; whether any was missing."""
    ends = [generation_after(row, passes) for passes in checkpoints] + [len(row["best"])]
    named = {found_in(row, generation) for generation in ends} - {None, *row["heldout"]}
    missing = sorted(name for name in named if name is not None)
    if not missing:
        return False
    scores = experiment.heldout.score(np.array([row["genomes"][name] for name in missing], np.float32))
    row["heldout"] |= dict(zip(missing, heldout_figures(experiment, scores), strict=True))
    return True


def heldout_figures(experiment: Experiment, scores: TaskScores) -> list[dict[str, float]]:
    """Each candidate's held-out fitness, and its other held-out scores."""
    tasks = experiment.heldout.tasks
    shown = [f"{task.name}/{task.metric}" for task in tasks if task.weight == 0]
    return [
        {"fitness": float(value), **{metric: table[metric] for metric in shown}}
        for value, table in zip(fitness(tasks, scores), means(tasks, scores), strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------
# The file


def key_of(row: Row) -> str:
    return json.dumps([row[key] for key in KEYS], sort_keys=True)


def read_rows(path: Path | None) -> dict[str, Row]:
    """The rows that a file holds, by their keys; of a search that stands there twice, the later one. A line that was
    cut short is left out."""
    rows: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[key_of(row)] = row
    return rows


def append_row(path: Path | None, row: Row) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_short + json.dumps(row) + "\n")


def collect(arguments: argparse.Namespace, names: Sequence[str]) -> list[Row]:
    """The rows of all searches that were asked for: those that the file holds, and the others, run one by one."""
    held = read_rows(arguments.json)
    experiments = open_experiments(FAMILIES[arguments.family], arguments.dimensions)
    rows: list[Row] = []
    warm: set[tuple[Any, ...]] = set()
    for space, name, seed in product(arguments.dimensions, names, range(arguments.seeds)):
        experiment = experiments[space]
        row = start_row(arguments, experiment, space, name, seed)
        is_new = key_of(row) not in held
        if is_new and programs_of(row) not in warm:
            warm_up(experiment, row)
            warm.add(programs_of(row))
        row = measure(experiment, row) if is_new else held[key_of(row)]
        if measure_heldout(experiment, row, arguments.checkpoints) or is_new:
            append_row(arguments.json, row)
            print(describe_row(row), flush=True)
        rows.append(row)
    return rows


def describe_row(row: Row) -> str:
    """One line on a search that has ended."""
    heldout = row["heldout"].get(found_in(row, len(row["best"])), {})
    shown = ", ".join(f"{name} {value:.4f}" for name, value in heldout.items())
    return (
        f"{row['family']}, {row['space']}, {row['variant']}, seed {row['seed']}: search {best_of(row)[-1]:.4f}, "
        f"held out {shown}; {spent(row)[-1]:,.0f} passes, {sum(row['seconds']):.1f} s"
    )


# ---------------------------------------------------------------------------------------------------------------
# Tables and plots


def groups_of(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each variant in each space."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["space"], row["variant"]), []).append(row)
    return groups


def label_of(rows: Sequence[Row], several: bool) -> str:
    row = rows[0]
    return f"{row['space']} ({row['dims']}), {row['variant']}" if several else str(row["variant"])


def heldout_at(row: Row, generation: int, measure: str) -> float:
    """A held-out score of what is best after a generation; NaN before there is one."""
    found = found_in(row, generation)
    return float("nan") if found is None else float(row["heldout"][found][measure])


def measures_of(rows: Sequence[Row]) -> list[str]:
    """The names of the held-out scores: the fitness, and the others that are shown."""
    return list(next(iter(rows[0]["heldout"].values()), {"fitness": 0.0}))


def figure_of(value: float, measure: str) -> str:
    if not np.isfinite(value):
        return "–"
    return f"{value:.4f}" if measure in ("search", "fitness") else f"{value:.1%}"


def quartiles(values: Sequence[float], measure: str) -> str:
    """Median, and the quartiles beside it where there are several values."""
    low, middle, high = (figure_of(value, measure) for value in np.percentile(values, [25, 50, 75]))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def lower_median(values: Sequence[float]) -> float:
    """The median, of an even number of values the lower one: at least half of them are as high."""
    return float(sorted(values)[(len(values) - 1) // 2])


def upper_median(values: Sequence[float]) -> float:
    """The median, of an even number of values the upper one: never a mean with something infinite."""
    return float(sorted(values)[len(values) // 2])


def title(measure: str) -> str:
    return {"search": "search split", "fitness": "held out"}.get(measure, measure.replace("_", " "))


def final_table(rows: Sequence[Row]) -> str:
    """The end of each variant, and the passes that it spends until it is where the reference ends."""
    groups, measures = groups_of(rows), measures_of(rows)
    several = len({space for space, _ in groups}) > 1
    heads = ["strategy", "passes", *map(title, ["search", *measures])]
    heads += [f"passes to {REFERENCE}'s end", f"of {REFERENCE}'s", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for (space, _), own in groups.items():
        cells = [label_of(own, several), f"{np.median([spent(row)[-1] for row in own]):,.0f}"]
        cells.append(quartiles([best_of(row)[-1] for row in own], "search"))
        for measure in measures:
            cells.append(quartiles([heldout_at(row, len(row["best"]), measure) for row in own], measure))
        reference = groups.get((space, REFERENCE), [])
        if reference:
            target = lower_median([best_of(row)[-1] for row in reference])
            theirs, ours = (upper_median([passes_to(row, target) for row in part]) for part in (reference, own))
            least = upper_median([spent(row)[-1] for row in own])
            cells += [f"{ours:,.0f}", f"{ours / theirs:.2f}"] if np.isfinite(ours) else [f"> {least:,.0f}", ""]
        else:
            cells += ["", ""]
        cells.append(f"{np.median([sum(row['seconds']) for row in own]):,.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def progress_table(rows: Sequence[Row], checkpoints: Sequence[int], measure: str) -> str:
    """The median of a measure after so many passes, by variant."""
    groups = groups_of(rows)
    several = len({space for space, _ in groups}) > 1
    lines = [
        f"| {title(measure)}, after | " + " | ".join(f"{passes:,} passes" for passes in checkpoints) + " |",
        "| --- |" + " ---: |" * len(checkpoints),
    ]
    for own in groups.values():
        cells = []
        for passes in checkpoints:
            ends = [generation_after(row, passes) for row in own]
            if measure == "search":
                found = [best_of(row)[end - 1] if end else np.nan for row, end in zip(own, ends, strict=True)]
            else:
                found = [heldout_at(row, end, measure) for row, end in zip(own, ends, strict=True)]
            cells.append(figure_of(float(np.median(found)), measure))
        lines.append(f"| {label_of(own, several)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """The loss on the search split against passes and against seconds: medians, and bands between the quartiles (PNG);
    a row of panels for each space."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = groups_of(rows)
    spaces = list(dict.fromkeys(space for space, _ in groups))
    variants = list(dict.fromkeys(variant for _, variant in groups))
    styles = {variant: (f"C{i % 10}", ("-", "--", ":")[i // 10 % 3]) for i, variant in enumerate(variants)}
    size = (13, 4.5 * len(spaces))
    figure, axes = plt.subplots(len(spaces), 2, figsize=size, sharey="row", squeeze=False, constrained_layout=True)
    for (space, variant), own in groups.items():
        panels, (color, style) = axes[spaces.index(space)], styles[variant]
        both = [[spent(row) for row in own], [np.cumsum(row["seconds"]) for row in own]]
        for panel, times in zip(panels, both, strict=True):
            grid = np.linspace(max(one[0] for one in times), np.median([one[-1] for one in times]), 200)
            losses = [
                -best_of(row)[np.searchsorted(one, grid + 1e-9, side="right") - 1]
                for row, one in zip(own, times, strict=True)
            ]
            low, middle, high = np.percentile(losses, [25, 50, 75], axis=0)
            panel.plot(grid, middle, style, color=color, label=variant)
            panel.fill_between(grid, low, high, color=color, alpha=0.15, linewidth=0)
        panels[0].set(yscale="log", ylabel=f"{space}: minus the best fitness so far" if len(spaces) > 1 else
                      "minus the best fitness so far, search split")  # fmt: skip
    for panel, label in zip(axes[-1], ("passes", "seconds of evaluating"), strict=True):
        panel.set_xlabel(label)
    for panel in axes.flat:
        panel.grid(alpha=0.3, which="both")
    handles = {text: line for panel in axes.flat for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------
# What a generation takes beside evaluating


class Clock(Reporter):
    """The time at which each generation was over, and the seconds in which it was evaluated."""

    def __init__(self) -> None:
        self.ended: list[float] = []
        self.evaluating_seconds: list[float] = []

    def finished(self, generation: Generation) -> None:
        self.ended.append(time.perf_counter())
        self.evaluating_seconds.append(generation.seconds)


class TimedStorage(FolderStorage):
    """A run folder that measures how long saving takes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds: list[float] = []

    def save(self, generation: int, state: Any, row: dict[str, Any], timing: dict[str, Any]) -> None:
        started = time.perf_counter()
        super().save(generation, state, row, timing)
        self.seconds.append(time.perf_counter() - started)


def stand_ins(folder: Path) -> Iterator[str]:
    """Overrides of the SmolLM2 config: where its experts are not in the cache, the base with noise stands for each.
    Seconds do not depend on what weights hold."""
    from safetensors.numpy import load_file, save_file

    experts = ("maths", "japanese")
    if all((cache_folder() / VERSION / expert).is_dir() for expert in experts):
        return
    base = resolve_reference("bench", "zoo:smollm2/base", Path.cwd())
    for i, expert in enumerate(experts):
        own = folder / expert
        own.mkdir()
        for file in base.iterdir():
            if file.suffix != ".safetensors":
                (own / file.name).write_bytes(file.read_bytes())
        rng, tensors = np.random.default_rng(i), load_file(base / "model.safetensors")
        noisy = {
            name: (values + np.float32(0.001) * rng.standard_normal(values.shape, np.float32)).astype(values.dtype)
            for name, values in tensors.items()
        }
        save_file(noisy, own / "model.safetensors", metadata={"format": "pt"})
        yield f"parents.{i}={own}"


def overhead(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Print, for each strategy, the seconds of a generation in a run folder, and the part that is not evaluating."""
    print(
        "| space (dimensions), strategy | s/generation | evaluating, s | saving, ms | asking, telling and the rest, ms "
        "| not evaluating |\n| --- |" + " ---: |" * 5
    )
    with tempfile.TemporaryDirectory() as work:
        replaced = list(stand_ins(Path(work))) if arguments.family == "smollm2" else []
        experiments = open_experiments(FAMILIES[arguments.family], arguments.dimensions, replaced)
        for number, (space, name) in enumerate(product(arguments.dimensions, names)):
            experiment = experiments[space]
            row = start_row(arguments, experiment, space, name, 0)
            problem = search_problem(experiment, search_config(row), 0)
            folder = open_run(
                Path(work) / f"run-{number}",
                resolved_document(problem.backend.config, problem),
                resume=False,
                overwrite=False,
            )
            clock = Clock()
            storage = TimedStorage(folder, Checkpoints(folder))
            run(experiment, problem, storage, clock)
            # The first generation compiles, and is not counted.
            whole = float(np.mean(np.diff(clock.ended)))
            evaluating, saving = (float(np.mean(part[1:])) for part in (clock.evaluating_seconds, storage.seconds))
            rest = whole - evaluating - saving
            print(
                f"| {space} ({row['dims']}), {name} | {whole:.3f} | {evaluating:.3f} | {1000 * saving:.1f} "
                f"| {1000 * rest:.1f} | {1 - evaluating / whole:.2%} |",
                flush=True,
            )
    population = arguments.population or next(iter(experiments.values())).problem.strategy.population
    note = "; stand-ins for the experts, which are not in the cache" if replaced else ""
    print(f"\n{arguments.family}, populations of {population}{note}; {describe()}")


# ---------------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search strategies, and peers, on the same experiment.")
    parser.add_argument("--family", choices=FAMILIES, help="default: zoo; with --overhead smollm2")
    parser.add_argument("--dimensions", nargs="+", metavar="SPACE", help="spaces of the family; of smollm2: "
                        + ", ".join(FAMILIES["smollm2"].spaces))  # fmt: skip
    known = [*VARIANTS, *PEERS, PSO_MERGING]
    parser.add_argument("--strategies", nargs="+", choices=known, metavar="NAME",
                        help="default: all; with --overhead cma_es. Of " + ", ".join(known))  # fmt: skip
    parser.add_argument("--peers", action="store_true", help="all peers, after the strategies")
    parser.add_argument("--seeds", type=int, default=11)
    parser.add_argument("--population", type=int, help="default: the config's")
    parser.add_argument("--generations", type=int, help="default: the config's")
    parser.add_argument("--passes", type=int, help="what a search may spend, in place of population x generations")
    parser.add_argument("--gradient-cost", type=float, default=4.0, help="passes of a candidate with its gradient")
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[80, 160, 320, 530, 800, 1600], metavar="PASSES")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append every search's figures; skip what is there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw fitness against passes and seconds")
    parser.add_argument("--overhead", action="store_true", help="what a generation takes beside evaluating, and end")
    arguments = parser.parse_args()
    arguments.family = arguments.family or ("smollm2" if arguments.overhead else "zoo")
    arguments.dimensions = arguments.dimensions or [DEFAULT_SPACES[arguments.family]]
    unknown = next((name for name in arguments.dimensions if name not in FAMILIES[arguments.family].spaces), None)
    if unknown is not None:
        parser.error(f"--dimensions: {arguments.family} has {', '.join(FAMILIES[arguments.family].spaces)}")
    if min(arguments.seeds, *(getattr(arguments, name) or 1 for name in ("population", "generations", "passes"))) < 1:
        parser.error("--seeds, --population, --generations and --passes must be at least 1")
    return arguments


def main() -> None:
    arguments = parse()
    logging.getLogger().setLevel(logging.ERROR)
    names = arguments.strategies or ([REFERENCE] if arguments.overhead else list(VARIANTS))
    if arguments.overhead:
        overhead(arguments, [name for name in names if name in VARIANTS])
        return
    names += [name for name in [*PEERS, PSO_MERGING] if arguments.peers and name not in names]
    if not is_installed() and any(name in PEERS for name in names):
        print("pymoo is not installed (`pip install 'evojax-merge[bench]'`): its algorithms are left out", flush=True)
        names = [name for name in names if name not in PEERS]
    rows = collect(arguments, names)
    if not rows:
        return
    budget = max(row["budget"] for row in rows)
    print(f"\n{final_table(rows)}")
    checkpoints = [passes for passes in arguments.checkpoints if passes <= budget]
    for measure in ["search", *measures_of(rows)] if checkpoints else []:
        print(f"\n{progress_table(rows, checkpoints, measure)}")
    population = max(row["population"] for row in rows)
    print(
        f"\n{arguments.family}, {arguments.seeds} seeds, populations of {population}, {budget:,} passes at most; "
        "medians (and quartiles); " + "; ".join(dict.fromkeys(row["machine"] for row in rows))
    )
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
