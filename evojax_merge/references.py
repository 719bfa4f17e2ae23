"""What a config or a command names: paths, hub ids, and the demo family's `zoo:name`, which is made on demand."""

from pathlib import Path

from evojax_merge.checkpoints.folder import resolve
from evojax_merge.errors import InputError
from evojax_merge.tasks.task import local_file
from evojax_merge.zoo import PREFIX
from evojax_merge.zoo import resolve_reference as resolve_in_zoo


def resolve_reference(where: object, reference: str, relative_to: Path) -> Path:
    """A model folder: a path, a hub id, or `zoo:name`. `where` says in messages who names it."""
    return _of_the_zoo(where, reference) if reference.startswith(PREFIX) else resolve(where, reference, relative_to)


def resolve_file(where: str, reference: str, relative_to: Path) -> Path:
    """A data file: a path, or `zoo:name`."""
    return _of_the_zoo(where, reference) if reference.startswith(PREFIX) else local_file(where, reference, relative_to)


def _of_the_zoo(where: object, reference: str) -> Path:
    try:
        return resolve_in_zoo(reference)
    except InputError as error:
        raise InputError(where, str(error)) from None
