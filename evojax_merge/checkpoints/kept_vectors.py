"""Prepared vectors that outlive a run: the next merge or search with the same tensors and rule reads them.

Vectors are kept by content: of the sources' tensors, of the prompts and models that their moments are measured on, of
the method, its constants and the kernels' own code. A file that is damaged is made again.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from math import prod
from pathlib import Path
from shutil import disk_usage
from time import monotonic

import merge_kernels
import numpy as np
from merge_kernels import Method, Options, Prepared, draw_row_keys, tabulate
from merge_kernels.method import Numbers

from evojax_merge.checkpoints.parents import Sources
from evojax_merge.errors import Failed, InputError
from evojax_merge.models.bank import MergeSpec
from evojax_merge.system.blas import one_blas_thread
from evojax_merge.system.data_packages import cache_folder
from evojax_merge.system.file_system import code_digest, make_folder, remove_file
from evojax_merge.system.kept_files import keep, read_kept

# Tensors of fewer entries are prepared as soon as they are read, where that asks for no moments.
MIN_ENTRIES = 2**16
# The bytes that all files may take; the share of the disk that they leave free.
MAX_BYTES, FREE_SHARE = 2**36, 0.1


def prepare_or_read(
    measure: Callable[..., Prepared], method: Method, options: Options, sources: Sources,
    inputs: Sequence[tuple[int, str]], tensors: Sequence[np.ndarray], parameters: Numbers, seed: int,
) -> Prepared:  # fmt: skip
    """The result of `measure`, which is `prepare` or `tabulate`, from a file where the method stores vectors and an
    earlier call has kept them. inputs: the sources' tensors, (source, name), the base first; tensors: their values,
    none for a method that does not measure them; seed: of the row keys."""
    parents = inputs[int(options.has_base) :]

    def row_keys(k: int) -> np.ndarray:
        return draw_row_keys(seed, sources.digest(*parents[k]), sources.shape(*inputs[0]))

    def moments(k: int) -> np.ndarray | None:
        return sources.moments_of(*parents[k])

    def prepare() -> Prepared:
        return measure(method, options, tensors, parameters, row_keys, moments)

    if not method.stores_vectors:
        return prepare()
    shape, dtype = tensors[0].shape, np.dtype(merge_kernels.widest([x.dtype for x in tensors]))
    keys_shape, keys_dtype = method.mask_key_array(shape, dtype)
    if prod(shape) < MIN_ENTRIES and not method.looks_at:
        with one_blas_thread():
            return prepare()
    constants = [(p.name, np.asarray(parameters[p.name]).tolist()) for p in method.parameters if not p.searched]
    digests = [sha256(np.ascontiguousarray(x, dtype).reshape(-1).view(np.uint8).data).digest() for x in tensors]
    code = code_digest(Path(merge_kernels.__file__).parent)
    of_moments = [] if sources.moments is None else [sources.moments.content(*each) for each in inputs]
    content = repr([method.name, constants, digests, of_moments, code])
    file = cache_folder() / "vectors" / sha256(content.encode()).hexdigest()
    count = method.mask_keys(len(parents))
    vectors = _read(file, count, keys_shape, keys_dtype)
    if vectors is not None:
        return Prepared(vectors, {})
    with one_blas_thread():
        prepared = prepare()
    _keep(file, b"".join(np.ascontiguousarray(x).reshape(-1).view(np.uint8).tobytes() for x in prepared.mask_keys))
    return prepared


def preparation_seconds(spec: MergeSpec, parents: int, shapes: Iterable[tuple[int, ...]], workers: int) -> float:
    """About the seconds that this machine takes to prepare the vectors of tensors `[..., out, in]`, by those of a small
    matrix: a decomposition takes the cube of a matrix's side."""
    side, rng = 256, np.random.default_rng(0)
    sources = [rng.normal(size=(side, side)).astype(np.float32) for _ in range(parents + int(spec.options.has_base))]
    keys, moments, taken = np.zeros(0, np.uint32), np.eye(side), list[float]()
    with one_blas_thread():
        # The first call loads libraries.
        for _ in range(2):
            started = monotonic()
            tabulate(
                spec.method, spec.options, sources, spec.prepared_for(parents), lambda k: keys, lambda k: moments
            )  # fmt: skip
            taken.append(monotonic() - started)
    cubes = sum(prod(shape) * min(shape[-2:]) for shape in shapes if len(shape) > 1)
    return min(taken) * cubes / side**3 / workers


def _read(file: Path, count: int, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, ...] | None:
    size = count * prod(shape) * dtype.itemsize
    content = read_kept(file, size)
    if content is None or len(content) != size:
        return None
    return tuple(np.frombuffer(content, dtype).reshape(count, *shape))


def _keep(file: Path, content: bytes) -> None:
    """Keep vectors if the folder can be written and has room, and remove the oldest ones."""
    with suppress(OSError, Failed, InputError):
        make_folder(file.parent)
        if disk_usage(file.parent).free - len(content) < FREE_SHARE * disk_usage(file.parent).total:
            return
        keep(file, content)
        states = sorted((each.stat().st_mtime, each.stat().st_size, each) for each in file.parent.iterdir())
        total = sum(size for _, size, _ in states)
        for _, size, old in states:
            if total <= MAX_BYTES:
                break
            remove_file(old)
            total -= size
