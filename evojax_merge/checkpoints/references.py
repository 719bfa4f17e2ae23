"""References to models: paths on this machine, and hub ids."""

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path

from evojax_merge.checkpoints.adapters import ADAPTER_FILE
from evojax_merge.checkpoints.folder import (
    FOREIGN_FILES,
    INDEX_FILE,
    PIPELINE_INDEX,
    SINGLE_FILE,
    SMALL_FILES,
    VARIANTS,
    weight_map,
)
from evojax_merge.checkpoints.remote import fetched, is_address
from evojax_merge.errors import InputError
from evojax_merge.system.data_packages import hub_failure
from evojax_merge.system.regular_file import check_model_folder


def resolve(where: object, reference: str, relative_to: Path, *, weights: bool = True) -> Path:
    """The path of a local model, or the downloaded folder of a hub id (`owner/name`, `owner/name@revision`). The hub's
    client draws a progress bar. An address (`s3://…`) is fetched into the cache. Without `weights` only the small files
    are downloaded, for the tokenizer. Raises InputError as `resolve_by` does."""
    if is_address(reference):
        return fetched(where, reference, weights=weights)
    return resolve_by(where, reference, relative_to, "it", lambda name, revision: _download(name, revision, weights))


def resolve_by(
    where: object, reference: str, relative_to: Path, what: str, fetch: Callable[[str, str | None], Path]
) -> Path:
    """The path of a local model, or what `fetch` makes of a hub id and a revision.

    A local folder needs no network, nor does a hub id whose files are in the hub's cache. `where`: the place of the
    reference, for messages; what: the thing that the hub gives. Raises InputError where neither exists, and for a
    folder that `check_model_folder` refuses.
    """
    # A local path has no revisions, but its name may have an @.
    name, revision = split_revision(reference)
    local = local_path(reference, relative_to) or local_path(name, relative_to)
    if local is not None:
        check_model_folder(local)
        return local
    if reference.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(where, f"{reference}: no such folder; expected a model folder or a hub id 'owner/name'")
    try:
        return fetch(name, revision)
    except InputError:
        raise
    except Exception as error:
        fault = f"{reference}: no such folder, and the hub did not give {what} ({hub_failure(error)})"
        advice = "check the name, or give the path of a model folder on this machine"
        raise InputError(where, f"{fault}; {advice}") from None


def split_revision(reference: str) -> tuple[str, str | None]:
    """The name and the revision of `name@revision`; None without a revision."""
    before, _, after = reference.rpartition("@")
    return (before, after or None) if before else (reference, None)


def local_path(reference: str, relative_to: Path) -> Path | None:
    """The path on this machine that a reference names, from the working directory, else from `relative_to`; None where
    there is none."""
    # Both functions take any text, also one that no file can be called.
    for local in (os.path.expanduser(reference), relative_to / reference):
        if os.path.exists(local):
            return Path(local).resolve()
    return None


def hub_id(folder: Path) -> str | None:
    """The hub id `owner/name` of a folder in the hub's cache (`models--owner--name/snapshots/COMMIT`), else None."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    name = repository.removeprefix("models--").replace("--", "/")
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) else None


def _download(name: str, revision: str | None, weights: bool) -> Path:
    """The snapshot of a hub repository with the files that are read, and no others: repositories also hold the weights
    in other programs' formats, beside ours or in folders of their own. Without `weights`: the small files alone."""
    from huggingface_hub import snapshot_download

    def fetch(revision: str | None, patterns: list[str]) -> Path:
        # The patterns' * matches / as well.
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", FOREIGN_FILES])
        )

    folder = fetch(revision, SMALL_FILES)
    if not weights:
        return folder
    if (folder / PIPELINE_INDEX).exists():
        # A folder for each component; weights in other precisions stand beside the ones that are read.
        patterns = [f"*/*{suffix}" for suffix in (".json", ".model", ".txt", ".jinja", ".safetensors")]
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=patterns, ignore_patterns=VARIANTS))
    # The snapshot's folder has the name of its commit: the weights come from the same one.
    index = folder / INDEX_FILE
    shards = sorted({glob.escape(file) for file in weight_map(index).values()}) if index.exists() else []
    # The hub's client warns of a pattern that matches no file.
    folder = fetch(folder.name, [SINGLE_FILE, *(shards or [ADAPTER_FILE])])
    if not shards and not any((folder / file).exists() for file in (SINGLE_FILE, ADAPTER_FILE)):
        folder = fetch(folder.name, ["*.safetensors"])
    return folder
