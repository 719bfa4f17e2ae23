"""The environment of a run, `environment.json`: the versions, devices and machine of every process that worked on it.

Nothing that must be the same to the byte depends on this file. It says what differs where a run is not reproduced.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from evojax_merge.errors import Failed, InputError, printable, shown, without_secrets
from evojax_merge.evaluation.compilations import compilations
from evojax_merge.evaluation.targets import processor_name
from evojax_merge.search.run_log import begin_logs
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import A_FILE, MAX_DOCUMENT, Environment, parse
from evojax_merge.system.file_system import atomic_write
from evojax_merge.system.regular_file import read_regular
from evojax_merge.version import __version__

PACKAGES = ("jax", "jaxlib", "numpy", "evosax", "transformers")
# Environment variables that change the programs that XLA compiles.
VARIABLES = (
    "JAX_DEFAULT_MATMUL_PRECISION", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_ENABLE_X64", "JAX_PLATFORMS",
    "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "XLA_FLAGS",
)  # fmt: skip
# The keys of a session that say when it ran and how it was started, and not in which environment.
OCCASION = ("command", "started", "ended", "seconds", "compiled")


def environment() -> dict[str, Any]:
    """This process's environment, as a JSON document."""
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version(), "evojax-merge": __version__}
        | {name: _version(name) for name in PACKAGES},
        "commit": _commit(Path(__file__).resolve().parents[2]),
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        # The runtime of an accelerator (CUDA, libtpu), and the version of NVIDIA's kernel module.
        "runtime": " ".join(devices[0].client.platform_version.split()),
        "driver": _first_line(Path("/proc/driver/nvidia/version")),
        "processes": jax.process_count(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


@contextmanager
def recorded_session(folder: RunFolder) -> Iterator[None]:
    """Append this process's environment, command, start and end to the sessions of a run, whose log begins. A session
    whose process was killed has no end."""
    sessions, began, compiled_before = read_sessions(folder), time.monotonic(), compilations()
    command = without_secrets(shlex.join(sys.argv))
    session = {"command": command, "started": _now(), "ended": None, "seconds": None} | environment()
    _write(folder, [*sessions, session])
    begin_logs()
    try:
        yield
    finally:
        compiled = compilations() - compiled_before
        session |= {
            "ended": _now(), "seconds": round(time.monotonic() - began, 3),
            "compiled": {"programs": compiled.compiled, "seconds": round(compiled.seconds, 3), "kept": compiled.kept},
        }  # fmt: skip
        # A full disk has its own message already.
        with suppress(Failed, InputError):
            _write(folder, [*sessions, session])


def read_sessions(folder: RunFolder) -> list[dict[str, Any]]:
    """The sessions of a run in their order; none where the file is missing or damaged."""
    if not folder.environment.is_file():
        return []
    try:
        return parse(Environment, read_regular(folder.environment, A_FILE, MAX_DOCUMENT))[0].sessions
    except (OSError, ValueError):
        return []


def differences(recorded: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A printable line for each part of two environments that differs."""
    before, now = (dict(_flat({key: part for key, part in session.items() if key not in OCCASION}))
                   for session in (recorded, current))  # fmt: skip
    return [
        printable(f"{name}: {_shown(before.get(name))} then, {_shown(now.get(name))} now")
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _flat(session: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in session.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", part) for key, part in value.items())
        else:
            yield name, value


def _shown(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else shown(value)


def _write(folder: RunFolder, sessions: list[dict[str, Any]]) -> None:
    atomic_write(folder.environment, json.dumps({"sessions": sessions}, indent=1, ensure_ascii=False) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    """The commit of a git checkout, with `-dirty` where tracked files differ from it; None where it is none."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _first_line(file: Path) -> str | None:
    try:
        return " ".join(file.read_text(encoding="utf-8", errors="replace").partition("\n")[0].split())
    except OSError:
        return None
