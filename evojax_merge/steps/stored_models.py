"""Scoring stored models on tasks: the work of `evaluate`, and the checks of its output files."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from evojax_merge import plugins
from evojax_merge.backends.decoder.backend import stored_dtype
from evojax_merge.backends.decoder.opening import context_length, stop_tokens
from evojax_merge.backends.decoder.vision import seeing_tokenizer, vision_of
from evojax_merge.backends.function.opening import model_path
from evojax_merge.backends.registry import find_backend
from evojax_merge.backends.torch.opening import FACTORY as TORCH
from evojax_merge.backends.torch.opening import TorchFactory
from evojax_merge.checkpoints.bank import bank_bytes, load_stored
from evojax_merge.checkpoints.derived import ignored_revisions
from evojax_merge.checkpoints.folder import file_hash
from evojax_merge.checkpoints.parents import Sources, open_sources
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import EvaluationConfig, TaskFile
from evojax_merge.errors import InputError
from evojax_merge.evaluation.batched_tasks import batch_tasks, suitable_tokens, token_warnings
from evojax_merge.evaluation.devices import unused_memory
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.evaluation.memory import require_memory
from evojax_merge.evaluation.samples import KEYS as SAMPLE_KEYS
from evojax_merge.evaluation.samples import sample_rows
from evojax_merge.evaluation.scores import TaskScores, fitness, means, units_of
from evojax_merge.evaluation.targets import live_target
from evojax_merge.problem import read_config
from evojax_merge.report.comparison import Row, short_names
from evojax_merge.report.notices import Log, log_unused_config_keys
from evojax_merge.report.progress import passes_bar
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.search.run_folder import RunFolder, check_recorded_inputs, is_run
from evojax_merge.search.validation import validation_split
from evojax_merge.system.file_system import holds_json
from evojax_merge.tasks.opening import ignored_numbers, open_splits, open_whole_task, repeated
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.task import Task, about_backend
from evojax_merge.zoo.references import resolve_file, resolve_reference

# () -> a model's answers, as `sample_rows` has them.
Answers = Callable[[], Sequence[dict[str, Any]]]
Split = Literal["search", "validation", "heldout", "all"]

# The keys of a row of the table that `evaluate --json` writes.
TABLE_KEYS = {"model", "fitness", "scores"}


@dataclass(frozen=True)
class TaskSet:
    """The tasks of an evaluation, on the examples that are scored. `where` names them in messages."""

    where: str
    tasks: list[Task]
    settings: EvaluationConfig
    # In words, the number of scored examples of each task.
    sizes: tuple[str, ...]
    # The backend that the file names, and the folder in which the path of one begins.
    backend: str
    folder: Path


def read_tasks(path: Path, split: Split = "all") -> TaskSet:
    """The tasks of a YAML file, a task file's or a search's, on the examples of a split (see `open_tasks`)."""
    plugins.load()
    document = load_yaml(path)
    if isinstance(document, dict) and document.keys() & {"parents", "genome"}:
        config = read_config(path, [], None)
        file = TaskFile(tasks=config.tasks, evaluation=config.evaluation, backend=config.backend)
        # The last stage of a chain chooses the winner.
        validation = (config.search if config.stages is None else config.stages[-1].search).validation
        task_set = open_tasks(str(path), file, path.parent, split, config.seed, validation)
        # The files of the models of the search are not compared: they may be gone.
        files = {file for task in task_set.tasks for file in task.files}
        files |= plugins.source_files([*config.tasks, *task_set.tasks]) | plugins.files_of(config.plugins)
        inputs = config.inputs or {}
        recorded = {name: inputs[name] for name in map(str, files) if name in inputs}
        check_recorded_inputs(path, recorded, {name: file_hash(Path(name)) for name in recorded})
        return task_set
    return open_tasks(str(path), parse(path, document, TaskFile), path.parent, split)


def open_tasks(
    where: str, file: TaskFile, folder: Path, split: Split = "all", seed: int = 0, validation: float = 0.0
) -> TaskSet:
    """The tasks of a task file on the examples of a split; relative paths start in `folder`. seed: that of a search, on
    which its splits, and drawn examples, depend; validation: the share of its search split that it keeps back.

    With split `all`, a task with a second source of held-out examples is on those, and any other on all that it has.
    Raises InputError for a split that does not exist.
    """
    sections = [(f"{where}: tasks[{i}]", section) for i, section in enumerate(file.tasks)]
    if split == "all":
        tasks = [open_whole_task(place, section, folder, seed, resolve_file) for place, section in sections]
        # A second source of held-out examples is scored alone; a share of the only source is scored with all others.
        sizes = [
            f"the {task.size} held-out examples of {task.name}"
            if section.heldout_source is not None
            else f"all {task.size} examples of {task.name}, searched or not"
            for task, section in zip(tasks, file.tasks, strict=True)
        ]
    else:
        splits = [open_splits(place, section, folder, seed, resolve_file) for place, section in sections]
        tasks, words = [heldout for _, heldout in splits], "held-out"
        if split != "heldout":
            searched = [search for search, _ in splits]
            searched, validated = validation_split(f"{where}: search.validation", searched, validation, seed)
            tasks, words = searched if split == "search" else validated, split
            if not tasks:
                what = "has no validation split (search.validation); expected --split search, heldout or all"
                raise InputError(where, what)
        sizes = [f"the {task.size} {words} examples of {task.name}" for task in tasks]
    return TaskSet(where, tasks, file.evaluation, tuple(sizes), file.backend, folder)


def score_models(
    models: Sequence[str],
    task_set: TaskSet,
    log: Log,
    warn: Log,
    on_scored: Callable[[str, Answers], None] = lambda model, answers: None,
) -> list[Row]:
    """Score stored models, or runs' winners, on all examples. `on_scored` receives each model's answers."""
    tasks, settings = task_set.tasks, task_set.settings
    compared = next((task.name for task in tasks if hasattr(task, "voting") or hasattr(task, "neighbours")), None)
    if compared is not None:
        raise InputError(task_set.where, f"{compared}: compares the candidates of a search; leave it out")
    factory = find_backend(f"{task_set.where}: backend", task_set.backend, task_set.folder)
    if not isinstance(factory, TorchFactory) and any(getattr(task, "backend", None) == "torch" for task in tasks):
        factory = TORCH
    if isinstance(factory, TorchFactory):
        return _score_networks(models, factory, task_set, on_scored)
    for task in tasks:
        if not hasattr(task, "requests"):
            raise InputError(
                task_set.where, f"{task.name}: {about_backend(task, 'requests')}; evaluate scores language models and "
                "networks of backend: torch, and a search's held-out table compares other models",
            )  # fmt: skip
    paths = [_model_folder(model) for model in models]
    for line in ignored_revisions(models, Path.cwd()):
        warn(line)
    for path in paths[1:]:
        # Errors of a later model show before the first is scored.
        _open_evaluator(path, tasks, settings)
    for i, task in enumerate(tasks):
        place = f"{task_set.where}: tasks[{i}]"
        for line in ignored_numbers(place, task) + repeated(place, task):
            warn(line)
    rows, begins = [], dict[bool, str]()
    for model, path, name in zip(models, paths, short_names(models), strict=True):
        sources, evaluator = _open_evaluator(path, tasks, settings)
        begins.setdefault(bool(evaluator.tokenizer("")["input_ids"]), name)
        log_unused_config_keys(sources.folders, log)
        for line in token_warnings(evaluator.batched_tasks, evaluator.tokenizer, evaluator.config.vocab):
            warn(line)
        require_memory(path, "the model", bank_bytes(sources, evaluator.config), unused_memory())
        vision = vision_of(evaluator.tokenizer, sources.folders)
        if vision is not None:
            prepared_images = vision.prepare()
            if prepared_images is not None:
                log(prepared_images)
            evaluator.images = vision.table(None, evaluator.compute_dtype, evaluator.devices.put)
        stored = load_stored(sources, evaluator.config, 0, evaluator.compute_dtype)
        with passes_bar(f"scoring {name}", evaluator.passes(1)) as progress:
            scores = evaluator.score_stored(stored, progress)
        rows.append(_model_row(name, tasks, scores))
        on_scored(model, partial(sample_rows, model, evaluator.batched_tasks, scores))
    if len(begins) == 2:
        warn(
            f"the tokenizer of {begins[True]} begins texts with a token, and that of {begins[False]} does not: equal "
            "weights have unequal scores (a search reads all texts with the tokenizer of the base, or the first parent)"
        )
    return rows


def _score_networks(
    models: Sequence[str], factory: TorchFactory, task_set: TaskSet, on_scored: Callable[[str, Answers], None]
) -> list[Row]:  # fmt: skip
    """Score networks of torch, as `score_models`."""
    rows = []
    paths = [_model_folder(model, resolve_reference if factory.make is None else model_path) for model in models]
    for model, path, name in zip(models, paths, short_names(models), strict=True):
        backend = factory.open_stored(task_set.where, task_set.backend, path, task_set.settings, live_target())
        for task in task_set.tasks:
            backend.check(task_set.where, task)
        prepared = backend.prepare(Splits([], [], None, task_set.tasks))
        evaluator = backend.evaluators([], prepared, 1).heldout
        with passes_bar(f"scoring {name}", len(task_set.tasks)) as progress:
            scores = backend.score_stored(path, evaluator, progress)
        tasks = prepared.heldout
        rows.append(_model_row(name, tasks, scores))
        on_scored(model, partial(backend.answers, model, path, evaluator, scores, 0))
    return rows


def _model_row(name: str, tasks: Sequence[Any], scores: TaskScores) -> Row:
    return Row("model", name, float(fitness(tasks, scores)[0]), means(tasks, scores)[0], units=units_of(tasks, scores))


def score_table(models: Sequence[str], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain data, with the models by the names that were asked for."""
    return [{"model": m, "fitness": row.fitness, "scores": row.scores} for m, row in zip(models, rows, strict=True)]


def _model_folder(reference: str, find: Callable[[str, str, Path], Path] = resolve_reference) -> Path:
    """The place of a model, or of a run's winner."""
    path = find("MODELS", reference, Path.cwd())
    run = RunFolder(path)
    if (path / "config.json").exists() or not is_run(run):
        return path
    if not run.model.is_dir():
        raise InputError(
            reference,
            "is a run without a winner yet (no best/model); finish it with evojax-merge search … --resume, or write "
            "its best candidate with evojax-merge export … --best-so-far and evaluate that",
        )
    return run.model


def _open_evaluator(path: Path, tasks: list[Task], settings: EvaluationConfig) -> tuple[Sources, Evaluator]:
    """The sources of a stored model, by its headers alone, and its evaluator."""
    sources, decoder = open_sources([path])
    tokenizer = seeing_tokenizer(load_tokenizer(path), sources.folders[0])
    tokens = settings.tokens_per_batch or suitable_tokens(live_target())
    (batched_tasks,) = batch_tasks(
        [tasks], tokenizer, tokens, context_length(sources.folders, decoder.positions),
        stop_tokens(path, tokenizer), decoder.vocab, decoder.position_switch,
    )  # fmt: skip
    setting = settings.final_compute_dtype or settings.compute_dtype
    dtype = live_target().compute_dtype(setting, [stored_dtype(sources, 0)])
    return sources, Evaluator(decoder, tokenizer, batched_tasks, dtype)


def is_score_table(content: bytes) -> bool:
    """Return whether a file's content is an output of `evaluate --json`."""
    rows = json.loads(content)
    named = isinstance(rows, list) and all(isinstance(row, dict) and row.keys() == TABLE_KEYS for row in rows)
    return named and len(rows) > 0


def is_samples_file(content: bytes) -> bool:
    """Return whether a file begins like an output of `evaluate --samples`."""
    return holds_json(content.partition(b"\n")[0], SAMPLE_KEYS)
