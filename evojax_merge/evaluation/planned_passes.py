"""The programs of an evaluation, traced over abstract arrays: their arithmetic, traffic and memory. Nothing is run, and
only headers need be there."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.checkpoints.abstract_bank import anywhere
from evojax_merge.evaluation.costs import Cost, cost_of, scan_length
from evojax_merge.evaluation.devices import Devices, is_sharded, tree_nbytes
from evojax_merge.evaluation.liveness import flat_program, sent_bytes, temporary_bytes
from evojax_merge.evaluation.passes import TracedPass, abstract_results, trace
from evojax_merge.evaluation.programs import Evaluation, Program
from evojax_merge.evaluation.targets import Platform, Target
from evojax_merge.models.architecture import EMBEDDING, HEAD
from evojax_merge.models.bank import Bank

# The use of planned passes: the generations' scores, their gradients, or what chooses the winner.
PlanUse = Literal["scores", "gradient", "final"]


class PassReader(Protocol):
    """Reads the memory and the results of a traced pass: from its jaxpr, or from the compiler of its target."""

    def temporary_bytes(self, traced: TracedPass) -> int:
        """Bytes that the pass needs on a device beside its arguments, its results included."""

    def sent_bytes(self, traced: TracedPass, steps: int) -> float:
        """Bytes that each device sends to the others that share its candidates. steps: of a `while` loop."""

    def outputs(self, traced: TracedPass) -> Any:
        """The pass's results, as abstract arrays with their shardings."""

    def place(self, candidates: Any) -> Any:
        """The arrays that each candidate has (leading axis P), with the shardings that a pass takes."""


@dataclass(frozen=True)
class JaxprReader:
    """An estimate for a target, read off the jaxpr. devices: one group of them, which share a candidate."""

    target: Target
    devices: Devices

    def temporary_bytes(self, traced: TracedPass) -> int:
        donated = [argument for argument in jax.tree.leaves(traced.args_info) if argument.donated]
        return temporary_bytes(traced.jaxpr, donated, self.target.platform, traced.cut, self.devices.model)

    def sent_bytes(self, traced: TracedPass, steps: int) -> float:
        shards = self.devices.model
        program = flat_program(traced.jaxpr, traced.cut, shards, self.target.platform)
        return sent_bytes(program.exchanges, shards, steps)

    def outputs(self, traced: TracedPass) -> Any:
        return abstract_results(traced, self.devices, self.target.platform)

    def place(self, candidates: Any) -> Any:
        return candidates


@dataclass(frozen=True)
class PlannedPass:
    """A pass over a chunk of candidates.

    task: the task's name; candidates: the size of the chunk; runs: how often the pass runs for such a chunk; steps: how
    often the body of its `while` loop runs, at most; expected_share: of these, the share that is likely to run;
    merge_bytes: the traffic of merging for a candidate in a run, the sources' and the merge's bytes; held_bytes: the
    memory that it needs beside the bank and its temporaries, for all its candidates; host_bytes: of what waits in the
    host's memory, for the candidates of a group of devices; called_seconds: what a candidate takes in a function that
    is not traced, as measured; sent_bytes: those that each device that shares the candidates sends to others in a run,
    for all of them; brought_bytes, disk_bytes: those of models that come for a candidate from the host, and from files,
    in all runs.
    """

    task: str
    name: str
    traced: Any
    candidates: int
    runs: int = 1
    steps: int = 1
    expected_share: float = 1.0
    merge_bytes: int = 0
    held_bytes: int = 0
    host_bytes: int = 0
    called_seconds: float = 0.0
    sent_bytes: float = 0.0
    brought_bytes: float = 0.0
    disk_bytes: float = 0.0

    def cost(self, target: Target) -> Cost:
        """The cost of all its runs, for one candidate."""
        # On a CPU the program finds how many blocks of a mixture's tokens it computes: each token counts once.
        platform = None if target.platform == "cpu" else target.platform
        computed = _cost_of(self.traced.jaxpr, self.steps, platform) * (self.runs / self.candidates)
        return computed + Cost(
            merge_bytes=float(self.merge_bytes * self.runs), called_seconds=self.called_seconds * self.runs,
            sent_bytes=self.sent_bytes * self.runs / self.candidates, brought_bytes=self.brought_bytes,
            disk_bytes=self.disk_bytes,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _cost_of(jaxpr: Any, steps: int, platform: Platform | None) -> Cost:
    """The cost of a closed jaxpr whose `while` loops run so many steps. A plan asks for each several times."""
    return cost_of(jaxpr, lambda eqn: steps if eqn.primitive.name == "while" else scan_length(eqn), platform)


def plan(evaluation: Evaluation, task: str, reader: PassReader) -> list[PlannedPass]:
    """The programs that an evaluation over abstract arrays would run, in their order; programs that are alike are one,
    with the number of its runs. `task`: the name of the evaluated task."""
    planned: dict[Any, PlannedPass] = {}
    for planned_pass, key in _walk(evaluation, task, reader, [], {}):
        earlier = planned.get(key)
        planned[key] = planned_pass if earlier is None else replace(
            earlier, runs=earlier.runs + 1, held_bytes=max(earlier.held_bytes, planned_pass.held_bytes)
        )  # fmt: skip
    return list(planned.values())


def abstract_result(evaluation: Evaluation, reader: PassReader) -> Any:
    """The result of an evaluation over abstract arrays."""
    result: list[Any] = []
    for _ in _walk(evaluation, "", reader, result, {}):
        pass
    return result[0]


# By a program and the layout of its arguments: what it is traced to, and its results as abstract arrays.
Traced = dict[Any, tuple[Any, Any]]


def _walk(
    evaluation: Evaluation, task: str, reader: PassReader, result: list[Any], traced: Traced, beside: int = 0
) -> Iterator[tuple[PlannedPass, Any]]:
    """Each program that an evaluation runs, and a key that is equal for programs that are alike; the evaluation's
    result is appended to `result`. traced: the programs so far: there may be thousands of batches of one shape; beside:
    bytes that are held beside what the evaluation itself holds."""
    sent: Any = None
    try:
        while True:
            item = evaluation.send(sent)
            sent = None
            if isinstance(item, Program):
                planned_pass, key, sent = _planned(item, task, reader, traced, beside)
                if item.is_priced:
                    yield planned_pass, key
                continue
            for job in item.jobs:
                results: list[Any] = []
                # The sum of the earlier jobs' results is held beside this one.
                yield from _walk(job, task, reader, results, traced, beside + tree_nbytes(sent))
                sent = None if item.keep is None else item.keep(results[0])
    except StopIteration as end:
        result.append(end.value)


def _planned(
    program: Program, task: str, reader: PassReader, traced: Traced, beside: int
) -> tuple[PlannedPass, Any, Any]:
    """A program as a planned pass, its key, and its results as abstract arrays."""
    spec, shared, *each = program.arguments
    # The candidates' arrays: those of the host get the shardings that a pass takes.
    each[:1] = [
        jax.tree.map(lambda leaf: reader.place(leaf) if isinstance(leaf, np.ndarray) else leaf, candidates)
        for candidates in each[:1]
    ]
    arguments = [spec, shared, *each]
    leaves, tree = jax.tree.flatten(arguments)
    layout = tuple(
        (leaf.shape, str(leaf.dtype), getattr(leaf, "sharding", None)) if hasattr(leaf, "dtype") else leaf
        for leaf in leaves
    )
    key = (program.name, program.function, tree, layout)
    if key not in traced:
        if hasattr(program.function, "trace"):
            pass_ = trace(program.function, *arguments)
            traced[key] = pass_, reader.outputs(pass_)
        else:
            # Several compiled functions of one layout: only their results are planned.
            traced[key] = None, jax.eval_shape(partial(program.function, spec), *arguments[1:])
    pass_, results = traced[key]
    if pass_ is None:
        return PlannedPass(task, program.name, None, program.candidates), None, results
    expected = 1.0 if program.expected_steps is None else min(1.0, program.expected_steps / program.steps)
    planned_pass = PlannedPass(
        task, program.name, pass_, program.candidates, 1, program.steps, expected, program.merge_bytes(results),
        tree_nbytes(program.holds) + beside, program.host_bytes,
        sent_bytes=reader.sent_bytes(pass_, program.steps),
    )  # fmt: skip
    return planned_pass, key, results


def merge_bytes(bank: Bank, dtype: str) -> int:
    """Bytes that merging all layers and the head into `dtype` moves for a candidate: sources and their prepared arrays
    are read, the merge is written. (Products that read it again count that themselves.)"""
    leaves = [leaf for stack in bank.stacks.values() for leaf in stack.values()]
    head = replace(bank.shared[HEAD if HEAD in bank.shared else EMBEDDING], factors=None)
    # A leaf of a stack has the sources behind its layers.
    entries = sum(leaf.sources.size // leaf.sources.shape[1] for leaf in leaves)
    entries += head.sources.size // head.sources.shape[0]
    read = [replace(leaf, statistics={}) for leaf in (*leaves, head)]
    return tree_nbytes(read) + entries * jnp.dtype(dtype).itemsize


@dataclass(frozen=True)
class Report:
    """A target compiler's report on a pass. temporary_bytes: on a device, beside its arguments, its results included;
    collectives: by kind their number, and the bytes of their results together."""

    temporary_bytes: int
    collectives: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class SizedPass:
    """A planned pass, and the bytes that it needs on a device: held for it, as the device's share of its group's;
    beside its arguments, its results included, as estimated; and its compiler's report (None: it was not asked, or
    refuses the pass however small it is)."""

    planned: PlannedPass
    held_bytes: int
    temporary_bytes: int
    report: Report | None

    @property
    def needed_bytes(self) -> int:
        """Bytes on a device, beside the bank."""
        return self.held_bytes + (self.temporary_bytes if self.report is None else self.report.temporary_bytes)


@dataclass
class DeviceSizes:
    """Bytes of the loaded models on a device, on a device that shares them with no other (`held`), in the memory of the
    host alone, in files that a search keeps candidates in, and of the largest leaf, which is on the host as a whole
    while it is loaded. Its `place` makes abstract arrays, and counts every leaf."""

    model: int
    bank: int = 0
    held: int = 0
    on_host: int = 0
    on_disk: int = 0
    largest_leaf: int = 0
    by_dtype: Counter[str] = field(default_factory=Counter)

    def place(self, shape: tuple[int, ...], dtype: Any, sharded_axis: int | None = None) -> jax.ShapeDtypeStruct:
        leaf = anywhere(shape, dtype)
        nbytes = leaf.size * leaf.dtype.itemsize
        device_bytes = nbytes // self.model if is_sharded(shape, sharded_axis, self.model) else nbytes
        self.bank, self.largest_leaf = self.bank + device_bytes, max(self.largest_leaf, nbytes)
        self.by_dtype[str(leaf.dtype)] += device_bytes
        return leaf
