"""What a search would take on a target, from headers alone: memory, arithmetic, traffic, time by the roofline, disk.

The passes are those that the search would run: the evaluator chooses them as it does then, over abstract arrays.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax

from evojax_merge.checkpoints.abstract_bank import anywhere
from evojax_merge.checkpoints.bank import bank_bytes
from evojax_merge.errors import Failed
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.compilers import TargetCompiler
from evojax_merge.evaluation.costs import Cost
from evojax_merge.evaluation.devices import MEMORY_SHARE, is_cut
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
from evojax_merge.search.protocols import differentiates
from evojax_merge.search.strategies.hybrid import ascent_generations
from evojax_merge.search.successive_halving import rung_shards, rung_size
from evojax_merge.selection import candidates_to_select

# What the program itself takes of the host: the interpreter, JAX, the compiler at work.
PROCESS_BYTES = 700 * 10**6
# Of a layer path, a gradient is planned as so many passes.
PATH_GRADIENT_PASSES = 4
# Devices that a plan asks for at most, where one is not enough.
MOST_SHARDS = 64


def make_plan(
    problem: SearchProblem,
    batched_tasks: Sequence[Sequence[BatchedTask]],
    minibatches: Sequence[Sequence[BatchedTask]] = (),
    download_bytes: int = 0,
    compiler: TargetCompiler | None = None,
) -> Plan:
    """The plan of a search for its problem's target. batched_tasks, minibatches: as `problem.batched_tasks` and
    `problem.batched_minibatches` give them; download_bytes: of the models that are not here; compiler: asked for the
    memory of every pass."""
    target, model, splits = problem.target, problem.config.evaluation.model, problem.by_split(batched_tasks)
    groups, sizes = target.devices // model, device_sizes(problem, model)
    planner = planning_evaluator(problem, sizes.bank)
    # What the winner is chosen on may be computed in another dtype, in which fewer candidates fit into a pass.
    final = planner
    if problem.final_compute_dtype != problem.compute_dtype:
        final = replace(planner, compute_dtype=problem.final_compute_dtype, chunk_sizes={})
    size = math.ceil(problem.strategy.population / groups)
    population = problem.candidates.planned_population(planner, size, anywhere)
    finalists = population if final is planner else problem.candidates.planned_population(final, size, anywhere)
    reports = None if compiler is None else partial(reported_bytes, problem, compiler)

    def passes_on(
        splits: Sequence[Sequence[BatchedTask]], plan_passes: PlanPasses = planned_passes, ask: bool = False
    ) -> list[SizedPass]:
        return [
            one
            for number, tasks in enumerate(splits)
            for one in _passes_of_tasks(
                planner, population, tasks, plan_passes, reports if ask and number == 0 else None
            )
        ]

    def final_passes(tasks: Sequence[BatchedTask]) -> list[SizedPass]:
        return _passes_of_tasks(final, finalists, tasks, planned_passes, None)

    def cost_on(tasks: Sequence[BatchedTask] | None, count: int) -> Cost:
        return _cost(final_passes(tasks)) * count if tasks and count else Cost()

    scored = passes_on(splits.shards, ask=True)
    known = population.differentiable() is not None
    differentiated = passes_on(minibatches, planned_gradient_passes if known else planned_passes, True)
    share = (1 if known else PATH_GRADIENT_PASSES) / max(1, len(minibatches))
    candidate, gradient = _cost(scored), _cost(differentiated) * share
    rounds, starts = _gradient_generations(problem)
    by_gradient = gradient * math.ceil(starts / groups)
    by_score = candidate * (_shard_passes(problem, len(splits.shards), groups) / len(splits.shards))
    counts = candidates_to_select(problem)
    selection = (
        cost_on(splits.full, counts.full)
        + cost_on(splits.validation, counts.validation)
        + cost_on(splits.heldout, counts.heldout)
    )
    followed = by_gradient * rounds + by_score * (problem.search.generations - rounds)
    run = followed + selection * (1 / groups)
    only_gradients = rounds == problem.search.generations
    rows = _rows([*([] if only_gradients else scored), *differentiated], target, model)
    also = [] if final is planner else _rows(final_passes(splits.full), target, model)
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
        advice=() if fits else advice(problem, pass_bytes),
    )


def _gradient_generations(problem: SearchProblem) -> tuple[int, int]:
    """How many generations of a search follow gradients, and how many candidates are differentiated in each."""
    what, search = differentiates(problem.strategy), problem.search
    if what is None:
        return 0, 0
    if what == "fitness":
        return search.generations, problem.strategy.population
    return ascent_generations(search.gradient, search.generations), search.gradient.starts


def disk_bytes(problem: SearchProblem) -> int:
    """What a run needs on the disk. Candidates need nothing; the winner is about as large as one parent."""
    model = bank_bytes(problem.sources, problem.decoder) // len(problem.merged_from)
    examples, tasks = sum(task.size for shard in problem.shards for task in shard), len(problem.full)
    return model + run_bytes(problem.search, problem.strategy, problem.space, examples, tasks)


# ---------------------------------------------------------------------------------------------------------------
# Passes


PlanPasses = Callable[[Evaluator, Any, BatchedTask, PassReader], list[PlannedPass]]


@dataclass(frozen=True)
class SizedPass:
    """A planned pass, and the bytes on a device that it needs beside its arguments, its results included: as estimated,
    and as its target's compiler reports (None: it was not asked, or refuses the pass however small it is)."""

    planned: PlannedPass
    temporary_bytes: int
    reported_bytes: int | None

    @property
    def needed_bytes(self) -> int:
        """Beside the bank."""
        own = self.temporary_bytes if self.reported_bytes is None else self.reported_bytes
        return self.planned.held_bytes + own


def planning_evaluator(problem: SearchProblem, bank: int) -> Evaluator:
    """An evaluator without tasks that chooses as one on the problem's target would, with `bank` bytes loaded on a
    device."""
    settings, target = problem.config.evaluation, problem.target
    free = int(MEMORY_SHARE * max(0, target.memory - bank))
    # Of what does not fit it is shown what one candidate takes.
    chunk = settings.chunk if bank < target.memory else 1
    return Evaluator(
        problem.decoder, problem.tokenizer, [], problem.compute_dtype, chunk, target=target,
        free_memory=lambda: free, temporary_bytes=JaxprReader(target).temporary_bytes,
    )  # fmt: skip


def _passes_of_tasks(
    planner: Evaluator, population: Population, tasks: Sequence[BatchedTask], plan_passes: PlanPasses,
    reports: Callable[..., list[int]] | None,
) -> list[SizedPass]:  # fmt: skip
    evaluator = replace(planner, batched_tasks=list(tasks))
    return [one for i in range(len(tasks)) for one in passes_of_task(evaluator, population, i, plan_passes, reports)]


def passes_of_task(
    evaluator: Evaluator, population: Population, i: int, plan_passes: PlanPasses,
    reports: Callable[..., list[int]] | None = None,
) -> list[SizedPass]:  # fmt: skip
    """The passes of the evaluator's task i over a chunk, with as much in a pass as fits; where not even one row fits,
    with one candidate. reports: asks the target's compiler."""

    reader = JaxprReader(evaluator.target)

    def fitting(task: BatchedTask, progress: Progress) -> list[SizedPass]:
        planned = plan_passes(evaluator, population, task, reader)
        unknown: list[int | None] = [None] * len(planned)
        reported = unknown if reports is None else reports(evaluator, plan_passes, task)
        sized = [
            SizedPass(one, reader.temporary_bytes(one.traced), said)
            for one, said in zip(planned, reported, strict=True)
        ]
        most = max((one.needed_bytes for one in sized), default=0)
        if evaluator.target.is_accelerator and most > evaluator.free_memory() / MEMORY_SHARE:
            raise MemoryError
        return sized

    try:
        found: list[SizedPass] = evaluator.with_less(i, fitting, lambda done: None)
    except Failed:
        alone = replace(evaluator, chunk=1, chunk_sizes={})
        planned = plan_passes(alone, population, evaluator.batched_tasks[i], reader)
        found = [SizedPass(one, reader.temporary_bytes(one.traced), None) for one in planned]
    return found


def _cost(passes: Sequence[SizedPass]) -> Cost:
    return sum((one.planned.cost for one in passes), Cost())


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
        cost, key = one.cost, (one.task, one.name, one.candidates, one.held_bytes, str(one.traced.out_info))
        fresh = PassPlan(
            one.task, one.name, one.candidates, one.runs, one.steps, one.held_bytes // model, sized.temporary_bytes,
            sized.reported_bytes, cost.flops, cost.nbytes, cost.seconds(target) / model,
        )  # fmt: skip
        known = rows.get(key)
        rows[key] = fresh if known is None else replace(
            known, runs=known.runs + fresh.runs, flops=known.flops + fresh.flops,
            moved_bytes=known.moved_bytes + fresh.moved_bytes, seconds=known.seconds + fresh.seconds,
        )  # fmt: skip
    return tuple(rows.values())


def reported_bytes(
    problem: SearchProblem, compiler: TargetCompiler, planned: Evaluator, plan_passes: PlanPasses, task: BatchedTask
) -> list[int]:
    """What the compiler says of the passes of a task, with the chunks that `planned` has chosen, in their order. Raises
    JaxRuntimeError where it refuses one because it does not fit."""
    return [
        compiler.temporary_bytes(one.traced) for one in compiled_passes(problem, compiler, planned, plan_passes, task)
    ]


def compiled_passes(
    problem: SearchProblem, compiler: TargetCompiler, planned: Evaluator, plan_passes: PlanPasses, task: BatchedTask
) -> list[PlannedPass]:
    """The passes of a task, with the chunks that `planned` has chosen, traced for the compiler's devices."""
    evaluator = replace(planned, devices=compiler.devices, temporary_bytes=compiler.temporary_bytes)
    # As many candidates for each group of devices as were planned with.
    groups, size = compiler.devices.population, problem.strategy.population
    each = math.ceil(size / (problem.target.devices // problem.config.evaluation.model))
    population = problem.candidates.planned_population(evaluator, groups * each, compiler.place_leaf)
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


def advice(problem: SearchProblem, pass_bytes: int) -> tuple[str, ...]:
    """What would make a search fit that does not."""
    target, model = problem.target, problem.config.evaluation.model
    here = device_sizes(problem, model)

    def fits(bank: float, memory: float = target.memory) -> bool:
        return bank + pass_bytes <= memory

    found = []
    shards = [m for m in range(2 * model, MOST_SHARDS + 1, model) if m & (m - 1) == 0 or m == target.devices_per_host]
    enough = next((m for m in shards if fits(device_sizes(problem, m).bank)), None)
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
    if here.bank < target.memory:
        found.append(f"evaluation.tokens_per_batch below {problem.tokens_per_batch:,}, or shorter examples")
    return tuple(found) or ("a device with more memory, or smaller models",)
