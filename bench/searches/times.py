"""Times of a search: its plan's estimate, its silences, the truth of `left`, and what a second run compiles.

    python -m bench times                 # SmolLM2-135M and two copies with noise; some 15 minutes
    python -m bench times --shape 100M --bench 540      # `evojax-merge bench` on larger models, for so many seconds
    python -m bench times --processes 2                 # each search once, by processes that share it

`evojax-merge bench` measures the device once, in an empty cache folder. Then three searches run with their output in a
file, each twice with the same cache: by likelihood, by answers, by gradients; five examples are held out. `plan`
estimates each from that one measurement. Its seconds leave out loading, compiling and writing the winner, so the parts
of a third run, for which no scores of base and parents are kept, are added up: base and parents, generations, choice
and held-out table.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from bench.shared.machine import host
from evojax_merge.zoo import resolve_reference

EVOLVED = {"strategy": "cma_es", "population": 6, "generations": 6}
SEARCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "likelihood": ({"kind": "likelihood"}, EVOLVED),
    "answers": ({"kind": "exact_match", "max_new_tokens": 24, "apply_chat_template": True}, EVOLVED),
    "gradients": ({"kind": "likelihood"}, {"strategy": "gradient", "generations": 12}),
}
EMPTY: Mapping[str, str] = MappingProxyType({})
COMMAND = (sys.executable, "-m", "evojax_merge")


@dataclass(frozen=True)
class Line:
    """A line of a command's output, and the seconds from the command's start."""

    seconds: float
    text: str


def lines_of(folder: Path, cache: Path, *arguments: str, variables: Mapping[str, str] = EMPTY) -> list[Line]:
    """The output of `evojax-merge` with these arguments, which must end well; the last line is its end. variables: of
    its environment."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1", **variables}
    started = time.monotonic()
    with subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = [Line(time.monotonic() - started, text.rstrip()) for text in process.stdout]
    if process.returncode:
        raise SystemExit("\n".join(line.text for line in lines))
    return [*lines, Line(time.monotonic() - started, "")]


def lines_of_first(folder: Path, cache: Path, processes: int, *arguments: str) -> list[Line]:
    """The output of the first of some processes with a device each, which run `evojax-merge` together."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{place.getsockname()[1]}"

    def run(number: int) -> list[Line]:
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes),
                     "JAX_PROCESS_ID": str(number), "JAX_NUM_CPU_DEVICES": "1"}  # fmt: skip
        return lines_of(folder, cache, *arguments, "--distributed", variables=variables)

    with ThreadPoolExecutor(processes) as pool:
        return next(iter(list(pool.map(run, range(processes)))))


def shared(folder: Path, cache: Path, processes: int) -> None:
    """Print what the searches' own plans say, and what they take, by processes that share them."""
    print("| search | processes | plan, s | took, s | took / plan |\n| --- | ---: | ---: | ---: | ---: |")
    for name in SEARCHES:
        lines = lines_of_first(folder, cache, processes, "search", f"{name}.yaml", "--out", name)
        stated = next(
            match for line in lines if (match := re.search(r"whole search takes about ([\d.,]+) (\w+)", line.text))
        )
        about = float(stated[1].replace(",", "")) * {"s": 1, "minutes": 60, "hours": 3600}[stated[2]]
        took = worked(lines, folder / name)
        print(f"| {name} | {processes} | {about:.1f} | {took:.1f} | {took / about:.2f} |", flush=True)


def empty_cache(folder: Path) -> Path:
    """A cache folder without timings and compiled programs, that has this user's models of the zoo."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evojax-merge"
    (folder / usual.name).mkdir(parents=True)
    (folder / usual.name / "zoo").symlink_to(usual / "zoo")
    return folder


def write_inputs(folder: Path) -> None:
    """Two parents beside the base, and 24 sums, five of which are held out."""
    base = resolve_reference("zoo:smollm2/base")
    for seed in (0, 1):
        parent = folder / f"parent{seed}"
        shutil.copytree(base, parent)
        (file,) = parent.glob("*.safetensors")
        rng = np.random.default_rng(seed)
        noisy = {
            name: (tensor.astype(np.float32) * (1 + 0.02 * rng.standard_normal(tensor.shape, np.float32))).astype(
                tensor.dtype
            )
            for name, tensor in load_file(file).items()
        }
        save_file(noisy, file, metadata={"format": "pt"})
    sums = [(a, b) for a in range(2, 10) for b in range(3, 6)]
    rows = [{"prompt": f"What is {a} plus {b}?\nAnswer:", "target": f" {a} plus {b} is {a + b}."} for a, b in sums]
    for name, part in (("search", rows[:-5]), ("heldout", rows[-5:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, (task, search) in SEARCHES.items():
        document = {
            "base": "zoo:smollm2/base", "parents": ["parent0", "parent1"], "scale": "parents",
            "space": {"method": "task_arithmetic", "layers_per_group": 10},
            "tasks": [{"name": name, "file": "search.jsonl", "heldout": "heldout.jsonl"} | task], "search": search,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))


def estimate(folder: Path, cache: Path, name: str) -> tuple[float, float]:
    """The plan's estimated seconds, and its bound by the roofline."""
    lines_of(folder, cache, "plan", f"{name}.yaml", "--json", f"{name}.plan.json")
    (plan,) = json.loads((folder / f"{name}.plan.json").read_text())
    return plan["run"]["seconds"] * plan["expected_share"] * plan["factor"]["value"], plan["run"]["seconds"]


def seconds_of(text: str) -> float:
    """The seconds of a duration such as 1:02:03."""
    total = 0
    for part in text.split(":"):
        total = 60 * total + int(part)
    return float(total)


def left_errors(lines: list[Line]) -> Iterator[float]:
    """From the second generation on, `left` less the seconds until the winner is written, as a share of these."""
    written = next(line.seconds for line in lines if line.text.startswith("winner: "))
    for line in lines:
        shown = re.match(r"generation \d+/\d+ .*left ([\d:]+)", line.text)
        if shown:
            truth = written - line.seconds
            yield (seconds_of(shown[1]) - truth) / truth


def worked(lines: list[Line], run: Path) -> float:
    """Seconds of a run's parts that a plan has: base and parents, generations, choice and held-out table."""
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    ends = (re.match(r"(?:measuring|choosing|scoring) .* took ([\d:]+)", line.text) for line in lines)
    return sum(row["seconds"] for row in timing) + sum(seconds_of(end[1]) for end in ends if end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=float, default=200, help="seconds of `evojax-merge bench`")
    parser.add_argument("--shape", default="10M", help="the shape of its models")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{host()}\n")
    if arguments.processes > 1:
        with tempfile.TemporaryDirectory() as root:
            write_inputs(Path(root))
            cache = empty_cache(Path(root) / "cache")
            lines_of(Path(root), cache, "bench", "--seconds", str(arguments.bench), "--shape", arguments.shape)
            shared(Path(root), cache, arguments.processes)
        return
    print("| search | bound, s | plan, s | took, s | took / plan | longest silence, s | `left`, worst error "
          "| compiled, first and second run | until the first generation, s |")  # fmt: skip
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        write_inputs(folder)
        # Plans compile passes for their memory, which the searches are not to find.
        plans, cache = (empty_cache(folder / name) for name in ("plans", "cache"))
        lines_of(folder, plans, "bench", "--seconds", str(arguments.bench), "--shape", arguments.shape)
        for name in SEARCHES:
            about, bound = estimate(folder, plans, name)
            runs = [lines_of(folder, cache, "search", f"{name}.yaml", "--out", f"{name}{k}") for k in (1, 2)]
            gaps = [
                max(b.seconds - a.seconds for a, b in zip([Line(0, ""), *lines], lines, strict=False)) for lines in runs
            ]
            errors = [abs(error) for lines in runs for error in left_errors(lines)]
            sessions = [
                json.loads((folder / f"{name}{k}" / "environment.json").read_text())["sessions"][-1]["compiled"]
                for k in (1, 2)
            ]
            begun = [
                next(line.seconds for line in lines if "; fitness on the search split" in line.text) for lines in runs
            ]
            # A plan has the scores of base and parents, which the second run reads.
            (cache / "evojax-merge" / "scores").rename(folder / f"{name}-scores")
            lines = lines_of(folder, cache, "search", f"{name}.yaml", "--out", f"{name}3")
            took = worked(lines, folder / f"{name}3")
            print(
                f"| {name} | {bound:.1f} | {about:.1f} | {took:.1f} | {took / about:.2f} | {max(gaps):.1f} "
                f"| {max(errors):.0%} | {sessions[0]['programs']} in {sessions[0]['seconds']:.0f} s, "
                f"{sessions[1]['programs']} | {begun[0]:.1f}, {begun[1]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
