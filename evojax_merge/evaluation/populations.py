"""Populations: candidates as arrays, and the programs that make models of them."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np

from evojax_merge.evaluation import passes
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.devices import AnyMesh, Devices, pad_chunk, size_of, tree_nbytes
from evojax_merge.evaluation.passes import (
    DifferentiableFactory,
    LazyMergeFactory,
    PerCandidateModel,
    SharedModel,
    WeightsFactory,
)
from evojax_merge.evaluation.planned_passes import merge_bytes
from evojax_merge.evaluation.programs import CAST, MATERIALISE, RECIPE_GRADIENT, Evaluation, Job, Program
from evojax_merge.models.bank import Bank
from evojax_merge.models.sources import StackedWeights

if TYPE_CHECKING:
    from evojax_merge.evaluation.evaluator import DecoderEvaluator

# Fraction of the free memory that materialised or unstacked candidates may take.
MATERIALISE_FRACTION = 1 / 8


@dataclass(frozen=True)
class Source:
    """A chunk of candidates as arguments of a program: the factory of their models, their shared arrays, and the arrays
    of each. holds: the weights that were materialised for it; merge_bytes: see `Program`, of one that it is scored
    by."""

    factory: Any
    replicated: Any
    candidates: Any
    holds: Any = ()
    merge_bytes: Callable[[Any], int] = lambda results: 0

    @property
    def arguments(self) -> tuple[Any, Any]:
        return self.replicated, self.candidates

    @property
    def size(self) -> int:
        return size_of(self.candidates)


# A generator that yields the programs that make a chunk's source, and returns it.
Sourcing = Generator[Program, Any, Source]


@dataclass(frozen=True)
class Population:
    """P candidates: their shared arrays, the arrays of each (leading axis P, on the host), and the factory that makes a
    model of these."""

    factory: WeightsFactory
    replicated: Any
    candidates: Any

    @property
    def size(self) -> int:
        return size_of(self.candidates)

    def chunks(self, size: int) -> Iterator[tuple[np.ndarray, Any]]:
        """Runs of `size` candidates: their numbers, and their arrays, filled up to one shape."""
        if size == self.size:
            yield np.arange(size), self.candidates
            return
        for begin in range(0, self.size, size):
            rows = np.arange(begin, min(begin + size, self.size))
            yield rows, pad_chunk(self.candidates, rows, size)

    def first(self, size: int) -> Self:
        """The first chunk of `size` candidates as a population."""
        _, candidates = next(Population.chunks(self, size))
        return replace(self, candidates=candidates)

    def source(self, candidates: Any, compute_dtype: str) -> Source:
        """A chunk that is scored without being materialised."""
        return Source(self.factory, self.replicated, candidates)

    def model_shape(self) -> Any:
        """One candidate's shapes where it has to be materialised first; None where it is in memory."""
        return None

    def abstract(self, devices: Devices) -> "Population":
        """The same candidates without arrays that come to the devices part by part: a plan loads nothing."""
        return self

    def materialise(self, mesh: AnyMesh, candidates: Any) -> Sourcing:
        """A chunk that exists as a whole."""
        return Source(self.factory, self.replicated, candidates)
        yield  # A generator without a program.

    def differentiable(self) -> Any:
        """The same candidates, to be differentiated with respect to the arrays of each; None where these are not
        differentiable."""
        return None

    def planned_scoring(self, evaluator: "DecoderEvaluator", batched_task: BatchedTask) -> Evaluation:
        """Score a task's rows for one chunk of candidates, without entering the results anywhere."""
        chunk = evaluator.scoring_chunk(self, batched_task)
        first, nobody = self.first(chunk * evaluator.devices.population), batched_task.requests.unanswered(0)
        return evaluator.scoring(first, batched_task, chunk, nobody, lambda done: None)


@dataclass(frozen=True)
class MergePopulation(Population):
    """P merges of one bank, each described by its recipe."""

    factory: LazyMergeFactory

    def source(self, candidates: Any, compute_dtype: str) -> Source:
        merged = partial(_merge_bytes, self.replicated, compute_dtype, 1)
        return Source(self.factory, self.replicated, candidates, merge_bytes=merged)

    def model_shape(self) -> Any:
        _, candidate = next(Population.chunks(self, 1))
        spec = passes.MaterialiseSpec(self.factory, None)
        return jax.eval_shape(partial(passes.materialise, spec), self.replicated, candidate)

    def materialise(self, mesh: AnyMesh, candidates: Any) -> Sourcing:
        size = size_of(candidates)

        def moved(models: Any) -> int:
            return tree_nbytes(self.replicated) + tree_nbytes(models) // size

        arguments = (passes.MaterialiseSpec(self.factory, mesh), self.replicated, candidates)
        models = yield Program(MATERIALISE, passes.materialise, arguments, size, merge_bytes=moved)
        return Source(PerCandidateModel(), None, models, models)

    def differentiable(self) -> "DifferentiableMerges":
        """The same merges, to be differentiated with respect to their recipes."""
        lazy_factory = self.factory
        factory = DifferentiableFactory(lazy_factory.spec, lazy_factory.compute_dtype, lazy_factory.prefetch_layers)
        return DifferentiableMerges(factory, self.replicated, self.candidates)


def _merge_bytes(bank: Bank, compute_dtype: str, times: int, results: Any) -> int:
    return times * merge_bytes(bank, compute_dtype)


@dataclass(frozen=True)
class DifferentiablePopulation(Population):
    """P candidates, to be differentiated with respect to the arrays of each."""

    def to_score(self) -> Population:
        """The same candidates, not to be differentiated."""
        return self

    def planned_gradient(self, evaluator: "DecoderEvaluator", batched_task: BatchedTask) -> Evaluation:
        """Differentiate a task's rows for one chunk of candidates, without entering the results anywhere."""
        size = evaluator.gradient_chunk(self, batched_task) * evaluator.devices.population
        first, answers = self.first(size), batched_task.requests.unanswered(size)
        return evaluator.differentiating(
            self, batched_task, np.arange(size), first.candidates, answers.totals, answers, lambda done: None
        )

    def pull_back(self, mesh: AnyMesh, candidates: Any, cotangents: Any, holds: Any) -> Job:
        """The derivative with respect to candidates, float32, of a function whose derivatives with respect to their
        materialised weights are `cotangents`. holds: what is in memory meanwhile."""
        return cotangents
        yield  # A generator without a program.


@dataclass(frozen=True)
class DifferentiableMerges(DifferentiablePopulation):
    """P merges of one bank, to be differentiated with respect to their recipes."""

    factory: DifferentiableFactory

    def to_score(self) -> MergePopulation:
        factory = LazyMergeFactory(self.factory.spec, self.factory.compute_dtype, self.factory.prefetch_layers)
        return MergePopulation(factory, self.replicated, self.candidates)

    def source(self, candidates: Any, compute_dtype: str) -> Source:
        # Merged, and merged again by the derivative, which then reads the sources once more.
        merged = partial(_merge_bytes, self.replicated, compute_dtype, 3)
        return Source(self.factory, self.replicated, candidates, merge_bytes=merged)

    def model_shape(self) -> Any:
        """One candidate's shapes, in the dtype of its computation, which is that of its gradient."""
        dtype = self.factory.compute_dtype
        return jax.eval_shape(lambda model: passes.to_dtype(model, dtype), self.to_score().model_shape())

    def materialise(self, mesh: AnyMesh, candidates: Any) -> Sourcing:
        source = yield from self.to_score().materialise(mesh, candidates)
        if self.factory.spec.export_dtype == self.factory.compute_dtype:
            return source
        # Cast once, not in every pass; and derivatives are not rounded to the export dtype in each of them.
        arguments = (source.candidates, self.factory.compute_dtype)
        models = yield Program(CAST, passes.to_dtype, arguments, source.size, holds=source.holds)
        return Source(source.factory, None, models, models)

    def pull_back(self, mesh: AnyMesh, candidates: Any, cotangents: Any, holds: Any) -> Job:
        size = size_of(candidates)

        def moved(gradient: Any) -> int:
            # Each layer is merged again, and its derivative reads its sources and the merge's cotangents.
            return 2 * (tree_nbytes(self.replicated) + tree_nbytes(cotangents) // size)

        spec = passes.MaterialiseSpec(self.factory, mesh)
        arguments = (spec, self.replicated, (candidates, cotangents))
        return (yield Program(RECIPE_GRADIENT, passes.recipe_gradient, arguments, size, holds=holds, merge_bytes=moved))


@dataclass(frozen=True)
class ModelPopulation(Population):
    """P models that are in memory, on the host."""

    factory: PerCandidateModel

    def chunks(self, size: int) -> Iterator[tuple[np.ndarray, Any]]:
        """A chunk goes to the device once, not with every batch."""
        for rows, models in super().chunks(size):
            yield rows, jax.device_put(models)


def stored(model: StackedWeights) -> Population:
    """A stored model: a population of one."""
    return Population(SharedModel(), model, np.zeros(1))
