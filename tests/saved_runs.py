"""Make the runs that a change of the core is compared with, from any checkout, and compare two folders of them.

    python tests/saved_runs.py make runs/before --checkout ../before     # a worktree of the commit before
    python tests/saved_runs.py make runs/after
    python tests/saved_runs.py compare runs/before runs/after

`make` searches every kind of candidate with every place of its parents' weights, the other backends, and the strategies
that ask for more than scores. It makes each search twice: undisturbed, and killed after its first generation and
resumed, which has to end in the same bytes. It plans four targets and merges every recipe of tests/parity as well.
`compare` prints each file that differs. Files that depend on the clock do not count, and of a checkpoint counts that it
is there.

All searches have their inputs and outputs in one work folder, since resolved configs name absolute paths.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hostile import Done, Server
from torture import contents

ROOT = Path(__file__).parent.parent
TARGETS = ("cpu", "h100", "8xh100", "v5e-8")
PLACES = ("device", "host", "disk")
Document = dict[str, Any]

TEXT: Document = {"name": "text", "kind": "likelihood", "file": "tasks.jsonl", "heldout": 0.25}
WORDS: Document = {"name": "words", "kind": "exact_match", "file": "tasks.jsonl", "heldout": 0.25, "max_new_tokens": 3}
CHOICE: Document = {"name": "choice", "kind": "multiple_choice", "metric": "margin", "file": "tasks.jsonl"}
TIES: Document = {"method": "ties", "parameters": {"weight": {"high": 1.5}, "density": {"low": 0.2}}}
LINEAR: Document = {"method": "linear", "parameters": {"weight": {}}}
FUNCTIONS = """
import numpy as np


def shorter(record, left, right):
    return "left" if len(left) < len(right) else "right" if len(right) < len(left) else "tie"


def errors(model, rows):
    return -((rows["x"] @ model["layer"]["w"] - rows["y"]) ** 2).sum(-1)


def grey(records, images):
    return -np.abs(images.mean((1, 2, 3)) - 0.4)
"""


# ---------------------------------------------------------------------------------------------------------------
# Inputs


def build_inputs(work: Path) -> None:
    """Write every model, task file and function that the searches name."""
    import torch
    from helpers.families import build_family
    from helpers.files import write_lines
    from helpers.models import random_records, tiny_config
    from reference.vision_models import save_seeing, seeing_model
    from safetensors.numpy import save_file
    from test_exported_networks import write_examples, write_models
    from test_parity import build_models
    from test_vision import write_tasks
    from tiny_generators import make_ddpm

    build_family(work, tiny_config("qwen3", tie_word_embeddings=False), 3, torch.bfloat16)
    write_lines(work / "tasks.jsonl", random_records(12))
    (work / "functions.py").write_text(FUNCTIONS)
    for name in ("seeing", "network", "generators", "parity"):
        (work / name).mkdir()
    seeing = seeing_model("llava")
    for seed, (name, noise) in enumerate((("base", 0.0), ("one", 0.0), ("two", 0.05))):
        save_seeing(seeing, work / "seeing" / name, seed, noise)
    write_tasks(work / "seeing", "<image>")
    write_models("BERT", work / "network")
    write_examples("BERT", work / "network")
    first = make_ddpm(work / "generators/one", 1)
    make_ddpm(work / "generators/two", 2, base=first)
    rng = np.random.default_rng(1)
    one, two, x = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 2), (3, 2), (40, 3)))
    save_file({"layer/w": one}, work / "one.safetensors")
    save_file({"layer/w": two}, work / "two.safetensors")
    np.savez(work / "data.npz", x=x, y=x @ ((one + two) / 2))
    build_models(work / "parity")
    for recipe in (ROOT / "tests/parity").glob("*.yaml"):
        shutil.copyfile(recipe, work / "parity" / recipe.name)


def merges(**changes: Any) -> Document:
    return {
        "base": "base", "parents": ["parent0", "parent1"], "space": TIES, "tasks": [TEXT, WORDS],
        "search": {"generations": 3, "population": 4}, "seed": 3,
    } | changes  # fmt: skip


def paths(**changes: Any) -> Document:
    search = {"strategy": "path_ga", "generations": 3, "population": 4}
    document = merges(data_flow={"moves": 2, "window": 2}, search=search, **changes)
    return {key: value for key, value in document.items() if key not in ("space", "base")}


def pools(**changes: Any) -> Document:
    pool = {"methods": ["slerp", "dare_ties"], "split": True, "size": 4, "slots": 1}
    document = merges(parents=["parent0", "parent1", "parent2"], pool=pool, **changes)
    return {key: value for key, value in document.items() if key != "space"}


def without_base(document: Document) -> Document:
    return {key: value for key, value in document.items() if key != "base"}


def searches() -> dict[str, Document]:
    """The config of each search, by its name."""
    kinds: dict[str, Callable[..., Document]] = {"merge": merges, "path": paths, "pool": pools}
    placed = {
        f"{name}-{place}": document(evaluation={"bank": place}) for name, document in kinds.items() for place in PLACES
    }
    strategy = {
        "gradient": merges(tasks=[TEXT], search={"strategy": "gradient", "generations": 4, "population": 2,
                                                 "gradient": {"minibatches": 2}}),
        "gradient-disk": merges(tasks=[TEXT], search={"strategy": "gradient", "generations": 3, "population": 2},
                                evaluation={"bank": "disk"}),
        "hybrid": merges(tasks=[TEXT], search={"strategy": "hybrid", "generations": 4, "population": 4}),
        "race": merges(search={"generations": 3, "population": 8, "rungs": 3, "rung_examples": "item_response"}),
        "validation": merges(search={"generations": 3, "population": 4, "validation": 0.25, "finalists": 2}),
        "niches": merges(tasks=[CHOICE, TEXT], search={"strategy": "niches", "generations": 3, "population": 6}),
        "front": merges(tasks=[CHOICE, TEXT], search={"strategy": "pareto", "generations": 3, "population": 6}),
    }  # fmt: skip
    stages = [{"space": LINEAR, "search": {"generations": 2, "population": 4}},
              {"data_flow": {"moves": 2, "window": 1}, "search": {"strategy": "path_ga", "generations": 3,
                                                                  "population": 4}}]  # fmt: skip
    staged = merges(stages=stages)
    del staged["space"], staged["search"]
    taste = {"name": "taste", "kind": "human", "file": "tasks.jsonl", "max_new_tokens": 4, "votes": 12,
             "heldout_votes": 2, "judge": "functions.py:shorter"}  # fmt: skip
    others = {
        "stages": staged,
        "judged": merges(tasks=[taste], space={"method": "task_arithmetic",
                                               "parameters": {"weight": {"low": -2.0, "high": 3.0}}}),
        "images": merges(base="seeing/base", parents=["seeing/one", "seeing/two"],
                         tasks=[TEXT | {"file": "seeing/tasks.jsonl"}], other_modules="base"),
        "torch": without_base(merges(
            backend="torch", parents=["network/model1", "network/model2"], space=LINEAR | {"layers_per_group": "all"},
            tasks=[{"name": "task", "file": "network/examples.jsonl", "heldout": 0.5, "kind": "classification",
                    "metric": "log_probability"}],
        )),
        "function": without_base(merges(
            backend="function", parents=["one.safetensors", "two.safetensors"], space=LINEAR,
            tasks=[{"name": "fit", "kind": "arrays", "file": "data.npz", "function": "functions.py:errors"}],
        )),
        "generator": without_base(merges(
            backend="torch", parents=["generators/one", "generators/two"], space=LINEAR, evaluation={"chunk": 1},
            tasks=[{"name": "grey", "kind": "image_generation", "function": "functions.py:grey", "images": 6,
                    "steps": 2, "heldout": 0.5}],
            search={"generations": 2, "population": 4},
        )),
    }  # fmt: skip
    return placed | strategy | others


# ---------------------------------------------------------------------------------------------------------------
# Runs


class Maker:
    """Runs commands of a checkout in the work folder and moves what they write to `out`."""

    def __init__(self, checkout: Path, work: Path, out: Path) -> None:
        # The server, and each command that it forks, imports the checkout's program.
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (checkout, checkout / "kernels")))
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        # No run reads scores that another has kept, rounded in other batches: a file has their folder's name.
        kept = work / "cache" / "evojax-merge" / "scores"
        kept.parent.mkdir(parents=True, exist_ok=True)
        if kept.is_dir():
            shutil.rmtree(kept)
        kept.touch()
        self.work, self.out = work, out
        self.server = Server(Path(tempfile.mkdtemp(prefix="server.")))
        self.faults: list[str] = []

    def command(self, *arguments: object) -> Done:
        done = self.server.run(arguments, self.work, seconds=900)
        if done.status:
            self.fault(f"{' '.join(map(str, arguments))} ended with {done.status}: {done.stderr.strip()[-500:]}")
        return done

    def fault(self, what: str) -> None:
        self.faults.append(what)
        print(f"FAULT: {what}", flush=True)

    def search(self, name: str, document: Document) -> None:
        """A search undisturbed, and once more, killed after a generation and resumed."""
        config, run = f"{name}.yaml", self.work / "runs" / name
        (self.work / config).write_text(yaml.safe_dump(document, sort_keys=False))
        self.command("search", config, "--out", run)
        if name == "judged":
            self.command("judge", config, "--out", self.work / "runs/replayed", "--replay", run / "votes.jsonl")
            self.keep("replayed")
        self.keep(name)
        self.killed(config, run)
        self.command("search", config, "--out", run, "--resume")
        self.keep(name, f"{name}.resumed")
        for line in differences(self.out / name, self.out / f"{name}.resumed"):
            self.fault(f"{name}: killed and resumed: {line}")

    def killed(self, config: str, run: Path) -> None:
        """Start a search and kill it once it has saved a generation."""
        running = self.server.start(("search", config, "--out", run), self.work)
        # A search in stages saves the generations of its first one in a folder of that stage's own.
        while running.poll() is None and not any(run.rglob("history.jsonl")):
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.wait()

    def keep(self, name: str, kept_name: str | None = None) -> None:
        """Move a run to `out`."""
        if (self.work / "runs" / name).is_dir():
            shutil.move(self.work / "runs" / name, self.out / (kept_name or name))

    def plan(self, name: str, target: str) -> None:
        file = self.out / f"plan-{name}-{target}.json"
        self.server.run(("plan", f"{name}.yaml", "--target", target, "--json", file), self.work, seconds=900)

    def merge(self, recipe: Path) -> None:
        """Merge a recipe; one that is refused leaves the message."""
        folder = self.work / "parity"
        done = self.server.run(("merge", recipe.name, "out"), folder, seconds=300)
        if (folder / "out").is_dir():
            shutil.move(folder / "out", self.out / f"merge-{recipe.stem}")
        else:
            (self.out / f"merge-{recipe.stem}.txt").write_text(done.stderr)


def make(out: Path, checkout: Path, work: Path, names: Sequence[str]) -> list[str]:
    """Make all runs, or those whose names begin with one of `names`; the faults."""
    wanted = tuple(names) or ("",)
    out.mkdir(parents=True)
    if not (work / "functions.py").is_file():
        work.mkdir(parents=True, exist_ok=True)
        build_inputs(work)
    shutil.rmtree(work / "runs", ignore_errors=True)
    (work / "runs").mkdir()
    maker, documents = Maker(checkout.resolve(), work, out.resolve()), searches()
    for name, document in documents.items():
        if name.startswith(wanted):
            started = time.monotonic()
            maker.search(name, document)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    for name in ("merge-device", "merge-disk", "path-device", "pool-device"):
        for target in TARGETS if f"plan-{name}".startswith(wanted) else ():
            (work / f"{name}.yaml").write_text(yaml.safe_dump(documents[name], sort_keys=False))
            maker.plan(name, target)
    for recipe in sorted((work / "parity").glob("*.yaml")):
        if f"recipe-{recipe.stem}".startswith(wanted):
            maker.merge(recipe)
    maker.server.close()
    return maker.faults


# ---------------------------------------------------------------------------------------------------------------
# Comparison


def files_of(folder: Path) -> dict[str, str]:
    """The files below a folder, each with what is compared of it. Votes have the time at which they came."""
    compared = contents(folder)
    for name in list(compared):
        run, _, inside = name.partition("checkpoints/")
        if inside:
            del compared[name]
            compared[f"{run}checkpoints/{Path(inside).parts[0]}"] = "checkpoint"
        elif name.endswith("votes.jsonl"):
            rows = [json.loads(line) for line in (folder / name).read_bytes().split(b"\n")[:-1]]
            timeless = [row | {"vote": row["vote"] | {"time": ""}} if "vote" in row else row for row in rows]
            compared[name] = sha256(json.dumps(timeless).encode()).hexdigest()
        elif Path(name).name in ("timing.jsonl", "report.html", "environment.json", "run.log"):
            compared[name] = ""
    return compared


def differences(one: Path, other: Path) -> list[str]:
    """A line for each file that differs between two folders."""
    first, second = files_of(one), files_of(other)
    return [
        f"{name}: {'differs' if name in first and name in second else f'only in {one if name in first else other}'}"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("out", type=Path)
    making.add_argument("--checkout", type=Path, default=ROOT, help="the program that runs; default: this one")
    making.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "evojax-merge-saved-runs")
    making.add_argument("--only", nargs="*", default=(), help="how the names of the runs begin: merge, plan, recipe, …")
    comparing = commands.add_parser("compare")
    comparing.add_argument("folders", type=Path, nargs=2)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if options.command == "make":
        lines = make(options.out, options.checkout, options.work, options.only)
        print(f"{len(lines)} faults")
    else:
        lines = differences(*options.folders)
        print("\n".join(lines) or "equal to the byte")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
