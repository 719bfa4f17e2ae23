"""The kinds of candidates over language models: merges, layer paths and members of a pool. Each kind loads its models,
and evaluates, writes and shows its candidates. This module holds all code that depends on the kind."""

import math
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import METHODS, Method

from evojax_merge.backends.decoder.bank_place import BankPlace
from evojax_merge.checkpoints.abstract_bank import Place, abstract_bank, abstract_stored
from evojax_merge.checkpoints.bank import (
    bank_bytes,
    held_bytes,
    leaf_layout,
    load_bank,
    load_path_bank,
    load_stored,
)
from evojax_merge.checkpoints.folder import FLOAT_DTYPES
from evojax_merge.checkpoints.members import MembersInFiles, MembersOnHost, MemberStore
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.checkpoints.streamed import bank_in_files, bank_on_host
from evojax_merge.checkpoints.streamed_paths import path_bank_in_files, path_bank_on_host
from evojax_merge.checkpoints.writer import TensorSpec
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import DecoderEvaluator, MergeEvaluator, Progress
from evojax_merge.evaluation.passes import SharedModel
from evojax_merge.evaluation.paths import PathEvaluator, StreamedPathEvaluator
from evojax_merge.evaluation.planned_passes import DeviceSizes
from evojax_merge.evaluation.pool import (
    LeavesOfPart,
    PoolBank,
    PoolEvaluator,
    StreamedPoolEvaluator,
    abstract_load,
    member_population,
    part_bytes,
    part_shape,
    part_tensors,
    parts_of,
    steps_of,
)
from evojax_merge.evaluation.populations import Population
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.streaming import StreamedEvaluator
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.plan import options_from
from evojax_merge.mergekit.write import lineage_documents, path_document, recipe_document
from evojax_merge.models.architecture import (
    EMBEDDING,
    HEAD,
    LAYERS,
    Leaf,
    architecture_of,
    shared_leaves,
    stack_leaves,
    tensor_shape,
)
from evojax_merge.models.bank import Bank, MergeSpec, Recipe, take_candidate
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.paths import PathBank, PathSpec
from evojax_merge.models.sources import StackedWeights
from evojax_merge.models.streamed_bank import abstract_streamed
from evojax_merge.report.merges import MergeReport
from evojax_merge.report.paths import PathReport
from evojax_merge.report.plan import shown_bytes, shown_seconds
from evojax_merge.report.pool import PoolReport
from evojax_merge.report.winner import WinnerReport
from evojax_merge.spaces.breeding import PARENTS, BreedingSpace
from evojax_merge.spaces.layer_path import PathSpace
from evojax_merge.spaces.parameter import ParameterSpace

CandidateEvaluator = MergeEvaluator | PathEvaluator | PoolEvaluator
# Layers of a streamed bank on a device: the one that computes, and the next.
LAYERS_AHEAD = 2
# The places of banks that are not on the devices, in words.
STREAMED_FROM = {"host": "in the host's memory", "disk": "in their files"}


class Candidates(Protocol):
    """A kind of candidates. `name`: the method or kind, in tables; `export_dtype`: the dtype that they are rounded to
    and written in; `methods`: the methods that merge them; `is_random`: whether random masks are drawn;
    `baseline_role`: the role of the space's baseline in the table, None where the parents' rows show it already;
    `gradient_passes`: the number of passes that a candidate's gradient is planned as, 0 where it has none."""

    @property
    def space(self) -> Any: ...
    @property
    def name(self) -> str: ...
    @property
    def methods(self) -> tuple[Method, ...]: ...
    @property
    def export_dtype(self) -> str: ...
    @property
    def is_random(self) -> bool: ...
    @property
    def baseline_role(self) -> str | None: ...
    @property
    def gradient_passes(self) -> int: ...

    def within(self, context: Any) -> "Candidates":
        """The candidates of a search whose strategy lends `context` to the space."""
        ...

    def held_bytes(self) -> int:
        """Bytes of the loaded bank."""
        ...

    def host_bytes(self) -> int:
        """Bytes of the models that stay in the memory of the host."""
        ...

    def disk_bytes(self) -> int:
        """Bytes of the files that candidates are kept in while a search runs."""
        ...

    def notes(self, target: Target, model: int) -> tuple[str, ...]:
        """Lines of a plan, for devices that share a candidate in groups of `model`."""
        ...

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        """Load the arrays that candidates are made of on the devices. `progress` receives the bytes that were
        loaded; folder: the place of files that candidates are kept in, None: a temporary one."""
        ...

    def evaluator(self, decoder: DecoderEvaluator, bank: Any) -> CandidateEvaluator:
        """An evaluator of candidates from a bank, with the settings of `decoder`."""
        ...

    def place_bank(self, place: Place) -> Any:
        """The arrays that stay on a device, as abstract arrays that `place` makes."""
        ...

    def planned_population(self, evaluator: DecoderEvaluator, size: int, place: Place) -> Population:
        """A population that `evaluator` would score together, up to `size` of them, over abstract arrays that `place`
        makes: a search is planned with them before anything is loaded."""
        ...

    def score_stored(
        self, evaluator: DecoderEvaluator, sources: Sources, config: DecoderConfig, progress: Progress
    ) -> TaskScores:
        """Score the first of the sources, a model of the search, as it is."""
        ...

    def describe(self) -> str:
        """The content of a genome, in words."""
        ...

    def describe_work(self, evaluators: Sequence[Any]) -> str:
        """One line on how the candidates of a search were evaluated."""
        ...

    def to_recipe(self, genome: np.ndarray) -> list[dict[str, Any]]:
        """A genome as the documents of a recipe in mergekit's format, the result's last."""
        ...

    def merged_from(self, genome: np.ndarray) -> list[Path]:
        """The folders of the models that a genome's candidate is made of, the base first."""
        ...

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> WinnerReport:
        """The report of a genome's candidate. parents: their short names."""
        ...


@dataclass(frozen=True)
class MergeCandidates:
    """Merges of all sources by a method. base, parents: the references in recipes, the parents in their order."""

    space: ParameterSpace
    spec: MergeSpec
    sources: Sources
    decoder: DecoderConfig
    base: str | None
    parents: tuple[str, ...]

    baseline_role = "uniform"
    gradient_passes = 1

    @property
    def name(self) -> str:
        return self.spec.method_name

    @property
    def export_dtype(self) -> str:
        return self.spec.export_dtype

    @property
    def methods(self) -> tuple[Method, ...]:
        return (self.spec.method,)

    @property
    def is_random(self) -> bool:
        return self.spec.method.random

    def within(self, context: Any) -> "MergeCandidates":
        return self

    def held_bytes(self) -> int:
        return held_bytes(self.sources, self.decoder, self.spec)

    def host_bytes(self) -> int:
        return 0

    def disk_bytes(self) -> int:
        return 0

    def notes(self, target: Target, model: int) -> tuple[str, ...]:
        return ()

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        return load_bank(self.sources, self.decoder, self.spec, progress, devices)

    def evaluator(self, decoder: DecoderEvaluator, bank: Any) -> MergeEvaluator:
        return MergeEvaluator(decoder, bank, self.spec)

    def place_bank(self, place: Place) -> Bank:
        return abstract_bank(self.sources, self.decoder, self.spec, place)

    def planned_recipes(self, size: int) -> Recipe:
        """Recipes of a population on the host. Their values make no difference to a plan."""
        shapes = jax.eval_shape(self.space.decode, jax.ShapeDtypeStruct((size, self.space.dims), jnp.float32))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def planned_population(self, evaluator: DecoderEvaluator, size: int, place: Place) -> Population:
        return evaluator.merges(self.place_bank(place), self.spec, self.planned_recipes(size))

    def score_stored(
        self, evaluator: DecoderEvaluator, sources: Sources, config: DecoderConfig, progress: Progress
    ) -> TaskScores:
        return score_whole(evaluator, sources, config, progress)

    def describe(self) -> str:
        names = ", ".join(parameter.name for parameter in self.space.search_parameters)
        return f"{self.space.dims} parameters ({names}; {len(self.space.groups)} groups)"

    def describe_work(self, evaluators: Sequence[Any]) -> str:
        most = max((chunk for evaluator in evaluators for chunk in evaluator.evaluator.chunk_sizes.values()), default=0)
        few = {0: "no candidate", 1: "one candidate at a time"}.get(most, f"up to {most:,} candidates at a time")
        return f"each device scored {few}"

    def to_recipe(self, genome: np.ndarray) -> list[dict[str, Any]]:
        recipe = take_candidate(jax.tree.map(np.asarray, self.space.decode(genome[None])), 0)
        return [recipe_document(recipe, self.spec, self.decoder, self.base, self.parents)]

    def merged_from(self, genome: np.ndarray) -> list[Path]:
        return [folder.path for folder in self.sources.folders]

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> MergeReport:
        values = {name: np.asarray(block) for name, block in self.space.values(jnp.asarray(genome)).items()}
        return MergeReport(tuple(self.space.groups), values, tuple(parents))


@dataclass(frozen=True)
class StreamedMerges(MergeCandidates):
    """Merges of sources that stay on the host, or in their files, and come to the devices layer by layer."""

    place: BankPlace

    def held_bytes(self) -> int:
        return _bytes_on_device(self)

    @property
    def _whole_bytes(self) -> int:
        return MergeCandidates.held_bytes(self)

    def host_bytes(self) -> int:
        return self._whole_bytes if self.place == "host" else 0

    def notes(self, target: Target, model: int) -> tuple[str, ...]:
        streamed = self._whole_bytes // model
        rate = "" if math.isnan(target.link) else f", {shown_seconds(streamed / target.link)} or more by its link"
        return (
            f"bank: {shown_bytes(self._whole_bytes)} of models stay {STREAMED_FROM[self.place]}; "
            f"{shown_bytes(streamed)} come to each "
            f"device once in a generation that is scored, and once for candidates that generate together{rate}",
        )  # fmt: skip

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        load = {"host": bank_on_host, "disk": bank_in_files}[self.place]
        return load(self.sources, self.decoder, self.spec, progress, devices)

    def evaluator(self, decoder: DecoderEvaluator, bank: Any) -> StreamedEvaluator:
        return StreamedEvaluator(_beside_bank(self, decoder), bank, self.spec)

    def place_bank(self, place: Place) -> Any:
        """The parts that are on the devices together, of those in turn that take most: the leaves that embed tokens;
        two layers, one that computes and the next, beside the leaves that stay; and these with the head."""

        def place_leaf(leaf: Leaf, place: Place) -> Any:
            layout = leaf_layout(self.sources, self.decoder, self.spec, leaf)
            depth = () if leaf.stack is None else (LAYERS_AHEAD,)
            return jax.tree.map(
                lambda array: place((*depth, *array.shape[len(depth) :]), array.dtype, array.shard_axis), layout
            )

        def nbytes(leaves: Sequence[Leaf]) -> int:
            sizes = DeviceSizes(1)
            for leaf in leaves:
                place_leaf(leaf, sizes.place)
            return sizes.bank

        leaves = {leaf.name: leaf for leaf in shared_leaves(self.decoder)}
        staying = [leaf for leaf in leaves.values() if leaf.name not in (EMBEDDING, HEAD) or HEAD not in leaves]
        before = [leaf for leaf in leaves.values() if leaf.name != HEAD]
        behind = [*staying, leaves[HEAD]] if HEAD in leaves else staying
        together = max(before, [*staying, *stack_leaves(self.decoder, LAYERS)], behind, key=nbytes)
        return [place_leaf(leaf, place) for leaf in together]

    def planned_population(self, evaluator: DecoderEvaluator, size: int, place: Place) -> Population:
        bank = abstract_streamed(abstract_bank(self.sources, self.decoder, self.spec, place))
        return StreamedEvaluator(evaluator, bank, self.spec).population(self.planned_recipes(size))

    def describe_work(self, evaluators: Sequence[Any]) -> str:
        where = {"host": "the host's memory", "disk": "the models' files"}[self.place]
        nbytes = evaluators[0].bank.layer_bytes * self.decoder.layers
        return f"{self.decoder.layers} layers ({nbytes / 1e9:,.2f} GB) came from {where} once for all candidates"

    def score_stored(
        self, evaluator: DecoderEvaluator, sources: Sources, config: DecoderConfig, progress: Progress
    ) -> TaskScores:
        return score_in_files(evaluator, sources, config, progress)


@dataclass(frozen=True)
class PathCandidates:
    """Paths through the layers of all parents."""

    space: PathSpace
    spec: PathSpec
    sources: Sources
    parents: tuple[str, ...]

    baseline_role = None
    gradient_passes = 4
    methods = ()
    is_random = False

    @property
    def name(self) -> str:
        return self.spec.method_name

    @property
    def export_dtype(self) -> str:
        return self.spec.export_dtype

    def within(self, context: Any) -> "PathCandidates":
        return self

    def held_bytes(self) -> int:
        return bank_bytes(self.sources, self.spec.configs[0])

    def host_bytes(self) -> int:
        return 0

    def disk_bytes(self) -> int:
        return 0

    def notes(self, target: Target, model: int) -> tuple[str, ...]:
        return ()

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> PathBank:
        return load_path_bank(self.sources, self.spec, progress)

    def evaluator(self, decoder: DecoderEvaluator, bank: PathBank) -> PathEvaluator:
        return PathEvaluator(decoder, replace(bank, compute_dtype=decoder.compute_dtype), self.space.max_length)

    def place_bank(self, place: Place) -> StackedWeights:
        return abstract_stored(self.sources, self.spec.configs[0], "float32", place)

    def planned_population(self, evaluator: DecoderEvaluator, size: int, place: Place) -> Population:
        """One path, with the depth of the first parent."""
        return _one_model(self.sources, self.spec.configs[0], evaluator.compute_dtype, place)

    def score_stored(
        self, evaluator: DecoderEvaluator, sources: Sources, config: DecoderConfig, progress: Progress
    ) -> TaskScores:
        return score_whole(evaluator, sources, config, progress)

    def describe(self) -> str:
        return f"{self.space.dims} numbers that say which layers follow each other"

    def describe_work(self, evaluators: Sequence[PathEvaluator]) -> str:
        done = sum(evaluator.work.steps_run for evaluator in evaluators)
        asked = sum(evaluator.work.steps_requested for evaluator in evaluators)
        saved = 0.0 if not asked else 1 - done / asked
        distinct = {path for evaluator in evaluators for path in evaluator.work.paths}
        return (
            f"layer steps: {done:,} computed of {asked:,} asked for ({saved:.0%} were shared); "
            f"{len(distinct):,} distinct paths"
        )

    def to_recipe(self, genome: np.ndarray) -> list[dict[str, Any]]:
        return [path_document(self._path(genome), self.spec, self.parents)]

    def merged_from(self, genome: np.ndarray) -> list[Path]:
        return [folder.path for folder in self.sources.folders]

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> PathReport:
        return PathReport(self._path(genome), self.spec, tuple(parents))

    def _path(self, genome: np.ndarray) -> Any:
        path = self.space.decode(genome[None])[0]
        assert path is not None, "a genome without a path has no finite fitness, and is never written"
        return path


@dataclass(frozen=True)
class StreamedPaths(PathCandidates):
    """Paths through layers that stay on the host, or in their files, and come to the device when a path does."""

    place: BankPlace

    gradient_passes = 0

    def held_bytes(self) -> int:
        return _bytes_on_device(self)

    def host_bytes(self) -> int:
        return PathCandidates.held_bytes(self) if self.place == "host" else 0

    def notes(self, target: Target, model: int) -> tuple[str, ...]:
        nbytes = shown_bytes(PathCandidates.held_bytes(self))
        return (
            f"bank: {nbytes} of models stay {STREAMED_FROM[self.place]}; for each step of a path a layer comes to the "
            "device, once where paths begin alike",
        )

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        load = {"host": path_bank_on_host, "disk": path_bank_in_files}[self.place]
        return load(self.sources, self.spec, progress)

    def evaluator(self, decoder: DecoderEvaluator, bank: Any) -> StreamedPathEvaluator:
        layout = replace(bank.layout, compute_dtype=decoder.compute_dtype)
        return StreamedPathEvaluator(decoder, replace(bank, layout=layout), self.space.max_length)

    def place_bank(self, place: Place) -> Any:
        """Two layers, one that computes and the next, and one parent's leaves outside of the layers."""
        config = self.spec.configs[0]
        two = replace(
            config, layers=LAYERS_AHEAD, windows=config.windows[:LAYERS_AHEAD],
            position_kinds=config.position_kinds[:LAYERS_AHEAD],
        )  # fmt: skip
        return abstract_stored(self.sources, two, "float32", place)

    def score_stored(
        self, evaluator: DecoderEvaluator, sources: Sources, config: DecoderConfig, progress: Progress
    ) -> TaskScores:
        return score_in_files(evaluator, sources, config, progress)


@dataclass(frozen=True)
class PoolCandidates:
    """Members of a pool. has_base: whether the sources begin with a base; base: its reference in recipes; founders:
    references, by number; seed: of random methods; slots: the number of bred members that are kept between generations;
    size: that of the pool."""

    space: BreedingSpace
    sources: Sources
    decoder: DecoderConfig
    has_base: bool
    base: str | None
    founders: tuple[str, ...]
    export_dtype: str
    seed: int
    slots: int
    size: int

    name = "pool"
    baseline_role = None
    gradient_passes = 1

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.space.methods

    @property
    def is_random(self) -> bool:
        return any(method.random for method in self.space.methods)

    def _bank(self, store: MemberStore) -> PoolBank:
        return PoolBank(self.sources, self.decoder, self.has_base, self.seed, self.export_dtype, self.slots, store)

    @property
    def members_bytes(self) -> int:
        """Bytes of the bred members that are kept at a time: while a member is bred again, at most as many of its
        ancestors as the pool had members."""
        return (max(self.slots, self.size) + self.size) * self._bank(MembersOnHost()).member_bytes()

    def within(self, context: Any) -> "PoolCandidates":
        return replace(self, space=self.space.within(context))

    def held_bytes(self) -> int:
        """0: founders stay in their files, and bred members on the host."""
        return 0

    def host_bytes(self) -> int:
        return self.members_bytes

    def disk_bytes(self) -> int:
        return 0

    def notes(self, target: Target, model: int) -> tuple[str, ...]:
        return ()

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> PoolBank:
        bank = self._bank(MembersOnHost())
        bank.check_founders(progress)
        return bank

    def evaluator(self, decoder: DecoderEvaluator, bank: PoolBank) -> PoolEvaluator:
        return PoolEvaluator(decoder, bank)

    def place_bank(self, place: Place) -> StackedWeights:
        return abstract_stored(self.sources, self.decoder, "float32", place)

    def planned_population(self, evaluator: DecoderEvaluator, size: int, place: Place) -> Population:
        return _one_model(self.sources, self.decoder, evaluator.compute_dtype, place)

    def score_stored(
        self, evaluator: DecoderEvaluator, sources: Sources, config: DecoderConfig, progress: Progress
    ) -> TaskScores:
        return score_whole(evaluator, sources, config, progress)

    def describe(self) -> str:
        methods = " or ".join(method.name for method in self.space.methods)
        return f"children of two members ({methods}; {len(self.founders)} founders)"

    def describe_work(self, evaluators: Sequence[PoolEvaluator]) -> str:
        return f"{max((pool.bank.bred for pool in evaluators), default=0):,} children were bred, those again included"

    def to_recipe(self, genome: np.ndarray) -> list[dict[str, Any]]:
        member = self.space.member(np.asarray(genome, np.float32))
        return lineage_documents(member, self.decoder.layers, self.base, self.founders, self.export_dtype, self.seed)

    def merged_from(self, genome: np.ndarray) -> list[Path]:
        """The founders that a member descends from, and the base where one of its ancestors was bred with it."""
        member = self.space.member(np.asarray(genome, np.float32))
        lineage, first = member.lineage(), int(self.has_base)
        founders = {
            parent.number
            for relative in (*lineage, member)
            for parent in (relative, *relative.parents)
            if parent.is_founder
        }
        with_base = any(METHODS[relative.method].uses_base(self.has_base) for relative in lineage)
        numbers = [0] * with_base + [first + number for number in sorted(founders)]
        return [self.sources.folders[number].path for number in numbers]

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> PoolReport:
        return PoolReport(self.space.member(np.asarray(genome, np.float32)), self.decoder.layers, tuple(parents))


@dataclass(frozen=True)
class StreamedPool(PoolCandidates):
    """Members of a pool that stay in the host's memory, or in files, and whose children come to the devices layer by
    layer."""

    place: BankPlace

    def held_bytes(self) -> int:
        return _bytes_on_device(self)

    def host_bytes(self) -> int:
        """A part of all parents, and of the children that come to the devices, beside the members."""
        largest = max(part_bytes(self.decoder, self.export_dtype, part) for part in parts_of(self.decoder))
        members = self.members_bytes if self.place == "host" else 0
        return members + largest * (self.size + int(self.has_base) + LAYERS_AHEAD)

    def disk_bytes(self) -> int:
        return self.members_bytes if self.place == "disk" else 0

    def notes(self, target: Target, model: int) -> tuple[str, ...]:
        member = self._bank(MembersOnHost()).member_bytes()
        where = "in the host's memory" if self.place == "host" else "in files of the run"
        # Parents go to the device to be merged, and the child comes back before it is scored.
        moved = member * (PARENTS + int(self.has_base) + 1) + member // model
        rate = "" if math.isnan(target.link) else f", {shown_seconds(moved / target.link)} or more"
        link = f"; {shown_bytes(moved)} go over the link for each child{rate}" if target.is_accelerator else ""
        return (
            f"bank: bred members ({shown_bytes(member)} each, up to {shown_bytes(self.members_bytes)}) stay {where}, "
            f"founders {STREAMED_FROM['disk']}{link}",
        )  # fmt: skip

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> PoolBank:
        bank = self._bank(MembersOnHost())
        if self.place == "disk":
            if folder is None:
                temporary = tempfile.TemporaryDirectory(prefix="evojax-merge-members-")
                weakref.finalize(bank, temporary.cleanup)
                folder = Path(temporary.name)
            specs = {
                name: TensorSpec(tensor_shape(self.decoder, leaf), bank.dtype)
                for part in parts_of(self.decoder)
                for name, leaf, _ in part_tensors(self.decoder, part)
            }
            drawn_from = f"seed {self.seed}, {self.export_dtype}"
            bank.store = MembersInFiles(folder / f"process-{devices.process}", specs, drawn_from)
        bank.check_founders(progress)
        return bank

    def evaluator(self, decoder: DecoderEvaluator, bank: PoolBank) -> StreamedPoolEvaluator:
        return StreamedPoolEvaluator(_beside_bank(self, decoder), bank)

    def place_bank(self, place: Place) -> Any:
        """The parts of a step that are on a device together, of those in turn that take most, for the candidate that
        computes and the next."""

        def nbytes(step: Sequence[LeavesOfPart]) -> int:
            return sum(part_bytes(self.decoder, self.export_dtype, part) for part in step)

        dtype = FLOAT_DTYPES[self.export_dtype]
        return [
            place((LAYERS_AHEAD, *part_shape(self.decoder, leaf)), dtype, leaf.sharded_axis)
            for leaves, _ in max(steps_of(self.decoder), key=nbytes)
            for leaf in leaves
        ]

    def planned_population(self, evaluator: DecoderEvaluator, size: int, place: Place) -> Population:
        load = abstract_load(self.decoder, self.export_dtype, evaluator.devices)
        return member_population(evaluator, self.decoder, self.export_dtype, size, load)

    def score_stored(
        self, evaluator: DecoderEvaluator, sources: Sources, config: DecoderConfig, progress: Progress
    ) -> TaskScores:
        return score_in_files(evaluator, sources, config, progress)


def _beside_bank(candidates: Candidates, decoder: DecoderEvaluator) -> DecoderEvaluator:
    """The evaluator, with as much free memory as the arrays that stay on its devices leave."""
    sizes = DeviceSizes(decoder.devices.model)
    candidates.place_bank(sizes.place)
    return replace(decoder, free_memory=lambda: max(0, decoder.free_memory() - sizes.bank))


# The candidates whose models stay elsewhere than on the devices, by the kind of those whose models are there.
_STREAMED: dict[type, Any] = {
    MergeCandidates: StreamedMerges, PathCandidates: StreamedPaths, PoolCandidates: StreamedPool
}  # fmt: skip


def placed_at(candidates: Candidates, place: BankPlace) -> Candidates:
    """Candidates whose models are on the devices, with these at another place."""
    if place == "device":
        return candidates
    streamed: Candidates = _STREAMED[type(candidates)](**vars(candidates), place=place)
    return streamed


def is_on_devices(candidates: Candidates) -> bool:
    """Return whether the models of candidates are on the devices."""
    return type(candidates) in _STREAMED


def score_whole(evaluator: DecoderEvaluator, sources: Sources, config: DecoderConfig, progress: Progress) -> TaskScores:
    """Score the first of the sources, loaded as a whole."""
    return evaluator.stored(load_stored(sources, config, 0, evaluator.compute_dtype), progress)


def _bytes_on_device(candidates: Candidates) -> int:
    """The bytes of the arrays that stay on a device, which has a candidate to itself."""
    sizes = DeviceSizes(1)
    candidates.place_bank(sizes.place)
    return sizes.bank


def score_in_files(
    evaluator: DecoderEvaluator, sources: Sources, config: DecoderConfig, progress: Progress
) -> TaskScores:
    """Score the first of the sources as a merge of itself alone, layer by layer from its files."""
    method = METHODS["passthrough"]
    alone = replace(sources, folders=sources.folders[:1])
    spec = MergeSpec(method.name, options_from("", method, {}, False), 0, "float32")
    bank = bank_in_files(alone, config, spec, placement=evaluator.devices)
    shape = (1, config.layers, len(architecture_of(config).components), 1)
    ends = {leaf.name: {"scale": jnp.ones((1, 1), jnp.float32)} for leaf in shared_leaves(config)}
    recipe = Recipe({LAYERS: {"scale": jnp.ones(shape, jnp.float32)}}, ends)
    return StreamedEvaluator(replace(evaluator, chunk_sizes={}), bank, spec).evaluate(recipe, progress)


def _one_model(sources: Sources, config: DecoderConfig, compute_dtype: str, place: Place) -> Population:
    """A stored model as a planned population: candidates that are scored one after the other."""
    return Population(SharedModel(), abstract_stored(sources, config, compute_dtype, place), np.zeros(1))
