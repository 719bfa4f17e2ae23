"""A benchmark as Markdown and as JSON, and beside an earlier one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any

from evojax_merge.benchmarks.device import PARENTS, Benchmark, Measurement
from evojax_merge.errors import InputError
from evojax_merge.report.tables import Table
from evojax_merge.search.environment import differences

# Characters of a line.
LINE = 120
# The figure of each part that two benchmarks are compared by.
COMPARED = {
    "merging": "M parameters/s", "likelihood": "TFLOP/s", "decoding": "tokens/s", "a generation": "s/candidate",
}  # fmt: skip
EXPECTED = "expected a file of `evojax-merge bench --json`"
# The keys of a file of `--json`.
KEYS = {"environment", "shape", "parameters", "dtype", "copy_bandwidth", "matrix_peak", "rows", "left_out"}


def as_json(benchmark: Benchmark, environment: Mapping[str, Any]) -> str:
    return json.dumps({"environment": environment} | asdict(benchmark), indent=1, ensure_ascii=False) + "\n"


def read_benchmark(file: Path) -> tuple[Benchmark, dict[str, Any]]:
    """The benchmark and the environment of a file of `--json`. Raises InputError where it holds none."""
    try:
        document = json.loads(file.read_bytes())
        environment = document.pop("environment")
        rows = [Measurement(**row) for row in document.pop("rows")]
        if not all(isinstance(row.figures[COMPARED[row.part]], int | float) for row in rows):
            raise TypeError
        return Benchmark(rows=rows, **document), dict(environment)
    except OSError as error:
        raise InputError(file, f"--compare: {error.strerror}; {EXPECTED}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(
            file, "--compare: holds no benchmark; expected a file of `evojax-merge bench --json`"
        ) from None


def section(benchmark: Benchmark, environment: Mapping[str, Any]) -> list[str]:
    """The lines of a Markdown section: the machine, a table for each part, and what was left out."""
    parts = dict.fromkeys(row.part for row in benchmark.rows)
    tables = [_table([row for row in benchmark.rows if row.part == part]) for part in parts]
    devices = environment["devices"]
    device = environment["processor"] if devices["platform"] == "cpu" else devices["kind"]
    left_out = f"Left out: {'; '.join(benchmark.left_out)}." if benchmark.left_out else ""
    return [
        f"## On {device}", "", *_wrapped(_machine(benchmark, environment)),
        *(line for table in tables for line in ("", *table)), *(["", *_wrapped(left_out)] if left_out else []),
    ]  # fmt: skip


def _machine(benchmark: Benchmark, environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    driver = f"; {environment['driver']}" if environment["driver"] else ""
    return (
        f"`evojax-merge bench`: {environment['processor']}, {environment['cores']} cores; {versions}; "
        f"{environment['runtime']}{driver}. An addition to a large array in place moves "
        f"{benchmark.copy_bandwidth / 1e9:,.1f} GB/s, the best matrix product in {benchmark.dtype} does "
        f"{benchmark.matrix_peak / 1e12:.3g} TFLOP/s. The "
        f"models are of the shape {benchmark.shape}, {benchmark.parameters / 1e6:,.0f} M parameters in "
        f"{benchmark.dtype}, a base and {PARENTS} parents."
    )


def _wrapped(text: str) -> list[str]:
    return wrap(text, LINE, break_long_words=False, break_on_hyphens=False)


def _table(rows: Sequence[Measurement]) -> list[str]:
    columns = list(rows[0].figures)
    cells = [[row.name, *(_figure(name, row.figures[name]) for name in columns)] for row in rows]
    return Table([rows[0].part, *columns], cells, range(1, 1 + len(columns))).markdown().split("\n")


def _figure(name: str, value: float) -> str:
    if name.startswith("share"):
        return f"{value:.0%}"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.3g}"


def comparison(earlier: tuple[Benchmark, Mapping[str, Any]], later: tuple[Benchmark, Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table of two benchmarks, and a line for each part of their environments that differs.
    Rows whose workloads differ are named, and not compared."""
    before = {(row.part, row.name): row for row in earlier[0].rows}
    rows, unlike = list[list[str]](), list[str]()
    for row in later[0].rows:
        match = before.get((row.part, row.name))
        if match is None or match.workload != row.workload:
            unlike.append(row.name if match is None else f"{row.name} ({match.workload} then, {row.workload} now)")
            continue
        figure = COMPARED[row.part]
        then, now = match.figures[figure], row.figures[figure]
        # The one figure that is less where the device is faster.
        faster = then / now if figure == "s/candidate" else now / then
        rows.append([row.name, figure, _figure(figure, then), _figure(figure, now), f"{faster:.2f}"])
    columns = ["compared", "figure", "then", "now", "now, times as fast"]
    lines = Table(columns, rows, range(2, 5)).markdown().split("\n") if rows else []
    if unlike:
        lines += ["", *_wrapped(f"Not compared: {'; '.join(unlike)}.")]
    return [*lines, "", *(f"- {difference}" for difference in differences(dict(earlier[1]), dict(later[1])))]
