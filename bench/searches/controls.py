"""Is a search worth it? Its winner beside controls of the same price, and polished, over five seeds (half an hour).

    python -m bench controls
    python -m bench controls --config vit --seeds 2

Every seed is a search of `configs/quickstart.yaml`, or another config, with another seed and another validation split
(a quarter of the searched examples): the models and the files are those of the config. The controls are those of
`search.controls`, each with as many passes as the search takes (`--passes`): the best of as many random candidates, and
adapters (LoRA) of the base and of the best parent, trained on the examples that the search has. Polishing
(`search.then`) trains an adapter of the winner with as many passes again: it alone has twice the price.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from bench.shared.machine import describe
from evojax_merge.problem import build_problem, read_config
from evojax_merge.report.comparison import Result
from evojax_merge.search.loop import evolve
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.search.run_folder import RunFolder
from evojax_merge.steps.selection import open_evaluators, select_best

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LABELS = {
    "base": "base", "parent": "best parent", "uniform": "uniform merge", "random": "best of as many random candidates",
    "lora_base": "LoRA on the base", "lora_parent": "LoRA on the best parent", "winner": "**evolved merge**",
    "polished": "evolved merge, polished",
}  # fmt: skip


def run_seed(config: Path, seed: int, overrides: list[str]) -> Result:
    """A search of one seed, without its files."""
    problem = build_problem(config, read_config(config, overrides, seed))
    on = open_evaluators(problem, problem.prepare())
    with tempfile.TemporaryDirectory() as folder:
        archive = evolve(problem, on, Storage(), Reporter())
        return select_best(problem, on, archive, folder=RunFolder(Path(folder)))


def table(results: list[Result], score: str, percent: bool) -> str:
    """Markdown: a row for each model, its score in each seed, their mean, and in how many seeds the winner is ahead of
    it, as good, and behind, as far as the 95% intervals of the fitness tell."""
    values: dict[str, list[float]] = defaultdict(list)
    outcomes: dict[str, list[int]] = {role: [0, 0, 0] for role in LABELS}
    for result in results:
        parent = max((row for row in result.rows if row.role == "parent"), key=lambda row: row.fitness)
        for row in result.rows:
            if row.role == "parent" and row is not parent:
                continue
            values[row.role].append(row.fitness if score == "fitness" else row.scores[score])
            if row.lead is not None:
                outcomes[row.role][0 if row.lead.low > 0 else 2 if row.lead.high < 0 else 1] += 1
    seeds = " | ".join(f"seed {number}" for number in range(len(results)))
    lines = [
        f"| {score}, held out | {seeds} | mean | winner ahead / level / behind |",
        "| --- |" + " ---: |" * (len(results) + 2),
    ]
    for role, label in LABELS.items():
        if role in values:
            shown = [*values[role], float(np.mean(values[role]))]
            cells = [f"{100 * value:.0f}%" if percent else f"{value:.3f}" for value in shown]
            counts = " / ".join(map(str, outcomes[role])) if role != "winner" else ""
            lines.append(f"| {label} | " + " | ".join(cells) + f" | {counts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="A search's winner beside controls of the same price.")
    parser.add_argument("--config", default="quickstart", help="of configs/")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=640)
    parser.add_argument("--limit", type=int, help="the number of searched examples")
    arguments = parser.parse_args()
    config, polish = CONFIGS / f"{arguments.config}.yaml", ["search.then=polish"]
    overrides = [
        "search.generations=null", f"search.budget={arguments.passes} passes", "search.validation=0.25",
        "search.controls=[random, lora]",
    ]  # fmt: skip
    if arguments.limit is not None:
        overrides.append(f"tasks.0.limit={arguments.limit}")
    if arguments.config != "vit":
        overrides += polish
    results = []
    for seed in range(arguments.seeds):
        results.append(run_seed(config, seed, overrides))
        for sentence in results[-1].verdicts():
            print(f"seed {seed}: {sentence}", flush=True)
    scores = ["fitness", *results[0].winner.scores]
    for score in scores:
        print(f"\n{table(results, score, score.endswith('accuracy'))}", flush=True)
    print(f"\n{describe()}")


if __name__ == "__main__":
    main()
