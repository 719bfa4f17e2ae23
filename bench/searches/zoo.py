"""The demo family over five seeds (10 minutes, and 12 more to train them once).

    python -m bench zoo

Each seed trains a family of its own, draws other problems and searches with another seed. The merge is searched as in
`configs/quickstart.yaml`, the path with three moves, and the two after each other with half of the candidates each,
so that all three score as many. Beside them stand merges that nobody searched: uniform linear, uniform TIES at
density 0.5, and the sum of both experts' task vectors; and the mean of 16 stacks of layers drawn at random.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bench.shared.machine import describe
from evojax_merge.mergekit.execute import merge_to, prepare
from evojax_merge.mergekit.streams import read_stream
from evojax_merge.problem import SearchProblem, build_problem, read_config, resolved_document
from evojax_merge.report.comparison import Result
from evojax_merge.search import loop
from evojax_merge.search.checkpoints import Checkpoints, FolderStorage
from evojax_merge.search.protocols import GenomeEvaluator
from evojax_merge.search.recording import Reporter
from evojax_merge.search.run_folder import open_run
from evojax_merge.spaces.layer_path import IndicatorSpace
from evojax_merge.steps.selection import open_evaluator, open_evaluators, select_best
from evojax_merge.zoo.references import resolve_reference

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
SHOWN = "whole_answers/accuracy"
# Every search has as many candidates, 16 a generation.
PARAMETER_GENERATIONS = 100
UNSEARCHED = {
    "uniform linear": ["space.method=linear", "space.parameters={weight: {}}"],
    "uniform TIES": ["space.method=ties", "space.parameters={weight: {}}", "space.fixed={density: 0.5}"],
    # Only lambda is left open, and it starts at 1.
    "task vectors added": ["space.parameters={lambda: {}}", "space.fixed={weight: [1, 1]}"],
}
DATA_FLOW = ["space=null", "data_flow={form: moves, moves: 3, window: 2}"]
RANDOM_STACKS = ["space=null", "data_flow={form: indicator, repetitions: 1, scales: none}"]


def problem_on(
    config: Path, family: str, experts: Sequence[str], seed: int, overrides: Sequence[str] = ()
) -> SearchProblem:
    """A config of two tasks, on the models and files of a family of the zoo (`zoo:3`), whose search has that seed."""
    zoo = [
        f"base={family}/base",
        f"parents=[{', '.join(f'{family}/{name}' for name in experts)}]",
        *(f"tasks.{i}.file={family}/search.jsonl" for i in range(2)),
        *(f"tasks.{i}.heldout={family}/heldout.jsonl" for i in range(2)),
    ]
    return build_problem(config, read_config(config, [*zoo, *overrides], seed))


def problem_for(seed: int, overrides: Sequence[str] = ()) -> SearchProblem:
    """The quickstart on the family of `seed`."""
    return problem_on(CONFIG, f"zoo:{seed}", ("maths", "japanese"), seed, overrides)


def accuracies(evaluator: GenomeEvaluator, genomes: np.ndarray) -> np.ndarray:
    """Exact match of each genome, float[P]."""
    task, metric = SHOWN.split("/")
    return evaluator.score(genomes).matrices[task][metric].mean(axis=1)


def start_accuracy(problem: SearchProblem) -> float:
    """Held-out exact match of the merge that the search would start from."""
    heldout = open_evaluator(problem, problem.prepare().heldout)
    return float(accuracies(heldout, problem.space.start[None])[0])


def random_frankenmerge(seed: int) -> float:
    """Mean held-out exact match of stacks of layers drawn at random from the experts, as many as one of them has."""
    problem = problem_for(seed, RANDOM_STACKS)
    assert isinstance(problem.space, IndicatorSpace)
    rng, depth = np.random.default_rng(seed), problem.space.depths[0]
    chosen = [rng.choice(problem.space.layers, depth, replace=False) for _ in range(16)]
    on = np.zeros((len(chosen), problem.space.num_indicators), bool)
    for row, layers in zip(on, chosen, strict=True):
        row[layers] = True
    heldout = open_evaluator(problem, problem.prepare().heldout)
    return float(np.nanmean(accuracies(heldout, np.stack([problem.space.genome(row) for row in on]))))


def evolve(problem: SearchProblem, folder: Path) -> Result:
    """Search, and choose the winner; its model is written to `folder/best/model`."""
    run = open_run(folder, resolved_document(problem.backend.config, problem), resume=False, overwrite=False)
    on = open_evaluators(problem, problem.prepare())
    archive = loop.evolve(problem, on, FolderStorage(run, Checkpoints(run)), Reporter())
    result = select_best(problem, on, archive)
    run.recipe.write_text(problem.backend.describe(result.genome).recipe)
    merge_to(prepare(read_stream(run.recipe).result, find=resolve_reference), run.model, card="")
    return result


def evolve_stages(
    problem_for: Callable[[Sequence[str]], SearchProblem], parents: Sequence[str], stages: Sequence[Sequence[str]]
) -> list[Result]:
    """Searches one after the other, as `stages:` of a config: the winner of one is the first parent of the next.
    problem_for: overrides -> a search; stages: the overrides of each."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as work:
        for number, overrides in enumerate(stages):
            before = [str(Path(work) / str(number - 1) / "best" / "model")] if number else []
            problem = problem_for([*overrides, f"parents=[{', '.join([*before, *parents])}]"])
            results.append(evolve(problem, Path(work) / str(number)))
    return results


def run_seed(seed: int) -> dict[str, float]:
    """Held-out exact match by model, for one seed."""
    whole, half = PARAMETER_GENERATIONS, PARAMETER_GENERATIONS // 2
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        result = evolve(problem_for(seed, [f"search.generations={whole}"]), folder / "merge")
        scores = {row.name: row.scores[SHOWN] for row in result.rows if row.role in ("base", "parent")}
        scores |= {name: start_accuracy(problem_for(seed, overrides)) for name, overrides in UNSEARCHED.items()}
        scores["frankenmerge at random"] = random_frankenmerge(seed)
        scores["evolved merge"] = result.winner.scores[SHOWN]
        path = [*DATA_FLOW, f"search.generations={whole}"]
        scores["evolved path"] = evolve(problem_for(seed, path), folder / "path").winner.scores[SHOWN]
    stages = [[f"search.generations={half}"], [*DATA_FLOW, f"search.generations={whole - half}"]]
    chained = evolve_stages(partial(problem_for, seed), [f"zoo:{seed}/maths", f"zoo:{seed}/japanese"], stages)
    scores["evolved merge, then path"] = chained[-1].winner.scores[SHOWN]
    return scores


def table(title: str, results: dict[int, dict[str, float]]) -> str:
    """Markdown: a row for each model, its share of right answers for each seed, and their mean."""
    names = list(next(iter(results.values())))
    lines = [
        f"| {title} | " + " | ".join(f"seed {seed}" for seed in results) + " | mean |",
        "| --- |" + " ---: |" * (len(results) + 1),
    ]
    for name in names:
        values = [result[name] for result in results.values()]
        cells = [f"{100 * value:.0f}%" for value in [*values, float(np.mean(values))]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def print_table(description: str, title: str, run_seed: Callable[[int], dict[str, float]]) -> None:
    """The program: run as many seeds as the command line says, and print their table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    results = {}
    for seed in range(arguments.seeds):
        results[seed] = run_seed(seed)
        print(f"seed {seed}: {results[seed]}", flush=True)
    print(f"\n{table(title, results)}\n\n{describe()}")


if __name__ == "__main__":
    print_table("The quickstart over several seeds.", "held-out sums right, in Japanese", run_seed)
