"""The quickstart over several seeds: held-out exact match of every model and merge, as a Markdown table.

    python bench/zoo_table.py

Each seed trains a family of its own, draws other problems and searches with another seed. The search is the one of
`configs/quickstart.yaml`; beside it stand the uniform linear merge, the uniform TIES merge at density 0.5, and the
sum of both experts' task vectors.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe

from evojax_merge.checkpoints.bank import load_bank
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.search.loop import Reporter, run_search
from evojax_merge.search.run_folder import open_run
from evojax_merge.search.setup import Problem, build_problem, read_config, resolved_document
from evojax_merge.search.winner import choose_winner

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
SHOWN = "whole_answers/accuracy"
UNSEARCHED = {
    "uniform linear": ["space.method=linear", "space.parameters={weight: {}}"],
    "uniform TIES": ["space.method=ties", "space.parameters={weight: {}}", "space.fixed={density: 0.5}"],
    # Only lambda is left open, and it starts at 1.
    "task vectors added": ["space.parameters={lambda: {}}", "space.fixed={weight: [1, 1]}"],
}


def problem_for(seed: int, overrides: Sequence[str] = ()) -> Problem:
    """The quickstart on the family of `seed`."""
    zoo = [
        f"base=zoo:{seed}/base",
        f"parents=[zoo:{seed}/maths, zoo:{seed}/japanese]",
        *(f"tasks.{i}.file=zoo:{seed}/search.jsonl" for i in range(2)),
        *(f"tasks.{i}.heldout=zoo:{seed}/heldout.jsonl" for i in range(2)),
    ]
    return build_problem(CONFIG, read_config(CONFIG, [*zoo, *overrides], seed))


def start_accuracy(problem: Problem) -> float:
    """Held-out exact match of the merge that the search would start from."""
    bank = load_bank(problem.sources, problem.decoder, problem.spec)
    evaluator = Evaluator(problem.decoder, problem.tokenizer, problem.requests()[2])
    recipes = jax.vmap(problem.space.recipe)(jnp.asarray(problem.space.start)[None])
    task, metric = SHOWN.split("/")
    return float(evaluator.population(bank, problem.spec, recipes).matrices[task][metric].mean())


def run_seed(seed: int) -> dict[str, float]:
    """Held-out exact match by model, for one seed."""
    problem = problem_for(seed)
    bank = load_bank(problem.sources, problem.decoder, problem.spec)
    searched, full, heldout = (Evaluator(problem.decoder, problem.tokenizer, rows) for rows in problem.requests())
    with tempfile.TemporaryDirectory() as work:
        folder = open_run(Path(work) / "run", resolved_document(problem), resume=False, overwrite=False)
        outcome = run_search(problem, bank, searched, folder, Reporter())
    result = choose_winner(problem, bank, full, heldout, outcome)
    scores = {row.name: row.scores[SHOWN] for row in result.rows if row.role in ("base", "parent")}
    scores |= {name: start_accuracy(problem_for(seed, overrides)) for name, overrides in UNSEARCHED.items()}
    return scores | {"evolved": result.winner.scores[SHOWN]}


def table(results: dict[int, dict[str, float]]) -> str:
    names = list(next(iter(results.values())))
    lines = [
        "| held-out sums right, in Japanese | " + " | ".join(f"seed {seed}" for seed in results) + " | mean |",
        "| --- |" + " ---: |" * (len(results) + 1),
    ]
    for name in names:
        values = [result[name] for result in results.values()]
        cells = [f"{100 * value:.0f}%" for value in [*values, float(np.mean(values))]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The quickstart over several seeds.")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    results = {}
    for seed in range(arguments.seeds):
        results[seed] = run_seed(seed)
        print(f"seed {seed}: {results[seed]}", flush=True)
    print(f"\n{table(results)}\n\n{describe()}")


if __name__ == "__main__":
    main()
