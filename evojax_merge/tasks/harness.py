"""Tasks of the lm-eval harness: it builds the requests and scores the answers, the evaluator answers them.

The requests become the tokens that the harness's own `hf` model makes of them, and each candidate's answers go back
through the task's filters and `process_results`.
"""

import contextlib
import copy
import functools
import io
import logging
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from evojax_merge.errors import InputError, first_line
from evojax_merge.schema.section import Location, Name, Text, Whole
from evojax_merge.system.jinja_process import TemplateError
from evojax_merge.tasks import harness_tokens
from evojax_merge.tasks.function import FunctionFailed, guard_user_function
from evojax_merge.tasks.images import RecordImage, images_of
from evojax_merge.tasks.patterns import SECONDS, LimitedRegex, TooSlow, time_limit
from evojax_merge.tasks.prompts import chat_template
from evojax_merge.tasks.task import (
    SHARE_RIGHT,
    Opening,
    Responses,
    Row,
    TaskConfig,
    TaskDefaults,
    TaskKind,
    TaskRequests,
    TestSet,
)
from evojax_merge.tasks.task_folders import Templates, find_task, rendered_apart

# The seeds of the harness's own command line for few-shot sampling, Python's and NumPy's generators.
FEWSHOT_SEED, PYTHON_SEED, NUMPY_SEED = 1234, 0, 1234

# Tasks by which models are compared, their variants included. A user's own task of such a name counts as well.
BENCHMARKS = (
    "aclue", "aexams", "afrimgsm", "afrimmlu", "agieval", "ai2_arc", "aime", "anli", "arabicmmlu", "arc", "bbh",
    "belebele", "bigbench", "blimp", "boolq", "ceval", "cmmlu", "commonsense_qa", "copa", "drop", "global_mmlu",
    "global_piqa", "glue", "gpqa", "gsm8k", "gsm_plus", "hellaswag", "hendrycks_math", "humaneval", "ifeval", "jmmlu",
    "kmmlu", "lambada", "leaderboard", "logiqa", "mathqa", "mbpp", "medmcqa", "medqa", "mgsm", "minerva_math", "mmlu",
    "mmmlu", "nq_open", "openbookqa", "paws", "piqa", "race", "sciq", "sglue", "social_iqa", "squad", "super-glue",
    "supergpqa", "tinyarc", "tinygsm8k", "tinyhellaswag", "tinymmlu", "tinytruthfulqa", "tinywinogrande", "triviaqa",
    "truthfulqa", "wikitext", "winogrande", "xcopa", "xnli", "xquad", "xstorycloze", "xwinograd",
)  # fmt: skip

# Metrics of a whole set of examples: no example has a score of its own.
CORPUS_METRICS = ("bypass", "f1", "matthews_corrcoef", "bleu", "chrf", "chrf++", "ter", "brier_score")


class HarnessConfig(TaskConfig):
    """A task of the lm-eval harness, by its name there; `heldout` may name a second one."""

    optional: ClassVar = ("allow_code",)

    name: Name = Field("", description="what the task is called in tables; default: its name in lm-eval")
    lm_eval: Name = Field(description="the task's name in lm-eval")
    metric: Name | None = Field(
        None, description="as lm-eval writes it: exact_match,flexible-extract; default: the task's first"
    )
    docs: Whole | None = Field(None, ge=2, description="only the first so many examples, lm-eval's --limit")
    split: Literal["train"] | None = Field(
        None, description="train: the task's training examples in place of its others"
    )
    num_fewshot: Whole | None = Field(
        None, ge=0, le=10_000, description="how many examples are shown; default: the task's own"
    )
    include_path: Location | None = Field(None, description="a folder with task YAMLs of your own")
    images: Location | None = Field(None, description="the folder of documents' images; default: where you run")
    allow_code: bool = Field(
        False, description="true: functions, scripts and templates that the YAMLs of include_path name are run"
    )
    apply_chat_template: bool = Field(False, description="whether prompts go through the models' chat template")
    fewshot_as_multiturn: bool = Field(True, description="in a chat template: whether examples are turns of their own")
    system_instruction: Text | None = Field(None, description="as in lm-eval")
    on_test_set: bool = Field(False, description="true: the search may see examples that models are compared by")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        lm_eval = value.get("lm_eval") if isinstance(value, dict) else None
        # A text that is no valid name is reported under its own key.
        return (
            {"name": lm_eval} | value
            if isinstance(lm_eval, str) and lm_eval.isprintable() and 0 < len(lm_eval) <= 200
            else value
        )


@dataclass
class Source:
    """A task of the harness, loaded once for all requests and candidates. `where` names it in messages.

    `folders`: the config's keys that name folders, with these; `templates`: renders the templates of a task that may
    run no code; None: the harness does. `kept`: its requests by example, with the tokenizer whose chat template is in
    them. `rows`: the number of rows of tokens that each request of an example became when it was last asked.
    """

    where: str
    task: Any
    config: HarnessConfig
    files: tuple[Path, ...]
    size: int
    folders: Mapping[str, Path]
    templates: Templates | None = None
    kept: tuple[Any, list[list[Any]]] | None = None
    rows: dict[int, list[int]] = field(default_factory=dict)

    def instances(self, tokenizer: Any) -> list[list[Any]]:
        """The harness's instances, a list for each example."""
        template = tokenizer if self.config.apply_chat_template else None
        if self.kept is None or self.kept[0] is not template:
            self.kept = (template, self._build(template))
        return self.kept[1]

    @property
    def built(self) -> list[list[Any]]:
        """The instances that were last asked for."""
        assert self.kept is not None, "asked before it is scored"
        return self.kept[1]

    @property
    def shows_images(self) -> bool:
        return bool(getattr(self.task, "MULTIMODAL", False))

    def images(self, where: str, request: Any) -> tuple[RecordImage, ...]:
        """The images of a request. `where` names its example."""
        visual = request.args[-1]["visual"] if self.shows_images else None
        return (
            () if visual is None else images_of(where, "doc_to_image", visual, self.folders.get("images", Path.cwd()))
        )

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Encloses the task's work on answers. A task that is data alone is an input: its failure raises InputError."""
        try:
            with _running(self.where, self.templates):
                yield
        except InputError:
            raise
        except Exception as error:
            if self.templates is None:
                raise
            if isinstance(error, TimeoutError):
                raise InputError(self.where, f"takes more than {SECONDS:g} s to score an answer") from None
            raise InputError(self.where, f"lm-eval cannot score an answer ({first_line(error)})") from error

    def _build(self, tokenizer: Any) -> list[list[Any]]:
        config, chat = self.config, None
        if tokenizer is not None:
            template = chat_template(f"{self.where}: apply_chat_template", tokenizer, None)
            chat = functools.partial(harness_tokens.written_chat, template, tokenizer, shows_images=self.shows_images)
        # Few-shot examples are drawn from one stream over all examples, so they are built together and in order.
        self.task.set_fewshot_seed(FEWSHOT_SEED)
        try:
            with lm_eval_context(), _running(self.where, self.templates):
                self.task.build_all_requests(
                    limit=config.docs,
                    rank=0,
                    world_size=1,
                    system_instruction=config.system_instruction,
                    apply_chat_template=config.apply_chat_template,
                    fewshot_as_multiturn=config.fewshot_as_multiturn,
                    chat_template=chat,
                )
        except TemplateError as error:
            raise InputError(self.where, f"apply_chat_template: the models' chat template failed ({error})") from None
        except InputError:
            raise
        except Exception as error:
            # A task is a program of its makers, templates and functions included.
            raise InputError(self.where, f"lm-eval cannot build its requests ({first_line(error)})") from error
        by_example: dict[int, list[Any]] = {}
        for instance in self.task.instances:
            by_example.setdefault(instance.doc_id, []).append(instance)
        return [sorted(group, key=lambda instance: instance.idx) for group in by_example.values()]


@dataclass(frozen=True)
class HarnessTask(TaskDefaults):
    """A task (tasks.task) of the harness on some of its examples. `metric` is in the harness's notation,
    `exact_match,flexible-extract`: the metric and the filter that the answers go through first.
    """

    units: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"), SHARE_RIGHT
    )

    by_example: ClassVar[tuple[str, ...]] = ("examples",)

    name: str
    metric: str
    weight: float
    source: Source
    examples: tuple[int, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.source.files

    def requests(self, tokenizer: Any, context: int) -> TaskRequests:
        instances = self.source.instances(tokenizer)
        scored: list[Row] = []
        prompts: list[Row] = []
        limits: set[tuple[int, tuple[str, ...]]] = set()
        for number, example in enumerate(self.examples):
            where, counts = f"{self.source.where}, example {example}", []
            for request in instances[example]:
                images = self.source.images(where, request)
                if request.request_type == "generate_until":
                    text, settings = request.args[:2]
                    new, stop = harness_tokens.output_limits(where, settings, tokenizer)
                    limits.add((new, stop))
                    if new >= context:
                        raise InputError(where, f"asks for {new} new tokens; the models' context is {context}")
                    if self.source.shows_images:
                        tokens = harness_tokens.encode_images(tokenizer, where, text, images)
                        harness_tokens.check_length(where, len(tokens) + new, context)
                    else:
                        tokens = harness_tokens.encode(tokenizer, text, tokenizer.bos_token)[-(context - new) :]
                    if not tokens:
                        raise InputError(where, "the prompt has no token")
                    prompts.append(Row(tuple(tokens), len(tokens), where, number))
                    counts.append(1)
                    continue
                if self.source.shows_images:
                    before, target = request.args[:2]
                    seen = harness_tokens.encode_images(tokenizer, where, before.rstrip(), images)
                    both = harness_tokens.encode_images(tokenizer, where, before + target, images)
                    pairs = [(seen, both[len(seen) :])]
                    harness_tokens.check_length(where, sum(map(len, pairs[0])) - 1, context)
                elif request.request_type == "loglikelihood":
                    pairs = [harness_tokens.encode_pair(tokenizer, *request.args)]
                else:
                    pairs = harness_tokens.rolling_windows(tokenizer, request.args[0], context)
                for before, target in pairs:
                    if not before or not target:
                        raise InputError(where, "has no token to score")
                    if len(target) > context:
                        raise InputError(where, f"{len(target)} tokens to score; the models' context is {context}")
                    # The last token is only predicted, so that the model reads `context` tokens at most.
                    tokens = [*before, *target][-(context + 1) :]
                    scored.append(Row(tuple(tokens), len(tokens) - len(target), where, number))
                counts.append(len(pairs))
            self.source.rows[example] = counts
        if len(limits) > 1:
            raise InputError(self.source.where, "its examples differ in stop texts or length; not supported")
        new, stop = limits.pop() if limits else (0, ())
        return TaskRequests(tuple(scored), tuple(prompts), new, stop)

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        """`metric,filter` -> float32[P, N]. Metrics of which the harness wants low values are negated. A perplexity is
        given as the log-probability behind it, weighted so that the mean over examples is that of a word (or byte) of
        the set; `bits_per_byte` is negated likewise."""
        population = max(len(responses.totals), len(responses.texts))
        given = [self._given(responses, p) for p in range(population)]
        # Candidates often agree: every distinct set of answers to an example is scored once.
        answered = [(p, n, answer) for p, row in enumerate(given) for n, answer in enumerate(row) if answer is not None]
        distinct: dict[tuple[int, tuple[Any, ...]], dict[str, Any]] = {(n, answer): {} for _, n, answer in answered}
        self._process(distinct)
        names = dict.fromkeys([self.metric, *(name for metrics in distinct.values() for name in metrics)])
        values = {name: np.full((population, self.size), np.nan, object) for name in names}
        for p, n, answer in answered:
            for name, value in distinct[n, answer].items():
                values[name][p, n] = value
        matrices = {name: self._matrix(name.partition(",")[0], table) for name, table in values.items()}
        if matrices[self.metric] is None:
            raise InputError(self.source.where, f"metric: {self.metric!r} has no value for a single example")
        return {name: matrix for name, matrix in matrices.items() if matrix is not None}

    def extraction_failure(self, texts: Sequence[str]) -> str | None:
        if self._fallback is None or self.source.kept is None or not texts:
            return None
        answers = self._filtered(self.examples, texts)
        return f"the filter {self._filter.name}" if all(answer == self._fallback for answer in answers) else None

    def prompt(self, example: int) -> str:
        task, doc = self.source.task, copy.copy(self.source.built[self.examples[example]][0].doc)
        with self.source.scoring():
            return str(task.doc_to_text(doc))

    def target(self, example: int) -> str | None:
        task, doc = self.source.task, copy.copy(self.source.built[self.examples[example]][0].doc)
        with self.source.scoring():
            target = task.doc_to_target(doc)
            if isinstance(target, int) and task.get_config("doc_to_choice") is not None:
                target = task.doc_to_choice(doc)[target]
        return None if target is None else str(target)

    def extracted(self, example: int, outputs: Sequence[str]) -> str | None:
        answers = self._filtered([self.examples[example]], outputs)
        return None if not answers or answers[0] == self._fallback else str(answers[0])

    @property
    def _filter(self) -> Any:
        """The harness's filter that outputs go through before the metric."""
        name = self.metric.partition(",")[2]
        return next(pipeline for pipeline in self.source.task._filters if pipeline.name == name)

    @property
    def _fallback(self) -> Any:
        """The filter's result where it has no match; None: it always has one."""
        steps = [make() for make in self._filter.filters]
        return next((step.fallback for step in reversed(steps) if hasattr(step, "fallback")), None)

    def _filtered(self, examples: Sequence[int], texts: Sequence[str]) -> list[Any]:
        """The filter's results on outputs for these examples of the source, those of one candidate before the next's. A
        list of one result is replaced by that result."""
        instances = self.source.built
        requests = [
            instance for e in examples for instance in instances[e] if instance.request_type == "generate_until"
        ]
        filled = [replace(requests[i % len(requests)], resps=[text], filtered_resps={}) for i, text in enumerate(texts)]
        if not filled:
            return []
        with self.source.scoring():
            self._filter.apply(filled)
        answers = [request.filtered_resps[self._filter.name] for request in filled]
        return [answer[0] if isinstance(answer, list) and len(answer) == 1 else answer for answer in answers]

    def paths(self) -> dict[str, str]:
        return {key: str(folder) for key, folder in self.source.folders.items()}

    def _given(self, responses: Responses, p: int) -> list[tuple[Any, ...] | None]:
        """Candidate p's answers by example, in the form of the harness's models; None where an answer is not finite."""
        totals, greedy = responses.totals[p], responses.greedy[p]
        rows, text, result = 0, 0, []
        for example in self.examples:
            answer: list[Any] = []
            for request, count in zip(self.source.built[example], self.source.rows[example], strict=True):
                if request.request_type == "generate_until":
                    answer.append(responses.texts[p][text])
                    text += 1
                    continue
                total = float(totals[rows : rows + count].sum(dtype=np.float64))
                is_single = request.request_type == "loglikelihood"
                answer.append((total, bool(greedy[rows])) if is_single else total)
                rows += count
            numbers = [a[0] if isinstance(a, tuple) else a for a in answer if not isinstance(a, str)]
            result.append(tuple(answer) if np.isfinite(numbers).all() else None)
        return result

    def _process(self, distinct: dict[tuple[int, tuple[Any, ...]], dict[str, Any]]) -> None:
        """Fill in the metrics of each (example, answers)."""
        filled = [
            [
                replace(request, resps=[answer] * (request.repeats or 1), filtered_resps={})
                for request, answer in zip(self.source.built[self.examples[n]], given, strict=True)
            ]
            for n, given in distinct
        ]
        together = [request for group in filled for request in group]
        if not together:
            return
        with self.source.scoring():
            for pipeline in self.source.task._filters:
                pipeline.apply(together)
        # Limits the time of scoring one example, where the task may run no code.
        limit = contextlib.nullcontext if self.source.templates is None else functools.partial(time_limit, SECONDS)
        for group, values in zip(filled, distinct.values(), strict=True):
            for name in group[0].filtered_resps:
                with self.source.scoring(), limit():
                    # A task's own function may change the document that it is given.
                    metrics = self.source.task.process_results(
                        copy.copy(group[0].doc), [request.filtered_resps[name] for request in group]
                    )
                values |= {f"{metric},{name}": value for metric, value in metrics.items()}

    def _matrix(self, metric: str, values: np.ndarray) -> np.ndarray | None:
        """object[P, N] of the harness's values -> scores, or None where they are not of single examples."""
        task = self.source.task
        kind = _aggregation_name(task, metric)
        if kind in ("weighted_perplexity", "bits_per_byte"):
            pairs = [[value if isinstance(value, tuple) else (value, math.nan) for value in row] for row in values]
            sums, weights = np.moveaxis(np.asarray(pairs, np.float64), -1, 0)
            scores = sums * self.size / weights.sum(axis=1, keepdims=True)
            return (scores / math.log(2) if kind == "bits_per_byte" else scores).astype(np.float32)
        if kind in CORPUS_METRICS or not all(isinstance(value, (bool, int, float, np.number)) for value in values.flat):
            return None
        # The value behind a perplexity is a log-probability already.
        sign = 1.0 if kind == "perplexity" or task.higher_is_better().get(metric, True) else -1.0
        return (sign * values.astype(np.float64)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------
# From the config and the harness's index to the task


def open_task(config: HarnessConfig, opening: Opening) -> HarnessTask:
    """The task of the harness that the config names. Raises InputError for an unknown task, metric or split, and for
    options that the task does not have."""
    where, folders = opening.where, dict[str, Path]()
    if config.include_path is not None:
        folders["include_path"] = (opening.folder / os.path.expanduser(config.include_path)).resolve()
        if not folders["include_path"].is_dir():
            raise InputError(f"{where}.include_path", f"{config.include_path}: no such folder")
    elif config.allow_code:
        raise InputError(f"{where}.allow_code", "has no meaning without include_path; leave it out")
    if config.images is not None:
        folders["images"] = opening.images(config.images, opening.folder)
    _, lm_eval = opening.source("lm_eval", config.lm_eval)

    def limited(make: Callable[[], Any]) -> Any:
        """A step of a filter. The harness's own ones that look for an expression get the time limit of patterns."""
        step = make()
        is_own = type(step).__module__ == "lm_eval.filters.extraction"
        if is_own and isinstance(getattr(step, "regex", None), re.Pattern):
            step.regex = LimitedRegex(f"{where}: {lm_eval}", step.regex)
        return step

    manager, files, templates = find_task(where, lm_eval, folders.get("include_path"), config.allow_code)
    try:
        with lm_eval_context(), _running(lm_eval, templates):
            (task,) = manager.load([lm_eval])["tasks"].values()
            for pipeline in task._filters:
                # Otherwise an invalid expression would only be noticed when the first outputs are scored.
                for make in pipeline.filters:
                    make()
                pipeline.filters = [functools.partial(limited, make) for make in pipeline.filters]
    except InputError:
        raise
    except Exception as error:
        # The library of data sets says "an error occurred", and what occurred in the cause.
        is_outer = type(error).__module__.startswith("datasets.") and error.__cause__ is not None
        reason = first_line(error.__cause__ if is_outer else error)
        raise InputError(where, f"lm_eval: {lm_eval} cannot be loaded ({reason})") from error
    if task.get_config("doc_to_audio") is not None:
        raise InputError(where, f"lm_eval: {lm_eval} plays sounds; texts and images are supported")
    if getattr(task, "MULTIMODAL", False) and task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise InputError(where, f"lm_eval: {lm_eval} shows images and asks for no answer; not supported")
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(where, f"lm_eval: {lm_eval} runs code that the model writes; not supported")
    configured = task.get_config("num_fewshot")
    # A task that sets 0 itself keeps it, as in the harness.
    task.set_config("num_fewshot", (configured or 0) if configured == 0 or config.num_fewshot is None
                    else config.num_fewshot)  # fmt: skip
    if config.split == "train":
        training = task.get_config("training_split")
        if training is None:
            raise InputError(where, f"split: {lm_eval} has no training split")
        task.set_config("test_split", training)
        # No example is shown as a few-shot example for itself.
        if task.fewshot_cfg.split is None:
            task.fewshot_cfg.split = training
    with lm_eval_context():
        size = len(task.eval_docs)
    size = size if config.docs is None else min(size, config.docs)
    metric = _metric(f"{where}: metric", task, config.metric)
    data = (task.get_config("dataset_kwargs") or {}).get("data_files", [])
    texts = [data] if isinstance(data, (str, list)) else list(data.values())
    named = [Path(text) for entry in texts for text in (entry if isinstance(entry, list) else [entry])]
    files = tuple(dict.fromkeys(path.resolve() for path in [*files, *named] if path.is_file()))
    source = Source(f"{where}: {lm_eval}", task, config, files, size, folders, templates)
    return HarnessTask(config.name, metric, config.weight, source, tuple(range(size)))


def test_set(config: HarnessConfig) -> TestSet | None:
    if config.split == "train" or not is_benchmark(config.lm_eval):
        return None
    return TestSet(config.lm_eval, "split: train or a task of your own (include_path)", config.on_test_set)


KIND = TaskKind(HarnessConfig, open_task, source="lm_eval", key="lm_eval", test_set=test_set)


def is_benchmark(lm_eval: str) -> bool:
    """Return whether models are compared by the task, so that a search on it makes the comparison worthless."""
    return re.match(rf"({'|'.join(map(re.escape, BENCHMARKS))})(?![a-z])", lm_eval.lower()) is not None


def _metric(where: str, task: Any, wanted: str | None) -> str:
    """The wanted `metric,filter`; without a filter the first filter, without either the first metric."""
    filters = [pipeline.name for pipeline in task._filters]
    metrics = [name for name in task.aggregation() if _aggregation_name(task, name) not in CORPUS_METRICS]
    if not metrics:
        raise InputError(where, "the task has only metrics of the whole set, none of single examples")
    metric, comma, chosen = (wanted or metrics[0]).partition(",")
    if metric not in metrics or (comma and chosen not in filters):
        choices = ", ".join(f'"{name},{pipeline}"' for name in metrics for pipeline in filters)
        raise InputError(where, f"{wanted!r}; the task has {choices}")
    return f"{metric},{chosen if comma else filters[0]}"


def _aggregation_name(task: Any, metric: str) -> str | None:
    """The harness's name of the function that aggregates a metric's values; None for a task's own."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    function = task.aggregation().get(metric)
    return next((name for name, registered in AGGREGATION_REGISTRY.items() if registered is function), None)


@contextlib.contextmanager
def _running(name: str, templates: Templates | None) -> Iterator[None]:
    """Encloses the code that a task runs, or, for a task that may run none, its templates. A refused template, or a
    pattern that takes too long, raises its own error: no function of the user's has failed."""
    try:
        with guard_user_function(name), rendered_apart(templates):
            yield
    except FunctionFailed as error:
        if isinstance(error.__cause__, InputError if templates is not None else TooSlow):
            raise error.__cause__ from None
        raise


@contextlib.contextmanager
def lm_eval_context() -> Iterator[None]:
    """Turns the harness's progress bars and the log of its data sets off, whose errors are raised as well, and seeds
    random numbers like its command line: some tasks shuffle their choices with the global generators."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)  # noqa: NPY002
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
