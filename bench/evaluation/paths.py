"""Seconds per candidate of layer paths, against building each with transformers (3 minutes).

    python -m bench paths

Ours: the population's trie is walked once per batch; what candidates share at their beginning is computed once, and a
path that comes again not at all. The peer, one candidate after the other in one warm process with all parents loaded:
transformers makes a model of the path's layers (their tensors, folded, are put in its place; no disk), torch scores
the same rows in batches of the same shape. Imports, and the first candidate of each, are not counted; scores agree.

The populations are what a search asks for in its first generation, on a base and two fine-tunes of 30 M parameters
(8 layers of width 512), and, for the growth with M, T and P, paths of random layers.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import yaml

from bench.shared.machine import describe
from bench.shared.random_family import write_random_family, write_rows
from bench.shared.torch_peer import mean_log_probability
from evojax_merge.backends.decoder.kinds.layer_path import PathCandidates
from evojax_merge.evaluation.paths import PathEvaluator
from evojax_merge.evaluation.scores import fitness
from evojax_merge.models.paths import LayerPath
from evojax_merge.problem import SearchProblem, build_problem, read_config
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import INIT_KEY, generation_key
from evojax_merge.steps.selection import open_evaluator

SPACES: dict[str, dict[str, Any]] = {
    "moves, scaled": {"form": "moves", "moves": 3, "window": 3},
    "moves, no scales": {"form": "moves", "moves": 3, "window": 3, "scales": "none"},
    "indicator, matrix": {"form": "indicator", "repetitions": 2},
    "indicator, no scales": {"form": "indicator", "repetitions": 2, "scales": "none"},
}
TOKENS, LENGTH = 2000, 64


def problem_for(folder: File, parents: Sequence[str], space: dict[str, Any]) -> SearchProblem:
    tasks = [{"name": "text", "kind": "likelihood", "file": "rows.jsonl", "heldout": "rows.jsonl"}]
    document = {"parents": [str(folder / name) for name in parents], "data_flow": space, "tasks": tasks}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document | {"export_dtype": "float32"}))
    return build_problem(path, read_config(path, [], None))


def fresh_evaluator(problem: SearchProblem) -> SpaceEvaluator[PathEvaluator]:
    evaluator = open_evaluator(problem, problem.prepare().shards[0])
    return evaluator


def time_ours(
    scorer: SpaceEvaluator[PathEvaluator], paths: Sequence[LayerPath | None]
) -> tuple[np.ndarray, float, float]:
    """(fitness, seconds per candidate, share of layer steps that were saved), everything compiled, nothing known."""
    evaluator = scorer.evaluator
    evaluator.evaluate(paths[:1])
    seconds = []
    for _ in range(3):
        evaluator.score_cache.clear()
        evaluator.work.steps_run = evaluator.work.steps_requested = 0
        start = time.perf_counter()
        values = fitness(scorer.tasks, evaluator.evaluate(paths))
        seconds.append(time.perf_counter() - start)
    return values, float(np.median(seconds)) / len(paths), 1 - evaluator.work.steps_run / evaluator.work.steps_requested


def time_peer(problem: SearchProblem, paths: Sequence[LayerPath]) -> tuple[np.ndarray, float, float]:
    """(fitness, median seconds to build, to score), the first candidate not counted."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    assert isinstance(problem.backend.candidates, PathCandidates)
    states = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict() for folder in problem.parents
    ]
    batched_task = problem.prepare().shards[0][0]
    values, seconds = [], []
    for path in paths:
        start = time.perf_counter()
        config = AutoConfig.from_pretrained(problem.parents[0])
        config.num_hidden_layers = len(path.layers)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tensors = {name: values for name, values in states[path.embedding_parent].items() if "layers." not in name}
        for step, (m, factor) in enumerate(zip(path.layers, path.residual_scales(), strict=True)):
            parent, layer = problem.backend.candidates.spec.origins[m]
            for name, values_ in states[parent].items():
                head, _, tail = name.partition(f"layers.{layer}.")
                if tail:
                    written = "o_proj" in tail or "down_proj" in tail
                    tensors[f"{head}layers.{step}.{tail}"] = values_ * float(factor) if written else values_
        model.load_state_dict(tensors, assign=True, strict=False)
        # Rotary frequencies, which have no tensor in a state dict, were made on no device.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        model.tie_weights()
        model.eval()
        built = time.perf_counter()
        values.append(mean_log_probability(model, batched_task.requests.scored))
        seconds.append((built - start, time.perf_counter() - built))
    build, score = np.median(seconds[1:], axis=0)
    return np.array(values), float(build), float(score)


def against_peer(folder: File, population: int, peers: int) -> None:
    print(
        "| space | steps per path | ours, s/candidate | peer, s/candidate | ratio | peer: build + score "
        "| steps shared |\n"
        "| --- |" + " ---: |" * 6
    )
    for name, space in SPACES.items():
        problem = problem_for(folder, ("base", "one", "two"), space)
        scorer = fresh_evaluator(problem)
        strategy = problem.strategy
        state = strategy.init(generation_key(0, INIT_KEY), problem.space.start[None])
        genomes, _ = strategy.ask(generation_key(0, 0), state)
        assert isinstance(problem.backend.candidates, PathCandidates)
        paths = [path for path in problem.backend.candidates.space.decode(np.asarray(genomes)) if path is not None]
        found, ours, saved = time_ours(scorer, paths)
        expected, build, score = time_peer(problem, paths[:peers])
        if not np.allclose(found[: len(expected)], expected, atol=1e-3):
            raise SystemExit(f"{name}: the scores differ: {found[: len(expected)]} and {expected}")
        steps = np.mean([len(path.layers) for path in paths])
        print(
            f"| {name} | {steps:.1f} | {ours:.3f} | {build + score:.3f} | {(build + score) / ours:.1f} "
            f"| {build:.3f} + {score:.3f} | {saved:.0%} |",
            flush=True,
        )


def growth(folder: File) -> None:
    """Seconds per candidate of paths of random layers: nothing but the length should count."""
    print("\n| parents (M) | T | P | s/candidate | s/step |\n| --- |" + " ---: |" * 4)
    rng = np.random.default_rng(0)
    cases: list[tuple[tuple[str, ...], int, int]] = [
        *((("base", "one", "two")[:k], 8, 16) for k in (1, 2, 3)),
        *((("base", "one"), steps, 16) for steps in (4, 16, 32)),
        *((("base", "one"), 8, count) for count in (4, 64)),
    ]
    for parents, steps, count in cases:
        problem = problem_for(folder, parents, {"form": "indicator", "repetitions": 1, "max_layers": 64})
        scorer = fresh_evaluator(problem)
        scorer.evaluator.max_length = 32
        layers = len(scorer.evaluator.bank.layout.origins)
        paths = [LayerPath(tuple(map(int, rng.integers(0, layers, steps))), (1.0,) * steps) for _ in range(count)]
        _, seconds, _ = time_ours(scorer, paths)
        print(f"| {len(parents)} ({layers}) | {steps} | {count} | {seconds:.3f} | {seconds / steps:.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds per candidate of a population of layer paths.")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--peers", type=int, default=5, help="candidates that the peer builds and scores")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = File(work)
        write_random_family(folder)
        vocabulary = json.loads((folder / "base" / "tokenizer.json").read_text())["model"]["vocab"]
        words = sorted(word for word in vocabulary if not word.startswith("<"))
        write_rows(folder / "rows.jsonl", words, TOKENS, LENGTH)
        against_peer(folder, arguments.candidates, arguments.peers)
        growth(folder)
    print(f"\n{TOKENS:,} tokens scored; {describe()}")


if __name__ == "__main__":
    main()
