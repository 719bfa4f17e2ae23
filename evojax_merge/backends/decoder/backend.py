"""Language models as a backend: candidates of every kind, scored by one native decoder."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.backends.backend import Adaptable, BackendFacts, CandidateFacts, Prepared
from evojax_merge.backends.decoder.kinds import kind_of
from evojax_merge.backends.decoder.kinds.kind import Candidates
from evojax_merge.backends.decoder.placements import DEVICE
from evojax_merge.backends.decoder.planner import DecoderPlanner
from evojax_merge.backends.decoder.vision import Vision
from evojax_merge.checkpoints.adapter_writer import AdapterWriter
from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.decoder_folder import decoder_of
from evojax_merge.checkpoints.derived import input_files, reference_to
from evojax_merge.checkpoints.folder import FLOAT_DTYPES
from evojax_merge.checkpoints.parents import OpenDecoder, Sources, as_decoder_of, open_sources
from evojax_merge.checkpoints.tokens import TokenizerChoice
from evojax_merge.checkpoints.writer import write_marker
from evojax_merge.config.search_config import Config
from evojax_merge.errors import InputError
from evojax_merge.evaluation.batched_tasks import (
    BatchedTask,
    batch_tasks,
    describe_batches,
    suitable_tokens,
    token_warnings,
)
from evojax_merge.evaluation.devices import ONE_DEVICE, Devices
from evojax_merge.evaluation.evaluator import Evaluator, PopulationEvaluator, Progress
from evojax_merge.evaluation.memory import available_memory
from evojax_merge.evaluation.passes import AdaptedFactory
from evojax_merge.evaluation.populations import AdaptedPopulation, Population
from evojax_merge.evaluation.samples import sample_rows
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.targets import Target, live_target
from evojax_merge.mergekit.write import dump_documents
from evojax_merge.models.adapted import LowRankLayout, spread_of, stacked_layout
from evojax_merge.models.architecture import ROUTER, architecture_of, leaves_of, stack_numbers
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.images import ImageTable
from evojax_merge.models.sources import StackedWeights
from evojax_merge.report.comparison import model_name
from evojax_merge.report.notices import log_unused_config_keys
from evojax_merge.schema.approximation import Approximation
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.successive_halving import example_lengths
from evojax_merge.system.file_system import atomic_folder
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.task import Task, about_backend


@dataclass(frozen=True)
class DecoderModels:
    """The language models of a search, by their headers.

    base, parents: their folders; references: each folder's name in recipes; sources: the models of the bank, the base
    first where the method needs one; other_modules: the model whose other modules the winner has, where text decoders
    of larger models are merged; context: the most tokens that all models take; stop: the tokens that end a generation;
    vision: the images of tasks, None where the models see none; open_decoder: takes what is merged out of a folder.
    """

    base: Path | None
    parents: tuple[Path, ...]
    references: Mapping[Path, str]
    sources: Sources
    decoder: DecoderConfig
    tokenizer: Any
    tokenizer_folder: Path
    other_modules: Path | None
    context: int
    stop: tuple[int, ...]
    vision: Vision | None = None
    open_decoder: OpenDecoder = decoder_of


@dataclass(frozen=True)
class DecoderBackend:
    """Candidates of one kind, over language models; see `Backend`."""

    config: Config
    models: DecoderModels
    candidates: Candidates
    target: Target

    @cached_property
    def facts(self) -> BackendFacts:
        candidates, models, settings = self.candidates, self.models, self.config.evaluation
        place, folders = candidates.placement, models.sources.folders
        dtypes = {stored_dtype(models.sources, i) for i in range(len(folders))} | {candidates.export_dtype}
        compute_dtype = self.target.compute_dtype(settings.compute_dtype, dtypes)
        not_adaptable = f"an adapter is trained on a model on the device (evaluation.bank: {place.name})"
        not_adaptable = "" if place == DEVICE else not_adaptable
        notes: list[str] = []
        log_unused_config_keys(folders, notes.append)
        notes += [] if models.base is None else [f"base: {reference_to(models.base)}"]
        notes += [f"parent: {reference_to(parent)}" for parent in models.parents]
        if models.other_modules is not None:
            notes.append(f"other modules: those of {reference_to(models.other_modules)}")
        # A plan for an accelerator halves batches until they fit.
        parts = () if self.target.is_accelerator else (2, 8, 32)
        return BackendFacts(
            name=candidates.name,
            space=candidates.space,
            genome=candidates.describe(),
            base=models.base,
            parents=models.parents,
            references=models.references,
            loaded=len(folders),
            stored_bytes=candidates.stored_bytes(models.decoder),
            settings=settings,
            target=self.target,
            is_random=any(method.random for method in candidates.methods),
            has_derivatives=candidates.has_derivatives,
            gradient_passes=candidates.gradient_passes,
            export_dtype=candidates.export_dtype,
            baseline_role=candidates.baseline_role,
            streamed_bytes=self._streamed_bytes(),
            not_adaptable=not_adaptable,
            not_polishable=not_adaptable or architecture_of(models.decoder).no_adapter,
            compute_dtype=compute_dtype,
            final_compute_dtype=settings.final_compute_dtype or compute_dtype,
            smaller_passes=[{"tokens_per_batch": self.tokens_per_batch // part} for part in parts],
            extensions=[*candidates.methods, architecture_of(models.decoder)],
            resolved=self._resolved(),
            notes=notes,
            warnings=models.sources.warnings,
        )

    def _streamed_bytes(self) -> int | None:
        if self.candidates.placement != DEVICE or self.candidates.places == (DEVICE.name,):
            return None
        on_host = self.candidates.placed_at("host").host_bytes()
        # A CPU's models are in the memory of the host in any case.
        has_room = self.target.is_accelerator and (self.target != live_target() or on_host <= available_memory())
        return on_host if has_room else self.candidates.placed_at("disk").host_bytes()

    # -----------------------------------------------------------------------------------------------------------
    # Before the search

    @property
    def tokens_per_batch(self) -> int:
        return self.config.evaluation.tokens_per_batch or suitable_tokens(self.target)

    def check(self, where: str, task: Any) -> None:
        lacking = [name for name in ("requests", "score") if not hasattr(task, name)]
        if lacking:
            raise InputError(
                where, f"{task.name}: {about_backend(task, lacking[0])}; take another kind of task, or the backend "
                "that it is for",
            )  # fmt: skip

    def example_lengths(self, task: Task) -> np.ndarray:
        return example_lengths(task, self.models.tokenizer, self.models.context)

    def prepare(self, splits: Splits[list[Task]]) -> Prepared:
        """The batches of the tasks on each split. Batches of all shards have the same shapes. Raises InputError where
        the strategy follows gradients that the candidates do not have."""
        if splits.minibatches and not self.candidates.gradient_passes:
            raise InputError(*self.candidates.no_gradient)
        scored = [*splits.shards, splits.search, *([] if splits.validation is None else [splits.validation])]
        *searched, held = self._batch([*scored, splits.heldout])
        searched = list(map(_weighted, searched))
        validation = None if splits.validation is None else searched.pop()
        *shards, search = searched
        choice = None
        if splits.choice is not None:
            # In batches like those of the shards, with room for any chosen examples.
            weighted = [[task for task in tasks if task.weight > 0] for tasks in splits.shards]
            *_, everything = self._batch([*weighted, splits.choice])
            choice = [batched_task.for_any_examples() for batched_task in everything]
        minibatches = self._batch(splits.minibatches) if splits.minibatches else []
        tuning = self._batch(splits.tuning) if splits.tuning else []
        batches = describe_batches([batched_task for shard in shards for batched_task in shard])
        read = [*search, *(validation or []), *held]
        warnings = token_warnings(read, self.models.tokenizer, self.models.decoder.vocab)
        return Prepared(shards, search, validation, held, minibatches, choice, tuning, [batches], warnings)

    def _batch(self, splits: Sequence[Sequence[Task]]) -> list[list[BatchedTask]]:
        models, decoder = self.models, self.models.decoder
        return batch_tasks(
            splits, models.tokenizer, self.tokens_per_batch, models.context, models.stop, decoder.vocab,
            decoder.position_switch, self.target.merge_tokens,
        )  # fmt: skip

    def _resolved(self) -> dict[str, Any]:
        models, config = self.models, self.config
        base = None if models.base is None else reference_to(models.base)
        parents = list(map(reference_to, models.parents))
        document: dict[str, Any] = {"base": base, "parents": parents, "space": None}
        document |= kind_of(config).resolved(config, base, parents)
        if config.tokenizer_source not in (None, "base"):
            document["tokenizer_source"] = self._tokenizer_source(reference_to(models.tokenizer_folder))
        if models.other_modules is not None and config.other_modules not in (None, "base"):
            document["other_modules"] = reference_to(models.other_modules)
        if self.calibration is not None:
            document["calibration"] = self.calibration
        return document

    @property
    def calibration(self) -> dict[str, Any] | None:
        """The config's section, with its files by their absolute paths; None where no method looks at prompts."""
        section, moments = self.config.calibration, self.models.sources.moments
        if section is None or moments is None:
            return None
        files = list(map(str, moments.files))
        return section.model_dump(mode="json") | {"file": files[0] if isinstance(section.file, str) else files}

    def files(self) -> set[Path]:
        images = set() if self.models.vision is None else self.models.vision.files
        prompts = set() if self.models.sources.moments is None else {*self.models.sources.moments.files}
        return images | prompts | {file for _, folder in self.facts.compared for file in input_files(folder)}

    # -----------------------------------------------------------------------------------------------------------
    # The cost

    def abstract_images(self, dtype: str, place: Callable[..., Any]) -> ImageTable | None:
        """The tasks' images as abstract arrays, which `place` makes; None where there are none."""
        vision = self.models.vision
        decoder = self.models.decoder
        width = decoder.hidden if decoder.projector is None else decoder.projector.width
        return None if vision is None else vision.abstract_table(width, dtype, place)

    def planner(self) -> DecoderPlanner:
        return DecoderPlanner(self)

    # -----------------------------------------------------------------------------------------------------------
    # The search

    def load(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        return self.candidates.load_bank(devices, progress, folder)

    def evaluators(
        self,
        bank: Any,
        prepared: Splits[list[BatchedTask]],
        population: int,
        devices: Devices,
        log: Callable[[str], None],
    ) -> Splits[SpaceEvaluator[Any]]:
        prepared_images = None if self.models.vision is None else self.models.vision.prepare()
        if prepared_images is not None:
            log(prepared_images)
        facts, config = self.facts, self.candidates.run_as(self.models.decoder)
        # Batches of all splits have the same shapes, so a chunk that fits one split in a dtype fits all of them.
        chunk_sizes: dict[str, dict[Any, int]] = {facts.compute_dtype: {}, facts.final_compute_dtype: {}}

        def evaluator(dtype: str, tasks: list[BatchedTask]) -> SpaceEvaluator[Any]:
            decoder = Evaluator(
                config, self.models.tokenizer, tasks, dtype, facts.settings.chunk, devices, log, chunk_sizes[dtype],
                target=self.target, images=self._images(None, dtype, devices),
            )  # fmt: skip
            return SpaceEvaluator(facts.space, self.candidates.evaluator(decoder, bank), devices)

        return prepared.map(partial(evaluator, facts.compute_dtype), partial(evaluator, facts.final_compute_dtype))

    def _images(self, model: Path | None, dtype: str, devices: Devices) -> ImageTable | None:
        """The tasks' images in front of candidates (None) or of a stored model; None where there are none."""
        return None if self.models.vision is None else self.models.vision.table(model, dtype, devices.put)

    def describe_work(self, evaluators: Sequence[SpaceEvaluator[Any]]) -> str:
        return self.candidates.describe_work([evaluator.evaluator for evaluator in evaluators])

    def within(self, context: Any) -> "DecoderBackend":
        return self if context is None else replace(self, candidates=self.candidates.within(context))

    # -----------------------------------------------------------------------------------------------------------
    # The winner

    def score_stored(self, model: Path, heldout: SpaceEvaluator[Any], progress: Progress) -> TaskScores:
        sources, config = self._open_stored(model)
        evaluator = self._evaluator_of(model, config, heldout)
        return self.candidates.placement.score_stored(evaluator, sources, config, progress)

    def _open_stored(self, model: Path) -> tuple[Sources, DecoderConfig]:
        """The sources of one of the compared models, with the vocabulary of the candidates, and its config."""
        folders = [model]
        choice: TokenizerChoice | None = None
        if self.models.sources.vocabulary is not None:
            folders.append(self.models.tokenizer_folder)
            choice = TokenizerChoice(1, approximation=self._approximation)
        sources, config = open_sources(folders, choice, self.models.open_decoder)
        if self.models.other_modules is not None and not sources.folders[0].is_part:
            # A text model takes images as the decoder that it merges into does.
            config = as_decoder_of(config, self.models.decoder)
        return sources, config

    def _evaluator_of(self, model: Path, config: DecoderConfig, like: SpaceEvaluator[Any]) -> Evaluator:
        """The evaluator of a stored model on the examples of an evaluator of genomes."""
        candidates: Evaluator = like.evaluator.evaluator
        images = self._images(model, candidates.compute_dtype, candidates.devices)
        return replace(candidates, config=config, images=images)

    def adaptable(
        self, candidate: Path | np.ndarray, like: Sequence[SpaceEvaluator[Any]], rank: int, scale: float
    ) -> Adaptable:
        if isinstance(candidate, np.ndarray):
            # A file is the one form that merges, layer paths and members share.
            with tempfile.TemporaryDirectory(prefix="evojax-merge-winner-") as folder:
                model = Path(folder) / "model"
                self.export(self._recipe(candidate), candidate, model, "", lambda: None)
                return self._adaptable(model, like, rank, scale)
        return self._adaptable(candidate, like, rank, scale)

    def _adaptable(self, model: Path, like: Sequence[SpaceEvaluator[Any]], rank: int, scale: float) -> Adaptable:
        sources, config = self._open_stored(model)
        evaluators, stored = [], load_stored(sources, config)
        # Other parameters are no modules that an adapter has a place for.
        linear = {
            f"{leaf.stack}/{leaf.name}"
            for leaf in leaves_of(config)
            if leaf.component != ROUTER and leaf.tensor.endswith(".weight")
        }
        layout, chunk_sizes = stacked_layout(stored, linear, rank, scale), dict[str, dict[Any, int]]()

        def changes(evaluator: Evaluator, model: StackedWeights, vectors: np.ndarray) -> list[Population]:
            model = replace(model, compute_dtype=evaluator.compute_dtype)
            return [AdaptedPopulation(AdaptedFactory(layout.of_dims(vectors.shape[1])), model, vectors)]

        for split in like:
            evaluator = self._evaluator_of(model, config, split)
            # Every group of devices would compute the same.
            sizes = chunk_sizes.setdefault(evaluator.compute_dtype, {})
            alone = replace(evaluator, devices=ONE_DEVICE, chunk_sizes=sizes, lookup_corpus={})
            evaluators.append(PopulationEvaluator(alone, stored, changes))
        export = partial(self._export_change, layout)
        return Adaptable(layout, spread_of(layout, stored), evaluators, export=export)

    def _export_change(
        self, layout: LowRankLayout, model: Path, vector: np.ndarray, out: Path, check: Callable[[], None]
    ) -> None:
        """Write a low-rank change of the exported winner `model` as the adapter `out`."""
        sources, config = self._open_stored(model)
        base, stacks = sources.folders[0], stack_numbers(config)
        leaves = {f"{leaf.stack}/{leaf.name}": leaf for leaf in leaves_of(config)}
        factors = {
            base.in_memory(leaves[name].tensor_of(layer)): (leaves[name], a[row], layout.scale * b[row])
            for name, (a, b) in layout.split(vector).items()
            for row, layer in enumerate(stacks[name.split("/")[0]])
        }
        transposed, most = any(leaf.transposed for leaf in leaves.values()), (len(factors), max(map(len, factors)))
        with atomic_folder(out, overwrite=True, check=check) as folder:
            with AdapterWriter(folder, str(model), fan_in_fan_out=transposed, most=most) as writer:
                for name, (leaf, a, b) in factors.items():
                    writer.add_factors(name, *((b.T, a.T) if leaf.transposed else (a, b)))
            write_marker(folder)

    def answers(
        self, model: str, candidate: Path | np.ndarray, heldout: SpaceEvaluator[Any], scores: TaskScores, number: int
    ) -> list[dict[str, Any]]:
        return sample_rows(model, heldout.evaluator.evaluator.batched_tasks, scores, number)

    def describe(self, genome: np.ndarray) -> CandidateFacts:
        candidates, parents = self.candidates, list(map(model_name, self.models.parents))
        return CandidateFacts(self._recipe(genome), candidates.merged_from(genome), candidates.report(genome, parents))

    def _recipe(self, genome: np.ndarray) -> str:
        documents = self.candidates.to_recipe(genome)
        if self.models.sources.vocabulary is not None:
            documents = list(map(self._with_tokenizer, documents))
        if self.models.other_modules is not None:
            named = self.models.references[self.models.other_modules]
            documents = [document | {"other_modules": named} for document in documents]
        if self.config.components:
            documents = [document | {"components": dict(self.config.components)} for document in documents]
        if self.calibration is not None:
            documents = [document | {"calibration": self.calibration} for document in documents]
        return dump_documents(documents)

    def _with_tokenizer(self, document: dict[str, Any]) -> dict[str, Any]:
        """A document of a recipe with the source of its merge's tokenizer."""
        source = self.models.references[self.models.tokenizer_folder]
        document = document | {"tokenizer_source": self._tokenizer_source(source)}
        if self.models.tokenizer_folder == self.models.base:
            # The recipe of a method that takes no base lacks it, but needs it for the tokenizer.
            document = {"merge_method": document["merge_method"], "base_model": source} | document
        return document

    @property
    def _approximation(self) -> Approximation | None:
        source = self.config.tokenizer_source
        return source if isinstance(source, Approximation) else None

    def _tokenizer_source(self, reference: str) -> str | dict[str, Any]:
        """The config's tokenizer_source, with another reference to the same model."""
        how = self._approximation
        return reference if how is None else {**how.model_dump(), "of": reference}

    def export(
        self, recipe: str, genome: np.ndarray, out: Path, card: str, check: Callable[[], None]
    ) -> list[dict[str, Any]]:
        return self.candidates.export(recipe, out, card, check)


def stored_dtype(sources: Sources, number: int) -> str:
    """The dtype of a source's weights, by its embedding; float32 where that is no dtype that a model is written in."""
    dtype = sources.entry(number, sources.token_tensors.embedding).dtype
    return next((name for name, float_dtype in FLOAT_DTYPES.items() if float_dtype == dtype), "float32")


def _weighted(batched_tasks: list[BatchedTask]) -> list[BatchedTask]:
    """The batches of tasks that are part of the fitness: a task of weight 0 is only shown in the held-out table."""
    return [batched_task for batched_task in batched_tasks if batched_task.task.weight > 0]
