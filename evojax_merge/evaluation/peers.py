"""The other processes of a run: they search the same, with the same files and versions, and their loss ends it."""

import ctypes
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax._src import distributed

from evojax_merge.errors import InputError, PeerLostError, first_line
from evojax_merge.evaluation.launching import ARRIVAL
from evojax_merge.system import interrupts
from evojax_merge.version import __version__

# Seconds that a process waits for another: which may read terabytes before; and where all have come as far already.
PATIENCE, MEETING = 12 * 3600.0, 60.0
# Milliseconds after which a process that waits looks whether another has ended; and where the ended ones say why.
LOOK_EVERY, FAILED = 1000, "evojax-merge/failed"
# Seconds within which every host sees a new file of a shared folder, and the first and longest of the waits between two
# looks.
SEEN_WITHIN, LOOKS = 3.0, (0.01, 0.5)
# Seconds by which clocks of hosts may differ: budgets, votes and timings are read off them.
CLOCKS = 60.0
# Lines for a process that JAX aborts: while the processes come together, and afterwards.
NOT_COME = (
    f"error: --distributed: not all processes of this run have come within {ARRIVAL:g} s, or two have one number; see "
    "what the others say, and start all again\n"
)
ABORTED = (
    "error: JAX has ended this process, most likely because another process of this run has gone; go on with --resume "
    "(TF_CPP_MIN_LOG_LEVEL=2 shows JAX's own words)\n"
)

_exchanges = count()
# The hosts of all processes, once they have met.
_hosts: list[str] = []
# Kept for as long as the process lives: the system calls it.
_handlers: list[Any] = []


def exchange(document: Mapping[str, Any], what: str, seconds: float = PATIENCE) -> list[dict[str, Any]]:
    """The documents of all processes, in their order. All of them call this in the same order. Raises PeerLostError
    where another process is gone, or has not come to `what` after so many seconds."""
    if jax.process_count() == 1:
        return [dict(document)]
    # Needs no devices, and so no program that all versions agree about. JAX has no public name for it.
    client, number = distributed.global_state.client, next(_exchanges)
    assert client is not None
    until = time.monotonic() + seconds
    try:
        client.key_value_set(f"evojax-merge/{number}/{jax.process_index()}", json.dumps(document))
        return [_awaited(client, number, process, what, seconds, until) for process in range(jax.process_count())]
    except jax.errors.JaxRuntimeError:
        raise PeerLostError from None


def _awaited(client: Any, number: int, process: int, what: str, seconds: float, until: float) -> dict[str, Any]:
    """The document of a process. Raises the error with which a process has ended meanwhile."""
    while True:
        try:
            document: dict[str, Any] = json.loads(
                client.blocking_key_value_get(f"evojax-merge/{number}/{process}", LOOK_EVERY)
            )
            return document
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        for _, text in client.key_value_dir_get(FAILED):
            failure = json.loads(text)
            line = f"process {failure['process']} ({failure['host']}) has ended: {failure['error']}"
            raise InputError("--distributed", line) if failure["is_input"] else PeerLostError(line)
        if time.monotonic() > until:
            raise PeerLostError(
                f"process {process} of this run has not come to {what} within {seconds:g} s; see what it says, stop "
                "all processes, and start them again"
            )


@contextmanager
def telling_peers() -> Iterator[None]:
    """Encloses the work of a run. The other processes hear of an error that ends it, instead of waiting."""
    try:
        yield
    except Exception as error:
        client = distributed.global_state.client
        if client is not None and not isinstance(error, PeerLostError):
            failure = {
                "process": jax.process_index(), "host": socket.gethostname(), "error": first_line(error),
                "is_input": isinstance(error, InputError),
            }  # fmt: skip
            with suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(f"{FAILED}/{jax.process_index()}", json.dumps(failure))
                until = time.monotonic() + 2 * LOOK_EVERY / 1000
                # The others' connection ends with the first process: it stays until all have ended for their part.
                while (
                    jax.process_index() == 0
                    and len(client.key_value_dir_get(FAILED)) < jax.process_count()
                    and time.monotonic() < until
                ):
                    time.sleep(LOOKS[0])
        raise


def check_versions() -> None:
    """Raises InputError, in every process, where two of them run different versions."""
    versions = {"evojax-merge": __version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    processes = _exchange_values(versions, "the comparison of versions")
    _hosts.extend(each["host"] for each in processes)
    compare(processes, "expected one version in all processes")


def processes_on_host() -> int:
    """The number of this run's processes on this host."""
    return max(1, _hosts.count(socket.gethostname()))


def check_agreement(config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises InputError, in every process, where two of them were given other values of a config's keys or other
    options, have other kinds or numbers of devices, or other clocks. Absolute paths of a config count by their last
    name: hosts may have models in different folders."""
    if jax.process_count() == 1:
        return
    devices = {"devices": jax.local_device_count(), "kind of devices": jax.local_devices()[0].device_kind}
    values = dict(_flat(config)) | dict(options) | devices
    compare(_exchange_values(values, "the comparison of configs"), "expected the same in all processes")
    # All have just met: what their clocks differ by is not the time that one has waited.
    clocks = exchange({"host": socket.gethostname(), "clock": time.time()}, "the comparison of clocks", MEETING)
    for number, other in enumerate(clocks):
        ahead = other["clock"] - clocks[0]["clock"]
        if abs(ahead) > CLOCKS:
            raise InputError(
                "--distributed",
                f"the clock of process {number} ({other['host']}) is {abs(ahead):,.0f} s "
                f"{'ahead of' if ahead > 0 else 'behind'} that of process 0 ({clocks[0]['host']}); expected clocks "
                f"within {CLOCKS:g} s of each other",
            )


def _exchange_values(values: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    return exchange({"host": socket.gethostname(), "values": dict(values)}, what, MEETING)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a document with dots, and their values."""
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if entries is None:
        yield key, Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
        return
    for name, entry in entries:
        yield from _flat(entry, f"{key}[{name}]" if isinstance(value, list) else f"{key}.{name}".lstrip("."))


def compare(processes: Sequence[Mapping[str, Any]], expected: str) -> None:
    """Raises InputError for the first of the `values` of a process that is not that of process 0. expected: what should
    be, in words."""
    first = processes[0]
    for number, other in enumerate(processes):
        for name in [*first["values"], *(name for name in other["values"] if name not in first["values"])]:
            ours, theirs = (_text(each["values"], name) for each in (first, other))
            if theirs != ours:
                raise InputError(
                    "--distributed",
                    f"{name} is {theirs} in process {number} ({other['host']}), but {ours} in process 0 "
                    f"({first['host']}); {expected}",
                )


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name, "missing")
    return value if isinstance(value, str) else json.dumps(value)


def check_shared_folder(folder: Path, mark: Callable[[], bytes | None]) -> None:
    """Raises InputError, in every process, where one of them does not see the run folder that process 0 has opened.
    mark: reads what process 0 has written into it."""
    if jax.process_count() == 1:
        return

    def text() -> str:
        return (mark() or b"").decode(errors="replace")

    # A host that looked before there is a file may remember that there is none.
    mine = {"mark": text()} if jax.process_index() == 0 else {}
    written = exchange(mine, "the opening of the run folder", MEETING)[0]["mark"]
    # File systems of a network may show a new file after some seconds.
    until, (wait, longest) = time.monotonic() + SEEN_WITHIN, LOOKS
    while not (sees := text() == written) and time.monotonic() < until:
        time.sleep(wait)
        wait = min(2 * wait, longest)
    hosts = exchange({"host": socket.gethostname(), "sees": sees}, "the look at the run folder", MEETING)
    for number, other in enumerate(hosts):
        if not other["sees"]:
            raise InputError(
                folder, f"process {number} ({other['host']}) does not see this run folder, which process 0 "
                f"({hosts[0]['host']}) has opened; expected one folder, on a disk that all hosts share",
            )  # fmt: skip


def check_samples(samples: Mapping[str, str]) -> None:
    """Raises InputError, in every process, where two of them have files that a look at some of their bytes tells apart.
    samples: by the files' names, of those that lie on this host; files that a host does not name are not compared."""
    if jax.process_count() == 1:
        return
    processes = _exchange_values(samples, "the comparison of models")
    names = [name for name in processes[0]["values"] if all(name in each["values"] for each in processes)]
    shared = [{**each, "values": {name: each["values"][name] for name in names}} for each in processes]
    compare(shared, "expected the same files on every host")


def check_files(hashes: Mapping[str, str]) -> None:
    """Raises InputError, in every process, where two of them read different files. hashes: by path, of all files that
    scores depend on; hosts may have them in different folders."""
    processes = exchange({"host": socket.gethostname(), "files": dict(hashes)}, "the comparison of files")
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


def report_aborts(line: str, status: int) -> None:
    """Have this process end with a line and an exit status where JAX aborts it, as it does once it misses another
    process, where Python can raise nothing; as interrupted where a signal has come to all of them."""

    def end(number: int) -> None:
        if interrupts.has_come():
            os.write(2, b"interrupted\n")
            os._exit(interrupts.INTERRUPTED)
        os.write(2, line.encode())
        os._exit(status)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    _handlers.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
