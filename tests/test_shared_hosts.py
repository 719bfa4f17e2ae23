"""One candidate over several processes: the mesh's axis `model` spans them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import build_family, sample, thorough, tiny_config
from test_devices import CHOICE, finish, history, start, write_config

from evojax_merge.errors import InputError
from evojax_merge.evaluation.targets import find_target

# Scores, texts and gradients of some merges by four devices that share each candidate.
PROGRAM = """
import sys
import jax
processes = int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 4 // processes)
import numpy as np
from pathlib import Path
from evojax_merge.evaluation.devices import init_distributed, local_devices
from evojax_merge.problem import build_problem, read_config
from evojax_merge.selection import open_evaluator

if processes > 1:
    init_distributed()
path, out, model = Path(sys.argv[1]), sys.argv[2], int(sys.argv[4])
problem = build_problem(path, read_config(path, [f"evaluation.model={model}"], None))
genomes = np.random.default_rng(0).random((3, problem.space.dims)).astype(np.float32)
devices = local_devices(model)
print(devices.describe())
scorer = open_evaluator(problem, problem.prepare().shards[0], devices)
scores = scorer.score(genomes)
answers = {"margin": scores.matrices["choice"]["margin"], **{k: np.array(v) for k, v in scores.outputs.items()}}
if devices.is_main_process:
    np.savez(out, **answers)
"""


def run_program(config: Path, out: Path, processes: int, model: int) -> tuple[dict[str, Any], str]:
    """The answers of so many processes together, and the line that they begin with."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]

    def started(process: int) -> subprocess.Popen[str]:
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(process),
        }  # fmt: skip
        command = [sys.executable, "-c", PROGRAM, str(config), str(out), str(processes), str(model)]
        return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)

    running = [started(process) for process in range(processes)]
    texts = [process.communicate(timeout=800)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    return dict(np.load(out)), next(line for line in texts[0].splitlines() if line.startswith("devices:"))


def test_two_processes_that_share_each_candidate_score_as_one(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4}
    family = build_family(tmp_path, tiny_config(**sizes))
    config = write_config(family.root)
    document = yaml.safe_load(config.read_text())
    # Choices; and, in the thorough form, texts.
    config.write_text(yaml.safe_dump(document | {"tasks": document["tasks"][: len(sample((1, 2), 1))]}))
    alone, _ = run_program(config, tmp_path / "one.npz", 1, 4)
    shared, line = run_program(config, tmp_path / "two.npz", 2, 4)
    assert line == "devices: 4 x cpu in 2 processes, 2 each (1 x population, 4 x model over all)"
    np.testing.assert_allclose(shared["margin"], alone["margin"], atol=1e-5)
    assert shared.keys() == alone.keys()
    assert all((shared[name] == alone[name]).all() for name in shared if name != "margin")


def test_groups_of_whole_hosts_share_a_candidate() -> None:
    target = find_target("--target", "2x8xh100")
    for model in (1, 2, 4, 8, 16):
        target.check_shards("evaluation.model", model)
    for model in (3, 12, 32):
        with pytest.raises(InputError, match=f"{model} does not divide the 8 devices of a process, nor the 16 of all"):
            target.check_shards("evaluation.model", model)


@thorough
def test_a_search_by_processes_that_share_candidates_is_resumed_to_the_byte(tmp_path: Path) -> None:
    """One of two processes is killed; the other ends, and both go on from where they were."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4}
    family = build_family(tmp_path, tiny_config(**sizes))
    config = write_config(family.root, tasks=[CHOICE], search={"population": 6, "generations": 20})
    settings = ("--set", "evaluation.model=4")
    devices = (("JAX_NUM_CPU_DEVICES", "2"),)
    assert [code for code, _, _ in finish(start(config, tmp_path / "whole", 2, *settings, more=devices))] == [0, 0]
    killed = tmp_path / "killed"
    processes = start(config, killed, 2, *settings, more=devices)
    while processes[0].poll() is None and not ((killed / "history.jsonl").exists() and len(history(killed)) > 3):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait() != 0
    ended = finish(start(config, killed, 2, *settings, "--resume", more=devices))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert (killed / "history.jsonl").read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()
