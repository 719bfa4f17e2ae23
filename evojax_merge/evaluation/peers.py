"""The other processes of a run: their versions and files have to be this process's, and their loss ends it."""

import ctypes
import json
import os
import signal
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax._src import distributed

from evojax_merge.errors import InputError, PeerLostError
from evojax_merge.version import __version__

# Milliseconds that a process waits for another's text: it may read terabytes before.
PATIENCE = 12 * 3600 * 1000
ABORTED = (
    "error: JAX has ended this process, most likely because another process of this run has gone; go on with --resume "
    "(TF_CPP_MIN_LOG_LEVEL=2 shows JAX's own words)\n"
)

_exchanges = count()
# Kept for as long as the process lives: the system calls it.
_handlers: list[Any] = []


def exchange(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of all processes, in their order. All of them call this in the same order."""
    if jax.process_count() == 1:
        return [dict(document)]
    # Needs no devices, and so no program that all versions agree about. JAX has no public name for it.
    client, number = distributed.global_state.client, next(_exchanges)
    assert client is not None
    try:
        client.key_value_set(f"evojax-merge/{number}/{jax.process_index()}", json.dumps(document))
        keys = [f"evojax-merge/{number}/{process}" for process in range(jax.process_count())]
        return [json.loads(client.blocking_key_value_get(key, PATIENCE)) for key in keys]
    except jax.errors.JaxRuntimeError:
        raise PeerLostError from None


def check_versions() -> None:
    """Raises InputError, in every process, where two of them run different versions."""
    versions = {"evojax-merge": __version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    compare_versions(exchange({"host": socket.gethostname(), "versions": versions}))


def compare_versions(processes: Sequence[Mapping[str, Any]]) -> None:
    first = processes[0]
    for number, other in enumerate(processes):
        for package, version in first["versions"].items():
            theirs = other["versions"].get(package)
            if theirs != version:
                raise InputError(
                    "--distributed",
                    f"{package} is {theirs} in process {number} ({other['host']}), but {version} in process 0 "
                    f"({first['host']}); expected one version in all processes",
                )


def check_files(hashes: Mapping[str, str]) -> None:
    """Raises InputError, in every process, where two of them read different files. hashes: by path, of all files that
    scores depend on; hosts may have them in different folders."""
    compare_files(exchange({"host": socket.gethostname(), "files": dict(hashes)}))


def compare_files(processes: Sequence[Mapping[str, Any]]) -> None:
    first = processes[0]
    for number, other in enumerate(processes):
        for one, place, without, absent in ((other, number, first, 0), (first, 0, other, number)):
            path = _missing_file(one["files"], without["files"])
            if path is not None:
                raise InputError(
                    "--distributed",
                    f"{path} of process {place} ({one['host']}) has sha256 {one['files'][path][:12]}…, and no file of "
                    f"that name in process {absent} ({without['host']}) has; expected the same files on every host",
                )


def _missing_file(files: Mapping[str, str], others: Mapping[str, str]) -> str | None:
    """The first file that has no equal of its name among the others; of several with one name, the one whose folder's
    name has none either."""
    missing = Counter((Path(path).name, digest) for path, digest in files.items())
    missing -= Counter((Path(path).name, digest) for path, digest in others.items())
    paths = [path for path, digest in files.items() if (Path(path).name, digest) in missing]
    placed = {(Path(path).parts[-2:], digest) for path, digest in others.items()}
    return next((path for path in paths if (Path(path).parts[-2:], files[path]) not in placed), next(iter(paths), None))


def report_aborts() -> None:
    """Have this process end with a line and exit status 1 where JAX aborts it, as it does once it misses another
    process in a thread of its own, where Python can raise nothing."""

    def end(number: int) -> None:
        os.write(2, ABORTED.encode())
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    _handlers.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
