"""Mixtures of experts out of the parents' MLPs: candidates differ in their routers, and share all other weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from merge_kernels import Method

from evojax_merge.backends.decoder.kinds.kind import Candidates, OpenedParents
from evojax_merge.backends.decoder.placements import Room, Streamed
from evojax_merge.checkpoints.abstract_bank import Place
from evojax_merge.checkpoints.folder import FLOAT_DTYPES
from evojax_merge.config.search_config import BankPlace, Config
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import Evaluator, PopulationEvaluator, Progress
from evojax_merge.evaluation.passes import SharedExpertsFactory
from evojax_merge.evaluation.populations import Population
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.account import Fate, TensorFate
from evojax_merge.mergekit.execute import merge_to
from evojax_merge.mergekit.gates import router_rows
from evojax_merge.mergekit.mixtures import RANDOM, MixturePlan, parse_mixture, plan_mixture
from evojax_merge.mergekit.write import dump_yaml
from evojax_merge.models.architecture import LAYERS, ROUTER, leaves_of, tensor_grid, tensor_shape, tensors_of
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.families.mixture import SLOTS, MixtureConfig
from evojax_merge.models.sources import StackedWeights
from evojax_merge.report.account import document, summary, with_public_names
from evojax_merge.report.progress import merge_bar
from evojax_merge.report.winner import MergeReport
from evojax_merge.schema.mixture_space import MixtureSpaceConfig
from evojax_merge.schema.yaml_reader import parse_documents
from evojax_merge.spaces.mixture import Mixtures, MixtureSpace
from evojax_merge.system.console import say
from evojax_merge.zoo.references import resolve_reference

# The base takes part in every candidate.
TAKES_BASE = True
MERGES_RECIPES = True


@dataclass(frozen=True, kw_only=True)
class MixtureCandidates(Candidates):
    """Mixtures of experts. plan: the mixture of each of the K models' MLPs once, which has all weights that candidates
    share; per_token: the number of a token's experts; experts: the names of the K models."""

    space: MixtureSpace
    plan: MixturePlan
    per_token: int
    experts: tuple[str, ...]

    baseline_role = "plain"
    has_derivatives = False
    gradient_passes = 0
    places: ClassVar[tuple[BankPlace, ...]] = ("device",)

    @cached_property
    def _decoder(self) -> MixtureConfig:
        """The decoder of a candidate: K experts, of which a router may name each at several numbers."""
        assert isinstance(self.plan.decoder, MixtureConfig)
        return replace(self.plan.decoder, experts_per_token=self.per_token)

    def run_as(self, config: DecoderConfig) -> MixtureConfig:
        return self._decoder

    def describe(self) -> str:
        return (
            f"{self.space.dims} numbers ({', '.join(self.space.searched)}; {len(self.space.groups)} groups of layers "
            f"of {self.space.slots} experts)"
        )

    def to_recipe(self, genome: np.ndarray) -> list[dict[str, Any]]:
        """The document of mergekit-moe, with `layers`."""
        mixtures = self.space.decode(np.asarray(genome)[None])
        fields = zip(mixtures.experts[0].tolist(), mixtures.scale[0].tolist(), mixtures.bias[0].tolist(), strict=True)
        layers = [{"experts": experts, "scale": scale, "bias": bias} for experts, scale, bias in fields]
        recipe = self.plan.recipe.model_dump(mode="json", exclude_defaults=True)
        return [recipe | {"experts_per_token": self.per_token, "layers": layers}]

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> MergeReport:
        values = {name: each[0] for name, each in self.space.values(np.asarray(genome)[None]).items()}
        return MergeReport(tuple(self.space.groups), values, self.experts)

    def fates(self, other_modules: Path | None) -> list[TensorFate]:
        """The fates of the models' tensors: of each expert its MLPs are taken, of the base all else."""
        # By the names of the files: a Phi-3 packs its projections.
        dense = self.sources.folders[0].decoder_config()
        mlps = {name for name, leaf, _ in tensors_of(dense) if leaf.component == "mlp" and leaf.stack}
        experts = {self.plan.models[expert.source_model] for expert in self.plan.recipe.experts}
        fates = []
        for number, folder in enumerate(self.sources.folders):
            for name in folder.entries:
                is_taken = folder.path in experts if name in mlps else number == 0
                whose = "the experts'" if name in mlps else "the base's"
                fate: Fate = "kept" if is_taken else "unused"
                reason = f"among {whose}" if is_taken else f"{whose} are taken"
                fates.append(TensorFate(str(folder.path), folder.names.in_file(name), fate, reason))
        return fates

    def export(self, recipe: str, out: Path, card: str, check: Callable[[], None]) -> list[dict[str, Any]]:
        path = out.parent / "recipe.yaml"
        (content,) = parse_documents(path, recipe)
        parsed, _ = parse_mixture(path, content)
        plan = plan_mixture(path, parsed, recipe, resolve_reference, out.parent, allow_same=True)
        # The very gates that were scored: another process's may differ in their last bits.
        plan = replace(plan, given_gates=self.plan.gates)
        with merge_bar("exporting", "", plan.nbytes) as progress:
            merge_to(plan, out, card=card, overwrite=True, check=check, progress=progress)
        folders = {str(folder.path): folder.path for folder in self.sources.folders}
        fates = with_public_names(self.fates(None), folders)
        say(summary(fates))
        return document(fates)

    # ---- Memory

    def _shared_model(self, array: Callable[[Any, tuple[int, ...], Any], Any]) -> StackedWeights:
        """The weights that candidates share; array: makes a leaf of a shape and a dtype."""
        layers: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        dtype = FLOAT_DTYPES[self.export_dtype]
        for leaf in leaves_of(self._decoder):
            if leaf.component == ROUTER:
                continue
            shape = (*tensor_grid(self._decoder, leaf), *tensor_shape(self._decoder, leaf))
            (shared if leaf.stack is None else layers)[leaf.name] = array(leaf, shape, dtype)
        return StackedWeights({LAYERS: layers}, shared)

    def room(self, model_bytes: int) -> Room:
        # A candidate that generates takes no weights of its own.
        return Room(self.loaded_bytes(), 0, self.loaded_bytes())

    def stored_bytes(self, config: DecoderConfig) -> int:
        return self.loaded_bytes()

    def loaded_bytes(self) -> int:
        return sum(row.spec.nbytes for row in self.plan.rows.values() if row.gates_of is None)

    def place_whole(self, place: Place) -> StackedWeights:
        return self._shared_model(lambda leaf, shape, dtype: place(shape, dtype, leaf.sharded_axis))

    def place_parts(self, place: Place) -> StackedWeights:
        return self.place_whole(place)

    def parts_note(self, placement: Streamed, target: Target, model: int) -> str:
        raise NotImplementedError("mixtures are on the devices")

    # ---- Evaluation

    def load_bank(self, devices: Devices, progress: Progress, folder: Path | None) -> StackedWeights:
        names: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for name, leaf, place in tensors_of(self._decoder):
            names.setdefault(leaf.name, []).append((name, place))

        def load(leaf: Any, shape: tuple[int, ...], dtype: Any) -> Any:
            values = np.empty(shape, dtype)
            for name, place in names[leaf.name]:
                values[place] = self.plan.tensor(name)
                progress(values[place].nbytes)
            return devices.put(values, leaf.sharded_axis)

        # Prompts that the tokenizer cannot read are refused before anything is scored.
        _ = self.plan.gates
        return self._shared_model(load)

    def _leaves(self, mixtures: Mixtures) -> dict[str, np.ndarray]:
        """The leaves of each candidate, as they are written."""
        routers = router_rows(self.plan.gates, mixtures.experts, mixtures.scale, mixtures.bias)
        return {"router": routers.astype(FLOAT_DTYPES[self.export_dtype]), SLOTS: mixtures.experts.astype(np.int32)}

    def _population(self, evaluator: Evaluator, model: StackedWeights, leaves: dict[str, np.ndarray]) -> Population:
        factory = SharedExpertsFactory(tuple(self._decoder.parts))
        return Population(factory, replace(model, compute_dtype=evaluator.compute_dtype), leaves)

    def evaluator(self, decoder: Evaluator, bank: StackedWeights) -> PopulationEvaluator:
        def populations(evaluator: Evaluator, model: StackedWeights, mixtures: Mixtures) -> list[Population]:
            return [self._population(evaluator, model, self._leaves(mixtures))]

        return PopulationEvaluator(decoder, bank, populations)

    def planned_population(self, evaluator: Evaluator, size: int, place: Place) -> Population:
        shape, dtype = (size, self.space.layers, self.space.slots), FLOAT_DTYPES[self.export_dtype]
        leaves = {"router": np.zeros((*shape, self._decoder.hidden), dtype), SLOTS: np.zeros(shape, np.int32)}
        return self._population(evaluator, self.place_whole(place), leaves)

    def describe_work(self, evaluators: Sequence[PopulationEvaluator]) -> str:
        return f"all candidates shared the weights of {len(self.experts)} models' MLPs"


def methods_of(where: str, config: Config) -> tuple[Method, ...]:
    """Raises InputError for settings that a mixture cannot have."""
    place = config.evaluation.bank
    for is_fault, key, what in (
        (config.tokenizer_source is not None, "tokenizer_source", "a mixture has the base's tokens; transplant the "
         "tokenizer first (transplant-tokenizer), or leave it out"),
        (place not in ("auto", *MixtureCandidates.places), "evaluation.bank", f"{place}; the weights that mixtures "
         "share are on the devices, expected device or auto"),
    ):  # fmt: skip
        if is_fault:
            raise InputError(where, f"{key}: {what}")
    return ()


def open_candidates(opened: OpenedParents) -> MixtureCandidates:
    config, section, where = opened.config, opened.config.mixture, f"{opened.where}: mixture"
    assert section is not None
    references = dict(zip(config.parents, opened.parents, strict=True))
    if config.base is not None and opened.base is not None:
        references[config.base] = opened.base
    experts = section.experts or config.parents
    _check_names(where, section, list(references), experts)
    space = build_space(section, config.parents, opened.configs[0].layers)
    if section.experts_per_token > space.slots:
        raise InputError(
            where, f"experts_per_token: {section.experts_per_token}, of {space.slots} experts in a layer; expected no "
            "more (slots: makes a layer of more)",
        )  # fmt: skip
    recipe = {
        "base_model": opened.base or opened.parents[0],
        "experts": [_expert(section, name, references[name]) for name in experts],
        "gate_mode": section.gate_mode, "gate_input": section.gate_input, "dtype": opened.export_dtype,
        "experts_per_token": min(section.experts_per_token, len(experts)), "random_seed": config.seed,
    }  # fmt: skip
    path = Path(where)
    parsed, _ = parse_mixture(path, recipe)
    plan = plan_mixture(path, parsed, dump_yaml(recipe), resolve_reference, Path(opened.where).parent, allow_same=True)
    return MixtureCandidates(
        space=space, name="mixture", export_dtype=opened.export_dtype, plan=plan, experts=tuple(experts),
        per_token=section.experts_per_token, sources=opened.sources,
    )  # fmt: skip


def build_space(section: MixtureSpaceConfig, parents: Sequence[str], layers: int) -> MixtureSpace:
    """The space of a config's mixture."""
    models, together = len(section.experts or parents), section.layers_per_group
    return MixtureSpace(
        layers, layers if together == "all" else min(together, layers), models, section.slots or models,
        tuple(section.searched), (section.scale_low, section.scale_high), section.bias,
    )  # fmt: skip


def resolved(config: Config, base: str | None, parents: Sequence[str]) -> dict[str, Any]:
    """The mixture, with absolute paths for its experts."""
    section, paths = config.mixture, dict(zip(config.parents, parents, strict=True))
    assert section is not None
    if config.base is not None and base is not None:
        paths[config.base] = base
    document = section.model_dump(mode="json")
    for key in ("positive_prompts", "negative_prompts"):
        document[key] = {paths[name]: texts for name, texts in document[key].items()}
    return {"mixture": document | {"experts": [paths[name] for name in section.experts or config.parents]}}


def named_space(where: str, config: Config, decoder: DecoderConfig) -> MixtureSpace:
    assert config.mixture is not None
    return build_space(config.mixture, config.parents, decoder.layers)


def _expert(section: MixtureSpaceConfig, name: str, reference: str) -> dict[str, Any]:
    prompts = {"positive_prompts": section.positive_prompts, "negative_prompts": section.negative_prompts}
    return {"source_model": reference} | {key: texts[name] for key, texts in prompts.items() if name in texts}


def _check_names(where: str, section: MixtureSpaceConfig, models: Sequence[str], experts: Sequence[str]) -> None:
    """Raises InputError for names of experts that are none of the models, for an expert that stands twice, and for
    prompts that are missing. models: by their names in the config."""
    twice = next((name for name in experts if list(experts).count(name) > 1), None)
    if twice is not None:
        raise InputError(where, f"experts: {twice!r} stands twice; slots makes room for an expert in more places")
    prompts = {"positive_prompts": section.positive_prompts, "negative_prompts": section.negative_prompts}
    for key, names, allowed in (
        ("experts", experts, models), *((key, list(texts), experts) for key, texts in prompts.items())
    ):  # fmt: skip
        for name in names:
            if name not in allowed:
                what = "parents, nor the base" if key == "experts" else "experts"
                raise InputError(where, f"{key}: {name!r} is none of the {what}{did_you_mean(name, allowed)}")
    lacking = [name for name in experts if not section.positive_prompts.get(name)]
    if lacking and section.gate_mode not in RANDOM:
        raise InputError(
            where, f"positive_prompts: {lacking[0]!r} has none; gate_mode {section.gate_mode} makes an expert's gates "
            "of texts that it should receive (random and uniform_random need none)",
        )  # fmt: skip
