"""Populations: candidates as arrays, the programs that make models of them, and the route by which they are run."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import jax
import numpy as np

from evojax_merge.evaluation import layer_passes, passes
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.devices import AnyMesh, Devices, pad_chunk, size_of
from evojax_merge.evaluation.passes import AdaptedFactory, LazyMergeFactory, PerCandidateModel, SharedModel
from evojax_merge.evaluation.planned_passes import merge_bytes
from evojax_merge.evaluation.programs import CAST, MATERIALISE, RECIPE_GRADIENT, Evaluation, Job, Program, merge_traffic
from evojax_merge.evaluation.routes import by_layer, whole
from evojax_merge.models.bank import Bank, LeafBank, Recipe
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.sources import DifferentiableMerge, StackedWeights
from evojax_merge.models.streamed_bank import StreamedBank, abstract_streamed

if TYPE_CHECKING:
    from evojax_merge.evaluation.evaluator import Evaluator


class Route(Protocol):
    """How candidates run; see `routes`."""

    def groups(self, tasks: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """The tasks that run together."""

    @property
    def score(self) -> Callable[..., Evaluation]:
        """(evaluator, population, *a group's tasks, progress) -> an evaluation that returns the responses to each
        task's rows, without texts."""

    @property
    def differentiate(self) -> Callable[..., Evaluation]:
        """(evaluator, population, weights, *a group's tasks, progress) -> an evaluation that returns each task's
        responses, and the derivative of the weighted sum of the tasks' mean scores with respect to the candidates'
        arrays, float32."""

    def planned_scoring(self, evaluator: "Evaluator", population: Any, batched_task: BatchedTask) -> Evaluation: ...
    def planned_gradient(self, evaluator: "Evaluator", population: Any, batched_task: BatchedTask) -> Evaluation: ...


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
    model of these. finite: bool[P], whether all weights that were made so far are finite; None: all are."""

    factory: Any
    replicated: Any
    candidates: Any
    finite: np.ndarray | None = field(default=None, kw_only=True)

    # How often a pass merges a candidate of a bank.
    merges: ClassVar[int] = 0

    @property
    def route(self) -> Route:
        return whole

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

        def moved(results: Any) -> int:
            return self.merges and self.merges * merge_bytes(self.replicated, compute_dtype)

        return Source(self.factory, self.replicated, candidates, merge_bytes=moved)

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


@dataclass(frozen=True)
class MergePopulation(Population):
    """P merges of one bank, each described by its recipe."""

    factory: LazyMergeFactory

    merges: ClassVar[int] = 1

    def model_shape(self) -> Any:
        return _merged_shape(self.factory, self.replicated, self)

    def materialise(self, mesh: AnyMesh, candidates: Any) -> Sourcing:
        size = size_of(candidates)
        arguments = (passes.MaterialiseSpec(self.factory, mesh), self.replicated, candidates)
        moved = merge_traffic(self.replicated, size)
        models = yield Program(MATERIALISE, passes.materialise, arguments, size, merge_bytes=moved)
        return Source(PerCandidateModel(), None, models, models)

    def differentiable(self) -> "DifferentiableMerges":
        factory = replace(self.factory, kind=DifferentiableMerge)
        return DifferentiableMerges(factory, self.replicated, self.candidates, scored=self)


def _merged_shape(factory: Any, bank: Bank, population: Population) -> Any:
    """The shapes of one materialised candidate."""
    _, candidate = next(Population.chunks(population, 1))
    return jax.eval_shape(partial(passes.materialise, passes.MaterialiseSpec(factory, None)), bank, candidate)


@dataclass(frozen=True)
class DifferentiablePopulation(Population):
    """P candidates whose arrays have derivatives."""

    def differentiable(self) -> Self:
        return self

    def pull_back(self, mesh: AnyMesh, candidates: Any, cotangents: Any, holds: Any) -> Job:
        """The derivative with respect to candidates, float32, of a function whose derivatives with respect to their
        materialised weights are `cotangents`. holds: what is in memory meanwhile."""
        return cotangents
        yield  # A generator without a program.


@dataclass(frozen=True)
class DifferentiableMerges(DifferentiablePopulation):
    """P merges of one bank, to be differentiated with respect to their recipes. scored: the same merges, without
    derivatives."""

    factory: LazyMergeFactory
    scored: MergePopulation

    # Merged, and merged again by the derivative, which then reads the sources once more.
    merges: ClassVar[int] = 3

    def model_shape(self) -> Any:
        """One candidate's shapes, in the dtype of its computation, which is that of its gradient."""
        dtype = self.factory.compute_dtype
        return jax.eval_shape(lambda model: passes.to_dtype(model, dtype), self.scored.model_shape())

    def materialise(self, mesh: AnyMesh, candidates: Any) -> Sourcing:
        source = yield from self.scored.materialise(mesh, candidates)
        if self.factory.spec.export_dtype == self.factory.compute_dtype:
            return source
        # Cast once, not in every pass; and derivatives are not rounded to the export dtype in each of them.
        arguments = (source.candidates, self.factory.compute_dtype)
        models = yield Program(CAST, passes.to_dtype, arguments, source.size, holds=source.holds)
        return Source(source.factory, None, models, models)

    def pull_back(self, mesh: AnyMesh, candidates: Any, cotangents: Any, holds: Any) -> Job:
        size = size_of(candidates)
        # Each layer is merged again, and its derivative reads its sources and the merge's cotangents.
        moved = 2 * merge_traffic(self.replicated, size)(cotangents)
        arguments = (passes.MaterialiseSpec(self.factory, mesh), self.replicated, (candidates, cotangents))
        return (
            yield Program(
                RECIPE_GRADIENT, passes.recipe_gradient, arguments, size, holds=holds, merge_bytes=lambda _: moved
            )
        )


@dataclass(frozen=True)
class AdaptedPopulation(DifferentiablePopulation):
    """P low-rank changes of one stored model. A layer's change is added inside the pass: that is little work."""

    factory: AdaptedFactory
    replicated: StackedWeights

    def materialise(self, mesh: AnyMesh, candidates: Any) -> Sourcing:
        arguments = (passes.MaterialiseSpec(self.factory, mesh), self.replicated, candidates)
        models = yield Program(MATERIALISE, passes.materialise, arguments, size_of(candidates))
        return Source(PerCandidateModel(), None, models, models)


@dataclass(frozen=True)
class ModelPopulation(Population):
    """P models that are in memory, on the host."""

    factory: PerCandidateModel

    def chunks(self, size: int) -> Iterator[tuple[np.ndarray, Any]]:
        """A chunk goes to the device once, not with every batch."""
        for rows, models in super().chunks(size):
            yield rows, jax.device_put(models)


def stored(model: StackedWeights, config: DecoderConfig) -> Population:
    """A stored model: a population of one."""
    return Population(SharedModel(tuple(config.parts)), model, np.zeros(1))


# ---------------------------------------------------------------------------------------------------------------
# Candidates whose parts come to the devices one after the other

# A part of the model, brought to the devices for a chunk of candidates: what all of them share, and what each has. A
# pass merges the candidates' weights of the two.
Part = tuple[dict[str, LeafBank], Any]
# (a chunk of candidates, by its arrays) -> its part. Chunks come one after the other, in their order.
Bring = Callable[[Any], Part]


class Parts(ABC):
    """Brings the parts of a kind of candidates to the devices, one after the other."""

    @property
    @abstractmethod
    def rows(self) -> Sequence[Mapping[str, int]]:
        """For each layer its stacks, and its row in each."""

    @property
    def depth(self) -> int:
        """L."""
        return len(self.rows)

    @property
    @abstractmethod
    def layer_bytes(self) -> int:
        """Bytes of what comes to the devices for a layer."""

    @abstractmethod
    def bring(self, chunks: Sequence[Any]) -> Iterator[Bring]:
        """The leaves that embed tokens, each of the layers, and the leaves behind them, for all chunks of candidates;
        the next part is loaded meanwhile."""

    @abstractmethod
    def ends(self, candidates: Any) -> Iterator[Part]:
        """The leaves outside of the layers for one chunk, one by one."""

    @abstractmethod
    def layers(self, candidates: Any) -> Iterator[tuple[str, int, Part]]:
        """The rows of the stacks for one chunk: each layer's, by stack and number."""

    @abstractmethod
    def model_shape(self, population: Population) -> Any:
        """The shapes of one materialised candidate."""

    @abstractmethod
    def abstract(self, devices: Devices) -> "Parts":
        """The same parts as abstract arrays."""


@dataclass(frozen=True)
class StreamedPopulation(Population):
    """P candidates whose parts come to the devices one after the other. gradient: the factory of candidates that are
    differentiated; None: they are not differentiable."""

    factory: Any
    replicated: Parts
    gradient: LazyMergeFactory | None = None

    @property
    def route(self) -> Route:
        return by_layer

    @property
    def parts(self) -> Any:
        return self.replicated

    def abstract(self, devices: Devices) -> "StreamedPopulation":
        return replace(self, replicated=self.replicated.abstract(devices))

    def differentiable(self) -> Any:
        return None if self.gradient is None else replace(self, factory=self.gradient)

    def model_shape(self) -> Any:
        return self.replicated.model_shape(self)

    def materialise(self, mesh: AnyMesh, candidates: Any) -> Sourcing:
        parts, size = self.replicated, size_of(candidates)
        ending = passes.MaterialiseSpec(self.factory, mesh)
        shared: dict[str, Any] = {}
        for part in parts.ends(candidates):
            shared |= yield Program(MATERIALISE, layer_passes.materialise_ends, (ending, *part), size)
            del part
        depths = Counter(stack for rows in parts.rows for stack in rows)
        stacks: dict[str, Any] = {}
        for stack, row, (leaves, each) in parts.layers(candidates):
            spec = layer_passes.StackSpec(self.factory, mesh, depths[stack])
            moved = merge_traffic((leaves, each), depths[stack] * size)
            arguments: tuple[Any, ...] = (spec, (leaves, np.int32(row)), each, stacks.pop(stack, None))
            written = yield Program(
                MATERIALISE, layer_passes.materialise_layer, arguments, size, holds=(shared, stacks), merge_bytes=moved
            )
            stacks[stack] = jax.block_until_ready(written)
            del leaves, each, arguments, written
        models = StackedWeights(stacks, shared, self.factory.compute_dtype)
        return Source(PerCandidateModel(), None, models, models)


@dataclass(frozen=True)
class MergeParts(Parts):
    """The parts of merges: a bank's leaves, which all candidates share, and the recipes' parameters for them."""

    bank: StreamedBank

    @property
    def rows(self) -> Sequence[Mapping[str, int]]:
        return self.bank.rows

    @property
    def layer_bytes(self) -> int:
        return self.bank.layer_bytes

    def bring(self, chunks: Sequence[Recipe]) -> Iterator[Bring]:
        bank = self.bank
        ends = bank.embedding_leaves()
        yield partial(_end_part, ends)
        ends = bank.resident_leaves(ends)
        for number, leaves in bank.layers(range(bank.depth)):
            yield partial(by_layer.layer_part, number, leaves)
            del leaves
        yield partial(_end_part, bank.head_leaves(ends))

    def ends(self, candidates: Recipe) -> Iterator[Part]:
        for name in self.bank.shapes.shared:
            yield self.bank.load_ends([name]), {name: candidates.shared[name]}

    def layers(self, candidates: Recipe) -> Iterator[tuple[str, int, Part]]:
        for number, leaves in self.bank.layers(range(self.depth)):
            for stack, row in self.rows[number].items():
                in_stack = {name: leaves[name] for name in self.bank.shapes.stacks[stack]}
                yield stack, row, by_layer.layer_part(number, in_stack, candidates)
                del in_stack
            del leaves

    def model_shape(self, population: Population) -> Any:
        return _merged_shape(population.factory, self.bank.shapes, population)

    def abstract(self, devices: Devices) -> "MergeParts":
        return MergeParts(abstract_streamed(self.bank.shapes, self.rows))


def _end_part(ends: dict[str, LeafBank], recipes: Recipe) -> Part:
    return ends, recipes.shared
