"""Networks of torch as a backend: merges of their tensors, scored by the network as a function of them."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from evojax_merge.backends.backend import Adaptable, Prepared
from evojax_merge.backends.function.backend import FunctionBackend
from evojax_merge.backends.function.programs import Programs
from evojax_merge.backends.torch import network as networks
from evojax_merge.backends.torch.folders import label_names
from evojax_merge.backends.torch.inputs import (
    class_names,
    class_prompts,
    documents,
    embedded_texts,
    example_arrays,
    is_zero_shot,
    likelihood_arrays,
)
from evojax_merge.backends.torch.network import (
    COMPARISONS,
    LIKELIEST,
    OUTPUT,
    SCORES,
    Ask,
    EmbeddingScorer,
    FunctionScorer,
    Network,
    Scorer,
    WrittenScorer,
    class_scores,
    embeddings,
    outputs,
    ranking_scores,
    similarity_scores,
    stored_groups,
)
from evojax_merge.checkpoints.folder import open_folder
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.errors import InputError, library_errors
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.memory import available_memory
from evojax_merge.mergekit.write import group_filters
from evojax_merge.models.architecture import known_architecture
from evojax_merge.report.plan import shown_bytes
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.system.console import say, say_once
from evojax_merge.tasks.arrays import ArrayTask
from evojax_merge.tasks.entropy import EntropyTask
from evojax_merge.tasks.networks import NEGATIVE_ENTROPY, PAIRED, WRITTEN, NetworkTask
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.text import TextTask

# Examples that a network is given at a time, of one candidate.
BATCH = 32
# The examples on which a network is asked twice, and compared with its form in JAX.
PROBED = 2
# The most that outputs of a network and of its form in JAX differ by, as a share of the largest.
TOLERANCE = 1e-4
# The library of a card.
SENTENCE_TRANSFORMERS = "sentence-transformers"


@dataclass(frozen=True, kw_only=True)
class TorchBackend(FunctionBackend):
    """Merges of networks; see `Backend`. network: takes the merged tensors, by their names."""

    network: Network
    # The arrays of tasks' examples, and the tasks as arrays, by name, metric and examples.
    _arrays: dict[Any, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    _tasks: dict[Any, ArrayTask] = field(default_factory=dict, repr=False)
    # Why the network is called with each candidate instead of being traced; empty: it is traced.
    _untraced: dict[str, str] = field(default_factory=dict, repr=False)
    # What batch norms are measured on, and by what a task asks for: batches of the search's examples.
    _calibration: list[tuple[Ask, list[Any]]] = field(default_factory=list, repr=False)

    def check(self, where: str, task: Any) -> None:
        if task.metric == "negative_word_error_rate" and find_spec("jiwer") is None:
            raise InputError(where, f"metric: {task.metric} needs jiwer; pip install 'evojax-merge[speech]'")
        if not isinstance(task, NetworkTask) and getattr(task, "kind", None) != "likelihood":
            raise InputError(
                where, f"{task.name}: a {type(task).__name__} asks no network of torch; expected one of kind: "
                f"{', '.join((*SCORES, *PAIRED))}, entropy or network",
            )  # fmt: skip

    def prepare(self, splits: Splits[list[Any]]) -> Prepared:
        described = dict(self._untraced)
        as_arrays = replace(splits, tuning=[]).map(lambda tasks: [self._prepared(task) for task in tasks])
        tuning = [[self.without_measuring._prepared(task) for task in tasks] for tasks in splits.tuning]
        prepared = super().prepare(replace(as_arrays, tuning=tuning))
        if self.facts.settings.recalibrate and not self._calibration:
            self._calibration.extend(
                (self._ask(task), _batches(arrays.rows[0]["inputs"]))
                for task, arrays in zip(splits.search, prepared.search, strict=True)
            )
        if not described and self._is_native():
            say(
                f"{self.network.name} is native as well: backend: decoder merges it layer by layer as it is scored; "
                f"here every candidate is a whole model, of {shown_bytes(4 * self._parameter_count())} in float32"
            )
        for why in dict.fromkeys(self._untraced.values()):
            names = [task for task, reason in self._untraced.items() if reason == why and task not in described]
            if names:
                how = "called with one candidate at a time" if why else "a function of JAX, by torchax"
                because = f", because JAX does not trace it ({why})" if why else ""
                say_once(f"{self.network.name}: {how} ({', '.join(names)}){because}")
        untraced = next((task for tasks in prepared.minibatches for task in tasks if not task.traced), None)
        if untraced is not None:
            raise InputError(
                untraced.where, f"{untraced.name}: {self.network.name} has no gradient, because it is no function of "
                f"JAX ({self._untraced[untraced.name]}); take a strategy without gradients, such as cma_es",
            )  # fmt: skip
        return prepared

    @cached_property
    def without_measuring(self) -> "TorchBackend":
        """The backend whose batch norms stay as they are: that of changes of a stored model, whose batch norms are
        measured already."""
        if not self.facts.settings.recalibrate:
            return self
        settings = self.facts.settings.model_copy(update={"recalibrate": False})
        return replace(self, facts=replace(self.facts, settings=settings), _tasks={}, _untraced={})

    def adaptable(
        self, candidate: Path | np.ndarray, like: Sequence[SpaceEvaluator[Any]], rank: int, scale: float
    ) -> Adaptable:
        return FunctionBackend.adaptable(self.without_measuring, candidate, like, rank, scale)

    def _is_native(self) -> bool:
        """Return whether backend: decoder opens the models as well."""
        config = self.models[0] / "config.json"
        if not config.is_file():
            return False
        return known_architecture(read_json_object(config, missing={}).get("model_type")) is not None

    def _parameter_count(self) -> int:
        """The number of parameters of a candidate that are merged."""
        return sum(leaf.sources[0].size for leaf in self.merge.tree.leaves if leaf.merged)

    def programs(self, population: int, devices: Devices) -> Programs:
        programs = super().programs(population, devices)
        programs.finish = self.finished
        if not self.facts.target.is_accelerator:
            # A quarter of the memory, with candidates in float32.
            most = max(1, available_memory() // (16 * self._parameter_count()))
            programs.workers = min(torch.get_num_threads(), most)
            programs.together = partial(on_cores, workers=programs.workers)
        return programs

    def finished(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """A candidate of a merge: with its batch norms measured anew, where the config says so."""
        if not self.facts.settings.recalibrate:
            return weights
        if not self._calibration:
            raise InputError(
                "evaluation.recalibrate", "batch norms are measured on the search's examples, which are not open; "
                "evojax-merge export writes a run's candidates",
            )  # fmt: skip
        for ask, batches in self._calibration:
            weights = self.network.measured(weights, batches, ask)
        return weights

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The kernel of a convolution `[out, in, …]` is a matrix of what it multiplies at a place."""
        return (shape[0], prod(shape[1:]))

    def filters(self) -> Sequence[tuple[str, int]]:
        named = self.merge.merged_groups
        if self.library == SENTENCE_TRANSFORMERS:
            # The folder's file is that of the first module, the transformer, by the names that its tensors have there.
            stored = open_folder(self.models[0]).entries
            ends = [(name.split("."), group) for name, group in named]
            named = [
                (text, group)
                for parts, group in ends
                for begin in range(len(parts))
                if (text := ".".join(parts[begin:])) in stored
            ]
        else:
            named = stored_groups(self.network.module, named)
        return group_filters([name for name, _ in named], [group for _, group in named])

    def merged(self, genome: np.ndarray) -> Any:
        return self.finished(super().merged(genome))

    def chunk(self, population: int) -> int:
        """The candidates that fit together into a quarter of the memory that an accelerator has beside the bank."""
        count = super().chunk(population)
        if self.facts.settings.chunk is not None or not self.facts.target.is_accelerator:
            return count
        room = (self.facts.target.memory - self.held_bytes()) // 4
        return max(1, min(count, int(room // (4 * self._parameter_count()))))

    def _prepared(self, task: Any) -> ArrayTask:
        """A task as arrays. The examples of networks' tasks are prepared once for all splits."""
        folder = self.models[0]
        if isinstance(task, TextTask | EntropyTask):
            arrays, where = likelihood_arrays(task, self.network, folder), f"task {task.name}"
            return self._array_task(task, arrays, where)
        key = (task.name, task.metric, id(task.examples))
        if key not in self._tasks:
            if key not in self._arrays:
                self._arrays[key] = example_arrays(task, self.network, folder)
            self._tasks[key] = self._array_task(task, self._arrays[key], task.section)
        return self._tasks[key].subset(task.indices)

    def _array_task(self, task: Any, examples: Mapping[str, Any], where: str) -> ArrayTask:
        if task.name not in self._untraced:
            self._untraced[task.name] = self._why_untraced(task, examples, where)
        traced = not self._untraced[task.name]
        numbers = range(len(examples["target"]))
        scorer: Any = self._scorer(task, traced)
        examples_of = task.examples if isinstance(task, NetworkTask) else ()
        images = [example.inputs.get("image") for example in examples_of]
        whole = replace(task, indices=tuple(numbers)) if examples_of else task
        prompts, targets = (tuple(map(words, numbers)) for words in (whole.prompt, whole.target))
        answer = scorer.written if task.metric in WRITTEN else None
        if task.kind == "classification" and getattr(task, "function", None) is None:
            labels = self._labels(task)
            likeliest = self._scorer(replace(task, metric=LIKELIEST), traced)
            answer = partial(_named_labels, jax.jit(likeliest) if traced else likeliest, labels)
            if task.metric != NEGATIVE_ENTROPY:
                targets = tuple(labels.get(int(number), str(number)) for number in examples["target"])
        return ArrayTask(
            task.name, examples, scorer, metric=task.metric, weight=task.weight, traced=traced,
            where=where, files=task.files, unit=task.units.get(task.metric, ""),
            pictures=tuple(map(str, images)) if all(isinstance(image, Path) for image in images) else (),
            prompts=prompts, targets=targets, answer=answer,
        )  # fmt: skip

    def _labels(self, task: NetworkTask) -> dict[int, str]:
        """The names of a classification's labels by number, where they have any."""
        if is_zero_shot(task, self.network):
            return dict(enumerate(class_names(task)))
        return label_names(self.models[0])

    def _scorer(self, task: Any, traced: bool) -> Callable[..., Any]:
        """The function of a task: (weights, rows) -> float[N]."""
        network = self.network
        if isinstance(task, NetworkTask) and task.function is not None:
            ask = None if task.config.gets == "module" else self._ask(task)
            return FunctionScorer(network, task.function, [one.record for one in task.examples], ask, BATCH)
        others = self._others(task)
        if task.metric in WRITTEN:
            targets = tuple(example.target for example in task.examples)
            tokenizer, compare = load_tokenizer(self.models[0]), COMPARISONS[task.metric]
            return WrittenScorer(network, tokenizer, compare, targets, task.config.max_new_tokens, BATCH)
        if task.kind == "similarity":
            return EmbeddingScorer(network, similarity_scores(task.metric), None, BATCH, traced)
        if task.kind == "retrieval":
            return EmbeddingScorer(network, ranking_scores(task.metric, task.config.k), others, BATCH, traced)
        if others is not None:
            score = class_scores(task.metric, len(class_names(task)))
            return EmbeddingScorer(network, score, others, BATCH, traced)
        return Scorer(network, SCORES[task.kind](task.metric), BATCH, traced)

    def _others(self, task: Any) -> Mapping[str, Any] | None:
        """The inputs that all examples of a task are compared with: documents, or the prompts of classes."""
        if task.kind == "retrieval":
            return embedded_texts(self.network, self.models[0], documents(task), "document")
        if isinstance(task, NetworkTask) and is_zero_shot(task, self.network):
            return embedded_texts(self.network, self.models[0], class_prompts(task))
        return None

    def _why_untraced(self, task: Any, examples: Mapping[str, Any], where: str) -> str:
        """Why JAX does not trace the network on a task's examples; empty where it does. Raises InputError for a network
        that fails on them, or whose outputs are random."""
        if task.metric in WRITTEN:
            return "it writes texts"
        if isinstance(task, NetworkTask) and getattr(task.config, "gets", "") == "module":
            return "a function of Python gets the module"
        network, weights = self.network, self.merge.tree.source(0)
        inputs = {name: array[:PROBED] for name, array in examples["inputs"].items()}
        name, ask = network.name, self._ask(task)
        try:
            with library_errors(
                where,
                f"{task.name}: {name} of {self.models[0]} fails on the first examples",
                (AttributeError, KeyError),
            ):
                once, again = network.call(weights, inputs, ask), network.call(weights, inputs, ask)
        except (AttributeError, KeyError) as error:
            raise InputError(
                where, f"{task.name}: {name} has no output {OUTPUT!r} ({error}); expected a network with a head for "
                f"{task.kind}",
            ) from None  # fmt: skip
        if not np.allclose(once, again, rtol=TOLERANCE, equal_nan=True):
            raise InputError(
                where, f"{task.name}: {name} answers the same example differently when it is asked twice; a search "
                "compares candidates, so outputs may not be random",
            )  # fmt: skip
        if ask is outputs and task.kind == "classification" and once.ndim != 2:
            raise InputError(where, f"{task.name}: {name} has outputs of shape {list(once.shape[1:])}; expected labels")
        if ask is outputs and task.kind == "classification" and examples["target"].max() >= once.shape[1]:
            raise InputError(where, f"{task.name}: label {examples['target'].max()}; {name} has {once.shape[1]} labels")
        if task.kind == "regression" and once.shape[1:] != examples["target"].shape[1:]:
            raise InputError(
                where, f"{task.name}: {name} has outputs of shape {list(once.shape[1:])}, and targets are of "
                f"{list(examples['target'].shape[1:])}",
            )  # fmt: skip
        if isinstance(task, NetworkTask) and task.function is not None:
            return "a function of Python scores it"
        if self.facts.settings.recalibrate:
            return "its batch norms are measured for each candidate"
        environment, reason = networks.torchax_environment()
        if environment is None:
            return reason
        try:
            traced = np.asarray(jax.jit(partial(network.trace, ask=ask))(weights, inputs))
        # A network that torchax cannot trace fails with an error of any kind.
        except Exception as error:
            return f"torchax: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        difference = float(np.abs(traced - once).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(once).max())):
            return f"torchax: outputs differ from torch's by {difference:.2g}"
        return ""

    def _ask(self, task: Any) -> Ask:
        """The requests of a task to a network, beside texts."""
        by_text = isinstance(task, NetworkTask) and is_zero_shot(task, self.network)
        asked = isinstance(task, NetworkTask) and getattr(task.config, "gets", "") == "embeddings"
        return embeddings if task.kind in PAIRED or by_text or asked else outputs

    def files(self) -> set[Path]:
        # Modules of a sentence transformer have folders with a number.
        return {
            file for model in self.models
            for file in ([model] if model.is_file() else (*model.iterdir(), *model.glob("[0-9]*_*/*")))
            if file.is_file()
        }  # fmt: skip


def _named_labels(likeliest: Callable[..., Any], labels: Mapping[int, str], *arguments: Any) -> list[str]:
    """The name of each example's likeliest label, or its number where it has no name. likeliest: (weights, rows) ->
    int[N]."""
    numbers = map(int, np.asarray(likeliest(*arguments)))
    return [labels.get(number, str(number)) for number in numbers]


def _batches(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs in batches. A last one of a single example has no variance, and is left out."""
    size = len(next(iter(inputs.values())))
    starts = [start for start in range(0, size, BATCH) if start == 0 or size - start > 1]
    return [{name: array[start : start + BATCH] for name, array in inputs.items()} for start in starts]


def on_cores(function: Callable[[Any], Any], calls: Sequence[Any], workers: int) -> list[Any]:
    """The function's results, by as many threads of Python, each with its share of torch's threads: that is quicker
    than many threads for each operation of a small network."""
    workers = min(len(calls), workers)
    if workers <= 1:
        return list(map(function, calls))
    threads = torch.get_num_threads() // workers
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, threads),))
    try:
        return list(pool.map(function, calls))
    finally:
        pool.shutdown(cancel_futures=True)
