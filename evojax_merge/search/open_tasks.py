"""A task of the config -> its search split and its held-out split."""

import json
import os
import sys
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.folder import resolve
from evojax_merge.config import FunctionConfig, GsmConfig, HarnessConfig, TaskConfig, TextConfig
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.tasks.function import METRIC, FunctionTask, load_function
from evojax_merge.tasks.gsm import STYLES, GsmTask, WordProblem, first_worked, is_test_set, read_problem, style_of
from evojax_merge.tasks.harness import HarnessTask, is_benchmark, open_harness
from evojax_merge.tasks.harness import Options as HarnessOptions
from evojax_merge.tasks.language import check_language
from evojax_merge.tasks.patterns import check_pattern
from evojax_merge.tasks.records import Source, is_file_name, read_records, read_source
from evojax_merge.tasks.task import Task
from evojax_merge.tasks.templates import check_template
from evojax_merge.tasks.text import METRICS, Fields, Kind, TextTask, extract_answer, read_examples

# Examples that a user's pattern is tried on before the search.
PROBED = 50


def resolve_reference(where: object, reference: str, relative_to: Path) -> Path:
    """A model folder or data file: a path, a hub id, or `zoo:name` from the demo family, which is made on demand.
    `where` says in messages who names it."""
    if reference.startswith("zoo:"):
        from evojax_merge.zoo import resolve_reference as resolve_in_zoo

        try:
            return resolve_in_zoo(reference)
        except InputError as error:
            raise InputError(where, str(error)) from None
    return resolve(where, reference, relative_to)


def resolve_file(where: str, reference: str, relative_to: Path) -> Path:
    if reference.startswith("zoo:"):
        return resolve_reference(where, reference, relative_to)
    for path in (Path(reference).expanduser(), relative_to / reference):
        # Not the path's own method, which raises for a name that no file can have.
        if os.path.exists(path):
            return path.resolve()
    raise InputError(where, f"{reference}: no such file")


def open_task(where: str, config: TaskConfig, folder: Path, seed: int) -> tuple[Task, Task]:
    """A task's search split and held-out split. `where` names the task in messages; relative paths start in `folder`.

    Raises InputError for what the config or its data cannot mean.
    """
    _check_fair(where, config)
    task = _build(where, config, None, folder)
    if isinstance(config.heldout, str):
        return task, _build(where, config, config.heldout, folder)
    if task.size < 2:
        raise InputError(
            task.files[0] if task.files else where, "holds one example; a held-out share needs at least two"
        )
    return split_task(task, config.heldout, seed)


def open_whole_task(where: str, config: TaskConfig, folder: Path) -> Task:
    """A task on all its examples; where the config names a second source of held-out examples, on those."""
    return _build(where, config, config.heldout if isinstance(config.heldout, str) else None, folder)


def _build(where: str, config: TaskConfig, source: str | None, folder: Path) -> Task:
    """The task on the examples of `source`; None: of the config's own."""
    match config:
        case TextConfig():
            return _text_task(where, config, source, folder)
        case GsmConfig():
            return _gsm_task(where, config, source, folder)
        case HarnessConfig():
            return _harness_task(where, config, source, folder)
        case FunctionConfig():
            return _function_task(where, config, source, folder)
    raise TypeError(f"no kind of task: {type(config).__name__}")


def split_task(task: Task, share: float, seed: int) -> tuple[Task, Task]:
    """The search split, and a random `share` of the examples that the search never sees; the same for a seed."""
    order = np.random.default_rng([seed, task.size]).permutation(task.size)
    count = min(max(1, round(share * task.size)), task.size - 1)
    return task.subset(sorted(order[count:].tolist())), task.subset(sorted(order[:count].tolist()))


def _text_task(where: str, config: TextConfig, source: str | None, folder: Path) -> TextTask:
    metric = config.metric or METRICS[config.kind][0]
    if metric not in METRICS[config.kind]:
        raise InputError(where, f"metric: {metric!r}; {config.kind} has {', '.join(METRICS[config.kind])}")
    fields = _fields(where, config.prompt, config.target, config.choices, config.answer, config.delimiter)
    _check_stop(where, config.stop)
    file = resolve_file(f"{where}.file" if source is None else f"{where}.heldout", source or config.file, folder)
    task = TextTask(
        config.name, config.kind, metric, config.weight, str(file), tuple(read_examples(file, config.kind, fields)),
        config.pattern, config.max_new_tokens, tuple(config.stop),
    )  # fmt: skip
    if config.pattern is not None:
        samples = [f"{one.prompt} {''.join(one.targets)}" for one in task.examples[:PROBED]]
        check_pattern(where, config.pattern, config.max_new_tokens, samples)
    elif config.kind == "exact_match":
        answers = [str(one.answer) for one in task.examples]
        if not any(extract_answer(answer, None) for answer in answers):
            why = f"no target of {file} holds a number, which is the answer without a pattern ({answers[0][:100]!r})"
            raise InputError(f"{where}.pattern", f"missing; {why}")
    return task


def _fields(where: str, prompt: str, target: str, choices: str, answer: str, delimiter: str) -> Fields:
    for key, template in (("prompt", prompt), ("target", target)):
        check_template(f"{where}.{key}", template)
    _check_characters(f"{where}.delimiter", delimiter)
    return Fields(prompt, target, choices, answer, delimiter)


def _check_stop(where: str, stop: Sequence[str]) -> None:
    """An empty text stands at the beginning of every output, and would leave nothing of it."""
    for number, text in enumerate(stop):
        if not text:
            raise InputError(f"{where}.stop[{number}]", "is empty, and would end every output at once; leave it out")
        _check_characters(f"{where}.stop[{number}]", text)


def _check_characters(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(where, "holds half of a surrogate pair, which is no character") from None


def _gsm_task(where: str, config: GsmConfig, source: str | None, folder: Path) -> GsmTask:
    if config.style is not None and config.style not in STYLES:
        raise InputError(f"{where}.style", f"unknown style {config.style!r}{did_you_mean(config.style, STYLES)}")
    if config.language is not None:
        check_language(f"{where}.language", config.language)

    def read(key: str, reference: str) -> Source:
        named = is_file_name(reference)
        return read_source(resolve_file(f"{where}.{key}", reference, folder) if named else reference)

    scored = read("source", config.source) if source is None else read("heldout", source)
    files = scored.files
    fewshot_examples: tuple[WordProblem, ...] = ()
    if config.num_fewshot:
        key = "source" if config.fewshot_source is None else "fewshot_source"
        shown = read(key, config.fewshot_source or config.source)
        files += tuple(file for file in shown.files if file not in files)
        fewshot_examples = first_worked(f"{where}.num_fewshot", shown, config.num_fewshot)
    style = STYLES[config.style or style_of(scored.records, config.language)]
    style = replace(
        style,
        prompt=style.prompt if config.prompt is None else config.prompt,
        strict=style.strict if config.pattern is None else config.pattern,
        stop=style.stop if config.stop is None else tuple(config.stop),
    )
    _check_stop(where, style.stop)
    for key, text in (("prompt", style.prompt), ("system_instruction", config.system_instruction)):
        _check_characters(f"{where}.{key}", text or "")
    # A problem whose answer is shown is none, wherever it comes from.
    seen = {shot.question for shot in fewshot_examples}
    problems = tuple(p for p in map(read_problem, scored.records) if p.question not in seen)
    if not problems:
        raise InputError(f"{where}.num_fewshot", f"{config.num_fewshot}; leaves no problem of {scored.name} to score")
    samples = [f"{problem.question} {problem.answer or problem.number}" for problem in problems[:PROBED]]
    check_pattern(where, style.strict, config.max_new_tokens, samples)
    return GsmTask(
        config.name, config.weight, files, problems, style, config.match, fewshot_examples, config.language,
        config.apply_chat_template, config.system_instruction, config.max_new_tokens,
    )  # fmt: skip


def _function_task(where: str, config: FunctionConfig, source: str | None, folder: Path) -> FunctionTask:
    function = load_function(f"{where}.function", config.function, config.gets, folder)
    file = resolve_file(f"{where}.file" if source is None else f"{where}.heldout", source or config.file, folder)
    kind: Kind = "exact_match" if config.gets == "texts" else "likelihood"
    # What a right text is, the function knows: a record of texts needs no target, and this one is never read.
    target = "-" if config.gets == "texts" else config.target
    fields = _fields(where, config.prompt, target, "", "", config.delimiter)
    _check_stop(where, config.stop)
    text = TextTask(
        config.name, kind, METRIC, config.weight, str(file), tuple(read_examples(file, kind, fields)),
        max_new_tokens=config.max_new_tokens, stop=tuple(config.stop),
    )  # fmt: skip
    return FunctionTask(text, tuple(record for _, record in read_records(file)), function, config.gets)


def _harness_task(where: str, config: HarnessConfig, source: str | None, folder: Path) -> HarnessTask:
    include = None
    if config.include_path is not None:
        include = (folder / Path(config.include_path).expanduser()).resolve()
        if not include.is_dir():
            raise InputError(f"{where}.include_path", f"{config.include_path}: no such folder")
    options = HarnessOptions(
        include, config.num_fewshot, config.docs, config.split, config.apply_chat_template,
        config.fewshot_as_multiturn, config.system_instruction,
    )  # fmt: skip
    return open_harness(where, source or config.lm_eval, config.metric, config.name, config.weight, options)


def overlaps(where: str, tasks: Sequence[TaskConfig], full: Sequence[Task], heldout: Sequence[Task]) -> list[str]:
    """What makes held-out scores say less than they seem to: a line for each task with examples that stand more than
    once in its data, and for each of which held-out examples are among those that are searched on. `where` is the
    config; `full` and `heldout` are the splits of its tasks."""
    searched = {key for task in full if task.weight > 0 for key, _ in _examples(task)}
    lines = []
    for number, (config, search, held) in enumerate(zip(tasks, full, heldout, strict=True)):
        task = f"{where}: tasks[{number}]"
        if isinstance(config.heldout, str):
            lines += repeated(task, search) + repeated(f"{task}.heldout", held)
        else:
            lines += repeated(task, search, held)
        shared = [place for key, place in _examples(held) if key in searched]
        if shared:
            lines.append(
                f"{task}.heldout: {len(shared)} of the {held.size} held-out examples are among those that are searched "
                f"on ({_places(shared)}); on them the held-out scores show nothing new"
            )
    return lines


def repeated(where: str, *splits: Task) -> list[str]:
    """A line, if examples stand more than once in a task's data."""
    known: set[Hashable] = set()
    places = []
    for key, place in sorted((row for split in splits for row in _examples(split)), key=lambda row: row[1]):
        if key in known:
            places.append(place)
        known.add(key)
    if not places:
        return []
    count = sum(split.size for split in splits)
    return [f"{where}: {len(places)} of {count} examples repeat others of the same data ({_places(places)})"]


def _examples(task: Task) -> list[tuple[Hashable, tuple[str, int]]]:
    """Each example's content, and where it stands. The harness's tasks keep their examples to themselves."""
    match task:
        case TextTask():
            return [((one.prompt, one.targets, one.answer), (task.file, one.line)) for one in task.examples]
        case GsmTask():
            return [((one.question, one.number), (one.where, 0)) for one in task.problems]
        case FunctionTask():
            contents = (json.dumps(record, sort_keys=True) for record in task.records)
            return list(zip(contents, ((task.text.file, one.line) for one in task.text.examples), strict=True))
    return []


def _places(places: Sequence[tuple[str, int]]) -> str:
    """The first of them."""
    shown = [f"{file}:{line}" if line else file for file, line in places[:3]]
    return ", ".join(shown) + (", …" if len(places) > 3 else "")


def _check_fair(where: str, config: TaskConfig) -> None:
    """No search on the examples that models are compared by, unless the config says that this is meant."""
    match config:
        case HarnessConfig() if config.split != "train" and is_benchmark(config.lm_eval):
            found, instead = config.lm_eval, "split: train"
        case GsmConfig() if is_test_set(config.source):
            found, instead = config.source, "the train split"
        case _:
            return
    if config.weight == 0:
        return
    why = f"{found} is a benchmark, and a search on its test examples makes its score meaningless"
    if not config.on_test_set:
        raise InputError(where, f"on_test_set: {why}; take {instead} or examples of your own, or say on_test_set: true")
    print(f"warning: {where}: {why}", file=sys.stderr)
