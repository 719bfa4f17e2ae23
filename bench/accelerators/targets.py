"""Searches over 7B models on accelerators that are not here, priced (3 minutes).

    python -m bench targets             # estimates for every method, mode and target, and then the experiment of
                                        # arXiv 2403.13187, priced for PAPER_TARGETS and PAPER_METHODS
    python -m bench targets --paper     # that experiment alone, for every method, mode and target
    python -m bench targets --compile --json targets.jsonl   # with what the targets' own compilers report, where they
                                                             # are installed (pip install '.[plan-tpu]', '.[plan-cuda]')
    python -m bench targets --meshes    # what devices that share a candidate exchange, as these compilers have it
    python -m bench targets --targets h100 --methods ties --modes likelihood --tokens 8192 16384

Models of Mistral-7B's shapes in bfloat16, a base and three parents: headers alone, no weights. The 1,069 examples are
of 350 tokens, of which a likelihood task scores the last 100 and a generation writes them.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax

from evojax_merge.benchmarks.header_models import MISTRAL_7B, problem_for, write_examples, write_models
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.compilers import CompilerMissing, TargetCompiler, collectives, target_compiler
from evojax_merge.evaluation.programs import DECODE, MATERIALISE, PREFILL, SCORE
from evojax_merge.evaluation.targets import Target, find_target
from evojax_merge.problem import SearchProblem
from evojax_merge.report.plan import Plan, shown_bytes, shown_number, shown_seconds
from evojax_merge.steps.planning import make_plan
from evojax_merge.tasks.splits import Splits

TARGETS = ("h100", "8xh100", "v5p-8", "v5e-16", "v6e-8")
METHODS = ("linear", "ties", "dare_ties", "path")
MODES = ("likelihood", "generation")
MESH_TARGETS = ("v5e-8", "v6e-8")
# A small Llama, wide enough for every device of eight to have a key-value head.
SMALL = MISTRAL_7B | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 6, "num_attention_heads": 16, "vocab_size": 8192,
}  # fmt: skip
# So few examples are scored in one batch, which merges.
ONE_BATCH = 16
PAPER_TARGETS, PAPER_METHODS = ("h100", "v5p-8"), ("ties", "dare_ties")
# The paper's experiment: CMA-ES with a population of 128 for 100 generations on 1,069 problems.
PAPER = {"population": 128, "generations": 100}
PROBLEMS, RUNGS, SHARE_OF_PEAK = 1069, 4, 0.5


def fitting_plan(
    folder: Path, parents: int, method: str, mode: str, target: Target, *, tokens: int | None = None, ask: bool = False,
    search: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[SearchProblem, Plan]:  # fmt: skip
    """The plan with the fewest of a host's devices to a candidate with which it fits; else the last that does not.
    tokens: of a batch; search: its keys; ask: whether the target's compiler is asked, where it is installed."""
    alone = problem_for(folder, parents, method, mode, target, tokens=tokens, **search)
    batches = batched(alone, mode)
    shares = [model for model in range(1, target.devices_per_host + 1) if target.devices_per_host % model == 0]
    for model in shares:
        config = alone.backend.config
        evaluation = config.evaluation.model_copy(update={"model": model})
        changed = config.model_copy(update={"evaluation": evaluation})
        problem = replace(alone, backend=replace(alone.backend, config=changed))
        # What does not hold the models alone need not be planned.
        if model < shares[-1] and problem.backend.planner().sizes.bank >= target.memory:
            continue
        plan = make_plan(problem, batches)
        if plan.fits:
            break
    compiler = compiler_of(target, plan.model) if ask and plan.fits else None
    if compiler is not None:
        plan = make_plan(problem, batches, compiler=compiler)
    return problem, plan


# By what they depend on: the batches of searches on the same examples.
_batches: dict[tuple[Any, ...], Splits[list[BatchedTask]]] = {}


def batched(problem: SearchProblem, mode: str) -> Splits[list[BatchedTask]]:
    """A search's batches, made once for all that differ in their methods and in how many devices share a candidate."""
    key = mode, problem.backend.tokens_per_batch, problem.target.merge_tokens, problem.search.rungs
    if key not in _batches:
        _batches[key] = problem.prepare()
    return _batches[key]


@cache
def compiler_of(target: Target, model: int) -> TargetCompiler | None:
    """One for all rows: what several searches have in common is compiled once."""
    try:
        return target_compiler(target, model)
    except CompilerMissing as error:
        print(error, file=sys.stderr)
        return None


# A search's figures, as JSON has them: KEYS, which tell it from others, and what a line of the tables says.
Row = dict[str, Any]
KEYS = ("target", "method", "mode", "parents", "tokens", "compile")


def planned_rows(folder: Path, wanted: Sequence[Row], file: Path | None) -> Iterator[Row]:
    """The figures of searches that are told by their KEYS: those that a JSON-lines file has, else planned now, and
    appended to it."""
    known = read_rows(file)
    for keys in wanted:
        row = known.get(json.dumps(keys))
        if row is None:
            started = time.perf_counter()
            found = fitting_plan(
                folder, keys["parents"], keys["method"], keys["mode"], find_target("--targets", keys["target"]),
                tokens=keys["tokens"], ask=keys["compile"],
            )  # fmt: skip
            row = keys | figures(keys["mode"], *found) | {"seconds_to_plan": round(time.perf_counter() - started, 1)}
            if file is not None:
                with file.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
        yield row


def read_rows(file: Path | None) -> dict[str, Row]:
    if file is None or not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {json.dumps({key: row[key] for key in KEYS}): row for row in rows}


def figures(mode: str, problem: SearchProblem, plan: Plan) -> Row:
    work, merge_tokens = plan.candidate, problem.target.merge_tokens
    tokens = problem.backend.tokens_per_batch
    merges = any(row.name == SCORE for row in plan.passes) and work.merge_seconds > 0
    return {
        "fits": plan.fits, "model": plan.model, "bank_bytes": plan.bank_bytes, "batch": batch_tokens(problem, mode),
        "tokens_per_batch": tokens, "flops": work.flops, "moved_bytes": work.moved_bytes, "seconds": work.seconds,
        "merging": work.merge_seconds / work.seconds,
        "merging_in_full_batches": merge_tokens / (merge_tokens + tokens) if merges else None, "bound": work.bound,
        "passes": [
            {
                "name": one.name, "chunk": one.chunk, "held_bytes": one.held_bytes,
                "temporary_bytes": one.temporary_bytes, "reported_bytes": one.reported_bytes,
                "collectives": one.collectives,
            }
            for one in plan.passes
        ],
    }  # fmt: skip


# The headings of the table, and what a row says under each.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "target": lambda row: row["target"],
    "method": lambda row: row["method"],
    "mode": lambda row: row["mode"],
    "fits": lambda row: "yes" if row["fits"] else "NO",
    "devices to a candidate": lambda row: str(row["model"]),
    "models": lambda row: shown_bytes(row["bank_bytes"]),
    "candidates a pass": lambda row: str(max(one["chunk"] for one in row["passes"])),
    "tokens a batch": lambda row: f"{row['batch']:,} of {row['tokens_per_batch']:,}",
    "temporaries": lambda row: shown_bytes(largest_pass(row)["temporary_bytes"]),
    "FLOP": lambda row: shown_number(row["flops"]).strip(),
    "moved": lambda row: shown_bytes(row["moved_bytes"]),
    # What does not fit takes no time.
    "s/candidate": lambda row: shown_seconds(row["seconds"]) if row["fits"] else "–",
    "merging": lambda row: f"{row['merging']:.0%}" if row["fits"] else "–",
    "in full batches": lambda row: share(row["merging_in_full_batches"]),
    "bound by": lambda row: row["bound"] if row["fits"] else "–",
}
# Of what the targets' compilers say, pass by pass.
COMPILED = (
    "target",
    "method",
    "mode",
    "pass",
    "candidates a pass",
    "estimated",
    "compiler says",
    "estimated / said",
    "collectives",
)
WORDS_OF_TABLES = ("target", "method", "mode", "fits", "pass", "bound by", "collectives")


def kept(rows: Iterable[Row], into: list[Row]) -> Iterator[Row]:
    """The rows, one by one, each also put `into` a list."""
    for row in rows:
        into.append(row)
        yield row


def heading(names: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield f"| {' | '.join('---' if name in WORDS_OF_TABLES else '---:' for name in names)} |"


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The plan of each search, with as few devices to a candidate as hold it. Temporaries are those of the largest
    pass."""
    yield from heading(list(COLUMNS))
    for row in rows:
        yield f"| {' | '.join(show(row) for show in COLUMNS.values())} |"


def compiled_table(rows: Iterable[Row]) -> Iterator[str]:
    """The temporaries of each pass by the plan's estimate and by the target's compiler, and what its devices exchange.
    Searches on a target that have a pass alike are in one line."""
    yield from heading(COMPILED)
    lines: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in rows:
        for one in row["passes"]:
            said, estimated = one["reported_bytes"], one["temporary_bytes"]
            if said is not None:
                cells = (
                    row["target"], one["name"], str(one["chunk"]), shown_bytes(estimated), shown_bytes(said),
                    f"{estimated / said:.2f}", shown_collectives(one["collectives"]),
                )  # fmt: skip
                alike = lines.setdefault(cells, {"method": [], "mode": []})
                for key, found in alike.items():
                    found += [row[key]] if row[key] not in found else []
    for (target, *rest), alike in lines.items():
        yield f"| {' | '.join([target, ', '.join(alike['method']), ', '.join(alike['mode']), *rest])} |"


def shown_collectives(found: Mapping[str, Sequence[int]]) -> str:
    """`64 all-reduce (4.3 GB)`, and so on."""
    return (
        ", ".join(f"{count} {kind} ({shown_bytes(nbytes)})" for kind, (count, nbytes) in sorted(found.items()))
        or "none"
    )


def largest_pass(row: Row) -> Row:
    found: Row = max(
        row["passes"],
        key=lambda one: (
            one["held_bytes"] + (one["temporary_bytes"] if one["reported_bytes"] is None else one["reported_bytes"])
        ),
    )
    return found


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def batch_tokens(problem: SearchProblem, mode: str) -> int:
    """The tokens of a batch that is scored, or of a group that is prefilled, on average."""
    (searched,) = batched(problem, mode).shards[0]
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


MESH_HEADINGS = ("target", "population x model", "pass", "all-reduces a layer", "collectives", "temporaries")


def meshes(folder: Path, parents: int, targets: Sequence[str], method: str) -> Iterator[str]:
    """The data that the devices of a host exchange in each pass, for every way to divide them into groups that share a
    candidate."""
    yield f"| {' | '.join(MESH_HEADINGS)} |"
    yield "| --- | --- | --- | ---: | --- | ---: |"
    for name in targets:
        target = find_target("--targets", name)
        for model in (n for n in range(target.devices_per_host, 0, -1) if target.devices_per_host % n == 0):
            groups = target.devices_per_host // model
            passes: dict[str, Sequence[str]] = {}
            for mode in MODES:
                compiler = compiler_of(target, model)
                if compiler is None:
                    return
                problem = problem_for(folder, parents, method, mode, target, model)
                make_plan(problem, problem.prepare(), compiler=compiler)
                for program in compiler.programs():
                    # Of batches of other shapes there is nothing else to see.
                    passes.setdefault(pass_name(program), mesh_cells(program, problem.backend.models.decoder.layers))
            for one in (SCORE, MATERIALISE, PREFILL, DECODE):
                yield f"| {name} | {groups} x {model} | {one} | {' | '.join(passes[one])} |"


def pass_name(program: jax.stages.Compiled) -> str:
    """The name of a compiled pass in `evaluation.passes`."""
    return (program.as_text() or "").split(",")[0].removeprefix("HloModule jit_")


def mesh_cells(program: jax.stages.Compiled, layers: int) -> list[str]:
    """From `all-reduces a layer` on: rounded down, as embedding and head have some besides. Of a decode step."""
    found, memory = collectives(program), program.memory_analysis()
    count, _ = found.get("all-reduce", (0, 0))
    each = ", ".join(f"{number} {kind} ({shown_bytes(nbytes)})" for kind, (number, nbytes) in sorted(found.items()))
    assert memory is not None
    return [f"{count // layers}", each or "none", shown_bytes(memory.temp_size_in_bytes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", metavar="TARGET", help="default: " + ", ".join(TARGETS))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--parents", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--paper", action="store_true", help="the paper's experiment, priced, in place of the table")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[None], help="of a batch, in place of the target's own"
    )
    parser.add_argument("--compile", action="store_true", help="ask the targets' compilers, where they are installed")
    parser.add_argument("--meshes", action="store_true", help="what devices exchange, of a small Llama and one method")
    parser.add_argument("--json", type=Path, help="a JSON-lines file: rows that it has are not planned again")
    options = parser.parse_args()
    options.targets = options.targets or (MESH_TARGETS if options.meshes else TARGETS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, SMALL if options.meshes else MISTRAL_7B, options.parents)
        write_examples(folder, ONE_BATCH if options.meshes else PROBLEMS)
        if options.meshes:
            for line in meshes(folder, options.parents, options.targets, options.methods[0]):
                print(line, flush=True)
            return
        if options.paper:
            for line in priced(folder, options.parents, options.targets, options.methods, options.modes):
                print(line, flush=True)
            return
        each = product(options.targets, options.methods, options.modes, [options.parents], options.tokens)
        wanted = [dict(zip(KEYS, (*one, options.compile), strict=True)) for one in each]
        rows: list[Row] = []
        for line in table(kept(planned_rows(folder, wanted, options.json), rows)):
            print(line, flush=True)
        if options.compile:
            print("\n" + "\n".join(compiled_table(rows)))
        if len(sys.argv) == 1:
            print()
            for line in priced(folder, options.parents, PAPER_TARGETS, PAPER_METHODS, MODES):
                print(line, flush=True)


if __name__ == "__main__":
    main()
