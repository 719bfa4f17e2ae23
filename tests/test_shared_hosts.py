"""One candidate over several processes: the mesh's axis `model` spans them."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.families import build_family
from helpers.files import write_yaml
from helpers.models import tiny_config
from helpers.sampling import sample, thorough
from test_devices import CHOICE, finish, history, start, write_config

from evojax_merge.checkpoints.folder import BLOCK, SAMPLED, file_sample
from evojax_merge.errors import InputError
from evojax_merge.evaluation.peers import _flat, compare
from evojax_merge.evaluation.targets import find_target

# Scores and texts of some merges by four devices that share each candidate, and the bytes of weights that each process
# has read.
PROGRAM = """
import json, sys
import jax
processes = int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 4 // processes)
import numpy as np
from pathlib import Path
from evojax_merge.checkpoints.folder import MappedFile
from evojax_merge.evaluation.devices import init_distributed, local_devices
from evojax_merge.problem import build_problem, read_config
from evojax_merge.steps.selection import open_evaluator
from evojax_merge.system import without_torch

# As commands do: torch and torchvision take longer to import than all the rest.
without_torch.is_command = True
if processes > 1:
    init_distributed()
path, out = Path(sys.argv[1]), sys.argv[2]
problem = build_problem(path, read_config(path, ["evaluation.model=4", *json.loads(sys.argv[4])], None))
genomes = np.random.default_rng(0).random((3, problem.space.dims)).astype(np.float32)
devices = local_devices(4)
print(devices.describe())
read, copy = {}, MappedFile.copy
def counted(self, start, into):
    # Masks are drawn by a tensor's bytes, which are read once more right behind the tensor, from the page cache.
    read[self.path, start, into.nbytes] = into.nbytes
    copy(self, start, into)
MappedFile.copy = counted
scorer = open_evaluator(problem, problem.prepare().shards[0], devices)
scores = scorer.score(genomes)
print("read:", sum(read.values()))
answers = {"margin": scores.matrices["choice"]["margin"], **{k: np.array(v) for k, v in scores.outputs.items()}}
if devices.is_main_process:
    np.savez(out, **answers)
"""


@dataclass(frozen=True)
class Ended:
    """The answers of processes together, the line that they begin with, and the bytes of weights that each has read."""

    answers: dict[str, Any]
    line: str
    read: list[int]


def run_program(config: Path, out: Path, processes: int, *overrides: str) -> Ended:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]

    def started(process: int) -> subprocess.Popen[str]:
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(process),
        }  # fmt: skip
        command = [sys.executable, "-c", PROGRAM, str(config), str(out), str(processes), json.dumps(overrides)]
        return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)

    running = [started(process) for process in range(processes)]
    texts = [process.communicate(timeout=800)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    line = next(line for line in texts[0].splitlines() if line.startswith("devices:"))
    read = [int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith("read:")]
    return Ended(dict(np.load(out)), line, read)


def four_heads(root: Path) -> Path:
    """The config of a search over a family whose heads four devices can divide."""
    family = build_family(root, tiny_config(num_attention_heads=4, num_key_value_heads=4))
    return write_config(family.root)


@thorough
def test_two_processes_that_share_each_candidate_score_as_one(tmp_path: Path) -> None:
    config = four_heads(tmp_path)
    document = yaml.safe_load(config.read_text())
    # Choices; and, in the thorough form, texts.
    write_yaml(config, document | {"tasks": document["tasks"][: len(sample((1, 2), 1))]})
    alone, shared = (run_program(config, tmp_path / f"{count}.npz", count) for count in (1, 2))
    assert shared.line == "devices: 4 x cpu in 2 processes, 2 each (1 x population, 4 x model over all)"
    np.testing.assert_allclose(shared.answers["margin"], alone.answers["margin"], atol=1e-5)
    assert shared.answers.keys() == alone.answers.keys()
    assert all((shared.answers[name] == alone.answers[name]).all() for name in shared.answers if name != "margin")
    # TIES measures tensors whole: a process reads every other one whole, and its half of the rest.
    assert abs(sum(shared.read) / alone.read[0] - 1.5) < 0.05 and max(shared.read) < 0.9 * alone.read[0], shared.read


# A method that measures nothing, and one that measures each tensor once, which the processes divide; and the share of
# the weights that one of two processes reads for a generation, in the mean.
READ = [("task_arithmetic", "device", 0.5), ("dare_ties", "disk", 1.0), ("task_arithmetic", "disk", 0.5)]


@pytest.mark.parametrize(("method", "place", "share"), sample(READ, 1))
def test_a_process_reads_the_shards_of_its_devices(method: str, place: str, share: float, tmp_path: Path) -> None:
    config, parameters = four_heads(tmp_path), {"weight": {"high": 1.5}}
    if method != "task_arithmetic":
        parameters |= {"density": {"low": 0.3, "high": 0.8}}
    document = yaml.safe_load(config.read_text())
    space = {"method": method, "parameters": parameters}
    write_yaml(config, document | {"space": space, "tasks": document["tasks"][:1]})
    setting = f"evaluation.bank={place}"
    alone, shared = (run_program(config, tmp_path / f"{count}.npz", count, setting) for count in (1, 2))
    np.testing.assert_allclose(shared.answers["margin"], alone.answers["margin"], atol=1e-5)
    whole = sum((tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "parent0", "parent1"))
    assert abs(np.mean(shared.read) / whole - share) < 0.05 and max(shared.read) / whole < share + 0.25


def test_groups_of_whole_hosts_share_a_candidate() -> None:
    target = find_target("--target", "2x8xh100")
    for model in (1, 2, 4, 8, 16):
        target.check_shards("evaluation.model", model)
    for model in (3, 12, 32):
        with pytest.raises(InputError, match=f"{model} does not divide the 8 devices of a process, nor the 16 of all"):
            target.check_shards("evaluation.model", model)


def test_processes_of_unlike_versions_are_refused() -> None:
    one = {"host": "a", "values": {"evojax-merge": "1.0", "jax": "0.10.2", "jaxlib": "0.10.2"}}
    compare([one, one], "expected one")
    for package, version in (("evojax-merge", "0.9"), ("jax", "0.10.1")):
        other = {"host": "b", "values": one["values"] | {package: version}}  # type: ignore[operator]
        with pytest.raises(InputError, match=rf"{package} is {version} in process 1 \(b\), but .* in process 0 \(a\)"):
            compare([one, other], "expected one")


# Options of the second of two processes, and the line with which both end.
DISAGREEMENTS = [
    (("--seed", "7"), "seed is 7 in process 1 .*, but 3 in process 0 .*; expected the same in all processes"),
    (("--set", "search.population=6"), "search.population is 6 in process 1 .*, but 4 in process 0 "),
    (("--set", "tasks[0].limit=4"), "tasks\\[0\\].limit is 4 in process 1 .*, but null in process 0 "),
    (("--force",), "--force is true in process 1 .*, but false in process 0 "),
    (("--set", "search.populatoin=6"), "(process 1 .* has ended: )?--set search.populatoin=6: unknown key .*"),
]


@pytest.mark.parametrize(("options", "says"), sample(DISAGREEMENTS, 1), ids=lambda value: " ".join(value)[:30])
def test_processes_that_were_given_other_values_end_at_once(
    options: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    build_family(tmp_path, tiny_config())
    config = write_config(tmp_path, tasks=[CHOICE], search={"population": 4, "generations": 1})
    for code, _, errors in finish(start(config, tmp_path / "run", 2, of_last=options)):
        assert code == 2 and re.fullmatch(f"error: (--distributed: )?{says}.*\n", errors), errors
    assert not (tmp_path / "run").exists()


def test_processes_with_run_folders_of_their_own_are_refused(tmp_path: Path) -> None:
    build_family(tmp_path, tiny_config())
    config = write_config(tmp_path, tasks=[CHOICE], search={"population": 4, "generations": 1})
    outs = [tmp_path / "one", tmp_path / "two"]
    for code, _, errors in finish(start(config, outs, 2)):
        assert code == 2 and errors.count("\n") == 1
        assert re.search(r"process 1 \(.*\) does not see this run folder, which process 0 \(.*\) has opened", errors)
    assert not any(map(Path.exists, outs))


def test_paths_of_a_config_count_by_their_last_names() -> None:
    one, other = ({"parents": [f"/{disk}/m"], "tasks": [{"file": f"{disk}.jsonl"}]} for disk in "ab")
    assert dict(_flat(one)) == {"parents[0]": "m", "tasks[0].file": "a.jsonl"}
    values = [{"host": "h", "values": dict(_flat(document))} for document in (one, other)]
    with pytest.raises(InputError, match=r"tasks\[0\].file is b.jsonl in process 1 \(h\), but a.jsonl in process 0"):
        compare(values, "expected one")
    del values[1]["values"]["parents[0]"]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"parents\[0\] is missing in process 1"):
        compare(values, "expected one")


# A file that differs on the second of two hosts, and the start of the line with which both end.
UNLIKE_FILES = [
    ("parent1/model.safetensors", r"parents\[1\]: model.safetensors is [\d,]+ bytes, sha256 \w{12}… in process 1 "),
    ("tasks.jsonl", ".*/b/tasks.jsonl of process 1 .* has sha256 "),
]


@pytest.mark.parametrize(("file", "says"), sample(UNLIKE_FILES, 1), ids=lambda value: value[:12])
def test_hosts_with_unlike_files_are_refused(file: str, says: str, tmp_path: Path) -> None:
    """A file that differs; folders may differ, as on hosts with disks of their own."""
    four_heads(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    content = bytearray((tmp_path / "b" / file).read_bytes())
    # Another digit: a file of data is still one.
    place = max(i for i, byte in enumerate(content) if chr(byte).isdigit())
    content[place] ^= 1
    (tmp_path / "b" / file).write_bytes(content)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]

    def started(process: int) -> subprocess.Popen[str]:
        """A process of its own: a forked one ends without JAX's meeting of all processes at the end."""
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(process),
            "JAX_NUM_CPU_DEVICES": "2",
        }  # fmt: skip
        command = [sys.executable, "-m", "evojax_merge", "search", str(tmp_path / "ab"[process] / "config.yaml")]
        command += ["--out", str(tmp_path / "run"), "--distributed", "--set", "evaluation.model=4"]
        return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)

    for process in [started(0), started(1)]:
        (line,) = process.communicate(timeout=600)[1].splitlines()
        assert process.returncode == 2
        assert re.fullmatch(f"error: --distributed: {says}.*; expected the same files on every host", line), line
    assert not (tmp_path / "run").exists()


def test_a_sample_tells_files_apart_by_their_size_and_their_ends(tmp_path: Path) -> None:
    """A sample of a small file is its hash; one of a large file reads some blocks, and the comparison of hashes that
    comes later finds what lies between them."""
    rng, file = np.random.default_rng(0), tmp_path / "file"
    for size in (0, 1, SAMPLED * BLOCK, 2 * SAMPLED * BLOCK + 1):
        content = rng.bytes(size)
        file.write_bytes(content)
        sampled = file_sample(file)
        assert sampled.startswith(f"{size:,} bytes, sha256 ")
        assert (hashlib.sha256(content).hexdigest()[:12] in sampled) == (size <= SAMPLED * BLOCK)
        for place in {0, size - 1} if size else ():
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert file_sample(file) != sampled
        file.write_bytes(content + b"0")
        assert file_sample(file) != sampled
        file.write_bytes(content)
        assert file_sample(file) == sampled


@thorough
def test_a_search_by_processes_that_share_candidates_is_resumed_to_the_byte(tmp_path: Path) -> None:
    """One of two processes is killed; the other ends, and both go on from where they were."""
    four_heads(tmp_path)
    config = write_config(tmp_path, tasks=[CHOICE], search={"population": 6, "generations": 8})
    settings = ("--set", "evaluation.model=4")
    devices = (("JAX_NUM_CPU_DEVICES", "2"),)
    assert [code for code, _, _ in finish(start(config, tmp_path / "whole", 2, *settings, more=devices))] == [0, 0]
    killed = tmp_path / "killed"
    processes = start(config, killed, 2, *settings, more=devices)
    while processes[0].poll() is None and not ((killed / "history.jsonl").exists() and len(history(killed)) > 3):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait() == 1
    error = processes[0].read("stderr")
    assert "another process of this run has gone" in error and "--resume" in error and "Traceback" not in error
    ended = finish(start(config, killed, 2, *settings, "--resume", more=devices))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert (killed / "history.jsonl").read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()
