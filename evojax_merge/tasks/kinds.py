"""The kinds of tasks: those of this folder, and registered ones."""

from typing import Any

from evojax_merge.errors import shown
from evojax_merge.tasks import (
    agreement,
    arrays,
    entropy,
    function,
    generated_images,
    generation,
    gsm,
    harness,
    human,
    networks,
    rubric,
    text,
)
from evojax_merge.tasks.task import TaskConfig, TaskKind

BUILT_IN: tuple[TaskKind, ...] = (
    text.KIND, entropy.KIND, agreement.KIND, generation.KIND, gsm.KIND, function.KIND, harness.KIND, human.KIND,
    rubric.KIND, *networks.KINDS, *generated_images.KINDS, arrays.KIND,
)  # fmt: skip
_registered: list[TaskKind] = []


def register_task(kind: TaskKind) -> TaskKind:
    """Make a kind of task known to configs, in the place of an earlier one that was registered under its names.

    Raises ValueError for a kind that no config could distinguish from others, or that has a name of a built-in one.
    """
    if not isinstance(kind, TaskKind):
        raise ValueError(f"kind: {shown(kind)}; expected a TaskKind")
    if not (isinstance(kind.config, type) and issubclass(kind.config, TaskConfig)):
        raise ValueError(f"kind.config: {shown(kind.config)}; expected a subclass of TaskConfig")
    tags = _tags(kind)
    if not tags:
        raise ValueError(
            f"{kind.config.__name__}: a kind of task needs a name; give the section a field `kind: Literal['mine']`"
        )
    taken = sorted(tags & {tag for other in BUILT_IN for tag in _tags(other)})
    if taken:
        raise ValueError(f"{kind.config.__name__}: {taken[0]!r} is a built-in kind of task; choose another name")
    if kind.source is not None and kind.source not in kind.config.model_fields:
        raise ValueError(f"{kind.config.__name__}: source: the section has no key {kind.source!r}")
    _registered[:] = [other for other in _registered if not tags & _tags(other)] + [kind]
    return kind


def _tags(kind: TaskKind) -> set[str]:
    """The values of `kind:` and the key by which a section names the kind."""
    return {*kind.names, *([] if kind.key is None else [kind.key])}


def kinds() -> tuple[TaskKind, ...]:
    """All kinds, the built-in ones first."""
    return (*BUILT_IN, *_registered)


def find_kind(section: Any) -> TaskKind | None:
    """The kind of a task's section, unchecked from the YAML; None where it is of none."""
    if not isinstance(section, dict):
        return None
    by_key = next((kind for kind in kinds() if kind.key is not None and kind.key in section), None)
    name = section.get("kind")
    # The value of `kind:` need not be text.
    return by_key or next((kind for kind in kinds() if isinstance(name, str) and name in kind.names), None)


def kind_of(config: TaskConfig) -> TaskKind:
    """The kind of a checked section."""
    return next(kind for kind in kinds() if type(config) is kind.config)
