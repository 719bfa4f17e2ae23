"""Tasks whose outputs are compared with the target as texts, by one of several metrics.

Scores are per example, between 0 and 1, and higher is better. The overlap of words and characters is measured by the
packages rouge-score, sacrebleu and rapidfuzz, and Japanese cut into words by fugashi, all of which are imported when a
task asks for them.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import Field

from evojax_merge.errors import InputError
from evojax_merge.schema.section import Text, Whole
from evojax_merge.tasks.answers import extract_answer
from evojax_merge.tasks.choices import brief
from evojax_merge.tasks.language import check_language, language_of
from evojax_merge.tasks.patterns import check_pattern, find_all
from evojax_merge.tasks.prompts import PromptConfig
from evojax_merge.tasks.sampling import UNITS, SamplingConfig, length_scores
from evojax_merge.tasks.task import SHARE_RIGHT, Opening, Responses, TaskKind
from evojax_merge.tasks.templates import field_path, look_up
from evojax_merge.tasks.text import (
    PromptedTask,
    TextTask,
    check_texts,
    cut_target,
    open_prompted,
    probe_texts,
)

Metric = Literal[
    "exact_match", "contains", "regex", "rouge_l", "rouge_l_mecab", "chrf", "bleu", "anls", "vqa_accuracy", "json",
    "length",
]  # fmt: skip
# Metrics by which the target itself is right, and those by which an output is right or wrong.
EXACT = ("exact_match", "contains", "json")
RIGHT_OR_WRONG = (*EXACT, "regex")
# By metric, the packages that it needs by their modules, and the extra that has them.
ROUGE, BLEU = {"rouge_score": "rouge-score"}, {"sacrebleu": "sacrebleu"}
MECAB = {name.replace("-", "_"): name for name in ("rouge-score", "fugashi", "unidic-lite", "neologdn", "emoji")}
PACKAGES = {
    "rouge_l": (ROUGE, "text-metrics"), "chrf": (BLEU, "text-metrics"), "bleu": (BLEU, "text-metrics"),
    "anls": ({"rapidfuzz": "rapidfuzz"}, "text-metrics"), "rouge_l_mecab": (MECAB, "text-metrics,japanese"),
}  # fmt: skip
# The edits, as a share of the longer text, from which on ANLS is 0.
FAR = 0.5
# The people whose answer is right by vqa_accuracy where they agree.
AGREEING = 3
# Words that vqa_accuracy leaves out, and numbers that it writes in digits.
ARTICLES = ("a", "an", "the")
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
# Signs that it leaves out where one stands beside white space, or a number has a comma; else a space takes their place.
# Apostrophes and points, but for those of decimals, are left out everywhere.
SIGNS = re.escape(';/[]"{}()=+\\_-><@`,?!')
# Characters of scripts without spaces between words: kana, ideographs, Thai, Lao, Burmese and Khmer.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
WORDS = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
FENCED = re.compile(r"\s*```[^\n`]*\n(.*?)\n?\s*```\s*", re.DOTALL)


class GenerationConfig(SamplingConfig, PromptConfig):
    """A task whose outputs are compared with the target as texts."""

    optional: ClassVar = (*PromptConfig.optional, *SamplingConfig.optional)

    kind: Literal["generation"] = Field(description="the kind of task")
    metric: Metric = Field(
        "exact_match",
        description="how an output is compared with the target: as a whole, by a part, by words …; "
        "length: minus tokens",
    )
    pattern: Text | None = Field(
        None, description="a regular expression, whose last match is what is compared; default: the whole output"
    )
    max_new_tokens: Whole = Field(256, ge=1, le=1_000_000, description="how many tokens a model may write")
    stop: list[Text] = Field([], max_length=100, description="texts that end what a model writes")
    accept: Text | None = Field(
        None,
        description="the field, or field[key], of further right answers, or all for vqa_accuracy; the best one counts",
    )
    language: Text | None = Field(
        None, description="an answer in another language scores 0, where it is long enough to tell; default: any"
    )

    @property
    def takes_json(self) -> bool:
        return self.metric == "json"


@dataclass(frozen=True, kw_only=True)
class GenerationTask(PromptedTask):
    """A task (tasks.task) that compares outputs with targets. `comparison`: the metric of an output; `pattern`: an
    expression whose last match in an output is compared; None: the whole output is. `accepted`: for each example
    further right answers; `language`: the only one whose answers count, where the target is not in another one (None:
    any does)."""

    units: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("exact_match", "contains", "regex", "json"), SHARE_RIGHT), "rouge_l": "ROUGE-L, 0 to 1",
        "rouge_l_mecab": "ROUGE-L, 0 to 1", "chrf": "chrF, 0 to 1", "bleu": "BLEU, 0 to 1", "anls": "ANLS, 0 to 1",
        "vqa_accuracy": "VQA accuracy, 0 to 1", **UNITS,
    }  # fmt: skip

    by_example: ClassVar[tuple[str, ...]] = (*PromptedTask.by_example, "accepted")

    accepted: tuple[tuple[str, ...], ...]
    comparison: Metric
    pattern: str | None = None
    language: str | None = None

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        texts, samples = responses.texts, self.sampling.samples
        if self.comparison == "length":
            return {"length": length_scores(responses.lengths, samples)}
        # Candidates often agree: each distinct output is judged once.
        judge = cache(lambda n, text: self._judge(text, (self.target(n), *self.accepted[n])))
        scores = [[judge(number // samples, text) for number, text in enumerate(row)] for row in texts]
        by_answer = np.array(scores, np.float32).reshape(len(texts), self.size * samples)
        right = self.comparison if self.comparison in RIGHT_OR_WRONG else None
        return self.sampling.reduce({self.comparison: by_answer}, texts, right, self._answer)

    def _answer(self, example: int, output: str) -> str | None:
        return output.strip() if self.pattern is None else extract_answer(output, self.pattern, f"task {self.name}")

    def _judge(self, output: str, targets: Sequence[str]) -> float:
        where = f"task {self.name}"
        answer = output if self.pattern is None else extract_answer(output, self.pattern, where)
        if answer is None or (self._is_foreign(answer) and not self._is_foreign(targets[0])):
            return 0.0
        if self.comparison == "vqa_accuracy":
            return vqa_accuracy(answer, targets[1:])
        return max(compare(self.comparison, answer, target, where) for target in targets)

    def _is_foreign(self, text: str) -> bool:
        return self.language is not None and language_of(text) not in (None, self.language)

    def wanted(self, example: int) -> Sequence[str]:
        if self.comparison not in ("exact_match", "contains"):
            return ()
        return [target.strip() for target in (self.target(example), *self.accepted[example])]

    def companion(self) -> TextTask | None:
        """The likelihood of the targets; None where they are expressions, and for an output's length."""
        return None if self.comparison in ("regex", "length") else self.likelihood_of_targets()

    def extraction_failure(self, texts: Sequence[str]) -> str | None:
        if (
            self.pattern is None
            or self.comparison == "length"
            or any(extract_answer(text, self.pattern, f"task {self.name}") for text in texts)
        ):
            return None
        return f"the pattern {self.pattern!r}"

    def target(self, example: int) -> str:
        return str(self.examples[example].answer)

    def extracted(self, example: int, outputs: Sequence[str]) -> str | None:
        chosen = self.sampling.majority(example, outputs, self._answer)
        return None if self.pattern is None or chosen is None else self._answer(example, outputs[chosen])


# ---------------------------------------------------------------------------------------------------------------
# From the config and its file to the task


def open_generation(config: GenerationConfig, opening: Opening) -> GenerationTask:
    """The task on the examples of one file. Raises InputError for a fault of config or file, or a missing package."""
    where = opening.where
    packages, extra = PACKAGES.get(config.metric, ({}, ""))
    for module, package in packages.items():
        try:
            import_module(module)
        except ImportError:
            what = f"{config.metric} needs the package {package}; pip install 'evojax-merge[{extra}]'"
            raise InputError(f"{where}.metric", what) from None
    if config.language is not None:
        check_language(f"{where}.language", config.language)
    if config.metric == "vqa_accuracy" and config.accept is None:
        raise InputError(f"{where}.accept", "missing; vqa_accuracy goes by the answers of several people in a field")
    if config.over_samples != "mean" and config.metric not in RIGHT_OR_WRONG:
        what = f"{config.over_samples}; {config.metric} does not say which answers are right"
        raise InputError(f"{where}.over_samples", f"{what}, as {', '.join(RIGHT_OR_WRONG)} do; expected mean")
    check_texts(where, config, {"prompt": True, "target": False})
    sampling = config.sampling(opening.seed)
    task = open_prompted(
        GenerationTask, config, opening, "exact_match", sampling.metric(config.metric), accepted=(),
        comparison=config.metric, pattern=config.pattern, language=config.language, sampling=sampling,
        stop_pattern=config.stop_pattern(where, config.pattern),
    )  # fmt: skip
    accepted = tuple(
        () if config.accept is None else _accepted(task.where(example), record, config.accept)
        for example, record in zip(task.examples, task.records, strict=True)
    )
    task = replace(task, accepted=accepted, records=())
    if config.pattern is not None:
        check_pattern(where, config.pattern, config.max_new_tokens, probe_texts(task))
    for example, further in zip(task.examples, accepted, strict=True):
        if config.metric == "vqa_accuracy" and len(further) <= AGREEING:
            what = f"{config.accept}: has {len(further)}; vqa_accuracy is for more than {AGREEING} people's answers"
            raise InputError(task.where(example), what)
        for target in (str(example.answer), *further):
            _check_target(where, task.where(example), target, config)
    return task


KIND = TaskKind(GenerationConfig, open_generation, source="file")


def _accepted(place: str, record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The further right answers of a record, each a text, or in a field `answer`, as VQA has them. Raises InputError
    where the field is missing, or is no list of texts."""
    path = field_path(name, record)
    answers = look_up(place, "accept", path, record) if len(path) > 1 else record.get(name)
    if isinstance(answers, list):
        answers = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        what = "missing" if path[0] not in record else f"{brief(str(answers))} is no list of texts"
        raise InputError(place, f"{name}: {what}; expected a list of further right answers")
    return tuple(answers)


def _check_target(where: str, place: str, target: str, config: GenerationConfig) -> None:
    """Raises InputError for a target that the metric cannot compare, or of which the pattern finds another part."""
    if config.metric == "json":
        try:
            json.loads(target)
        except (ValueError, RecursionError) as error:
            raise InputError(place, f"target: {brief(target)} is not valid JSON ({error})") from None
    if config.metric == "regex":
        check_pattern(f"{place}: target, a regular expression", target, 0)
    if config.pattern is None or config.metric not in EXACT:
        return
    answer = extract_answer(target, config.pattern, where)
    if answer is not None and compare(config.metric, answer, target, where) < 1:
        raise cut_target(where, config.pattern, answer, place, target)


# ---------------------------------------------------------------------------------------------------------------
# Metrics


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """The accuracy of the VQA challenge: an answer that three people gave is right, one that fewer gave a third for
    each of them; the mean over all ways to leave out one of the people (Antol et al., VQA, 2015)."""
    counted = _plain_answer(answer)
    same = [_plain_answer(other) == counted for other in given]
    return sum(min(1.0, (sum(same) - left_out) / AGREEING) for left_out in same) / len(same)


def _plain_answer(answer: str) -> str:
    """An answer in the form that VQA compares: no articles, signs or capitals, and numbers in digits."""
    written = text = " ".join(answer.split())
    for sign in set(re.findall(f"[{SIGNS}]", written)):
        is_left_out = f"{sign} " in written or f" {sign}" in written or re.search(r"\d,\d", written)
        text = text.replace(sign, "" if is_left_out else " ")
    text = re.sub(r"\.(?!\d)|['’]", "", text)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(word for word in words if word not in ARTICLES)


def compare(metric: str, answer: str, target: str, where: str = "tasks") -> float:
    """The score of an answer by a metric of two texts, between 0 and 1. `where` names the task in messages."""
    return _METRICS[metric](where, answer, target)


def _same_fields(answer: str, target: str) -> float:
    """Return 1 for an answer, also in a Markdown block, that is JSON with all of the target's fields, equal."""
    block = FENCED.fullmatch(answer)
    wanted = json.loads(target)
    try:
        value = json.loads(block[1] if block else answer)
        if isinstance(wanted, dict) and isinstance(value, dict):
            return float(all(name in value and _equal(value[name], wanted[name]) for name in wanted))
        return float(_equal(value, wanted))
    except (ValueError, RecursionError):
        return 0.0


def _equal(value: Any, wanted: Any) -> bool:
    """Return whether JSON values are equal. In JSON, unlike in Python, true is not 1."""
    if isinstance(value, dict) and isinstance(wanted, dict):
        return value.keys() == wanted.keys() and all(_equal(value[name], wanted[name]) for name in wanted)
    if isinstance(value, list) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_equal, value, wanted))
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


class _Words:
    """A text's words for ROUGE, as its package has them for ASCII; a character of a script without spaces is a word."""

    def tokenize(self, text: str) -> list[str]:
        return WORDS.findall(text.lower())


class _JapaneseWords:
    """The words of a text for ROUGE as fugashi has them, in the form in which EvoVLM-JP was measured: without emoji,
    and with one way to write a character."""

    def __init__(self) -> None:
        from fugashi import Tagger

        self._tagger = Tagger("-Owakati")

    def tokenize(self, text: str) -> list[str]:
        from emoji import is_emoji
        from neologdn import normalize

        plain = normalize("".join(character for character in text if not is_emoji(character)))
        words: list[str] = self._tagger.parse(" ".join(plain.split())).split()
        return words


@cache
def _rouge_scorer(words: type) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=words())


def _rouge_l(words: type, answer: str, target: str) -> float:
    return float(_rouge_scorer(words).score(target, answer)["rougeL"].fmeasure)


def _sacrebleu(name: str, answer: str, target: str) -> float:
    return float(getattr(import_module("sacrebleu"), name)(answer, [target]).score) / 100


def _anls(answer: str, target: str) -> float:
    """1 less the edits as a share of the longer text, without regard to case; 0 from half of it on (Biten et al., Scene
    text visual question answering, 2019)."""
    from rapidfuzz.distance import Levenshtein

    distance = Levenshtein.normalized_distance(answer.strip().lower(), target.strip().lower())
    return 0.0 if distance >= FAR else 1.0 - float(distance)


_METRICS: dict[str, Callable[[str, str, str], float]] = {
    "exact_match": lambda where, answer, target: float(answer.strip() == target.strip()),
    "contains": lambda where, answer, target: float(target.strip() in answer),
    "regex": lambda where, answer, target: float(bool(find_all(where, target, answer))),
    "rouge_l": lambda where, answer, target: _rouge_l(_Words, answer, target),
    "rouge_l_mecab": lambda where, answer, target: _rouge_l(_JapaneseWords, answer, target),
    "chrf": lambda where, answer, target: _sacrebleu("sentence_chrf", answer, target),
    "bleu": lambda where, answer, target: _sacrebleu("sentence_bleu", answer, target),
    "anls": lambda where, answer, target: _anls(answer, target),
    "json": lambda where, answer, target: _same_fields(answer, target),
}
assert {*_METRICS, "vqa_accuracy", "length"} == {*get_args(Metric)} <= GenerationTask.units.keys()
