"""Programs as data: an evaluation yields what is to be run, and an interpreter runs it, or plans it on abstract arrays.

An evaluation is a generator. It yields a `Program`, and is sent the program's results; or it yields `Each`, and is sent
the sum that this keeps. `execute` runs what it yields, `planned_passes.plan` prices it.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event
from typing import Any

import jax

from evojax_merge.evaluation import passes

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

    def run(self, cancelled: Event) -> Any:
        """Run the program on its arguments. `cancelled` ends a loop before it is done."""
        if self.loop is None:
            results = self.function(*self.arguments)
        else:
            results = self.first
            while not cancelled.is_set() and (arguments := self.loop(results)) is not None:
                results = self.function(*arguments)
        if self.read is not None:
            self.read(results)
        return results


# Yields programs, and is sent the results of each.
Job = Generator[Program, Any, Any]


@dataclass(frozen=True)
class Each:
    """Jobs that may run side by side. read: takes a job's result on the host, in the jobs' order; keep: (a job's
    result) -> the part whose sum over all jobs is sent back once all have ended (a None is no part); None: the
    evaluation goes on before they have."""

    jobs: Iterator[Job]
    read: Callable[[Any], None]
    keep: Callable[[Any], Any] | None = None


Evaluation = Generator[Program | Each, Any, Any]


def single(program: Program) -> Job:
    """A job of one program, with its results."""
    return (yield program)


def execute(evaluation: Evaluation, threads: bool) -> Any:
    """Run an evaluation, and return its result. Each job is started before the one before it is waited for, and no
    more, so that an interruption does not wait long.

    An accelerator queues its work, and only has to be kept busy. A CPU runs the work of one thread one after the other,
    and leaves cores idle wherever there is little to do: with `threads` each job has its own.
    """
    cancelled = Event()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2)) if threads else None
        stack.callback(cancelled.set)
        running: deque[tuple[Each, Any]] = deque()
        sent: Any = None
        try:
            while True:
                item = evaluation.send(sent)
                sent = None
                if isinstance(item, Program):
                    sent = item.run(cancelled)
                else:
                    for job in item.jobs:
                        running.append((item, pool.submit(_finish, job, cancelled) if pool else _run(job, cancelled)))
                        while len(running) > 1:
                            sent = _take(running, sent)
                    while item.keep is not None and running:
                        sent = _take(running, sent)
                # Its arrays may be freed while the next program is made.
                del item
        except StopIteration as end:
            while running:
                _take(running, None)
            return end.value


def _run(job: Job, cancelled: Event) -> Any:
    """Run a job's programs. Nobody waits for its result once `cancelled` is set."""
    results = None
    try:
        while not cancelled.is_set():
            results = job.send(results).run(cancelled)
    except StopIteration as end:
        return end.value
    job.close()
    return None


def _finish(job: Job, cancelled: Event) -> Any:
    return jax.block_until_ready(_run(job, cancelled))


def _take(running: deque[tuple[Each, Any]], total: Any) -> Any:
    """Wait for the first of the running jobs, and read it. Return the sum that is kept with it."""
    each, outcome = running.popleft()
    result = outcome.result() if isinstance(outcome, Future) else outcome
    each.read(result)
    if each.keep is None:
        return total
    part = each.keep(result)
    return part if total is None else passes.add(total, part)
