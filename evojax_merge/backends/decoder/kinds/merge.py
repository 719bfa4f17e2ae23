"""Merges of all sources by a method."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import Method

from evojax_merge.backends.decoder.kinds.kind import LAYERS_AHEAD, MergedCandidates, OpenedParents
from evojax_merge.backends.decoder.placements import Streamed
from evojax_merge.checkpoints.abstract_bank import Place, abstract_bank
from evojax_merge.checkpoints.bank import LOADERS, held_bytes, leaf_layout
from evojax_merge.checkpoints.decoder_folder import PROJECTOR
from evojax_merge.checkpoints.kept_vectors import preparation_seconds
from evojax_merge.config.search_config import Config, SpaceConfig
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import Evaluator, PopulationEvaluator, Progress
from evojax_merge.evaluation.planned_passes import DeviceSizes
from evojax_merge.evaluation.populations import Population
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.schema import check_parent_count
from evojax_merge.mergekit.write import recipe_document
from evojax_merge.models.architecture import (
    EMBEDDING,
    HEAD,
    LAYERS,
    ROUTER,
    Leaf,
    architecture_of,
    components_of,
    first_of_each_type,
    leaf_tensors,
    leaves_of,
    leaves_of_layer,
    rows_of_layers,
    shared_leaves,
    stack_numbers,
    tensor_grid,
)
from evojax_merge.models.bank import Bank, MergeSpec, Recipe, take_candidate
from evojax_merge.models.config import DecoderConfig
from evojax_merge.report.plan import shown_bytes, shown_seconds
from evojax_merge.report.winner import MergeReport
from evojax_merge.spaces.parameter import ParameterSpace, component_groups
from evojax_merge.spaces.search_parameters import (
    check_active,
    find_method,
    options_of,
    parent_groups_of,
    search_parameters_of,
)
from evojax_merge.system.data_packages import cache_folder

# A base takes part by the method alone.
TAKES_BASE = False
MERGES_RECIPES = True


@dataclass(frozen=True, kw_only=True)
class MergeCandidates(MergedCandidates):
    """Merges of all sources by a method. base, parents: the references in recipes, the parents in their order."""

    space: ParameterSpace
    spec: MergeSpec
    decoder: DecoderConfig
    base: str | None
    parents: tuple[str, ...]

    baseline_role = "uniform"

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
        layers = [leaves_of_layer(self.decoder, number) for number in first_of_each_type(self.decoder).values()]
        together = max(before, behind, *([*staying, *layer] for layer in layers), key=nbytes)
        return [place_leaf(leaf, place) for leaf in together]

    def parts_note(self, placement: Streamed, target: Target, model: int) -> str:
        streamed = self.loaded_bytes() // model
        rate = "" if math.isnan(target.link) else f", {shown_seconds(streamed / target.link)} or more by its link"
        return (
            f"bank: {shown_bytes(self.loaded_bytes())} of models stay {placement.where}; "
            f"{shown_bytes(streamed)} come to each "
            f"device once in a generation that is scored, and once for candidates that generate together{rate}"
        )  # fmt: skip

    def preparation_notes(self, target: Target) -> tuple[str, ...]:
        if not self.spec.method.stores_vectors:
            return ()
        tensors = [
            (leaf, (*tensor_grid(self.decoder, leaf), *self.sources.shape(0, leaf_tensors(self.decoder, leaf)[0])))
            for leaf in leaves_of(self.decoder)
        ]
        shapes = [shape for leaf, shape in tensors if len(leaf.shape) > 1]
        workers = min(LOADERS, os.cpu_count() or 1)
        seconds = preparation_seconds(self.spec, len(self.parents), shapes, workers)
        vectors = [leaf_layout(self.sources, self.decoder, self.spec, leaf).mask_keys for leaf, _ in tensors]
        nbytes = sum(array.nbytes for array in vectors if array is not None)
        note = (
            f"{self.name}: matrices are taken apart on this machine's processor before the search, about "
            f"{shown_seconds(seconds)} the first time; {shown_bytes(nbytes)} of vectors are kept in {cache_folder()}"
        )
        if self.sources.moments is None:
            return (note,)
        held, flops = self.sources.moments.costs(self.decoder)
        return (
            f"calibration: the moments take {shown_bytes(held)} of this machine's memory, and "
            f"{shown_seconds(flops / target.float32)} or more to measure, the first time",
            note,
        )

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        return self.placement.load_merges(self.sources, self.decoder, self.spec, progress, devices)

    def evaluator(self, decoder: Evaluator, bank: Any) -> PopulationEvaluator:
        def populations(decoder: Evaluator, bank: Any, recipes: Recipe) -> list[Population]:
            return [decoder.merges(bank, self.spec, recipes)]

        return PopulationEvaluator(self.placement.beside_bank(self, decoder), bank, populations)

    def planned_population(self, evaluator: Evaluator, size: int, place: Place) -> Population:
        # The values of recipes make no difference to a plan.
        shapes = jax.eval_shape(self.space.decode, jax.ShapeDtypeStruct((size, self.space.dims), jnp.float32))
        recipes = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        bank = self.placement.abstract(self.place_whole(place), rows_of_layers(self.decoder))
        return evaluator.merges(bank, self.spec, recipes)

    def describe_work(self, evaluators: Sequence[PopulationEvaluator]) -> str:
        if isinstance(self.placement, Streamed):
            layers, nbytes = self.decoder.layers, evaluators[0].bank.layer_bytes * self.decoder.layers
            return f"{layers} layers ({nbytes / 1e9:,.2f} GB) came from {self.placement.source} once for all candidates"
        most = max((chunk for evaluator in evaluators for chunk in evaluator.evaluator.chunk_sizes.values()), default=0)
        few = {0: "no candidate", 1: "one candidate at a time"}.get(most, f"up to {most:,} candidates at a time")
        return f"each device scored {few}"


def methods_of(where: str, config: Config) -> tuple[Method, ...]:
    assert config.space is not None
    method = find_method(f"{where}: space.method", config.space.method)
    check_models(where, method, config.base is not None, len(config.parents))
    return (method,)


def open_candidates(opened: OpenedParents) -> MergeCandidates:
    config, decoder, where = opened.config, opened.configs[0], f"{opened.where}: space"
    assert config.space is not None
    method = find_method(f"{where}.method", config.space.method)
    space = build_space(where, config.space, method, config.parents, decoder)
    spec = MergeSpec(
        method.name,
        options_of(where, method, opened.has_base, config.space.normalize, config.space.rescale),
        config.seed,
        opened.export_dtype,
        tuple((name, values) for name, values in space.constants if not method.parameter(name).searched),
    )
    return MergeCandidates(
        space=space, name=method.name, methods=(method,), export_dtype=opened.export_dtype, spec=spec,
        sources=opened.sources, decoder=decoder, base=opened.base, parents=opened.parents,
    )  # fmt: skip


def resolved(config: Config, base: str | None, parents: Sequence[str]) -> dict[str, Any]:
    """The space, with absolute paths in its groups of parents."""
    assert config.space is not None
    members = {}
    for name, patterns in config.space.parent_groups.items():
        alone = parent_groups_of("space", {name: patterns}, config.parents)
        # In a chain the first parent may stand for itself and for the winner of the stage before.
        members[name] = list(dict.fromkeys(path for path, g in zip(parents, alone, strict=True) if g == 0))
    return {"space": config.space.model_copy(update={"parent_groups": members}).model_dump(mode="json")}


def named_space(where: str, config: Config, decoder: DecoderConfig) -> ParameterSpace:
    assert config.space is not None
    method = find_method(f"{where}: space.method", config.space.method)
    return build_space(f"{where}: space", config.space, method, config.parents, decoder)


def check_models(where: str, method: Method, has_base: bool, parents: int) -> None:
    """Raises InputError for a base that is missing, and for a number of parents that the method cannot merge."""
    if method.base == "required" and not has_base:
        raise InputError(where, f"base: missing; {method.name} takes task vectors from a base model")
    check_parent_count(f"{where}: parents", method, parents)


def build_space(
    where: str, config: SpaceConfig, method: Method, parents: Sequence[str], decoder: DecoderConfig
) -> ParameterSpace:
    """The parameter space of a config. parents: their names in the config. Raises InputError for unknown parameters and
    parents, and for meaningless bounds."""
    shared = [leaf.name for leaf in architecture_of(decoder).shared if leaf.component != PROJECTOR]
    components = components_of(decoder)
    named = [name.strip() for part in config.components for name in part.split("+")]
    # A router that is not named has parameters of its own, like shared leaves.
    alone = [ROUTER] if ROUTER in components and ROUTER not in named else []
    groups = component_groups([*config.components, *alone], components, shared)
    if groups is None:
        unknown = [
            f"{name!r}{did_you_mean(name, [*components, *shared])}"
            for name in named
            if name not in {*components, *shared}
        ]
        wrong = unknown[0] if unknown else str(config.components)
        raise InputError(where, f"components: {wrong}; expected each of {', '.join(components)} once (join with +)")
    parent_groups = parent_groups_of(where, config.parent_groups, parents)
    search_parameters, constants = search_parameters_of(
        where, method, len(parents), config.parameters, config.fixed, parent_groups
    )
    projector = tuple(leaf.name for leaf in shared_leaves(decoder) if leaf.component == PROJECTOR)
    groups = (*groups, projector) if projector else groups
    together = config.layers_per_group
    space = ParameterSpace(
        method=method,
        parents=len(parents),
        layers=decoder.layers,
        layers_per_group=decoder.layers if together == "all" else min(together, decoder.layers),
        names=components,
        components=groups,
        shared=tuple(leaf.name for leaf in shared_leaves(decoder)),
        search_parameters=search_parameters,
        constants=constants,
        smooth=config.smooth,
        further_stacks=tuple(
            (stack, tuple(numbers)) for stack, numbers in stack_numbers(decoder).items() if stack != LAYERS
        ),
        parent_groups=parent_groups,
        active=config.active,
    )
    check_active(where, config.active, space)
    return space
