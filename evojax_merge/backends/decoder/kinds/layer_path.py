"""Paths through the layers of all parents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.backends.decoder.kinds.kind import LAYERS_AHEAD, STREAMED_FROM, Candidates, one_model
from evojax_merge.backends.decoder.placements import DEVICE, BankPlace
from evojax_merge.checkpoints.abstract_bank import Place, abstract_stored
from evojax_merge.checkpoints.bank import bank_bytes, load_path_bank
from evojax_merge.checkpoints.streamed import path_bank_in_files, path_bank_on_host
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import Evaluator, Progress
from evojax_merge.evaluation.paths import PathEvaluator
from evojax_merge.evaluation.populations import Population
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.write import path_document
from evojax_merge.models.paths import PathSpec
from evojax_merge.models.sources import StackedWeights
from evojax_merge.report.plan import shown_bytes
from evojax_merge.report.winner import PathReport
from evojax_merge.spaces.layer_path import PathSpace

# By the place of the models: loads them.
LOADERS: dict[BankPlace, Any] = {"device": load_path_bank, "host": path_bank_on_host, "disk": path_bank_in_files}


@dataclass(frozen=True, kw_only=True)
class PathCandidates(Candidates):
    """Paths through the layers of all parents."""

    space: PathSpace
    spec: PathSpec
    parents: tuple[str, ...]

    methods = ()
    is_random = False

    @property
    def name(self) -> str:
        return self.spec.method_name

    @property
    def export_dtype(self) -> str:
        return self.spec.export_dtype

    @property
    def gradient_passes(self) -> int:
        # A pass is differentiated with respect to the scales of layers that are on the device.
        return 4 if self.placement == DEVICE else 0

    def describe(self) -> str:
        return f"{self.space.dims} numbers that say which layers follow each other"

    def to_recipe(self, genome: np.ndarray) -> list[dict[str, Any]]:
        return [path_document(self._path(genome), self.spec, self.parents)]

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> PathReport:
        return PathReport(self._path(genome), self.spec, tuple(parents))

    def _path(self, genome: np.ndarray) -> Any:
        path = self.space.decode(genome[None])[0]
        assert path is not None, "a genome without a path has no finite fitness, and is never written"
        return path

    def loaded_bytes(self) -> int:
        return bank_bytes(self.sources, self.spec.configs[0])

    def place_whole(self, place: Place) -> StackedWeights:
        return abstract_stored(self.sources, self.spec.configs[0], "float32", place)

    def place_parts(self, place: Place) -> Any:
        """Two layers, one that computes and the next, and one parent's leaves outside of the layers."""
        config = self.spec.configs[0]
        two = replace(
            config, layers=LAYERS_AHEAD, windows=config.windows[:LAYERS_AHEAD],
            position_kinds=config.position_kinds[:LAYERS_AHEAD],
        )  # fmt: skip
        return abstract_stored(self.sources, two, "float32", place)

    def parts_note(self, target: Target, model: int) -> str:
        return (
            f"bank: {shown_bytes(self.loaded_bytes())} of models stay {STREAMED_FROM[self.placement.name]}; for each "
            "step of a path a layer comes to the device, once where paths begin alike"
        )

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        return LOADERS[self.placement.name](self.sources, self.spec, progress)

    def evaluator(self, decoder: Evaluator, bank: Any) -> PathEvaluator:
        decoder = self.placement.beside_bank(self, decoder)
        return PathEvaluator(decoder, bank.with_compute_dtype(decoder.compute_dtype), self.space.max_length)

    def planned_population(self, evaluator: Evaluator, size: int, place: Place) -> Population:
        """One path, with the depth of the first parent."""
        return one_model(self.sources, self.spec.configs[0], evaluator.compute_dtype, place)

    def describe_work(self, evaluators: Sequence[PathEvaluator]) -> str:
        done = sum(evaluator.work.steps_run for evaluator in evaluators)
        asked = sum(evaluator.work.steps_requested for evaluator in evaluators)
        saved = 0.0 if not asked else 1 - done / asked
        distinct = {path for evaluator in evaluators for path in evaluator.work.paths}
        return (
            f"layer steps: {done:,} computed of {asked:,} asked for ({saved:.0%} were shared); "
            f"{len(distinct):,} distinct paths"
        )
