"""What searches over 7B models take on accelerators that are not here.

    python bench/targets.py             # estimates for every method, mode and target
    python bench/targets.py --paper     # the experiment of arXiv 2403.13187, priced
    python bench/targets.py --compile   # with what the targets' own compilers report, where they are installed
                                        # (pip install '.[plan-tpu]', '.[plan-cuda]')

Models of Mistral-7B's shapes in bfloat16, a base and three parents: headers alone, no weights. The 1,069 examples are
of 350 tokens, of which a likelihood task scores the last 100 and a generation writes them.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from header_models import MISTRAL_7B, problem_for, write_examples, write_models

from evojax_merge.evaluation.compilers import CompilerMissing, TargetCompiler, collectives, target_compiler
from evojax_merge.evaluation.planned_passes import SCORE
from evojax_merge.evaluation.targets import Target, find_target
from evojax_merge.planning import make_plan
from evojax_merge.problem import SearchProblem
from evojax_merge.report.plan import Plan, shown_bytes, shown_number, shown_seconds

TARGETS = ("h100", "8xh100", "v5p-8", "v5e-16", "v6e-8")
METHODS = ("linear", "ties", "dare_ties", "path")
MODES = ("likelihood", "generation")
# The paper's experiment: CMA-ES with a population of 128 for 100 generations on 1,069 problems.
PAPER = {"population": 128, "generations": 100}
PROBLEMS, RUNGS, SHARE_OF_PEAK = 1069, 4, 0.5


def fitting_plan(
    folder: Path, parents: int, method: str, mode: str, target: Target, *, ask: bool = False,
    search: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[SearchProblem, Plan, TargetCompiler | None]:  # fmt: skip
    """The plan with the fewest of a host's devices to a candidate with which it fits; else the last that does not.
    search: its keys; ask: whether the target's compiler is asked, where it is installed."""
    for model in range(1, target.devices_per_host + 1):
        if target.devices_per_host % model == 0:
            problem = problem_for(folder, parents, method, mode, target, model, **search)
            plan = make_plan(problem, problem.batched_tasks())
            if plan.fits:
                break
    compiler = compiler_of(target, plan.model) if ask and plan.fits else None
    if compiler is not None:
        plan = make_plan(problem, problem.batched_tasks(), compiler=compiler)
    return problem, plan, compiler


def compiler_of(target: Target, model: int) -> TargetCompiler | None:
    try:
        return target_compiler(target, model)
    except CompilerMissing as error:
        print(error, file=sys.stderr)
        return None


HEADINGS = (
    "target", "method", "mode", "fits", "devices to a candidate", "models", "candidates a pass", "tokens a batch",
    "temporaries", "compiler says", "FLOP", "moved", "s/candidate", "merging", "in full batches", "bound by",
    "collectives",
)  # fmt: skip


def table(
    folder: Path, parents: int, targets: Sequence[str], methods: Sequence[str], modes: Sequence[str], ask: bool
) -> Iterator[str]:
    """What each search takes, with as few devices to a candidate as hold it."""
    yield f"| {' | '.join(HEADINGS)} |"
    yield f"| {' | '.join('---' if name in ('target', 'method', 'mode') else '---:' for name in HEADINGS)} |"
    for name in targets:
        for method in methods:
            for mode in modes:
                found = fitting_plan(folder, parents, method, mode, find_target("--targets", name), ask=ask)
                yield f"| {name} | {method} | {mode} | {' | '.join(cells(*found))} |"


def cells(problem: SearchProblem, plan: Plan, compiler: TargetCompiler | None) -> list[str]:
    """A row of the table, from `fits` on. Temporaries are those of the largest pass."""
    work, largest = plan.candidate, max(plan.passes, key=lambda row: row.needed_bytes)
    tokens, merge_tokens = problem.tokens_per_batch, problem.target.merge_tokens
    merges = any(row.name == SCORE for row in plan.passes) and work.merge_seconds > 0
    exchanged: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for program in () if compiler is None else compiler.programs():
        for kind, (count, nbytes) in collectives(program).items():
            counted[kind], exchanged[kind] = max(counted[kind], count), max(exchanged[kind], nbytes)
    each = ", ".join(f"{counted[kind]} {kind} ({shown_bytes(exchanged[kind])})" for kind in sorted(counted))
    return [
        "yes" if plan.fits else "NO", f"{plan.model}", shown_bytes(plan.bank_bytes),
        f"{max(row.chunk for row in plan.passes)}", f"{batch_tokens(problem):,} of {tokens:,}",
        shown_bytes(largest.temporary_bytes),
        "" if largest.reported_bytes is None else shown_bytes(largest.reported_bytes),
        shown_number(work.flops).strip(), shown_bytes(work.moved_bytes), shown_seconds(work.seconds),
        f"{work.merge_seconds / work.seconds:.0%}",
        f"{merge_tokens / (merge_tokens + tokens):.0%}" if merges else "", work.bound,
        "" if compiler is None else each or "none",
    ]  # fmt: skip


def batch_tokens(problem: SearchProblem) -> int:
    """The tokens of a batch that is scored, or of a group that is prefilled, on average."""
    (searched,) = problem.by_split(problem.batched_tasks()).shards[0]
    if searched.scoring is not None:
        return round(searched.scoring.computed / len(searched.scoring.batches))
    assert searched.prompts is not None
    return round(searched.prompts.computed / sum(len(batch.prefill_groups) for batch in searched.prompts.batches))


def priced(
    folder: Path, parents: int, targets: Sequence[str], methods: Sequence[str], modes: Sequence[str]
) -> Iterator[str]:
    """The paper's experiment, in hours."""
    yield "| target | method | fitness | fits | devices to a candidate | hours | with racing |"
    yield "| --- | --- | --- | --- | ---: | ---: | ---: |"
    for name in targets:
        target = find_target("--targets", name)
        for method in methods:
            for mode in modes:
                plans = [
                    fitting_plan(folder, parents, method, mode, target, search=PAPER | {"rungs": rungs})[1]
                    for rungs in (1, RUNGS)
                ]
                hours = [f"{plan.run.seconds / SHARE_OF_PEAK / 3600:,.1f}" if plan.fits else "–" for plan in plans]
                yield (
                    f"| {name} | {method} | {mode} | {'yes' if plans[0].fits else 'no'} | {plans[0].model} | "
                    f"{hours[0]} | {hours[1]} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--parents", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--paper", action="store_true", help="the paper's experiment, priced, in place of the table")
    parser.add_argument("--compile", action="store_true", help="ask the targets' compilers, where they are installed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, MISTRAL_7B, options.parents)
        write_examples(folder, PROBLEMS)
        what = folder, options.parents, options.targets, options.methods, options.modes
        for line in priced(*what) if options.paper else table(*what, options.compile):
            print(line, flush=True)


if __name__ == "__main__":
    main()
