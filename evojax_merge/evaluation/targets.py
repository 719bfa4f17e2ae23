"""The devices of a search: those of this machine, or named ones, so that a search can be planned for them.

A `Target` makes every choice that depends on the kind of device (how many tokens go through a pass, how many candidates
share one, whether the next layer is prefetched). No choice asks JAX for this machine's devices while a program is
traced: a program may be compiled for others.
"""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import jax

from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.evaluation.memory import available_memory

# The share of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_MEMORY_FRACTION = 0.75
# Bytes that merging moves for each parameter: the base, three parents and the merge in bfloat16, which a product then
# reads.
MERGE_BYTES = 12
# A CPU core, nominally: cycles a second, and bytes a second from memory.
CPU_CLOCK, CPU_CORE_BANDWIDTH = 3e9, 10e9
# Float32 operations of a core in a cycle, by the widest vector instructions: two fused multiply-adds.
CPU_FLOPS_PER_CYCLE = {"avx512f": 64, "avx2": 32, "asimd": 16}

Platform = Literal["cpu", "gpu", "tpu"]


@dataclass(frozen=True)
class Target:
    """Devices of one kind. `kind`: JAX's name for it (`Device.device_kind`).

    For each device: `memory`, the bytes that programs may use; `bandwidth`, bytes a second to and from it; `bfloat16`
    and `float32`, the peak FLOP/s of matrix products of operands of these dtypes, as JAX computes them by default
    (float32: see `float32_products`; on a TPU one pass of bfloat16). NaN where they are not known.

    `devices`: the number of devices, in `hosts` machines together; `topology`: of a TPU slice, in its compiler's
    notation; `native_bfloat16`: whether an accelerator multiplies it faster than float32.
    """

    name: str
    platform: Platform
    kind: str
    memory: int
    bandwidth: float
    bfloat16: float
    float32: float
    devices: int = 1
    hosts: int = 1
    topology: str = ""
    native_bfloat16: bool = True

    @property
    def is_accelerator(self) -> bool:
        return self.platform != "cpu"

    @property
    def devices_per_host(self) -> int:
        return self.devices // self.hosts

    @property
    def tokens_per_step(self) -> float:
        """The number of tokens whose products with 16-bit weights take as long as reading the weights: fewer tokens in
        a decode step are nearly free. NaN where it is not known."""
        # Two FLOPs for each parameter and token, two bytes for each parameter.
        return self.bfloat16 / self.bandwidth

    @property
    def decodes_together(self) -> bool:
        """Return whether several candidates decode in one program without copies of their weights. TPUs' compiler makes
        one array of all of them, in another layout, and a step takes longer than one for each candidate."""
        return self.platform != "tpu"

    @property
    def merge_tokens(self) -> int:
        """The cost of merging, which each scored batch does anew, in tokens of a forward pass: its traffic of about 12
        bytes for each parameter against 2 FLOPs for each parameter and token, in bfloat16. 0 on a CPU, whose arithmetic
        is slower than its traffic."""
        is_known = self.is_accelerator and not math.isnan(self.bandwidth)
        return int(MERGE_BYTES * self.bfloat16 / (2 * self.bandwidth)) if is_known else 0

    @property
    def float32_products(self) -> str:
        """The name of the format that products of float32 are computed in: NVIDIA's GPUs that multiply bfloat16
        natively, from Ampere on, compute them in TF32."""
        has_tf32 = self.platform == "gpu" and self.kind.startswith("NVIDIA") and self.native_bfloat16
        return "TF32" if has_tf32 else "float32"

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products of operands of this dtype."""
        return self.float32 if dtype == "float32" else self.bfloat16

    def compute_dtype(self, setting: str, weights: Iterable[str]) -> str:
        """The dtype that a config's `compute_dtype` means on these devices for weights of these dtypes: `auto` is
        bfloat16 where all of them are bfloat16 and the devices multiply it natively, else float32."""
        if setting != "auto":
            return setting
        native = self.is_accelerator and self.native_bfloat16
        return "bfloat16" if native and set(weights) == {"bfloat16"} else "float32"

    def check_shards(self, where: str, model: int) -> None:
        """Raises InputError where a host's devices cannot be divided into groups of `model` that share a candidate."""
        if self.devices_per_host % model:
            raise InputError(where, f"{model} does not divide the {self.devices_per_host} devices of a process")


GB, GIB, TERA = 10**9, 2**30, 1e12
# By their `--target` name. Memory, bandwidth and peaks without sparsity are those of the vendors' data sheets; memory
# is that which is left beside the driver, and on TPUs that which their compiler gives programs.
_GPUS = {
    "a100": Target("a100", "gpu", "NVIDIA A100-SXM4-80GB", 85 * GB, 2.039 * TERA, 312 * TERA, 156 * TERA),
    "h100": Target("h100", "gpu", "NVIDIA H100 80GB HBM3", 85 * GB, 3.352 * TERA, 989 * TERA, 494 * TERA),
    "h200": Target("h200", "gpu", "NVIDIA H200", 150 * GB, 4.8 * TERA, 989 * TERA, 494 * TERA),
    "l4": Target("l4", "gpu", "NVIDIA L4", 23 * GB, 0.3 * TERA, 121 * TERA, 60 * TERA),
}
_TPUS = {
    "v5e": Target("v5e", "tpu", "TPU v5 lite", int(15.75 * GIB), 0.819 * TERA, 197 * TERA, 197 * TERA),
    "v5p": Target("v5p", "tpu", "TPU v5", int(95.74 * GIB), 2.765 * TERA, 459 * TERA, 459 * TERA),
    "v6e": Target("v6e", "tpu", "TPU v6 lite", int(31.25 * GIB), 1.64 * TERA, 918 * TERA, 918 * TERA),
}
# The size in a slice's name -> its topology, and its number of hosts. v5p counts two cores to a chip.
_SLICES = {
    "v5e": {1: ("1x1", 1), 4: ("2x2", 1), 8: ("2x4", 1), 16: ("4x4", 4), 32: ("4x8", 8), 64: ("8x8", 16)},
    "v5p": {8: ("2x2x1", 1), 16: ("2x2x2", 2), 32: ("2x2x4", 4), 64: ("2x4x4", 8)},
    "v6e": {1: ("1x1", 1), 4: ("2x2", 1), 8: ("2x4", 1), 16: ("4x4", 4), 32: ("4x8", 8), 64: ("8x8", 16)},
}
_GPU_COUNTS = (1, 2, 4, 8)


def target_names() -> list[str]:
    """The names that `find_target` takes."""
    gpus = [chip if count == 1 else f"{count}x{chip}" for chip in _GPUS for count in _GPU_COUNTS]
    return ["cpu", *gpus, *(f"{chip}-{size}" for chip, sizes in _SLICES.items() for size in sizes)]


def _chip(name: str) -> str:
    """The chip of a target's name: the part behind a number of GPUs, or before a slice's size."""
    return re.sub(r"^\d+x|-\d+$", "", name)


def find_target(where: str, name: str) -> Target:
    """The target of a name: `cpu` (this machine's), a GPU (`h100`, `8xh100`), or a TPU slice (`v5p-8`). Raises
    InputError with the nearest known name."""
    if name == "cpu":
        return cpu_target()
    if name not in target_names():
        # The number of GPUs stands before their name.
        turned = re.sub(r"^(\w*?[a-z]\d+)[x*:-](\d+)$", r"\2x\1", name.lower())
        of_the_chip = [
            target_name
            for target_name in target_names()
            if target_name != "cpu" and _chip(target_name) == _chip(turned)
        ]
        other_size = bool(of_the_chip) and turned not in of_the_chip
        hint = f"; expected one of {', '.join(of_the_chip)}" if other_size else did_you_mean(turned, target_names())
        raise InputError(where, f"there is no target {name!r}{hint}")
    if match := re.fullmatch(r"(?:(\d+)x)?([a-z]+\d+)", name):
        count, chip = int(match[1] or 1), _GPUS[match[2]]
        return replace(chip, name=name, devices=count, memory=int(gpu_memory_fraction() * chip.memory))
    chip_name, _, size = name.partition("-")
    topology, hosts = _SLICES[chip_name][int(size)]
    devices = math.prod(map(int, topology.split("x")))
    return replace(_TPUS[chip_name], name=name, devices=devices, hosts=hosts, topology=topology)


def one_host(target: Target) -> Target:
    """One host's part of a named TPU slice, as a slice of its own; any other target unchanged."""
    if target.platform != "tpu" or target.hosts == 1:
        return target
    chip = target.name.partition("-")[0]
    names = (f"{chip}-{size}" for size, (_, hosts) in _SLICES[chip].items() if hosts == 1)
    return next(
        candidate
        for candidate in map(partial(find_target, "target"), names)
        if candidate.devices == target.devices_per_host
    )


def gpu_memory_fraction() -> float:
    """The share of a GPU's memory that JAX takes."""
    try:
        return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION))
    except ValueError:
        return GPU_MEMORY_FRACTION


@cache
def live_target() -> Target:
    """The devices that JAX has found, of all processes together."""
    devices, hosts = jax.local_devices(), jax.process_count()
    kind, count = devices[0].device_kind, len(devices) * hosts
    if devices[0].platform == "cpu":
        return replace(cpu_target(), devices=count, hosts=hosts)
    chip_target = next((chip for chip in (*_GPUS.values(), *_TPUS.values()) if chip.kind == kind), None)
    if chip_target is None:
        platform: Literal["gpu", "tpu"] = "tpu" if devices[0].platform == "tpu" else "gpu"
        chip_target = Target(kind, platform, kind, 0, math.nan, math.nan, math.nan)
    stats = devices[0].memory_stats() or {}
    # NVIDIA's GPUs of an older architecture than Ampere emulate bfloat16; other vendors' devices give no such version.
    version = re.fullmatch(r"(\d+)\.\d+", str(getattr(devices[0], "compute_capability", "")))
    return replace(
        chip_target, name=kind, memory=int(stats.get("bytes_limit", chip_target.memory)), devices=count, hosts=hosts,
        native_bfloat16=version is None or int(version[1]) >= 8,
    )  # fmt: skip


def cpu_target() -> Target:
    """This machine's CPU as one device: the part of its memory that this process may take, and nominal rates of the
    cores that it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")))
    except OSError:
        flags = set()
    wide = next((flops for flag, flops in CPU_FLOPS_PER_CYCLE.items() if flag in flags), 8)
    peak = float(cores * wide * CPU_CLOCK)
    return Target("cpu", "cpu", "cpu", available_memory(), cores * CPU_CORE_BANDWIDTH, peak, peak)
