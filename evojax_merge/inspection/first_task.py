"""The task of a first search, by the fields of the data."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evojax_merge.errors import InputError
from evojax_merge.tasks.arrays import read_examples
from evojax_merge.tasks.choices import ChoiceTemplates, choice_fields
from evojax_merge.tasks.gsm import read_problem
from evojax_merge.tasks.harness import is_benchmark
from evojax_merge.tasks.networks import IMAGES
from evojax_merge.tasks.patterns import PROBED
from evojax_merge.tasks.prompts import read_turns
from evojax_merge.tasks.records import FORMS, Record, is_file_name, read_file
from evojax_merge.tasks.templates import check_template, field_path, fill, look_up

# Fields of a prompt and of what follows it, by the names that data sets have for them.
PAIRS = (
    ("prompt", "completion"), ("prompt", "target"), ("prompt", "response"), ("prompt", "answer"),
    ("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("question", "response"),
    ("problem", "solution"), ("problem", "answer"), ("query", "response"), ("input", "output"), ("input", "target"),
    ("inputs", "targets"), ("source", "target"), ("prompt", "chosen"), ("question", "chosen"),
    ("instruction", "chosen"), ("question", "answers[text][0]"), ("prompt", "canonical_solution"),
    ("article", "highlights"), *((text, "summary") for text in ("article", "document", "dialogue", "text")),
    ("text", "code"), ("text", "label_text"), ("text", "label"), ("sentence", "label"), ("hypothesis", "label"),
)  # fmt: skip
# Texts that belong to a prompt, which an instruction stands before, and other prompts behind.
CONTEXTS = ("input", "context", "passage", "article", "premise", "support")
CHOICES = ("choices", "options", "endings", "mc1_targets[choices]")
ANSWERS = (
    "answer_idx", "answer", "answerKey", "label", "gold", "correct_option", "correct_answer", "cop",
    "mc1_targets[labels]",
)  # fmt: skip
QUESTIONS = ("question", "question_stem")
STEMS = (*QUESTIONS, "prompt", "query", "ctx", "goal", "startphrase", "premise", "sentence")
TEXTS = ("text", "content")
# The names of fields that hold a choice each: A, B, … or option_a, choice1 and the like.
CHOICE = re.compile(
    "((option|choice|answer|ending|distractor|sol|op)[_ ]?)?[a-h]|"
    "(option|choice|answer|ending|distractor|sol)[_ ]?[0-8]",
    re.IGNORECASE,
)  # fmt: skip
# The fields of a network's examples by the kind of task: what the user's option names, its key in the task's section,
# and the names that data sets have for it. The key `text` is `image` where the field holds the name of a picture.
SEEN = (
    "image", "img", "picture", "photo", "file_name", "filename", "path", "file", "text", "sentence", "content",
    "review", "question", "input", "prompt",
)  # fmt: skip
RIGHT = ("label", "labels", "class", "category", "target", "score", "answer", "y")
WRITTEN = ("target", "summary", "translation", "output", "answer", "text", "sentence", "transcription")
QUERIES = ("query", "question", "anchor")
ROLES: dict[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    "classification": (("--prompt", "text", SEEN), ("--target", "target", RIGHT)),
    "regression": (("--prompt", "text", SEEN), ("--target", "target", RIGHT)),
    "text_to_text": (("--prompt", "text", SEEN), ("--target", "target", WRITTEN)),
    "transcription": (
        ("--prompt", "audio", ("audio", "path", "file", "file_name")), ("--target", "target", WRITTEN),
    ),
    "similarity": (
        ("--prompt", "first", ("sentence1", "sentence_1", "text1", "premise")),
        ("--prompt", "second", ("sentence2", "sentence_2", "text2", "hypothesis")),
        ("--target", "target", ("score", "similarity_score", "similarity", "label")),
    ),
    "retrieval": (
        ("--prompt", "query", QUERIES), ("--target", "target", ("document", "positive", "documents", "passage")),
    ),
    "image_generation": (("--prompt", "prompt", ("prompt", "caption", "text")),),
    "network": (("--prompt", "text", SEEN),),
}  # fmt: skip
# Fields of conversations, by the names that data sets have for them; pairs of preferences have a bad one beside them.
CHATS, REJECTED = ("messages", "conversations", "chosen"), "reject"
EXPECTED = (
    "question and answer, prompt and completion (or instruction and output, and the like), choices and answer, "
    "turns {role, content} under any name (in a config: messages: FIELD), or text; or name its fields by --prompt and "
    "--target (a field of a field: 'answers[text][0]')"
)
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?")
HELDOUT = 0.2
FORM = {**FORMS, ".npz": "arrays, whose first axes are the examples", "": "a folder for each class"}
# The examples above which worked ones are shown.
ENOUGH_TO_SHOW = 10
# The tokens that a model may write where it explains its answer, and where it does not.
LONGEST_ANSWER, SHORT_ANSWER = 256, 32
# A line of a section: key, value, and comment.
Line = tuple[str, Any, str]


@dataclass(frozen=True)
class TaskSection:
    """The section of a task: its keys in order, with their comments."""

    lines: tuple[Line, ...]

    @property
    def unscored(self) -> int:
        """The examples that are shown with their answers."""
        return next((value for key, value, _ in self.lines if key == "num_fewshot"), 0)


@dataclass(frozen=True)
class ModelTemplates:
    """The chat templates of a search's models. owner: the model whose template prompts can go through; None where no
    model has one. is_shared: whether all parents have it, and the base as well unless it has none. room: the most new
    tokens that leave the prompt its part of the models' context."""

    owner: str | None = None
    is_shared: bool = False
    room: int = LONGEST_ANSWER

    def lines(self) -> list[Line]:
        """The key of a task whose prompts are written for chats and as plain text alike."""
        if self.is_shared:
            return [("apply_chat_template", True, "prompts go through the chat template that the models share")]
        if self.owner is not None:
            return [("apply_chat_template", False, "plain text, since not all models have the same chat template")]
        return []


# ---------------------------------------------------------------------------------------------------------------
# The kind of task


@dataclass(frozen=True)
class Fields:
    """The fields of an example that the user has named: of its prompt, or input, and of what is right about it."""

    prompt: tuple[str, ...] = ()
    target: tuple[str, ...] = ()

    def templates(self, record: Record) -> tuple[str, str]:
        """The templates of the prompt and the target: a line for each field. Raises InputError for a name that the
        record does not have, or that holds no text."""
        for flag, names in (("--prompt", self.prompt), ("--target", self.target)):
            for name in names:
                check_template(f"{flag} {name}", f"{{{name}}}")
                fill(record.where, flag, f"{{{name}}}", record.fields)
        if not self.target:
            raise _missing("--target", record.where, record.fields)
        prompt, target = ("\n".join(f"{{{name}}}" for name in names) for names in (self.prompt, self.target))
        return prompt, target


def _missing(flag: str, where: str, fields: Mapping[str, Any]) -> InputError:
    names = ", ".join(map(str, list(fields)[:12])) or "none"
    return InputError(flag, f"missing; {where} has the fields {names}: name one")


def task_for_records(
    source: str, records: Sequence[Record], templates: ModelTemplates, named: Fields = Fields()
) -> TaskSection:
    """The section of a task of language models on these records, by the fields that are named, else by those of the
    first. source: the reference to the data. Raises InputError where the fields say no kind of task, and where
    conversations cannot be scored as plain text."""
    record = records[0]
    fields = record.fields
    if named != Fields():
        return _pair(source, *named.templates(record), records, templates)
    choices = next((name for name in CHOICES if _has(record, name)), None) or _choice_templates(records)
    if choices is not None:
        return _multiple_choice(source, records, choices, templates)
    pair = next((pair for pair in PAIRS if _has(record, *pair)), None)
    chats: list[tuple[str, ...]] = [
        (name,)
        for name in (*CHATS, *fields)
        if not str(name).startswith(REJECTED) and "assistant" in _roles(record, name)[1:]
    ]
    if pair is not None and _roles(record, pair[0]) and _roles(record, pair[1]) == ["assistant"]:
        chats.insert(0, pair)
    is_class = pair is not None and pair[1].startswith("label")
    if pair is not None and is_class and re.fullmatch(r"-?\d+|True|False", str(fields[pair[1]])):
        raise InputError(
            record.where, f"{pair[1]}: {fields[pair[1]]!r} is the number of a class; expected its name, which models "
            f"can write, in a field label_text, or in the config kind: multiple_choice, choices: {{0: NAME, 1: NAME}}, "
            f"answer: {pair[1]}; to score the number: --prompt {pair[0]} --target {pair[1]}; the text alone: --target "
            f"{pair[0]}"
        )  # fmt: skip
    unwanted = [record for record in records if str(record.fields.get("label")).lower() in ("false", "0")]
    if unwanted and (chats or pair is not None) and not is_class:
        label = str(unwanted[0].fields["label"]).lower()
        raise InputError(
            unwanted[0].where, f"label: {label} says that the answer is a bad one, as in "
            f"{len(unwanted)} of {len(records)} records; write the others to a file of their own, or name the "
            "fields by --prompt and --target"
        )  # fmt: skip
    if {"question", "answer"} <= fields.keys() and _are_problems(records[:PROBED]):
        return _problems(source, records, templates)
    # Beside a pair, turns under a name of the user's are most likely its history.
    if chats and (pair is None or chats[0] == pair or chats[0][0] in CHATS):
        return _chat(source, chats[0], templates) if templates.owner else _plain_chat(source, chats[0], records)
    if pair is not None:
        prompt = _with_context(_prompt(pair[0], templates), pair, records)
        return _pair(source, prompt, f"{{{pair[1]}}}", records, templates)
    text = next((name for name in TEXTS if name in fields), None)
    if text is not None:
        empty = ("prompt", "", "the whole text is predicted")
        return _likelihood(source, [empty, ("target", f"{{{text}}}", "a template over a record's fields")])
    for name in CHATS:
        if name in fields:
            # Its message about a turn says more than the names of the fields.
            roles = ", ".join(turn["role"] for turn in read_turns(record.where, name, name, fields))
            raise InputError(record.where, f"{name}: no assistant's turn follows another ({roles})")
    names = ", ".join(map(str, list(fields)[:12])) or "none"
    raise InputError(record.where, f"its fields ({names}) say no kind of task; expected {EXPECTED}")


def _choice_templates(records: Sequence[Record]) -> list[str] | dict[str, str] | None:
    """Templates of choices that have a field each, in a list, or by the letters or numbers that the answers are, or no
    and yes where these are truth values; None where there are none, or answers say no place among them."""
    names = sorted((name for name in records[0].fields if CHOICE.fullmatch(str(name))), key=str.lower)
    answer = next((name for name in ANSWERS if name in records[0].fields), None)
    if answer is None or not {*STEMS} & records[0].fields.keys():
        return None
    if all(isinstance(record.fields.get("answer"), bool) for record in records):
        return {"false": "no", "true": "yes"}
    if len(names) < 2:
        return None
    if answer == "correct_answer" and all(name.lower().startswith("distractor") for name in names):
        return [f"{{{name}}}" for name in (*names, answer)]
    right, places = {str(record.fields.get(answer)) for record in records}, range(len(names))
    letters, numbers = [chr(ord("A") + k) for k in places], [str(k + 1) for k in places]
    # Numbers from 0, which need no labels, never reach the last one.
    for labels in (letters, [letter.lower() for letter in letters], numbers if numbers[-1] in right else []):
        if right <= {*labels}:
            return {label: f"{{{name}}}" for label, name in zip(labels, names, strict=True)}
    by_text = all(record.fields.get(answer) in [record.fields.get(name) for name in names] for record in records)
    return [f"{{{name}}}" for name in names] if by_text or right <= {*map(str, places)} else None


def _has(record: Record, *names: str) -> bool:
    """Return whether a record has all of these fields, `name[key]` for a field of a field."""
    try:
        for name in names:
            look_up(record.where, name, field_path(name, record.fields), record.fields)
    except InputError:
        return False
    return True


def _are_problems(records: Sequence[Record]) -> bool:
    """Return whether most records are problems with a number as answer: an error names the others."""
    count = 0
    for record in records:
        with suppress(InputError):
            read_problem(record)
            count += 1
    return count > len(records) / 2


def _with_context(template: str, taken: Sequence[str], records: Sequence[Record]) -> str:
    """A prompt's template with the field of texts that it is about, if the records have one beside those taken."""
    for name in CONTEXTS:
        texts = [record.fields.get(name) for record in records]
        if name not in taken and any(texts) and all(isinstance(text, str | None) for text in texts):
            return f"{template}\n{{{name}}}" if taken[0] == "instruction" else f"{{{name}}}\n{template}"
    return template


def _roles(record: Record, *fields: str) -> list[str]:
    """The roles of a conversation's turns, by their names in chat templates; empty where a field holds none."""
    try:
        return [turn["role"] for field in fields for turn in read_turns(record.where, field, field, record.fields)]
    except InputError:
        return []


def _chat(source: str, fields: tuple[str, ...], templates: ModelTemplates) -> TaskSection:
    template = "that the models share" if templates.is_shared else f"of {templates.owner}; not all models have the same"
    read = "a record's turns: the assistant's last is scored, and all before it are its prompt"
    return _likelihood(
        source,
        [
            ("messages", fields[0] if len(fields) == 1 else list(fields), read),
            ("apply_chat_template", True, f"turns go through the chat template {template}"),
        ],
    )


def _plain_chat(source: str, fields: tuple[str, ...], records: Sequence[Record]) -> TaskSection:
    """Without a chat template a task has templates of its own, which read the same turns of every record."""
    roles, named = _roles(records[0], *fields), fields[0] if len(fields) == 1 else f"[{', '.join(fields)}]"
    first = roles.index("assistant", 1)
    for record in records:
        others = _roles(record, *fields)
        if others[: first + 1] != roles[: first + 1]:
            raise InputError(
                record.where, f"{named}: its turns ({', '.join(others) or 'none'}) are others than the first record's "
                f"({', '.join(roles)}); expected the same up to the first reply, or models with a chat template, for "
                f"which `messages: {named}` reads any turns"
            )  # fmt: skip
    places = [
        f"{field}[{number}][{'content' if 'content' in turn else 'value'}]"
        for field in fields for number, turn in enumerate(records[0].fields[field])
    ]  # fmt: skip
    longer = any(len(_roles(record, *fields)) > first + 1 for record in records)
    rest = "; later turns are left out: to score the last reply takes a chat template" if longer else ""
    return _likelihood(
        source,
        [
            (
                "prompt", "".join(f"{{{place}}}\n" for place in places[:first]),
                "the turns before the model's first, as plain text: no model has a chat template",
            ),
            ("target", f"{{{places[first]}}}", f"the model's first turn{rest}"),
        ],
    )  # fmt: skip


def _problems(source: str, records: Sequence[Record], templates: ModelTemplates) -> TaskSection:
    worked = all("####" in str(record.fields.get("answer")) for record in records[:PROBED])
    match = ("match", "strict" if worked else "flexible", "strict: the number after ####; flexible: the last")
    shown = ("num_fewshot", 2, "the first two are shown with their answers, and not scored")
    lines = [match, *templates.lines(), *([shown] if worked and len(records) >= ENOUGH_TO_SHOW else [])]
    kind = ("gsm", "worked problems with a number as answer, as in GSM8K")
    length = ("max_new_tokens", templates.room, "how much a model may write")
    return _section("problems", kind, source, [*lines, length], key="source")


def _section(name: str, kind: tuple[str, str], source: str, lines: Sequence[Line], key: str = "file") -> TaskSection:
    """The section of a task with one source of data, which `key` names. kind: with its comment."""
    ending = Path(source.removesuffix(".gz")).suffix
    form = FORM.get(ending, "one JSON object a line") if is_file_name(source) else "a data set to fetch"
    return TaskSection(
        (
            ("name", name, "what the task is called in tables"),
            ("kind", *kind),
            (key, source, form),
            ("heldout", HELDOUT, f"this share is never searched on; or a second {key}"),
            *lines,
        )
    )


def _multiple_choice(
    source: str, records: Sequence[Record], choices: ChoiceTemplates, templates: ModelTemplates
) -> TaskSection:
    record = records[0]
    answer, stem = (next((name for name in names if _has(record, name)), None) for names in (ANSWERS, STEMS))
    if answer is None or stem is None:
        missing = " or ".join(ANSWERS if answer is None else STEMS)
        raise InputError(record.where, f"has {choices}, but no {missing}; expected a question, choices and an answer")
    lines = [
        *templates.lines(),
        (
            "prompt", _with_context(_prompt(stem, templates), (stem, *choice_fields(choices), answer), records),
            "a template over a record's fields",
        ),
        ("choices", choices, "the field with the choices" if isinstance(choices, str) else "a template for each"),
        ("answer", answer, "the field with the right one: by text, place or letter"),
        ("metric", "margin", "smoother than accuracy: the right choice's lead over the best wrong one"),
    ]  # fmt: skip
    return _section("choices", ("multiple_choice", "the most likely of the choices is the answer"), source, lines)


def _prompt(field: str, templates: ModelTemplates) -> str:
    """The template of a prompt: a question has words around it, unless it is a chat's turn."""
    return f"Question: {{{field}}}\nAnswer:" if field in QUESTIONS and not templates.is_shared else f"{{{field}}}"


def _pair(source: str, prompt: str, target: str, records: Sequence[Record], templates: ModelTemplates) -> TaskSection:
    """The section of a task on prompts and targets, by their templates."""
    answers = [fill(records[0].where, "target", target, records[0].fields)]
    for record in records[1:PROBED]:
        # The check of all records says more of one that has no target.
        with suppress(InputError):
            answers.append(fill(record.where, "target", target, record.fields))
    lines: list[Line] = [
        *(templates.lines() if prompt else []),
        ("prompt", prompt, "a template over a record's fields" if prompt else "the whole text is predicted"),
        ("target", target, "what should follow it"),
    ]
    if not all(NUMBER.fullmatch(answer.strip()) for answer in answers):
        return _likelihood(source, lines)
    # In a chat models explain their answers.
    length = templates.room if templates.is_shared else min(SHORT_ANSWER, templates.room)
    lines.append(("max_new_tokens", length, "how much a model may write"))
    kind = ("exact_match", "right where the last number is the target's (whole texts: pattern: ^(.+)$)")
    return _section("answers", kind, source, lines)


def _likelihood(source: str, lines: Sequence[Line]) -> TaskSection:
    comment = "the mean log-probability of the target's tokens; answers to find: exact_match"
    return _section("text", ("likelihood", comment), source, lines)


def task_of_harness(name: str, templates: ModelTemplates) -> TaskSection:
    """The section of a task of lm-eval."""
    lines: list[Line] = [
        ("lm_eval", name, "the task's name in lm-eval"),
        ("heldout", HELDOUT, "this share is never searched on; or a second task"),
    ]
    if is_benchmark(name):
        lines.append(("split", "train", "models are compared on its test examples, which no search should see"))
    return TaskSection((*lines, *templates.lines(), ("docs", 200, "only its first examples")))


# ---------------------------------------------------------------------------------------------------------------
# Networks


def examples_of(data: Path) -> tuple[Path, int]:
    """The file or folder that a network's task reads, of a data file, an .npz of arrays, or a folder of pictures: by
    class, or with a table of them; and how many examples it holds. Raises InputError for any other folder."""
    if not data.is_dir():
        return data, len(next(iter(read_examples(data).values()))) if data.suffix == ".npz" else len(read_file(data))
    pictures = [file for label in sorted(data.iterdir()) if label.is_dir() for file in label.iterdir()]
    tables = [file for file in sorted(data.iterdir()) if file.suffix in (".jsonl", ".csv", ".tsv", ".parquet", ".json")]
    if len(tables) == 1:
        return tables[0], len(read_file(tables[0]))
    count = sum(file.suffix.lower() in IMAGES for file in pictures)
    if tables or not count:
        what = f"holds {len(tables)} tables" if tables else "holds neither a table nor pictures in folders"
        raise InputError(data, f"{what}; expected a folder of pictures for each class, or one table (metadata.csv)")
    return data, count


def task_of_network(kind: str, source: str, data: Path | None, named: Fields, function: str | None) -> TaskSection:
    """The section of a task of networks. kind: of the task; `classification` is one of numbers where the targets are;
    source: the reference to the data; data: its file or folder, None: there is none. Raises InputError for data that
    lack a field, and for a kind that needs a function where there is none."""
    if kind in ("network", "image_generation", "arrays") and function is None:
        raise InputError("--function", f"missing; a task of kind {kind} is scored by FILE.py:NAME, a function of yours")
    lines: list[Line] = [] if function is None else [("function", function, "higher is better")]
    if data is not None and data.is_dir():
        kind = "classification"
    elif data is not None and data.suffix == ".npz" and kind not in ("network", "arrays"):
        arrays = read_examples(data)
        lines += _field_lines(str(data), arrays, ROLES["classification"][1:], Fields(target=named.target))
        kind = "classification" if arrays[lines[-1][1]].dtype.kind in "biu" else "regression"
    elif data is not None and data.suffix != ".npz":
        record = read_file(data)[0]
        if kind == "similarity" and (len(named.prompt) == 1 or (not named.prompt and {*QUERIES} & {*record.fields})):
            kind = "retrieval"
        lines += _field_lines(record.where, record.fields, ROLES[kind], named)
        if kind == "classification" and isinstance(record.fields[lines[-1][1]], float | list):
            kind = "regression"
    if kind == "classification":
        lines.append(("metric", "log_probability", "of the right label; smooth where accuracy is flat"))
    section = _section(kind, (kind, "see `evojax-merge keys tasks`"), source, lines)
    return section if data is not None else TaskSection((*section.lines[:2], *lines))


def _field_lines(
    where: str, fields: Mapping[str, Any], roles: Sequence[tuple[str, str, Sequence[str]]], named: Fields
) -> list[Line]:
    """The lines that name an example's fields: those that the user has named, in their order, else by the names that
    data sets have. Raises InputError for a field that the example does not have, and where too many are named."""
    given = {"--prompt": [*named.prompt], "--target": [*named.target]}
    lines: list[Line] = []
    for flag, key, names in roles:
        left = [name for name in names if name in fields and name not in [taken for _, taken, _ in lines]]
        name = given[flag].pop(0) if given[flag] else next(iter(left), None)
        if name is None or name not in fields:
            raise _missing(flag if name is None else f"{flag} {name}", where, fields)
        is_picture = key == "text" and Path(str(fields[name])).suffix.lower() in IMAGES
        lines.append(("image" if is_picture else key, name, "the name of the examples' field"))
    for flag, others in given.items():
        if others:
            raise InputError(flag, f"{' '.join(others)}: more fields than the task reads; leave them out")
    return lines
