"""Resolves the references of configs and commands: paths, hub ids, and the demo family's `zoo:name`, which is made on
demand."""

from collections.abc import Callable, Mapping
from pathlib import Path

from evojax_merge.checkpoints.adapters import is_adapter
from evojax_merge.checkpoints.derived import EMPTY, SAFETENSORS, reference_to, resolve_model
from evojax_merge.checkpoints.generator_lora import factor_ranks
from evojax_merge.checkpoints.headers import HeaderFolders
from evojax_merge.checkpoints.references import hub_id, local_path, resolve
from evojax_merge.checkpoints.remote import is_address
from evojax_merge.errors import InputError
from evojax_merge.tasks.data_versions import OXEN, check_data_file, oxen_file
from evojax_merge.tasks.task import local_file
from evojax_merge.zoo import PREFIX
from evojax_merge.zoo import resolve_reference as resolve_in_zoo


def resolve_reference(
    where: object, reference: str, relative_to: Path, *, made: Mapping[str, Path] = EMPTY, weights: bool = True
) -> Path:
    """A model folder: a path, a hub id, `zoo:name`, or one of these and an adapter, `base+adapter`. `where`: the place
    of the reference, for messages; made, weights: see `resolve_model`. Raises InputError."""
    return resolve_model(where, reference, relative_to, _named, made, weights)


def _named(where: object, reference: str, relative_to: Path, *, weights: bool = True) -> Path:
    if reference.startswith(PREFIX):
        return _of_the_zoo(where, reference)
    return resolve(where, reference, relative_to, weights=weights)


def resolve_onto(
    resolve: Callable[[object, str, Path], Path], where: object, reference: str, base: str | None, relative_to: Path
) -> tuple[str, Path]:
    """A model's reference and folder. A LoRA's file, and an adapter whose config names no base that is in reach, go
    with `base`. Raises InputError as `resolve` does."""
    path = local_path(reference, relative_to)
    if base is not None and path is not None and path.suffix == SAFETENSORS and factor_ranks(path):
        reference = f"{base}+{reference}"
    try:
        return reference, resolve(where, reference, relative_to)
    except InputError:
        if base is None or path is None or not is_adapter(path):
            raise
    return f"{base}+{reference}", resolve(where, f"{base}+{reference}", relative_to)


def recipe_reference(reference: str, folder: Path) -> str:
    """A recipe's reference to the model that a config calls `reference` and that lies in `folder`, valid from any
    place: `zoo:name` and an address as they are, a hub id with the commit that was downloaded, any other
    model by full paths."""
    by_paths = reference_to(folder)
    if by_paths != str(folder):
        # A model of several parts, such as a base and an adapter.
        return by_paths
    if reference.startswith(PREFIX) or is_address(reference):
        return reference
    name = reference.partition("@")[0]
    return f"{name}@{folder.name}" if hub_id(folder) == name else by_paths


def canonical_reference(reference: str) -> str:
    """The same text for all references of recipes to one model: `zoo:name` as the path of its folder, and the path of a
    snapshot in the hub's cache as the hub id with the commit."""
    if reference.startswith(PREFIX):
        return str(resolve_in_zoo(reference))
    name = hub_id(Path(reference))
    return reference if name is None else f"{name}@{Path(reference).name}"


def resolve_headers(folders: HeaderFolders, where: object, reference: str, relative_to: Path) -> Path:
    """Like `resolve_reference`, with no more than the headers of a model that is not on this machine."""

    def named(where: object, reference: str, relative_to: Path, *, weights: bool = True) -> Path:
        zoo = reference.startswith(PREFIX)
        return _of_the_zoo(where, reference) if zoo else folders.resolve(where, reference, relative_to)

    return resolve_model(where, reference, relative_to, named)


def resolve_file(where: str, reference: str, relative_to: Path) -> Path:
    """A data file: a path, `zoo:name`, or `oxen:REPOSITORY@COMMIT:FILE`. Raises InputError where there is none, and
    where its version is not the one that DVC or Git LFS tracks."""
    if reference.startswith(PREFIX):
        return _of_the_zoo(where, reference)
    if reference.startswith(OXEN):
        return oxen_file(where, reference, relative_to)
    file = local_file(where, reference, relative_to)
    check_data_file(where, file)
    return file


def _of_the_zoo(where: object, reference: str) -> Path:
    try:
        return resolve_in_zoo(reference)
    except InputError as error:
        raise InputError(where, str(error)) from None
