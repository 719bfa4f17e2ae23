"""Searches over 7B and 70B models on cards that they outgrow, priced (5 minutes).

    python -m bench large-models
    python -m bench large-models --compile v5e-1     # with the reports of this target's compiler, where it is installed

Models of Mistral-7B's and Llama-3-70B's shapes in bfloat16, a base and three parents: headers alone, no weights. A
generation is of 16 candidates merged by TIES, or 4 that follow gradients, on 128 examples of 350 tokens, of which the
last 100 are scored, or written. Seconds are those of the roofline: of the arithmetic and the memory's traffic, and of
the link that a streamed bank comes over; the larger of the two bounds a generation from below.
"""

import argparse
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from evojax_merge.benchmarks.header_models import MISTRAL_7B, problem_for, write_examples, write_models
from evojax_merge.evaluation.compilers import CompilerMissing, TargetCompiler, target_compiler
from evojax_merge.evaluation.targets import find_target
from evojax_merge.report.plan import shown_bytes, shown_seconds
from evojax_merge.steps.planning import make_plan

LLAMA_70B = MISTRAL_7B | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
SHAPES = {"7B": MISTRAL_7B, "70B": LLAMA_70B}
EXAMPLES, POPULATION, STARTS = 128, 16, 4


@dataclass(frozen=True)
class Case:
    """A search: models, target, the devices that share a candidate, and the use of a generation."""

    shape: str
    target: str
    model: int
    use: str


SEVEN = [Case("7B", target, 1, use) for target in ("rtx4090", "h100", "8xh100")
         for use in ("likelihood", "generation", "gradient")]  # fmt: skip
SEVENTY = [Case("70B", *pair, "likelihood") for pair in (("h100", 1), ("8xh100", 1), ("8xh100", 8), ("2x8xh100", 8))]
CASES = [*SEVEN, *SEVENTY]
HEADER = (
    "| models | target | devices to a candidate | generation by | bank | of a device | of the host | a generation | "
    "its link | |\n| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | --- |"
)


def row(folder: Path, case: Case, compiler: TargetCompiler | None = None) -> str:
    target = find_target("--targets", case.target)
    mode = "generation" if case.use == "generation" else "likelihood"
    strategy, population = ("gradient", STARTS) if case.use == "gradient" else ("cma_es", POPULATION)
    problem = problem_for(
        folder, 3, "ties", mode, target, case.model, bank="auto", strategy=strategy, population=population
    )
    plan = make_plan(problem, problem.prepare(), compiler=compiler)
    candidates = problem.backend.candidates
    place = getattr(candidates, "place", "device")
    moved = candidates.host_bytes() / case.model
    rounds = 2 if case.use == "gradient" else 1
    # Each candidate that generates is materialised from the bank anew, unless several fit at a time.
    if mode == "generation":
        rounds = math.ceil(population / (target.devices // case.model) / plan.passes[0].chunk)
    link = shown_seconds(rounds * moved / target.link) if moved else ""
    time = shown_seconds(plan.generation.seconds) if plan.fits else ""
    verdict = "fits" if plan.fits else "does not fit"
    return (
        f"| {case.shape} | {case.target} | {case.model} | {case.use} | {place} | "
        f"{shown_bytes(plan.bank_bytes + plan.pass_bytes)} of {shown_bytes(target.memory)} | "
        f"{shown_bytes(plan.host_bytes)} | {time} | {link} | {verdict} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", metavar="TARGET", help="ask the compiler of a TPU target about the 7B search")
    options = parser.parse_args()
    cases = [Case("7B", options.compile, 1, "likelihood")] if options.compile else CASES
    compiler = None
    if options.compile:
        try:
            compiler = target_compiler(find_target("--compile", options.compile), 1)
        except CompilerMissing as error:
            sys.exit(str(error))
    with tempfile.TemporaryDirectory() as root:
        for name, shape in SHAPES.items():
            (Path(root) / name).mkdir()
            write_models(Path(root) / name, shape, 3)
            write_examples(Path(root) / name, EXAMPLES)
        print(HEADER)
        for case in cases:
            print(row(Path(root) / case.shape, case, compiler), flush=True)
        if compiler is not None:
            print("\n| pass | arguments | temporaries |\n| --- | ---: | ---: |")
            for program in compiler.programs():
                memory: Any = program.memory_analysis()
                name = str(program.as_text()).split(",")[0].removeprefix("HloModule jit_")
                held = shown_bytes(memory.argument_size_in_bytes)
                print(f"| {name} | {held} | {shown_bytes(memory.temp_size_in_bytes)} |")


if __name__ == "__main__":
    main()
