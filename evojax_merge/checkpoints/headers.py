"""Model folders of headers alone: all that a search is planned with, where the weights are not here.

Of a hub model's safetensors files only the headers are fetched. A file is then written that has the whole file's size
and takes the room of its header, so that whatever opens a model folder opens this one; its tensors are zeros.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from evojax_merge.checkpoints.folder import (
    INDEX_FILE,
    SINGLE_FILE,
    SMALL_FILES,
    hub_reference,
    local_model,
    weight_map,
)
from evojax_merge.errors import InputError


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of a tensor: `dtype` as it is written there (F32, BF16, …)."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def write_header_only(file: Path, tensors: Mapping[str, TensorHeader]) -> int:
    """Write a safetensors file of these tensors, zeros that take no room; its size in bytes."""
    document, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        document[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(document).encode()
    with file.open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        handle.truncate(8 + len(header) + end)
    return 8 + len(header) + end


@dataclass
class HeaderFolders:
    """Resolves what a config names, as `references.resolve_reference` does, without downloading weights: for a hub
    model that is not in the hub's cache a folder of headers is made below `root`. download_bytes: of what was not
    here."""

    root: Path
    download_bytes: int = 0
    known: dict[str, Path] = field(default_factory=dict)

    def resolve(self, where: object, reference: str, relative_to: Path) -> Path:
        """A model's folder, or that of its headers. Raises InputError where there is none, or no hub to ask."""
        local = local_model(reference, relative_to)
        if local is not None:
            return local
        name, revision = hub_reference(where, reference)
        if reference not in self.known:
            try:
                self.known[reference] = self._cached(name, revision) or self._fetch(name, revision)
            except InputError:
                raise
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise InputError(where, f"{reference}: the hub did not give its headers ({reason})") from None
        return self.known[reference]

    @staticmethod
    def _cached(name: str, revision: str | None) -> Path | None:
        """The model in the hub's cache, where all of it is there."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        files = [SINGLE_FILE] if not (folder / INDEX_FILE).exists() else set(weight_map(folder / INDEX_FILE).values())
        return folder if all((folder / file).exists() for file in files) else None

    def _fetch(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import HfApi, snapshot_download

        small = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_FILES, ignore_patterns=["*/*"]))
        folder = self.root / str(len(self.known))
        folder.mkdir(parents=True)
        for one in small.iterdir():
            (folder / one.name).symlink_to(one.resolve())
        index = folder / INDEX_FILE
        # The snapshot's folder has the name of its commit: the headers come from the same one.
        for file in sorted(set(weight_map(index).values())) if index.exists() else [SINGLE_FILE]:
            found = HfApi().parse_safetensors_file_metadata(name, file, revision=small.name)
            tensors = {
                tensor: TensorHeader(row.dtype, tuple(row.shape), row.data_offsets[1] - row.data_offsets[0])
                for tensor, row in found.tensors.items()
            }
            self.download_bytes += write_header_only(folder / file, tensors)
        return folder
