"""A kind of candidates over language models: what a genome means, and what that needs of the models."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from merge_kernels import Method

from evojax_merge.backends.backend import BaselineRole
from evojax_merge.backends.decoder.placements import DEVICE, PLACEMENTS, OnDevices, Room, Streamed
from evojax_merge.checkpoints.abstract_bank import Place, abstract_stored
from evojax_merge.checkpoints.bank import bank_bytes
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.config.search_config import BankPlace, Config
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import Evaluator, PopulationEvaluator, Progress
from evojax_merge.evaluation.paths import PathEvaluator
from evojax_merge.evaluation.populations import Population, stored
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.account import TensorFate, account_of_search
from evojax_merge.mergekit.execute import merge_to
from evojax_merge.mergekit.stages import merge_stream, prepare_stream
from evojax_merge.mergekit.streams import parse_stream
from evojax_merge.models.config import DecoderConfig
from evojax_merge.report.account import card_section, document, summary, with_public_names
from evojax_merge.report.progress import merge_bar
from evojax_merge.report.winner import WinnerReport
from evojax_merge.schema.yaml_reader import parse_documents
from evojax_merge.system.console import say
from evojax_merge.zoo.references import resolve_reference

CandidateEvaluator = PopulationEvaluator | PathEvaluator
# Layers of a streamed bank on a device: the one that computes, and the next.
LAYERS_AHEAD = 2


@dataclass(frozen=True)
class OpenedParents:
    """The models of a search, by their headers, for the module of a kind to make its `Candidates` of. where: names the
    config in messages; sources: the models of the bank, the base first where `has_base`; configs: of the sources; base,
    parents: their references in recipes."""

    where: str
    config: Config
    sources: Sources
    configs: tuple[DecoderConfig, ...]
    export_dtype: str
    has_base: bool
    base: str | None
    parents: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Candidates(ABC):
    """A kind of candidates. `baseline_role`: see `BackendFacts`; `has_derivatives`: whether every gene has an effect
    that a gradient shows; `places`: where the models' weights may be; `no_gradient`: the key of a config, and the
    complaint, where `gradient_passes` is 0; sources: the models; placement: where their weights are."""

    sources: Sources
    placement: OnDevices = DEVICE

    baseline_role: ClassVar[BaselineRole | None] = None
    places: ClassVar[tuple[BankPlace, ...]] = tuple(PLACEMENTS)
    has_derivatives: ClassVar[bool] = True
    no_gradient: ClassVar[tuple[str, str]] = (
        "search.strategy", "its candidates have no gradients; take a strategy without them, such as cma_es"
    )  # fmt: skip

    # What a genome means. space: decodes it; name: the method or kind, in tables; methods: those that merge candidates;
    # export_dtype: the dtype that they are rounded to and written in.
    space: Any
    name: str
    methods: tuple[Method, ...] = ()
    export_dtype: str

    def preparation_notes(self, target: Target) -> tuple[str, ...]:
        """Lines of a plan about the work before the search."""
        return ()

    @property
    def gradient_passes(self) -> int:
        """The number of passes that a candidate's gradient is planned as, 0 where it has none."""
        return 1

    def within(self, context: Any) -> Self:
        """The candidates of a search whose strategy lends `context` to the space."""
        return self

    @abstractmethod
    def describe(self) -> str:
        """The content of a genome, in words."""

    @abstractmethod
    def to_recipe(self, genome: np.ndarray) -> list[dict[str, Any]]:
        """A genome as the documents of a recipe in mergekit's format, the result's last."""

    @abstractmethod
    def report(self, genome: np.ndarray, parents: Sequence[str]) -> WinnerReport:
        """The report of a genome's candidate. parents: their short names."""

    def merged_from(self, genome: np.ndarray) -> list[Path]:
        """The folders of the models that a genome's candidate is made of, the base first."""
        return [folder.path for folder in self.sources.folders]

    def config_sources(self) -> Sequence[int]:
        """The numbers of the sources of which the winner may have the generation_config.json."""
        return [0]

    def run_as(self, config: DecoderConfig) -> DecoderConfig:
        """The config of the decoder that candidates are run by. config: that of the first source."""
        return config

    @abstractmethod
    def fates(self, other_modules: Path | None) -> list[TensorFate]:
        """The fates of the models' tensors, which are named by their paths. other_modules: see `account_of_search`."""

    @abstractmethod
    def export(self, recipe: str, out: Path, card: str, check: Callable[[], None]) -> list[dict[str, Any]]:
        """Write the model of a recipe, a YAML text, to the folder `out`, and return the account of its tensors."""

    # ---- Memory

    def room(self, model_bytes: int) -> Room:
        """The bytes that a search needs, by the place of its models. model_bytes: of one model."""
        models = self.loaded_bytes()
        return Room(models + model_bytes, 0, models)

    def placed_at(self, place: BankPlace) -> Self:
        """The same candidates with the models' weights at another place."""
        return replace(self, placement=PLACEMENTS[place])

    def stored_bytes(self, config: DecoderConfig) -> int:
        """Bytes that `load_bank` reports as its progress. config: of the first source."""
        return bank_bytes(self.sources, config)

    @abstractmethod
    def loaded_bytes(self) -> int:
        """Bytes of the bank where the devices hold all of it."""

    def host_bytes(self) -> int:
        """Bytes of the models that stay in the memory of the host."""
        return self.loaded_bytes() if self.placement.in_memory else 0

    def brought_bytes(self) -> int:
        """Bytes of models that come to the devices part by part for candidates that are evaluated together."""
        return self.loaded_bytes() if isinstance(self.placement, Streamed) else 0

    def disk_bytes(self) -> int:
        """Bytes of the files that candidates are kept in while a search runs."""
        return 0

    @abstractmethod
    def place_whole(self, place: Place) -> Any:
        """The arrays of a bank that the devices hold all of, as abstract arrays that `place` makes."""

    @abstractmethod
    def place_parts(self, place: Place) -> Any:
        """The arrays of the parts of a bank that are on a device together, of those in turn that take most."""

    @abstractmethod
    def parts_note(self, placement: Streamed, target: Target, model: int) -> str:
        """A line of a plan on how parts come to devices that share a candidate in groups of `model`."""

    # ---- Evaluation

    @abstractmethod
    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        """Load the arrays that candidates are made of on the devices. `progress` receives the bytes that were
        loaded; folder: the place of files that candidates are kept in, None: a temporary one."""

    @abstractmethod
    def evaluator(self, decoder: Evaluator, bank: Any) -> CandidateEvaluator:
        """An evaluator of candidates from a bank, with the settings of `decoder`."""

    @abstractmethod
    def planned_population(self, evaluator: Evaluator, size: int, place: Place) -> Population:
        """A population that `evaluator` would score together, up to `size` of them, over abstract arrays that `place`
        makes: a search is planned with them before anything is loaded."""

    @abstractmethod
    def describe_work(self, evaluators: Sequence[Any]) -> str:
        """One line on how the candidates of a search were evaluated."""


@dataclass(frozen=True, kw_only=True)
class MergedCandidates(Candidates):
    """Candidates that `evojax-merge merge` makes of their recipes."""

    def fates(self, other_modules: Path | None) -> list[TensorFate]:
        return account_of_search(self.sources, other_modules)

    def export(self, recipe: str, out: Path, card: str, check: Callable[[], None]) -> list[dict[str, Any]]:
        # The recipe's models are named by absolute paths, so that its own place makes no difference.
        stream = parse_stream(out.parent / "recipe.yaml", parse_documents(out.parent / "recipe.yaml", recipe))
        with prepare_stream(stream, out, find=resolve_reference) as stream_plan:
            fates = with_public_names(stream_plan.account, stream_plan.paths)
            write = partial(merge_to, recipe=recipe)
            bar = partial(merge_bar, "exporting")
            card += card_section(fates)
            merge_stream(stream_plan, out, write, card=card, overwrite=True, check=check, bar=bar)
        say(summary(fates))
        return document(fates)


def one_model(sources: Sources, config: DecoderConfig, compute_dtype: str, place: Place) -> Population:
    """A stored model as a planned population: candidates that are scored one after the other."""
    return stored(abstract_stored(sources, config, compute_dtype, place), config)
