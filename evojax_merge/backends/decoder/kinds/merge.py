"""Merges of all sources by a method."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import Method

from evojax_merge.backends.decoder.kinds.kind import LAYERS_AHEAD, STREAMED_FROM, Candidates
from evojax_merge.backends.decoder.placements import BankPlace
from evojax_merge.checkpoints.abstract_bank import Place, abstract_bank
from evojax_merge.checkpoints.bank import (
    held_bytes,
    leaf_layout,
    load_bank,
)
from evojax_merge.checkpoints.streamed import bank_in_files, bank_on_host
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import Evaluator, PopulationEvaluator, Progress
from evojax_merge.evaluation.planned_passes import DeviceSizes
from evojax_merge.evaluation.populations import Population
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.write import recipe_document
from evojax_merge.models.architecture import (
    EMBEDDING,
    HEAD,
    LAYERS,
    Leaf,
    shared_leaves,
    stack_leaves,
)
from evojax_merge.models.bank import Bank, MergeSpec, Recipe, take_candidate
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.streamed_bank import StreamedBank
from evojax_merge.report.plan import shown_bytes, shown_seconds
from evojax_merge.report.winner import MergeReport
from evojax_merge.spaces.parameter import ParameterSpace

# By the place of the models: loads them.
LOADERS: dict[BankPlace, Any] = {"device": load_bank, "host": bank_on_host, "disk": bank_in_files}


@dataclass(frozen=True, kw_only=True)
class MergeCandidates(Candidates):
    """Merges of all sources by a method. base, parents: the references in recipes, the parents in their order."""

    space: ParameterSpace
    spec: MergeSpec
    decoder: DecoderConfig
    base: str | None
    parents: tuple[str, ...]

    baseline_role = "uniform"

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

    def describe(self) -> str:
        names = ", ".join(parameter.name for parameter in self.space.search_parameters)
        return f"{self.space.dims} parameters ({names}; {len(self.space.groups)} groups)"

    def to_recipe(self, genome: np.ndarray) -> list[dict[str, Any]]:
        recipe = take_candidate(jax.tree.map(np.asarray, self.space.decode(genome[None])), 0)
        return [recipe_document(recipe, self.spec, self.decoder, self.base, self.parents)]

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> MergeReport:
        values = {name: np.asarray(block) for name, block in self.space.values(jnp.asarray(genome)).items()}
        return MergeReport(tuple(self.space.groups), values, tuple(parents))

    def loaded_bytes(self) -> int:
        return held_bytes(self.sources, self.decoder, self.spec)

    def place_whole(self, place: Place) -> Bank:
        return abstract_bank(self.sources, self.decoder, self.spec, place)

    def place_parts(self, place: Place) -> Any:
        """The leaves that embed tokens; two layers, one that computes and the next, beside the leaves that stay; or
        these with the head."""

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

    def parts_note(self, target: Target, model: int) -> str:
        streamed = self.loaded_bytes() // model
        rate = "" if math.isnan(target.link) else f", {shown_seconds(streamed / target.link)} or more by its link"
        return (
            f"bank: {shown_bytes(self.loaded_bytes())} of models stay {STREAMED_FROM[self.placement.name]}; "
            f"{shown_bytes(streamed)} come to each "
            f"device once in a generation that is scored, and once for candidates that generate together{rate}"
        )  # fmt: skip

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        return LOADERS[self.placement.name](self.sources, self.decoder, self.spec, progress, devices)

    def evaluator(self, decoder: Evaluator, bank: Any) -> PopulationEvaluator:
        def populations(decoder: Evaluator, bank: Any, recipes: Recipe) -> list[Population]:
            return [decoder.merges(bank, self.spec, recipes)]

        return PopulationEvaluator(self.placement.beside_bank(self, decoder), bank, populations)

    def planned_population(self, evaluator: Evaluator, size: int, place: Place) -> Population:
        # The values of recipes make no difference to a plan.
        shapes = jax.eval_shape(self.space.decode, jax.ShapeDtypeStruct((size, self.space.dims), jnp.float32))
        recipes = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        bank = self.placement.abstract(self.place_whole(place))
        return evaluator.merges(bank, self.spec, recipes)

    def describe_work(self, evaluators: Sequence[PopulationEvaluator]) -> str:
        if isinstance(evaluators[0].bank, StreamedBank):
            where = {"host": "the host's memory", "disk": "the models' files"}[self.placement.name]
            nbytes = evaluators[0].bank.layer_bytes * self.decoder.layers
            return f"{self.decoder.layers} layers ({nbytes / 1e9:,.2f} GB) came from {where} once for all candidates"
        most = max((chunk for evaluator in evaluators for chunk in evaluator.evaluator.chunk_sizes.values()), default=0)
        few = {0: "no candidate", 1: "one candidate at a time"}.get(most, f"up to {most:,} candidates at a time")
        return f"each device scored {few}"
