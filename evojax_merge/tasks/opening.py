"""A task of the config -> its search split and its held-out split, for any kind of task."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from evojax_merge.errors import InputError, print_warning, shown
from evojax_merge.tasks.answers import numbers_in
from evojax_merge.tasks.data_versions import pinned_reference
from evojax_merge.tasks.kinds import kind_of
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.task import FindFile, Opening, Place, Task, TaskConfig, TaskKind, local_file
from evojax_merge.tasks.text import TextTask

# Fewer examples to search on say next to nothing.
FEW_EXAMPLES = 4


def open_task(
    where: str, config: TaskConfig, folder: Path, seed: int, find_file: FindFile = local_file
) -> tuple[Task, Task]:
    """A task's search split and held-out split. `where` names the task in messages; relative paths start in `folder`;
    `find_file` finds the files that the config names.

    Raises InputError for a config or data without a meaning, and for a search on examples that models are compared by,
    unless the config says that it is meant.
    """
    test_set = kind_of(config).test_set(config)
    if test_set is not None and config.weight != 0:
        why = f"{test_set.name} is a benchmark, and a search on its test examples makes its score meaningless"
        if not test_set.meant:
            raise InputError(where, f"on_test_set: {why}; take {test_set.instead}, or say on_test_set: true")
        print_warning(f"{where}: {why}")
    return open_splits(where, config, folder, seed, find_file)


def open_splits(
    where: str, config: TaskConfig, folder: Path, seed: int, find_file: FindFile = local_file
) -> tuple[Task, Task]:
    """The splits of `open_task`, for scoring alone: also those of a test set that no search should see."""
    kind, second = kind_of(config), config.heldout_source
    if second is not None and kind.source is None:
        raise InputError(f"{where}.heldout", f"{second}; a task of this kind has one source: expected a share")
    task = _open(kind, config, Opening(where, folder, seed, None, find_file))
    if second is not None:
        return task, _open(kind, config, Opening(where, folder, seed, second, find_file))
    if not task.is_divisible:
        return task, task
    if task.size < 2:
        raise InputError(
            task.files[0] if task.files else where, "holds one example; a held-out share needs at least two"
        )
    # The parts depend on the seed alone.
    order = np.random.default_rng([seed, task.size]).permutation(task.size)
    count = min(max(1, round(float(config.heldout) * task.size)), task.size - 1)
    return task.subset(sorted(order[count:].tolist())), task.subset(sorted(order[:count].tolist()))


def open_whole_task(
    where: str, config: TaskConfig, folder: Path, seed: int = 0, find_file: FindFile = local_file
) -> Task:
    """A task on all its examples; where the config names a second source of held-out examples, on those."""
    kind = kind_of(config)
    second = None if kind.source is None else config.heldout_source
    return _open(kind, config, Opening(where, folder, seed, second, find_file))


def _open(kind: TaskKind, config: TaskConfig, opening: Opening) -> Task:
    task: Any = kind.open(config, opening)
    lacking = [name for name in ("name", "metric", "weight", "size", "files", "subset") if not hasattr(task, name)]
    if lacking:
        name = " or ".join(kind.names) or kind.key
        what = f"the kind of task {name} opened it as {shown(task)}"
        raise InputError(opening.where, f"{what}; expected a Task, which has {', '.join(lacking)}")
    return cast(Task, task)


def resolved_config(config: TaskConfig, search: Task, heldout: Task) -> dict[str, Any]:
    """A task's section for a run folder: defaults filled in, files by their absolute paths, or their repository and
    commit. `search`, `heldout`: its splits."""
    section = config.model_dump(mode="json") | {key: pinned_reference(path) for key, path in search.paths().items()}
    unsaid = {*(() if config.guard else ("guard", "tolerance")), *(() if section.get("images") else ("images",))}
    section = {name: value for name, value in section.items() if name not in unsaid}
    source = heldout.paths().get(kind_of(config).source or "")
    if config.heldout_source is not None and source is not None:
        section["heldout"] = pinned_reference(source)
    return section


# ---------------------------------------------------------------------------------------------------------------
# Warnings about the data


def data_warnings(where: str, tasks: Sequence[TaskConfig], splits: Splits[list[Task]]) -> list[str]:
    """Warnings about examples that make scores say less than they seem to, a line each: for a task with fewer than
    FEW_EXAMPLES to search on, one of which only the last of several numbers counts, one with examples that stand more
    than once in its data, and one whose held-out (or validation) examples are among the searched ones. `where`: the
    config; `splits`: those of its tasks."""
    validation = splits.validation or []
    searched = {key for task in splits.search if task.weight > 0 for key, _ in task.contents()}
    chosen_on = {key for task in validation if task.weight > 0 for key, _ in task.contents()}
    lines = []
    for number, (config, search, held) in enumerate(zip(tasks, splits.search, splits.heldout, strict=True)):
        task = f"{where}: tasks[{number}]"
        # A task of weight 0 is not divided.
        kept_back = [validation[number]] if validation and config.weight > 0 else []
        if config.weight > 0 and len(search.contents()) in range(1, FEW_EXAMPLES):
            count = "1 example" if search.size == 1 else f"{search.size} examples"
            lines.append(f"{task}: {count} to search on; what is best there may be no better elsewhere, take dozens")
        lines += ignored_numbers(task, search, *kept_back, held)
        if config.heldout_source is not None:
            lines += repeated(task, search, *kept_back) + repeated(f"{task}.heldout", held)
        else:
            lines += repeated(task, search, *kept_back, held)
        parts = [(f"{task}.heldout", held, "held-out", searched | chosen_on, "the held-out scores show nothing new")]
        follows = "the choice of the winner goes by what was searched on"
        parts += [(task, part, "validation", searched, follows) for part in kept_back]
        for place, part, name, keys, follows in parts:
            shared = [at for key, at in part.contents() if key in keys]
            if shared:
                lines.append(
                    f"{place}: {len(shared)} of the {part.size} {name} examples are among those that are searched on "
                    f"({_places(shared)}); on them {follows}"
                )
    return lines


def repeated(where: str, *splits: Task) -> list[str]:
    """A line, if examples stand more than once in a task's data."""
    seen: set[Hashable] = set()
    places = []
    for key, place in sorted(
        (content for split in splits for content in split.contents()), key=lambda content: content[1]
    ):
        if key in seen:
            places.append(place)
        seen.add(key)
    if not places:
        return []
    count = sum(split.size for split in splits)
    return [f"{where}: {len(places)} of {count} examples repeat others of the same data ({_places(places)})"]


def ignored_numbers(where: str, *splits: Task) -> list[str]:
    """A line, if a task compares the last number alone, and most targets hold more numbers than that: an output whose
    other numbers are wrong counts as right. `where` names the task, `splits` are its splits."""
    answers = [
        str(example.answer)
        for task in splits
        if isinstance(task, TextTask) and task.metric == "accuracy" and task.kind == "exact_match"
        if task.pattern is None
        for example in task.examples
    ]
    several = [answer for answer in answers if len(numbers_in(answer)) > 1]
    if len(several) <= len(answers) / 2:
        return []
    return [
        f"{where}.pattern: missing; {len(several)} of {len(answers)} targets hold more than one number "
        f"({several[0].strip()[:100]!r}), and only the last one is compared; pattern: ^(.+)$ compares whole texts"
    ]


def _places(places: Sequence[Place]) -> str:
    """The first three places, in words."""
    shown = [f"{file}:{line}" if line else file for file, line in places[:3]]
    return ", ".join(shown) + (", …" if len(places) > 3 else "")
