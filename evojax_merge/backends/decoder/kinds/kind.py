"""A kind of candidates over language models: the protocol, and what kinds share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Self

import jax.numpy as jnp
import numpy as np
from merge_kernels import METHODS, Method

from evojax_merge.backends.decoder.bank_place import BankPlace
from evojax_merge.checkpoints.abstract_bank import Place, abstract_stored
from evojax_merge.checkpoints.bank import (
    load_stored,
)
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.checkpoints.streamed import bank_in_files
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import DecoderEvaluator, MergeEvaluator, Progress
from evojax_merge.evaluation.passes import SharedModel
from evojax_merge.evaluation.paths import PathEvaluator
from evojax_merge.evaluation.planned_passes import DeviceSizes
from evojax_merge.evaluation.pool import (
    PoolEvaluator,
)
from evojax_merge.evaluation.populations import Population
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.streaming import StreamedEvaluator
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.plan import options_from
from evojax_merge.models.architecture import (
    LAYERS,
    architecture_of,
    shared_leaves,
)
from evojax_merge.models.bank import MergeSpec, Recipe
from evojax_merge.models.config import DecoderConfig
from evojax_merge.report.winner import WinnerReport

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


class OnDevices(ABC):
    """Candidates whose models are on the devices, of all sources."""

    sources: Sources

    def within(self, context: Any) -> Self:
        return self

    @abstractmethod
    def whole_bytes(self) -> int:
        """Bytes of the bank, wherever it is."""
        ...

    def held_bytes(self) -> int:
        return self.whole_bytes()

    def host_bytes(self) -> int:
        return 0

    def disk_bytes(self) -> int:
        return 0

    def notes(self, target: Target, model: int) -> tuple[str, ...]:
        return ()

    def score_stored(
        self, evaluator: DecoderEvaluator, sources: Sources, config: DecoderConfig, progress: Progress
    ) -> TaskScores:
        return evaluator.stored(load_stored(sources, config, 0, evaluator.compute_dtype), progress)

    def merged_from(self, genome: np.ndarray) -> list[Path]:
        return [folder.path for folder in self.sources.folders]


class Streamed(OnDevices):
    """Candidates whose models stay on the host, or in files, and come to the devices part by part."""

    place: BankPlace

    @abstractmethod
    def place_bank(self, place: Place) -> Any: ...

    def held_bytes(self) -> int:
        """The bytes of the arrays that stay on a device, which has a candidate to itself."""
        sizes = DeviceSizes(1)
        self.place_bank(sizes.place)
        return sizes.bank

    def host_bytes(self) -> int:
        return self.whole_bytes() if self.place == "host" else 0

    def score_stored(
        self, evaluator: DecoderEvaluator, sources: Sources, config: DecoderConfig, progress: Progress
    ) -> TaskScores:
        return score_in_files(evaluator, sources, config, progress)


def beside_bank(candidates: Candidates, decoder: DecoderEvaluator) -> DecoderEvaluator:
    """The evaluator, with as much free memory as the arrays that stay on its devices leave."""
    sizes = DeviceSizes(decoder.devices.model)
    candidates.place_bank(sizes.place)
    return replace(decoder, free_memory=lambda: max(0, decoder.free_memory() - sizes.bank))


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


def one_model(sources: Sources, config: DecoderConfig, compute_dtype: str, place: Place) -> Population:
    """A stored model as a planned population: candidates that are scored one after the other."""
    return Population(SharedModel(), abstract_stored(sources, config, compute_dtype, place), np.zeros(1))
