"""Plans of searches over language models: the evaluator itself chooses the passes, over abstract arrays."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from evojax_merge.checkpoints.decoder_folder import PROJECTOR
from evojax_merge.evaluation.batched_tasks import BatchedTask, in_batches_of
from evojax_merge.evaluation.compilers import TargetCompiler, collectives
from evojax_merge.evaluation.devices import MEMORY_SHARE, group_of
from evojax_merge.evaluation.evaluator import Evaluator, no_progress
from evojax_merge.evaluation.generation import Continuations, generating, generation_chunk
from evojax_merge.evaluation.memory import is_out_of_memory
from evojax_merge.evaluation.planned_passes import (
    DeviceSizes,
    JaxprReader,
    PassReader,
    PlannedPass,
    PlanUse,
    Report,
    SizedPass,
    plan,
)
from evojax_merge.evaluation.populations import Population
from evojax_merge.evaluation.programs import LAYER, LAYER_GRADIENT, MATERIALISE
from evojax_merge.models.architecture import leaves_of, tensor_grid, tensor_shape
from evojax_merge.report.account import summary, with_public_names
from evojax_merge.report.plan import shown_number

if TYPE_CHECKING:
    from evojax_merge.backends.decoder.backend import DecoderBackend

PlanPasses = Callable[[Evaluator, Any, BatchedTask, PassReader], list[PlannedPass]]
# (the evaluator that has chosen chunks, a planner of passes, a task) -> the reports of the target's compiler on the
# passes.
AskCompiler = Callable[[Evaluator, PlanPasses, BatchedTask], list[Report]]


@dataclass
class DecoderPlanner:
    """Plans the passes of a search over language models; see `Planner`."""

    backend: "DecoderBackend"

    @cached_property
    def sizes(self) -> DeviceSizes:
        backend, candidates = self.backend, self.backend.candidates
        sizes = DeviceSizes(backend.facts.settings.model)
        candidates.placement.place_bank(candidates, sizes.place)
        sizes.held = candidates.placement.held_bytes(candidates)
        sizes.on_host, sizes.on_disk = candidates.host_bytes(), candidates.disk_bytes()
        # Layer paths are planned as one model, but all of the parents' layers are loaded.
        sizes.bank = max(sizes.bank, sizes.held // sizes.model)
        backend.abstract_images(backend.facts.compute_dtype, sizes.place)
        return sizes

    @cached_property
    def evaluator(self) -> Evaluator:
        """An evaluator without tasks that makes the choices of one on the backend's target."""
        backend, target = self.backend, self.backend.target
        free = int(MEMORY_SHARE * max(0, target.memory - self.sizes.bank))
        # The plan of a search that does not fit shows the memory of one candidate.
        chunk = backend.facts.settings.chunk if self.sizes.bank < target.memory else 1
        devices = group_of(backend.facts.settings.model)
        config = backend.candidates.run_as(backend.models.decoder)
        return Evaluator(
            config, backend.models.tokenizer, [], backend.facts.compute_dtype, chunk, devices, target=target,
            free_memory=lambda: free, temporary_bytes=JaxprReader(target, devices).temporary_bytes,
            images=backend.abstract_images(backend.facts.compute_dtype, devices.abstract),
        )  # fmt: skip

    @cached_property
    def _final(self) -> Evaluator:
        """The evaluator of the splits that no generation is scored on: in another dtype, fewer candidates may fit."""
        if self.backend.facts.final_compute_dtype == self.backend.facts.compute_dtype:
            return self.evaluator
        dtype, devices = self.backend.facts.final_compute_dtype, self.evaluator.devices
        images = self.backend.abstract_images(dtype, devices.abstract)
        return replace(self.evaluator, compute_dtype=dtype, chunk_sizes={}, images=images)

    @property
    def jobs(self) -> int:
        return 2 if self.evaluator.runs_two_jobs(0) else 1

    @property
    def notes(self) -> tuple[str, ...]:
        config, backend = self.backend.models.decoder, self.backend
        placed = backend.candidates.placement.notes(backend.candidates, backend.target, backend.facts.settings.model)
        fates = backend.candidates.fates(backend.models.other_modules)
        folders = {str(folder.path): folder.path for folder in backend.models.sources.folders}
        account = summary(with_public_names(fates, folders))
        placed = (*backend.candidates.preparation_notes(backend.target), *placed, account)
        if config.projector is None:
            return placed
        leaves = [leaf for leaf in leaves_of(config) if len(leaf.shape) > 1]
        sizes = {leaf.name: math.prod((*tensor_grid(config, leaf), *tensor_shape(config, leaf))) for leaf in leaves}
        projector = sum(sizes[leaf.name] for leaf in leaves if leaf.component == PROJECTOR)
        layers = sum(sizes[leaf.name] for leaf in leaves if leaf.stack is not None)
        return (
            *placed,
            f"{PROJECTOR}: merged, and computed by every candidate: {shown_number(2 * projector)}FLOP for each "
            f"position, {projector / layers:.2%} of what the layers take",
        )  # fmt: skip

    def passes(
        self, tasks: Sequence[BatchedTask], candidates: int, use: PlanUse, compiler: TargetCompiler | None = None,
        smallest: bool = False,
    ) -> list[SizedPass]:  # fmt: skip
        is_final = use == "final"
        ask = None if compiler is None else partial(self._reports, compiler, self._share(candidates))
        evaluator = replace(self._final if is_final else self.evaluator, batched_tasks=list(tasks))
        population = self._population(candidates, is_final)
        follows = use == "gradient" and population.differentiable() is not None
        plan_passes = planned_gradient_passes if follows else planned_passes
        if smallest and self.backend.target.is_accelerator and not _holds_candidate(evaluator, population, tasks):
            # Nothing need be traced.
            held = evaluator.devices.candidate_bytes(population.model_shape())
            return [SizedPass(PlannedPass(tasks[0].task.name, MATERIALISE, None, 1), held, 0, None)]
        passes, written = list[SizedPass](), set[Hashable]()
        for i, requests in enumerate(task.requests for task in tasks):
            if follows or requests.scored or requests.generated not in written:
                passes += passes_of_task(evaluator, population, i, plan_passes, ask, smallest)
            written.add(requests.generated)
        return self._with_brought(passes, self._share(candidates))

    def _with_brought(self, passes: list[SizedPass], candidates: int) -> list[SizedPass]:
        """The passes with the bytes of models that come for a candidate: once for all that are scored, twice for their
        gradients, and once for each chunk that is materialised. candidates: of a group of devices."""
        nbytes = self.backend.candidates.brought_bytes()
        if not nbytes:
            return passes
        is_on_disk, counted = not self.backend.candidates.placement.in_memory, set[str]()
        for i, sized in enumerate(passes):
            planned = sized.planned
            # Scored tasks go through the layers together, each task that generates alone.
            key = planned.task if planned.name == MATERIALISE else "scored"
            if planned.name not in (MATERIALISE, LAYER, LAYER_GRADIENT) or key + planned.name in counted:
                continue
            counted.add(key + planned.name)
            brought = nbytes / (planned.candidates if planned.name == MATERIALISE else candidates)
            planned = replace(planned, brought_bytes=brought, disk_bytes=brought * is_on_disk)
            passes[i] = replace(sized, planned=planned)
        return passes

    def _share(self, candidates: int) -> int:
        """The candidates of one group of devices, where all groups have `candidates` together."""
        return math.ceil(candidates / (self.backend.target.devices // self.backend.facts.settings.model))

    @cached_property
    def _population(self) -> Callable[..., Population]:
        def population(candidates: int, is_final: bool) -> Population:
            evaluator = self._final if is_final else self.evaluator
            planned = self.backend.candidates.planned_population
            return planned(evaluator, self._share(candidates), evaluator.devices.abstract)

        return cache(population)

    def _reports(
        self, compiler: TargetCompiler, size: int, planned: Evaluator, plan_passes: PlanPasses, task: BatchedTask
    ) -> list[Report]:
        """The compiler's reports on the passes of a task over a chunk of `size` candidates for each group of devices,
        in the chunks that `planned` has chosen, in their order. Raises JaxRuntimeError where it refuses one because it
        does not fit."""
        evaluator = replace(
            planned, devices=compiler.devices, temporary_bytes=compiler.temporary_bytes,
            images=self.backend.abstract_images(planned.compute_dtype, compiler.place_leaf),
        )  # fmt: skip
        population = self.backend.candidates.planned_population(
            evaluator, size * compiler.devices.population, compiler.place_leaf
        )
        return [
            Report(compiler.temporary_bytes(planned_pass.traced), collectives(compiler.compiled(planned_pass.traced)))
            for planned_pass in plan_passes(evaluator, population, task, compiler)
        ]


def passes_of_task(
    evaluator: Evaluator, population: Population, i: int, plan_passes: PlanPasses, ask: AskCompiler | None = None,
    smallest: bool = False,
) -> list[SizedPass]:  # fmt: skip
    """The passes of the evaluator's task i over a chunk, with as much in a pass as fits. Where not even one candidate
    and one row fit, and with `smallest`: the passes with these, which no compiler is asked about. A CPU's passes have
    the size that they are given."""
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

    @cache
    def least() -> list[SizedPass]:
        alone = replace(evaluator, chunk=1, chunk_sizes={})
        return sized(alone, in_batches_of(evaluator.batched_tasks[i], 1), None)

    has_no_room = smallest or evaluator.free_memory() <= 0
    has_no_room = has_no_room or not _holds_candidate(evaluator, population, [evaluator.batched_tasks[i]])
    if has_no_room and evaluator.target.is_accelerator:
        return least()
    while True:
        try:
            sized_passes = sized(evaluator, evaluator.batched_tasks[i], ask)
            if fits(sized_passes):
                return sized_passes
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Where the least does not fit, halving again and again is in vain.
        if not fits(least()) or not evaluator.halve(i):
            return least()


def _holds_candidate(evaluator: Evaluator, population: Population, tasks: Sequence[BatchedTask]) -> bool:
    """Return whether a device has room for its part of a candidate that generates, which is there as a whole."""
    shape = population.model_shape() if any(task.prompts is not None for task in tasks) else None
    return shape is None or evaluator.devices.candidate_bytes(shape) <= evaluator.free_memory() / MEMORY_SHARE


_NOTHING = Continuations([], [], np.zeros(0))


def planned_passes(
    evaluator: Evaluator, population: Population, batched_task: BatchedTask, reader: PassReader
) -> list[PlannedPass]:
    """The passes that evaluate one chunk of a population on a task's batches, on one group of devices."""
    passes, groups, name = list[PlannedPass](), evaluator.devices.population, batched_task.task.name
    if batched_task.scoring is not None:
        passes += plan(population.route.planned_scoring(evaluator, population, batched_task), name, reader)
    if batched_task.prompts is not None:
        chunk = generation_chunk(evaluator, population, batched_task)
        first = population.first(chunk * groups)
        passes += plan(generating(evaluator, first, batched_task, chunk, _NOTHING, no_progress), name, reader)
    return passes


def planned_gradient_passes(
    evaluator: Evaluator, population: Population, batched_task: BatchedTask, reader: PassReader
) -> list[PlannedPass]:
    """The passes that differentiate one chunk of a population on a task's batches, on one group of devices."""
    name, passes, route = batched_task.task.name, list[PlannedPass](), population.route
    if batched_task.task.derivative == "nonlinear":
        # The weight of each total depends on all of them.
        passes += plan(route.planned_scoring(evaluator, population, batched_task), name, reader)
    return [*passes, *plan(route.planned_gradient(evaluator, population, batched_task), name, reader)]
