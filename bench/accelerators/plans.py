"""Memory and FLOPs as `plan` predicts them, against those of a search (10 minutes, 6 GB of memory).

    python -m bench plans                      # the demo family, a Llama of 30 M parameters, SmolLM2-135M
    python -m bench plans --models zoo 30M

Memory is the host's, of the whole process: what plan says, and the most that `evojax-merge search` has over two
generations and the choice of the winner. What of it are pages of files, such as the models', is not counted: the kernel
drops them where memory is short. FLOPs are those of every pass that a generation runs, with each loop's body counted
once, as the compiler counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import yaml

from bench.shared.machine import describe
from bench.shared.random_family import write_random_family, write_rows
from evojax_merge.backends.decoder.planner import passes_of_task, planned_passes
from evojax_merge.checkpoints.abstract_bank import anywhere
from evojax_merge.evaluation.costs import cost_of
from evojax_merge.problem import SearchProblem, build_problem, read_config
from evojax_merge.report.plan import shown_bytes, shown_number

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GENERATIONS = ["--set", "search.generations=2"]
# Of the Llama of 30 M parameters: examples of so many tokens, so many tokens together.
LENGTH, TOKENS = 64, 8000


def write_search_of_30m(folder: Path) -> Path:
    """Base and two experts with random weights, merged by TIES."""
    write_random_family(folder)
    write_rows(folder / "rows.jsonl", [f"w{i}" for i in range(2, 1000)], TOKENS, LENGTH)
    document: dict[str, Any] = {
        "base": "base", "parents": ["one", "two"], "space": {"method": "ties"},
        "tasks": [{"name": "text", "kind": "likelihood", "file": "rows.jsonl", "heldout": "rows.jsonl"}],
        "search": {"population": 4, "generations": 2}, "export_dtype": "float32",
    }  # fmt: skip
    (folder / "search.yaml").write_text(yaml.safe_dump(document))
    return folder / "search.yaml"


def predicted_bytes(config: Path, folder: Path) -> int:
    plan = folder / "plan.json"
    command = [sys.executable, "-m", "evojax_merge", "plan", str(config), *GENERATIONS, "--json", str(plan)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return max(int(stage["host_bytes"]) for stage in json.loads(plan.read_text()))


def measured_bytes(config: Path, folder: Path) -> int:
    """The most anonymous memory of a search, looked at twenty times a second."""
    command = [sys.executable, "-m", "evojax_merge", "search", str(config), *GENERATIONS, "--out", str(folder / "run")]
    process, most = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        most = max(most, anonymous_bytes(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return most


def anonymous_bytes(pid: int) -> int:
    """The resident memory of a process that no file stands behind; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def counted_flops(problem: SearchProblem) -> Iterator[tuple[str, float, float]]:
    """Each pass of a generation: its name, FLOPs by the plan's count, and by the compiler's."""
    splits = problem.prepare()
    planner = problem.backend.planner().evaluator
    population = problem.backend.candidates.planned_population(planner, problem.strategy.population, anywhere)
    for tasks in splits.shards:
        evaluator = replace(planner, batched_tasks=tasks)
        for i in range(len(tasks)):
            for one in passes_of_task(evaluator, population, i, planned_passes):
                traced = one.planned.traced
                analysis = traced.lower().compile().cost_analysis()
                assert analysis is not None
                counted = cost_of(traced.jaxpr, lambda eqn: 1).flops
                yield one.planned.name, counted, float(analysis["flops"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("zoo", "30M", "smollm2")
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    print(f"{describe()}\n")
    print("| models | memory, predicted | measured | predicted / measured | FLOPs of a pass, plan / compiler |")
    print("| --- | ---: | ---: | ---: | --- |")
    for name in options.models:
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            known = {"zoo": CONFIGS / "quickstart.yaml", "smollm2": CONFIGS / "smollm2.yaml"}
            config = known[name] if name in known else write_search_of_30m(folder)
            predicted, measured = predicted_bytes(config, folder), measured_bytes(config, folder)
            passes = counted_flops(build_problem(config, read_config(config, [], None)))
            flops = ", ".join(
                f"{what} {shown_number(ours).strip()} ({ours / theirs:.2f})" for what, ours, theirs in passes
            )
            memory = f"{shown_bytes(predicted)} | {shown_bytes(measured)} | {predicted / measured:.2f}"
            print(f"| {name} | {memory} | {flops} |", flush=True)


if __name__ == "__main__":
    main()
