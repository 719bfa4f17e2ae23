"""A task of the config -> its search split and its held-out split.

May import config, tasks, zoo and checkpoints.folder.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.folder import resolve
from evojax_merge.config import FunctionConfig, GsmConfig, HarnessConfig, TaskConfig, TextConfig
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.tasks.function import METRIC, FunctionTask, load_function
from evojax_merge.tasks.gsm import STYLES, GsmTask, Problem, first_worked, is_test_set, read_problem, style_of
from evojax_merge.tasks.harness import HarnessTask, is_benchmark, open_harness
from evojax_merge.tasks.harness import Options as HarnessOptions
from evojax_merge.tasks.language import check_language
from evojax_merge.tasks.records import Source, is_file_name, read_records, read_source
from evojax_merge.tasks.task import Task
from evojax_merge.tasks.text import METRICS, Fields, Kind, TextTask, read_examples


def locate(where: object, reference: str, relative_to: Path) -> Path:
    """A model folder or data file: a path, a hub id, or `zoo:name` from the demo family, which is made on demand.
    `where` says in messages who names it."""
    if reference.startswith("zoo:"):
        from evojax_merge.zoo import locate as locate_in_zoo

        try:
            return locate_in_zoo(reference)
        except InputError as error:
            raise InputError(where, str(error)) from None
    return resolve(where, reference, relative_to)


def locate_file(where: str, reference: str, relative_to: Path) -> Path:
    if reference.startswith("zoo:"):
        return locate(where, reference, relative_to)
    for path in (Path(reference).expanduser(), relative_to / reference):
        if path.exists():
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
    return task.part(sorted(order[count:].tolist())), task.part(sorted(order[:count].tolist()))


def _text_task(where: str, config: TextConfig, source: str | None, folder: Path) -> TextTask:
    metric = config.metric or METRICS[config.kind][0]
    if metric not in METRICS[config.kind]:
        raise InputError(where, f"metric: {metric!r}; {config.kind} has {', '.join(METRICS[config.kind])}")
    if config.pattern is not None:
        _check_pattern(where, config.pattern)
    file = locate_file(f"{where}.file" if source is None else f"{where}.heldout", source or config.file, folder)
    fields = Fields(config.prompt, config.target, config.choices, config.answer, config.delimiter)
    return TextTask(
        config.name, config.kind, metric, config.weight, str(file), tuple(read_examples(file, config.kind, fields)),
        config.pattern, config.max_new_tokens, tuple(config.stop),
    )  # fmt: skip


def _check_pattern(where: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(where, f"pattern: {pattern!r} is not a regular expression ({error})") from None


def _gsm_task(where: str, config: GsmConfig, source: str | None, folder: Path) -> GsmTask:
    if config.style is not None and config.style not in STYLES:
        raise InputError(f"{where}.style", f"unknown style {config.style!r}{did_you_mean(config.style, STYLES)}")
    if config.language is not None:
        check_language(f"{where}.language", config.language)

    def read(key: str, reference: str) -> Source:
        named = is_file_name(reference)
        return read_source(locate_file(f"{where}.{key}", reference, folder) if named else reference)

    scored = read("source", config.source) if source is None else read("heldout", source)
    files = scored.files
    shots: tuple[Problem, ...] = ()
    if config.num_fewshot:
        key = "source" if config.fewshot_source is None else "fewshot_source"
        shown = read(key, config.fewshot_source or config.source)
        files += tuple(file for file in shown.files if file not in files)
        shots = first_worked(f"{where}.num_fewshot", shown, config.num_fewshot)
    style = STYLES[config.style or style_of(scored.records, config.language)]
    style = replace(
        style,
        prompt=style.prompt if config.prompt is None else config.prompt,
        strict=style.strict if config.pattern is None else config.pattern,
        stop=style.stop if config.stop is None else tuple(config.stop),
    )
    _check_pattern(where, style.strict)
    # A problem whose answer is shown is none, wherever it comes from.
    seen = {shot.question for shot in shots}
    problems = tuple(p for p in map(read_problem, scored.records) if p.question not in seen)
    if not problems:
        raise InputError(f"{where}.num_fewshot", f"{config.num_fewshot}; leaves no problem of {scored.name} to score")
    return GsmTask(
        config.name, config.weight, files, problems, style, config.match, shots, config.language,
        config.apply_chat_template, config.system_instruction, config.max_new_tokens,
    )  # fmt: skip


def _function_task(where: str, config: FunctionConfig, source: str | None, folder: Path) -> FunctionTask:
    function = load_function(f"{where}.function", config.function, config.gets, folder)
    file = locate_file(f"{where}.file" if source is None else f"{where}.heldout", source or config.file, folder)
    kind: Kind = "exact_match" if config.gets == "texts" else "likelihood"
    # What a right text is, the function knows: a record of texts needs no target, and this one is never read.
    target = "-" if config.gets == "texts" else config.target
    fields = Fields(config.prompt, target, "", "", config.delimiter)
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
