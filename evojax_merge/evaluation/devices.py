"""The devices of a run: one mesh with axes population and model in every process, and processes that share candidates.

Candidates are sharded along the `population` axis; the bank, and with it every merge, along `model`, for models that
one device does not hold. Several processes (jax.distributed) each score their share of a population on their own
devices and gather the scores: a generation costs a few numbers per candidate.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from evojax_merge.errors import Failed, InputError, PeerLostError, first_line, shown
from evojax_merge.evaluation.launching import (
    ARRIVAL,
    check_coordinator,
    coordinator_address,
    launched,
    local_device_ids,
)
from evojax_merge.evaluation.memory import available_memory
from evojax_merge.evaluation.peers import ABORTED, NOT_COME, check_versions, report_aborts
from evojax_merge.evaluation.targets import live_target
from evojax_merge.models.bank import vmap_population

# The mesh that passes are traced for: a process's devices, or a number of devices on no machine in particular; None:
# one device.
AnyMesh = Mesh | AbstractMesh | None

# Share of a device's free memory that a pass may take beyond the bank.
MEMORY_SHARE = 0.8
# Seconds without a heartbeat after which a process is taken to be dead.
HEARTBEAT = 30
# Parts of the messages of passes whose other processes have gone: of the coordination service, and of the libraries
# that exchange arrays on CPUs and GPUs.
PEER_WORDS = ("CoordinationService", "Gloo", "gloo", "NCCL", "UNAVAILABLE: Task")


@dataclass(frozen=True)
class Devices:
    """mesh: axes population and model, of this process's devices, or of all processes' where a candidate is shared by
    more devices than a process has; None: one device. Candidates are divided between `processes` processes, of which
    this is number `process`; those that share a mesh count as one."""

    mesh: AnyMesh = None
    process: int = 0
    processes: int = 1

    @property
    def population(self) -> int:
        """The number of groups of devices that score candidates side by side in this process."""
        return 1 if self.mesh is None else self.mesh.shape["population"]

    @property
    def model(self) -> int:
        """The number of devices that share each candidate."""
        return 1 if self.mesh is None else self.mesh.shape["model"]

    def share(self, nbytes: int) -> int:
        """Bytes on each device of arrays that the devices of a group hold together for candidates: weights and caches
        are cut along `model`, and all else is little beside them."""
        return nbytes // self.model

    def candidate_bytes(self, tree: Any) -> int:
        """Bytes on each device of one candidate's arrays, or of their shapes."""
        return self.share(tree_nbytes(tree))

    @property
    def is_main_process(self) -> bool:
        """Return whether this is the process that writes the run folder."""
        return self.process == 0

    def describe(self) -> str:
        kind, each, hosts = jax.local_devices()[0].device_kind, len(jax.local_devices()), jax.process_count()
        mesh = f"{self.population} x population, {self.model} x model"
        if hosts == 1:
            return f"devices: {each} x {kind} ({mesh})"
        where = "in each" if self.processes > 1 else "over all"
        return f"devices: {hosts * each} x {kind} in {hosts} processes, {each} each ({mesh} {where})"

    def sharding(self, shape: tuple[int, ...], sharded_axis: int | None = None) -> NamedSharding | None:
        """The sharding of an array of the bank on the mesh: along `model`, at an axis counted from its end, where its
        length allows, else replicated. None without a mesh."""
        if self.mesh is None:
            return None
        axes: list[str | None] = [None] * len(shape)
        if sharded_axis is not None and is_sharded(shape, sharded_axis, self.model):
            axes[sharded_axis] = "model"
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def abstract(self, shape: tuple[int, ...], dtype: Any, sharded_axis: int | None = None) -> jax.ShapeDtypeStruct:
        """An abstract array with the sharding of `put`."""
        return jax.ShapeDtypeStruct(
            shape, jax.dtypes.canonicalize_dtype(dtype), sharding=self.sharding(shape, sharded_axis)
        )

    def abstract_of_candidates(self, leaf: Any, axis: int | None) -> jax.ShapeDtypeStruct:
        """An abstract array of the shape and dtype of a leaf that each candidate has (leading axis P); the devices of a
        group cut one of its axes."""
        if self.mesh is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        names = ("population", *("model" if i == axis else None for i in range(1, len(leaf.shape))))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, PartitionSpec(*names)))

    def put_candidates(self, array: np.ndarray, sharded_axis: int | None) -> jax.Array:
        """Put an array that each candidate has (leading axis P) on the devices (see `abstract_candidates`)."""
        sharding = self.abstract_candidates(array, sharded_axis).sharding
        return jax.block_until_ready(
            jax.device_put(array, may_alias=True) if sharding is None else placed(array, sharding)
        )

    def abstract_candidates(self, array: Any, sharded_axis: int | None) -> jax.ShapeDtypeStruct:
        """An abstract array that each candidate has; the devices of a group cut one of its axes, counted from its end,
        where its length allows."""
        cut = sharded_axis if is_sharded(array.shape, sharded_axis, self.model) else None
        return self.abstract_of_candidates(array, None if cut is None else len(array.shape) + cut)

    def part(self, shape: tuple[int, ...], sharded_axis: int | None) -> tuple[slice, ...]:
        """The part of an array of the bank that the devices of this process hold (see `sharding`); empty: all of it."""
        sharding = self.sharding(shape, sharded_axis)
        if sharding is None or sharding.is_fully_addressable or sharding.is_fully_replicated or sharded_axis is None:
            return ()
        axis = len(shape) + sharded_axis
        places = sharding.addressable_devices_indices_map(shape).values()
        bounds = [place[axis].indices(shape[axis])[:2] for place in places if place is not None]
        begin, end = min(begin for begin, _ in bounds), max(end for _, end in bounds)
        whole = [slice(None)] * len(shape)
        return () if end - begin == shape[axis] else (*whole[:axis], slice(begin, end), *whole[axis + 1 :])

    def put(
        self, array: np.ndarray, sharded_axis: int | None = None, whole: tuple[int, ...] | None = None
    ) -> jax.Array:
        """Put an array of the bank on the devices (see `sharding`); whole: the shape of that array where `array` is
        this process's part of it. Waits, so that the host's copy can be freed before the next leaf is read."""
        shape = array.shape if whole is None else whole
        sharding = self.sharding(shape, sharded_axis)
        if sharding is None:
            return jax.block_until_ready(jax.device_put(array, may_alias=True))
        part = () if whole is None else self.part(shape, sharded_axis)
        if not part or sharded_axis is None:
            return jax.block_until_ready(placed(array, sharding))
        axis = len(shape) + sharded_axis
        begin = part[axis].start

        def shard(index: Any) -> np.ndarray:
            first, last, _ = index[axis].indices(shape[axis])
            return array[(*index[:axis], slice(first - begin, last - begin), *index[axis + 1 :])]

        return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, shard))

    def measures(self, number: int) -> bool:
        """Return whether this process measures tensor `number` of those that processes measure together."""
        return number % jax.process_count() == jax.process_index()

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """The content of each process of the run, in their order."""
        if jax.process_count() == 1:
            return [content]
        sizes = _gathered(np.int32(len(content)))
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(content)] = np.frombuffer(content, np.uint8)
        rows = _gathered(padded)
        return [row[:size].tobytes() for row, size in zip(rows.reshape(len(sizes), -1), sizes, strict=True)]

    def local_indices(self, size: int) -> np.ndarray:
        """The indices of the `size` candidates that this process scores; the last one repeats where there are too
        few."""
        each = -(-size // self.processes)
        return np.minimum(np.arange(self.process * each, (self.process + 1) * each), size - 1)

    def gather(self, rows: np.ndarray, size: int) -> np.ndarray:
        """`[P, …]` of all processes' shares `[P / processes, …]`."""
        if self.processes == 1:
            return rows
        return _gathered(rows).reshape(-1, *rows.shape[1:])[:size]


ONE_DEVICE = Devices()


def placed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on the devices of a mesh: each process places the parts of its own."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _gathered(array: Any, tiled: bool = False) -> np.ndarray:
    """An array of each process of the run, along a new first axis; or, `tiled`, the whole of which they have parts."""
    from jax.experimental import multihost_utils

    with collective():
        return np.asarray(multihost_utils.process_allgather(array, tiled=tiled))


def on_host(array: Any) -> np.ndarray:
    """A pass's result on the host. Processes that share a mesh have parts of it, and gather the whole together."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return _gathered(array, tiled=True)
    return np.asarray(array)


def group_of(model: int) -> Devices:
    """`model` devices that share a candidate, on no machine in particular: programs for one group of them can be
    traced."""
    if model == 1:
        return ONE_DEVICE
    return Devices(AbstractMesh((1, model), ("population", "model"), axis_types=(AxisType.Auto, AxisType.Auto)))


def is_sharded(shape: tuple[int, ...], sharded_axis: int | None, shards: int) -> bool:
    """Return whether an array of the bank is cut into so many shards, at an axis counted from its end."""
    return sharded_axis is not None and -len(shape) <= sharded_axis < len(shape) and shape[sharded_axis] % shards == 0


@contextmanager
def collective() -> Iterator[None]:
    """Encloses an operation that all processes of a run do together. Raises PeerLostError where one of them has
    gone."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or not _concerns_peer(error):
            raise
        raise PeerLostError from error


@contextmanager
def losing_peers() -> Iterator[None]:
    """Encloses the work of a run. Raises PeerLostError where a pass that processes share fails because one of them has
    gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not concerns_lost_peer(error):
            raise
        raise PeerLostError from error


def concerns_lost_peer(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, says that another process of the run has gone."""
    if error is None or jax.process_count() == 1:
        return False
    is_said = any(word in str(error) for word in PEER_WORDS)
    return is_said or concerns_lost_peer(error.__cause__ or error.__context__)


def _concerns_peer(error: BaseException | None) -> bool:
    """Return True where JAX raised an error, or its cause, over another process. Orbax wraps such errors in its own."""
    if error is None:
        return False
    is_jax_error = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return is_jax_error or "UNAVAILABLE: Task" in str(error) or _concerns_peer(error.__cause__ or error.__context__)


def barrier(name: str) -> None:
    """Wait until every process of the run has come here, however long that takes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        with collective():
            multihost_utils.sync_global_devices(name)


def check_genomes(genomes: np.ndarray) -> None:
    """Raises Failed, in every process, where two of them are to score other genomes, float32[P, D]."""
    if jax.process_count() == 1:
        return
    # By the devices, which notice at once that a process has gone.
    digests = _gathered(np.frombuffer(sha256(genomes.tobytes()).digest(), np.int32))
    differing = np.flatnonzero((digests != digests[0]).any(axis=1))
    if differing.size:
        raise Failed(
            f"process {differing[0]} of this run has proposed other candidates than process 0: their states differ; "
            "nothing more was scored. Go on from the last generation with --resume"
        )


def decided_by_main(value: int) -> int:
    """The main process's number: clocks and files of the others may differ."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    with collective():
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def init_distributed() -> None:
    """Join the processes of one run. JAX recognises clusters (SLURM, Open MPI, a TPU pod); by hand
    JAX_COORDINATOR_ADDRESS is set, and JAX_NUM_PROCESSES and JAX_PROCESS_ID where no launcher numbers the processes.
    Raises InputError where neither is there, or processes run different versions."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = (os.environ.get(name, "").strip() for name in names)
    given: dict[str, Any] = {}
    launcher = launched()
    if launcher is not None and numbers == ["", ""]:
        numbers = [str(launcher.processes), str(launcher.process)]
    if "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        given["local_device_ids"] = local_device_ids()
    if address:
        _, _, port = address.rpartition(":")
        if not re.fullmatch(r"[^\s/]+:[0-9]{1,5}", address) or not 0 < int(port) < 2**16:
            raise InputError(
                "--distributed", f"{names[0]}: {shown(address)}; expected host:port, with a port from 1 to 65535"
            )
        for name, number in zip(names[1:], numbers, strict=True):
            if not re.fullmatch("[0-9]{1,9}", number):
                raise InputError("--distributed", f"{name}: {shown(number)}; expected a number beside {names[0]}")
        count, process = map(int, numbers)
        if process >= count:
            raise InputError("--distributed", f"{names[2]}: {process}; expected a number below {names[1]}, {count}")
        given |= {"coordinator_address": address, "num_processes": count, "process_id": process}
    place = address or coordinator_address()
    if place is not None and numbers[1].isdecimal():
        check_coordinator(place, int(numbers[1]))
    _silence_libraries()
    report_aborts(NOT_COME, 2)
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, initialization_timeout=int(ARRIVAL), **given)
    except Exception as error:
        # JAX recognises clusters by variables of many programs, and believes them.
        what = f"no other processes were found ({first_line(error)}); expected {', '.join(names)}"
        raise InputError("--distributed", what) from None
    report_aborts(ABORTED, 1)
    check_versions()


def _silence_libraries() -> None:
    """Let this process's own texts alone reach its standard output: Gloo prints lines of its own there."""
    usual = sys.stdout
    usual.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.stdout = os.fdopen(kept, "w", encoding=usual.encoding, errors=usual.errors, buffering=1)


def local_devices(model: int = 1) -> Devices:
    """All devices of this process, in groups of `model` that share a candidate; or those of all processes together,
    where a group has more devices than a process. Raises InputError where `model` and the number of a process's devices
    do not divide each other, or other processes have more or fewer."""
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise InputError(
            "--distributed",
            f"the processes have unlike numbers of devices ({', '.join(map(str, counts.values()))}); expected equally "
            "many in each",
        )
    live_target().check_shards("evaluation.model", model)
    if model > len(jax.local_devices()):
        return Devices(mesh_of(jax.devices(), model), jax.process_index())
    return Devices(mesh_of(jax.local_devices(), model), jax.process_index(), jax.process_count())


def mesh_of(devices: Sequence[Any], model: int) -> Mesh | None:
    """The mesh of some devices, in groups of `model` that follow each other; None: there is one device."""
    if len(devices) == 1:
        return None
    grid = np.array(devices).reshape(-1, model)
    return Mesh(grid, ("population", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def size_of(candidates: Any) -> int:
    """The leading axis of a pytree of candidates."""
    return jax.tree.leaves(candidates)[0].shape[0]


def vmap_sharded(mesh: AnyMesh, function: Callable[[Any, Any], Any], replicated: Any, candidates: Any) -> Any:
    """`function(replicated, candidate)` for each candidate (leading axis P on every leaf): vmap, sharded over the
    mesh's population axis."""

    def local(replicated: Any, candidates: Any) -> Any:
        return vmap_population(partial(function, replicated), candidates)

    return shard_population(mesh, local, replicated, candidates)


def shard_population(mesh: AnyMesh, local: Callable[[Any, Any], Any], replicated: Any, candidates: Any) -> Any:
    """`local(replicated, candidates)` under shard_map: each group of devices runs it on its own candidates. The
    compiler divides the work between the devices of a group, within the constraints of models.sharding."""
    if mesh is None:
        return local(replicated, candidates)
    spec = PartitionSpec("population")
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, axis_names={"population"}, check_vma=False
    )
    return sharded(replicated, candidates)


def free_memory() -> int:
    """Bytes that a pass may use on a device beside the loaded arrays."""
    return int(MEMORY_SHARE * unused_memory())


def unused_memory() -> int:
    """Free bytes of a device; on a CPU those of the host that this process may take."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    return available_memory()


def pad_chunk(candidates: Any, rows: Sequence[int] | np.ndarray, size: int) -> Any:
    """Candidates `rows`, on the host, padded to `size` with the last one so that all chunks have one shape."""
    padded = np.concatenate([rows, np.full(size - len(rows), rows[-1])]).astype(np.int64)
    return jax.tree.map(lambda leaf: leaf[padded], candidates)


def tree_nbytes(tree: Any) -> int:
    """Bytes of a pytree of arrays or of their shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
