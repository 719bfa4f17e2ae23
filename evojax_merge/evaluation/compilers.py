"""Compilers of targets that are not here: libtpu compiles for TPUs on machines that have none. What it reports of
memory and collectives is what the chip would do."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from evojax_merge.evaluation.devices import Devices, mesh_of
from evojax_merge.evaluation.targets import Target

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


class CompilerMissing(Exception):
    """The compiler of a target is not here, or cannot be used: the text says why, and what installs it."""


def compile_devices(target: Target) -> list[Any]:
    """The devices of one host of a target, which programs can be compiled for and cannot be run on. Raises
    CompilerMissing."""
    from jax.experimental import topologies

    if target.platform == "cpu":
        return [jax.local_devices(backend="cpu")[0]]
    if target.platform == "gpu":
        raise CompilerMissing(f"{target.name}: no compiler for GPUs is asked; what passes need is estimated")
    if find_spec("libtpu") is None:
        raise CompilerMissing(
            f"the compiler of {target.name} is not installed (pip install 'evojax-merge[plan-tpu]'): what passes need "
            "is estimated"
        )
    # Else libtpu asks a cloud's metadata server for the machine's TPUs; and several processes may compile at a time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name = f"{target.name.partition('-')[0]}:{target.topology}"
    # A slice of one host is that host's whole grid of chips; larger ones have the usual four chips to a host.
    grid = [*map(int, target.topology.split("x")), 1] if target.topology and target.hosts == 1 else [2, 2, 1]
    try:
        found = topologies.get_topology_desc(
            platform=target.platform, topology_name=name, chips_per_host_bounds=grid[:3]
        ).devices
    except (RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CompilerMissing(
            f"the compiler of {target.name} cannot be asked ({reason}): what passes need is estimated"
        ) from None
    return list(found)[: target.devices_per_host]


@dataclass
class TargetCompiler:
    """The compiler of a target, as a reader of passes. devices: the target's, on a mesh where there are several."""

    target: Target
    devices: Devices
    device: Any
    # By the identity of a traced pass: it, and what it was compiled to.
    _compiled: dict[int, tuple[jax.stages.Traced, jax.stages.Compiled]] = field(default_factory=dict)

    def compiled(self, traced: jax.stages.Traced) -> jax.stages.Compiled:
        """A pass, compiled once. Raises JaxRuntimeError where it takes more memory than a device has."""
        if id(traced) not in self._compiled:
            lowered = traced.lower(lowering_platforms=(self.target.platform,))
            self._compiled[id(traced)] = traced, lowered.compile()
        return self._compiled[id(traced)][1]

    def programs(self) -> list[jax.stages.Compiled]:
        """What was compiled, in its order."""
        return [compiled for _, compiled in self._compiled.values()]

    def temporary_bytes(self, traced: jax.stages.Traced) -> int:
        memory = self.compiled(traced).memory_analysis()
        assert memory is not None
        return int(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)

    def outputs(self, traced: jax.stages.Traced) -> Any:
        shardings = self.compiled(traced).output_shardings
        return jax.tree.map(
            lambda out, sharding: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding),
            traced.out_info,
            shardings,
        )

    def place(self, candidates: Any) -> Any:
        sharding = self._sharding(PartitionSpec("population"))
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=sharding),
            candidates,
        )

    def place_leaf(self, shape: tuple[int, ...], dtype: Any, sharded_axis: int | None = None) -> jax.ShapeDtypeStruct:
        """An abstract array of the bank, as `Devices.put` would lay it."""
        sharding = self.devices.sharding(shape, sharded_axis) or SingleDeviceSharding(self.device)
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype), sharding=sharding)

    def _sharding(self, spec: PartitionSpec) -> Sharding:
        mesh = self.devices.mesh
        return SingleDeviceSharding(self.device) if mesh is None else NamedSharding(mesh, spec)


def target_compiler(target: Target, model: int) -> TargetCompiler:
    """The compiler for one host of a target, whose devices share candidates in groups of `model`. Raises
    CompilerMissing where it is not installed."""
    devices = compile_devices(target)
    return TargetCompiler(target, Devices(mesh_of(devices, model)), devices[0])


def collectives(compiled: jax.stages.Compiled) -> dict[str, tuple[int, int]]:
    """By kind: how many collectives a compiled program has, and the bytes of their results. One in a loop's body counts
    once."""
    counts: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for line in (compiled.as_text() or "").splitlines():
        found = re.search(r"= (.*?) (" + "|".join(COLLECTIVES) + r")(-start)?\(", line)
        if found:
            counts[found[2]] += 1
            nbytes[found[2]] += _result_bytes(found[1])
    return {kind: (counts[kind], nbytes[kind]) for kind in counts}


def _result_bytes(text: str) -> int:
    """Bytes of the largest array of a result's type, as HLO writes it: of an asynchronous one the operand is beside
    it."""
    sizes = [0]
    for dtype, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", text):
        size = _BYTES.get(dtype, 0)
        for length in filter(None, shape.split(",")):
            size *= int(length)
        sizes.append(size)
    return max(sizes)
