"""Paths through the layers of all parents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from merge_kernels import Method

from evojax_merge.backends.decoder.kinds.kind import LAYERS_AHEAD, MergedCandidates, OpenedParents, one_model
from evojax_merge.backends.decoder.placements import DEVICE, Streamed
from evojax_merge.checkpoints.abstract_bank import Place, abstract_stored
from evojax_merge.checkpoints.bank import bank_bytes
from evojax_merge.config.search_config import MAX_PATH_LAYERS, Config, DataFlowConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import Evaluator, Progress
from evojax_merge.evaluation.paths import PathEvaluator
from evojax_merge.evaluation.populations import Population
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.write import path_document
from evojax_merge.models.architecture import architecture_of, types_of_layers
from evojax_merge.models.paths import PathSpec
from evojax_merge.models.sources import StackedWeights
from evojax_merge.report.plan import shown_bytes
from evojax_merge.report.winner import PathReport
from evojax_merge.spaces.layer_path import IndicatorSpace, MoveSpace, PathSpace, ScaleBounds

# A base takes part by the method alone.
TAKES_BASE = False
MERGES_RECIPES = True
# Genes have no names.
named_space = None


@dataclass(frozen=True, kw_only=True)
class PathCandidates(MergedCandidates):
    """Paths through the layers of all parents."""

    space: PathSpace
    spec: PathSpec
    parents: tuple[str, ...]

    # Which layers a path takes has none.
    has_derivatives = False
    no_gradient = (
        "evaluation.bank", "layer paths whose layers are not on the device have no gradients; take bank: device, or a "
        "strategy without gradients, such as cma_es",
    )  # fmt: skip

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

    def config_sources(self) -> list[int]:
        return sorted({0, self.space.embedding_parent})

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

    def parts_note(self, placement: Streamed, target: Target, model: int) -> str:
        return (
            f"bank: {shown_bytes(self.loaded_bytes())} of models stay {placement.where}; for each "
            "step of a path a layer comes to the device, once where paths begin alike"
        )

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        return self.placement.load_paths(self.sources, self.spec, progress)

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


def methods_of(where: str, config: Config) -> tuple[Method, ...]:
    return ()


def resolved(config: Config, base: str | None, parents: Sequence[str]) -> dict[str, Any]:
    return {}


def open_candidates(opened: OpenedParents) -> PathCandidates:
    assert opened.config.data_flow is not None
    spec = PathSpec(opened.configs, opened.export_dtype)
    space = build_path_space(f"{opened.where}: data_flow", opened.config.data_flow, spec)
    return PathCandidates(
        space=space, name=spec.method_name, export_dtype=opened.export_dtype, spec=spec, sources=opened.sources,
        parents=opened.parents,
    )  # fmt: skip


def build_path_space(where: str, config: DataFlowConfig, spec: PathSpec) -> PathSpace:
    """The data-flow space of a config. Raises InputError for an end that no parent has, or an impossible path."""
    depths = tuple(decoder.layers for decoder in spec.configs)
    if config.embedding_parent >= len(depths):
        raise InputError(
            where,
            f"embedding_parent: there is no parent {config.embedding_parent} "
            f"(they are numbered from 0 to {len(depths) - 1})",
        )
    bounds = ScaleBounds(config.scale_low, config.scale_high)
    if config.max_layers is not None and config.max_layers < depths[0]:
        raise InputError(where, f"max_layers: {config.max_layers}; the first parent has {depths[0]} layers already")
    if config.form == "moves":
        max_length = config.max_layers or 2 * depths[0]
        return MoveSpace(
            depths,
            config.moves,
            min(config.window, depths[0]),
            bounds,
            config.scales != "none",
            max_length,
            config.embedding_parent,
            partial(is_model, spec),
        )
    places = sum(depths) * config.repetitions
    if places > MAX_PATH_LAYERS:
        raise InputError(
            where,
            f"repetitions: {config.repetitions} times {sum(depths)} layers are paths of up to {places:,}; expected "
            f"{MAX_PATH_LAYERS // sum(depths)} repetitions at most, for paths of {MAX_PATH_LAYERS:,}",
        )
    max_length = config.max_layers or places
    return IndicatorSpace(
        depths, config.repetitions, config.scales or "matrix", bounds, max_length, config.embedding_parent,
        partial(is_model, spec),
    )  # fmt: skip


def is_model(spec: PathSpec, layers: Sequence[int]) -> bool:
    """Return whether a config.json can say the types of some of the parents' layers, in an order."""
    type_keys = architecture_of(spec.configs[0]).type_keys
    if type_keys is None:
        return True
    types = [name for config in spec.configs for name in types_of_layers(config)]
    try:
        type_keys([types[layer] for layer in layers])
    except ValueError:
        return False
    return True
