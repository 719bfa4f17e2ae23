"""The cost of a search on a target, from headers alone: memory, arithmetic, traffic, time by the roofline, disk.

The passes are those of the search itself: the same evaluator chooses them, over abstract arrays.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import jax

from evojax_merge.checkpoints.abstract_bank import anywhere
from evojax_merge.checkpoints.bank import bank_bytes
from evojax_merge.errors import Failed
from evojax_merge.evaluation.batched_tasks import BatchedTask, one_row_batches
from evojax_merge.evaluation.compilers import TargetCompiler, collectives
from evojax_merge.evaluation.costs import Cost
from evojax_merge.evaluation.devices import MEMORY_SHARE, group_of, is_sharded
from evojax_merge.evaluation.evaluator import Evaluator, Population, Progress
from evojax_merge.evaluation.planned_passes import (
    JaxprReader,
    PassReader,
    PlannedPass,
    planned_gradient_passes,
    planned_passes,
)
from evojax_merge.evaluation.targets import Target, gpu_memory_fraction
from evojax_merge.problem import SearchProblem
from evojax_merge.report.plan import PassPlan, Plan, Work
from evojax_merge.search.loop import run_bytes
from evojax_merge.search.protocols import gradient_generations
from evojax_merge.search.successive_halving import rung_shards, rung_size
from evojax_merge.selection import candidates_to_select
from evojax_merge.tasks.splits import Splits

# Bytes of the host that the program itself takes: the interpreter, JAX, the compiler at work.
PROCESS_BYTES = 700 * 10**6
# The number of passes that a gradient of a layer path is planned as.
PATH_GRADIENT_PASSES = 4
# The most devices that a plan suggests, where one is not enough.
MOST_SHARDS = 64


def make_plan(
    problem: SearchProblem,
    batched_tasks: Splits[list[BatchedTask]],
    download_bytes: int = 0,
    compiler: TargetCompiler | None = None,
) -> Plan:
    """The plan of a search for its problem's target. batched_tasks: the result of `problem.batched_tasks`;
    download_bytes: of the models that are not on this machine; compiler: reports the memory of every pass; None:
    estimates alone."""
    target, model, splits = problem.target, problem.config.evaluation.model, batched_tasks
    groups, sizes = target.devices // model, device_sizes(problem, model)
    planner = planning_evaluator(problem, sizes.bank)
    # The winner may be chosen in another dtype, in which fewer candidates fit into a pass.
    final = planner
    if problem.final_compute_dtype != problem.compute_dtype:
        final = replace(planner, compute_dtype=problem.final_compute_dtype, chunk_sizes={})
    rounds, starts = gradient_generations(problem.strategy, problem.search.generations)

    def planned(evaluator: Evaluator, candidates: int) -> Population:
        """The candidates of one group of devices, where all groups have `candidates` together."""
        share = math.ceil(candidates / groups)
        return problem.candidates.planned_population(evaluator, share, evaluator.devices.abstract)

    population = cache(partial(planned, planner))
    whole = problem.strategy.population
    finalists = population(whole) if final is planner else planned(final, whole)

    def passes_on(
        splits: Sequence[Sequence[BatchedTask]], candidates: int, plan_passes: PlanPasses = planned_passes,
        ask: bool = False,
    ) -> list[SizedPass]:  # fmt: skip
        """The passes of a generation of so many candidates. ask: whether the compiler reports on the passes of the
        first split."""
        each = math.ceil(candidates / groups)
        asked = partial(reports, problem, compiler, each) if compiler is not None and ask else None
        return [
            sized_pass
            for number, tasks in enumerate(splits)
            for sized_pass in _passes_of_tasks(
                planner, population(candidates), tasks, plan_passes, None if number else asked
            )
        ]

    def final_passes(tasks: Sequence[BatchedTask]) -> list[SizedPass]:
        return _passes_of_tasks(final, finalists, tasks, planned_passes, None)

    def cost_on(tasks: Sequence[BatchedTask] | None, count: int) -> Cost:
        return _cost(final_passes(tasks), target) * count if tasks and count else Cost()

    scored = passes_on(splits.shards, whole, ask=True)
    is_differentiable = population(whole).differentiable() is not None
    differentiated = passes_on(
        splits.minibatches, starts, planned_gradient_passes if is_differentiable else planned_passes, ask=True
    )
    share = (1 if is_differentiable else PATH_GRADIENT_PASSES) / max(1, len(splits.minibatches))
    candidate, gradient = _cost(scored, target), _cost(differentiated, problem.target) * share
    by_gradient = gradient * math.ceil(starts / groups)
    by_score = candidate * (_shard_passes(problem, len(splits.shards), groups) / len(splits.shards))
    counts = candidates_to_select(problem)
    selection = (
        cost_on(splits.search, counts.search)
        + cost_on(splits.validation, counts.validation)
        + cost_on(splits.heldout, counts.heldout)
    )
    followed = by_gradient * rounds + by_score * (problem.search.generations - rounds)
    run = followed + selection * (1 / groups)
    only_gradients = rounds == problem.search.generations
    rows = _rows([*([] if only_gradients else scored), *differentiated], target, model)
    also = [] if final is planner else _rows(final_passes(splits.search), target, model)
    jobs = 2 if planner.runs_two_jobs(0) else 1
    pass_bytes = max((jobs * row.needed_bytes for row in (*rows, *also)), default=0)
    fits = sizes.bank + pass_bytes <= target.memory
    on_host = (
        sizes.largest_leaf if target.is_accelerator else sizes.bank * target.devices_per_host // model + pass_bytes
    )
    return Plan(
        target=target,
        model=model,
        groups=groups,
        bank_bytes=sizes.bank,
        pass_bytes=pass_bytes,
        passes=rows,
        population=starts if only_gradients else problem.strategy.population,
        generations=problem.search.generations,
        gradient_generations=rounds,
        candidate=_work(candidate, target, model),
        gradient=_work(gradient, target, model) if rounds else None,
        generation=_work(by_gradient if only_gradients else by_score, target, model),
        run=_work(run, target, model),
        host_bytes=PROCESS_BYTES + on_host,
        disk_bytes=disk_bytes(problem) + download_bytes,
        download_bytes=download_bytes,
        advice=() if fits else advice(problem, pass_bytes, max((row.held_bytes for row in rows), default=0)),
    )


def disk_bytes(problem: SearchProblem) -> int:
    """Bytes that a run needs on the disk. Candidates need nothing; the winner is about as large as one parent."""
    model = bank_bytes(problem.sources, problem.decoder) // len(problem.merged_from)
    examples, tasks = sum(task.size for shard in problem.splits.shards for task in shard), len(problem.splits.search)
    return model + run_bytes(problem.search, problem.strategy, problem.space, examples, tasks)


# ---------------------------------------------------------------------------------------------------------------
# Passes


PlanPasses = Callable[[Evaluator, Any, BatchedTask, PassReader], list[PlannedPass]]
# (the evaluator that has chosen chunks, a planner of passes, a task) -> the reports of the target's compiler on the
# passes.
AskCompiler = Callable[[Evaluator, PlanPasses, BatchedTask], list["Report"]]


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


def planning_evaluator(problem: SearchProblem, bank: int) -> Evaluator:
    """An evaluator without tasks that makes the choices of one on the problem's target, with `bank` bytes loaded on a
    device."""
    settings, target = problem.config.evaluation, problem.target
    free = int(MEMORY_SHARE * max(0, target.memory - bank))
    # The plan of a search that does not fit shows the memory of one candidate.
    chunk = settings.chunk if bank < target.memory else 1
    devices = group_of(settings.model)
    return Evaluator(
        problem.decoder, problem.tokenizer, [], problem.compute_dtype, chunk, devices, target=target,
        free_memory=lambda: free, temporary_bytes=JaxprReader(target, devices).temporary_bytes,
    )  # fmt: skip


def _passes_of_tasks(
    planner: Evaluator, population: Population, tasks: Sequence[BatchedTask], plan_passes: PlanPasses,
    ask: AskCompiler | None,
) -> list[SizedPass]:  # fmt: skip
    evaluator = replace(planner, batched_tasks=list(tasks))
    return [
        sized_pass
        for i in range(len(tasks))
        for sized_pass in passes_of_task(evaluator, population, i, plan_passes, ask)
    ]


def passes_of_task(
    evaluator: Evaluator, population: Population, i: int, plan_passes: PlanPasses, ask: AskCompiler | None = None
) -> list[SizedPass]:
    """The passes of the evaluator's task i over a chunk, with as much in a pass as fits. Where not even one candidate
    and one row fit: the passes with these, which no compiler is asked about."""
    reader = JaxprReader(evaluator.target, evaluator.devices)

    def sized(evaluator: Evaluator, task: BatchedTask, ask: AskCompiler | None) -> list[SizedPass]:
        planned = plan_passes(evaluator, population, task, reader)
        reports = [None] * len(planned) if ask is None else ask(evaluator, plan_passes, task)
        return [
            SizedPass(
                planned_pass,
                evaluator.devices.share(planned_pass.held_bytes),
                reader.temporary_bytes(planned_pass.traced),
                report,
            )
            for planned_pass, report in zip(planned, reports, strict=True)
        ]

    def fits(passes: Sequence[SizedPass]) -> bool:
        most = max((sized_pass.needed_bytes for sized_pass in passes), default=0)
        return not evaluator.target.is_accelerator or most <= evaluator.free_memory() / MEMORY_SHARE

    def fitting(task: BatchedTask, progress: Progress) -> list[SizedPass]:
        sized_passes = sized(evaluator, task, ask)
        if not fits(sized_passes):
            # Where the least does not fit, halving again and again is in vain.
            if not fits(least()):
                raise _NothingFits
            raise MemoryError
        return sized_passes

    @cache
    def least() -> list[SizedPass]:
        alone = replace(evaluator, chunk=1, chunk_sizes={})
        return sized(alone, one_row_batches(evaluator.batched_tasks[i]), None)

    try:
        sized_passes: list[SizedPass] = evaluator.retry_on_oom(i, fitting, lambda done: None)
    except (_NothingFits, Failed):
        sized_passes = least()
    return sized_passes


class _NothingFits(Exception):
    """Not even one candidate's pass over one row fits."""


def _cost(passes: Sequence[SizedPass], target: Target) -> Cost:
    return sum((sized.planned.cost(target) for sized in passes), Cost())


def _shard_passes(problem: SearchProblem, shards: int, groups: int) -> int:
    """The number of passes of a candidate over a shard of the examples that a generation has for each group of
    devices."""
    ends = rung_shards(shards)
    return sum(
        math.ceil(rung_size(problem.strategy.population, rung) / groups) * (end - begin)
        for rung, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    )


def _rows(passes: Sequence[SizedPass], target: Target, model: int) -> tuple[PassPlan, ...]:
    """One row for all passes that are alike, on whatever shards of the examples."""
    rows: dict[tuple[Any, ...], PassPlan] = {}
    for sized in passes:
        item = sized.planned
        cost, key = (
            item.cost(target),
            (item.task, item.name, item.candidates, item.held_bytes, str(item.traced.out_info)),
        )
        report = sized.report
        fresh = PassPlan(
            item.task, item.name, item.candidates, item.runs, item.steps, sized.held_bytes, sized.temporary_bytes,
            None if report is None else report.temporary_bytes, None if report is None else report.collectives,
            cost.flops, cost.nbytes, cost.seconds(target) / model,
        )  # fmt: skip
        earlier = rows.get(key)
        rows[key] = fresh if earlier is None else replace(
            earlier, runs=earlier.runs + fresh.runs, flops=earlier.flops + fresh.flops,
            moved_bytes=earlier.moved_bytes + fresh.moved_bytes, seconds=earlier.seconds + fresh.seconds,
        )  # fmt: skip
    return tuple(rows.values())


def reports(
    problem: SearchProblem, compiler: TargetCompiler, size: int, planned: Evaluator, plan_passes: PlanPasses,
    task: BatchedTask,
) -> list[Report]:  # fmt: skip
    """The compiler's reports on the passes of a task over a chunk of `size` candidates, in the chunks that `planned`
    has chosen, in their order. Raises JaxRuntimeError where it refuses one because it does not fit."""
    return [
        Report(compiler.temporary_bytes(planned_pass.traced), collectives(compiler.compiled(planned_pass.traced)))
        for planned_pass in compiled_passes(problem, compiler, size, planned, plan_passes, task)
    ]


def compiled_passes(
    problem: SearchProblem, compiler: TargetCompiler, size: int, planned: Evaluator, plan_passes: PlanPasses,
    task: BatchedTask,
) -> list[PlannedPass]:  # fmt: skip
    """The passes of a task over a population of which each group of devices has `size` candidates, in the chunks that
    `planned` has chosen, traced for the compiler's devices."""
    evaluator = replace(planned, devices=compiler.devices, temporary_bytes=compiler.temporary_bytes)
    population = problem.candidates.planned_population(
        evaluator, size * compiler.devices.population, compiler.place_leaf
    )
    return plan_passes(evaluator, population, task, compiler)


def _work(cost: Cost, target: Target, model: int) -> Work:
    return Work(
        cost.flops, cost.nbytes, cost.seconds(target) / model, cost.merge_seconds(target) / model,
        cost.compute_seconds(target) / model,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Memory


@dataclass
class DeviceSizes:
    """Bytes of the loaded models on a device, and of the largest leaf, which is on the host as a whole while it is
    loaded. Its `place` makes abstract arrays, and counts every leaf."""

    model: int
    bank: int = 0
    largest_leaf: int = 0
    by_dtype: Counter[str] = field(default_factory=Counter)

    def place(self, shape: tuple[int, ...], dtype: Any, sharded_axis: int | None = None) -> jax.ShapeDtypeStruct:
        leaf = anywhere(shape, dtype)
        nbytes = leaf.size * leaf.dtype.itemsize
        device_bytes = nbytes // self.model if is_sharded(shape, sharded_axis, self.model) else nbytes
        self.bank, self.largest_leaf = self.bank + device_bytes, max(self.largest_leaf, nbytes)
        self.by_dtype[str(leaf.dtype)] += device_bytes
        return leaf


def device_sizes(problem: SearchProblem, model: int) -> DeviceSizes:
    """The sizes of the loaded models where groups of `model` devices share a candidate."""
    sizes = DeviceSizes(model)
    problem.candidates.planned_population(planning_evaluator(problem, 0), 1, sizes.place)
    # Layer paths are planned as one model, but all of the parents' layers are loaded.
    sizes.bank = max(sizes.bank, problem.candidates.held_bytes() // model)
    return sizes


def advice(problem: SearchProblem, pass_bytes: int, held_bytes: int = 0) -> tuple[str, ...]:
    """Changes that would make a search fit that does not. Bytes on a device: pass_bytes, of the largest pass;
    held_bytes: of materialised candidates and caches, which no shorter batch makes smaller than those of one row."""
    target, model = problem.target, problem.config.evaluation.model
    sizes = device_sizes(problem, model)

    def fits(bank: float, memory: float = target.memory, needed: float = pass_bytes) -> bool:
        return bank + needed <= memory

    def fits_shared(shards: int) -> bool:
        return fits(device_sizes(problem, shards).bank, needed=pass_bytes * model / shards)

    remedies = []
    shards = [m for m in range(2 * model, MOST_SHARDS + 1, model) if m & (m - 1) == 0 or m == target.devices_per_host]
    enough = next(filter(fits_shared, shards), None)
    if enough is not None and target.is_accelerator:
        more = "" if target.devices_per_host % enough == 0 else f", on a host with {enough} such devices"
        remedies.append(f"evaluation.model: {enough} (devices that share the models){more}")
    whole = target.memory / gpu_memory_fraction() if target.platform == "gpu" else 0
    if whole and fits(sizes.bank, 0.95 * whole):
        remedies.append("the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, for more of the GPU's memory")
    masks = sizes.by_dtype["uint16"]
    if masks and fits(sizes.bank - masks):
        remedies.append("a method that stores no number per entry, such as ties or dare_ties")
    count = len(problem.merged_from)
    fewer = next((n for n in range(count - 1, 1, -1) if fits(sizes.bank * n / count)), None)
    if fewer is not None:
        remedies.append(f"{count - fewer} fewer of the {count} models")
    if sizes.bank + held_bytes < target.memory:
        remedies.append(f"evaluation.tokens_per_batch below {problem.tokens_per_batch:,}, or shorter examples")
    return tuple(remedies) or ("a device with more memory, or smaller models",)
