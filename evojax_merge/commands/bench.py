"""`evojax-merge bench`: what the device at hand merges, scores, decodes and searches in a second."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from evojax_merge.benchmarks.device import (
    ACCELERATOR,
    CPU,
    METHODS,
    SEARCHES,
    SHAPES,
    Budget,
    measure,
    timings_of,
)
from evojax_merge.benchmarks.report import KEYS, as_json, comparison, read_benchmark, section
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.evaluation.targets import live_target
from evojax_merge.evaluation.timings import record_timings
from evojax_merge.report.progress import named_bar
from evojax_merge.search.environment import environment
from evojax_merge.system.console import console
from evojax_merge.system.file_system import OutputFile, check_outputs, holds_json


def bench(shape: str | None, seconds: float, json_file: Path | None, compare: Path | None) -> None:
    """Measure for so many seconds, print the tables, and write them as JSON. compare: an earlier file of `--json`."""
    if shape is not None and shape not in SHAPES:
        raise InputError("--shape", f"there is no shape {shape!r}{did_you_mean(shape, SHAPES)}")
    is_own = partial(holds_json, keys=KEYS)
    output = None if json_file is None else OutputFile(json_file, "--json", "holds no benchmark", is_own)
    check_outputs([output], {} if compare is None else {"--compare": compare})
    earlier = None if compare is None else read_benchmark(compare)
    # Nothing of this needs a second device.
    target = replace(live_target(), devices=1, hosts=1)
    sizes = ACCELERATOR if target.is_accelerator else CPU
    if shape is not None:
        sizes = replace(sizes, shapes=(shape,))
    rows = len(METHODS) + len(sizes.prompts) + 2 + len(SEARCHES)
    with named_bar("bench", rows) as announce:
        benchmark = measure(target, sizes, Budget(seconds, announce))
    record_timings(timings_of(benchmark))
    machine = environment()
    lines = section(benchmark, machine)
    if earlier is not None:
        lines += ["", *comparison(earlier, (benchmark, machine))]
    for line in lines:
        console.print(line, soft_wrap=True)
    if output is not None:
        output.write(as_json(benchmark, machine))
