"""Programs as data: an evaluation yields what is to be run, and an interpreter runs it, or plans it on abstract arrays.

An evaluation is a generator. It yields a `Program`, and is sent the program's results; or it yields `Each`, and is sent
the sum that this keeps. `evaluator.execute` runs what it yields, `planned_passes.plan` prices it.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from evojax_merge.evaluation.devices import tree_nbytes

# The names of programs in plans.
MATERIALISE, CAST, UNSTACK, PREFIX, SCORE = "materialise", "cast", "unstack", "prefix", "score"
EMBED, MERGE, LAYER, HEAD = "embed", "merge", "layer", "head"
START, PREFILL, DECODE = "start", "prefill", "decode"
GRADIENT, PREFIX_GRADIENT, RECIPE_GRADIENT = "gradient", "prefix gradient", "recipe gradient"
EMBED_GRADIENT, LAYER_GRADIENT, HEAD_GRADIENT = "embed gradient", "layer gradient", "head gradient"
SUM = "sum"


@dataclass(frozen=True)
class Program:
    """One compiled function with its arguments, over a chunk of `candidates` candidates.

    arguments: of a pass, its spec, the arrays that all candidates share, and those that each has, which may be on the
    host. holds: what is in memory while it runs, beside the bank: materialised candidates and caches; host_bytes: of
    what waits in the host's. merge_bytes: (results) -> the traffic of merging for a candidate in a run. loop: the
    program runs again and again, from the results `first` on: (results) -> the arguments of the next run, None once it
    is done; `arguments` are those of a first run. steps: the most runs of the body of its `while` loop, in all runs;
    expected_steps: how many are likely, None: as many. is_priced: whether a plan shows it.
    read: takes the results that the host needs.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    candidates: int
    holds: Any = ()
    host_bytes: int = 0
    merge_bytes: Callable[[Any], int] = lambda results: 0
    loop: Callable[[Any], tuple[Any, ...] | None] | None = None
    first: Any = None
    steps: int = 1
    expected_steps: int | None = None
    is_priced: bool = True
    read: Callable[[Any], None] | None = None


# Yields programs, and is sent the results of each.
Job = Generator[Program, Any, Any]


@dataclass(frozen=True)
class Each:
    """Jobs that may run side by side. read: takes a job's result on the host, in the jobs' order; keep: (a job's
    result) -> the part whose sum over all jobs is sent back once all have ended (a None is no part); None: the
    evaluation goes on before they have. threads: each job has a thread of its own."""

    jobs: Iterator[Job]
    read: Callable[[Any], None]
    keep: Callable[[Any], Any] | None = None
    threads: bool = False


Evaluation = Generator[Program | Each, Any, Any]
# Goes on once the results of all jobs before have been read.
ALL_READ = Each(iter(()), read=lambda result: None, keep=lambda result: None)


def merge_traffic(sources: Any, shares: int) -> Callable[[Any], int]:
    """(results) -> the traffic of merging for a candidate: the sources are read, and one of so many equal `shares` of
    the results is written."""
    nbytes = tree_nbytes(sources)
    return lambda results: nbytes + tree_nbytes(results) // shares
