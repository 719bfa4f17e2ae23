"""One candidate over several processes: the mesh's axis `model` spans them."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import build_family, tiny_config
from test_devices import write_config

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
answers = {"margin": scores.matrices["choice"]["margin"], "words": np.array(scores.outputs["words"])}
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
    alone, _ = run_program(config, tmp_path / "one.npz", 1, 4)
    shared, line = run_program(config, tmp_path / "two.npz", 2, 4)
    assert line == "devices: 4 x cpu in 2 processes, 2 each (1 x population, 4 x model over all)"
    np.testing.assert_allclose(shared["margin"], alone["margin"], atol=1e-5)
    assert (shared["words"] == alone["words"]).all()


def test_groups_of_whole_hosts_share_a_candidate() -> None:
    target = find_target("--target", "2x8xh100")
    for model in (1, 2, 4, 8, 16):
        target.check_shards("evaluation.model", model)
    for model in (3, 12, 32):
        with pytest.raises(InputError, match=f"{model} does not divide the 8 devices of a process, nor the 16 of all"):
            target.check_shards("evaluation.model", model)
