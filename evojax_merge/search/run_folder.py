"""The run folder: the files that a search leaves behind and continues from.

config.yaml      the resolved config, with the hash of every input file
history.jsonl    one line a generation; nothing in it depends on the clock
history.backup.jsonl  the same, from which a damaged history is restored
timing.jsonl     seconds a generation
run.log          all that the command prints, with the time of each line; appended to when the run goes on
history.csv      the figures of the history as a table, where the config's log names csv
environment.json  versions, devices, machine, command and duration of each process that worked on the run
checkpoints/     the state after generations (orbax), the last ones kept
best/            recipe.yaml and model/; for a strategy that keeps a front, front/ with the recipe of each member; of a
                 polished winner, adapter/
members/         of a pool whose members are kept in files, while it is searched: the weights of parents
winners/         best/ as it was when the run had finished with fewer generations, with its result.json
stages/          run folders of the stages before the last, in a chain
result.json      held-out scores of the winner, the parents and the uniform merge
controls.safetensors  the adapters and genomes of the held-out table's controls (search.controls)
heldout_answers.jsonl  the winner's and each task's best parent's answers to each held-out example
report.html      the run as a page: figures, tables, the config
lock             while a process works here: its id and host

The process may be killed at any instant. It leaves a folder that holds nothing but a lock, or one that can be
continued; the next process that opens the folder removes whatever was half-written.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import merge_kernels

from evojax_merge.checkpoints.folder import file_hash
from evojax_merge.config.search_config import GradientConfig, KeepConfig
from evojax_merge.errors import InputError
from evojax_merge.mergekit.write import dump_yaml
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.search.run_lock import acquire, holder, release
from evojax_merge.search.run_log import run_log
from evojax_merge.search.run_parts import (
    RunFolder,
    check_parts,
    check_replaceable,
    check_room,
    clear,
    entries,
    remove_log,
    sweep,
)
from evojax_merge.search.run_schema import GROUPS, StoredResult, read_result, read_run_config
from evojax_merge.system.file_system import (
    atomic_folder,
    atomic_write,
    check_local,
    is_unfinished,
    link_or_copy,
    remove_empty_folder,
    remove_file,
)
from evojax_merge.system.interrupts import defer_signals

# Keys that may differ between a run and its continuation.
EXTENDABLE = (
    ("search", "generations"), ("search", "budget"), ("search", "stop"), ("search", "controls"), ("search", "then"),
    ("log",), ("keep",),
)  # fmt: skip
POPULATION, GRADIENT = ("search", "population"), ("search", "gradient")
_START_AGAIN = "cannot be continued by this one; pass --overwrite to start again, or choose another folder with --out"
OTHER_VERSION = f"was begun by another version of this program, and {_START_AGAIN}"
OTHER_MASKS = f"was begun by a version of this program that drew other random masks, and {_START_AGAIN}"
# In config.yaml, beside the config: the hashes of input files, and how random masks are drawn where they are.
INPUTS, RANDOM_NUMBERS = "inputs", "random_numbers"


# ---------------------------------------------------------------------------------------------------------------
# Opening


def open_run(
    path: Path,
    document: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    say: Callable[[str], None] = lambda line: None,
) -> RunFolder:
    """Create a run folder, or open one that was begun with the same config, and remove what a killed process left.
    `say` receives a line for each part of a run that is started again in which a user's files stay.

    Raises InputError where the folder cannot be written, holds another run, or is no run folder at all.
    """
    folder = RunFolder(path)
    occupied = check_place(path, resume=resume, overwrite=overwrite)
    last_stage = (document.get("stages") or [document])[-1]
    generations = last_stage.get("search", {}).get("generations", 0)
    if occupied and resume:
        check_same_config(folder, document)
        result = read_result(folder.result) or StoredResult()
        if result.generations < generations and result.stopped_by is None:
            # Before long work.
            check_room(folder, generations)
    if resume and "generations" in document.get("search", {}):
        # Fewer generations than are saved already cannot be asked for.
        wanted = max(document["search"]["generations"], len(folder.read_history()))
        document = document | {"search": document["search"] | {"generations": wanted}}
    try:
        path.mkdir(parents=True, exist_ok=True)
        sweep(folder, KeepConfig.model_validate(document.get("keep", {})))
        if occupied and not resume:
            for line in clear(folder, generations):
                say(line)
        atomic_write(folder.config, dump_yaml(document))
        folder.best.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror})") from None
    return folder


@contextmanager
def opened(
    path: Path, document: dict[str, Any], *, resume: bool, overwrite: bool,
    say: Callable[[str], None] = lambda line: None,
    on_started: Callable[[RunFolder], None] = lambda folder: None,
    check: Callable[[RunFolder], None] = lambda folder: None,
) -> Iterator[RunFolder]:  # fmt: skip
    """A run folder, locked and opened by `open_run` for the one process that writes; the others wait. The folder is
    removed again where it is refused before the search has saved anything. `on_started` is called as soon as there is
    something to resume, then `check`, before the run has a log."""
    folder = RunFolder(path)
    with ExitStack() as stack:
        with defer_signals():
            if jax.process_index() == 0:
                stack.enter_context(locked(path, resume=resume))
                open_run(path, document, resume=resume, overwrite=overwrite, say=say)
                if not resume:
                    stack.enter_context(removed_if_refused(folder))
            on_started(folder)
        check(folder)
        if jax.process_index() == 0:
            stack.enter_context(run_log(folder))
        yield folder


@contextmanager
def locked(path: Path, *, resume: bool) -> Iterator[None]:
    """Lock the run folder for this process, create it where there is none, with the folders above it, and remove
    those again that stay empty.

    Raises InputError where another process has it, where the folder is none of a run, or holds none to `resume`.
    """
    folder, new = RunFolder(path), [place for place in (path, *path.parents) if not place.exists()]
    # Whether it may be replaced is asked when it is opened.
    check_place(path, resume=resume, overwrite=True)
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = acquire(folder)
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        release(folder, handle)
        for place in new:
            remove_empty_folder(place)


@contextmanager
def removed_if_refused(folder: RunFolder) -> Iterator[None]:
    """Remove what was written to a run folder where the input turns out to be wrong (InputError) before the search has
    saved anything: the next attempt may have another config. The folder itself goes with its lock."""
    try:
        yield
    except InputError:
        others = {*entries(folder.path)} - {folder.config, folder.environment, folder.log, folder.lock}
        if all(path in folder.parts and not entries(path) for path in others):
            for path in others:
                remove_empty_folder(path)
            remove_log(folder)
            remove_file(folder.environment)
            remove_file(folder.config)
        raise


def check_place(path: Path, *, resume: bool, overwrite: bool) -> bool:
    """Return whether a run lies at a path. Raises InputError where a run with progress is neither to be resumed nor to
    be overwritten, where something else lies there, or where there is nothing to resume. A run without progress gives
    way to any other."""
    folder = RunFolder(path)
    check_local(path)
    if path.exists() and not path.is_dir():
        raise InputError(path, "is a file; expected a run folder")
    try:
        empty = not path.exists() or not any(path.iterdir())
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None
    if empty and resume:
        raise InputError(path, "holds no run to resume")

    def of_a_start(entry: Path) -> bool:
        """Return whether a process that was killed before it had written config.yaml leaves such an entry."""
        if entry == folder.lock:
            return entry.is_file() and holder(entry) is not None
        return is_unfinished(entry, folder.config) or (entry in folder.parts and entry.is_dir() and not entries(entry))

    if empty or all(map(of_a_start, path.iterdir())):
        return False
    if not is_run(folder):
        raise InputError(path, "is not empty and not a run folder; choose another with --out")
    check_parts(folder)
    if not resume and not overwrite and folder.has_progress():
        raise InputError(path, "holds a run already; pass --resume to continue it or --overwrite to start again")
    return True


def is_run(folder: RunFolder) -> bool:
    """Return whether a search made this folder: its config.yaml lists the hashes of its inputs."""
    if not folder.config.exists():
        return False
    document = load_yaml(folder.config)
    return isinstance(document, dict) and INPUTS in document


def run_at(run: Path) -> RunFolder:
    """The run folder at a path. Raises InputError where there is none; the message names a run that the path is in."""
    if not run.is_dir():
        raise InputError(run, "no such folder; expected the run folder of a search")
    if not is_run(RunFolder(run)):
        above = next((f"; did you mean {path}?" for path in run.parents[:2] if is_run(RunFolder(path))), "")
        raise InputError(run, f"is not a run folder of a search{above}")
    return RunFolder(run)


def random_numbers(is_random: bool) -> dict[str, str]:
    """The entry of a run's config.yaml on random masks, where the run draws any."""
    return {RANDOM_NUMBERS: merge_kernels.SCHEME} if is_random else {}


def check_masks(folder: RunFolder) -> None:
    """Raises InputError where this program would draw other random masks than a run was scored with."""
    if read_run_config(folder.config).get(RANDOM_NUMBERS) != merge_kernels.SCHEME:
        raise InputError(
            folder.path,
            "was searched by a version of this program that drew other random masks; what it has exported itself (in "
            "best/model, once it is finished) is what was scored, and cannot be made again by this one",
        )


def keep_winner(folder: RunFolder, recipe: str) -> None:
    """Keep a finished run's winner in `winners/GENERATIONS`, unless `recipe`, the new winner's, is the same: recipe,
    model, front and result, all of them or none. Weights are hard links where their disk allows it."""
    result = read_result(folder.result)
    if result is None or not folder.model.exists() or not folder.recipe.exists():
        return
    if folder.recipe.read_text(encoding="utf-8") == recipe:
        return
    if any(read_result(winner / folder.result.name) == result for winner in folder.kept_winners()):
        # A process was killed after it had kept this winner.
        return
    name = f"{result.generations:03d}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    place = next(folder.winners / name for name in names if not os.path.lexists(folder.winners / name))
    with atomic_folder(place) as work:
        for path in (folder.recipe, folder.result):
            if path.exists():
                shutil.copyfile(path, work / path.name)
        for path in folder.replaced:
            if path.exists():
                shutil.copytree(path, work / path.name, symlinks=True, copy_function=link_or_copy)


def write_front(folder: RunFolder, recipes: Sequence[str]) -> None:
    """Write the recipe of each member of a front, in place of the recipes in its folder, all at once."""
    check = partial(check_replaceable, folder.front)
    with atomic_folder(folder.front, overwrite=True, check=check) as work:
        for number, recipe in enumerate(recipes, start=1):
            (work / f"member-{number}.yaml").write_text(recipe, encoding="utf-8")


def find_member(folder: RunFolder, number: int) -> Path:
    """The recipe of a member of the front. Raises InputError where there is no such member."""
    file, count = folder.front / f"member-{number}.yaml", len(entries(folder.front))
    if not count:
        raise InputError(
            folder.path,
            "has no front to take a member from; expected a finished search with strategy pareto or niches",
        )
    if not file.is_file():
        raise InputError("--member", f"{number}; expected a member of {folder.path}, whose front has 1 to {count}")
    return file


def check_same_config(folder: RunFolder, document: dict[str, Any]) -> None:
    """Raises InputError where a run folder holds the run of another config than this document's, or of other inputs."""
    differences = _differences(read_run_config(folder.config), document)
    # Another method is another config, whatever it draws and reads.
    for key, old, new in sorted(differences, key=lambda difference: difference[0][0] in (INPUTS, RANDOM_NUMBERS)):
        # The model that votes may have moved.
        if any(key[: len(extendable)] == extendable for extendable in EXTENDABLE) or key[-1] == "judge_address":
            continue
        # Earlier versions wrote no groups, a population only where the config had one, and the defaults of gradients
        # only for strategies that came with the program.
        is_default = key[-2:] == GRADIENT and new == GradientConfig().model_dump(mode="json")
        if old is None and (key == (GROUPS,) or key[-2:] == POPULATION or is_default):
            continue
        if key == (RANDOM_NUMBERS,):
            raise InputError(folder.path, OTHER_MASKS)
        if key[0] == INPUTS and len(key) == 2:
            raise _other_input(folder, key[1], old, new)
        raise InputError(
            folder.config,
            f"belongs to another config: {'.'.join(map(str, key))} differs (it was {_short(old)}, now {_short(new)}); "
            "give the options of its first search again, or choose another folder with --out",
        )


def check_inputs(folder: RunFolder) -> None:
    """Raises InputError where a file that a run's scores depend on has changed or is gone."""
    for file, digest in read_run_config(folder.config)[INPUTS].items():
        current = file_hash(Path(file)) if Path(file).is_file() else None
        if current != digest:
            raise _other_input(folder, file, digest, current)


def check_recorded_inputs(where: object, recorded: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Raises InputError where a file is missing or has another hash than a run recorded. current: the hashes of the
    files that are read now, by their paths."""
    for file, digest in recorded.items():
        if file in current and current[file] != digest:
            what = f"has changed since the run (sha256 {_short(digest)}, now {_short(current[file])})"
        elif file not in current and not os.path.lexists(file):
            what = f"is missing; the run read it (sha256 {_short(digest)})"
        else:
            continue
        raise InputError(
            f"{where}: {INPUTS}",
            f"{file} {what}; restore it, or go on all the same without the key {INPUTS} (search: --set {INPUTS}=null)",
        )


def _other_input(folder: RunFolder, file: str, old: str | None, new: str | None) -> InputError:
    what = "was removed" if new is None else "is new" if old is None else "has changed"
    return InputError(
        folder.config,
        f"belongs to other inputs: {file} {what} since the run was begun (sha256 {_short(old)}, now {_short(new)}); "
        "restore it, or choose another folder with --out",
    )


def _differences(one: Any, other: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """The differences of two documents: each key that differs, and its values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(set(one) | set(other), key=str):
            yield from _differences(one.get(name), other.get(name), (*key, name))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(*pair, (*key, number))
    elif one != other:
        yield key, one, other


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else f"{text[:40]} … {text[-10:]}"
