"""Launchers: the numbers and devices of a process under SLURM and Open MPI, and two processes as SLURM starts them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.families import build_family
from helpers.models import tiny_config
from helpers.sampling import thorough
from test_devices import CHOICE, write_config

from evojax_merge.errors import InputError
from evojax_merge.evaluation.launching import Launched, launched, local_device_ids

SLURM = {"SLURM_STEP_NODELIST": "gpu[01-02]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}, Launched(4, 3, 2, 1)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "1"}, Launched(4, 3, 1, 1)),
        (SLURM, Launched(4, 3, 1, 1)),
        # In an allocation, and in no step that srun started.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),
        (OMPI, Launched(2, 1, 1, 0)),
        (OMPI | {"OMPI_COMM_WORLD_RANK": "one"}, None),
    ],
)
def test_the_numbers_of_a_launcher(environment: dict[str, str], expected: Launched | None) -> None:
    assert launched(environment) == expected


def on_node(processes: int, process: int, **more: str) -> dict[str, str]:
    """A process of one node's."""
    numbers = {"SLURM_NTASKS": str(processes), "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
    return SLURM | numbers | {"SLURM_STEP_TASKS_PER_NODE": str(processes), "SLURM_NODEID": "0"} | more


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        # One process has all GPUs, where JAX would give it the first.
        (on_node(1, 0), []),
        (on_node(1, 0, CUDA_VISIBLE_DEVICES="0,1,2,3"), []),
        (on_node(4, 3), [6, 7]),
        (on_node(8, 3), [3]),
        (on_node(2, 1, CUDA_VISIBLE_DEVICES="4,5,6,7"), [2, 3]),
        # SLURM has bound two of eight to each process.
        (on_node(4, 3, CUDA_VISIBLE_DEVICES="0,1", SLURM_GPUS_ON_NODE="8"), []),
        (on_node(2, 1, CUDA_VISIBLE_DEVICES=""), []),
    ],
)
def test_processes_of_a_node_divide_its_gpus(environment: dict[str, str], expected: list[int], tmp_path: Path) -> None:
    for name in (*(f"nvidia{i}" for i in range(8)), "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert local_device_ids(environment, tmp_path) == expected


def test_gpus_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 processes on a node cannot share its 8 GPUs equally; expected one a node"):
        local_device_ids(on_node(3, 0, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7"), tmp_path)


# The line that a search prints at its start, and the sum of both processes' numbers. JAX's own library prints to the
# same output.
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from evojax_merge.evaluation.devices import init_distributed, local_devices

init_distributed()
devices = local_devices(2)
sums = devices.gather(np.array([devices.process + 1]), 2).sum()
Path(sys.argv[1]).write_text(f"{devices.describe()} {sums}")
"""


def test_two_processes_that_slurm_started_use_all_their_devices(tmp_path: Path) -> None:
    """Nothing of JAX's own is set but the port; each process has both devices of its node."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])

    def start(process: int) -> subprocess.Popen[str]:
        environment = SLURM | {
            "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
            "SLURM_PROCID": str(process), "SLURM_NODEID": str(process), "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "JAX_COORDINATOR_PORT": port, "JAX_NUM_CPU_DEVICES": "2",
        }  # fmt: skip
        return subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path / str(process)], env=os.environ | environment)

    processes = [start(0), start(1)]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    for process in range(2):
        written = (tmp_path / str(process)).read_text()
        assert written == "devices: 4 x cpu in 2 processes, 2 each (1 x population, 2 x model in each) 3"


# Two tasks on two nodes, both this machine. A signal to the step reaches its tasks; its status is the highest of
# theirs.
SRUN = """#!{python}
import os, signal, subprocess, sys
from pathlib import Path

step = {{"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}}
step |= {{"SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}}
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | step | {{"SLURM_PROCID": str(number), "SLURM_NODEID": str(number)}})
    for number in range(2)
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
(Path(__file__).parent / "step").write_text(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
STAND_INS = {
    "srun": SRUN.format(python=sys.executable),
    "scontrol": '#!/bin/sh\necho "$@" >> "$(dirname "$0")/requeued"\n',
    "evojax-merge": f'#!/bin/sh\nexec {sys.executable} -m evojax_merge "$@"\n',
}


@thorough
def test_a_job_of_slurm_that_is_queued_again_ends_as_one_that_never_stopped(tmp_path: Path) -> None:
    """The script of the guide, with stand-ins for SLURM's programs."""
    family = build_family(tmp_path / "family", tiny_config())
    config = write_config(family.root, tasks=[CHOICE], search={"population": 4, "generations": 30})
    config.rename(family.root / "search.yaml")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in STAND_INS.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    guide = Path(__file__).parents[1] / "docs/guides/launching.md"
    (script,) = re.findall(r"## SLURM\n\n```sh\n(.*?)```", guide.read_text(), re.DOTALL)

    def submit(run: Path) -> subprocess.Popen[str]:
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = str(place.getsockname()[1])
        environment = os.environ | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "JAX_COORDINATOR_PORT": port,
            "JAX_NUM_CPU_DEVICES": "1",
        }  # fmt: skip
        (bin_folder / "step").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", "-c", script.replace("/shared/run", str(run))], cwd=family.root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    job = submit(stopped)
    while job.poll() is None and not (stopped / "history.jsonl").exists():
        time.sleep(0.05)
    os.kill(int((bin_folder / "step").read_text()), signal.SIGUSR1)
    text = job.communicate(timeout=600)[0]
    assert job.returncode == 130, text
    assert (bin_folder / "requeued").read_text() == "requeue 7\n"
    assert 0 < len((stopped / "history.jsonl").read_text().splitlines()) < 30
    for run in (stopped, whole):
        job = submit(run)
        text = job.communicate(timeout=600)[0]
        assert job.returncode == 0, text
    assert (bin_folder / "requeued").read_text() == "requeue 7\n"
    for file in ("history.jsonl", "best/model/model.safetensors"):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes()
