"""Compilers for targets that this machine lacks: libtpu compiles for TPUs, and XLA's CUDA compiler for GPUs. The memory
and the collectives that they report are those of the chip."""

import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from evojax_merge.errors import first_line
from evojax_merge.evaluation.devices import Devices, mesh_of
from evojax_merge.evaluation.passes import TracedPass
from evojax_merge.evaluation.targets import Target, one_host

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


@dataclass(frozen=True)
class _Gpu:
    """A GPU as XLA's compiler needs it, from NVIDIA's documents and XLA's own descriptions. Each of its `cores`
    (streaming multiprocessors) has float32 `units`, resident `threads`, bytes of `shared` memory, of which a block may
    have `block_shared`. cache: bytes of the second level; clock: GHz; memory: bytes; bandwidth: bytes a second;
    capability: CUDA's."""

    cores: int
    units: int
    threads: int
    shared: int
    block_shared: int
    cache: int
    clock: float
    memory: int
    bandwidth: int
    capability: tuple[int, int]


# By `Target.kind`.
_GPUS = {
    "NVIDIA GeForce RTX 3090": _Gpu(
        82, 128, 1536, 102400, 101376, 6291456, 1.695, 25300000000, 936096000000, (8, 6)),
    "NVIDIA GeForce RTX 4090": _Gpu(
        128, 128, 1536, 102400, 101376, 75497472, 2.52, 25200000000, 1008096000000, (8, 9)),
    "NVIDIA GeForce RTX 5090": _Gpu(
        170, 128, 1536, 102400, 101376, 100663296, 2.407, 33600000000, 1792000000000, (12, 0)),
    "NVIDIA L4": _Gpu(
        58, 128, 1536, 102400, 101376, 50331648, 2.04, 24152899584, 300096000000, (8, 9)),
    "NVIDIA L40S": _Gpu(
        142, 128, 1536, 102400, 101376, 100663296, 2.52, 47600000000, 864000000000, (8, 9)),
    "NVIDIA A100-SXM4-40GB": _Gpu(
        108, 64, 2048, 167936, 166912, 41943040, 1.41, 42331013120, 1555200000000, (8, 0)),
    "NVIDIA A100-SXM4-80GB": _Gpu(
        108, 64, 2048, 167936, 166912, 41943040, 1.41, 85100068864, 2039040000000, (8, 0)),
    "NVIDIA H100 80GB HBM3": _Gpu(
        132, 128, 2048, 233472, 232448, 52428800, 1.98, 84942979072, 3352320000000, (9, 0)),
    "NVIDIA H200": _Gpu(
        132, 128, 2048, 233472, 232448, 52428800, 1.98, 151397597184, 4800000000000, (9, 0)),
    "NVIDIA B200": _Gpu(
        148, 128, 2048, 233472, 232448, 132644864, 1.965, 191514411008, 7672320000000, (10, 0)),
}  # fmt: skip
# The packages of `jax[cuda12]`, or of its successor, that have XLA's CUDA compiler.
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# No autotuning of kernels: it would have to run them.
_CUDA_OPTIONS = {"xla_gpu_autotune_level": 0}


# Patterns of optimised HLO: the start of a computation, a collective (or the start of an asynchronous one), a loop's
# trips where they are known, and the computations that an instruction calls.
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(r"= (.*?) (" + "|".join(COLLECTIVES) + r")(?:-start)?\(")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)")


class CompilerMissing(Exception):
    """The compiler of a target is not installed, or cannot be used: the text says why, and what installs it."""


def compile_devices(target: Target) -> list[Any]:
    """The devices of a target, for which programs can be compiled but not run. Raises CompilerMissing."""
    if target.platform == "cpu":
        return [jax.local_devices(backend="cpu")[0]]
    find, extra, packages = {
        "gpu": (_cuda_devices, "plan-cuda", _CUDA_PLUGINS),
        "tpu": (_tpu_devices, "plan-tpu", ("libtpu",)),
    }[target.platform]
    if not any(map(find_spec, packages)):
        raise CompilerMissing(
            f"the compiler of {target.name} is not installed (pip install 'evojax-merge[{extra}]'): what passes need "
            "is estimated"
        )
    try:
        return list(find(target))
    except (RuntimeError, NotImplementedError) as error:
        what = f"the compiler of {target.name} cannot be asked ({first_line(error)})"
        raise CompilerMissing(f"{what}: what passes need is estimated") from None


def _tpu_devices(target: Target) -> Sequence[Any]:
    from jax.experimental import topologies

    # Otherwise libtpu asks a cloud's metadata server for the machine's TPUs. Several processes may compile at a time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name, grid = f"{target.name.partition('-')[0]}:{target.topology}", one_host(target).topology.split("x")
    bounds = [*map(int, grid), 1][:3]
    return topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=bounds).devices


def _cuda_devices(target: Target) -> Sequence[Any]:
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda", topology_name=target.name, topology=f"1x{target.hosts}x{target.devices_per_host}",
        target_config=_gpu_description(target.kind),
    ).devices  # fmt: skip


def _gpu_description(kind: str) -> str:
    """The description of a GPU for XLA's compiler: a GpuTargetConfigProto in text form."""
    gpu = _GPUS.get(kind)
    if gpu is None:
        raise NotImplementedError(f"{kind} is none of {', '.join(_GPUS)}")
    return f"""
        gpu_device_info {{
          core_count: {gpu.cores} fpus_per_core: {gpu.units} clock_rate_ghz: {gpu.clock} l2_cache_size: {gpu.cache}
          device_memory_size: {gpu.memory} memory_bandwidth: {gpu.bandwidth}
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
          shared_memory_per_block: 49152 shared_memory_per_block_optin: {gpu.block_shared}
          shared_memory_per_core: {gpu.shared} registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
        }}
        platform_name: "CUDA" device_description_str: "{kind}"
        dnn_version_info {{ major: 9 minor: 8 patch: 0 }} runtime_version {{ major: 12 minor: 8 patch: 0 }}
    """


@dataclass
class TargetCompiler:
    """The compiler of a target, as a reader of passes. devices: the target's, on a mesh where there are several."""

    target: Target
    devices: Devices
    device: Any
    # By the identity of a traced pass: the pass, and its compiled program.
    _compiled: dict[int, tuple[TracedPass, jax.stages.Compiled]] = field(default_factory=dict)
    # By the text of a lowered pass: its compiled program, which searches share.
    _programs: dict[str, jax.stages.Compiled] = field(default_factory=dict)
    # What compiling them took.
    seconds: float = 0.0

    def compiled(self, traced: TracedPass) -> jax.stages.Compiled:
        """A pass, compiled once. Raises JaxRuntimeError where it takes more memory than a device has."""
        if id(traced) not in self._compiled:
            cuda = self.target.platform == "gpu"
            lowered = traced.lower(lowering_platforms=("cuda" if cuda else self.target.platform,))
            text = lowered.as_text()
            if text not in self._programs:
                begun = time.perf_counter()
                self._programs[text] = lowered.compile(compiler_options=_CUDA_OPTIONS if cuda else {})
                self.seconds += time.perf_counter() - begun
            self._compiled[id(traced)] = traced, self._programs[text]
        return self._compiled[id(traced)][1]

    def programs(self) -> list[jax.stages.Compiled]:
        """The compiled programs, in their order."""
        return list(self._programs.values())

    def temporary_bytes(self, traced: TracedPass) -> int:
        memory = self.compiled(traced).memory_analysis()
        assert memory is not None
        return int(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)

    def sent_bytes(self, traced: TracedPass, steps: int) -> float:
        # The estimate counts: compilers do not say how often a loop of unknown length runs.
        return 0.0

    def outputs(self, traced: TracedPass) -> Any:
        # A program that reads no array, such as the one that makes decoding's first state, is not bound to the device.
        alone = jax.tree.map(lambda _: SingleDeviceSharding(self.device), traced.out_info)
        return jax.tree.map(
            lambda out, sharding: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding),
            traced.out_info,
            alone if self.devices.mesh is None else self.compiled(traced).output_shardings,
        )

    def place(self, candidates: Any) -> Any:
        mesh, alone = self.devices.mesh, SingleDeviceSharding(self.device)
        sharding = alone if mesh is None else NamedSharding(mesh, PartitionSpec("population"))
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=sharding),
            candidates,
        )

    def place_leaf(self, shape: tuple[int, ...], dtype: Any, sharded_axis: int | None = None) -> jax.ShapeDtypeStruct:
        """An abstract array of the bank, placed like `Devices.put` places it."""
        sharding = self.devices.sharding(shape, sharded_axis) or SingleDeviceSharding(self.device)
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype), sharding=sharding)


def target_compiler(target: Target, model: int) -> TargetCompiler:
    """The compiler for a target whose devices share candidates in groups of `model`: for one of its hosts, or, where a
    group has the devices of several, for all of them. Raises CompilerMissing where it is not installed."""
    # The compiler takes no part of a larger slice: it numbers devices by their places in the whole.
    devices = compile_devices(target if model > target.devices_per_host else one_host(target))
    return TargetCompiler(target, Devices(mesh_of(devices, model)), devices[0])


def collectives(compiled: jax.stages.Compiled) -> dict[str, tuple[int, int]]:
    """By kind: the number of collectives that a compiled program runs, and the bytes of their results together. A
    collective in a loop counts once for each trip, or once where the number of trips is unknown."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in (compiled.as_text() or "").splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            entry = name if head[1] else entry
        lines.setdefault(name, []).append(line)
    counts: Counter[tuple[str, int]] = Counter()

    def count(computation: str, times: int) -> None:
        for line in lines.get(computation, ()):
            if collective := _COLLECTIVE.search(line):
                counts[collective[2], _result_bytes(collective[1])] += times
            for called in _CALLED.findall(line):
                count(called, times * _trips(line, lines))

    count(entry, 1)
    kinds = dict.fromkeys(kind for kind, _ in counts)
    return {
        kind: (
            sum(times for (key, _), times in counts.items() if key == kind),
            sum(times * nbytes for (key, nbytes), times in counts.items() if key == kind),
        )
        for kind in kinds
    }


def _trips(line: str, lines: Mapping[str, Sequence[str]]) -> int:
    """The number of times that an instruction runs the computations that it calls: for a loop the number that the
    compiler knows, or to which its condition counts, 1 where there is none. lines: of each computation."""
    if " while(" not in line:
        return 1
    if trip_count := _KNOWN_TRIPS.search(line):
        return int(trip_count[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    text = "" if condition is None else "\n".join(lines.get(condition[1], ()))
    bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", text)
    counts = re.search(r"ROOT .* compare\(.*direction=LT", text) is not None
    return int(bounds[0]) if counts and len(bounds) == 1 else 1


def _result_bytes(text: str) -> int:
    """Bytes of the largest array of a result's type, as HLO writes it: the type of an asynchronous collective names its
    operand as well."""
    sizes = [0]
    for dtype, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", text):
        size = _BYTES.get(dtype, 0)
        for length in filter(None, shape.split(",")):
            size *= int(length)
        sizes.append(size)
    return max(sizes)
