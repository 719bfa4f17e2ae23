"""Plans of searches over pytrees."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.backends.function.programs import TreeEvaluator, gradient_program, score_program
from evojax_merge.backends.function.trees import TreeBank, put_bank
from evojax_merge.checkpoints.abstract_bank import anywhere
from evojax_merge.evaluation.compilers import TargetCompiler, collectives
from evojax_merge.evaluation.devices import ONE_DEVICE, tree_nbytes
from evojax_merge.evaluation.passes import TracedPass, trace
from evojax_merge.evaluation.planned_passes import (
    DeviceSizes,
    JaxprReader,
    PlannedPass,
    PlanUse,
    Report,
    SizedPass,
)
from evojax_merge.evaluation.programs import GRADIENT, MATERIALISE, SCORE
from evojax_merge.report.plan import shown_seconds
from evojax_merge.tasks.arrays import ArrayTask

if TYPE_CHECKING:
    from evojax_merge.backends.function.backend import FunctionBackend

# The least duration of a measurement of a function that is not traced, unless it has all examples.
LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class FunctionPlanner:
    """Plans a search over pytrees: one program for each task; see `Planner`."""

    backend: "FunctionBackend"
    # By the name and metric of a task that is not traced: numbers of examples, and the seconds of a candidate on them.
    _measured: dict[tuple[str, str], list[tuple[int, float]]] = field(default_factory=dict)

    jobs = 1

    @cached_property
    def sizes(self) -> DeviceSizes:
        sizes = DeviceSizes(self.backend.facts.settings.model, held=self.backend.held_bytes())
        self.backend.abstract_bank(sizes.place)
        return sizes

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"{name}: JAX does not trace it; measured here: {shown_seconds(points[-1][1])} for a candidate on "
            f"{points[-1][0]} of the examples"
            for (name, _), points in self._measured.items()
        )

    def _called_seconds(self, task: ArrayTask) -> float:
        """The seconds that a candidate takes on a task that is not traced, from measurements on one example, and then
        on twice as many until they take a second."""
        points = self._measured.setdefault((task.name, task.metric), [])
        if not points:
            backend, count = self.backend, 1
            bank, workers = put_bank(backend.merge.bank, jnp.asarray), backend.programs(1, ONE_DEVICE).workers
            genomes = np.repeat(backend.merge.space.start[None], workers, axis=0)
            while not points or (points[-1][0] < task.size and points[-1][1] * workers < LEAST_SECONDS):
                programs = backend.programs(workers, ONE_DEVICE)
                evaluator = TreeEvaluator([task.subset(range(count))], bank, programs)
                seconds = np.inf
                # The first call on so many examples compiles, or prepares the network for them.
                for _ in range(2):
                    started = time.perf_counter()
                    evaluator.evaluate(genomes)
                    seconds = min(seconds, (time.perf_counter() - started) / workers)
                points.append((count, seconds))
                count = min(2 * count, task.size)
        (few, less), (many, more) = points[-2] if len(points) > 1 else (0, 0.0), points[-1]
        return more + max(0.0, more - less) / (many - few) * (task.size - many)

    def passes(
        self, tasks: Sequence[ArrayTask], candidates: int, use: PlanUse, compiler: TargetCompiler | None = None,
        smallest: bool = False,
    ) -> list[SizedPass]:  # fmt: skip
        backend, target = self.backend, self.backend.facts.target
        chunk, reader = backend.chunk(math.ceil(candidates / target.devices)), JaxprReader(target, ONE_DEVICE)
        genomes = jax.ShapeDtypeStruct((chunk, backend.merge.space.dims), jnp.float32)
        bank = backend.abstract_bank(anywhere)
        sized = []
        for task in tasks:
            traced = self._traced(task, bank, genomes, chunk, use)
            name = MATERIALISE if not task.traced else GRADIENT if use == "gradient" else SCORE
            planned = PlannedPass(
                task.name, name, traced, chunk if task.traced else 1, merge_bytes=tree_nbytes(bank),
                held_bytes=tree_nbytes([anywhere(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(task.rows)]),
                called_seconds=0.0 if task.traced else self._called_seconds(task),
            )  # fmt: skip
            report = None
            if compiler is not None:
                placed = backend.abstract_bank(compiler.place_leaf)
                compiled = self._traced(task, placed, compiler.place(genomes), chunk, use)
                report = Report(compiler.temporary_bytes(compiled), collectives(compiler.compiled(compiled)))
            sized.append(SizedPass(planned, planned.held_bytes, reader.temporary_bytes(traced), report))
        return sized

    def _traced(self, task: ArrayTask, bank: TreeBank, genomes: Any, chunk: int, use: PlanUse) -> TracedPass:
        merge = self.backend.merge
        if not task.traced:
            return trace(jax.jit(merge), bank, jax.ShapeDtypeStruct(genomes.shape[1:], genomes.dtype))
        make = gradient_program if use == "gradient" else score_program
        return trace(make(merge, task, chunk), bank, genomes, task.rows)
