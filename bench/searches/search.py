"""Seconds per candidate of a search, against mergekit and transformers (3 minutes).

    python -m bench search

Ours: a population is merged inside compiled passes and scored in memory. The peer, one candidate after the other in
one warm process: mergekit writes the model, transformers loads it, torch scores the same rows in batches of as
many tokens. Imports and the first candidate (compilation, caches) are not counted on either side; ours are shown
apart. Both score the same recipes, and the scores must agree.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np

from bench.shared.machine import describe
from bench.shared.random_family import METHOD, problem_for, write_random_family, write_rows
from bench.shared.torch_peer import mean_log_probability
from evojax_merge.checkpoints.parents import tensor_shapes
from evojax_merge.evaluation.scores import fitness
from evojax_merge.problem import SearchProblem, resolve_reference
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.steps.selection import open_evaluator


@dataclass(frozen=True)
class Timing:
    """Seconds per candidate, and how ours and the peer's are made up."""

    model: str
    parameters: int
    tokens: int
    ours: float
    prepare: float
    compile: float
    peer_merge: float
    peer_load: float
    peer_score: float

    @property
    def peer(self) -> float:
        return self.peer_merge + self.peer_load + self.peer_score


def time_ours(problem: SearchProblem, genomes: np.ndarray) -> tuple[np.ndarray, float, float, float]:
    """(fitness, seconds per candidate, seconds to load and prepare the bank, seconds to compile)."""
    batched_tasks = problem.prepare().shards[0]
    start = time.perf_counter()
    scorer = open_evaluator(problem, batched_tasks)
    prepare = time.perf_counter() - start

    def once() -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        values = fitness(scorer.tasks, scorer.score(genomes))
        return values, time.perf_counter() - start

    _, first = once()
    # The median of three: the machine may be busy.
    runs = [once() for _ in range(3)]
    seconds = float(np.median([run[1] for run in runs]))
    return runs[0][0], seconds / len(genomes), prepare, first - seconds


def time_peer(problem: SearchProblem, genomes: np.ndarray, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(fitness, median seconds for merging, loading, scoring), the first candidate not counted."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoModelForCausalLM

    batched_task = problem.prepare().shards[0][0]
    values, seconds = [], []
    for genome in genomes:
        (folder / "recipe.yaml").write_text(problem.backend.describe(genome).recipe)
        document = load_yaml(folder / "recipe.yaml")
        start = time.perf_counter()
        run_merge(
            MergeConfiguration.model_validate(document), str(folder / "merged"),
            MergeOptions(quiet=True, write_model_card=False),
        )  # fmt: skip
        merged = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="float32").eval()
        loaded = time.perf_counter()
        values.append(mean_log_probability(model, batched_task.requests.scored))
        seconds.append((merged - start, loaded - merged, time.perf_counter() - loaded))
    return np.array(values), np.median(seconds[1:], axis=0)


def measure(name: str, models: dict[str, str], tokens: int, length: int, population: int, peers: int) -> Timing:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        vocabulary = json.loads((Path(models["base"]) / "tokenizer.json").read_text())["model"]["vocab"]
        words = sorted(word for word in vocabulary if not word.startswith("<"))
        write_rows(folder / "rows.jsonl", words, tokens, length)
        problem = problem_for(folder, models["base"], [models["one"], models["two"]], population)
        rng = np.random.default_rng(1)
        genomes = rng.uniform(0, 1, (population, problem.space.dims)).astype(np.float32)
        ours, per_candidate, prepare, compile_seconds = time_ours(problem, genomes)
        theirs, peer = time_peer(problem, genomes[:peers], folder)
        # Among entries of bfloat16 many tie at a threshold: here all of them are kept, there the first ones.
        np.testing.assert_allclose(ours[:peers], theirs, rtol=0.02)
        counted = sum(len(row.tokens) for row in problem.prepare().shards[0][0].requests.scored)
        size = sum(int(np.prod(shape)) for shape in tensor_shapes(problem.backend.models.decoder).values())
        return Timing(name, size, counted, per_candidate, prepare, compile_seconds, *peer)


def table(rows: Sequence[Timing]) -> str:
    lines = [
        "| model | tokens scored | ours, s/candidate | peer, s/candidate | ratio | peer: merge + load + score "
        "| ours, once: prepare + compile |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        parts = f"{row.peer_merge:.2f} + {row.peer_load:.2f} + {row.peer_score:.2f}"
        lines.append(
            f"| {row.model} ({row.parameters / 1e6:.1f} M) | {row.tokens:,} | {row.ours:.4f} | {row.peer:.3f} "
            f"| {row.peer / row.ours:.1f} | {parts} | {row.prepare:.1f} + {row.compile:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds per candidate of a search, against mergekit + transformers.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 2000, 8000])
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--peers", type=int, default=4, help="candidates that the peer builds, 2 or more")
    parser.add_argument("--models", nargs="+", choices=["zoo", "30M"], default=["zoo", "30M"])
    arguments = parser.parse_args()
    if arguments.peers < 2:
        parser.error("--peers: 2 or more, for the first is not counted: it loads what the others find loaded")
    logging.getLogger().setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name in arguments.models:
            if name == "zoo":
                parts = {"base": "zoo:base", "one": "zoo:maths", "two": "zoo:japanese"}
                models = {key: str(resolve_reference("bench", part, Path.cwd())) for key, part in parts.items()}
                length, population = 16, arguments.population
            else:
                write_random_family(Path(work))
                models = {key: str(Path(work) / key) for key in ("base", "one", "two")}
                length, population = 64, max(4, arguments.population // 4)
            for tokens in arguments.tokens:
                rows.append(measure(name, models, tokens, length, population, arguments.peers))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{METHOD}, base and two parents; {describe()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
