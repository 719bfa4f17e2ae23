"""Plans of searches over 8B, 32B and 70B models, and what follows from their advice (30 to 60 minutes).

    python -m bench fleet
    python -m bench fleet --models 70B --targets 8xh100 2x8xh100

Models of Llama-3's and Qwen2.5-32B's shapes in bfloat16, a base and two parents: headers alone, no weights. A
generation is of 8 candidates by task arithmetic, or 4 that follow gradients, on 64 examples of 350 tokens, of which the
last 100 are scored, or written. Each search is planned with one device to a candidate. Where it does not fit, each
change that the plan names is followed by itself, and planned: the row is that of the first, and says how many of them
fit. Seconds of a generation are at least those, by the roofline and by data sheets; those of planning are the
processor's, whatever else it does.
"""

import argparse
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from evojax_merge.benchmarks.header_models import MISTRAL_7B, problem_for, write_examples, write_models
from evojax_merge.evaluation.targets import GPU_MEMORY_FRACTION, find_target
from evojax_merge.report.plan import Plan, shown_bytes, shown_seconds
from evojax_merge.steps.planning import make_plan

LLAMA = MISTRAL_7B | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256}
SHAPES = {
    "8B": LLAMA,
    "32B": LLAMA | {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
                    "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064},
    "70B": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
USES = {"likelihood": ("likelihood", "cma_es", 8), "generation": ("generation", "cma_es", 8),
        "gradient": ("likelihood", "gradient", 4)}  # fmt: skip
PLACES = ("device", "host", "disk")
TARGETS = ("rtx4090", "h100", "8xh100", "2x8xh100", "v5e-8", "v5p-16")
EXAMPLES, PARENTS = 64, 2
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
HEADER = (
    "| models | by | bank | target | planned in | the search as asked | advice that fits | first advice | a device | "
    "a generation | arithmetic | merging | weights | between devices | link | disk | loading | compiling | writing | "
    "bound by |\n| --- | --- | --- | --- | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | "
    "---: | ---: | ---: | ---: | --- |"
)


@dataclass(frozen=True)
class Case:
    """A search. fraction: the share of a GPU's memory that JAX takes."""

    shape: str
    use: str
    bank: str
    target: str
    model: int = 1
    parents: int = PARENTS
    fraction: float = GPU_MEMORY_FRACTION

    def plan(self, folder: Path) -> Plan:
        mode, strategy, population = USES[self.use]
        os.environ[FRACTION] = str(self.fraction)
        problem = problem_for(
            folder, self.parents, "task_arithmetic", mode, find_target("--targets", self.target), self.model,
            bank=self.bank, strategy=strategy, population=population,
        )  # fmt: skip
        return make_plan(problem, problem.prepare())

    def following(self, line: str) -> "Case":
        """The search that has followed a line of advice."""
        changes: dict[str, Any] = dict(re.findall(r"evaluation\.(\w+): (\w+)", line))
        changes |= {"model": int(changes["model"])} if "model" in changes else {}
        if named := re.match(r"--target (\S+)", line):
            changes["target"] = named[1]
        if fewer := re.match(r"(\d+) fewer", line):
            changes["parents"] = self.parents - int(fewer[1])
        return replace(self, **changes | ({"fraction": 0.95} if FRACTION in line else {}))


def row(case: Case, folder: Path) -> str:
    begun = time.process_time()
    plan = case.plan(folder)
    seconds, asked, first, fitting = time.process_time() - begun, "fits" if plan.fits else "does not fit", "", ""
    if not plan.fits:
        first = plan.advice[0]
        cases = [case.following(line) for line in plan.advice]
        plans = [followed.plan(folder) for followed in cases if followed != case]
        fitting = f"{sum(each.fits for each in plans)} of {len(plans)}"
        plan = plans[0] if plans else plan
    work, memory = plan.generation, f"{shown_bytes(plan.bank_bytes + plan.pass_bytes)} of "
    times = [
        work.seconds, work.compute_seconds, work.merge_seconds, max(0.0, work.reading_seconds), work.exchange_seconds,
        work.link_seconds, work.disk_seconds, *(around.seconds for around in plan.around.values()),
    ]  # fmt: skip
    shown = [shown_seconds(value) if plan.fits else "" for value in times]
    cells = (
        case.shape, case.use, case.bank, case.target, shown_seconds(seconds), asked, fitting, first,
        memory + shown_bytes(plan.target.memory), *shown, plan.run.bound if plan.fits else "",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def cases(shapes: list[str], targets: list[str], uses: list[str]) -> Iterator[Case]:
    for shape, target, use, place in product(shapes, targets, uses, PLACES):
        yield Case(shape, use, place, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--by", nargs="+", choices=USES, default=list(USES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        print(HEADER)
        for name in options.models:
            folder = Path(root) / name
            folder.mkdir()
            write_models(folder, SHAPES[name], PARENTS)
            write_examples(folder, EXAMPLES)
            for case in cases([name], options.targets, options.by):
                print(row(case, folder), flush=True)


if __name__ == "__main__":
    main()
