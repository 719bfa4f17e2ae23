"""The paths of a run folder's files, the check that they are the search's own, and their removal when a search starts
again.

`best/`, `checkpoints/`, `members/`, `stages/` and `winners/` may be links to folders on another disk, and a user may
keep files of their own in them, and beside them. A file is removed only where the search wrote it: its name and its
form are the search's. Any other file in a folder that would go as a whole stops the replacement, with a message that
names the file.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.members import member_folders
from evojax_merge.checkpoints.writer import check_ours
from evojax_merge.config.search_config import KeepConfig
from evojax_merge.errors import InputError, shown
from evojax_merge.search.run_schema import (
    A_FILE,
    MAX_DOCUMENT,
    HistoryLine,
    TimingLine,
    read_lines,
    read_result,
    whole_lines,
)
from evojax_merge.system.file_system import (
    check_free,
    is_real_folder,
    may_replace,
    recover,
    regular_file,
    remove_empty_folder,
    remove_file,
    remove_folder,
    remove_leftovers,
    resolved,
)
from evojax_merge.system.regular_file import read_regular

# Nanoseconds.
HOUR = 3600 * 10**9
# A mark in a checkpoint's metadata: this program wrote the checkpoint.
CHECKPOINT_MARK = {"written_by": "evojax-merge"}
# A mark near the start of a page: this program wrote it.
PAGE_MARK = b'<meta name="generator" content="evojax-merge report">'
# The starts of a log, the date and time of its first line, and of a table: this program wrote the file.
LOG_MARK = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")
TABLE_MARK = re.compile(rb"generation,\w+/\w+")
_METADATA = "_CHECKPOINT_METADATA"
_STEP = re.compile("[1-9][0-9]*")
_UNFINISHED_STEP = re.compile(r"[1-9][0-9]*\.orbax-checkpoint-tmp(-[0-9]+)?")
# The names, each at its depth, of the files and folders that orbax writes into a checkpoint.
_ORBAX_NAME = re.compile(
    r"(_[A-Z_]+|_sharding|_strings\.json|commit_success\.txt|orbax\.checkpoint|(state|pytree|default|metrics)"
    r"(\.orbax-checkpoint-tmp(-[0-9]+)?)?|array_metadatas|process_[0-9]+|ocdbt\.process_[0-9]+|d|[0-9a-f]{32}"
    r"|manifest\.ocdbt)(\.__lock)?"
)
# The folder of a front's recipes, and each of these.
FRONT = "front"
_MEMBER = re.compile(r"member-[1-9][0-9]*\.yaml")
_KEPT_WINNER = re.compile(r"[0-9]{3,}(-[0-9]+)?")
_STAGE = re.compile(r"stage-[1-9][0-9]*")
_PROCESS = re.compile(r"process-(0|[1-9][0-9]*)")
_ADVICE = "move it, or choose another folder with --out"


class _Place:
    """An attribute of a run folder: the path of one of its entries."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: "RunFolder", kind: type["RunFolder"]) -> Path:
        return run.path / self._name


@dataclass(frozen=True)
class RunFolder:
    path: Path

    config = _Place("config.yaml")
    history = _Place("history.jsonl")
    history_backup = _Place("history.backup.jsonl")
    timing = _Place("timing.jsonl")
    environment = _Place("environment.json")
    log = _Place("run.log")
    # The history's figures as a table, which the logger `csv` writes.
    table = _Place("history.csv")
    best = _Place("best")
    recipe = _Place("best/recipe.yaml")
    model = _Place("best/model")
    front = _Place(f"best/{FRONT}")
    # The adapter by which the winner is polished.
    adapter = _Place("best/adapter")
    winners = _Place("winners")
    result = _Place("result.json")
    # The votes of people, and of functions in their place (see `judge.votes`).
    votes = _Place("votes.jsonl")
    # The token in the addresses of its pages for judges.
    judge_token = _Place("judge-token")
    # The winner's and each task's best parent's answers to each held-out example.
    heldout_answers = _Place("heldout_answers.jsonl")
    # What was made for the controls of the held-out table, so that a killed run makes none of it twice.
    controls = _Place("controls.safetensors")
    # Members of a pool that are kept in files while the search runs.
    members = _Place("members")
    checkpoints = _Place("checkpoints")
    stages = _Place("stages")
    lock = _Place("lock")
    page = _Place("report.html")

    @property
    def winner(self) -> str:
        """The reference to the winner: to the model, with its adapter where it is polished."""
        return f"{self.model}+{self.adapter}" if self.adapter.is_dir() else str(self.model)

    @property
    def replaced(self) -> list[Path]:
        """The folders of best/ that a new winner replaces as wholes."""
        return [self.model, self.adapter, self.front]

    @property
    def files(self) -> list[Path]:
        """The files that a search writes, those of best/ included."""
        history = [self.history, self.history_backup, self.timing, self.table]
        results = [self.result, self.heldout_answers, self.controls, self.page, self.recipe]
        return [self.config, *history, self.environment, self.log, *results]

    @property
    def named_files(self) -> dict[str, Path]:
        """The files of the run by their names in messages: what no other output may be."""
        return {f"the run's {file.name}": file for file in (*self.files, self.votes, self.judge_token, self.lock)}

    @property
    def parts(self) -> list[Path]:
        """The folders that belong to the run; anything else beside them is its user's."""
        return [self.best, self.checkpoints, self.members, self.stages, self.winners]

    def read_history(self) -> list[dict[str, Any]]:
        return read_lines(self.history, HistoryLine)

    def read_timing(self) -> list[dict[str, Any]]:
        return read_lines(self.timing, TimingLine)

    def is_finished(self) -> bool:
        """Return whether the search has chosen its winner after the last saved generation."""
        result = read_result(self.result)
        return result is not None and result.generations >= len(self.read_history())

    def steps(self) -> list[int]:
        """The generations of the run's checkpoints, in their order."""
        last = max(len(read_lines(file, HistoryLine)) for file in (self.history, self.history_backup))
        return sorted(int(path.name) for path in entries(self.checkpoints) if _is_own_step(path, last))

    def step(self, generation: int) -> Path:
        return self.checkpoints / str(generation)

    def has_progress(self) -> bool:
        """Return whether the run has anything to lose: a saved generation, a whole or damaged line of one, or a
        result. A run without progress failed before the end of its first generation, or was killed there."""
        lines = any(next(whole_lines(file), None) is not None for file in (self.history, self.history_backup))
        steps = any(_STEP.fullmatch(path.name) for path in entries(self.checkpoints))
        results = any(map(os.path.lexists, (self.result, self.recipe, self.model, self.front)))
        return lines or steps or results or any(stage.has_progress() for stage in self.begun_stages())

    def kept_winners(self) -> list[Path]:
        """The folders of earlier winners, kept when the run had finished with fewer generations, in their order."""
        named = (path for path in entries(self.winners) if _KEPT_WINNER.fullmatch(path.name))
        return sorted(path for path in named if (path / self.recipe.name).is_file())

    def begun_stages(self) -> list["RunFolder"]:
        """The run folders of a chain's stages. A link to a folder is none."""
        named = (path for path in entries(self.stages) if _STAGE.fullmatch(path.name))
        return [RunFolder(path) for path in sorted(named) if is_real_folder(path)]


def entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


# ---------------------------------------------------------------------------------------------------------------
# The search's own


def _is_own_step(path: Path, last: int) -> bool:
    """Return whether a folder is a checkpoint of a run whose history has `last` lines."""
    if not (_STEP.fullmatch(path.name) and is_real_folder(path)):
        return False
    custom = _metadata(path, "custom_metadata")
    if custom is None:
        # The metadata are damaged.
        return _foreign_in_step(path) is None and (int(path.name) <= last or any(path.iterdir()))
    # Earlier versions left no mark.
    return bool(custom == CHECKPOINT_MARK) or int(path.name) <= last


def _metadata(step: Path, key: str) -> Any:
    """An entry of the metadata that orbax writes beside a checkpoint; None where they are damaged."""
    metadata = step / _METADATA
    try:
        return json.loads(read_regular(metadata, A_FILE, MAX_DOCUMENT) if metadata.is_file() else b"")[key]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, InputError):
        return None


def _foreign_in_step(folder: Path, above: str = "") -> str | None:
    """The first entry of a checkpoint that orbax did not write. above: the path of the folder in the checkpoint."""
    for path in sorted(folder.iterdir()):
        name, is_folder = f"{above}{path.name}", is_real_folder(path)
        if not _ORBAX_NAME.fullmatch(path.name) or not (is_folder or (path.is_file() and not path.is_symlink())):
            return name
        foreign = _foreign_in_step(path, f"{name}/") if is_folder else None
        if foreign is not None:
            return foreign
    return None


def _foreign(folder: Path, name: str, advice: str = _ADVICE) -> InputError:
    return InputError(folder, f"holds {shown(name)}, which evojax-merge did not write; {advice}")


def is_page(content: bytes) -> bool:
    """Return whether a file's content is a page that this program made of runs."""
    return PAGE_MARK in content[:1000]


def check_replaceable(place: Path) -> None:
    """Raises InputError where the folder of the winner, of its adapter, or of a front's recipes must not be
    replaced."""
    check_free(place, overwrite=True)
    if place.name != FRONT and place.exists():
        check_ours(place)
    for path in entries(place) if place.name == FRONT else ():
        if not _MEMBER.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            raise _foreign(place, path.name)


def check_removable_step(folder: RunFolder, generation: int) -> None:
    """Raises InputError where a checkpoint holds a file that is not the run's."""
    name = _foreign_in_step(folder.step(generation))
    if name is not None:
        raise _foreign(folder.checkpoints, f"{generation}/{name}")


def check_parts(folder: RunFolder, places: dict[Path, Path] | None = None) -> None:
    """Raises InputError where a part of a run folder or of its stages, or a file of them, is of the wrong type: a link
    that leads nowhere or into another run, a pipe, a folder in the place of a file; and where a link stands in the
    place of a file, or of the winner, since what it leads to would be replaced. places: of the parts so far."""
    places = {} if places is None else places
    for part in folder.parts:
        if not os.path.lexists(part):
            continue
        if not part.is_dir():
            problem = "a link that leads nowhere" if part.is_symlink() else "no folder"
            raise InputError(folder.path, f"cannot be written ({part.name} is {problem})")
        place = resolved(part)
        if place in places:
            raise InputError(part, f"leads to the same folder as {places[place].name}; give each one of its own")
        places[place] = part
        for above in (place, *place.parents):
            other = RunFolder(above)
            if above in (resolved(folder.path), *resolved(folder.path).parents):
                continue
            if other.config.is_file() and other.history.is_file():
                raise InputError(part, f"leads into another run ({above}); give this one a folder of its own")
    for file in folder.files:
        regular_file(file)
    # These three are replaced only where this program wrote them.
    checked = (folder.page, folder.log, folder.table)
    stages = (path for path in sorted(entries(folder.stages)) if _STAGE.fullmatch(path.name))
    for path in (*folder.files, *folder.replaced, *stages):
        if path.is_symlink() and path not in checked:
            what = "is a link, and what it leads to would be replaced; put the file or folder itself in its place"
            raise InputError(path, what)
    for stage in folder.begun_stages():
        check_parts(stage, places)


def check_room(folder: RunFolder, generations: int) -> None:
    """Raises InputError where a file that is not the search's own is in the way of a file that a search of
    `generations` generations will write or replace."""
    check_parts(folder)
    for place in folder.replaced:
        check_replaceable(place)
    _check_names(folder, range(max(folder.steps(), default=0) + 1, generations + 1))


def _check_names(folder: RunFolder, generations: range) -> None:
    """Raises InputError where something else has the name of a checkpoint of these generations."""
    steps = {folder.step(generation) for generation in folder.steps()}
    for path in entries(folder.checkpoints):
        if _STEP.fullmatch(path.name) and int(path.name) in generations and path not in steps:
            raise _foreign(folder.checkpoints, path.name, f"generation {path.name} needs the name: {_ADVICE}")


# ---------------------------------------------------------------------------------------------------------------
# Removing


def sweep(folder: RunFolder, keep: KeepConfig) -> None:
    """Remove half-written files, and checkpoints that are not kept; a model that was being replaced gets its name back.
    The caller holds the lock."""
    for place in folder.replaced:
        recover(place)
    for winner in {path.name.split(".")[1] for path in entries(folder.winners) if path.name.startswith(".")}:
        if _KEPT_WINNER.fullmatch(winner):
            recover(folder.winners / winner)
    for place in (folder.path, *folder.parts):
        remove_leftovers(place)
    for file in map(resolved, folder.files):
        remove_leftovers(file.parent, [file])
    for path in entries(folder.checkpoints):
        if _UNFINISHED_STEP.fullmatch(path.name) and is_real_folder(path) and _foreign_in_step(path) is None:
            remove_folder(path)
    prune(folder, keep)
    for stage in folder.begun_stages():
        sweep(stage, keep)


def prune(folder: RunFolder, keep: KeepConfig) -> None:
    """Remove the checkpoints that a search does not keep; one in which a user keeps a file stays."""
    interval, due = None if keep.every_hours is None else round(keep.every_hours * HOUR), 0
    for generation in folder.steps()[: -keep.last]:
        step = folder.step(generation)
        saved_at = _metadata(step, "commit_timestamp_nsecs")
        if interval is not None and isinstance(saved_at, int) and saved_at >= due:
            due = saved_at + interval
        elif _foreign_in_step(step) is None:
            remove_folder(step)


def remove_members(folder: RunFolder) -> None:
    """Remove the members of a pool that were kept in files; a file that a user keeps beside them stays."""
    for path in entries(folder.members):
        if _PROCESS.fullmatch(path.name) and is_real_folder(path):
            remove_leftovers(path)
            for member in member_folders(path):
                remove_folder(member)
            remove_empty_folder(path)
    remove_empty_folder(folder.members)


def clear(folder: RunFolder, generations: int) -> list[str]:
    """Delete what a search wrote, and nothing that a user put beside it: a line names the files that stay in the run's
    parts. Raises InputError, before anything is deleted, where a user's file lies in a folder that would go as a whole,
    or has the name of a checkpoint of a search of so many generations.

    Until the last checkpoint is deleted the run can be continued, with its history restored from the backup; afterwards
    the folder is like that of a run that has not begun."""
    _check_clear(folder)
    _check_names(folder, range(1, generations + 1))
    page = [folder.page] if may_replace(folder.page, is_page) else []
    table = [folder.table] if may_replace(folder.table, TABLE_MARK.match) else []
    remove_log(folder)
    for file in (folder.result, folder.heldout_answers, folder.controls, *page, *table, folder.recipe):
        remove_file(file)
    stages = [stage.path for stage in folder.begun_stages()]
    for path in (*folder.replaced, *folder.kept_winners(), *stages):
        if path.exists():
            remove_folder(path)
    remove_members(folder)
    remove_file(folder.timing)
    remove_file(folder.environment)
    remove_file(folder.history)
    # From the last to the first: the backup holds the history of every checkpoint that is left.
    for generation in reversed(folder.steps()):
        remove_folder(folder.step(generation))
    remove_file(folder.history_backup)
    lines = []
    for part in folder.parts:
        remove_empty_folder(part)
        names = sorted(path.name for path in entries(part))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{part}: {shown(names[0])}{more}, which evojax-merge did not write, stays")
    return lines


def remove_log(folder: RunFolder) -> None:
    """Remove a run's log; a file of the same name that this program did not write stays."""
    if may_replace(folder.log, LOG_MARK.match):
        remove_file(folder.log)


def _check_clear(folder: RunFolder) -> None:
    stages = folder.begun_stages()
    for path in (*folder.files, *folder.replaced, *folder.kept_winners(), *(run.path for run in stages)):
        if path.is_symlink():
            raise InputError(path, "is a link, which is not followed to delete what it leads to; remove it first")
    for place in folder.replaced:
        check_replaceable(place)
    names = {place.name for place in folder.replaced}
    for path in (path for winner in folder.kept_winners() for path in entries(winner)):
        if path.name in names:
            check_replaceable(path)
        elif path.name not in (folder.recipe.name, folder.result.name) or path.is_symlink() or not path.is_file():
            raise _foreign(path.parent, path.name)
    for generation in folder.steps():
        check_removable_step(folder, generation)
    for stage in stages:
        _check_clear(stage)
        steps = map(stage.step, stage.steps())
        allowed = {*stage.files, stage.lock, *stage.replaced, *stage.kept_winners(), *steps, *stage.parts}
        for path in (path for place in (stage.path, *stage.parts) for path in entries(place)):
            # A stage's folder goes as a whole.
            if path not in allowed:
                raise _foreign(stage.path, str(path.relative_to(stage.path)))
