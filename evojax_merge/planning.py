"""What a search would take on a target, from headers alone: memory, arithmetic, traffic, time by the roofline, disk.

The passes are those that the search would run: the evaluator chooses them as it does then, over abstract arrays.
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
from evojax_merge.evaluation.devices import MEMORY_SHARE, group_of, is_cut
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

# What the program itself takes of the host: the interpreter, JAX, the compiler at work.
PROCESS_BYTES = 700 * 10**6
# Of a layer path, a gradient is planned as so many passes.
PATH_GRADIENT_PASSES = 4
# Devices that a plan asks for at most, where one is not enough.
MOST_SHARDS = 64


def make_plan(
    problem: SearchProblem,
    batched_tasks: Splits[list[BatchedTask]],
    download_bytes: int = 0,
    compiler: TargetCompiler | None = None,
) -> Plan:
    """The plan of a search for its problem's target. batched_tasks: as `problem.batched_tasks` gives
    them; download_bytes: of the models that are not here; compiler: asked for the
    memory of every pass."""
    target, model, splits = problem.target, problem.config.evaluation.model, batched_tasks
    groups, sizes = target.devices // model, device_sizes(problem, model)
    planner = planning_evaluator(problem, sizes.bank)
    # What the winner is chosen on may be computed in another dtype, in which fewer candidates fit into a pass.
    final = planner
    if problem.final_compute_dtype != problem.compute_dtype:
        final = replace(planner, compute_dtype=problem.final_compute_dtype, chunk_sizes={})
    rounds, starts = gradient_generations(problem.strategy, problem.search.generations)

    def planned(evaluator: Evaluator, candidates: int) -> Population:
        """As many candidates as each group of devices has of so many."""
        share = math.ceil(candidates / groups)
        return problem.candidates.planned_population(evaluator, share, evaluator.devices.abstract)

    population = cache(partial(planned, planner))
    whole = problem.strategy.population
    finalists = population(whole) if final is planner else planned(final, whole)

    def passes_on(
        splits: Sequence[Sequence[BatchedTask]], candidates: int, plan_passes: PlanPasses = planned_passes,
        ask: bool = False,
    ) -> list[SizedPass]:  # fmt: skip
        """Of a generation of so many candidates. ask: the compiler, of the passes of the first split."""
        each = math.ceil(candidates / groups)
        asked = partial(reports, problem, compiler, each) if compiler is not None and ask else None
        return [
            one
            for number, tasks in enumerate(splits)
            for one in _passes_of_tasks(planner, population(candidates), tasks, plan_passes, None if number else asked)
        ]

    def final_passes(tasks: Sequence[BatchedTask]) -> list[SizedPass]:
        return _passes_of_tasks(final, finalists, tasks, planned_passes, None)

    def cost_on(tasks: Sequence[BatchedTask] | None, count: int) -> Cost:
        return _cost(final_passes(tasks), target) * count if tasks and count else Cost()

    scored = passes_on(splits.shards, whole, ask=True)
    known = population(whole).differentiable() is not None
    differentiated = passes_on(
        splits.minibatches, starts, planned_gradient_passes if known else planned_passes, ask=True
    )
    share = (1 if known else PATH_GRADIENT_PASSES) / max(1, len(splits.minibatches))
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
    """What a run needs on the disk. Candidates need nothing; the winner is about as large as one parent."""
    model = bank_bytes(problem.sources, problem.decoder) // len(problem.merged_from)
    examples, tasks = sum(task.size for shard in problem.splits.shards for task in shard), len(problem.splits.search)
    return model + run_bytes(problem.search, problem.strategy, problem.space, examples, tasks)


# ---------------------------------------------------------------------------------------------------------------
# Passes


PlanPasses = Callable[[Evaluator, Any, BatchedTask, PassReader], list[PlannedPass]]
# (the evaluator that has chosen chunks, what plans passes, a task) -> what the target's compiler says of the passes.
AskCompiler = Callable[[Evaluator, PlanPasses, BatchedTask], list["Report"]]


@dataclass(frozen=True)
class Report:
    """What a target's compiler says of a pass. temporary_bytes: on a device, beside its arguments, its results
    included; collectives: by kind how many it runs, and the bytes of their results together."""

    temporary_bytes: int
    collectives: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class SizedPass:
    """A planned pass, and the bytes on a device that it needs: held for it, its share of what a group of devices holds;
    beside its arguments, its results included, as estimated; and its compiler's report (None: it was not asked, or
    refuses the pass however small it is)."""

    planned: PlannedPass
    held_bytes: int
    temporary_bytes: int
    report: Report | None

    @property
    def needed_bytes(self) -> int:
        """Beside the bank."""
        return self.held_bytes + (self.temporary_bytes if self.report is None else self.report.temporary_bytes)


def planning_evaluator(problem: SearchProblem, bank: int) -> Evaluator:
    """An evaluator without tasks that chooses as one on the problem's target would, with `bank` bytes loaded on a
    device."""
    settings, target = problem.config.evaluation, problem.target
    free = int(MEMORY_SHARE * max(0, target.memory - bank))
    # Of what does not fit it is shown what one candidate takes.
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
    return [one for i in range(len(tasks)) for one in passes_of_task(evaluator, population, i, plan_passes, ask)]


def passes_of_task(
    evaluator: Evaluator, population: Population, i: int, plan_passes: PlanPasses, ask: AskCompiler | None = None
) -> list[SizedPass]:
    """The passes of the evaluator's task i over a chunk, with as much in a pass as fits. Where not even one candidate
    and one row fit: those, which no compiler is asked for."""
    reader = JaxprReader(evaluator.target, evaluator.devices)

    def sized(evaluator: Evaluator, task: BatchedTask, ask: AskCompiler | None) -> list[SizedPass]:
        planned = plan_passes(evaluator, population, task, reader)
        reports = [None] * len(planned) if ask is None else ask(evaluator, plan_passes, task)
        return [
            SizedPass(one, evaluator.devices.share(one.held_bytes), reader.temporary_bytes(one.traced), report)
            for one, report in zip(planned, reports, strict=True)
        ]

    def fits(passes: Sequence[SizedPass]) -> bool:
        most = max((one.needed_bytes for one in passes), default=0)
        return not evaluator.target.is_accelerator or most <= evaluator.free_memory() / MEMORY_SHARE

    def fitting(task: BatchedTask, progress: Progress) -> list[SizedPass]:
        found = sized(evaluator, task, ask)
        if not fits(found):
            # What is not enough for the least is not tried with half as much again and again.
            if not fits(least()):
                raise _NothingFits
            raise MemoryError
        return found

    @cache
    def least() -> list[SizedPass]:
        alone = replace(evaluator, chunk=1, chunk_sizes={})
        return sized(alone, one_row_batches(evaluator.batched_tasks[i]), None)

    try:
        found: list[SizedPass] = evaluator.with_less(i, fitting, lambda done: None)
    except (_NothingFits, Failed):
        found = least()
    return found


class _NothingFits(Exception):
    """Not even one candidate's pass over one row fits."""


def _cost(passes: Sequence[SizedPass], target: Target) -> Cost:
    return sum((one.planned.cost(target) for one in passes), Cost())


def _shard_passes(problem: SearchProblem, shards: int, groups: int) -> int:
    """How many passes of a candidate over a shard of the examples a generation has for each group of devices."""
    ends = rung_shards(shards)
    return sum(
        math.ceil(rung_size(problem.strategy.population, rung) / groups) * (end - begin)
        for rung, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    )


def _rows(passes: Sequence[SizedPass], target: Target, model: int) -> tuple[PassPlan, ...]:
    """One for all passes that are alike, whatever shards of the examples they are of."""
    rows: dict[tuple[Any, ...], PassPlan] = {}
    for sized in passes:
        one = sized.planned
        cost, key = one.cost(target), (one.task, one.name, one.candidates, one.held_bytes, str(one.traced.out_info))
        report = sized.report
        fresh = PassPlan(
            one.task, one.name, one.candidates, one.runs, one.steps, sized.held_bytes, sized.temporary_bytes,
            None if report is None else report.temporary_bytes, None if report is None else report.collectives,
            cost.flops, cost.nbytes, cost.seconds(target) / model,
        )  # fmt: skip
        known = rows.get(key)
        rows[key] = fresh if known is None else replace(
            known, runs=known.runs + fresh.runs, flops=known.flops + fresh.flops,
            moved_bytes=known.moved_bytes + fresh.moved_bytes, seconds=known.seconds + fresh.seconds,
        )  # fmt: skip
    return tuple(rows.values())


def reports(
    problem: SearchProblem, compiler: TargetCompiler, size: int, planned: Evaluator, plan_passes: PlanPasses,
    task: BatchedTask,
) -> list[Report]:  # fmt: skip
    """What the compiler says of the passes of a task over a chunk of `size` candidates, chunked as `planned` has
    chosen, in their order. Raises JaxRuntimeError where it refuses one because it does not fit."""
    return [
        Report(compiler.temporary_bytes(one.traced), collectives(compiler.compiled(one.traced)))
        for one in compiled_passes(problem, compiler, size, planned, plan_passes, task)
    ]


def compiled_passes(
    problem: SearchProblem, compiler: TargetCompiler, size: int, planned: Evaluator, plan_passes: PlanPasses,
    task: BatchedTask,
) -> list[PlannedPass]:  # fmt: skip
    """The passes of a task over a population of which each group of devices has `size` candidates, chunked as `planned`
    has chosen, traced for the compiler's devices."""
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
    loaded. A `place` of abstract arrays: it is told every leaf."""

    model: int
    bank: int = 0
    largest_leaf: int = 0
    by_dtype: Counter[str] = field(default_factory=Counter)

    def place(self, shape: tuple[int, ...], dtype: Any, sharded_axis: int | None = None) -> jax.ShapeDtypeStruct:
        leaf = anywhere(shape, dtype)
        nbytes = leaf.size * leaf.dtype.itemsize
        own = nbytes // self.model if is_cut(shape, sharded_axis, self.model) else nbytes
        self.bank, self.largest_leaf = self.bank + own, max(self.largest_leaf, nbytes)
        self.by_dtype[str(leaf.dtype)] += own
        return leaf


def device_sizes(problem: SearchProblem, model: int) -> DeviceSizes:
    """What is loaded where groups of `model` devices share a candidate."""
    sizes = DeviceSizes(model)
    problem.candidates.planned_population(planning_evaluator(problem, 0), 1, sizes.place)
    # Layer paths are planned as one model, and all of the parents' layers are loaded.
    sizes.bank = max(sizes.bank, problem.candidates.held_bytes() // model)
    return sizes


def advice(problem: SearchProblem, pass_bytes: int, held_bytes: int = 0) -> tuple[str, ...]:
    """What would make a search fit that does not. Bytes on a device: pass_bytes, of the largest pass; held_bytes: of
    materialised candidates and caches, which are for no shorter batch less than for one row."""
    target, model = problem.target, problem.config.evaluation.model
    here = device_sizes(problem, model)

    def fits(bank: float, memory: float = target.memory, needed: float = pass_bytes) -> bool:
        return bank + needed <= memory

    def fits_shared(shards: int) -> bool:
        return fits(device_sizes(problem, shards).bank, needed=pass_bytes * model / shards)

    found = []
    shards = [m for m in range(2 * model, MOST_SHARDS + 1, model) if m & (m - 1) == 0 or m == target.devices_per_host]
    enough = next(filter(fits_shared, shards), None)
    if enough is not None and target.is_accelerator:
        more = "" if target.devices_per_host % enough == 0 else f", on a host with {enough} such devices"
        found.append(f"evaluation.model: {enough} (devices that share the models){more}")
    whole = target.memory / gpu_memory_fraction() if target.platform == "gpu" else 0
    if whole and fits(here.bank, 0.95 * whole):
        found.append("the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, for more of the GPU's memory")
    masks = here.by_dtype["uint16"]
    if masks and fits(here.bank - masks):
        found.append("a method that stores no number per entry, such as ties or dare_ties")
    count = len(problem.merged_from)
    fewer = next((n for n in range(count - 1, 1, -1) if fits(here.bank * n / count)), None)
    if fewer is not None:
        found.append(f"{count - fewer} fewer of the {count} models")
    if here.bank + held_bytes < target.memory:
        found.append(f"evaluation.tokens_per_batch below {problem.tokens_per_batch:,}, or shorter examples")
    return tuple(found) or ("a device with more memory, or smaller models",)
