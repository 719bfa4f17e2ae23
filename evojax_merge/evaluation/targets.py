"""The devices of a search: those of this machine, or named ones, so that a search can be planned for them.

A `Target` makes every choice that depends on the kind of device (how many tokens go through a pass, how many candidates
share one, whether the next layer is prefetched). No choice asks JAX for this machine's devices while a program is
traced: a program may be compiled for others. Only the attention of long rows (`models.fused_attention`), like JAX's
own, asks whether cuDNN is installed.
"""

import math
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import jax

from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.evaluation.memory import available_memory
from evojax_merge.evaluation.peers import processes_on_host

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
    (float32: see `float32_products`; on a TPU one pass of bfloat16); `link`, bytes a second from the host's memory;
    `interconnect`, bytes a second in one direction to the other devices of its host; `network`, its share of the bytes
    a second to other hosts; `disk`, bytes a second that a host reads from its files. NaN where they are not known.

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
    link: float = math.nan
    interconnect: float = math.nan
    network: float = math.nan
    disk: float = math.nan

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

    def exchange_rate(self, model: int) -> float:
        """Bytes a second that each of `model` devices which share a candidate sends to the next. Groups of several
        hosts exchange over all of their links at once."""
        if model <= self.devices_per_host:
            return self.interconnect
        return min(self.interconnect, self.network * self.devices_per_host)

    def takes_shards(self, model: int) -> bool:
        """Return whether groups of `model` devices are equal parts of a host, or several whole hosts."""
        each = self.devices_per_host
        return each % model == 0 or (model % each == 0 and self.devices % model == 0)

    def check_shards(self, where: str, model: int) -> None:
        """Raises InputError where devices cannot be divided into groups of `model` that share a candidate: parts of a
        host, or several whole hosts."""
        if not self.takes_shards(model):
            each = self.devices_per_host
            raise InputError(
                where, f"{model} does not divide the {each} devices of a process"
                + ("" if self.hosts == 1 else f", nor the {self.devices} of all, in whole processes"),
            )  # fmt: skip


GB, GIB, TERA = 10**9, 2**30, 1e12


# Bytes a second of PCI Express with 16 lanes, in one direction, by its generation (PCI-SIG's specifications).
PCIE_4, PCIE_5 = 31.5e9, 63.0e9
# Bytes a second that no data sheet of a card says, nominal: its share of its network (25 Gbit Ethernet), and those of
# the files of its host (an NVMe drive of PCI Express 4).
ETHERNET, NVME = 3.1e9, 7.0e9


def _gpu(
    name: str, kind: str, memory: float, bandwidth: float, bfloat16: float, float32: float, link: float = PCIE_4,
    nvlink: float | None = None, network: float = ETHERNET,
) -> Target:  # fmt: skip
    """One GPU; memory in GB, bandwidth in TB/s, peaks in TFLOP/s, links in bytes a second: to the host, NVLink in one
    direction (None: GPUs exchange over the link to the host), and to other hosts."""
    return Target(
        name, "gpu", kind, int(memory * GB), bandwidth * TERA, bfloat16 * TERA, float32 * TERA, link=link,
        interconnect=nvlink or link, network=network, disk=NVME,
    )  # fmt: skip


def _tpu(name: str, kind: str, memory: float, bandwidth: float, bfloat16: float, links: float) -> Target:
    """One chip; memory in GiB, bandwidth in TB/s, the peak in TFLOP/s, its links to other chips, of whatever host, in
    bytes a second."""
    return Target(
        name, "tpu", kind, int(memory * GIB), bandwidth * TERA, bfloat16 * TERA, bfloat16 * TERA, link=PCIE_4,
        interconnect=links, network=links, disk=NVME,
    )  # fmt: skip


# By their `--target` name. Bandwidths and peaks are those of the vendor's document beside each: dense products, without
# sparsity, bfloat16 with float32 sums, and TF32. So are links: half of NVLink's figure, which is of both directions, a
# chip's links of a TPU together; networks are an adapter for each GPU of NVIDIA's DGX systems. Memory is that which is
# left beside the driver, and on TPUs that which their compiler gives programs.
_GPUS = {
    chip.name: chip
    for chip in (
        # NVIDIA Ampere GA102 GPU Architecture, whitepaper, table of the GeForce RTX 3090.
        _gpu("rtx3090", "NVIDIA GeForce RTX 3090", 25.3, 0.936, 71, 35.6),
        # NVIDIA Ada GPU Architecture, whitepaper, appendix on the GeForce RTX 4090.
        _gpu("rtx4090", "NVIDIA GeForce RTX 4090", 25.2, 1.008, 165.2, 82.6),
        # NVIDIA RTX Blackwell GPU Architecture, whitepaper, appendix on the GeForce RTX 5090.
        _gpu("rtx5090", "NVIDIA GeForce RTX 5090", 33.6, 1.792, 209.5, 104.8, PCIE_5),
        # NVIDIA L4 Tensor Core GPU, data sheet, halves of the figures with sparsity.
        _gpu("l4", "NVIDIA L4", 23, 0.3, 121, 60),
        # NVIDIA L40S, data sheet.
        _gpu("l40s", "NVIDIA L40S", 47.6, 0.864, 362, 183),
        # NVIDIA A100 Tensor Core GPU, data sheet, columns of the SXM modules with 40 and 80 GB.
        _gpu("a100-40", "NVIDIA A100-SXM4-40GB", 42.3, 1.555, 312, 156, PCIE_4, 300e9, 25e9),
        _gpu("a100-80", "NVIDIA A100-SXM4-80GB", 85, 2.039, 312, 156, PCIE_4, 300e9, 25e9),
        # NVIDIA H100 Tensor Core GPU, data sheet, column of the SXM module, halves of the figures with sparsity.
        _gpu("h100", "NVIDIA H100 80GB HBM3", 85, 3.352, 989, 494, PCIE_5, 450e9, 50e9),
        # NVIDIA H200 Tensor Core GPU, data sheet, column of the SXM module, halves of the figures with sparsity.
        _gpu("h200", "NVIDIA H200", 150, 4.8, 989, 494, PCIE_5, 450e9, 50e9),
        # NVIDIA DGX B200, data sheet, an eighth of the system; halves of the figures with sparsity.
        _gpu("b200", "NVIDIA B200", 191, 8, 2250, 1125, PCIE_5, 900e9, 50e9),
    )
}
# Cloud TPU's documents: the pages of TPU v5e, v5p and v6e, tables of the chips.
_TPUS = {
    chip.name: chip
    for chip in (
        _tpu("v5e", "TPU v5 lite", 15.75, 0.819, 197, 200e9),
        _tpu("v5p", "TPU v5", 95.74, 2.765, 459, 600e9),
        _tpu("v6e", "TPU v6 lite", 31.25, 1.64, 918, 448e9),
    )
}
# The size in a slice's name -> its topology, and its number of hosts. v5p counts two cores to a chip.
_FLAT = {
    1: ("1x1", 1), 4: ("2x2", 1), 8: ("2x4", 1), 16: ("4x4", 4), 32: ("4x8", 8), 64: ("8x8", 16), 128: ("8x16", 32),
    256: ("16x16", 64),
}  # fmt: skip
_SLICES = {
    "v5e": _FLAT,
    "v5p": {
        8: ("2x2x1", 1), 16: ("2x2x2", 2), 32: ("2x2x4", 4), 64: ("2x4x4", 8), 128: ("4x4x4", 16), 256: ("4x4x8", 32),
    },
    "v6e": _FLAT,
}  # fmt: skip
# Of GPUs: the numbers of a host's that names are offered with, and the most of them, and of hosts, that a name can say.
_GPU_COUNTS = (1, 2, 4, 8)
MOST_GPUS, MOST_HOSTS = 16, 1024
_GPU_NAME = re.compile(r"(?:(?:(\d{1,4})x)?(\d{1,4})x)?([a-z].*)", re.ASCII)


def target_names() -> list[str]:
    """Names that `find_target` takes. It takes other numbers of GPUs and of hosts as well."""
    gpus = [chip if count == 1 else f"{count}x{chip}" for chip in _GPUS for count in _GPU_COUNTS]
    hosts = [f"2x{_GPU_COUNTS[-1]}x{chip}" for chip in _GPUS]
    return ["cpu", *gpus, *hosts, *(f"{chip}-{size}" for chip, sizes in _SLICES.items() for size in sizes)]


def find_target(where: str, name: str) -> Target:
    """The target of a name: `cpu` (this machine's), a GPU (`h100`), several of one host (`8xh100`) or of several
    (`2x8xh100`), or a TPU slice (`v5p-8`), in letters of any case; after a colon rates in bytes a second that replace
    those of data sheets (`8xh100:disk=2e9,link=25e9`). Raises InputError with the nearest known name."""
    asked, name = name, name.lower()
    chip_name, _, rates = name.partition(":")
    # h100:8 is another mistake.
    if "=" in rates:
        return _with_rates(where, find_target(where, chip_name), rates)
    if name == "cpu":
        return cpu_target()
    match = _GPU_NAME.fullmatch(name)
    if match is not None and match[3] in _GPUS:
        hosts, count = int(match[1] or 1), int(match[2] or 1)
        if not (0 < count <= MOST_GPUS and 0 < hosts <= MOST_HOSTS):
            raise InputError(
                where,
                f"there is no target {asked!r}; expected 1 to {MOST_GPUS} GPUs to a host, such as 8x{match[3]}, and up "
                f"to {MOST_HOSTS:,} hosts, such as 2x8x{match[3]}",
            )
        chip = _GPUS[match[3]]
        memory = int(gpu_memory_fraction() * chip.memory)
        return replace(chip, name=name, devices=hosts * count, hosts=hosts, memory=memory)
    if name not in target_names():
        # The number of GPUs stands before their name.
        turned = re.sub(r"^(\w*?[a-z]\d+)[x*:-](\d+)$", r"\2x\1", name.lower(), flags=re.ASCII)
        other_sizes = [other for other in target_names() if other.startswith(f"{turned.partition('-')[0]}-")]
        hint = f"; expected one of {', '.join(other_sizes)}" if other_sizes else did_you_mean(turned, target_names())
        raise InputError(where, f"there is no target {asked!r}{hint}")
    chip_name, _, size = name.partition("-")
    topology, hosts = _SLICES[chip_name][int(size)]
    devices = math.prod(map(int, topology.split("x")))
    return replace(_TPUS[chip_name], name=name, devices=devices, hosts=hosts, topology=topology)


# The rates of a target that its name may replace.
RATES = ("bandwidth", "link", "interconnect", "network", "disk")


def _with_rates(where: str, target: Target, text: str) -> Target:
    rates: dict[str, Any] = {}
    for pair in text.split(","):
        key, _, value = pair.partition("=")
        try:
            rates[key] = float(value)
        except ValueError:
            rates[key] = math.nan
        if key not in RATES or not 0 < rates[key] < math.inf:
            what = f"{pair}: expected KEY=BYTES, bytes a second such as 2e9; the keys are {', '.join(RATES)}"
            raise InputError(where, what)
    return replace(target, **rates)


def one_host(target: Target) -> Target:
    """One host's part of a named target of several, as a target of its own; any other target unchanged."""
    if target.hosts == 1 or not target.is_accelerator:
        return target
    if target.platform == "gpu":
        return replace(
            target, name=target.name.partition("x")[2], devices=target.devices_per_host, hosts=1
        )  # fmt: skip
    chip = target.name.partition("-")[0]
    names = (f"{chip}-{size}" for size, (_, hosts) in _SLICES[chip].items() if hosts == 1)
    return next(
        candidate
        for candidate in map(partial(find_target, "target"), names)
        if candidate.devices == target.devices_per_host
    )


def larger_targets(target: Target) -> list[Target]:
    """The named targets of a target's platform, GPUs for a CPU: of one host first, and from the one with the least
    memory together; of as much memory, fewer devices first."""
    platform = target.platform if target.is_accelerator else "gpu"
    names = (name for name in target_names() if name != "cpu")
    targets = [other for other in map(partial(find_target, "target"), names) if other.platform == platform]
    return sorted(targets, key=lambda other: (other.hosts > 1, other.devices * other.memory, other.devices))


def gpu_memory_fraction() -> float:
    """The share of a GPU's memory that JAX takes."""
    try:
        return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION))
    except ValueError:
        return GPU_MEMORY_FRACTION


@cache
def live_target() -> Target:
    """The devices that JAX has found, of all processes together. Devices that are a host's CPU divide its cores, and
    its memory's bandwidth, with those of the other processes there."""
    devices, hosts = jax.local_devices(), jax.process_count()
    kind, count = devices[0].device_kind, len(devices) * hosts
    if devices[0].platform == "cpu":
        whole, sharing = cpu_target(), len(devices) * processes_on_host()
        return replace(
            whole, devices=count, hosts=hosts, bandwidth=whole.bandwidth / sharing, bfloat16=whole.bfloat16 / sharing,
            float32=whole.float32 / sharing,
        )  # fmt: skip
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


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cpu_target() -> Target:
    """This machine's CPU as one device: the part of its memory that this process may take, and nominal rates of the
    cores that it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")))
    except OSError:
        flags = set()
    wide = next((flops for flag, flops in CPU_FLOPS_PER_CYCLE.items() if flag in flags), 8)
    peak, bandwidth = float(cores * wide * CPU_CLOCK), cores * CPU_CORE_BANDWIDTH
    # Devices and processes of one host exchange arrays through its memory.
    return Target(
        "cpu", "cpu", "cpu", available_memory(), bandwidth, peak, peak, link=bandwidth, interconnect=bandwidth / 2,
        network=bandwidth / 2, disk=NVME,
    )  # fmt: skip
