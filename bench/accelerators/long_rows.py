"""Memory of a likelihood pass over long rows of a 7B model, by the targets' compilers (a minute for each).

    python -m bench long-rows
    python -m bench long-rows --targets v5p-8 --lengths 32768

A base and a parent of Mistral-7B's shapes in bfloat16, headers alone; the candidates of a linear merge that share
a pass, and one row of so many tokens, of which the last 100 are scored. Bytes are those of a device, beside the bank.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from bench.shared.machine import describe
from evojax_merge.benchmarks.header_models import ANSWER, MISTRAL_7B, problem_for, write_examples, write_models
from evojax_merge.evaluation.compilers import CompilerMissing, target_compiler
from evojax_merge.evaluation.targets import find_target
from evojax_merge.report.plan import shown_bytes
from evojax_merge.steps.planning import make_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["v5p-8", "h100"], metavar="TARGET")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 16384, 32768], help="tokens of a row")
    arguments = parser.parse_args()
    print("| target | tokens of a row | candidates a pass | estimated | compiler says |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in arguments.targets:
        target = find_target("--targets", name)
        try:
            compiler = target_compiler(target, 1)
        except CompilerMissing as error:
            print(error, file=sys.stderr)
            compiler = None
        for length in arguments.lengths:
            with tempfile.TemporaryDirectory() as root:
                folder = Path(root)
                write_models(folder, MISTRAL_7B, 1)
                write_examples(folder, 2, prompt=length - ANSWER)
                problem = problem_for(folder, 1, "linear", "likelihood", target, tokens=length)
                plan = make_plan(problem, problem.prepare(), compiler=compiler)
            (row,) = plan.passes
            reported = "" if row.reported_bytes is None else shown_bytes(row.reported_bytes)
            estimated = shown_bytes(row.temporary_bytes)
            print(f"| {name} | {length:,} | {row.chunk} | {estimated} | {reported} |", flush=True)
    print(f"\n{describe()}")


if __name__ == "__main__":
    main()
