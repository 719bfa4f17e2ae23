"""Worked problems with a number as answer, as in GSM8K and MGSM.

Prompts, the search for the answer in an output and its comparison are those of the lm-eval harness's tasks (0.4.13):
`gsm8k`, `gsm8k_cot`, and, as `mgsm_ja`, its `mgsm_native_cot_ja`. Two answers are looked for: `strict` takes the one
after the agreed words, `flexible` the last number of the output. Where a language is wanted, an output counts only if
it is written in it (arXiv 2403.13187).
"""

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from evojax_merge.errors import InputError, did_you_mean, shown
from evojax_merge.schema.section import Location, Name, Text, Whole
from evojax_merge.system.jinja_process import TemplateError, render_chat
from evojax_merge.tasks.language import check_language, language_of
from evojax_merge.tasks.patterns import PROBED, check_pattern, find_all
from evojax_merge.tasks.prompts import chat_template, encode_prompt
from evojax_merge.tasks.records import Record
from evojax_merge.tasks.sampling import GREEDY, UNITS, Sampling, SamplingConfig, length_scores
from evojax_merge.tasks.task import (
    SHARE_RIGHT,
    Opening,
    Place,
    Responses,
    Row,
    TaskDefaults,
    TaskKind,
    TaskRequests,
    TestSet,
    brevity,
    token_ids,
)
from evojax_merge.tasks.templates import check_stop
from evojax_merge.tasks.text import Example, TextTask

Match = Literal["strict", "flexible"]
MATCHES: tuple[Match, ...] = ("strict", "flexible")
Metric = Literal["accuracy", "brevity", "length"]

FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
ENDS = ("</s>", "<|im_end|>")
NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)", re.ASCII)


@dataclass(frozen=True)
class Style:
    """The prompt of a problem, and the extraction and comparison of its answer.

    `prompt` has `{question}` where the problem goes. `strict`: a regular expression whose first match is the answer.
    `ignored`: expressions whose matches are removed from both answers, one after the other, before they are compared.
    `labels`: the words with which a data set's own worked examples begin their questions and answers.
    """

    prompt: str
    strict: str
    stop: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    ignore_punctuation: bool = False
    labels: tuple[str, str] | None = None


GSM8K_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
# MGSM's words: for a question, for an answer in steps, and for the answer at its end.
MGSM = {
    "bn": ("প্রশ্ন:", "ধাপে ধাপে উত্তর:", r"The answer is (\-?[0-9\.\,]+)"),
    "de": ("Frage:", "Schritt-für-Schritt-Antwort:", r"Die Antwort lautet (\-?[0-9\.\,]+)"),
    "en": ("Question:", "Step-by-Step Answer:", r"The answer is (\-?[0-9\.\,]+)"),
    "es": ("Pregunta:", "Respuesta paso a paso:", r"La respuesta es (\-?[0-9\.\,]+)"),
    "fr": ("Question :", "Réponse étape par étape :", r"La réponse est (\-?[0-9\.\,]+)"),
    "ja": ("問題：", "ステップごとの答え:", r"答えは(\-?[0-9\.\,]+)です。"),
    "ru": ("Задача:", "Пошаговоерешение:", r"Ответ — (\-?[0-9\.\,]+)"),
    "sw": ("Swali:", "Jibu la Hatua kwa Hatua:", r"Jibu ni (\-?[0-9\.\,]+)"),
    "te": ("ప్రశ్న:", "దశలవారీగా సమాధానం:", r"సమాధానం (\-?[0-9\.\,]+)"),
    "th": ("โจทย์:", "คำตอบทีละขั้นตอน:", r"คำตอบคือ (\-?[0-9\.\,]+)"),
    "zh": ("问题：", "逐步解答:", r"答案是 (\-?[0-9\.\,]+)。"),
}
STYLES = {
    "gsm8k": Style(
        "Question: {question}\nAnswer:", r"#### (\-?[0-9\.\,]+)", ("Question:", *ENDS), ignored=GSM8K_IGNORED
    ),
    "gsm8k_cot": Style(
        "Q: {question}\n\nA:", r"The answer is (\-?[0-9\.\,]+).", ("Q:", *ENDS), ignored=GSM8K_IGNORED
    ),
} | {
    f"mgsm_{language}": Style(
        f"{question} {{question}}\n{answer}", strict, (question, *ENDS),
        ignore_punctuation=True, labels=(question, answer),
    )
    for language, (question, answer, strict) in MGSM.items()
}  # fmt: skip


class GsmConfig(SamplingConfig):
    """Worked problems with a number as answer, as in GSM8K and MGSM.

    `heldout` may name a second source. `style`: chosen by the data's fields where there is none. The `num_fewshot`
    examples are not scored.
    """

    optional: ClassVar = ("metric", *SamplingConfig.optional)

    kind: Literal["gsm"] = Field(description="the kind of task")
    source: Location = Field(
        description="a JSONL or parquet file, hub:owner/dataset[@revision][/config][:split], or gsm-symbolic:language"
    )
    match: Match = Field(
        "strict", description="which number is the answer: strict, as the pattern says; flexible, the last"
    )
    metric: Metric = Field("accuracy", description="which of the scores is the fitness")
    language: Name | None = Field(None, description="an output counts only if it is in this language; default: in any")
    style: Name | None = Field(
        None, description="whose prompt and patterns: gsm8k, gsm8k_cot or mgsm_ja; default: by the data's fields"
    )
    prompt: Text | None = Field(None, description="a template with {question}; default: the style's")
    pattern: Text | None = Field(None, description="of the strict match, a regular expression; default: the style's")
    stop: list[Text] | None = Field(
        None, max_length=100, description="texts that end what a model writes; default: the style's"
    )
    num_fewshot: Whole = Field(0, ge=0, le=10_000, description="how many worked examples are shown")
    fewshot_source: Location | None = Field(None, description="where they come from; default: the first of source")
    apply_chat_template: bool = Field(
        False, description="whether prompts go through the models' chat template, worked examples as turns"
    )
    system_instruction: Text | None = Field(None, description="the first turn of a chat")
    max_new_tokens: Whole = Field(256, ge=1, le=1_000_000, description="how many tokens a model may write")
    on_test_set: bool = Field(False, description="true: the search may see examples that models are compared by")

    @model_validator(mode="after")
    def _fits(self) -> "GsmConfig":
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ValueError("prompt: expected {question} where the problem goes")
        if self.system_instruction is not None and not self.apply_chat_template:
            raise ValueError("system_instruction: a turn of a chat; say apply_chat_template: true, or put it in prompt")
        if self.fewshot_source is not None and not self.num_fewshot:
            raise ValueError("fewshot_source: say num_fewshot, how many examples to take from it")
        if self.over_samples != "mean" and self.metric != "accuracy":
            raise ValueError(f"over_samples: {self.over_samples} goes with metric: accuracy; expected mean")
        return self


@dataclass(frozen=True)
class WordProblem:
    """A problem. `answer`: the worked answer, None: the data has none; `number`: the wanted number as it is written."""

    question: str
    answer: str | None
    number: str
    where: str


@dataclass(frozen=True)
class GsmTask(TaskDefaults):
    """A task (tasks.task) of worked problems. `fewshot_examples`: the problems that are shown with their answers before
    every question, the same for all, as turns of the chat where `chat`. `system`: the beginning of a chat. `sources`:
    the config's keys that name sources, with these, files by their absolute paths."""

    units: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("accuracy", "strict", "flexible"), SHARE_RIGHT), "language": "share in the language",
        "brevity": "minus characters", **UNITS,
    }  # fmt: skip

    by_example: ClassVar[tuple[str, ...]] = ("problems",)

    name: str
    weight: float
    files: tuple[Path, ...]
    problems: tuple[WordProblem, ...]
    style: Style
    match: Match
    fewshot_examples: tuple[WordProblem, ...] = ()
    language: str | None = None
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 256
    sources: tuple[tuple[str, str], ...] = ()
    metric: str = "accuracy"
    sampling: Sampling = GREEDY
    stop_pattern: str | None = None

    def requests(self, tokenizer: Any, context: int) -> TaskRequests:
        where = f"task {self.name}: apply_chat_template"
        template = chat_template(where, tokenizer, None) if self.chat else None
        rows = []
        for number, problem in enumerate(self.problems):
            if template is None:
                tokens = encode_prompt(tokenizer, self.text(problem))
            else:
                tokens = self._chat(template, tokenizer, problem)
            rows.append(Row(tuple(tokens), len(tokens), problem.where, number))
        return TaskRequests(
            (), self.sampling.rows(rows), self.max_new_tokens, self.style.stop, sampler=self.sampling.sampler,
            counts_tokens=self.metric == "length", answer=self.stop_pattern,
        )  # fmt: skip

    def text(self, problem: WordProblem) -> str:
        """The text that a model continues with its answer."""
        shown = (f"{format_question(self.style, shot)}{_after(self.style, shot)}\n\n" for shot in self.fewshot_examples)
        return "".join(shown) + format_question(self.style, problem)

    def _chat(self, template: str, tokenizer: Any, problem: WordProblem) -> list[int]:
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        for shot in self.fewshot_examples:
            turns.append({"role": "user", "content": format_question(self.style, shot)})
            turns.append({"role": "assistant", "content": format_solution(self.style, shot)})
        turns.append({"role": "user", "content": format_question(self.style, problem)})
        try:
            text = render_chat(template, tokenizer, turns, add_generation_prompt=True)
        except TemplateError as error:
            # A template may refuse a system turn, say.
            raise InputError(
                f"task {self.name}", f"apply_chat_template: the models' chat template failed ({error})"
            ) from None
        # Templates write the beginning of the sequence themselves.
        return token_ids(tokenizer, text, add_special_tokens=False)

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        """`strict` and `flexible`: whether the number is right; `language`, where one is wanted: whether the output is
        in it; `accuracy`: whether both are as asked; `brevity`, where that is the metric. `length` alone, where that is
        the metric. float32[P, N] each."""
        if self.metric == "length":
            return {"length": length_scores(responses.lengths, self.sampling.samples)}
        wanted = [comparable(self.style, problem.number) for problem in self.problems]
        # Candidates often agree: each distinct output is judged once.
        judge = cache(lambda n, text: self._judge(text, wanted[n]))
        texts, samples = responses.texts, self.sampling.samples
        by_answer = {"brevity": brevity(texts)} if self.metric == "brevity" else {}
        for metric in ("accuracy", "strict", "flexible", *(["language"] if self.language else [])):
            values = [[judge(number // samples, text)[metric] for number, text in enumerate(row)] for row in texts]
            by_answer[metric] = np.array(values, np.float32).reshape(len(texts), self.size * samples)
        return self.sampling.reduce(by_answer, texts, "accuracy", self._vote)

    def _vote(self, example: int, output: str) -> str | None:
        answer = find_answer(self.style, self.match, output, f"task {self.name}")
        return None if answer is None else comparable(self.style, answer)

    def _judge(self, text: str, wanted: str) -> Mapping[str, bool]:
        right: dict[str, bool] = {}
        for match in MATCHES:
            answer = find_answer(self.style, match, text, f"task {self.name}")
            right[match] = answer is not None and comparable(self.style, answer) == wanted
        if self.language is None:
            return {**right, "accuracy": right[self.match]}
        language_ok = language_of(text) == self.language
        return {**right, "language": language_ok, "accuracy": right[self.match] and language_ok}

    def companion(self) -> TextTask | None:
        """The likelihood of the worked answers, where the data have them. None for a chat, whose turns a template
        writes, and for an output's length."""
        if (
            self.metric in ("brevity", "length")
            or self.chat
            or any(problem.answer is None for problem in self.problems)
        ):
            return None
        examples = [
            Example(self.text(problem), (_after(self.style, problem),), problem.number, place)
            for place, problem in enumerate(self.problems, start=1)
        ]
        return TextTask(
            self.name, "likelihood", "log_probability", self.weight, self.problems[0].where, tuple(examples)
        )

    def extraction_failure(self, texts: Sequence[str]) -> str | None:
        if self.metric in ("brevity", "length"):
            return None
        where = f"task {self.name}"
        if any(find_answer(self.style, self.match, text, where) is not None for text in texts):
            return None
        return "a number" if self.match == "flexible" else f"the pattern {self.style.strict!r}"

    def prompt(self, example: int) -> str:
        return self.problems[example].question

    def target(self, example: int) -> str:
        return self.problems[example].number

    def extracted(self, example: int, outputs: Sequence[str]) -> str | None:
        chosen = self.sampling.majority(example, outputs, self._vote)
        return None if chosen is None else find_answer(self.style, self.match, outputs[chosen], f"task {self.name}")

    def contents(self) -> list[tuple[tuple[str, str], Place]]:
        return [((problem.question, problem.number), (problem.where, 0)) for problem in self.problems]

    def paths(self) -> dict[str, str]:
        return dict(self.sources)


# ---------------------------------------------------------------------------------------------------------------
# From the config and its sources to the task


def open_gsm(config: GsmConfig, opening: Opening) -> GsmTask:
    """The task on the problems of one source. Raises InputError for a meaningless config or source."""
    where = opening.where
    if config.style is not None and config.style not in STYLES:
        raise InputError(f"{where}.style", f"unknown style {config.style!r}{did_you_mean(config.style, STYLES)}")
    if config.language is not None:
        check_language(f"{where}.language", config.language)

    scored = opening.read(*opening.source("source", config.source))
    files, sources = scored.files, [("source", scored.name)]
    fewshot_examples: tuple[WordProblem, ...] = ()
    if config.num_fewshot:
        key = "source" if config.fewshot_source is None else "fewshot_source"
        source = opening.read(key, config.fewshot_source or config.source)
        sources += [(key, source.name)] if config.fewshot_source else []
        files += tuple(file for file in source.files if file not in files)
        if config.num_fewshot > len(source.records):
            what = f"{config.num_fewshot}; {source.name} holds {len(source.records)} problems"
            raise InputError(f"{where}.num_fewshot", what)
        fewshot_examples = tuple(map(read_problem, source.records[: config.num_fewshot]))
        for shot in fewshot_examples:
            if shot.answer is None:
                raise InputError(shot.where, "has no worked answer to show; name other examples as fewshot_source")
    by_fields = "gsm8k"
    if "answer_number" in scored.records[0].fields:
        by_fields = f"mgsm_{config.language if config.language in MGSM else 'en'}"
    style = STYLES[config.style or by_fields]
    style = replace(
        style,
        prompt=style.prompt if config.prompt is None else config.prompt,
        strict=style.strict if config.pattern is None else config.pattern,
        stop=style.stop if config.stop is None else tuple(config.stop),
    )
    check_stop(where, style.stop)
    # A problem whose answer is shown is not scored, wherever it comes from.
    seen = {shot.question for shot in fewshot_examples}
    problems = tuple(p for p in map(read_problem, scored.records) if p.question not in seen)
    if not problems:
        raise InputError(f"{where}.num_fewshot", f"{config.num_fewshot}; leaves no problem of {scored.name} to score")
    samples = [f"{problem.question} {problem.answer or problem.number}" for problem in problems[:PROBED]]
    check_pattern(where, style.strict, config.max_new_tokens, samples)
    for problem in problems if config.pattern is not None else ():
        # An output like such an answer would count as wrong.
        answer = find_answer(style, "strict", problem.answer or "", where)
        if answer is not None and comparable(style, answer) != comparable(style, problem.number):
            raise InputError(
                f"{where}.pattern", f"{style.strict!r} finds {shown(answer)} in the worked answer of {problem.where}, "
                f"whose number is {shown(problem.number)}"
            )  # fmt: skip
    sampling = config.sampling(opening.seed)
    return GsmTask(
        config.name, config.weight, files, problems, style, config.match, fewshot_examples, config.language,
        config.apply_chat_template, config.system_instruction, config.max_new_tokens, tuple(sources),
        sampling.metric(config.metric), sampling, config.stop_pattern(where, style.strict),
    )  # fmt: skip


def test_set(config: GsmConfig) -> TestSet | None:
    if re.fullmatch(r"hub:.*gsm.*:test", config.source, re.IGNORECASE) is None:
        return None
    return TestSet(config.source, "the train split or examples of your own", config.on_test_set)


KIND = TaskKind(GsmConfig, open_gsm, source="source", test_set=test_set)


# ---------------------------------------------------------------------------------------------------------------
# Records


def read_problem(record: Record) -> WordProblem:
    """A record of GSM8K (`question`, `answer` that ends in `#### number`) or MGSM (with `answer_number`)."""
    fields = record.fields
    question = fields.get("question")
    answer, given = (_written(fields.get(key)) for key in ("answer", "answer_number"))
    if not isinstance(question, str) or not question.strip():
        keys = ", ".join(map(str, fields))
        raise InputError(record.where, f"question: expected a text, found {question!r} (the record has {keys})")
    if answer is not None and not isinstance(answer, str):
        raise InputError(record.where, f"answer: expected a worked answer that ends in '#### number', found {answer!r}")
    if given is None:
        if answer is None:
            raise InputError(record.where, "has neither answer nor answer_number")
        key, number = "answer", answer.rpartition("####")[2].strip()
    else:
        key, number = "answer_number", str(given).strip()
    if not NUMBER.fullmatch(re.sub(r"[,$]|\.$", "", number)):
        hint = "; expected a worked answer that ends in '#### number'" if key == "answer" else ""
        raise InputError(record.where, f"{key}: {number[-80:]!r} is not a number{hint}")
    return WordProblem(question.strip(), answer.strip() if answer else None, number, record.where)


def _written(value: Any) -> Any:
    """A number as a text. Parquet and pandas make floats of whole numbers where one is missing."""
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return str(int(value) if value == int(value) else value)
    return value


def format_question(style: Style, problem: WordProblem) -> str:
    """A question with its prompt. MGSM's own worked examples bring the word for it along."""
    prompt = style.prompt
    if style.labels is not None and problem.question.startswith(style.labels[0]):
        prompt = prompt.replace(f"{style.labels[0]} {{question}}", "{question}")
    return prompt.replace("{question}", problem.question)


def format_solution(style: Style, problem: WordProblem) -> str:
    """The worked answer without a label, in the hope of answers like it."""
    answer = problem.answer or ""
    if style.labels is None:
        return answer
    # The colon of the data may be the wide one.
    return re.sub(rf"^{re.escape(style.labels[1][:-1])}[:：]\s*", "", answer)


def _after(style: Style, problem: WordProblem) -> str:
    """The worked answer with the space that separates it from the prompt."""
    return format_solution(style, problem) if style.prompt[-1:].isspace() else f" {format_solution(style, problem)}"


# ---------------------------------------------------------------------------------------------------------------
# Answers


def find_answer(style: Style, match: Match, text: str, where: str = "tasks") -> str | None:
    """The answer in an output, of several groups the first that is not empty. `where` names the task in messages."""
    matches = find_all(where, style.strict, text) if match == "strict" else list(re.finditer(FLEXIBLE, text))
    if not matches:
        return None
    chosen = matches[0 if match == "strict" else -1]
    groups = chosen.groups("")
    # A single empty group is an answer; among several the first that is not empty is, as in the harness.
    answer = next((group for group in groups if group), None) if len(groups) > 1 else chosen[len(groups)]
    return None if answer is None else str(answer).strip()


def comparable(style: Style, answer: str) -> str:
    """An answer without the parts that the comparison ignores."""
    for pattern in style.ignored:
        answer = re.sub(pattern, "", answer)
    answer = answer.lower()
    return answer.translate(str.maketrans("", "", string.punctuation)) if style.ignore_punctuation else answer
