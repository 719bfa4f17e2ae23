"""`evojax-merge init`: the commented config of a first search, asked for, checked and written."""

import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from merge_kernels import METHODS, Method

from evojax_merge import plugins
from evojax_merge.backends.decoder.opening import check_models
from evojax_merge.checkpoints.decoder_folder import decoder_of
from evojax_merge.checkpoints.derived import open_model
from evojax_merge.checkpoints.folder import local_path
from evojax_merge.checkpoints.headers import HeaderFolders
from evojax_merge.checkpoints.tokens import chat_template, count_differing_tokens, has_tokenizer
from evojax_merge.errors import InputError, shown
from evojax_merge.file_system import OutputFile
from evojax_merge.first_config import (
    HEAD,
    FirstConfig,
    ModelTemplates,
    TaskSection,
    searched_parameters,
    task_for_records,
    task_of_harness,
)
from evojax_merge.problem import SearchProblem, build_problem, config_from
from evojax_merge.references import recipe_reference, resolve_file, resolve_headers
from evojax_merge.report.progress import say
from evojax_merge.spaces.search_parameters import find_method
from evojax_merge.tasks.data_versions import pinned_reference
from evojax_merge.tasks.records import is_file_name, read_source
from evojax_merge.yaml_reader import parse_yaml
from evojax_merge.zoo import PREFIX

YAML_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Choices:
    """The choices of a first search, by flag: models, data (a file, hub:…) or a task of lm-eval, the method's name, and
    the run folder; None: not made."""

    base: str | None
    parents: tuple[str, ...]
    data: str | None
    lm_eval: str | None
    method: str | None
    out: str | None
    generations: int | None


def init(path: Path, choices: Choices, overwrite: bool) -> None:
    """Write the config to `path`, once the program has parsed it and built its problem. Asks on a terminal for the
    parents, the base and the data where they are missing. Raises InputError where it cannot ask."""
    if path.suffix not in YAML_ENDINGS:
        raise InputError(path, f"expected a name that ends in {' or '.join(YAML_ENDINGS)}")
    if os.path.lexists(path) and not overwrite:
        raise InputError(path, "exists already; choose another name or pass --overwrite")
    output = OutputFile(path, "", "is no first config", HEAD.match)
    output.check()
    plugins.load()
    commands = [shlex.join(["evojax-merge", name, str(path)]) for name in ("plan", "search")]
    choices, method = complete(choices)
    with tempfile.TemporaryDirectory() as root:
        resolve = partial(resolve_headers, HeaderFolders(Path(root)))
        text = first_config(path, choices, method, resolve).text(commands)
        problem = build_problem(path, config_from(path, parse_yaml(path, text), [], None), resolve=resolve)
    output.write(text)
    say(f"{path}: {_summary(problem)}")
    say("Next:")
    for command in commands:
        say(f"  {command}")


def complete(choices: Choices) -> tuple[Choices, Method]:
    """The choices with the answers of the terminal's user, and the method. Raises InputError for a choice that is
    missing, for a method that cannot be searched, and for models that the method does not take."""
    parents = choices.parents or _split(ask("--parents", "parents, the models that are merged, separated by spaces: "))
    base = choices.base or read_line("base, the model that task vectors are taken from (empty: none): ") or None
    data, lm_eval = choices.data, choices.lm_eval
    if data is None and lm_eval is None:
        answer = ask("--data or --lm-eval", "data, a JSONL file, hub:owner/dataset, or a task of lm-eval: ")
        is_task = is_file_name(answer) and not answer.startswith(PREFIX) and not Path(answer).suffix
        data, lm_eval = (None, answer) if is_task else (answer, None)
    method = find_method("--method", choices.method or ("linear" if base is None else "ties"))
    if not searched_parameters(method):
        able = ", ".join(name for name, other in METHODS.items() if searched_parameters(other))
        raise InputError("--method", f"{method.name} has no parameter to search; expected one of {able}")
    if base is None and method.base == "required":
        base = ask("--base", f"base, which {method.name} takes task vectors from: ")
    check_models("--parents", method, base is not None, len(parents))
    # A method of one model changes the model itself.
    if len(parents) == 1 != method.max_parents and not method.uses_base(base is not None):
        reason = "there is no base" if base is None else f"{method.name} does not use the base"
        raise InputError(
            "--parents", f"one parent, and {reason}: every candidate would be that parent; name a second parent, or "
            "--base and a method that takes task vectors from it, such as ties"
        )  # fmt: skip
    return replace(choices, base=base, parents=parents, data=data, lm_eval=lm_eval), method


def first_config(
    path: Path, choices: Choices, method: Method, resolve: Callable[[object, str, Path], Path]
) -> FirstConfig:
    """The config that fits the models, by their headers and tokenizers, and the data, by their first record."""
    folders = [resolve("--parents", parent, Path.cwd()) for parent in choices.parents]
    parents = tuple(_valid_in(path, *named) for named in zip(choices.parents, folders, strict=True))
    base, merged = None, folders
    if choices.base is not None:
        base_folder = resolve("--base", choices.base, Path.cwd())
        base, merged = _valid_in(path, choices.base, base_folder), [base_folder, *folders]
    names = (*(() if base is None else ("base",)), *parents)
    differ = _tokens_differ(merged)
    # A base that takes no part in the merge has no rows to align.
    first = 1 if differ and base is not None and not method.uses_base(True) else 0
    by_model = [chat_template(folder) for folder in merged]
    owner = next((number for number in range(first, len(by_model)) if by_model[number] is not None), None)
    # A base is often trained without the template that its fine-tunes have.
    compared = by_model[1:] if base is not None and by_model[0] is None else by_model
    templates = ModelTemplates(None if owner is None else names[owner], owner is not None and len({*compared}) == 1)
    if choices.lm_eval is not None:
        task, examples = task_of_harness(choices.lm_eval, templates), None
    else:
        assert choices.data is not None
        task, examples = _task_on(path, choices.data, templates)
    source = owner if owner is not None and task.uses_template else first
    reasons = ["the tokenizers differ: rows of the vocabulary are aligned by token"] if differ else []
    reasons += [] if source == first else [f"{names[first]} has no chat template"]
    return FirstConfig(
        base=base,
        parents=parents,
        tokenizer_source=(names[source], "; ".join(reasons)) if reasons else None,
        method=method,
        layers=decoder_of(open_model(folders[0])).decoder_config().layers,
        task=task,
        examples=examples,
        generations=choices.generations,
        out=choices.out,
    )


def read_line(question: str) -> str:
    """The answer to a question on the terminal; empty without a terminal, and where the user ends the input."""
    if not sys.stdin.isatty():
        return ""
    try:
        return input(question).strip()
    except EOFError:
        print()
        return ""


def ask(flag: str, question: str) -> str:
    """The answer to a question on the terminal. Raises InputError, with the flag that answers it, where there is
    none."""
    answer = read_line(question)
    if not answer:
        raise InputError(flag, "missing; give it on the command line, or answer on a terminal")
    return answer


def _split(names: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(names))
    except ValueError as error:
        raise InputError("--parents", f"{shown(names)}: {error}; expected names separated by spaces") from None


def _valid_in(path: Path, reference: str, folder: Path) -> str:
    """A model's reference in a config at `path`: as the user wrote it, but by full paths where the config lies in
    another folder than the working directory."""
    is_local = local_path(reference.partition("+")[0], Path.cwd()) is not None
    return recipe_reference(reference, folder) if is_local and path.parent.resolve() != Path.cwd() else reference


def _tokens_differ(folders: Sequence[Path]) -> bool:
    """Return whether the models' tokenizers have different tokens in some row."""
    with_tokens = [folder for folder in folders if has_tokenizer(folder)]
    return any(count_differing_tokens(with_tokens[0], other) for other in with_tokens[1:])


def _task_on(path: Path, data: str, templates: ModelTemplates) -> tuple[TaskSection, int]:
    """The section of the task on a data set, and the number of its records."""
    if not is_file_name(data):
        records = read_source(data).records
    else:
        file = resolve_file("--data", data, Path.cwd())
        records = read_source(file).records
        if not data.startswith(PREFIX) and path.parent.resolve() != Path.cwd():
            data = pinned_reference(str(file))
    return task_for_records(data, records, templates), len(records)


def _summary(problem: SearchProblem) -> str:
    """The search of the checked config, in a line."""
    splits = (problem.splits.search, problem.splits.validation or (), problem.splits.heldout)
    search, validation, heldout = (sum(task.size for task in tasks) for tasks in splits)
    kept = f"{validation:,} kept back to choose the winner on and " if validation else ""
    parents = f"{len(problem.parents)} parent{'s' if len(problem.parents) > 1 else ''}"
    return (
        f"written; {problem.space.dims} parameters of {parents}, searched on {search:,} examples, "
        f"with {kept}{heldout:,} held out"
    )
