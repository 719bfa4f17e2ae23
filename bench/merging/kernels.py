"""Parameters per second of every merge method as a search uses it, against mergekit and XLA's one add (8 minutes).

    python -m bench kernels [--sweep --plot bench/results/kernels.png]

A parameter is one entry of one candidate's merged tensor. Measured in turn, in every repeat, so that a busy machine
disturbs all alike (medians are shown):

- *ours*: P candidates of one tensor `[rows, 1024]`, one after the other in a `lax.scan` whose carry, a float32 tensor,
  takes each result: no memory is written that was not written before, as where a search merges a layer, uses it and
  drops it. `tabulate`, which measures a tensor once, is shown apart, as *prepare*.
- *XLA's one add*: the same scan over P constants c with `x + c` in place of the merge, the least that any kernel does.
  The share of this figure says what the method's further sources and arithmetic cost.
- *mergekit* in process, on the same tensors, with torch's own number of threads and with one (threads that wait for
  each other suffer on a busy machine): ours is divided by the faster. It makes one candidate at a time.

Model Stock and Karcher have no parameter to search: the same merge is made P times. Ours is compared with
candidates merged alone, and with mergekit where nothing is random, before anything is timed.

`--explain METHOD` prints the steps of a candidate as they are compiled: TIES looks its thresholds up, and all the rest
is one fusion, which holds the K deltas in registers. A candidate reads the K + 1 sources, 4 (K + 1) bytes per entry in
float32 (2 (K + 1) in bfloat16; DELLA reads 2 K bytes of numbers on top, DARE hashes its own in registers), and the
carry is read and written, 8 bytes per entry.

The sources pass a barrier. Without it XLA takes the deltas and their magnitudes, which do not depend on the candidate,
out of the loop and stores them: more memory, and more to read per candidate than to recompute. A search merges each
layer inside the scan over layers, where XLA has no occasion to.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import METHODS

from bench.shared.machine import describe
from evojax_merge.benchmarks.kernels import WIDTH, Kernels, MergeProblem, build_problem, medians, require_equal

SWEPT = ("ties", "dare_ties")
SWEPT_CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
SWEPT_PARENTS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Row:
    """Millions of parameters per second; None: not measured, or nothing to do."""

    method: str
    dtype: str
    size: int
    parents: int
    candidates: int
    ours: float
    one_add: float
    mergekit: float | None
    mergekit_one_thread: float | None
    prepare: float | None

    @property
    def peer(self) -> float | None:
        """The faster of mergekit's two."""
        if self.mergekit is None or self.mergekit_one_thread is None:
            return None
        return max(self.mergekit, self.mergekit_one_thread)


# ---------------------------------------------------------------------------------------------------------------
# What is timed


def mergekit_call(problem: MergeProblem) -> Callable[[bool], Any] | None:
    """Candidate 0 through mergekit's own method, with torch's own number of threads or with one; None where mergekit
    or torch is not installed."""
    try:
        import torch
        from mergekit.merge_methods import registry
        from mergekit.merge_methods.base import TensorGroup
    except ImportError:
        return None
    name = problem.method.name
    method = registry.get(name)
    kind = torch.float32 if problem.sources[0].dtype == np.float32 else torch.bfloat16
    tensors = [torch.tensor(np.asarray(x, np.float32)).to(kind) for x in problem.sources]
    parameters = {name: value[0].tolist() for name, value in problem.numbers.items()}
    parameters |= {name: value.tolist() for name, value in problem.constants.items()}
    if "max_iter" in parameters:
        parameters["max_iter"] = int(parameters["max_iter"])
    # SLERP has no deltas, but counts from one of its two models.
    base_index = 0 if problem.method.options.has_base or name == "slerp" else None

    threads = torch.get_num_threads()

    def call(one_thread: bool) -> Any:
        torch.set_num_threads(1 if one_thread else threads)
        group = TensorGroup.from_tensors(tensors, base_index=base_index)
        return method([group], parameters=parameters)[0]

    return call


def measure(name: str, size: int, parents: int, count: int, dtype: str, repeats: int) -> Row:
    problem = build_problem(name, size, parents, count, dtype)
    kernels = Kernels(problem, count)
    kernels.check()
    x = jnp.asarray(problem.sources[0])
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: kernels.scan(kernels.shared, kernels.candidates),
        "one_add": lambda: kernels.one_add(x, kernels.constants),
    }
    # Torch's threads may spin for a while after their work: what runs next is not threaded.
    peer = mergekit_call(problem)
    if peer is not None:
        if dtype == "float32" and not problem.method.random:
            first = jax.tree.map(lambda leaf: leaf[0], kernels.candidates)
            # Its float32 inner products move multi-SLERP by up to 1e-4 on millions of entries; ours are float64.
            require_equal(f"{name}: ours and mergekit", kernels.one(kernels.shared, first), peer(False).numpy(), 1e-3)
        runs["mergekit"] = lambda: peer(False)
        runs["mergekit_one_thread"] = lambda: peer(True)
    if kernels.is_prepared:
        runs["prepare"] = kernels.tabulate
    seconds = medians(runs, repeats)
    rate = {key: (count if key in ("ours", "one_add") else 1) * size / value / 1e6 for key, value in seconds.items()}
    return Row(
        name, dtype, size, problem.parents, count, rate["ours"], rate["one_add"], rate.get("mergekit"),
        rate.get("mergekit_one_thread"), rate.get("prepare"),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# What is shown


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row], label: str, key: Callable[[Row], str]) -> str:
    """A Markdown table, the first column `label` with `key(row)`; without mergekit's columns where it is missing."""
    peer = any(row.peer is not None for row in rows)
    heads = [label, "ours, M/s", "ours / XLA's one add"]
    heads += ["mergekit, M/s", "with one thread, M/s", "ours / mergekit"] if peer else []
    heads += ["prepare, M entries/s"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in rows:
        cells = [key(row), _figure(row.ours), f"{100 * row.ours / row.one_add:.0f}%"]
        if peer:
            ratio = None if row.peer is None else row.ours / row.peer
            cells += [_figure(row.mergekit), _figure(row.mergekit_one_thread), f"{_figure(ratio)}x"]
        lines.append("| " + " | ".join([*cells, _figure(row.prepare)]) + " |")
    return "\n".join(lines)


def bounds(rows: Sequence[Row]) -> str:
    return f"XLA, one add: {np.median([row.one_add for row in rows]):,.0f} M/s"


def plot(by_candidates: Sequence[Row], by_parents: Sequence[Row], path: Path) -> None:
    """Both sweeps, side by side (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), sharey=True, constrained_layout=True)
    panels = (("candidates", "candidates P", by_candidates), ("parents", "parents K", by_parents))
    for axis, (name, label, rows) in zip(axes, panels, strict=True):
        for color, method in zip(("tab:blue", "tab:orange"), SWEPT, strict=True):
            own = [row for row in rows if row.method == method]
            places = [getattr(row, name) for row in own]
            for field, style in (("ours", "o-"), ("peer", "x:")):
                values = [getattr(row, field) for row in own]
                if None not in values:
                    title = {"ours": "ours", "peer": "mergekit"}[field]
                    axis.plot(places, values, style, color=color, label=f"{method}, {title}")
            if method == SWEPT[0]:
                values = [row.one_add for row in own]
                axis.plot(places, values, color="grey", linewidth=0.8, label="XLA, one add")
        axis.set(xlabel=label, yscale="log")
        axis.set_xticks(sorted({getattr(row, name) for row in rows}))
        axis.grid(alpha=0.3)
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:.0f}")
    axes[0].set_ylabel("million parameters per second")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def explain(name: str, size: int, parents: int, count: int, dtype: str) -> None:
    """Print the steps that one candidate of the scan is compiled to, and the memory that the scan needs."""
    problem = build_problem(name, size, parents, count, dtype)
    compiled = Kernels(problem, count).scan
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    loop = re.search(r"body=(%[\w.-]+)", text)
    assert loop is not None
    step = text.split(f"\n{loop[1]} ", 1)[1].split("\n}", 1)[0].splitlines()[1:]
    print(f"{name}, P = {count}, K = {problem.parents}, {size:,} entries of {dtype}")
    for line in step:
        if "=" in line and not re.search(r" (parameter|get-tuple-element|constant|tuple)\(", line):
            print("  " + line.strip().split(", metadata=")[0])
    print(
        f"bytes: arguments {memory.argument_size_in_bytes:,}, result {memory.output_size_in_bytes:,}, "
        f"temporary {memory.temp_size_in_bytes:,}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Parameters per second of the merge kernels.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--size", type=int, nargs="+", default=[2**20, 2**22], help="entries of the tensor")
    parser.add_argument("--parents", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the stored sources")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help=f"{' and '.join(SWEPT)} over P and over K, at one size")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the sweeps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--explain", choices=list(METHODS), metavar="METHOD", help="print how it is compiled, and end")
    arguments = parser.parse_args()
    if any(size < WIDTH or size % WIDTH for size in arguments.size):
        parser.error(f"--size: rows have {WIDTH} entries, give a multiple of it")
    if min(arguments.candidates, arguments.parents, arguments.repeats) < 1:
        parser.error("--candidates, --parents and --repeats must be at least 1")
    if arguments.plot and not arguments.sweep:
        parser.error("--plot draws the sweeps: add --sweep")
    return arguments


def main() -> None:
    arguments = parse()
    parents, count, dtype, repeats = arguments.parents, arguments.candidates, arguments.dtype, arguments.repeats
    if arguments.explain:
        explain(arguments.explain, arguments.size[0], parents, count, dtype)
        return

    def sweep(title: str, label: str, key: Callable[[Row], str], cases: Sequence[tuple[str, int, int, int]]) -> Any:
        rows = [measure(*case, dtype, repeats) for case in cases]
        print(f"\n### {title}\n\n{table(rows, label, key)}\n\n{bounds(rows)}", flush=True)
        return rows

    every: list[Row] = []
    for size in arguments.size:
        every += sweep(
            f"{size:,} entries of {dtype}, {parents} parents, {count} candidates", "method (parents)",
            lambda row: f"{row.method} ({row.parents})", [(name, size, parents, count) for name in arguments.methods],
        )  # fmt: skip
    if arguments.sweep:
        size = arguments.size[0]
        by_candidates = sweep(
            f"{size:,} entries of {dtype}, {parents} parents, P candidates", "method, P",
            lambda row: f"{row.method}, {row.candidates}",
            [(name, size, parents, p) for name in SWEPT for p in SWEPT_CANDIDATES],
        )  # fmt: skip
        by_parents = sweep(
            f"{size:,} entries of {dtype}, K parents, {count} candidates", "method, K",
            lambda row: f"{row.method}, {row.parents}",
            [(name, size, k, count) for name in SWEPT for k in SWEPT_PARENTS],
        )  # fmt: skip
        every += by_candidates + by_parents
        if arguments.plot:
            plot(by_candidates, by_parents, arguments.plot)
    print(f"\nMedians of {repeats}; {describe()}")
    if any(row.mergekit is None for row in every):
        print("mergekit or torch is not installed (`pip install 'evojax-merge[bench]'`): its columns are left out")
    if arguments.json:
        document = {"machine": describe(), "repeats": repeats, "rows": [asdict(row) for row in every]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
