"""Tasks of the lm-eval harness by their names, and those of a folder (`include_path`): YAMLs of strangers, read as
data.

The harness would run the code that such a YAML names: functions, data set scripts, metrics that are programs, and
templates without limits. Here a task that needs any of these is refused, unless its section of the config says
`allow_code`.
"""

import difflib
import functools
import glob
import json
import logging
import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from evojax_merge.errors import InputError, shown
from evojax_merge.schema.patterns import expression
from evojax_merge.schema.yaml_reader import LOADER, load_documents, take_last
from evojax_merge.system import jinja_process
from evojax_merge.tasks.records import parquet_batches, read_bytes

# The harness's own folder has 14,000 YAMLs of 10 MB together.
MAX_ENTRIES, MAX_YAML_BYTES = 100_000, 32 * 2**20
MAX_INCLUDES = 100
# Formats that `datasets` reads without running anything, and the arguments for them.
FORMATS = ("json", "csv", "parquet", "text")
ARGUMENTS = ("data_files", "data_dir", "field", "sep", "delimiter", "column_names", "encoding", "revision", "split")
MAX_DATA_FILES = 1000
MAX_REPEATS = 100
# Processor seconds of all of a task's templates together; a million of the usual ones take as long.
TEMPLATE_SECONDS = 60
ALLOW = "which is run only where the task says allow_code: true"


class FunctionName(str):
    """The text behind `!function`."""


class TaskLoader(LOADER):
    """A loader of plain data, for which `!function` is a name."""


TaskLoader.add_constructor("!function", lambda loader, node: FunctionName(loader.construct_scalar(node)))


def read_folder(where: str, folder: Path) -> tuple[dict[str, Any], dict[str, InputError]]:
    """The harness's entries of a folder's tasks, groups and tags, by name; and the errors of YAMLs that could not be
    read, by their names. An entry has its YAML, with the YAMLs that it includes, as plain data. Raises InputError where
    the folder is too large."""
    from lm_eval.tasks._index import TaskIndex

    index: dict[str, Any] = {}
    unreadable: dict[str, InputError] = {}
    for path in _yaml_paths(where, folder):
        try:
            TaskIndex.process_cfg(_read(path.resolve(), [], folder.resolve()), path, index)
        except InputError as error:
            unreadable.setdefault(path.stem, error)
        except Exception:
            # It is a YAML of something else, or no text names its task: the harness ignores it as well.
            continue
    return index, unreadable


def _yaml_paths(where: str, folder: Path) -> list[Path]:
    paths: list[Path] = []
    entries = size = 0
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("__pycache__", ".ipynb_checkpoints")]
        entries += len(folders) + len(names)
        yaml_files = [Path(root, name) for name in names if name.endswith(".yaml")]
        size += sum(path.stat().st_size for path in yaml_files if path.is_file())
        if entries > MAX_ENTRIES or size > MAX_YAML_BYTES:
            amount = f"{MAX_ENTRIES:,} files" if entries > MAX_ENTRIES else f"{MAX_YAML_BYTES:,} bytes of YAML"
            raise InputError(where, f"include_path: {folder} holds more than {amount}; expected a folder of task YAMLs")
        paths += yaml_files
    return sorted(paths, key=Path.as_posix)


def _read(path: Path, seen: list[Path], folder: Path) -> dict[str, Any]:
    """A task's YAML with those that it includes, merged like in lm_eval.tasks: its own keys count first."""
    if path in seen:
        raise InputError(path, "include: includes itself, or is included twice")
    if len(seen) > MAX_INCLUDES:
        raise InputError(path, f"include: more than {MAX_INCLUDES} files")
    seen.append(path)
    documents = load_documents(path, take_last, TaskLoader)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise InputError(path, "expected a mapping of keys, one task of lm-eval")
    config: dict[str, Any] = documents[0]
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str) or isinstance(name, FunctionName):
            raise InputError(path, f"include: {shown(name)}; expected the name of a YAML file")
        file = (path.parent / name).resolve()
        if folder not in file.parents:
            raise InputError(path, f"include: {shown(name)} lies outside of {folder}; expected a YAML inside of it")
        merged |= {key: value for key, value in _read(file, seen, folder).items() if key != "task_list"}
    return merged | config


# ---------------------------------------------------------------------------------------------------------------
# Tasks that would run code, or read without end


def check_is_data(where: str, config: dict[str, Any]) -> None:
    """Raises InputError for a task that the harness could only take by running code of its makers or of others, and for
    data that have no end. `where` names the task."""
    from lm_eval.prompts import PROMPT_REGISTRY

    for key, value in _walk("", config):
        if isinstance(value, FunctionName):
            raise InputError(where, f"{key}: !function {str(value)[:200]} is code of the task's makers, {ALLOW}")
    if "class" in config:
        raise InputError(where, f"class: {shown(config['class'])} is code of the task's makers, {ALLOW}")
    if config.get("unsafe_code"):
        raise InputError(where, "unsafe_code: runs code that the model writes; not supported")
    prompt = config.get("use_prompt")
    if prompt is not None and str(prompt).partition(":")[0] not in PROMPT_REGISTRY:
        raise InputError(where, f"use_prompt: {shown(prompt)} is a library of others, {ALLOW}")
    _check_metrics(where, config.get("metric_list") or [])
    _check_filters(where, config.get("filter_list") or [])
    _check_data(where, config)
    repeats = config.get("repeats", 1)
    if not (isinstance(repeats, int) and 1 <= repeats <= MAX_REPEATS):
        raise InputError(where, f"repeats: {shown(repeats)}; expected a number from 1 to {MAX_REPEATS}")


def _walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield key, value
    if isinstance(value, dict):
        for name, part in value.items():
            yield key, name
            yield from _walk(f"{key}.{name}".removeprefix("."), part)
    elif isinstance(value, (list, tuple, set)):
        for number, part in enumerate(value):
            yield from _walk(f"{key}[{number}]", part)


def _check_metrics(where: str, metrics: Any) -> None:
    """Raises InputError for a metric that lm-eval does not have: a program that the package evaluate would load."""
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY

    for key, metric in _mappings(where, "metric_list", metrics):
        name, aggregation = metric.get("metric"), metric.get("aggregation", "mean")
        if not isinstance(name, str):
            raise InputError(where, f"{key}.metric: {shown(name)}; expected the name of a metric of lm-eval")
        if metric.get("hf_evaluate") or name not in METRIC_REGISTRY:
            raise InputError(where, f"{key}.metric: {shown(name)} is no metric of lm-eval itself but code, {ALLOW}")
        if not isinstance(aggregation, str) or aggregation not in AGGREGATION_REGISTRY:
            raise InputError(where, f"{key}.aggregation: {shown(aggregation)}; lm-eval has no such aggregation")
        _check_patterns(where, f"{key}.regexes_to_ignore", metric.get("regexes_to_ignore") or [])


def _check_filters(where: str, filters: Any) -> None:
    import lm_eval.filters  # noqa: F401
    from lm_eval.api.registry import FILTER_REGISTRY

    for key, pipeline in _mappings(where, "filter_list", filters):
        for step_key, step in _mappings(where, f"{key}.filter", pipeline.get("filter") or []):
            name = step.get("function")
            if not isinstance(name, str) or name not in FILTER_REGISTRY:
                raise InputError(where, f"{step_key}.function: {shown(name)}; lm-eval has no such filter")
            if name == "custom":
                raise InputError(where, f"{step_key}.function: custom is code of the task's makers, {ALLOW}")
            _check_patterns(where, f"{step_key}.regex_pattern", step.get("regex_pattern", []))
            _check_patterns(where, f"{step_key}.regexes_to_ignore", step.get("regexes_to_ignore") or [])


def _mappings(where: str, key: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(value, list):
        raise InputError(where, f"{key}: {shown(value)}; expected a list")
    for number, mapping in enumerate(value):
        if not isinstance(mapping, dict):
            raise InputError(where, f"{key}[{number}]: {shown(mapping)}; expected a mapping")
        yield f"{key}[{number}]", mapping


def _check_patterns(where: str, key: str, patterns: Any) -> None:
    for pattern in patterns if isinstance(patterns, list) else [patterns]:
        if not isinstance(pattern, str):
            raise InputError(where, f"{key}: {shown(pattern)}; expected a regular expression")
        try:
            expression(pattern)
        except ValueError as error:
            raise InputError(where, f"{key}: {shown(pattern)} {error}") from None


def _check_data(where: str, config: dict[str, Any]) -> None:
    """Raises InputError unless the data lie in files of a plain format, each of a likely size, or on the hub."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    path, arguments = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if not isinstance(arguments, dict):
        raise InputError(where, f"dataset_kwargs: {shown(arguments)}; expected a mapping")
    if arguments.get("trust_remote_code"):
        raise InputError(where, f"dataset_kwargs.trust_remote_code: the data set is a script, {ALLOW}")
    for key in arguments:
        if key not in (*ARGUMENTS, "trust_remote_code"):
            raise InputError(where, f"dataset_kwargs.{shown(key)}: is passed on {ALLOW.removeprefix('which is run ')}")
    for key in ("sep", "delimiter"):
        # A longer separator would be a regular expression.
        if len(str(arguments.get(key, ","))) != 1:
            raise InputError(where, f"dataset_kwargs.{key}: {shown(arguments[key])}; expected one character")
    if not isinstance(path, str) or (
        path not in FORMATS and (os.path.exists(path) or not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", path))
    ):
        raise InputError(
            where, f"dataset_path: {shown(path)}; expected {', '.join(FORMATS)} with data_files, or a data set on the "
            "hub; scripts and folders are taken only where the task says allow_code: true"
        )  # fmt: skip
    # Of its own readers `datasets` has some that open databases, or unpack archives.
    if path.endswith(".py") or ("/" not in path and path not in FORMATS and path in _PACKAGED_DATASETS_MODULES):
        raise InputError(where, f"dataset_path: {shown(path)} is code, {ALLOW}")
    if path in FORMATS:
        if arguments.get("data_dir") is not None:
            raise InputError(where, "dataset_kwargs.data_dir: name the files under data_files")
        for file in data_files(where, arguments.get("data_files")):
            _check_file(where, path, file)


def data_files(where: str, named: Any) -> list[Path]:
    """The local files under `data_files`. Raises InputError for a value that names none."""
    by_split = list(named.values()) if isinstance(named, dict) else [named]
    flat = [name for entry in by_split for name in (entry if isinstance(entry, list) else [entry])]
    files: list[Path] = []
    for name in flat:
        if not isinstance(name, str) or not name:
            raise InputError(where, f"data_files: {shown(name)}; expected the paths of files")
        if re.match("(https?|hf)://", name) and "::" not in name:
            continue
        if "://" in name or "::" in name or glob.has_magic(os.path.dirname(name)):
            raise InputError(where, f"data_files: {shown(name)}; expected the paths of files, or of URLs https://…")
        matches = list(islice(glob.iglob(name), MAX_DATA_FILES + 1)) if glob.has_magic(name) else [name]
        if len(matches) > MAX_DATA_FILES:
            raise InputError(where, f"data_files: {shown(name)} names more than {MAX_DATA_FILES:,} files")
        files += map(Path, matches)
    return files


def _check_file(where: str, kind: str, file: Path) -> None:
    if not os.path.exists(file):
        raise InputError(where, f"data_files: {file}: no such file")
    if not file.is_file():
        raise InputError(where, f"data_files: {file}: is not a regular file")
    if kind == "parquet":
        with parquet_batches(file) as batches:
            deque(batches, maxlen=0)
        return
    read_bytes(file)
    from datasets.utils.extract import Extractor

    # A small archive may hold enough data to fill the disk.
    if Extractor.infer_extractor_format(str(file)) is not None:
        raise InputError(where, f"data_files: {file}: is compressed; unpack it")


# ---------------------------------------------------------------------------------------------------------------
# Templates


@dataclass
class Templates:
    """Renders a task's templates for its records, each pair once. `where`: the task; `seconds`: that are left."""

    where: str
    seconds: float = TEMPLATE_SECONDS
    texts: dict[bytes, str] = field(default_factory=dict)

    def render(self, template: str, record: dict[str, Any]) -> str:
        """The harness's `apply_template`, with limits. Raises InputError for a template that fails."""
        # Equal records give equal texts, however often scoring asks for them.
        key = sha256(json.dumps([template, record], default=str).encode()).digest()
        if key not in self.texts:
            try:
                self.texts[key], seconds = jinja_process.render_record(template, record)
            except jinja_process.TemplateError as error:
                raise InputError(self.where, f"the template {shown(template)} failed ({error})") from None
            self.seconds -= seconds
            if self.seconds < 0:
                raise InputError(self.where, f"its templates take more than {TEMPLATE_SECONDS} s altogether")
        return self.texts[key]


_templates: ContextVar[Templates | None] = ContextVar("templates", default=None)


@contextmanager
def rendered_apart(templates: Templates | None) -> Iterator[None]:
    """Let these templates render the harness's ones in the block; None: the harness itself does."""
    from lm_eval import utils

    if not getattr(utils.apply_template, "chooses", False):
        by_harness = utils.apply_template

        def choose(template: str, record: dict[str, Any]) -> str:
            chosen = _templates.get()
            return str(by_harness(template, record) if chosen is None else chosen.render(template, record))

        choose.chooses = True  # type: ignore[attr-defined]
        utils.apply_template = choose
    token = _templates.set(templates)
    try:
        yield
    finally:
        _templates.reset(token)


# ---------------------------------------------------------------------------------------------------------------
# The index


@functools.cache
def default_task_manager() -> Any:
    """The index of the harness's own tasks; building it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def find_task(
    where: str, name: str, folder: Path | None, allow_code: bool
) -> tuple[Any, tuple[Path, ...], Templates | None]:
    """The manager that has a task, of the folder (`include_path`) first; the files that the task is made of; and the
    renderer of the templates of a task that may run no code. Raises InputError for a task of the folder that would run
    code and may not."""
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("lm_eval", "datasets"):
            raise
        raise InputError(
            where, "lm_eval: needs the lm-eval harness; install it with pip install 'evojax-merge[lm-eval]'"
        ) from None
    for logger in ("lm_eval", "datasets"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # It opens pictures of any format, and Pillow would have Ghostscript, a program, draw one of PostScript.
    with suppress(ImportError):
        from PIL import EpsImagePlugin

        EpsImagePlugin.gs_binary = False
    index, unreadable = ({}, {}) if folder is None else read_folder(where, folder)
    if name not in index and name in unreadable:
        # A YAML's name is mostly that of its task.
        raise unreadable[name]
    manager = TaskManager(include_defaults=False) if name in index else default_task_manager()
    entry = index.get(name) or manager.task_index.get(name)
    if entry is None:
        if unreadable:
            raise next(iter(unreadable.values()))
        near = difflib.get_close_matches(name, [*index, *manager.all_subtasks], n=1, cutoff=0.5)
        hint = f" (did you mean '{near[0]}'?)" if near else "; `lm-eval ls tasks` lists them"
        raise InputError(where, f"lm_eval: lm-eval has no task {name!r}{hint}")
    if entry.kind.name in ("GROUP", "TAG"):
        members = (entry.cfg or {}).get("task", [])
        names = [member for member in members if isinstance(member, str)] or sorted(entry.tags)
        listed = f" ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})" if names else ""
        raise InputError(where, f"lm_eval: {name} is a group of tasks; name them one by one{listed}")
    files, templates = () if entry.yaml_path is None else tuple(_yaml_files(Path(entry.yaml_path).resolve())), None
    if name in index:
        if not allow_code:
            templates = Templates(f"{where}: lm_eval: {name}")
            check_is_data(templates.where, entry.cfg)
            # The harness takes the checked config, and reads no file again.
            entry = replace(entry, yaml_path=None)
        manager.task_index[name] = entry
    return manager, files, templates


def _yaml_files(path: Path) -> list[Path]:
    """A YAML of the harness, the modules beside it whose functions it names, and the same of those that it includes."""
    from lm_eval.tasks._yaml_loader import load_yaml

    events = yaml.parse(path.read_bytes(), Loader=yaml.SafeLoader)
    functions = [event.value for event in events if isinstance(event, yaml.ScalarEvent) and event.tag == "!function"]
    modules = [path.parent / f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in functions]
    named = load_yaml(path, resolve_func=False, recursive=False).get("include", [])
    # A relative path starts in the folder of the file that names it.
    included = [(path.parent / name).resolve() for name in (named if isinstance(named, list) else [named])]
    return [path, *modules, *(file for included_file in included for file in _yaml_files(included_file))]
