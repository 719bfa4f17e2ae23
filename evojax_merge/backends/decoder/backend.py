"""Language models as a backend: merges, layer paths and pool members, scored by one native decoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.backends.decoder.kinds.kind import Candidates
from evojax_merge.backends.decoder.placements import DEVICE, BankPlace
from evojax_merge.backends.decoder.planner import DecoderPlanner
from evojax_merge.backends.decoder.vision import Vision
from evojax_merge.checkpoints.bank import bank_bytes
from evojax_merge.checkpoints.decoder_folder import decoder_of
from evojax_merge.checkpoints.derived import input_files, reference_to
from evojax_merge.checkpoints.folder import FLOAT_DTYPES
from evojax_merge.checkpoints.parents import OpenDecoder, Sources, as_decoder_of, open_sources
from evojax_merge.checkpoints.tokens import TokenizerChoice
from evojax_merge.config.search_config import Config, EvaluationConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.batched_tasks import (
    BatchedTask,
    batch_tasks,
    describe_batches,
    suitable_tokens,
    token_warnings,
)
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import Evaluator, Progress
from evojax_merge.evaluation.memory import available_memory
from evojax_merge.evaluation.planned_passes import DeviceSizes
from evojax_merge.evaluation.samples import sample_rows
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.targets import Target, live_target
from evojax_merge.mergekit.execute import merge_to
from evojax_merge.mergekit.stages import merge_stream, prepare_stream
from evojax_merge.mergekit.streams import parse_stream
from evojax_merge.mergekit.write import dump_documents
from evojax_merge.models.architecture import architecture_of
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.images import ImageTable
from evojax_merge.report.notices import log_unused_config_keys
from evojax_merge.report.progress import merge_bar
from evojax_merge.report.winner import WinnerReport
from evojax_merge.schema.yaml_reader import parse_documents
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.successive_halving import example_lengths
from evojax_merge.spaces.search_parameters import parent_groups_of
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.task import Task, about_backend
from evojax_merge.zoo.references import resolve_reference


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

    @property
    def name(self) -> str:
        return self.candidates.name

    @property
    def space(self) -> Any:
        return self.candidates.space

    @property
    def settings(self) -> EvaluationConfig:
        return self.config.evaluation

    @property
    def compared(self) -> list[tuple[str, Path]]:
        base = [] if self.models.base is None else [("base", self.models.base)]
        return base + [("parent", parent) for parent in self.models.parents]

    @property
    def references(self) -> Mapping[Path, str]:
        return self.models.references

    @property
    def loaded(self) -> int:
        return len(self.models.sources.folders)

    @property
    def compute_dtype(self) -> str:
        sources = self.models.sources
        dtypes = {stored_dtype(sources, i) for i in range(len(sources.folders))}
        return self.target.compute_dtype(self.settings.compute_dtype, dtypes | {self.candidates.export_dtype})

    @property
    def final_compute_dtype(self) -> str:
        return self.settings.final_compute_dtype or self.compute_dtype

    @property
    def export_dtype(self) -> str:
        return self.candidates.export_dtype

    @property
    def baseline_role(self) -> str | None:
        return self.candidates.baseline_role

    @property
    def is_random(self) -> bool:
        return self.candidates.is_random

    @property
    def has_derivatives(self) -> bool:
        return self.candidates.has_derivatives

    # -----------------------------------------------------------------------------------------------------------
    # Before the search

    @property
    def tokens_per_batch(self) -> int:
        return self.settings.tokens_per_batch or suitable_tokens(self.target)

    def check_task(self, where: str, task: Any) -> None:
        lacking = [name for name in ("requests", "score") if not hasattr(task, name)]
        if lacking:
            raise InputError(
                where, f"{task.name}: {about_backend(task, lacking[0])}; take another kind of task, or the backend "
                "that it is for",
            )  # fmt: skip

    def example_lengths(self, task: Task) -> np.ndarray:
        return example_lengths(task, self.models.tokenizer, self.models.context)

    def prepare(self, splits: Splits[list[Task]]) -> Splits[list[BatchedTask]]:
        """The batches of the tasks on each split. Batches of all shards have the same shapes. Raises InputError where
        the strategy follows gradients that the candidates do not have."""
        if splits.minibatches and not self.candidates.gradient_passes:
            raise InputError(*self.candidates.no_gradient)
        scored = [*splits.shards, splits.search, *([] if splits.validation is None else [splits.validation])]
        heldout = splits.heldout
        *searched, held = self._batch([*scored, heldout])
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
        return Splits(shards, search, validation, held, minibatches, choice)

    def _batch(self, splits: Sequence[Sequence[Task]]) -> list[list[BatchedTask]]:
        models, decoder = self.models, self.models.decoder
        return batch_tasks(
            splits, models.tokenizer, self.tokens_per_batch, models.context, models.stop, decoder.vocab,
            decoder.position_switch, self.target.merge_tokens,
        )  # fmt: skip

    def describe(self) -> str:
        return self.candidates.describe()

    def describe_inputs(self, prepared: Splits[list[BatchedTask]]) -> list[str]:
        lines: list[str] = []
        log_unused_config_keys(self.models.sources.folders, lines.append)
        lines += [f"{role}: {reference_to(model)}" for role, model in self.compared]
        if self.models.other_modules is not None:
            lines.append(f"other modules: those of {reference_to(self.models.other_modules)}")
        return [*lines, describe_batches([batched_task for shard in prepared.shards for batched_task in shard])]

    def warnings(self, prepared: Splits[list[BatchedTask]]) -> list[str]:
        examples = [*prepared.search, *(prepared.validation or []), *prepared.heldout]
        lines = token_warnings(examples, self.models.tokenizer, self.models.decoder.vocab)
        return [*self.models.sources.warnings, *lines]

    def resolved(self) -> dict[str, Any]:
        models, config = self.models, self.config
        document: dict[str, Any] = {
            "base": None if models.base is None else reference_to(models.base),
            "parents": list(map(reference_to, models.parents)),
            "space": self._resolved_space(),
        }
        if config.tokenizer_source not in (None, "base"):
            document["tokenizer_source"] = reference_to(models.tokenizer_folder)
        if models.other_modules is not None and config.other_modules not in (None, "base"):
            document["other_modules"] = reference_to(models.other_modules)
        return document

    def _resolved_space(self) -> dict[str, Any] | None:
        """The config's space: its groups of parents with absolute paths."""
        space = self.config.space
        if space is None:
            return None
        members = {}
        for name, patterns in space.parent_groups.items():
            alone = parent_groups_of("space", {name: patterns}, self.config.parents)
            # In a chain the first parent may stand for itself and for the winner of the stage before.
            members[name] = list(
                dict.fromkeys(reference_to(p) for p, g in zip(self.models.parents, alone, strict=True) if g == 0)
            )
        return space.model_copy(update={"parent_groups": members}).model_dump(mode="json")

    def files(self) -> set[Path]:
        images = set() if self.models.vision is None else self.models.vision.files
        return images | {file for _, folder in self.compared for file in input_files(folder)}

    def extensions(self) -> list[object]:
        return [*self.candidates.methods, architecture_of(self.models.decoder)]

    # -----------------------------------------------------------------------------------------------------------
    # The cost

    def stored_bytes(self) -> int:
        return bank_bytes(self.models.sources, self.models.decoder)

    def held_bytes(self) -> int:
        return self.candidates.placement.held_bytes(self.candidates)

    def device_sizes(self, shards: int) -> DeviceSizes:
        sizes = DeviceSizes(shards)
        self.candidates.placement.place_bank(self.candidates, sizes.place)
        sizes.on_host, sizes.on_disk = self.candidates.host_bytes(), self.candidates.disk_bytes()
        # Layer paths are planned as one model, but all of the parents' layers are loaded.
        sizes.bank = max(sizes.bank, self.held_bytes() // shards)
        self.abstract_images(self.compute_dtype, sizes.place)
        return sizes

    def streamed(self) -> "DecoderBackend | None":
        if self.candidates.placement != DEVICE:
            return None
        on_host = self.candidates.placed_at("host").host_bytes()
        # A CPU's models are in the memory of the host in any case.
        has_room = self.target.is_accelerator and (self.target != live_target() or on_host <= available_memory())
        place: BankPlace = "host" if has_room else "disk"
        config = self.config.model_copy(update={"evaluation": self.settings.model_copy(update={"bank": place})})
        return replace(self, candidates=self.candidates.placed_at(place), config=config)

    def abstract_images(self, dtype: str, place: Callable[..., Any]) -> ImageTable | None:
        """The tasks' images as abstract arrays, which `place` makes; None where there are none."""
        vision = self.models.vision
        decoder = self.models.decoder
        width = decoder.hidden if decoder.projector is None else decoder.projector.width
        return None if vision is None else vision.abstract_table(width, dtype, place)

    def planner(self, bank_bytes: int) -> DecoderPlanner:
        return DecoderPlanner(self, bank_bytes)

    def smaller_passes(self) -> str:
        return f"evaluation.tokens_per_batch below {self.tokens_per_batch:,}, or shorter examples"

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
        # Batches of all splits have the same shapes, so a chunk that fits one split in a dtype fits all of them.
        chunk_sizes: dict[str, dict[Any, int]] = {self.compute_dtype: {}, self.final_compute_dtype: {}}

        def evaluator_in(dtype: str) -> Callable[[list[BatchedTask]], SpaceEvaluator[Any]]:
            return partial(self._evaluator, bank, devices, log, chunk_sizes[dtype], dtype)

        return prepared.map(evaluator_in(self.compute_dtype), evaluator_in(self.final_compute_dtype))

    def evaluator(self, bank: Any, tasks: list[BatchedTask], population: int, devices: Devices) -> SpaceEvaluator[Any]:
        return self._evaluator(bank, devices, lambda text: None, {}, self.compute_dtype, tasks)

    def _evaluator(
        self, bank: Any, devices: Devices, log: Callable[[str], None], chunk_sizes: dict[Any, int], dtype: str,
        tasks: list[BatchedTask],
    ) -> SpaceEvaluator[Any]:  # fmt: skip
        decoder = Evaluator(
            self.models.decoder, self.models.tokenizer, tasks, dtype, self.settings.chunk, devices, log, chunk_sizes,
            target=self.target, images=self._images(None, dtype, devices),
        )  # fmt: skip
        return SpaceEvaluator(self.space, self.candidates.evaluator(decoder, bank), devices)

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
        aligned = self.models.sources.vocabulary is not None
        sources, config = (
            open_sources([model, self.models.tokenizer_folder], TokenizerChoice(1), self.models.open_decoder)
            if aligned
            else open_sources([model], open_decoder=self.models.open_decoder)
        )
        candidates: Evaluator = heldout.evaluator.evaluator
        images = self._images(model, candidates.compute_dtype, candidates.devices)
        if self.models.other_modules is not None and not sources.folders[0].is_part:
            # A text model takes images as the decoder that it merges into does.
            config = as_decoder_of(config, self.models.decoder)
        evaluator = replace(candidates, config=config, images=images)
        return self.candidates.placement.score_stored(evaluator, sources, config, progress)

    def answers(
        self, model: str, heldout: SpaceEvaluator[Any], scores: TaskScores, number: int
    ) -> list[dict[str, Any]]:
        return sample_rows(model, heldout.evaluator.evaluator.batched_tasks, scores, number)

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> WinnerReport:
        return self.candidates.report(genome, parents)

    def merged_from(self, genome: np.ndarray) -> list[Path]:
        return self.candidates.merged_from(genome)

    def recipe(self, genome: np.ndarray) -> str:
        documents = self.candidates.to_recipe(genome)
        if self.models.sources.vocabulary is not None:
            documents = list(map(self._with_tokenizer, documents))
        if self.models.other_modules is not None:
            named = self.references[self.models.other_modules]
            documents = [document | {"other_modules": named} for document in documents]
        if self.config.components:
            documents = [document | {"components": dict(self.config.components)} for document in documents]
        return dump_documents(documents)

    def _with_tokenizer(self, document: dict[str, Any]) -> dict[str, Any]:
        """A document of a recipe with the source of its merge's tokenizer."""
        source = self.references[self.models.tokenizer_folder]
        document = document | {"tokenizer_source": source}
        if self.models.tokenizer_folder == self.models.base:
            # The recipe of a method that takes no base lacks it, but needs it for the tokenizer.
            document = {"merge_method": document["merge_method"], "base_model": source} | document
        return document

    def export(self, recipe: str, genome: np.ndarray, out: Path, card: str, check: Callable[[], None]) -> None:
        # The recipe's models are named by absolute paths, so that its own place makes no difference.
        stream = parse_stream(out.parent / "recipe.yaml", parse_documents(out.parent / "recipe.yaml", recipe))
        with prepare_stream(stream, out, find=resolve_reference) as stream_plan:
            write = partial(merge_to, recipe=recipe)
            bar = partial(merge_bar, "exporting")
            merge_stream(stream_plan, out, write, card=card, overwrite=True, check=check, bar=bar)


def stored_dtype(sources: Sources, number: int) -> str:
    """The dtype of a source's weights, by its embedding; float32 where that is no dtype that a model is written in."""
    dtype = sources.entry(number, sources.token_tensors.embedding).dtype
    return next((name for name, float_dtype in FLOAT_DTYPES.items() if float_dtype == dtype), "float32")


def _weighted(batched_tasks: list[BatchedTask]) -> list[BatchedTask]:
    """The batches of tasks that are part of the fitness: a task of weight 0 is only shown in the held-out table."""
    return [batched_task for batched_task in batched_tasks if batched_task.task.weight > 0]
