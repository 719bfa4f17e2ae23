"""Writing model folders: streamed safetensors shards, and folders that appear complete or not at all.

May import errors and checkpoints.folder.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from evojax_merge.checkpoints.folder import DTYPE_NAMES, INDEX_FILE
from evojax_merge.errors import InputError, cannot_write

MAX_SHARD_BYTES = 5 * 10**9


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends well, and vanishes when it does not.

    An existing `target` is refused, or, with `overwrite`, replaced only once the new one is complete.
    """
    if target.exists() and not overwrite:
        raise InputError(target, "exists already; choose another folder or pass --overwrite")
    if target.exists() and not target.is_dir():
        raise InputError(target, "is a file; expected a folder name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        work.chmod(0o755)
    except OSError as error:
        raise InputError(target, f"cannot be written ({error.strerror})") from None
    try:
        yield work
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / "folder"
            os.rename(target, old)
            try:
                os.rename(work, target)
            except BaseException:
                os.rename(old, target)
                raise
            finally:
                shutil.rmtree(old.parent)
        else:
            os.rename(work, target)
    except OSError as error:
        raise cannot_write(target, error, "; nothing was left behind") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def require_space(target: Path, nbytes: int) -> None:
    """Raises InputError where the disk that `target` will be on has less than `nbytes` free."""
    folder = next(parent for parent in (target, *target.resolve().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise InputError(target, f"needs {nbytes / 1e6:,.1f} MB, but the disk has {free / 1e6:,.1f} MB free")


def atomic_write(path: Path, text: str) -> None:
    """Write a text file that is either the old one or the complete new one."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        work.write_text(text, encoding="utf-8")
        os.replace(work, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        work.unlink(missing_ok=True)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that is going to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class ShardWriter:
    """Writes tensors, in the order of `specs`, as one `model.safetensors` or as shards with an index.

    Headers are known from `specs`, so each tensor goes to disk as it comes and is forgotten.
    """

    def __init__(self, folder: Path, specs: dict[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        from huggingface_hub import split_state_dict_into_shards_factory

        self.folder, self.specs = folder, specs
        split = split_state_dict_into_shards_factory(
            specs,
            get_storage_size=lambda spec: spec.nbytes,
            get_storage_id=lambda spec: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_bytes,
        )
        self._order = [(file, name) for file, names in split.filename_to_tensors.items() for name in names]
        self._files = split.filename_to_tensors
        self._index = split.tensor_to_filename if split.is_sharded else None
        self._next = 0
        self._handle: BinaryIO | None = None

    @property
    def order(self) -> list[str]:
        """The order in which `write` wants the tensors."""
        return [name for _, name in self._order]

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.close()
        if kind is None and self._next != len(self._order):
            raise RuntimeError(f"{len(self._order) - self._next} tensors were not written")

    def write(self, name: str, values: np.ndarray) -> None:
        file, expected = self._order[self._next]
        spec = self.specs[name]
        if name != expected or values.shape != spec.shape or values.dtype != spec.dtype:
            raise RuntimeError(f"wrote {name} {values.dtype}{values.shape}, expected {expected} {spec}")
        if self._handle is None:
            self._handle = (self.folder / file).open("wb")
            self._handle.write(self._header(self._files[file]))
        self._handle.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._next += 1
        if self._next == len(self._order) or self._order[self._next][0] != file:
            self._handle.close()
            self._handle = None
        if self._next == len(self._order) and self._index is not None:
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._index}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _header(self, names: list[str]) -> bytes:
        rows: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            spec = self.specs[name]
            rows[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(rows, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
