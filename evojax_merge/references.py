"""What a config or a command names: paths, hub ids, and the demo family's `zoo:name`, which is made on demand."""

from pathlib import Path

from evojax_merge.checkpoints.derived import resolve_model
from evojax_merge.checkpoints.folder import resolve
from evojax_merge.errors import InputError
from evojax_merge.tasks.task import local_file
from evojax_merge.zoo import PREFIX
from evojax_merge.zoo import resolve_reference as resolve_in_zoo


def resolve_reference(where: object, reference: str, relative_to: Path) -> Path:
    """A model folder: a path, a hub id, `zoo:name`, or one of these and an adapter, `base+adapter`. `where` says in
    messages who names it."""
    return resolve_model(where, reference, relative_to, _named)


def _named(where: object, reference: str, relative_to: Path) -> Path:
    return _of_the_zoo(where, reference) if reference.startswith(PREFIX) else resolve(where, reference, relative_to)


def resolve_file(where: str, reference: str, relative_to: Path) -> Path:
    """A data file: a path, or `zoo:name`."""
    return _of_the_zoo(where, reference) if reference.startswith(PREFIX) else local_file(where, reference, relative_to)


def _of_the_zoo(where: object, reference: str) -> Path:
    try:
        return resolve_in_zoo(reference)
    except InputError as error:
        raise InputError(where, str(error)) from None
