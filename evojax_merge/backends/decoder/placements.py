"""The places of a search's models: on the devices, in the host's memory, or in their files.

A kind of candidates says what its models take, loaded whole or brought to the devices part by part; a place says which
of the two happens, and what that means for memory, for stored models and for a plan's notes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
from merge_kernels import METHODS

from evojax_merge.checkpoints.abstract_bank import Place
from evojax_merge.checkpoints.bank import load_bank, load_path_bank, load_stored
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.checkpoints.streamed import bank_in_files, bank_on_host, path_bank_in_files, path_bank_on_host
from evojax_merge.config.search_config import BankPlace
from evojax_merge.errors import InputError
from evojax_merge.evaluation.evaluator import Evaluator, Progress
from evojax_merge.evaluation.memory import available_memory, format_bytes
from evojax_merge.evaluation.planned_passes import DeviceSizes
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.targets import Target, live_target
from evojax_merge.mergekit.plan import options_from
from evojax_merge.models.architecture import LAYERS, components_of, shared_leaves
from evojax_merge.models.bank import Bank, MergeSpec, Recipe
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.streamed_bank import StreamedBank, abstract_streamed

if TYPE_CHECKING:
    from evojax_merge.backends.decoder.kinds.kind import Candidates

# The share of the memory that the models and one candidate may take together where they are on the devices.
DEVICE_SHARE, HOST_SHARE = 0.9, 0.9


@dataclass(frozen=True)
class OnDevices:
    """Models are on the devices, of all sources. name: in configs; load_merges, load_paths: load the bank of these
    kinds; in_memory: whether models take the host's memory meanwhile."""

    name: BankPlace
    load_merges: Callable[..., Any]
    load_paths: Callable[..., Any]
    in_memory: bool = False

    def held_bytes(self, candidates: "Candidates") -> int:
        """Bytes of the loaded bank on a device that has a candidate to itself."""
        return candidates.loaded_bytes()

    def place_bank(self, candidates: "Candidates", place: Place) -> Any:
        """The arrays that stay on a device, as abstract arrays that `place` makes."""
        return candidates.place_whole(place)

    def abstract(self, bank: Bank, rows: Sequence[Mapping[str, int]]) -> Any:
        """A bank of abstract arrays as the place has it, for plans. rows: for each layer its row in each stack."""
        return bank

    def beside_bank(self, candidates: "Candidates", evaluator: Evaluator) -> Evaluator:
        """The evaluator, with as much free memory as the arrays that stay on its devices leave: these are loaded."""
        return evaluator

    def notes(self, candidates: "Candidates", target: Target, model: int) -> tuple[str, ...]:
        """Lines of a plan, for devices that share a candidate in groups of `model`."""
        return ()

    def score_stored(
        self, evaluator: Evaluator, sources: Sources, config: DecoderConfig, progress: Progress
    ) -> TaskScores:
        """Score the first of the sources, a model of the search, as it is."""
        return evaluator.score_stored(load_stored(sources, config, 0, evaluator.compute_dtype), progress)


@dataclass(frozen=True, kw_only=True)
class Streamed(OnDevices):
    """Models stay on the host, or in files, and come to the devices part by part. where, source: in words, where they
    stay, and what parts come from."""

    where: str
    source: str

    def held_bytes(self, candidates: "Candidates") -> int:
        sizes = DeviceSizes(1)
        candidates.place_parts(sizes.place)
        return sizes.bank

    def place_bank(self, candidates: "Candidates", place: Place) -> Any:
        return candidates.place_parts(place)

    def abstract(self, bank: Bank, rows: Sequence[Mapping[str, int]]) -> StreamedBank:
        return abstract_streamed(bank, rows)

    def beside_bank(self, candidates: "Candidates", evaluator: Evaluator) -> Evaluator:
        sizes = DeviceSizes(evaluator.devices.model)
        candidates.place_parts(sizes.place)
        return replace(evaluator, free_memory=lambda: max(0, evaluator.free_memory() - sizes.bank))

    def notes(self, candidates: "Candidates", target: Target, model: int) -> tuple[str, ...]:
        return (candidates.parts_note(self, target, model),)

    def score_stored(
        self, evaluator: Evaluator, sources: Sources, config: DecoderConfig, progress: Progress
    ) -> TaskScores:
        """A merge of the model alone, layer by layer from its files."""
        method = METHODS["passthrough"]
        alone = replace(sources, folders=sources.folders[:1], lenders=sources.folders[1:])
        spec = MergeSpec(method.name, options_from("", method, {}, False), 0, "float32")
        bank = bank_in_files(alone, config, spec, placement=evaluator.devices)
        shape = (1, config.layers, len(components_of(config)), 1)
        ends = {leaf.name: {"scale": jnp.ones((1, 1), jnp.float32)} for leaf in shared_leaves(config)}
        recipe = Recipe({LAYERS: {"scale": jnp.ones(shape, jnp.float32)}}, ends)
        evaluator = replace(evaluator, chunk_sizes={})
        return evaluator.score(evaluator.merges(bank, spec, recipe), progress)


DEVICE = OnDevices("device", load_bank, load_path_bank)
HOST = Streamed(
    "host", bank_on_host, path_bank_on_host, in_memory=True, where="in the host's memory", source="the host's memory"
)
DISK = Streamed("disk", bank_in_files, path_bank_in_files, where="in their files", source="the models' files")
PLACEMENTS = {placement.name: placement for placement in (DEVICE, HOST, DISK)}


@dataclass(frozen=True)
class Room:
    """The bytes that a search needs. on_device: of the models and one candidate, which must have room beside them to
    generate, where they are on the devices; beside: of what is in the host's memory then; on_host: where they are in
    the host's memory."""

    on_device: int
    beside: int
    on_host: int


def bank_place(where: str, setting: BankPlace | Literal["auto"], target: Target, room: Room, shards: int) -> BankPlace:
    """The place that a config's `evaluation.bank` means. shards: the number of devices that share the models. Raises
    InputError where they are to be in the memory of a host that is too small."""
    is_here, host = target == live_target(), available_memory()
    in_memory = setting != "auto" and PLACEMENTS[setting].in_memory
    needed = room.on_host if in_memory else room.beside if setting == DEVICE.name else 0
    if is_here and needed > host:
        raise InputError(
            f"{where}: evaluation.bank", f"{setting}: the models take {format_bytes(needed)} of the host's memory, and "
            f"{format_bytes(host)} are available; take disk, which leaves them in files",
        )  # fmt: skip
    if setting != "auto":
        return setting
    # A CPU's devices hold their copies in the same memory.
    copies = 1 if target.is_accelerator else target.devices_per_host
    beside = 0 if target.is_accelerator else room.beside
    has_room = not is_here or room.beside <= HOST_SHARE * host
    if has_room and room.on_device * copies + beside <= DEVICE_SHARE * target.memory * shards:
        return "device"
    if target.is_accelerator and (not is_here or room.on_host <= HOST_SHARE * host):
        return "host"
    return "disk"
