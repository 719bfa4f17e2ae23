"""Scoring members of a pool: founders, and children that are bred when they are asked for.

A member's tensors are made as `evojax-merge merge` makes them of its recipe: each measured exactly, merged in float32
and cast to the export dtype, with random masks drawn by the parents' content. The scored weights are therefore, to the
bit, the result of the member's lineage of recipes. Founders are read from their files whenever they are needed. Parents
are kept as wholes, some of them beyond a generation; any other is bred again from its ancestors.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import jax
import numpy as np
from flax import struct
from merge_kernels import METHODS, draw_row_keys, merge_tensor

from evojax_merge.checkpoints.bank import aligned_empty
from evojax_merge.checkpoints.folder import FLOAT_DTYPES, is_finite, tensor_digest
from evojax_merge.checkpoints.members import MemberStore
from evojax_merge.checkpoints.parents import Sources, tensor_shapes
from evojax_merge.checkpoints.streamed import FileStates
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import Evaluator, Progress
from evojax_merge.evaluation.memory import available_memory
from evojax_merge.evaluation.passes import PerCandidateModel
from evojax_merge.evaluation.populations import Bring, ModelPopulation, Part, Parts, Population, StreamedPopulation
from evojax_merge.evaluation.routes.whole import MATERIALISE_FRACTION
from evojax_merge.models.architecture import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Leaf,
    leaves_of_layer,
    rows_of_layers,
    shared_leaves,
    stack_leaves,
    stack_numbers,
    tensor_grid,
    tensor_shape,
)
from evojax_merge.models.bank import Bank, LeafBank, Recipe
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.layers import Weights
from evojax_merge.models.sources import StackedWeights
from evojax_merge.models.streamed_bank import load_ahead
from evojax_merge.schema.genealogy import Member
from evojax_merge.system.blas import one_blas_thread

# Tensors that are merged at a time.
WORKERS = 4
# The leaves of a part of the model, and the number of its layer; None: a leaf outside of the layers.
LeavesOfPart = tuple[Sequence[Leaf], int | None]


def parts_of(config: DecoderConfig) -> Iterator[LeavesOfPart]:
    """The parts of a model: each leaf outside of the layers, and each layer."""
    yield from (([leaf], None) for leaf in shared_leaves(config))
    for stack, numbers in stack_numbers(config).items():
        yield from ((stack_leaves(config, stack), number) for number in numbers)


def part_tensors(config: DecoderConfig, part: LeavesOfPart) -> Iterator[tuple[str, Leaf, tuple[int, ...]]]:
    """The tensors of a part: the name in a file, the leaf, and the index among the experts where the leaf has these."""
    leaves, number = part
    for leaf in leaves:
        if number is None:
            yield leaf.tensor, leaf, ()
        else:
            yield from ((leaf.tensor_of(number, *i), leaf, i) for i in np.ndindex(tensor_grid(config, leaf)[1:]))


def steps_of(config: DecoderConfig) -> list[list[LeavesOfPart]]:
    """The parts that a pass needs together: those that embed tokens, each of the layers, and those behind them. An
    embedding comes twice where it is the head as well."""
    leaves = {leaf.name: leaf for leaf in shared_leaves(config)}
    before = [leaf for name, leaf in leaves.items() if name not in (FINAL_NORM, HEAD)]
    behind = [leaf for name, leaf in leaves.items() if name != EMBEDDING or HEAD not in leaves]
    layers: list[list[LeavesOfPart]] = [[(leaves_of_layer(config, number), number)] for number in range(config.layers)]
    return [[([leaf], None) for leaf in before], *layers, [([leaf], None) for leaf in behind]]


def part_shape(config: DecoderConfig, leaf: Leaf) -> tuple[int, ...]:
    """The shape of a leaf in its part of the model, where a layer has an axis of one."""
    grid = () if leaf.stack is None else (1, *tensor_grid(config, leaf)[1:])
    return (*grid, *tensor_shape(config, leaf))


def part_bytes(config: DecoderConfig, export_dtype: str, part: LeavesOfPart) -> int:
    return sum(prod(part_shape(config, leaf)) for leaf in part[0]) * FLOAT_DTYPES[export_dtype].itemsize


@dataclass
class PoolBank:
    """The founders' files and the weights of bred members.

    sources: the base first where `has_base`, then the founders by number; seed: of random methods; export_dtype: the
    dtype that members are rounded to; slots: the number of bred members that are kept, the most recent parents; store:
    keeps them.
    """

    sources: Sources
    config: DecoderConfig
    has_base: bool
    seed: int
    export_dtype: str
    slots: int
    store: MemberStore
    # The members that are kept, the most recent parents last.
    _kept: dict[Member, None] = field(default_factory=dict)
    # The number of children that were bred, repetitions included.
    bred: int = 0

    @property
    def dtype(self) -> np.dtype:
        return FLOAT_DTYPES[self.export_dtype]

    def member_bytes(self) -> int:
        shapes = tensor_shapes(self.config).values()
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes) * self.dtype.itemsize

    @cached_property
    def _files(self) -> FileStates:
        return FileStates.of(self.sources.folders)

    def check_founders(self, progress: Progress) -> None:
        """Raises InputError where a founder or the base holds NaN or infinity. `progress` receives the bytes that were
        read."""
        # From now on the files have to stay as they are.
        self._files.check()
        for source in range(len(self.sources.folders)):
            for part in parts_of(self.config):
                for name, _, _ in part_tensors(self.config, part):
                    progress(self.sources.load_finite(source, name).nbytes)

    def hold(self, members: Iterable[Member]) -> None:
        """Keep these members as wholes. Raises Failed where a file has changed since the search began.

        Members that are not kept are bred, after those of their ancestors that are missing, in order of birth; an
        ancestor goes after its last child. Besides the members asked for, or the `slots` latest of them, no more are
        held at any time than the pool had members.
        """
        self._files.check()
        self.store.check()
        asked = {member for member in members if not member.is_founder}
        missing: set[Member] = set()
        waiting = [*asked]
        while waiting:
            member = waiting.pop()
            if member in self.store:
                # A run before this one may have left it.
                self._kept.setdefault(member)
            elif not (member.is_founder or member in missing):
                missing.add(member)
                waiting += member.parents
        children = Counter(parent for member in missing for parent in member.parents)
        for member in sorted(missing, key=lambda member: member.number):
            self.store.write(member, self._tensors(member))
            self._kept[member] = None
            self.bred += 1
            children.subtract(member.parents)
            self._evict({*asked, *(parent for parent, count in children.items() if count > 0)})
        for member in sorted(asked, key=lambda member: member.number):
            self._kept.pop(member, None)
            self._kept[member] = None
        self._evict(asked)

    def _evict(self, needed: set[Member]) -> None:
        """Remove the earliest of the members that are kept, but for those that are needed, down to `slots`."""
        for member in [member for member in self._kept if member not in needed]:
            if len(self._kept) <= self.slots:
                return
            del self._kept[member]
            self.store.drop(member)

    def _tensors(self, member: Member) -> Iterator[tuple[str, np.ndarray]]:
        """A member's tensors, part by part, bred of parents that are kept."""

        def bred(tensor: tuple[str, Leaf, tuple[int, ...]]) -> tuple[str, np.ndarray]:
            return tensor[0], MemberTensor(self, tensor[0], layer_of(self.config, part)).of(member)

        with ThreadPoolExecutor(WORKERS) as pool:
            for part in parts_of(self.config):
                yield from pool.map(bred, part_tensors(self.config, part))


def layer_of(config: DecoderConfig, part: LeavesOfPart) -> int:
    """The layer that a part is merged like: the embedding goes with the first one, all else outside of the layers with
    the last."""
    leaves, number = part
    if number is not None:
        return number
    return 0 if leaves[0].component == "embedding" else config.layers - 1


@dataclass(frozen=True)
class MemberTensor:
    """A tensor of members of a pool, by its name in a file, merged like that of a layer. A parent's is read once,
    whatever the number of its children."""

    bank: PoolBank
    name: str
    layer: int
    _read: dict[Member | None, np.ndarray] = field(default_factory=dict)
    _digests: dict[Member, bytes] = field(default_factory=dict)

    def of(self, member: Member) -> np.ndarray:
        """The tensor of one member, in the export dtype: read where the member is kept or a founder, else bred."""
        bank = self.bank
        if member.is_founder or member in bank.store:
            return self._parent(member).astype(bank.dtype, copy=False)
        method = METHODS[member.method]
        has_base = method.uses_base(bank.has_base)
        options = replace(method.options, has_base=has_base)
        parents = member.ordered(self.layer)
        tensors = [*map(self._parent, parents)]
        # Export would refuse a recipe with such numbers.
        if method.validate(options, member.parameters) is not None:
            return np.full(tensors[0].shape, np.nan, bank.dtype)

        def row_keys(k: int) -> np.ndarray:
            return draw_row_keys(bank.seed, self._digest(parents[k]), tensors[k].shape)

        sources = [self._parent(None), *tensors] if has_base else tensors
        with one_blas_thread(method.stores_vectors):
            return merge_tensor(method, options, sources, member.parameters, row_keys, bank.dtype)

    def _parent(self, member: Member | None) -> np.ndarray:
        """The tensor of a founder (None: of the base), in its own dtype, or of a member that is kept."""
        if member not in self._read:
            if member is None or member.is_founder:
                self._read[member] = self.bank.sources.load(self._source(member), self.name)
            else:
                self._read[member] = self.bank.store.read(member, self.name)
        return self._read[member]

    def _digest(self, member: Member) -> bytes:
        if member not in self._digests:
            self._digests[member] = (
                self.bank.sources.digest(self._source(member), self.name)
                if member.is_founder
                else tensor_digest(self.name, [self._parent(member)])
            )
        return self._digests[member]

    def _source(self, member: Member | None) -> int:
        return 0 if member is None else member.number + int(self.bank.has_base)


@dataclass(frozen=True)
class LazyChildren:
    """Members of a pool, part by part: children of members that are kept, such members, and founders. members: P of
    them; finite: bool[P], whether all weights that were bred so far are finite."""

    bank: PoolBank
    members: Sequence[Member]
    finite: np.ndarray

    @classmethod
    def of(cls, bank: PoolBank, members: Sequence[Member]) -> "LazyChildren":
        """Members, of which the pool keeps from now on what they are bred of."""
        children = [member for member in members if not (member.is_founder or member in bank.store)]
        bank.hold([*(set(members) - set(children)), *(parent for child in children for parent in child.parents)])
        bank.bred += len(children)
        return cls(bank, members, np.ones(len(members), bool))

    def breeder(self, part: LeavesOfPart) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        """(the numbers of some of the members, int[N]) -> that part's weights by leaf, `[N, 1, …]` of a layer. Parents'
        tensors are read once for all calls."""
        config, dtype = self.bank.config, self.bank.dtype
        tensors = [
            (MemberTensor(self.bank, name, layer_of(config, part)), leaf, place)
            for name, leaf, place in part_tensors(config, part)
        ]

        def breed(numbers: np.ndarray) -> dict[str, np.ndarray]:
            arrays = {leaf.name: aligned_empty((len(numbers), *part_shape(config, leaf)), dtype) for leaf in part[0]}

            def enter(tensor: tuple[MemberTensor, Leaf, tuple[int, ...]]) -> None:
                of_member, leaf, place = tensor
                # A layer has an axis of one.
                array = arrays[leaf.name][:, 0] if leaf.stack else arrays[leaf.name]
                for number in np.unique(numbers):
                    values = of_member.of(self.members[number])
                    # Numbers that fill up a chunk repeat the last one.
                    array[(numbers == number, *place)] = values
                    if not is_finite(values):
                        self.finite[number] = False

            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(enter, tensors))
            return arrays

        return breed


def whole_children(evaluator: Evaluator, bank: PoolBank, members: Sequence[Member]) -> Iterator[Population]:
    """Members as whole models, as many bred and scored together as fit into memory. A member with a weight that is not
    finite has failed, whether or not the examples meet it: export would refuse its recipe."""
    size = max(1, int(MATERIALISE_FRACTION * available_memory()) // bank.member_bytes())
    for begin in range(0, len(members), size):
        children = LazyChildren.of(bank, members[begin : begin + size])
        models = _stacked(children, evaluator.compute_dtype)
        yield ModelPopulation(PerCandidateModel(), None, models, finite=children.finite)


def _stacked(children: "LazyChildren", compute_dtype: str) -> StackedWeights:
    """Children as one population, a leading axis P on every leaf."""
    config, numbers = children.bank.config, np.arange(len(children.members))
    stacks: dict[str, dict[str, np.ndarray]] = {
        stack: {
            leaf.name: aligned_empty(
                (len(numbers), *tensor_grid(config, leaf), *tensor_shape(config, leaf)), children.bank.dtype
            )
            for leaf in stack_leaves(config, stack)
        }
        for stack in stack_numbers(config)
    }
    rows = rows_of_layers(config)
    shared: dict[str, np.ndarray] = {}
    for leaves, layer in parts_of(config):
        arrays = children.breeder((leaves, layer))(numbers)
        if layer is None:
            shared |= arrays
            continue
        for leaf in leaves:
            stacks[str(leaf.stack)][leaf.name][:, rows[layer][str(leaf.stack)]] = arrays[leaf.name][:, 0]
    return StackedWeights(stacks, shared, compute_dtype)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------
# Layer by layer


@struct.dataclass
class BredParts(StackedWeights):
    """Parts of a child, where a merge has its sources."""

    def merge_layer(self, slice_: Weights) -> Weights:
        return slice_

    def materialise(self) -> "BredParts":
        return self


@dataclass(frozen=True)
class BredPartsFactory:
    """Candidates are the weights of a part of the model, which was bred for them."""

    compute_dtype: str

    def __call__(self, leaves: Bank, parts: Recipe) -> BredParts:
        return BredParts(parts.stacks, parts.shared, self.compute_dtype)  # type: ignore[arg-type]


# (a part) -> (the numbers of a chunk's members, int[N]) -> their weights of that part, by leaf.
LoadPart = Callable[[LeavesOfPart], Callable[[np.ndarray], Any]]


@dataclass(frozen=True)
class MemberParts(Parts):
    """The parts of members of a pool, who are numbers in the population: bred when they are needed, and brought to the
    devices. load: brings a part of a chunk of members, on the devices."""

    config: DecoderConfig
    export_dtype: str
    load: LoadPart

    @property
    def rows(self) -> Sequence[Mapping[str, int]]:
        return rows_of_layers(self.config)

    def abstract(self, devices: Devices) -> "MemberParts":
        return replace(self, load=abstract_load(self.config, self.export_dtype, devices))

    @property
    def layer_bytes(self) -> int:
        layers = range(self.config.layers)
        return max(part_bytes(self.config, self.export_dtype, (leaves_of_layer(self.config, i), i)) for i in layers)

    def bring(self, chunks: Sequence[np.ndarray]) -> Iterator[Bring]:
        steps = steps_of(self.config)
        ahead = load_ahead(self._loader(steps, chunks), range(len(steps) * len(chunks)))
        for _ in steps:
            yield lambda numbers: next(ahead)[1]

    def _loader(self, steps: Sequence[Sequence[LeavesOfPart]], chunks: Sequence[np.ndarray]) -> Callable[[int], Part]:
        """(number of a step for all chunks, one after the other) -> its part."""
        loading: tuple[int, list[Callable[[np.ndarray], Any]]] = -1, []

        def load(place: int) -> Part:
            nonlocal loading
            number, chunk = divmod(place, len(chunks))
            if number != loading[0]:
                loading = number, [self.load(part) for part in steps[number]]
            return self._part(steps[number], loading[1], chunks[chunk])

        return load

    def _part(
        self, parts: Sequence[LeavesOfPart], loads: Sequence[Callable[[np.ndarray], Any]], numbers: np.ndarray
    ) -> Part:
        # Without sources: where devices share a model, a leaf's shards alone are read.
        leaves = {
            leaf.name: LeafBank(None, shard_axis=leaf.sharded_axis, has_experts=leaf.has_experts)  # type: ignore[arg-type]
            for part, _ in parts
            for leaf in part
        }
        weights: dict[str, Any] = {}
        for load in loads:
            weights |= load(numbers)
        return leaves, weights

    def ends(self, candidates: np.ndarray) -> Iterator[Part]:
        for leaf in shared_leaves(self.config):
            part: LeavesOfPart = [leaf], None
            yield self._part([part], [self.load(part)], candidates)

    def layers(self, candidates: np.ndarray) -> Iterator[tuple[str, int, Part]]:
        places = [(number, stack, row) for number, rows in enumerate(self.rows) for stack, row in rows.items()]

        def load(place: int) -> Part:
            number, stack, _ = places[place]
            part = stack_leaves(self.config, stack), number
            return self._part([part], [self.load(part)], candidates)

        for place, part in load_ahead(load, range(len(places))):
            yield *places[place][1:], part
            del part

    def model_shape(self, population: Population) -> Any:
        dtype = FLOAT_DTYPES[self.export_dtype]

        def shape(leaf: Leaf) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, *tensor_grid(self.config, leaf), *tensor_shape(self.config, leaf)), dtype)

        def shapes(leaves: Sequence[Leaf]) -> dict[str, jax.ShapeDtypeStruct]:
            return {leaf.name: shape(leaf) for leaf in leaves}

        stacks: Any = {stack: shapes(stack_leaves(self.config, stack)) for stack in stack_numbers(self.config)}
        shared: Any = shapes(shared_leaves(self.config))
        return StackedWeights(stacks, shared, population.factory.compute_dtype)


def on_devices(children: LazyChildren, devices: Devices) -> LoadPart:
    """Brings the parts of children to the devices."""

    def load(part: LeavesOfPart) -> Callable[[np.ndarray], Any]:
        breed, axes = children.breeder(part), {leaf.name: leaf.sharded_axis for leaf in part[0]}
        return lambda numbers: {
            name: devices.put_candidates(array, axes[name]) for name, array in breed(numbers).items()
        }

    return load


def abstract_load(config: DecoderConfig, export_dtype: str, devices: Devices) -> LoadPart:
    """Makes arrays that take no memory in the place of parts, for plans."""
    dtype = FLOAT_DTYPES[export_dtype]

    def abstract(leaf: Leaf, numbers: np.ndarray) -> Any:
        array = np.broadcast_to(np.zeros((), dtype), (len(numbers), *part_shape(config, leaf)))
        return array if devices.mesh is None else devices.abstract_candidates(array, leaf.sharded_axis)

    return lambda part: lambda numbers: {leaf.name: abstract(leaf, numbers) for leaf in part[0]}


def children_by_layer(evaluator: Evaluator, bank: PoolBank, members: Sequence[Member]) -> list[Population]:
    """Members whose layers come to the devices one after the other, bred when they are needed: a child that is scored
    by likelihood never exists as a whole, and a parent's layer is read once for all children."""
    children = LazyChildren.of(bank, members)
    parts = MemberParts(bank.config, bank.export_dtype, on_devices(children, evaluator.devices))
    return [member_population(evaluator, parts, len(members), children.finite)]


def member_population(
    evaluator: Evaluator, parts: MemberParts, size: int, finite: np.ndarray | None = None
) -> StreamedPopulation:
    return StreamedPopulation(BredPartsFactory(evaluator.compute_dtype), parts, np.arange(size), finite=finite)
