"""Tasks of networks that are no language models: examples whose inputs a model's own processor prepares.

Seven kinds: `classification` (the likeliest label), `regression` (numbers), `text_to_text` and `transcription` (the
target text of a text, an image or a recording), `similarity` and `retrieval` (embeddings of texts), and `network`
(a user's own function of what the network computes). Scores are per example, and higher is better.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from evojax_merge.errors import InputError, shown
from evojax_merge.schema.section import Location, Name, Text, Whole
from evojax_merge.system.regular_file import file_inside
from evojax_merge.tasks.arrays import read_examples
from evojax_merge.tasks.function import METRIC as SCORE
from evojax_merge.tasks.function import UserFunction, load_function
from evojax_merge.tasks.images import ELSEWHERE, image_content, open_image
from evojax_merge.tasks.records import Record, read_file
from evojax_merge.tasks.task import IMAGES as IMAGES_FROM
from evojax_merge.tasks.task import SHARE_RIGHT, Derivative, Opening, Place, TaskConfig, TaskDefaults, TaskKind

Kind = Literal["classification", "regression", "text_to_text", "transcription", "similarity", "retrieval", "network"]
# The kinds of inputs that a record of each kind of task may have.
INPUTS: dict[Kind, tuple[str, ...]] = {
    "classification": ("image", "text"),
    "regression": ("image", "text"),
    "network": ("image", "text"),
    "text_to_text": ("image", "text"),
    "transcription": ("audio",),
}
# Inputs whose fields hold the paths of files.
FILES = ("image", "audio")
# Metrics of texts that a network writes.
WRITTEN = ("exact_match", "negative_word_error_rate")
# A metric without a derivative -> the metric that stands for it in a search by gradients.
RANKINGS = ("recall", "reciprocal_rank", "ndcg")
COMPANIONS = dict.fromkeys(("accuracy", *WRITTEN, *RANKINGS), "log_probability") | {"spearman": "pearson"}
TextMetric = Literal["log_probability", "exact_match", "negative_word_error_rate"]
# The endings of the files that a folder of images is searched for.
IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# The metric of tasks without labels.
NEGATIVE_ENTROPY = "negative_entropy"
IMAGE_FIELD = "the field of an image's path, from the file's folder"
TEXT_FIELD = "the field of a text; a record has an image, or a text"
FILE = "JSONL, CSV or parquet with paths or texts, a folder of images by class, or an .npz of arrays"


class SeenConfig(TaskConfig):
    """The keys of tasks of networks that are given images, texts or arrays."""

    file: Location = Field(description=FILE)
    images: Location | None = Field(None, description=IMAGES_FROM)
    image: Name = Field("image", description=IMAGE_FIELD)
    text: Name = Field("text", description=TEXT_FIELD)


class ClassificationConfig(SeenConfig):
    """A task of classifiers: the label of an image, a text, or arrays."""

    kind: Literal["classification"] = Field(description="the kind of task")
    target: Name = Field("label", description="the field, or array, of the label: its number or name")
    metric: Literal["accuracy", "log_probability"] = Field(
        "accuracy", description="the task's score; log_probability is that of the right label"
    )
    prompts: list[Text] = Field(
        ["a photo of a {label}."],
        min_length=1,
        max_length=1000,
        description="of networks that compare images with texts: the texts of a class, with {label} for its name",
    )
    classes: list[Text] = Field(
        [], max_length=100_000, description="of such networks: the names of all classes; default: the data's labels"
    )

    @field_validator("prompts")
    @classmethod
    def _name_the_label(cls, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            if "{label}" not in prompt:
                raise ValueError(f"{shown(prompt)} lacks {{label}}; expected a text such as 'a photo of a {{label}}.'")
        return prompts


class RegressionConfig(SeenConfig):
    """A task of networks whose outputs are numbers."""

    kind: Literal["regression"] = Field(description="the kind of task")
    target: Name = Field("label", description="the field, or array, of the right number, or list of numbers")
    metric: Literal["negative_squared_error", "negative_absolute_error"] = Field(
        "negative_squared_error", description="the task's score: minus the mean over the numbers"
    )


class TextToTextConfig(SeenConfig):
    """A task of encoder-decoders: a target text, by its log-probability per token or by what is written greedily."""

    kind: Literal["text_to_text"] = Field(description="the kind of task")
    target: Name = Field("target", description="the field of the target text")
    metric: TextMetric = Field("log_probability", description="the task's score, of the target or of a written text")
    max_new_tokens: Whole = Field(64, ge=1, le=100_000, description="how many tokens a network may write")


class TranscriptionConfig(TaskConfig):
    """A task of speech recognisers: the text of a recording, as `text_to_text`."""

    kind: Literal["transcription"] = Field(description="the kind of task")
    file: Location = Field(description="JSONL, CSV or parquet with paths of .wav files")
    images: Location | None = Field(None, description=IMAGES_FROM)
    audio: Name = Field("audio", description="the field of a recording's path, from the file's folder")
    target: Name = Field("text", description="the field of the recording's text")
    metric: TextMetric = Field("log_probability", description="the task's score, of the target or of a written text")
    max_new_tokens: Whole = Field(64, ge=1, le=100_000, description="how many tokens a network may write")


class SimilarityConfig(TaskConfig):
    """A task of embeddings: how well the cosines of pairs of texts agree with the pairs' scores."""

    kind: Literal["similarity"] = Field(description="the kind of task")
    file: Location = Field(description="JSONL, CSV or parquet with pairs of texts and how similar they are")
    first: Name = Field("sentence1", description="the field of a pair's first text")
    second: Name = Field("sentence2", description="the field of a pair's second text")
    target: Name = Field("score", description="the field of a pair's score, a number: higher is more similar")
    metric: Literal["spearman", "pearson"] = Field(
        "spearman", description="the correlation of cosines and scores, by ranks or by values"
    )


class RetrievalConfig(TaskConfig):
    """A task of embeddings: how high the documents of a query come among all documents."""

    kind: Literal["retrieval"] = Field(description="the kind of task")
    file: Location = Field(description="JSONL, CSV or parquet with queries and their documents")
    query: Name = Field("query", description="the field of a query, a text")
    target: Name = Field("document", description="the field of a query's document, a text, or of several, a list")
    corpus: Location | None = Field(
        None, description="a file of further documents, in the field that target names; none: those of the queries"
    )
    metric: Literal["ndcg", "recall", "reciprocal_rank", "log_probability"] = Field(
        "ndcg", description="the task's score, of the first k documents; log_probability has no k"
    )
    k: Whole = Field(10, ge=1, le=1_000_000, description="how many documents count, the most similar first")


class NetworkConfig(SeenConfig):
    """A task that a user's own function scores, by what a network computes for the examples or by the network itself:
    (records, outputs) -> a number for each record."""

    kind: Literal["network"] = Field(description="the kind of task")
    function: Location = Field(description="path/to/file.py:name, or module:name, from the config's folder")
    gets: Literal["outputs", "embeddings", "module"] = Field(
        "outputs", description="what the function is called with, beside the records"
    )


@dataclass(frozen=True)
class NetworkExample:
    """An example. inputs: `image` or `audio` (a file), `text`, `first` and `second` or `query` (texts), or arrays by
    the names of the network's arguments; target: a label, numbers, a text or several; place: its file and line;
    record: its fields in the file."""

    inputs: Mapping[str, Any]
    target: Any
    place: Place
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        file, line = self.place
        return f"{file}:{line}" if line else file

    @property
    def content(self) -> Hashable:
        """The example's input and target, by which equal examples are recognised."""
        inputs = tuple((name, _hashable(value)) for name, value in sorted(self.inputs.items()))
        return inputs, _hashable(self.target)


def image_file(example: NetworkExample) -> tuple[str, bytes]:
    """The place of an example's image in messages, and its file's content. Raises InputError for a bad file."""
    path = example.inputs["image"]
    where = example.where if example.where == str(path) else f"{example.where}: {path.name}"
    return where, image_content(where, path)


def _hashable(value: Any) -> Hashable:
    return value.tobytes() if isinstance(value, np.ndarray) else str(value)


@dataclass(frozen=True)
class NetworkTask(TaskDefaults):
    """A task of networks. examples: all of its file's; indices: the numbers of those that the task has; files: what it
    was made from; places: see `paths`; section: its place in the config; config: the section; corpus: further documents
    of a retrieval; function: a user's own."""

    backend: ClassVar[str] = "torch"
    by_example: ClassVar[tuple[str, ...]] = ("indices",)
    units: ClassVar[Mapping[str, str]] = {
        "accuracy": SHARE_RIGHT, "exact_match": SHARE_RIGHT, "negative_word_error_rate": "minus the word error rate",
        "negative_squared_error": "minus the squared error", "negative_absolute_error": "minus the absolute error",
        "spearman": "correlation", "pearson": "correlation", "ndcg": "nDCG, 0 to 1", "recall": "share retrieved",
        "reciprocal_rank": "reciprocal rank, 0 to 1", "log_probability": "log-probability",
        NEGATIVE_ENTROPY: "minus nats",
    }  # fmt: skip

    name: str
    kind: Kind
    metric: str
    weight: float
    examples: tuple[NetworkExample, ...]
    indices: tuple[int, ...]
    files: tuple[Path, ...]
    places: Mapping[str, str]
    section: str
    config: Any
    corpus: tuple[str, ...] = ()
    function: UserFunction | None = None

    @property
    def derivative(self) -> Derivative | None:
        return None if self.metric in COMPANIONS or self.function is not None else "linear"

    def companion(self) -> Any:
        return replace(self, metric=COMPANIONS[self.metric]) if self.metric in COMPANIONS else None

    def prompt(self, example: int) -> str | None:
        texts = [value for value in self.examples[self.indices[example]].inputs.values() if isinstance(value, str)]
        return "\n".join(texts) or None

    def target(self, example: int) -> str | None:
        target = self.examples[self.indices[example]].target
        texts = target if self.kind == "retrieval" else [target]
        return None if target is None else "\n".join(map(str, texts))

    def contents(self) -> Sequence[tuple[Hashable, Place]]:
        return [(self.examples[i].content, self.examples[i].place) for i in self.indices]

    def paths(self) -> dict[str, str]:
        return dict(self.places)


def open_network(config: Any, opening: Opening) -> NetworkTask:
    """The task on the examples of one source. Raises InputError for a file that does not fit."""
    file = opening.file(*opening.source("file", config.file))
    corpus: tuple[str, ...] = ()
    files: tuple[Path, ...] = (file,)
    places = {"file": str(file)}
    if config.kind in PAIRED:
        read = PAIRED[config.kind]
        examples = tuple(NetworkExample(*read(record, config), _place(record, file)) for record in read_file(file))
        if getattr(config, "corpus", None) is not None:
            more = opening.file("corpus", config.corpus)
            corpus = tuple(text for record in read_file(more) for text in _documents(record, config))
            files, places["corpus"] = (file, more), str(more)
    elif file.is_dir():
        examples, files = _folder(file, config.kind)
    elif file.suffix == ".npz":
        examples = _arrays(file, getattr(config, "target", None))
    else:
        folder = opening.images(config.images, file.parent)
        places |= {} if config.images is None else {"images": str(folder)}
        examples = tuple(_example(record, config, file, folder) for record in read_file(file))
        named = [path for example in examples for name, path in example.inputs.items() if name in FILES]
        files = (file, *dict.fromkeys(named))
    for example in examples:
        # An array may have the name as well.
        if isinstance(example.inputs.get("image"), Path):
            open_image(*image_file(example)).close()
    function = None
    if isinstance(config, NetworkConfig):
        function = load_function(f"{opening.where}.function", config.function, config.gets, opening.folder)
        files, places["function"] = (*files, *function.files), function.place
    metric = getattr(config, "metric", SCORE)
    return NetworkTask(
        config.name, config.kind, metric, config.weight, examples, tuple(range(len(examples))), files,
        places, opening.where, config, corpus, function,
    )  # fmt: skip


def _folder(folder: Path, kind: Kind) -> tuple[tuple[NetworkExample, ...], tuple[Path, ...]]:
    """The images of a folder that has a folder for each class."""
    if kind != "classification":
        raise InputError(folder, f"is a folder, which holds images by class; {kind} has a file of records")
    files = tuple(sorted(
        image for label in folder.iterdir() if label.is_dir()
        for image in label.iterdir() if image.suffix.lower() in IMAGES
    ))  # fmt: skip
    if not files:
        raise InputError(folder, "holds no image in a folder of its class, such as cat/1.png")
    return tuple(NetworkExample({"image": file}, file.parent.name, (str(file), 0)) for file in files), files


def _arrays(file: Path, target: str | None) -> tuple[NetworkExample, ...]:
    """The rows of an .npz file: the target's array, and one for each argument of the network."""
    arrays = read_examples(file)
    if target is None:
        rows = [{name: array[i] for name, array in arrays.items()} for i in range(len(next(iter(arrays.values()))))]
        return tuple(NetworkExample(row, None, (str(file), i + 1), row) for i, row in enumerate(rows))
    if target not in arrays:
        raise InputError(file, f"has no array {target!r}, the target (it has {', '.join(arrays)})")
    targets = arrays.pop(target)
    if not arrays:
        raise InputError(file, "has no array beside the target; expected one for each argument of the network")
    return tuple(
        NetworkExample({name: array[i] for name, array in arrays.items()}, targets[i], (str(file), i + 1))
        for i in range(len(targets))
    )


def _example(record: Record, config: Any, file: Path, folder: Path) -> NetworkExample:
    """The example of a record, which names files in `folder`. Raises InputError where it lacks an input or a target."""
    fields, target = record.fields, getattr(config, "target", None)
    keys = INPUTS[config.kind]
    given = [name for name in keys if getattr(config, name) in fields]
    if len(given) != 1:
        expected = " or ".join(repr(getattr(config, name)) for name in keys)
        what = "both an image and a text" if given else "no input"
        raise InputError(record.where, f"has {what}; expected the field {expected}")
    if target is not None and target not in fields:
        raise InputError(record.where, f"has no field {target!r}, the target (it has {', '.join(fields)})")
    name = given[0]
    value = fields[getattr(config, name)]
    if not isinstance(value, str) or not value:
        raise InputError(record.where, f"{getattr(config, name)}: {shown(value)}; expected a text")
    if name in FILES:
        path = file_inside(f"{record.where}: {getattr(config, name)}", folder, value, advice=ELSEWHERE)
        if not path.is_file():
            raise InputError(record.where, f"{getattr(config, name)}: {value}: no such file in {folder}")
        value = path.resolve()
    answer = None if target is None else fields[target]
    return NetworkExample({name: value}, answer, _place(record, file), fields)


def _place(record: Record, file: Path) -> Place:
    return (str(file), record.line) if record.line else (record.where, 0)


def _text(record: Record, name: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(record.where, f"{name}: {shown(value)}; expected a text")
    return value


def _field(record: Record, name: str) -> Any:
    if name not in record.fields:
        raise InputError(record.where, f"has no field {name!r} (it has {', '.join(record.fields)})")
    return record.fields[name]


def _documents(record: Record, config: RetrievalConfig) -> tuple[str, ...]:
    """The documents of a record. Raises InputError where there is none, or one that is no text."""
    value = _field(record, config.target)
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(record.where, f"{config.target}: {shown(value)}; expected a text, or a list of texts")
    return tuple(texts)


# The inputs and the target of an example of texts that belong together, by the kind of task.
PAIRED: dict[str, Callable[[Record, Any], tuple[dict[str, str], Any]]] = {
    "similarity": lambda record, config: (
        {"first": _text(record, config.first), "second": _text(record, config.second)}, _field(record, config.target)
    ),
    "retrieval": lambda record, config: ({"query": _text(record, config.query)}, _documents(record, config)),
}  # fmt: skip


KINDS = tuple(
    TaskKind(config, open_network, source="file")
    for config in (
        ClassificationConfig, RegressionConfig, TextToTextConfig, TranscriptionConfig, SimilarityConfig,
        RetrievalConfig, NetworkConfig,
    )
)  # fmt: skip
