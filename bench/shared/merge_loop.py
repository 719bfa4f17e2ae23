"""The usual loop of an evolutionary merge, as a process of its own: pycma proposes a recipe, mergekit writes the model,
transformers loads it, torch scores it.

    python -m bench.shared.merge_loop CONFIG FOLDER EVALUATIONS

prints one line of JSON: the seconds until the first candidate is begun, the seconds at which each candidate had its
fitness, the fitness, and the seconds at which the best one had been written. Seconds count from the start of the
process. They leave out reading the config, with which this package turns genomes into recipes and log-probabilities
into scores: the loop that it stands for has code of its own for that.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np


def evolve(evaluate: Callable[[np.ndarray], np.ndarray], start: np.ndarray, evaluations: int) -> None:
    """Maximise over the unit cube by pycma's CMA-ES, as mergekit-evolve sets it. evaluate: `[P, D]` -> `[P]`."""
    import cma

    strategy = cma.CMAEvolutionStrategy(start, 1 / 6, {"bounds": [0, 1], "seed": 1, "verbose": -9})
    done, size = 0, strategy.popsize
    while done + size < evaluations:
        units = strategy.ask()
        strategy.tell(units, list(-evaluate(np.asarray(units))))
        done += size
    evaluate(np.asarray(strategy.ask())[: evaluations - done])


def age() -> float:
    """The seconds since this process was started."""
    began = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - began


def main() -> None:
    config_file, folder, evaluations = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    import cma  # noqa: F401
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paused = age()
    from bench.shared.torch_peer import continued, score_rows
    from evojax_merge.evaluation.scores import TaskScores, fitness
    from evojax_merge.problem import build_problem, read_config
    from evojax_merge.schema.yaml_reader import load_yaml

    problem = build_problem(config_file, read_config(config_file, [], None))
    (batched_task,) = problem.prepare().search
    task, requests = batched_task.task, batched_task.requests
    late = age() - paused
    tokenizer = AutoTokenizer.from_pretrained(problem.facts.compared[0][1])
    recipe = folder / "recipe.yaml"
    seconds: list[float] = []
    values: list[float] = []
    best: tuple[float, Any] = (-np.inf, None)

    def merged(document: Any, name: str) -> Path:
        options = MergeOptions(quiet=True, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(document), str(folder / name), options)
        return folder / name

    def evaluate(units: np.ndarray) -> np.ndarray:
        nonlocal late, best
        for unit in units:
            before = age()
            recipe.write_text(problem.backend.describe(unit.astype(np.float32)).recipe)
            document = load_yaml(recipe)
            late += age() - before
            model = AutoModelForCausalLM.from_pretrained(merged(document, "merged"), dtype="float32").eval()
            answers: dict[str, Any]
            if requests.prompts:
                answers = {"texts": [continued(model, tokenizer, requests.prompts, requests.max_new_tokens)]}
            else:
                answers = {"totals": score_rows(model, requests.scored).astype(np.float32)[None]}
            scores = task.score(replace(requests.unanswered(1), **answers))
            value = float(fitness([task], TaskScores({task.name: scores}))[0])
            best = max(best, (value, document), key=lambda pair: pair[0])
            values.append(value)
            seconds.append(age() - late)
        return np.array(values[-len(units) :])

    begun = age() - late
    evolve(evaluate, problem.space.start, evaluations)
    merged(best[1], "best")
    print(json.dumps({"begun": begun, "seconds": seconds, "values": values, "end": age() - late}))


if __name__ == "__main__":
    main()
