"""Inputs from strangers: what a hostile case is, and the server that runs each of them in a process of its own.

A case changes a folder of good inputs (`World`) and names a command. The command runs in a forked child of a process
that has imported everything once, so that a case costs a fraction of a second and still is a real process: its exit
status is what a shell would see, it may hang, be killed, or call `os._exit`.

The modules beside this one each hold a list `CASES`, by the kind of input.
"""

import atexit
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml


@dataclass(frozen=True)
class World:
    """A folder of good inputs: models `base`, `one`, `two`, `tasks.jsonl`, `recipe.yaml` (a TIES merge of them) and
    `config.yaml` (a search of one generation of four candidates)."""

    root: Path

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def write(self, name: str, document: Any) -> Path:
        """Write a text, bytes, or a document as YAML."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(document, bytes):
            path.write_bytes(document)
        else:
            text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
            path.write_text(text, encoding="utf-8")
        return path

    def edit(self, name: str, **changes: Any) -> None:
        """Set keys of a JSON or YAML mapping in place; the value `...` removes a key."""
        edit_keys(self.root / name, **changes)


def edit_keys(path: Path, /, **changes: Any) -> None:
    """`World.edit` of any file."""
    is_json = path.suffix == ".json"
    document = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
    kept = {key: value for key, value in (document | changes).items() if value is not ...}
    path.write_text(json.dumps(kept) if is_json else yaml.safe_dump(kept, sort_keys=False))


def changing(make: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Turn a function of a place (a world, a folder), and of more, into one of the rest alone, which returns what
    changes a place."""
    return lambda *arguments, **named: lambda *place: make(*place, *arguments, **named)


@changing
def together(place: Any, *changes: Callable[[Any], Any]) -> None:
    for one in changes:
        one(place)


@changing
def everywhere(world: World, /, **changes: Any) -> None:
    """The same in the config.json of all models, so that they do not refuse each other."""
    for model in ("base", "one", "two"):
        world.edit(f"{model}/config.json", **changes)


@changing
def edited(place: Any, name: str, /, **changes: Any) -> None:
    """Other keys in a file of a world or folder, as of `World.edit`."""
    edit_keys(place / name, **changes)


@changing
def instead(place: Any, name: str, make: Callable[[Path], Any]) -> None:
    """Something else where a file is, or might be."""
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)


@changing
def link(path: Path, to: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


def recipe(**changes: Any) -> dict[str, Any]:
    """The recipe of a world, with other top-level keys."""
    models = [{"model": name, "parameters": {"weight": 0.5, "density": 0.5}} for name in ("one", "two")]
    return {"merge_method": "ties", "base_model": "base", "models": models} | changes


def config(**changes: Any) -> dict[str, Any]:
    """The search config of a world, with other top-level keys."""
    return {
        "base": "base",
        "parents": ["one", "two"],
        "space": {"method": "ties", "parameters": {"weight": {"low": 0.0, "high": 1.0}, "density": {}}},
        "tasks": [{"name": "text", "kind": "likelihood", "file": "tasks.jsonl"}],
        "search": {"generations": 1, "population": 4},
    } | changes


SEARCH = ("search", "config.yaml", "--out", "run")
MERGE = ("merge", "recipe.yaml", "out")


@dataclass(frozen=True)
class Case:
    """One hostile input.

    `change`: makes it, in a world; may return a tuple, the arguments of the command in place of `command`.
    `says`: texts that the one line on stderr must contain. `leaves`: files and folders, by their path in the world,
    that may be there afterwards and were not before; `rewrites`: those that may be others afterwards, or gone; all else
    must be as it was, to the byte. `seconds`: the time by which the command has ended. `lines`: how many lines stderr
    may have (a user's traceback has more). `prints`: texts that stdout must contain. `imports`: modules that the
    server imports before it forks: what several cases would import, each for itself.
    """

    name: str
    change: Callable[[World], Any]
    says: tuple[str, ...] = ()
    command: tuple[str, ...] = SEARCH
    status: int = 2
    leaves: tuple[str, ...] = ()
    rewrites: tuple[str, ...] = ()
    seconds: float = 10.0
    lines: int = 1
    stdin: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    prints: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """How a command ended. `status` is negative for a signal, as with subprocess; None: it was killed for time."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Running:
    """A command that a server has started, to be watched and killed; as with subprocess.Popen."""

    server: "Server"
    pid: int
    streams: Path

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None: it runs."""
        status: int | None = self.server.ask({"poll": self.pid})["status"]
        return status

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """Its exit status once it has ended; raises subprocess.TimeoutExpired where it has not in time."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("evojax-merge", timeout)
            time.sleep(0.005)
        return status

    def read(self, name: str) -> str:
        """The text that it has written to `stdout` or `stderr`."""
        return (self.streams / name).read_text(errors="replace")


class Server:
    """A process that has imported the program, and forks a child for each command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hostile"],
            cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(
        self,
        arguments: Sequence[object],
        folder: Path,
        *,
        seconds: float,
        stdin: str = "",
        environment: Sequence[tuple[str, str]] = (),
        imports: Sequence[str] = (),
    ) -> Done:
        """Run `evojax-merge` with these arguments in `folder`; kill it after `seconds`."""
        request = self._request(self._folder, arguments, folder, stdin, environment)
        answer = self.ask(request | {"seconds": seconds, "imports": imports})
        streams = [(self._folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        return Done(answer["status"], *streams, answer["seconds"])

    def start(
        self, arguments: Sequence[object], folder: Path, *, environment: Sequence[tuple[str, str]] = ()
    ) -> Running:
        """Start `evojax-merge` with these arguments in `folder`, and do not wait for its end."""
        streams = Path(tempfile.mkdtemp(dir=self._folder))
        return Running(self, self.ask(self._request(streams, arguments, folder, "", environment))["pid"], streams)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The server process's answer to a request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    @staticmethod
    def _request(
        streams: Path, arguments: Sequence[object], folder: Path, stdin: str, environment: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        (streams / "stdin").write_text(stdin)
        return {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder), "streams": str(streams), "environment": {**os.environ, **dict(environment)},
        }  # fmt: skip

    def seconds(self) -> float:
        """Processor time that the server and its children have taken; 0 where Linux does not tell."""
        status = Path(f"/proc/{self._process.pid}/stat")
        if not status.exists():
            return 0.0
        return sum(map(int, status.read_text().rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.communicate()


@cache
def shared_server() -> Server:
    """The one server of this test process."""
    folder = Path(tempfile.mkdtemp(prefix="server."))
    server = Server(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.close)
    return server


def server_seconds() -> float:
    """Processor time of this test process's server, if it has one."""
    return shared_server().seconds() if shared_server.cache_info().currsize else 0.0


def run_command(
    *arguments: object, folder: Path | None = None, seconds: float = 300, status: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """`evojax-merge` with these arguments as `subprocess.run` would give it, but forked, in today's environment. It
    must end with `status`, where that is one."""
    done = shared_server().run(arguments, folder or Path.cwd(), seconds=seconds)
    if done.status is None:
        raise subprocess.TimeoutExpired(["evojax-merge", *map(str, arguments)], seconds, done.stdout, done.stderr)
    assert status in (None, done.status), (done.status, done.stdout, done.stderr)
    return subprocess.CompletedProcess(["evojax-merge", *arguments], done.status, done.stdout, done.stderr)


def start_command(
    *arguments: object, folder: Path | None = None, environment: Sequence[tuple[str, str]] = ()
) -> Running:
    """As `run_command`, for a command that is to be watched, and killed. Not while it imports: it has."""
    return shared_server().start(arguments, folder or Path.cwd(), environment=environment)


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A program as `python -c` would run it, but forked from a process that has imported evojax_merge; `options`: those
    of `run_command`."""
    return run_command("-c", code, *arguments, **options)


def run_script(script: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A script as `python script` would run it, but forked as in `run_python`."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return run_python(code, script, *arguments, **options)


def serve() -> None:
    """Answer requests, one JSON line each, until standard input ends. One with a number of seconds is a command that is
    waited for, one without is started, and `poll` asks for the status of one that was."""
    # What every child needs, what transformers imports when it is first asked for it, and what a search imports late.
    import altair  # noqa: F401
    import huggingface_hub.serialization  # noqa: F401
    import optax  # noqa: F401
    import scipy.linalg  # noqa: F401
    from orbax.checkpoint import v1  # noqa: F401
    from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast  # noqa: F401

    import evojax_merge.api.models  # noqa: F401
    from evojax_merge.errors import InputError
    from evojax_merge.search import checkpoints
    from evojax_merge.system.jax_environment import check_environment

    # Searches of tests take milliseconds a generation, of which a search leaves out most checkpoints.
    checkpoints.SAVING_SHARE = 1.0
    _import_evosax()
    with suppress(ImportError):
        import lm_eval.tasks  # noqa: F401
    # No child looks through all of this for garbage, which would copy every page of it.
    gc.collect()
    gc.freeze()
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            child = request["poll"]
            status = ended[child] if child in ended else _poll(child)
            if status is not None:
                ended[child] = status
            print(json.dumps({"status": status}), flush=True)
            continue
        for name in request.get("imports", ()):
            importlib.import_module(name)
        # A child forks a process that tries its flags: those that were tried here need none.
        with suppress(InputError), patch.dict(os.environ, XLA_FLAGS=request["environment"].get("XLA_FLAGS", "")):
            check_environment()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _become(request)
        if "seconds" not in request:
            print(json.dumps({"pid": child}), flush=True)
            continue
        status = _wait(child, started + request["seconds"])
        print(json.dumps({"status": status, "seconds": time.monotonic() - started}), flush=True)


def _import_evosax() -> None:
    """evosax has one array at the top of a module, for which JAX would start threads that a forked child is without."""
    import jax
    import numpy as np

    asarray, jax.numpy.asarray = jax.numpy.asarray, np.asarray
    try:
        import evosax.algorithms  # noqa: F401
    finally:
        jax.numpy.asarray = asarray


def _poll(child: int) -> int | None:
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _wait(child: int, deadline: float) -> int | None:
    while time.monotonic() < deadline:
        status = _poll(child)
        if status is not None:
            return status
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _become(request: dict[str, Any]) -> None:
    """Turn a forked child into the command line."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams = Path(request["streams"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        handle = os.open(streams / name, flags, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(request["folder"])
    import jax

    os.environ.clear()
    os.environ.update(request["environment"])
    # JAX reads these when it is imported: each command compiles as the module that runs it (tests/conftest.py).
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS"))
    jax.config.update("jax_disable_most_optimizations", os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1")
    jax.config.update("jax_num_cpu_devices", int(os.environ.get("JAX_NUM_CPU_DEVICES", "-1")))
    first, *rest = request["arguments"] or [""]
    try:
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = ["evojax-merge", *request["arguments"]]
            from evojax_merge.cli import main

            main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def snapshot(root: Path) -> dict[str, str]:
    """Everything below a folder: a file's digest, a link's target, or `folder`."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file() and path.stat().st_size > 2**30:
            found[name] = f"{path.stat().st_size} bytes"  # A sparse file: reading it would take the memory.
        elif path.is_file():
            found[name] = sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def check(case: Case, world: World, server: Server) -> Done:
    """Make the case, run it, and assert that it ended as a user can rely on."""
    changed = case.change(world)
    arguments = changed if isinstance(changed, tuple) else case.command
    before = snapshot(world.root)
    done = server.run(
        arguments, world.root, seconds=3 * case.seconds, stdin=case.stdin, environment=case.environment,
        imports=case.imports,
    )  # fmt: skip
    shown = f"status {done.status} after {done.seconds:.1f} s\nstdout: {done.stdout[-2000:]}\nstderr: {done.stderr}"
    assert done.status == case.status, shown
    assert done.seconds < case.seconds, shown
    if case.status == 2:
        assert "Traceback" not in done.stderr, shown
        lines = done.stderr.splitlines()
        assert len(lines) == case.lines and lines[-1].startswith("error: ") and len(lines[-1]) < 2000, shown
    for text in case.says:
        assert text in done.stderr, f"{text!r} is not in: {shown}"
    for text in case.prints:
        assert text in done.stdout, f"{text!r} is not in: {shown}"
    after = snapshot(world.root)
    new, other = set(after) - set(before), {name for name in before if before[name] != after.get(name)}
    new = {name for name in new if not any(_within(name, allowed) for allowed in (*case.leaves, *case.rewrites))}
    other = {name for name in other if not any(_within(name, allowed) for allowed in case.rewrites)}
    assert not new and not other, f"left: {sorted(new)}; changed or gone: {sorted(other)}\n{shown}"
    return done


def _within(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}/")


def build_world(root: Path, family: Any) -> World:
    """A world with models, tasks, a recipe and a config that are right. `family`: helpers.families.build_family."""
    for name, path in zip(("base", "one", "two"), (family.base, *family.parents), strict=True):
        shutil.copytree(path, root / name)
    shutil.copyfile(family.tasks, root / "tasks.jsonl")
    world = World(root)
    world.write("recipe.yaml", recipe())
    world.write("config.yaml", config())
    return world
