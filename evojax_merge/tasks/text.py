"""Tasks of text: examples from a file, their requests to a model, and the scoring of the answers.

Three kinds: `likelihood` (mean log-probability of the target given the prompt), `multiple_choice` (the best choice by
log-probability, and the margin it wins by), `exact_match` (the answer in a greedy continuation). Scores are per
example, and higher is better.
"""

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import BeforeValidator, Field

from evojax_merge.errors import InputError, print_warning
from evojax_merge.schema.section import Name, Text, Whole
from evojax_merge.tasks import templates
from evojax_merge.tasks.answers import check_answerable, extract_answer, same_answer
from evojax_merge.tasks.choices import ChoiceTemplates, brief, choice_fields, read_choices, right_choice, templates_of
from evojax_merge.tasks.images import RecordImage, expand_images, number_images, read_images
from evojax_merge.tasks.patterns import PROBED, check_pattern
from evojax_merge.tasks.prompts import (
    PLAIN,
    Example,
    PromptConfig,
    Prompts,
    Turn,
    encode_alone,
    joined,
    read_turns,
)
from evojax_merge.tasks.records import Record, Source
from evojax_merge.tasks.sampling import GREEDY, KEYS, UNITS, Sampling, SamplingConfig, length_scores
from evojax_merge.tasks.task import (
    SHARE_RIGHT,
    Derivative,
    Opening,
    Place,
    Responses,
    Row,
    TaskDefaults,
    TaskKind,
    TaskRequests,
    brevity,
)

Kind = Literal["likelihood", "multiple_choice", "exact_match"]
Metric = Literal[
    "log_probability", "accuracy", "margin", "acc_norm", "acc_bytes", "acc_mutual_info", "brevity", "length",
]  # fmt: skip
METRICS: dict[str, tuple[str, ...]] = {
    "likelihood": ("log_probability",),
    "multiple_choice": ("accuracy", "margin", "acc_norm", "acc_bytes", "acc_mutual_info"),
    "exact_match": ("accuracy", "brevity", "length"),
}
# The target of an example that a function judges.
NO_TARGET = "-"


class TextConfig(SamplingConfig, PromptConfig):
    """A task of text: a file of examples, and the names of their fields."""

    optional: ClassVar = (*PromptConfig.optional, *SamplingConfig.optional)

    kind: Kind = Field(description="the kind of task")
    target: Text = Field("{target}", description="of likelihood, exact_match: a template over a record's fields")
    delimiter: Text = Field(
        " ", description="what joins a prompt to its target or choice where neither has white space there"
    )
    choices: ChoiceTemplates = Field(
        "choices",
        description="of multiple_choice: the field that lists the choices, or a template for each, by place or label",
    )
    answer: Name = Field("answer", description="of multiple_choice: the field that has the right one, by place or text")
    metric: Annotated[Metric, BeforeValidator(lambda value: "accuracy" if value == "acc" else value)] | None = Field(
        None, description="which of the kind's metrics is the fitness; default: log_probability or accuracy"
    )
    pattern: Text | None = Field(
        None,
        description="of exact_match: a regular expression, whose last match is the answer; default: the last number",
    )
    max_new_tokens: Whole = Field(
        256, ge=1, le=1_000_000, description="of exact_match: how many tokens a model may write"
    )
    stop: list[Text] = Field([], max_length=100, description="of exact_match: texts that end what a model writes")


@dataclass(frozen=True)
class PromptedTask(TaskDefaults):
    """A task (tasks.task) of one split's examples, in text: its requests to a model, without a score. A task of kind
    exact_match has its prompts continued.

    `file`: the source of the examples by its name; `fewshot_file`: that of the shown examples, where it is another one;
    `data_files`: the files that both were read from; `records`: the examples in the file's form, where the score needs
    them; `sampling`: how prompts are continued; `stop_pattern`: the expression of an answer that ends an output.
    """

    by_example: ClassVar[tuple[str, ...]] = ("examples", "records")

    name: str
    kind: Kind
    metric: str
    weight: float
    file: str
    examples: tuple[Example, ...]
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    prompts: Prompts = PLAIN
    fewshot_file: str | None = None
    data_files: tuple[Path, ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    sampling: Sampling = GREEDY
    stop_pattern: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        images = (*self.prompts.images, *(image for example in self.examples for image in example.images))
        files = (image.file for image in images if image.file is not None)
        return tuple(dict.fromkeys([*self.data_files, *files]))

    def requests(self, tokenizer: Any, context: int) -> TaskRequests:
        if self.kind == "exact_match":
            targets = [target for example in self.examples for target in example.targets]
            tokens = tokenizer(targets, add_special_tokens=False)["input_ids"]
            wanted = [(self.where(example), self.wanted(n)) for n, example in enumerate(self.examples)]
            check_answerable(self.name, wanted, tokenizer, {*chain(*tokens)}, self.stop, self.max_new_tokens)
            rows = self.sampling.rows(prompt_rows(self, tokenizer))
            # An answer like its target, and the token that ends it.
            return TaskRequests(
                (), rows, self.max_new_tokens, self.stop, expected_tokens=max(map(len, tokens)) + 1,
                sampler=self.sampling.sampler, counts_tokens=self.metric == "length", answer=self.stop_pattern,
            )  # fmt: skip
        return TaskRequests(tuple(likelihood_rows(self, tokenizer)))

    def wanted(self, example: int) -> Sequence[str]:
        """The texts one of which an output for an example must contain to be right; empty: other outputs may be."""
        return ()

    def likelihood_of_targets(self) -> "TextTask":
        return TextTask(
            self.name, "likelihood", "log_probability", self.weight, self.file, self.examples, prompts=self.prompts,
            fewshot_file=self.fewshot_file, data_files=self.data_files,
        )  # fmt: skip

    def contents(self) -> Sequence[tuple[Hashable, Place]]:
        return [
            ((*_question(example), example.targets, example.answer), self.location(example))
            for example in self.examples
        ]

    def prompt(self, example: int) -> str:
        asked = self.examples[example]
        turns = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in asked.turns)
        return turns or asked.prompt

    def image(self, example: int) -> Any:
        images = self.examples[example].images
        return images[0].open() if images else None

    def paths(self) -> dict[str, str]:
        named = {"fewshot_source": self.fewshot_file, "images": self.prompts.images_from}
        return {"file": self.file} | {key: str(value) for key, value in named.items() if value is not None}

    def where(self, example: Example) -> str:
        """The example's place in messages."""
        return example.where or f"{self.file}:{example.line}"

    def location(self, example: Example) -> Place:
        return (example.where, 0) if example.where else (self.file, example.line)


P = TypeVar("P", bound=PromptedTask)


@dataclass(frozen=True)
class TextTask(PromptedTask):
    """A task (tasks.task) of text. `pattern` (exact_match) is a regular expression whose last match in the output is
    the answer: the first of its groups that took part, where it has groups. None: the last number, after `####` where
    there is one."""

    units: ClassVar[Mapping[str, str]] = {
        "log_probability": "log-probability per token", "margin": "log-probability", "brevity": "minus characters",
        **dict.fromkeys(("accuracy", "acc_norm", "acc_bytes", "acc_mutual_info"), SHARE_RIGHT), **UNITS,
    }  # fmt: skip

    pattern: str | None = None

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        if self.kind != "exact_match":
            return score_likelihood(self, responses.totals, responses.counts)
        where, texts, samples = f"task {self.name}", responses.texts, self.sampling.samples
        if self.metric == "length":
            return {"length": length_scores(responses.lengths, samples)}
        right = [
            [
                same_answer(
                    extract_answer(text, self.pattern, where), str(self.examples[n // samples].answer), self.pattern
                )
                for n, text in enumerate(row)
            ]
            for row in texts
        ]
        asked = {"brevity": brevity(texts)} if self.metric == "brevity" else {}
        by_answer = {"accuracy": np.asarray(right, np.float32).reshape(len(texts), self.size * samples)} | asked
        return self.sampling.reduce(by_answer, texts, "accuracy", self._vote)

    def wanted(self, example: int) -> Sequence[str]:
        compares_texts = self.pattern is not None and self.metric not in ("brevity", "length")
        return (self.target(example).strip(),) if compares_texts else ()

    def _vote(self, example: int, output: str) -> str | Decimal | None:
        answer = extract_answer(output, self.pattern, f"task {self.name}")
        return Decimal(answer) if answer is not None and self.pattern is None else answer

    @property
    def derivative(self) -> Derivative | None:
        return {"log_probability": "linear", "margin": "nonlinear"}.get(self.metric)  # type: ignore[return-value]

    def score_gradient(self, responses: Responses) -> np.ndarray:
        if self.kind == "likelihood":
            return np.broadcast_to(1 / responses.counts, responses.totals.shape).astype(np.float32)
        # Of a margin it is 1 for the right choice, and -1 for the best of the others (the first of equals).
        sums = responses.totals
        gradient, candidates = np.zeros(sums.shape, np.float32), np.arange(len(sums))
        for example, rows in _choices(self):
            others = sums[:, rows].copy()
            others[:, int(example.answer)] = -np.inf
            gradient[candidates, rows.start + others.argmax(axis=1)] = -1
            gradient[:, rows.start + int(example.answer)] = 1
        return gradient

    def companion(self) -> "TextTask | None":
        """The likelihood of wanted answers, or the margin of choices; None for an output's length."""
        if self.metric in ("brevity", "length"):
            return None
        return replace(self, metric="margin") if self.kind == "multiple_choice" else self.likelihood_of_targets()

    def extraction_failure(self, texts: Sequence[str]) -> str | None:
        if self.kind != "exact_match" or self.metric in ("brevity", "length"):
            return None
        if any(extract_answer(text, self.pattern, f"task {self.name}") is not None for text in texts):
            return None
        return "a number" if self.pattern is None else f"the pattern {self.pattern!r}"

    def target(self, example: int) -> str:
        """The wanted text; for multiple choice, the text of the right choice."""
        record = self.examples[example]
        return record.targets[record.answer].strip() if isinstance(record.answer, int) else record.answer

    def extracted(self, example: int, outputs: Sequence[str]) -> str | None:
        chosen = self.sampling.majority(example, outputs, self._vote)
        return None if chosen is None else extract_answer(outputs[chosen], self.pattern, f"task {self.name}")


# ---------------------------------------------------------------------------------------------------------------
# From the config and its file to the task


def open_text(config: TextConfig, opening: Opening) -> TextTask:
    """The task on the examples of one file. Raises InputError for a meaningless config or file."""
    where, kind = opening.where, config.kind
    metric = config.metric or METRICS[kind][0]
    if metric not in METRICS[kind]:
        why = f", and generates nothing that has a {metric}" if metric in ("brevity", "length") else ""
        raise InputError(where, f"metric: {metric!r}; {kind} has {', '.join(METRICS[kind])}{why}")
    of_generation = [key for key in (*KEYS, "stop_at") if getattr(config, key) != TextConfig.model_fields[key].default]
    if of_generation and kind != "exact_match":
        raise InputError(f"{where}.{of_generation[0]}", f"{kind} generates nothing; expected kind: exact_match or none")
    sampling = config.sampling(opening.seed)
    if sampling.reduction != "mean" and metric != "accuracy":
        raise InputError(f"{where}.over_samples", f"{sampling.reduction} goes with metric: accuracy; expected mean")
    named = {"prompt": kind == "exact_match"} if config.prompt else {}
    check_texts(where, config, named | ({} if kind == "multiple_choice" else {"target": False}))
    task = open_prompted(
        TextTask, config, opening, kind, sampling.metric(metric), records=(), pattern=config.pattern, sampling=sampling,
        stop_pattern=config.stop_pattern(where, config.pattern),
    )  # fmt: skip
    repeating = [task.where(example) for example in task.examples if len(set(example.targets)) < len(example.targets)]
    if repeating:
        print_warning(f"{repeating[0]}: {len(repeating)} of {task.size} records list a wrong choice twice")
    if config.pattern is not None:
        check_pattern(where, config.pattern, config.max_new_tokens, probe_texts(task))
        for example in task.examples:
            # Outputs are compared with the target: none would be right. A target without a match is the bare answer.
            answer, target = extract_answer(str(example.answer), config.pattern, where), str(example.answer)
            if answer is not None and not same_answer(answer, target, config.pattern):
                raise cut_target(where, config.pattern, answer, task.where(example), target)
    elif kind == "exact_match":
        answers = [str(example.answer) for example in task.examples]
        without = [answer for answer in answers if extract_answer(answer, None) is None]
        what = f"a number, which is the answer without a pattern ({without[0][:100]!r})" if without else ""
        if len(without) == len(answers):
            raise InputError(f"{where}.pattern", f"missing; no target of {task.file} holds {what}")
        if len(without) > len(answers) / 2:
            print_warning(
                f"{where}.pattern: missing; {len(without)} of {len(answers)} targets of {task.file} do not hold {what}"
                "; no output is right for these"
            )
    return task


KIND = TaskKind(TextConfig, open_text, source="file")


def probe_texts(task: PromptedTask) -> list[str]:
    """Texts of the task that a pattern is tried on."""
    return [f"{example.prompt} {''.join(example.targets)}" for example in task.examples[:PROBED]]


def cut_target(where: str, pattern: str, answer: str, place: str, target: str) -> InputError:
    """The error about a pattern that finds `answer` in the target of an example, whose place is `place`."""
    return InputError(
        f"{where}.pattern", f"{pattern!r} finds {brief(answer)} in the target of {place}, which is compared with "
        f"{brief(target.strip())}; expected a pattern that finds all of it, or a target of the answer alone"
    )  # fmt: skip


def check_texts(where: str, config: Any, named: Mapping[str, bool] = MappingProxyType({})) -> None:
    """Raises InputError for an invalid template, and for an empty text that would end all outputs. config: as in
    `open_prompted`; named: the templates that should name a field of the records -> whether those without are refused,
    or are a warning."""
    for key, template in (("prompt", config.prompt), ("target", config.target)):
        templates.check_template(f"{where}.{key}", template)
    for template in templates_of(config.choices) if isinstance(config, TextConfig) else ():
        templates.check_template(f"{where}.choices", template)
    templates.check_stop(where, config.stop)
    for key, refuse in named.items() if config.messages is None else ():
        templates.check_names_field(f"{where}.{key}", getattr(config, key), refuse)


def open_prompted(
    make: Callable[..., P], config: Any, opening: Opening, kind: Kind, metric: str, has_targets: bool = True,
    **fields: Any,
) -> P:  # fmt: skip
    """Make a `PromptedTask` on the examples of the opening's source. Examples that are shown are not scored, whatever
    source they come from: their answers stand in the prompt. config: a `PromptConfig` with the length of outputs;
    has_targets: whether scored examples need a target, as shown ones do; fields: those of the kind. Raises InputError
    for records that do not fit, or too few examples to show."""
    source = opening.read(*opening.source("file", config.file))
    records, files, fewshot_file = list(source.records), source.files, None
    folder = None if config.images is None else opening.images(config.images, opening.folder)
    read = partial(read_examples, kind=kind, config=config, section=opening.where, folder=folder)
    examples, shots = read(source, has_targets=has_targets), []
    if config.num_fewshot:
        # Held-out examples have the same ones before them as those that are searched on.
        key = "file" if config.fewshot_source is None else "fewshot_source"
        is_same = config.fewshot_source is None and opening.heldout is None
        shown = source if is_same else opening.read(key, config.fewshot_source or config.file)
        if len(shown.records) < config.num_fewshot:
            what = f"{config.num_fewshot}; {shown.name} has only {len(shown.records)}"
            raise InputError(f"{opening.where}.num_fewshot", what)
        shots = read(replace(shown, records=shown.records[: config.num_fewshot]))
        fewshot_file = shown.name if config.fewshot_source is not None or shown.name != source.name else None
        files += shown.files
        asked = {_identity(shot, kind) for shot in shots}
        kept = [number for number, example in enumerate(examples) if _identity(example, kind) not in asked]
        if not kept:
            what = f"{config.num_fewshot}; leaves no example of {source.name} to score"
            raise InputError(f"{opening.where}.num_fewshot", what)
        records, examples = [records[number] for number in kept], [examples[number] for number in kept]
    prefix = config.assistant_prefix
    if prefix:
        shots = [replace(shot, answer=prefix + joined(prefix, " ", shot.solution)) for shot in shots]
    prompts = Prompts(
        opening.where, config.delimiter, prefix, tuple(shots),
        config.apply_chat_template, config.system_instruction, config.fewshot_as_multiturn,
        config.chat_template_kwargs, folder,
    )  # fmt: skip
    given = {
        "name": config.name, "kind": kind, "metric": metric, "weight": config.weight, "file": source.name,
        "examples": tuple(examples), "prompts": prompts, "fewshot_file": fewshot_file, "data_files": files,
        "records": tuple(dict(record.fields) for record in records), "max_new_tokens": config.max_new_tokens,
        "stop": tuple(config.stop),
    }  # fmt: skip
    return make(**given | fields)


def _question(example: Example) -> tuple[Any, ...]:
    return example.prompt, json.dumps(example.turns, sort_keys=True, default=str), example.images


def _identity(example: Example, kind: Kind) -> tuple[Any, ...]:
    """The part of an example that gives its answer away where it is equal to a shown one's. A question that is answered
    in words has one answer; of other prompts, which may be equal or empty, the targets are a part of the question."""
    return _question(example) if kind == "exact_match" else (*_question(example), example.targets)


def read_examples(
    source: Source, kind: Kind, config: PromptConfig, section: str, folder: Path | None = None, has_targets: bool = True
) -> list[Example]:
    """The examples of a source's records. section: the config in messages; folder: of images, by default the source's;
    has_targets: see `open_prompted`. Raises InputError with the place of the first record that does not fit."""
    folder = folder or source.files[0].parent
    fields = templates.fields_of_any(config.prompt, [record.fields for record in source.records])
    return [_example(record, kind, config, section, folder, has_targets, fields) for record in source.records]


def _example(
    record: Record, kind: Kind, config: PromptConfig, section: str, folder: Path, has_target: bool,
    fields: Sequence[str],
) -> Example:  # fmt: skip
    where, is_chat, prefix = record.where, bool(config.apply_chat_template), config.assistant_prefix
    # A placeholder that is never read.
    template = config.target if has_target else NO_TARGET
    chosen_by = {*choice_fields(config.choices), config.answer} if isinstance(config, TextConfig) else set()
    named = templates.named_fields(config.prompt) | templates.named_fields(template)
    images = read_images(record, folder, named | chosen_by)
    turns, of_turns = list[Turn](), " + ".join(config.turns)
    if not of_turns:
        prompt = templates.fill_prompt(where, f"{section}.prompt", config.prompt, record.fields, fields)
        before = "" if is_chat else prompt
    else:
        prompt = before = ""
        for name in config.turns:
            turns += read_turns(where, f"{section}.messages", name, record.fields)
    place = (record.line, "" if record.line else where)
    answered = bool(turns) and turns[-1]["role"] == "assistant"

    def answer_text(text: str) -> str:
        """The answer behind what stands before it. A chat template ends where the answer begins."""
        if prefix:
            return joined(prefix, config.delimiter, text)
        return text if is_chat else joined(before, config.delimiter, text)

    if kind != "multiple_choice":
        if answered:
            *turns, last = turns
            target = last["content"]
            if template not in ("{target}", NO_TARGET):
                what = f"{of_turns}: ends with the assistant's turn, which would be the target"
                raise InputError(where, f"{what}; leave {section}.target out, or the turn")
            if not turns:
                raise InputError(where, f"{of_turns}: holds the assistant's turn alone; expected the user's")
        else:
            if turns and template == "{target}" and "target" not in record.fields:
                what = f"{of_turns}: ends with a turn of the role {brief(turns[-1]['role'])}"
                raise InputError(where, f"{what}; expected the assistant's, which is scored, or {section}.target")
            key, path = f"{section}.target", templates.only_field(template)
            value = templates.look_up(where, key, path, record.fields) if config.takes_json and path is not None else ""
            if isinstance(value, str):
                target = templates.fill(where, key, template, record.fields)
            else:
                target = json.dumps(value, ensure_ascii=False, default=str)
        # White space as an answer is never found; as a target it can be predicted.
        if not (target.strip() if kind == "exact_match" else target):
            raise InputError(where, "target: is empty")
        return Example(prompt, (answer_text(target),), target, *place, turns=tuple(turns), images=images)
    if answered:
        what = f"{of_turns}: ends with the assistant's turn; expected the user's, which the choices answer"
        raise InputError(where, what)
    assert isinstance(config, TextConfig)
    choices, labels = read_choices(where, f"{section}.choices", config.choices, record.fields)
    path = templates.field_path(config.answer, record.fields)
    answer = templates.look_up(where, f"{section}.answer", path, record.fields)
    chosen = right_choice(where, config.answer, answer, choices, labels)
    return Example(prompt, tuple(map(answer_text, choices)), chosen, *place, tuple(choices), tuple(turns), images)


# ---------------------------------------------------------------------------------------------------------------
# Requests


def likelihood_rows(task: PromptedTask, tokenizer: Any) -> list[Row]:
    """One row per target or choice, examples in order, each one's choices together. Behind them, where the metric is
    acc_mutual_info, each one's choices without the prompt."""
    rows = []
    for number, (example, where, context, images) in enumerate(_contexts(task, tokenizer)):
        for target in example.targets:
            tokens, start = task.prompts.encode_pair(tokenizer, context, target)
            tokens = number_images(tokenizer, where, tokens, images)
            # Without a beginning-of-sequence token an empty prompt leaves the first token unscored.
            rows.append(Row(tuple(tokens), max(start, 1), where, number))
            if len(tokens) < 2 or start >= len(tokens):
                raise InputError(where, "has no token to score; give it a prompt")
        if task.metric == "acc_mutual_info":
            alone = (encode_alone(tokenizer, target) for target in example.targets)
            rows += [Row(tuple(tokens), 1, where, number) for tokens in alone]
    return rows


def _contexts(task: PromptedTask, tokenizer: Any) -> Iterator[tuple[Example, str, str, tuple[RecordImage, ...]]]:
    """The examples with their places, the text before each one's answer, with its images' places expanded, and these
    images in their order."""
    for example in task.examples:
        where, images = task.where(example), (*task.prompts.images, *example.images)
        text = task.prompts.context(tokenizer, where, example.prompt, example.turns, example.images)
        yield example, where, expand_images(tokenizer, where, text, images), images


def prompt_rows(task: PromptedTask, tokenizer: Any) -> list[Row]:
    """One row per example, the prompt alone."""
    rows = []
    for number, (_, where, context, images) in enumerate(_contexts(task, tokenizer)):
        tokens = number_images(tokenizer, where, task.prompts.encode(tokenizer, context), images)
        if not tokens:
            raise InputError(where, "prompt: has no token")
        rows.append(Row(tuple(tokens), len(tokens), where, number))
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Scores


def score_likelihood(task: TextTask, sums: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """sums: float32[P, rows], the targets' total log-probabilities; counts: int[rows]. Metric -> float32[P, N]."""
    if task.kind == "likelihood":
        return {"log_probability": (sums / counts).astype(np.float32)}
    accuracy, margin, asked = [], [], []
    for example, rows in _choices(task):
        choices = sums[:, rows]
        right = choices[:, int(example.answer)]
        others = np.delete(choices, int(example.answer), axis=1).max(axis=1)
        # The first of equal choices counts as chosen, like in argmax.
        accuracy.append(np.where(np.isfinite(right), choices.argmax(axis=1) == example.answer, np.nan))
        margin.append(right - others)
        if task.metric in NORMALISED:
            alone = sums[:, rows.stop : rows.stop + len(example.targets)]
            normalised = NORMALISED[task.metric](choices.astype(np.float64), alone, example.choices)
            asked.append(np.where(np.isfinite(right), normalised.argmax(axis=1) == example.answer, np.nan))
    metrics = {"accuracy": accuracy, "margin": margin} | ({task.metric: asked} if asked else {})
    return {name: np.stack(values, axis=1).astype(np.float32) for name, values in metrics.items()}


# The harness's metrics of multiple choice, by the score whose maximum is the model's choice: of the choices'
# log-probabilities, float64[P, C], those without the prompt, where the metric is acc_mutual_info, and the choices.
NORMALISED: dict[str, Callable[[np.ndarray, np.ndarray, tuple[str, ...]], np.ndarray]] = {
    "acc_norm": lambda sums, alone, choices: sums / np.array([len(choice) for choice in choices]),
    "acc_bytes": lambda sums, alone, choices: sums / np.array([len(choice.encode()) for choice in choices]),
    "acc_mutual_info": lambda sums, alone, choices: sums - alone,
}


def _choices(task: TextTask) -> Iterator[tuple[Example, slice]]:
    """The examples of multiple choice, and the rows of each one's choices."""
    begin = 0
    for example in task.examples:
        yield example, slice(begin, begin + len(example.targets))
        begin += len(example.targets) * (2 if task.metric == "acc_mutual_info" else 1)
