"""The effect of bfloat16 on scores and on the ranking of candidates (10 minutes).

    python -m bench precision              # SmolLM2-135M (made on the first run), and the demo family
    python -m bench precision --parts zoo

- scores: SmolLM2-135M-Instruct and two fine-tunes of it on the rows of configs/smollm2.yaml, in both dtypes, here and
  in transformers. A row's score is the mean log-probability of its target's tokens; shown are means over rows of
  absolute differences.
- rankings: the fitness of a population in both dtypes: of the first generation of configs/smollm2.yaml, with more
  candidates, and of the first and the middle generation of configs/quickstart.yaml; in the middle one candidates have
  come near each other. *Lost* is by how much the candidate that bfloat16 has as the best is worse than the best, in
  float32.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np

from bench.shared.machine import describe
from bench.shared.torch_peer import score_rows
from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.evaluation.scores import fitness
from evojax_merge.problem import SearchProblem, build_problem, read_config
from evojax_merge.search.loop import INIT_KEY, evolve, generation_key
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.steps.selection import open_evaluators
from evojax_merge.tasks.splits import Splits

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DTYPES = ("float32", "bfloat16")
# Generations in bfloat16, the final choice in float32.
BOTH = ("evaluation.compute_dtype=bfloat16", "evaluation.final_compute_dtype=float32")
PARTS = ("scores", "smollm2", "zoo")


def problem_of(config: str, overrides: Sequence[str]) -> SearchProblem:
    path = CONFIGS / config
    return build_problem(path, read_config(path, list(overrides), None))


# ---------------------------------------------------------------------------------------------------------------
# Scores


def mean_scores(model: Path, problem: SearchProblem) -> dict[tuple[str, str], np.ndarray]:
    """(whose, dtype) -> the mean log-probability of each row's target tokens, float64[S]."""
    import torch
    from transformers import AutoModelForCausalLM

    (tasks,) = problem.prepare().shards
    (task,) = tasks
    rows = task.requests.scored
    counts = np.array([len(row.tokens) - row.start for row in rows])
    sources, config = open_sources([model])
    found = {}
    for dtype in DTYPES:
        evaluator = Evaluator(config, problem.backend.models.tokenizer, tasks, dtype)
        scores = evaluator.score_stored(load_stored(sources, config, 0, dtype))
        found["ours", dtype] = scores.log_probabilities[task.task.name][0] / counts
        peer = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        found["transformers", dtype] = score_rows(peer, rows) / counts
    return found


def scores_part(options: argparse.Namespace) -> None:
    problem = problem_of("smollm2.yaml", [f"tasks.0.limit={options.problems}"])
    print(
        "\n| SmolLM2-135M-Instruct | rows | ours, bfloat16 - float32 | transformers, bfloat16 - float32 "
        "| ours - transformers, float32 | ours - transformers, bfloat16 |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for _, model in problem.facts.compared:
        found = mean_scores(model, problem)
        pairs = [
            (("ours", "bfloat16"), ("ours", "float32")),
            (("transformers", "bfloat16"), ("transformers", "float32")),
            (("ours", "float32"), ("transformers", "float32")),
            (("ours", "bfloat16"), ("transformers", "bfloat16")),
        ]
        cells = [f"{np.abs(found[one] - found[other]).mean():.1e}" for one, other in pairs]
        count = len(found["ours", "float32"])
        print(f"| {model.name} | {count} | {' | '.join(cells)} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Rankings


@dataclass(frozen=True)
class Agreement:
    """The ranking of a population by scores that are rounded, against exact ones. spread: the standard deviation of the
    exact fitness; noise: that of the differences; spearman: of the ranks; kept: of the best `quarter`, how many are
    among the best by rounded scores; lost: of exact fitness, by taking the best of the rounded."""

    spread: float
    noise: float
    spearman: float
    kept: int
    quarter: int
    lost: float


def ranks(values: np.ndarray) -> np.ndarray:
    """From 0 on, ascending; equals share the mean of their ranks."""
    return np.array([(values < one).sum() + ((values == one).sum() - 1) / 2 for one in values])


def agreement(exact: np.ndarray, rounded: np.ndarray) -> Agreement:
    """Both: float[P], finite."""
    quarter = max(1, len(exact) // 4)
    best, chosen = (set(np.argsort(-values, kind="stable")[:quarter].tolist()) for values in (exact, rounded))
    return Agreement(
        float(exact.std()), float((rounded - exact).std()),
        float(np.corrcoef(ranks(exact), ranks(rounded))[0, 1]), len(best & chosen), quarter,
        float(exact.max() - exact[np.argmax(rounded)]),
    )  # fmt: skip


def row_of(name: str, problem: SearchProblem, genomes: np.ndarray) -> str:
    (tasks,) = problem.prepare().shards
    on = open_evaluators(problem, Splits([tasks], tasks, None, tasks))
    searched, final = on.shards[0], on.search
    exact, rounded = (fitness(one.tasks, one.score(genomes)) for one in (final, searched))
    finite = np.isfinite(exact) & np.isfinite(rounded)
    found, examples = agreement(exact[finite], rounded[finite]), sum(task.task.size for task in tasks)
    return (
        f"| {name} | {finite.sum()} | {examples} | {found.spread:.2g} | {found.noise:.2g} | {found.spearman:.3f} "
        f"| {found.kept} of {found.quarter} | {found.lost:.2g} |"
    )


def first_generation(problem: SearchProblem) -> np.ndarray:
    """float32[P, D]: what the strategy asks for first."""
    seed = problem.seed
    state = problem.strategy.init(generation_key(seed, INIT_KEY), problem.space.start[None])
    return np.asarray(problem.strategy.ask(generation_key(seed, 0), state)[0])


def last_generation(problem: SearchProblem) -> np.ndarray:
    """float32[P, D]: the candidates of the last generation of a search in float32."""
    on = open_evaluators(problem, problem.prepare())
    storage = Storage()
    evolve(problem, on, storage, Reporter())
    return np.array(storage.read_history()[-1]["genomes"], np.float32)


def rankings(options: argparse.Namespace, families: Sequence[str]) -> None:
    print(
        "\n| population | candidates | examples | spread of the fitness | of the difference | Spearman "
        "| best quarter kept | lost |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    if "smollm2" in families:
        overrides = [f"search.population={options.candidates}", f"tasks.0.limit={options.problems}", *BOTH]
        problem = problem_of("smollm2.yaml", overrides)
        print(row_of("SmolLM2-135M, generation 1", problem, first_generation(problem)), flush=True)
    if "zoo" in families:
        for number in options.generations:
            genomes = last_generation(problem_of("quickstart.yaml", [f"search.generations={number}"]))
            name = f"demo family, generation {number}"
            print(row_of(name, problem_of("quickstart.yaml", BOTH), genomes), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--problems", type=int, default=8, help="that SmolLM2 is scored on")
    parser.add_argument("--candidates", type=int, default=24, help="of SmolLM2's population")
    parser.add_argument("--generations", type=int, nargs="+", default=[1, 50], help="of the demo family")
    options = parser.parse_args()
    print(describe())
    if "scores" in options.parts:
        scores_part(options)
    if families := [part for part in options.parts if part != "scores"]:
        rankings(options, families)


if __name__ == "__main__":
    main()
