"""Members of a pool, which are bred."""

import math
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from merge_kernels import METHODS, Method

from evojax_merge.backends.decoder.kinds.kind import LAYERS_AHEAD, MergedCandidates, OpenedParents, one_model
from evojax_merge.backends.decoder.placements import DEVICE, DISK, Room, Streamed
from evojax_merge.checkpoints.abstract_bank import Place, abstract_stored
from evojax_merge.checkpoints.folder import FLOAT_DTYPES
from evojax_merge.checkpoints.members import MembersInFiles, MemberStore
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.checkpoints.writer import TensorSpec
from evojax_merge.config.search_config import BankPlace, Config
from evojax_merge.errors import InputError
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import Evaluator, PopulationEvaluator, Progress
from evojax_merge.evaluation.pool import (
    LeavesOfPart,
    MemberParts,
    PoolBank,
    abstract_load,
    children_by_layer,
    member_population,
    part_bytes,
    part_shape,
    part_tensors,
    parts_of,
    steps_of,
    whole_children,
)
from evojax_merge.evaluation.populations import Population
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.schema import check_parent_count
from evojax_merge.mergekit.write import lineage_documents
from evojax_merge.models.architecture import tensor_shape
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.sources import StackedWeights
from evojax_merge.report.plan import shown_bytes, shown_seconds
from evojax_merge.report.winner import PoolReport
from evojax_merge.schema.genealogy import founding_genealogy
from evojax_merge.spaces.breeding import PARENTS, BreedingSpace, genome_genes
from evojax_merge.spaces.search_parameters import find_method

# A base takes part by the method alone.
TAKES_BASE = False
MERGES_RECIPES = True
# Genes have no names.
named_space = None


@dataclass(frozen=True, kw_only=True)
class PoolCandidates(MergedCandidates):
    """Members of a pool. has_base: whether the sources begin with a base; base: its reference in recipes; founders:
    references, by number; seed: of random methods; slots: the number of bred members that are kept between generations;
    size: that of the pool."""

    space: BreedingSpace
    decoder: DecoderConfig
    has_base: bool
    base: str | None
    founders: tuple[str, ...]
    seed: int
    slots: int
    size: int

    places: ClassVar[tuple[BankPlace, ...]] = ("device", "host", "disk")

    @property
    def _in_files(self) -> bool:
        """Whether bred members are kept in files."""
        return self.placement != DEVICE and not self.placement.in_memory

    def _bank(self, store: MemberStore) -> PoolBank:
        return PoolBank(self.sources, self.decoder, self.has_base, self.seed, self.export_dtype, self.slots, store)

    @property
    def members_bytes(self) -> int:
        """Bytes of the bred members that are kept at a time: while a member is bred again, at most as many of its
        ancestors as the pool had members."""
        return (max(self.slots, self.size) + self.size) * self._bank(MemberStore()).member_bytes()

    def within(self, context: Any) -> "PoolCandidates":
        return replace(self, space=self.space.within(context))

    def describe(self) -> str:
        methods = " or ".join(method.name for method in self.space.methods)
        return f"children of two members ({methods}; {len(self.founders)} founders)"

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

    def config_sources(self) -> range:
        return range(len(self.sources.folders))

    def room(self, model_bytes: int) -> Room:
        return Room(model_bytes, self.host_bytes(), self.host_bytes())

    def loaded_bytes(self) -> int:
        """0: founders stay in their files, and bred members on the host."""
        return 0

    def host_bytes(self) -> int:
        """The members, but for those in files; where these come to the devices layer by layer, a part of all parents,
        and of the children that come, beside them."""
        members = 0 if self._in_files else self.members_bytes
        if self.placement == DEVICE:
            return members
        largest = max(part_bytes(self.decoder, self.export_dtype, part) for part in parts_of(self.decoder))
        return members + largest * (self.size + int(self.has_base) + LAYERS_AHEAD)

    def disk_bytes(self) -> int:
        return self.members_bytes if self._in_files else 0

    def place_whole(self, place: Place) -> StackedWeights:
        return abstract_stored(self.sources, self.decoder, "float32", place)

    def place_parts(self, place: Place) -> Any:
        """The largest parts of a step, for the candidate that computes and the next."""

        def nbytes(step: Sequence[LeavesOfPart]) -> int:
            return sum(part_bytes(self.decoder, self.export_dtype, part) for part in step)

        dtype = FLOAT_DTYPES[self.export_dtype]
        return [
            place((LAYERS_AHEAD, *part_shape(self.decoder, leaf)), dtype, leaf.sharded_axis)
            for leaves, _ in max(steps_of(self.decoder), key=nbytes)
            for leaf in leaves
        ]

    def parts_note(self, placement: Streamed, target: Target, model: int) -> str:
        member = self._bank(MemberStore()).member_bytes()
        where = "in files of the run" if self._in_files else placement.where
        # Parents go to the device to be merged, and the child comes back before it is scored.
        moved = member * (PARENTS + int(self.has_base) + 1) + member // model
        rate = "" if math.isnan(target.link) else f", {shown_seconds(moved / target.link)} or more"
        link = f"; {shown_bytes(moved)} go over the link for each child{rate}" if target.is_accelerator else ""
        return (
            f"bank: bred members ({shown_bytes(member)} each, up to {shown_bytes(self.members_bytes)}) stay {where}, "
            f"founders {DISK.where}{link}"
        )

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> PoolBank:
        bank = self._bank(MemberStore())
        if self._in_files:
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

    def evaluator(self, decoder: Evaluator, bank: PoolBank) -> PopulationEvaluator:
        populations = whole_children if self.placement == DEVICE else children_by_layer
        return PopulationEvaluator(self.placement.beside_bank(self, decoder), bank, populations)

    def planned_population(self, evaluator: Evaluator, size: int, place: Place) -> Population:
        if self.placement == DEVICE:
            return one_model(self.sources, self.decoder, evaluator.compute_dtype, place)
        load = abstract_load(self.decoder, self.export_dtype, evaluator.devices)
        return member_population(evaluator, MemberParts(self.decoder, self.export_dtype, load), size)

    def describe_work(self, evaluators: Sequence[PopulationEvaluator]) -> str:
        return f"{max((pool.bank.bred for pool in evaluators), default=0):,} children were bred, those again included"


def methods_of(where: str, config: Config) -> tuple[Method, ...]:
    """The methods that breed a pool's children. Raises InputError for methods that cannot, and for a pool of one
    model."""
    assert config.pool is not None
    if len(config.parents) < PARENTS:
        raise InputError(where, f"parents: 1 model; a pool breeds from {PARENTS} or more")
    if config.tokenizer_source is not None:
        raise InputError(
            where, "tokenizer_source: a pool's models share their tokens; merge each with the tokenizer first, or "
            "leave it out",
        )  # fmt: skip
    methods = []
    for i, name in enumerate(config.pool.methods):
        key = f"{where}: pool.methods[{i}]"
        method = find_method(key, name)
        if method.looks_at:
            raise InputError(key, f"{name} looks at prompts, which no child of a pool has seen; take another method")
        check_parent_count(key, method, PARENTS)
        if method.base == "required" and config.base is None:
            raise InputError(where, f"base: missing; {name} (pool.methods[{i}]) takes task vectors from a base model")
        if method in methods:
            raise InputError(key, f"{name} stands there already; expected methods that differ")
        methods.append(method)
    return tuple(methods)


def resolved(config: Config, base: str | None, parents: Sequence[str]) -> dict[str, Any]:
    return {}


def open_candidates(opened: OpenedParents) -> PoolCandidates:
    pool, decoder, names = opened.config.pool, opened.configs[0], opened.parents
    assert pool is not None
    _check_heads(opened.where, opened.sources)
    methods = methods_of(opened.where, opened.config)
    founders = founding_genealogy(len(names), genome_genes(methods, pool.split))
    size = pool.members(len(names))
    return PoolCandidates(
        space=BreedingSpace(methods, decoder.layers, pool.split, founders), name="pool", methods=methods,
        export_dtype=opened.export_dtype, sources=opened.sources, decoder=decoder, has_base=opened.has_base,
        base=opened.base if opened.has_base else None, founders=names, seed=opened.config.seed,
        slots=pool.slots or size, size=size,
    )  # fmt: skip


def _check_heads(where: str, sources: Sources) -> None:
    """Raises InputError where some of a pool's models share their head with the embedding and others do not."""
    tied = [bool(folder.config.get("tie_word_embeddings", False)) for folder in sources.folders]
    if any(tied) and not all(tied):
        paths = [sources.folders[tied.index(is_tied)].path for is_tied in (True, False)]
        raise InputError(
            where, f"parents: the head of {paths[0]} is its embedding (tie_word_embeddings), that of {paths[1]} is "
            "not; a pool breeds models that are alike in this",
        )  # fmt: skip
