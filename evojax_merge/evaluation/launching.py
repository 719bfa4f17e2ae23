"""Launchers of several processes (SLURM, Open MPI): the number of a process, and its share of its node's devices.

JAX gives each process that such a launcher started one device of its node. One process for all devices of a node, the
launch that fits this program best, would use one GPU of eight: here processes of a node divide its devices.
"""

import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evojax_merge.errors import InputError

# Seconds within which all processes of a run have started.
ARRIVAL = 300.0


@dataclass(frozen=True)
class Launched:
    """Process `process` of `processes`, and `local_process` of the `local_processes` on its node."""

    processes: int
    process: int
    local_processes: int
    local_process: int


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """The numbers that a launcher gave this process; None: it was started by hand, or on a TPU pod."""
    number = {name: int(value) for name, value in environment.items() if re.fullmatch("[0-9]{1,9}", value)}
    in_step = bool(environment.get("SLURM_STEP_NODELIST"))
    if in_step and {"SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"} <= number.keys():
        return Launched(
            number["SLURM_NTASKS"], number["SLURM_PROCID"], _tasks_of_node(environment), number["SLURM_LOCALID"]
        )
    ompi = [f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")]
    return Launched(*(number[name] for name in ompi)) if number.keys() >= set(ompi) else None


def _tasks_of_node(environment: Mapping[str, str]) -> int:
    """The number of a SLURM step's processes on this node, from a list such as `4(x2),1`."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    groups = [re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part) for part in text.split(",")]
    counts = [int(group[1]) for group in groups if group is not None for _ in range(int(group[2] or 1))]
    node = environment.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else 1


def coordinator_address() -> str | None:
    """The address, `host:port`, at which a launcher's processes meet; None without a launcher."""
    # JAX has no public name for it.
    from jax._src.clusters import ClusterEnv

    if launched() is None:
        return None
    parameters = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(ARRIVAL))
    return parameters[0]


def check_coordinator(address: str, process: int) -> None:
    """Raises InputError where processes cannot meet at an address, `host:port`: its host is unknown, another program
    has the port, on which JAX would crash the first process, or no first process answers in time."""
    host, _, port = address.rpartition(":")
    host, until = host.strip("[]"), time.monotonic() + ARRIVAL
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        what = f"{address}: this host knows no host of that name ({error.strerror}); expected that of the first process"
        raise InputError("--distributed", what) from None
    if process == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            what = f"{address}: the first process cannot listen there ({os.strerror(error.errno or 0)})"
            advice = "choose another port, by JAX_COORDINATOR_PORT or in JAX_COORDINATOR_ADDRESS"
            raise InputError("--distributed", f"{what}; {advice}") from None
        return
    # JAX would not heed a signal while it waits.
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=10.0).close()
        except OSError as error:
            if time.monotonic() < until:
                time.sleep(0.1)
                continue
            what = f"no first process answers at {address} within {ARRIVAL:g} s ({error.strerror or error})"
            advice = "see what it says; start all processes within that time, and let no firewall stand between them"
            raise InputError("--distributed", f"{what}; {advice}") from None
        return


def local_device_ids(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[int]:
    """The numbers of this process's devices among those that it sees; empty: all of them. devices: the folder with the
    GPUs' files. Raises InputError where a node's GPUs cannot be divided between its processes."""
    numbers, visible = launched(environment), _visible(environment)
    if numbers is None or numbers.local_processes == 1:
        return []
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    if visible is not None and on_node.isdecimal() and visible < int(on_node):
        # SLURM has bound GPUs to each process, which then sees no others.
        return []
    count = len(list(devices.glob("nvidia[0-9]*"))) if visible is None else visible
    if count % numbers.local_processes:
        raise InputError(
            "--distributed",
            f"{numbers.local_processes} processes on a node cannot share its {count} GPUs equally; expected one a node "
            f"(--ntasks-per-node=1, or mpirun --map-by ppr:1:node), or a number that divides {count}",
        )
    share = count // numbers.local_processes
    return list(range(numbers.local_process * share, (numbers.local_process + 1) * share))


def _visible(environment: Mapping[str, str]) -> int | None:
    """The number of GPUs that this process sees; None where nothing restricts it."""
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if name in environment:
            return len([part for part in environment[name].split(",") if part.strip()])
    return None
