"""Models in object stores and on web servers (`s3://`, `gs://`, `https://`), fetched by fsspec into the cache.

A fetched model is a folder of the cache with a list of its files, their sizes and SHA-256. It is fetched once: later
commands take it without the network. A store lists its files; of a web server the usual names are asked for. A folder
appears when all of its files are there.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from evojax_merge.checkpoints.folder import (
    FOREIGN_FILES,
    INDEX_FILE,
    PICKLES,
    PIPELINE_INDEX,
    SINGLE_FILE,
    SMALL_FILES,
    VARIANTS,
    file_hash,
    weight_map,
)
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.checkpoints.tokens import TOKENIZER_FILES
from evojax_merge.checkpoints.writer import CARD, PROCESSOR_FILES, require_space
from evojax_merge.errors import InputError, first_line, name_in_messages, shown
from evojax_merge.system.data_packages import cache_folder
from evojax_merge.system.file_system import atomic_folder, locked_folder
from evojax_merge.system.regular_file import file_inside

# By the protocol of an address: the package that fsspec needs for it.
PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}
_ADDRESS = re.compile(r"([a-z0-9]+)://(.*)")
# The list of a fetched model's files.
FILES = "evojax_merge_files.json"
# Names that a web server is asked for, and those of weights.
USUAL_NAMES = (
    "config.json", "generation_config.json", "adapter_config.json", CARD, INDEX_FILE, *TOKENIZER_FILES,
    *PROCESSOR_FILES,
)  # fmt: skip
WEIGHTS = (SINGLE_FILE, "adapter_model.safetensors")
# The suffixes of models that are one file.
ONE_FILE = (".gguf", ".safetensors")
# The largest header of a safetensors file.
MAX_HEADER = 10**8


def is_address(reference: str) -> bool:
    """Return whether a reference is the address of a model in a store or on a web server."""
    match = _ADDRESS.match(reference)
    return match is not None and match[1] in PROTOCOLS


@dataclass(frozen=True)
class RemoteModel:
    """A model in a store. address: as the user wrote it, without a slash at its end; store: fsspec's file system; root:
    the model's place in it; sizes: of its files in bytes, by their names, None where the server does not say; of a
    model that is one file, its own name alone."""

    where: object
    address: str
    store: Any
    root: str
    sizes: dict[str, int | None]

    @property
    def is_file(self) -> bool:
        return self.address.endswith(ONE_FILE)

    def path(self, name: str) -> str:
        return self.root if self.is_file else f"{self.root}/{name}"

    def fetch(self, name: str, into: Path) -> None:
        """Fetch one file into a folder. Raises InputError where it cannot be had, or ends before its size."""
        file = file_inside(f"{self.where}: {self.address}", into, name)
        file.parent.mkdir(exist_ok=True)
        with self.asking(name):
            self.store.get_file(self.path(name), str(file))
        size, wanted = file.stat().st_size, self.sizes[name]
        if wanted is not None and size != wanted:
            what = f"{name} was cut short: {size:,} of {wanted:,} bytes came; run the command again"
            raise InputError(self.where, f"{self.address}: {what}")

    def read(self, name: str, begin: int, end: int) -> bytes:
        """The bytes of a file from `begin` to `end`."""
        with self.asking(name):
            content = bytes(self.store.cat_file(self.path(name), start=begin, end=end))
        # Some web servers send the whole file.
        return content if len(content) <= end - begin else content[begin:end]

    @contextmanager
    def asking(self, name: str = "") -> Iterator[None]:
        """Encloses a question to the store. Raises its error as InputError, in a line."""
        try:
            yield
        except Exception as error:
            # Every store's library raises errors of its own.
            why = _failure(error)
            what = f"{name} could not be fetched ({why})" if name else why
            raise InputError(self.where, f"{self.address}: {what}") from None

    def names(self, patterns: list[str]) -> list[str]:
        """The files of these patterns, but for those of other programs and precisions, and of folders that are no
        components of a pipeline."""
        from huggingface_hub.utils import filter_repo_objects

        # The patterns' * matches / as well.
        ignored = [FOREIGN_FILES, *(VARIANTS if PIPELINE_INDEX in self.sizes else ["*/*"])]
        return sorted(filter_repo_objects(self.sizes, allow_patterns=patterns, ignore_patterns=ignored))

    def weight_names(self, folder: Path) -> list[str]:
        """The files of weights. folder: with the small files."""
        if self.is_file:
            return [*self.sizes]
        if PIPELINE_INDEX in self.sizes:
            return self.names(["*/*.safetensors"])
        if SINGLE_FILE not in self.sizes and (folder / INDEX_FILE).exists():
            return sorted(set(weight_map(folder / INDEX_FILE).values()))
        return [SINGLE_FILE] if SINGLE_FILE in self.sizes else self.names(["*.safetensors"])


def opened(where: object, reference: str) -> RemoteModel:
    """The model at an address, with the names and sizes of its files. Raises InputError where there is none, where this
    machine may not read it, and where the store's package is missing."""
    protocol, place = reference.split("://", 1)
    parts = place.rstrip("/").split("/")
    if re.search(r"[?#\\\s]", place) or "@" in parts[0] or {"", ".", ".."} & {*parts}:
        what = "expected a plain address, without a query or a password: credentials belong into the store's settings"
        raise InputError(where, f"{protocol}://…: {what}")
    try:
        import fsspec

        store, root = fsspec.core.url_to_fs(reference.rstrip("/"))
    except ImportError:
        what = f"needs the package {PROTOCOLS[protocol]}; pip install 'evojax-merge[remote]'"
        raise InputError(where, f"{reference}: {what}") from None
    model = RemoteModel(where, reference.rstrip("/"), store, root, {})
    if model.address.endswith(PICKLES):
        raise InputError(where, f"{reference}: may be a pickle; expected safetensors or GGUF")
    if model.is_file:
        with model.asking():
            model.sizes[PurePosixPath(place).name] = store.info(root).get("size")
    elif protocol.startswith("http"):
        _ask_for_usual_names(model)
    else:
        with model.asking():
            listed = store.find(root, maxdepth=2, detail=True)
        model.sizes.update({path.removeprefix(f"{root}/"): entry.get("size") for path, entry in listed.items()})
    if not model.sizes:
        raise InputError(where, f"{model.address}: holds no file that may be listed; expected a model folder")
    return model


def _ask_for_usual_names(model: RemoteModel) -> None:
    """Find a folder's files on a web server, which lists none. Raises InputError for one without a config."""
    errors = dict[str, Exception]()
    for name in (*USUAL_NAMES, *WEIGHTS):
        try:
            model.sizes[name] = model.store.info(model.path(name)).get("size")
        except FileNotFoundError as error:
            errors[name] = error
        except Exception as error:
            with model.asking():
                raise error
    if not {"config.json", "adapter_config.json"} & model.sizes.keys():
        with model.asking("config.json"):
            raise errors["config.json"]


def _failure(error: BaseException | None) -> str:
    """The reason for which a store does not give something, as part of a line."""
    first, causes = error, list[BaseException]()
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    # Of aiohttp's errors, and of gcsfs'.
    statuses = [cause.status if hasattr(cause, "status") else getattr(cause, "code", None) for cause in causes]
    names = " ".join(type(cause).__name__ for cause in causes)
    if any(isinstance(cause, PermissionError) for cause in causes) or {401, 403} & {*statuses} or "Credential" in names:
        return "this machine has no right to read it; put credentials where the store's own tools look for them"
    if any(isinstance(cause, ConnectionError | TimeoutError) for cause in causes) or "Connect" in names:
        return f"no network reaches it: {first_line(causes[-1])}"
    if any(isinstance(cause, FileNotFoundError) for cause in causes):
        return "there is nothing of that name, or it may not be listed"
    return first_line(first)


def cached(reference: str, *, weights: bool = True) -> Path | None:
    """The place of a model in the cache; None where it is not there as it was fetched."""
    place = _place(reference, weights)
    try:
        files = read_json_object(place / FILES, missing={}).get("files")
        model = file_inside(place, place, PurePosixPath(reference.rstrip("/")).name)
        base = place if model.is_file() else model
        whole = isinstance(files, dict) and all(
            file_inside(place, base, name).stat().st_size == file["bytes"] for name, file in files.items()
        )
    except (InputError, OSError, TypeError, KeyError):
        return None
    if not whole:
        return None
    name_in_messages(model, reference)
    return model


def _place(reference: str, weights: bool) -> Path:
    """The folder of the cache that holds a model and the list of its files."""
    key = hashlib.sha256(f"{reference.rstrip('/')} {weights}".encode()).hexdigest()[:16]
    return cache_folder() / "remote" / key


def fetched(where: object, reference: str, *, weights: bool = True) -> Path:
    """The folder, or the one file, of the model at an address, fetched where the cache does not have it. Without
    `weights`: the small files alone. Raises InputError as `opened` and `RemoteModel.fetch` do; nothing half-fetched
    stays."""
    place = _place(reference, weights)
    # Of several processes on a host one fetches.
    with locked_folder(place.with_name(f"{place.name}.lock")):
        earlier = cached(reference, weights=weights)
        if earlier is not None:
            return earlier
        model = opened(where, reference)
        require_space(place, sum(size or 0 for size in model.sizes.values()))
        with atomic_folder(place, overwrite=place.exists()) as work:
            folder = work if model.is_file else file_inside(where, work, PurePosixPath(model.address).name)
            folder.mkdir(exist_ok=True)
            small_files = [*SMALL_FILES, *(f"*/{pattern}" for pattern in SMALL_FILES)]
            for small in [] if model.is_file else model.names(small_files):
                model.fetch(small, folder)
            names = model.weight_names(folder) if weights else []
            total = sum(model.sizes.get(each) or 0 for each in names)
            print(f"fetching {model.address} ({total / 1e6:,.1f} MB of weights) …", file=sys.stderr)
            for each in names:
                if each not in model.sizes:
                    _add(model, each)
                model.fetch(each, folder)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            listed = {
                file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_hash(file)}
                for file in files
            }
            document = {"address": model.address, "files": listed}
            (work / FILES).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        result = cached(reference, weights=weights)
        assert result is not None
        return result


def _add(model: RemoteModel, name: str) -> None:
    """Ask for a file that an index names."""
    if name != PurePosixPath(name).name:
        raise InputError(model.where, f"{model.address}: {INDEX_FILE} names {shown(name)}; expected a plain name")
    with model.asking(name):
        model.sizes[name] = model.store.info(model.path(name)).get("size")


def header(model: RemoteModel, name: str) -> dict[str, Any]:
    """The header of a safetensors file, which alone is read."""
    if name not in model.sizes:
        _add(model, name)
    length = int.from_bytes(model.read(name, 0, 8), "little")
    try:
        if not 0 < length <= MAX_HEADER:
            raise ValueError
        document: dict[str, Any] = json.loads(model.read(name, 8, 8 + length))
        return {tensor: entry for tensor, entry in document.items() if tensor != "__metadata__"}
    except (ValueError, AttributeError, RecursionError):
        raise InputError(model.where, f"{model.address}: {name} is no safetensors file") from None
