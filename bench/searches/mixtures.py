"""Mixtures of the quickstart's experts, with searched gates and with mergekit's hidden gates (15 minutes).

    python -m bench mixtures

The quickstart's models and examples (configs/quickstart.yaml), and 30 generations of its 16 candidates. A row is a
model on the held-out sums: mixtures whose routers have the gates of `evojax-merge moe`, from hidden states that enter a
layer (mergekit's `gate_mode: hidden`) or that the router will receive (`gate_input: normed`); the same mixtures with
searched gates, or with searched gates and experts; and the quickstart's evolved merge. Attention, norms, embedding and
head of a mixture are those of one model, `base`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.shared.machine import describe
from evojax_merge.evaluation.scores import fitness, means
from evojax_merge.problem import SearchProblem, build_problem, config_from
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.search.loop import evolve
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.steps.selection import open_evaluators, rescore

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
SHOWN = "whole_answers/accuracy"
PROMPTS = {
    "zoo:maths": ["what 3 7 plus 4 5 is", "what 8 2 minus 1 9 is"],
    "zoo:japanese": ["いくつ 3 たす 4 は", "いくつ 8 ひく 2 は"],
}
GATES, ALL = ["scale", "bias"], ["scale", "bias", "experts", "dense"]


def mixture_problem(base: str, gate_input: str, searched: Sequence[str], options: argparse.Namespace, seed: int) -> Any:
    document = {key: value for key, value in load_yaml(CONFIG).items() if key != "space"}
    parents = [name for name in ("zoo:base", "zoo:maths", "zoo:japanese") if name != base]
    section = {"experts": list(PROMPTS), "positive_prompts": PROMPTS, "gate_input": gate_input}
    document |= {"base": base, "parents": parents, "mixture": section | {"searched": list(searched)}}
    return problem_of(document, options, seed)


def problem_of(document: dict[str, Any], options: argparse.Namespace, seed: int) -> SearchProblem:
    document["search"] = document["search"] | {"generations": options.generations}
    return build_problem(CONFIG, config_from(CONFIG, document, [], seed))


def search(problem: SearchProblem, seed: int) -> tuple[str, str]:
    """The held-out scores of the space's baseline, and of the winner of a search, as cells."""
    on = open_evaluators(problem, problem.prepare())
    archive = evolve(problem, on, Storage(), Reporter())
    winner = rescore(problem.space, on.search, archive, lambda done: None)[0].genome
    _, baselines = problem.space.baselines()
    scores = on.heldout.score(np.stack([baselines[0], winner]))
    values = fitness(on.heldout.tasks, scores)
    plain, best = (
        f"{value:.3f} ({row[SHOWN]:.0%})" for value, row in zip(values, means(on.heldout.tasks, scores), strict=True)
    )
    return plain, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--generations", type=int, default=30)
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(5)), help="the numbers of rows, from 0")
    options = parser.parse_args()
    seeds = range(options.seeds)
    print(describe(), "\n")
    print(f"| base | model | gates of moe | {' | '.join(f'searched, seed {seed}' for seed in seeds)} |")
    print(f"| --- | --- | ---: | {' | '.join('---:' for _ in seeds)} |")
    rows = [
        ("zoo:base", "layer", GATES), ("zoo:base", "normed", ALL),
        ("zoo:japanese", "layer", GATES), ("zoo:japanese", "normed", ALL),
    ]  # fmt: skip
    for base, gate_input, searched in (row for number, row in enumerate(rows) if number in options.rows):
        results = [search(mixture_problem(base, gate_input, searched, options, seed), seed) for seed in seeds]
        what = "gates" if searched is GATES else "gates, experts, dense layers"
        cells = " | ".join(best for _, best in results)
        print(f"| {base} | gate_input: {gate_input}; {what} | {results[0][0]} | {cells} |", flush=True)
    if len(rows) in options.rows:
        results = [search(problem_of(load_yaml(CONFIG), options, seed), seed) for seed in seeds]
        cells = " | ".join(best for _, best in results)
        print(f"| zoo:base | the quickstart's merge (left: the uniform merge) | {results[0][0]} | {cells} |")


if __name__ == "__main__":
    main()
