"""The cost of a search on a target, from headers alone: memory, arithmetic, traffic, time by the roofline, disk.

The passes are those of the search itself: its backend plans them, over abstract arrays.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import Any, NamedTuple

import jax

from evojax_merge.backends.backend import Backend, Planner
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.evaluation.compilations import Compilations, compilations
from evojax_merge.evaluation.compilers import TargetCompiler
from evojax_merge.evaluation.costs import Cost, seconds_of
from evojax_merge.evaluation.devices import tree_nbytes
from evojax_merge.evaluation.liveness import flat_program
from evojax_merge.evaluation.planned_passes import DeviceSizes, PlanUse, SizedPass
from evojax_merge.evaluation.targets import Target, live_target
from evojax_merge.evaluation.timings import (
    CALLED,
    Factor,
    Timing,
    WorkKind,
    compiling_factor,
    estimated_factor,
    kind_of_pass,
    read_timings,
    record_timings,
    timing,
)
from evojax_merge.problem import SearchProblem
from evojax_merge.report.plan import (
    CHOOSING,
    COMPILING,
    GENERATIONS,
    HELDOUT,
    LOADING,
    MEASURING,
    TUNING,
    WRITING,
    PassPlan,
    Plan,
    Work,
)
from evojax_merge.search.budgets import STEPS_PER_LOOK, looks_at_all
from evojax_merge.search.loop import INIT_KEY, generation_key
from evojax_merge.search.protocols import Strategy, gradient_generations
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.successive_halving import rung_passes
from evojax_merge.search.surrogate import HISTORY
from evojax_merge.steps.advice import Adviser
from evojax_merge.steps.controls import equal_searches
from evojax_merge.steps.loading import BESIDE_BYTES
from evojax_merge.steps.selection import SelectionCounts, candidates_to_select, models_to_measure, not_kept
from evojax_merge.system.console import working
from evojax_merge.tasks.splits import Splits

# Seconds that a compiler takes for an operation of a program, on a core.
SECONDS_PER_OPERATION = 0.005
# The small programs that a search compiles beside its passes, and the seconds of each.
SMALL_PROGRAMS, SECONDS_PER_PROGRAM = 45, 0.1
# Bytes of the host that the program itself takes: the interpreter, JAX, the compiler at work.
PROCESS_BYTES = 700 * 10**6
# The generations of a search that the clock ends, for the room that its history needs on the disk.
TIMED_GENERATIONS = 10_000
# The fields of a pass that add up over passes that are alike.
SUMMED = ("runs", "flops", "moved_bytes", "sent_bytes", "seconds")


@dataclass(frozen=True)
class PlannedGeneration:
    """The passes of a generation, and what they cost. scored: over the shards; differentiated: over the minibatches;
    candidate, gradient: the costs of one candidate on all examples, and of its gradient on a minibatch; by_score,
    by_gradient: those of a generation, by the groups of devices side by side."""

    scored: list[SizedPass]
    differentiated: list[SizedPass]
    candidate: Cost
    gradient: Cost
    by_score: Cost
    by_gradient: Cost


def _generation(
    problem: SearchProblem[Backend], prepared: Splits[list[Any]], planner: Planner, compiler: TargetCompiler | None
) -> PlannedGeneration:
    target, facts, whole = problem.target, problem.facts, problem.strategy.population
    groups, shards = target.devices // facts.settings.model, len(prepared.shards)
    _, starts = gradient_generations(problem.strategy, problem.search.generations)

    def passes_on(splits: Sequence[list[Any]], candidates: int, use: PlanUse) -> list[SizedPass]:
        """The passes of a generation of so many candidates; the compiler reports on those of the first split."""
        return [
            sized_pass
            for number, tasks in enumerate(splits)
            for sized_pass in planner.passes(tasks, candidates, use, None if number else compiler)
        ]

    scored = passes_on(prepared.shards, whole, "scores")
    differentiated = passes_on(prepared.minibatches, starts, "gradient")
    share = facts.gradient_passes / max(1, len(prepared.minibatches))
    candidate, gradient = _cost(scored, target), _cost(differentiated, target) * share
    by_gradient = gradient * math.ceil(starts / groups)
    if looks_at_all(problem.search):
        by_gradient += candidate * (math.ceil(starts / groups) / STEPS_PER_LOOK)
    beside = 1 + problem.neighbours(problem.splits.search).count
    by_score = candidate * (beside * rung_passes(shards, whole, groups) / shards)
    return PlannedGeneration(scored, differentiated, candidate, gradient, by_score, by_gradient)


def make_plan(
    problem: SearchProblem[Backend],
    prepared: Splits[list[Any]],
    download_bytes: int = 0,
    compiler: TargetCompiler | None = None,
    timings: Sequence[Timing] = (),
) -> Plan:
    """The plan of a search for its problem's target. prepared: the tasks as the backend prepared them; download_bytes:
    of the models that are not on this machine; compiler: reports the memory of every pass; None: estimates alone;
    timings: of work that was measured on this machine's devices."""
    backend: Backend = problem.backend
    target, model = backend.facts.target, backend.facts.settings.model
    groups, planner = target.devices // model, backend.planner()
    sizes, whole = planner.sizes, problem.strategy.population
    _, starts = gradient_generations(problem.strategy, problem.search.generations)
    generation = _generation(problem, prepared, planner, compiler)
    scored, differentiated = generation.scored, generation.differentiated
    by_score, by_gradient = generation.by_score, generation.by_gradient
    on_search, on_heldout = (
        1 + problem.neighbours(tasks).count for tasks in (problem.splits.search, problem.splits.heldout)
    )
    counts, measured = candidates_to_select(problem), models_to_measure(problem)

    def cost_on(tasks: list[Any] | None, count: int) -> Cost:
        return _cost(planner.passes(tasks, whole, "final"), target) * count if tasks and count else Cost()

    def scoring(models: SelectionCounts) -> Cost:
        """The cost of models that are scored one after the other."""
        on_search = cost_on(prepared.search, models.search) + cost_on(prepared.validation, models.validation)
        return (on_search + cost_on(prepared.heldout, models.heldout)) * (1 / groups)

    expectation = partial(
        _expectation, target=target, model=model, bank_bytes=sizes.bank,
        timings=timings if target == live_target() else (), is_called=by_score.called_seconds > 0,
    )  # fmt: skip
    expected = [
        cost.seconds(target, model) * expectation([passes]).multiple
        for cost, passes in ((by_gradient, differentiated), (by_score, scored))
    ]
    generations = _planned_generations(problem.search, problem.strategy, *expected)
    rounds = min(gradient_generations(problem.strategy, generations)[0], generations)
    searched = by_gradient * rounds + by_score * (generations - rounds)
    parts = {
        MEASURING: scoring(measured),
        GENERATIONS: searched,
        CHOOSING: scoring(replace(counts, heldout=0)) * on_search,
        TUNING: searched * equal_searches(problem),
        HELDOUT: scoring(SelectionCounts(0, 0, counts.heldout)) * on_heldout,
    }
    run = sum(parts.values(), Cost())
    only_gradients = rounds == generations
    expectations = expectation([scored] * (not only_gradients) + [differentiated] * (rounds > 0))
    rows = _rows([*([] if only_gradients else scored), *differentiated], target, model)
    pass_bytes = _pass_bytes(problem, prepared.search, planner, rows)
    final = planner.passes(prepared.heldout, whole, "final") if prepared.heldout else []
    compiling = _compiling(problem, scored, [*differentiated, *final], target, model, sizes.bank, timings)
    fits = sizes.bank + pass_bytes <= target.memory
    return Plan(
        target=target,
        model=model,
        groups=groups,
        bank_bytes=sizes.bank,
        pass_bytes=pass_bytes,
        passes=rows,
        population=starts if only_gradients else problem.strategy.population,
        generations=generations,
        gradient_generations=rounds,
        budget=problem.search.budget,
        notes=(*problem.notes, *planner.notes),
        compile_seconds=None if compiler is None else compiler.seconds,
        candidate=_work(generation.candidate, target, model),
        gradient=_work(generation.gradient, target, model) if rounds else None,
        generation=_work(by_gradient if only_gradients else by_score, target, model),
        run=_work(run, target, model),
        parts={name: _work(cost, target, model) for name, cost in parts.items() if cost.seconds(target, model)},
        around=_around(backend, sizes, run, compiling if compiler is None else compiler.seconds),
        expected_share=expectations.share,
        factor=expectations.factor,
        kind=expectations.kind,
        host_bytes=_host_bytes(sizes, target, model, pass_bytes, [*scored, *differentiated, *final]),
        disk_bytes=disk_bytes(problem) + download_bytes,
        download_bytes=download_bytes,
        advice=() if fits else Adviser(problem, prepared).advice(),
    )


def _pass_bytes(
    problem: SearchProblem[Backend], searched: list[Any], planner: Planner, rows: Sequence[PassPlan]
) -> int:
    """The most bytes of passes at once: of a generation's, `rows`, and of finalists' where these compute in another
    dtype. searched: the tasks of the search split."""
    facts = problem.backend.facts
    also: Sequence[PassPlan] = ()
    if facts.final_compute_dtype != facts.compute_dtype:
        passes = planner.passes(searched, problem.strategy.population, "final")
        also = _rows(passes, facts.target, facts.settings.model)
    return max((planner.jobs * row.needed_bytes for row in (*rows, *also)), default=0)


def compile_ahead(problem: SearchProblem[Backend], prepared: Splits[list[Any]], cancelled: Event) -> None:
    """Compile the passes of a generation, and those over the held-out examples, into JAX's folder of compiled programs,
    from headers alone. A pass that cannot be compiled is left to the search, which reports it."""
    planner = problem.backend.planner()
    _, starts = gradient_generations(problem.strategy, problem.search.generations)
    uses: list[tuple[list[Any], int, PlanUse]] = [
        *((tasks, starts, "gradient") for tasks in prepared.minibatches[:1]),
        *((tasks, problem.strategy.population, "scores") for tasks in prepared.shards[:1]),
        (prepared.heldout, 2, "final"),
    ]  # fmt: skip
    for tasks, candidates, use in uses:
        for sized in planner.passes(tasks, candidates, use):
            if cancelled.is_set():
                return
            if sized.planned.traced is not None:
                with suppress(jax.errors.JaxRuntimeError):
                    sized.planned.traced.lower().compile()


def ending_estimate(
    problem: SearchProblem[Backend], planned: Plan, before: Compilations, exporting: float
) -> Callable[[float], float]:
    """(seconds of a generation) -> about the seconds from the last generation to the end. Programs of the ending that
    were not compiled ahead take about as long to compile as those that ran until the second generation. exporting: the
    seconds of the winner's export."""
    compiling = list[float]()

    def ending(generation: float) -> float:
        if not compiling:
            is_ahead = problem.facts.stored_bytes >= BESIDE_BYTES
            compiling.append(0.0 if is_ahead else (compilations() - before).seconds)
        return planned.ending_seconds(generation) + compiling[0] + exporting

    return ending


@contextmanager
def compiling_beside(problem: SearchProblem[Backend], prepared: Splits[list[Any]]) -> Iterator[None]:
    """Compile the search's passes while the block loads models, where that takes longer than compiling them twice
    would. The programs are handed over in JAX's folder of compiled programs."""
    is_kept = jax.config.values["jax_compilation_cache_dir"] and jax.config.values["jax_enable_compilation_cache"]
    # GPUs of several processes tune kernels together.
    is_alone = jax.process_count() == 1
    is_worth_it = is_kept and is_alone and problem.facts.stored_bytes >= BESIDE_BYTES
    sizes, kept = {task.name: task.size for task in problem.splits.heldout}, problem.kept
    # An earlier search with the same models and tasks that came to its end has left its programs.
    if not is_worth_it or (kept is not None and kept.read("heldout", problem.facts.compared[0][1], sizes) is not None):
        yield
        return
    cancelled = Event()
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(compile_ahead, problem, prepared, cancelled)
        try:
            yield
            with working("compiling"):
                compiling.result()
        finally:
            cancelled.set()


def record_timing(planned: Plan, folder: RunFolder, compiled: Compilations) -> None:
    """Record how many times its bound a generation took, for later plans. The first one, which compiled, does not
    count, and neither do generations of two kinds. Judges, and functions that JAX does not trace, are no work of a
    device: their runs are not recorded. Compiling is recorded where most programs were compiled."""
    estimated = planned.around[COMPILING].seconds
    if min(estimated, compiled.seconds, planned.bank_bytes) > 0 and compiled.compiled > compiled.kept:
        factor = compiling_factor(planned.bank_bytes, read_timings()) * compiled.seconds / estimated
        record_timings([timing("compiling", factor, planned.bank_bytes, "search")])
    seconds = [] if planned.run.called_seconds else [row["seconds"] for row in folder.read_timing()[1:]]
    if len(seconds) > 1 and planned.generation.seconds > 0 and planned.gradient_generations in (0, planned.generations):
        factor = statistics.median(seconds) / (planned.generation.seconds * planned.expected_share)
        # A clock may be too coarse for the smallest searches.
        if factor > 0 and planned.bank_bytes > 0:
            record_timings([timing(planned.kind, factor, planned.bank_bytes, "search")])


def _host_bytes(
    sizes: DeviceSizes, target: Target, model: int, pass_bytes: int, passes: Sequence[SizedPass]
) -> int:  # fmt: skip
    """Bytes of a host's memory, which is that of the devices on a CPU."""
    on_cpu = sizes.bank * target.devices_per_host // model + pass_bytes
    groups = max(1, target.devices_per_host // model)
    waiting = groups * max((sized.planned.host_bytes for sized in passes), default=0)
    return PROCESS_BYTES + sizes.on_host + waiting + (sizes.largest_leaf if target.is_accelerator else on_cpu)


class _Expectation(NamedTuple):
    """See `Plan`."""

    share: float
    factor: Factor
    kind: WorkKind

    @property
    def multiple(self) -> float:
        """The expected seconds, over those of the bound."""
        return self.share * self.factor.value


def _expectation(
    used: Sequence[Sequence[SizedPass]], *, target: Target, model: int, bank_bytes: int, timings: Sequence[Timing],
    is_called: bool,
) -> _Expectation:  # fmt: skip
    """The expectation of passes. is_called: whether functions are called that JAX does not trace."""
    planned = [sized.planned for passes in used for sized in passes]
    bounds = [each.cost(target).seconds(target, model) for each in planned]
    by_kind: dict[WorkKind, float] = {}
    for each, seconds in zip(planned, bounds, strict=True):
        # Answers end as they are likely to.
        kind = kind_of_pass(each.name)
        by_kind[kind] = by_kind.get(kind, 0.0) + seconds * each.expected_share
    return _Expectation(
        share=sum(by_kind.values()) / sum(bounds) if any(bounds) else 1.0,
        factor=CALLED if is_called else estimated_factor(by_kind, bank_bytes, timings),
        kind=max(by_kind, key=lambda kind: by_kind[kind], default="scoring"),
    )


def _planned_generations(search: SearchConfig, strategy: Strategy, by_gradient: float, by_score: float) -> int:
    """The generations of a search; where the clock ends it, about as many as fit into its budget. by_gradient,
    by_score: the expected seconds of a generation that follows gradients, and of one that does not."""
    seconds = search.parsed_budget.seconds
    if seconds is None:
        return search.generations
    rounds, _ = gradient_generations(strategy, search.generations)

    def quotient(seconds: float, each: float) -> int:
        return max(0, math.ceil(min(seconds / each, search.generations))) if each > 0 else search.generations

    followed = min(rounds, quotient(seconds, by_gradient))
    return max(1, min(search.generations, followed + quotient(seconds - followed * by_gradient, by_score)))


def disk_bytes(problem: SearchProblem[Backend]) -> int:
    """Bytes that a run needs on the disk. Candidates need nothing, but for members of a pool that are kept in files;
    the winner is about as large as one parent."""
    kept = problem.backend.planner().sizes.on_disk
    model = problem.facts.stored_bytes // problem.facts.loaded
    examples, tasks = sum(task.size for shard in problem.splits.shards for task in shard), len(problem.splits.search)
    search, strategy, dims = problem.search, problem.strategy, problem.space.dims
    # Checkpoints, one of them being written while the others are kept, and the history twice.
    state = strategy.init(generation_key(0, INIT_KEY), problem.space.start[None])
    arrays = 4 * HISTORY * (dims + examples) + 4 * search.finalists * dims + tree_nbytes(jax.eval_shape(lambda: state))
    generations = TIMED_GENERATIONS if search.parsed_budget.seconds else search.generations
    history = generations * (400 + strategy.population * (45 + 14 * dims + 25 * tasks))
    return kept + model + (problem.keep.last + 1) * arrays + 2 * history + 2**20


def _around(backend: Backend, sizes: DeviceSizes, run: Cost, compiling: float) -> dict[str, Work]:
    """The work around a run: models are read from files, unless the run does so, and go to the devices; programs are
    compiled, in so many seconds; and a model is written."""
    target, stored = backend.facts.target, backend.facts.stored_bytes
    hosts = max(1, backend.facts.settings.model // target.devices_per_host)
    read, link = (0 if run.disk_bytes else stored), seconds_of(sizes.bank, target.link)
    disk, written = seconds_of(read / hosts, target.disk), stored // backend.facts.loaded
    writing = seconds_of(written, target.disk)
    return {
        LOADING: Work(0, read, max(link, disk), link_seconds=link, disk_seconds=disk),
        COMPILING: Work(0, 0, compiling),
        WRITING: Work(0, written, writing, disk_seconds=writing),
    }


def _compiling(
    problem: SearchProblem[Backend], scored: Sequence[SizedPass], others: Sequence[SizedPass], target: Target,
    model: int, bank_bytes: int, timings: Sequence[Timing],
) -> float:  # fmt: skip
    """Seconds of compiling the passes by their size: it takes more than twice as long for a program of twice as many
    operations. An earlier search with the same models and tasks that came to its end has left its programs."""
    if problem.kept is not None and not not_kept(problem, "heldout", problem.splits.heldout):
        return 0.0

    def seconds(passes: Sequence[SizedPass], programs: int) -> float:
        traced = {str(each.planned.traced.out_info): each.planned.traced for each in passes}.values()
        sizes = [flat_program(each.jaxpr, each.cut, model, target.platform).operations for each in traced]
        return sum(SECONDS_PER_OPERATION * size for size in sizes) + SECONDS_PER_PROGRAM * programs

    # Each adapter has passes of its own, with a gradient and without.
    trained = equal_searches(problem) - problem.search.controls.count("random")
    factor = compiling_factor(bank_bytes, timings if target == live_target() else ())
    each = 3 * seconds(scored, SMALL_PROGRAMS // 9)
    return factor * (seconds([*scored, *others], SMALL_PROGRAMS) + trained * each)


def _cost(passes: Sequence[SizedPass], target: Target) -> Cost:
    return sum((sized.planned.cost(target) for sized in passes), Cost())


def _rows(passes: Sequence[SizedPass], target: Target, model: int) -> tuple[PassPlan, ...]:
    """One row for all passes that are alike, on whatever shards of the examples."""
    rows: dict[tuple[Any, ...], PassPlan] = {}
    for sized in passes:
        item = sized.planned
        cost, report = item.cost(target), sized.report
        key = (item.task, item.name, item.candidates, item.held_bytes, str(item.traced.out_info))
        fresh = PassPlan(
            item.task, item.name, item.candidates, item.runs, item.steps, sized.held_bytes, sized.temporary_bytes,
            None if report is None else report.temporary_bytes, None if report is None else report.collectives,
            cost.flops, cost.nbytes, cost.sent_bytes, cost.seconds(target, model),
        )  # fmt: skip
        earlier = rows.get(key)
        summed = {name: getattr(earlier, name) + getattr(fresh, name) for name in SUMMED if earlier is not None}
        rows[key] = fresh if earlier is None else replace(earlier, **summed)
    return tuple(rows.values())


def _work(cost: Cost, target: Target, model: int) -> Work:
    return Work(
        cost.flops, cost.nbytes, cost.seconds(target, model), cost.merge_seconds(target) / model,
        cost.compute_seconds(target) / model, cost.called_seconds / model, cost.exchange_seconds(target, model),
        cost.link_seconds(target, model), cost.disk_seconds(target, model),
    )  # fmt: skip
