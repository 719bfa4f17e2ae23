"""Seconds until a merge is as good: whole processes against mergekit, transformers, torch and pycma (an hour).

    python -m bench equal-fitness --models demo --tokens 500     # one size, minutes

The peer is the usual loop (bench/shared/merge_loop.py): pycma's CMA-ES, set as mergekit-evolve sets it, proposes a
recipe, mergekit writes the model, transformers loads it, torch scores it. The best fitness that it reaches is the
target of ours: `evojax-merge search` with `stop: {target: …}`. Both are timed from the start of the process until the
winner is written: ours with the held-out comparison besides, first with an empty cache of compiled programs, then with
what the first run left there.

The peer of the demo family is run whole. Of larger models pycma gets the same scores from our evaluator; the loop's
seconds are then those of its start and of three candidates, times the evaluations until it first reached the target.

Two kinds of fitness: one with derivatives, the likelihood of the targets (ours: `strategy: auto`, which follows the
gradient), and one without (ours: CMA-ES with four rungs of racing): the share of right answers, or, of SmolLM2, of
questions of four choices. The family of 30M parameters is random: its targets are what a merge that the search does not
know writes.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.searches.times import Line, empty_cache, lines_of
from bench.shared.machine import describe
from bench.shared.merge_loop import evolve
from bench.shared.random_family import write_random_family
from evojax_merge.evaluation.scores import fitness
from evojax_merge.problem import build_problem, read_config
from evojax_merge.steps.selection import open_evaluator
from evojax_merge.zoo import resolve_reference

Record = dict[str, Any]
LIKELIHOOD = {"kind": "likelihood", "target": "{target}"}
CHOICES = {"kind": "multiple_choice", "choices": "choices", "answer": "answer"}


def answers(tokens: int) -> Record:
    return {"kind": "exact_match", "target": "{short}", "pattern": "^(.+)$", "max_new_tokens": tokens}


@dataclass(frozen=True)
class Family:
    """How many neighbouring layers share their weights in the search, the evaluations that the peer has, and the task
    of the fitness without derivatives."""

    group: int
    evaluations: int
    answers: Record


FAMILIES = {
    "demo": Family(1, 640, answers(6)), "30M": Family(2, 320, answers(4)), "smollm2": Family(10, 160, CHOICES),
}  # fmt: skip
OURS: dict[str, Record] = {
    "likelihood": {"strategy": "auto"},
    "answers": {"strategy": "cma_es", "population": 16, "rungs": 4, "generations": 200},
}
HELDOUT = 8


def wrong_numbers(target: str, rng: np.random.Generator) -> list[str]:
    """Three texts that are a target but for one digit."""
    places = [match.start() for match in re.finditer(r"\d", target)]
    texts: list[str] = []
    while len(texts) < 3:
        at = int(rng.choice(places))
        text = target[:at] + str(rng.integers(10)) + target[at + 1 :]
        if text not in (target, *texts):
            texts.append(text)
    return texts


def records_of_zoo(prefix: str) -> list[Record]:
    """The examples of a family of the zoo, with four choices each."""
    rng = np.random.default_rng(0)
    files = [resolve_reference(f"zoo:{prefix}{name}.jsonl") for name in ("search", "heldout")]
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [record | {"short": record["target"], "wrong": wrong_numbers(record["target"], rng)} for record in records]


def records_of_random_family(folder: Path, count: int) -> list[Record]:
    """Prompts of 48 random words, and the 16 words that a merge of a folder's family writes, the first four of them
    apart."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge, *experts = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("base", "one", "two"))
    with torch.no_grad():
        for base, one, two in zip(merge.parameters(), *(expert.parameters() for expert in experts), strict=True):
            base += 0.9 * (one - base) + 0.4 * (two - base)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    prompts = torch.tensor(np.random.default_rng(0).integers(10, len(tokenizer), (count, 48)))

    tokens = merge.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=16, min_new_tokens=16, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    parts = (tokens[:, :48], tokens[:, 48:], tokens[:, 48:52])
    texts = zip(*map(tokenizer.batch_decode, parts), strict=True)
    return [{"prompt": prompt, "target": target, "short": short} for prompt, target, short in texts]


def write_config(
    folder: Path, models: Sequence[str], group: int, task: Record, search: Record, records: list[Record]
) -> Path:
    """A search's config and data; the last records are held out."""
    rng = np.random.default_rng(1)
    for name, part in (("search", records[:-HELDOUT]), ("heldout", records[-HELDOUT:])):
        rows = []
        for record in part:
            place, wrong = int(rng.integers(4)), record.get("wrong", [])
            choices = [*wrong[:place], record["target"], *wrong[place:]]
            rows.append(record | {"choices": choices, "answer": place})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "base": models[0], "parents": list(models[1:]), "export_dtype": "float32",
        "space": {"method": "task_arithmetic", "layers_per_group": group,
                  "parameters": {"weight": {"low": -0.5, "high": 2.0}}},
        "tasks": [{"name": "text", "prompt": "{prompt}", "file": "search.jsonl", "heldout": "heldout.jsonl"} | task],
        "search": search,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@dataclass(frozen=True)
class Loop:
    """The peer: the best fitness, the evaluations until it was reached, and the seconds until it was reached and
    written, of which `start` come before the first candidate."""

    target: float
    evaluations: int
    start: float
    candidate: float
    seconds: float


def run_loop(config: Path, folder: Path, evaluations: int) -> dict[str, Any]:
    folder.mkdir()
    command = [sys.executable, "-m", "bench.shared.merge_loop", str(config), str(folder), str(evaluations)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def loop_of(config: Path, folder: Path, evaluations: int, is_whole: bool) -> Loop:
    """The peer's loop, run whole; or three candidates of it are measured, and our evaluator gives pycma its scores."""
    report = run_loop(config, folder, evaluations if is_whole else 3)
    times = np.diff([report["begun"], *report["seconds"]])
    # The first candidate loads what others find loaded.
    candidate, first = float(np.median(times[1:])), float(times[0])
    values = report["values"] if is_whole else counted(config, evaluations)
    reached = int(np.argmax(values)) + 1
    writing = report["end"] - report["seconds"][-1]
    spent = report["seconds"][reached - 1] if is_whole else report["begun"] + first + candidate * (reached - 1)
    return Loop(float(max(values)), reached, report["begun"], candidate, spent + writing)


def counted(config: Path, evaluations: int) -> list[float]:
    """The fitness of pycma's candidates, by our evaluator."""
    problem = build_problem(config, read_config(config, ["search.strategy=cma_es", "search.rungs=1"], None))
    batched_tasks = problem.prepare().search
    evaluator = open_evaluator(problem, batched_tasks)
    values: list[float] = []

    def evaluate(units: np.ndarray) -> np.ndarray:
        reached = fitness(evaluator.tasks, evaluator.score(units.astype(np.float32)))
        values.extend(map(float, reached))
        return reached

    evolve(evaluate, problem.space.start, evaluations)
    return values


@dataclass(frozen=True)
class Search:
    """Ours: the best fitness, generations, and seconds: of the process, until the first generation ended, and from the
    last one's end."""

    fitness: float
    generations: int
    seconds: float
    start: float
    ending: float


def search_of(config: Path, cache: Path, name: str, target: float) -> Search:
    run = config.parent / name
    lines = lines_of(
        config.parent, cache, "search", config.name, "--out", str(run), "--set", f"search.stop.target={target!r}"
    )
    generations: list[Line] = [line for line in lines if line.text.startswith("generation ")]
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    best = max(row["best"] for row in history if row.get("best") is not None)
    end = lines[-1].seconds
    return Search(best, len(history), end, generations[0].seconds, end - generations[-1].seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 2000, 8000])
    parser.add_argument("--fitness", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--evaluations", type=int, help="of the peer, in place of those of each family")
    arguments = parser.parse_args()
    print(f"{describe()}\n")
    print("| models | fitness | tokens | reached | peer: evaluations | s each | s in all | ours, s: start + search "
          "+ ending | ratio | ours again, s | ratio |")  # fmt: skip
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as root:
        for name in arguments.models:
            folder = Path(root) / name
            folder.mkdir()
            models, records = models_of(name, folder)
            for kind in arguments.fitness:
                for tokens in arguments.tokens:
                    row = compared(name, kind, tokens, models, records, arguments.evaluations)
                    print(row, flush=True)


def models_of(name: str, folder: Path) -> tuple[list[str], list[Record]]:
    """Base and parents of a family, and its examples."""
    if name == "30M":
        write_random_family(folder)
        return [str(folder / part) for part in ("base", "one", "two")], records_of_random_family(folder, 160)
    prefix = "" if name == "demo" else f"{name}/"
    models = [str(resolve_reference(f"zoo:{prefix}{part}")) for part in ("base", "maths", "japanese")]
    return models, records_of_zoo(prefix)


def compared(
    name: str, kind: str, tokens: int, models: list[str], records: list[Record], evaluations: int | None
) -> str:
    """A row of the table."""
    family = FAMILIES[name]
    task = LIKELIHOOD if kind == "likelihood" else family.answers
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        config, scored = sized(
            lambda part: write_config(folder, models, family.group, task, OURS[kind], part), tokens, records
        )
        loop = loop_of(config, folder / "loop", evaluations or family.evaluations, name == "demo")
        cache = empty_cache(folder / "cache")
        runs = [search_of(config, cache, f"run{k}", loop.target) for k in (1, 2)]
    first, again = runs
    parts = f"{first.start:.1f} + {first.seconds - first.start - first.ending:.1f} + {first.ending:.1f}"
    ratios = [
        f"{loop.seconds / run.seconds:.1f}" if run.fitness >= loop.target else f"not reached: {run.fitness:.4f}"
        for run in runs
    ]
    return (
        f"| {name} | {task['kind'].replace('_', ' ')} | {scored:,} | {loop.target:.4f} | {loop.evaluations} "
        f"| {loop.candidate:.3f} | {loop.seconds:.1f} | {parts} = {first.seconds:.1f} | {ratios[0]} "
        f"| {again.seconds:.1f} | {ratios[1]} |"
    )


def sized(write: Callable[[list[Record]], Path], tokens: int, records: list[Record]) -> tuple[Path, int]:
    """A config with as many of the records as have about so many tokens in all, and their number: of scored rows, or of
    prompts and the answers to them."""

    def scored(part: list[Record]) -> tuple[Path, int]:
        config = write(part)
        problem = build_problem(config, read_config(config, [], None))
        (batched_task,) = problem.prepare().search
        requests = batched_task.requests
        written = requests.max_new_tokens * len(requests.prompts)
        return config, sum(len(row.tokens) for row in (*requests.scored, *requests.prompts)) + written

    _, total = scored(records)
    count = round(tokens / total * (len(records) - HELDOUT))
    return scored([*records[: max(4, count)], *records[-HELDOUT:]] if count < len(records) - HELDOUT else records)


if __name__ == "__main__":
    main()
