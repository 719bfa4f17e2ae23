"""What a process may still take of the host's memory, on faked /proc and /sys trees, and models that do not fit."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import refusal
from helpers.families import Family
from helpers.files import write_yaml
from helpers.searches import search_config

from evojax_merge.evaluation.memory import available_memory, is_out_of_memory

FREE = 8 * 2**30
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A /proc with 8 GiB available, in no control group; an empty /sys/fs/cgroup beside it."""
    write(tmp_path / "proc/meminfo", f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable:   {FREE // 1024} kB\n")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def available(machine: Path) -> int:
    return available_memory(machine / "proc", machine / "cgroup")


def group(machine: Path, membership: str, **files: object) -> None:
    """Put the process into control groups, and write files below the mount (`__` for `/`, `_dot_` for `.`)."""
    write(machine / "proc/self/cgroup", membership)
    for name, value in files.items():
        write(machine / "cgroup" / name.replace("__", "/").replace("_dot_", "."), f"{value}\n")


def test_without_limits_it_is_what_the_machine_has(machine: Path) -> None:
    assert available(machine) == FREE


def test_a_container_of_version_2(machine: Path) -> None:
    """Its own group is the root of what it sees. Cached files are no use of memory that the kernel would kill for."""
    group(machine, "0::/\n", memory_dot_max=500 * 2**20, memory_dot_high="max", memory_dot_current=300 * 2**20,
          memory_dot_stat=f"anon 5\ninactive_file {100 * 2**20}\nactive_file 7")  # fmt: skip
    assert available(machine) == 300 * 2**20


def test_the_softer_limit_counts_too(machine: Path) -> None:
    group(machine, "0::/\n", memory_dot_max=500, memory_dot_high=400, memory_dot_current=100)
    assert available(machine) == 300


def test_the_tightest_group_above_counts(machine: Path) -> None:
    group(machine, "0::/user.slice/job\n", user_dot_slice__memory_dot_max=1000, user_dot_slice__memory_dot_current=900,
          user_dot_slice__job__memory_dot_max=500, user_dot_slice__job__memory_dot_current=200)  # fmt: skip
    assert available(machine) == 100


def test_a_group_that_the_container_does_not_see(machine: Path) -> None:
    group(machine, "0::/../../elsewhere\n", memory_dot_max=700, memory_dot_current=100)
    assert available(machine) == 600


def test_version_1(machine: Path) -> None:
    group(machine, "12:cpu,cpuacct:/x\n5:memory:/docker/abc\n0::/\n", memory__memory_dot_limit_in_bytes=UNLIMITED_V1,
          memory__memory_dot_usage_in_bytes=5, memory__docker__abc__memory_dot_limit_in_bytes=900,
          memory__docker__abc__memory_dot_usage_in_bytes=400,
          memory__docker__abc__memory_dot_stat="cache 9\ntotal_inactive_file 150")  # fmt: skip
    assert available(machine) == 650
    # In a container of version 1 the path is the host's, and the files lie at the root.
    group(machine, "5:memory:/docker/of-the-host\n", memory__memory_dot_limit_in_bytes=80,
          memory__memory_dot_usage_in_bytes=30)  # fmt: skip
    assert available(machine) == 50


def test_a_group_beyond_its_limit_leaves_nothing(machine: Path) -> None:
    group(machine, "0::/\n", memory_dot_max=100, memory_dot_current=200)
    assert available(machine) == 0


@pytest.mark.parametrize("text", ["", "nonsense", "0::", "1:memory", "\0", "0::/" + "x" * 300])
def test_what_cannot_be_read_is_no_limit(machine: Path, text: str) -> None:
    write(machine / "proc/self/cgroup", text)
    write(machine / "cgroup/memory.max", "a lot")
    assert available(machine) == FREE


def test_an_address_space_that_is_limited(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = resource.getpagesize()
    write(machine / "proc/self/statm", "1000 5 5 5 0 5 0\n")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1500 * page, resource.RLIM_INFINITY))
    assert available(machine) == 500 * page


def test_the_limit_of_a_real_process() -> None:
    program = (
        "import resource\nfrom evojax_merge.evaluation.memory import available_memory\n"
        "before = available_memory()\nresource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "print(0 < available_memory() < min(before, 2**30))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True), (RuntimeError("INTERNAL: YNNPACK operation failed"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: allocating 5 bytes"), True), (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Out of memory"), True), (ValueError("shapes differ"), False),
    ],
)  # fmt: skip
def test_what_says_that_memory_has_run_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_models_that_do_not_fit_are_refused_before_they_are_loaded(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evojax_merge.commands import search
    from evojax_merge.steps import stored_models

    task = {"name": "text", "kind": "likelihood", "file": str(family.tasks)}
    space = {"method": "dare_ties", "parameters": {"weight": {}, "density": {}}}
    config = write_yaml(tmp_path / "config.yaml", search_config(family, 1, space=space, tasks=[task]))
    size = (family.base / "model.safetensors").stat().st_size
    # Random masks are hashed where a layer is merged: nothing is held but the models.
    for arguments, what, least in (
        (["search", config, "--out", tmp_path / "run"], "holding 3 models", 2.9),
        (["evaluate", family.base, "--tasks", config], "the model", 0.9),
    ):
        for module in (search, stored_models):
            monkeypatch.setattr(module, "unused_memory", lambda least=least: int(least * size))
        line = refusal(*arguments)
        assert f"{what} takes " in line and "of memory, but" in line, line
        assert not (tmp_path / "run").exists()
